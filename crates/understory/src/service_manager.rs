//! What is said to systemd and taken from it: `sd_notify(3)`, `sd_listen_fds(3)`, `sd_pid_notify_with_fds(3)`.
//!
//! systemd starts a service with descriptors from 3 on: the sockets of its socket units, then what the processes before
//! have let it keep (`FDSTORE=1`). Each has a name, in `LISTEN_FDNAMES`. Checked against systemd 252 and the manual
//! pages of 257.
//!
//! Cost: a datagram and a socket for each thing that is said.

#![allow(unsafe_code)]

use crate::{Error, Result};
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd};
use rustix::io::FdFlags;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};
use rustix::process::{PidfdFlags, PidfdGetfdFlags, getpid, pidfd_getfd, pidfd_open};
use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// First descriptor that a process is started with (`SD_LISTEN_FDS_START`).
const DESCRIPTOR_FIRST: i32 = 3;
/// Most descriptors that are taken: twice what a supervisor keeps at most, and some sockets.
const DESCRIPTORS_MAX: u32 = 640;
/// How long systemd may take to do what it was told; it does it in below a millisecond, unless it is stuck.
const BARRIER_MAX: Timespec = Timespec {
    tv_sec: 5,
    tv_nsec: 0,
};
/// What descriptors without a name are called, as in systemd.
const NAMELESS: &str = "unknown";

/// A descriptor that this process was started with.
#[derive(Debug)]
pub struct Handed {
    /// What it is called.
    pub name: String,
    /// The descriptor; it is closed on exec from now on.
    pub descriptor: OwnedFd,
}

/// Takes the descriptors that systemd has started this process with, by `LISTEN_PID`, `LISTEN_FDS` and
/// `LISTEN_FDNAMES`; none if there are none for this process, or if they were taken before.
///
/// # Errors
/// The variables make no sense.
pub fn take_descriptors() -> Result<Vec<Handed>> {
    static TAKEN: AtomicBool = AtomicBool::new(false);
    let variable = |name: &str| std::env::var(name).ok();
    let (Some(pid), Some(count)) = (variable("LISTEN_PID"), variable("LISTEN_FDS")) else {
        return Ok(Vec::new());
    };
    if pid.trim().parse() != Ok(getpid().as_raw_nonzero().get()) {
        return Ok(Vec::new());
    }
    let count: u32 = count
        .trim()
        .parse()
        .ok()
        .filter(|count| *count <= DESCRIPTORS_MAX)
        .ok_or_else(|| {
            Error::environment(format!("LISTEN_FDS is {count:?}, not a small number"))
        })?;
    let names = variable("LISTEN_FDNAMES");
    let mut names = names.as_deref().unwrap_or_default().split(':');
    let this = pidfd_open(getpid(), PidfdFlags::empty())
        .map_err(|error| Error::environment("opening our own process").with_source(error))?;
    if TAKEN.swap(true, Ordering::SeqCst) {
        return Ok(Vec::new());
    }
    let mut out = Vec::new();
    for fd in (DESCRIPTOR_FIRST..).take(count as usize) {
        let failed = |error| {
            Error::environment(format!("descriptor {fd} of the socket activation"))
                .with_source(error)
        };
        // An error if it is not open.
        pidfd_getfd(&this, fd, PidfdGetfdFlags::empty()).map_err(failed)?;
        // SAFETY: it is open, as the line before shows, and nobody else owns it: whoever started this process says, by
        // LISTEN_PID, that these numbers are for us to take, and `TAKEN` lets them be taken once.
        let descriptor = unsafe { OwnedFd::from_raw_fd(fd) };
        rustix::io::fcntl_setfd(&descriptor, FdFlags::CLOEXEC).map_err(failed)?;
        let name = names.next().filter(|name| !name.is_empty());
        out.push(Handed {
            name: name.unwrap_or(NAMELESS).to_owned(),
            descriptor,
        });
    }
    Ok(out)
}

/// Tells systemd that the service is ready; nothing without `NOTIFY_SOCKET`, here and below.
pub fn ready(status: &str) {
    let status = status.replace('\n', " ");
    tell(&format!("READY=1\nSTATUS={status}\n"));
}

/// Tells systemd that the service stops.
pub fn stopping() {
    tell("STOPPING=1\n");
}

/// Gives systemd the sign of life that it wants by its `WatchdogSec=`.
pub(crate) fn alive() {
    tell("WATCHDOG=1\n");
}

/// How often systemd wants at least two signs of life from this process, if it does.
pub(crate) fn watchdog() -> Option<Duration> {
    let number = |name: &str| std::env::var(name).ok()?.trim().parse::<u64>().ok();
    let is_ours = number("WATCHDOG_PID").is_none_or(|pid| pid == u64::from(std::process::id()));
    let time = number("WATCHDOG_USEC").map(Duration::from_micros);
    time.filter(|time| is_ours && !time.is_zero())
}

/// How many descriptors systemd keeps for this service: `FDSTORE`, which systemd sets from 254 on, and a unit for
/// older ones.
pub(crate) fn store_capacity() -> usize {
    let given = std::env::var("FDSTORE").ok();
    let capacity = given.and_then(|text| text.trim().parse().ok());
    capacity
        .filter(|_| std::env::var_os("NOTIFY_SOCKET").is_some())
        .unwrap_or(0)
}

/// Lets systemd keep a descriptor under `name`. It is not watched (`FDPOLL=0`): systemd would be woken by each request
/// on a FUSE device, and would drop it silently when the mount ends.
///
/// # Errors
/// systemd does not listen.
pub(crate) fn store(name: &str, descriptor: BorrowedFd<'_>) -> io::Result<()> {
    send(
        &format!("FDSTORE=1\nFDNAME={name}\nFDPOLL=0\n"),
        &[descriptor],
    )
}

/// Lets systemd close what it keeps under `name`.
///
/// # Errors
/// As [`store`].
pub(crate) fn remove(name: &str) -> io::Result<()> {
    send(&format!("FDSTOREREMOVE=1\nFDNAME={name}\n"), &[])
}

/// Waits until systemd has done what it was told so far (`BARRIER=1`, systemd 246), at most [`BARRIER_MAX`]
///
/// # Errors
/// It does not listen, or not in time.
pub(crate) fn wait_done() -> io::Result<()> {
    if std::env::var_os("NOTIFY_SOCKET").is_none() {
        return Ok(());
    }
    let (ours, theirs) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)?;
    send("BARRIER=1\n", &[theirs.as_fd()])?;
    drop(theirs);
    // The end of theirs is seen as a hang-up, which is always waited for.
    let mut fds = [PollFd::new(&ours, PollFlags::empty())];
    match rustix::event::poll(&mut fds, Some(&BARRIER_MAX))? {
        0 => Err(io::ErrorKind::TimedOut.into()),
        _ => Ok(()),
    }
}

fn tell(text: &str) {
    if let Err(error) = send(text, &[]) {
        tracing::warn!(%error, "telling the service manager");
    }
}

fn send(text: &str, descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
    let Some(path) = std::env::var_os("NOTIFY_SOCKET") else {
        return Ok(());
    };
    let address = match path.as_bytes() {
        [b'@', name @ ..] => SocketAddr::from_abstract_name(name)?,
        _ => SocketAddr::from_pathname(&path)?,
    };
    let socket = UnixDatagram::unbound()?;
    socket.connect_addr(&address)?;
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !descriptors.is_empty() && !ancillary.push(SendAncillaryMessage::ScmRights(descriptors)) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let bytes = [IoSlice::new(text.as_bytes())];
    rustix::net::sendmsg(socket.as_fd(), &bytes, &mut ancillary, SendFlags::NOSIGNAL)?;
    Ok(())
}
