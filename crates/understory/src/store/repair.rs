//! Repair: damaged content is fetched again.
//!
//! Which paths are hurt says a scrub of the same process, which also makes the castore's writer store again
//! what lies in damaged frames. A path is fetched from the sources in order of their priority; its NAR must have
//! the hash and size of the row, so no signature is needed. Then the damaged packs are written anew without what
//! was superseded ([`Store::drop_damaged`]); until then reads take the good copies.

use super::{CollectOptions, CollectReport, Store, StoredPath};
use crate::add::ingest_nar_with;
use crate::daemon::Reporter;
use crate::nar::{HashRequest, ReadOptions, hash_node};
use crate::settings::Settings;
use crate::substitute::{Sink, Substituters};
use crate::{Error, Result};
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::io::BufRead;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use understory_castore::store::CollectStep;
use understory_castore::{Node, Whole};
use understory_nix::worker::WireRealisation;
use understory_nix::{PathInfo, StorePath};

/// Rows looked at at once.
const ROWS_MAX: usize = 1000;

/// What became of a repair.
#[derive(Debug, Default)]
pub struct Repaired {
    /// Paths whose content is right again.
    pub repaired: Vec<StorePath>,
    /// Paths that are damaged still, and why.
    pub failed: BTreeMap<StorePath, Error>,
}

impl Store {
    /// Names the paths that need something that is missing, or that a scrub of this process has found damaged.
    ///
    /// # Errors
    /// I/O, a row is damaged.
    pub fn hurt_paths(&self) -> Result<BTreeSet<StorePath>> {
        let mut whole = Whole::new(self.castore());
        let mut hurt = BTreeSet::new();
        let mut after = 0;
        loop {
            let rows = self.list(after, ROWS_MAX)?;
            let Some(last) = rows.last() else {
                return Ok(hurt);
            };
            after = last.id;
            for row in &rows {
                if !whole.is_whole(&row.root)? {
                    hurt.insert(row.info.path.clone());
                }
            }
        }
    }

    /// Fetches `paths` again from the sources that `settings` names, and stores what is damaged of them. Durable on
    /// return.
    ///
    /// # Errors
    /// The store is open read-only, interrupted, I/O. What cannot be repaired is in the outcome.
    pub fn repair(
        &self,
        paths: &BTreeSet<StorePath>,
        settings: &Settings,
        reporter: &dyn Reporter,
    ) -> Result<Repaired> {
        self.check_writable()?;
        let mut rows = HashMap::new();
        let mut outcome = Repaired::default();
        for path in paths {
            match self.path(path)? {
                Some(row) => drop(rows.insert(path.clone(), row)),
                None => drop(outcome.failed.insert(path.clone(), self.not_valid(path))),
            }
        }
        // The row says what the content must be.
        let settings = Settings {
            require_signatures: false,
            substitute: true,
            ..settings.clone()
        };
        let cache = tempfile::tempdir()
            .map_err(|e| Error::io("making a directory in", std::env::temp_dir(), e))?;
        let sources = Substituters::new(&settings, self.store_dir(), cache.path())?;
        let sink = RepairSink { store: self, rows };
        let wanted: BTreeSet<StorePath> = sink.rows.keys().cloned().collect();
        let fetched = sources.substitute(&wanted, &sink, reporter)?;
        outcome.failed.extend(
            fetched
                .failed
                .into_iter()
                .filter(|(path, _)| wanted.contains(path)),
        );
        for path in fetched.substituted {
            let Some(row) = sink.rows.get(&path) else {
                continue;
            };
            match self.verify_row(row) {
                Ok(()) => outcome.repaired.push(path),
                Err(error) => drop(outcome.failed.insert(path, error)),
            }
        }
        Ok(outcome)
    }

    /// Reads a path and compares its NAR with the row.
    fn verify_row(&self, row: &StoredPath) -> Result<()> {
        let found = hash_node(self.castore(), &row.root, HashRequest::None)?;
        if found.nar_hash == row.info.nar_hash && found.nar_size == row.info.nar_size {
            return Ok(());
        }
        Err(Error::corrupt(format!(
            "path '{}': expected hash '{}', stored '{}'",
            self.store_dir().print(&row.info.path),
            row.info.nar_hash,
            found.nar_hash
        )))
    }

    /// Writes packs anew in which this process has found damage, without what is damaged and stored elsewhere.
    ///
    /// # Errors
    /// As [`Store::reclaim`].
    pub fn drop_damaged(
        &self,
        watch: &mut dyn FnMut(CollectStep) -> Result<()>,
    ) -> Result<CollectReport> {
        let options = CollectOptions {
            dead_permille_min: u32::MAX,
            damaged: true,
            ..CollectOptions::default()
        };
        self.reclaim(&options, &BTreeSet::new(), watch)
    }
}

/// Takes archives of paths that are valid already.
struct RepairSink<'a> {
    store: &'a Store,
    rows: HashMap<StorePath, Arc<StoredPath>>,
}

impl Sink for RepairSink<'_> {
    type Content = Node;

    /// All but those that are repaired: references are not fetched.
    fn valid(&self, paths: &[StorePath]) -> Result<HashSet<StorePath>> {
        Ok(paths
            .iter()
            .filter(|path| !self.rows.contains_key(*path))
            .cloned()
            .collect())
    }

    fn receive(
        &self,
        info: &PathInfo,
        archive: &mut dyn BufRead,
        bytes: &AtomicU64,
        _reporter: &dyn Reporter,
    ) -> Result<Node> {
        let row = self
            .rows
            .get(&info.path)
            .ok_or_else(|| self.store.not_valid(&info.path))?;
        let options = ReadOptions {
            bytes: Some(bytes),
            ..ReadOptions::default()
        };
        ingest_nar_with(self.store, &row.info, archive, &options)
    }

    fn publish(&self, paths: Vec<(PathInfo, Node)>) -> Result<()> {
        let ours = paths
            .into_iter()
            .filter_map(|(info, root)| Some((self.rows.get(&info.path)?.info.clone(), root)));
        self.store.republish(ours.collect())
    }

    fn register(&self, _realisation: &WireRealisation) -> Result<()> {
        Ok(())
    }
}
