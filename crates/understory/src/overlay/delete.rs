//! Deleting objects: never a whiteout for a name that a lower has or may get, never what a lower needs.
//!
//! overlayfs makes a whiteout when a name is removed that a lower directory has, whatever the lower's database says.
//! So what counts is the directory entry. A name that a lower has is removed in the upper directory itself, below the
//! overlayfs, which then has stale entries in its cache: a remount is noted on disk before. Other names are removed
//! through the merged directory, which keeps overlayfs's cache right. A lower that gets the name in that very moment
//! leaves a whiteout, which is looked for afterwards and removed. A lower whose server died makes overlayfs assume that it
//! has every name (`ovl_lower_positive`): whoever removes something then leaves a whiteout. After a crash the next open
//! removes them.

use super::Overlay;
use crate::local::restore::remove_tree;
use crate::{Error, Result};
use std::ffi::OsStr;
use std::fs::DirEntry;
use std::io::ErrorKind;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;
use understory_nix::StorePath;

impl Overlay {
    /// Removes the upper's copy of `path` from disk, if there is one; the rows are the caller's concern. Where a lower has
    /// the name, the copy is removed below the overlayfs and a remount becomes due; else through the merged directory.
    /// Returns the bytes that the upper gets back.
    ///
    /// # Errors
    /// I/O with the path.
    pub(super) fn delete_object(&self, path: &StorePath) -> Result<u64> {
        let valid_below = self
            .inner
            .lowers
            .iter()
            .map(|lower| Ok(lower.valid(std::slice::from_ref(path))?.pop() == Some(true)))
            .collect::<Result<Vec<bool>>>()?
            .contains(&true);
        self.delete_name(OsStr::new(path.base_name()), valid_below)
    }

    /// As [`Overlay::delete_object`], for any name at the top of the store. `valid_below` is true if a lower calls it
    /// valid, also if its directory does not show it.
    pub(super) fn delete_name(&self, name: &OsStr, valid_below: bool) -> Result<u64> {
        let upper = self.inner.upper.join(name);
        let Some(kind) = kind_of(&upper)? else {
            return Ok(0);
        };
        if kind == Kind::Whiteout {
            self.inner.merged.remount_is_due()?;
            remove_file(&upper)?;
            return Ok(0);
        }
        if valid_below || self.is_in_lower_dir(Path::new(name))? {
            return self.delete_directly(&upper);
        }
        let freed = match remove_tree(&self.inner.local.real.join(name)) {
            Ok(freed) => freed,
            // The upper was changed below the overlayfs: its cache does not know what is there.
            Err(error) if is_stale(&error) => 0,
            Err(error) => return Err(error),
        };
        match kind_of(&upper)? {
            None => Ok(freed),
            Some(Kind::Whiteout) => {
                self.inner.merged.remount_is_due()?;
                remove_file(&upper)?;
                Ok(freed)
            }
            // Not seen through the merged directory, or stale there.
            Some(Kind::Object) => Ok(freed.saturating_add(self.delete_directly(&upper)?)),
        }
    }

    /// Removes the whiteouts at the top of the upper directory that a crash left, whatever their names: a lower may get
    /// them. Notes that a remount is due.
    ///
    /// # Errors
    /// I/O with the upper directory.
    pub(super) fn remove_whiteouts(&self) -> Result<()> {
        let dir = &self.inner.upper;
        for entry in std::fs::read_dir(dir).map_err(|e| Error::io("reading", dir, e))? {
            let entry = entry.map_err(|e| Error::io("reading", dir, e))?;
            if is_whiteout(&entry)? {
                tracing::warn!("removing the whiteout {}", entry.path().display());
                self.delete_name(&entry.file_name(), false)?;
            }
        }
        Ok(())
    }

    /// True if the directory of a lower has an entry of that name.
    pub(super) fn is_in_lower_dir(&self, name: &Path) -> Result<bool> {
        for lower in &self.inner.lowers {
            let place = lower.real_dir().join(name);
            match std::fs::symlink_metadata(&place) {
                Ok(_) => return Ok(true),
                Err(error)
                    if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => {}
                Err(error) => return Err(Error::io("reading", place, error)),
            }
        }
        Ok(false)
    }

    /// Removes a tree in the upper directory itself.
    pub(super) fn delete_directly(&self, upper: &Path) -> Result<u64> {
        self.inner.merged.remount_is_due()?;
        remove_tree(upper)
    }
}

/// What the upper directory has under a name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// Character device 0/0: overlayfs hides a lower entry.
    Whiteout,
    /// Anything else.
    Object,
}

/// `None` if there is nothing.
pub(super) fn kind_of(upper: &Path) -> Result<Option<Kind>> {
    match std::fs::symlink_metadata(upper) {
        Ok(metadata) if metadata.file_type().is_char_device() && metadata.rdev() == 0 => {
            Ok(Some(Kind::Whiteout))
        }
        Ok(_) => Ok(Some(Kind::Object)),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(Error::io("reading", upper, error)),
    }
}

/// True for a whiteout. Other types are told from the directory, without a system call for each.
pub(super) fn is_whiteout(entry: &DirEntry) -> Result<bool> {
    let is_device = entry.file_type().is_ok_and(|kind| kind.is_char_device());
    Ok(is_device && kind_of(&entry.path())? == Some(Kind::Whiteout))
}

fn remove_file(path: &Path) -> Result<()> {
    match std::fs::remove_file(path) {
        Ok(()) => Ok(()),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        Err(error) => Err(Error::io("removing", path, error)),
    }
}

/// True if the cause is ESTALE.
fn is_stale(error: &Error) -> bool {
    let mut cause = std::error::Error::source(error);
    while let Some(inner) = cause {
        if let Some(io) = inner.downcast_ref::<std::io::Error>() {
            return io.raw_os_error() == Some(rustix::io::Errno::STALE.raw_os_error());
        }
        cause = inner.source();
    }
    false
}
