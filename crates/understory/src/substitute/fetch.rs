//! One path: its archive from a substituter into the sink, or from the next one.

use super::Sink;
use super::files::Context;
use super::find::{Candidate, Finder};
use super::source::{FetchError, Progress};
use crate::daemon::Activity;
use crate::{Error, Result, metrics};
use std::sync::atomic::{AtomicU64, Ordering};
use understory_nix::worker::{ActivityType, Field, Verbosity};
use understory_nix::{ContentAddress, StoreDir};

/// Where Nix says that a path is copied to.
const HERE: &str = "local";

/// What became of it.
pub(super) enum Fetched<C> {
    /// Stored, by this candidate.
    Stored(Candidate, C),
    /// Another substituter has it, but with other references, which are to be had first.
    Other(Candidate),
    /// Nobody can provide it.
    Failed(Error),
}

/// Fetches a path.
///
/// # Errors
/// Interrupted.
pub(super) fn fetch<S: Sink>(
    candidate: &Candidate,
    ca: Option<&ContentAddress>,
    finder: &Finder<'_>,
    store_dir: &StoreDir,
    parent: u64,
    sink: &S,
    context: Context<'_>,
) -> Result<Fetched<S::Content>> {
    let mut candidate = candidate.clone();
    loop {
        let error = match attempt(&candidate, store_dir, parent, sink, context) {
            Ok(content) => return Ok(Fetched::Stored(candidate, content)),
            Err(error) => error,
        };
        context.cancel.check()?;
        metrics::substitution_failed();
        let path = &candidate.info.path;
        let opened = &candidate.opened;
        let error = match error {
            FetchError::Cancelled => return Err(super::cancel::interrupted()),
            FetchError::Gone => {
                opened
                    .substituter
                    .source
                    .forget(&opened.about, &candidate.found.info.path);
                let url = candidate.found.file.as_ref().map_or("", |file| &file.url);
                Error::environment(format!(
                    "file '{url}' does not exist in binary cache '{}'",
                    opened.substituter.name
                ))
            }
            FetchError::Failed { error, unreachable } => {
                opened
                    .substituter
                    .source
                    .forget(&opened.about, &candidate.found.info.path);
                if unreachable {
                    opened.substituter.disable(&error, context);
                }
                let text = format!(
                    "cannot substitute path '{}' from '{}': {}",
                    store_dir.print(path),
                    opened.substituter.name,
                    error.chain()
                );
                let out = Error::new(error.kind(), text);
                match error.hint() {
                    Some(hint) => out.with_hint(hint),
                    None => out,
                }
            }
        };
        let Some(next) = finder.next(path, ca, candidate.rank, context)? else {
            return Ok(Fetched::Failed(error));
        };
        context.warn(&format!(
            "{error}; trying '{}'",
            next.opened.substituter.name
        ));
        if !next.info.references.is_subset(&candidate.info.references) {
            return Ok(Fetched::Other(next));
        }
        candidate = next;
    }
}

fn attempt<S: Sink>(
    candidate: &Candidate,
    store_dir: &StoreDir,
    parent: u64,
    sink: &S,
    context: Context<'_>,
) -> Result<S::Content, FetchError> {
    let info = &candidate.info;
    let from = &candidate.opened.substituter.name;
    let path = store_dir.print(&info.path);
    let text = |text: &str| Field::Text(text.as_bytes().to_vec());
    let substitute = Activity::start(
        context.reporter,
        Verbosity::Info,
        ActivityType::Substitute,
        "",
        vec![text(&path), text(from)],
        parent,
    );
    let copy = Activity::start(
        context.reporter,
        Verbosity::Info,
        ActivityType::CopyPath,
        &format!("copying path '{path}' from '{from}'"),
        vec![text(&path), text(from), text(HERE)],
        substitute.id(),
    );
    let nar_bytes = AtomicU64::new(0);
    let file_bytes = AtomicU64::new(0);
    let progress = Progress {
        copy: &copy,
        nar_bytes: &nar_bytes,
        file_bytes: &file_bytes,
    };
    copy.progress(0, info.nar_size, 0, 0);
    let mut content = None;
    candidate.opened.substituter.source.fetch(
        &candidate.found,
        progress,
        context,
        &mut |archive| {
            nar_bytes.store(0, Ordering::Relaxed);
            content = Some(sink.receive(info, archive, &nar_bytes, context.reporter)?);
            Ok(())
        },
    )?;
    copy.progress(info.nar_size, info.nar_size, 0, 0);
    metrics::substituted(info.nar_size, file_bytes.load(Ordering::Relaxed));
    content.ok_or_else(|| FetchError::Failed {
        error: Error::internal("a substituter gave no archive"),
        unreachable: false,
    })
}
