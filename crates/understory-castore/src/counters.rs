//! Counters of what a castore does: cheap to bump, summed when somebody asks.
//!
//! A [`Sharded`] value exists [`SHARDS`] times, each copy on cache lines of its own; a thread always
//! bumps the same copy. So a bump is one relaxed addition to a line that other cores seldom have: 1 to
//! 5 ns, where one shared line costs 20 to 100 ns under contention. A reader adds the copies up; it may
//! see one event in one counter and not yet in another.
//!
//! Memory: [`SHARDS`] times the counters, a few KiB for a castore.

use crate::writer::WriterCounters;
use std::cell::Cell;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

/// Copies of sharded counters: about the threads that bump at the same time on usual machines.
pub const SHARDS: usize = 8;

/// A number that only grows. Wraps after 2^64.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Zero.
    pub const fn new() -> Self {
        Self(AtomicU64::new(0))
    }
    /// Adds one.
    pub fn bump(&self) {
        self.add(1);
    }
    /// Adds `n`.
    pub fn add(&self, n: u64) {
        self.0.fetch_add(n, Ordering::Relaxed);
    }
    /// The number.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// A copy, on cache lines of its own; processors fetch lines in pairs.
#[derive(Debug, Default)]
#[repr(align(128))]
struct Padded<T>(T);

/// Several copies of `T`, of which each thread uses one.
#[derive(Debug, Default)]
pub struct Sharded<T> {
    shards: [Padded<T>; SHARDS],
}

static NEXT_SHARD: AtomicUsize = AtomicUsize::new(0);
thread_local! {
    static SHARD: Cell<usize> = const { Cell::new(usize::MAX) };
}

/// The copy that this thread uses.
fn own_shard() -> usize {
    // A thread that is being torn down has no number any more.
    SHARD
        .try_with(|shard| {
            if shard.get() == usize::MAX {
                shard.set(NEXT_SHARD.fetch_add(1, Ordering::Relaxed) % SHARDS);
            }
            shard.get()
        })
        .unwrap_or(0)
}

impl<T> Sharded<T> {
    /// This thread's copy.
    pub fn local(&self) -> &T {
        &self.shards[own_shard()].0
    }
    /// All copies.
    pub fn all(&self) -> impl Iterator<Item = &T> {
        self.shards.iter().map(|shard| &shard.0)
    }
    /// The sum of a number over all copies.
    pub fn sum(&self, number: impl Fn(&T) -> u64) -> u64 {
        self.all()
            .fold(0, |sum, shard| sum.wrapping_add(number(shard)))
    }
}

/// What readers of a castore bump.
#[derive(Debug, Default)]
pub(crate) struct ReadCounts {
    pub(crate) frame_hits: Counter,
    pub(crate) frame_misses: Counter,
    pub(crate) read_bytes: Counter,
    pub(crate) decompressed_bytes: Counter,
    pub(crate) directory_hits: Counter,
    pub(crate) directory_misses: Counter,
    pub(crate) damaged_frames: Counter,
}

/// What a castore has done since it was opened in this process, and what its caches hold now.
#[derive(Debug, Clone, Copy, Default)]
pub struct Counters {
    /// Frames that were in memory when they were needed.
    pub frame_hits: u64,
    /// Frames that had to be read.
    pub frame_misses: u64,
    /// Bytes of frames read from packs, as they lie there.
    pub read_bytes: u64,
    /// Bytes of frames read, decompressed.
    pub decompressed_bytes: u64,
    /// Directories that were in memory.
    pub directory_hits: u64,
    /// Directories that had to be decoded.
    pub directory_misses: u64,
    /// Frames found damaged.
    pub damaged_frames: u64,
    /// Bytes that decompressed frames take in memory now.
    pub frame_cache_bytes: u64,
    /// Bytes that decoded directories take in memory now.
    pub directory_cache_bytes: u64,
    /// What all writers of this process together were given and stored.
    pub writer: WriterCounters,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_lost_between_threads() {
        let counts: Sharded<ReadCounts> = Sharded::default();
        std::thread::scope(|scope| {
            for _ in 0..3 * SHARDS {
                scope.spawn(|| {
                    for _ in 0..1000 {
                        counts.local().frame_hits.bump();
                        counts.local().read_bytes.add(3);
                    }
                });
            }
        });
        let threads = 3 * SHARDS as u64;
        assert_eq!(counts.sum(|c| c.frame_hits.get()), threads * 1000);
        assert_eq!(counts.sum(|c| c.read_bytes.get()), threads * 3000);
        assert_eq!(counts.sum(|c| c.frame_misses.get()), 0);
    }

    #[test]
    fn copies_share_no_cache_line() {
        let counts: Sharded<Counter> = Sharded::default();
        let mut at: Vec<usize> = counts.all().map(|c| std::ptr::from_ref(c).addr()).collect();
        at.sort_unstable();
        assert!(at.windows(2).all(|pair| pair[1] - pair[0] >= 128));
    }
}
