//! Reading ahead of metadata: images of mounted generations are fetched whole into the page cache when files are read and
//! they are not there.
//!
//! The kernel reads an image a block of 4 KiB at a time, when it needs one, and nothing ahead. After a start, or when
//! memory was short, the inode and the name of each file that is opened for the first time are one or two reads from
//! disk, which is a fifth of the time that a small file takes. All of an image is about 100 bytes an inode, and one read
//! in sequence.
//!
//! - Whether it is there is asked when several files were begun, of some blocks spread over it: the page cache
//!   answers a read that must not wait.
//! - It is fetched again only when as many bytes of contents were read meanwhile: where memory is too short for it, that
//!   is at most twice the work.
//! - The kernel drops these pages as any others.
//!
//! Cost: two atomic additions a request; some 10 µs for each [`FILES_MIN`] files that are begun.

use super::{image_of, lock_mutex};
use crate::Store;
use rustix::fs::Advice;
use rustix::io::{Errno, ReadWriteFlags};
use std::fs::File;
use std::io::IoSliceMut;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

/// Larger images are left to the kernel: a quarter of a million inodes.
const IMAGE_BYTES_MAX: u64 = 32 << 20;
/// Files that are begun before anything is looked at: who reads one file needs no more than its metadata.
const FILES_MIN: u32 = 16;
/// Blocks that are looked at, and how many must be missing.
const SAMPLES: u64 = 16;
const MISSING_MIN: u64 = SAMPLES / 2;

/// The images of mounted generations.
#[derive(Default)]
pub(super) struct ImagesAhead {
    images: Mutex<Vec<Image>>,
    /// Files begun since the last look.
    files: AtomicU32,
    /// Bytes of contents that were read.
    read_bytes: AtomicU64,
}

struct Image {
    number: u64,
    /// [`ImagesAhead::read_bytes`] from which on it may be fetched again.
    again: u64,
}

impl ImagesAhead {
    /// Notes that a generation is mounted, and fetches its image.
    pub(super) fn mounted(&self, store: &Store, number: u64) {
        let again = self.read_bytes.load(Ordering::Relaxed);
        let mut images = lock_mutex(&self.images);
        images.retain(|image| image.number != number);
        images.push(Image { number, again });
        drop(images);
        self.look(store);
    }

    /// Notes that a generation is not mounted any more.
    pub(super) fn unmounted(&self, number: u64) {
        lock_mutex(&self.images).retain(|image| image.number != number);
    }

    /// To be called before `bytes` of a file are read, whose first they may be.
    pub(super) fn before(&self, store: &Store, bytes: usize, is_first: bool) {
        self.read_bytes.fetch_add(bytes as u64, Ordering::Relaxed);
        if is_first && self.files.fetch_add(1, Ordering::Relaxed) + 1 == FILES_MIN {
            self.look(store);
            self.files.store(0, Ordering::Relaxed);
        }
    }

    /// Fetches what is not there.
    fn look(&self, store: &Store) {
        let read_bytes = self.read_bytes.load(Ordering::Relaxed);
        for image in lock_mutex(&self.images).iter_mut() {
            if read_bytes < image.again {
                continue;
            }
            // Without it nothing but time is lost.
            let Ok(file) = File::open(image_of(store.dir(), image.number)) else {
                continue;
            };
            let bytes = file.metadata().map_or(0, |metadata| metadata.len());
            if bytes <= IMAGE_BYTES_MAX && is_missing(&file, bytes) {
                image.again = read_bytes.saturating_add(bytes);
                fetch(file);
            }
        }
    }
}

/// Has the kernel fetch a file, on a thread of its own: submitting that takes milliseconds, and a reader waits.
fn fetch(file: File) {
    let fetch = move || {
        if let Err(error) = rustix::fs::fadvise(&file, 0, None, Advice::WillNeed) {
            tracing::debug!(%error, "reading an image ahead");
        }
    };
    if let Err(error) = std::thread::Builder::new()
        .name("image-ahead".into())
        .spawn(fetch)
    {
        tracing::debug!(%error, "starting a thread that reads an image ahead");
    }
}

/// True if much of the file is not in the page cache; false also if that cannot be known.
fn is_missing(file: &File, bytes: u64) -> bool {
    let mut missing = 0;
    for sample in 0..SAMPLES {
        let mut byte = [0];
        let into = &mut [IoSliceMut::new(&mut byte)];
        let at = bytes / SAMPLES * sample;
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
    use std::io::{Seek, Write};
    use std::time::{Duration, Instant};

    const BYTES: u64 = 1 << 20;

    /// A file on a disk that is not in the page cache; `None` where it cannot be had out of it.
    fn cold() -> Option<File> {
        let mut file = tempfile::tempfile_in(".").unwrap();
        file.write_all(&vec![7; BYTES as usize]).unwrap();
        file.rewind().unwrap();
        file.sync_all().unwrap();
        rustix::fs::fadvise(&file, 0, None, Advice::DontNeed).unwrap();
        is_missing(&file, BYTES).then_some(file)
    }

    #[test]
    fn what_is_not_in_the_page_cache_is_fetched() {
        let Some(file) = cold() else {
            eprintln!("skipped: this file system keeps all in memory");
            return;
        };
        fetch(file.try_clone().unwrap());
        let begun = Instant::now();
        while is_missing(&file, BYTES) {
            assert!(begun.elapsed() < Duration::from_secs(60));
            std::thread::yield_now();
        }
    }
}
