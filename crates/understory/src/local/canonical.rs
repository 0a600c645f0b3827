//! Canonical metadata of store objects: modes 0444 and 0555, time 1, no extended attributes, our user.
//!
//! Reproduces what Nix's `canonicalisePathMetaData` leaves behind (compared with Nix 2.34.8): access times stay as they
//! are, attributes that mandatory access control or NFS keep in every file (`ignored-acls`) stay too.
//!
//! The tree must belong to us alone: it is found by path, not by descriptor, where extended attributes are concerned.
//!
//! Cost per file: one `lstat`, one `llistxattr`, and one call for each thing that is not as it should be.

use crate::{Error, Result};
use rustix::fs::{AtFlags, CWD, FileType, Gid, Mode, Stat, Timespec, Timestamps, Uid, XattrFlags};
use rustix::io::Errno;
use std::ffi::{CStr, CString};
use std::fs::File;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

/// Attributes that stay: the default of Nix's `ignored-acls`.
const IGNORED_ACLS: [&[u8]; 3] = [b"security.csm", b"security.selinux", b"system.nfs4_acl"];
/// Seconds since the epoch that every object has as its time of change.
const TIME: i64 = 1;
/// Bytes of attribute names that are asked for at first; the kernel's own limit is 64 KiB.
const NAMES_BYTES: usize = 1024;
/// The kernel's limit for a list of attribute names (`XATTR_LIST_MAX`).
const NAMES_BYTES_MAX: usize = 64 << 10;

/// Makes the metadata of the tree at `path` canonical, as Nix's `canonicalisePathMetaData` does.
///
/// # Errors
/// A file that is no regular file, directory or symlink; not owned by us and not to be had; I/O with the path.
pub fn canonicalise(path: &Path) -> Result<()> {
    let us = (rustix::process::geteuid(), rustix::process::getegid());
    let mut todo = vec![path.to_path_buf()];
    let mut names = vec![0; NAMES_BYTES];
    while let Some(path) = todo.pop() {
        let stat = one(&path, us, &mut names)?;
        if FileType::from_raw_mode(stat.st_mode) == FileType::Directory {
            for entry in std::fs::read_dir(&path).map_err(|e| Error::io("reading", &path, e))? {
                let entry = entry.map_err(|e| Error::io("reading", &path, e))?;
                todo.push(entry.path());
            }
        }
    }
    Ok(())
}

/// Makes the tree durable: every file, every directory, and the entry in its parent.
///
/// # Errors
/// I/O with the path.
pub fn sync_tree(path: &Path) -> Result<()> {
    let sync = |path: &Path| {
        let file = File::open(path).map_err(|e| Error::io("opening", path, e))?;
        file.sync_all().map_err(|e| Error::io("syncing", path, e))
    };
    let mut todo = vec![path.to_path_buf()];
    while let Some(path) = todo.pop() {
        let found = std::fs::symlink_metadata(&path);
        let kind = found
            .map_err(|e| Error::io("examining", &path, e))?
            .file_type();
        if kind.is_dir() {
            for entry in std::fs::read_dir(&path).map_err(|e| Error::io("reading", &path, e))? {
                let entry = entry.map_err(|e| Error::io("reading", &path, e))?;
                todo.push(entry.path());
            }
        }
        // A symlink is durable with its directory.
        if kind.is_dir() || kind.is_file() {
            sync(&path)?;
        }
    }
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => sync(parent),
        _ => Ok(()),
    }
}

/// Makes one file canonical; returns what it was.
fn one(path: &Path, (uid, gid): (Uid, Gid), names: &mut Vec<u8>) -> Result<Stat> {
    let failed = |verb: &str, error: Errno| Error::io(verb, path, error.into());
    let c_path = CString::new(path.as_os_str().as_bytes())
        .map_err(|_| Error::user(format!("{:?} holds a NUL byte", path.display())))?;
    let stat = rustix::fs::statat(CWD, &c_path, AtFlags::SYMLINK_NOFOLLOW)
        .map_err(|e| failed("examining", e))?;
    let kind = FileType::from_raw_mode(stat.st_mode);
    if !matches!(
        kind,
        FileType::RegularFile | FileType::Directory | FileType::Symlink
    ) {
        // Nix's words.
        return Err(Error::user(format!(
            "file '{}' has an unsupported type",
            path.display()
        )));
    }
    // Before the mode: some attributes can only be changed by who may write.
    remove_attributes(path, &c_path, names)?;
    if (stat.st_uid, stat.st_gid) != (uid.as_raw(), gid.as_raw()) {
        rustix::fs::chownat(
            CWD,
            &c_path,
            Some(uid),
            Some(gid),
            AtFlags::SYMLINK_NOFOLLOW,
        )
        .map_err(|e| failed("changing the owner of", e))?;
    }
    if kind != FileType::Symlink {
        let executable = kind == FileType::Directory || stat.st_mode & 0o100 != 0;
        let mode = if executable { 0o555 } else { 0o444 };
        if stat.st_mode & 0o7777 != mode {
            rustix::fs::chmodat(CWD, &c_path, Mode::from_raw_mode(mode), AtFlags::empty())
                .map_err(|e| failed("changing the mode of", e))?;
        }
    }
    if stat.st_mtime != TIME || stat.st_mtime_nsec != 0 {
        let times = Timestamps {
            last_access: Timespec {
                tv_sec: 0,
                tv_nsec: rustix::fs::UTIME_OMIT,
            },
            last_modification: Timespec {
                tv_sec: TIME,
                tv_nsec: 0,
            },
        };
        rustix::fs::utimensat(CWD, &c_path, &times, AtFlags::SYMLINK_NOFOLLOW)
            .map_err(|e| failed("setting the time of", e))?;
    }
    Ok(stat)
}

fn remove_attributes(path: &Path, c_path: &CStr, names: &mut Vec<u8>) -> Result<()> {
    let count = loop {
        match rustix::fs::llistxattr(c_path, &mut names[..]) {
            Ok(count) => break count,
            Err(Errno::RANGE) if names.len() < NAMES_BYTES_MAX => names.resize(NAMES_BYTES_MAX, 0),
            // The file system has none.
            Err(Errno::NOTSUP | Errno::NODATA) => return Ok(()),
            Err(error) => {
                return Err(Error::io("reading the attributes of", path, error.into()));
            }
        }
    };
    for name in names[..count].split(|&byte| byte == 0) {
        if name.is_empty() || IGNORED_ACLS.contains(&name) {
            continue;
        }
        match rustix::fs::lremovexattr(c_path, name) {
            Ok(()) | Err(Errno::NODATA) => {}
            Err(error) => {
                let name = name.escape_ascii();
                let verb = format!("removing the attribute '{name}' of");
                return Err(Error::io(&verb, path, error.into()));
            }
        }
    }
    Ok(())
}

/// Marks a directory of an overlayfs's upper as opaque: entries of the same directory in a lower do not show through.
/// `user` says that the overlay is mounted with `userxattr`.
///
/// # Errors
/// I/O with the path.
pub(crate) fn make_opaque(directory: &Path, user: bool) -> Result<()> {
    let name = if user {
        c"user.overlay.opaque"
    } else {
        c"trusted.overlay.opaque"
    };
    rustix::fs::lsetxattr(directory, name, b"y", XattrFlags::empty())
        .map_err(|e| Error::io("making opaque", PathBuf::from(directory), e.into()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};

    #[test]
    fn modes_times_and_attributes() {
        let dir = tempfile::tempdir().unwrap();
        let tree = dir.path().join("tree");
        std::fs::create_dir(&tree).unwrap();
        std::fs::write(tree.join("plain"), b"x").unwrap();
        std::fs::write(tree.join("run"), b"x").unwrap();
        std::fs::set_permissions(tree.join("run"), PermissionsExt::from_mode(0o4700)).unwrap();
        symlink("nowhere", tree.join("link")).unwrap();
        let attribute = rustix::fs::lsetxattr(
            tree.join("plain"),
            "user.test",
            b"value",
            XattrFlags::empty(),
        );
        canonicalise(&tree).unwrap();
        sync_tree(&tree).unwrap();
        for (name, mode) in [("", 0o555), ("plain", 0o444), ("run", 0o555)] {
            let found = std::fs::symlink_metadata(tree.join(name)).unwrap();
            assert_eq!(found.mode() & 0o7777, mode, "{name}");
            assert_eq!((found.mtime(), found.mtime_nsec()), (1, 0), "{name}");
        }
        let link = std::fs::symlink_metadata(tree.join("link")).unwrap();
        assert_eq!(link.mtime(), 1);
        if attribute.is_ok() {
            let mut names = [0; 256];
            let count = rustix::fs::llistxattr(tree.join("plain"), &mut names).unwrap();
            let names = String::from_utf8_lossy(&names[..count]).into_owned();
            assert!(!names.contains("user.test"), "{names}");
        }
        crate::local::restore::remove_tree(&tree).unwrap();
    }

    #[test]
    fn what_cannot_be_stored_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        let _socket = std::os::unix::net::UnixListener::bind(&path).unwrap();
        let error = canonicalise(&path).unwrap_err();
        assert_eq!(
            error.to_string(),
            format!("file '{}' has an unsupported type", path.display())
        );
    }
}
