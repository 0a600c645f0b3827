//! EROFS mounts of images whose file contents lie on a virtual device.
//!
//! Which way works is found out by trying, in this order; the last refusal says why none does:
//! 1. *file*: the kernel reads the image file itself (Linux 6.12 or newer).
//! 2. *served*: as before, but the image is read through the blob server. For images that lie on overlayfs.
//! 3. *loop*: image and device through loop devices. For kernels from 5.16 on.
//!
//! All by the new mount interface (fsopen, fsconfig, fsmount, move_mount): `mount(8)` makes loop devices without a word.
//! A user namespace may not mount EROFS: there the live mount serves alone.
//!
//! File-backed EROFS counts as a layer of stacking, and so leaves room for one overlay on top.

use super::mountinfo::{self, MountEntry};
use super::sys::{self, LoopDevice};
use crate::{Error, Result};
use rustix::fs::CWD;
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags, UnmountFlags, fsconfig_create,
    fsconfig_set_flag, fsconfig_set_string, fsmount, fsopen, move_mount,
};
use std::path::{Path, PathBuf};

/// The type in mountinfo.
pub(crate) const FS_TYPE: &str = "erofs";
/// What the kernel may say about a refusal.
const SAID_BYTES_MAX: usize = 4096;
/// Messages of the kernel about one refusal.
const SAID_LINES_MAX: usize = 16;

/// How an image is mounted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Route {
    /// The kernel reads the image file.
    File,
    /// The kernel reads the image through the blob server.
    Served,
    /// Through loop devices.
    Loop,
}

impl Route {
    /// All, the best first.
    pub const ALL: [Self; 3] = [Self::File, Self::Served, Self::Loop];

    /// For people.
    pub fn describe(self) -> &'static str {
        match self {
            Self::File => "the kernel reads the image file itself",
            Self::Served => "the kernel reads the image through the blob server",
            Self::Loop => "the kernel reads the image through loop devices",
        }
    }
}

/// What to mount.
#[derive(Debug, Clone)]
pub(crate) struct ImageRequest<'a> {
    /// The image file.
    pub(crate) image: &'a Path,
    /// The same, as the blob server has it.
    pub(crate) served: &'a Path,
    /// The virtual device.
    pub(crate) device: &'a Path,
    /// Where; a directory.
    pub(crate) mountpoint: &'a Path,
    /// Ways to try, in this order.
    pub(crate) routes: &'a [Route],
    /// Bytes that the kernel reads ahead of a sequential reader.
    pub(crate) read_ahead_bytes: u32,
}

/// A mounted image. It stays mounted when this is dropped: it may have users that outlive us.
#[derive(Debug, Clone)]
pub struct ImageMount {
    mountpoint: PathBuf,
    device_number: (u32, u32),
    route: Route,
    reason: Option<String>,
}

impl ImageMount {
    /// Mounts an image.
    ///
    /// # Errors
    /// No way works; the message has each refusal.
    pub(crate) fn mount(request: &ImageRequest<'_>) -> Result<Self> {
        let mountpoint = std::fs::canonicalize(request.mountpoint)
            .map_err(|e| Error::io("resolving", request.mountpoint, e))?;
        let mut refusals: Vec<String> = Vec::new();
        for &route in request.routes {
            let bdis = sys::bdi_names(FS_TYPE);
            match try_route(request, route, &mountpoint) {
                Ok(()) => {
                    sys::set_new_read_ahead(FS_TYPE, &bdis, request.read_ahead_bytes);
                    let entry = mount_of(&mountpoint)?.ok_or_else(|| {
                        Error::environment(format!(
                            "{} was mounted and is gone",
                            mountpoint.display()
                        ))
                    })?;
                    return Ok(Self {
                        mountpoint,
                        device_number: entry.device,
                        route,
                        reason: (!refusals.is_empty()).then(|| refusals.join("; ")),
                    });
                }
                Err(refusal) => refusals.push(refusal),
            }
        }
        Err(Error::environment(format!(
            "mounting {} on {}: {}",
            request.image.display(),
            mountpoint.display(),
            refusals.join("; ")
        ))
        .with_hint("Linux 5.16 or newer with EROFS is needed, and root in the first user namespace; without, the live mount serves alone"))
    }

    /// Where it is mounted; canonical.
    pub fn mountpoint(&self) -> &Path {
        &self.mountpoint
    }

    /// Major and minor number of its `st_dev`.
    pub fn device(&self) -> (u32, u32) {
        self.device_number
    }

    /// How it is mounted.
    pub fn route(&self) -> Route {
        self.route
    }

    /// Why it is not mounted in a better way; `None` if it is mounted in the best one.
    pub fn reason(&self) -> Option<&str> {
        self.reason.as_deref()
    }

    /// Unmounts, lazily if it is in use. Does nothing if it is not mounted.
    ///
    /// # Errors
    /// Not permitted.
    pub fn unmount(&self) -> Result<()> {
        match mount_of(&self.mountpoint)? {
            Some(entry) if entry.device == self.device_number => unmount(&self.mountpoint),
            _ => Ok(()),
        }
    }

    /// Unmounts the image that is mounted on `at`, whoever has mounted it.
    ///
    /// # Errors
    /// Not permitted.
    pub(crate) fn unmount_at(at: &Path) -> Result<()> {
        let at = std::fs::canonicalize(at).map_err(|e| Error::io("resolving", at, e))?;
        match mount_of(&at)? {
            Some(_) => unmount(&at),
            None => Ok(()),
        }
    }
}

fn unmount(at: &Path) -> Result<()> {
    let unmount = |flags| rustix::mount::unmount(at, flags | UnmountFlags::NOFOLLOW);
    let done = match unmount(UnmountFlags::empty()) {
        Err(Errno::BUSY) => unmount(UnmountFlags::DETACH),
        other => other,
    };
    match done {
        Ok(()) | Err(Errno::INVAL) => Ok(()),
        Err(errno) => Err(Error::io("unmounting", at, errno.into())),
    }
}

/// The EROFS that is mounted on `at`, canonical.
fn mount_of(at: &Path) -> Result<Option<MountEntry>> {
    Ok(mountinfo::mount_at(at)?.filter(|entry| entry.fs_type == FS_TYPE))
}

/// Mounts in one way; says what refused otherwise.
fn try_route(request: &ImageRequest<'_>, route: Route, at: &Path) -> Result<(), String> {
    let plain = |image: &Path| mount_directly(image, request.device, at);
    match route {
        Route::File => plain(request.image),
        Route::Served => plain(request.served),
        Route::Loop => {
            let loop_of = |path: &Path| {
                LoopDevice::new(path)
                    .map_err(|errno| format!("a loop device for {}: {errno}", path.display()))
            };
            let image = loop_of(request.image)?;
            let device = loop_of(request.device)?;
            // They go with the mount, or with their last descriptor.
            mount_directly(image.path(), device.path(), at)
        }
    }
}

fn mount_directly(image: &Path, device: &Path, at: &Path) -> Result<(), String> {
    let context = fsopen(FS_TYPE, FsOpenFlags::FSOPEN_CLOEXEC)
        .map_err(|errno| format!("the kernel has no EROFS for us: {errno}"))?;
    let mounted = fsconfig_set_string(&context, "source", image)
        .and_then(|()| fsconfig_set_string(&context, "device", device))
        // Without it, loop devices would have to be writable.
        .and_then(|()| fsconfig_set_flag(&context, "ro"))
        .and_then(|()| fsconfig_create(&context))
        .and_then(|()| {
            let attributes = MountAttrFlags::MOUNT_ATTR_RDONLY
                | MountAttrFlags::MOUNT_ATTR_NOSUID
                | MountAttrFlags::MOUNT_ATTR_NODEV;
            fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, attributes)
        })
        .and_then(|mount| {
            let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
            move_mount(&mount, "", CWD, at, flags)
        });
    mounted.map_err(|errno| {
        let mut text = format!("{}: {errno}", image.display());
        for line in said(&context) {
            text.push_str(", ");
            text.push_str(&line);
        }
        text
    })
}

/// What the kernel says about the last failure.
fn said(context: &rustix::fd::OwnedFd) -> Vec<String> {
    let mut lines = Vec::new();
    let mut buffer = [0; SAID_BYTES_MAX];
    while lines.len() < SAID_LINES_MAX
        && let Ok(bytes) = rustix::io::read(context, &mut buffer)
        && bytes > 0
    {
        // `e erofs: …`: the first letter is the level.
        let text = String::from_utf8_lossy(&buffer[..bytes]);
        lines.push(text.get(2..).unwrap_or(&text).trim().to_owned());
    }
    lines
}
