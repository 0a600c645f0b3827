//! A served FUSE mount: the threads that answer the kernel's requests, and their end.
//!
//! A [`Session`] serves the descriptors that it is given, whoever mounted (see `connect`) and whoever served
//! them before; what the answers are is its [`Handler`]'s business.
//!
//! Why not the `fuser` crate: it caps read-ahead, it sends INIT again when it is given a descriptor
//! that is connected already (which a restart without unmount needs), and its interface changes often.
//! What we need of the protocol is small and documented in `linux/fuse.h`.
//!
//! - Each thread serves a descriptor of its own as far as there are enough, with its own buffers. A reply
//!   goes to the descriptor that its request came from. The first descriptor is for notifications.
//! - A panic in a handler is an EIO for that request and a line in the log. When the last thread ends
//!   without having been asked to, the mount is detached: no dead mount stays behind, unless the descriptors
//!   are held by another process, so that another server can go on ([`Serve::held`]).
//! - The kernel ends the connection when the last descriptor is closed, at the latest with the process.
//!   A dead mount of a killed process is detached by the next mount on the same place.
//!
//! # Taking over
//! While another process holds the descriptors, a server may be killed at any moment. Requests wait in the
//! kernel; those that it had read and not answered are queued again for the next server when that asks for it
//! ([`Notify::Resend`], Linux 6.9). Before that they could only fail: closing the descriptor that they were read
//! from ends them with an error. That is done, by dropping all clones and making new ones, since waiting for ever is worse.
//! What is answered twice is answered alike, and a reply to a request that has been withdrawn is refused.

use super::connect::{DEVICES_MAX, Handover, Place, clone_devices};
use super::protocol::{Agreed, DATA_BYTES_MAX, Notify, REQUEST_BYTES_MAX, Reply, Request, op};
use super::sys;
use crate::{Error, Result, metrics};
use rustix::fd::OwnedFd;
use rustix::io::Errno;
use rustix::mount::UnmountFlags;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

/// Threads when the caller does not say: a few more than one, so that a slow read does not hold up a
/// lookup; more only fight for the kernel's queue.
const THREADS_DEFAULT_MAX: usize = 4;
/// How long an unmount waits for its threads. They end within a millisecond once the kernel lets go.
const STOP_MS_MAX: u64 = 700;
/// A name that no root has, looked up to wake a thread.
const STOP_NAME: &str = ".understory-stop";
/// Bytes for notifications: a name and a header.
pub(super) const NOTIFICATION_BYTES_MAX: usize = 512;

/// What answers the requests of a mount. INIT is not among them.
pub(super) trait Handler: Send + Sync + 'static {
    /// As what its requests are counted.
    const COUNTED_AS: metrics::Mount = metrics::Mount::Live;

    /// Answers one request. `counted` is given the nodes whose lookup count the reply raises; if the
    /// kernel does not take the reply they come back to [`Handler::forget`].
    fn handle(&self, request: &Request<'_>, reply: &mut Reply, counted: &mut Vec<u64>) -> Outcome;

    /// Takes back the lookups of a reply that the kernel did not take.
    fn forget(&self, counted: &[u64]) {
        debug_assert!(counted.is_empty(), "lookups are counted and not taken back");
    }
}

/// What to do with a request.
pub(super) enum Outcome {
    /// Send the reply's data.
    Data,
    /// Send an error.
    Error(Errno),
    /// Send nothing.
    Silent,
}

/// How a mount is served.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Serve {
    /// Threads; 0: by the number of cores, see [`thread_count`].
    pub(super) threads: usize,
    /// Another process holds the descriptors: the mount stays when this session ends.
    pub(super) held: bool,
    /// Answer what an earlier server has read already with EIO: it may be what killed it.
    pub(super) refuse_resent: bool,
}

/// Gives the descriptors of a mount to who keeps them.
pub(super) type Hold<'a> = &'a mut dyn FnMut(&Handover, &[OwnedFd]) -> Result<()>;

/// A mount that is being served. Dropping it unmounts, unless the descriptors are held elsewhere.
pub(super) struct Session<H: Handler> {
    shared: Arc<Shared<H>>,
}

/// Reaches a session's kernel side and its handler without keeping it alive.
pub(super) struct WeakSession<H: Handler>(Weak<Shared<H>>);

/// What the threads and the handle share.
struct Shared<H> {
    handler: H,
    place: Place,
    options: Serve,
    /// For notifications; gone once stopping.
    control: Mutex<Option<Arc<OwnedFd>>>,
    stopping: AtomicBool,
    running: Mutex<usize>,
    ended: Condvar,
    made: Instant,
    /// For each thread: when it began the request that it works on, milliseconds after `made` and one more; 0: none.
    busy_since: Box<[AtomicU64]>,
}

impl<H: Handler> Session<H> {
    /// Serves the mount at `place`, whose handshake is done. `devices` are the descriptor that it was mounted with
    /// and its clones.
    ///
    /// # Errors
    /// No thread can be started; the mount is then detached if it is not held.
    pub(super) fn serve(
        handler: H,
        place: Place,
        devices: Vec<OwnedFd>,
        options: Serve,
    ) -> Result<Self> {
        let devices: Vec<Arc<OwnedFd>> = devices.into_iter().map(Arc::new).collect();
        let first = devices
            .first()
            .cloned()
            .ok_or_else(|| Error::internal("a mount without a descriptor cannot be served"))?;
        let threads = thread_count(options.threads);
        let shared = Arc::new(Shared {
            handler,
            place,
            options,
            control: Mutex::new(Some(Arc::clone(&first))),
            stopping: AtomicBool::new(false),
            running: Mutex::new(threads),
            ended: Condvar::new(),
            made: Instant::now(),
            busy_since: (0..threads).map(|_| AtomicU64::new(0)).collect(),
        });
        let clones = devices.get(1..).filter(|clones| !clones.is_empty());
        let mut served = clones.unwrap_or(&devices).iter().cycle();
        for number in 0..threads {
            let own = served.next().map_or_else(|| Arc::clone(&first), Arc::clone);
            let ends = ThreadEnds(Arc::clone(&shared));
            let spawned = std::thread::Builder::new()
                .name(format!("fuse-{number}"))
                .spawn(move || ends.0.serve(number, own));
            if let Err(error) = spawned {
                // The closure is dropped with its guard, and so are those not yet made.
                *lock(&shared.running) -= threads - number - 1;
                if !options.held {
                    let _ = sys::detach(&shared.place.mountpoint);
                }
                shared.stop_threads(None);
                return Err(Error::environment("starting a thread of the mount").with_source(error));
            }
        }
        Ok(Self { shared })
    }

    /// Serves a mount that an earlier server, which is dead, has served; see the module's documentation. `hold` is
    /// called when there are new descriptors to keep instead of `devices`.
    ///
    /// # Errors
    /// As [`Session::serve`].
    pub(super) fn take_over(
        handler: H,
        handover: &Handover,
        mut devices: Vec<OwnedFd>,
        options: Serve,
        hold: Hold<'_>,
    ) -> Result<Self> {
        let at = handover.place.mountpoint.display();
        if devices.is_empty() {
            return Err(Error::internal(format!(
                "{at}: no descriptor was handed over"
            )));
        }
        if !handover.can_resend() {
            devices.truncate(1);
            let clones = clone_devices(&devices[0], thread_count(options.threads));
            devices.extend(clones);
            hold(handover, &devices)?;
            tracing::warn!(
                "{at}: what the last server was working on fails: this kernel cannot resend (Linux 6.9 can)"
            );
        }
        let session = Self::serve(handler, handover.place.clone(), devices, options)?;
        if handover.can_resend() {
            session.shared.notify(Notify::Resend, |_| {});
        }
        Ok(session)
    }

    /// What another server must know of it.
    pub(super) fn handover(place: &Place, agreed: Agreed) -> Handover {
        Handover {
            place: place.clone(),
            agreed,
        }
    }

    /// How long the request takes that has been worked on longest; zero if there is none.
    pub(super) fn busy_for(&self) -> Duration {
        let now = self.shared.now_ms();
        let longest = self.shared.busy_since.iter().filter_map(|since| {
            let since = since.load(Ordering::Relaxed);
            (since > 0).then(|| now.saturating_sub(since))
        });
        Duration::from_millis(longest.max().unwrap_or(0))
    }

    /// What answers.
    pub(super) fn handler(&self) -> &H {
        &self.shared.handler
    }

    /// Where it is mounted.
    pub(super) fn place(&self) -> &Place {
        &self.shared.place
    }

    /// A handle that does not keep it alive.
    pub(super) fn downgrade(&self) -> WeakSession<H> {
        WeakSession(Arc::downgrade(&self.shared))
    }

    /// True while requests are served.
    pub(super) fn is_serving(&self) -> bool {
        *lock(&self.shared.running) > 0
    }

    /// Waits until it is unmounted, by [`Session::unmount`] on another thread or by someone else.
    pub(super) fn wait(&self) {
        let mut running = lock(&self.shared.running);
        while *running > 0 {
            running = self
                .shared
                .ended
                .wait(running)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Unmounts and stops serving, within a second: while files are in use, the mount is taken out of
    /// sight and their readers get errors. What is mounted on top must be unmounted before. Does nothing
    /// when it is unmounted already.
    ///
    /// # Errors
    /// Not permitted; the mount then stays, but is served no more.
    pub(super) fn unmount(&self) -> Result<()> {
        self.shared.unmount()
    }

    /// Takes the mount out of sight and serves who still uses it; true if nobody does, and so it has ended.
    ///
    /// # Errors
    /// Not permitted.
    pub(super) fn let_go(&self) -> Result<bool> {
        let place = &self.shared.place;
        if place.is_mounted() {
            let flags = UnmountFlags::NOFOLLOW | UnmountFlags::DETACH;
            rustix::mount::unmount(&place.mountpoint, flags)
                .map_err(|e| Error::io("unmounting", &place.mountpoint, e.into()))?;
        }
        let running = lock(&self.shared.running);
        let limit = Duration::from_millis(STOP_MS_MAX);
        let waited = self
            .shared
            .ended
            .wait_timeout_while(running, limit, |running| *running > 0);
        let (running, _) = waited.unwrap_or_else(PoisonError::into_inner);
        Ok(*running == 0)
    }
}

impl<H: Handler> Drop for Session<H> {
    fn drop(&mut self) {
        if self.shared.options.held {
            return;
        }
        if let Err(error) = self.shared.unmount() {
            tracing::warn!("{}", error.chain());
        }
    }
}

impl<H: Handler> WeakSession<H> {
    /// Calls `then` with the handler and a function that notifies, if the session still is.
    pub(super) fn with(&self, then: impl FnOnce(&H, &dyn Fn(Notify, &dyn Fn(&mut Reply)))) {
        if let Some(shared) = self.0.upgrade() {
            then(&shared.handler, &|code, fill| shared.notify(code, fill));
        }
    }
}

impl<H: Handler> Shared<H> {
    /// Milliseconds since the start, at least 1.
    fn now_ms(&self) -> u64 {
        u64::try_from(self.made.elapsed().as_millis()).map_or(u64::MAX, |ms| ms + 1)
    }

    /// Serves requests until the mount ends.
    fn serve(&self, number: usize, device: Arc<OwnedFd>) {
        let at = self.place.mountpoint.display();
        // Not zeros: see `Reply::new`.
        let mut buffer = vec![0xff; REQUEST_BYTES_MAX];
        let mut reply = Reply::new(DATA_BYTES_MAX);
        let mut counted = Vec::new();
        while !self.stopping.load(Ordering::Acquire) {
            let message = match rustix::io::read(&*device, &mut buffer[..]) {
                Ok(bytes) => &buffer[..bytes],
                // Interrupted; or the request was withdrawn while it was being fetched.
                Err(Errno::INTR | Errno::NOENT | Errno::AGAIN) => continue,
                Err(Errno::NODEV) => break,
                Err(errno) => {
                    tracing::error!("{at}: reading requests: {errno}");
                    break;
                }
            };
            let Some(request) = Request::parse(message) else {
                tracing::error!("{at}: a request of {} bytes is malformed", message.len());
                continue;
            };
            self.busy_since[number].store(self.now_ms(), Ordering::Relaxed);
            self.answer(&request, &device, &mut reply, &mut counted);
            self.busy_since[number].store(0, Ordering::Relaxed);
        }
        // Before the thread counts as ended: closing the last one ends the connection.
        drop(device);
    }

    fn answer(
        &self,
        request: &Request<'_>,
        device: &OwnedFd,
        reply: &mut Reply,
        counted: &mut Vec<u64>,
    ) {
        let at = self.place.mountpoint.display();
        let began = Instant::now();
        let count = |bytes, error| {
            metrics::fuse_request(H::COUNTED_AS, request.opcode, began, bytes, error);
        };
        counted.clear();
        reply.clear();
        let handled = AssertUnwindSafe(|| {
            if request.is_resent() && self.options.refuse_resent {
                tracing::error!(
                    "{at}: request {} on node {} is refused: servers ended while they worked on it",
                    request.opcode,
                    request.node
                );
                return Outcome::Error(Errno::IO);
            }
            self.handler.handle(request, reply, counted)
        });
        let outcome = catch_unwind(handled).unwrap_or_else(|panic| {
            let what = panic.downcast_ref::<&str>().copied().map(str::to_owned);
            let what = what
                .or_else(|| panic.downcast_ref::<String>().cloned())
                .unwrap_or_default();
            tracing::error!("{at}: request {} panicked: {what}", request.opcode);
            Outcome::Error(Errno::IO)
        });
        let (message, failed) = match outcome {
            Outcome::Silent => return count(0, None),
            Outcome::Data => {
                let is_read = request.opcode == op::READ;
                count(if is_read { reply.len() } else { 0 }, None);
                (reply.message(request.unique, Ok(())), false)
            }
            Outcome::Error(errno) => {
                count(0, Some(errno));
                (reply.message(request.unique, Err(errno)), true)
            }
        };
        let sent = rustix::io::write(device, message);
        if (failed || sent.is_err()) && !counted.is_empty() {
            self.handler.forget(counted);
        }
        match sent {
            // The asking process was killed, or the mount ended.
            Ok(_) | Err(Errno::NOENT | Errno::NODEV | Errno::PERM) => {}
            Err(errno) => {
                tracing::error!("{at}: replying to request {}: {errno}", request.opcode);
                // So that the asking process does not wait for ever.
                if errno == Errno::INVAL {
                    let _ =
                        rustix::io::write(device, reply.message(request.unique, Err(Errno::IO)));
                }
            }
        }
    }

    /// Tells the kernel something unasked. Whatever it says to that is fine: it may know nothing of the
    /// name, or be gone.
    fn notify(&self, code: Notify, fill: impl FnOnce(&mut Reply)) {
        let Some(device) = lock(&self.control).clone() else {
            return;
        };
        let mut notification = Reply::new(NOTIFICATION_BYTES_MAX);
        fill(&mut notification);
        if let Err(errno) = rustix::io::write(&*device, notification.notification(code)) {
            let at = self.place.mountpoint.display();
            tracing::trace!("{at}: {code:?}: {errno}");
        }
    }

    fn unmount(self: &Arc<Self>) -> Result<()> {
        if !self.place.is_mounted() {
            self.stop_threads(None);
            return Ok(());
        }
        let mountpoint = &self.place.mountpoint;
        // Reaches the file system when it is out of sight, so that its threads can be woken.
        let root = sys::open_directory(mountpoint).ok();
        let detached = sys::detach(mountpoint);
        self.stop_threads(root);
        match detached {
            // Someone else was quicker.
            Ok(()) | Err(Errno::INVAL | Errno::NOENT) => Ok(()),
            Err(errno) => Err(Error::io("unmounting", mountpoint, errno.into())
                .with_hint(format!("run `umount -l {}` as root", mountpoint.display()))),
        }
    }

    /// Ends all threads and so closes the device, which ends the connection even if the file system is
    /// in use somewhere out of sight (below an overlay, by an open file).
    ///
    /// A privileged unmount has ended the connection already. Otherwise a thread that waits for a
    /// request wakes for one, answers it and ends; so requests are made until all have.
    fn stop_threads(self: &Arc<Self>, root: Option<OwnedFd>) {
        self.stopping.store(true, Ordering::Release);
        if let Some(root) = root
            && *lock(&self.running) > 0
        {
            let shared = Arc::clone(self);
            // On a thread of its own: a request waits for as long as a handler is stuck in a slow disk.
            // After the last thread the connection is gone, and no request waits for an answer in vain.
            let toucher = std::thread::Builder::new().name("fuse-stop".into());
            let spawned = toucher.spawn(move || {
                while *lock(&shared.running) > 0 {
                    sys::touch(&root, STOP_NAME);
                }
            });
            if let Err(error) = spawned {
                tracing::warn!("starting a thread that stops the mount: {error}");
            }
        }
        let limit = Duration::from_millis(STOP_MS_MAX);
        let running = lock(&self.running);
        let waited = self
            .ended
            .wait_timeout_while(running, limit, |running| *running > 0);
        let (running, _) = waited.unwrap_or_else(PoisonError::into_inner);
        if *running > 0 {
            tracing::warn!(
                "{}: {} threads still wait for the kernel",
                self.place.mountpoint.display(),
                *running
            );
        }
        drop(running);
        *lock(&self.control) = None;
    }
}

/// Counts a thread's end, however it ends; the last one sees to it that no dead mount stays.
struct ThreadEnds<H: Handler>(Arc<Shared<H>>);

impl<H: Handler> Drop for ThreadEnds<H> {
    fn drop(&mut self) {
        let shared = &self.0;
        let mut running = lock(&shared.running);
        *running -= 1;
        if *running == 0 {
            let asked = shared.stopping.load(Ordering::Acquire) || shared.options.held;
            if !asked && shared.place.is_mounted() {
                let mountpoint = &shared.place.mountpoint;
                tracing::error!(
                    "{}: all threads ended: detaching the mount",
                    mountpoint.display()
                );
                let _ = sys::detach(mountpoint);
            }
            *lock(&shared.control) = None;
        }
        drop(running);
        shared.ended.notify_all();
    }
}

/// The number of threads that a mount gets when `asked` for so many; 0 means that the caller does not care.
pub(super) fn thread_count(asked: usize) -> usize {
    if asked > 0 {
        return asked.min(DEVICES_MAX);
    }
    std::thread::available_parallelism()
        .map_or(1, usize::from)
        .min(THREADS_DEFAULT_MAX)
        + 1
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
