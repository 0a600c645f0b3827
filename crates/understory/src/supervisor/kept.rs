//! What systemd keeps for an instance, so that the supervisor itself may end: its file-descriptor store.
//!
//! The bound sockets and all that is held for workers are stored, each descriptor under a name of its own, when
//! everything works, and last of all the *record*: a sealed memory file that lists them and says whose they are. When
//! something changes, what is new is stored, then a new record, and only then what is not listed any more is removed,
//! the old record first; so there is a record beside all that it lists, whenever the supervisor ends. (Descriptors that
//! are stored already are not stored again under another name. Where mount servers give them away again, on kernels that
//! cannot resend, the old record is removed first.) The next supervisor is started with the descriptors and goes on with
//! those of the newest record that is whole, understood and right ([`Keeper::restore`]); if there is none, all is
//! dropped, and it starts afresh.
//!
//! The lock is not stored: that it is free says that all processes of the instance are gone.
//!
//! Cost: some thirty datagrams at a start, as many removals at an end.

use super::Bundle;
use super::channel::{DESCRIPTORS_MAX, HeldNote, PROTOCOL};
use crate::config::Layout;
use crate::daemon::{Bound, Listener};
use crate::generation::stack;
use crate::mount::Handover;
use crate::service_manager::{self, Handed};
use crate::{Error, Result};
use rustix::fd::{AsFd, OwnedFd};
use rustix::fs::{MemfdFlags, SealFlags};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs::File;
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixListener;

/// How names of what is stored begin.
const PREFIX: &str = "understory-";
/// How names of records begin; a number follows, but for those of version 0.1.
const RECORD: &str = "understory-record";
/// Version of the record.
const FORMAT: u32 = 1;
/// Longest record: the states of what is held, each of which fits a message of 128 KiB.
const RECORD_BYTES_MAX: u64 = 1 << 20;

/// Lets systemd keep what an instance needs.
#[derive(Debug)]
pub struct Keeper {
    /// Most descriptors that it keeps.
    capacity: usize,
    /// Names of what it keeps.
    names: Vec<String>,
    /// A record is stored beside all that it lists.
    is_whole: bool,
    /// Number of the next bundle or record that is stored.
    next: u64,
}

/// What an instance goes on with whose supervisor is gone.
pub struct Restored {
    /// Its sockets by name.
    pub sockets: Vec<(&'static str, Listener)>,
    pub(super) held: Vec<Bundle>,
    pub(super) resend: Option<bool>,
}

/// What is stored, for who goes on with it.
#[derive(Serialize, Deserialize)]
struct Record {
    #[serde(flatten)]
    head: Head,
    layout: Layout,
    sockets: Vec<Socket>,
    held: Vec<Stored>,
    resend: Option<bool>,
}

/// What every version of the record begins with.
#[derive(Serialize, Deserialize)]
struct Head {
    format: u32,
    /// Of the messages to workers, whose states are among what is held.
    protocol: u32,
    /// Of the program, for people.
    version: String,
}

#[derive(Serialize, Deserialize)]
struct Socket {
    name: String,
    bound: Bound,
}

#[derive(Serialize, Deserialize)]
struct Stored {
    note: HeldNote,
    /// Of its descriptors.
    names: Vec<String>,
}

impl Keeper {
    /// Made if systemd keeps descriptors for this service (`FDSTORE`).
    pub fn of_environment() -> Option<Self> {
        let capacity = service_manager::store_capacity();
        (capacity > 0).then(|| Self {
            capacity,
            names: Vec::new(),
            is_whole: false,
            next: 0,
        })
    }

    /// Splits what a process was started with into what an earlier supervisor has let systemd keep, and the rest.
    pub fn split(handed: Vec<Handed>) -> (Vec<Handed>, Vec<Handed>) {
        handed
            .into_iter()
            .partition(|handed| handed.name.starts_with(PREFIX))
    }

    /// Goes on with what was kept. The caller has the instance's lock. `None` if nothing was.
    ///
    /// # Errors
    /// Why it cannot be gone on with. All of it is dropped then; mounts may be there that nobody serves.
    pub fn restore(&mut self, kept: Vec<Handed>, layout: &Layout) -> Result<Option<Restored>> {
        if kept.is_empty() {
            return Ok(None);
        }
        self.names = kept.iter().map(|handed| handed.name.clone()).collect();
        let numbers = self.names.iter().filter_map(|name| number_of(name));
        self.next = numbers.max().map_or(0, |number| number + 1);
        let restored = self.take(kept, layout);
        match &restored {
            Ok(restored) => {
                self.is_whole = true;
                tracing::info!(
                    sockets = restored.sockets.len(),
                    held = restored.held.len(),
                    "going on with what systemd has kept"
                );
            }
            Err(_) => self.forget(),
        }
        restored.map(Some)
    }

    fn take(&mut self, kept: Vec<Handed>, layout: &Layout) -> Result<Restored> {
        let count = kept.len();
        let mut descriptors: BTreeMap<String, OwnedFd> = kept
            .into_iter()
            .map(|handed| (handed.name, handed.descriptor))
            .collect();
        if descriptors.len() != count {
            return Err(Error::environment(
                "a name was kept twice: expected each once",
            ));
        }
        let (record_name, record) = newest_record(&mut descriptors)?;
        if record.layout != *layout {
            unmount_elsewhere(&record.layout);
            return Err(Error::environment(format!(
                "what was kept is of an instance with other places, in {}",
                record.layout.state.display()
            )));
        }
        let mut next = |name: &str| {
            descriptors
                .remove(name)
                .ok_or_else(|| Error::environment(format!("{name} was not kept")))
        };
        let mut sockets = Vec::new();
        for socket in record.sockets {
            let name = super::SOCKETS
                .into_iter()
                .find(|name| *name == socket.name)
                .ok_or_else(|| Error::environment(format!("an unknown socket {}", socket.name)))?;
            let descriptor = UnixListener::from(next(&socket_name(name))?);
            sockets.push((name, Listener::from_bound(descriptor, socket.bound)));
        }
        let mut held = Vec::new();
        for Stored { note, names } in record.held {
            let descriptors = names.iter().map(|name| next(name)).collect::<Result<_>>()?;
            held.push(Bundle {
                note,
                descriptors,
                names,
            });
        }
        // Of generations, those that an overlay stands on are needed, wherever their mounts are: what is let go of is out
        // of sight, and who uses it is served.
        for number in stack::stood_on(layout)? {
            if !held
                .iter()
                .any(|b| b.note.name == stack::newer_name(number))
            {
                return Err(Error::environment(format!(
                    "generation {number}, which the overlay stands on, was not kept"
                )));
            }
        }
        for bundle in held.iter().filter(|b| !stack::is_newer(&b.note.name)) {
            if let Some(handover) = mount_of(&bundle.note)
                && !handover.is_mounted()
            {
                return Err(Error::environment(format!(
                    "the mount on {} that was kept is there no more",
                    handover.mountpoint().display()
                )));
            }
        }
        // What was stored for a record that was not written any more comes to its end.
        drop(descriptors);
        self.remove_where(|name| {
            let listed = held.iter().flat_map(|bundle| &bundle.names);
            let sockets = sockets.iter().map(|(socket, _)| socket_name(socket));
            !listed.cloned().chain(sockets).any(|listed| listed == name) && name != record_name
        })?;
        Ok(Restored {
            sockets,
            held,
            resend: record.resend,
        })
    }

    /// Drops what was kept where nothing may be.
    pub fn refuse(kept: Vec<Handed>) {
        if kept.is_empty() {
            return;
        }
        tracing::warn!("what systemd has kept is of no use here: everything is mounted anew");
        let names = kept.iter().map(|handed| handed.name.clone()).collect();
        drop(kept);
        let mut keeper = Self {
            capacity: 0,
            names,
            is_whole: false,
            next: 0,
        };
        keeper.forget();
    }

    /// True if another supervisor could go on with everything now.
    pub(super) fn is_whole(&self) -> bool {
        self.is_whole
    }

    /// Lets systemd keep exactly this.
    pub(super) fn keep(
        &mut self,
        layout: &Layout,
        sockets: &[(&'static str, Listener)],
        held: &mut [Bundle],
        resend: Option<bool>,
    ) {
        let kept = self.try_keep(layout, sockets, held, resend);
        if let Err(error) = kept {
            tracing::warn!(
                "systemd does not keep what this process holds: {}",
                error.chain()
            );
            self.forget();
        }
    }

    fn try_keep(
        &mut self,
        layout: &Layout,
        sockets: &[(&'static str, Listener)],
        held: &mut [Bundle],
        resend: Option<bool>,
    ) -> Result<()> {
        // The second control socket bears the process id in its name.
        let sockets: Vec<_> = sockets
            .iter()
            .filter_map(|(name, listener)| Some((*name, listener, listener.bound()?.clone())))
            .filter(|(name, _, bound)| {
                *name != super::SOCKET_CONTROL || bound.is_at(&layout.control())
            })
            .collect();
        let count = sockets.len() + held.iter().map(|b| b.descriptors.len()).sum::<usize>() + 1;
        if count > self.capacity.min(DESCRIPTORS_MAX) {
            return Err(Error::environment(format!(
                "{count} descriptors are held, and it keeps {}",
                self.capacity.min(DESCRIPTORS_MAX)
            ))
            .with_hint("raise FileDescriptorStoreMax= of the service"));
        }
        let wanted = |held: &[Bundle]| -> Vec<String> {
            sockets
                .iter()
                .map(|(name, ..)| socket_name(name))
                .chain(held.iter().flat_map(|bundle| bundle.names.iter().cloned()))
                .collect()
        };
        // Both must fit for a moment, and what is stored already under an old name would not be stored again.
        if resend != Some(true) || self.names.len() + count > self.capacity {
            self.is_whole = false;
            self.remove_where(is_record)?;
            let wanted = wanted(held);
            self.remove_where(|name| !wanted.iter().any(|wanted| wanted == name))?;
        }
        for (name, listener, _) in &sockets {
            self.store(socket_name(name), listener)?;
        }
        for bundle in held.iter_mut() {
            if bundle.names.len() != bundle.descriptors.len() {
                let number = self.next;
                self.next += 1;
                bundle.names = (0..bundle.descriptors.len())
                    .map(|at| format!("{PREFIX}{number}-{}-{at}", bundle.note.name))
                    .collect();
            }
            for (name, descriptor) in bundle.names.iter().zip(&bundle.descriptors) {
                self.store(name.clone(), descriptor)?;
            }
        }
        let record = Record {
            head: Head {
                format: FORMAT,
                protocol: PROTOCOL,
                version: env!("CARGO_PKG_VERSION").into(),
            },
            layout: layout.clone(),
            sockets: sockets
                .iter()
                .map(|(name, _, bound)| Socket {
                    name: (*name).into(),
                    bound: bound.clone(),
                })
                .collect(),
            held: held
                .iter()
                .map(|bundle| Stored {
                    note: bundle.note.clone(),
                    names: bundle.names.clone(),
                })
                .collect(),
            resend,
        };
        let name = format!("{RECORD}-{}", self.next);
        self.next += 1;
        self.store(name.clone(), record.write()?)?;
        self.is_whole = true;
        self.remove_where(|stored| is_record(stored) && stored != name)?;
        let mut wanted = wanted(held);
        wanted.push(name);
        self.remove_where(|name| !wanted.iter().any(|wanted| wanted == name))?;
        tracing::debug!(count, "systemd keeps what this process holds");
        Ok(())
    }

    /// Lets systemd close all that it keeps, and waits for it: until then nothing that is dropped here comes to its end.
    pub(super) fn forget(&mut self) {
        self.is_whole = false;
        if self.names.is_empty() {
            return;
        }
        let removed = self
            .remove_where(is_record)
            .and_then(|()| self.remove_where(|_| true))
            .and_then(|()| {
                service_manager::wait_done()
                    .map_err(|e| Error::environment("waiting for systemd").with_source(e))
            });
        if let Err(error) = removed {
            tracing::warn!("{}", error.chain());
            self.names.clear();
        }
    }

    fn store(&mut self, name: String, descriptor: impl AsFd) -> Result<()> {
        if self.names.contains(&name) {
            return Ok(());
        }
        service_manager::store(&name, descriptor.as_fd())
            .map_err(|e| Error::environment(format!("storing {name}")).with_source(e))?;
        self.names.push(name);
        Ok(())
    }

    fn remove_where(&mut self, is_unwanted: impl Fn(&str) -> bool) -> Result<()> {
        let (unwanted, rest) = std::mem::take(&mut self.names)
            .into_iter()
            .partition(|name| is_unwanted(name));
        self.names = rest;
        let unwanted: Vec<String> = unwanted;
        unwanted.iter().try_for_each(|name| {
            service_manager::remove(name)
                .map_err(|e| Error::environment(format!("removing {name}")).with_source(e))
        })
    }
}

impl Record {
    /// Into a memory file that nobody can change.
    fn write(&self) -> Result<OwnedFd> {
        let failed = |e: std::io::Error| {
            Error::environment("writing the record of what is kept").with_source(e)
        };
        let text = serde_json::to_vec(self)
            .map_err(|e| Error::internal("encoding the record of what is kept").with_source(e))?;
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let file =
            rustix::fs::memfd_create("understory-record", flags).map_err(|e| failed(e.into()))?;
        let mut file = File::from(file);
        file.write_all(&text).map_err(failed)?;
        rustix::fs::fcntl_add_seals(&file, seals()).map_err(|e| failed(e.into()))?;
        Ok(file.into())
    }

    fn read(file: &File) -> Result<Self> {
        let failed = |e: std::io::Error| {
            Error::environment("reading the record of what was kept").with_source(e)
        };
        let odd = |e: serde_json::Error| {
            Error::environment("the record of what was kept is not understood").with_source(e)
        };
        let found = rustix::fs::fcntl_get_seals(file).map_err(|e| failed(e.into()))?;
        let length = file.metadata().map_err(failed)?.len();
        if !found.contains(seals()) || length > RECORD_BYTES_MAX {
            return Err(Error::environment(format!(
                "the record of what was kept is none: {length} bytes, seals {found:?}"
            )));
        }
        let mut text = vec![0; usize::try_from(length).unwrap_or(0)];
        file.read_exact_at(&mut text, 0).map_err(failed)?;
        let head: Head = serde_json::from_slice(&text).map_err(odd)?;
        if (head.format, head.protocol) != (FORMAT, PROTOCOL) {
            return Err(Error::environment(format!(
                "what was kept is of version {}: expected format {FORMAT} and protocol {PROTOCOL}, found {} and {}",
                head.version, head.format, head.protocol
            )));
        }
        serde_json::from_slice(&text).map_err(odd)
    }
}

fn seals() -> SealFlags {
    SealFlags::WRITE | SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL
}

fn socket_name(name: &str) -> String {
    format!("{PREFIX}socket-{name}")
}

fn is_record(name: &str) -> bool {
    name.starts_with(RECORD)
}

/// The number of a bundle's descriptor, or of a record.
fn number_of(name: &str) -> Option<u64> {
    let number = match name.strip_prefix(RECORD) {
        Some(rest) => rest.strip_prefix('-')?,
        None => name.strip_prefix(PREFIX)?.split_once('-')?.0,
    };
    number.parse().ok()
}

/// Takes the records out of what was kept; returns the newest beside which all is that it lists, with its name.
fn newest_record(kept: &mut BTreeMap<String, OwnedFd>) -> Result<(String, Record)> {
    let mut names: Vec<String> = kept.keys().filter(|n| is_record(n)).cloned().collect();
    names.sort_by_key(|name| std::cmp::Reverse(number_of(name)));
    let mut failed = None;
    let mut found = None;
    for name in names {
        let Some(descriptor) = kept.remove(&name) else {
            continue;
        };
        let read = Record::read(&File::from(descriptor)).and_then(|record| {
            let mut listed = record.held.iter().flat_map(|stored| &stored.names);
            match listed.find(|name| !kept.contains_key(*name)) {
                Some(name) => Err(Error::environment(format!("{name} was not kept"))),
                None => Ok(record),
            }
        });
        match read {
            Ok(record) if found.is_none() => found = Some((name, record)),
            Ok(_) => {}
            Err(error) => failed = failed.or(Some(error)),
        }
    }
    found.ok_or_else(|| {
        failed.unwrap_or_else(|| Error::environment("the record of what was kept is missing"))
    })
}

/// The FUSE mount that is held, if it is one: a worker says where it is, alone or among other things.
fn mount_of(note: &HeldNote) -> Option<Handover> {
    [Some(&note.state), note.state.get("handover")]
        .into_iter()
        .flatten()
        .find_map(|state| Handover::deserialize(state).ok())
}

/// Takes away what an instance with other places has left.
fn unmount_elsewhere(layout: &Layout) {
    if crate::doctor::is_locked(&layout.lock()) {
        return;
    }
    match crate::up::unmount_leftovers(layout) {
        Ok(removed) => removed
            .iter()
            .for_each(|what| tracing::warn!("removed {what}")),
        Err(error) => tracing::warn!("{}", error.chain()),
    }
}
