//! The virtual address space: where in the virtual blob device each file lies, for ever.
//!
//! `extents` is an append-only file of fixed records in address order, drawn in `docs/disk-format.md`.
//! A file of the castore (digest, size) has one extent, aligned to [`BLOCK_BYTES`]; extents follow one
//! another without gaps but the padding to the next block. Once a generation has been published with a
//! number of extents, those records never change, so that every older image stays right.
//!
//! - [`Space`] finds the extent at an offset: what the blob server does for each request. A search is
//!   some 16 loads from memory, and one page of 64 records that is cached or read. Memory is bounded:
//!   512 KiB of keys and 1 MiB of pages, whatever the number of extents.
//! - [`Appender`] finds and gives extents: what the making of a generation does. It reads the whole
//!   file once (64 bytes an extent) and keeps 16 bytes an extent in memory.
//! - Which write publishes: the generation's `info.json`, which says how many records it relies on.
//!   What lies behind the highest such number is the rest of an interrupted making, and is cut off by
//!   the next one.

use crate::files::open_or_create;
use crate::{Error, Result};
use quick_cache::sync::Cache;
use std::fs::File;
use std::io::{BufReader, Read};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock};
use understory_castore::Digest;

/// Alignment of extents: the block of the images, and the page of the kernel.
pub(crate) const BLOCK_BYTES: u64 = 4096;
/// Blocks of the address space: an image gives a block 32 bits, and begins with its own. Nearly 16 TiB.
pub(crate) const SPACE_BLOCKS_MAX: u64 = (u32::MAX - understory_erofs::DEVICE_FIRST_BLOCK) as u64;

const MAGIC: [u8; 8] = *b"USTYEXTS";
const VERSION: u32 = 1;
/// Bytes of a record, and of the header, which takes the place of the first one.
const RECORD_BYTES: usize = 64;
/// Records of one page that is read and cached.
const PAGE_RECORDS: u64 = 64;
const PAGE_BYTES: usize = RECORD_BYTES * PAGE_RECORDS as usize;
/// Pages that are cached: 1 MiB.
const PAGES_CACHED: usize = 256;
/// Keys that are kept in memory, each the offset at which a run of pages begins: 512 KiB. Up to four
/// million extents each page has one.
const FENCES_MAX: u64 = 1 << 16;
/// A fence that was not read yet. No extent begins there.
const UNKNOWN: u64 = u64::MAX;
/// Bytes that an appender collects before it writes.
const APPEND_BYTES: usize = 1 << 20;

/// Where a file lies in the address space.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Extent {
    /// Where it begins; a multiple of [`BLOCK_BYTES`].
    pub(crate) offset: u64,
    /// Bytes of the file; at least 1.
    pub(crate) size: u64,
    /// The file.
    pub(crate) digest: Digest,
}

impl Extent {
    /// Where the next extent begins.
    pub(crate) fn end(&self) -> u64 {
        self.offset + self.size.next_multiple_of(BLOCK_BYTES)
    }

    fn encode(&self, id: &[u8; 16]) -> [u8; RECORD_BYTES] {
        let mut bytes = [0; RECORD_BYTES];
        bytes[..8].copy_from_slice(&self.offset.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.size.to_le_bytes());
        bytes[16..48].copy_from_slice(&self.digest.0);
        let checksum = checksum(id, &bytes[..56]);
        bytes[56..].copy_from_slice(&checksum);
        bytes
    }

    fn decode(bytes: &[u8], id: &[u8; 16]) -> Result<Self, String> {
        if bytes.len() != RECORD_BYTES {
            return Err(format!(
                "expected {RECORD_BYTES} bytes, found {}",
                bytes.len()
            ));
        }
        if bytes[56..] != checksum(id, &bytes[..56]) {
            return Err("its checksum does not fit".to_owned());
        }
        let mut digest = [0; 32];
        digest.copy_from_slice(&bytes[16..48]);
        let extent = Self {
            offset: u64_at(bytes, 0),
            size: u64_at(bytes, 8),
            digest: Digest(digest),
        };
        let end = extent.offset.checked_add(extent.size);
        if extent.size == 0
            || !extent.offset.is_multiple_of(BLOCK_BYTES)
            || end.is_none_or(|end| end > SPACE_BLOCKS_MAX * BLOCK_BYTES)
            || bytes[48..56] != [0; 8]
        {
            return Err(format!(
                "{} bytes at {} are no extent",
                extent.size, extent.offset
            ));
        }
        Ok(extent)
    }
}

/// The address space, for reading. Shared by threads.
pub(crate) struct Space {
    path: PathBuf,
    file: File,
    id: [u8; 16],
    view: RwLock<Arc<View>>,
    pages: Cache<(u64, u64), Arc<[u8]>>,
}

/// What of the file is published, and its sparse keys.
struct View {
    /// Extents.
    count: u64,
    /// Pages between two fences.
    stride: u64,
    fences: Vec<AtomicU64>,
}

impl View {
    fn new(count: u64) -> Self {
        // The header is slot 0, so `count` extents fill the slots up to `count`.
        let pages = (count + 1).div_ceil(PAGE_RECORDS);
        let stride = pages.div_ceil(FENCES_MAX).max(1);
        Self {
            count,
            stride,
            fences: (0..pages.div_ceil(stride))
                .map(|_| AtomicU64::new(UNKNOWN))
                .collect(),
        }
    }
}

impl Space {
    /// Opens the address space in the file `path`, of which `count` extents are published.
    ///
    /// # Errors
    /// Not there, not of this version, shorter than what is published.
    pub(crate) fn open(path: &Path, count: u64) -> Result<Self> {
        let file = File::open(path).map_err(|e| Error::io("opening", path, e))?;
        let id = read_header(&file, path)?;
        let space = Self {
            path: path.to_owned(),
            file,
            id,
            view: RwLock::new(Arc::new(View::new(0))),
            pages: Cache::new(PAGES_CACHED),
        };
        space.grow(count)?;
        Ok(space)
    }

    /// Which address space it is: images of another one do not fit.
    pub(crate) fn id(&self) -> [u8; 16] {
        self.id
    }

    /// Takes in that `count` extents are published by now; never fewer than before.
    ///
    /// # Errors
    /// The file is shorter than that.
    pub(crate) fn grow(&self, count: u64) -> Result<()> {
        let mut view = self.view.write().unwrap_or_else(PoisonError::into_inner);
        if count <= view.count && view.count > 0 {
            return Ok(());
        }
        let found = self
            .file
            .metadata()
            .map_err(|e| Error::io("examining", &self.path, e))?
            .len();
        let expected = (count + 1) * RECORD_BYTES as u64;
        if found < expected {
            return Err(Error::corrupt(format!(
                "{}: expected {expected} bytes at least, found {found}",
                self.path.display()
            ))
            .with_hint(RENEW_HINT));
        }
        *view = Arc::new(View::new(count));
        Ok(())
    }

    /// Finds the extent whose blocks hold the byte at `offset`; `None` behind the last one.
    ///
    /// # Errors
    /// I/O; the records around `offset` are damaged.
    pub(crate) fn find(&self, offset: u64) -> Result<Option<Extent>> {
        let view = Arc::clone(&self.view.read().unwrap_or_else(PoisonError::into_inner));
        if view.count == 0 {
            return Ok(None);
        }
        // The last fence that is not behind the offset, then the last page, then the last record.
        let fence = last_not_above(0, view.fences.len() as u64, offset, |at| {
            self.fence(&view, at)
        })?;
        let pages = (view.count + 1).div_ceil(PAGE_RECORDS);
        let first = fence * view.stride;
        let page = last_not_above(first, (first + view.stride).min(pages), offset, |page| {
            self.first_of_page(page)
        })?;
        let records = (view.count + 1 - page * PAGE_RECORDS).min(PAGE_RECORDS);
        let bytes = self.page(page, records)?;
        let slot = last_not_above(u64::from(page == 0), records, offset, |slot| {
            Ok(u64_at(&bytes, slot as usize * RECORD_BYTES))
        })?;
        let number = page * PAGE_RECORDS + slot;
        let at = slot as usize * RECORD_BYTES;
        let extent = Extent::decode(&bytes[at..at + RECORD_BYTES], &self.id)
            .map_err(|reason| damaged(&self.path, number, &reason))?;
        if (extent.offset..extent.end()).contains(&offset) {
            return Ok(Some(extent));
        }
        if number == view.count && offset >= extent.end() {
            return Ok(None);
        }
        let reason = format!(
            "expected one around {offset}, found {} bytes at {}",
            extent.size, extent.offset
        );
        Err(damaged(&self.path, number, &reason))
    }

    fn fence(&self, view: &View, at: u64) -> Result<u64> {
        let fence = &view.fences[at as usize];
        let known = fence.load(Ordering::Relaxed);
        if known != UNKNOWN {
            return Ok(known);
        }
        let read = self.first_of_page(at * view.stride)?;
        fence.store(read, Ordering::Relaxed);
        Ok(read)
    }

    /// Where the first extent of a page begins.
    fn first_of_page(&self, page: u64) -> Result<u64> {
        let slot = (page * PAGE_RECORDS).max(1);
        let mut bytes = [0; 8];
        self.file
            .read_exact_at(&mut bytes, slot * RECORD_BYTES as u64)
            .map_err(|e| Error::io("reading", &self.path, e))?;
        Ok(u64::from_le_bytes(bytes))
    }

    fn page(&self, page: u64, records: u64) -> Result<Arc<[u8]>> {
        // With the number of records as part of the key, a page that has grown is read again.
        self.pages.get_or_insert_with(&(page, records), || {
            let mut bytes = vec![0; records as usize * RECORD_BYTES];
            self.file
                .read_exact_at(&mut bytes, page * PAGE_BYTES as u64)
                .map_err(|e| Error::io("reading", &self.path, e))?;
            Ok(bytes.into())
        })
    }
}

/// Returns the last number from `low` to below `high` whose key is not above `offset`; `low` if there is
/// none. Keys rise.
fn last_not_above(
    mut low: u64,
    mut high: u64,
    offset: u64,
    key: impl Fn(u64) -> Result<u64>,
) -> Result<u64> {
    while high - low > 1 {
        let middle = low + (high - low) / 2;
        if key(middle)? <= offset {
            low = middle;
        } else {
            high = middle;
        }
    }
    Ok(low)
}

/// Finds and gives extents. Whoever makes one holds the lock of all generations.
pub(crate) struct Appender {
    path: PathBuf,
    file: File,
    id: [u8; 16],
    /// Records in the file.
    written: u64,
    /// Records that are not in the file yet.
    pending: Vec<u8>,
    /// Where the next extent begins.
    end: u64,
    table: Table,
}

impl Appender {
    /// Opens the address space in the file `path`, or makes one; then cuts off what an interrupted
    /// making left behind the `published` extents that generations rely on.
    ///
    /// # Errors
    /// I/O; what is published is damaged.
    pub(crate) fn open(path: &Path, published: u64) -> Result<Self> {
        let file = open_or_create(path)?;
        let len = file
            .metadata()
            .map_err(|e| Error::io("examining", path, e))?
            .len();
        let id = match read_header(&file, path) {
            Ok(id) => id,
            // Nothing relies on it: an interrupted first making.
            Err(_) if published == 0 && len < 2 * RECORD_BYTES as u64 => make_header(&file, path)?,
            Err(error) => return Err(error),
        };
        let mut appender = Self {
            path: path.to_owned(),
            file,
            id,
            written: 0,
            pending: Vec::new(),
            end: 0,
            table: Table::with_capacity((len / RECORD_BYTES as u64) as usize),
        };
        appender.load(published)?;
        let len = (appender.written + 1) * RECORD_BYTES as u64;
        appender
            .file
            .set_len(len)
            .map_err(|e| Error::io("cutting", path, e))?;
        Ok(appender)
    }

    /// Opens the address space to find extents only; needs no lock.
    ///
    /// # Errors
    /// I/O; what is published is damaged.
    pub(crate) fn open_read_only(path: &Path, published: u64) -> Result<Self> {
        let file = File::open(path).map_err(|e| Error::io("opening", path, e))?;
        let mut appender = Self {
            id: read_header(&file, path)?,
            path: path.to_owned(),
            file,
            written: 0,
            pending: Vec::new(),
            end: 0,
            table: Table::with_capacity(usize::try_from(published).unwrap_or(0)),
        };
        appender.load(published)?;
        Ok(appender)
    }

    fn load(&mut self, published: u64) -> Result<()> {
        let io = |path: &Path, e| Error::io("reading", path, e);
        let mut reader = BufReader::with_capacity(APPEND_BYTES, &self.file);
        let mut record = [0; RECORD_BYTES];
        reader
            .read_exact(&mut record)
            .map_err(|e| io(&self.path, e))?;
        let mut why = None;
        loop {
            match reader.read_exact(&mut record) {
                Ok(()) => {}
                Err(e) if e.kind() == std::io::ErrorKind::UnexpectedEof => break,
                Err(e) => return Err(io(&self.path, e)),
            }
            match Extent::decode(&record, &self.id) {
                Ok(extent) if extent.offset == self.end => {
                    self.written += 1;
                    self.end = extent.end();
                    self.table.insert(&extent.digest, self.written);
                }
                Ok(extent) => {
                    why = Some(format!(
                        "expected one at {}, found it at {}",
                        self.end, extent.offset
                    ));
                    break;
                }
                Err(reason) => {
                    why = Some(reason);
                    break;
                }
            }
        }
        if self.written < published {
            let reason = why.unwrap_or_else(|| "the file ends before it".to_owned());
            return Err(damaged(&self.path, self.written + 1, &reason));
        }
        Ok(())
    }

    /// Which address space it is.
    pub(crate) fn id(&self) -> [u8; 16] {
        self.id
    }

    /// Extents so far.
    pub(crate) fn count(&self) -> u64 {
        self.written + (self.pending.len() / RECORD_BYTES) as u64
    }

    /// Where the next extent begins.
    #[cfg(test)]
    fn end(&self) -> u64 {
        self.end
    }

    /// Returns where the file begins, and gives it an extent if it has none. Durable after
    /// [`Appender::commit`].
    ///
    /// # Errors
    /// I/O; the address space is full.
    ///
    /// # Panics
    /// The file is empty: it needs no extent.
    pub(crate) fn place(&mut self, digest: &Digest, size: u64) -> Result<u64> {
        assert!(size > 0, "an empty file has no extent");
        if let Some(known) = self.find(digest, size)? {
            return Ok(known.offset);
        }
        let extent = Extent {
            offset: self.end,
            size,
            digest: *digest,
        };
        let end = size
            .checked_next_multiple_of(BLOCK_BYTES)
            .and_then(|bytes| bytes.checked_add(self.end))
            .filter(|end| *end <= SPACE_BLOCKS_MAX * BLOCK_BYTES)
            .ok_or_else(|| {
                Error::environment(format!(
                    "{}: the address space of 16 TiB is full",
                    self.path.display()
                ))
                .with_hint(RENEW_HINT)
            })?;
        self.pending.extend_from_slice(&extent.encode(&self.id));
        self.end = end;
        let count = self.count();
        self.table.insert(digest, count);
        if self.pending.len() >= APPEND_BYTES {
            self.write()?;
        }
        Ok(extent.offset)
    }

    /// The extent of a file, if it has one.
    ///
    /// # Errors
    /// I/O, damaged; it has another size there.
    pub(crate) fn find(&self, digest: &Digest, size: u64) -> Result<Option<Extent>> {
        let mut from = self.table.start(digest);
        while let Some((number, next)) = self.table.probe(digest, from) {
            let known = self.record(number)?;
            if known.digest == *digest {
                if known.size == size {
                    return Ok(Some(known));
                }
                return Err(Error::corrupt(format!(
                    "file {digest}: expected {} bytes, found {size}",
                    known.size
                )));
            }
            from = next;
        }
        Ok(None)
    }

    fn record(&self, number: u64) -> Result<Extent> {
        let mut bytes = [0; RECORD_BYTES];
        match number.checked_sub(self.written + 1) {
            Some(at) => {
                let at = at as usize * RECORD_BYTES;
                bytes.copy_from_slice(&self.pending[at..at + RECORD_BYTES]);
            }
            None => self
                .file
                .read_exact_at(&mut bytes, number * RECORD_BYTES as u64)
                .map_err(|e| Error::io("reading", &self.path, e))?,
        }
        Extent::decode(&bytes, &self.id).map_err(|reason| damaged(&self.path, number, &reason))
    }

    fn write(&mut self) -> Result<()> {
        let at = (self.written + 1) * RECORD_BYTES as u64;
        self.file
            .write_all_at(&self.pending, at)
            .map_err(|e| Error::io("writing", &self.path, e))?;
        self.written += (self.pending.len() / RECORD_BYTES) as u64;
        self.pending.clear();
        Ok(())
    }

    /// Makes all extents that were given durable. They count once a generation says so.
    ///
    /// # Errors
    /// I/O: a full disk, mostly.
    pub(crate) fn commit(&mut self) -> Result<()> {
        self.write()?;
        self.file
            .sync_data()
            .map_err(|e| Error::io("syncing", &self.path, e))
    }
}

/// Numbers of records by digest: a hash table of 8 bytes an entry that leaves the digests in the file.
struct Table {
    /// 0: free; else 32 bits of the digest in the upper half, which also say where the entry belongs, and
    /// the record's number in the lower one.
    slots: Vec<u64>,
    len: usize,
}

impl Table {
    fn with_capacity(len: usize) -> Self {
        Self {
            slots: vec![0; (len * 2).next_power_of_two().max(1 << 10)],
            len: 0,
        }
    }

    fn tag(digest: &Digest) -> u64 {
        u64_at(&digest.0, 0) << 32
    }

    fn home(&self, tag: u64) -> usize {
        (tag >> 32) as usize & (self.slots.len() - 1)
    }

    fn start(&self, digest: &Digest) -> usize {
        self.home(Self::tag(digest))
    }

    /// The next record that may be the digest's, from slot `from` on, and where to go on if it is not.
    fn probe(&self, digest: &Digest, mut from: usize) -> Option<(u64, usize)> {
        let tag = Self::tag(digest);
        loop {
            let slot = self.slots[from];
            from = (from + 1) & (self.slots.len() - 1);
            if slot == 0 {
                return None;
            }
            if slot & !u64::from(u32::MAX) == tag {
                return Some((slot & u64::from(u32::MAX), from));
            }
        }
    }

    /// Adds a record. Numbers have 32 bits and are not 0: there are no more blocks than that.
    fn insert(&mut self, digest: &Digest, number: u64) {
        if (self.len + 1) * 4 > self.slots.len() * 3 {
            let larger = vec![0; self.slots.len() * 2];
            let old = std::mem::replace(&mut self.slots, larger);
            for entry in old.into_iter().filter(|entry| *entry != 0) {
                self.put(entry);
            }
        }
        self.put(Self::tag(digest) | number);
        self.len += 1;
    }

    fn put(&mut self, entry: u64) {
        let mut at = self.home(entry);
        while self.slots[at] != 0 {
            at = (at + 1) & (self.slots.len() - 1);
        }
        self.slots[at] = entry;
    }
}

/// What helps when the address space cannot go on.
const RENEW_HINT: &str = "when nothing is mounted, `understory generation drop --all` begins a new one; nothing of the store is lost";

fn damaged(path: &Path, number: u64, reason: &str) -> Error {
    Error::corrupt(format!("extent {number} of {}: {reason}", path.display())).with_hint(RENEW_HINT)
}

fn read_header(file: &File, path: &Path) -> Result<[u8; 16]> {
    let mut bytes = [0; RECORD_BYTES];
    file.read_exact_at(&mut bytes, 0)
        .map_err(|e| Error::io("reading", path, e))?;
    let mut id = [0; 16];
    id.copy_from_slice(&bytes[16..32]);
    let refuse = |what: String| {
        Err(Error::corrupt(format!("{}: {what}", path.display())).with_hint(RENEW_HINT))
    };
    if bytes[..8] != MAGIC || bytes[56..] != checksum(&id, &bytes[..56]) {
        return refuse("the header of an address space is damaged".to_owned());
    }
    let version = u32::from_le_bytes([bytes[8], bytes[9], bytes[10], bytes[11]]);
    if version != VERSION || bytes[12..16] != [0; 4] || bytes[32..56] != [0; 24] {
        return refuse(format!("expected version {VERSION}, found {version}"));
    }
    Ok(id)
}

fn make_header(file: &File, path: &Path) -> Result<[u8; 16]> {
    let mut id = [0; 16];
    getrandom::fill(&mut id)
        .map_err(|e| Error::environment("reading random bytes").with_source(e.to_string()))?;
    let mut bytes = [0; RECORD_BYTES];
    bytes[..8].copy_from_slice(&MAGIC);
    bytes[8..12].copy_from_slice(&VERSION.to_le_bytes());
    bytes[16..32].copy_from_slice(&id);
    let sum = checksum(&id, &bytes[..56]);
    bytes[56..].copy_from_slice(&sum);
    file.set_len(0)
        .and_then(|()| file.write_all_at(&bytes, 0))
        .and_then(|()| file.sync_all())
        .map_err(|e| Error::io("writing", path, e))?;
    Ok(id)
}

/// The first 8 bytes of the BLAKE3 of the address space's id and `bytes`: a record of another space
/// does not pass.
fn checksum(id: &[u8; 16], bytes: &[u8]) -> [u8; 8] {
    let mut hasher = blake3::Hasher::new();
    hasher.update(id);
    hasher.update(bytes);
    let mut out = [0; 8];
    out.copy_from_slice(&hasher.finalize().as_bytes()[..8]);
    out
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    let mut eight = [0; 8];
    eight.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(eight)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn file(number: u64) -> (Digest, u64) {
        (
            Digest::of(&number.to_le_bytes()),
            1 + (number * 7919) % 20_000,
        )
    }

    fn fill(path: &Path, published: u64, numbers: std::ops::Range<u64>) -> (u64, u64) {
        let mut appender = Appender::open(path, published).unwrap();
        for number in numbers {
            let (digest, size) = file(number);
            appender.place(&digest, size).unwrap();
        }
        appender.commit().unwrap();
        (appender.count(), appender.end())
    }

    #[test]
    fn every_byte_is_found_and_padding_belongs_to_its_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("extents");
        // More than one page and not a whole number of them; then it grows.
        for count in [1, 63, 64, 65, 1000, 5000] {
            let (counted, end) = fill(&path, 0, 0..count);
            assert_eq!(counted, count);
            let space = Space::open(&path, count).unwrap();
            let mut at = 0;
            for number in 0..count {
                let (digest, size) = file(number);
                let extent = Extent {
                    offset: at,
                    size,
                    digest,
                };
                for offset in [at, at + size - 1, extent.end() - 1] {
                    assert_eq!(space.find(offset).unwrap(), Some(extent));
                }
                at = extent.end();
            }
            assert_eq!(at, end);
            assert_eq!(space.find(end).unwrap(), None);
            assert_eq!(space.find(u64::MAX).unwrap(), None);
        }
    }

    #[test]
    fn extents_stay_and_what_is_new_goes_behind() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("extents");
        let (count, end) = fill(&path, 0, 0..3000);
        let space = Space::open(&path, count).unwrap();
        let id = space.id();
        let mut appender = Appender::open(&path, count).unwrap();
        assert_eq!(appender.id(), id);
        let mut at = 0;
        for number in 0..3000 {
            let (digest, size) = file(number);
            assert_eq!(appender.place(&digest, size).unwrap(), at);
            at += size.next_multiple_of(BLOCK_BYTES);
        }
        let (digest, size) = file(3000);
        assert_eq!(appender.place(&digest, size).unwrap(), end);
        // Asked for again before it is in the file.
        assert_eq!(appender.place(&digest, size).unwrap(), end);
        assert_eq!(appender.count(), count + 1);
        let error = appender.place(&digest, size + 1).unwrap_err();
        assert!(
            error
                .to_string()
                .contains(&format!("expected {size} bytes")),
            "{error}"
        );
        appender.commit().unwrap();
        assert_eq!(space.find(end).unwrap(), None, "not published yet");
        space.grow(count + 1).unwrap();
        assert_eq!(space.find(end).unwrap().unwrap().digest, digest);
        assert!(space.grow(count + 2).is_err());
    }

    #[test]
    fn what_was_not_published_is_cut_off_and_what_was_is_never() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("extents");
        fill(&path, 0, 0..100);
        // Torn: a record and a half are garbage.
        let file = File::options().write(true).open(&path).unwrap();
        file.write_all_at(&[0xa5; 64], 64 * 91).unwrap();
        file.set_len(64 * 101 + 17).unwrap();
        assert_eq!(Appender::open(&path, 90).unwrap().count(), 90);
        assert_eq!(std::fs::metadata(&path).unwrap().len(), 64 * 91);
        let (count, _) = fill(&path, 90, 0..120);
        assert_eq!(count, 120);
        // A flipped bit of what is published.
        let file = File::options().write(true).open(&path).unwrap();
        file.write_all_at(&[0xa5], 64 * 50 + 20).unwrap();
        let error = Appender::open(&path, 120).err().unwrap();
        assert!(error.to_string().starts_with("extent 50 of "), "{error}");
        assert_eq!(std::fs::metadata(&path).unwrap().len(), 64 * 121);
        let space = Space::open(&path, 120).unwrap();
        let bad = (0..49)
            .map(|n| super::tests::file(n).1.next_multiple_of(BLOCK_BYTES))
            .sum::<u64>();
        let error = space.find(bad).unwrap_err();
        assert_eq!(error.kind(), crate::error::ErrorKind::Corrupt);
        assert!(space.find(0).unwrap().is_some());
    }

    #[test]
    fn a_first_making_that_was_interrupted_is_begun_again() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("extents");
        std::fs::write(&path, b"USTY").unwrap();
        assert_eq!(fill(&path, 0, 0..10).0, 10);
        std::fs::write(&path, [0; 64 * 3]).unwrap();
        assert!(Appender::open(&path, 0).is_err(), "not ours to throw away");
    }

    #[test]
    fn the_space_has_an_end() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("extents");
        let mut appender = Appender::open(&path, 0).unwrap();
        let half = SPACE_BLOCKS_MAX / 2 * BLOCK_BYTES;
        appender.place(&file(0).0, half).unwrap();
        appender.place(&file(1).0, half).unwrap();
        for size in [2 * BLOCK_BYTES, u64::MAX] {
            let error = appender.place(&file(2).0, size).unwrap_err();
            assert!(error.to_string().contains("is full"), "{error}");
        }
        appender.place(&file(3).0, 1).unwrap();
    }

    proptest! {
        #[test]
        fn the_table_finds_what_a_map_finds(numbers in proptest::collection::vec(0_u64..3000, 1..4000)) {
            let mut table = Table::with_capacity(0);
            let mut map = std::collections::HashMap::new();
            for number in numbers {
                let digest = file(number).0;
                if map.insert(digest, number + 1).is_none() {
                    table.insert(&digest, number + 1);
                }
            }
            for number in 0..3000 {
                let digest = file(number).0;
                let mut from = table.start(&digest);
                let mut found = false;
                while let Some((candidate, next)) = table.probe(&digest, from) {
                    found |= Some(&candidate) == map.get(&digest);
                    from = next;
                }
                prop_assert_eq!(found, map.contains_key(&digest));
            }
        }
    }
}
