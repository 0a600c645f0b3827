//! System calls of the live mount: the device, mounting with and without privileges, read-ahead.
//!
//! The `unsafe` of the mounts is here: ioctls that rustix has no function for.

use crate::{Error, Result};
use rustix::fd::{AsFd, AsRawFd, OwnedFd};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{MountFlags, UnmountFlags};
use std::ffi::{CString, OsStr, OsString};
use std::io::IoSliceMut;
use std::mem::MaybeUninit;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::Path;
use std::process::{Command, Stdio};

/// The type that mountinfo shows.
pub(crate) const FS_TYPE: &str = "fuse.understory";
/// What the kernel puts after `fuse.`.
const SUBTYPE: &str = "understory";
/// The kernel's FUSE device.
const DEVICE: &str = "/dev/fuse";
/// The setuid program that mounts for users.
const HELPER: &str = "fusermount3";

/// How a live mount is made.
#[derive(Debug, Clone)]
pub(super) struct MountRequest<'a> {
    /// What mountinfo shows as the source.
    pub(super) source: &'a OsStr,
    /// Where; canonical.
    pub(super) mountpoint: &'a Path,
    /// Users other than the mounter may look inside.
    pub(super) allow_other: bool,
    /// The longest READ.
    pub(super) read_bytes_max: usize,
}

/// Mounts and returns the device, connected.
///
/// # Errors
/// What stands in the way, with a hint.
pub(super) fn mount(request: &MountRequest<'_>) -> Result<OwnedFd> {
    let device = match open_device() {
        Ok(device) => device,
        Err(Errno::NOENT | Errno::NODEV | Errno::NXIO) => {
            return Err(Error::environment(format!("{DEVICE} is missing"))
                .with_hint("load the kernel module with `modprobe fuse`; a container needs the device (`--device /dev/fuse`)"));
        }
        Err(Errno::ACCESS | Errno::PERM) => return mount_with_helper(request),
        Err(errno) => return Err(Error::io("opening", DEVICE, errno.into())),
    };
    match mount_directly(request, &device) {
        Ok(()) => Ok(device),
        Err(Errno::PERM) => mount_with_helper(request),
        Err(errno) => {
            let error = Error::io("mounting on", request.mountpoint, errno.into());
            Err(match errno {
                Errno::NODEV => {
                    error.with_hint("the kernel has no FUSE: load the module with `modprobe fuse`")
                }
                Errno::NOTDIR => error.with_hint("a directory is needed"),
                Errno::INVAL => error.with_hint(
                    "Linux 5.4 or newer is needed; in a user namespace, root must be mapped",
                ),
                _ => error,
            })
        }
    }
}

fn open_device() -> Result<OwnedFd, Errno> {
    rustix::fs::open(DEVICE, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())
}

fn mount_directly(request: &MountRequest<'_>, device: &OwnedFd) -> Result<(), Errno> {
    let options = format!(
        "fd={},rootmode=40000,user_id={},group_id={},default_permissions,max_read={}{}",
        device.as_raw_fd(),
        rustix::process::geteuid().as_raw(),
        rustix::process::getegid().as_raw(),
        request.read_bytes_max,
        if request.allow_other {
            ",allow_other"
        } else {
            ""
        },
    );
    let options = CString::new(options).map_err(|_| Errno::INVAL)?;
    let flags = MountFlags::RDONLY | MountFlags::NOSUID | MountFlags::NODEV;
    rustix::mount::mount(
        request.source,
        request.mountpoint,
        FS_TYPE,
        flags,
        options.as_c_str(),
    )
}

/// Lets `fusermount3` mount; it hands back the device over a socket.
fn mount_with_helper(request: &MountRequest<'_>) -> Result<OwnedFd> {
    match try_helper(request, request.allow_other) {
        // Users may share a mount only where the administrator says so; do without.
        Err(error) if request.allow_other && error.chain().contains("user_allow_other") => {
            try_helper(request, false)
        }
        other => other,
    }
}

fn try_helper(request: &MountRequest<'_>, allow_other: bool) -> Result<OwnedFd> {
    use rustix::net::{
        AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SocketFlags,
        SocketType,
    };
    let failed = |what: &str, errno: Errno| {
        Error::environment(format!("{HELPER}: {what}")).with_source(std::io::Error::from(errno))
    };
    let (ours, theirs) = rustix::net::socketpair(
        AddressFamily::UNIX,
        SocketType::STREAM,
        SocketFlags::CLOEXEC,
        None,
    )
    .map_err(|e| failed("making a socket pair", e))?;
    let mut options = OsString::from(format!(
        "ro,nosuid,nodev,default_permissions,max_read={},subtype={SUBTYPE}{},fsname=",
        request.read_bytes_max,
        if allow_other { ",allow_other" } else { "" },
    ));
    options.push(escape_option(request.source));
    // The socket is its standard input, so that no other child can inherit it by accident.
    let child = Command::new(HELPER)
        .arg("-o")
        .arg(options)
        .arg("--")
        .arg(request.mountpoint)
        .env("_FUSE_COMMFD", "0")
        .stdin(Stdio::from(theirs))
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|e| {
            Error::environment(format!(
                "this user may not mount, and {HELPER} cannot be run"
            ))
            .with_source(e)
            .with_hint(
                "install the package fuse3, or run as root or in a user namespace (`unshare -Urm`)",
            )
        })?;
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let mut byte = [0u8; 1];
    let received = loop {
        let result = rustix::net::recvmsg(
            &ours,
            &mut [IoSliceMut::new(&mut byte)],
            &mut ancillary,
            RecvFlags::CMSG_CLOEXEC,
        );
        if !matches!(result, Err(Errno::INTR)) {
            break result;
        }
    };
    let device = ancillary.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
        _ => None,
    });
    let output = child
        .wait_with_output()
        .map_err(|e| Error::environment(HELPER).with_source(e))?;
    match (device, received) {
        (Some(device), Ok(_)) if output.status.success() => Ok(device),
        (_, received) => {
            let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
            let said = match (said.is_empty(), received) {
                (false, _) => said,
                (true, Err(errno)) => format!("no device received: {errno}"),
                (true, Ok(_)) => format!("no device received: {}", output.status),
            };
            Err(Error::environment(format!("{HELPER} did not mount on {}: {said}", request.mountpoint.display()))
                .with_hint("/dev/fuse must be there and fusermount3 setuid root; or run as root or in a user namespace"))
        }
    }
}

/// Protects what separates mount options.
fn escape_option(value: &OsStr) -> OsString {
    let mut out = Vec::with_capacity(value.len());
    for &byte in value.as_bytes() {
        if byte == b',' || byte == b'\\' {
            out.push(b'\\');
        }
        out.push(byte);
    }
    OsString::from_vec(out)
}

/// Opens the device once more for the same mount, so that threads do not share one queue of replies.
#[allow(unsafe_code, reason = "rustix has no function for this ioctl")]
pub(super) fn clone_device(device: &OwnedFd) -> Result<OwnedFd, Errno> {
    /// `FUSE_DEV_IOC_CLONE`, `_IOR(229, 0, uint32_t)`.
    const CLONE: rustix::ioctl::Opcode = rustix::ioctl::opcode::read::<u32>(229, 0);
    let clone = open_device()?;
    let of = device.as_raw_fd().cast_unsigned();
    // SAFETY: the kernel reads one u32, the descriptor to clone, through the pointer that Setter passes.
    unsafe { rustix::ioctl::ioctl(clone.as_fd(), rustix::ioctl::Setter::<CLONE, u32>::new(of))? };
    Ok(clone)
}

/// Takes what is mounted on `mountpoint` out of sight at once. With privileges its connection ends too and
/// requests in flight fail; without, it lives on until nothing uses it.
pub(super) fn detach(mountpoint: &Path) -> Result<(), Errno> {
    let lazily = UnmountFlags::NOFOLLOW | UnmountFlags::DETACH;
    match rustix::mount::unmount(mountpoint, lazily | UnmountFlags::FORCE) {
        Err(Errno::PERM) => {}
        other => return other,
    }
    match rustix::mount::unmount(mountpoint, lazily) {
        Err(Errno::PERM) => {}
        other => return other,
    }
    let mut helper = Command::new(HELPER);
    helper.args(["-u", "-q", "-z", "--"]).arg(mountpoint);
    let status = helper
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status();
    if status.is_ok_and(|status| status.success()) {
        Ok(())
    } else {
        Err(Errno::PERM)
    }
}

/// Opens a directory so that names in it can be looked up, no more.
pub(super) fn open_directory(path: &Path) -> Result<OwnedFd, Errno> {
    rustix::fs::open(
        path,
        OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
    )
}

/// Looks a name up, for the sake of the request; what comes of it does not matter.
pub(super) fn touch(directory: &OwnedFd, name: &str) {
    let _ = rustix::fs::statat(directory, name, rustix::fs::AtFlags::SYMLINK_NOFOLLOW);
}

/// Sets how much the kernel reads ahead on a mount; it has 128 KiB for each FUSE mount otherwise,
/// whatever INIT said. Needs root in the first namespace; without it things are slower, no more.
pub(super) fn set_read_ahead(device: (u32, u32), bytes: u32) {
    let path = format!("/sys/class/bdi/{}:{}/read_ahead_kb", device.0, device.1);
    if let Err(error) = std::fs::write(&path, format!("{}", bytes / 1024)) {
        tracing::debug!("read-ahead stays at the kernel's default: writing {path}: {error}");
    }
}

/// Where the kernel shows settings of what is backed by a device or a server.
const BDI_DIR: &str = "/sys/class/bdi";

/// Names of the settings of mounts of `fs_type`, which do not say of which mount.
pub(super) fn bdi_names(fs_type: &str) -> Vec<OsString> {
    let Ok(entries) = std::fs::read_dir(BDI_DIR) else {
        return Vec::new();
    };
    let prefix = format!("{fs_type}-");
    entries
        .filter_map(|entry| Some(entry.ok()?.file_name()))
        .filter(|name| name.to_string_lossy().starts_with(&prefix))
        .collect()
}

/// Sets read-ahead of the mounts of `fs_type` that are not among `before`: mostly the one that was just made. Should
/// somebody else have made one at the same time, it gets the same, which harms nothing.
pub(super) fn set_new_read_ahead(fs_type: &str, before: &[OsString], bytes: u32) {
    for name in bdi_names(fs_type) {
        if before.contains(&name) {
            continue;
        }
        let path = Path::new(BDI_DIR).join(name).join("read_ahead_kb");
        if let Err(error) = std::fs::write(&path, format!("{}", bytes / 1024)) {
            tracing::debug!(
                "read-ahead stays at the kernel's default: writing {}: {error}",
                path.display()
            );
        }
    }
}

/// A loop device, read-only, that goes with its last user.
pub(super) struct LoopDevice {
    path: std::path::PathBuf,
    _device: OwnedFd,
}

/// The kernel's directory of loop devices.
const LOOP_CONTROL: &str = "/dev/loop-control";
/// Loop devices that are tried: another process may take a free one first.
const LOOP_TRIES_MAX: usize = 32;

impl LoopDevice {
    /// Makes one for the file `path`, with direct I/O where the file can.
    ///
    /// # Errors
    /// No loop devices, not permitted.
    pub(super) fn new(path: &Path) -> Result<Self, Errno> {
        let control =
            rustix::fs::open(LOOP_CONTROL, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())?;
        let file = rustix::fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
        for _ in 0..LOOP_TRIES_MAX {
            let number = free_loop(&control)?;
            let path = std::path::PathBuf::from(format!("/dev/loop{number}"));
            let device = rustix::fs::open(&path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
            match configure_loop(&device, &file) {
                Ok(()) => {
                    return Ok(Self {
                        path,
                        _device: device,
                    });
                }
                // Somebody was quicker.
                Err(Errno::BUSY) => {}
                Err(errno) => return Err(errno),
            }
        }
        Err(Errno::BUSY)
    }

    /// The device node.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }
}

/// Returns the number of a loop device that nobody uses.
#[allow(unsafe_code, reason = "rustix has no function for this ioctl")]
fn free_loop(control: &OwnedFd) -> Result<u32, Errno> {
    /// `LOOP_CTL_GET_FREE` of `linux/loop.h`: no argument, the number is what it returns.
    struct GetFree;
    // SAFETY: the opcode takes no pointer and writes nothing.
    unsafe impl rustix::ioctl::Ioctl for GetFree {
        type Output = u32;
        const IS_MUTATING: bool = false;
        fn opcode(&self) -> rustix::ioctl::Opcode {
            0x4C82
        }
        fn as_ptr(&mut self) -> *mut std::ffi::c_void {
            std::ptr::null_mut()
        }
        unsafe fn output_from_ptr(
            out: rustix::ioctl::IoctlOutput,
            _: *mut std::ffi::c_void,
        ) -> rustix::io::Result<u32> {
            u32::try_from(out).map_err(|_| Errno::NODEV)
        }
    }
    // SAFETY: as above.
    unsafe { rustix::ioctl::ioctl(control, GetFree) }
}

/// Gives a loop device its file.
#[allow(unsafe_code, reason = "rustix has no function for this ioctl")]
fn configure_loop(device: &OwnedFd, file: &OwnedFd) -> Result<(), Errno> {
    /// `struct loop_config`: file and block size, `struct loop_info64`, reserved.
    const CONFIG_BYTES: usize = 8 + 232 + 64;
    /// Where `lo_flags` is: behind the sizes, and 52 bytes into `loop_info64`.
    const FLAGS_AT: usize = 8 + 52;
    /// `LO_FLAGS_READ_ONLY`, `LO_FLAGS_AUTOCLEAR`, `LO_FLAGS_DIRECT_IO`.
    const FLAGS: u32 = 1 | 4 | 16;
    /// `LOOP_CONFIGURE`.
    const CONFIGURE: rustix::ioctl::Opcode = 0x4C0A;
    let mut config = [0_u8; CONFIG_BYTES];
    config[..4].copy_from_slice(&file.as_raw_fd().to_ne_bytes());
    config[4..8].copy_from_slice(&4096_u32.to_ne_bytes());
    config[FLAGS_AT..FLAGS_AT + 4].copy_from_slice(&FLAGS.to_ne_bytes());
    // SAFETY: the kernel reads a `struct loop_config`, which is as long as the array and has no pointers.
    unsafe {
        rustix::ioctl::ioctl(
            device,
            rustix::ioctl::Setter::<CONFIGURE, [u8; CONFIG_BYTES]>::new(config),
        )
    }
}

/// Who owns all files: root where there is one, else the mounter.
pub(super) fn owner() -> (u32, u32) {
    let own = (
        rustix::process::geteuid().as_raw(),
        rustix::process::getegid().as_raw(),
    );
    let has_root = |map: &str| {
        std::fs::read_to_string(map).map_or(true, |text| {
            text.lines()
                .any(|line| line.split_whitespace().next() == Some("0"))
        })
    };
    let pick = |map, own| if has_root(map) { 0 } else { own };
    (
        pick("/proc/self/uid_map", own.0),
        pick("/proc/self/gid_map", own.1),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_are_escaped() {
        assert_eq!(escape_option(OsStr::new("a,b\\c")), "a\\,b\\\\c");
    }
}
