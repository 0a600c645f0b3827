//! A worker as its supervisor sees it: a process with a channel, and how it ends.

use super::channel::{Channel, FromWorker};
use crate::{Error, Result};
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::fd::OwnedFd;
use rustix::process::{Pid, Signal, WaitOptions, WaitStatus};
use std::time::Instant;

/// A worker that runs.
pub(super) struct Process {
    pub(super) pid: Pid,
    /// Readable when it has ended.
    pub(super) pidfd: OwnedFd,
    pub(super) channel: Channel,
    pub(super) ready: bool,
    pub(super) heard: Instant,
    /// Its end is what we want.
    pub(super) dismissed: bool,
    /// It was killed because it gave no sign of life.
    pub(super) killed: bool,
}

/// True if a process runs: what has ended and was not waited for does not, it has let go of all that it had.
pub(crate) fn lives(pid: u32) -> bool {
    // After the program's name, which may hold anything.
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let state = stat.rsplit_once(") ").map(|(_, rest)| rest);
    state.is_some_and(|state| !state.starts_with(['Z', 'X']))
}

/// Kills it.
pub(super) fn kill(process: &Process) {
    // The process id is ours until it is reaped.
    let _ = rustix::process::pidfd_send_signal(&process.pidfd, Signal::KILL);
}

/// Waits for a worker's end until `limit`, then kills it. Errors it tells are returned.
pub(super) fn end(process: &Process, limit: Instant) -> Result<()> {
    let mut failure = Ok(());
    loop {
        let left = limit.saturating_duration_since(Instant::now());
        let timeout = Timespec::try_from(left).unwrap_or(Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        });
        let mut fds = [
            PollFd::new(&process.channel, PollFlags::IN),
            PollFd::new(&process.pidfd, PollFlags::IN),
        ];
        match rustix::event::poll(&mut fds, Some(&timeout)) {
            Err(rustix::io::Errno::INTR) => continue,
            Ok(0) | Err(_) => {
                tracing::error!("a worker does not end: it is killed");
                kill(process);
                break;
            }
            Ok(_) => {}
        }
        if fds[0].revents().contains(PollFlags::IN) {
            match process.channel.receive::<FromWorker>() {
                Ok(Some((FromWorker::Failed { message, hint, .. }, _))) => {
                    let error = Error::environment(message);
                    failure = Err(match hint {
                        Some(hint) => error.with_hint(hint),
                        None => error,
                    });
                }
                Ok(Some(_)) => {}
                Ok(None) | Err(_) => break,
            }
            continue;
        }
        if !fds[1].revents().is_empty() {
            break;
        }
    }
    reap(process.pid);
    failure
}

/// Waits for its end.
pub(super) fn reap(pid: Pid) -> Ended {
    loop {
        match rustix::process::waitpid(Some(pid), WaitOptions::empty()) {
            Err(rustix::io::Errno::INTR) => {}
            Ok(Some((_, status))) => return Ended(Some(status)),
            Ok(None) | Err(_) => return Ended(None),
        }
    }
}

/// How a process has ended, if that is known.
#[derive(Clone, Copy)]
pub(super) struct Ended(Option<WaitStatus>);

impl std::fmt::Display for Ended {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Some(status) = self.0 else {
            return f.write_str("an unknown way");
        };
        match (status.terminating_signal(), status.exit_status()) {
            (Some(signal), _) => write!(f, "signal {signal}"),
            (_, Some(code)) => write!(f, "exit code {code}"),
            _ => f.write_str("an unknown way"),
        }
    }
}

/// In words, and whether it was killed by somebody else.
pub(super) fn describe_end(ended: Ended) -> (String, bool) {
    let signal = ended.0.and_then(|status| status.terminating_signal());
    let killed = [Signal::KILL, Signal::TERM]
        .iter()
        .any(|by| signal == Some(by.as_raw()));
    (ended.to_string(), killed)
}
