//! Collection of path infos: Nix's semantics for a store that builds nothing.
//!
//! Alive are the roots, temporary ones and the needs of registered overlay stores included, and all that they refer to. Everything happens under
//! `gc.lock` (so no temporary root appears meanwhile) and, when something is deleted, in one write
//! transaction (so no path is published meanwhile): rows go referrers first, all or none. Content is
//! not touched: what no row needs any more is reclaimed by `reclaim.rs`.
//!
//! Cost: one scan of `paths` and `refs` by number; memory about 40 bytes per path and 16 per reference
//! that is dead.

use super::db::{Database, parse_path};
use super::queries::id_of;
use super::roots::GcLock;
use super::{GcAction, GcReport, Store};
use crate::{Error, Result};
use rusqlite::Connection;
use rustix::fs::FlockOperation;
use std::collections::{BTreeSet, HashMap, HashSet};
use understory_nix::StorePath;

/// A collection that has begun; ends when it is dropped.
pub(crate) struct Collection<'a> {
    store: &'a Store,
    _lock: GcLock,
}

impl Collection<'_> {
    /// Dead paths that may go together and have just more than `bytes_max` bytes of NARs, as if `generation`, which is
    /// mounted, needed nothing.
    pub(crate) fn dead_but_for(
        &self,
        generation: Option<u64>,
        bytes_max: u64,
    ) -> Result<BTreeSet<StorePath>> {
        let roots = self.store.roots_but(generation)?;
        let proceed = || Ok(());
        self.store
            .db()
            .read_snapshot(|connection| {
                let order = dead_paths(connection, &roots, bytes_max, &proceed)?;
                let chosen: HashSet<i64> = order.into_iter().collect();
                names_where(connection, &proceed, |id| chosen.contains(&id))
            })
            .map(|report| report.paths)
    }

    /// Deletes those of `paths` that are dead.
    pub(crate) fn delete(&self, paths: &BTreeSet<StorePath>) -> Result<GcReport> {
        let action = GcAction::DeleteAmong {
            paths: paths.iter().cloned().collect(),
            referrers: false,
            skip_alive: true,
            freed_bytes_max: u64::MAX,
        };
        self.store.release_room()?;
        let roots = self.store.roots_but(None)?;
        self.store.collect_from(&roots, &action, &|| Ok(()))
    }
}

impl Store {
    /// Collects path infos; content is reclaimed later. Freed bytes are NAR sizes.
    ///
    /// # Errors
    /// `Cannot delete path '…' since it is still alive…`: nothing is deleted then.
    pub fn collect(&self, action: &GcAction) -> Result<GcReport> {
        self.collect_with(action, &|| Ok(()))
    }

    /// Like [`Store::collect`]; `check` is asked now and then whether to go on. Nothing is deleted if it says
    /// no.
    ///
    /// # Errors
    /// As [`Store::collect`], and those of `check`.
    pub fn collect_with(
        &self,
        action: &GcAction,
        check: &dyn Fn() -> Result<()>,
    ) -> Result<GcReport> {
        if self.is_read_only() && !matches!(action, GcAction::ReturnLive | GcAction::ReturnDead) {
            self.check_writable()?;
        }
        if !matches!(action, GcAction::ReturnLive | GcAction::ReturnDead) {
            crate::adopt::refuse_deletion(self.dir())?;
            self.release_room()?;
        }
        let _exclusive = if self.is_read_only() {
            None
        } else {
            Some(self.lock_gc(FlockOperation::LockExclusive)?)
        };
        self.collect_from(&self.roots_but(None)?, action, check)
    }

    /// Keeps others from collecting and from making temporary roots.
    pub(crate) fn begin_collection(&self) -> Result<Collection<'_>> {
        self.check_writable()?;
        crate::adopt::refuse_deletion(self.dir())?;
        let lock = self.lock_gc(FlockOperation::LockExclusive)?;
        Ok(Collection {
            store: self,
            _lock: lock,
        })
    }

    /// All roots, without what only that mounted generation needs.
    fn roots_but(&self, generation: Option<u64>) -> Result<Vec<StorePath>> {
        let permanent = self.permanent_roots()?.into_iter();
        let temporary = self.temporary_roots_but(!self.is_read_only(), generation)?;
        let mut roots: Vec<StorePath> = permanent.chain(temporary).map(|(_, path)| path).collect();
        roots.extend(self.overlay_roots()?);
        Ok(roots)
    }

    fn collect_from(
        &self,
        roots: &[StorePath],
        action: &GcAction,
        check: &dyn Fn() -> Result<()>,
    ) -> Result<GcReport> {
        match action {
            GcAction::ReturnLive => self.db().read_snapshot(|connection| {
                let live = live_ids(connection, roots, check)?;
                names_where(connection, check, |id| live.contains(&id))
            }),
            GcAction::ReturnDead => self.db().read_snapshot(|connection| {
                let live = live_ids(connection, roots, check)?;
                names_where(connection, check, |id| !live.contains(&id))
            }),
            GcAction::DeleteDead { freed_bytes_max } => self.delete(check, |connection| {
                dead_paths(connection, roots, *freed_bytes_max, check)
            }),
            GcAction::DeleteSpecific { paths } => self.delete(check, |connection| {
                let live = live_ids(connection, roots, check)?;
                let mut asked = HashMap::new();
                for path in paths {
                    if let Some(id) = id_of(connection, path)? {
                        asked.insert(id, path);
                    }
                }
                // Alive for this purpose: what a root reaches, and what a path refers to that is
                // not to go as well.
                for (id, path) in asked
                    .iter()
                    .map(|(id, path)| (*id, *path))
                    .collect::<std::collections::BTreeMap<_, _>>()
                {
                    if live.contains(&id) || !referrers_are_among(connection, id, &asked)? {
                        return Err(self.still_alive(path));
                    }
                }
                let dead = asked.keys().map(|id| (*id, 0)).collect();
                referrers_first(connection, &dead)
            }),
            GcAction::DeleteAmong {
                paths,
                referrers,
                skip_alive,
                freed_bytes_max,
            } => self.delete(check, |connection| {
                let live = live_ids(connection, roots, check)?;
                let mut named = Vec::new();
                for path in paths {
                    if let Some(id) = id_of(connection, path)? {
                        named.push((id, path));
                    }
                }
                let mut among: HashMap<i64, u64> = HashMap::new();
                let mut open: Vec<i64> = named.iter().map(|(id, _)| *id).collect();
                while let Some(id) = open.pop() {
                    check()?;
                    // What is alive may have referrers without number, and stays.
                    if live.contains(&id) || among.contains_key(&id) {
                        continue;
                    }
                    among.insert(id, size_of(connection, id)?);
                    if *referrers {
                        open.extend(referrers_of(connection, id)?);
                    }
                }
                while let Some(kept) = with_other_referrers(connection, &among, check)? {
                    for id in kept {
                        among.remove(&id);
                    }
                }
                if !skip_alive
                    && let Some((_, path)) = named.iter().find(|(id, _)| !among.contains_key(id))
                {
                    return Err(self.still_alive(path));
                }
                let order = referrers_first(connection, &among)?;
                Ok(until_freed(order, &among, *freed_bytes_max))
            }),
        }
    }

    fn still_alive(&self, path: &StorePath) -> Error {
        Error::user(format!(
            "Cannot delete path '{}' since it is still alive. To find out why, use: \
             nix-store --query --roots and nix-store --query --referrers",
            self.store_dir().print(path)
        ))
    }

    /// Deletes the rows that `choose` names, in its order.
    fn delete(
        &self,
        check: &dyn Fn() -> Result<()>,
        choose: impl FnOnce(&Connection) -> Result<Vec<i64>>,
    ) -> Result<GcReport> {
        let mut order = Vec::new();
        let report = self.db().write(|transaction| {
            let ids = choose(transaction)?;
            if ids.is_empty() {
                return Ok(GcReport::default());
            }
            transaction.will_change_rows();
            let mut report = GcReport::default();
            for id in ids {
                check()?;
                let (name, size): (String, i64) = transaction
                    .prepare_cached("select base_name, nar_size from paths where id = ?1")?
                    .query_row([id], |row| Ok((row.get(0)?, row.get(1)?)))?;
                // References first: one to itself would otherwise forbid the deletion.
                transaction
                    .prepare_cached("delete from refs where referrer = ?1")?
                    .execute([id])?;
                transaction
                    .prepare_cached("delete from paths where id = ?1")?
                    .execute([id])?;
                let path = parse_path(&name)?;
                order.push(path.clone());
                report.paths.insert(path);
                report.freed_bytes = report.freed_bytes.saturating_add(size.unsigned_abs());
            }
            Ok(report)
        })?;
        if !order.is_empty() {
            for path in &order {
                self.inner.rows.remove(path);
            }
            self.tell_observers(|observer| observer.deleted(&order));
        }
        Ok(report)
    }
}

/// Numbers of all valid paths that `roots` reach.
fn live_ids(
    connection: &Connection,
    roots: &[StorePath],
    check: &dyn Fn() -> Result<()>,
) -> Result<HashSet<i64>> {
    let mut live = HashSet::new();
    let mut open = Vec::new();
    for root in roots {
        if let Some(id) = id_of(connection, root)?
            && live.insert(id)
        {
            open.push(id);
        }
    }
    let mut statement =
        connection.prepare_cached("select reference from refs where referrer = ?1")?;
    while let Some(id) = open.pop() {
        check()?;
        let mut rows = statement.query([id])?;
        while let Some(row) = rows.next()? {
            let reference = row.get(0)?;
            if live.insert(reference) {
                open.push(reference);
            }
        }
    }
    Ok(live)
}

/// What `roots` do not reach, referrers first, until it frees just more than `bytes_max`.
fn dead_paths(
    connection: &Connection,
    roots: &[StorePath],
    bytes_max: u64,
    check: &dyn Fn() -> Result<()>,
) -> Result<Vec<i64>> {
    let live = live_ids(connection, roots, check)?;
    let mut dead = HashMap::new();
    Database::for_each_path(connection, |id, _, size| {
        check()?;
        if !live.contains(&id) {
            dead.insert(id, size);
        }
        Ok(())
    })?;
    let order = referrers_first(connection, &dead)?;
    Ok(until_freed(order, &dead, bytes_max))
}

fn names_where(
    connection: &Connection,
    check: &dyn Fn() -> Result<()>,
    wanted: impl Fn(i64) -> bool,
) -> Result<GcReport> {
    let mut paths = BTreeSet::new();
    Database::for_each_path(connection, |id, name, _| {
        check()?;
        if wanted(id) {
            paths.insert(parse_path(name)?);
        }
        Ok(())
    })?;
    Ok(GcReport {
        paths,
        freed_bytes: 0,
    })
}

/// As much of `order` as frees just more than `bytes_max`.
fn until_freed(mut order: Vec<i64>, sizes: &HashMap<i64, u64>, bytes_max: u64) -> Vec<i64> {
    let mut freed = 0_u64;
    let enough = order.iter().position(|id| {
        freed = freed.saturating_add(sizes[id]);
        freed > bytes_max
    });
    if let Some(index) = enough {
        order.truncate(index + 1);
    }
    order
}

fn size_of(connection: &Connection, id: i64) -> Result<u64> {
    let size: i64 = connection
        .prepare_cached("select nar_size from paths where id = ?1")?
        .query_row([id], |row| row.get(0))?;
    Ok(size.unsigned_abs())
}

fn referrers_of(connection: &Connection, id: i64) -> Result<Vec<i64>> {
    let mut statement =
        connection.prepare_cached("select referrer from refs where reference = ?1")?;
    let ids = statement.query_map([id], |row| row.get(0))?;
    Ok(ids.collect::<Result<_, _>>()?)
}

/// Those of `set` that something outside of it refers to; `None` if there are none.
fn with_other_referrers(
    connection: &Connection,
    set: &HashMap<i64, u64>,
    check: &dyn Fn() -> Result<()>,
) -> Result<Option<Vec<i64>>> {
    let mut found = Vec::new();
    for id in set.keys() {
        check()?;
        if !referrers_are_among(connection, *id, set)? {
            found.push(*id);
        }
    }
    Ok((!found.is_empty()).then_some(found))
}

/// True if all transitive referrers of `id` are among `set`.
fn referrers_are_among<T>(connection: &Connection, id: i64, set: &HashMap<i64, T>) -> Result<bool> {
    // Direct ones are enough: each of the set is asked about in turn.
    let mut statement =
        connection.prepare_cached("select referrer from refs where reference = ?1")?;
    let mut rows = statement.query([id])?;
    while let Some(row) = rows.next()? {
        if !set.contains_key(&row.get(0)?) {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Orders `dead` so that each comes after all its referrers. Every referrer of a dead path is dead.
fn referrers_first(connection: &Connection, dead: &HashMap<i64, u64>) -> Result<Vec<i64>> {
    let mut references: HashMap<i64, Vec<i64>> = HashMap::new();
    let mut referrers: HashMap<i64, u64> = HashMap::with_capacity(dead.len());
    let mut statement =
        connection.prepare_cached("select reference from refs where referrer = ?1")?;
    for id in dead.keys().copied() {
        let mut rows = statement.query([id])?;
        while let Some(row) = rows.next()? {
            let reference = row.get(0)?;
            if reference != id && dead.contains_key(&reference) {
                references.entry(id).or_default().push(reference);
                *referrers.entry(reference).or_default() += 1;
            }
        }
    }
    let mut ready: Vec<i64> = dead
        .keys()
        .copied()
        .filter(|id| !referrers.contains_key(id))
        .collect();
    ready.sort_unstable();
    let mut order = Vec::with_capacity(dead.len());
    while let Some(id) = ready.pop() {
        order.push(id);
        for reference in references.remove(&id).unwrap_or_default() {
            if let Some(count) = referrers.get_mut(&reference) {
                *count -= 1;
                if *count == 0 {
                    ready.push(reference);
                }
            }
        }
    }
    if order.len() == dead.len() {
        return Ok(order);
    }
    // Publication refuses cycles, so the database did not come from us.
    Err(Error::corrupt(
        "the references in the store's database form a cycle",
    ))
}
