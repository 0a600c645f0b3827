//! Overlay stores that stand on this store: what they need is not collected, also while they are down.
//!
//! `overlays/<nix32 of SHA-1 of the state directory>.json` names the state directory and the merged directory of one.
//! All rows of its database, its permanent roots and what processes use of it are roots here. One whose state directory is gone is
//! forgotten, as Nix forgets an indirect root whose link is gone; one whose database cannot be read stops a collection.

use super::Store;
use crate::local::roots::permanent_roots;
use crate::local::{Database, LocalPaths, OpenMode};
use crate::{Error, Result};
use serde::{Deserialize, Serialize};
use std::fs;
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};
use understory_nix::hash::Hasher;
use understory_nix::{HashAlgorithm, StorePath};

/// What is kept of an overlay store.
#[derive(Debug, Serialize, Deserialize)]
struct Registered {
    state: PathBuf,
    real: PathBuf,
}

impl Store {
    /// Keeps what the overlay store at `local` needs, from now on until its state directory is removed. Durable on
    /// return.
    ///
    /// # Errors
    /// The store is open read-only; I/O.
    pub fn register_overlay(&self, local: &LocalPaths) -> Result<()> {
        self.check_writable()?;
        let place =
            |path: &Path| fs::canonicalize(path).map_err(|e| Error::io("resolving", path, e));
        let registered = Registered {
            state: place(&local.state)?,
            real: place(&local.real)?,
        };
        let text = serde_json::to_string(&registered)
            .map_err(|e| Error::internal("describing an overlay store").with_source(e))?;
        let dir = self.dir().join("overlays");
        let file = dir.join(name_of(&registered.state));
        if fs::read_to_string(&file).is_ok_and(|known| known == text) {
            return Ok(());
        }
        let failed = |e| Error::io("writing", &file, e);
        fs::create_dir_all(&dir).map_err(failed)?;
        let mut new = tempfile::NamedTempFile::new_in(&dir).map_err(failed)?;
        new.write_all(text.as_bytes()).map_err(failed)?;
        new.as_file().sync_all().map_err(failed)?;
        new.persist(&file).map_err(|e| failed(e.error))?;
        fs::File::open(&dir)
            .and_then(|dir| dir.sync_all())
            .map_err(failed)
    }

    /// What registered overlay stores need.
    pub(super) fn overlay_roots(&self) -> Result<Vec<StorePath>> {
        let dir = self.dir().join("overlays");
        let entries = match fs::read_dir(&dir) {
            Ok(entries) => entries,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(Error::io("reading", dir, error)),
        };
        let mut roots = Vec::new();
        for entry in entries {
            let file = entry.map_err(|e| Error::io("reading", &dir, e))?.path();
            if file.extension().is_none_or(|extension| extension != "json") {
                continue;
            }
            let text = fs::read(&file).map_err(|e| Error::io("reading", &file, e))?;
            let Registered { state, real } = serde_json::from_slice(&text)
                .map_err(|e| Error::corrupt(format!("{}", file.display())).with_source(e))?;
            if let Err(error) = fs::symlink_metadata(&state)
                && error.kind() == ErrorKind::NotFound
            {
                tracing::warn!(state = %state.display(), "an overlay store is gone, what it needed is not kept any more");
                if !self.is_read_only() {
                    fs::remove_file(&file).map_err(|e| Error::io("removing", &file, e))?;
                }
                continue;
            }
            self.roots_of(&state, real, &mut roots).map_err(|error| {
                Error::environment(format!(
                    "what the overlay store at {} needs cannot be told, so nothing is deleted",
                    state.display()
                ))
                .with_source(error.chain())
                .with_hint(format!(
                    "if that store is gone for good, remove {}",
                    file.display()
                ))
            })?;
        }
        Ok(roots)
    }

    fn roots_of(&self, state: &Path, real: PathBuf, roots: &mut Vec<StorePath>) -> Result<()> {
        let local = LocalPaths {
            store_dir: self.store_dir().clone(),
            real,
            log: state.join("log"),
            state: state.to_path_buf(),
        };
        let database = Database::open(state, self.store_dir(), OpenMode::ReadOnly)?;
        roots.extend(database.all_paths()?);
        let permanent = permanent_roots(&local, true, &|_| Ok(true))?;
        roots.extend(permanent.into_iter().map(|(_, path)| path));
        Ok(())
    }
}

fn name_of(state: &Path) -> String {
    use std::os::unix::ffi::OsStrExt;
    let mut hasher = Hasher::new(HashAlgorithm::Sha1);
    hasher.update(state.as_os_str().as_bytes());
    format!("{}.json", hasher.finish().to_nix32())
}
