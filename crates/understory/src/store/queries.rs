//! Reading: each query sees all that was published before it began, by any process.

use super::db::{Database, ROW_BY_NAME, ROWS_AFTER, parse_path, realisation_checksum, stored_path};
use super::{CachedRow, Realisation, Store, StoredPath};
use crate::{Error, Result};
use rusqlite::Connection;
use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::sync::Arc;
use understory_nix::StorePath;
use understory_nix::worker::{DrvOutput, WireRealisation};

/// Characters of a hash part.
const HASH_PART_CHARS: usize = 32;

impl Store {
    /// The row of `path`, from memory where possible.
    pub fn path(&self, path: &StorePath) -> Result<Option<Arc<StoredPath>>> {
        let cached = self.cached(path);
        crate::metrics::path_info(cached.is_some());
        if cached.is_some() {
            return Ok(cached);
        }
        let generation = self.db().generation.stable();
        let row = self.db().read(|connection| row_of(connection, path))?;
        Ok(row.map(|row| self.remember(generation, row)))
    }

    /// Moves, and only up, when paths are deleted or their rows changed, by whichever process; not when paths are added.
    pub(crate) fn changes(&self) -> u64 {
        self.db().generation.moves()
    }

    /// Which of `paths` are valid, in the order given: one snapshot, in bulk.
    pub fn valid_paths(&self, paths: &[StorePath]) -> Result<Vec<StorePath>> {
        self.db().read_snapshot(|connection| {
            let mut statement =
                connection.prepare_cached("select 1 from paths where base_name = ?1")?;
            let mut valid = Vec::new();
            for path in paths {
                if self.cached(path).is_some() || statement.exists([path.base_name()])? {
                    valid.push(path.clone());
                }
            }
            Ok(valid)
        })
    }

    /// The rows of `paths`, in the order given: one snapshot, from memory where possible.
    pub fn paths(&self, paths: &[StorePath]) -> Result<Vec<Option<Arc<StoredPath>>>> {
        if let [path] = paths {
            return Ok(vec![self.path(path)?]);
        }
        self.db().read_snapshot(|connection| {
            // The snapshot begins with the first read, after this.
            let generation = self.db().generation.stable();
            paths
                .iter()
                .map(|path| match self.cached(path) {
                    Some(row) => Ok(Some(row)),
                    None => Ok(row_of(connection, path)?.map(|row| self.remember(generation, row))),
                })
                .collect()
        })
    }

    /// The largest row number that was ever given: grows with each publication and never falls, also when
    /// paths are deleted.
    pub fn last_id(&self) -> Result<u64> {
        self.db().read(|connection| {
            let mut statement = connection
                .prepare_cached("select seq from sqlite_sequence where name = 'paths'")?;
            let mut rows = statement.query([])?;
            Ok(match rows.next()? {
                Some(row) => row.get::<_, i64>(0)?.max(0).unsigned_abs(),
                None => 0,
            })
        })
    }

    /// True if `path` is valid.
    pub fn is_valid(&self, path: &StorePath) -> Result<bool> {
        Ok(self.path(path)?.is_some())
    }

    /// All valid paths, sorted.
    pub fn all_paths(&self) -> Result<Vec<StorePath>> {
        self.paths_of("select base_name from paths order by base_name", &[])
    }

    /// The number of valid paths.
    pub fn count(&self) -> Result<u64> {
        self.db().read(|connection| {
            let count: i64 = connection
                .prepare_cached("select count(*) from paths")?
                .query_row([], |row| row.get(0))?;
            Ok(count.unsigned_abs())
        })
    }

    /// The number of valid paths up to that row.
    pub(crate) fn count_up_to(&self, row: u64) -> Result<u64> {
        let row = i64::try_from(row).unwrap_or(i64::MAX);
        self.db().read(|connection| {
            let count: i64 = connection
                .prepare_cached("select count(*) from paths where id <= ?1")?
                .query_row([row], |row| row.get(0))?;
            Ok(count.unsigned_abs())
        })
    }

    /// Rows with id > `after`, by id, at most `count`. References of a path that was published
    /// together with it have smaller ids than it.
    pub fn list(&self, after: u64, count: usize) -> Result<Vec<Arc<StoredPath>>> {
        let after = i64::try_from(after).unwrap_or(i64::MAX);
        let count = i64::try_from(count).unwrap_or(i64::MAX);
        self.db().read(|connection| {
            let mut statement = connection.prepare_cached(&ROWS_AFTER)?;
            let mut rows = statement.query([after, count])?;
            let mut out = Vec::new();
            while let Some(row) = rows.next()? {
                out.push(Arc::new(stored_path(row)?));
            }
            Ok(out)
        })
    }

    /// The path with that 32-character hash part.
    ///
    /// # Errors
    /// `invalid hash part` if it has another length.
    pub fn path_from_hash_part(&self, hash_part: &str) -> Result<Option<StorePath>> {
        if hash_part.len() != HASH_PART_CHARS {
            return Err(Error::user("invalid hash part"));
        }
        let found = self.paths_of(
            "select base_name from paths where base_name >= ?1 order by base_name limit 1",
            &[hash_part],
        )?;
        Ok(found
            .into_iter()
            .next()
            .filter(|path| path.hash_part() == hash_part))
    }

    /// Valid paths that refer to `path` (itself included if it does).
    pub fn referrers(&self, path: &StorePath) -> Result<BTreeSet<StorePath>> {
        self.set_of(
            "select referrer.base_name from refs join paths as referrer on referrer.id = refs.referrer \
             where refs.reference = (select id from paths where base_name = ?1)",
            path,
        )
    }

    /// Valid derivations that have `path` as a statically known output.
    pub fn valid_derivers(&self, path: &StorePath) -> Result<BTreeSet<StorePath>> {
        self.set_of(
            "select paths.base_name from derivation_outputs join paths on paths.id = derivation_outputs.drv \
             where derivation_outputs.path = ?1",
            path,
        )
    }

    /// Outputs of a valid derivation; `None` as value where the path is not known yet.
    /// `Ok(None)` if the derivation is not valid.
    pub fn derivation_outputs(
        &self,
        drv: &StorePath,
    ) -> Result<Option<BTreeMap<String, Option<StorePath>>>> {
        self.db().read_snapshot(|connection| {
            let Some(id) = id_of(connection, drv)? else {
                return Ok(None);
            };
            let mut statement = connection
                .prepare_cached("select name, path from derivation_outputs where drv = ?1")?;
            let mut rows = statement.query([id])?;
            let mut outputs = BTreeMap::new();
            while let Some(row) = rows.next()? {
                let path: Option<String> = row.get(1)?;
                outputs.insert(row.get(0)?, path.as_deref().map(parse_path).transpose()?);
            }
            Ok(Some(outputs))
        })
    }

    /// A realisation by its id.
    pub fn realisation(&self, id: &str) -> Result<Option<Realisation>> {
        self.db().read(|connection| realisation_of(connection, id))
    }

    /// A realisation as daemons speak of it.
    pub(crate) fn wire_realisation(&self, id: &DrvOutput) -> Result<Option<WireRealisation>> {
        let found = self.realisation(&id.id())?;
        Ok(found.map(|found| WireRealisation {
            id: id.clone(),
            out_path: found.out_path,
            signatures: found.signatures,
        }))
    }

    /// All realisations whose output is `path`.
    pub fn realisations_of(&self, path: &StorePath) -> Result<Vec<Realisation>> {
        self.db().read_snapshot(|connection| {
            let mut statement = connection.prepare_cached(
                "select id from realisations where out_path = (select id from paths where base_name = ?1) order by id",
            )?;
            let mut rows = statement.query([path.base_name()])?;
            let mut out = Vec::new();
            while let Some(row) = rows.next()? {
                let id: String = row.get(0)?;
                out.extend(realisation_of(connection, &id)?);
            }
            Ok(out)
        })
    }

    /// The closure of `paths` (references first), in one snapshot.
    ///
    /// # Errors
    /// `path '…' is not valid`.
    pub fn closure(&self, paths: &[StorePath]) -> Result<Vec<Arc<StoredPath>>> {
        self.db().read_snapshot(|connection| {
            let generation = self.db().generation.stable();
            let mut seen = HashSet::new();
            let mut out = Vec::new();
            // Depth first: a path is put out when all its references are.
            let mut stack: Vec<(Arc<StoredPath>, Vec<StorePath>)> = Vec::new();
            for start in paths {
                let mut next = Some(start.clone());
                loop {
                    if let Some(path) = next.take()
                        && !seen.contains(&path)
                    {
                        let row = match self.cached(&path) {
                            Some(row) => row,
                            None => row_of(connection, &path)?
                                .map(|row| self.remember(generation, row))
                                .ok_or_else(|| self.not_valid(&path))?,
                        };
                        seen.insert(path);
                        let references = row.info.references.iter().rev().cloned().collect();
                        stack.push((row, references));
                    }
                    match stack.last_mut() {
                        None => break,
                        Some((_, references)) => match references.pop() {
                            Some(reference) => next = Some(reference),
                            None => out.extend(stack.pop().map(|(row, _)| row)),
                        },
                    }
                }
            }
            Ok(out)
        })
    }

    pub(super) fn cached(&self, path: &StorePath) -> Option<Arc<StoredPath>> {
        let now = self.db().generation.stable()?;
        let found = self.inner.rows.get(path)?;
        (found.generation == now).then_some(found.row)
    }

    /// Puts a row into memory; `generation` is what was stable before it was read.
    fn remember(&self, generation: Option<u64>, row: StoredPath) -> Arc<StoredPath> {
        let row = Arc::new(row);
        if let Some(generation) = generation {
            self.inner.rows.insert(
                row.info.path.clone(),
                CachedRow {
                    generation,
                    row: row.clone(),
                },
            );
        }
        row
    }

    fn paths_of(&self, sql: &str, parameters: &[&str]) -> Result<Vec<StorePath>> {
        self.db().read(|connection| {
            let mut statement = connection.prepare_cached(sql)?;
            let mut rows = statement.query(rusqlite::params_from_iter(parameters))?;
            let mut out = Vec::new();
            while let Some(row) = rows.next()? {
                out.push(parse_path(
                    row.get_ref(0)?.as_str().map_err(rusqlite::Error::from)?,
                )?);
            }
            Ok(out)
        })
    }

    fn set_of(&self, sql: &str, path: &StorePath) -> Result<BTreeSet<StorePath>> {
        Ok(self
            .paths_of(sql, &[path.base_name()])?
            .into_iter()
            .collect())
    }
}

/// The row of `path`.
pub(super) fn row_of(connection: &Connection, path: &StorePath) -> Result<Option<StoredPath>> {
    let mut statement = connection.prepare_cached(&ROW_BY_NAME)?;
    let mut rows = statement.query([path.base_name()])?;
    let Some(row) = rows.next()? else {
        return Ok(None);
    };
    let row = stored_path(row)?;
    // The index led here; a flipped bit in it would lead elsewhere.
    if row.info.path != *path {
        return Err(Error::corrupt(format!(
            "the store's database: asked for '{path}', found '{}'",
            row.info.path
        )));
    }
    Ok(Some(row))
}

/// The row number of `path`.
pub(super) fn id_of(connection: &Connection, path: &StorePath) -> Result<Option<i64>> {
    let mut statement = connection.prepare_cached("select id from paths where base_name = ?1")?;
    let mut rows = statement.query([path.base_name()])?;
    Ok(match rows.next()? {
        Some(row) => Some(row.get(0)?),
        None => None,
    })
}

/// A realisation by its id.
pub(super) fn realisation_of(connection: &Connection, id: &str) -> Result<Option<Realisation>> {
    let mut statement = connection.prepare_cached(
        "select paths.base_name, realisations.signatures, realisations.checksum from realisations \
         join paths on paths.id = realisations.out_path where realisations.id = ?1",
    )?;
    let mut rows = statement.query([id])?;
    let Some(row) = rows.next()? else {
        return Ok(None);
    };
    let out_path = parse_path(row.get_ref(0)?.as_str().map_err(rusqlite::Error::from)?)?;
    let signatures: Option<String> = row.get(1)?;
    if row.get::<_, i64>(2)? != realisation_checksum(id, &out_path, signatures.as_deref()) {
        return Err(Error::corrupt(format!(
            "the store's database: the row of realisation '{id}' does not have its checksum"
        )));
    }
    let signatures = signatures.iter().flat_map(|all| all.split(' '));
    Ok(Some(Realisation {
        id: id.to_owned(),
        out_path,
        signatures: signatures.map(str::to_owned).collect(),
    }))
}

impl Database {
    /// Calls `visit` with (id, base name, NAR size) of every path, by id, inside a snapshot.
    pub(super) fn for_each_path(
        connection: &Connection,
        mut visit: impl FnMut(i64, &str, u64) -> Result<()>,
    ) -> Result<()> {
        let mut statement =
            connection.prepare("select id, base_name, nar_size from paths order by id")?;
        let mut rows = statement.query([])?;
        while let Some(row) = rows.next()? {
            let name = row.get_ref(1)?.as_str().map_err(rusqlite::Error::from)?;
            visit(row.get(0)?, name, row.get::<_, i64>(2)?.unsigned_abs())?;
        }
        Ok(())
    }
}
