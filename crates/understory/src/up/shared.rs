//! What the control socket of an instance and the observers of its store use.

use super::{lock, renewal};
use crate::config::Layout;
use crate::control::{self, Collected, Observed, Published, Status};
use crate::mount::RemoteMounts;
use crate::mount::overlay::OverlayMount;
use crate::store::Observer;
use crate::{Error, Result, daemon, namespace};
use std::ffi::OsStr;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, Weak};
use understory_nix::{StoreDir, StorePath};

/// What the control socket and the store's observer use.
pub(super) struct Shared {
    pub(super) pid: u32,
    pub(super) layout: Layout,
    /// Where the mount server answers, if that is another process.
    pub(super) mount_control: Option<PathBuf>,
    pub(super) started: u64,
    pub(super) store: PathBuf,
    pub(super) store_dir: StoreDir,
    pub(super) lower: PathBuf,
    pub(super) socket: PathBuf,
    pub(super) upper: PathBuf,
    pub(super) url: String,
    pub(super) remote: String,
    pub(super) overlay_socket: PathBuf,
    pub(super) lowers: Vec<String>,
    pub(super) overlays: Mutex<Vec<OverlayMount>>,
    pub(super) published: AtomicU64,
    pub(super) remounts: AtomicU64,
    /// Paths that came after the generation that the overlay stands on.
    pub(super) newer_paths: AtomicU64,
    /// None if the live mount is served here.
    pub(super) remotes: Option<Arc<RemoteMounts>>,
    /// To the thread that collects.
    pub(super) orders: OnceLock<Arc<renewal::Orders>>,
    pub(super) metrics: Mutex<Option<String>>,
    pub(super) on_stop: Box<dyn Fn() + Send + Sync>,
    pub(super) on_upgrade: Option<Box<Upgrade>>,
}

/// Passes on that a client asks for an upgrade.
pub(super) type Upgrade = dyn Fn(Option<PathBuf>) + Send + Sync;

impl control::Handler for Shared {
    fn status(&self) -> Status {
        Status {
            pid: self.pid,
            version: env!("CARGO_PKG_VERSION").into(),
            started: self.started,
            store: self.store.clone(),
            store_dir: self.store_dir.to_string(),
            lower: self.lower.clone(),
            socket: self.socket.clone(),
            overlays: lock(&self.overlays)
                .iter()
                .map(|o| o.merged().to_owned())
                .collect(),
            upper: Some(self.upper.clone()),
            url: Some(self.url.clone()),
            overlay_socket: Some(self.overlay_socket.clone()),
            nix_remote: Some(self.remote.clone()),
            lowers: self.lowers.clone(),
            private: namespace::in_user_namespace(),
            published: self.published.load(Ordering::Relaxed),
            remounts: self.remounts.load(Ordering::Relaxed),
            metrics: lock(&self.metrics).clone(),
        }
    }
    fn metrics(&self) -> Observed {
        Observed {
            metrics: self.snapshot(),
            clients: daemon::clients(),
            generations: self.generations(),
        }
    }
    fn stop(&self) {
        (self.on_stop)();
    }
    fn upgrade(&self, program: Option<PathBuf>) -> Result<()> {
        match &self.on_upgrade {
            Some(upgrade) => {
                upgrade(program);
                Ok(())
            }
            None => Err(Error::user(
                "this instance serves by itself and cannot be upgraded while it runs",
            )),
        }
    }
    fn published(&self, names: &[String]) -> Result<Published> {
        // Names come from outside: nothing but store paths is looked up.
        for name in names {
            StorePath::from_base_name(name)?;
        }
        if let Some(remotes) = &self.remotes {
            remotes.root_changed();
        }
        self.show(names.iter().map(String::as_str))
    }
    fn collect(&self, freed_bytes_max: u64) -> Result<Collected> {
        let orders = self.orders.get().ok_or_else(|| {
            Error::environment(match &self.remotes {
                Some(_) => "it has just begun",
                None => "it serves by itself and deletes nothing while it runs",
            })
        })?;
        let report = orders.collect(freed_bytes_max)?;
        Ok(Collected {
            paths: report.paths.len() as u64,
            freed_bytes: report.freed_bytes,
        })
    }
}

impl Shared {
    /// Looks each name up through each overlay; remounts the overlay when one is hidden.
    pub(super) fn show<'a>(
        &self,
        names: impl Iterator<Item = &'a str> + Clone,
    ) -> Result<Published> {
        let mut done = Published::default();
        for overlay in lock(&self.overlays).iter() {
            let mut hidden = Vec::new();
            for name in names.clone() {
                done.looked_up += 1;
                if overlay.is_hidden(OsStr::new(name))? {
                    hidden.push(name);
                }
            }
            let Some(name) = hidden.first() else { continue };
            overlay.remount()?;
            done.remounts += 1;
            for still in &hidden {
                if !overlay.is_hidden(OsStr::new(still))? {
                    continue;
                }
                return Err(Error::environment(format!(
                    "{still} is in {} but hidden in {}, even after a remount",
                    self.lower.display(),
                    overlay.merged().display()
                ))
                .with_hint(format!(
                    "is there a whiteout of that name in {}?",
                    self.upper.display()
                )));
            }
            tracing::debug!(%name, overlay = %overlay.merged().display(), "remounted: the name was hidden");
        }
        let total = names.count() as u64;
        self.published.fetch_add(total, Ordering::Relaxed);
        self.remounts.fetch_add(done.remounts, Ordering::Relaxed);
        Ok(done)
    }
}

/// The instance's own observer: what its daemon publishes is visible before the client is answered.
pub(super) struct Told(pub(super) Weak<Shared>);
impl Observer for Told {
    fn published(&self, paths: &[StorePath]) {
        if let Some(shared) = self.0.upgrade()
            && let Err(error) = shared.show(paths.iter().map(StorePath::base_name))
        {
            tracing::error!("{}", error.chain());
        }
    }
    fn deleted(&self, _paths: &[StorePath]) {}
}
