//! A store of stock Nix on this machine as a lower store: its database, opened read-only, and its files.
//!
//! Nothing is created or locked there; see [`OpenMode::ReadOnly`]. A store that nobody has written to yet has no
//! database; stock Nix would make one. It counts as empty until it has one: a lower may grow from nothing. A place that
//! was mistyped is found by the overlay's mount check.

use super::{Identity, Lower};
use crate::local::{Database, OpenMode};
use crate::{Error, Result};
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use understory_nix::worker::{DrvOutput, WireRealisation};
use understory_nix::{PathInfo, StoreDir, StorePath};

/// See the module.
pub struct LocalLower {
    real: PathBuf,
    state: PathBuf,
    store_dir: StoreDir,
    /// Empty as long as there is none.
    database: OnceLock<Database>,
}

impl LocalLower {
    /// Opens the store whose objects are in `real` and whose database is in `state`.
    ///
    /// # Errors
    /// Another schema or store directory, not permitted.
    pub fn open(real: &Path, state: &Path, store_dir: &StoreDir) -> Result<Self> {
        let out = Self {
            real: real.to_path_buf(),
            state: state.to_path_buf(),
            store_dir: store_dir.clone(),
            database: OnceLock::new(),
        };
        if out.database()?.is_none() {
            tracing::warn!(
                "the lower store {} has no database in {} yet: it counts as empty until it has one",
                real.display(),
                state.display()
            );
        }
        Ok(out)
    }

    /// `None` as long as there is none.
    fn database(&self) -> Result<Option<&Database>> {
        if let Some(database) = self.database.get() {
            return Ok(Some(database));
        }
        if !self.state.join("db/db.sqlite").exists() {
            return Ok(None);
        }
        let database = Database::open(&self.state, &self.store_dir, OpenMode::ReadOnly)?;
        if let Some(path) = database.any_path()?
            && let Some((found, _)) = path.rsplit_once('/')
            && found != self.store_dir.as_str()
        {
            return Err(Error::user(format!(
                "the store of {} has store directory '{found}', expected '{}'",
                database.path().display(),
                self.store_dir
            ))
            .with_hint(
                "paths are valid in their own store directory only: all layers must have the same",
            ));
        }
        Ok(Some(self.database.get_or_init(|| database)))
    }

    /// What the database says, or what an empty store says.
    fn ask<T>(
        &self,
        empty: impl FnOnce() -> T,
        ask: impl FnOnce(&Database) -> Result<T>,
    ) -> Result<T> {
        self.database()?.map_or_else(|| Ok(empty()), ask)
    }
}

impl Lower for LocalLower {
    fn describe(&self) -> String {
        format!("local store {}", self.real.display())
    }
    fn real_dir(&self) -> &Path {
        &self.real
    }
    fn store_dir(&self) -> &StoreDir {
        &self.store_dir
    }
    fn identity(&self) -> Result<Identity> {
        let Some(database) = self.database()? else {
            return Ok(Identity {
                id: None,
                generation: Some(0),
            });
        };
        let id = database.fingerprint()?;
        Ok(Identity {
            id: id.map(|id| format!("local {id}")),
            generation: Some(database.last_id()?),
        })
    }
    fn infos(&self, paths: &[StorePath]) -> Result<Vec<Option<Arc<PathInfo>>>> {
        let Some(database) = self.database()? else {
            return Ok(vec![None; paths.len()]);
        };
        let found = database.infos(paths)?;
        Ok(found.into_iter().map(|info| info.map(Arc::new)).collect())
    }
    fn with_info(&self, path: &StorePath, visit: &mut dyn FnMut(&PathInfo)) -> Result<bool> {
        let found = self.ask(|| None, |db| db.info(path))?;
        if let Some(info) = &found {
            visit(info);
        }
        Ok(found.is_some())
    }
    fn valid(&self, paths: &[StorePath]) -> Result<Vec<bool>> {
        self.ask(|| vec![false; paths.len()], |db| db.valid(paths))
    }
    fn all_paths(&self) -> Result<Vec<StorePath>> {
        self.ask(Vec::new, |db| db.all_paths())
    }
    fn referrers(&self, path: &StorePath) -> Result<BTreeSet<StorePath>> {
        self.ask(BTreeSet::new, |db| db.referrers(path))
    }
    fn valid_derivers(&self, path: &StorePath) -> Result<BTreeSet<StorePath>> {
        self.ask(BTreeSet::new, |db| db.valid_derivers(path))
    }
    fn path_from_hash_part(&self, hash_part: &str) -> Result<Option<StorePath>> {
        self.ask(|| None, |db| db.path_from_hash_part(hash_part))
    }
    fn realisation(&self, id: &DrvOutput) -> Result<Option<WireRealisation>> {
        self.ask(|| None, |db| db.realisation(id))
    }
}
