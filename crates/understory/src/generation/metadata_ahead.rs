//! Reading ahead of metadata: images of mounted generations, and the extents, are fetched whole into the page cache when
//! files are read and they are not there.
//!
//! The kernel reads an image a block of 4 KiB at a time, when it needs one, and nothing ahead. After a start, or when
//! memory was short, name, inode and extent of each file that is opened for the first time are one to three reads from
//! disk, which is a fourth of the time that a small file takes. All of an image is about 100 bytes an inode, an extent
//! has 64, and both are one read in sequence.
//!
//! - Whether it is there is asked when several files were begun, of some blocks spread over it, others each time: the
//!   page cache answers a read that must not wait, and has the block read if it has it not.
//! - It is fetched again only when as many bytes of contents were read meanwhile: where memory is too short for it, that
//!   is at most twice the work.
//! - The kernel drops these pages as any others.
//!
//! Cost: two atomic additions a request; some 10 µs a file for each [`FILES_MIN`] files that are begun.

use super::{BLOCK_BYTES, lock_mutex};
use rustix::fs::Advice;
use rustix::io::{Errno, ReadWriteFlags};
use std::fs::File;
use std::io::IoSliceMut;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

/// Larger files are left to the kernel: more than a third of a million inodes, half a million extents.
const FILE_BYTES_MAX: u64 = 32 << 20;
/// Files that are begun before anything is looked at: who reads one file needs no more than its metadata.
const FILES_MIN: u32 = 16;
/// Blocks that are looked at, and how many must be missing.
const SAMPLES: u64 = 16;
const MISSING_MIN: u64 = SAMPLES / 2;

/// What is read ahead.
pub(super) struct MetadataAhead {
    known: Mutex<Vec<Known>>,
    /// Files begun since the last look.
    files: AtomicU32,
    /// Bytes of contents that were read.
    read_bytes: AtomicU64,
}

/// A file with metadata.
struct Known {
    path: PathBuf,
    /// [`MetadataAhead::read_bytes`] from which on it may be fetched again.
    again: u64,
    /// How often it was looked at.
    looks: u64,
}

impl MetadataAhead {
    /// With the file of the extents.
    pub(super) fn new(extents: &Path) -> Self {
        let this = Self {
            known: Mutex::default(),
            files: AtomicU32::new(0),
            read_bytes: AtomicU64::new(0),
        };
        this.add(extents);
        this
    }

    /// Reads a file ahead from now on, at first when it is needed.
    pub(super) fn add(&self, path: &Path) {
        self.remove(path);
        let again = self.read_bytes.load(Ordering::Relaxed);
        let path = path.to_owned();
        lock_mutex(&self.known).push(Known {
            path,
            again,
            looks: 0,
        });
    }

    /// Does so no more.
    pub(super) fn remove(&self, path: &Path) {
        lock_mutex(&self.known).retain(|known| known.path != path);
    }

    /// To be called before `bytes` of contents are read, which may be the first of a file.
    pub(super) fn before(&self, bytes: usize, is_first: bool) {
        self.read_bytes.fetch_add(bytes as u64, Ordering::Relaxed);
        if is_first && self.files.fetch_add(1, Ordering::Relaxed) + 1 == FILES_MIN {
            self.look();
            self.files.store(0, Ordering::Relaxed);
        }
    }

    /// Fetches what is not there.
    fn look(&self) {
        let read_bytes = self.read_bytes.load(Ordering::Relaxed);
        for known in lock_mutex(&self.known).iter_mut() {
            if read_bytes < known.again {
                continue;
            }
            // Without it nothing but time is lost.
            let Ok(file) = File::open(&known.path) else {
                continue;
            };
            let bytes = file.metadata().map_or(0, |metadata| metadata.len());
            known.looks += 1;
            if bytes <= FILE_BYTES_MAX && is_missing(&file, bytes, known.looks) {
                known.again = read_bytes.saturating_add(bytes);
                fetch(file);
            }
        }
    }
}

/// Has the kernel fetch a file, on a thread of its own: submitting that takes milliseconds, and a reader waits.
fn fetch(file: File) {
    let fetch = move || {
        if let Err(error) = rustix::fs::fadvise(&file, 0, None, Advice::WillNeed) {
            tracing::debug!(%error, "reading metadata ahead");
        }
    };
    if let Err(error) = std::thread::Builder::new()
        .name("metadata-ahead".into())
        .spawn(fetch)
    {
        tracing::debug!(%error, "starting a thread that reads metadata ahead");
    }
}

/// True if much of the file is not in the page cache; false also if that cannot be known. `look` chooses the blocks.
fn is_missing(file: &File, bytes: u64, look: u64) -> bool {
    let mut missing = 0;
    let stride = (bytes / SAMPLES).max(1);
    let first = look.wrapping_mul(BLOCK_BYTES) % stride;
    for sample in 0..SAMPLES {
        let mut byte = [0];
        let into = &mut [IoSliceMut::new(&mut byte)];
        let at = first + stride * sample;
        match rustix::io::preadv2(file, into, at, ReadWriteFlags::NOWAIT) {
            Err(Errno::AGAIN) => missing += 1,
            Err(_) => return false,
            Ok(_) => {}
        }
    }
    missing >= MISSING_MIN
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::{Duration, Instant};

    const BYTES: u64 = 1 << 20;

    /// A file that is not in the page cache; `None` on a file system that keeps all in memory.
    fn cold(name: &str, dir: &Path) -> Option<PathBuf> {
        let path = dir.join(name);
        std::fs::write(&path, vec![7; BYTES as usize]).unwrap();
        File::open(&path).unwrap().sync_all().unwrap();
        forget(&path);
        is_cold(&path).then_some(path)
    }

    fn forget(path: &Path) {
        let file = File::open(path).unwrap();
        rustix::fs::fadvise(&file, 0, None, Advice::DontNeed).unwrap();
    }

    fn is_cold(path: &Path) -> bool {
        understory_testkit::cached_bytes(path) < BYTES / 2
    }

    fn wait_until_warm(path: &Path) {
        let begun = Instant::now();
        while understory_testkit::cached_bytes(path) < BYTES {
            assert!(begun.elapsed() < Duration::from_secs(60));
            std::thread::yield_now();
        }
    }

    #[test]
    fn what_is_known_and_missing_is_fetched_when_files_are_read() {
        // The directory for temporary files may be in memory.
        let dir = tempfile::tempdir_in("/var/tmp").unwrap();
        let (Some(extents), Some(image), Some(other)) = (
            cold("extents", dir.path()),
            cold("image", dir.path()),
            cold("other", dir.path()),
        ) else {
            understory_testkit::skip("this file system keeps all in memory");
            return;
        };
        let ahead = MetadataAhead::new(&extents);
        ahead.add(&image);
        let read = |files: u32, bytes: u64| {
            for _ in 0..files {
                ahead.before((bytes / u64::from(files)) as usize, true);
            }
        };
        // One file is not enough, however often it is read.
        for _ in 0..100 {
            ahead.before(1, false);
        }
        read(FILES_MIN - 1, 0);
        assert!(is_cold(&extents) && is_cold(&image));
        read(1, 0);
        wait_until_warm(&extents);
        wait_until_warm(&image);
        assert!(is_cold(&other));
        // Not again before as much was read as it has bytes.
        forget(&image);
        read(FILES_MIN, BYTES / 2);
        assert!(is_cold(&image));
        read(FILES_MIN, BYTES);
        read(FILES_MIN, 0);
        wait_until_warm(&image);
        // Nor when it is not mounted any more.
        forget(&image);
        ahead.remove(&image);
        forget(&extents);
        read(FILES_MIN, 2 * BYTES);
        read(FILES_MIN, 0);
        wait_until_warm(&extents);
        assert!(is_cold(&image));
    }
}
