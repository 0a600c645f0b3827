//! A Nix store's SQLite database, opened so that it is never changed and never misread.
//!
//! Three ways, in this order:
//! 1. `mode=ro`: SQLite takes part in the locking, content of the WAL is seen. Needs `-shm` to be
//!    there or makeable.
//! 2. `immutable=1`, when that fails, on a read-only file system, and only if no WAL or rollback
//!    journal has content: nobody can write there.
//! 3. a private copy of the database and its WAL or journal, which SQLite recovers like after a crash.
//!    The copy is repeated when a file changed meanwhile.

use crate::Error;
use crate::Result;
use crate::local::db::read_only::{
    self, connect, copy, failed, has_journal, is_corrupt, is_on_read_only_file_system, uri,
};
use rusqlite::{Connection, OptionalExtension, Row as SqlRow, Transaction};
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use tempfile::TempDir;
use understory_nix::{ContentAddress, NarHash, PathInfo, Signature, StoreDir};

/// A Nix store's database.
pub(super) struct Database {
    connection: Connection,
    path: PathBuf,
    /// The private copy, if it is one.
    _copy: Option<TempDir>,
}

/// What selecting needs of a row.
pub(super) struct BriefRow {
    pub(super) id: i64,
    pub(super) path: String,
    pub(super) nar_size: Option<u64>,
}

/// A row of ValidPaths with its references.
pub(super) struct Row {
    pub(super) path: String,
    hash: String,
    registration_time: u64,
    deriver: Option<String>,
    nar_size: Option<u64>,
    ultimate: bool,
    signatures: Option<String>,
    ca: Option<String>,
    references: Vec<String>,
}

/// A realisation, in the words of the source.
pub(super) struct RealisationRow {
    /// `sha256:<hex>!<output>` or `<derivation's base name>!<output>`.
    pub(super) id: String,
    /// Full path.
    pub(super) out_path: String,
    pub(super) signatures: BTreeSet<String>,
}

impl Database {
    /// Opens the database at `path`.
    pub(super) fn open(path: &Path) -> Result<Self> {
        read_only::check(path)?;
        let database = Self::open_any_way(path)?;
        tracing::debug!(path = %path.display(), copied = database._copy.is_some(), "opened");
        Ok(database)
    }

    fn open_any_way(path: &Path) -> Result<Self> {
        let refused = match connect(&uri(path, "mode=ro")) {
            Ok(connection) => return Ok(Self::new(connection, path, None)),
            Err(error) if is_corrupt(&error) => return Err(failed(path, error)),
            Err(error) => error,
        };
        tracing::debug!(path = %path.display(), error = %refused, "not readable in place");
        if is_on_read_only_file_system(path) && !has_journal(path)? {
            match connect(&uri(path, "mode=ro&immutable=1")) {
                Ok(connection) => return Ok(Self::new(connection, path, None)),
                Err(error) if is_corrupt(&error) => return Err(failed(path, error)),
                Err(error) => tracing::debug!(%error, "not readable as immutable"),
            }
        }
        let copy = copy(path)?;
        let name = path.file_name().unwrap_or(path.as_os_str());
        let connection =
            connect(&uri(&copy.path().join(name), "mode=rw")).map_err(|e| failed(path, e))?;
        Ok(Self::new(connection, path, Some(copy)))
    }

    fn new(connection: Connection, path: &Path, copy: Option<TempDir>) -> Self {
        Self {
            connection,
            path: path.to_owned(),
            _copy: copy,
        }
    }

    /// Where the original lies.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Until it is dropped, all queries see one state.
    pub(super) fn snapshot(&self) -> Result<Transaction<'_>> {
        self.connection
            .unchecked_transaction()
            .map_err(|e| self.failed(e))
    }

    /// Some path, if there is one.
    pub(super) fn any_path(&self) -> Result<Option<String>> {
        self.one("select path from ValidPaths limit 1", [], |row| row.get(0))
    }

    /// The row number of a full path.
    pub(super) fn id_of(&self, path: &str) -> Result<Option<i64>> {
        self.one("select id from ValidPaths where path = ?1", [path], |row| {
            row.get(0)
        })
    }

    /// Rows with numbers greater than `after`.
    pub(super) fn rows_after(&self, after: i64, count: usize) -> Result<Vec<BriefRow>> {
        let count = i64::try_from(count).unwrap_or(i64::MAX);
        self.all(
            "select id, path, narSize from ValidPaths where id > ?1 order by id limit ?2",
            [after, count],
            brief_row,
        )
    }

    /// The beginning of a row.
    pub(super) fn brief_row(&self, id: i64) -> Result<Option<BriefRow>> {
        self.one(
            "select id, path, narSize from ValidPaths where id = ?1",
            [id],
            brief_row,
        )
    }

    /// Row numbers of what a row refers to.
    pub(super) fn references(&self, id: i64) -> Result<Vec<i64>> {
        self.all(
            "select reference from Refs where referrer = ?1",
            [id],
            |row| row.get(0),
        )
    }

    /// A whole row.
    pub(super) fn row(&self, id: i64) -> Result<Option<Row>> {
        let row = self.one(
            "select path, hash, registrationTime, deriver, narSize, ultimate, sigs, ca \
             from ValidPaths where id = ?1",
            [id],
            |row| {
                Ok(Row {
                    path: row.get(0)?,
                    hash: row.get(1)?,
                    registration_time: row.get::<_, i64>(2)?.max(0).unsigned_abs(),
                    deriver: row.get(3)?,
                    nar_size: nar_size(row.get(4)?),
                    ultimate: row.get::<_, Option<i64>>(5)? == Some(1),
                    signatures: row.get(6)?,
                    ca: row.get(7)?,
                    references: Vec::new(),
                })
            },
        )?;
        let Some(mut row) = row else { return Ok(None) };
        row.references = self.all(
            "select ValidPaths.path from Refs join ValidPaths on ValidPaths.id = Refs.reference \
             where Refs.referrer = ?1",
            [id],
            |row| row.get(0),
        )?;
        Ok(Some(row))
    }

    /// Calls `visit` with each realisation, of both forms.
    pub(super) fn for_each_realisation(
        &self,
        mut visit: impl FnMut(RealisationRow) -> Result<()>,
    ) -> Result<()> {
        let tables = [
            (
                "Realisations",
                "select drvPath, outputName, path, signatures from Realisations \
                 join ValidPaths on ValidPaths.id = outputPath order by Realisations.id",
            ),
            (
                "BuildTraceV3",
                "select drvPath, outputName, outputPath, signatures from BuildTraceV3 order by id",
            ),
        ];
        for (table, sql) in tables {
            let found = self.one(
                "select 1 from sqlite_master where type = 'table' and name = ?1",
                [table],
                |_| Ok(()),
            )?;
            if found.is_none() {
                continue;
            }
            let mut statement = self.connection.prepare(sql).map_err(|e| self.failed(e))?;
            let mut rows = statement.query([]).map_err(|e| self.failed(e))?;
            while let Some(row) = rows.next().map_err(|e| self.failed(e))? {
                visit(realisation_row(row).map_err(|e| self.failed(e))?)?;
            }
        }
        Ok(())
    }

    fn one<T>(
        &self,
        sql: &str,
        parameters: impl rusqlite::Params,
        read: impl FnOnce(&SqlRow<'_>) -> rusqlite::Result<T>,
    ) -> Result<Option<T>> {
        self.connection
            .prepare_cached(sql)
            .and_then(|mut statement| statement.query_row(parameters, read).optional())
            .map_err(|e| self.failed(e))
    }

    fn all<T>(
        &self,
        sql: &str,
        parameters: impl rusqlite::Params,
        read: impl FnMut(&SqlRow<'_>) -> rusqlite::Result<T>,
    ) -> Result<Vec<T>> {
        self.connection
            .prepare_cached(sql)
            .and_then(|mut statement| statement.query_map(parameters, read)?.collect())
            .map_err(|e| self.failed(e))
    }

    fn failed(&self, error: rusqlite::Error) -> Error {
        failed(&self.path, error)
    }
}

impl Row {
    /// Makes a path info of it, verbatim. A NAR size of 0 means that the source does not know it.
    pub(super) fn into_path_info(self, dir: &StoreDir) -> Result<PathInfo> {
        let path = dir.parse(self.path.as_bytes())?;
        let mut signatures = BTreeSet::new();
        for text in self
            .signatures
            .iter()
            .flat_map(|all| all.split_whitespace())
        {
            match Signature::parse(text) {
                Ok(signature) => {
                    signatures.insert(signature);
                }
                // No key can have made it, so nothing is lost with it.
                Err(error) => tracing::warn!(%path, text, %error, "left out"),
            }
        }
        let parse = |text: &String| dir.parse(text.as_bytes());
        Ok(PathInfo {
            nar_hash: NarHash::parse(&self.hash)?,
            nar_size: self.nar_size.unwrap_or(0),
            references: self
                .references
                .iter()
                .map(parse)
                .collect::<Result<_, _>>()?,
            deriver: self.deriver.as_ref().map(parse).transpose()?,
            registration_time: self.registration_time,
            ultimate: self.ultimate,
            signatures,
            ca: ContentAddress::parse_optional(self.ca.as_deref().unwrap_or_default())?,
            path,
        })
    }
}

fn brief_row(row: &SqlRow<'_>) -> rusqlite::Result<BriefRow> {
    Ok(BriefRow {
        id: row.get(0)?,
        path: row.get(1)?,
        nar_size: nar_size(row.get(2)?),
    })
}

/// 0 and NULL both mean that it is not known.
fn nar_size(column: Option<i64>) -> Option<u64> {
    column
        .and_then(|size| u64::try_from(size).ok())
        .filter(|&size| size > 0)
}

fn realisation_row(row: &SqlRow<'_>) -> rusqlite::Result<RealisationRow> {
    let derivation: String = row.get(0)?;
    let output: String = row.get(1)?;
    let signatures: Option<String> = row.get(3)?;
    Ok(RealisationRow {
        id: format!(
            "{}!{output}",
            derivation.rsplit('/').next().unwrap_or_default()
        ),
        out_path: row.get(2)?,
        signatures: signatures
            .iter()
            .flat_map(|all| all.split_whitespace())
            .map(str::to_owned)
            .collect(),
    })
}
