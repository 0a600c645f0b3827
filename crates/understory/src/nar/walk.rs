//! File trees on disk into the castore.
//!
//! A tree is walked in the order of its NAR (names sorted as raw bytes), relative to directory
//! descriptors and without ever following a symlink, so that a tree which changes meanwhile cannot
//! lead elsewhere. A file whose size changes while it is read is an error, never a wrong archive.
//!
//! Cost: one `openat`, `fstat` and two reads per small file; one descriptor per open directory, of
//! which the NAR's depth limit allows 64.

use super::hashes::{NarSink, TreeHasher};
use super::{BUFFER_BYTES, ReadNar, ReadOptions};
use crate::{Error, Result};
use rustix::fs::{AtFlags, CWD, Dir, FileType, Mode, OFlags};
use rustix::io::Errno;
use std::ffi::{CStr, CString, OsStr};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use understory_castore::{TreeBuilder, Writer};
use understory_nix::nar::{NarError, Writer as NarWriter};

/// Walks a file, directory or symlink on disk into the castore, hashing its NAR on the way.
/// Metadata other than the executable bit is ignored; sockets, devices and fifos are refused.
///
/// # Errors
/// I/O (with the path), unsupported file type, castore error.
pub fn read_path(writer: &Arc<Writer>, path: &Path) -> Result<ReadNar> {
    read_path_with(writer, path, &ReadOptions::default())
}

/// [`read_path`] with options.
///
/// # Errors
/// As [`read_path`]; a flat hash of something that is not a file; cancelled.
pub fn read_path_with(
    writer: &Arc<Writer>,
    path: &Path,
    options: &ReadOptions<'_>,
) -> Result<ReadNar> {
    let name = CString::new(path.as_os_str().as_bytes())
        .map_err(|_| Error::user(format!("{:?} holds a NUL byte", path.display())))?;
    let stat = rustix::fs::statat(CWD, &name, AtFlags::SYMLINK_NOFOLLOW)
        .map_err(|e| Error::io("reading", path, e.into()))?;
    let mut walk = Walk {
        builder: TreeBuilder::new(writer.clone()),
        nar: NarWriter::new(NarSink::new(options.hash, options.bytes)),
        tree: TreeHasher::new(options.hash),
        buffer: vec![0; BUFFER_BYTES],
        place: path.to_path_buf(),
        options,
    };
    walk.node(CWD, &name, None, FileType::from_raw_mode(stat.st_mode))?;
    let Walk {
        builder, nar, tree, ..
    } = walk;
    let (nar_hash, nar_size, raw_hash) = nar.finish()?.finish();
    let content_hash = match raw_hash {
        Some(hash) => Some(hash),
        None => tree.finish().map_err(|e| e.within(path))?,
    };
    Ok(ReadNar {
        root: builder.finish()?,
        nar_hash,
        nar_size,
        content_hash,
    })
}

struct Walk<'a> {
    builder: TreeBuilder,
    nar: NarWriter<NarSink<'a>>,
    tree: TreeHasher,
    buffer: Vec<u8>,
    /// Where the walk is, for errors.
    place: PathBuf,
    options: &'a ReadOptions<'a>,
}

impl Walk<'_> {
    /// Takes the node `name` of `parent`. `entry_name` is `None` for the root.
    fn node(
        &mut self,
        parent: BorrowedFd<'_>,
        name: &CStr,
        entry_name: Option<&[u8]>,
        kind: FileType,
    ) -> Result<()> {
        self.options.check_cancel()?;
        match kind {
            FileType::RegularFile => self.file(parent, name, entry_name),
            FileType::Directory => self.directory(parent, name, entry_name),
            FileType::Symlink => self.symlink(parent, name, entry_name),
            FileType::Unknown => {
                let stat = rustix::fs::statat(parent, name, AtFlags::SYMLINK_NOFOLLOW)
                    .map_err(|e| self.failed("reading", e))?;
                match FileType::from_raw_mode(stat.st_mode) {
                    FileType::Unknown => Err(self.unsupported()),
                    kind => self.node(parent, name, entry_name, kind),
                }
            }
            _ => Err(self.unsupported()),
        }
    }

    fn file(
        &mut self,
        parent: BorrowedFd<'_>,
        name: &CStr,
        entry_name: Option<&[u8]>,
    ) -> Result<()> {
        // NONBLOCK: should it have become a fifo, opening it must not wait.
        let flags =
            OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
        let fd = rustix::fs::openat(parent, name, flags, Mode::empty())
            .map_err(|e| self.failed("opening", e))?;
        let stat = rustix::fs::fstat(&fd).map_err(|e| self.failed("reading", e))?;
        if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
            return Err(self.unsupported());
        }
        let size = u64::try_from(stat.st_size).map_err(|_| self.failed("reading", Errno::INVAL))?;
        let executable = stat.st_mode & Mode::XUSR.as_raw_mode() != 0;
        let Self {
            builder,
            nar,
            tree,
            buffer,
            place,
            options,
        } = self;
        nar.file(entry_name, executable, size)
            .map_err(|e| in_place(e, place))?;
        tree.file_begin(entry_name, executable, size);
        let mut sink = builder.file(entry_name, executable, size)?;
        let mut left = size;
        loop {
            let count = read(&fd, buffer).map_err(|e| Error::io("reading", &*place, e.into()))?;
            let piece = &buffer[..count];
            match left.checked_sub(count as u64) {
                Some(rest) => left = rest,
                None => return Err(changed(place, size, "more")),
            }
            nar.contents(piece).map_err(|e| in_place(e, place))?;
            tree.contents(piece);
            sink.write(piece)?;
            // A short read of a regular file is its end.
            if count < buffer.len() {
                break;
            }
            options.check_cancel()?;
        }
        if left > 0 {
            return Err(changed(place, size, &(size - left).to_string()));
        }
        sink.finish()?;
        tree.file_end();
        Ok(())
    }

    fn directory(
        &mut self,
        parent: BorrowedFd<'_>,
        name: &CStr,
        entry_name: Option<&[u8]>,
    ) -> Result<()> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let fd = rustix::fs::openat(parent, name, flags, Mode::empty())
            .map_err(|e| self.failed("opening", e))?;
        let mut entries = Vec::new();
        for entry in Dir::read_from(&fd).map_err(|e| self.failed("reading", e))? {
            let entry = entry.map_err(|e| self.failed("reading", e))?;
            let name = entry.file_name();
            if name.to_bytes() != b"." && name.to_bytes() != b".." {
                entries.push((name.to_owned(), entry.file_type()));
            }
        }
        entries.sort_unstable_by(|a, b| a.0.cmp(&b.0));
        self.nar
            .directory_begin(entry_name)
            .map_err(|e| in_place(e, &self.place))?;
        self.tree.directory_begin(entry_name);
        self.builder.directory_begin(entry_name)?;
        for (name, kind) in entries {
            self.place.push(OsStr::from_bytes(name.to_bytes()));
            self.node(fd.as_fd(), &name, Some(name.to_bytes()), kind)?;
            self.place.pop();
        }
        self.nar
            .directory_end()
            .map_err(|e| in_place(e, &self.place))?;
        self.tree.directory_end();
        self.builder.directory_end()?;
        Ok(())
    }

    fn symlink(
        &mut self,
        parent: BorrowedFd<'_>,
        name: &CStr,
        entry_name: Option<&[u8]>,
    ) -> Result<()> {
        let target = rustix::fs::readlinkat(parent, name, Vec::new())
            .map_err(|e| self.failed("reading", e))?;
        let target = target.to_bytes();
        self.nar
            .symlink(entry_name, target)
            .map_err(|e| in_place(e, &self.place))?;
        self.tree.symlink(entry_name, target);
        self.builder.symlink(entry_name, target)?;
        Ok(())
    }

    fn failed(&self, verb: &str, error: Errno) -> Error {
        Error::io(verb, &self.place, error.into())
    }

    /// In Nix's words.
    fn unsupported(&self) -> Error {
        Error::user(format!(
            "file '{}' has an unsupported type",
            self.place.display()
        ))
    }
}

fn read(fd: &OwnedFd, buffer: &mut [u8]) -> std::result::Result<usize, Errno> {
    // Filled as far as it goes, so that a short count means the end.
    let mut filled = 0;
    while filled < buffer.len() {
        match rustix::io::read(fd, &mut buffer[filled..]) {
            Ok(0) => break,
            Ok(count) => filled += count,
            Err(Errno::INTR) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(filled)
}

fn changed(place: &Path, expected: u64, found: &str) -> Error {
    Error::user(format!(
        "file '{}' changed while it was read: expected {expected} bytes, found {found}",
        place.display()
    ))
}

fn in_place(error: NarError, place: &Path) -> Error {
    Error::from(error).within(place)
}
