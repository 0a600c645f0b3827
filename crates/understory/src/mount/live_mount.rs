//! A mounted live file system: a session that shows a store, and what keeps it up to date.

use super::connect::{Connection, Handover, shake_hands};
use super::filter::{Filtered, RowFilter};
use super::live::LiveFs;
use super::protocol::{self, DATA_BYTES_MAX, InitRequest, Notify, ROOT_NODE, Reply};
use super::session::{Serve, Session, WeakSession, thread_count};
use super::source::Source;
use super::sys;
use super::table::NodeTable;
use crate::metrics::{self, Snapshot};
use crate::store::Observer;
use crate::{Error, Result, Store};
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ffi::{OsStr, OsString};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use understory_nix::StorePath;

/// How to mount.
#[derive(Debug, Clone)]
pub struct LiveOptions {
    /// Threads that serve requests; 0 = as many as cores, at most 4, and one more.
    pub threads: usize,
    /// Users other than the mounter may look inside. `fusermount3` may not permit it; it is then left out.
    pub allow_other: bool,
    /// Bytes that the kernel reads ahead of a sequential reader; taken as far as permissions go.
    pub read_ahead_bytes: u32,
    /// What is shown of the store; `None` for all.
    pub filter: Option<Arc<dyn RowFilter>>,
}

impl Default for LiveOptions {
    fn default() -> Self {
        Self {
            threads: 0,
            allow_other: true,
            read_ahead_bytes: 1 << 20,
            filter: None,
        }
    }
}

/// A mounted live file system. Dropping it unmounts, unless its descriptors are held elsewhere.
pub struct LiveMount {
    session: Session<LiveFs>,
    handover: Handover,
    /// Tells its gauges for as long as it is mounted.
    _figures: Arc<Figures>,
}

/// What of a live mount outlives its server, to be held by another process.
pub struct LiveHandover<'a> {
    /// What the next server must know.
    pub state: &'a Handover,
    /// The memory of its nodes, then the device's descriptors.
    pub descriptors: Vec<BorrowedFd<'a>>,
}

/// Gives a live mount to who keeps it. It is kept when this returns, whatever becomes of this process.
pub type HoldLive<'a> = &'a mut dyn FnMut(&LiveHandover<'_>) -> Result<()>;

impl LiveMount {
    /// Mounts `store` on the directory `mountpoint`. When it returns, the mount answers.
    /// A dead mount that an earlier process of ours left there is removed first.
    ///
    /// # Errors
    /// What of the machine stands in the way, with a hint; a living mount of ours is there already.
    pub fn mount(store: &Store, mountpoint: &Path, options: &LiveOptions) -> Result<Self> {
        Self::mount_source(
            source_of(store, options),
            &name_of(store),
            mountpoint,
            options,
        )
        .map(|live| live.observing(store))
    }

    /// As [`LiveMount::mount`], but what outlives the server is given to `hold` before anything is served, and the
    /// mount stays when this is dropped.
    ///
    /// # Errors
    /// As [`LiveMount::mount`], or those of `hold`.
    pub fn mount_held(
        store: &Store,
        mountpoint: &Path,
        options: &LiveOptions,
        hold: HoldLive<'_>,
    ) -> Result<Self> {
        Self::begin(
            source_of(store, options),
            &name_of(store),
            mountpoint,
            options,
            &InitRequest::live(options.read_ahead_bytes),
            Some(hold),
        )
        .map(|live| live.observing(store))
    }

    /// Serves a mount whose server is dead. `descriptors` are those that it had given to `hold`, which is called
    /// again if there are others to keep. With `refuse_resent`, requests that the dead server had read are
    /// answered with EIO.
    ///
    /// # Errors
    /// What was held is not of this version.
    pub fn take_over(
        store: &Store,
        state: &Handover,
        descriptors: Vec<OwnedFd>,
        options: &LiveOptions,
        refuse_resent: bool,
        hold: HoldLive<'_>,
    ) -> Result<Self> {
        Self::go_on(
            source_of(store, options),
            state,
            descriptors,
            options,
            refuse_resent,
            hold,
        )
        .map(|live| live.observing(store))
    }

    pub(super) fn mount_source(
        source: Box<dyn Source>,
        name: &OsStr,
        mountpoint: &Path,
        options: &LiveOptions,
    ) -> Result<Self> {
        let init = InitRequest::live(options.read_ahead_bytes);
        Self::begin(source, name, mountpoint, options, &init, None)
    }

    pub(super) fn begin(
        source: Box<dyn Source>,
        name: &OsStr,
        mountpoint: &Path,
        options: &LiveOptions,
        init: &InitRequest,
        hold: Option<HoldLive<'_>>,
    ) -> Result<Self> {
        let request = sys::MountRequest {
            source: name,
            mountpoint,
            allow_other: options.allow_other,
            read_bytes_max: DATA_BYTES_MAX,
        };
        let threads = thread_count(options.threads);
        let table = NodeTable::create()?;
        let connection = Connection::mount(&request, threads)?;
        let agreed = shake_hands(&connection.devices()[0], init)?;
        let place = connection.place();
        sys::set_read_ahead(place.device_number, options.read_ahead_bytes);
        tracing::debug!(mountpoint = %place.mountpoint.display(), minor = agreed.minor, flags = agreed.flags, "mounted");
        let handover = Session::<LiveFs>::handover(place, agreed);
        let serve = Serve {
            threads,
            held: hold.is_some(),
            refuse_resent: false,
        };
        if let Some(hold) = hold {
            hold(&to_hold(&handover, &table, connection.devices()))?;
        }
        let fs = LiveFs::new(source, sys::owner(), table);
        let (place, devices) = connection.into_parts();
        Ok(Self::of(
            Session::serve(fs, place, devices, serve)?,
            handover,
        ))
    }

    pub(super) fn go_on(
        source: Box<dyn Source>,
        state: &Handover,
        mut descriptors: Vec<OwnedFd>,
        options: &LiveOptions,
        refuse_resent: bool,
        hold: HoldLive<'_>,
    ) -> Result<Self> {
        if descriptors.len() < 2 {
            return Err(Error::internal(format!(
                "a live mount is handed over with two descriptors or more, found {}",
                descriptors.len()
            )));
        }
        let table = NodeTable::take_over(descriptors.remove(0))?;
        let kept = table
            .file()
            .try_clone()
            .map_err(|e| Error::environment("duplicating a descriptor").with_source(e))?;
        let fs = LiveFs::new(source, sys::owner(), table);
        tracing::info!(
            takeover = fs.takeovers(),
            nodes = fs.inode_count(),
            "taking over {}",
            state.mountpoint().display()
        );
        let serve = Serve {
            threads: options.threads,
            held: true,
            refuse_resent,
        };
        let mut hold_all = |state: &Handover, devices: &[OwnedFd]| {
            let mut all = vec![kept.as_fd()];
            all.extend(devices.iter().map(AsFd::as_fd));
            hold(&LiveHandover {
                state,
                descriptors: all,
            })
        };
        Ok(Self::of(
            Session::take_over(fs, state, descriptors, serve, &mut hold_all)?,
            state.clone(),
        ))
    }

    fn of(session: Session<LiveFs>, handover: Handover) -> Self {
        let figures = Arc::new(Figures(session.downgrade()));
        metrics::register(&figures);
        Self {
            session,
            handover,
            _figures: figures,
        }
    }

    fn observing(self, store: &Store) -> Self {
        store.observe(Arc::new(Notifier(self.session.downgrade())));
        self
    }

    /// What another server must know of it.
    pub fn handover(&self) -> &Handover {
        &self.handover
    }

    /// How many servers have taken it over so far.
    pub fn takeovers(&self) -> u64 {
        self.session.handler().takeovers()
    }

    /// How long the request takes that has been worked on longest.
    pub fn busy_for(&self) -> Duration {
        self.session.busy_for()
    }

    /// Where it is mounted; canonical.
    pub fn mountpoint(&self) -> &Path {
        &self.session.place().mountpoint
    }

    /// Major and minor number of its `st_dev`.
    pub fn device(&self) -> (u32, u32) {
        self.session.place().device_number
    }

    /// Inodes that the kernel holds of it.
    pub fn inode_count(&self) -> usize {
        self.session.handler().inode_count()
    }

    /// True while it is at its place, where one can see it.
    pub fn is_mounted(&self) -> bool {
        self.session.place().is_mounted()
    }

    /// True while requests are served.
    pub fn is_serving(&self) -> bool {
        self.session.is_serving()
    }

    /// Takes names out of sight that another process has deleted from the store. What this process
    /// publishes and deletes is shown without a word.
    pub fn deleted(&self, paths: &[StorePath]) {
        self.session.downgrade().names_gone(base_names(paths));
    }

    /// Waits until it is unmounted, by [`LiveMount::unmount`] on another thread or by someone else.
    pub fn wait(&self) {
        self.session.wait();
    }

    /// What the observer of a real store does.
    #[cfg(test)]
    pub(super) fn announce(&self, gone: &[&str]) {
        self.session.downgrade().names_gone(gone.iter().copied());
    }

    /// Unmounts and stops serving, within a second: while files are in use, the mount is taken out of
    /// sight and their readers get errors. An overlay on top must be unmounted before. Does nothing
    /// when it is unmounted already.
    ///
    /// # Errors
    /// Not permitted; the mount then stays, but is served no more.
    pub fn unmount(&self) -> Result<()> {
        self.session.unmount()
    }

    /// Takes the mount out of sight, but goes on serving who still uses it, such as an overlay in a namespace of its own.
    /// True if nobody does any more: then it has ended.
    ///
    /// # Errors
    /// Not permitted.
    pub fn let_go(&self) -> Result<bool> {
        self.session.let_go()
    }
}

fn source_of(store: &Store, options: &LiveOptions) -> Box<dyn Source> {
    let source = store.clone();
    match options.filter.clone() {
        Some(filter) => Box::new(Filtered { source, filter }),
        None => Box::new(source),
    }
}

fn name_of(store: &Store) -> OsString {
    let mut name = OsString::from("understory:");
    name.push(store.dir());
    name
}

fn to_hold<'a>(
    state: &'a Handover,
    table: &'a NodeTable,
    devices: &'a [OwnedFd],
) -> LiveHandover<'a> {
    let mut descriptors = vec![table.file().as_fd()];
    descriptors.extend(devices.iter().map(AsFd::as_fd));
    LiveHandover { state, descriptors }
}

pub(super) fn base_names(paths: &[StorePath]) -> impl Iterator<Item = &str> {
    paths.iter().map(StorePath::base_name)
}

impl WeakSession<LiveFs> {
    /// Makes the next listing of the root a new one, and the kernel drop these names of the root and all below.
    fn names_gone<'a>(&self, names: impl Iterator<Item = &'a str>) {
        self.with(|fs, notify| {
            fs.root_changed();
            let root = |n: &mut Reply| protocol::invalidate_attributes(ROOT_NODE, n);
            notify(Notify::InvalidateInode, &root);
            for name in names {
                notify(Notify::InvalidateEntry, &|n| {
                    protocol::invalidate_entry(ROOT_NODE, name.as_bytes(), n);
                });
            }
        });
    }
}

/// What a snapshot of the metrics asks of a live mount.
struct Figures(WeakSession<LiveFs>);

impl metrics::Source for Figures {
    fn collect(&self, out: &mut Snapshot) {
        self.0.with(|fs, _| {
            out.gauge(
                "understory_fuse_inodes",
                "Inodes that the kernel holds of a mount.",
                &[("mount", "live")],
                fs.inode_count() as u64,
            );
        });
    }
}

/// Tells the kernel what this process publishes and deletes.
struct Notifier(WeakSession<LiveFs>);

impl Observer for Notifier {
    fn published(&self, _paths: &[StorePath]) {
        self.0.names_gone(std::iter::empty());
    }
    fn deleted(&self, paths: &[StorePath]) {
        self.0.names_gone(base_names(paths));
    }
}
