//! Opening an overlay store: directories, database, mount check, identity of the lowers, leftovers of a crash.
//!
//! What is known of the lowers at an open is noted in the upper's database (`lowers`: identity and generation of each)
//! and compared at the next one. A lower may only grow. What counts in the end is whether it still has what U relies on:
//! rows whose object is not in the upper must be valid below, and after a replacement or a step back the infos must
//! agree, too. Where nothing is missing, another identity is recorded with a warning.
//!
//! Cost: one scan of U's paths, one listing of the upper directory, one bulk query to each lower for the rows between.

use super::merged::{Merged, is_there};
use super::{Inner, Lower, Options, Overlay};
use crate::local::{Database, LocalPaths, OpenMode};
use crate::store::Observer;
use crate::substitute::Substituters;
use crate::{Error, Result};
use serde::{Deserialize, Serialize};
use std::collections::HashSet;
use std::path::Path;
use std::sync::{Arc, Weak};
use understory_nix::StorePath;

/// The note that says which lowers there were.
const LOWERS_NOTE: &str = "lowers";
/// Directory of the state directory that holds what only we know: caches, and the file below.
const OURS: &str = "understory";
/// A file in it, made by the user: go on without what the lowers lost. Removed when it was heeded.
const ACCEPT_LOSS: &str = "accept-lower-loss";
/// Paths that an error names; of more the number is said.
const NAMED_MAX: usize = 5;

impl Overlay {
    /// Opens the store, and makes what is missing of its state. The overlayfs must be mounted.
    ///
    /// # Errors
    /// No lower; store directories differ; a wrong mount, and what is wrong; a lower that was replaced, went back to an
    /// older state or lost paths that U relies on: all with hints.
    pub fn open(options: Options) -> Result<Self> {
        let Options {
            local,
            upper,
            lowers,
            check_mount,
            remount,
            settings,
            builder,
        } = options;
        check_layers(&local, &upper, &lowers)?;
        let upper = std::fs::canonicalize(&upper).map_err(|e| Error::io("resolving", &upper, e))?;
        let merged = Merged::open(&local, &upper, &lowers, remount, check_mount)?;
        local.create()?;
        let db = Database::open(&local.state, &local.store_dir, OpenMode::ReadWrite)?;
        let ours = local.state.join(OURS);
        std::fs::create_dir_all(&ours).map_err(|e| Error::io("creating", &ours, e))?;
        check_lowers(&db, &local, &upper, &lowers, &ours.join(ACCEPT_LOSS))?;
        let substituters = Arc::new(Substituters::new(&settings, &local.store_dir, &ours)?);
        let overlay = Self {
            inner: Arc::new(Inner {
                local,
                db,
                upper,
                lowers,
                merged,
                settings,
                substituters,
                builder,
                hashes: std::sync::Mutex::default(),
            }),
        };
        overlay.remove_whiteouts()?;
        if let Err(error) = overlay.inner.merged.remount_if_due() {
            tracing::warn!("{}", error.chain());
        }
        for lower in &overlay.inner.lowers {
            if let Some(store) = lower.castore() {
                store.observe(Arc::new(ShowPublished(Arc::downgrade(&overlay.inner))));
                if !store.is_read_only() {
                    store.register_overlay(overlay.local())?;
                }
            }
        }
        Ok(overlay)
    }
}

/// Makes what is published in a castore below visible before the publication returns.
struct ShowPublished(Weak<Inner>);

impl Observer for ShowPublished {
    fn published(&self, paths: &[StorePath]) {
        let Some(inner) = self.0.upgrade() else {
            return;
        };
        if let Err(error) = inner.merged.show(paths) {
            tracing::warn!("{}", error.chain());
        }
    }
    fn deleted(&self, _paths: &[StorePath]) {}
}

fn check_layers(local: &LocalPaths, upper: &Path, lowers: &[Arc<dyn Lower>]) -> Result<()> {
    if lowers.is_empty() {
        return Err(Error::user("an overlay store needs a lower store")
            .with_hint("name it with `lower-store`; its value must be percent-encoded in a URL"));
    }
    for lower in lowers {
        if *lower.store_dir() != local.store_dir {
            return Err(Error::user(format!(
                "the lower store {} has the store directory {}, expected {} as the overlay store has",
                lower.describe(),
                lower.store_dir().as_str(),
                local.store_dir.as_str()
            )));
        }
    }
    if upper.as_os_str().is_empty() {
        return Err(Error::user("the overlay store has no upper directory")
            .with_hint("name it with `upper-layer`: the `upperdir` of the overlayfs"));
    }
    let found = std::fs::metadata(upper).map_err(|e| {
        Error::io("examining the upper directory", upper, e)
            .with_hint("`upper-layer` is the `upperdir` of the overlayfs")
    })?;
    if !found.is_dir() {
        return Err(Error::user(format!(
            "the upper directory {} is not a directory",
            upper.display()
        )));
    }
    Ok(())
}

/// What is noted of a lower.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Known {
    name: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    id: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    generation: Option<u64>,
}

fn check_lowers(
    db: &Database,
    local: &LocalPaths,
    upper: &Path,
    lowers: &[Arc<dyn Lower>],
    accept_loss: &Path,
) -> Result<()> {
    let mut now = Vec::new();
    for lower in lowers {
        let identity = lower.identity()?;
        now.push(Known {
            name: lower.describe(),
            id: identity.id,
            generation: identity.generation,
        });
    }
    let before: Vec<Known> = match db.note(LOWERS_NOTE)? {
        None => Vec::new(),
        Some(text) => serde_json::from_str(&text).unwrap_or_else(|error| {
            tracing::warn!(%error, "the note about the lower stores is not understood");
            Vec::new()
        }),
    };
    let changes = changes(&before, &now);
    let lost = lost_paths(db, upper, lowers, !changes.is_empty())?;
    if lost.is_empty() {
        for change in changes {
            tracing::warn!("{change}; nothing that the overlay store relies on is missing");
        }
    } else {
        let mut message = changes.join("; ");
        if !message.is_empty() {
            message.push_str("; ");
        }
        message.push_str(&describe_lost(&lost, local));
        if is_there(accept_loss)? {
            tracing::error!("{message}: accepted");
            std::fs::remove_file(accept_loss).map_err(|e| Error::io("removing", accept_loss, e))?;
        } else {
            return Err(Error::corrupt(message).with_hint(format!(
                "put the lower store back as it was; or create the file {} to open the overlay store once without what is lost, and let `nix-store --verify --repair` fetch it",
                accept_loss.display()
            )));
        }
    }
    if now != before {
        let text = serde_json::to_string(&now).map_err(|e| {
            Error::internal("writing the note about the lower stores").with_source(e)
        })?;
        db.set_note(LOWERS_NOTE, Some(&text))?;
    }
    Ok(())
}

/// What is not as a lower that only grows would be.
fn changes(before: &[Known], now: &[Known]) -> Vec<String> {
    let mut out = Vec::new();
    for old in before {
        let same = now
            .iter()
            .find(|new| new.id == old.id && (old.id.is_some() || new.name == old.name));
        match same {
            Some(new) => {
                if let (Some(expected), Some(found)) = (old.generation, new.generation)
                    && found < expected
                {
                    out.push(format!(
                        "the lower store {} went back to an older state: expected generation {expected} or later, found {found}",
                        new.name
                    ));
                }
            }
            None => {
                let Some(id) = &old.id else { continue };
                out.push(match now.iter().find(|new| new.name == old.name) {
                    Some(new) => format!(
                        "the lower store {} was replaced by another one: expected {id}, found {}",
                        old.name,
                        new.id.as_deref().unwrap_or("none that it tells")
                    ),
                    None => format!("the lower store {} ({id}) is not used any more", old.name),
                });
            }
        }
    }
    out
}

/// Rows of U whose object is neither in the upper nor valid below; with `compare` those, too, whose info is another one
/// there.
fn lost_paths(
    db: &Database,
    upper: &Path,
    lowers: &[Arc<dyn Lower>],
    compare: bool,
) -> Result<Vec<StorePath>> {
    let rows = db.all_paths()?;
    let mut in_upper = HashSet::new();
    for entry in std::fs::read_dir(upper).map_err(|e| Error::io("reading", upper, e))? {
        let entry = entry.map_err(|e| Error::io("reading", upper, e))?;
        in_upper.insert(entry.file_name());
    }
    let mut open: Vec<StorePath> = rows
        .into_iter()
        .filter(|path| !in_upper.contains(std::ffi::OsStr::new(path.base_name())))
        .collect();
    let mut differ = Vec::new();
    for lower in lowers {
        if open.is_empty() {
            break;
        }
        let found = lower.valid(&open)?;
        let (below, rest): (Vec<_>, Vec<_>) =
            open.into_iter().zip(found).partition(|(_, valid)| *valid);
        open = rest.into_iter().map(|(path, _)| path).collect();
        if compare {
            let below: Vec<StorePath> = below.into_iter().map(|(path, _)| path).collect();
            let theirs = lower.infos(&below)?;
            let ours = db.infos(&below)?;
            for ((path, ours), theirs) in below.into_iter().zip(ours).zip(theirs) {
                if let (Some(ours), Some(theirs)) = (ours, theirs)
                    && (ours.nar_hash != theirs.nar_hash || ours.references != theirs.references)
                {
                    differ.push(path);
                }
            }
        }
    }
    open.extend(differ);
    // What was collected since U was read is not lost.
    let still = db.valid(&open)?;
    let lost = open.into_iter().zip(still).filter(|(_, still)| *still);
    Ok(lost.map(|(path, _)| path).collect())
}

fn describe_lost(lost: &[StorePath], local: &LocalPaths) -> String {
    let named: Vec<String> = lost
        .iter()
        .take(NAMED_MAX)
        .map(|path| format!("'{}'", local.store_dir.print(path)))
        .collect();
    let more = match lost.len().saturating_sub(NAMED_MAX) {
        0 => String::new(),
        more => format!(" and {more} more"),
    };
    format!(
        "lower store lost {} that the overlay store relies on: {}{more}",
        if lost.len() == 1 {
            "a path".to_owned()
        } else {
            format!("{} paths", lost.len())
        },
        named.join(", ")
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn known(name: &str, id: Option<&str>, generation: Option<u64>) -> Known {
        Known {
            name: name.into(),
            id: id.map(Into::into),
            generation,
        }
    }

    #[test]
    fn growth_is_no_change_and_everything_else_is() {
        let before = [known("l", Some("a"), Some(5)), known("d", None, None)];
        assert!(changes(&before, &before).is_empty());
        let grown = [known("d", None, None), known("moved", Some("a"), Some(9))];
        assert!(changes(&before, &grown).is_empty());
        let older = [known("l", Some("a"), Some(4))];
        assert_eq!(
            changes(&before, &older),
            [
                "the lower store l went back to an older state: expected generation 5 or later, found 4"
            ]
        );
        let other = [known("l", Some("b"), Some(9))];
        assert_eq!(
            changes(&before, &other),
            ["the lower store l was replaced by another one: expected a, found b"]
        );
        let none = [known("x", None, None)];
        assert_eq!(
            changes(&before, &none),
            ["the lower store l (a) is not used any more"]
        );
    }
}
