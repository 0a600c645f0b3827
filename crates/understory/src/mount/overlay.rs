//! Overlays: one writable directory over read-only ones, as `local-overlay` stores need it.
//!
//! - Options are `index=off,metacopy=off,redirect_dir=off` and the default `xino`; in a user namespace
//!   `userxattr` and `redirect_dir=nofollow`. Mounted by mount(2), so that mountinfo shows `lowerdir=` the way Nix's mount check reads it.
//! - Overlayfs remembers for ever that a name was absent: one that was looked up before a lower directory
//!   got it stays hidden, whatever the lower does (shown on Linux 6.18). A remount by mount(2) with
//!   `MS_REMOUNT` makes it forget; the new mount interface does not. So after a publication ask
//!   [`OverlayMount::is_hidden`] and then [`OverlayMount::remount`].
//! - The layers of a mounted overlay cannot be changed. [`OverlayMount::mount_beneath`] puts another one with the same upper
//!   directory below it, which nobody can reach, and [`OverlayMount::unmount_if_unused`] takes the upper one off in one step:
//!   every system call is done on one of the two. Of the two only the upper one is in use at a time, which is what
//!   overlayfs asks for (its warning about an upper directory in use is about that); each has a work directory of its
//!   own, because mounting clears it. `MOVE_MOUNT_BENEATH` is in Linux 6.5; it takes what mount(2) has made, as a clone.
//! - Files of equal contents are one inode in a live lower mount, so writing *through the overlay* into a
//!   file that exists in the lower shows in its twins until the overlay is mounted anew. Store objects are
//!   never written in place; replacing and deleting are safe.

use super::mountinfo::{self, MountEntry};
use crate::{Error, Result};
use rustix::fs::CWD;
use rustix::io::Errno;
use rustix::mount::{
    MountFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags, move_mount, open_tree,
};
use std::ffi::{CString, OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

/// What mountinfo shows as the source. Nix's mount check reads only lines that begin with `overlay `.
const SOURCE: &str = "overlay";
/// The type in mountinfo.
const FS_TYPE: &str = "overlay";
/// mount(2) takes one page of options, with the final NUL.
const OPTIONS_BYTES_MAX: usize = 4095;

/// A mounted overlay. It stays mounted when this is dropped: it may have users that outlive us.
#[derive(Debug, Clone)]
pub struct OverlayMount {
    merged: PathBuf,
    lowers: Vec<PathBuf>,
}

/// What an overlay is made of.
#[derive(Debug, Clone)]
pub struct OverlayLayers {
    /// Read-only directories, uppermost first; at least one.
    pub lowers: Vec<PathBuf>,
    /// Takes what is written. On a file system that overlayfs accepts: ext4, xfs, btrfs, tmpfs.
    pub upper: PathBuf,
    /// Empty, on the same file system as `upper`.
    pub work: PathBuf,
}

impl OverlayMount {
    /// Mounts on the directory `merged`. `userxattr` is needed in a user namespace, and changes where
    /// overlayfs keeps its marks: an upper must be used the same way each time.
    ///
    /// # Errors
    /// What overlayfs refuses, with a hint where the reason can be found out.
    pub fn mount(layers: &OverlayLayers, merged: &Path, userxattr: bool) -> Result<Self> {
        if layers.lowers.is_empty() {
            return Err(Error::user("an overlay needs a lower directory"));
        }
        for dir in layers
            .lowers
            .iter()
            .chain([&layers.upper, &layers.work])
            .map(PathBuf::as_path)
            .chain([merged])
        {
            let found = std::fs::metadata(dir).map_err(|e| Error::io("examining", dir, e))?;
            if !found.is_dir() {
                return Err(Error::user(format!("{} is not a directory", dir.display())));
            }
        }
        let merged = canonical(merged)?;
        let lowers = layers
            .lowers
            .iter()
            .map(|lower| canonical(lower))
            .collect::<Result<Vec<_>>>()?;
        let (upper, work) = (canonical(&layers.upper)?, canonical(&layers.work)?);
        let options = options(&lowers, &upper, &work, userxattr)?;
        rustix::mount::mount(
            SOURCE,
            &merged,
            FS_TYPE,
            MountFlags::empty(),
            options.as_c_str(),
        )
        .map_err(|errno| refused(errno, &merged, &upper, &work, userxattr))?;
        Ok(Self { merged, lowers })
    }

    /// Takes over an overlay that is mounted on `merged` already; `None` if there is none.
    ///
    /// # Errors
    /// Mountinfo cannot be read.
    pub fn find(merged: &Path) -> Result<Option<Self>> {
        let merged = canonical(merged)?;
        let entry = mountinfo::mount_at(&merged)?.filter(|entry| entry.fs_type == FS_TYPE);
        Ok(entry.map(|entry| Self {
            merged,
            lowers: entry.overlay_lower_dirs(),
        }))
    }

    /// Mounts below the overlay that is mounted on `merged`, by way of the empty directory `scratch`. It is seen once
    /// that one is gone.
    ///
    /// # Errors
    /// As [`OverlayMount::mount`]; the kernel cannot (before Linux 6.5), with a hint.
    pub fn mount_beneath(
        layers: &OverlayLayers,
        merged: &Path,
        scratch: &Path,
        userxattr: bool,
    ) -> Result<()> {
        let merged = canonical(merged)?;
        let made = Self::mount(layers, scratch, userxattr)?;
        let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
        let clone = open_tree(CWD, &made.merged, flags)
            .map_err(|e| Error::io("cloning the mount on", &made.merged, e.into()));
        made.unmount()?;
        let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_BENEATH;
        move_mount(clone?, "", CWD, &merged, flags).map_err(|errno| {
            let error = Error::io("mounting an overlay below that on", &merged, errno.into());
            match errno {
                Errno::INVAL => error.with_hint("Linux 6.5 or newer can"),
                _ => error,
            }
        })
    }

    /// The overlays with that upper directory (canonical) that are mounted on `merged`, the lowest first.
    ///
    /// # Errors
    /// Mountinfo cannot be read.
    pub fn stacked(merged: &Path, upper: &Path) -> Result<Vec<MountEntry>> {
        let merged = canonical(merged)?;
        let mounts = mountinfo::mounts()?;
        let stacked = mountinfo::stacked_at(&mounts, &merged);
        let ours = stacked.into_iter().filter(|entry| {
            entry.fs_type == FS_TYPE
                && entry
                    .super_option("upperdir")
                    .is_some_and(|dir| Path::new(&dir) == upper)
        });
        Ok(ours.cloned().collect())
    }

    /// True if nothing in this mount namespace uses it: no open file, no working directory, no mapped program. Another
    /// moment later that may be different.
    ///
    /// # Errors
    /// Not permitted, or it is not mounted any more.
    pub fn is_unused(&self) -> Result<bool> {
        // Takes away the mark that an earlier question has left: it is for two in a row without a use between.
        rustix::fs::stat(&self.merged)
            .map_err(|e| Error::io("examining", &self.merged, e.into()))?;
        let flags = UnmountFlags::EXPIRE | UnmountFlags::NOFOLLOW;
        match rustix::mount::unmount(&self.merged, flags) {
            Err(Errno::AGAIN) => Ok(true),
            Err(Errno::BUSY) => Ok(false),
            Err(e) => Err(Error::io("asking about the use of", &self.merged, e.into())),
            Ok(()) => Err(Error::internal(format!(
                "{} was unmounted by a question about it",
                self.merged.display()
            ))),
        }
    }

    /// Unmounts it if nothing uses it, here or in a namespace that hears of it; false if something does.
    ///
    /// # Errors
    /// Not permitted, or it is not mounted any more.
    pub fn unmount_if_unused(&self) -> Result<bool> {
        match rustix::mount::unmount(&self.merged, UnmountFlags::NOFOLLOW) {
            Ok(()) => Ok(true),
            Err(Errno::BUSY) => Ok(false),
            Err(e) => Err(Error::io("unmounting", &self.merged, e.into())),
        }
    }

    /// Unmounts it and those with the same upper directory (canonical) below it, lazily if they are in use.
    ///
    /// # Errors
    /// Not permitted.
    pub fn unmount_all(&self, upper: &Path) -> Result<()> {
        self.unmount()?;
        for _ in Self::stacked(&self.merged, upper)? {
            self.unmount()?;
        }
        Ok(())
    }

    /// Where it is mounted; canonical.
    pub fn merged(&self) -> &Path {
        &self.merged
    }

    /// The lower directories, uppermost first.
    pub fn lowers(&self) -> &[PathBuf] {
        &self.lowers
    }

    /// The mount as the kernel shows it; `None` when it is gone.
    ///
    /// # Errors
    /// Mountinfo cannot be read.
    pub fn entry(&self) -> Result<Option<MountEntry>> {
        Ok(mountinfo::mount_at(&self.merged)?.filter(|entry| entry.fs_type == FS_TYPE))
    }

    /// True if a lower directory has `name` and the merged one does not show it: looked up before it
    /// was there, or deleted through the overlay. Only for names in the root.
    ///
    /// # Errors
    /// I/O, other than that the name is absent.
    pub fn is_hidden(&self, name: &OsStr) -> Result<bool> {
        if exists(&self.merged.join(name))? {
            return Ok(false);
        }
        for lower in &self.lowers {
            if exists(&lower.join(name))? {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Makes overlayfs forget which names it found absent, and stale entries. Open files and working
    /// directories go on; takes well below a millisecond.
    ///
    /// # Errors
    /// Not permitted, or it is not mounted any more.
    pub fn remount(&self) -> Result<()> {
        let entry = self.entry()?.ok_or_else(|| {
            Error::environment(format!(
                "no overlay is mounted on {}",
                self.merged.display()
            ))
        })?;
        // What a remount does not name is cleared; a namespace may not clear what is locked.
        rustix::mount::mount_remount(&self.merged, flags(&entry), "")
            .map_err(|e| Error::io("remounting", &self.merged, e.into()))?;
        crate::metrics::remounted();
        Ok(())
    }

    /// Unmounts, lazily if it is in use. Does nothing if it is not mounted.
    ///
    /// # Errors
    /// Not permitted.
    pub fn unmount(&self) -> Result<()> {
        if self.entry()?.is_none() {
            return Ok(());
        }
        let unmount = |flags| rustix::mount::unmount(&self.merged, flags | UnmountFlags::NOFOLLOW);
        let done = match unmount(UnmountFlags::empty()) {
            Err(Errno::BUSY) => {
                tracing::info!("{} is in use: detaching it", self.merged.display());
                unmount(UnmountFlags::DETACH)
            }
            other => other,
        };
        match done {
            Ok(()) | Err(Errno::INVAL) => Ok(()),
            Err(errno) => Err(Error::io("unmounting", &self.merged, errno.into())),
        }
    }
}

fn canonical(path: &Path) -> Result<PathBuf> {
    std::fs::canonicalize(path).map_err(|e| Error::io("resolving", path, e))
}

fn exists(path: &Path) -> Result<bool> {
    match std::fs::symlink_metadata(path) {
        Ok(_) => Ok(true),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(Error::io("looking up", path, error)),
    }
}

/// The flags that a mount has, as a remount wants them.
fn flags(entry: &MountEntry) -> MountFlags {
    [
        ("ro", MountFlags::RDONLY),
        ("nosuid", MountFlags::NOSUID),
        ("nodev", MountFlags::NODEV),
        ("noexec", MountFlags::NOEXEC),
        ("noatime", MountFlags::NOATIME),
        ("nodiratime", MountFlags::NODIRATIME),
        ("relatime", MountFlags::RELATIME),
    ]
    .into_iter()
    .filter(|(name, _)| entry.has_option(name))
    .fold(MountFlags::empty(), |all, (_, flag)| all | flag)
}

fn options(lowers: &[PathBuf], upper: &Path, work: &Path, userxattr: bool) -> Result<CString> {
    let mut out = b"lowerdir=".to_vec();
    for (number, lower) in lowers.iter().enumerate() {
        if number > 0 {
            out.push(b':');
        }
        // A backslash protects a colon between directories and a comma between options.
        out.extend(escape(lower.as_os_str(), b":,\\").as_bytes());
    }
    for (name, dir) in [("upperdir", upper), ("workdir", work)] {
        out.extend(format!(",{name}=").bytes());
        out.extend(escape(dir.as_os_str(), b",\\").as_bytes());
    }
    out.extend(b",index=off,metacopy=off,redirect_dir=");
    // With `userxattr` overlayfs refuses `off`, and does this in any case.
    out.extend(if userxattr {
        &b"nofollow,userxattr"[..]
    } else {
        b"off"
    });
    if out.len() > OPTIONS_BYTES_MAX {
        return Err(Error::environment(format!(
            "the overlay's options: expected {OPTIONS_BYTES_MAX} bytes at most, found {}",
            out.len()
        ))
        .with_hint("use shorter paths for the layers, or fewer of them"));
    }
    CString::new(out).map_err(|_| Error::user("a path of the overlay holds a NUL byte"))
}

fn escape(value: &OsStr, special: &[u8]) -> OsString {
    let mut out = Vec::with_capacity(value.len());
    for &byte in value.as_bytes() {
        if special.contains(&byte) {
            out.push(b'\\');
        }
        out.push(byte);
    }
    OsString::from_vec(out)
}

/// Finds out why overlayfs refused, as far as one can see from outside; the kernel's log says the rest.
fn refused(errno: Errno, merged: &Path, upper: &Path, work: &Path, userxattr: bool) -> Error {
    let error = Error::io("mounting an overlay on", merged, errno.into());
    let device = |path: &Path| {
        std::fs::metadata(path)
            .map(|m| std::os::unix::fs::MetadataExt::dev(&m))
            .ok()
    };
    match errno {
        Errno::PERM => error.with_hint(
            "run as root, or in a user namespace (`unshare -Urm`); containers may forbid mounts",
        ),
        Errno::NODEV => {
            error.with_hint("the kernel has no overlayfs: load the module with `modprobe overlay`")
        }
        Errno::BUSY => error.with_hint(format!(
            "another overlay uses {} or {}: unmount it first",
            upper.display(),
            work.display()
        )),
        _ if device(upper) != device(work) => error.with_hint(format!(
            "the work directory {} must be on the same file system as the upper one, {}",
            work.display(),
            upper.display()
        )),
        _ if upper.starts_with(work) || work.starts_with(upper) => error
            .with_hint("the upper and the work directory must lie beside each other, not inside"),
        _ => {
            let kind = rustix::fs::statfs(upper).map(|fs| fs.f_type);
            error.with_hint(match kind.ok().and_then(|kind| unfit(kind.cast_unsigned())) {
                Some(name) => format!(
                    "the upper directory {} lies on {name}, which overlayfs does not take: use ext4, xfs, btrfs or tmpfs",
                    upper.display()
                ),
                None if userxattr => "in a user namespace overlayfs needs Linux 5.11, and an upper on a file system with user xattrs (tmpfs: Linux 6.6)".into(),
                None => "the kernel's log has the reason: `dmesg | tail`".into(),
            })
        }
    }
}

/// File systems that cannot hold an upper directory, by their magic number (statfs(2)).
pub(crate) fn unfit(magic: u64) -> Option<&'static str> {
    Some(match magic {
        0x794c_7630 => "another overlay",
        0x6969 => "NFS",
        0x4d44 => "FAT",
        0x2011_bab0 => "exFAT",
        0x5346_544e | 0x7366_746e => "NTFS",
        0x6573_5546 => "FUSE",
        0x0102_1997 => "9p",
        0xff53_4d42 | 0xfe53_4d42 => "SMB",
        0x7371_7368 => "squashfs",
        0xe0f5_e1e2 => "erofs",
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_protect_what_separates() {
        let all = options(
            &["/a:b".into(), "/c,d".into()],
            Path::new("/u:p,\\x"),
            Path::new("/w"),
            true,
        )
        .unwrap();
        assert_eq!(
            all.to_str().unwrap(),
            "lowerdir=/a\\:b:/c\\,d,upperdir=/u:p\\,\\\\x,workdir=/w,index=off,metacopy=off,redirect_dir=nofollow,userxattr"
        );
        let long = PathBuf::from(format!("/{}", "x".repeat(5000)));
        let error = options(&[long], Path::new("/u"), Path::new("/w"), false).unwrap_err();
        assert_eq!(
            error.to_string(),
            "the overlay's options: expected 4095 bytes at most, found 5073"
        );
    }
}
