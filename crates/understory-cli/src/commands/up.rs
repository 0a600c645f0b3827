//! `up`: mounts, serves and overlays the store, all in one; also what its relatives share.

use crate::context::{Context, is_store};
use crate::env;
use crate::error::{CommandError, Result};
use crate::settings::SettingsArgs;
use crate::signals;
use rustix::stdio::{dup2_stderr, dup2_stdout};
use serde::Deserialize;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM, SIGUSR1, SIGUSR2};
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::Read;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::time::Duration;
use understory::config::{Layout, LayoutOptions};
use understory::daemon::{Listener, ServerOptions};
use understory::generation::HotOptions;
use understory::generation::stack::{MountMode, StackOptions, Standing};
use understory::mount::LiveOptions;
use understory::settings::Resolved;
use understory::supervisor::{self, Keeper, Role, Worker};
use understory::up::{Instance, Options, Report};
use understory::{StoreOptions, mount_server, namespace, service_manager, up};
use understory_nix::{PublicKeys, StoreDir};

/// Where things lie; shared by `up`, `down`, `status`, `shell` and `doctor`.
#[derive(Debug, Clone, Default, clap::Args)]
pub(crate) struct LayoutArgs {
    /// Directory for sockets, mounts and the upper layer [default: the store's directory]
    #[arg(long, value_name = "DIR")]
    state: Option<PathBuf>,
    /// The overlay's upper directory: what Nix adds on top [default: STATE/upper]
    #[arg(long, value_name = "DIR")]
    upper: Option<PathBuf>,
    /// The overlay's work directory, on the file system of the upper one [default: STATE/work]
    #[arg(long, value_name = "DIR")]
    work: Option<PathBuf>,
    /// Where the overlay is mounted, such as /nix/store [default: STATE/merged/nix/store]
    #[arg(long, value_name = "DIR")]
    merged: Option<PathBuf>,
    /// The castore's socket: the lower store's daemon [default: STATE/run/daemon.sock]
    #[arg(long, value_name = "FILE")]
    socket: Option<PathBuf>,
    /// The overlay store's socket: what clients use [default: STATE/run/overlay.sock]
    #[arg(long, value_name = "FILE")]
    overlay_socket: Option<PathBuf>,
}

impl LayoutArgs {
    pub(crate) fn options(&self) -> LayoutOptions {
        LayoutOptions {
            state: self.state.clone(),
            upper: self.upper.clone(),
            work: self.work.clone(),
            merged: self.merged.clone(),
            socket: self.socket.clone(),
            overlay_socket: self.overlay_socket.clone(),
            ..LayoutOptions::default()
        }
    }
}

/// Who may use the daemon of `serve`.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct TrustArgs {
    /// Users (name, @group or *) who may add unsigned paths and delete
    #[arg(
        long,
        value_name = "USERS",
        value_delimiter = ' ',
        default_value = "root"
    )]
    trusted_users: Vec<String>,
    /// Users (name, @group or *) who may connect
    #[arg(long, value_name = "USERS", value_delimiter = ' ', default_value = "*")]
    allowed_users: Vec<String>,
    /// Public keys (name:base64) whose signatures make additions by others acceptable
    #[arg(long, value_name = "KEYS", value_delimiter = ' ')]
    trusted_public_keys: Vec<String>,
}

impl TrustArgs {
    pub(crate) fn options(&self) -> Result<ServerOptions> {
        let words = |list: &[String]| list.iter().filter(|w| !w.is_empty()).cloned().collect();
        Ok(ServerOptions {
            trusted_users: words(&self.trusted_users),
            allowed_users: words(&self.allowed_users),
            trusted_public_keys: PublicKeys::parse(&self.trusted_public_keys.join(" "))?,
            ..ServerOptions::default()
        })
    }
}

/// Mount, serve and overlay the store, all in one
///
/// Creates the store if there is none, mounts it, starts its daemon, mounts the overlay, serves the
/// overlay store, and proves that each works. Then prints what NIX_REMOTE must be for Nix to use it
/// (and how stock Nix can open the overlay by itself instead), tells systemd, and runs until it is
/// interrupted or `understory down` is called. Takes the overlay store's sockets from systemd
/// (LISTEN_FDS) if it is given some.
///
/// What is substituted or copied in goes to the castore, what is built or added to the upper
/// directory. Builds are done by the Nix that is installed; without one everything else works.
///
/// The process itself only supervises: it keeps the mounts and sockets, and lets others of the same program serve
/// them. One that ends is replaced, and readers of the mounts wait meanwhile. SIGUSR2 replaces them by what is
/// installed now; see `understory upgrade`.
///
/// As a systemd service with a file-descriptor store (FileDescriptorStoreMax=) it goes on with the mounts and sockets
/// of the process before, if that has crashed or was told by SIGUSR1 to leave them.
///
/// Without root everything is mounted in a user and mount namespace of its own: use `understory
/// shell` to work inside.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    layout: LayoutArgs,
    /// Go to the background once everything works; the log goes to STATE/run/up.log
    #[arg(long)]
    detach: bool,
    /// Mount in a namespace of its own even as root
    #[arg(long)]
    private: bool,
    /// What the overlay stands on: an image of the store (see `understory generation`) where it pays and can be
    /// mounted, the live mount, or an image and nothing else
    #[arg(long, value_name = "WHAT", default_value = "auto")]
    mount: MountArg,
    /// With an image: keep files uncompressed that are often read in small pieces, in at most SIZE
    #[arg(long, value_name = "raw[=SIZE]", value_parser = super::generation::parse_hot)]
    hot: Option<HotOptions>,
    /// Seconds without a sign of life after which a process that serves is replaced
    #[arg(long, value_name = "SECONDS", default_value_t = 30, value_parser = clap::value_parser!(u64).range(1..=3600))]
    watchdog: u64,
    /// Internal: this is the background process
    #[arg(long, hide = true)]
    detached: bool,
    /// Internal: this is a process of the one that supervises
    #[arg(long, hide = true, value_name = "ROLE")]
    worker: Option<String>,
    /// Logical store directory of a store that is created
    #[arg(long, value_name = "DIR", default_value = "/nix/store")]
    store_dir: String,
    /// Serve metrics on a loopback address or a unix socket, such as 127.0.0.1:9464 or unix:/run/metrics.sock
    #[arg(long, value_name = "ADDR")]
    metrics: Option<String>,
    #[command(flatten)]
    settings: SettingsArgs,
}

/// What the overlay stands on.
#[derive(Debug, Clone, Copy, clap::ValueEnum)]
enum MountArg {
    Auto,
    Live,
    Image,
}

impl Args {
    fn mode(&self) -> MountMode {
        match self.mount {
            MountArg::Auto => MountMode::Auto,
            MountArg::Live => MountMode::Live,
            MountArg::Image => MountMode::Image,
        }
    }

    fn stack(&self, settings: &Resolved) -> StackOptions {
        StackOptions {
            mode: self.mode(),
            hot: self.hot,
            thresholds: settings.settings.thresholds(),
        }
    }
}

/// What ends an instance.
pub(crate) enum End {
    Signal(i32),
    Asked,
}

pub(crate) fn run(args: &Args, cx: &Context) -> Result<()> {
    if args.worker.is_some() {
        return work(args);
    }
    let layout = cx.layout(&args.layout.options())?;
    if args.detach {
        return detach(cx, &layout);
    }
    // So that what is wrong with them is said before anything is done; the worker reads them again.
    args.resolve_settings()?;
    let directory = File::open(".").ok();
    let program =
        std::env::current_exe().map_err(|e| CommandError::io("finding", "this program", &e))?;
    // While the process has one thread and its descriptors are those it was given.
    let handed = service_manager::take_descriptors()?;
    if args.detached {
        // A session of its own: the terminal's signals and its end do not reach it.
        rustix::process::setsid()
            .map_err(|e| CommandError::io("starting", "a session", &e.into()))?;
    }
    // A namespace of our own ends with our processes, and what is mounted in it does so, too.
    let may_keep = namespace::may_mount() && !args.private && !layout.is_below_mounts(&program);
    let keeper = may_keep.then(Keeper::of_environment).flatten();
    enter_namespace(args.private)?;
    let store_dir = StoreDir::new(&args.store_dir)?;
    let prepared = up::prepare(&layout, &store_dir, handed, keeper)?;
    let mut arguments = absolute_arguments(std::env::args_os().skip(1))?;
    arguments.push("--worker".into());
    let mut on_ready = |report: &serde_json::Value| {
        let report = Report::deserialize(report)
            .map_err(|e| understory::Error::internal("the daemon's report").with_source(e))?;
        let ready = || -> Result<Option<File>> {
            print_report(cx, &layout, &report)?;
            let log = match args.detached {
                true => Some(move_output(&layout)?),
                false => None,
            };
            if log.is_some() {
                // All paths are absolute by now; the directory it was started in must not stay busy.
                rustix::process::chdir("/")
                    .map_err(|e| CommandError::io("entering", "/", &e.into()))?;
            }
            service_manager::ready(&format!("serving {}", layout.store.display()));
            Ok(log)
        };
        ready().map_err(|e| understory::Error::environment(e.message))
    };
    supervisor::run(supervisor::Options {
        layout: layout.clone(),
        lock: prepared.lock,
        sockets: prepared.sockets,
        program,
        arguments,
        directory,
        watchdog: Duration::from_secs(args.watchdog),
        stop: signals::readable(&[SIGINT, SIGTERM, SIGHUP])?,
        upgrade: signals::readable(&[SIGUSR2])?,
        leave: signals::readable(&[SIGUSR1])?,
        keeper: prepared.keeper,
        restored: prepared.restored,
        on_ready: &mut on_ready,
        on_stop: &mut || {
            service_manager::stopping();
            tracing::info!("stopping");
        },
    })?;
    Ok(())
}

/// The arguments of this process for one that starts in another directory.
fn absolute_arguments(arguments: impl Iterator<Item = OsString>) -> Result<Vec<OsString>> {
    /// Flags whose value is a file. Where the instance is, workers are told as it is.
    const FILES: [&str; 2] = ["--config", "--nix"];
    let absolute = |flag: &str, value: &OsStr| -> Result<OsString> {
        let path = Path::new(value);
        // A program without a slash is looked for in PATH.
        match value.is_empty() || flag == "--nix" && path.components().count() == 1 {
            true => Ok(value.to_owned()),
            false => Ok(understory::config::absolute(path)?.into()),
        }
    };
    let mut out: Vec<OsString> = Vec::new();
    let mut config = env::path(env::CONFIG);
    for argument in arguments {
        let last = out.last().and_then(|last| last.to_str());
        let flag = |name: &&str| last == Some(*name);
        if let Some(name) = FILES.into_iter().find(|name| flag(name)) {
            out.push(absolute(name, &argument)?);
            continue;
        }
        let joined = FILES.into_iter().find_map(|name| {
            let value = argument.as_bytes().strip_prefix(name.as_bytes())?;
            Some((name, OsStr::from_bytes(value.strip_prefix(b"=")?)))
        });
        let argument = match joined {
            Some((name, value)) => {
                let mut joined = OsString::from(format!("{name}="));
                joined.push(absolute(name, value)?);
                joined
            }
            None => argument,
        };
        if argument.as_bytes().starts_with(b"--config") {
            config = None;
        }
        out.push(argument);
    }
    if let Some(config) = config {
        out.push("--config".into());
        out.push(absolute("--config", config.as_os_str())?);
    }
    Ok(out)
}

impl Args {
    fn resolve_settings(&self) -> Result<Resolved> {
        let mut settings = self.settings.resolve()?;
        if let Some(address) = &self.metrics {
            settings.settings.metrics = Some(address.parse()?);
        }
        Ok(settings)
    }
}

/// Does a part of the work of the process that has started us.
fn work(args: &Args) -> Result<()> {
    let worker = Worker::begin()?;
    let line = worker.line();
    let served = || -> Result<()> {
        let settings = args.resolve_settings()?;
        enter_root()?;
        match worker.role() {
            Role::Mount => mount_server::serve(worker, &args.stack(&settings))?,
            Role::Daemon => up::serve_daemon(worker, settings, args.mode())?,
        }
        Ok(())
    };
    served().map_err(|error| {
        // The supervisor says it.
        line.failed(&error.to_library());
        CommandError::silent(error.code)
    })
}

/// The directory that the program was started in must not stay busy.
fn enter_root() -> Result<()> {
    rustix::process::chdir("/").map_err(|e| CommandError::io("entering", "/", &e.into()))
}

/// Enters a namespace where mounts are permitted, if that is needed or wanted.
pub(crate) fn enter_namespace(private: bool) -> Result<()> {
    if !namespace::may_mount() {
        namespace::enter_user_namespace()?;
    } else if private {
        namespace::enter_mount_namespace()?;
    }
    Ok(())
}

/// Starts an instance. Call it after namespaces are entered.
pub(crate) fn start(
    layout: &Layout,
    store_dir: &str,
    settings: Resolved,
    activated: Vec<Listener>,
) -> Result<(Instance, mpsc::Receiver<End>)> {
    let (to, ends) = mpsc::channel();
    let (signals_to, signals) = mpsc::channel();
    signals::forward(signals_to)?;
    let (asked, signalled) = (to.clone(), to);
    std::thread::Builder::new()
        .name("ends".into())
        .spawn(move || {
            for signal in signals {
                if signalled.send(End::Signal(signal)).is_err() {
                    return;
                }
            }
        })
        .map_err(|e| CommandError::io("starting", "a thread", &e))?;
    let asked = std::sync::Mutex::new(asked);
    let mut store = StoreOptions::default();
    store.castore.mask_hash_parts = settings.settings.mask_hash_parts;
    let instance = Instance::start(Options {
        layout: layout.clone(),
        store,
        store_dir: StoreDir::new(store_dir)?,
        settings,
        activated,
        live: LiveOptions::default(),
        on_stop: Box::new(move || {
            if let Ok(to) = asked.lock() {
                // The receiver is gone only while the instance stops anyhow.
                let _ = to.send(End::Asked);
            }
        }),
    })?;
    Ok((instance, ends))
}

fn print_report(cx: &Context, layout: &Layout, report: &Report) -> Result<()> {
    let standing = Standing::read(layout);
    if cx.json {
        return cx.ui.print_json(&serde_json::json!({
            "pid": std::process::id(),
            "store": layout.store,
            "storeDir": report.store_dir,
            "lower": layout.lower,
            "lowerStore": report.lower_store,
            "socket": layout.socket,
            "upper": layout.upper,
            "merged": layout.merged,
            "url": report.url,
            "nixRemote": report.nix_remote,
            "overlaySocket": layout.overlay_socket,
            "metrics": report.metrics,
            "private": report.private,
            "standing": standing,
        }));
    }
    if let Some(standing) = &standing {
        cx.ui.say(format_args!(
            "the overlay stands on {}",
            standing.describe()
        ));
    }
    let conf = report.nix_conf.replace('\n', "\n#   ");
    cx.ui.print(format!(
        "export NIX_REMOTE='{}'\n\n\
         # Instead, Nix 2.26 or newer can open the same store by itself; for nix.conf:\n\
         #   {}\n",
        report.nix_remote,
        conf.trim_end_matches("#   ").trim_end(),
    ))?;
    if report.private {
        cx.ui
            .hint("the mounts are in a namespace of their own: `understory shell` takes you there");
    }
    Ok(())
}

/// Runs this program again in the background and waits until it has said that everything works, which
/// it does by writing to its stdout and then closing it.
fn detach(cx: &Context, layout: &Layout) -> Result<()> {
    let io = |verb: &str, e: &std::io::Error| CommandError::io(verb, "the background process", e);
    let program =
        std::env::current_exe().map_err(|e| CommandError::io("finding", "this program", &e))?;
    let arguments = std::env::args_os().skip(1).map(|a| {
        if a == "--detach" {
            "--detached".into()
        } else {
            a
        }
    });
    let mut child = Command::new(program)
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .map_err(|e| io("starting", &e))?;
    let mut text = String::new();
    if let Some(mut out) = child.stdout.take() {
        out.read_to_string(&mut text)
            .map_err(|e| io("reading from", &e))?;
    }
    if text.is_empty() {
        let status = child.wait().map_err(|e| io("waiting for", &e))?;
        // It has said why on our stderr.
        let code = status
            .code()
            .and_then(|c| u8::try_from(c).ok())
            .unwrap_or(70);
        return Err(CommandError::silent(code));
    }
    cx.ui.print(text)?;
    cx.ui.say(format_args!(
        "process {} runs in the background; its log is {}",
        child.id(),
        layout.log().display()
    ));
    Ok(())
}

/// Lets stdout and stderr go to the log from now on.
fn move_output(layout: &Layout) -> Result<File> {
    let path = layout.log();
    let io = |e: std::io::Error| CommandError::io("writing to", path.display(), &e);
    let log = File::options()
        .create(true)
        .append(true)
        .open(&path)
        .map_err(io)?;
    dup2_stderr(&log).map_err(|e| io(e.into()))?;
    dup2_stdout(&log).map_err(|e| io(e.into()))?;
    Ok(log)
}

/// The store directory of the store in the layout, or the default one.
pub(crate) fn store_dir_of(cx: &Context, layout: &Layout) -> Result<StoreDir> {
    if is_store(&layout.store) {
        Ok(cx.open()?.store_dir().clone())
    } else {
        Ok(StoreDir::default())
    }
}
