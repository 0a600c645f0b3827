//! The raw tier: files that are read often or were chosen lie uncompressed beside the packs, so that a small read
//! costs a small read and not the decompression of a frame.
//!
//! ```text
//! STORE/hot/raw      sparse; a file lies at the same address as on the virtual device
//! STORE/hot/sums     sparse; 8 bytes for each block of 4 KiB: 0, or the checksum of what `raw` has there
//! STORE/hot/lock     empty; held by the one process that fills and evicts
//! ```
//! - A block is served only if its checksum fits, which has the address space's id and the block's number in it. So
//!   nothing needs to be written in a certain order: what a crash, a full disk or a decaying disk left does not fit and
//!   comes from the packs instead.
//! - A file's BLAKE3 is compared before its checksums are written.
//! - The tier is bounded: what was not read since the last look goes first (the *clock* algorithm), by punching holes.
//!   What it holds is found again at the next start by looking where `sums` has data.
//!
//! Cost of a read of 4 KiB: two `pread`s (the page of checksums covers 2 MiB) and BLAKE3 over 4 KiB, some 3 µs. Memory:
//! about 60 bytes a file in the tier, and 16 KiB for counting reads.

use super::space::{BLOCK_BYTES, Extent, Space};
use super::{hex, lock_mutex};
use crate::{Error, Result, Store, metrics};
use crossbeam_channel::{Receiver, Sender, TrySendError};
use rustix::fs::{FallocateFlags, FlockOperation, SeekFrom, fallocate, flock, seek};
use rustix::io::Errno;
use std::collections::{HashMap, VecDeque};
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};

const DIR: &str = "hot";
const RAW: &str = "raw";
const SUMS: &str = "sums";
const LOCK: &str = "lock";
/// Holds the id of the address space that it is for.
const SPACE: &str = "space";
/// Bytes of a block's checksum.
const SUM_BYTES: u64 = 8;
/// Bytes that are copied at once.
const COPY_BYTES: usize = 256 << 10;
/// Bytes of checksums that are read at once when the tier is opened.
const SUMS_READ_BYTES: usize = 64 << 10;
/// A file is taken in when so many small reads fell on its counter.
const READS_MIN: u32 = 8;
/// Counters of small reads; files share them by their address.
const COUNTERS: usize = 4096;
/// Reads up to this many bytes are small: more is reading ahead, which decompresses what is asked for next anyhow.
const SMALL_READ_BYTES: usize = 16 << 10;
/// Files that wait for being taken in; what comes while they do is taken in another time.
const QUEUE_MAX: usize = 64;
/// A file may take this part of the tier.
const FILE_PART: u64 = 4;
/// What the tier holds when nobody says.
pub const HOT_BYTES_DEFAULT: u64 = 1 << 30;

/// How the raw tier is used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HotOptions {
    /// Bytes that it may take on disk.
    pub bytes_max: u64,
    /// Take in what is read often. Without, it holds what was put there.
    pub by_reads: bool,
}

impl Default for HotOptions {
    fn default() -> Self {
        Self {
            bytes_max: HOT_BYTES_DEFAULT,
            by_reads: true,
        }
    }
}

/// What the raw tier has done.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "camelCase")]
pub struct HotFigures {
    /// Files in it.
    pub files: u64,
    /// Bytes of them, in whole blocks.
    pub bytes: u64,
    /// Reads that it has served.
    pub hits: u64,
    /// Blocks whose checksum did not fit.
    pub misfits: u64,
}

/// The raw tier of a store.
pub(crate) struct RawTier {
    dir: PathBuf,
    raw: File,
    sums: File,
    id: [u8; 16],
    bytes_max: u64,
    /// Held by who may change it; others read.
    lock: Option<File>,
    files: Mutex<Files>,
    counters: Box<[AtomicU32]>,
    hits: AtomicU64,
    misfits: AtomicU64,
    queue: Option<(Sender<Extent>, Receiver<Extent>)>,
}

#[derive(Default)]
struct Files {
    /// By address: bytes in whole blocks, and whether it was read since the last look.
    known: HashMap<u64, (u64, AtomicBool)>,
    /// In the order of looking.
    order: VecDeque<u64>,
    bytes: u64,
}

impl metrics::Source for RawTier {
    fn collect(&self, out: &mut metrics::Snapshot) {
        let figures = self.figures();
        let counters = [
            (
                "understory_raw_tier_hits_total",
                "Reads that the raw tier has served.",
                figures.hits,
            ),
            (
                "understory_raw_tier_misfits_total",
                "Blocks of the raw tier whose checksum did not fit; they were read from packs.",
                figures.misfits,
            ),
        ];
        for (name, help, value) in counters {
            out.counter(name, help, &[], value);
        }
        out.gauge(
            "understory_raw_tier_bytes",
            "Bytes of the files in the raw tier, in whole blocks.",
            &[],
            figures.bytes,
        );
    }
}

impl RawTier {
    /// Opens the tier of `store`, or makes one. A tier for another address space is emptied.
    ///
    /// # Errors
    /// I/O.
    pub(crate) fn open(store: &Store, space: &Space, options: &HotOptions) -> Result<Self> {
        let dir = store.dir().join(DIR);
        fs::create_dir_all(&dir).map_err(|e| Error::io("creating", &dir, e))?;
        let open = |name: &str| {
            let path = dir.join(name);
            File::options()
                .read(true)
                .write(true)
                .create(true)
                .truncate(false)
                .open(&path)
                .map_err(|e| Error::io("opening", path, e))
        };
        let lock = open(LOCK)?;
        let lock = match flock(&lock, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Some(lock),
            // Another process fills it: reading is free for all.
            Err(Errno::WOULDBLOCK) => None,
            Err(error) => return Err(Error::io("locking", dir.join(LOCK), error.into())),
        };
        let mut tier = Self {
            raw: open(RAW)?,
            sums: open(SUMS)?,
            id: space.id(),
            bytes_max: options.bytes_max,
            lock,
            files: Mutex::default(),
            counters: (0..COUNTERS).map(|_| AtomicU32::new(0)).collect(),
            hits: AtomicU64::new(0),
            misfits: AtomicU64::new(0),
            queue: None,
            dir,
        };
        tier.adopt(space)?;
        if options.by_reads && tier.lock.is_some() {
            tier.queue = Some(crossbeam_channel::bounded(QUEUE_MAX));
        }
        Ok(tier)
    }

    /// Takes in what an earlier process left.
    fn adopt(&self, space: &Space) -> Result<()> {
        let path = self.dir.join(SPACE);
        let id = hex(&self.id);
        if fs::read_to_string(&path).ok().as_deref() != Some(id.as_str()) {
            if self.lock.is_none() {
                return Ok(());
            }
            for file in [&self.sums, &self.raw] {
                file.set_len(0)
                    .map_err(|e| Error::io("emptying a file in", &self.dir, e))?;
            }
            return fs::write(&path, id).map_err(|e| Error::io("writing", path, e));
        }
        let io = |e: Errno| Error::io("reading", self.dir.join(SUMS), e.into());
        let mut at = 0;
        let mut buffer = vec![0; SUMS_READ_BYTES];
        let mut behind = 0;
        let mut files = lock_mutex(&self.files);
        loop {
            at = match seek(&self.sums, SeekFrom::Data(at)) {
                // Behind the last data.
                Err(Errno::NXIO) => break,
                other => other.map_err(io)? / SUM_BYTES * SUM_BYTES,
            };
            let read = rustix::io::pread(&self.sums, &mut buffer[..], at).map_err(io)?;
            if read == 0 {
                break;
            }
            for (number, sum) in (at / SUM_BYTES..).zip(buffer[..read].chunks(8)) {
                let offset = number * BLOCK_BYTES;
                if sum.iter().any(|byte| *byte != 0)
                    && offset >= behind
                    && let Some(extent) = space.find(offset)?
                {
                    files.add(&extent);
                    behind = extent.end();
                }
            }
            at += read as u64;
        }
        drop(files);
        if self.lock.is_some() {
            self.make_room(0);
        }
        Ok(())
    }

    /// What it has done so far.
    pub(crate) fn figures(&self) -> HotFigures {
        let files = lock_mutex(&self.files);
        HotFigures {
            files: files.known.len() as u64,
            bytes: files.bytes,
            hits: self.hits.load(Ordering::Relaxed),
            misfits: self.misfits.load(Ordering::Relaxed),
        }
    }

    /// Fills `buffer` from whole blocks of `extent`, from `within` it on; false if they are not here, or not whole.
    pub(crate) fn read(&self, extent: &Extent, within: u64, buffer: &mut [u8]) -> bool {
        {
            let files = lock_mutex(&self.files);
            match files.known.get(&extent.offset) {
                Some((_, is_read)) => is_read.store(true, Ordering::Relaxed),
                None => return false,
            }
        }
        if !within.is_multiple_of(BLOCK_BYTES) {
            return false;
        }
        let first = (extent.offset + within) / BLOCK_BYTES;
        let blocks = (buffer.len() as u64).div_ceil(BLOCK_BYTES);
        let mut sums = vec![0; (blocks * SUM_BYTES) as usize];
        if self
            .sums
            .read_exact_at(&mut sums, first * SUM_BYTES)
            .is_err()
            || self.raw.read_exact_at(buffer, first * BLOCK_BYTES).is_err()
        {
            return false;
        }
        let mut block = [0; BLOCK_BYTES as usize];
        for ((number, bytes), sum) in (first..)
            .zip(buffer.chunks(BLOCK_BYTES as usize))
            .zip(sums.chunks(8))
        {
            let whole = if bytes.len() == block.len() {
                bytes
            } else if within + buffer.len() as u64 == extent.size {
                // The end of the file: zeros follow.
                block[..bytes.len()].copy_from_slice(bytes);
                block[bytes.len()..].fill(0);
                &block[..]
            } else {
                return false;
            };
            if *sum != self.sum(number, whole) {
                self.misfits.fetch_add(1, Ordering::Relaxed);
                tracing::debug!("the raw tier has other bytes in block {number}");
                self.forget(extent.offset);
                return false;
            }
        }
        self.hits.fetch_add(1, Ordering::Relaxed);
        true
    }

    /// Counts a read that came from the packs; a file that is read often in small pieces is taken in.
    pub(crate) fn count(&self, extent: &Extent, bytes: usize) {
        let Some((queue, _)) = &self.queue else {
            return;
        };
        if bytes > SMALL_READ_BYTES || extent.end() - extent.offset > self.bytes_max / FILE_PART {
            return;
        }
        let counter = &self.counters[(extent.offset / BLOCK_BYTES) as usize % COUNTERS];
        if counter.fetch_add(1, Ordering::Relaxed) + 1 < READS_MIN {
            return;
        }
        counter.store(0, Ordering::Relaxed);
        if let Err(TrySendError::Full(_)) = queue.try_send(*extent) {
            tracing::trace!("the raw tier is busy");
        }
    }

    /// What waits for being taken in; ends when the tier does.
    pub(crate) fn wanted(&self) -> Option<Receiver<Extent>> {
        self.queue.as_ref().map(|(_, receiver)| receiver.clone())
    }

    /// Takes a file in; false if it does not fit. Durable on return.
    ///
    /// # Errors
    /// The file is damaged; a full disk; another process fills the tier.
    pub(crate) fn insert(&self, store: &Store, extent: &Extent) -> Result<bool> {
        if self.lock.is_none() {
            return Err(Error::environment("another process fills the raw tier"));
        }
        let bytes = extent.end() - extent.offset;
        if lock_mutex(&self.files).known.contains_key(&extent.offset) {
            return Ok(true);
        }
        if bytes > self.bytes_max / FILE_PART {
            return Ok(false);
        }
        self.make_room(bytes);
        match self.copy(store, extent) {
            Ok(()) => {
                lock_mutex(&self.files).add(extent);
                Ok(true)
            }
            Err(error) => {
                self.punch(extent.offset, bytes);
                Err(error)
            }
        }
    }

    fn copy(&self, store: &Store, extent: &Extent) -> Result<()> {
        let blob = store.castore().blob(&extent.digest, extent.size)?;
        let mut hasher = blake3::Hasher::new();
        let mut sums = Vec::new();
        let mut buffer = vec![0; COPY_BYTES];
        let mut at = 0;
        while at < extent.size {
            let read = blob.read_at(at, &mut buffer)?;
            hasher.update(&buffer[..read]);
            let whole = read.next_multiple_of(BLOCK_BYTES as usize);
            buffer[read..whole].fill(0);
            let first = (extent.offset + at) / BLOCK_BYTES;
            for (number, block) in (first..).zip(buffer[..whole].chunks(BLOCK_BYTES as usize)) {
                sums.extend(self.sum(number, block));
            }
            self.raw
                .write_all_at(&buffer[..whole], extent.offset + at)
                .map_err(|e| Error::io("writing", self.dir.join(RAW), e))?;
            at += read as u64;
        }
        if hasher.finalize().as_bytes() != &extent.digest.0 {
            return Err(Error::corrupt(format!(
                "file {}: its bytes have another digest",
                extent.digest
            )));
        }
        self.raw
            .sync_data()
            .map_err(|e| Error::io("syncing", self.dir.join(RAW), e))?;
        self.sums
            .write_all_at(&sums, extent.offset / BLOCK_BYTES * SUM_BYTES)
            .map_err(|e| Error::io("writing", self.dir.join(SUMS), e))
    }

    /// Evicts until `bytes` more fit.
    fn make_room(&self, bytes: u64) {
        let mut gone = Vec::new();
        {
            let mut files = lock_mutex(&self.files);
            while files.bytes + bytes > self.bytes_max
                && let Some(offset) = files.order.pop_front()
            {
                let was_read = files
                    .known
                    .get(&offset)
                    .is_some_and(|(_, is_read)| is_read.swap(false, Ordering::Relaxed));
                if was_read {
                    files.order.push_back(offset);
                } else if let Some((bytes, _)) = files.known.remove(&offset) {
                    files.bytes -= bytes;
                    gone.push((offset, bytes));
                }
            }
        }
        for (offset, bytes) in gone {
            self.punch(offset, bytes);
        }
    }

    /// Takes out a file that is not whole, so that it may be taken in again.
    fn forget(&self, offset: u64) {
        let removed = {
            let mut files = lock_mutex(&self.files);
            let removed = files.known.remove(&offset);
            if let Some((bytes, _)) = &removed {
                files.bytes -= bytes;
                files.order.retain(|known| *known != offset);
            }
            removed
        };
        if let Some((bytes, _)) = removed
            && self.lock.is_some()
        {
            self.punch(offset, bytes);
        }
    }

    /// Gives room back. What stays because it cannot be is overwritten some day.
    fn punch(&self, offset: u64, bytes: u64) {
        let zeros = vec![0; (bytes / BLOCK_BYTES * SUM_BYTES) as usize];
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        let sums = self
            .sums
            .write_all_at(&zeros, offset / BLOCK_BYTES * SUM_BYTES);
        let raw = fallocate(&self.raw, flags, offset, bytes);
        if let Err(error) = sums.and(raw.map_err(Into::into)) {
            tracing::warn!("giving back room of the raw tier: {error}");
        }
    }

    /// The checksum of a block; never 0.
    fn sum(&self, number: u64, block: &[u8]) -> [u8; 8] {
        let mut hasher = blake3::Hasher::new();
        hasher.update(block);
        hasher.update(&self.id);
        hasher.update(&number.to_le_bytes());
        let mut sum = [0; 8];
        sum.copy_from_slice(&hasher.finalize().as_bytes()[..8]);
        if sum == [0; 8] { [1; 8] } else { sum }
    }
}

impl Files {
    fn add(&mut self, extent: &Extent) {
        let bytes = extent.end() - extent.offset;
        if self
            .known
            .insert(extent.offset, (bytes, AtomicBool::new(true)))
            .is_none()
        {
            self.order.push_back(extent.offset);
            self.bytes += bytes;
        }
    }
}

/// Removes the raw tier of the store in `store`.
///
/// # Errors
/// A process fills it; I/O.
pub fn clear(store: &Path) -> Result<()> {
    let dir = store.join(DIR);
    let lock = match File::open(dir.join(LOCK)) {
        Ok(lock) => lock,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(Error::io("opening", dir.join(LOCK), error)),
    };
    match flock(&lock, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => fs::remove_dir_all(&dir).map_err(|e| Error::io("removing", dir, e)),
        Err(Errno::WOULDBLOCK) => Err(Error::user("the raw tier is in use")
            .with_hint("unmount what uses it, or run `understory down`")),
        Err(error) => Err(Error::io("locking", dir.join(LOCK), error.into())),
    }
}
