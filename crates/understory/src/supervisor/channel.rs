//! What supervisor and worker say to each other, over a pair of sequenced-packet sockets: a message is one packet,
//! JSON, and may carry descriptors.
//!
//! ```text
//! supervisor → worker                         worker → supervisor
//!   start {…}   + lock, sockets, held           ready {report, resend}   it serves
//!   drain       no more clients, then end       failed {kind, message, hint}  it cannot start, and ends
//!   stop        undo and end                    alive                    every third of the watchdog's time
//!   output      + where stderr goes now         hold {name, state, notify} + descriptors  keep these for the next one
//!   held {…}    + device: held from now on      release {name}           keep them no longer
//!   forget {name}  that is not held any more
//!                                               stop                     a client asks for it
//!                                               upgrade {program}        a client asks for it
//!                                               unmounted                somebody has ended the mount
//! ```
//! A worker finds its end as standard input: the one descriptor that a program is started with in any case.
//! [`PROTOCOL`] is in the first message, so that another version of the program can say that it does not know it.

use crate::config::Layout;
use crate::{Error, Result};
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags,
    SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketFlags, SocketType,
};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::path::PathBuf;

/// Version of the messages.
pub(super) const PROTOCOL: u32 = 2;
/// Longest message: a layout's paths and the states of what is held.
const MESSAGE_BYTES_MAX: usize = 128 << 10;
/// Most descriptors of one message: the kernel's own limit (`SCM_MAX_FD`).
pub(super) const DESCRIPTORS_MAX: usize = 253;

/// What a worker does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Serves the FUSE mounts.
    Mount,
    /// Serves the sockets, and owns the overlay.
    Daemon,
}

impl Role {
    /// Its name, as on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Mount => "mount",
            Self::Daemon => "daemon",
        }
    }
}

/// What the supervisor says.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum ToWorker {
    Start(Box<Start>),
    Drain,
    Stop,
    Output,
    /// For the daemon: what the mount server gave away while it runs, with the descriptor for notifications.
    Held(HeldNote),
    /// For the daemon: what the mount server took back.
    Forget {
        name: String,
    },
}

/// What a worker is started with. The descriptors come in this order: the lock, one for each of `sockets`, then those
/// of `held`.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Start {
    pub(super) protocol: u32,
    pub(super) role: Role,
    /// The supervisor's process id.
    pub(super) supervisor: u32,
    pub(super) layout: Layout,
    pub(super) watchdog_ms: u64,
    /// Names of the listening sockets.
    pub(super) sockets: Vec<String>,
    pub(super) held: Vec<HeldNote>,
    /// Requests that dead servers have read are to be answered with errors.
    pub(super) refuse_resent: bool,
}

/// What is known of held descriptors.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct HeldNote {
    pub(super) name: String,
    pub(super) state: serde_json::Value,
    pub(super) descriptors: usize,
    /// The one that notifications to the kernel go through.
    pub(super) notify: Option<usize>,
}

/// What a worker says.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum FromWorker {
    Ready {
        report: serde_json::Value,
        resend: Option<bool>,
    },
    Failed {
        kind: String,
        message: String,
        hint: Option<String>,
    },
    Alive,
    Hold {
        name: String,
        state: serde_json::Value,
        notify: Option<usize>,
    },
    Release {
        name: String,
    },
    Stop,
    Upgrade {
        program: Option<PathBuf>,
    },
    Unmounted,
}

/// One end.
#[derive(Debug)]
pub(super) struct Channel(OwnedFd);

impl Channel {
    /// Makes a channel; the second end is for the worker.
    pub(super) fn pair() -> Result<(Self, OwnedFd)> {
        let (ours, theirs) = rustix::net::socketpair(
            AddressFamily::UNIX,
            SocketType::SEQPACKET,
            SocketFlags::CLOEXEC,
            None,
        )
        .map_err(|e| Error::environment("making a channel to a worker").with_source(e))?;
        Ok((Self(ours), theirs))
    }

    /// Uses a descriptor that is one end.
    pub(super) fn from_descriptor(end: OwnedFd) -> Self {
        Self(end)
    }

    /// Sends a message. Waits for room only if `wait`.
    ///
    /// # Errors
    /// The other end is closed, or there is no room.
    pub(super) fn send(
        &self,
        message: &impl Serialize,
        descriptors: &[BorrowedFd<'_>],
        wait: bool,
    ) -> Result<()> {
        let failed = |e: Errno| Error::environment("writing to a channel").with_source(e);
        let text = serde_json::to_vec(message)
            .map_err(|e| Error::internal("encoding a message").with_source(e))?;
        if text.len() > MESSAGE_BYTES_MAX || descriptors.len() > DESCRIPTORS_MAX {
            return Err(Error::internal(format!(
                "a message of {} bytes and {} descriptors: expected {MESSAGE_BYTES_MAX} and {DESCRIPTORS_MAX} at most",
                text.len(),
                descriptors.len()
            )));
        }
        let mut space =
            vec![MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS_MAX))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        if !descriptors.is_empty() && !ancillary.push(SendAncillaryMessage::ScmRights(descriptors))
        {
            return Err(Error::internal("too many descriptors for a message"));
        }
        let mut flags = SendFlags::NOSIGNAL;
        if !wait {
            flags |= SendFlags::DONTWAIT;
        }
        loop {
            match rustix::net::sendmsg(&self.0, &[IoSlice::new(&text)], &mut ancillary, flags) {
                Err(Errno::INTR) => {}
                other => return other.map(|_| ()).map_err(failed),
            }
        }
    }

    /// Waits for a message; `None` when the other end is closed.
    ///
    /// # Errors
    /// It is not understood.
    pub(super) fn receive<T: DeserializeOwned>(&self) -> Result<Option<(T, Vec<OwnedFd>)>> {
        let mut text = vec![0; MESSAGE_BYTES_MAX];
        let mut space =
            vec![MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS_MAX))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let received = loop {
            let mut parts = [IoSliceMut::new(&mut text)];
            let flags = RecvFlags::CMSG_CLOEXEC;
            match rustix::net::recvmsg(&self.0, &mut parts, &mut ancillary, flags) {
                Err(Errno::INTR) => {}
                Err(Errno::CONNRESET) => return Ok(None),
                Err(e) => {
                    return Err(Error::environment("reading from a channel").with_source(e));
                }
                Ok(received) => break received,
            }
        };
        let mut descriptors = Vec::new();
        for message in ancillary.drain() {
            if let RecvAncillaryMessage::ScmRights(more) = message {
                descriptors.extend(more);
            }
        }
        if received.bytes == 0 {
            return Ok(None);
        }
        let cut = ReturnFlags::TRUNC | ReturnFlags::CTRUNC;
        if received.flags.intersects(cut) {
            return Err(Error::environment(
                "a message of a channel was cut: are there too many open files?",
            ));
        }
        let message = serde_json::from_slice(&text[..received.bytes])
            .map_err(|e| Error::internal("a message of a channel").with_source(e))?;
        Ok(Some((message, descriptors)))
    }
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_carry_descriptors_and_the_end_is_seen() {
        let (a, b) = Channel::pair().unwrap();
        let b = Channel::from_descriptor(b);
        let file = tempfile::tempfile().unwrap();
        let hold = FromWorker::Hold {
            name: "live".into(),
            state: serde_json::json!({"x": 1}),
            notify: Some(1),
        };
        a.send(&hold, &vec![file.as_fd(); DESCRIPTORS_MAX], true)
            .unwrap();
        a.send(&FromWorker::Alive, &[], true).unwrap();
        drop(a);
        let (message, descriptors) = b.receive::<FromWorker>().unwrap().unwrap();
        assert!(
            matches!(message, FromWorker::Hold { name, notify: Some(1), .. } if name == "live")
        );
        assert_eq!(descriptors.len(), DESCRIPTORS_MAX);
        let (message, descriptors) = b.receive::<FromWorker>().unwrap().unwrap();
        assert!(matches!(message, FromWorker::Alive) && descriptors.is_empty());
        assert!(b.receive::<FromWorker>().unwrap().is_none());
    }
}
