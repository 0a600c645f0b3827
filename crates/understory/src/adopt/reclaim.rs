//! Deletes originals that the castore has, which is what frees space.
//!
//! Each is read back from the castore and hashed first. A name goes by a rename, so an interruption leaves whole
//! objects only. What a process has had open since before the overlay came stays.

use super::{Adoption, Control, Phase, Step, by_name, is_object, state, tree, verify};
use crate::{Error, Result, Store, namespace};
use serde::Serialize;
use std::ffi::OsString;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use understory_nix::StorePath;

/// What a reclaim did.
#[derive(Debug, Clone, Default, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Reclaimed {
    /// Originals deleted.
    pub paths: u64,
    /// Bytes on disk that this freed, about: hard links between originals count once their last name goes.
    pub freed_bytes: u64,
    /// Originals that a process still uses from before.
    pub in_use: u64,
    /// Originals that only the store directory has; they stay.
    pub kept: u64,
}

impl Adoption {
    /// Deletes the originals of all paths that the castore has and the overlay shows.
    ///
    /// # Errors
    /// The store is not adopted, or the overlay is not mounted; this machine needs its store to start, or this
    /// program lies in it; a path that does not verify; interrupted.
    pub fn reclaim(&self, control: &Control<'_>) -> Result<Reclaimed> {
        let (store, mut state, _lock) = self.begun()?;
        if state.phase != Phase::Swapped || !self.is_mounted()? {
            return Err(Error::user(format!(
                "the overlay is not mounted on {}: nothing is deleted",
                self.nix.real.display()
            ))
            .with_hint("run `understory adopt` first"));
        }
        self.check_needed_to_start()?;
        let original = self.nix.original(&self.layout)?;
        if !original.is_hidden {
            return Err(Error::internal("the originals are not hidden"));
        }
        if !state.reclaimed {
            state.reclaimed = true;
            state.save(&self.layout.store)?;
        }
        tree::sweep(&original.path)?;
        let (_, in_use) = self.nix.uses(self.overlay()?);
        let valid = self.valid(&store)?;
        let rows = by_name(&valid);
        let mut done = Reclaimed::default();
        let mut todo = Vec::new();
        for name in tree::names(&original.path)? {
            if !is_object(&name) {
                continue;
            }
            if in_use.contains_key::<OsString>(&name.clone().into_os_string()) {
                done.in_use += 1;
            } else if let Some(path) = self.in_castore(&store, &name, &rows)? {
                todo.push(path);
            } else {
                done.kept += 1;
            }
        }
        let total = todo.iter().map(|path| path.nar_size).sum();
        let freed = AtomicU64::new(0);
        let jobs = self.options.jobs;
        done.paths = verify::each(&todo, jobs, Step::Reclaiming, total, control, &|path| {
            verify::one(&store, path)?;
            let name = path.path.base_name();
            if !namespace::exists(&self.nix.real.join(name)) {
                return Err(Error::environment(format!(
                    "path '{}' does not show through the overlay any more",
                    store.store_dir().print(&path.path)
                )));
            }
            let bytes = tree::freed_bytes(&original.path.join(name));
            tree::discard(&original.path, name)?;
            freed.fetch_add(bytes, Ordering::Relaxed);
            Ok(path.nar_size)
        })?;
        done.freed_bytes = freed.into_inner() + unlink_unused(&original.path.join(".links"))?;
        state::sync_directory(&original.path)?;
        Ok(done)
    }

    /// A path that may go: valid in the castore with the hash that Nix's database has, if it has a row.
    fn in_castore(
        &self,
        store: &Store,
        name: &Path,
        rows: &std::collections::HashMap<&str, &super::Valid>,
    ) -> Result<Option<super::Valid>> {
        let Some(text) = name.to_str() else {
            return Ok(None);
        };
        let Some(stored) = store.path(&StorePath::from_base_name(text)?)? else {
            return Ok(None);
        };
        Ok(match rows.get(text) {
            Some(row) if row.nar_hash != stored.info.nar_hash => None,
            Some(row) => Some((*row).clone()),
            None => Some(super::Valid {
                path: stored.info.path.clone(),
                nar_hash: stored.info.nar_hash,
                nar_size: stored.info.nar_size,
            }),
        })
    }

    /// Refuses where nothing could start the instance again.
    fn check_needed_to_start(&self) -> Result<()> {
        let root = self.nix.real.parent().and_then(Path::parent);
        let root = root.unwrap_or(Path::new("/"));
        if namespace::exists(&root.join("etc/NIXOS")) {
            return Err(Error::user(format!(
                "{} is a NixOS system, which starts from its store: its originals stay",
                root.display()
            )));
        }
        let program = std::env::current_exe().unwrap_or_else(|_| PathBuf::new());
        if program.starts_with(&self.nix.real) {
            return Err(Error::user(format!(
                "this program lies in the store itself: {}",
                program.display()
            ))
            .with_hint("it must be able to start without the store: install it elsewhere, then use that one"));
        }
        Ok(())
    }
}

/// Removes entries of `.links` that no object shares any more; returns the bytes that this frees.
fn unlink_unused(links: &Path) -> Result<u64> {
    let mut freed = 0;
    for name in tree::names(links)? {
        let link = links.join(name);
        let found = fs::symlink_metadata(&link).map_err(|e| Error::io("examining", &link, e))?;
        if found.nlink() == 1 && !found.is_dir() {
            fs::remove_file(&link).map_err(|e| Error::io("removing", &link, e))?;
            freed += found.blocks() * 512;
        }
    }
    Ok(freed)
}
