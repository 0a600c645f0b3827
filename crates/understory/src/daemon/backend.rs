//! What a daemon serves: the operations of the worker protocol without their bytes.
//!
//! A [`Backend`] is a store that can be served; each client gets its own [`Operations`], which keeps what
//! belongs to that client (its temporary roots, its settings, a builder that runs for it) and is dropped when
//! it disconnects. The castore ([`Store`](crate::Store)) and the overlay
//! ([`Overlay`](crate::overlay::Overlay)) are backends.
//!
//! The connection reads and judges arguments, streams bodies, and writes replies. A backend checks what needs
//! the store, in the words of Nix, and never sees the wire, except for log messages, which pass through as
//! they are.

use crate::add::AddMethod;
use crate::store::GcReport;
use crate::{Error, Result};
use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufRead, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use understory_nix::worker::{
    ActivityType, BasicDerivation, BuildMode, BuildResult, DerivedPath, DrvOutput, Field,
    GcRequest, KeyedBuildResult, LogMessage, MissingInfo, ResultType, SetOptions,
    SubstitutablePathInfo, Verbosity, WireRealisation,
};
use understory_nix::{ContentAddress, PathInfo, Signature, StoreDir, StorePath};

/// A store that can be served.
pub trait Backend: Send + Sync {
    /// The logical store directory.
    fn store_dir(&self) -> &StoreDir;
    /// True if nothing can be changed.
    fn is_read_only(&self) -> bool;
    /// Begins to serve a client.
    ///
    /// # Errors
    /// The store cannot be used; the client is told and sent away.
    fn connect(&self, client: &ClientInfo) -> Result<Box<dyn Operations>>;
}

/// Who is served.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ClientInfo {
    /// In `trusted-users`.
    pub trusted: bool,
    /// User of the peer, if known.
    pub uid: Option<u32>,
    /// Process of the peer, if known.
    pub pid: Option<i32>,
}

/// How an upload is to be taken.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct AddOptions {
    /// Replaces what is there. False for clients without trust.
    pub repair: bool,
    /// Needs a signature by a trusted key, or a content address.
    pub check_signatures: bool,
}

/// Paths with their archives, one after another.
pub trait PathSource {
    /// The next path. The archive of the one before must have been read, or is skipped.
    ///
    /// # Errors
    /// The stream's.
    fn next(&mut self) -> Result<Option<PathInfo>>;
    /// The archive of the path that [`PathSource::next`] gave: exactly one NAR.
    fn archive(&mut self) -> &mut dyn BufRead;
    /// Says that nothing of what was read is held any more, so that memory counts as free.
    fn release(&mut self);
}

/// Writes an archive whose path is known to be valid.
pub type NarWriter<'a> = Box<dyn FnOnce(&mut dyn Write) -> Result<()> + 'a>;

/// The operations of one client. Long ones take a [`Reporter`], ask it whether to go on, and end with an
/// error when not.
pub trait Operations: Send {
    /// SetOptions. Settings that a client without trust may not choose are the backend's to ignore.
    fn set_options(&self, options: &SetOptions) -> Result<()>;

    // -- queries

    /// True if the path is valid.
    fn is_valid(&self, path: &StorePath) -> Result<bool>;
    /// Shows the path info to `visit`; false if the path is not valid. Not copied: the hot path.
    fn with_path_info(&self, path: &StorePath, visit: &mut dyn FnMut(&PathInfo)) -> Result<bool>;
    /// Those of `paths` that are valid. With `substitute` missing ones are substituted first.
    fn valid_paths(
        &self,
        paths: &[StorePath],
        substitute: bool,
        reporter: &dyn Reporter,
    ) -> Result<Vec<StorePath>>;
    /// All valid paths.
    fn all_valid_paths(&self) -> Result<Vec<StorePath>>;
    /// Valid paths that refer to this one.
    fn referrers(&self, path: &StorePath) -> Result<BTreeSet<StorePath>>;
    /// Valid derivations that have this path as a statically known output.
    fn valid_derivers(&self, path: &StorePath) -> Result<BTreeSet<StorePath>>;
    /// The path with that hash part of 32 characters.
    fn path_from_hash_part(&self, hash_part: &str) -> Result<Option<StorePath>>;
    /// Outputs of a valid derivation with what realisations tell.
    ///
    /// # Errors
    /// `path '…' is not valid`.
    fn derivation_output_map(&self, drv: &StorePath)
    -> Result<BTreeMap<String, Option<StorePath>>>;
    /// What a derivation's output became.
    fn realisation(&self, id: &DrvOutput) -> Result<Option<WireRealisation>>;
    /// The archive of a valid path.
    ///
    /// # Errors
    /// `path '…' is not valid`.
    fn nar<'a>(&'a self, path: &StorePath) -> Result<NarWriter<'a>>;

    // -- additions

    /// AddToStoreNar: exactly one NAR is read from `archive`, also when the path is valid already.
    fn add_nar(
        &self,
        info: PathInfo,
        archive: &mut dyn BufRead,
        options: AddOptions,
        reporter: &dyn Reporter,
    ) -> Result<()>;
    /// AddMultipleToStore.
    fn add_multiple(
        &self,
        source: &mut dyn PathSource,
        options: AddOptions,
        reporter: &dyn Reporter,
    ) -> Result<()>;
    /// AddToStore: content-addressed, from a dump, as [`crate::add::add_from_dump`].
    fn add_dump(
        &self,
        name: &str,
        how: &AddMethod,
        references: &BTreeSet<StorePath>,
        repair: bool,
        dump: &mut dyn BufRead,
        reporter: &dyn Reporter,
    ) -> Result<PathInfo>;
    /// Keeps the log of a build.
    fn add_build_log(&self, drv: &StorePath, log: &mut dyn Read) -> Result<()>;
    /// Adds signatures to a valid path.
    fn add_signatures(&self, path: &StorePath, signatures: &BTreeSet<Signature>) -> Result<()>;
    /// Registers what a derivation's output became.
    fn register_realisation(&self, realisation: &WireRealisation) -> Result<()>;

    // -- housekeeping

    /// Keeps a path, valid or not, until the client goes.
    fn add_temp_root(&self, path: &StorePath) -> Result<()>;
    /// Keeps what the symlink at `link` points to.
    fn add_indirect_root(&self, link: &Path) -> Result<()>;
    /// Makes a symlink to a path and keeps the path.
    fn add_perm_root(&self, path: &StorePath, link: &Path) -> Result<()>;
    /// All roots: link and target, one pair for each link.
    fn roots(&self) -> Result<Vec<(PathBuf, StorePath)>>;
    /// CollectGarbage. With a set of paths and `DeleteDead` only these are looked at. Nix lets everybody
    /// collect, so a backend that does not, asks its [`ClientInfo`].
    fn collect_garbage(&self, request: &GcRequest, reporter: &dyn Reporter) -> Result<GcReport>;
    /// VerifyStore: true if errors remain. Each is said to the reporter.
    fn verify(&self, check_contents: bool, repair: bool, reporter: &dyn Reporter) -> Result<bool>;
    /// OptimiseStore.
    fn optimise(&self, reporter: &dyn Reporter) -> Result<()>;

    // -- builds and substitution

    /// QueryMissing.
    fn query_missing(&self, paths: &[DerivedPath], reporter: &dyn Reporter) -> Result<MissingInfo>;
    /// EnsurePath.
    fn ensure_path(&self, path: &StorePath, reporter: &dyn Reporter) -> Result<()>;
    /// BuildPaths.
    fn build_paths(
        &self,
        paths: &[DerivedPath],
        mode: BuildMode,
        reporter: &dyn Reporter,
    ) -> Result<()>;
    /// BuildPathsWithResults: one result for each path, in order. `realisation_with_path` says which
    /// form the keys of built outputs must have: false is the hash modulo of Nix up to 2.34.
    fn build_paths_with_results(
        &self,
        paths: &[DerivedPath],
        mode: BuildMode,
        realisation_with_path: bool,
        reporter: &dyn Reporter,
    ) -> Result<Vec<KeyedBuildResult>>;
    /// BuildDerivation.
    fn build_derivation(
        &self,
        drv: &StorePath,
        derivation: &BasicDerivation,
        mode: BuildMode,
        realisation_with_path: bool,
        reporter: &dyn Reporter,
    ) -> Result<BuildResult>;
    /// QuerySubstitutablePaths.
    fn substitutable_paths(
        &self,
        paths: &[StorePath],
        reporter: &dyn Reporter,
    ) -> Result<Vec<StorePath>>;
    /// QuerySubstitutablePathInfos. A content address lets a store with another directory serve the path.
    fn substitutable_path_infos(
        &self,
        paths: &BTreeMap<StorePath, Option<ContentAddress>>,
        reporter: &dyn Reporter,
    ) -> Result<Vec<(StorePath, SubstitutablePathInfo)>>;
}

/// Takes what is said to a client while its operation runs, from any thread.
pub trait Reporter: Sync {
    /// What the client wants to hear.
    fn verbosity(&self) -> Verbosity;
    /// True if the client has gone or the server stops.
    fn is_cancelled(&self) -> bool;
    /// Sends a message; `Last`, `Error`, `Read` and `Write` are not for here. A client that cannot be
    /// reached any more counts as cancelled.
    fn send(&self, message: &LogMessage);

    /// Says a line, if the client wants that level.
    fn say(&self, level: Verbosity, text: &str) {
        if level <= self.verbosity() {
            self.send(&LogMessage::Next(format!("{text}\n").into_bytes()));
        }
    }
    /// `Err` if cancelled.
    ///
    /// # Errors
    /// `interrupted by the user`.
    fn check(&self) -> Result<()> {
        if self.is_cancelled() {
            return Err(Error::user("interrupted by the user"));
        }
        Ok(())
    }
}

/// Says nothing and never ends: for work without a client.
#[derive(Debug, Clone, Copy, Default)]
pub struct Silent;

impl Reporter for Silent {
    fn verbosity(&self) -> Verbosity {
        Verbosity::Error
    }
    fn is_cancelled(&self) -> bool {
        false
    }
    fn send(&self, _message: &LogMessage) {}
}

/// Activity ids, unique in this process; the process id in the upper half keeps those of builders apart.
static NEXT_ACTIVITY: AtomicU64 = AtomicU64::new(1);

/// Something that goes on, as progress bars show it. It ends when this is dropped.
pub struct Activity<'a> {
    reporter: &'a dyn Reporter,
    id: u64,
}

impl<'a> Activity<'a> {
    /// Begins one. `parent` is an id, 0 for none.
    pub fn start(
        reporter: &'a dyn Reporter,
        level: Verbosity,
        kind: ActivityType,
        text: &str,
        fields: Vec<Field>,
        parent: u64,
    ) -> Self {
        let id = (u64::from(std::process::id()) << 32)
            | (NEXT_ACTIVITY.fetch_add(1, Ordering::Relaxed) & u64::from(u32::MAX));
        reporter.send(&LogMessage::StartActivity {
            id,
            level: level as u64,
            activity: kind,
            text: text.into(),
            fields,
            parent,
        });
        Self { reporter, id }
    }
    /// Its id, as a parent of others.
    pub fn id(&self) -> u64 {
        self.id
    }
    /// Reports something about it.
    pub fn result(&self, kind: ResultType, fields: Vec<Field>) {
        self.reporter.send(&LogMessage::Result {
            id: self.id,
            result: kind,
            fields,
        });
    }
    /// How far it is.
    pub fn progress(&self, done: u64, expected: u64, running: u64, failed: u64) {
        let fields = [done, expected, running, failed];
        self.result(ResultType::Progress, fields.map(Field::Int).to_vec());
    }
}

impl Drop for Activity<'_> {
    fn drop(&mut self) {
        self.reporter.send(&LogMessage::StopActivity(self.id));
    }
}
