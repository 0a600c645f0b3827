//! The beginning of a FUSE mount: mounting, more descriptors of the device, the handshake.
//!
//! Serving is not part of it (see `session`): who mounts may hand the descriptors to another process that
//! serves, and who takes a mount over gets descriptors whose handshake is done.
//!
//! A mount that was made and is then not served must not stay behind: [`Connection`] detaches when it is
//! dropped, until [`Connection::into_parts`] gives it away.

use super::mountinfo::{self, MountEntry};
use super::protocol::{
    self, Agreed, InitError, InitRequest, REQUEST_BYTES_MAX, Reply, Request, op,
};
use super::sys::{self, FS_TYPE};
use crate::{Error, Result};
use rustix::fd::OwnedFd;
use rustix::io::Errno;
use std::path::{Path, PathBuf};

/// Most descriptors, and so threads, that one mount may have.
pub(super) const DEVICES_MAX: usize = 64;

/// Where a mount is.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub(super) struct Place {
    /// Canonical.
    pub(super) mountpoint: PathBuf,
    /// The mount's `st_dev`, which tells it from others at the same place.
    pub(super) device_number: (u32, u32),
}

impl Place {
    /// True if the mount is still the uppermost one there.
    pub(super) fn is_mounted(&self) -> bool {
        mountinfo::mount_at(&self.mountpoint).is_ok_and(|entry| {
            entry.is_some_and(|entry| is_ours(&entry) && entry.device == self.device_number)
        })
    }
}

/// What another server must know of a mount to serve it, besides the descriptors of the device.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Handover {
    pub(super) place: Place,
    pub(super) agreed: Agreed,
}

impl Handover {
    /// True if the kernel gives the requests that a killed server has read to the next one (Linux 6.9);
    /// without, they fail and all others wait.
    pub fn can_resend(&self) -> bool {
        self.agreed.can_resend()
    }
    /// Where it is mounted.
    pub fn mountpoint(&self) -> &Path {
        &self.place.mountpoint
    }
    /// True if it is the uppermost mount there. Asks nobody who may have to serve it.
    pub fn is_mounted(&self) -> bool {
        self.place.is_mounted()
    }
}

/// A mount whose requests nobody serves yet. Dropping it unmounts.
pub(super) struct Connection {
    place: Place,
    devices: Vec<OwnedFd>,
    keep: bool,
}

impl Connection {
    /// Mounts, and opens the device `clones` times more; not at all if the kernel does not permit it. A dead mount of
    /// ours that is there already is removed first. The first request that the kernel makes is INIT, for
    /// [`shake_hands`].
    ///
    /// # Errors
    /// What of the machine stands in the way, with a hint; a living mount of ours is there already.
    pub(super) fn mount(request: &sys::MountRequest<'_>, clones: usize) -> Result<Self> {
        let mountpoint = prepare_mountpoint(request.mountpoint)?;
        let device = sys::mount(&sys::MountRequest {
            mountpoint: &mountpoint,
            ..*request
        })?;
        let mut this = Self {
            place: Place {
                mountpoint,
                device_number: (0, 0),
            },
            devices: vec![device],
            keep: false,
        };
        let mountpoint = &this.place.mountpoint;
        let entry = mountinfo::mount_at(mountpoint)?
            .filter(|entry| entry.fs_type == FS_TYPE)
            .ok_or_else(|| {
                Error::environment(format!("{} was mounted and is gone", mountpoint.display()))
            })?;
        this.place.device_number = entry.device;
        let clones = clone_devices(&this.devices[0], clones);
        this.devices.extend(clones);
        Ok(this)
    }

    /// Where it is.
    pub(super) fn place(&self) -> &Place {
        &self.place
    }

    /// The device: the descriptor that it was mounted with, which is for notifications, and the clones.
    pub(super) fn devices(&self) -> &[OwnedFd] {
        &self.devices
    }

    /// Gives the mount away: from now on it stays when things go wrong.
    pub(super) fn into_parts(mut self) -> (Place, Vec<OwnedFd>) {
        self.keep = true;
        (self.place.clone(), std::mem::take(&mut self.devices))
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        if !self.keep {
            let _ = sys::detach(&self.place.mountpoint);
        }
    }
}

/// Opens the device `count` times more, or not at all if the kernel does not permit it: then all use one descriptor.
pub(super) fn clone_devices(device: &OwnedFd, count: usize) -> Vec<OwnedFd> {
    let clones = (0..count.min(DEVICES_MAX)).map(|_| sys::clone_device(device));
    clones.collect::<Result<_, _>>().unwrap_or_else(|errno| {
        tracing::debug!("one descriptor for all threads: {errno}");
        Vec::new()
    })
}

/// Answers INIT, which is the first request on a new mount.
///
/// # Errors
/// The kernel lacks what is needed.
pub(super) fn shake_hands(device: &OwnedFd, wanted: &InitRequest) -> Result<Agreed> {
    let mut buffer = vec![0xff; REQUEST_BYTES_MAX];
    let mut reply = Reply::new(256);
    loop {
        let bytes = match rustix::io::read(device, &mut buffer[..]) {
            Ok(bytes) => bytes,
            Err(Errno::INTR | Errno::AGAIN) => continue,
            Err(errno) => {
                return Err(Error::environment("waiting for the kernel's INIT")
                    .with_source(std::io::Error::from(errno)));
            }
        };
        let request = Request::parse(&buffer[..bytes])
            .filter(|request| request.opcode == op::INIT)
            .ok_or_else(|| Error::environment("the kernel's first request is not INIT"))?;
        reply.clear();
        let result = protocol::init(request.body, wanted, &mut reply);
        let message = match result {
            Ok(_) | Err(InitError::MajorNewer) => reply.message(request.unique, Ok(())),
            Err(_) => reply.message(request.unique, Err(Errno::PROTO)),
        };
        rustix::io::write(device, message).map_err(|e| {
            Error::environment("answering the kernel's INIT").with_source(std::io::Error::from(e))
        })?;
        let too_old = |what: String| {
            Error::environment(format!("this kernel's FUSE is too old: {what}"))
                .with_hint("Linux 5.4 or newer is needed")
        };
        match result {
            Ok(agreed) => return Ok(agreed),
            Err(InitError::MajorNewer) => {}
            Err(InitError::TooOld(major, minor)) => {
                return Err(too_old(format!(
                    "expected protocol 7.{} at least, found {major}.{minor}",
                    protocol::MINOR_MIN
                )));
            }
            Err(InitError::Lacks(flags)) => {
                return Err(too_old(format!("it lacks INIT flags {flags:#x}")));
            }
            Err(InitError::Malformed) => {
                return Err(Error::environment("the kernel's INIT is malformed"));
            }
        }
    }
}

/// Returns the canonical mountpoint, freed of dead mounts of ours.
fn prepare_mountpoint(given: &Path) -> Result<PathBuf> {
    let canonical = std::fs::canonicalize(given).map_err(|e| Error::io("resolving", given, e))?;
    loop {
        let top = mountinfo::mount_at(&canonical)?;
        match top {
            Some(entry) if is_ours(&entry) && !entry.is_alive() => {
                tracing::warn!(
                    "{}: removing the dead mount of {}",
                    canonical.display(),
                    entry.source.display()
                );
                sys::detach(&canonical)
                    .map_err(|e| Error::io("removing the dead mount on", &canonical, e.into()))?;
            }
            Some(entry) if is_ours(&entry) => {
                let (at, source) = (canonical.display(), entry.source.display());
                return Err(
                    Error::environment(format!("{at} is mounted already: {source}")).with_hint(
                        format!("unmount it first: `understory down`, or `umount {at}`"),
                    ),
                );
            }
            Some(entry) if !entry.is_alive() => {
                let at = canonical.display();
                return Err(Error::environment(format!(
                    "{at} is a dead mount of {}",
                    entry.fs_type
                ))
                .with_hint(format!("its server is gone: `umount -l {at}`")));
            }
            _ => break,
        }
    }
    let found = std::fs::metadata(&canonical).map_err(|e| Error::io("examining", &canonical, e))?;
    if !found.is_dir() {
        return Err(Error::user(format!(
            "{} is not a directory",
            canonical.display()
        )));
    }
    Ok(canonical)
}

fn is_ours(entry: &MountEntry) -> bool {
    entry.fs_type == FS_TYPE
}
