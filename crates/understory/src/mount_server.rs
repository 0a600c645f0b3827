//! The mount worker of an instance: serves its FUSE mounts, and may be killed at any moment.
//!
//! What must outlive it is held by the supervisor: see [`LiveMount::take_over`] for what that is. It opens the store to
//! read, so that nothing is left half written when it is killed. Its control socket answers `status` and `metrics`.

use crate::config::Layout;
use crate::control::{self, MountedAs, Observed, Published, Status};
use crate::generation::stack::{HeldParts, Holder, Stack, StackOptions};
use crate::mount::{Handover, HoldLive, LiveHandover, LiveMount, LiveOptions};
use crate::supervisor::{Line, Order, SOCKET_MOUNT, Worker};
use crate::{Error, Result, Store, StoreOptions, daemon, metrics, namespace};
use rustix::fd::BorrowedFd;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

/// Under which name the live mount is held.
pub(crate) const HELD_LIVE: &str = "live";
/// What metrics call this process.
const ROLE: &str = "mount";
/// Which of what is held notifications go through: the device, which comes after the memory of the nodes.
const NOTIFY: usize = 1;

/// Serves the mounts until it is told to end.
///
/// # Errors
/// What keeps it from starting, or went wrong at the end.
pub fn serve(mut worker: Worker, stack: &StackOptions) -> Result<()> {
    let layout = worker.layout().clone();
    // Nothing below may look at the mount or what lies on it: while nobody serves it, that would wait for us.
    let goes_on = worker.held().iter().any(|held| held.name == HELD_LIVE);
    if !goes_on {
        crate::up::make_directories(&layout)?;
    }
    let mut options = StoreOptions::default();
    options.castore.read_only = true;
    let store = Store::open(&layout.store, &options)?;
    store.castore().keep_fresh()?;
    let live = Arc::new(serve_live(&mut worker, &store, &layout)?);
    let stack = Arc::new(serve_stack(&mut worker, &store, &layout, stack, goes_on)?);
    let checked = (Arc::downgrade(&live), Arc::downgrade(&stack));
    let busy_max = worker.watchdog();
    worker.is_well_while(move || {
        let live = checked.0.upgrade();
        let stack = checked.1.upgrade();
        live.is_none_or(|live| live.busy_for() < busy_max)
            && stack.is_none_or(|stack| stack.busy_for() < busy_max)
    });
    let handler = Arc::new(Handler {
        layout: layout.clone(),
        stack: Arc::clone(&stack),
        store_dir: store.store_dir().to_string(),
        started: SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .map_or(0, |d| d.as_secs()),
    });
    let path = layout.mount_control();
    let mut controls = Vec::new();
    for listener in worker.take_sockets(SOCKET_MOUNT) {
        let server = control::Server::serve(listener, &path, handler.clone())?;
        controls.push(server);
    }
    let (line, watched) = (worker.line(), Arc::clone(&live));
    std::thread::Builder::new()
        .name("unmounted".into())
        .spawn(move || {
            watched.wait();
            line.unmounted();
        })
        .map_err(|e| Error::environment("starting a thread").with_source(e))?;
    let resend = live.handover().can_resend();
    worker.line().ready(&(), Some(resend))?;
    match worker.wait() {
        Order::Stop | Order::Drain => {
            let stack = stack.unmount();
            live.unmount().and(stack)
        }
    }
}

/// Mounts what the overlay stands on if that is an image, or goes on with it.
fn serve_stack(
    worker: &mut Worker,
    store: &Store,
    layout: &Layout,
    options: &StackOptions,
    goes_on: bool,
) -> Result<Stack> {
    let holder = Arc::new(worker.line());
    let held = worker.take_all_held().into_iter().map(|held| HeldParts {
        name: held.name,
        state: held.state,
        descriptors: held.descriptors,
    });
    if goes_on {
        let held = held.collect();
        let refuse = worker.refuses_resent();
        return Stack::go_on(store, layout, options, held, refuse, holder);
    }
    // Nothing is mounted on top yet: the daemon starts after us.
    Stack::begin(store, layout, options, holder)
}

impl Holder for Line {
    fn hold(
        &self,
        name: &str,
        state: &serde_json::Value,
        descriptors: &[BorrowedFd<'_>],
        notify: Option<usize>,
    ) -> Result<()> {
        Line::hold(self, name, state, descriptors, notify)
    }
    fn release(&self, name: &str) -> Result<()> {
        Line::release(self, name)
    }
}

fn serve_live(worker: &mut Worker, store: &Store, layout: &Layout) -> Result<LiveMount> {
    let options = LiveOptions::default();
    let line = worker.line();
    let hold: HoldLive<'_> = &mut |live: &LiveHandover<'_>| {
        line.hold(HELD_LIVE, live.state, &live.descriptors, Some(NOTIFY))
    };
    let Some(held) = worker.take_held(HELD_LIVE) else {
        return LiveMount::mount_held(store, &layout.lower, &options, hold);
    };
    let state: Handover = serde_json::from_value(held.state)
        .map_err(|e| Error::internal("what is held of the live mount").with_source(e))?;
    let refuse = worker.refuses_resent();
    LiveMount::take_over(store, &state, held.descriptors, &options, refuse, hold)
}

/// Answers on the control socket.
struct Handler {
    layout: Layout,
    stack: Arc<Stack>,
    store_dir: String,
    started: u64,
}

impl control::Handler for Handler {
    fn status(&self) -> Status {
        Status {
            pid: std::process::id(),
            version: env!("CARGO_PKG_VERSION").into(),
            started: self.started,
            store: self.layout.store.clone(),
            store_dir: self.store_dir.clone(),
            lower: self.layout.lower.clone(),
            socket: self.layout.socket.clone(),
            overlays: Vec::new(),
            upper: None,
            url: None,
            overlay_socket: None,
            nix_remote: None,
            lowers: Vec::new(),
            private: namespace::in_user_namespace(),
            published: 0,
            remounts: 0,
            metrics: None,
        }
    }
    fn metrics(&self) -> Observed {
        Observed {
            metrics: metrics::snapshot(ROLE),
            clients: daemon::clients(),
            // The daemon knows more of them.
            generations: Vec::new(),
        }
    }
    fn stop(&self) {
        tracing::warn!("the mount server is not stopped by itself: stop the instance");
    }
    fn published(&self, _names: &[String]) -> Result<Published> {
        // It asks the store anew for each name that the kernel does not know.
        Ok(Published::default())
    }
    fn mount_generation(&self, number: u64) -> Result<MountedAs> {
        let standing = self.stack.raise(number)?;
        let route = standing
            .route
            .ok_or_else(|| Error::internal("a generation was mounted in no way"))?;
        Ok(MountedAs {
            route,
            reason: standing.reason,
        })
    }
    fn keep_generations(&self, numbers: &[u64]) -> Result<usize> {
        self.stack.keep_only(numbers)
    }
}
