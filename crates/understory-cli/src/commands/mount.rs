//! `mount`: the live mount alone.

use crate::context::Context;
use crate::error::{CommandError, Result};
use crate::signals;
use std::path::PathBuf;
use std::sync::mpsc;
use understory::mount::{LiveMount, LiveOptions};
use understory::{config, up};

/// Mount the store's paths read-only (foreground)
///
/// Shows what the store holds, also what is added later. Ends and unmounts on SIGINT or SIGTERM, or
/// when it is unmounted with umount or fusermount3 -u.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// An existing directory
    mountpoint: PathBuf,
    /// Only this user may look inside
    #[arg(long)]
    not_others: bool,
    /// Threads that serve requests; 0 = by the number of cores
    #[arg(long, value_name = "N", default_value_t = 0)]
    threads: usize,
}

pub(crate) fn run(args: &Args, cx: &Context) -> Result<()> {
    let store = cx.open()?;
    let at = config::absolute(&args.mountpoint)?;
    let (to, ends) = mpsc::channel();
    signals::forward(to.clone())?;
    let options = LiveOptions {
        threads: args.threads,
        allow_other: !args.not_others,
        ..LiveOptions::default()
    };
    let live = LiveMount::mount(&store, &at, &options)?;
    tracing::info!(at = %at.display(), "mounted");
    up::notify_ready(&format!("mounted on {}", at.display()));
    std::thread::scope(|scope| -> Result<()> {
        let live = &live;
        std::thread::Builder::new()
            .name("unmounted".into())
            .spawn_scoped(scope, move || {
                live.wait();
                // The receiver may be gone: then we are unmounting already.
                let _ = to.send(0);
            })
            .map_err(|e| CommandError::io("starting", "a thread", &e))?;
        // An error cannot be: one sender is in the thread above until it has sent.
        let _ = ends.recv();
        up::notify_stopping();
        Ok(live.unmount()?)
    })
}
