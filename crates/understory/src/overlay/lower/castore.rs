//! A castore of this process as a lower store.
//!
//! Cost: from memory where the store has the row, else one statement; nothing is copied for [`Lower::with_info`].

use super::{Identity, Lower};
use crate::Result;
use crate::store::Store;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use understory_nix::worker::{DrvOutput, WireRealisation};
use understory_nix::{PathInfo, StoreDir, StorePath};

/// See the module.
pub struct CastoreLower {
    store: Store,
    real: PathBuf,
    layers: Vec<PathBuf>,
}

impl CastoreLower {
    /// `real` is where the store is mounted.
    pub fn new(store: Store, real: &Path) -> Self {
        Self {
            store,
            real: real.to_path_buf(),
            layers: vec![real.to_path_buf()],
        }
    }

    /// The overlayfs stands on these directories instead, which show the same together.
    #[must_use]
    pub fn over(mut self, layers: Vec<PathBuf>) -> Self {
        self.layers = layers;
        self
    }
}

impl Lower for CastoreLower {
    fn describe(&self) -> String {
        format!("castore {}", self.store.dir().display())
    }
    fn real_dir(&self) -> &Path {
        &self.real
    }
    fn layers(&self) -> Vec<PathBuf> {
        self.layers.clone()
    }
    fn store_dir(&self) -> &StoreDir {
        self.store.store_dir()
    }
    fn identity(&self) -> Result<Identity> {
        Ok(Identity {
            id: Some(format!("castore {}", self.store.id())),
            generation: Some(self.store.last_id()?),
        })
    }
    fn infos(&self, paths: &[StorePath]) -> Result<Vec<Option<Arc<PathInfo>>>> {
        let found = self.store.paths(paths)?;
        Ok(found
            .into_iter()
            .map(|row| row.map(|row| Arc::new(row.info.clone())))
            .collect())
    }
    fn with_info(&self, path: &StorePath, visit: &mut dyn FnMut(&PathInfo)) -> Result<bool> {
        let Some(row) = self.store.path(path)? else {
            return Ok(false);
        };
        visit(&row.info);
        Ok(true)
    }
    fn valid(&self, paths: &[StorePath]) -> Result<Vec<bool>> {
        // Both are in the same order.
        let valid = self.store.valid_paths(paths)?;
        let mut valid = valid.iter().peekable();
        Ok(paths
            .iter()
            .map(|path| valid.next_if_eq(&path).is_some())
            .collect())
    }
    fn all_paths(&self) -> Result<Vec<StorePath>> {
        self.store.all_paths()
    }
    fn referrers(&self, path: &StorePath) -> Result<BTreeSet<StorePath>> {
        self.store.referrers(path)
    }
    fn valid_derivers(&self, path: &StorePath) -> Result<BTreeSet<StorePath>> {
        self.store.valid_derivers(path)
    }
    fn path_from_hash_part(&self, hash_part: &str) -> Result<Option<StorePath>> {
        self.store.path_from_hash_part(hash_part)
    }
    fn realisation(&self, id: &DrvOutput) -> Result<Option<WireRealisation>> {
        self.store.wire_realisation(id)
    }
    fn castore(&self) -> Option<&Store> {
        Some(&self.store)
    }
}
