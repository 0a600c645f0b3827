//! Reclaiming the space of content that no path needs: the castore's collection, with the rows as roots.
//!
//! Rows are deleted by [`Store::collect`]; this frees what only deleted rows needed, and what was added
//! but never published. It runs beside everything, mounts and overlays included: no valid path is touched.

use super::{Store, StoredPath};
use crate::{Error, Result};
use std::collections::BTreeSet;
use understory_castore::store::{CollectOptions, CollectReport, CollectStep};
use understory_castore::{CastoreError, Node};
use understory_nix::StorePath;

/// Rows read at once.
const ROWS_MAX: usize = 1000;

/// Why paths are kept.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Keepers {
    /// Paths that permanent roots name.
    pub permanent: u64,
    /// Paths that running processes have made temporary roots: clients, imports, mounted generations.
    pub temporary: u64,
    /// Paths that registered overlay stores need.
    pub overlays: u64,
}

impl Store {
    /// Frees the space of content that no valid path needs; see [`understory_castore::Castore::collect`].
    /// A dry run may ask what would be freed if paths had been deleted: `without`.
    ///
    /// # Errors
    /// The store is open read-only, another collection is at work, a path's directories or chunk lists cannot
    /// be read (nothing is deleted then), I/O, full disk, and those of `watch`.
    pub fn reclaim(
        &self,
        options: &CollectOptions,
        without: &BTreeSet<StorePath>,
        watch: &mut dyn FnMut(CollectStep) -> Result<()>,
    ) -> Result<CollectReport> {
        if !options.dry_run {
            self.check_writable()?;
        }
        if !options.dry_run && !without.is_empty() {
            return Err(Error::internal("paths were left out of a real collection"));
        }
        if !options.dry_run {
            self.release_room()?;
        }
        let collected = self.castore().collect::<Error>(
            &mut |each| self.for_each_root(without, each),
            options,
            watch,
        );
        if !options.dry_run {
            self.reserve_room();
        }
        collected
    }

    fn for_each_root(
        &self,
        without: &BTreeSet<StorePath>,
        each: &mut dyn FnMut(&Node) -> Result<(), CastoreError>,
    ) -> Result<()> {
        let mut after = 0;
        loop {
            let rows = self.list(after, ROWS_MAX)?;
            let Some(last) = rows.last() else {
                return Ok(());
            };
            after = last.id;
            for row in rows.iter().filter(|row| !without.contains(&row.info.path)) {
                each(&row.root).map_err(|error| self.cannot_mark(row, error))?;
            }
        }
    }

    fn cannot_mark(&self, row: &StoredPath, error: CastoreError) -> Error {
        match error {
            CastoreError::Missing { .. } | CastoreError::Corrupt { .. } => Error::corrupt(format!(
                "what path '{}' needs cannot be told, so nothing is deleted",
                self.store_dir().print(&row.info.path)
            ))
            .with_source(error)
            .with_hint("mend it with `understory check --repair-from URL`, or delete it"),
            other => other.into(),
        }
    }

    /// What keeps paths from being collected, in numbers.
    ///
    /// # Errors
    /// I/O; the database of an overlay store cannot be read.
    pub fn keepers(&self) -> Result<Keepers> {
        let count = |roots: Vec<StorePath>| roots.into_iter().collect::<BTreeSet<_>>().len() as u64;
        let targets =
            |roots: Vec<(_, StorePath)>| roots.into_iter().map(|(_, path)| path).collect();
        Ok(Keepers {
            permanent: count(targets(self.permanent_roots()?)),
            temporary: count(targets(self.temporary_roots(false)?)),
            overlays: count(self.overlay_roots()?),
        })
    }
}
