//! Makes a store.
//!
//! `format` is written last, so a directory is a store or it is not. A file `creating`, locked while
//! the work is going on, tells an interrupted creation from somebody else's directory: what lies
//! beside it without a `format` may be thrown away.

use super::db::Database;
use super::generation::Generation;
use super::{FORMAT, StorePath};
use crate::files::remove_if_there;
use crate::{Error, Result};
use rustix::fs::{FlockOperation, flock};
use std::fs::{self, File};
use std::io::Write;
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};
use understory_castore::Castore;
use understory_nix::StoreDir;

const MARKER: &str = "creating";
/// Bytes of a store's random id.
const ID_BYTES: usize = 16;

/// Creates a store in `dir`.
pub(super) fn create(dir: &Path, store_dir: &StoreDir) -> Result<()> {
    fs::create_dir_all(dir).map_err(|e| Error::io("creating", dir, e))?;
    check_absent(dir)?;
    let marker_path = dir.join(MARKER);
    if !marker_path.exists() {
        check_empty(dir)?;
    }
    let marker = File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(&marker_path)
        .map_err(|e| Error::io("creating", &marker_path, e))?;
    flock(&marker, FlockOperation::LockExclusive)
        .map_err(|e| Error::io("locking", &marker_path, e.into()))?;
    // Another process may have made it while we waited.
    check_absent(dir)?;
    remove_leftovers(dir)?;

    Castore::create(&dir.join("castore"))?;
    Generation::create(&dir.join("generation"))?;
    for name in ["gcroots", "gcroots/auto", "temproots", "log"] {
        let path = dir.join(name);
        fs::create_dir(&path).map_err(|e| Error::io("creating", path, e))?;
    }
    let mut id = [0; ID_BYTES];
    getrandom::fill(&mut id)
        .map_err(|e| Error::environment("reading random bytes").with_source(e.to_string()))?;
    let created = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |d| d.as_secs());
    Database::create(
        &dir.join("db.sqlite"),
        &[
            ("store_dir", store_dir.as_str()),
            ("store_id", &data_encoding::HEXLOWER.encode(&id)),
            ("created", &created.to_string()),
        ],
    )?;
    write_durably(dir, "format", FORMAT.as_bytes())?;
    fs::remove_file(&marker_path).map_err(|e| Error::io("removing", marker_path, e))
}

fn check_absent(dir: &Path) -> Result<()> {
    let format = dir.join("format");
    match fs::symlink_metadata(&format) {
        Ok(_) => Err(Error::user(format!("{} is a store already", dir.display()))),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(Error::io("reading", format, error)),
    }
}

fn check_empty(dir: &Path) -> Result<()> {
    let mut entries = fs::read_dir(dir).map_err(|e| Error::io("reading", dir, e))?;
    match entries.next() {
        // Another process may be making the store at this moment: then the marker is there too.
        Some(Ok(entry)) if entry.file_name() != MARKER && !dir.join(MARKER).exists() => {
            // Or it may have finished just now.
            check_absent(dir)?;
            Err(Error::user(format!(
                "cannot make a store in {}: it is not empty (it holds `{}`)",
                dir.display(),
                entry.file_name().to_string_lossy()
            ))
            .with_hint("name an empty directory, or one that is not there yet"))
        }
        Some(Err(error)) => Err(Error::io("reading", dir, error)),
        _ => Ok(()),
    }
}

/// Removes what an interrupted creation left. The marker says that the directory was empty before.
fn remove_leftovers(dir: &Path) -> Result<()> {
    for name in ["castore", "gcroots", "temproots", "log"] {
        let path = dir.join(name);
        match fs::remove_dir_all(&path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(Error::io("removing", path, error));
            }
            _ => {}
        }
    }
    for name in [
        "db.sqlite",
        "db.sqlite-wal",
        "db.sqlite-shm",
        "db.sqlite-journal",
        "generation",
        "format.tmp",
    ] {
        remove_if_there(&dir.join(name))?;
    }
    Ok(())
}

/// Writes `dir/name` so that it is there as a whole or not at all, and on disk on return.
fn write_durably(dir: &Path, name: &str, bytes: &[u8]) -> Result<()> {
    let path = dir.join(name);
    let draft = dir.join(format!("{name}.tmp"));
    let mut file = File::create(&draft).map_err(|e| Error::io("creating", &draft, e))?;
    file.write_all(bytes)
        .and_then(|()| file.sync_all())
        .map_err(|e| Error::io("writing", &draft, e))?;
    fs::rename(&draft, &path).map_err(|e| Error::io("writing", &path, e))?;
    sync_dir(dir)
}

/// Makes the names in `dir` durable.
pub(super) fn sync_dir(dir: &Path) -> Result<()> {
    File::open(dir)
        .and_then(|file| file.sync_all())
        .map_err(|e| Error::io("syncing", dir, e))
}

/// Where the build log of `drv` lies below the store's directory: `log/drvs/<2>/<rest>.zst`.
pub(super) fn log_name(drv: &StorePath) -> (String, String) {
    let (first, rest) = drv.base_name().split_at(2);
    (format!("log/drvs/{first}"), format!("{rest}.zst"))
}
