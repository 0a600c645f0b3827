//! Opening: locks, creation, upgrades, and how connections are set up.

use super::read_only::Sight;
use super::{Access, BUSY_TIMEOUT, Database, OpenMode, schema, sql_error};
use crate::files::reserve;
use crate::pool::{Pool, lock};
use crate::{Error, Result};
use rusqlite::{Connection, FileControl, MAIN_DB, OpenFlags, TransactionBehavior};
use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{ErrorKind as IoErrorKind, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Mutex;
use understory_nix::StoreDir;

/// Nix's values.
const WAL_CHECKPOINT_PAGES: u32 = 40_000;
const JOURNAL_BYTES_MAX: i64 = 1 << 40;
/// Bytes of the file that the garbage collector removes first when the disk is full: Nix's `gc-reserved-space`.
const RESERVED_BYTES: u64 = 8 << 20;
/// Prepared statements that a connection keeps: more than there are in this module.
const STATEMENTS_MAX: usize = 64;
/// Page cache of each connection, filled on demand: the inner pages and the busiest leaves of a store of 100,000 paths.
/// SQLite's own 2 MB make bulk reads of more than 10,000 paths read pages over and over.
const CACHE_KIB: i64 = 8 << 10;
/// Longest content of the file `schema` that is looked at.
const SCHEMA_BYTES_MAX: usize = 16;

impl Database {
    /// Opens `STATE/db/db.sqlite`.
    ///
    /// # Errors
    /// Schema below 7 or above 10; damaged; not permitted; [`OpenMode::ReadOnly`] and none there.
    pub fn open(state: &Path, store_dir: &StoreDir, mode: OpenMode) -> Result<Self> {
        let dir = state.join("db");
        let path = dir.join("db.sqlite");
        let access = match mode {
            OpenMode::ReadOnly => Access::ReadOnly(Sight::open(&path)?),
            OpenMode::ReadWrite => {
                let mut builder = DirBuilder::new();
                builder
                    .recursive(true)
                    .mode(0o755)
                    .create(&dir)
                    .map_err(|e| Error::io("creating", &dir, e))?;
                reserve(&dir.join("reserved"), RESERVED_BYTES);
                let big_lock = lock_shared(&dir.join("big-lock"))?;
                prepare(&dir, &path, &big_lock)?;
                Access::ReadWrite {
                    readers: Pool::new(super::READERS_MAX),
                    writer: Mutex::default(),
                    big_lock,
                }
            }
        };
        let database = Self {
            path,
            store_dir: store_dir.clone(),
            access,
        };
        if let Access::ReadWrite { writer, .. } = &database.access {
            // Whether it can be written, and is whole, is told here and not in the middle of something.
            let connection = connect(&database.path)?;
            connection
                .prepare("select id, path, ultimate, sigs, ca from ValidPaths limit 1")
                .and_then(|mut statement| statement.exists([]))
                .map_err(|e| sql_error("opening", &database.path, e))?;
            *lock(writer) = Some(connection);
        }
        Ok(database)
    }
}

impl Database {
    /// Calls `then` while no other process has the store open and none can open it; `None` if some has, or it is open
    /// read-only here. Whoever opens it meanwhile waits, as Nix does for an upgrade of the schema.
    ///
    /// # Errors
    /// I/O.
    pub fn alone<T>(&self, then: impl FnOnce() -> T) -> Result<Option<T>> {
        let Access::ReadWrite { big_lock, .. } = &self.access else {
            return Ok(None);
        };
        let io = |e: Errno| Error::environment("locking Nix's big-lock").with_source(e);
        // The kernel gives up a shared lock before it asks for the other one. Nobody but us wants that but for an
        // upgrade, which has been.
        let taken = match flock(big_lock, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Some(then()),
            Err(Errno::WOULDBLOCK) => None,
            Err(e) => return Err(io(e)),
        };
        flock(big_lock, FlockOperation::LockShared).map_err(io)?;
        Ok(taken)
    }
}

/// Makes sure that there is a database of our schema.
fn prepare(dir: &Path, path: &Path, big_lock: &File) -> Result<()> {
    let file = dir.join("schema");
    match read_version(&file)? {
        None => {
            create(path)?;
            write_version(&file)
        }
        Some(schema::VERSION) => Ok(()),
        Some(version) if version > schema::VERSION => Err(Error::environment(format!(
            "current Nix store schema is version {version}, but I only support {}",
            schema::VERSION
        ))
        .within(&file)
        .with_hint("use a newer understory")),
        Some(version) if version < schema::VERSION_MIN => Err(too_old(&file, version)),
        Some(_) => upgrade(path, &file, big_lock),
    }
}

fn too_old(file: &Path, version: u32) -> Error {
    Error::environment(format!(
        "expected schema {} to {}, found {version}",
        schema::VERSION_MIN,
        schema::VERSION
    ))
    .within(file)
    .with_hint("open the store once with Nix, which upgrades it")
}

/// The version in the file `schema`; `None` if there is no store yet.
pub(super) fn read_version(file: &Path) -> Result<Option<u32>> {
    let text = match std::fs::read(file) {
        Ok(text) => text,
        Err(e) if e.kind() == IoErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(Error::io("reading", file, e)),
    };
    let shown = &text[..text.len().min(SCHEMA_BYTES_MAX)];
    match std::str::from_utf8(shown).map(|text| text.trim().parse()) {
        Ok(Ok(version)) => Ok(Some(version)),
        _ => Err(Error::corrupt(format!(
            "'{}' is corrupt: expected a number, found '{}'",
            file.display(),
            shown.escape_ascii()
        ))),
    }
}

/// Durable, before anybody relies on it.
fn write_version(file: &Path) -> Result<()> {
    let write = || {
        let mut out = File::create(file)?;
        out.write_all(schema::VERSION.to_string().as_bytes())?;
        out.sync_all()
    };
    write().map_err(|e| Error::io("writing", file, e))
}

fn create(path: &Path) -> Result<()> {
    let mut connection = connect_with(path, OpenFlags::SQLITE_OPEN_CREATE)?;
    // Another process may do the same now.
    let create = || {
        let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
        transaction.execute_batch(schema::CREATE)?;
        // Several Nixes with `ca-derivations` that open it first at the same time would make these tables each, and
        // all but one fail.
        transaction.execute_batch(schema::CREATE_REALISATIONS)?;
        transaction.commit()
    };
    run(create).map_err(|e| sql_error("creating", path, e))?;
    tracing::debug!(path = %path.display(), "created a Nix database");
    Ok(())
}

/// Names the type of a closure that runs once.
fn run<T>(work: impl FnOnce() -> rusqlite::Result<T>) -> rusqlite::Result<T> {
    work()
}

/// From an older schema to ours, while nobody else has the store open.
fn upgrade(path: &Path, file: &Path, big_lock: &File) -> Result<()> {
    let lock_file = path.with_file_name("big-lock");
    let failed = |e: Errno| Error::io("locking", &lock_file, e.into());
    match flock(big_lock, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => {}
        Err(Errno::WOULDBLOCK) => {
            tracing::info!("waiting for exclusive access to the Nix store...");
            // Two that hold it shared would wait for each other.
            flock(big_lock, FlockOperation::Unlock).map_err(failed)?;
            flock(big_lock, FlockOperation::LockExclusive).map_err(failed)?;
        }
        Err(e) => return Err(failed(e)),
    }
    // Another process may have done it meanwhile.
    let version = read_version(file)?.unwrap_or(0);
    if version < schema::VERSION_MIN {
        return Err(too_old(file, version));
    }
    if version < schema::VERSION {
        let mut connection = connect(path)?;
        let steps = &schema::UPGRADES[(version - schema::VERSION_MIN) as usize..];
        let upgrade = || {
            let transaction =
                connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
            for step in steps {
                for statement in step.split_inclusive(';') {
                    // An upgrade that was interrupted before the version was written has done it already.
                    match transaction.execute_batch(statement) {
                        Err(e) if e.to_string().contains("duplicate column name") => {}
                        result => result?,
                    }
                }
            }
            transaction.execute_batch(schema::CREATE_MIGRATIONS)?;
            transaction.commit()
        };
        run(upgrade).map_err(|e| sql_error("upgrading", path, e))?;
        write_version(file)?;
        tracing::info!(
            from = version,
            to = schema::VERSION,
            "upgraded {}",
            path.display()
        );
    }
    flock(big_lock, FlockOperation::LockShared).map_err(failed)
}

/// A connection for reading and writing, with Nix's pragmas.
pub(super) fn connect(path: &Path) -> Result<Connection> {
    connect_with(path, OpenFlags::empty())
}

fn connect_with(path: &Path, more: OpenFlags) -> Result<Connection> {
    let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX | more;
    let open = || {
        let connection = Connection::open_with_flags(path, flags)?;
        connection.busy_timeout(BUSY_TIMEOUT)?;
        connection.set_prepared_statement_cache_capacity(STATEMENTS_MAX);
        connection.pragma_update(None, "cache_size", -CACHE_KIB)?;
        connection.pragma_update(None, "foreign_keys", true)?;
        connection.pragma_update(None, "synchronous", "normal")?;
        let journal: String =
            connection.pragma_query_value(Some("main"), "journal_mode", |row| row.get(0))?;
        // Changing it needs the database for oneself.
        if journal != "wal" {
            connection.pragma_update(Some("main"), "journal_mode", "wal")?;
        }
        connection.pragma_update(Some("main"), "journal_size_limit", JOURNAL_BYTES_MAX)?;
        connection.pragma_update(Some("main"), "wal_autocheckpoint", WAL_CHECKPOINT_PAGES)?;
        // The log stays when the last one closes: readers that may not write the directory need it.
        connection.file_control(Some(MAIN_DB), FileControl::PersistWal(&mut 1))?;
        Ok(connection)
    };
    run(open).map_err(|e| sql_error("opening", path, e))
}

fn lock_shared(path: &Path) -> Result<File> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(path)
        .map_err(|e| {
            let denied = e.kind() == IoErrorKind::PermissionDenied;
            let error = Error::io("opening", path, e);
            if denied {
                error.with_hint("the store belongs to another user: use its daemon")
            } else {
                error
            }
        })?;
    let locked = match flock(&file, FlockOperation::NonBlockingLockShared) {
        Err(Errno::WOULDBLOCK) => {
            tracing::info!("waiting for the big Nix store lock...");
            flock(&file, FlockOperation::LockShared)
        }
        result => result,
    };
    locked.map_err(|e| Error::io("locking", path, e.into()))?;
    Ok(file)
}
