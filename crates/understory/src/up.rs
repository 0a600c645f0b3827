//! A running instance: live mount, lower daemon, overlay and overlay store of one castore, each proved to work.
//!
//! Order of the start: lock, leftovers of a killed instance, castore, live mount, lower daemon, overlay,
//! overlay store and its daemon, control socket. Each step is proved before the next one: a lookup through
//! the mount, an operation through each socket, a file made and removed through the overlay. Whatever fails
//! undoes what was made. The stop is the reverse; the control socket closes last, which tells waiting clients
//! that all is gone.
//!
//! What appears in the castore must appear in the overlay. The overlay store shows what it publishes itself
//! before it answers; what comes by another way (the lower daemon, other processes through the control
//! socket) is looked up here. Both look names up first and remount only if one is hidden, so that a name that
//! both hear of costs one more lookup.

mod observed;
mod proof;
mod renewal;
mod shared;
mod stack;
mod supervised;

pub use stack::{builder_options, describe_builder};
pub use supervised::{Prepared, Report, prepare, serve_daemon};

use crate::config::Layout;
use crate::control::{self, Status};
use crate::daemon::{Client, ClientOptions, Listener, Server, ServerOptions, Shutdown};
use crate::doctor::{is_dead, is_locked};
use crate::files::open_or_create;
use crate::generation::stack::Places;
use crate::mount::mountinfo::{self, MountEntry};
use crate::mount::overlay::{OverlayLayers, OverlayMount};
use crate::mount::{LiveMount, LiveOptions};
use crate::overlay::Overlay;
use crate::overlay_url::OverlayUrl;
use crate::settings::Resolved;
use crate::store::Observer;
use crate::{Error, Result, Store, StoreOptions, metrics, namespace};
use proof::{prove_live, prove_overlay};
use renewal::Renewal;
use shared::{Shared, Told, Upgrade};
use stack::Lowers;
use std::fs::{self, File, TryLockError};
use std::io::{Read, Seek, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};
use understory_nix::{StoreDir, StorePath};

/// Most mounts on one place that are taken off; more than a few means that something else goes on.
const LEFTOVER_MOUNTS_MAX: usize = 16;
/// How long the address of the metrics may stay taken by the process before.
const METRICS_MS_MAX: u64 = 5_000;
/// Between two looks whether an earlier daemon's clients have gone.
const DRAIN_POLL_MS: u64 = 100;
/// How long processes of an instance whose first process is gone may take to end.
const ORPHANS_MS_MAX: u64 = 10_000;
/// After how much of that the FUSE connections of the instance are ended.
const ORPHANS_STUCK_MS: u64 = 5_000;
/// How long a look at a mount that may hang may take.
const LOOK_MS_MAX: u64 = 1_000;
/// Between two looks at a lock that another process holds.
const LOCK_POLL_MS: u64 = 10;
/// How long the daemon may need for an answer to [`ping`]. It answers in well below a millisecond.
const PING_MS_MAX: u64 = 10_000;
/// Most instances of one store; each is an overlay of its own.
const INSTANCES_MAX: usize = 64;

/// What to start.
pub struct Options {
    /// Where everything lies.
    pub layout: Layout,
    /// How the store is opened.
    pub store: StoreOptions,
    /// Store directory of a store that must be created first.
    pub store_dir: StoreDir,
    /// Substituters, keys, users, further lower stores, who builds.
    pub settings: Resolved,
    /// Serve the overlay store on these (socket activation) instead of making its socket.
    pub activated: Vec<Listener>,
    /// How the live mount is made.
    pub live: LiveOptions,
    /// Called when a client of the control socket asks to stop.
    pub on_stop: Box<dyn Fn() + Send + Sync>,
}

/// A running instance. Dropping it stops it, too, but swallows errors.
pub struct Instance {
    store: Store,
    url: OverlayUrl,
    layout: Layout,
    shared: Arc<Shared>,
    live: Option<LiveMount>,
    /// Of the castore, for stock Nix as the overlay store and for the Nix that builds.
    lower_daemon: Option<Daemon>,
    /// Of the overlay store.
    daemon: Option<Daemon>,
    controls: Vec<control::Server>,
    metrics: Option<metrics::Endpoint>,
    renewal: Option<renewal::Renewal>,
    /// It is for another process to undo the mounts, since the next one goes on with them.
    leave: bool,
    _lock: Option<File>,
}

/// What an instance is made of.
struct Parts {
    layout: Layout,
    store: Store,
    /// None if another process serves the mount.
    live: Option<LiveMount>,
    lock: Option<File>,
    pid: u32,
    sockets: Sockets,
    settings: Resolved,
    /// None: what the overlay stands on stays, and so do paths.
    renewal: Option<renewal::Options>,
    on_stop: Box<dyn Fn() + Send + Sync>,
    on_upgrade: Option<Box<Upgrade>>,
}

/// What it listens on.
struct Sockets {
    lower: Vec<Listener>,
    /// None: it makes its own.
    overlay: Vec<Listener>,
    /// None: it makes its own.
    controls: Option<Vec<UnixListener>>,
}

/// A daemon on a thread of its own.
struct Daemon {
    shutdown: Shutdown,
    thread: JoinHandle<Result<()>>,
}

impl Instance {
    /// Starts everything; returns when it is proved to work.
    ///
    /// # Errors
    /// Another instance runs; a foreign mount is in the way; whatever the machine refuses.
    pub fn start(options: Options) -> Result<Self> {
        let layout = options.layout;
        layout.check_sockets()?;
        create_store(&layout, &options.store_dir)?;
        make_directory(&layout.run)?;
        let lock = take_lock(&layout)?;
        for what in mend(&layout)? {
            tracing::warn!("removed {what}");
        }
        let store = Store::open(&layout.store, &options.store)?;
        make_directories(&layout)?;
        let live = LiveMount::mount(&store, &layout.lower, &options.live)?;
        let sockets = Sockets {
            lower: vec![Listener::bind(&layout.socket)?],
            overlay: options.activated,
            controls: None,
        };
        Self::serve(Parts {
            layout,
            store,
            live: Some(live),
            lock: Some(lock),
            pid: std::process::id(),
            sockets,
            settings: options.settings,
            renewal: None,
            on_stop: options.on_stop,
            on_upgrade: None,
        })
    }

    /// Serves what is mounted: daemons, overlay, control sockets.
    fn serve(parts: Parts) -> Result<Self> {
        let Parts { layout, store, .. } = parts;
        store.castore().keep_fresh()?;
        prove_live(&layout.lower)?;
        tracing::info!(at = %layout.lower.display(), "the live mount answers");
        let mut url = OverlayUrl::of(&layout, store.store_dir())?;
        // Mounted by the mount server before us, if so.
        let image = stack::image(&layout)?;
        let lowers = Lowers::open(&store, &layout.lower, image, &parts.settings)?;
        // Nix's own check knows one lower directory only.
        let renews = parts.renewal.as_ref().is_some_and(|options| options.renews);
        url.check_mount = !lowers.are_several() && !renews;
        let server = ServerOptions {
            deletions_refused: Some(format!(
                "nothing is deleted while an overlay is mounted over this store at {}",
                layout.merged.display()
            )),
            // What is copied to the castore by itself is the business of who is trusted: no signatures are asked for.
            require_signatures: false,
            ..parts.settings.settings.server_options()
        };
        let server = Server::new(store.clone(), server);
        let daemon = Daemon::start("lower-daemon", server, parts.sockets.lower)?;
        let mut instance = Self {
            shared: Arc::new(Shared {
                pid: parts.pid,
                layout: layout.clone(),
                mount_control: parts.live.is_none().then(|| layout.mount_control()),
                started: SystemTime::now()
                    .duration_since(UNIX_EPOCH)
                    .map_or(0, |d| d.as_secs()),
                store: layout.store.clone(),
                store_dir: store.store_dir().clone(),
                lower: layout.lower.clone(),
                socket: layout.socket.clone(),
                upper: layout.upper.clone(),
                url: url.to_string(),
                remote: url.remote(&layout),
                overlay_socket: layout.overlay_socket.clone(),
                lowers: lowers.describe(),
                overlays: Mutex::new(Vec::new()),
                published: AtomicU64::new(0),
                remounts: AtomicU64::new(0),
                newer_paths: AtomicU64::new(0),
                remotes: parts
                    .renewal
                    .as_ref()
                    .map(|options| Arc::clone(&options.remotes)),
                orders: OnceLock::new(),
                metrics: Mutex::new(None),
                on_stop: parts.on_stop,
                on_upgrade: parts.on_upgrade,
            }),
            store,
            url,
            layout,
            leave: parts.live.is_none(),
            live: parts.live,
            lower_daemon: Some(daemon),
            daemon: None,
            controls: Vec::new(),
            metrics: None,
            renewal: None,
            _lock: parts.lock,
        };
        // From here on `instance` undoes everything when it is dropped.
        ping(&instance.layout.socket)?;
        tracing::info!(socket = %instance.layout.socket.display(), "the lower daemon answers");
        instance.mount_overlay(lowers.directories())?;
        let below = lowers.others();
        let overlay = instance.serve_overlay(lowers, &parts.settings, parts.sockets.overlay)?;
        if let Some(address) = &parts.settings.settings.metrics {
            instance.serve_metrics(address)?;
        }
        instance.open_controls(parts.sockets.controls)?;
        instance
            .store
            .observe(Arc::new(Told(Arc::downgrade(&instance.shared))));
        if let Some(options) = parts.renewal {
            let (store, layout) = (instance.store.clone(), instance.layout.clone());
            let shared = Arc::clone(&instance.shared);
            let renewal = Renewal::start(store, overlay, layout, shared, options, below)?;
            let _ = instance.shared.orders.set(renewal.orders());
            instance.renewal = Some(renewal);
        }
        Ok(instance)
    }
    /// The store.
    pub fn store(&self) -> &Store {
        &self.store
    }
    /// Where everything lies.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }
    /// What clients set `NIX_REMOTE` to.
    pub fn nix_remote(&self) -> &str {
        &self.shared.remote
    }
    /// The overlay store's URL, for stock Nix to open it by itself.
    pub fn url(&self) -> &OverlayUrl {
        &self.url
    }
    /// What the control socket says about it.
    pub fn status(&self) -> Status {
        control::Handler::status(&*self.shared)
    }
    /// Unmounts, stops the daemon and removes the sockets.
    ///
    /// # Errors
    /// The first thing that failed; the rest was done nevertheless.
    pub fn stop(mut self) -> Result<()> {
        self.leave = false;
        self.teardown()
    }

    /// Takes no more clients and returns when the last one has gone, or when `stop` says so, which it is asked
    /// now and then. The mounts stay, for another instance to go on with.
    fn drain(&mut self, stop: impl Fn() -> bool) {
        self.renewal = None;
        self.metrics = None;
        self.controls.clear();
        let daemons = [&self.daemon, &self.lower_daemon];
        for daemon in daemons.into_iter().flatten() {
            daemon.shutdown.drain();
        }
        let running = || {
            daemons
                .iter()
                .copied()
                .flatten()
                .any(|d| !d.thread.is_finished())
        };
        while running() && !stop() {
            std::thread::sleep(Duration::from_millis(DRAIN_POLL_MS));
        }
    }

    fn mount_overlay(&self, lowers: Vec<PathBuf>) -> Result<()> {
        let layout = &self.layout;
        let layers = OverlayLayers {
            lowers,
            upper: layout.upper.clone(),
            work: layout.work.clone(),
        };
        let found = match self.leave {
            // That of the process before us.
            true => OverlayMount::find(&layout.merged)?.filter(|overlay| {
                let entry = overlay.entry().ok().flatten();
                entry.is_some_and(|entry| is_ours(&entry, "overlay", layout))
            }),
            false => None,
        };
        let overlay = match found {
            Some(overlay) => overlay,
            None => OverlayMount::mount(&layers, &layout.merged, namespace::in_user_namespace())?,
        };
        lock(&self.shared.overlays).push(overlay);
        prove_overlay(layout, self.shared.pid)?;
        tracing::info!(at = %layout.merged.display(), "the overlay takes writes");
        Ok(())
    }

    fn serve_overlay(
        &mut self,
        lowers: Lowers,
        settings: &Resolved,
        activated: Vec<Listener>,
    ) -> Result<Overlay> {
        let overlay = stack::open(&self.layout, &self.url, lowers, settings)?;
        let backend = Arc::new(overlay.clone());
        let server = Server::for_backend(backend, settings.settings.server_options());
        let socket = &self.layout.overlay_socket;
        let listeners = match activated.is_empty() {
            true => vec![Listener::bind(socket)?],
            false => activated,
        };
        self.daemon = Some(Daemon::start("overlay-daemon", server, listeners)?);
        ping(socket)?;
        tracing::info!(socket = %socket.display(), "the overlay store answers");
        Ok(overlay)
    }

    fn serve_metrics(&mut self, address: &metrics::Address) -> Result<()> {
        let shared = Arc::downgrade(&self.shared);
        let take = move || {
            let shared = shared.upgrade();
            shared.map_or_else(Default::default, |shared| shared.snapshot())
        };
        let take = Arc::new(take);
        let give_up = Instant::now() + Duration::from_millis(METRICS_MS_MAX);
        let endpoint = loop {
            match metrics::Endpoint::start(address, take.clone()) {
                // The process before us may not have let go yet.
                Err(_) if self.leave && Instant::now() < give_up => {
                    std::thread::sleep(Duration::from_millis(LOCK_POLL_MS));
                }
                other => break other?,
            }
        };
        tracing::info!(at = %endpoint.address(), "metrics are served");
        *lock(&self.shared.metrics) = Some(endpoint.address().to_string());
        self.metrics = Some(endpoint);
        Ok(())
    }

    fn open_controls(&mut self, given: Option<Vec<UnixListener>>) -> Result<()> {
        let handler: Arc<dyn control::Handler> = self.shared.clone();
        if let Some(listeners) = given {
            for listener in listeners {
                let path = self.layout.control();
                let server = control::Server::serve(listener, &path, handler.clone())?;
                self.controls.push(server);
            }
            return Ok(());
        }
        self.controls.push(control::Server::start(
            &self.layout.control(),
            handler.clone(),
        )?);
        if self.layout.state != self.layout.store {
            // So that processes that add to the store find instances with a state directory elsewhere.
            let run = self.layout.store.join("run");
            let path = run.join(format!("control-{}.sock", self.shared.pid));
            match make_directory(&run).and_then(|()| control::Server::start(&path, handler)) {
                Ok(server) => self.controls.push(server),
                Err(error) => tracing::warn!(
                    error = %error.chain(),
                    "other processes cannot tell this instance of paths that they add"
                ),
            }
        }
        Ok(())
    }

    fn teardown(&mut self) -> Result<()> {
        let mut first = Ok(());
        let mut note = |result: Result<()>| match (&first, result) {
            (Ok(()), result) => first = result,
            (Err(_), Err(error)) => tracing::error!("{}", error.chain()),
            _ => {}
        };
        // It may be about to change what is mounted: not any more once the lock below is ours.
        self.renewal = None;
        self.metrics = None;
        if let Some(daemon) = self.daemon.take() {
            note(daemon.stop());
        }
        for overlay in lock(&self.shared.overlays).drain(..) {
            if !self.leave {
                note(overlay.unmount_all(&self.layout.upper));
            }
        }
        if let Some(daemon) = self.lower_daemon.take() {
            note(daemon.stop());
        }
        if let Some(live) = self.live.take() {
            note(live.unmount());
        }
        self.controls.clear();
        first
    }
}

impl Drop for Instance {
    fn drop(&mut self) {
        if let Err(error) = self.teardown() {
            tracing::error!("{}", error.chain());
        }
    }
}

impl Daemon {
    fn start(name: &str, server: Server, listeners: Vec<Listener>) -> Result<Self> {
        let shutdown = Shutdown::new()?;
        let switch = shutdown.clone();
        let thread = std::thread::Builder::new()
            .name(name.into())
            .spawn(move || server.serve(&listeners, &switch))
            .map_err(|e| Error::environment("starting a daemon's thread").with_source(e))?;
        Ok(Self { shutdown, thread })
    }
    fn stop(self) -> Result<()> {
        self.shutdown.trigger();
        self.thread
            .join()
            .unwrap_or_else(|_| Err(Error::internal("the daemon panicked")))
    }
}

/// Connections to the running instances of the store in `store`, wherever their state directories lie.
/// Control sockets of processes that are gone are removed.
///
/// # Errors
/// I/O, not permitted.
pub fn instances(store: &Path) -> Result<Vec<control::Client>> {
    let run = store.join("run");
    let entries = match fs::read_dir(&run) {
        Ok(entries) => entries,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(Error::io("reading", &run, e)),
    };
    let mut out = Vec::new();
    for entry in entries {
        let path = entry.map_err(|e| Error::io("reading", &run, e))?.path();
        let name = path
            .file_name()
            .and_then(|n| n.to_str())
            .and_then(|n| n.strip_prefix("control"));
        let Some(number) = name.and_then(|n| n.strip_suffix(".sock")) else {
            continue;
        };
        match control::Client::connect(&path)? {
            Some(_) if out.len() == INSTANCES_MAX => {
                return Err(Error::environment(format!(
                    "more than {INSTANCES_MAX} instances run for {}",
                    store.display()
                )));
            }
            Some(client) => out.push(client),
            // The name holds the process id; a process that is just about to listen is alive.
            None => {
                let pid = number
                    .strip_prefix('-')
                    .filter(|n| n.bytes().all(|b| b.is_ascii_digit()));
                if pid.is_some_and(|pid| !Path::new("/proc").join(pid).exists())
                    && let Err(error) = fs::remove_file(&path)
                {
                    tracing::debug!(path = %path.display(), %error, "removing a stale control socket");
                }
            }
        }
    }
    Ok(out)
}

/// Tells running instances of what this process publishes. Register it with [`Store::observe`] in
/// processes that add to a store and are not an instance.
pub struct Notifier {
    store: PathBuf,
}

impl Notifier {
    /// For the store in `store`.
    pub fn new(store: &Path) -> Self {
        Self {
            store: store.to_owned(),
        }
    }
    fn tell(&self, paths: &[StorePath]) -> Result<()> {
        let mut clients = instances(&self.store)?;
        if clients.is_empty() {
            return Ok(());
        }
        let names: Vec<String> = paths.iter().map(|p| p.base_name().to_owned()).collect();
        for client in &mut clients {
            client.published(&names)?;
        }
        Ok(())
    }
}

impl Observer for Notifier {
    fn published(&self, paths: &[StorePath]) {
        if let Err(error) = self.tell(paths) {
            tracing::warn!(
                "telling the running instance of new paths: {}",
                error.chain()
            );
        }
    }
    fn deleted(&self, _paths: &[StorePath]) {}
}

/// Removes what a killed instance left: dead or abandoned mounts of ours, stale sockets. Returns what
/// was removed. The caller holds the lock, or has seen that nobody does.
///
/// # Errors
/// A foreign mount is in the way, unmounting fails, or an instance runs.
pub fn mend(layout: &Layout) -> Result<Vec<String>> {
    let mut removed = unmount_leftovers(layout)?;
    for socket in [
        layout.socket.clone(),
        layout.overlay_socket.clone(),
        layout.control(),
        layout.mount_control(),
    ] {
        use std::os::unix::fs::FileTypeExt;
        let is_socket = fs::symlink_metadata(&socket).is_ok_and(|m| m.file_type().is_socket());
        let refused = is_socket
            && UnixStream::connect(&socket)
                .is_err_and(|e| e.kind() == std::io::ErrorKind::ConnectionRefused);
        if refused {
            fs::remove_file(&socket).map_err(|e| Error::io("removing", &socket, e))?;
            removed.push(format!("the stale socket {}", socket.display()));
        }
    }
    Ok(removed)
}

/// The mounts among it.
pub(crate) fn unmount_leftovers(layout: &Layout) -> Result<Vec<String>> {
    let mut removed = Vec::new();
    let mut all = vec![(layout.merged.clone(), "overlay")];
    all.extend(Places::of(layout).all());
    all.push((layout.lower.clone(), crate::mount::FUSE_TYPE));
    for (path, own_type) in &all {
        for _ in 0..LEFTOVER_MOUNTS_MAX {
            let list = mountinfo::mounts()?;
            let Some(entry) = mountinfo::topmost_at(&list, path) else {
                break;
            };
            if !is_ours(entry, own_type, layout) {
                if layout.is_over_store && *path == layout.merged && entry.fs_type != *own_type {
                    break;
                }
                return Err(Error::environment(format!(
                    "a foreign mount of type {} is on {}",
                    entry.fs_type,
                    path.display()
                ))
                .with_hint(format!(
                    "unmount it with `umount {}`, or choose another place with --state or --merged",
                    path.display()
                )));
            }
            let state = state_of(path);
            rustix::mount::unmount(path, rustix::mount::UnmountFlags::DETACH)
                .map_err(|e| Error::io("unmounting", path, e.into()))?;
            removed.push(format!("the {state} mount on {}", path.display()));
        }
    }
    Places::of(layout).remove_unused();
    Ok(removed)
}

/// In a word. A mount may be alive that nobody answers for, while systemd keeps its descriptors.
fn state_of(path: &Path) -> &'static str {
    let (to, answer) = std::sync::mpsc::channel();
    let path = path.to_owned();
    // Where it hangs, the thread ends when the mount does. Nobody may be there to hear.
    let asked = std::thread::Builder::new().spawn(move || to.send(is_dead(&path)));
    let answer = asked.map(|_| answer.recv_timeout(Duration::from_millis(LOOK_MS_MAX)));
    match answer {
        Ok(Ok(true)) => "dead",
        Ok(Ok(false)) => "abandoned",
        _ => "unserved",
    }
}

fn is_ours(entry: &MountEntry, own_type: &str, layout: &Layout) -> bool {
    let upper = || {
        entry
            .super_option("upperdir")
            .is_some_and(|dir| Path::new(&dir) == layout.upper)
    };
    entry.fs_type == own_type && (own_type != "overlay" || upper())
}

/// Waits until no instance holds the lock, at most `timeout`. True if none does.
///
/// # Errors
/// None at present.
pub fn wait_unlocked(layout: &Layout, timeout: Duration) -> Result<bool> {
    let end = Instant::now() + timeout;
    while is_locked(&layout.lock()) {
        if Instant::now() >= end {
            return Ok(false);
        }
        std::thread::sleep(Duration::from_millis(LOCK_POLL_MS));
    }
    Ok(true)
}

/// Asks the daemon at `socket` something that only a working daemon answers.
///
/// # Errors
/// It cannot be reached, or answers wrongly.
pub fn ping(socket: &Path) -> Result<()> {
    let stream = UnixStream::connect(socket).map_err(|e| Error::io("connecting to", socket, e))?;
    let timeout = Some(Duration::from_millis(PING_MS_MAX));
    let timed = stream
        .set_read_timeout(timeout)
        .and_then(|()| stream.set_write_timeout(timeout));
    timed.map_err(|e| Error::io("setting timeouts of", socket, e))?;
    let failed =
        |e| Error::environment(format!("asking the daemon at {}", socket.display())).with_source(e);
    let mut client = Client::handshake(stream, &ClientOptions::default()).map_err(failed)?;
    client
        .query_path_from_hash_part(&"0".repeat(32))
        .map_err(failed)?;
    Ok(())
}

/// Ends the FUSE connections of an instance whose first process is gone. A thread of a server that was killed while it
/// mounted an image may wait, where no signal reaches it, for what only that server would have answered.
fn abort_mounts(layout: &Layout) {
    let lower = (layout.lower.clone(), crate::mount::FUSE_TYPE);
    for (path, own_type) in Places::of(layout).all().into_iter().chain([lower]) {
        if own_type != crate::mount::FUSE_TYPE {
            continue;
        }
        tracing::warn!(
            "a process of an instance that was killed does not end: ending the mount on {}",
            path.display()
        );
        let flags = rustix::mount::UnmountFlags::FORCE | rustix::mount::UnmountFlags::NOFOLLOW;
        // What is in use stays, but is answered with errors.
        if let Err(errno) = rustix::mount::unmount(&path, flags) {
            tracing::debug!("unmounting {}: {errno}", path.display());
        }
    }
}

fn take_lock(layout: &Layout) -> Result<File> {
    let path = layout.lock();
    let mut file = open_or_create(&path)?;
    let began = Instant::now();
    let give_up = began + Duration::from_millis(ORPHANS_MS_MAX);
    let mut is_aborted = false;
    let result = loop {
        let result = file.try_lock();
        let mut pid = String::new();
        // If it cannot be read, somebody holds it.
        let _ = file.rewind().and_then(|()| file.read_to_string(&mut pid));
        let lives = pid.trim().parse().map_or(true, crate::supervisor::lives);
        // When the first process of an instance is killed, the others end at once, too.
        if result.is_ok() || lives || Instant::now() >= give_up {
            break result;
        }
        if !is_aborted && began.elapsed() >= Duration::from_millis(ORPHANS_STUCK_MS) {
            abort_mounts(layout);
            is_aborted = true;
        }
        std::thread::sleep(Duration::from_millis(LOCK_POLL_MS));
    };
    match result {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => {
            let mut pid = String::new();
            // Only for the message.
            let _ = file.rewind().and_then(|()| file.read_to_string(&mut pid));
            return Err(Error::user(format!(
                "an instance runs for {} already: process {}",
                layout.state.display(),
                pid.trim()
            ))
            .with_hint(
                "see `understory status`; stop it with `understory down`, or use another --state",
            ));
        }
        Err(TryLockError::Error(e)) => return Err(Error::io("locking", &path, e)),
    }
    let written = file
        .set_len(0)
        .and_then(|()| file.rewind())
        .and_then(|()| writeln!(file, "{}", std::process::id()));
    written.map_err(|e| Error::io("writing", &path, e))?;
    Ok(file)
}

fn create_store(layout: &Layout, store_dir: &StoreDir) -> Result<()> {
    if !layout.store.join("format").exists() {
        OverlayUrl::of(layout, store_dir)?;
        Store::create(&layout.store, store_dir)?;
        tracing::info!(store = %layout.store.display(), "created a store");
    }
    Ok(())
}

/// Creates the directories of an instance where they are missing.
pub(crate) fn make_directories(layout: &Layout) -> Result<()> {
    let dirs = [
        &layout.lower,
        &layout.upper,
        &layout.work,
        &layout.merged,
        &layout.nix_state,
        &layout.nix_log,
    ];
    dirs.into_iter().try_for_each(|dir| make_directory(dir))
}

fn make_directory(dir: &Path) -> Result<()> {
    fs::create_dir_all(dir).map_err(|e| Error::io("creating", dir, e))
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
