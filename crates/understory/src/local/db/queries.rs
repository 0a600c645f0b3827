//! Reading: point lookups and bulk queries, each in one snapshot of what is committed.

use super::{Database, Failure, Work};
use crate::{Error, Result};
use rusqlite::types::ValueRef;
use rusqlite::{Connection, OptionalExtension, Row};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use understory_nix::{ContentAddress, NarHash, PathInfo, Signature, StorePath};

/// Characters of a hash part.
const HASH_PART_CHARS: usize = 32;

/// A path info by its full path. References are separated by line ends.
const INFO: &str = "select hash, registrationTime, deriver, narSize, ultimate, sigs, ca, \
     (select group_concat(target.path, char(10)) from Refs \
      join ValidPaths as target on target.id = Refs.reference where Refs.referrer = ValidPaths.id) \
     from ValidPaths where path = ?1";
/// References that were met: infos share most of theirs, and so their memory.
type Names = HashMap<Box<str>, StorePath>;

/// The row number of a full path.
const ID: &str = "select id from ValidPaths where path = ?1";

impl Database {
    /// The path info of a row, self-reference included.
    pub fn info(&self, path: &StorePath) -> Result<Option<PathInfo>> {
        self.read(|connection| self.info_of(connection, path, &mut Names::new()))
    }

    /// The path infos of rows, in the order given, in one snapshot.
    pub fn infos(&self, paths: &[StorePath]) -> Result<Vec<Option<PathInfo>>> {
        if let [path] = paths {
            return Ok(vec![self.info(path)?]);
        }
        self.read_snapshot(|connection| {
            let mut names = Names::new();
            paths
                .iter()
                .map(|path| self.info_of(connection, path, &mut names))
                .collect()
        })
    }

    /// Which of `paths` are rows, in the order given, in one snapshot.
    pub fn valid(&self, paths: &[StorePath]) -> Result<Vec<bool>> {
        self.read_snapshot(|connection| {
            let mut statement = connection.prepare_cached(ID)?;
            paths
                .iter()
                .map(|path| Ok(statement.exists([self.store_dir.print(path)])?))
                .collect()
        })
    }

    /// True if `path` is a row.
    pub fn is_valid(&self, path: &StorePath) -> Result<bool> {
        let path = self.store_dir.print(path);
        self.read(|connection| Ok(connection.prepare_cached(ID)?.exists([&path])?))
    }

    /// All rows, sorted.
    pub fn all_paths(&self) -> Result<Vec<StorePath>> {
        self.paths("select path from ValidPaths order by path", &[])
    }

    /// Some path as the database has it: its directory tells which store directory the store is for.
    pub fn any_path(&self) -> Result<Option<String>> {
        self.read(|connection| {
            let mut statement = connection.prepare_cached("select path from ValidPaths limit 1")?;
            Ok(statement.query_row([], |row| row.get(0)).optional()?)
        })
    }

    /// Rows that refer to `path`, itself included if it does.
    pub fn referrers(&self, path: &StorePath) -> Result<BTreeSet<StorePath>> {
        let found = self.paths(
            "select path from Refs join ValidPaths on ValidPaths.id = Refs.referrer \
             where reference = (select id from ValidPaths where path = ?1)",
            &[&self.store_dir.print(path)],
        )?;
        Ok(found.into_iter().collect())
    }

    /// Derivations that have `path` among their statically known outputs.
    pub fn valid_derivers(&self, path: &StorePath) -> Result<BTreeSet<StorePath>> {
        let found = self.paths(
            "select ValidPaths.path from DerivationOutputs join ValidPaths on ValidPaths.id = DerivationOutputs.drv \
             where DerivationOutputs.path = ?1",
            &[&self.store_dir.print(path)],
        )?;
        Ok(found.into_iter().collect())
    }

    /// The row with that hash part.
    ///
    /// # Errors
    /// `invalid hash part` if it has another length.
    pub fn path_from_hash_part(&self, hash_part: &str) -> Result<Option<StorePath>> {
        if hash_part.len() != HASH_PART_CHARS {
            return Err(Error::user("invalid hash part"));
        }
        let prefix = format!("{}/{hash_part}", self.store_dir);
        let found = self.read(|connection| {
            let mut statement = connection.prepare_cached(
                "select path from ValidPaths where path >= ?1 order by path limit 1",
            )?;
            let found: Option<String> = statement
                .query_row([&prefix], |row| row.get(0))
                .optional()?;
            found
                .filter(|path| path.starts_with(&prefix))
                .map(|path| self.parse(&path))
                .transpose()
        })?;
        Ok(found)
    }

    /// Table DerivationOutputs of a derivation (statically known outputs only); `None` if it is no row.
    pub fn derivation_outputs(
        &self,
        drv: &StorePath,
    ) -> Result<Option<BTreeMap<String, StorePath>>> {
        self.read_snapshot(|connection| {
            let Some(id) = self.id_of(connection, drv)? else {
                return Ok(None);
            };
            let mut statement = connection
                .prepare_cached("select id, path from DerivationOutputs where drv = ?1")?;
            let mut rows = statement.query([id])?;
            let mut outputs = BTreeMap::new();
            while let Some(row) = rows.next()? {
                outputs.insert(row.get(0)?, self.parse(text(row, 1)?)?);
            }
            Ok(Some(outputs))
        })
    }

    /// The largest row number that was ever given: grows with each new row, also across deletions.
    pub fn last_id(&self) -> Result<u64> {
        self.read(|connection| {
            let mut statement = connection
                .prepare_cached("select seq from sqlite_sequence where name = 'ValidPaths'")?;
            let last: Option<i64> = statement.query_row([], |row| row.get(0)).optional()?;
            Ok(last.unwrap_or(0).max(0).unsigned_abs())
        })
    }

    /// What tells this database from another one as long as its oldest row is there: that row's path and time. `None`
    /// if there is none. Device and inode would not do: they may differ after the next boot, and for a copy.
    pub fn fingerprint(&self) -> Result<Option<String>> {
        self.read(|connection| {
            let mut statement = connection.prepare_cached(
                "select id, path, registrationTime from ValidPaths order by id limit 1",
            )?;
            let oldest = statement.query_row([], |row| {
                let id: i64 = row.get(0)?;
                let path: String = row.get(1)?;
                let time: i64 = row.get(2)?;
                Ok(format!("{id} {path} {time}"))
            });
            Ok(oldest.optional()?)
        })
    }

    /// A value that Understory keeps in its own table `Understory(name text primary key, value text)`, which
    /// stock Nix ignores.
    pub fn note(&self, name: &str) -> Result<Option<String>> {
        self.read_snapshot(|connection| {
            if !has_table(connection, "Understory")? {
                return Ok(None);
            }
            let mut statement =
                connection.prepare_cached("select value from Understory where name = ?1")?;
            let found: Option<Option<String>> =
                statement.query_row([name], |row| row.get(0)).optional()?;
            Ok(found.flatten())
        })
    }

    /// The row number of `path`.
    pub(super) fn id_of(&self, connection: &Connection, path: &StorePath) -> Work<Option<i64>> {
        let mut statement = connection.prepare_cached(ID)?;
        let found = statement.query_row([self.store_dir.print(path)], |row| row.get(0));
        Ok(found.optional()?)
    }

    fn info_of(
        &self,
        connection: &Connection,
        path: &StorePath,
        names: &mut Names,
    ) -> Work<Option<PathInfo>> {
        let mut statement = connection.prepare_cached(INFO)?;
        let mut rows = statement.query([self.store_dir.print(path)])?;
        let Some(row) = rows.next()? else {
            return Ok(None);
        };
        let damaged = |what: String| {
            Failure::Other(Error::corrupt(format!(
                "{}: row of '{}': {what}",
                self.path.display(),
                self.store_dir.print(path)
            )))
        };
        let hash = text(row, 0)?;
        let nar_hash = NarHash::parse(hash).map_err(|e| damaged(e.to_string()))?;
        let ca = ContentAddress::parse_optional(opt_text(row, 6)?.unwrap_or_default())
            .map_err(|e| damaged(e.to_string()))?;
        let references = opt_text(row, 7)?.unwrap_or_default().split_terminator('\n');
        Ok(Some(PathInfo {
            path: path.clone(),
            nar_hash,
            nar_size: number(row.get(3)?),
            references: references
                .map(|path| self.parse_once(path, names))
                .collect::<Work<_>>()?,
            // Very old stores have `unknown-deriver`; it says nothing.
            deriver: opt_text(row, 2)?.and_then(|text| self.store_dir.parse(text.as_bytes()).ok()),
            registration_time: number(row.get(1)?),
            ultimate: row.get::<_, Option<i64>>(4)? == Some(1),
            signatures: signatures(path, opt_text(row, 5)?.unwrap_or_default()),
            ca,
        }))
    }

    /// Parses a path that has mostly been met before.
    fn parse_once(&self, text: &str, names: &mut Names) -> Work<StorePath> {
        if let Some(path) = names.get(text) {
            return Ok(path.clone());
        }
        let path = self.parse(text)?;
        names.insert(text.into(), path.clone());
        Ok(path)
    }

    fn paths(&self, sql: &str, parameters: &[&str]) -> Result<Vec<StorePath>> {
        self.read(|connection| {
            let mut statement = connection.prepare_cached(sql)?;
            let mut rows = statement.query(rusqlite::params_from_iter(parameters))?;
            let mut out = Vec::new();
            while let Some(row) = rows.next()? {
                out.push(self.parse(text(row, 0)?)?);
            }
            Ok(out)
        })
    }
}

/// True if there is a table of that name.
pub(super) fn has_table(connection: &Connection, name: &str) -> Work<bool> {
    let mut statement = connection
        .prepare_cached("select 1 from sqlite_master where type = 'table' and name = ?1")?;
    Ok(statement.exists([name])?)
}

/// A text column, not copied.
pub(super) fn text<'a>(row: &'a Row<'_>, column: usize) -> Work<&'a str> {
    let value = row.get_ref(column)?;
    Ok(value.as_str().map_err(rusqlite::Error::from)?)
}

/// A text column that may be null, not copied.
pub(super) fn opt_text<'a>(row: &'a Row<'_>, column: usize) -> Work<Option<&'a str>> {
    match row.get_ref(column)? {
        ValueRef::Null => Ok(None),
        value => Ok(Some(value.as_str().map_err(rusqlite::Error::from)?)),
    }
}

/// A size or time; null and what is below 0 mean that it is not known.
fn number(column: Option<i64>) -> u64 {
    column.unwrap_or(0).max(0).unsigned_abs()
}

fn signatures(path: &StorePath, text: &str) -> BTreeSet<Signature> {
    let mut out = BTreeSet::new();
    for text in text.split_ascii_whitespace() {
        match Signature::parse(text) {
            Ok(signature) => {
                out.insert(signature);
            }
            // No key can have made it, so nothing is lost with it.
            Err(error) => tracing::debug!(%path, text, %error, "left out"),
        }
    }
    out
}
