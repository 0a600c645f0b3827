//! The oracles of EROFS images: `fsck.erofs`, `dump.erofs` and the kernel.

use crate::skip;
use rustix::fd::{AsRawFd, OwnedFd};
use rustix::io::Errno;
use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Runs `fsck.erofs` with `arguments` on an image and expects it to find nothing and to say nothing, then `dump.erofs`
/// likewise. False, after having said why, if they are not installed.
///
/// # Panics
/// They found something.
pub fn check(image: &Path, device: Option<&Path>, arguments: &[&str]) -> bool {
    let mut device_argument = Vec::new();
    if let Some(device) = device {
        device_argument.push(format!("--device={}", device.display()));
    }
    for (program, own) in [("fsck.erofs", arguments), ("dump.erofs", &["-s", "-S"])] {
        let output = match Command::new(program)
            .args(own)
            .args(&device_argument)
            .arg(image)
            .output()
        {
            Ok(output) => output,
            Err(error) if error.kind() == ErrorKind::NotFound => {
                skip("erofs-utils are not installed");
                return false;
            }
            Err(error) => panic!("{program}: {error}"),
        };
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{program}: {said}");
        assert!(
            !said.contains("<E>") && !said.contains("<W>"),
            "{program}: {said}"
        );
    }
    true
}

/// An image that the kernel has mounted, from its file and without a loop device, and that is nowhere in the tree.
pub struct Mounted {
    mount: OwnedFd,
}

impl Mounted {
    /// Mounts an image. `None`, after having said why, where that cannot be done.
    ///
    /// # Panics
    /// The kernel refuses the image.
    pub fn new(image: &Path, device: Option<&Path>) -> Option<Self> {
        if !rustix::process::geteuid().is_root() {
            skip("mounting EROFS needs root");
            return None;
        }
        let context = match rustix::mount::fsopen("erofs", FsOpenFlags::FSOPEN_CLOEXEC) {
            Ok(context) => context,
            Err(Errno::NODEV | Errno::PERM) => {
                skip("this kernel has no EROFS, or does not let us mount it");
                return None;
            }
            Err(errno) => panic!("fsopen: {errno}"),
        };
        let set = |key: &str, value: &Path| {
            rustix::mount::fsconfig_set_string(&context, key, value)
                .unwrap_or_else(|errno| panic!("{key}: {errno}"));
        };
        set("source", image);
        if let Some(device) = device {
            set("device", device);
        }
        match rustix::mount::fsconfig_create(&context) {
            Ok(()) => {}
            Err(Errno::NOTBLK) => {
                skip("this kernel does not mount EROFS from a file (before 6.12)");
                return None;
            }
            Err(errno) => panic!("the kernel refuses {}: {errno}", image.display()),
        }
        let attributes = MountAttrFlags::MOUNT_ATTR_RDONLY;
        let mount = rustix::mount::fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, attributes)
            .unwrap_or_else(|errno| panic!("fsmount: {errno}"));
        Some(Self { mount })
    }

    /// Its root, for this process and while this lives.
    pub fn path(&self) -> PathBuf {
        PathBuf::from(format!("/proc/self/fd/{}/", self.mount.as_raw_fd()))
    }
}
