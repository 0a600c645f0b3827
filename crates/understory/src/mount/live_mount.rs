//! A mounted live file system: a session that shows a store, and what keeps it up to date.

use super::connect::{Connection, shake_hands};
use super::filter::{Filtered, RowFilter};
use super::live::LiveFs;
use super::protocol::{self, DATA_BYTES_MAX, InitRequest, Notify, ROOT_NODE, Reply};
use super::session::{Session, WeakSession, thread_count};
use super::source::Source;
use super::sys;
use crate::metrics::{self, Snapshot};
use crate::store::Observer;
use crate::{Result, Store};
use std::ffi::{OsStr, OsString};
use std::path::Path;
use std::sync::Arc;
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

/// A mounted live file system. Dropping it unmounts.
pub struct LiveMount {
    session: Session<LiveFs>,
    /// Tells its gauges for as long as it is mounted.
    _figures: Arc<Figures>,
}

impl LiveMount {
    /// Mounts `store` on the directory `mountpoint`. When it returns, the mount answers.
    /// A dead mount that an earlier process of ours left there is removed first.
    ///
    /// # Errors
    /// What of the machine stands in the way, with a hint; a living mount of ours is there already.
    pub fn mount(store: &Store, mountpoint: &Path, options: &LiveOptions) -> Result<Self> {
        let mut name = OsString::from("understory:");
        name.push(store.dir());
        let source = store.clone();
        let source: Box<dyn Source> = match options.filter.clone() {
            Some(filter) => Box::new(Filtered { source, filter }),
            None => Box::new(source),
        };
        let live = Self::mount_source(source, &name, mountpoint, options)?;
        store.observe(Arc::new(Notifier(live.session.downgrade())));
        Ok(live)
    }

    pub(super) fn mount_source(
        source: Box<dyn Source>,
        name: &OsStr,
        mountpoint: &Path,
        options: &LiveOptions,
    ) -> Result<Self> {
        let request = sys::MountRequest {
            source: name,
            mountpoint,
            allow_other: options.allow_other,
            read_bytes_max: DATA_BYTES_MAX,
        };
        let threads = thread_count(options.threads);
        let connection = Connection::mount(&request, threads)?;
        let agreed = shake_hands(
            &connection.devices()[0],
            &InitRequest::live(options.read_ahead_bytes),
        )?;
        let place = connection.place();
        sys::set_read_ahead(place.device_number, options.read_ahead_bytes);
        tracing::debug!(mountpoint = %place.mountpoint.display(), minor = agreed.minor, flags = agreed.flags, "mounted");
        let fs = LiveFs::new(source, sys::owner());
        let (place, devices) = connection.into_parts();
        let session = Session::serve(fs, place, devices, threads)?;
        let figures = Arc::new(Figures(session.downgrade()));
        metrics::register(&figures);
        Ok(Self {
            session,
            _figures: figures,
        })
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
}

fn base_names(paths: &[StorePath]) -> impl Iterator<Item = &str> {
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
