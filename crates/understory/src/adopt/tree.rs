//! Store objects as file trees: hashing, copying, restoring from the castore, removing.
//!
//! What is made is canonical as Nix has it (modes 0444 and 0555, time 1, the store's owner), is made under another
//! name in the same directory, synced, checked against its NAR hash and then renamed: a name is there whole or not
//! at all. Symlinks are never followed.

use crate::nar::{BUFFER_BYTES, read_blob};
use crate::{Error, Result};
use rustix::fs::{AtFlags, CWD, Timespec, Timestamps};
use sha2::{Digest as _, Sha256};
use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use understory_castore::{Castore, Node};
use understory_nix::NarHash;
use understory_nix::nar::Writer as NarWriter;

/// What objects in the making and objects that go away are called in front.
pub(super) const NEW: &str = ".adopt-new-";
/// See [`NEW`].
pub(super) const OLD: &str = ".adopt-old-";
/// Directories deeper than this are in no NAR (Nix's own limit is 64).
const DEPTH_MAX: usize = 256;

/// Where an object comes from.
pub(super) enum Origin<'a> {
    /// The castore.
    Castore(&'a Castore, &'a Node),
    /// A tree on disk.
    Disk(&'a Path),
}

/// How objects are made.
#[derive(Debug, Clone, Copy)]
pub(super) struct Owner {
    pub(super) uid: u32,
    pub(super) gid: u32,
}

/// Makes the object `name` in the directory `dir`. One that is there is replaced.
///
/// # Errors
/// What was made does not have the hash; I/O; interrupted. The name is then as it was.
pub(super) fn place(
    origin: &Origin<'_>,
    dir: &Path,
    name: &str,
    nar_hash: &NarHash,
    owner: Owner,
    cancel: &AtomicBool,
) -> Result<()> {
    let new = dir.join(format!("{NEW}{name}"));
    remove(&new)?;
    let made = Make {
        owner,
        cancel,
        root: &new,
    }
    .run(origin)
    .and_then(|()| expect_hash(&new, nar_hash, cancel));
    if let Err(error) = made {
        // The first error counts.
        let _ = remove(&new);
        return Err(error);
    }
    swap_in(&new, dir, name)
}

/// Gives a finished object its name; one that is there is removed. The caller syncs the directory.
pub(super) fn swap_in(new: &Path, dir: &Path, name: &str) -> Result<()> {
    let target = dir.join(name);
    let old = dir.join(format!("{OLD}{name}"));
    if fs::symlink_metadata(&target).is_ok() {
        remove(&old)?;
        rename(&target, &old)?;
    }
    rename(new, &target)?;
    remove(&old)
}

/// Removes the object `name` of `dir`; it is gone at once or not at all, its tree after that.
pub(super) fn discard(dir: &Path, name: &str) -> Result<()> {
    let old = dir.join(format!("{OLD}{name}"));
    remove(&old)?;
    let target = dir.join(name);
    match rename(&target, &old) {
        Ok(()) => remove(&old),
        Err(_) if fs::symlink_metadata(&target).is_err() => Ok(()),
        Err(error) => Err(error),
    }
}

/// Removes what an interrupted [`place`] or [`discard`] left in `dir`. Names that went away stay away: they were
/// verified before.
pub(super) fn sweep(dir: &Path) -> Result<()> {
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(Error::io("reading", dir, e)),
    };
    for entry in entries {
        let entry = entry.map_err(|e| Error::io("reading", dir, e))?;
        let name = entry.file_name();
        let name = name.as_bytes();
        if name.starts_with(NEW.as_bytes()) || name.starts_with(OLD.as_bytes()) {
            remove(&entry.path())?;
        }
    }
    Ok(())
}

/// Renames a file or directory.
pub(super) fn rename(from: &Path, to: &Path) -> Result<()> {
    fs::rename(from, to).map_err(|e| Error::io("renaming", from, e))
}

/// Removes a tree, also where its directories are read-only; nothing if it is not there.
pub(super) fn remove(path: &Path) -> Result<()> {
    let found = match fs::symlink_metadata(path) {
        Ok(found) => found,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(Error::io("examining", path, e)),
    };
    if !found.is_dir() {
        return fs::remove_file(path).map_err(|e| Error::io("removing", path, e));
    }
    if found.permissions().mode() & 0o700 != 0o700 {
        fs::set_permissions(path, fs::Permissions::from_mode(0o700))
            .map_err(|e| Error::io("changing the mode of", path, e))?;
    }
    for entry in fs::read_dir(path).map_err(|e| Error::io("reading", path, e))? {
        remove(&entry.map_err(|e| Error::io("reading", path, e))?.path())?;
    }
    fs::remove_dir(path).map_err(|e| Error::io("removing", path, e))
}

/// Bytes of files below `path` whose last name goes with it; entries of `.links` count as such.
pub(super) fn freed_bytes(path: &Path) -> u64 {
    let Ok(found) = fs::symlink_metadata(path) else {
        return 0;
    };
    if !found.is_dir() {
        return if found.nlink() <= 2 {
            found.blocks() * 512
        } else {
            0
        };
    }
    let below = fs::read_dir(path)
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| freed_bytes(&entry.path()))
        .sum::<u64>();
    below + found.blocks() * 512
}

/// Fails unless the tree's NAR has the hash.
pub(super) fn expect_hash(path: &Path, expected: &NarHash, cancel: &AtomicBool) -> Result<()> {
    let found = hash(path, cancel)?;
    if found == *expected {
        return Ok(());
    }
    Err(Error::corrupt(format!(
        "path '{}' was modified! expected hash '{expected}', got '{found}'",
        path.display()
    )))
}

/// SHA-256 of the tree's NAR.
pub(super) fn hash(path: &Path, cancel: &AtomicBool) -> Result<NarHash> {
    let mut writer = NarWriter::new(Sink(Sha256::new()));
    dump(
        &mut writer,
        None,
        path,
        0,
        cancel,
        &mut vec![0; BUFFER_BYTES],
    )?;
    let sink = writer
        .finish()
        .map_err(|e| Error::internal(e.to_string()).within(path))?;
    Ok(NarHash(sink.0.finalize().into()))
}

struct Sink(Sha256);
impl Write for Sink {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.update(bytes);
        Ok(bytes.len())
    }
    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

fn dump(
    writer: &mut NarWriter<Sink>,
    name: Option<&[u8]>,
    path: &Path,
    depth: usize,
    cancel: &AtomicBool,
    buffer: &mut [u8],
) -> Result<()> {
    check(cancel)?;
    too_deep(depth, path)?;
    let wrong = |e: understory_nix::nar::NarError| Error::user(e.to_string()).within(path);
    let found = fs::symlink_metadata(path).map_err(|e| Error::io("examining", path, e))?;
    let kind = found.file_type();
    if kind.is_symlink() {
        let target = fs::read_link(path).map_err(|e| Error::io("reading", path, e))?;
        return writer
            .symlink(name, target.as_os_str().as_bytes())
            .map_err(wrong);
    }
    if kind.is_dir() {
        writer.directory_begin(name).map_err(wrong)?;
        for name in sorted_names(path)? {
            let below = path.join(std::ffi::OsStr::from_bytes(&name));
            dump(writer, Some(&name), &below, depth + 1, cancel, buffer)?;
        }
        return writer.directory_end().map_err(wrong);
    }
    if !kind.is_file() {
        return Err(Error::user(format!(
            "{} is neither a file, a directory nor a symlink",
            path.display()
        )));
    }
    let mut file = open(path)?;
    let executable = found.permissions().mode() & 0o100 != 0;
    writer.file(name, executable, found.len()).map_err(wrong)?;
    let mut left = found.len();
    while left > 0 {
        check(cancel)?;
        let count = file
            .read(buffer)
            .map_err(|e| Error::io("reading", path, e))?;
        if count == 0 || count as u64 > left {
            return Err(Error::environment(format!(
                "{} changed while it was read",
                path.display()
            )));
        }
        left -= count as u64;
        writer.contents(&buffer[..count]).map_err(wrong)?;
    }
    Ok(())
}

fn sorted_names(dir: &Path) -> Result<Vec<Vec<u8>>> {
    let mut names = Vec::new();
    for entry in fs::read_dir(dir).map_err(|e| Error::io("reading", dir, e))? {
        let entry = entry.map_err(|e| Error::io("reading", dir, e))?;
        names.push(entry.file_name().into_vec());
    }
    names.sort_unstable();
    Ok(names)
}

fn open(path: &Path) -> Result<File> {
    File::options()
        .read(true)
        .custom_flags(rustix::fs::OFlags::NOFOLLOW.bits().cast_signed())
        .open(path)
        .map_err(|e| Error::io("opening", path, e))
}

/// Makes one object.
struct Make<'a> {
    owner: Owner,
    cancel: &'a AtomicBool,
    root: &'a Path,
}

impl Make<'_> {
    fn run(&self, origin: &Origin<'_>) -> Result<()> {
        match origin {
            Origin::Castore(castore, node) => self.node(castore, node, self.root, 0),
            Origin::Disk(path) => self.copy(path, self.root, 0),
        }
    }

    fn node(&self, castore: &Castore, node: &Node, to: &Path, depth: usize) -> Result<()> {
        check(self.cancel)?;
        too_deep(depth, to)?;
        match node {
            Node::Symlink { target } => self.symlink(target, to),
            Node::File {
                digest,
                size,
                executable,
            } => {
                let mut file = create(to)?;
                read_blob(castore, digest, *size, &mut Vec::new(), |piece| {
                    check(self.cancel)?;
                    file.write_all(piece)
                        .map_err(|e| Error::io("writing", to, e))
                })?;
                self.finish_file(&file, to, *executable)
            }
            Node::Directory { digest, .. } => {
                create_directory(to)?;
                for entry in castore.directory(digest)?.entries() {
                    let below = to.join(std::ffi::OsStr::from_bytes(&entry.name));
                    self.node(castore, &entry.node, &below, depth + 1)?;
                }
                self.finish_directory(to)
            }
        }
    }

    fn copy(&self, from: &Path, to: &Path, depth: usize) -> Result<()> {
        check(self.cancel)?;
        too_deep(depth, to)?;
        let found = fs::symlink_metadata(from).map_err(|e| Error::io("examining", from, e))?;
        let kind = found.file_type();
        if kind.is_symlink() {
            let target = fs::read_link(from).map_err(|e| Error::io("reading", from, e))?;
            self.symlink(target.as_os_str().as_bytes(), to)
        } else if kind.is_dir() {
            create_directory(to)?;
            for name in sorted_names(from)? {
                let name = std::ffi::OsStr::from_bytes(&name);
                self.copy(&from.join(name), &to.join(name), depth + 1)?;
            }
            self.finish_directory(to)
        } else if kind.is_file() {
            let (mut source, mut file) = (open(from)?, create(to)?);
            std::io::copy(&mut source, &mut file).map_err(|e| Error::io("copying", from, e))?;
            self.finish_file(&file, to, found.permissions().mode() & 0o100 != 0)
        } else {
            Err(Error::user(format!(
                "{} is neither a file, a directory nor a symlink",
                from.display()
            )))
        }
    }

    fn symlink(&self, target: &[u8], to: &Path) -> Result<()> {
        std::os::unix::fs::symlink(std::ffi::OsStr::from_bytes(target), to)
            .map_err(|e| Error::io("creating", to, e))?;
        self.own(to)?;
        set_time(to)
    }

    fn finish_file(&self, file: &File, to: &Path, executable: bool) -> Result<()> {
        self.own(to)?;
        let mode = if executable { 0o555 } else { 0o444 };
        file.set_permissions(fs::Permissions::from_mode(mode))
            .map_err(|e| Error::io("changing the mode of", to, e))?;
        set_time(to)?;
        file.sync_all().map_err(|e| Error::io("syncing", to, e))
    }

    fn finish_directory(&self, to: &Path) -> Result<()> {
        self.own(to)?;
        fs::set_permissions(to, fs::Permissions::from_mode(0o555))
            .map_err(|e| Error::io("changing the mode of", to, e))?;
        set_time(to)?;
        super::state::sync_directory(to)
    }

    fn own(&self, to: &Path) -> Result<()> {
        let found = fs::symlink_metadata(to).map_err(|e| Error::io("examining", to, e))?;
        if (found.uid(), found.gid()) == (self.owner.uid, self.owner.gid) {
            return Ok(());
        }
        std::os::unix::fs::lchown(to, Some(self.owner.uid), Some(self.owner.gid))
            .map_err(|e| Error::io("changing the owner of", to, e))
    }
}

fn create(path: &Path) -> Result<File> {
    File::options()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)
        .map_err(|e| Error::io("creating", path, e))
}

fn create_directory(path: &Path) -> Result<()> {
    fs::DirBuilder::new()
        .mode(0o700)
        .create(path)
        .map_err(|e| Error::io("creating", path, e))
}

/// The time that Nix gives to everything in a store.
fn set_time(path: &Path) -> Result<()> {
    let one = Timespec {
        tv_sec: 1,
        tv_nsec: 0,
    };
    let times = Timestamps {
        last_access: one,
        last_modification: one,
    };
    rustix::fs::utimensat(CWD, path, &times, AtFlags::SYMLINK_NOFOLLOW)
        .map_err(|e| Error::io("setting the time of", path, e.into()))
}

fn too_deep(depth: usize, path: &Path) -> Result<()> {
    if depth > DEPTH_MAX {
        return Err(Error::user(format!(
            "{} lies deeper than {DEPTH_MAX} directories",
            path.display()
        )));
    }
    Ok(())
}

/// Ends the work when somebody wants it to.
pub(super) fn check(cancel: &AtomicBool) -> Result<()> {
    if cancel.load(Ordering::Relaxed) {
        return Err(super::interrupted());
    }
    Ok(())
}

/// The names in a directory, unsorted; none if it is not there.
pub(super) fn names(dir: &Path) -> Result<Vec<PathBuf>> {
    match fs::read_dir(dir) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(e) => Err(Error::io("reading", dir, e)),
        Ok(entries) => entries
            .map(|entry| {
                Ok(entry
                    .map_err(|e| Error::io("reading", dir, e))?
                    .file_name()
                    .into())
            })
            .collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    static RUN: AtomicBool = AtomicBool::new(false);

    fn owner() -> Owner {
        Owner {
            uid: rustix::process::geteuid().as_raw(),
            gid: rustix::process::getegid().as_raw(),
        }
    }

    fn tree(dir: &Path) -> PathBuf {
        let tree = dir.join("tree");
        fs::create_dir_all(tree.join("sub/empty")).unwrap();
        fs::write(tree.join("file"), "some text").unwrap();
        fs::write(tree.join("run"), "#!/bin/sh\n").unwrap();
        fs::set_permissions(tree.join("run"), fs::Permissions::from_mode(0o755)).unwrap();
        std::os::unix::fs::symlink("../nowhere", tree.join("sub/link")).unwrap();
        tree
    }

    #[test]
    fn a_copy_is_the_same_archive_with_canonical_metadata() {
        let dir = tempfile::tempdir().unwrap();
        let tree = tree(dir.path());
        let to = dir.path().join("to");
        fs::create_dir(&to).unwrap();
        let expected = hash(&tree, &RUN).unwrap();
        for _ in 0..2 {
            place(&Origin::Disk(&tree), &to, "made", &expected, owner(), &RUN).unwrap();
            assert_eq!(hash(&to.join("made"), &RUN).unwrap(), expected);
            assert_eq!(names(&to).unwrap(), [PathBuf::from("made")]);
        }
        for (name, mode) in [
            ("", 0o555),
            ("file", 0o444),
            ("run", 0o555),
            ("sub/empty", 0o555),
        ] {
            let found = fs::symlink_metadata(to.join("made").join(name)).unwrap();
            assert_eq!(found.permissions().mode() & 0o7777, mode, "{name}");
            assert_eq!(found.mtime(), 1, "{name}");
        }
        let link = fs::symlink_metadata(to.join("made/sub/link")).unwrap();
        assert_eq!(link.mtime(), 1);
        discard(&to, "made").unwrap();
        discard(&to, "made").unwrap();
        assert!(names(&to).unwrap().is_empty());
    }

    #[test]
    fn what_has_another_hash_leaves_the_old_one() {
        let dir = tempfile::tempdir().unwrap();
        let tree = tree(dir.path());
        let to = dir.path().join("to");
        fs::create_dir(&to).unwrap();
        fs::write(to.join("made"), "old").unwrap();
        let other = NarHash([7; 32]);
        let error = place(&Origin::Disk(&tree), &to, "made", &other, owner(), &RUN).unwrap_err();
        assert!(
            error.to_string().contains("was modified! expected hash"),
            "{error}"
        );
        assert_eq!(fs::read(to.join("made")).unwrap(), b"old");
        assert_eq!(names(&to).unwrap().len(), 1);
        let stopped = AtomicBool::new(true);
        let error = place(&Origin::Disk(&tree), &to, "x", &other, owner(), &stopped).unwrap_err();
        assert_eq!(error.to_string(), "interrupted");
    }

    #[test]
    fn leftovers_are_swept() {
        let dir = tempfile::tempdir().unwrap();
        for name in [".adopt-new-a", ".adopt-old-b", "c"] {
            fs::create_dir(dir.path().join(name)).unwrap();
        }
        fs::write(dir.path().join(".adopt-old-b/x"), "").unwrap();
        fs::set_permissions(
            dir.path().join(".adopt-old-b"),
            fs::Permissions::from_mode(0o555),
        )
        .unwrap();
        sweep(dir.path()).unwrap();
        assert_eq!(names(dir.path()).unwrap(), [PathBuf::from("c")]);
        sweep(&dir.path().join("absent")).unwrap();
    }
}
