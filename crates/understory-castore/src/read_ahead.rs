//! Reading ahead: packs from disk, frames of large files into the cache.
//!
//! - **Packs.** The kernel's own way reads 128 KiB for a frame of 20 at a random place, and loses the thread when several
//!   threads read one file. So it is told to read what is asked for, and when frames are read about where the last ones
//!   were, those behind them are announced to it. Frames of a store path, and the chunks of a file, lie one behind the
//!   other.
//! - **Frames.** A reader of a mount waits while the window that the kernel has asked for is decompressed, and nothing
//!   is decompressed while it takes what has come. So a large file that is read in sequence has the next window
//!   decompressed meanwhile, by threads that start with the first such file and end with the store.
//!
//! Cost: two atomic operations for each frame that is read from disk and each request to a large file; a system call for
//! each [`FILE_AHEAD_BYTES`]`/2`, and a message for each [`JOB_BYTES`], of a sequential reader. What is read ahead and not
//! wanted costs at most [`BLOB_AHEAD_BYTES`] a reader.

use crate::blob::Blob;
use crossbeam_channel::{Receiver, Sender};
use rustix::fs::Advice;
use std::fs::File;
use std::num::NonZeroU64;
use std::ops::Range;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

/// Reads near to the one before that are not yet a sequence: a chunk behind the recipe that names it is not.
const NEAR_MIN: u32 = 1;
/// Bytes of a file on disk that are fetched before they are asked for.
const FILE_AHEAD_BYTES: u64 = 1 << 20;
/// Bytes of a file that are decompressed before they are asked for: what the kernel reads ahead of a reader.
const BLOB_AHEAD_BYTES: u64 = 1 << 20;
/// Reads of files from this size on are of a reader in sequence.
const BLOB_READ_BYTES_MIN: usize = 64 << 10;
/// What one thread decompresses before it looks for the next.
const JOB_BYTES: u64 = 256 << 10;
/// Jobs that wait; what comes later is decompressed when it is asked for.
const JOBS_MAX: usize = 64;
/// More threads do not make one reader faster.
const THREADS_MAX: usize = 4;

/// Where something is read, and what was announced.
#[derive(Debug, Default)]
struct Window {
    /// End of the last read.
    end: AtomicU64,
    /// End of what was announced.
    announced: AtomicU64,
}

impl Window {
    /// Notes a read; true if it is near to the last one, as several threads read at a time.
    fn moves_on(&self, read: &Range<u64>, ahead: u64) -> bool {
        let last = self.end.swap(read.end, Ordering::Relaxed);
        read.start.abs_diff(last) <= ahead
    }

    /// What to announce when `read`, which moves on, is about to be read: itself and `ahead` bytes behind it, if enough
    /// of that is new.
    fn next(&self, read: &Range<u64>, ahead: u64) -> Option<Range<u64>> {
        let announced = self.announced.load(Ordering::Relaxed);
        let to = read.end.checked_add(ahead)?;
        // It may be ahead of this reader, which is the slower one of two.
        let from = if (read.start..=to.saturating_add(ahead)).contains(&announced) {
            announced.min(to)
        } else {
            read.start
        };
        if to - from < ahead / 2 {
            return None;
        }
        self.announced.store(to, Ordering::Relaxed);
        Some(from..to)
    }
}

/// Where a file on disk is read, a pack for instance.
#[derive(Debug, Default)]
pub struct FileReads {
    window: Window,
    /// Reads near to the one before, in a row.
    near: AtomicU32,
}

impl FileReads {
    /// To be called before about `len` bytes at `offset` are read; true if the last reads were near to each other. They
    /// are announced then, with what is behind them.
    pub fn before(&self, file: &File, offset: u64, len: u64) -> bool {
        let read = offset..offset + len;
        if !self.window.moves_on(&read, FILE_AHEAD_BYTES) {
            self.near.store(0, Ordering::Relaxed);
            return false;
        }
        if self.near.fetch_add(1, Ordering::Relaxed) < NEAR_MIN {
            return false;
        }
        if let Some(next) = self.window.next(&read, FILE_AHEAD_BYTES) {
            announce(file, next);
        }
        true
    }
}

/// Has the kernel fetch a part of a file.
pub(crate) fn announce(file: &File, range: Range<u64>) {
    let len = NonZeroU64::new(range.end - range.start);
    // Advice: if the kernel does not take it, what is needed is read when it is needed.
    let _ = rustix::fs::fadvise(file, range.start, len, Advice::WillNeed);
}

/// Tells the kernel not to read more of a file than is asked for.
pub fn only_when_told(file: &File) {
    // Advice, too.
    let _ = rustix::fs::fadvise(file, 0, None, Advice::Random);
}

/// Where a large file is read.
#[derive(Debug, Default)]
pub(crate) struct BlobReads(Window);

impl BlobReads {
    /// To be called before `len` bytes at `offset` of `blob` are read.
    pub(crate) fn before(&self, blob: &Blob, offset: u64, len: usize) {
        if len < BLOB_READ_BYTES_MIN {
            return;
        }
        let read = offset..offset.saturating_add(len as u64);
        if !self.0.moves_on(&read, BLOB_AHEAD_BYTES) {
            return;
        }
        let Some(next) = self.0.next(&read, BLOB_AHEAD_BYTES) else {
            return;
        };
        let end = next.end.min(blob.size());
        if let Err(error) = blob.announce(next.start..end) {
            tracing::debug!(%error, "announcing what will be read");
            return;
        }
        // What is read now is decompressed by who reads it.
        let mut start = next.start.max(read.end);
        while start < end {
            let job = start..end.min(start + JOB_BYTES);
            start = job.end;
            if !blob.core().ahead.submit(blob, job) {
                return;
            }
        }
    }
}

/// Threads that read ahead.
#[derive(Default)]
pub(crate) struct Ahead {
    jobs: OnceLock<Option<Sender<Job>>>,
}

type Job = (Blob, Range<u64>);

impl Ahead {
    /// False if there is too much to do already.
    fn submit(&self, blob: &Blob, range: Range<u64>) -> bool {
        let jobs = self.jobs.get_or_init(start);
        jobs.as_ref()
            .is_some_and(|jobs| jobs.try_send((blob.clone(), range)).is_ok())
    }
}

/// Starts the threads; `None` if that fails.
fn start() -> Option<Sender<Job>> {
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let (sender, jobs) = crossbeam_channel::bounded(JOBS_MAX);
    for number in 0..threads.min(THREADS_MAX) {
        let jobs = jobs.clone();
        let spawned = std::thread::Builder::new()
            .name(format!("read-ahead-{number}"))
            .spawn(move || work(&jobs));
        if let Err(error) = spawned {
            tracing::warn!(%error, "starting a thread that reads ahead");
            return None;
        }
    }
    Some(sender)
}

/// Ends when the store is closed: jobs hold it open, and are done before.
fn work(jobs: &Receiver<Job>) {
    for (blob, range) in jobs {
        if let Err(error) = blob.load(range) {
            // Whoever reads it hears of it.
            tracing::debug!(%error, "reading ahead");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn step(window: &Window, read: Range<u64>) -> Option<Range<u64>> {
        window
            .moves_on(&read, 100)
            .then(|| window.next(&read, 100))
            .flatten()
    }

    #[test]
    fn a_sequential_reader_is_announced_once() {
        let window = Window::default();
        assert_eq!(step(&window, 0..10), Some(0..110));
        assert_eq!(step(&window, 10..20), None);
        assert_eq!(step(&window, 20..70), Some(110..170));
        // Two threads, the other way round.
        assert_eq!(step(&window, 80..130), Some(170..230));
        assert_eq!(step(&window, 70..80), None);
    }

    #[test]
    fn readers_at_random_are_left_alone() {
        let window = Window::default();
        for start in [1000, 5000, 2000, 9000] {
            assert_eq!(step(&window, start..start + 10), None);
        }
        // One that goes on from there is not.
        assert_eq!(step(&window, 9010..9020), Some(9010..9120));
        // Nor is one that begins again.
        assert_eq!(step(&window, 0..10), None);
        assert_eq!(step(&window, 10..20), Some(10..120));
    }

    #[test]
    fn two_reads_side_by_side_are_no_sequence_of_a_file() {
        let file = tempfile::tempfile().unwrap();
        let reads = FileReads::default();
        let far = 100 * FILE_AHEAD_BYTES;
        for start in [far, 2 * far, 3 * far] {
            assert!(!reads.before(&file, start, 10));
            assert!(!reads.before(&file, start + 10, 10));
        }
        assert!(reads.before(&file, 3 * far + 20, 10));
        assert!(reads.before(&file, 3 * far + 30, 10));
        assert!(!reads.before(&file, far, 10));
    }

    #[test]
    fn the_end_of_what_can_be_addressed() {
        let window = Window::default();
        assert_eq!(step(&window, 0..u64::MAX - 1), None);
    }
}
