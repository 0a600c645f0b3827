//! Nix's SQLite database of schema 10.
//!
//! Stock Nix may have the same database open: everything is done in its tables, with its pragmas and locks, and
//! nothing is cached. Invariants: a [`OpenMode::ReadWrite`] database holds `big-lock` shared; one writing connection
//! per process, used under a mutex and always in an immediate transaction; up to [`READERS_MAX`] reading connections,
//! each used by one thread at a time; what belongs together is read in one statement or one snapshot. A committed
//! transaction survives the end of any process; as in Nix (`synchronous = normal`) a failing machine may lose the last
//! ones, never parts of one.
//!
//! The tables are listed in `schema.rs`; columns and their meaning were checked against databases that Nix 2.26.3 and
//! 2.34.8 wrote. One table is ours: `Understory`, for [`Database::note`].
//!
//! Cost: a validity test is one index lookup, about 1 µs in bulk; a path info is one prepared statement and two lookups
//! for each reference, 10 to 20 µs with ten. Registration of 10,000 paths with ten references each is one transaction of
//! about half a second.

mod graph;
mod open;
mod queries;
pub(crate) mod read_only;
mod realisations;
mod register;
mod schema;
#[cfg(test)]
mod tests;

use crate::pool::{Loan, Pool, lock};
use crate::{Error, Result};
use read_only::Sight;
use rusqlite::{Connection, ErrorCode};
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::{Duration, Instant};
use understory_nix::{StoreDir, StorePath};

pub use graph::{Graph, GraphNode};

/// Reading connections; more readers at once wait for one. Lookups take microseconds, so a few serve hundreds of
/// threads.
const READERS_MAX: usize = 8;
/// How long SQLite waits for another's transaction before we say that we wait. Nix says it as often.
const BUSY_TIMEOUT: Duration = Duration::from_secs(10);
/// How long to wait in all: what Nix does.
const BUSY_TIMEOUT_MAX: Duration = Duration::from_secs(3600);
/// Longest pause between two attempts where SQLite does not wait by itself.
const RETRY_PAUSE_MS_MAX: u64 = 100;
/// How often a read is repeated because the files below it changed.
const READS_MAX: u32 = 20;

/// How to open a database.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OpenMode {
    /// Creates or upgrades it if needed; holds `big-lock` shared.
    ReadWrite,
    /// Nothing is written and no lock taken, but a write-ahead log of others is honoured, also where the
    /// directory is not writable.
    ReadOnly,
}

/// An open database. Threads share it; each read sees what other processes have committed. Nothing is cached.
pub struct Database {
    path: PathBuf,
    store_dir: StoreDir,
    access: Access,
}

/// A statically known output of a derivation: name and path.
pub type DrvOutputs = Vec<(String, StorePath)>;

enum Access {
    ReadWrite {
        readers: Pool<Connection>,
        writer: Mutex<Option<Connection>>,
        /// Shared for as long as the database is open, so that nobody upgrades the schema.
        big_lock: File,
    },
    ReadOnly(Sight),
}

/// Why work on a connection fails.
enum Failure {
    Sql(rusqlite::Error),
    Other(Error),
}

impl From<rusqlite::Error> for Failure {
    fn from(error: rusqlite::Error) -> Self {
        Self::Sql(error)
    }
}
impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self::Other(error)
    }
}

impl Failure {
    /// True if somebody else's doing was in the way, and it is worth another try.
    fn is_busy(&self) -> bool {
        match self {
            Self::Sql(error) => matches!(
                error.sqlite_error_code(),
                Some(ErrorCode::DatabaseBusy | ErrorCode::FileLockingProtocolFailed)
            ),
            Self::Other(_) => false,
        }
    }
}

/// Shorthand for work on a connection.
type Work<T> = std::result::Result<T, Failure>;

impl Database {
    /// Where it is: `STATE/db/db.sqlite`.
    pub fn path(&self) -> &Path {
        &self.path
    }
    /// The logical store directory.
    pub fn store_dir(&self) -> &StoreDir {
        &self.store_dir
    }

    /// Runs `work`, which reads, on a connection: one statement, or several that need not agree. It may be run again.
    fn read<T>(&self, work: impl Fn(&Connection) -> Work<T>) -> Result<T> {
        match &self.access {
            Access::ReadWrite { readers, .. } => self.retry("reading", || {
                let connection = readers.lend(|| open::connect(&self.path))?;
                work(&connection)
            }),
            Access::ReadOnly(sight) => {
                for _ in 0..READS_MAX {
                    let view = sight.view()?;
                    let found = self.retry("reading", || {
                        let connection: Loan<'_, Connection> = view.lend()?;
                        work(&connection)
                    });
                    if sight.is_current(&view)? {
                        return found;
                    }
                }
                Err(Error::environment(format!(
                    "{} changed each of the {READS_MAX} times it was read",
                    self.path.display()
                ))
                .with_hint("use it as a user who may open it for writing, or through its daemon"))
            }
        }
    }

    /// As [`Database::read`], but all of `work` sees one state.
    fn read_snapshot<T>(&self, work: impl Fn(&Connection) -> Work<T>) -> Result<T> {
        self.read(|connection| {
            // Nothing is written: its end by rollback is the same as a commit.
            let transaction = connection.unchecked_transaction()?;
            work(&transaction)
        })
    }

    /// Runs `work` in an immediate transaction and commits it, unless it fails.
    fn write<T>(&self, work: impl FnOnce(&Connection) -> Work<T>) -> Result<T> {
        let Access::ReadWrite { writer, .. } = &self.access else {
            return Err(Error::user(format!(
                "{} is open read-only",
                self.path.display()
            )));
        };
        let mut writer = lock(writer);
        let connection = match &mut *writer {
            Some(connection) => connection,
            none => none.insert(open::connect(&self.path)?),
        };
        // Only the beginning waits for others; from then on the database is ours.
        self.retry("writing", || {
            connection
                .execute_batch("begin immediate")
                .map_err(Failure::from)
        })?;
        let guard = Rollback { connection };
        let out = work(guard.connection).map_err(|failure| self.failed("writing", failure))?;
        guard
            .connection
            .execute_batch("commit")
            .map_err(|error| self.failed("writing", error.into()))?;
        Ok(out)
    }

    /// Repeats `work` while others are in the way.
    fn retry<T>(&self, verb: &str, mut work: impl FnMut() -> Work<T>) -> Result<T> {
        let mut waiting = Waiting::default();
        loop {
            match work() {
                Err(failure) if failure.is_busy() && waiting.go_on(&self.path) => {}
                result => return result.map_err(|failure| self.failed(verb, failure)),
            }
        }
    }

    fn failed(&self, verb: &str, failure: Failure) -> Error {
        match failure {
            Failure::Other(error) => error,
            Failure::Sql(error) => sql_error(verb, &self.path, error),
        }
    }

    fn not_valid(&self, path: &StorePath) -> Error {
        Error::user(format!(
            "path '{}' is not valid",
            self.store_dir.print(path)
        ))
    }

    /// Parses a full path out of a column.
    fn parse(&self, text: &str) -> Work<StorePath> {
        self.store_dir.parse(text.as_bytes()).map_err(|error| {
            Failure::Other(Error::corrupt(format!("{}: {error}", self.path.display())))
        })
    }
}

/// Rolls a transaction back that was not committed.
struct Rollback<'a> {
    connection: &'a Connection,
}

impl Drop for Rollback<'_> {
    fn drop(&mut self) {
        if !self.connection.is_autocommit()
            && let Err(error) = self.connection.execute_batch("rollback")
        {
            tracing::warn!(%error, "rolling back");
        }
    }
}

/// How long somebody else has been in the way.
#[derive(Default)]
struct Waiting {
    since: Option<Instant>,
    said: Option<Instant>,
}

impl Waiting {
    /// Pauses, says now and then that we wait; false if it is enough.
    fn go_on(&mut self, path: &Path) -> bool {
        let since = *self.since.get_or_insert_with(Instant::now);
        if since.elapsed() > BUSY_TIMEOUT_MAX {
            return false;
        }
        if self.said.is_none_or(|said| said.elapsed() > BUSY_TIMEOUT) {
            self.said = Some(Instant::now());
            tracing::warn!("SQLite database '{}' is busy", path.display());
        }
        // Spread out, so that many that wait do not meet again.
        let nanos = u64::from(Instant::now().duration_since(since).subsec_nanos());
        let pause = (nanos ^ u64::from(std::process::id())) % RETRY_PAUSE_MS_MAX;
        std::thread::sleep(Duration::from_millis(pause));
        true
    }
}

/// An error of SQLite with the path.
fn sql_error(verb: &str, path: &Path, error: rusqlite::Error) -> Error {
    let kind = Error::from_sqlite_kind(&error);
    let hint = match error.sqlite_error_code() {
        Some(ErrorCode::DiskFull) => Some("the disk is full: make room and try again"),
        Some(ErrorCode::DatabaseBusy | ErrorCode::DatabaseLocked) => {
            Some("another process has held the database for an hour: see what it does, or end it")
        }
        Some(ErrorCode::ReadOnly | ErrorCode::PermissionDenied | ErrorCode::CannotOpen) => {
            Some("check that you may read and write the directory, or use the store's daemon")
        }
        _ => None,
    };
    let out = Error::new(kind, format!("{verb} {}", path.display())).with_source(error);
    match hint {
        Some(hint) => out.with_hint(hint),
        None => out,
    }
}
