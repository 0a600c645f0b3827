//! Live mounts that another process serves, as far as the kernel must be told of what this process does: the other one
//! asks the store anew, but the kernel would keep what it knows for a while.
//!
//! Cost: one system call for each mount and publication, one more for each name that is deleted.

use super::live_mount::base_names;
use super::protocol::{self, Notify, ROOT_NODE, Reply};
use super::session::NOTIFICATION_BYTES_MAX;
use crate::store::Observer;
use rustix::fd::OwnedFd;
use std::collections::BTreeMap;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use understory_nix::StorePath;

/// The mounts by name, each with a descriptor of its connection that notifications go through.
#[derive(Default)]
pub struct RemoteMounts {
    devices: Mutex<BTreeMap<String, Arc<OwnedFd>>>,
    added: Condvar,
}

impl RemoteMounts {
    /// From now on notifies this mount, too, or through this descriptor.
    pub fn add(&self, name: &str, device: OwnedFd) {
        self.lock().insert(name.to_owned(), Arc::new(device));
        self.added.notify_all();
    }

    /// Does not notify that mount any more.
    pub fn remove(&self, name: &str) {
        self.lock().remove(name);
    }

    /// Waits until that mount is known, at most `limit`; false if it is not.
    pub fn wait_for(&self, name: &str, limit: Duration) -> bool {
        let waited = self
            .added
            .wait_timeout_while(self.lock(), limit, |known| !known.contains_key(name));
        let (known, _) = waited.unwrap_or_else(PoisonError::into_inner);
        known.contains_key(name)
    }

    fn notify(&self, code: Notify, fill: impl Fn(&mut Reply)) {
        // Not while the lock is held: the kernel may let a notification wait for a reader.
        let devices: Vec<_> = self.lock().values().cloned().collect();
        for device in devices {
            let mut notification = Reply::new(NOTIFICATION_BYTES_MAX);
            fill(&mut notification);
            if let Err(errno) = rustix::io::write(&*device, notification.notification(code)) {
                tracing::trace!("{code:?}: {errno}");
            }
        }
    }

    /// What was listed of the root before is old.
    pub(crate) fn root_changed(&self) {
        self.notify(Notify::InvalidateInode, |n| {
            protocol::invalidate_attributes(ROOT_NODE, n);
        });
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, Arc<OwnedFd>>> {
        self.devices.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Observer for RemoteMounts {
    fn published(&self, _paths: &[StorePath]) {
        self.root_changed();
    }
    fn deleted(&self, paths: &[StorePath]) {
        self.root_changed();
        for name in base_names(paths) {
            self.notify(Notify::InvalidateEntry, |n| {
                protocol::invalidate_entry(ROOT_NODE, name.as_bytes(), n);
            });
        }
    }
}
