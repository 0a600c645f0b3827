//! `overlay`: our own overlay store over directories that somebody else has mounted.

use crate::context::{Context, is_store};
use crate::error::{CommandError, Result};
use crate::settings::SettingsArgs;
use crate::signals;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc;
use std::thread::JoinHandle;
use understory::builder::{Builder, NixBuilder};
use understory::daemon::{Listener, Server, ServerOptions, Shutdown};
use understory::local::LocalPaths;
use understory::overlay::lower::{self, CastoreLower};
use understory::overlay::{Lower, LowerDir, Options, Overlay, Remount, check_mount};
use understory::overlay_url::{BuilderUrl, daemon_url};
use understory::settings::Resolved;
use understory::up::{self, Notifier};
use understory::{Store, StoreOptions, config, service_manager};
use understory_nix::StoreDir;

/// Serve an overlay store whose overlayfs is mounted already (foreground)
///
/// A writable store over read-only ones, as Nix's local-overlay:// has it and compatible with it on
/// disk, for every client of the worker protocol: NIX_REMOTE=unix://SOCKET. `understory up` does this
/// and all that it needs in one command; this one is for mounts that something else makes, such as a
/// container runtime or systemd.
///
/// The uppermost lower store is the castore, if one is named: it takes what is substituted or copied
/// in. No other lower store is ever written to; then everything goes to the upper directory. Ends on
/// SIGTERM or SIGINT. Takes sockets from systemd (LISTEN_FDS) if it is given some.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Listen here [default: STATE/daemon-socket/socket]
    #[arg(long, value_name = "FILE")]
    socket: Option<PathBuf>,
    /// Serve one client on stdin and stdout
    #[arg(long, conflicts_with = "socket")]
    stdio: bool,
    /// Prefix of the store: nix/store, nix/var/nix and nix/var/log/nix lie below
    #[arg(long, value_name = "DIR", required_unless_present_all = ["real", "state_dir"])]
    root: Option<PathBuf>,
    /// Where the overlayfs is mounted [default: ROOT/nix/store]
    #[arg(long, value_name = "DIR")]
    real: Option<PathBuf>,
    /// The database, roots and locks [default: ROOT/nix/var/nix]
    #[arg(long, value_name = "DIR")]
    state_dir: Option<PathBuf>,
    /// Build logs [default: ROOT/nix/var/log/nix, or log/nix beside STATE]
    #[arg(long, value_name = "DIR")]
    log_dir: Option<PathBuf>,
    /// The overlayfs's upper directory
    #[arg(long, value_name = "DIR")]
    upper: PathBuf,
    /// A castore below: the directory of its store (`--store` of the other commands)
    #[arg(long, value_name = "DIR", requires = "castore_mount")]
    castore: Option<PathBuf>,
    /// Where the castore is mounted
    #[arg(long, value_name = "DIR", requires = "castore")]
    castore_mount: Option<PathBuf>,
    /// Never write to the castore: everything new goes to the upper directory
    #[arg(long, requires = "castore")]
    castore_read_only: bool,
    /// Logical store directory
    #[arg(long, value_name = "DIR", default_value = "/nix/store")]
    store_dir: String,
    /// Run this with the mounted directory as argument when the overlayfs must forget stale entries
    /// [default: it is remounted by us]
    #[arg(long, value_name = "PROGRAM")]
    remount_hook: Option<PathBuf>,
    /// Never remount: tell clients when it is due
    #[arg(long, conflicts_with = "remount_hook")]
    no_remount: bool,
    /// Believe that the right overlayfs is mounted
    #[arg(long)]
    no_check_mount: bool,
    #[command(flatten)]
    settings: SettingsArgs,
}

pub(crate) fn run(args: &Args, _cx: &Context) -> Result<()> {
    let settings = args.settings.resolve()?;
    let local = places(args)?;
    let upper = config::absolute(&args.upper)?;
    let hook = args
        .remount_hook
        .as_deref()
        .map(config::absolute)
        .transpose()?;
    check_lowers(args, &settings)?;
    if !args.no_check_mount {
        // Before a store is opened at a wrong place.
        let mut dirs: Vec<LowerDir> = Vec::new();
        if let Some(mount) = &args.castore_mount {
            dirs.push(("the castore".to_owned(), config::absolute(mount)?));
        }
        for url in &settings.settings.lowers {
            dirs.push((url.clone(), lower::real_dir(url, &local.store_dir)?));
        }
        check_mount(&local.real, &upper, &dirs)?;
    }
    let stack = Lowers::open(args, &settings, &local)?;
    let (to, signalled) = mpsc::channel();
    if !args.stdio {
        signals::forward(to)?;
    }
    let builder: Arc<dyn Builder> = Arc::new(NixBuilder {
        program: settings.settings.nix.clone(),
        store_url: BuilderUrl {
            local: &local,
            upper: &upper,
            lower: &stack.url,
            remount_hook: hook.as_deref(),
        }
        .to_string(),
        options: up::builder_options(&settings),
    });
    let state = local.state.clone();
    let overlay = Overlay::open(Options {
        local,
        upper,
        lowers: stack.lowers,
        check_mount: !args.no_check_mount,
        remount: match hook {
            Some(program) => Remount::Hook(program),
            None if args.no_remount => Remount::Never,
            None => Remount::Ours,
        },
        settings: settings.settings.clone(),
        builder,
    })?;
    let server = Server::for_backend(Arc::new(overlay), settings.settings.server_options());
    if args.stdio {
        server.serve_stdio()?;
        return stack.daemon.map_or(Ok(()), LowerDaemon::stop);
    }
    let mut listeners = Listener::activated()?;
    if let Some(path) = &args.socket {
        listeners.push(Listener::bind(&config::absolute(path)?)?);
    } else if listeners.is_empty() {
        // Where clients look that know the state directory only.
        listeners.push(Listener::bind(&state.join("daemon-socket/socket"))?);
    }
    for path in listeners.iter().filter_map(Listener::path) {
        tracing::info!(socket = %path.display(), "listening");
    }
    let shutdown = signals::shutdown(signalled)?;
    service_manager::ready(&format!(
        "serving the overlay store with the state {}",
        state.display()
    ));
    let served = server.serve(&listeners, &shutdown);
    service_manager::stopping();
    drop(listeners);
    let stopped = stack.daemon.map_or(Ok(()), LowerDaemon::stop);
    served?;
    stopped
}

/// Whether there is something below, as far as that is seen without opening it.
fn check_lowers(args: &Args, settings: &Resolved) -> Result<()> {
    if let Some(dir) = args.castore.as_deref().map(config::absolute).transpose()?
        && !is_store(&dir)
    {
        return Err(
            CommandError::failed(format!("there is no store in {}", dir.display())).hint(format!(
                "create one with `understory --store {} init`",
                dir.display()
            )),
        );
    }
    if args.castore.is_none() && settings.settings.lowers.is_empty() {
        return Err(CommandError::usage("there is no lower store")
            .hint("name one with --lower URL, or a castore with --castore and --castore-mount"));
    }
    Ok(())
}

/// Where the store is.
fn places(args: &Args) -> Result<LocalPaths> {
    let root = args.root.as_deref().map(config::absolute).transpose()?;
    let given = |dir: &Option<PathBuf>, below: &str| -> Result<Option<PathBuf>> {
        match (dir, &root) {
            (Some(dir), _) => Ok(Some(config::absolute(dir)?)),
            (None, Some(root)) => Ok(Some(root.join(below))),
            (None, None) => Ok(None),
        }
    };
    let needed = |dir: Option<PathBuf>, name: &str| {
        dir.ok_or_else(|| {
            CommandError::usage(format!("{name} is not given"))
                .hint("use --root, or --real and --state-dir")
        })
    };
    let state = needed(given(&args.state_dir, "nix/var/nix")?, "--state-dir")?;
    let log = given(&args.log_dir, "nix/var/log/nix")?;
    Ok(LocalPaths {
        store_dir: StoreDir::new(&args.store_dir)?,
        real: needed(given(&args.real, "nix/store")?, "--real")?,
        // As /nix/var/log/nix is to /nix/var/nix.
        log: log.unwrap_or_else(|| state.parent().unwrap_or(Path::new("/")).join("log/nix")),
        state,
    })
}

/// The stores below.
struct Lowers {
    lowers: Vec<Arc<dyn Lower>>,
    /// The uppermost one's URL, for the Nix that builds.
    url: String,
    daemon: Option<LowerDaemon>,
}

impl Lowers {
    fn open(args: &Args, settings: &Resolved, local: &LocalPaths) -> Result<Self> {
        let mut out = Self {
            lowers: Vec::new(),
            url: String::new(),
            daemon: None,
        };
        if let (Some(dir), Some(mount)) = (&args.castore, &args.castore_mount) {
            let (dir, mount) = (config::absolute(dir)?, config::absolute(mount)?);
            let mut options = StoreOptions::default();
            options.castore.read_only = args.castore_read_only;
            options.castore.mask_hash_parts = settings.settings.mask_hash_parts;
            let store = Store::open(&dir, &options)?;
            store.castore().keep_fresh()?;
            if !args.castore_read_only {
                // Who has it mounted elsewhere hears of what is added.
                store.observe(Arc::new(Notifier::new(&dir)));
            }
            let daemon = LowerDaemon::start(&store, local)?;
            out.url = daemon_url(&daemon.socket, &mount, &local.store_dir);
            out.daemon = Some(daemon);
            out.lowers.push(Arc::new(CastoreLower::new(store, &mount)));
        }
        for url in &settings.settings.lowers {
            out.lowers.push(lower::open(url, &local.store_dir)?);
            if out.url.is_empty() {
                out.url.clone_from(url);
            }
        }
        Ok(out)
    }
}

/// Answers the Nix that builds about the castore; nobody else may connect.
struct LowerDaemon {
    socket: PathBuf,
    shutdown: Shutdown,
    thread: JoinHandle<understory::Result<()>>,
}

impl LowerDaemon {
    fn start(store: &Store, local: &LocalPaths) -> Result<Self> {
        let socket = local.state.join("understory/lower.sock");
        let listener = Listener::bind(&socket)?;
        let options = ServerOptions {
            trusted_users: Vec::new(),
            // Builders ask through the Nix that runs them, which is this user's.
            allowed_users: vec!["root".to_owned()],
            read_only: true,
            ..ServerOptions::default()
        };
        let (server, shutdown) = (Server::new(store.clone(), options), Shutdown::new()?);
        let switch = shutdown.clone();
        let thread = std::thread::Builder::new()
            .name("lower-daemon".into())
            .spawn(move || server.serve(&[listener], &switch))
            .map_err(|e| CommandError::io("starting", "the lower daemon's thread", &e))?;
        Ok(Self {
            socket,
            shutdown,
            thread,
        })
    }
    fn stop(self) -> Result<()> {
        self.shutdown.trigger();
        let ended = self.thread.join();
        Ok(ended
            .unwrap_or_else(|_| Err(understory::Error::internal("the lower daemon panicked")))?)
    }
}
