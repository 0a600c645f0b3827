//! `shell`: a command that sees the merged store at its store directory.

use crate::commands::enter;
use crate::commands::up::{End, LayoutArgs, enter_namespace, start, store_dir_of};
use crate::context::Context;
use crate::env;
use crate::error::{CommandError, Result};
use crate::settings::SettingsArgs;
use rustix::process::{Pid, Signal};
use std::ffi::OsString;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::Command;
use understory::config::Layout;
use understory::control::Client;
use understory::overlay_url::OverlayUrl;
use understory::up::Instance;
use understory_nix::StoreDir;

/// Run a command with the merged store at its store directory
///
/// In a private mount namespace: nothing changes for other processes, and /nix need not exist on this
/// machine. Nix inside uses the overlay store (NIX_REMOTE), whatever its version. If an instance of `up` runs, its
/// mounts are used; else one is started for as long as the command runs.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    layout: LayoutArgs,
    /// Keep nothing of what is added on top: the upper layer lies in memory
    #[arg(long)]
    ephemeral: bool,
    /// The command and its arguments [default: $SHELL]
    #[arg(
        trailing_var_arg = true,
        allow_hyphen_values = true,
        value_name = "CMD"
    )]
    command: Vec<OsString>,
    #[command(flatten)]
    settings: SettingsArgs,
}

pub(crate) fn run(args: &Args, cx: &Context) -> Result<()> {
    let command = match args.command.is_empty() {
        false => args.command.clone(),
        true => vec![env::var(env::SHELL).unwrap_or_else(|| "/bin/sh".into())],
    };
    let layout = cx.layout(&args.layout.options())?;
    if !args.ephemeral
        && let Some(mut client) = Client::connect(&layout.control())?
    {
        let status = client.status()?;
        return in_running(&layout, &status, &command);
    }
    let scratch = if args.ephemeral {
        Some(scratch_directory()?)
    } else {
        None
    };
    let code = with_instance(
        args,
        cx,
        &layout,
        scratch.as_ref().map(tempfile::TempDir::path),
        &command,
    )?;
    if code == 0 {
        Ok(())
    } else {
        Err(CommandError::silent(code))
    }
}

/// Becomes the command in the namespaces of a running instance.
fn in_running(
    layout: &Layout,
    status: &understory::control::Status,
    command: &[OsString],
) -> Result<()> {
    let Some(overlay) = status.overlays.first() else {
        return Err(CommandError::environment(
            "the running instance has no overlay",
        ));
    };
    let store_dir = StoreDir::new(&status.store_dir)?;
    let layout = Layout {
        merged: overlay.clone(),
        ..layout.clone()
    };
    let layout = match &status.overlay_socket {
        Some(socket) => Layout {
            overlay_socket: socket.clone(),
            ..layout
        },
        None => return Err(CommandError::environment(
            "the running instance serves no overlay store",
        )
        .hint("it is of an older version: restart it with `understory down` and `understory up`")),
    };
    let url = OverlayUrl::of(&layout, &store_dir)?;
    let error = enter::command(Some(status.pid), &layout, &url, &store_dir, command)?.exec();
    Err(CommandError::io("running", "this program", &error))
}

/// Runs the command beside an instance of its own; returns its exit code.
fn with_instance(
    args: &Args,
    cx: &Context,
    layout: &Layout,
    scratch: Option<&Path>,
    command: &[OsString],
) -> Result<u8> {
    let mut layout = layout.clone();
    let settings = args.settings.resolve()?;
    enter_namespace(true)?;
    if let Some(dir) = scratch {
        rustix::mount::mount(
            "tmpfs",
            dir,
            "tmpfs",
            rustix::mount::MountFlags::empty(),
            c"mode=755",
        )
        .map_err(|e| CommandError::io("mounting a tmpfs on", dir.display(), &e.into()))?;
        let mut options = args.layout.options();
        options.state = Some(dir.to_owned());
        layout = cx.layout(&options)?;
    }
    let dir = store_dir_of(cx, &layout)?;
    let (instance, ends) = start(&layout, dir.as_str(), settings, Vec::new())?;
    let code = run_beside(&instance, ends, command)?;
    instance.stop()?;
    Ok(code)
}

/// Runs a command in its own mount namespace while `instance` lives. Signals go to the command.
pub(crate) fn run_beside(
    instance: &Instance,
    ends: std::sync::mpsc::Receiver<End>,
    command: &[OsString],
) -> Result<u8> {
    let mut child: Command = enter::command(
        None,
        instance.layout(),
        instance.url(),
        instance.store().store_dir(),
        command,
    )?;
    let mut child = child
        .spawn()
        .map_err(|e| CommandError::io("running", "this program", &e))?;
    let pid = Pid::from_child(&child);
    std::thread::Builder::new()
        .name("pass-signals".into())
        .spawn(move || {
            // The terminal's SIGINT reaches the command by itself; a SIGTERM or `down` is passed on.
            while let Ok(end) = ends.recv() {
                if !matches!(end, End::Signal(signal_hook::consts::SIGINT))
                    && let Err(error) = rustix::process::kill_process(pid, Signal::TERM)
                {
                    tracing::debug!(%error, "ending the command");
                }
            }
        })
        .map_err(|e| CommandError::io("starting", "a thread", &e))?;
    let status = child
        .wait()
        .map_err(|e| CommandError::io("waiting for", "the command", &e))?;
    let code = status
        .code()
        .or(status.signal().map(|s| 128 + s))
        .unwrap_or(1);
    Ok(u8::try_from(code).unwrap_or(1))
}

/// A directory to mount a tmpfs on; its name has only characters that a store URL may hold.
pub(crate) fn scratch_directory() -> Result<tempfile::TempDir> {
    tempfile::Builder::new()
        .prefix("understory-")
        .tempdir()
        .map_err(|e| CommandError::io("creating", "a temporary directory", &e))
}
