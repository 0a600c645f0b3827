//! The database: connections, schema, and how rows are encoded.
//!
//! Invariants: one writing connection per process, used under a mutex and always in an immediate
//! transaction; up to [`READERS_MAX`] reading connections, each used by one thread at a time; a row
//! is never half read (one statement, or one snapshot). The schema is in
//! `docs/disk-format.md`.
//!
//! Cost: opening reads one page. A point lookup is a prepared statement and about five pages out of
//! the page cache, a few microseconds. Memory: [`READER_CACHE_KIB`] per connection, made on demand.

use super::StoredPath;
use super::generation::{Change, Generation};
use crate::{Error, Result};
use rusqlite::{Connection, OpenFlags, Row, Transaction, TransactionBehavior};
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::{Condvar, LazyLock, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use understory_castore::{Digest, Node};
use understory_nix::{ContentAddress, NarHash, PathInfo, Signature, StorePath};

/// Reading connections a process keeps; more readers at once wait for one. Lookups take
/// microseconds, so a few serve hundreds of threads.
pub(super) const READERS_MAX: usize = 8;
/// Page cache of each reading connection.
const READER_CACHE_KIB: i64 = 1024;
/// Page cache of the writing connection while it writes: a publication of 100,000 paths touches
/// index pages all over. It is given back after each transaction.
const WRITER_CACHE_KIB: i64 = 32 * 1024;
/// How long a writer waits for another process's transaction. The longest one is a publication of
/// hundreds of thousands of paths or a collection: seconds.
const BUSY_TIMEOUT: Duration = Duration::from_secs(300);
/// Prepared statements that a connection keeps: more than there are in this module.
const STATEMENTS_MAX: usize = 48;
/// The WAL is cut to this after a checkpoint.
const JOURNAL_BYTES_MAX: i64 = 64 << 20;
/// The schema this program writes, in the settings row `schema`.
pub(super) const SCHEMA_VERSION: u32 = 1;

const SCHEMA: &str = "
create table settings (
    name text primary key not null,
    value text not null
) without rowid;
create table paths (
    id integer primary key autoincrement not null,
    base_name text unique not null,
    nar_hash blob not null check (length(nar_hash) = 32),
    nar_size integer not null,
    registration_time integer not null,
    deriver text,
    ultimate integer not null,
    ca text,
    signatures text,
    root_kind integer not null,
    root blob not null,
    root_size integer not null,
    checksum integer not null
);
create table refs (
    referrer integer not null references paths(id) on delete cascade,
    reference integer not null references paths(id) on delete restrict,
    primary key (referrer, reference)
) without rowid;
create index refs_reference on refs(reference);
create table derivation_outputs (
    drv integer not null references paths(id) on delete cascade,
    name text not null,
    path text,
    primary key (drv, name)
) without rowid;
create index derivation_outputs_path on derivation_outputs(path) where path is not null;
create table realisations (
    id text primary key not null,
    out_path integer not null references paths(id) on delete cascade,
    signatures text,
    checksum integer not null
) without rowid;
create index realisations_out_path on realisations(out_path);
";

/// The columns of a path's row, with the names of its references. `from paths` follows.
const COLUMNS: &str = "paths.id, paths.base_name, paths.nar_hash, paths.nar_size, \
     paths.registration_time, paths.deriver, paths.ultimate, paths.ca, paths.signatures, \
     paths.root_kind, paths.root, paths.root_size, \
     (select group_concat(target.base_name, ' ') from refs join paths as target on target.id = refs.reference \
      where refs.referrer = paths.id), paths.checksum";

/// A path's row by its base name.
pub(super) static ROW_BY_NAME: LazyLock<String> =
    LazyLock::new(|| format!("select {COLUMNS} from paths where base_name = ?1"));
/// A path's row by its number.
pub(super) static ROW_BY_ID: LazyLock<String> =
    LazyLock::new(|| format!("select {COLUMNS} from paths where id = ?1"));
/// Rows after a number.
pub(super) static ROWS_AFTER: LazyLock<String> =
    LazyLock::new(|| format!("select {COLUMNS} from paths where id > ?1 order by id limit ?2"));

/// How the database may be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mode {
    ReadWrite,
    ReadOnly,
    /// On media that cannot change: no locks, no WAL.
    Immutable,
}

/// The open database.
pub(super) struct Database {
    path: PathBuf,
    mode: Mode,
    pub(super) generation: Generation,
    readers: Mutex<Readers>,
    returned: Condvar,
    writer: Mutex<Option<Connection>>,
}

#[derive(Default)]
struct Readers {
    idle: Vec<Connection>,
    lent: usize,
    /// Threads that wait for one.
    waiting: usize,
}

impl Database {
    /// Makes the database with its settings. Nothing may be there yet.
    pub(super) fn create(path: &Path, settings: &[(&str, &str)]) -> Result<()> {
        let mut connection = connect(path, Mode::ReadWrite, true)?;
        connection
            .pragma_update(None, "journal_mode", "wal")
            .map_err(|e| failed(path, e))?;
        let create = |connection: &mut Connection| -> rusqlite::Result<()> {
            let transaction =
                connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
            transaction.execute_batch(SCHEMA)?;
            for (name, value) in settings {
                transaction.execute(
                    "insert into settings (name, value) values (?1, ?2)",
                    [name, value],
                )?;
            }
            transaction.execute(
                "insert into settings (name, value) values ('schema', ?1)",
                [SCHEMA_VERSION.to_string()],
            )?;
            transaction.commit()
        };
        create(&mut connection).map_err(|e| failed(path, e))?;
        connection.close().map_err(|(_, e)| failed(path, e))
    }

    /// Opens the database for reading and writing.
    pub(super) fn open(path: &Path, generation_path: &Path) -> Result<Self> {
        let database = Self::new(path, Mode::ReadWrite, Generation::open(generation_path)?);
        database.check_schema()?;
        if database.generation.stable().is_none() {
            database.write(|_| Ok(()))?;
        }
        Ok(database)
    }

    /// Opens the database without ever writing. Where SQLite cannot make the files that coordinate
    /// readers (read-only media) and there is no WAL with content, it is taken as immutable.
    pub(super) fn open_read_only(path: &Path, generation_path: &Path) -> Result<Self> {
        let database = Self::new(
            path,
            Mode::ReadOnly,
            Generation::open_read_only(generation_path),
        );
        let error = match database.check_schema() {
            Ok(()) => return Ok(database),
            Err(error) => error,
        };
        if error.kind() == crate::error::ErrorKind::Corrupt || wal_bytes(path) > 0 {
            return Err(error);
        }
        let database = Self::new(path, Mode::Immutable, Generation::Constant);
        database.check_schema()?;
        Ok(database)
    }

    fn new(path: &Path, mode: Mode, generation: Generation) -> Self {
        Self {
            path: path.to_path_buf(),
            mode,
            generation,
            readers: Mutex::default(),
            returned: Condvar::new(),
            writer: Mutex::default(),
        }
    }

    fn check_schema(&self) -> Result<()> {
        let found = self
            .setting("schema")?
            .and_then(|text| text.parse::<u32>().ok());
        match found {
            Some(SCHEMA_VERSION) => Ok(()),
            Some(newer) if newer > SCHEMA_VERSION => Err(Error::environment(format!(
                "{} has schema {newer}, this program knows up to {SCHEMA_VERSION}",
                self.path.display()
            ))
            .with_hint("use a newer understory")),
            _ => Err(Error::corrupt(format!(
                "{} has no schema version",
                self.path.display()
            ))),
        }
    }

    /// Where it lies.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// True if nothing may be written.
    pub(super) fn is_read_only(&self) -> bool {
        self.mode != Mode::ReadWrite
    }

    /// A settings row.
    pub(super) fn setting(&self, name: &str) -> Result<Option<String>> {
        self.read(|connection| {
            let mut statement =
                connection.prepare_cached("select value from settings where name = ?1")?;
            let mut rows = statement.query([name])?;
            Ok(match rows.next()? {
                Some(row) => Some(row.get(0)?),
                None => None,
            })
        })
    }

    /// Runs `work` on a reading connection: for single statements.
    pub(super) fn read<T>(&self, work: impl FnOnce(&Connection) -> Result<T>) -> Result<T> {
        let lent = self.lend()?;
        work(lent.connection())
    }

    /// Runs `work` in one snapshot.
    pub(super) fn read_snapshot<T>(
        &self,
        work: impl FnOnce(&Connection) -> Result<T>,
    ) -> Result<T> {
        let mut lent = self.lend()?;
        let transaction = lent.connection_mut().transaction()?;
        let out = work(&transaction)?;
        // Nothing was written: ending it by rollback is the same as a commit.
        drop(transaction);
        Ok(out)
    }

    /// Runs `work` in an immediate transaction and commits it durably, unless it fails.
    pub(super) fn write<T>(
        &self,
        work: impl FnOnce(&mut WriteTransaction<'_>) -> Result<T>,
    ) -> Result<T> {
        if self.is_read_only() {
            return Err(Error::user("the store is open read-only"));
        }
        let mut writer = lock(&self.writer);
        if writer.is_none() {
            let connection = connect(&self.path, Mode::ReadWrite, false)?;
            connection.pragma_update(None, "cache_size", -WRITER_CACHE_KIB)?;
            *writer = Some(connection);
        }
        let Some(connection) = writer.as_mut() else {
            return Err(Error::internal("the database's writer is gone"));
        };
        let out = {
            let transaction =
                connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
            self.generation.mend();
            let mut transaction = WriteTransaction {
                transaction,
                change: None,
                generation: &self.generation,
            };
            let out = work(&mut transaction)?;
            let WriteTransaction {
                transaction,
                change,
                ..
            } = transaction;
            transaction.commit()?;
            drop(change);
            out
        };
        if let Err(error) = connection.execute_batch("pragma shrink_memory") {
            tracing::debug!("giving back the page cache: {error}");
        }
        Ok(out)
    }

    fn lend(&self) -> Result<Lent<'_>> {
        let mut readers = lock(&self.readers);
        loop {
            if let Some(connection) = readers.idle.pop() {
                readers.lent += 1;
                return Ok(Lent {
                    database: self,
                    connection: Some(connection),
                });
            }
            if readers.lent < READERS_MAX {
                readers.lent += 1;
                drop(readers);
                let mut lent = Lent {
                    database: self,
                    connection: None,
                };
                lent.connection = Some(connect(&self.path, self.mode, false)?);
                return Ok(lent);
            }
            readers.waiting += 1;
            readers = self
                .returned
                .wait(readers)
                .unwrap_or_else(PoisonError::into_inner);
            readers.waiting -= 1;
        }
    }
}

/// A write transaction.
pub(super) struct WriteTransaction<'a> {
    // Before `change`: a rollback comes before the end of the change.
    transaction: Transaction<'a>,
    change: Option<Change<'a>>,
    generation: &'a Generation,
}

impl WriteTransaction<'_> {
    /// Must be called before rows that others may have cached are changed or deleted.
    pub(super) fn will_change_rows(&mut self) {
        if self.change.is_none() {
            self.change = Some(self.generation.change());
        }
    }
}

impl std::ops::Deref for WriteTransaction<'_> {
    type Target = Connection;
    fn deref(&self) -> &Connection {
        &self.transaction
    }
}

/// A reading connection on loan; given back when dropped.
struct Lent<'a> {
    database: &'a Database,
    connection: Option<Connection>,
}

#[allow(clippy::expect_used, reason = "only `drop` takes the connection out")]
impl Lent<'_> {
    fn connection(&self) -> &Connection {
        self.connection.as_ref().expect("a loan has a connection")
    }
    fn connection_mut(&mut self) -> &mut Connection {
        self.connection.as_mut().expect("a loan has a connection")
    }
}

impl Drop for Lent<'_> {
    fn drop(&mut self) {
        let mut readers = lock(&self.database.readers);
        readers.lent -= 1;
        if let Some(connection) = self.connection.take() {
            readers.idle.push(connection);
        }
        // A wake-up is a system call, also if nobody waits.
        let awaited = readers.waiting > 0;
        drop(readers);
        if awaited {
            self.database.returned.notify_one();
        }
    }
}

/// Locks a mutex whose data is right even if a thread panicked while it held it.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn connect(path: &Path, mode: Mode, create: bool) -> Result<Connection> {
    let mut flags = OpenFlags::SQLITE_OPEN_NO_MUTEX;
    flags |= match mode {
        Mode::ReadWrite => OpenFlags::SQLITE_OPEN_READ_WRITE,
        Mode::ReadOnly | Mode::Immutable => OpenFlags::SQLITE_OPEN_READ_ONLY,
    };
    if create {
        flags |= OpenFlags::SQLITE_OPEN_CREATE;
    }
    let connection = if mode == Mode::Immutable {
        Connection::open_with_flags(immutable_uri(path)?, flags | OpenFlags::SQLITE_OPEN_URI)
    } else {
        Connection::open_with_flags(path, flags)
    }
    .map_err(|e| failed(path, e))?;
    let set_up = || -> rusqlite::Result<()> {
        connection.busy_timeout(BUSY_TIMEOUT)?;
        connection.set_prepared_statement_cache_capacity(STATEMENTS_MAX);
        connection.pragma_update(None, "cache_size", -READER_CACHE_KIB)?;
        connection.pragma_update(None, "temp_store", "memory")?;
        if mode == Mode::ReadWrite {
            connection.pragma_update(None, "foreign_keys", true)?;
            // The commit of a path's row publishes it: it must be on disk when it returns.
            connection.pragma_update(None, "synchronous", "full")?;
            connection.pragma_update(None, "journal_size_limit", JOURNAL_BYTES_MAX)?;
        }
        Ok(())
    };
    set_up().map_err(|e| failed(path, e))?;
    Ok(connection)
}

/// SQLite's URI of a database on media that cannot change.
pub(crate) fn immutable_uri(path: &Path) -> Result<String> {
    use std::os::unix::ffi::OsStrExt;
    let absolute = std::path::absolute(path).map_err(|e| Error::io("resolving", path, e))?;
    let mut uri = String::from("file:");
    for byte in absolute.as_os_str().as_bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'/' | b'-' | b'_' | b'.' | b'~' => {
                uri.push(char::from(*byte));
            }
            other => uri.push_str(&format!("%{other:02X}")),
        }
    }
    uri.push_str("?immutable=1");
    Ok(uri)
}

/// Bytes of the database's write-ahead log, 0 if there is none.
pub(crate) fn wal_bytes(path: &Path) -> u64 {
    let mut wal = path.as_os_str().to_owned();
    wal.push("-wal");
    std::fs::metadata(PathBuf::from(wal)).map_or(0, |metadata| metadata.len())
}

fn failed(path: &Path, error: rusqlite::Error) -> Error {
    let error = Error::from(error);
    let message = format!("the database {}", path.display());
    let mut out = Error::new(error.kind(), message);
    if let Some(hint) = error.hint() {
        out = out.with_hint(hint);
    }
    match std::error::Error::source(&error) {
        Some(source) => out.with_source(source.to_string()),
        None => out,
    }
}

/// Checksum of a path's row, kept in it: the first 8 bytes of a BLAKE3 of all that the row and its
/// references say. SQLite would hand out a flipped bit as if it were true.
pub(super) fn checksum(info: &PathInfo, root: &Node) -> Result<i64> {
    let (kind, bytes, size) = root_columns(root)?;
    let mut hasher = RowHasher::default();
    hasher.text(Some(info.path.base_name()));
    hasher.bytes(Some(&info.nar_hash.0));
    hasher.number(info.nar_size);
    hasher.number(info.registration_time);
    hasher.text(info.deriver.as_ref().map(StorePath::base_name));
    hasher.number(u64::from(info.ultimate));
    hasher.text(info.ca.map(|ca| ca.to_string()).as_deref());
    hasher.text(signatures_column(&info.signatures).as_deref());
    hasher.number(kind.unsigned_abs());
    hasher.bytes(Some(bytes));
    hasher.number(size.unsigned_abs());
    hasher.number(info.references.len() as u64);
    for reference in &info.references {
        hasher.text(Some(reference.base_name()));
    }
    Ok(hasher.finish())
}

/// Checksum of a realisation's row.
pub(super) fn realisation_checksum(
    id: &str,
    out_path: &StorePath,
    signatures: Option<&str>,
) -> i64 {
    let mut hasher = RowHasher::default();
    hasher.text(Some(id));
    hasher.text(Some(out_path.base_name()));
    hasher.text(signatures);
    hasher.finish()
}

/// Fields go in with their lengths, so that none can flow into the next.
#[derive(Default)]
struct RowHasher(blake3::Hasher);

impl RowHasher {
    fn number(&mut self, value: u64) {
        self.0.update(&value.to_le_bytes());
    }
    fn bytes(&mut self, value: Option<&[u8]>) {
        self.number(value.map_or(u64::MAX, |bytes| bytes.len() as u64));
        self.0.update(value.unwrap_or_default());
    }
    fn text(&mut self, value: Option<&str>) {
        self.bytes(value.map(str::as_bytes));
    }
    fn finish(self) -> i64 {
        let mut first = [0; 8];
        first.copy_from_slice(&self.0.finalize().as_bytes()[..8]);
        i64::from_le_bytes(first)
    }
}

/// Reads a row made of [`COLUMNS`] and verifies its checksum.
pub(super) fn stored_path(row: &Row<'_>) -> Result<StoredPath> {
    let stored = unverified_path(row)?;
    let found: i64 = row.get(13)?;
    let expected = checksum(&stored.info, &stored.root)?;
    if found != expected {
        let reason = format!(
            "the row of '{}' has checksum {found}, its contents {expected}",
            stored.info.path
        );
        return Err(damaged(row.get(0)?, &reason));
    }
    Ok(stored)
}

/// Reads a row made of [`COLUMNS`].
pub(super) fn unverified_path(row: &Row<'_>) -> Result<StoredPath> {
    let id: i64 = row.get(0)?;
    let base_name = row
        .get_ref(1)?
        .as_str()
        .map_err(|_| damaged(id, "its name is not text"))?;
    decode_row(row, base_name)
        .map_err(|reason| damaged(id, &reason))
        .and_then(|(info, root)| {
            let id = u64::try_from(id).map_err(|_| damaged(id, "its number is negative"))?;
            Ok(StoredPath { id, info, root })
        })
}

fn decode_row(row: &Row<'_>, base_name: &str) -> std::result::Result<(PathInfo, Node), String> {
    let text = |index: usize| {
        row.get_ref(index)
            .and_then(|v| Ok(v.as_str_or_null()?))
            .map_err(|e| e.to_string())
    };
    let number = |index: usize| {
        let value: i64 = row.get(index).map_err(|e| e.to_string())?;
        u64::try_from(value).map_err(|_| format!("{value} is negative"))
    };
    let path_of = |text: &str| StorePath::from_base_name(text).map_err(|e| e.to_string());
    let nar_hash = row
        .get_ref(2)
        .and_then(|v| Ok(v.as_blob()?))
        .map_err(|e| e.to_string())?;
    let references = text(12)?.map(|all| {
        all.split(' ')
            .map(path_of)
            .collect::<std::result::Result<BTreeSet<_>, _>>()
    });
    let info = PathInfo {
        path: path_of(base_name)?,
        nar_hash: NarHash(
            nar_hash
                .try_into()
                .map_err(|_| format!("NAR hash of {} bytes", nar_hash.len()))?,
        ),
        nar_size: number(3)?,
        references: references.transpose()?.unwrap_or_default(),
        deriver: text(5)?.map(path_of).transpose()?,
        registration_time: number(4)?,
        ultimate: number(6)? != 0,
        signatures: text(8)?.map(signatures_of).transpose()?.unwrap_or_default(),
        ca: text(7)?
            .map(|ca| ContentAddress::parse(ca).map_err(|e| e.to_string()))
            .transpose()?,
    };
    let root = row
        .get_ref(10)
        .and_then(|v| Ok(v.as_blob()?))
        .map_err(|e| e.to_string())?;
    let digest = || {
        root.try_into()
            .map(Digest)
            .map_err(|_| format!("digest of {} bytes, expected 32", root.len()))
    };
    let root = match number(9)? {
        0 => Node::Directory {
            digest: digest()?,
            size: number(11)?,
        },
        1 => Node::File {
            digest: digest()?,
            size: number(11)?,
            executable: false,
        },
        2 => Node::File {
            digest: digest()?,
            size: number(11)?,
            executable: true,
        },
        3 => Node::Symlink {
            target: root.into(),
        },
        other => return Err(format!("root node of kind {other}")),
    };
    Ok((info, root))
}

/// Kind, bytes and size of a root node, as the columns keep them.
pub(super) fn root_columns(root: &Node) -> Result<(i64, &[u8], i64)> {
    Ok(match root {
        Node::Directory { digest, size } => (0, &digest.0[..], integer(*size)?),
        Node::File {
            digest,
            size,
            executable,
        } => (1 + i64::from(*executable), &digest.0[..], integer(*size)?),
        Node::Symlink { target } => (3, &target[..], 0),
    })
}

/// A number as SQLite has it.
pub(super) fn integer(value: u64) -> Result<i64> {
    i64::try_from(value).map_err(|_| Error::user(format!("{value} is too large a number")))
}

/// Signatures as their column has them.
pub(super) fn signatures_column(signatures: &BTreeSet<Signature>) -> Option<String> {
    if signatures.is_empty() {
        return None;
    }
    Some(
        signatures
            .iter()
            .map(Signature::as_str)
            .collect::<Vec<_>>()
            .join(" "),
    )
}

fn signatures_of(text: &str) -> std::result::Result<BTreeSet<Signature>, String> {
    text.split(' ')
        .filter(|s| !s.is_empty())
        .map(|s| Signature::parse(s).map_err(|e| e.to_string()))
        .collect()
}

/// Signatures out of their column.
pub(super) fn parse_signatures(id: i64, text: Option<&str>) -> Result<BTreeSet<Signature>> {
    text.map(signatures_of)
        .transpose()
        .map(Option::unwrap_or_default)
        .map_err(|reason| damaged(id, &reason))
}

/// A store path out of a column.
pub(super) fn parse_path(base_name: &str) -> Result<StorePath> {
    StorePath::from_base_name(base_name).map_err(|e| {
        Error::corrupt(format!(
            "the store's database names a path that is none: {e}"
        ))
    })
}

pub(super) fn damaged(id: i64, reason: &str) -> Error {
    Error::corrupt(format!(
        "row {id} of the store's database is damaged: {reason}"
    ))
}
