//! Ways in for whole sets of paths: from a local Nix store, a `file://` binary cache, or a stream of
//! `nix-store --export`.
//!
//! Invariants: what a source says about a path (references, deriver, signatures, content address,
//! registration time, ultimate) is kept verbatim; NAR hash and size are always computed and compared;
//! a path is published only when its references are valid or are published in the same transaction.
//! A path that fails takes its referrers with it and nobody else. Whatever was published stays, so an
//! import that ends early is finished by running it again: valid paths are skipped in bulk.
//!
//! One thread (the caller's) plans in reference order, hands paths to `jobs` threads that read,
//! hash and store them, and publishes what they finish. A path that is done before one of its references waits for it; at most [`WINDOW_PATHS_MAX`] paths are
//! between being planned and being ready to publish.
//!
//! Cost per path: one row and its references from the source's database (about 30 µs), the content
//! read once, SHA-256 (1 GB/s a core) beside the castore's own hashing and compression; per batch
//! ([`BATCH_NAR_BYTES`], [`BATCH_PATHS`] or [`BATCH_MS`]) one sync of the castore and one of the
//! database. A valid path costs a point lookup here and one in the source, about 10 µs. Memory: a bit
//! per row of a local store, about 50 bytes per path of a binary cache, about 1 KiB per path in the
//! window, and the decompressor of each job ([`DECOMPRESSOR_BYTES_MAX`] at worst).
//!
//! Formats: the databases of Nix 2.26 to 2.35 (schema 10), `nix-cache-info` and `.narinfo` files, and
//! the export format of `nix-store --export`, all checked against Nix 2.26.3 and 2.34.8.

mod cache;
pub(crate) mod decompress;
mod export;
mod id_set;
mod local;
mod pipeline;
mod selection;
mod source;

pub use cache::CacheSource;
pub(crate) use cache::parse_realisation;
pub use decompress::DECOMPRESSOR_BYTES_MAX;
pub use local::LocalSource;
pub use pipeline::{BATCH_MS, BATCH_NAR_BYTES, BATCH_PATHS, WINDOW_PATHS_MAX};
pub use selection::Selection;
pub use source::Source;
pub(crate) use source::decode;

use crate::{Error, Result, Store};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use understory_castore::store::WriterCounters;
use understory_nix::PublicKeys;

/// Failures that a [`Report`] describes; more are only counted.
pub const FAILURES_DESCRIBED_MAX: usize = 100;
/// An import ends early after this many paths failed by themselves (referrers of failed paths do not
/// count): then something is wrong with the source as a whole.
pub const FAILURES_MAX: u64 = 10_000;
/// Failures that the message of [`Report::error`] lists.
const FAILURES_LISTED_MAX: usize = 10;

/// How to import.
#[derive(Debug, Clone, Default)]
pub struct Options {
    /// Threads that read, hash and store; 0 = one per core.
    pub jobs: usize,
    /// Accepts only paths that are content-addressed or signed by one of these keys.
    pub trusted_keys: Option<PublicKeys>,
}

/// How far an import is.
#[derive(Debug, Clone, Copy, Default)]
pub struct Counters {
    /// Paths to be imported, as far as is known: grows while a binary cache's closure is followed, and
    /// with an export stream. Paths that are valid already are not in it.
    pub paths_total: u64,
    /// Of these, published.
    pub paths_done: u64,
    /// Selected paths that were valid before.
    pub paths_valid: u64,
    /// Paths that could not be imported, referrers of such paths included.
    pub paths_failed: u64,
    /// NAR bytes of the paths to be imported, as far as the source has said.
    pub nar_bytes_total: u64,
    /// NAR bytes read so far.
    pub nar_bytes_done: u64,
    /// What the castore's writer did since the import began, for whomever in this process.
    pub writer: WriterCounters,
}

/// Is told how an import goes on.
pub trait Progress: Sync {
    /// The figures now; some ten times a second, from the thread that runs the import.
    fn update(&self, counters: &Counters);
}

/// Shows nothing.
impl Progress for () {
    fn update(&self, _counters: &Counters) {}
}

/// Something that could not be imported.
#[derive(Debug)]
pub struct Failure {
    /// The path in full, or the file that should have told it.
    pub path: String,
    /// Why; names the path or file.
    pub error: Error,
    /// True if the only reason is that a reference failed.
    pub by_reference: bool,
}

/// What an import did.
#[derive(Debug, Default)]
pub struct Report {
    /// The last figures.
    pub counters: Counters,
    /// Sum of the NAR sizes of the paths that became valid.
    pub nar_bytes_imported: u64,
    /// Realisations recorded.
    pub realisations: u64,
    /// The first [`FAILURES_DESCRIBED_MAX`] failures, causes before consequences.
    pub failures: Vec<Failure>,
    /// True if it was cancelled before everything was done.
    pub cancelled: bool,
    /// How long it took.
    pub elapsed: Duration,
}

impl Report {
    /// The error that an import with failures ends with; `None` if nothing failed.
    pub fn error(&self) -> Option<Error> {
        let first = self.failures.first()?;
        let failed = self.counters.paths_failed;
        let total = self.counters.paths_total.max(failed);
        let mut text = format!("{failed} of {total} paths were not imported:");
        for failure in self.failures.iter().take(FAILURES_LISTED_MAX) {
            text.push('\n');
            text.push_str(&failure.error.chain());
        }
        let listed = self.failures.len().min(FAILURES_LISTED_MAX) as u64;
        if failed > listed {
            text.push_str(&format!("\n… and {} more", failed - listed));
        }
        let out = Error::new(first.error.kind(), text);
        Some(match first.error.hint() {
            Some(hint) => out.with_hint(hint),
            None => out,
        })
    }
}

/// Imports into one store.
pub struct Importer {
    store: Store,
}

impl Importer {
    /// An importer into `store`.
    pub fn new(store: Store) -> Self {
        Self { store }
    }

    /// Imports what `selection` names from `source`. Returns when everything is published that could
    /// be; see [`Report::error`] for what could not. Setting `cancel` makes it publish what is
    /// complete and return, within about a second.
    ///
    /// # Errors
    /// The source cannot be read, or is of another store directory; a selected path is not in it; the
    /// store cannot be written (full disk): what was published before stays. Failures of single paths
    /// are in the report instead.
    pub fn run(
        &self,
        source: Source,
        selection: &Selection,
        options: &Options,
        progress: &dyn Progress,
        cancel: &AtomicBool,
    ) -> Result<Report> {
        let mut run = pipeline::Run::new(&self.store, options, progress, cancel)?;
        match source {
            Source::Local(source) => source.import(selection, &mut run)?,
            Source::Cache(source) => source.import(selection, &mut run)?,
            Source::Export(stream) => export::import(stream, selection, &mut run)?,
        }
        Ok(run.finish())
    }
}

/// True once the caller wants to stop.
fn is_set(flag: &AtomicBool) -> bool {
    flag.load(Ordering::Relaxed)
}
