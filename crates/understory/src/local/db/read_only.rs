//! A Nix store's SQLite database, looked at so that nothing is changed or created and nothing is misread.
//!
//! Three ways, in this order:
//! 1. in place (`mode=ro`), if the files of the write-ahead log are there: SQLite takes part in the locking and sees
//!    what others commit. Without these files it would make them.
//! 2. `immutable=1`, if neither log nor rollback journal has content: SQLite reads one file and takes no lock.
//! 3. a private copy of the database and its log or journal, which SQLite recovers as after a crash.
//!
//! With 2 and 3, size, inode and time of the files are compared before and after each use; when they changed, what was
//! read is dropped and the way is chosen anew. Costs three `stat` calls each time; with 1 it is one, for a database that
//! was put in the place of the one that is open.

use super::{Failure, READERS_MAX, open, schema};
use crate::error::ErrorKind;
use crate::pool::{Loan, Pool, lock};
use crate::{Error, Result};
use rusqlite::config::DbConfig;
use rusqlite::{Connection, ErrorCode, OpenFlags};
use rustix::fs::StatVfsMountFlags;
use std::ffi::OsString;
use std::fs::File;
use std::io::ErrorKind as IoErrorKind;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tempfile::TempDir;

/// How long to wait for a writer that is in the way: only recovery of a WAL and schema upgrades are.
const BUSY_TIMEOUT: Duration = Duration::from_secs(60);
/// How often a copy is tried while somebody writes.
const COPIES_MAX: u32 = 10;
/// Files beside the database that may hold committed or rolled back content.
const JOURNALS: [&str; 2] = ["-wal", "-journal"];
/// Prepared statements that a connection keeps.
const STATEMENTS_MAX: usize = 32;

/// A database that is only looked at.
pub(super) struct Sight {
    path: PathBuf,
    /// Device and inode of the file that was opened.
    file: (u64, u64),
    view: Mutex<Arc<View>>,
}

/// One way to see it.
pub(super) struct View {
    way: Way,
    stamps: Stamps,
    connections: Pool<Connection>,
}

enum Way {
    InPlace { uri: String },
    Immutable { uri: String },
    Copy { uri: String, _dir: TempDir },
}

/// Of the database and its journals.
type Stamps = [Option<Stamp>; 3];

/// What changes when a file does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Stamp {
    bytes: u64,
    inode: u64,
    modified: (i64, i64),
}

impl Sight {
    /// Opens the database at `path`.
    pub(super) fn open(path: &Path) -> Result<Self> {
        let file = check(path)?;
        Ok(Self {
            path: path.to_path_buf(),
            file,
            view: Mutex::new(Arc::new(View::open(path)?)),
        })
    }

    /// How to see what is there now.
    pub(super) fn view(&self) -> Result<Arc<View>> {
        let mut view = lock(&self.view);
        self.check_file()?;
        if !view.is_in_place() && view.stamps != stamps(&self.path)? {
            *view = Arc::new(View::open(&self.path)?);
        }
        Ok(view.clone())
    }

    /// True if what was read through `view` may be believed.
    pub(super) fn is_current(&self, view: &View) -> Result<bool> {
        Ok(view.is_in_place() || view.stamps == stamps(&self.path)?)
    }

    fn check_file(&self) -> Result<()> {
        let happened = match std::fs::metadata(&self.path) {
            Ok(metadata) if (metadata.dev(), metadata.ino()) == self.file => return Ok(()),
            Ok(_) => "replaced",
            Err(e) if e.kind() == IoErrorKind::NotFound => "removed",
            Err(e) => return Err(Error::io("reading", &self.path, e)),
        };
        Err(Error::environment(format!(
            "{} was {happened} while it was open",
            self.path.display()
        ))
        .with_hint("restart whatever uses this store, so that it is opened anew"))
    }
}

impl View {
    fn open(path: &Path) -> Result<Self> {
        for _ in 0..COPIES_MAX {
            let before = stamps(path)?;
            let way = Self::choose(path)?;
            let view = Self {
                way,
                stamps: before,
                connections: Pool::new(READERS_MAX),
            };
            // The first read tells whether it works, and whether it is Nix's.
            match view.lend() {
                Ok(loan) => drop(loan),
                // Somebody changed it between the choice and the opening.
                Err(_) if !view.is_in_place() && before != stamps(path)? => continue,
                Err(Failure::Other(error)) => return Err(error),
                Err(Failure::Sql(error)) => return Err(failed(path, error)),
            }
            tracing::debug!(path = %path.display(), way = view.way.name(), "opened read-only");
            return Ok(view);
        }
        Err(changes(path))
    }

    fn choose(path: &Path) -> Result<Way> {
        let is_there = |suffix| Ok::<_, Error>(stamp(&beside(path, suffix))?.is_some());
        if is_there("-wal")? && is_there("-shm")? {
            let uri = uri(path, "mode=ro");
            match connect(&uri) {
                Ok(_) => return Ok(Way::InPlace { uri }),
                Err(error) if is_corrupt(&error) || is_busy(&error) => {
                    return Err(failed(path, error));
                }
                Err(error) => {
                    tracing::debug!(path = %path.display(), %error, "not readable in place");
                }
            }
        }
        if !has_journal(path)? {
            return Ok(Way::Immutable {
                uri: uri(path, "mode=ro&immutable=1"),
            });
        }
        let dir = copy(path)?;
        let name = path.file_name().unwrap_or(path.as_os_str());
        Ok(Way::Copy {
            uri: uri(&dir.path().join(name), "mode=rw"),
            _dir: dir,
        })
    }

    fn is_in_place(&self) -> bool {
        matches!(self.way, Way::InPlace { .. })
    }

    /// A connection.
    pub(super) fn lend(&self) -> std::result::Result<Loan<'_, Connection>, Failure> {
        let mut refused = None;
        let loan = self.connections.lend(|| {
            connect(self.way.uri()).map_err(|error| {
                refused = Some(error);
                Error::internal("no connection")
            })
        });
        loan.map_err(|error| refused.map_or(Failure::Other(error), Failure::Sql))
    }
}

impl Way {
    fn uri(&self) -> &str {
        match self {
            Self::InPlace { uri } | Self::Immutable { uri } | Self::Copy { uri, .. } => uri,
        }
    }
    fn name(&self) -> &'static str {
        match self {
            Self::InPlace { .. } => "in place",
            Self::Immutable { .. } => "immutable",
            Self::Copy { .. } => "copy",
        }
    }
}

/// Checks that there is a database of our schema; its device and inode.
pub(crate) fn check(path: &Path) -> Result<(u64, u64)> {
    let file = match std::fs::metadata(path) {
        Ok(metadata) => (metadata.dev(), metadata.ino()),
        Err(e) if e.kind() == IoErrorKind::NotFound => {
            return Err(Error::user(format!(
                "there is no Nix store: {} does not exist",
                path.display()
            ))
            .with_hint("`local?root=DIR` or `local?state=DIR` says where it is"));
        }
        Err(e) => return Err(Error::io("opening", path, e)),
    };
    let schema_file = path.with_file_name("schema");
    match open::read_version(&schema_file)? {
        // None: a store put together by hand; the tables decide.
        None | Some(schema::VERSION) => {}
        Some(version) => {
            return Err(Error::user(format!(
                "{}: expected schema {}, found {version}",
                schema_file.display(),
                schema::VERSION
            ))
            .with_hint("open the store once with Nix 2.0 or newer, which upgrades it"));
        }
    }
    Ok(file)
}

/// Connects to a Nix database that is only read, and reads something.
pub(crate) fn connect(uri: &str) -> rusqlite::Result<Connection> {
    let flags = if uri.ends_with("?mode=rw") {
        OpenFlags::SQLITE_OPEN_READ_WRITE
    } else {
        OpenFlags::SQLITE_OPEN_READ_ONLY
    } | OpenFlags::SQLITE_OPEN_URI
        | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let connection = Connection::open_with_flags(uri, flags)?;
    connection.busy_timeout(BUSY_TIMEOUT)?;
    connection.set_prepared_statement_cache_capacity(STATEMENTS_MAX);
    // Whoever writes this database decides when its WAL is merged.
    connection.set_db_config(DbConfig::SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, true)?;
    // The first read tells whether WAL and shared memory can be used; and whether it is Nix's.
    connection
        .prepare_cached("select id from ValidPaths limit 1")?
        .exists([])?;
    Ok(connection)
}

/// `file:` URI of an SQLite database.
pub(crate) fn uri(path: &Path, parameters: &str) -> String {
    let mut out = String::from("file:");
    for &byte in path.as_os_str().as_bytes() {
        if byte.is_ascii_alphanumeric() || b"/-._~".contains(&byte) {
            out.push(char::from(byte));
        } else {
            out.push_str(&format!("%{byte:02X}"));
        }
    }
    out.push('?');
    out.push_str(parameters);
    out
}

/// True if nobody can write there.
pub(crate) fn is_on_read_only_file_system(path: &Path) -> bool {
    rustix::fs::statvfs(path).is_ok_and(|stat| stat.f_flag.contains(StatVfsMountFlags::RDONLY))
}

fn beside(path: &Path, suffix: &str) -> PathBuf {
    let mut name: OsString = path.as_os_str().to_owned();
    name.push(suffix);
    PathBuf::from(name)
}

/// True if a WAL or a rollback journal has content.
pub(crate) fn has_journal(path: &Path) -> Result<bool> {
    for suffix in JOURNALS {
        if stamp(&beside(path, suffix))?.is_some_and(|stamp| stamp.bytes > 0) {
            return Ok(true);
        }
    }
    Ok(false)
}

fn stamps(path: &Path) -> Result<Stamps> {
    let [wal, journal] = JOURNALS.map(|suffix| stamp(&beside(path, suffix)));
    Ok([stamp(path)?, wal?, journal?])
}

/// `None` if there is no such file.
fn stamp(path: &Path) -> Result<Option<Stamp>> {
    match std::fs::metadata(path) {
        Ok(m) => Ok(Some(Stamp {
            bytes: m.len(),
            inode: m.ino(),
            modified: (m.mtime(), m.mtime_nsec()),
        })),
        Err(e) if e.kind() == IoErrorKind::NotFound => Ok(None),
        Err(e) => Err(Error::io("reading", path, e)),
    }
}

/// Copies the database with its WAL or journal into a private directory.
pub(crate) fn copy(path: &Path) -> Result<TempDir> {
    let dir = tempfile::Builder::new()
        .prefix("understory-db-")
        .tempdir()
        .map_err(|e| Error::environment("creating a temporary directory").with_source(e))?;
    let name = path.file_name().unwrap_or(path.as_os_str());
    let target = dir.path().join(name);
    for _ in 0..COPIES_MAX {
        let before = stamps(path)?;
        for (suffix, stamp) in ["", JOURNALS[0], JOURNALS[1]].iter().zip(&before) {
            let (source, target) = (beside(path, suffix), beside(&target, suffix));
            let copied = match stamp {
                Some(_) => copy_content(&source, &target),
                None => std::fs::remove_file(&target),
            };
            match copied {
                // Gone since, which the stamps tell; or never there.
                Err(e) if e.kind() == IoErrorKind::NotFound => {}
                Err(e) => return Err(Error::io("copying", source, e)),
                Ok(()) => {}
            }
        }
        if before == stamps(path)? {
            return Ok(dir);
        }
    }
    Err(changes(path))
}

fn changes(path: &Path) -> Error {
    Error::environment(format!(
        "{} changed each of the {COPIES_MAX} times it was copied",
        path.display()
    ))
    .with_hint("read it as a user who may open the database, or while nothing is built")
}

/// Copies without the mode: the copy must be writable whatever the original is.
fn copy_content(source: &Path, target: &Path) -> std::io::Result<()> {
    let mut from = File::open(source)?;
    let mut to = File::create(target)?;
    std::io::copy(&mut from, &mut to)?;
    Ok(())
}

/// True if it is damaged, or no database of Nix.
pub(crate) fn is_corrupt(error: &rusqlite::Error) -> bool {
    matches!(
        error.sqlite_error_code(),
        Some(ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase | ErrorCode::Unknown)
    )
}

fn is_busy(error: &rusqlite::Error) -> bool {
    matches!(
        error.sqlite_error_code(),
        Some(ErrorCode::DatabaseBusy | ErrorCode::FileLockingProtocolFailed)
    )
}

/// An error of a database that is only read.
pub(crate) fn failed(path: &Path, error: rusqlite::Error) -> Error {
    let kind = if is_corrupt(&error) {
        ErrorKind::Corrupt
    } else {
        ErrorKind::Environment
    };
    Error::new(kind, format!("reading {}", path.display())).with_source(error)
}
