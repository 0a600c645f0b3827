//! What keeps paths alive: permanent roots (symlinks) and temporary roots (locked files).
//!
//! Permanent roots lie in `gcroots/` as in Nix: `auto/<nix32 of SHA-1 of link>` is a symlink to
//! `link`, which is a symlink to a store path in somebody's directory; symlinks to store paths
//! anywhere below `gcroots/` count too. The directory is the truth: nothing is kept in the database.
//!
//! Temporary roots of one owner (a client's connection, an import) are the lines of a file
//! `temproots/<pid>-<random>`, one base name each. The file is locked exclusively for as long as its owner
//! lives, so a dead owner's file is known by its lock being free. Lines are added under a shared lock
//! of `gc.lock`; a collection holds that exclusively, so it sees every root that was acknowledged
//! before it began, and those that come later wait for it.

use super::Store;
use super::create::sync_dir;
use super::db::lock;
use crate::files::open_or_create;
use crate::files::remove_if_there;
use crate::local::roots::place_for_root;
use crate::{Error, Result};
use rustix::fs::{FlockOperation, flock};
use std::collections::HashSet;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{ErrorKind, Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use understory_nix::{Hash, HashAlgorithm, StorePath};

/// Temporary roots that one owner may have: ten times the largest store anybody has told of.
const TEMP_ROOTS_MAX: usize = 4_000_000;
/// Depth of directories below `gcroots/` that are looked at.
const GCROOTS_DEPTH_MAX: usize = 32;

/// A group of temporary roots, which end when this is dropped or its process dies.
pub struct TempRootOwner {
    state: Mutex<TempRoots>,
    path: PathBuf,
}

#[derive(Default)]
struct TempRoots {
    /// Made with the first root.
    file: Option<File>,
    known: HashSet<StorePath>,
}

impl Drop for TempRootOwner {
    fn drop(&mut self) {
        if lock(&self.state).file.is_some() {
            // If that fails, the lock goes with the file's closing and a collection removes it.
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// The lock that a collection holds exclusively; released when dropped.
pub(crate) struct GcLock {
    _file: File,
}

impl Store {
    /// Starts a group of temporary roots; dropping it ends them (a dead process's end too).
    ///
    /// # Errors
    /// No random numbers to be had.
    pub fn temp_root_owner(&self) -> Result<TempRootOwner> {
        // Not the process' number alone: another pid namespace may have the same.
        let mut random = [0; 8];
        getrandom::fill(&mut random)
            .map_err(|e| Error::environment("reading random bytes").with_source(e.to_string()))?;
        let name = format!(
            "{}-{}",
            std::process::id(),
            data_encoding::HEXLOWER.encode(&random)
        );
        Ok(TempRootOwner {
            state: Mutex::default(),
            path: self.dir().join("temproots").join(name),
        })
    }

    /// Makes a temporary root that lives as long as `owner`. The path need not be valid. Waits while
    /// a collection is running. A store that is open read-only has none: does nothing there.
    ///
    /// # Errors
    /// I/O, more roots than an owner may have.
    pub fn add_temp_root(&self, owner: &TempRootOwner, path: &StorePath) -> Result<()> {
        self.add_temp_roots(owner, std::slice::from_ref(path))
    }

    /// Like [`Store::add_temp_root`], for many at once.
    ///
    /// # Errors
    /// As [`Store::add_temp_root`].
    pub fn add_temp_roots(&self, owner: &TempRootOwner, paths: &[StorePath]) -> Result<()> {
        if self.is_read_only() {
            return Ok(());
        }
        let mut state = lock(&owner.state);
        let mut lines = String::new();
        let mut added = Vec::new();
        for path in paths {
            if !state.known.contains(path) {
                lines.push_str(path.base_name());
                lines.push('\n');
                added.push(path.clone());
            }
        }
        if added.is_empty() {
            return Ok(());
        }
        if state.known.len() + added.len() > TEMP_ROOTS_MAX {
            return Err(Error::user(format!(
                "more than {TEMP_ROOTS_MAX} temporary roots"
            )));
        }
        let _shared = self.lock_gc(FlockOperation::LockShared)?;
        if state.file.is_none() {
            let file = File::options()
                .create_new(true)
                .append(true)
                .open(&owner.path)
                .map_err(|e| Error::io("creating", &owner.path, e))?;
            flock(&file, FlockOperation::LockExclusive)
                .map_err(|e| Error::io("locking", &owner.path, e.into()))?;
            state.file = Some(file);
        }
        if let Some(file) = state.file.as_mut() {
            file.write_all(lines.as_bytes())
                .map_err(|e| Error::io("writing", &owner.path, e))?;
        }
        state.known.extend(added);
        Ok(())
    }

    /// Keeps collections from deciding anything until what is returned is dropped; they wait. Nothing on a store
    /// that is open read-only.
    pub(crate) fn hold_collections(&self) -> Result<Option<GcLock>> {
        if self.is_read_only() {
            return Ok(None);
        }
        self.lock_gc(FlockOperation::LockShared).map(Some)
    }

    /// Takes `gc.lock`. Each call opens the file anew, since a lock belongs to an open file.
    pub(super) fn lock_gc(&self, operation: FlockOperation) -> Result<GcLock> {
        let path = self.dir().join("gc.lock");
        let file = open_or_create(&path)?;
        loop {
            match flock(&file, operation) {
                Ok(()) => return Ok(GcLock { _file: file }),
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(Error::io("locking", path, error.into())),
            }
        }
    }

    /// Adds an indirect root: `link` is an absolute path of a symlink into the store. Durable on
    /// return.
    ///
    /// # Errors
    /// `link` is not absolute, I/O.
    pub fn add_indirect_root(&self, link: &Path) -> Result<()> {
        self.check_writable()?;
        if !link.is_absolute() {
            return Err(Error::user(format!(
                "not an absolute path: '{}'",
                link.display()
            )));
        }
        let hash = Hash::of(HashAlgorithm::Sha1, link.as_os_str().as_bytes());
        let auto = self.dir().join("gcroots/auto");
        fs::create_dir_all(&auto).map_err(|e| Error::io("creating", &auto, e))?;
        replace_symlink(link.as_os_str(), &auto.join(hash.to_nix32()))
    }

    /// Adds a permanent root: makes the symlink `link` to `path` (durably) and registers it.
    ///
    /// # Errors
    /// `link` lies in the store directory, or something that is not a symlink into the store is
    /// there; `path` is not valid; I/O.
    pub fn add_perm_root(&self, path: &StorePath, link: &Path) -> Result<()> {
        self.check_writable()?;
        let link = place_for_root(self.store_dir(), link)?;
        // Alive before the link says so: no collection comes in between.
        let owner = self.temp_root_owner()?;
        self.add_temp_root(&owner, path)?;
        if !self.is_valid(path)? {
            return Err(self.not_valid(path));
        }
        if let Some(parent) = link.parent() {
            fs::create_dir_all(parent).map_err(|e| Error::io("creating", parent, e))?;
        }
        replace_symlink(OsStr::new(&self.store_dir().print(path)), &link)?;
        self.add_indirect_root(&link)
    }

    /// All roots: (link or `{temp:PID}`, target), sorted. Indirect roots whose link is gone are
    /// removed. Targets need not be valid.
    ///
    /// # Errors
    /// I/O.
    pub fn roots(&self) -> Result<Vec<(PathBuf, StorePath)>> {
        let mut roots = self.permanent_roots()?;
        roots.extend(self.temporary_roots(false)?);
        roots.sort();
        roots.dedup();
        Ok(roots)
    }

    /// Roots below `gcroots/`.
    pub(super) fn permanent_roots(&self) -> Result<Vec<(PathBuf, StorePath)>> {
        let mut roots = Vec::new();
        let top = self.dir().join("gcroots");
        self.find_roots(&top, &top.join("auto"), 0, &mut roots)?;
        Ok(roots)
    }

    fn find_roots(
        &self,
        dir: &Path,
        auto: &Path,
        depth: usize,
        roots: &mut Vec<(PathBuf, StorePath)>,
    ) -> Result<()> {
        if depth > GCROOTS_DEPTH_MAX {
            return Err(Error::environment(format!(
                "{} lies deeper than {GCROOTS_DEPTH_MAX} directories",
                dir.display()
            )));
        }
        let entries = match fs::read_dir(dir) {
            Ok(entries) => entries,
            Err(error) if is_absent(&error) => return Ok(()),
            Err(error) => return Err(Error::io("reading", dir, error)),
        };
        for entry in entries {
            let entry = entry.map_err(|e| Error::io("reading", dir, e))?;
            let path = entry.path();
            let Ok(kind) = entry.file_type() else {
                continue;
            };
            if kind.is_dir() {
                self.find_roots(&path, auto, depth + 1, roots)?;
            } else if kind.is_symlink() {
                let Ok(target) = fs::read_link(&path) else {
                    continue;
                };
                if let Some(store_path) = self.store_path_of(&target) {
                    roots.push((path, store_path));
                    continue;
                }
                // An indirect root: the symlink that it names must lead into the store.
                let link = dir.join(&target);
                match fs::symlink_metadata(&link) {
                    Ok(metadata) if metadata.is_symlink() => {
                        if let Some(store_path) = fs::read_link(&link)
                            .ok()
                            .and_then(|t| self.store_path_of(&t))
                        {
                            roots.push((link, store_path));
                        }
                    }
                    Ok(_) => {}
                    Err(error) if is_absent(&error) => {
                        if dir == auto && !self.is_read_only() {
                            tracing::info!(
                                "removing stale link from \"{}\" to \"{}\"",
                                path.display(),
                                target.display()
                            );
                            remove_if_there(&path)?;
                        }
                    }
                    // Not ours to see, as in Nix.
                    Err(error) if error.kind() == ErrorKind::PermissionDenied => {}
                    Err(error) => return Err(Error::io("reading", link, error)),
                }
            } else if kind.is_file()
                && let Some(store_path) = entry
                    .file_name()
                    .to_str()
                    .and_then(|n| StorePath::from_base_name(n).ok())
            {
                roots.push((path, store_path));
            }
        }
        Ok(())
    }

    /// The store path that `target` names or lies in.
    fn store_path_of(&self, target: &Path) -> Option<StorePath> {
        self.store_dir()
            .parse_below(target.as_os_str().as_bytes())
            .ok()
            .map(|(path, _)| path)
    }

    /// Temporary roots of living owners, and paths of mounted generations. With `remove_dead` (under the exclusive lock
    /// only), files of dead owners go.
    pub(super) fn temporary_roots(&self, remove_dead: bool) -> Result<Vec<(PathBuf, StorePath)>> {
        self.temporary_roots_but(remove_dead, None)
    }

    /// The same without the paths of one generation.
    pub(super) fn temporary_roots_but(
        &self,
        remove_dead: bool,
        generation: Option<u64>,
    ) -> Result<Vec<(PathBuf, StorePath)>> {
        let dir = self.dir().join("temproots");
        let mut roots = Vec::new();
        let entries = match fs::read_dir(&dir) {
            Ok(entries) => entries,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(roots),
            Err(error) => return Err(Error::io("reading", dir, error)),
        };
        for entry in entries {
            let path = entry.map_err(|e| Error::io("reading", &dir, e))?.path();
            let mut file = match File::open(&path) {
                Ok(file) => file,
                // Its owner ended just now.
                Err(error) if error.kind() == ErrorKind::NotFound => continue,
                Err(error) if error.kind() == ErrorKind::PermissionDenied && !remove_dead => {
                    continue;
                }
                Err(error) => return Err(Error::io("opening", path, error)),
            };
            match flock(&file, FlockOperation::NonBlockingLockShared) {
                Ok(()) => {
                    if remove_dead {
                        remove_if_there(&path)?;
                    }
                    continue;
                }
                Err(rustix::io::Errno::WOULDBLOCK) => {}
                Err(error) => return Err(Error::io("locking", path, error.into())),
            }
            let name = path.file_name().and_then(OsStr::to_str).unwrap_or_default();
            let pid = name.split_once('-').map_or(name, |(pid, _)| pid);
            let link = PathBuf::from(format!("{{temp:{pid}}}"));
            let mut text = String::new();
            file.read_to_string(&mut text)
                .map_err(|e| Error::io("reading", &path, e))?;
            // A line without its end was never acknowledged.
            for line in text
                .split_inclusive('\n')
                .filter_map(|line| line.strip_suffix('\n'))
            {
                roots.push((link.clone(), StorePath::from_base_name(line)?));
            }
        }
        roots.extend(crate::generation::roots_in_use(self.dir(), generation)?);
        Ok(roots)
    }
}

fn is_absent(error: &std::io::Error) -> bool {
    matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory)
}

/// Makes or replaces the symlink `link`, atomically and durably.
fn replace_symlink(target: &OsStr, link: &Path) -> Result<()> {
    let Some(parent) = link.parent() else {
        return Err(Error::user(format!(
            "{} is not a file name",
            link.display()
        )));
    };
    let draft = tempfile::Builder::new()
        .prefix(".tmp-")
        .make_in(parent, |path| symlink(target, path))
        .map_err(|e| Error::io("creating a symlink in", parent, e))?;
    draft
        .into_temp_path()
        .persist(link)
        .map_err(|e| Error::io("creating", link, e.error))?;
    sync_dir(parent)
}
