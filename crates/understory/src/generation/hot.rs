//! The raw tier: files that are read often or were chosen lie uncompressed beside the packs, so that a small read
//! costs a small read and not the decompression of a frame.
//!
//! ```text
//! STORE/hot/raw      sparse; a file lies at the same address as on the virtual device
//! STORE/hot/sums     sparse; 8 bytes for each block of 4 KiB: 0, or the checksum of what `raw` has there
//! STORE/hot/space    the form of all this, and the address space that it is for
//! STORE/hot/lock     empty; held by the one process that fills and evicts
//! ```
//! - A block is served only if its checksum fits, which depends on the address space's id and the block's number. A
//!   block at one address has one content for ever. So nothing needs to be written in a certain order, and checksums in
//!   memory are right whatever another process does: what a crash, a full disk, a decaying disk or an eviction left does
//!   not fit and comes from the packs instead.
//! - A file's BLAKE3 is compared before its checksums are written. They are XXH3, as those of the packs' frames: they
//!   tell decay, and nobody can choose what decays.
//! - The tier is bounded: what was not read since the last look goes first (the *clock* algorithm), by punching holes.
//!   What it holds is found again at the next start by looking where `sums` has data; what has no checksums is removed.
//! - Small reads are done with direct I/O, since the kernel keeps what it has read in the cache of the image. What is read
//!   in sequence, large files and small ones that lie one behind the other, goes through the cache of `raw`: the kernel is
//!   told not to read ahead by itself, which several threads on one file make it do badly, and what follows is announced
//!   to it, as for packs (`read_ahead` of the castore).
//!
//! Cost of a read of 4 KiB: one `pread`, and 0.3 µs for the checksum. Memory: `bytes_max`/512 of checksums (2 MiB for
//! each GiB that is held), about 110 bytes a file in the tier, and 16 KiB for counting reads.

use super::hex;
use super::space::{BLOCK_BYTES, Extent, Space};
use crate::{Error, Result, Store, metrics};
use crossbeam_channel::{Receiver, Sender, TrySendError};
use rustix::fs::{FallocateFlags, FlockOperation, Mode, OFlags, SeekFrom, fallocate, flock, seek};
use rustix::io::Errno;
use std::collections::{HashMap, VecDeque};
use std::fs::{self, File};
use std::io::ErrorKind;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use understory_castore::{FileReads, only_when_told};
use xxhash_rust::xxh3::xxh3_64_with_seed;

const DIR: &str = "hot";
const RAW: &str = "raw";
const SUMS: &str = "sums";
const LOCK: &str = "lock";
/// Holds the id of the address space that it is for.
const SPACE: &str = "space";
/// Of the form of `sums`; others are emptied.
const VERSION: u32 = 2;
/// Bytes of a block's checksum.
const SUM_BYTES: u64 = 8;
/// Bytes that are copied at once.
const COPY_BYTES: usize = 256 << 10;
/// Places that are read ahead each for itself; those that are [`PLACES`] apart share.
const PLACES: usize = 64;
/// Bytes of a place.
const PLACE_BYTES: u64 = 64 << 20;
/// Between two files that are read one after the other there may be so many bytes that are not.
const GAP_BYTES_MAX: u64 = 64 << 10;
/// Bytes of which the room is given back at once.
const SWEEP_BYTES: u64 = 64 << 20;
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
    /// The same without the cache of the kernel, where the file system can do that.
    direct: Option<File>,
    sums: File,
    id: [u8; 16],
    bytes_max: u64,
    /// Held by who may change it; others read.
    lock: Option<File>,
    files: RwLock<Files>,
    places: [Place; PLACES],
    counters: Box<[AtomicU32]>,
    hits: AtomicU64,
    misfits: AtomicU64,
    queue: Option<(Sender<Extent>, Receiver<Extent>)>,
}

#[derive(Default)]
struct Files {
    /// By address.
    known: HashMap<u64, HotFile>,
    /// In the order of looking.
    order: VecDeque<u64>,
    bytes: u64,
}

struct HotFile {
    /// Of each block.
    sums: Box<[u64]>,
    /// Since the last look.
    is_read: AtomicBool,
}

/// A part of `raw`, and how it is read.
#[derive(Default)]
struct Place {
    /// End of the last read.
    end: AtomicU64,
    ahead: FileReads,
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
        let gauges = [
            (
                "understory_raw_tier_files",
                "Files in the raw tier.",
                figures.files,
            ),
            (
                "understory_raw_tier_bytes",
                "Bytes of the files in the raw tier, in whole blocks.",
                figures.bytes,
            ),
            (
                "understory_raw_tier_bytes_max",
                "Bytes that the raw tier may hold.",
                self.bytes_max,
            ),
        ];
        for (name, help, value) in gauges {
            out.gauge(name, help, &[], value);
        }
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
            direct: open_direct(&dir.join(RAW)),
            sums: open(SUMS)?,
            id: space.id(),
            bytes_max: options.bytes_max,
            lock,
            files: RwLock::default(),
            places: std::array::from_fn(|_| Place::default()),
            counters: (0..COUNTERS).map(|_| AtomicU32::new(0)).collect(),
            hits: AtomicU64::new(0),
            misfits: AtomicU64::new(0),
            queue: None,
            dir,
        };
        only_when_told(&tier.raw);
        tier.adopt(space)?;
        if options.by_reads && tier.lock.is_some() {
            tier.queue = Some(crossbeam_channel::bounded(QUEUE_MAX));
        }
        Ok(tier)
    }

    /// Takes in what an earlier process left.
    fn adopt(&self, space: &Space) -> Result<()> {
        let path = self.dir.join(SPACE);
        let form = format!("{VERSION} {}", hex(&self.id));
        if fs::read_to_string(&path).ok().as_deref() != Some(form.as_str()) {
            if self.lock.is_none() {
                return Ok(());
            }
            for file in [&self.sums, &self.raw] {
                file.set_len(0)
                    .map_err(|e| Error::io("emptying a file in", &self.dir, e))?;
            }
            return fs::write(&path, form).map_err(|e| Error::io("writing", path, e));
        }
        let io = |e: Errno| Error::io("reading", self.dir.join(SUMS), e.into());
        let mut at = 0;
        let mut buffer = vec![0; SUMS_READ_BYTES];
        let mut behind = 0;
        let mut files = self.files_mut();
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
                    behind = extent.end();
                    if let Some(sums) = self.sums_of(&extent) {
                        files.add(&extent, sums);
                    }
                }
            }
            at += read as u64;
        }
        drop(files);
        if self.lock.is_some() {
            self.sweep();
            self.make_room(0);
        }
        Ok(())
    }

    /// The checksums of a file as they were written; `None` if they are not all there.
    fn sums_of(&self, extent: &Extent) -> Option<Box<[u64]>> {
        let blocks = (extent.end() - extent.offset) / BLOCK_BYTES;
        let mut bytes = vec![0; (blocks * SUM_BYTES) as usize];
        self.sums
            .read_exact_at(&mut bytes, extent.offset / BLOCK_BYTES * SUM_BYTES)
            .ok()?;
        let sums = bytes.chunks_exact(8).map(|sum| {
            let mut bytes = [0; 8];
            bytes.copy_from_slice(sum);
            Some(u64::from_le_bytes(bytes)).filter(|sum| *sum != 0)
        });
        sums.collect()
    }

    /// Gives back the room of what no file here has: an interrupted process left it.
    fn sweep(&self) {
        let mut known: Vec<(u64, u64)> = self
            .files()
            .known
            .iter()
            .map(|(offset, file)| (*offset, offset + file.bytes()))
            .collect();
        known.sort_unstable();
        known.push((u64::MAX, u64::MAX));
        let mut at = 0;
        for (start, end) in known {
            while at < start {
                let Ok(data) = seek(&self.raw, SeekFrom::Data(at)) else {
                    break;
                };
                if data >= start {
                    break;
                }
                let hole = seek(&self.raw, SeekFrom::Hole(data)).unwrap_or(start);
                at = hole.min(start).min(data + SWEEP_BYTES);
                self.punch(data, at - data);
            }
            at = end;
        }
    }

    /// What it has done so far.
    pub(crate) fn figures(&self) -> HotFigures {
        let files = self.files();
        HotFigures {
            files: files.known.len() as u64,
            bytes: files.bytes,
            hits: self.hits.load(Ordering::Relaxed),
            misfits: self.misfits.load(Ordering::Relaxed),
        }
    }

    /// Fills `buffer` from whole blocks of `extent`, from `within` it on; false if they are not here, or not whole.
    pub(crate) fn read(&self, extent: &Extent, within: u64, buffer: &mut [u8]) -> bool {
        let len = buffer.len() as u64;
        if !within.is_multiple_of(BLOCK_BYTES) || !len.is_multiple_of(BLOCK_BYTES) {
            return false;
        }
        let blocks = (within / BLOCK_BYTES) as usize..((within + len) / BLOCK_BYTES) as usize;
        let sums: Vec<u64> = match self.files().known.get(&extent.offset) {
            Some(file) => {
                file.is_read.store(true, Ordering::Relaxed);
                file.sums[blocks].to_vec()
            }
            None => return false,
        };
        let offset = extent.offset + within;
        if let Err(error) = self.fetch(offset, buffer) {
            tracing::debug!("reading {}: {error}", self.dir.join(RAW).display());
            return false;
        }
        let blocks = buffer.chunks_exact(BLOCK_BYTES as usize);
        for ((number, block), sum) in (offset / BLOCK_BYTES..).zip(blocks).zip(sums) {
            if sum != self.sum(number, block) {
                // One that was evicted meanwhile is none.
                if self.forget(extent.offset) {
                    self.misfits.fetch_add(1, Ordering::Relaxed);
                    tracing::debug!("the raw tier has other bytes in block {number}");
                }
                return false;
            }
        }
        self.hits.fetch_add(1, Ordering::Relaxed);
        true
    }

    fn fetch(&self, offset: u64, buffer: &mut [u8]) -> std::io::Result<()> {
        let len = buffer.len() as u64;
        let place = &self.places[(offset / PLACE_BYTES) as usize % PLACES];
        if place.goes_on(offset, len) || buffer.len() > SMALL_READ_BYTES {
            place.ahead.before(&self.raw, offset, len);
        } else if let Some(direct) = &self.direct {
            match direct.read_exact_at(buffer, offset) {
                // This file system wants other addresses in memory.
                Err(error) if error.kind() == ErrorKind::InvalidInput => {}
                other => return other,
            }
        }
        self.raw.read_exact_at(buffer, offset)
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

    /// Takes a file in; false if it does not fit. Not durable: see [`RawTier::sync`].
    ///
    /// # Errors
    /// The file is damaged; a full disk; another process fills the tier.
    pub(crate) fn insert(&self, store: &Store, extent: &Extent) -> Result<bool> {
        if self.lock.is_none() {
            return Err(Error::environment("another process fills the raw tier"));
        }
        let bytes = extent.end() - extent.offset;
        if self.files().known.contains_key(&extent.offset) {
            return Ok(true);
        }
        if bytes > self.bytes_max / FILE_PART {
            return Ok(false);
        }
        self.make_room(bytes);
        match self.copy(store, extent) {
            Ok(sums) => {
                self.files_mut().add(extent, sums);
                Ok(true)
            }
            Err(error) => {
                self.punch(extent.offset, bytes);
                Err(error)
            }
        }
    }

    /// Makes what was taken in durable.
    ///
    /// # Errors
    /// I/O.
    pub(crate) fn sync(&self) -> Result<()> {
        for (name, file) in [(RAW, &self.raw), (SUMS, &self.sums)] {
            file.sync_data()
                .map_err(|e| Error::io("syncing", self.dir.join(name), e))?;
        }
        Ok(())
    }

    /// Returns the checksums of the file's blocks.
    fn copy(&self, store: &Store, extent: &Extent) -> Result<Box<[u64]>> {
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
                sums.push(self.sum(number, block));
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
        let bytes: Vec<u8> = sums.iter().flat_map(|sum| sum.to_le_bytes()).collect();
        self.sums
            .write_all_at(&bytes, extent.offset / BLOCK_BYTES * SUM_BYTES)
            .map_err(|e| Error::io("writing", self.dir.join(SUMS), e))?;
        Ok(sums.into())
    }

    /// Evicts until `bytes` more fit.
    fn make_room(&self, bytes: u64) {
        let mut gone = Vec::new();
        {
            let mut files = self.files_mut();
            while files.bytes + bytes > self.bytes_max
                && let Some(offset) = files.order.pop_front()
            {
                let was_read = files
                    .known
                    .get(&offset)
                    .is_some_and(|file| file.is_read.swap(false, Ordering::Relaxed));
                if was_read {
                    files.order.push_back(offset);
                } else if let Some(file) = files.known.remove(&offset) {
                    files.bytes -= file.bytes();
                    gone.push((offset, file.bytes()));
                }
            }
        }
        for (offset, bytes) in gone {
            self.punch(offset, bytes);
        }
    }

    /// Takes out a file that is not whole, so that it may be taken in again; false if it is not here.
    fn forget(&self, offset: u64) -> bool {
        let removed = {
            let mut files = self.files_mut();
            let removed = files.known.remove(&offset);
            if let Some(file) = &removed {
                files.bytes -= file.bytes();
                files.order.retain(|known| *known != offset);
            }
            removed
        };
        if let Some(file) = &removed
            && self.lock.is_some()
        {
            self.punch(offset, file.bytes());
        }
        removed.is_some()
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
    fn sum(&self, number: u64, block: &[u8]) -> u64 {
        let seed = xxh3_64_with_seed(&self.id, number);
        xxh3_64_with_seed(block, seed).max(1)
    }

    fn files(&self) -> RwLockReadGuard<'_, Files> {
        self.files.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn files_mut(&self) -> RwLockWriteGuard<'_, Files> {
        self.files.write().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Place {
    /// Notes a read; true if it begins where the last one has ended, or little behind.
    fn goes_on(&self, offset: u64, len: u64) -> bool {
        let last = self.end.swap(offset + len, Ordering::Relaxed);
        (last..=last + GAP_BYTES_MAX).contains(&offset)
    }
}

impl HotFile {
    /// In whole blocks.
    fn bytes(&self) -> u64 {
        self.sums.len() as u64 * BLOCK_BYTES
    }
}

impl Files {
    fn add(&mut self, extent: &Extent, sums: Box<[u64]>) {
        let file = HotFile {
            sums,
            is_read: AtomicBool::new(true),
        };
        self.bytes += file.bytes();
        match self.known.insert(extent.offset, file) {
            None => self.order.push_back(extent.offset),
            Some(old) => self.bytes -= old.bytes(),
        }
    }
}

fn open_direct(path: &Path) -> Option<File> {
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::DIRECT;
    match rustix::fs::open(path, flags, Mode::empty()) {
        Ok(file) => Some(file.into()),
        Err(error) => {
            tracing::debug!("opening {} for direct I/O: {error}", path.display());
            None
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
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(Error::io("opening", dir.join(LOCK), error)),
    };
    match flock(&lock, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => fs::remove_dir_all(&dir).map_err(|e| Error::io("removing", dir, e)),
        Err(Errno::WOULDBLOCK) => Err(Error::user("the raw tier is in use")
            .with_hint("unmount what uses it, or run `understory down`")),
        Err(error) => Err(Error::io("locking", dir.join(LOCK), error.into())),
    }
}
