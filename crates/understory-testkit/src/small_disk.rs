//! Disks that fill up.

use rustix::mount::{MountFlags, UnmountFlags, mount, mount_remount, unmount};
use std::ffi::CString;
use std::fs::File;
use std::io::Write;
use std::path::Path;

/// Bytes written at once by [`SmallDisk::fill`].
const FILL_BYTES: usize = 64 << 10;

/// A tmpfs of its own, gone when dropped.
pub struct SmallDisk(tempfile::TempDir);

impl SmallDisk {
    /// Mounts one; [skips](crate::skip) and returns `None` without the privilege.
    ///
    /// # Panics
    /// Nothing may be skipped; no temporary directory can be made.
    pub fn new(megabytes: u32) -> Option<Self> {
        let dir = match tempfile::tempdir() {
            Ok(dir) => dir,
            Err(error) => panic!("making a temporary directory: {error}"),
        };
        let flags = MountFlags::empty();
        let size = size(megabytes);
        match mount("tmpfs", dir.path(), "tmpfs", flags, Some(size.as_c_str())) {
            Ok(()) => Some(Self(dir)),
            Err(error) => {
                crate::skip(&format!("mounting a tmpfs: {error}"));
                None
            }
        }
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        self.0.path()
    }

    /// Makes it larger.
    ///
    /// # Panics
    /// The kernel refuses.
    pub fn grow(&self, megabytes: u32) {
        if let Err(error) = mount_remount(self.path(), MountFlags::empty(), size(megabytes)) {
            panic!("growing a tmpfs: {error}");
        }
    }

    /// Leaves no room, by a file `ballast`.
    ///
    /// # Panics
    /// I/O, but for a full disk.
    pub fn fill(&self) {
        let mut ballast = match File::create(self.path().join("ballast")) {
            Ok(file) => file,
            Err(error) => panic!("making ballast: {error}"),
        };
        let mut count = FILL_BYTES;
        while count > 0 {
            match ballast.write_all(&[1; FILL_BYTES][..count]) {
                Ok(()) => {}
                Err(error) if error.kind() == std::io::ErrorKind::StorageFull => count /= 2,
                Err(error) => panic!("writing ballast: {error}"),
            }
        }
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = unmount(self.path(), UnmountFlags::DETACH);
    }
}

fn size(megabytes: u32) -> CString {
    CString::new(format!("size={megabytes}M")).unwrap_or_default()
}
