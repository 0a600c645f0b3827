//! Lower stores: what an overlay stands on. Never written to through this interface.

mod castore;
mod daemon;
mod local;
#[cfg(test)]
mod tests;
mod url;

use crate::store::Store;
use crate::{Error, Result};
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use understory_nix::worker::{DrvOutput, WireRealisation};
use understory_nix::{PathInfo, StoreDir, StorePath};

pub use castore::CastoreLower;
pub use daemon::DaemonLower;
pub use local::LocalLower;

/// What tells a store from another one, and an older state of it from a newer one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// Differs between stores and stays the same in a copy or after a reboot: the castore's id; what
    /// [`Database::fingerprint`](crate::local::Database::fingerprint) says of a database. `None` where the store cannot
    /// say (another daemon, an empty database).
    pub id: Option<String>,
    /// Grows when the store grows and never falls, unless the store is replaced by an older state.
    pub generation: Option<u64>,
}

/// A store below an overlay. Answers are about now: what was added a moment ago is seen.
pub trait Lower: Send + Sync {
    /// For messages: its URL or place.
    fn describe(&self) -> String;
    /// Where its objects are in the file system.
    fn real_dir(&self) -> &Path;
    /// The lower directories of the overlayfs that show its objects, uppermost first.
    fn layers(&self) -> Vec<PathBuf> {
        vec![self.real_dir().to_owned()]
    }
    /// The logical store directory.
    fn store_dir(&self) -> &StoreDir;
    /// Which store it is, and how far it is.
    fn identity(&self) -> Result<Identity>;
    /// The path infos of those that are valid, in the order given; in bulk where the store can.
    fn infos(&self, paths: &[StorePath]) -> Result<Vec<Option<Arc<PathInfo>>>>;
    /// Shows one path info to `visit` without copying where possible; false if it is not valid.
    fn with_info(&self, path: &StorePath, visit: &mut dyn FnMut(&PathInfo)) -> Result<bool> {
        let found = self.infos(std::slice::from_ref(path))?.pop().flatten();
        Ok(found.is_some_and(|info| {
            visit(&info);
            true
        }))
    }
    /// Which of `paths` are valid, in the order given; one query.
    fn valid(&self, paths: &[StorePath]) -> Result<Vec<bool>>;
    /// All valid paths.
    fn all_paths(&self) -> Result<Vec<StorePath>>;
    /// Valid paths that refer to `path`.
    fn referrers(&self, path: &StorePath) -> Result<BTreeSet<StorePath>>;
    /// Valid derivations that have `path` as a statically known output.
    fn valid_derivers(&self, path: &StorePath) -> Result<BTreeSet<StorePath>>;
    /// The valid path with that hash part.
    fn path_from_hash_part(&self, hash_part: &str) -> Result<Option<StorePath>>;
    /// What an output became.
    fn realisation(&self, id: &DrvOutput) -> Result<Option<WireRealisation>>;
    /// The castore, if it is one that this process has open.
    fn castore(&self) -> Option<&Store> {
        None
    }
}

/// Returns where the store of a URL, as [`open`] takes it, has its objects. Nothing is opened.
///
/// # Errors
/// As [`open`] for URLs that are not understood.
pub fn real_dir(url: &str, store_dir: &StoreDir) -> Result<PathBuf> {
    Ok(match url::Place::parse(url, store_dir)? {
        url::Place::Daemon { real, .. } | url::Place::Local { real, .. } => real,
    })
}

/// Opens the store of a URL: `unix://SOCKET?real=…|root=…`, `daemon`, `local?root=…` or its other parameters, a plain path
/// (as `local?root=PATH`). Values are percent-decoded once; a URL that is encoded as a whole is understood too. A castore
/// is not opened by URL: see [`CastoreLower`].
///
/// # Errors
/// Empty (`the lower store has no URL`), kinds of store that have no files here, whatever the store says.
pub fn open(url: &str, store_dir: &StoreDir) -> Result<Arc<dyn Lower>> {
    let lower: Arc<dyn Lower> = match url::Place::parse(url, store_dir)? {
        url::Place::Daemon { socket, real } => {
            Arc::new(DaemonLower::connect(&socket, &real, store_dir)?)
        }
        url::Place::Local { real, state } => Arc::new(LocalLower::open(&real, &state, store_dir)?),
    };
    let real = lower.real_dir();
    let metadata = std::fs::metadata(real).map_err(|e| {
        Error::environment(format!("lower store '{url}': opening {}", real.display()))
            .with_source(e)
            .with_hint("`real=DIR` in the lower store's URL says where its files are")
    })?;
    if !metadata.is_dir() {
        return Err(Error::user(format!(
            "lower store '{url}': {} is not a directory",
            real.display()
        ))
        .with_hint("`real=DIR` in the lower store's URL says where its files are"));
    }
    Ok(lower)
}
