//! Archives onto disk: a NAR becomes a file tree, safely; and trees out as archives, and away.
//!
//! A tree is made relative to directory descriptors: files with `O_EXCL|O_NOFOLLOW`, directories opened with
//! `O_NOFOLLOW` right after they are made, so that nothing which somebody else puts there is followed or written to.
//! Format and limits: [`understory_nix::nar`]. Modes are those of Nix before they are made canonical: 0666 or 0777
//! less the umask.
//!
//! Cost: one `openat`, `write` and `close` for a small file; one descriptor for each open directory, of which the
//! archive's depth limit allows 64. Contents go from the stream's buffer to write(2) without a copy.

use crate::nar::{HashRequest, HashingReader, NarSink, ReadOptions, TreeHasher, write_path};
use crate::{Error, Result};
use rustix::fs::{AtFlags, CWD, Dir, FileType, Mode, OFlags};
use rustix::io::Errno;
use std::ffi::{CString, OsStr};
use std::io::BufRead;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use understory_nix::nar::{Event, Reader};
use understory_nix::{Hash, NarHash};

/// What was restored.
#[derive(Debug, Clone)]
pub struct Restored {
    /// SHA-256 of the NAR.
    pub nar_hash: NarHash,
    /// Bytes of the NAR.
    pub nar_size: u64,
    /// The other hash, if one was asked for.
    pub content_hash: Option<Hash>,
}

/// Reads exactly one NAR from `archive` and makes the tree at `target`, which must not exist. Symlinks are never
/// followed. `cancelled` ends it with an error. What was made stays when it fails; remove it with [`remove_tree`].
///
/// # Errors
/// Malformed archive, stream error, I/O with the path.
pub fn restore_nar(
    archive: &mut dyn BufRead,
    target: &Path,
    hash: HashRequest,
    cancelled: &dyn Fn() -> bool,
) -> Result<Restored> {
    let (parent, name) = match (target.parent(), target.file_name()) {
        (Some(parent), Some(name)) => (parent, name),
        _ => return Err(Error::internal(format!("{} has no name", target.display()))),
    };
    let parent = if parent.as_os_str().is_empty() {
        Path::new(".")
    } else {
        parent
    };
    let directory = rustix::fs::open(parent, DIRECTORY, Mode::empty())
        .map_err(|e| Error::io("opening", parent, e.into()))?;
    let mut tree = Tree {
        open: vec![directory],
        place: parent.to_path_buf(),
        root: name.to_owned(),
    };
    read(archive, &mut tree, hash, cancelled)
}

/// Reads exactly one NAR from `archive` and only hashes it.
///
/// # Errors
/// Malformed archive, stream error; a flat hash of something that is not a file.
pub fn hash_nar(archive: &mut dyn BufRead, hash: HashRequest) -> Result<Restored> {
    read(archive, &mut Nowhere, hash, &|| false)
}

/// Writes the tree at `source` as a NAR; returns what [`restore_nar`] would have.
///
/// # Errors
/// An unsupported file type, I/O with the path, and `out`'s.
pub fn dump_path(
    source: &Path,
    hash: HashRequest,
    out: &mut dyn std::io::Write,
) -> Result<Restored> {
    let options = ReadOptions {
        hash,
        ..ReadOptions::default()
    };
    let (nar_hash, nar_size, content_hash) = write_path(source, out, &options)?;
    Ok(Restored {
        nar_hash,
        nar_size,
        content_hash,
    })
}

/// Removes a tree, also where directories are read-only; nothing is done if it is not there. Returns the bytes of
/// files that are really freed by it, as Nix counts them: those whose link count was 1, or 2, where the other link is
/// taken to be the one in `.links`.
///
/// # Errors
/// I/O with the path.
pub fn remove_tree(path: &Path) -> Result<u64> {
    let name = CString::new(path.as_os_str().as_bytes())
        .map_err(|_| Error::user(format!("{:?} holds a NUL byte", path.display())))?;
    let mut place = path.to_path_buf();
    let mut freed = 0;
    remove(CWD, &name, &mut place, &mut freed)?;
    Ok(freed)
}

const DIRECTORY: OFlags = OFlags::RDONLY
    .union(OFlags::DIRECTORY)
    .union(OFlags::NOFOLLOW)
    .union(OFlags::CLOEXEC);

/// What takes an archive's nodes. Names are `None` for the root.
trait Target {
    type File;
    fn directory_begin(&mut self, name: Option<&[u8]>) -> Result<()>;
    fn directory_end(&mut self);
    fn symlink(&mut self, name: Option<&[u8]>, target: &[u8]) -> Result<()>;
    fn file(&mut self, name: Option<&[u8]>, executable: bool) -> Result<Self::File>;
    fn write(&mut self, file: &mut Self::File, data: &[u8]) -> Result<()>;
}

fn read<T: Target>(
    archive: &mut dyn BufRead,
    target: &mut T,
    hash: HashRequest,
    cancelled: &dyn Fn() -> bool,
) -> Result<Restored> {
    let check = || {
        if cancelled() {
            // Nix's words.
            return Err(Error::user("interrupted by the user"));
        }
        Ok(())
    };
    let mut tree = TreeHasher::new(hash);
    let mut reader = Reader::new(HashingReader {
        inner: archive,
        sink: NarSink::new(hash, None),
    });
    loop {
        match reader.next_event()? {
            Event::DirectoryBegin { name } => {
                check()?;
                tree.directory_begin(name.as_deref());
                target.directory_begin(name.as_deref())?;
            }
            Event::DirectoryEnd => {
                tree.directory_end();
                target.directory_end();
            }
            Event::Symlink {
                name,
                target: points_to,
            } => {
                tree.symlink(name.as_deref(), &points_to);
                target.symlink(name.as_deref(), &points_to)?;
            }
            Event::File {
                name,
                executable,
                size,
            } => {
                tree.file_begin(name.as_deref(), executable, size);
                let mut file = target.file(name.as_deref(), executable)?;
                loop {
                    let piece = reader.read_contents()?;
                    if piece.is_empty() {
                        break;
                    }
                    tree.contents(piece);
                    target.write(&mut file, piece)?;
                    check()?;
                }
                tree.file_end();
            }
            Event::End => break,
        }
    }
    let (nar_hash, nar_size, raw_hash) = reader.into_inner().sink.finish();
    let content_hash = match raw_hash {
        Some(hash) => Some(hash),
        None => tree.finish()?,
    };
    Ok(Restored {
        nar_hash,
        nar_size,
        content_hash,
    })
}

/// Makes nothing.
struct Nowhere;

impl Target for Nowhere {
    type File = ();
    fn directory_begin(&mut self, _name: Option<&[u8]>) -> Result<()> {
        Ok(())
    }
    fn directory_end(&mut self) {}
    fn symlink(&mut self, _name: Option<&[u8]>, _target: &[u8]) -> Result<()> {
        Ok(())
    }
    fn file(&mut self, _name: Option<&[u8]>, _executable: bool) -> Result<()> {
        Ok(())
    }
    fn write(&mut self, (): &mut (), _data: &[u8]) -> Result<()> {
        Ok(())
    }
}

/// A tree on disk.
struct Tree {
    /// The directories that are open, the root's parent first. Never empty.
    open: Vec<OwnedFd>,
    /// Where the innermost one is, for errors.
    place: PathBuf,
    /// What the root is called.
    root: std::ffi::OsString,
}

impl Tree {
    fn at(&self) -> Result<BorrowedFd<'_>> {
        let innermost = self.open.last();
        innermost
            .map(AsFd::as_fd)
            .ok_or_else(|| Error::internal("no directory is open"))
    }
    fn name<'a>(&'a self, name: Option<&'a [u8]>) -> &'a OsStr {
        name.map_or(&self.root, OsStr::from_bytes)
    }
    fn failed(&self, verb: &str, name: &OsStr, error: Errno) -> Error {
        Error::io(verb, self.place.join(name), error.into())
    }
}

impl Target for Tree {
    /// With its path, for errors.
    type File = (OwnedFd, PathBuf);

    fn directory_begin(&mut self, name: Option<&[u8]>) -> Result<()> {
        let name = self.name(name).to_owned();
        let at = self.at()?;
        rustix::fs::mkdirat(at, &name, Mode::from_raw_mode(0o777))
            .map_err(|e| self.failed("creating", &name, e))?;
        let fd = rustix::fs::openat(at, &name, DIRECTORY, Mode::empty())
            .map_err(|e| self.failed("opening", &name, e))?;
        self.open.push(fd);
        self.place.push(name);
        Ok(())
    }

    fn directory_end(&mut self) {
        self.open.pop();
        self.place.pop();
    }

    fn symlink(&mut self, name: Option<&[u8]>, target: &[u8]) -> Result<()> {
        let name = self.name(name);
        rustix::fs::symlinkat(OsStr::from_bytes(target), self.at()?, name)
            .map_err(|e| self.failed("creating", name, e))
    }

    fn file(&mut self, name: Option<&[u8]>, executable: bool) -> Result<Self::File> {
        let name = self.name(name);
        let flags =
            OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let mode = Mode::from_raw_mode(if executable { 0o777 } else { 0o666 });
        let fd = rustix::fs::openat(self.at()?, name, flags, mode)
            .map_err(|e| self.failed("creating", name, e))?;
        Ok((fd, self.place.join(name)))
    }

    fn write(&mut self, (fd, path): &mut Self::File, mut data: &[u8]) -> Result<()> {
        while !data.is_empty() {
            match rustix::io::write(&*fd, data) {
                Ok(0) => {
                    let error = std::io::ErrorKind::WriteZero.into();
                    return Err(Error::io("writing", &*path, error));
                }
                Ok(count) => data = &data[count..],
                Err(Errno::INTR) => {}
                Err(error) => return Err(Error::io("writing", &*path, error.into())),
            }
        }
        Ok(())
    }
}

/// Removes `name` of `parent`, which is at `place`.
fn remove(
    parent: BorrowedFd<'_>,
    name: &std::ffi::CStr,
    place: &mut PathBuf,
    freed: &mut u64,
) -> Result<()> {
    let stat = match rustix::fs::statat(parent, name, AtFlags::SYMLINK_NOFOLLOW) {
        Ok(stat) => stat,
        Err(Errno::NOENT) => return Ok(()),
        Err(error) => return Err(Error::io("examining", &*place, error.into())),
    };
    let mut flags = AtFlags::empty();
    if FileType::from_raw_mode(stat.st_mode) == FileType::Directory {
        flags = AtFlags::REMOVEDIR;
        // Its owner must be able to look into it and to take entries out.
        let mode = Mode::from_raw_mode(stat.st_mode);
        if !mode.contains(Mode::RWXU) {
            rustix::fs::chmodat(parent, name, mode | Mode::RWXU, AtFlags::empty())
                .map_err(|e| Error::io("changing the mode of", &*place, e.into()))?;
        }
        let fd = rustix::fs::openat(parent, name, DIRECTORY, Mode::empty())
            .map_err(|e| Error::io("opening", &*place, e.into()))?;
        // All names first: a directory that changes while it is read may show some twice or not.
        let mut names = Vec::new();
        for entry in Dir::read_from(&fd).map_err(|e| Error::io("reading", &*place, e.into()))? {
            let entry = entry.map_err(|e| Error::io("reading", &*place, e.into()))?;
            if !matches!(entry.file_name().to_bytes(), b"." | b"..") {
                names.push(entry.file_name().to_owned());
            }
        }
        for name in names {
            place.push(OsStr::from_bytes(name.to_bytes()));
            remove(fd.as_fd(), &name, place, freed)?;
            place.pop();
        }
    } else if stat.st_nlink <= 2 {
        *freed += u64::try_from(stat.st_size).unwrap_or(0);
    }
    match rustix::fs::unlinkat(parent, name, flags) {
        Ok(()) | Err(Errno::NOENT) => Ok(()),
        Err(error) => Err(Error::io("removing", &*place, error.into())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{PermissionsExt, symlink};
    use understory_nix::HashAlgorithm;

    fn sample(dir: &Path) {
        std::fs::create_dir(dir).unwrap();
        std::fs::create_dir(dir.join("bin")).unwrap();
        std::fs::write(dir.join("bin/run"), b"#!/bin/sh\n").unwrap();
        std::fs::set_permissions(dir.join("bin/run"), PermissionsExt::from_mode(0o755)).unwrap();
        std::fs::write(dir.join("data"), vec![7; 1 << 20]).unwrap();
        symlink("bin/run", dir.join("link")).unwrap();
    }

    #[test]
    fn what_is_dumped_and_restored_is_the_same() {
        let dir = tempfile::tempdir().unwrap();
        let (one, two) = (dir.path().join("one"), dir.path().join("two"));
        sample(&one);
        for hash in [
            HashRequest::None,
            HashRequest::Nar(HashAlgorithm::Sha1),
            HashRequest::Git(HashAlgorithm::Sha1),
        ] {
            let mut nar = Vec::new();
            let dumped = dump_path(&one, hash, &mut nar).unwrap();
            nar.extend(b"what comes after");
            let mut stream = &nar[..];
            let restored = restore_nar(&mut stream, &two, hash, &|| false).unwrap();
            assert_eq!(stream, b"what comes after");
            assert_eq!(restored.nar_hash, dumped.nar_hash);
            assert_eq!(restored.nar_size, nar.len() as u64 - 16);
            assert_eq!(restored.content_hash, dumped.content_hash);
            assert_eq!(restored.content_hash.is_some(), hash != HashRequest::None);
            let hashed = hash_nar(&mut &nar[..], hash).unwrap();
            assert_eq!(hashed.content_hash, dumped.content_hash);
            let mode = std::fs::metadata(two.join("bin/run"))
                .unwrap()
                .permissions();
            assert_ne!(mode.mode() & 0o100, 0);
            assert_eq!(
                std::fs::read_link(two.join("link")).unwrap(),
                Path::new("bin/run")
            );
            assert_eq!(remove_tree(&two).unwrap(), (1 << 20) + 10 + 7);
            assert!(!two.exists());
        }
        assert_eq!(remove_tree(&two).unwrap(), 0);
    }

    #[test]
    fn nothing_is_followed_or_overwritten() {
        let dir = tempfile::tempdir().unwrap();
        let (one, two) = (dir.path().join("one"), dir.path().join("two"));
        std::fs::write(&one, b"text").unwrap();
        let mut nar = Vec::new();
        dump_path(&one, HashRequest::None, &mut nar).unwrap();
        symlink(dir.path().join("elsewhere"), &two).unwrap();
        let error = restore_nar(&mut &nar[..], &two, HashRequest::None, &|| false).unwrap_err();
        assert_eq!(
            error.chain(),
            format!("creating {}: File exists (os error 17)", two.display())
        );
        assert!(!dir.path().join("elsewhere").exists());
        let flat = HashRequest::Flat(HashAlgorithm::Sha256);
        std::fs::remove_file(&two).unwrap();
        let restored = restore_nar(&mut &nar[..], &two, flat, &|| false).unwrap();
        assert_eq!(
            restored.content_hash,
            Some(Hash::of(HashAlgorithm::Sha256, b"text"))
        );
    }

    #[test]
    fn a_cancelled_one_ends_and_what_is_read_only_is_removed() {
        let dir = tempfile::tempdir().unwrap();
        let (one, two) = (dir.path().join("one"), dir.path().join("two"));
        sample(&one);
        let mut nar = Vec::new();
        dump_path(&one, HashRequest::None, &mut nar).unwrap();
        let error = restore_nar(&mut &nar[..], &two, HashRequest::None, &|| true).unwrap_err();
        assert_eq!(error.to_string(), "interrupted by the user");
        let cut = &nar[..nar.len() / 2];
        let error = restore_nar(&mut &*cut, &two, HashRequest::None, &|| false).unwrap_err();
        assert_eq!(error.to_string(), "NAR stream");
        super::super::canonical::canonicalise(&two).unwrap();
        remove_tree(&two).unwrap();
        assert!(!two.exists());
        // A symlink to a directory is removed, not what it points to.
        symlink(&one, &two).unwrap();
        remove_tree(&two).unwrap();
        assert!(one.join("data").exists());
    }
}
