//! Checks all of an image, as `fsck.erofs` does.
//!
//! Every directory is walked once: names in order, `.` and `..` right, entries of the kind that their inode is, no
//! directory with two names, every extent inside image or device, as many inodes as the superblock says. The work is
//! bounded: no more entries are looked at than the image has room for, so that directories that share blocks cannot
//! multiply it.
//!
//! Cost: an inode and its extents are read for each name; 8 bytes an inode in memory, 16 a directory that waits.

use crate::error::ErofsError;
use crate::layout::{
    DIRENT_BYTES, FileType, MODE_DIRECTORY, MODE_EXECUTABLE, MODE_FILE, MODE_SYMLINK,
};
use crate::reader::{Image, Inode, ReadAt, corrupt_inode};
use std::collections::HashSet;

/// What was found in a whole image.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Verified {
    /// Inodes.
    pub inodes: u64,
    /// Directories.
    pub directories: u64,
    /// Names of regular files.
    pub files: u64,
    /// Names of symlinks.
    pub symlinks: u64,
    /// Bytes of regular files, each inode once.
    pub bytes: u64,
}

impl<R: ReadAt> Image<R> {
    /// Walks all of it. With `canonical`, owner, mode and links must be those of a Nix store as well.
    ///
    /// # Errors
    /// The first thing that is wrong.
    pub fn verify(&self, canonical: bool) -> Result<Verified, ErofsError> {
        let root = self.root()?;
        let mut walk = Walk {
            image: self,
            canonical,
            found: Verified::default(),
            seen: HashSet::new(),
            waiting: Vec::new(),
            // A name of one byte at least.
            entries_left: self.source().len() / (DIRENT_BYTES as u64 + 1),
        };
        walk.seen.insert(root.number);
        walk.inode(&root)?;
        walk.waiting.push((root.number, root.number));
        while let Some((number, parent)) = walk.waiting.pop() {
            walk.directory(number, parent)?;
        }
        let inodes = self.superblock().inodes;
        if walk.found.inodes != inodes {
            return Err(ErofsError::corrupt(
                "the superblock",
                format!("expected {inodes} inodes, found {}", walk.found.inodes),
            ));
        }
        Ok(walk.found)
    }
}

struct Walk<'a, R> {
    image: &'a Image<R>,
    canonical: bool,
    found: Verified,
    seen: HashSet<u64>,
    /// Directories and their parents.
    waiting: Vec<(u64, u64)>,
    entries_left: u64,
}

impl<R: ReadAt> Walk<'_, R> {
    fn directory(&mut self, number: u64, parent: u64) -> Result<(), ErofsError> {
        let inode = self.image.inode(number)?;
        let mut dots = 0;
        let mut failed = None;
        self.image.entries(&inode, |entry| {
            let result = match entry.name.as_slice() {
                b"." => {
                    dots += 1;
                    same(number, ".", number, entry.number)
                }
                b".." => {
                    dots += 1;
                    same(number, "..", parent, entry.number)
                }
                _ => self.entry(number, entry.number, entry.kind),
            };
            failed = result.err();
            failed.is_none()
        })?;
        if let Some(error) = failed {
            return Err(error);
        }
        if dots != 2 {
            return Err(corrupt_inode(number, "`.` or `..` is missing"));
        }
        Ok(())
    }

    fn entry(&mut self, directory: u64, number: u64, kind: FileType) -> Result<(), ErofsError> {
        self.entries_left = self
            .entries_left
            .checked_sub(1)
            .ok_or_else(|| ErofsError::corrupt("the image", "more entries than it has room for"))?;
        match kind {
            FileType::Directory => {}
            FileType::File => self.found.files += 1,
            FileType::Symlink => self.found.symlinks += 1,
        }
        let new = self.seen.insert(number);
        if !new && kind == FileType::Directory {
            return Err(corrupt_inode(number, "a directory with two names"));
        }
        let inode = self.image.inode(number)?;
        if inode.kind != kind {
            return Err(corrupt_inode(
                number,
                format!(
                    "directory {directory} says {kind:?}, it is {:?}",
                    inode.kind
                ),
            ));
        }
        if new {
            self.inode(&inode)?;
            if kind == FileType::Directory {
                self.waiting.push((number, directory));
            }
        }
        Ok(())
    }

    /// Counts an inode and checks what it has.
    fn inode(&mut self, inode: &Inode) -> Result<(), ErofsError> {
        self.found.inodes += 1;
        match inode.kind {
            FileType::Directory => self.found.directories += 1,
            FileType::Symlink => {
                let target = self.image.target(inode)?;
                if target.contains(&0) {
                    return Err(corrupt_inode(inode.number, "a target with NUL"));
                }
            }
            FileType::File => self.extents(inode)?,
        }
        let expected = match inode.kind {
            FileType::Directory => [MODE_DIRECTORY; 2],
            FileType::Symlink => [MODE_SYMLINK; 2],
            FileType::File => [MODE_FILE, MODE_EXECUTABLE],
        };
        if self.canonical
            && (!expected.contains(&inode.mode)
                || (inode.uid, inode.gid, inode.links, inode.mtime_s) != (0, 0, 1, 1))
        {
            return Err(corrupt_inode(
                inode.number,
                format!("its attributes are not those of a store: {inode:?}"),
            ));
        }
        Ok(())
    }

    fn extents(&mut self, inode: &Inode) -> Result<(), ErofsError> {
        self.found.bytes = self.found.bytes.saturating_add(inode.size);
        let mut offset = 0;
        while let Some(extent) = self.image.extent(inode, offset)? {
            // A chunk has an index of four bytes at least, so that the same room bounds them.
            self.entries_left = self.entries_left.checked_sub(1).ok_or_else(|| {
                ErofsError::corrupt("the image", "more chunks than it has room for")
            })?;
            offset += extent.bytes;
        }
        Ok(())
    }
}

fn same(directory: u64, name: &str, expected: u64, found: u64) -> Result<(), ErofsError> {
    if expected == found {
        return Ok(());
    }
    Err(corrupt_inode(
        directory,
        format!("`{name}`: expected {expected}, found {found}"),
    ))
}
