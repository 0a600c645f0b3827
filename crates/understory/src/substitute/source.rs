//! Where paths come from: a binary cache or another store, without the question whether it may be used.

use super::files::{Context, Failure};
use crate::daemon::Activity;
use crate::{Error, Result};
use std::io::BufRead;
use std::sync::atomic::AtomicU64;
use understory_nix::narinfo::{CacheInfo, Compression};
use understory_nix::worker::{DrvOutput, WireRealisation};
use understory_nix::{PathInfo, StoreDir, StorePath};

/// What a store says of itself.
#[derive(Debug, Clone)]
pub(super) struct About {
    /// Its store directory.
    pub(super) store_dir: StoreDir,
    pub(super) want_mass_query: bool,
    /// Lower is asked first.
    pub(super) priority: u32,
    /// Its number in the cache on disk, if that is used.
    pub(super) id: Option<i64>,
}

impl About {
    pub(super) fn new(info: &CacheInfo, store_dir: &StoreDir, id: Option<i64>) -> Self {
        Self {
            store_dir: store_dir.clone(),
            want_mass_query: info.want_mass_query,
            priority: info.priority.unwrap_or(0),
            id,
        }
    }
}

/// A path that a store has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Found {
    /// As the store says it.
    pub(super) info: PathInfo,
    /// Where its archive is, in a binary cache.
    pub(super) file: Option<NarFile>,
}

/// An archive in a binary cache.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct NarFile {
    pub(super) url: String,
    pub(super) compression: Compression,
    /// Bytes of the file, if the store says so.
    pub(super) bytes: Option<u64>,
}

/// Why a path's archive could not be had.
#[derive(Debug)]
pub(super) enum FetchError {
    /// The store does not have it any more.
    Gone,
    /// Anything else. `unreachable` says that the store cannot be asked for others either.
    Failed { error: Error, unreachable: bool },
    /// The client has gone.
    Cancelled,
}

impl From<Failure> for FetchError {
    fn from(failure: Failure) -> Self {
        match failure {
            Failure::Cancelled => Self::Cancelled,
            failure => Self::Failed {
                unreachable: failure.is_unreachable(),
                error: failure.into_error(),
            },
        }
    }
}

/// Takes one archive; may be called again from the beginning when a download broke.
pub(super) type Receive<'a> = dyn FnMut(&mut dyn BufRead) -> Result<()> + 'a;

/// How far a download is, and who is told.
#[derive(Clone, Copy)]
pub(super) struct Progress<'a> {
    /// The path's activity.
    pub(super) copy: &'a Activity<'a>,
    /// Bytes of the archive that were read.
    pub(super) nar_bytes: &'a AtomicU64,
    /// Bytes of the file that were read.
    pub(super) file_bytes: &'a AtomicU64,
}

/// A store that others can be filled from. Threads share it.
pub(super) trait Source: Send + Sync {
    /// Asks the store what it is.
    fn open(&self, context: Context<'_>) -> Result<About, Failure>;
    /// Looks paths up, in the order given. An error of one path is that path's.
    fn lookup(
        &self,
        about: &About,
        paths: &[StorePath],
        context: Context<'_>,
    ) -> Result<Vec<Result<Option<Found>>>, Failure>;
    /// Gives the archive of a path to `receive`.
    fn fetch(
        &self,
        found: &Found,
        progress: Progress<'_>,
        context: Context<'_>,
        receive: &mut Receive<'_>,
    ) -> Result<(), FetchError>;
    /// Forgets what was remembered of a path, since it has turned out wrong.
    fn forget(&self, _about: &About, _path: &StorePath) {}
    /// What an output became.
    fn realisation(
        &self,
        about: &About,
        id: &DrvOutput,
        context: Context<'_>,
    ) -> Result<Option<WireRealisation>, Failure>;
}
