//! Many paths one after another, published many at once: one sync of content and database for all of
//! them. Used for AddMultipleToStore.
//!
//! Invariant: what is published refers to nothing but what is valid or published with it. Clients send
//! references first, so that mostly nothing has to wait.

use super::{ReadOptions, ingest_nar_with};
use crate::daemon::PathSource;
use crate::nar::skip_nar;
use crate::store::TempRootOwner;
use crate::{Result, Store};
use std::collections::{BTreeSet, HashSet};
use std::io::BufRead;
use understory_castore::Node;
use understory_nix::{PathInfo, StorePath};

/// Paths that are published together.
const PATHS_MAX: usize = 2_000;
/// NAR bytes after which they are published even if they are fewer, so that an interrupted upload
/// of large paths is not for nothing.
const NAR_BYTES_MAX: u64 = 1 << 30;

/// Paths on their way into the castore. What was not published when it is dropped never was there.
pub struct Batch<'a> {
    store: &'a Store,
    owner: &'a TempRootOwner,
    repair: bool,
    pending: Vec<(PathInfo, Node)>,
    names: HashSet<StorePath>,
    nar_bytes: u64,
}

impl<'a> Batch<'a> {
    /// Begins one. With `repair` the content of valid paths is replaced.
    pub fn new(store: &'a Store, owner: &'a TempRootOwner, repair: bool) -> Self {
        Self {
            store,
            owner,
            repair,
            pending: Vec::new(),
            names: HashSet::new(),
            nar_bytes: 0,
        }
    }

    /// Reads exactly one NAR and keeps the path for publication; it is a temporary root from now on. If it
    /// is valid already the NAR is read and thrown away. Signatures are the caller's concern.
    ///
    /// # Errors
    /// As [`add_nar`](super::add_nar); the batch can be used further, if the stream can.
    pub fn add(&mut self, info: PathInfo, archive: &mut dyn BufRead) -> Result<()> {
        self.store.add_temp_root(self.owner, &info.path)?;
        if !self.repair && (self.is_pending(&info.path) || self.store.is_valid(&info.path)?) {
            return skip_nar(archive).map(drop);
        }
        let root = ingest_nar_with(self.store, &info, archive, &ReadOptions::default())?;
        self.nar_bytes += info.nar_size;
        self.names.insert(info.path.clone());
        self.pending.push((info, root));
        Ok(())
    }

    /// True if the path was added and is not published yet.
    pub fn is_pending(&self, path: &StorePath) -> bool {
        self.names.contains(path)
    }

    /// True if it is time to publish.
    pub fn is_full(&self) -> bool {
        self.pending.len() >= PATHS_MAX || self.nar_bytes >= NAR_BYTES_MAX
    }

    /// Publishes what refers only to what is valid or published with it. Returns true if nothing is left.
    ///
    /// # Errors
    /// Database or disk; nothing is published then.
    pub fn publish_closed(&mut self) -> Result<bool> {
        let outside: BTreeSet<&StorePath> = self
            .pending
            .iter()
            .flat_map(|(info, _)| &info.references)
            .filter(|reference| !self.names.contains(reference))
            .collect();
        let outside: Vec<StorePath> = outside.into_iter().cloned().collect();
        let mut there: HashSet<StorePath> = self.store.valid_paths(&outside)?.into_iter().collect();
        there.extend(self.names.iter().cloned());
        loop {
            let before = there.len();
            for (info, _) in &self.pending {
                if there.contains(&info.path) && !info.references.iter().all(|r| there.contains(r))
                {
                    there.remove(&info.path);
                }
            }
            if there.len() == before {
                break;
            }
        }
        let (ready, rest) = std::mem::take(&mut self.pending)
            .into_iter()
            .partition(|(info, _)| there.contains(&info.path));
        self.pending = rest;
        self.publish(ready)?;
        Ok(self.pending.is_empty())
    }

    /// Publishes all that is left.
    ///
    /// # Errors
    /// A reference that neither is valid nor was added; nothing of this last publication is there then.
    pub fn finish(mut self) -> Result<()> {
        let all = std::mem::take(&mut self.pending);
        self.publish(all)
    }

    fn publish(&mut self, paths: Vec<(PathInfo, Node)>) -> Result<()> {
        self.nar_bytes = self.pending.iter().map(|(info, _)| info.nar_size).sum();
        self.names = self
            .pending
            .iter()
            .map(|(info, _)| info.path.clone())
            .collect();
        if self.repair {
            self.store.republish(paths)
        } else {
            self.store.publish(paths)
        }
    }
}

/// Adds all paths of `source`; `check` judges each before its archive is read.
///
/// # Errors
/// The first of a path; what was published before stays.
pub fn add_multiple(
    store: &Store,
    owner: &TempRootOwner,
    source: &mut dyn PathSource,
    repair: bool,
    check: &mut dyn FnMut(&PathInfo) -> Result<()>,
) -> Result<()> {
    let mut batch = Batch::new(store, owner, repair);
    while let Some(info) = source.next()? {
        check(&info)?;
        batch.add(info, source.archive())?;
        if batch.is_full() && batch.publish_closed()? {
            source.release();
        }
    }
    batch.finish()
}
