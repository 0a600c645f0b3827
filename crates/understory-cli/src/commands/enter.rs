//! The hidden command that `shell` and `demo` run themselves with: changes namespaces while the
//! process has one thread, then becomes the user's command.

use crate::env;
use crate::error::{CommandError, Result};
use std::ffi::OsString;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use understory::config::Layout;
use understory::namespace;
use understory::overlay_url::OverlayUrl;
use understory_nix::StoreDir;

/// Its name.
pub(crate) const NAME: &str = "__enter";

/// Internal
#[derive(Debug, clap::Parser)]
#[command(name = NAME)]
pub(crate) struct Args {
    /// Process whose user and mount namespaces are joined first
    #[arg(long)]
    join: Option<u32>,
    /// Directory to show, and where
    #[arg(long, num_args = 2, value_names = ["SOURCE", "TARGET"])]
    place: Vec<PathBuf>,
    /// Empty directory on which a new root may be built
    #[arg(long)]
    scratch: PathBuf,
    /// What becomes of this process
    #[arg(last = true, required = true)]
    command: Vec<OsString>,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    if let Some(pid) = args.join {
        namespace::join(pid)?;
    }
    namespace::enter_mount_namespace()?;
    let pairs: Vec<(PathBuf, PathBuf)> = args
        .place
        .chunks_exact(2)
        .map(|pair| (pair[0].clone(), pair[1].clone()))
        .collect();
    namespace::place(&pairs, &args.scratch)?;
    let program = &args.command[0];
    let error = Command::new(program).args(&args.command[1..]).exec();
    Err(CommandError::io(
        "running",
        program.to_string_lossy(),
        &error,
    ))
}

/// Makes the command line for a command that sees the merged store of an instance at its store
/// directory, with the environment that makes Nix use it.
pub(crate) fn command(
    join: Option<u32>,
    layout: &Layout,
    url: &OverlayUrl,
    store_dir: &StoreDir,
    run: &[OsString],
) -> Result<Command> {
    let program =
        std::env::current_exe().map_err(|e| CommandError::io("finding", "this program", &e))?;
    let mut command = Command::new(program);
    command
        .arg(NAME)
        .arg("--scratch")
        .arg(layout.run.join("root"));
    if let Some(pid) = join {
        command.arg("--join").arg(pid.to_string());
    }
    command
        .arg("--place")
        .arg(&layout.merged)
        .arg(store_dir.as_str());
    // On a machine without Nix its state belongs where programs look for it.
    let nix_var = Path::new("/nix/var/nix");
    if store_dir == &StoreDir::default() && !nix_var.exists() {
        command.arg("--place").arg(&layout.nix_state).arg(nix_var);
    }
    command.arg("--").args(run);
    let mut config = "extra-experimental-features = nix-command\n".to_owned();
    if let Some(before) = env::var(env::NIX_CONFIG) {
        config.push_str(&before.to_string_lossy());
    }
    command
        .env(env::NIX_REMOTE, url.remote_at_store_dir(layout))
        .env(env::NIX_CONFIG, config)
        .env(env::STORE, &layout.store)
        .env(env::SHELL_MARK, &layout.store);
    Ok(command)
}
