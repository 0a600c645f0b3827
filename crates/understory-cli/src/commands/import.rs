//! `import`: store paths from a Nix store, a binary cache or an export.

use crate::context::Context;
use crate::error::{Code, CommandError, Result};
use crate::progress::{Done, Progress};
use crate::settings::MaskArgs;
use crate::signals;
use crate::ui;
use std::collections::BTreeSet;
use std::ffi::{OsStr, OsString};
use std::io::IsTerminal;
use std::os::unix::ffi::OsStrExt;
use std::sync::Arc;
use understory::import::{self, Counters, Importer, Options, Report, Selection, Source};
use understory::up::Notifier;
use understory::{Store, StoreOptions};
use understory_nix::{PublicKeys, StorePath};

/// Import store paths from a Nix store, a binary cache or an export
///
/// Verifies the hash and size of each NAR. Can be interrupted at any time: what was imported before is
/// kept, and the next run goes on where this one ended. Creates the store if there is none.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// `/` or another root of a local Nix store, `local?root=…`, `file:///…` (a binary cache), or `-`
    /// for the output of `nix-store --export`
    #[arg(required_unless_present = "export")]
    source: Option<String>,
    /// Store paths of the source
    #[arg(conflicts_with = "all")]
    paths: Vec<OsString>,
    /// Import all paths of the source
    #[arg(long)]
    all: bool,
    /// Only the paths themselves; what they refer to must be valid already [default: their closures]
    #[arg(long)]
    no_closure: bool,
    /// Read the output of `nix-store --export` on stdin, as SOURCE `-`
    #[arg(long, conflicts_with_all = ["source", "paths", "all"])]
    export: bool,
    /// Threads that read [default: all cores]
    #[arg(
        short,
        long,
        value_name = "N",
        default_value_t = 0,
        hide_default_value = true
    )]
    jobs: usize,
    /// Accept only paths that are content-addressed or signed by one of these keys (name:base64)
    #[arg(long, value_name = "KEYS", value_delimiter = ' ')]
    trusted_public_keys: Vec<String>,
    /// zstd level, 1 to 19
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(i32).range(1..=19))]
    compression: i32,
    #[command(flatten)]
    mask: MaskArgs,
}

pub(crate) fn run(args: &Args, cx: &Context) -> Result<()> {
    let from_stdin = args.export || args.source.as_deref() == Some("-");
    if from_stdin && std::io::stdin().is_terminal() {
        return Err(
            CommandError::usage("an export is binary and is not read from a terminal").hint(
                "pipe it in: `nix-store --export $(nix-store -qR PATH) | understory import -`",
            ),
        );
    }
    if !from_stdin && args.paths.is_empty() && !args.all {
        return Err(CommandError::usage("nothing is named to be imported")
            .hint("name store paths of the source, or use --all"));
    }
    let mut options = StoreOptions::default();
    options.castore.compression_level = args.compression;
    options.castore.compress_threads = args.jobs;
    args.mask.apply(&mut options);
    let store = cx.open_or_create(&options)?;
    store.observe(Arc::new(Notifier::new(store.dir())));
    let (source, selection) = match &args.source {
        Some(text) if !from_stdin => (Source::open(text, &store)?, selection(args, &store)?),
        _ => (Source::Export(Box::new(std::io::stdin())), Selection::All),
    };
    let keys = args.trusted_public_keys.join(" ");
    let options = Options {
        jobs: args.jobs,
        trusted_keys: if keys.trim().is_empty() {
            None
        } else {
            Some(PublicKeys::parse(&keys)?)
        },
    };
    let cancel = signals::cancel_flag()?;
    let bar = Bar(Progress::new(&cx.ui, "importing"));
    let report = Importer::new(store).run(source, &selection, &options, &bar, &cancel);
    let time = bar.0.finish();
    end(cx, &report?, time)
}

struct Bar(Progress);
impl import::Progress for Bar {
    fn update(&self, counters: &Counters) {
        self.0.update(Done {
            paths: (counters.paths_done, counters.paths_total),
            bytes: (counters.nar_bytes_done, counters.nar_bytes_total),
            new_bytes: counters.writer.new_bytes,
        });
    }
}

fn selection(args: &Args, store: &Store) -> Result<Selection> {
    if args.all {
        return Ok(Selection::All);
    }
    let paths = args
        .paths
        .iter()
        .map(|p| parse(store, p))
        .collect::<Result<BTreeSet<_>>>()?;
    Ok(Selection::Paths {
        paths,
        closure: !args.no_closure,
    })
}

/// A store path of the source: in full, by base name, or a symlink such as `./result` to it.
fn parse(store: &Store, text: &OsStr) -> Result<StorePath> {
    let dir = store.store_dir();
    if let Some(path) = text
        .to_str()
        .and_then(|t| StorePath::from_base_name(t).ok())
    {
        return Ok(path);
    }
    let wrong = match dir.parse_below(text.as_bytes()) {
        Ok((path, _)) => return Ok(path),
        Err(error) => error,
    };
    if let Ok(real) = std::fs::canonicalize(text)
        && let Ok((path, _)) = dir.parse_below(real.as_os_str().as_bytes())
    {
        return Ok(path);
    }
    Err(wrong.into())
}

fn end(cx: &Context, report: &Report, time: std::time::Duration) -> Result<()> {
    let counters = &report.counters;
    let writer = &counters.writer;
    if cx.json {
        cx.ui.print_json(&serde_json::json!({
            "paths": counters.paths_done,
            "pathsTotal": counters.paths_total,
            "pathsValidBefore": counters.paths_valid,
            "pathsFailed": counters.paths_failed,
            "narBytes": counters.nar_bytes_done,
            "newBytes": writer.new_bytes,
            "storedBytes": writer.stored_bytes,
            "maskedDuplicateBytes": writer.masked_duplicate_bytes,
            "maskedFiles": writer.masked_files,
            "realisations": report.realisations,
            "seconds": time.as_secs_f64(),
            "cancelled": report.cancelled,
            "failures": report.failures.iter()
                .map(|f| serde_json::json!({"path": f.path, "error": f.error.chain()})).collect::<Vec<_>>(),
        }))?;
    } else {
        cx.ui.say(format_args!(
            "imported {} paths, {} of NARs in {:.1} s ({}); {} were there before",
            ui::count(counters.paths_done),
            ui::bytes(counters.nar_bytes_done),
            time.as_secs_f64(),
            ui::rate(counters.nar_bytes_done, time),
            ui::count(counters.paths_valid),
        ));
        cx.ui.say(format_args!(
            "equal files {}, equal chunks {}, equal but for hash parts {}, new {}, on disk {}",
            ui::bytes(writer.file_duplicate_bytes),
            ui::bytes(writer.chunk_duplicate_bytes),
            ui::bytes(writer.masked_duplicate_bytes),
            ui::bytes(writer.new_bytes),
            ui::bytes(writer.stored_bytes)
        ));
    }
    if report.cancelled {
        return Err(CommandError::new(Code::Interrupted, "interrupted")
            .hint("what was imported before is kept: run the same command again to go on"));
    }
    match report.error() {
        None => Ok(()),
        Some(error) => Err(error.into()),
    }
}
