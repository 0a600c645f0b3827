//! Room for a collection on a full disk.
//!
//! Deleting rows takes room before it gives any: SQLite writes each page that changes to its log, and content goes only
//! after the rows that need it. So a file holds some, which a collection gives up before it begins, as Nix does
//! (`gc-reserved-space`). It is there again afterwards, or when the store is opened the next time.
//!
//! A little of it goes to who opens the database, which takes room for what its readers share.

use super::Store;
use crate::Result;
use crate::files::{remove_if_there, reserve};
use std::fs::File;
use std::path::Path;

const FILE: &str = "reserved";
/// What the rest of a collection needs at least: locks, leases, the list of packs that are to go.
const BYTES_MIN: u64 = 1 << 20;
/// A database of a gigabyte holds four million paths.
const BYTES_MAX: u64 = 1 << 30;

/// SQLite's shared memory takes 32 KiB, and files their blocks.
const OPENING_BYTES: u64 = 128 << 10;

/// Runs `open`, which opens the store in `dir`; if that fails on a full disk, once more with a little of what is reserved.
pub(super) fn open_with_room<T>(dir: &Path, open: impl Fn() -> Result<T>) -> Result<T> {
    open().or_else(|error| match give_a_little(dir) {
        Some(()) => open(),
        None => Err(error),
    })
}

/// Shortens the file if the disk is full; `None` if that is not so, or cannot be done.
fn give_a_little(dir: &Path) -> Option<()> {
    let disk = rustix::fs::statvfs(dir).ok()?;
    if disk.f_bavail.saturating_mul(disk.f_frsize) >= OPENING_BYTES {
        return None;
    }
    let file = File::options().write(true).open(dir.join(FILE)).ok()?;
    let len = file.metadata().ok()?.len();
    file.set_len(len.checked_sub(OPENING_BYTES)?).ok()
}

impl Store {
    /// Has room for one transaction that changes each page of the database.
    pub(super) fn reserve_room(&self) {
        let database = self.inner.dir.join("db.sqlite");
        let bytes = std::fs::metadata(database).map_or(0, |metadata| metadata.len());
        let wanted = (bytes + bytes / 4).next_multiple_of(BYTES_MIN);
        reserve(
            &self.inner.dir.join(FILE),
            wanted.clamp(BYTES_MIN, BYTES_MAX),
        );
    }

    /// Gives the room up, for a collection.
    pub(super) fn release_room(&self) -> Result<()> {
        remove_if_there(&self.inner.dir.join(FILE))
    }
}
