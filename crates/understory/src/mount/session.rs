//! A live mount: the threads that talk to the kernel, and its beginning and end.
//!
//! Why not the `fuser` crate: it caps read-ahead, it sends INIT again when it is given a descriptor
//! that is connected already (which a restart without unmount needs), and its interface changes often.
//! What we need of the protocol is small and documented in `linux/fuse.h`.
//!
//! - INIT is answered before [`LiveMount::mount`] returns; then each thread serves its own clone of the
//!   device with its own buffers.
//! - A panic in a handler is an EIO for that request and a line in the log. When the last thread ends
//!   without having been asked to, the mount is detached: no dead mount stays behind.
//! - The kernel ends the connection when the last descriptor is closed, at the latest with the process.
//!   A dead mount of a killed process is detached by the next mount on the same place.

use super::live::{LiveFs, Outcome};
use super::mountinfo::{self, MountEntry};
use super::protocol::{
    self, Agreed, DATA_BYTES_MAX, InitError, Notify, REQUEST_BYTES_MAX, ROOT_NODE, Reply, Request,
    op,
};
use super::source::Source;
use super::sys::{self, FS_TYPE};
use crate::store::Observer;
use crate::{Error, Result, Store};
use rustix::fd::OwnedFd;
use rustix::io::Errno;
use std::ffi::{OsStr, OsString};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;
use understory_nix::StorePath;

/// Threads when the caller does not say: a few more than one, so that a slow read does not hold up a
/// lookup; more only fight for the kernel's queue.
const THREADS_DEFAULT_MAX: usize = 4;
/// Most threads that one mount may have.
const THREADS_MAX: usize = 64;
/// How long an unmount waits for its threads. They end within a millisecond once the kernel lets go.
const STOP_MS_MAX: u64 = 700;
/// A name that no root has, looked up to wake a thread.
const STOP_NAME: &str = ".understory-stop";
/// Bytes for notifications: a name and a header.
const NOTIFICATION_BYTES_MAX: usize = 512;

/// How to mount.
#[derive(Debug, Clone)]
pub struct LiveOptions {
    /// Threads that serve requests; 0 = as many as cores, at most 4, and one more.
    pub threads: usize,
    /// Users other than the mounter may look inside. `fusermount3` may not permit it; it is then left out.
    pub allow_other: bool,
    /// Bytes that the kernel reads ahead of a sequential reader; taken as far as permissions go.
    pub read_ahead_bytes: u32,
}

impl Default for LiveOptions {
    fn default() -> Self {
        Self {
            threads: 0,
            allow_other: true,
            read_ahead_bytes: 1 << 20,
        }
    }
}

/// A mounted live file system. Dropping it unmounts.
pub struct LiveMount {
    shared: Arc<Shared>,
}

/// What the threads, the observer and the handle share.
struct Shared {
    fs: LiveFs,
    mountpoint: PathBuf,
    /// The mount's `st_dev`, which tells it from others at the same place.
    device_number: (u32, u32),
    /// For notifications; gone once stopping.
    control: Mutex<Option<Arc<OwnedFd>>>,
    stopping: AtomicBool,
    running: Mutex<usize>,
    ended: Condvar,
}

impl LiveMount {
    /// Mounts `store` on the directory `mountpoint`. When it returns, the mount answers.
    /// A dead mount that an earlier process of ours left there is removed first.
    ///
    /// # Errors
    /// What of the machine stands in the way, with a hint; a living mount of ours is there already.
    pub fn mount(store: &Store, mountpoint: &Path, options: &LiveOptions) -> Result<Self> {
        let mut name = OsString::from("understory:");
        name.push(store.dir());
        let live = Self::mount_source(Box::new(store.clone()), &name, mountpoint, options)?;
        store.observe(Arc::new(Notifier {
            mount: Arc::downgrade(&live.shared),
        }));
        Ok(live)
    }

    pub(super) fn mount_source(
        source: Box<dyn Source>,
        name: &OsStr,
        mountpoint: &Path,
        options: &LiveOptions,
    ) -> Result<Self> {
        let mountpoint = prepare_mountpoint(mountpoint)?;
        let request = sys::MountRequest {
            source: name,
            mountpoint: &mountpoint,
            allow_other: options.allow_other,
            read_bytes_max: DATA_BYTES_MAX,
        };
        let device = sys::mount(&request)?;
        // From here on, whatever goes wrong must not leave the mount behind.
        let guard = DetachOnDrop(Some(&mountpoint));
        let agreed = shake_hands(&device, options.read_ahead_bytes)?;
        let entry = mountinfo::mount_at(&mountpoint)?
            .filter(|entry| entry.fs_type == FS_TYPE)
            .ok_or_else(|| {
                Error::environment(format!("{} was mounted and is gone", mountpoint.display()))
            })?;
        sys::set_read_ahead(entry.device, options.read_ahead_bytes);
        tracing::debug!(mountpoint = %mountpoint.display(), minor = agreed.minor, flags = agreed.flags, "mounted");
        let threads = thread_count(options.threads);
        let shared = Arc::new(Shared {
            fs: LiveFs::new(source, sys::owner()),
            mountpoint: mountpoint.clone(),
            device_number: entry.device,
            control: Mutex::new(None),
            stopping: AtomicBool::new(false),
            running: Mutex::new(threads),
            ended: Condvar::new(),
        });
        let device = Arc::new(device);
        *lock(&shared.control) = Some(Arc::clone(&device));
        for number in 0..threads {
            // Without permission to open the device again the threads share one descriptor.
            let own = if number == 0 {
                Err(Errno::NOSYS)
            } else {
                sys::clone_device(&device)
            };
            let own = own.map_or_else(|_| Arc::clone(&device), Arc::new);
            let ends = ThreadEnds(Arc::clone(&shared));
            let spawned = std::thread::Builder::new()
                .name(format!("fuse-{number}"))
                .spawn(move || ends.0.serve(own));
            if let Err(error) = spawned {
                // The closure is dropped with its guard, and so are those not yet made.
                *lock(&shared.running) -= threads - number - 1;
                shared.stop_threads(None);
                return Err(Error::environment("starting a thread of the mount").with_source(error));
            }
        }
        guard.keep();
        Ok(Self { shared })
    }

    /// Where it is mounted; canonical.
    pub fn mountpoint(&self) -> &Path {
        &self.shared.mountpoint
    }

    /// Major and minor number of its `st_dev`.
    pub fn device(&self) -> (u32, u32) {
        self.shared.device_number
    }

    /// Inodes that the kernel holds of it.
    pub fn inode_count(&self) -> usize {
        self.shared.fs.inode_count()
    }

    /// True while requests are served.
    pub fn is_serving(&self) -> bool {
        *lock(&self.shared.running) > 0
    }

    /// Takes names out of sight that another process has deleted from the store. What this process
    /// publishes and deletes is shown without a word.
    pub fn deleted(&self, paths: &[StorePath]) {
        self.shared.deleted(paths);
    }

    /// Waits until it is unmounted, by [`LiveMount::unmount`] on another thread or by someone else.
    pub fn wait(&self) {
        let mut running = lock(&self.shared.running);
        while *running > 0 {
            running = self
                .shared
                .ended
                .wait(running)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// What the observer of a real store does.
    #[cfg(test)]
    pub(super) fn announce(&self, gone: &[&str]) {
        self.shared.root_changed();
        for name in gone {
            self.shared.name_gone(name);
        }
    }

    /// Unmounts and stops serving, within a second: while files are in use, the mount is taken out of
    /// sight and their readers get errors. An overlay on top must be unmounted before. Does nothing
    /// when it is unmounted already.
    ///
    /// # Errors
    /// Not permitted; the mount then stays, but is served no more.
    pub fn unmount(&self) -> Result<()> {
        self.shared.unmount()
    }
}

impl Drop for LiveMount {
    fn drop(&mut self) {
        if let Err(error) = self.shared.unmount() {
            tracing::warn!("{}", error.chain());
        }
    }
}

impl Shared {
    /// Serves requests until the mount ends.
    fn serve(&self, device: Arc<OwnedFd>) {
        let mut buffer = vec![0; REQUEST_BYTES_MAX];
        let mut reply = Reply::new(DATA_BYTES_MAX);
        let mut counted = Vec::new();
        while !self.stopping.load(Ordering::Acquire) {
            let message = match rustix::io::read(&*device, &mut buffer[..]) {
                Ok(bytes) => &buffer[..bytes],
                // Interrupted; or the request was withdrawn while it was being fetched.
                Err(Errno::INTR | Errno::NOENT | Errno::AGAIN) => continue,
                Err(Errno::NODEV) => break,
                Err(errno) => {
                    tracing::error!("{}: reading requests: {errno}", self.mountpoint.display());
                    break;
                }
            };
            let Some(request) = Request::parse(message) else {
                tracing::error!(
                    "{}: a request of {} bytes is malformed",
                    self.mountpoint.display(),
                    message.len()
                );
                continue;
            };
            self.answer(&request, &device, &mut reply, &mut counted);
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
        counted.clear();
        reply.clear();
        let outcome = catch_unwind(AssertUnwindSafe(|| self.fs.handle(request, reply, counted)))
            .unwrap_or_else(|panic| {
                let what = panic.downcast_ref::<&str>().copied().map(str::to_owned);
                let what = what
                    .or_else(|| panic.downcast_ref::<String>().cloned())
                    .unwrap_or_default();
                tracing::error!(
                    "{}: request {} panicked: {what}",
                    self.mountpoint.display(),
                    request.opcode
                );
                Outcome::Error(Errno::IO)
            });
        let (message, failed) = match outcome {
            Outcome::Silent => return,
            Outcome::Data => (reply.message(request.unique, Ok(())), false),
            Outcome::Error(errno) => (reply.message(request.unique, Err(errno)), true),
        };
        let sent = rustix::io::write(device, message);
        if failed || sent.is_err() {
            self.fs.forget(counted);
        }
        match sent {
            // The asking process was killed, or the mount ended.
            Ok(_) | Err(Errno::NOENT | Errno::NODEV | Errno::PERM) => {}
            Err(errno) => {
                tracing::error!(
                    "{}: replying to request {}: {errno}",
                    self.mountpoint.display(),
                    request.opcode
                );
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
            tracing::trace!("{}: {code:?}: {errno}", self.mountpoint.display());
        }
    }

    /// Makes the next listing of the root a new one.
    fn root_changed(&self) {
        self.fs.root_changed();
        self.notify(Notify::InvalidateInode, |n| {
            protocol::invalidate_attributes(ROOT_NODE, n);
        });
    }

    /// Makes the kernel drop a name of the root and all below.
    fn name_gone(&self, name: &str) {
        self.notify(Notify::InvalidateEntry, |n| {
            protocol::invalidate_entry(ROOT_NODE, name.as_bytes(), n);
        });
    }

    fn deleted(&self, paths: &[StorePath]) {
        self.root_changed();
        for path in paths {
            self.name_gone(path.base_name());
        }
    }

    fn unmount(self: &Arc<Self>) -> Result<()> {
        if !self.is_mounted() {
            self.stop_threads(None);
            return Ok(());
        }
        // Reaches the file system when it is out of sight, so that its threads can be woken.
        let root = sys::open_directory(&self.mountpoint).ok();
        let detached = sys::detach(&self.mountpoint);
        self.stop_threads(root);
        match detached {
            // Someone else was quicker.
            Ok(()) | Err(Errno::INVAL | Errno::NOENT) => Ok(()),
            Err(errno) => Err(
                Error::io("unmounting", &self.mountpoint, errno.into()).with_hint(format!(
                    "run `umount -l {}` as root",
                    self.mountpoint.display()
                )),
            ),
        }
    }

    fn is_mounted(&self) -> bool {
        mountinfo::mount_at(&self.mountpoint).is_ok_and(|entry| {
            entry.is_some_and(|entry| is_ours(&entry) && entry.device == self.device_number)
        })
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
                self.mountpoint.display(),
                *running
            );
        }
        drop(running);
        *lock(&self.control) = None;
    }
}

/// Counts a thread's end, however it ends; the last one sees to it that no dead mount stays.
struct ThreadEnds(Arc<Shared>);

impl Drop for ThreadEnds {
    fn drop(&mut self) {
        let shared = &self.0;
        let mut running = lock(&shared.running);
        *running -= 1;
        if *running == 0 {
            if !shared.stopping.load(Ordering::Acquire) && shared.is_mounted() {
                tracing::error!(
                    "{}: all threads ended: detaching the mount",
                    shared.mountpoint.display()
                );
                let _ = sys::detach(&shared.mountpoint);
            }
            *lock(&shared.control) = None;
        }
        drop(running);
        shared.ended.notify_all();
    }
}

/// Detaches the mount when something fails after it was made.
struct DetachOnDrop<'a>(Option<&'a Path>);

impl DetachOnDrop<'_> {
    fn keep(mut self) {
        self.0 = None;
    }
}

impl Drop for DetachOnDrop<'_> {
    fn drop(&mut self) {
        if let Some(mountpoint) = self.0 {
            let _ = sys::detach(mountpoint);
        }
    }
}

/// Tells the kernel what this process publishes and deletes.
struct Notifier {
    mount: Weak<Shared>,
}

impl Observer for Notifier {
    fn published(&self, _paths: &[StorePath]) {
        if let Some(mount) = self.mount.upgrade() {
            mount.root_changed();
        }
    }
    fn deleted(&self, paths: &[StorePath]) {
        if let Some(mount) = self.mount.upgrade() {
            mount.deleted(paths);
        }
    }
}

/// Answers INIT, which is the first request on a new mount.
fn shake_hands(device: &OwnedFd, read_ahead_bytes: u32) -> Result<Agreed> {
    let mut buffer = vec![0; REQUEST_BYTES_MAX];
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
        let result = protocol::init(request.body, read_ahead_bytes, &mut reply);
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

fn thread_count(asked: usize) -> usize {
    if asked > 0 {
        return asked.min(THREADS_MAX);
    }
    std::thread::available_parallelism()
        .map_or(1, usize::from)
        .min(THREADS_DEFAULT_MAX)
        + 1
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
