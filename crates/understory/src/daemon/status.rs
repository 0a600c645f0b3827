//! Who is connected to the daemons of this process, and what they do.
//!
//! A connection's thread notes the operation that it begins and its end: three relaxed stores. Whoever asks looks at
//! all connections, so that an answer is a little old and never stops anybody.

use super::trust::{Accounts, Peer};
use crate::metrics;
use serde::{Deserialize, Serialize};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::{Duration, Instant};
use understory_nix::worker::Op;

/// Most clients that are named in an answer: what a line of the control socket holds, some times over.
pub const CLIENTS_MAX: usize = 1_000;
/// Bytes of a program's name, as the kernel has it.
const PROGRAM_BYTES_MAX: usize = 64;

/// A client of a daemon.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ClientStatus {
    /// Which daemon: `castore` or `overlay`.
    pub daemon: String,
    /// The process that connected; 0 if it is in a namespace that we cannot see.
    pub pid: i32,
    /// Its user.
    pub uid: u32,
    /// The user's name, or the number.
    pub user: String,
    /// The program's name, if it still runs.
    pub program: Option<String>,
    /// Seconds since it connected.
    pub connected_seconds: f64,
    /// Operations that it has begun.
    pub operations: u64,
    /// What it does now, by Nix's name; `None`: nothing.
    pub operation: Option<String>,
    /// For how many seconds.
    pub operation_seconds: f64,
}

/// What a client does, as its thread notes it.
pub(super) struct Doing {
    peer: Option<Peer>,
    since: Instant,
    /// The operation's number; 0 is none.
    op: AtomicU64,
    /// Microseconds after `since` at which it began.
    began_us: AtomicU64,
    operations: AtomicU64,
}

impl Doing {
    pub(super) fn new(peer: Option<Peer>) -> Self {
        Self {
            peer,
            since: Instant::now(),
            op: AtomicU64::new(0),
            began_us: AtomicU64::new(0),
            operations: AtomicU64::new(0),
        }
    }
    /// An operation begins; returns when.
    pub(super) fn begin(&self, op: Op) -> Instant {
        let now = Instant::now();
        let us = now.duration_since(self.since).as_micros();
        self.began_us
            .store(u64::try_from(us).unwrap_or(u64::MAX), Ordering::Relaxed);
        self.operations.fetch_add(1, Ordering::Relaxed);
        self.op.store(op.to_wire(), Ordering::Relaxed);
        now
    }
    /// It has ended.
    pub(super) fn end(&self) {
        self.op.store(0, Ordering::Relaxed);
    }
    /// What to say of it; `None` if the client is at the other end of a pipe.
    pub(super) fn status(
        &self,
        daemon: metrics::Daemon,
        accounts: &Accounts,
    ) -> Option<ClientStatus> {
        let peer = self.peer?;
        let connected = self.since.elapsed();
        let began = Duration::from_micros(self.began_us.load(Ordering::Relaxed));
        let operation = Op::from_wire(self.op.load(Ordering::Relaxed));
        Some(ClientStatus {
            daemon: daemon.name().to_owned(),
            pid: peer.pid,
            uid: peer.uid,
            user: peer.user_name(accounts),
            program: program(peer.pid),
            connected_seconds: connected.as_secs_f64(),
            operations: self.operations.load(Ordering::Relaxed),
            operation: operation.map(|op| op.name().to_owned()),
            operation_seconds: match operation {
                Some(_) => connected.saturating_sub(began).as_secs_f64(),
                None => 0.0,
            },
        })
    }
}

/// The name of a running program. Control characters, which it may choose, are replaced.
fn program(pid: i32) -> Option<String> {
    let name = std::fs::read(format!("/proc/{pid}/comm")).ok()?;
    let name = String::from_utf8_lossy(&name[..name.len().min(PROGRAM_BYTES_MAX)]);
    let name = name.trim_end_matches('\n');
    Some(name.replace(|c: char| c.is_control(), "?"))
}

/// A daemon that can say who is connected.
pub(super) trait Clients: Send + Sync {
    /// Its clients, in no order, at most `count_max`.
    fn clients(&self, count_max: usize) -> Vec<ClientStatus>;
}

static DAEMONS: Mutex<Vec<Weak<dyn Clients>>> = Mutex::new(Vec::new());

/// Lets [`clients`] ask a daemon for as long as it lives.
pub(super) fn register(daemon: &Arc<impl Clients + 'static>) {
    let weak: Weak<dyn Clients> = Arc::downgrade(&(Arc::clone(daemon) as Arc<dyn Clients>));
    let mut daemons = DAEMONS.lock().unwrap_or_else(PoisonError::into_inner);
    daemons.retain(|daemon| daemon.strong_count() > 0);
    daemons.push(weak);
}

/// The clients of all daemons of this process, those that have been there for longest first; at most
/// [`CLIENTS_MAX`].
pub fn clients() -> Vec<ClientStatus> {
    let daemons = DAEMONS
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .clone();
    let mut out = Vec::new();
    for daemon in daemons.iter().filter_map(Weak::upgrade) {
        out.extend(daemon.clients(CLIENTS_MAX - out.len()));
    }
    out.sort_by(|a, b| b.connected_seconds.total_cmp(&a.connected_seconds));
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_client_does() {
        let peer = Peer {
            uid: 0,
            gid: 0,
            pid: i32::try_from(std::process::id()).unwrap(),
        };
        let accounts = Accounts::default();
        let doing = Doing::new(Some(peer));
        let status = |doing: &Doing| doing.status(metrics::Daemon::Overlay, &accounts).unwrap();
        assert_eq!(status(&doing).operation, None);
        doing.begin(Op::QueryPathInfo);
        let busy = status(&doing);
        assert_eq!(busy.operation.as_deref(), Some("QueryPathInfo"));
        assert_eq!((busy.operations, busy.user.as_str()), (1, "root"));
        assert!(busy.program.is_some());
        assert!(busy.operation_seconds <= busy.connected_seconds);
        doing.end();
        let idle = status(&doing);
        assert_eq!((idle.operation, idle.operations), (None, 1));
        assert!(
            Doing::new(None)
                .status(metrics::Daemon::Castore, &accounts)
                .is_none()
        );
    }
}
