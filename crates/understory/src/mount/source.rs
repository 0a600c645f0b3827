//! What a live mount shows: the seam between the file system and the store.

use super::protocol::FileSystemFigures;
use crate::open_files::Weigh;
use crate::store::StoredPath;
use crate::{Error, Result, Store};
use std::sync::Arc;
use understory_castore::{Blob, CastoreError, Digest, Directory, Node};
use understory_nix::StorePath;

/// A name in the root.
#[derive(Debug, Clone)]
pub(super) struct RootEntry {
    /// The row: grows, never used twice, at least 1.
    pub(super) row: u64,
    /// The name.
    pub(super) name: Box<str>,
    /// What it is.
    pub(super) node: Node,
}

/// Something that a live mount can show.
pub(super) trait Source: Send + Sync {
    /// The root's entry of that name. Sees all that was published before.
    fn find(&self, name: &[u8]) -> Result<Option<RootEntry>>;
    /// Root entries with a row above `after`, by row, at most `count`.
    fn list(&self, after: u64, count: usize) -> Result<Vec<RootEntry>>;
    /// Moves when root entries are deleted or replaced, by whichever process; grows only.
    fn changes(&self) -> u64;
    /// A directory's entries.
    fn directory(&self, digest: &Digest) -> Result<Arc<Directory>>;
    /// A file's contents.
    fn blob(&self, digest: &Digest, size: u64) -> Result<Arc<dyn Contents>>;
    /// Figures for statfs.
    fn figures(&self) -> Result<FileSystemFigures>;
}

/// The contents of one file.
pub(super) trait Contents: Weigh + Send + Sync {
    /// Reads at `offset`; short only at the end of the file.
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<usize, CastoreError>;
}

impl Weigh for Arc<dyn Contents> {
    fn memory_bytes(&self) -> u64 {
        (**self).memory_bytes()
    }
}

impl Contents for Blob {
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<usize, CastoreError> {
        Self::read_at(self, offset, buffer)
    }
}

impl From<&StoredPath> for RootEntry {
    fn from(path: &StoredPath) -> Self {
        Self {
            row: path.id,
            name: path.info.path.base_name().into(),
            node: path.root.clone(),
        }
    }
}

impl Source for Store {
    fn find(&self, name: &[u8]) -> Result<Option<RootEntry>> {
        // `.links`, lock files and whatever else clients look for are no store paths.
        let Some(path) = std::str::from_utf8(name)
            .ok()
            .and_then(|name| StorePath::from_base_name(name).ok())
        else {
            return Ok(None);
        };
        Ok(self.path(&path)?.as_deref().map(RootEntry::from))
    }

    fn list(&self, after: u64, count: usize) -> Result<Vec<RootEntry>> {
        Ok(Self::list(self, after, count)?
            .iter()
            .map(|path| RootEntry::from(&**path))
            .collect())
    }

    fn changes(&self) -> u64 {
        self.changes()
    }

    fn directory(&self, digest: &Digest) -> Result<Arc<Directory>> {
        Ok(self.castore().directory(digest)?)
    }

    fn blob(&self, digest: &Digest, size: u64) -> Result<Arc<dyn Contents>> {
        Ok(Arc::new(self.castore().blob(digest, size)?))
    }

    fn figures(&self) -> Result<FileSystemFigures> {
        let dir = self.dir();
        let fs = rustix::fs::statvfs(dir).map_err(|e| Error::io("examining", dir, e.into()))?;
        Ok(FileSystemFigures {
            block_bytes: u32::try_from(fs.f_frsize).unwrap_or(4096),
            blocks: fs.f_blocks,
            blocks_free: fs.f_bfree,
            blocks_available: fs.f_bavail,
            files: fs.f_files,
            files_free: fs.f_ffree,
        })
    }
}
