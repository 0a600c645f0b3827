//! File trees on disk into the castore, or out as an archive.
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
use std::io::Write;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use understory_castore::{TreeBuilder, Writer};
use understory_nix::nar::{NarError, Writer as NarWriter};
use understory_nix::{Hash, NarHash};

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
    let builder = Some(options.builder(writer));
    let (builder, hashes) = walk(builder, None, path, options)?;
    let builder = builder.ok_or_else(|| Error::internal("the tree's builder is gone"))?;
    Ok(ReadNar {
        root: builder.finish()?,
        nar_hash: hashes.0,
        nar_size: hashes.1,
        content_hash: hashes.2,
    })
}

/// Writes a file, directory or symlink on disk as a NAR to `out`; returns its hash and size, and the
/// other hash if one was asked for.
///
/// # Errors
/// As [`read_path_with`]; `out`'s.
pub(crate) fn write_path(
    path: &Path,
    out: &mut dyn Write,
    options: &ReadOptions<'_>,
) -> Result<Hashes> {
    walk(None, Some(out), path, options).map(|(_, hashes)| hashes)
}

/// NAR hash, NAR size, and the other hash.
type Hashes = (NarHash, u64, Option<Hash>);

fn walk<'a>(
    builder: Option<TreeBuilder>,
    out: Option<&'a mut dyn Write>,
    path: &Path,
    options: &'a ReadOptions<'a>,
) -> Result<(Option<TreeBuilder>, Hashes)> {
    let name = CString::new(path.as_os_str().as_bytes())
        .map_err(|_| Error::user(format!("{:?} holds a NUL byte", path.display())))?;
    let stat = rustix::fs::statat(CWD, &name, AtFlags::SYMLINK_NOFOLLOW)
        .map_err(|e| Error::io("reading", path, e.into()))?;
    let mut walk = Walk {
        builder,
        nar: NarWriter::new(Tee {
            sink: NarSink::new(options.hash, options.bytes),
            out,
        }),
        tree: TreeHasher::new(options.hash),
        buffer: vec![0; BUFFER_BYTES],
        place: path.to_path_buf(),
        options,
    };
    walk.node(CWD, &name, None, FileType::from_raw_mode(stat.st_mode))?;
    let Walk {
        builder, nar, tree, ..
    } = walk;
    let (nar_hash, nar_size, raw_hash) = nar.finish()?.sink.finish();
    let content_hash = match raw_hash {
        Some(hash) => Some(hash),
        None => tree.finish().map_err(|e| e.within(path))?,
    };
    Ok((builder, (nar_hash, nar_size, content_hash)))
}

/// Takes the archive's bytes: hashes them, and passes them on.
struct Tee<'a> {
    sink: NarSink<'a>,
    out: Option<&'a mut dyn Write>,
}

impl Write for Tee<'_> {
    fn write(&mut self, data: &[u8]) -> std::io::Result<usize> {
        if let Some(out) = &mut self.out {
            out.write_all(data)?;
        }
        self.sink.update(data);
        Ok(data.len())
    }
    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

struct Walk<'a> {
    /// None if the tree is only written as an archive.
    builder: Option<TreeBuilder>,
    nar: NarWriter<Tee<'a>>,
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
        let mut sink = match builder {
            Some(builder) => Some(builder.file(entry_name, executable, size)?),
            None => None,
        };
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
            if let Some(sink) = &mut sink {
                sink.write(piece)?;
            }
            // A short read of a regular file is its end.
            if count < buffer.len() {
                break;
            }
            options.check_cancel()?;
        }
        if left > 0 {
            return Err(changed(place, size, &(size - left).to_string()));
        }
        if let Some(sink) = sink {
            sink.finish()?;
        }
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
        if let Some(builder) = &mut self.builder {
            builder.directory_begin(entry_name)?;
        }
        for (name, kind) in entries {
            self.place.push(OsStr::from_bytes(name.to_bytes()));
            self.node(fd.as_fd(), &name, Some(name.to_bytes()), kind)?;
            self.place.pop();
        }
        self.nar
            .directory_end()
            .map_err(|e| in_place(e, &self.place))?;
        self.tree.directory_end();
        if let Some(builder) = &mut self.builder {
            builder.directory_end()?;
        }
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
        if let Some(builder) = &mut self.builder {
            builder.symlink(entry_name, target)?;
        }
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
