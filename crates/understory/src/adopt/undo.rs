//! The way back: every valid path an object in the store directory again, and no overlay.
//!
//! While the overlay still serves, each original is hashed; what is missing or differs is made anew from the
//! castore. Then the overlay goes, and what only its upper directory has moves down. At the end every valid path's
//! object was seen with its hash.

use super::nix_store::{self, Original};
use super::{Adoption, Call, Control, Phase, State, Step, Valid, by_name, state, tree, verify};
use crate::{Error, Result, Store, namespace, up};
use rustix::io::Errno;
use serde::Serialize;
use std::collections::HashSet;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Mutex;
use std::sync::PoisonError;

/// Marks that overlayfs leaves on directories of an upper one; a store object has none.
const MARKS: [&str; 2] = ["trusted.overlay.", "user.overlay."];
/// Longest list of names of extended attributes, from the kernel's XATTR_LIST_MAX.
const XATTR_LIST_BYTES_MAX: usize = 65536;
/// Paths that are named.
const NAMED_MAX: usize = 20;

/// What an undo did.
#[derive(Debug, Clone, Default, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Undone {
    /// Valid paths whose objects have their hashes.
    pub paths: u64,
    /// Of these, made from the castore.
    pub restored: u64,
    /// Of these, moved from the upper directory.
    pub moved: u64,
    /// Valid paths whose objects are nowhere or damaged everywhere, at most twenty.
    pub missing: Vec<String>,
    /// Store paths that garbage-collector roots point to and only the castore has, at most twenty.
    pub only_in_castore: Vec<String>,
    /// Objects of the upper directory that are no valid paths; they stay there.
    pub leftovers: u64,
}

impl Adoption {
    /// Takes the castore away again. `stop` stops the instance, which unmounts the overlay.
    ///
    /// # Errors
    /// Nothing was adopted; the store or the overlay is in use; the disk is too small; interrupted.
    pub fn undo(&self, stop: Call<'_>, control: &Control<'_>) -> Result<Undone> {
        let (store, mut state, _lock) = self.begun()?;
        let at = &self.layout.store;
        if state.phase < Phase::Swapping {
            State::remove(at)?;
            return Ok(Undone::default());
        }
        let instance = self.instance()?;
        let locks = self
            .nix
            .lock(self.options.wait, &instance, control.cancel)?;
        let overlay = self.overlay()?;
        if let Some(id) = overlay {
            let (users, _) = self.nix.uses(Some(id));
            let users: Vec<_> = users
                .into_iter()
                .filter(|user| !instance.contains(&user.pid))
                .collect();
            if !users.is_empty() {
                return Err(Error::user(format!(
                    "the overlay on {} is in use: {}",
                    self.nix.real.display(),
                    nix_store::name(&users)
                ))
                .with_hint("end them, then run the same command again"));
            }
        }
        state.phase = Phase::Undoing;
        state.save(at)?;

        let valid = self.valid(&store)?;
        let mut done = Undone::default();
        let original = self.nix.original(&self.layout)?;
        tree::sweep(&original.path)?;
        let lacking = self.restore(&store, &original, &valid, &mut done, control)?;
        drop(original);

        if !instance.is_empty() {
            stop(&self.layout)?;
        }
        for what in up::mend(&self.layout)? {
            tracing::info!("removed {what}");
        }
        if self.overlay()?.is_some() {
            return Err(Error::environment(format!(
                "the overlay is still mounted on {}",
                self.nix.real.display()
            ))
            .with_hint("stop whatever uses it, then run the same command again"));
        }
        locks.exclude(&self.nix, self.options.wait, control.cancel)?;
        self.move_down(&store, &lacking, &mut done, control)?;
        self.drop_copies(&valid, &lacking)?;
        done.paths = valid.len() as u64 - done.missing.len() as u64;
        done.leftovers = self.leftovers(&valid)?;
        done.only_in_castore = self.roots_only_in_castore(&store, &valid)?;
        // What is in memory of the names must be on disk before the note of the adoption goes.
        state::sync_directory(&self.nix.real)?;
        State::remove(at)?;
        drop(locks);
        Ok(done)
    }

    /// Hashes the originals and makes those that lack from the castore. Returns what the castore has not.
    fn restore(
        &self,
        store: &Store,
        original: &Original,
        valid: &[Valid],
        done: &mut Undone,
        control: &Control<'_>,
    ) -> Result<Vec<Valid>> {
        self.check_space(store, original, valid)?;
        let owner = self.nix.owner()?;
        let lacking: Mutex<Vec<Valid>> = Mutex::default();
        let restored: Mutex<u64> = Mutex::default();
        let total = valid.iter().map(|path| path.nar_size).sum();
        let jobs = self.options.jobs;
        verify::each(valid, jobs, Step::Restoring, total, control, &|path| {
            let name = path.path.base_name();
            let object = original.path.join(name);
            if namespace::exists(&object)
                && tree::hash(&object, control.cancel).is_ok_and(|hash| hash == path.nar_hash)
            {
                return Ok(path.nar_size);
            }
            tree::check(control.cancel)?;
            let stored = store
                .path(&path.path)?
                .filter(|stored| stored.info.nar_hash == path.nar_hash);
            let Some(stored) = stored else {
                let mut lacking = lacking.lock().unwrap_or_else(PoisonError::into_inner);
                lacking.push(path.clone());
                return Ok(path.nar_size);
            };
            tree::place(
                &tree::Origin::Castore(store.castore(), &stored.root),
                &original.path,
                name,
                &path.nar_hash,
                owner,
                control.cancel,
            )?;
            *restored.lock().unwrap_or_else(PoisonError::into_inner) += 1;
            Ok(path.nar_size)
        })?;
        state::sync_directory(&original.path)?;
        done.restored = restored
            .into_inner()
            .unwrap_or_else(PoisonError::into_inner);
        Ok(lacking.into_inner().unwrap_or_else(PoisonError::into_inner))
    }

    fn check_space(&self, store: &Store, original: &Original, valid: &[Valid]) -> Result<()> {
        let mut needed = 0_u64;
        for path in valid {
            let is_there = namespace::exists(&original.path.join(path.path.base_name()));
            if !is_there && store.is_valid(&path.path)? {
                needed += path.nar_size;
            }
        }
        let space = rustix::fs::statvfs(&original.path)
            .map_err(|e| Error::io("asking for the free space of", &self.nix.real, e.into()))?;
        let free = space.f_bavail.saturating_mul(space.f_frsize);
        if needed <= free {
            return Ok(());
        }
        Err(Error::environment(format!(
            "{} needs {needed} bytes for the objects that only the castore has, {free} are free",
            self.nix.real.display()
        ))
        .with_hint("make room, or collect garbage in the overlay store first"))
    }

    /// Moves what only the upper directory has to the store directory.
    fn move_down(
        &self,
        store: &Store,
        lacking: &[Valid],
        done: &mut Undone,
        control: &Control<'_>,
    ) -> Result<()> {
        let (upper, real) = (&self.layout.upper, &self.nix.real);
        let owner = self.nix.owner()?;
        for path in lacking {
            tree::check(control.cancel)?;
            let name = path.path.base_name();
            let above = upper.join(name);
            if tree::expect_hash(&above, &path.nar_hash, control.cancel).is_err() {
                tree::check(control.cancel)?;
                // A run that was interrupted may have moved it.
                if tree::expect_hash(&real.join(name), &path.nar_hash, control.cancel).is_err()
                    && done.missing.len() < NAMED_MAX
                {
                    done.missing.push(store.store_dir().print(&path.path));
                }
                continue;
            }
            if same_file_system(&above, real) {
                strip_marks(&above)?;
                tree::swap_in(&above, real, name)?;
            } else {
                let origin = tree::Origin::Disk(&above);
                tree::place(&origin, real, name, &path.nar_hash, owner, control.cancel)?;
                state::sync_directory(real)?;
                tree::remove(&above)?;
            }
            done.moved += 1;
        }
        state::sync_directory(real)
    }

    /// Removes objects of the upper directory that the store directory has: their hashes were compared.
    fn drop_copies(&self, valid: &[Valid], lacking: &[Valid]) -> Result<()> {
        let (rows, lacking) = (by_name(valid), by_name(lacking));
        let upper = &self.layout.upper;
        tree::sweep(upper)?;
        for name in tree::names(upper)? {
            if let Some(name) = name.to_str()
                && rows.contains_key(name)
                && !lacking.contains_key(name)
            {
                tree::discard(upper, name)?;
            }
        }
        Ok(())
    }

    /// Objects of the upper directory that no row names.
    fn leftovers(&self, valid: &[Valid]) -> Result<u64> {
        let rows = by_name(valid);
        let names = tree::names(&self.layout.upper)?;
        let left = names.iter().filter(|name| {
            super::is_object(name) && !name.to_str().is_some_and(|name| rows.contains_key(name))
        });
        Ok(left.count() as u64)
    }

    /// Store paths that roots point to, that Nix's database lacks and the castore has.
    fn roots_only_in_castore(&self, store: &Store, valid: &[Valid]) -> Result<Vec<String>> {
        let rows: HashSet<&str> = valid.iter().map(|path| path.path.base_name()).collect();
        let mut found = Vec::new();
        let mut dirs = vec![
            self.nix.state.join("gcroots"),
            self.nix.state.join("profiles"),
        ];
        while let Some(dir) = dirs.pop() {
            for name in tree::names(&dir)? {
                let place = dir.join(name);
                let Ok(kind) = fs::symlink_metadata(&place) else {
                    continue;
                };
                if kind.is_dir() {
                    dirs.push(place);
                    continue;
                }
                let Ok(target) = fs::read_link(&place) else {
                    continue;
                };
                let target = fs::read_link(dir.join(&target)).unwrap_or(target);
                let Some(text) = target.to_str() else {
                    continue;
                };
                let Ok((path, _)) = store.store_dir().parse_below(text.as_bytes()) else {
                    continue;
                };
                if !rows.contains(path.base_name())
                    && found.len() < NAMED_MAX
                    && store.is_valid(&path)?
                {
                    found.push(store.store_dir().print(&path));
                }
            }
        }
        found.sort();
        found.dedup();
        Ok(found)
    }
}

fn same_file_system(a: &Path, b: &Path) -> bool {
    let device = |path: &Path| fs::symlink_metadata(path).map(|found| found.dev()).ok();
    device(a).is_some() && device(a) == device(b)
}

/// Removes overlayfs's marks from a tree.
fn strip_marks(path: &Path) -> Result<()> {
    let found = fs::symlink_metadata(path).map_err(|e| Error::io("examining", path, e))?;
    if found.is_symlink() {
        return Ok(());
    }
    let mut buffer = vec![0_u8; XATTR_LIST_BYTES_MAX];
    let bytes = match rustix::fs::llistxattr(path, &mut buffer[..]) {
        Ok(bytes) => bytes,
        Err(Errno::OPNOTSUPP) => 0,
        Err(e) => return Err(Error::io("listing extended attributes of", path, e.into())),
    };
    for name in buffer[..bytes].split(|byte| *byte == 0) {
        let Ok(name) = std::str::from_utf8(name) else {
            continue;
        };
        if MARKS.iter().any(|mark| name.starts_with(mark)) {
            rustix::fs::lremovexattr(path, name)
                .map_err(|e| Error::io("removing extended attributes of", path, e.into()))?;
        }
    }
    if found.is_dir() {
        for name in tree::names(path)? {
            strip_marks(&path.join(name))?;
        }
    }
    Ok(())
}
