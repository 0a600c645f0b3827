//! Nix's own store state on disk, as stock Nix has it: the database of schema 10, locks, temporary roots,
//! garbage-collector roots, metadata of objects. What the overlay keeps its upper store in, so that stock Nix
//! can open the same store before, after and at the same time.
//!
//! The formats are Nix's; facts and sources are named where they are used. Nothing here knows of layers.

pub mod canonical;
pub mod db;
pub mod lock;
pub mod restore;
pub mod roots;
pub mod temp_roots;

use crate::{Error, Result};
use std::fs::{self, DirBuilder};
use std::io::ErrorKind;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use understory_nix::{StoreDir, StorePath};

pub use db::{Database, OpenMode};

/// Where a local store keeps what.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LocalPaths {
    /// Logical store directory.
    pub store_dir: StoreDir,
    /// Where the objects are in the file system (`real`).
    pub real: PathBuf,
    /// `state`: database, roots, locks; `/nix/var/nix` in a store of the usual layout.
    pub state: PathBuf,
    /// `log`: build logs in `log/drvs`.
    pub log: PathBuf,
}

impl LocalPaths {
    /// The places below a prefix, as `root=` of a store URL has them.
    pub fn at_root(root: &Path, store_dir: StoreDir) -> Self {
        Self {
            store_dir,
            real: root.join("nix/store"),
            state: root.join("nix/var/nix"),
            log: root.join("nix/var/log/nix"),
        }
    }
    /// Where an object is in the file system.
    pub fn object(&self, path: &StorePath) -> PathBuf {
        self.real.join(path.base_name())
    }
    /// Makes the directories that stock Nix expects (`real` and its `.links`, `db`, `gcroots/auto`,
    /// `gcroots/per-user`, `profiles/per-user`, `temproots`), and the link `gcroots/profiles`. Changes nothing that
    /// is as it should be: what is there keeps its mode, but for the `per-user` directories, which Nix makes 0755 too.
    ///
    /// # Errors
    /// I/O, not permitted.
    pub fn create(&self) -> Result<()> {
        let gcroots = self.state.join("gcroots");
        let profiles = self.state.join("profiles");
        for dir in [
            self.real.clone(),
            self.real.join(".links"),
            self.state.join("db"),
            self.state.join("temproots"),
            gcroots.join("auto"),
        ] {
            make_dir(&dir)?;
        }
        for dir in [profiles.join("per-user"), gcroots.join("per-user")] {
            make_dir(&dir)?;
            let metadata = fs::symlink_metadata(&dir).map_err(|e| Error::io("reading", &dir, e))?;
            if metadata.mode() & 0o777 != DIR_MODE {
                let mode = fs::Permissions::from_mode(DIR_MODE);
                fs::set_permissions(&dir, mode).map_err(|e| Error::io("changing", &dir, e))?;
            }
        }
        // Absolute, as Nix makes it. What another Nix has put there stays.
        let link = gcroots.join("profiles");
        match symlink(&profiles, &link) {
            Err(e) if e.kind() != ErrorKind::AlreadyExists => Err(Error::io("creating", link, e)),
            _ => Ok(()),
        }
    }
}

/// Mode of Nix's directories.
const DIR_MODE: u32 = 0o755;

fn make_dir(dir: &Path) -> Result<()> {
    DirBuilder::new()
        .recursive(true)
        .mode(DIR_MODE)
        .create(dir)
        .map_err(|e| Error::io("creating", dir, e))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn directories_as_nix_has_them() {
        let dir = tempfile::tempdir().unwrap();
        let paths = LocalPaths::at_root(dir.path(), StoreDir::default());
        paths.create().unwrap();
        let per_user = paths.state.join("profiles/per-user");
        fs::set_permissions(&per_user, fs::Permissions::from_mode(0o1777)).unwrap();
        let db = paths.state.join("db");
        fs::set_permissions(&db, fs::Permissions::from_mode(0o700)).unwrap();
        paths.create().unwrap();
        let mode = |path: &Path| fs::symlink_metadata(path).unwrap().mode() & 0o7777;
        assert_eq!(mode(&per_user), 0o755);
        assert_eq!(mode(&db), 0o700, "not ours to change");
        assert_eq!(mode(&paths.real.join(".links")), 0o755);
        assert!(paths.state.join("gcroots/auto").is_dir());
        assert!(paths.state.join("temproots").is_dir());
        assert_eq!(
            fs::read_link(paths.state.join("gcroots/profiles")).unwrap(),
            paths.state.join("profiles")
        );
        let path = StorePath::from_base_name("00bgd045z0d4icpbc2yyz4gx48ak44la-a").unwrap();
        assert_eq!(
            paths.object(&path),
            dir.path()
                .join("nix/store/00bgd045z0d4icpbc2yyz4gx48ak44la-a")
        );
    }

    #[test]
    fn what_is_in_the_way_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let paths = LocalPaths::at_root(dir.path(), StoreDir::default());
        fs::create_dir_all(&paths.state).unwrap();
        fs::write(paths.state.join("temproots"), "").unwrap();
        let error = paths.create().unwrap_err();
        assert_eq!(
            error.to_string(),
            format!("creating {}/nix/var/nix/temproots", dir.path().display())
        );
    }
}
