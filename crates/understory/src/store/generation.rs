//! The generation counter that keeps caches of rows coherent between processes.
//!
//! A file of 8 bytes (`generation`, little endian on every machine we run on) is mapped by every
//! process that has the store open. It moves only when rows are changed or deleted, not when paths
//! are added: a cached row is right as long as the counter stands where it stood before the row was
//! read. The counter is odd while a change is being committed; nothing is taken from or put into a
//! cache then. Changes are made under SQLite's write lock, so at most one process moves it at a time;
//! one that dies in the middle leaves it odd, and the next change (or the next writable open) mends
//! that.
//!
//! Cost: a lookup is one atomic load. The file's content matters only to running processes, so it is
//! never synced.

use crate::files::open_or_create;
use crate::{Error, Result};
use memmap2::{MmapOptions, MmapRaw};
use std::fs::OpenOptions;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

/// Bytes of the file.
const FILE_BYTES: u64 = 8;

/// The counter.
pub(super) enum Generation {
    /// Shared with other processes.
    Shared(MmapRaw),
    /// Nothing can change (immutable media): caches are always right.
    Constant,
    /// There is no counter to be had: caches are never used.
    Unknown,
}

impl Generation {
    /// Makes the file if it is not there.
    pub(super) fn create(path: &Path) -> Result<()> {
        let file = open_or_create(path)?;
        if file
            .metadata()
            .map_err(|e| Error::io("reading", path, e))?
            .len()
            < FILE_BYTES
        {
            file.set_len(FILE_BYTES)
                .map_err(|e| Error::io("writing", path, e))?;
        }
        Ok(())
    }

    /// Maps the file for reading and writing.
    pub(super) fn open(path: &Path) -> Result<Self> {
        Self::create(path)?;
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .open(path)
            .map_err(|e| Error::io("opening", path, e))?;
        let map = MmapOptions::new()
            .len(FILE_BYTES as usize)
            .map_raw(&file)
            .map_err(|e| Error::io("mapping", path, e))?;
        Ok(Self::Shared(map))
    }

    /// Maps the file for reading only; [`Generation::Unknown`] if that cannot be done.
    pub(super) fn open_read_only(path: &Path) -> Self {
        let map = OpenOptions::new().read(true).open(path).and_then(|file| {
            if file.metadata()?.len() < FILE_BYTES {
                return Err(std::io::ErrorKind::UnexpectedEof.into());
            }
            MmapOptions::new()
                .len(FILE_BYTES as usize)
                .map_raw_read_only(&file)
        });
        match map {
            Ok(map) => Self::Shared(map),
            Err(_) => Self::Unknown,
        }
    }

    /// The value under which rows read from now on may be cached and cached rows may be used;
    /// `None` while a change is under way.
    pub(super) fn stable(&self) -> Option<u64> {
        match self {
            Self::Shared(map) => {
                let value = counter(map).load(Ordering::Acquire);
                value.is_multiple_of(2).then_some(value)
            }
            Self::Constant => Some(0),
            Self::Unknown => None,
        }
    }

    /// Moves, and only up, with each change of rows; where it stands means nothing else.
    pub(super) fn moves(&self) -> u64 {
        match self {
            Self::Shared(map) => counter(map).load(Ordering::Acquire),
            Self::Constant | Self::Unknown => 0,
        }
    }

    /// Begins a change; it ends when the guard is dropped, which must be after the commit. The
    /// caller holds SQLite's write lock.
    pub(super) fn change(&self) -> Change<'_> {
        let Self::Shared(map) = self else {
            return Change {
                counter: None,
                value: 0,
            };
        };
        let counter = counter(map);
        let mut value = 0;
        // The update always applies, so both arms mean the same.
        let _ = counter.fetch_update(Ordering::AcqRel, Ordering::Acquire, |now| {
            value = now.wrapping_add(1) | 1;
            Some(value)
        });
        Change {
            counter: Some(counter),
            value,
        }
    }

    /// Mends a counter that a dead process left odd. The caller holds SQLite's write lock.
    pub(super) fn mend(&self) {
        if self.stable().is_none() {
            drop(self.change());
        }
    }
}

/// A change under way.
pub(super) struct Change<'a> {
    counter: Option<&'a AtomicU64>,
    value: u64,
}

impl Drop for Change<'_> {
    fn drop(&mut self) {
        if let Some(counter) = self.counter {
            // If it moved on, the next change has begun already and will end by itself.
            let _ = counter.compare_exchange(
                self.value,
                self.value.wrapping_add(1),
                Ordering::AcqRel,
                Ordering::Acquire,
            );
        }
    }
}

#[allow(
    unsafe_code,
    reason = "an atomic in a mapping that other processes share"
)]
fn counter(map: &MmapRaw) -> &AtomicU64 {
    // SAFETY: the mapping starts at a page boundary, so it is aligned; it is FILE_BYTES = 8 bytes
    // long and lives as long as the returned reference. Every process touches it only through
    // atomics. A read-only mapping is only ever loaded from: `change` is reached by writers alone,
    // and they map with `open`.
    unsafe { AtomicU64::from_ptr(map.as_mut_ptr().cast::<u64>()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moves_by_two_and_is_odd_in_between() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("generation");
        let one = Generation::open(&path).unwrap();
        let two = Generation::open(&path).unwrap();
        let reader = Generation::open_read_only(&path);
        assert_eq!(two.stable(), Some(0));
        let change = one.change();
        assert_eq!(two.stable(), None);
        assert_eq!(reader.stable(), None);
        drop(change);
        assert_eq!(reader.stable(), Some(2));
    }

    #[test]
    fn a_dead_process_leaves_it_odd_and_the_next_change_mends_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("generation");
        let one = Generation::open(&path).unwrap();
        std::mem::forget(one.change());
        let two = Generation::open(&path).unwrap();
        assert_eq!(two.stable(), None);
        two.mend();
        assert_eq!(two.stable(), Some(4));
        assert_eq!(one.stable(), Some(4));
        two.mend();
        assert_eq!(two.stable(), Some(4), "nothing to mend");
    }
}
