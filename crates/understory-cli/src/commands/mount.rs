//! `mount`: the live mount alone.

use crate::context::Context;
use crate::error::{CommandError, Result};
use crate::{resolve, signals};
use std::ffi::OsString;
use std::path::PathBuf;
use std::sync::{Arc, mpsc};
use understory::mount::{LiveMount, LiveOptions, OnlyRows, RowFilter};
use understory::store::{StoredPath, TempRootOwner};
use understory::{Store, config, service_manager};
use understory_nix::StorePath;

/// Mount the store's paths read-only (foreground)
///
/// Shows what the store holds, also what is added later. Ends and unmounts on SIGINT or SIGTERM, or
/// when it is unmounted with umount or fusermount3 -u.
///
/// With --closure-only it shows these paths and what they need, and nothing else: not in a listing, not by
/// name, not later. They are not collected while they are mounted.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// An existing directory
    mountpoint: PathBuf,
    /// Show the closures of these paths only; they come after the directory
    #[arg(long, value_name = "PATH", num_args = 1..)]
    closure_only: Vec<OsString>,
    /// Only this user may look inside
    #[arg(long)]
    not_others: bool,
    /// Threads that serve requests; 0 = by the number of cores
    #[arg(long, value_name = "N", default_value_t = 0)]
    threads: usize,
}

pub(crate) fn run(args: &Args, cx: &Context) -> Result<()> {
    let store = cx.open_to_keep()?;
    store.castore().keep_fresh()?;
    let at = config::absolute(&args.mountpoint)?;
    let (to, ends) = mpsc::channel();
    signals::forward(to.clone())?;
    let shown = Shown::new(&store, &args.closure_only)?;
    let options = LiveOptions {
        filter: shown.filter(),
        threads: args.threads,
        allow_other: !args.not_others,
        ..LiveOptions::default()
    };
    let live = LiveMount::mount(&store, &at, &options)?;
    tracing::info!(at = %at.display(), "mounted");
    if let Some(closure) = &shown.closure {
        tracing::info!("shows {} paths and nothing else", closure.len());
    }
    service_manager::ready(&format!("mounted on {}", at.display()));
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
        service_manager::stopping();
        Ok(live.unmount()?)
    })
}

/// What is shown, kept from being collected.
struct Shown {
    closure: Option<Vec<Arc<StoredPath>>>,
    _roots: TempRootOwner,
}

impl Shown {
    fn new(store: &Store, paths: &[OsString]) -> Result<Self> {
        let roots = store.temp_root_owner()?;
        if paths.is_empty() {
            return Ok(Self {
                closure: None,
                _roots: roots,
            });
        }
        let paths = resolve::paths(store, paths)?;
        let paths: Vec<StorePath> = paths.iter().map(|row| row.info.path.clone()).collect();
        // Kept first, then looked at: what is valid now stays.
        store.add_temp_roots(&roots, &paths)?;
        Ok(Self {
            closure: Some(store.closure(&paths)?),
            _roots: roots,
        })
    }

    fn filter(&self) -> Option<Arc<dyn RowFilter>> {
        let closure = self.closure.as_ref()?;
        Some(Arc::new(OnlyRows::of(closure.iter().map(|row| &**row))))
    }
}
