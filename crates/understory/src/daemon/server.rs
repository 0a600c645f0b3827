//! Accepts connections, notices hang-ups and time limits, shuts down.

use super::backend::Backend;
use super::castore::{CastoreBackend, CastoreOptions};
use super::connection::{self, Endpoint};
use super::listen::Listener;
use super::status::{ClientStatus, Doing};
use super::trust::{Accounts, Decision, Peer};
use super::{ARGUMENTS_MS_MAX, REFUSAL_MS_MAX, REFUSALS_MAX, STACK_BYTES, ServerOptions};
use crate::metrics::{self, Snapshot};
use crate::{Error, Result, Store};
use rustix::event::{EventfdFlags, Timespec, epoll, eventfd};
use rustix::io::Errno;
use rustix::net::{RecvFlags, recv};
use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read, Write};
use std::net::Shutdown as Half;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use understory_nix::wire::Budget;

/// How often time limits are looked at while somebody is connected.
const TICK: Duration = Duration::from_millis(500);
/// How long the next request is looked for before a connection's thread sleeps: about what waking it costs.
const LOOK_MAX: Duration = Duration::from_micros(50);
/// Reads without looking at the start and after a look in vain; doubled up to the second with each.
const LOOK_PAUSE_READS: u32 = 16;
const LOOK_PAUSE_READS_MAX: u32 = 4096;
/// Pause after the process has run out of descriptors or threads.
const EXHAUSTED_PAUSE: Duration = Duration::from_millis(100);
/// Events taken at once.
const EVENTS_MAX: usize = 256;
/// The shutdown's tag among the events; listeners count up from 0, connections from [`FIRST_CONNECTION`].
const SHUTDOWN_TAG: u64 = u64::MAX;
const FIRST_CONNECTION: u64 = 1 << 32;

/// Serves a store.
pub struct Server {
    shared: Arc<Shared>,
}

/// What all connections share.
pub(super) struct Shared {
    pub(super) backend: Arc<dyn Backend>,
    pub(super) options: ServerOptions,
    pub(super) accounts: Accounts,
    pub(super) budget: Arc<Budget>,
    pub(super) stopping: AtomicBool,
    /// As what it is counted.
    pub(super) counted_as: metrics::Daemon,
    started: Instant,
    connections: Mutex<HashMap<u64, Arc<State>>>,
    gone: Condvar,
}

/// What the accepting thread knows of a connection.
pub(super) struct State {
    socket: Option<UnixStream>,
    cancelled: AtomicBool,
    busy: AtomicBool,
    refusal: bool,
    /// Milliseconds after the server's start; 0 is none.
    deadline_ms: AtomicU64,
    pub(super) doing: Doing,
}

impl State {
    pub(super) fn new(socket: Option<UnixStream>, refusal: bool) -> Self {
        Self {
            socket,
            cancelled: AtomicBool::new(false),
            busy: AtomicBool::new(false),
            refusal,
            deadline_ms: AtomicU64::new(0),
            doing: Doing::new(None),
        }
    }
    /// True if the client has gone or the server stops: long operations end then.
    pub(super) fn is_cancelled(&self) -> bool {
        self.cancelled.load(Ordering::Relaxed)
    }
    /// Says whether a request is being worked on.
    pub(super) fn set_busy(&self, busy: bool) {
        self.busy.store(busy, Ordering::SeqCst);
    }
    /// Ends the time limit.
    pub(super) fn clear_deadline(&self) {
        self.deadline_ms.store(0, Ordering::Relaxed);
    }
    fn close(&self, half: Half) {
        if let Some(socket) = &self.socket
            && let Err(error) = socket.shutdown(half)
        {
            tracing::debug!(%error, "closing a connection that has gone");
        }
    }
}

impl Shared {
    fn connections(&self) -> MutexGuard<'_, HashMap<u64, Arc<State>>> {
        self.connections
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
    fn now_ms(&self) -> u64 {
        u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX)
    }
    fn set_deadline(&self, state: &State, in_ms: u64) {
        state
            .deadline_ms
            .store((self.now_ms() + in_ms).max(1), Ordering::Relaxed);
    }
    /// Starts the time limit for a request's arguments.
    pub(super) fn limit_arguments(&self, state: &State) {
        self.set_deadline(state, ARGUMENTS_MS_MAX);
    }
}

impl super::status::Clients for Shared {
    fn clients(&self, count_max: usize) -> Vec<ClientStatus> {
        // Names of users may have to be asked for: not under the lock.
        let states: Vec<Arc<State>> = self
            .connections()
            .values()
            .take(count_max)
            .cloned()
            .collect();
        states
            .iter()
            .filter_map(|state| state.doing.status(self.counted_as, &self.accounts))
            .collect()
    }
}

impl metrics::Source for Shared {
    fn collect(&self, out: &mut Snapshot) {
        let daemon = [("daemon", self.counted_as.name())];
        out.gauge(
            "understory_worker_connections",
            "Clients that are connected.",
            &daemon,
            self.connections().len() as u64,
        );
        out.gauge(
            "understory_worker_request_bytes",
            "Memory that arguments of requests take of their common budget.",
            &daemon,
            self.budget.used(),
        );
    }
}

/// One direction of a connection's socket; both use one descriptor.
struct SocketHalf(Arc<State>);

impl SocketHalf {
    fn get(&self) -> io::Result<&UnixStream> {
        self.0
            .socket
            .as_ref()
            .ok_or_else(|| io::ErrorKind::NotConnected.into())
    }
}
impl Read for SocketHalf {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        self.get()?.read(out)
    }
}
impl Write for SocketHalf {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        self.get()?.write(data)
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A client's requests. Waking a thread that sleeps costs more than answering from memory, and a client that asks one
/// thing after another has the next request ready soon: so it is looked for a little before the thread sleeps. Where that
/// is in vain, because the client has nothing to ask or cannot run for lack of a free core, it is not tried for a while.
struct Requests {
    socket: SocketHalf,
    /// Reads to go before it is tried again.
    pause: u32,
    /// The pause after the next time in vain.
    next_pause: u32,
}

impl Requests {
    fn new(socket: SocketHalf) -> Self {
        Self {
            socket,
            pause: LOOK_PAUSE_READS,
            next_pause: LOOK_PAUSE_READS,
        }
    }

    /// What comes within [`LOOK_MAX`]; `None` if nothing does.
    fn look(&mut self, out: &mut [u8]) -> io::Result<Option<usize>> {
        if self.pause > 0 {
            self.pause -= 1;
            return Ok(None);
        }
        let start = Instant::now();
        loop {
            match recv(self.socket.get()?, &mut *out, RecvFlags::DONTWAIT) {
                Ok((count, _)) => {
                    self.next_pause = LOOK_PAUSE_READS;
                    return Ok(Some(count));
                }
                Err(Errno::AGAIN) if start.elapsed() < LOOK_MAX => std::hint::spin_loop(),
                Err(Errno::AGAIN) => break,
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        self.pause = self.next_pause;
        self.next_pause = (self.next_pause * 2).min(LOOK_PAUSE_READS_MAX);
        Ok(None)
    }
}
impl Read for Requests {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        match self.look(out)? {
            Some(count) => Ok(count),
            None => self.socket.read(out),
        }
    }
}

/// Takes a connection out of the table when its thread ends, however it ends.
struct Registered {
    shared: Arc<Shared>,
    id: u64,
}

impl Drop for Registered {
    fn drop(&mut self) {
        self.shared.connections().remove(&self.id);
        self.shared.gone.notify_all();
    }
}

/// Tells a server to stop. Clones are the same switch.
#[derive(Debug, Clone)]
pub struct Shutdown {
    inner: Arc<ShutdownInner>,
}

#[derive(Debug)]
struct ShutdownInner {
    triggered: AtomicBool,
    draining: AtomicBool,
    event: OwnedFd,
}

impl Shutdown {
    /// Makes a switch that is off.
    ///
    /// # Errors
    /// No descriptor is left.
    pub fn new() -> Result<Self> {
        let event = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .map_err(|error| Error::environment("making an event descriptor").with_source(error))?;
        Ok(Self {
            inner: Arc::new(ShutdownInner {
                triggered: AtomicBool::new(false),
                draining: AtomicBool::new(false),
                event,
            }),
        })
    }
    /// Switches it on; the server wakes at once.
    pub fn trigger(&self) {
        self.inner.triggered.store(true, Ordering::SeqCst);
        self.wake();
    }
    /// Lets the server take no more connections and end when the last one has gone.
    pub fn drain(&self) {
        self.inner.draining.store(true, Ordering::SeqCst);
        self.wake();
    }
    fn wake(&self) {
        // A full counter has been read by nobody, so the server wakes anyhow.
        if let Err(error) = rustix::io::write(&self.inner.event, &1_u64.to_ne_bytes()) {
            tracing::debug!(%error, "the shutdown event is set already");
        }
    }
    /// True if it is on.
    pub fn is_triggered(&self) -> bool {
        self.inner.triggered.load(Ordering::SeqCst)
    }
}

impl Server {
    /// Makes a server of a castore; nothing is opened yet.
    pub fn new(store: Store, options: ServerOptions) -> Self {
        let castore = CastoreOptions {
            read_only: options.read_only,
            trusted_public_keys: options.trusted_public_keys.clone(),
            require_signatures: options.require_signatures,
        };
        Self::counted(
            Arc::new(CastoreBackend::new(store, castore)),
            options,
            metrics::Daemon::Castore,
        )
    }

    /// Makes a server of any store; nothing is opened yet. Of the options, those about signatures and
    /// `read_only` are the backend's own.
    pub fn for_backend(backend: Arc<dyn Backend>, options: ServerOptions) -> Self {
        Self::counted(backend, options, metrics::Daemon::Overlay)
    }

    fn counted(
        backend: Arc<dyn Backend>,
        options: ServerOptions,
        counted_as: metrics::Daemon,
    ) -> Self {
        let budget = Budget::new(options.request_bytes_max);
        let shared = Arc::new(Shared {
            backend,
            options,
            accounts: Accounts::default(),
            budget,
            stopping: AtomicBool::new(false),
            counted_as,
            started: Instant::now(),
            connections: Mutex::default(),
            gone: Condvar::new(),
        });
        metrics::register(&shared);
        super::status::register(&shared);
        Self { shared }
    }

    /// Connections that are open now.
    pub fn connection_count(&self) -> usize {
        self.shared.connections().len()
    }

    /// Bytes that requests hold of the common budget now.
    pub fn request_bytes(&self) -> u64 {
        self.shared.budget.used()
    }

    /// Serves until `shutdown` is triggered. Then no more connections are accepted, idle ones are
    /// closed, operations may end within [`ServerOptions::grace_ms_max`], and the rest is cut off.
    ///
    /// # Errors
    /// No descriptor or thread is left at the start.
    pub fn serve(&self, listeners: &[Listener], shutdown: &Shutdown) -> Result<()> {
        let wait_error =
            |error: Errno| Error::environment("waiting for connections").with_source(error);
        let poll = epoll::create(epoll::CreateFlags::CLOEXEC).map_err(wait_error)?;
        let add = |fd: &dyn AsFd, tag: u64| {
            epoll::add(
                &poll,
                fd.as_fd(),
                epoll::EventData::new_u64(tag),
                epoll::EventFlags::IN,
            )
        };
        add(&shutdown.inner.event, SHUTDOWN_TAG).map_err(wait_error)?;
        for (tag, listener) in (0..).zip(listeners) {
            listener.socket().set_nonblocking(true).map_err(|error| {
                Error::environment("waiting for connections").with_source(error)
            })?;
            add(listener.socket(), tag).map_err(wait_error)?;
        }
        raise_descriptor_limit(self.shared.options.connections_max);
        let mut next_id = FIRST_CONNECTION;
        let mut events = Vec::with_capacity(EVENTS_MAX);
        let mut draining = false;
        while !shutdown.is_triggered() {
            if !draining && shutdown.inner.draining.load(Ordering::SeqCst) {
                draining = true;
                for listener in listeners {
                    epoll::delete(&poll, listener.socket()).map_err(wait_error)?;
                }
                // So that it wakes once.
                let _ = rustix::io::read(&shutdown.inner.event, &mut [0_u8; 8]);
            }
            if draining && self.shared.connections().is_empty() {
                break;
            }
            let tick = (!self.shared.connections().is_empty()).then(|| Timespec {
                tv_sec: 0,
                tv_nsec: i64::from(TICK.subsec_nanos()),
            });
            events.clear();
            match epoll::wait(
                &poll,
                rustix::buffer::spare_capacity(&mut events),
                tick.as_ref(),
            ) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(error) => return Err(wait_error(error)),
            }
            for event in &events {
                match event.data.u64() {
                    SHUTDOWN_TAG => {}
                    id if id >= FIRST_CONNECTION => self.hung_up(id),
                    tag => {
                        let listener = usize::try_from(tag).ok().and_then(|tag| listeners.get(tag));
                        if let Some(listener) = listener {
                            self.accept_all(listener, &poll, &mut next_id);
                        }
                    }
                }
            }
            self.end_overdue();
        }
        self.stop();
        Ok(())
    }

    /// Serves one client on standard input and output. Who can start us is trusted, as with Nix. Its operation
    /// is cancelled when standard input hangs up.
    ///
    /// # Errors
    /// The descriptors are closed, no thread is left.
    pub fn serve_stdio(&self) -> Result<()> {
        let open = |fd: std::os::fd::BorrowedFd<'_>, name: &str| {
            fd.try_clone_to_owned()
                .map(File::from)
                .map_err(|error| Error::io("opening", name, error))
        };
        let input = open(rustix::stdio::stdin(), "standard input")?;
        let output = open(rustix::stdio::stdout(), "standard output")?;
        let state = Arc::new(State::new(None, false));
        let watched = input
            .try_clone()
            .map_err(|error| Error::io("opening", "standard input", error))?;
        let done = Shutdown::new()?;
        let endpoint = Endpoint {
            reader: Box::new(input),
            writer: Box::new(output),
            state: Arc::clone(&state),
        };
        std::thread::scope(|scope| {
            let watch = std::thread::Builder::new()
                .name("hang-up".to_owned())
                .spawn_scoped(scope, || watch_hang_up(&watched, &done, &state));
            if let Err(error) = watch {
                return Err(Error::environment("starting a thread").with_source(error));
            }
            let _end = TriggerOnDrop(&done);
            connection::serve(&self.shared, endpoint, &Decision::Trusted, None);
            Ok(())
        })
    }

    fn accept_all(&self, listener: &Listener, poll: &OwnedFd, next_id: &mut u64) {
        loop {
            let (total, refusals) = {
                let connections = self.shared.connections();
                (
                    connections.len(),
                    connections.values().filter(|state| state.refusal).count(),
                )
            };
            if refusals >= REFUSALS_MAX {
                // The kernel's queue holds the others; the next tick looks again.
                std::thread::sleep(EXHAUSTED_PAUSE);
                return;
            }
            match listener.socket().accept() {
                Ok((socket, _)) => {
                    let id = *next_id;
                    *next_id += 1;
                    if let Err(error) = self.start(socket, id, poll, total - refusals) {
                        tracing::warn!(%error, "a connection could not be served");
                        std::thread::sleep(EXHAUSTED_PAUSE);
                        return;
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => {}
                Err(error) => {
                    tracing::warn!(%error, "accepting a connection");
                    std::thread::sleep(EXHAUSTED_PAUSE);
                    return;
                }
            }
        }
    }

    fn start(&self, socket: UnixStream, id: u64, poll: &OwnedFd, open: usize) -> io::Result<()> {
        socket.set_nonblocking(false)?;
        let credentials = rustix::net::sockopt::socket_peercred(&socket)?;
        let peer = Peer {
            uid: credentials.uid.as_raw(),
            gid: credentials.gid.as_raw(),
            pid: credentials.pid.as_raw_nonzero().get(),
        };
        let max = self.shared.options.connections_max;
        let limit = if peer.is_privileged() {
            max
        } else {
            max - max / 8
        };
        let refusal = open >= limit;
        let mut state = State::new(Some(socket), refusal);
        state.doing = Doing::new(Some(peer));
        let state = Arc::new(state);
        metrics::worker_connection(self.shared.counted_as);
        let limit_ms = if refusal {
            REFUSAL_MS_MAX
        } else {
            self.shared.options.handshake_ms_max
        };
        self.shared.set_deadline(&state, limit_ms);
        // Hang-ups are reported without being asked for, once.
        let socket = SocketHalf(Arc::clone(&state));
        epoll::add(
            poll,
            socket.get()?,
            epoll::EventData::new_u64(id),
            epoll::EventFlags::ET,
        )?;
        self.shared.connections().insert(id, Arc::clone(&state));
        let registered = Registered {
            shared: Arc::clone(&self.shared),
            id,
        };
        let endpoint = Endpoint {
            reader: Box::new(Requests::new(SocketHalf(Arc::clone(&state)))),
            writer: Box::new(socket),
            state,
        };
        std::thread::Builder::new()
            .name(format!("client {}", peer.pid))
            .stack_size(STACK_BYTES)
            .spawn(move || {
                let shared = &registered.shared;
                let decision = if refusal {
                    Decision::Refused(format!(
                        "too many connections: {open} are open, {limit} are allowed"
                    ))
                } else {
                    peer.judge(&shared.options, &shared.accounts)
                };
                tracing::debug!(?peer, ?decision, "client");
                connection::serve(shared, endpoint, &decision, Some(&peer));
            })?;
        Ok(())
    }

    fn hung_up(&self, id: u64) {
        if let Some(state) = self.shared.connections().get(&id) {
            state.cancelled.store(true, Ordering::Relaxed);
        }
    }

    fn end_overdue(&self) {
        let now = self.shared.now_ms();
        for state in self.shared.connections().values() {
            let deadline = state.deadline_ms.load(Ordering::Relaxed);
            if deadline != 0 && deadline <= now {
                state.cancelled.store(true, Ordering::Relaxed);
                state.close(Half::Both);
            }
        }
    }

    fn stop(&self) {
        self.shared.stopping.store(true, Ordering::SeqCst);
        for state in self.shared.connections().values() {
            // A busy one sees `stopping` when it is done; both orders are sequentially consistent.
            if !state.busy.load(Ordering::SeqCst) {
                state.close(Half::Read);
            }
        }
        if self.wait_until_gone(Duration::from_millis(self.shared.options.grace_ms_max)) {
            return;
        }
        for state in self.shared.connections().values() {
            state.cancelled.store(true, Ordering::Relaxed);
            state.close(Half::Both);
        }
        if !self.wait_until_gone(TICK) {
            tracing::warn!(
                count = self.connection_count(),
                "operations still run, the process's end will stop them"
            );
        }
    }

    fn wait_until_gone(&self, limit: Duration) -> bool {
        let connections = self.shared.connections();
        let waited = self
            .shared
            .gone
            .wait_timeout_while(connections, limit, |open| !open.is_empty());
        waited.unwrap_or_else(PoisonError::into_inner).0.is_empty()
    }
}

/// Ends a thread that waits for the switch, also when we panic.
struct TriggerOnDrop<'a>(&'a Shutdown);

impl Drop for TriggerOnDrop<'_> {
    fn drop(&mut self) {
        self.0.trigger();
    }
}

/// Cancels what runs when `input` hangs up; returns then or when `done` is triggered.
fn watch_hang_up(input: &File, done: &Shutdown, state: &State) {
    use rustix::event::{PollFd, PollFlags, poll};
    // A hang-up is reported without being asked for.
    let mut watched = [
        PollFd::new(input, PollFlags::empty()),
        PollFd::new(&done.inner.event, PollFlags::IN),
    ];
    loop {
        match poll(&mut watched, None) {
            Err(Errno::INTR) => {}
            Err(error) => {
                tracing::warn!(%error, "a hang-up will not be noticed");
                return;
            }
            Ok(_) if !watched[0].revents().is_empty() => {
                state.cancelled.store(true, Ordering::Relaxed);
                return;
            }
            Ok(_) if !watched[1].revents().is_empty() => return,
            Ok(_) => {}
        }
    }
}

/// Makes room for the connections' descriptors, as far as the hard limit allows.
fn raise_descriptor_limit(connections_max: usize) {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    /// Everything else that the process has open: packs, database, mounts.
    const OTHERS: u64 = 1024;
    let limit = getrlimit(Resource::Nofile);
    let Some(soft) = limit.current else { return };
    let want = connections_max as u64 + OTHERS;
    let new = limit.maximum.map_or(want, |hard| want.min(hard));
    if soft < new
        && let Err(error) = setrlimit(
            Resource::Nofile,
            Rlimit {
                current: Some(new),
                maximum: limit.maximum,
            },
        )
    {
        tracing::warn!(%error, "raising the limit of open files");
    }
}
