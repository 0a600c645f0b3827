//! `serve`: the worker protocol on sockets or stdio, with a live mount if wanted.

use crate::commands::up::{TrustArgs, enter_namespace};
use crate::context::{Context, is_store};
use crate::error::{CommandError, Result};
use crate::settings::MaskArgs;
use crate::signals;
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use understory::daemon::{Listener, Server};
use understory::mount::{LiveMount, LiveOptions, mountinfo};
use understory::up::Notifier;
use understory::{Store, StoreOptions, config, service_manager};
use understory_nix::StoreDir;

/// Serve the worker protocol (foreground)
///
/// Creates the store if there is none. Takes sockets from systemd (LISTEN_FDS) if it is given some.
/// With --mount the live mount is there before the socket appears. Ends on SIGTERM or SIGINT and
/// unmounts.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Listen here [default: STORE/run/daemon.sock]
    #[arg(long, value_name = "FILE")]
    socket: Option<PathBuf>,
    /// Serve one client on stdin and stdout
    #[arg(long, conflicts_with_all = ["socket", "mount"])]
    stdio: bool,
    /// Also mount the store's paths here
    #[arg(long, value_name = "DIR")]
    mount: Option<PathBuf>,
    /// Mount over a live mount that another namespace has there already: what is inherited from a
    /// more privileged namespace cannot be unmounted, only covered
    #[arg(long, requires = "mount")]
    mount_over: bool,
    /// Refuse all changes
    #[arg(long)]
    read_only: bool,
    /// Mount in a user and mount namespace of its own if mounts are not permitted here
    #[arg(long, requires = "mount")]
    private: bool,
    #[command(flatten)]
    trust: TrustArgs,
    /// Logical store directory of a store that is created
    #[arg(long, value_name = "DIR", default_value = "/nix/store")]
    store_dir: String,
    #[command(flatten)]
    mask: MaskArgs,
}

pub(crate) fn run(args: &Args, cx: &Context) -> Result<()> {
    let mut options = args.trust.options()?;
    options.read_only = args.read_only;
    if args.private {
        enter_namespace(true)?;
    }
    let store = open(args, cx)?;
    if !args.read_only {
        // An instance of `up` may run on the same store with overlays of its own.
        store.observe(std::sync::Arc::new(Notifier::new(store.dir())));
    }
    let server = Server::new(store.clone(), options);
    if args.stdio {
        return Ok(server.serve_stdio()?);
    }
    let (to, signalled) = mpsc::channel();
    signals::forward(to)?;
    let live = match &args.mount {
        Some(at) => Some(mount(args, &store, at)?),
        None => None,
    };
    let mut listeners = Listener::activated()?;
    if let Some(path) = &args.socket {
        listeners.push(Listener::bind(&config::absolute(path)?)?);
    } else if listeners.is_empty() {
        let run = store.dir().join("run");
        std::fs::create_dir_all(&run)
            .map_err(|e| CommandError::io("creating", run.display(), &e))?;
        listeners.push(Listener::bind(&run.join("daemon.sock"))?);
    }
    for path in listeners.iter().filter_map(Listener::path) {
        tracing::info!(socket = %path.display(), "listening");
    }
    let shutdown = signals::shutdown(signalled)?;
    service_manager::ready(&format!("serving {}", store.dir().display()));
    let served = server.serve(&listeners, &shutdown);
    service_manager::stopping();
    drop(listeners);
    let unmounted = live.map_or(Ok(()), Mounted::unmount);
    served?;
    unmounted
}

/// A live mount, and whether it lies on a cover of ours.
struct Mounted {
    live: LiveMount,
    covered: bool,
}

fn mount(args: &Args, store: &Store, at: &Path) -> Result<Mounted> {
    std::fs::create_dir_all(at).map_err(|e| CommandError::io("creating", at.display(), &e))?;
    let at = config::absolute(at)?;
    let covered = args.mount_over && mountinfo::mount_at(&at)?.is_some();
    if covered {
        let flags = rustix::mount::MountFlags::RDONLY;
        rustix::mount::mount("tmpfs", &at, "tmpfs", flags, c"mode=755,size=4k")
            .map_err(|e| CommandError::io("covering", at.display(), &e.into()))?;
    }
    let live = LiveMount::mount(store, &at, &LiveOptions::default())?;
    Ok(Mounted { live, covered })
}

impl Mounted {
    fn unmount(self) -> Result<()> {
        let at = self.live.mountpoint().to_owned();
        self.live.unmount()?;
        if self.covered {
            rustix::mount::unmount(&at, rustix::mount::UnmountFlags::DETACH)
                .map_err(|e| CommandError::io("uncovering", at.display(), &e.into()))?;
        }
        Ok(())
    }
}

fn open(args: &Args, cx: &Context) -> Result<Store> {
    let dir = cx.store_path()?;
    if !is_store(&dir) && !args.read_only {
        // Several servers may be started at a time, for instance by socket activation: the second one
        // finds the store made.
        match Store::create(&dir, &StoreDir::new(&args.store_dir)?) {
            Err(error) if !is_store(&dir) => return Err(error.into()),
            _ => {}
        }
    }
    let mut options = StoreOptions::default();
    options.castore.read_only = args.read_only;
    args.mask.apply(&mut options);
    let store = Store::open(&dir, &options)?;
    store.castore().keep_fresh()?;
    Ok(store)
}
