//! An instance in several processes: what its supervisor prepares, and the daemon worker.

use super::{
    Instance, Parts, Sockets, create_store, make_directories, make_directory, mend, renewal,
    take_lock,
};
use crate::config::Layout;
use crate::daemon::Listener;
use crate::generation::stack::{MountMode, is_newer};
use crate::mount::RemoteMounts;
use crate::service_manager::Handed;
use crate::settings::Resolved;
use crate::supervisor::{
    Change, Held, Keeper, Order, Restored, SOCKET_CONTROL, SOCKET_LOWER, SOCKET_MOUNT,
    SOCKET_OVERLAY, Worker,
};
use crate::{Error, Result, Store, StoreOptions, mount_server, namespace};
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use understory_nix::StoreDir;

/// What a supervisor holds from the beginning.
pub struct Prepared {
    /// The instance's lock.
    pub lock: File,
    /// Its listening sockets by name.
    pub sockets: Vec<(&'static str, Listener)>,
    /// Lets systemd keep what the next supervisor needs.
    pub keeper: Option<Keeper>,
    /// What to go on with.
    pub restored: Option<Restored>,
}

/// What a user wants to know of an instance that has started.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Report {
    /// The logical store directory.
    pub store_dir: String,
    /// The castore's URL for stock Nix.
    pub lower_store: String,
    /// The overlay store's URL for stock Nix.
    pub url: String,
    /// Lines for nix.conf.
    pub nix_conf: String,
    /// What clients set `NIX_REMOTE` to.
    pub nix_remote: String,
    /// Where its metrics are served.
    pub metrics: Option<String>,
    /// True if its mounts are in a namespace of its own.
    pub private: bool,
}

/// Creates the store if there is none, takes the lock, goes on with what systemd has kept or removes what a killed
/// instance left, and listens. Clients that connect now wait for the workers. Of `handed`, sockets of socket units are
/// served instead of a socket of our own for the overlay store.
///
/// # Errors
/// Another instance runs; a foreign mount is in the way; a socket cannot be made.
pub fn prepare(
    layout: &Layout,
    store_dir: &StoreDir,
    handed: Vec<Handed>,
    mut keeper: Option<Keeper>,
) -> Result<Prepared> {
    let (kept, handed) = Keeper::split(handed);
    layout.check_sockets()?;
    create_store(layout, store_dir)?;
    make_directory(&layout.run)?;
    let lock = take_lock(layout)?;
    let mut restored = match &mut keeper {
        Some(keeper) => keeper.restore(kept, layout).unwrap_or_else(|error| {
            tracing::warn!("{}: everything is mounted anew", error.chain());
            None
        }),
        None => {
            Keeper::refuse(kept);
            None
        }
    };
    // Nothing may look at the mounts while nobody serves them.
    if restored.is_none() {
        for what in mend(layout)? {
            tracing::warn!("removed {what}");
        }
    }
    let mut sockets = restored
        .as_mut()
        .map_or_else(Vec::new, |restored| std::mem::take(&mut restored.sockets));
    for socket in handed {
        sockets.push((SOCKET_OVERLAY, Listener::from_handed(socket)?));
    }
    let private = |path: &PathBuf| {
        // The lock is ours: whoever listened there is gone.
        if let Err(e) = std::fs::remove_file(path)
            && e.kind() != std::io::ErrorKind::NotFound
        {
            return Err(Error::io("removing", path, e));
        }
        Listener::bind_with_mode(path, 0o600)
    };
    let is_there = |sockets: &[(&str, Listener)], name| sockets.iter().any(|(n, _)| *n == name);
    if !is_there(&sockets, SOCKET_LOWER) {
        sockets.push((SOCKET_LOWER, Listener::bind(&layout.socket)?));
    }
    if !is_there(&sockets, SOCKET_CONTROL) {
        sockets.push((SOCKET_CONTROL, private(&layout.control())?));
    }
    if !is_there(&sockets, SOCKET_MOUNT) {
        sockets.push((SOCKET_MOUNT, private(&layout.mount_control())?));
    }
    if !is_there(&sockets, SOCKET_OVERLAY) {
        sockets.push((SOCKET_OVERLAY, Listener::bind(&layout.overlay_socket)?));
    }
    if layout.state != layout.store {
        // So that processes that add to the store find instances with a state directory elsewhere.
        let run = layout.store.join("run");
        let path = run.join(format!("control-{}.sock", std::process::id()));
        match make_directory(&run).and_then(|()| private(&path)) {
            Ok(listener) => sockets.push((SOCKET_CONTROL, listener)),
            Err(error) => tracing::warn!(
                error = %error.chain(),
                "other processes cannot tell this instance of paths that they add"
            ),
        }
    }
    Ok(Prepared {
        lock,
        sockets,
        keeper,
        restored,
    })
}

/// Takes the descriptor that notifications for a mount go through.
fn add(remotes: &RemoteMounts, held: Held) {
    if let Some(device) = held.descriptors.into_iter().next() {
        remotes.add(&held.name, device);
    }
}

/// The daemon worker: serves the sockets and owns the overlay, until it is told to end. `mode` is what the overlay shall stand
/// on.
///
/// # Errors
/// What keeps it from starting, or went wrong at the end.
pub fn serve_daemon(mut worker: Worker, settings: Resolved, mode: MountMode) -> Result<()> {
    let layout = worker.layout().clone();
    make_directories(&layout)?;
    let store = Store::open(&layout.store, &StoreOptions::default())?;
    let live = worker
        .take_held(mount_server::HELD_LIVE)
        .ok_or_else(|| Error::internal("the daemon was started without a live mount"))?;
    let listeners = |sockets: Vec<_>| sockets.into_iter().map(Listener::from_socket).collect();
    let sockets = Sockets {
        lower: listeners(worker.take_sockets(SOCKET_LOWER)),
        overlay: listeners(worker.take_sockets(SOCKET_OVERLAY)),
        controls: Some(worker.take_sockets(SOCKET_CONTROL)),
    };
    let remotes = Arc::new(RemoteMounts::default());
    let newer = worker
        .take_all_held()
        .into_iter()
        .filter(|held| is_newer(&held.name));
    for held in [live].into_iter().chain(newer) {
        add(&remotes, held);
    }
    let changed = Arc::clone(&remotes);
    worker.on_change(move |change| match change {
        Change::Held(held) => add(&changed, held),
        Change::Forgotten(name) => changed.remove(&name),
    });
    // First of the observers: the live mounts show it before anybody looks through an overlay.
    store.observe(remotes.clone());
    let may_renew = settings.settings.image_renew && !namespace::in_user_namespace();
    let renewal = renewal::Options {
        mode,
        renews: may_renew && mode != MountMode::Live,
        thresholds: settings.settings.thresholds(),
        remotes,
    };
    let (line, upgrader) = (worker.line(), worker.line());
    let mut instance = Instance::serve(Parts {
        layout,
        store,
        live: None,
        lock: None,
        pid: worker.supervisor(),
        sockets,
        settings,
        renewal: Some(renewal),
        on_stop: Box::new(move || line.ask_stop()),
        on_upgrade: Some(Box::new(move |program| upgrader.ask_upgrade(program))),
    })?;
    worker.line().ready(&instance.report(), None)?;
    if worker.wait() == Order::Stop {
        return instance.stop();
    }
    // A stop may come while clients are still served.
    let stopped = AtomicBool::new(false);
    let mut ended = Ok(());
    std::thread::scope(|scope| {
        std::thread::Builder::new()
            .name("stop".into())
            .spawn_scoped(scope, || {
                if worker.wait() == Order::Stop {
                    stopped.store(true, Ordering::SeqCst);
                }
            })
            .map_err(|e| Error::environment("starting a thread").with_source(e))?;
        instance.drain(|| stopped.load(Ordering::SeqCst));
        ended = instance.teardown();
        // The thread waits for an order that nobody gives any more.
        if let Err(error) = &ended {
            worker.line().failed(error);
        }
        std::process::exit(i32::from(ended.is_err()));
    })
}

impl Instance {
    /// What a user wants to know of it.
    pub fn report(&self) -> Report {
        Report {
            store_dir: self.store.store_dir().to_string(),
            lower_store: self.url.lower(),
            url: self.url.to_string(),
            nix_conf: self.url.nix_conf(),
            nix_remote: self.shared.remote.clone(),
            metrics: self.status().metrics,
            private: namespace::in_user_namespace(),
        }
    }
}
