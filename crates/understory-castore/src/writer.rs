//! The writer of a process: deduplicates, groups, compresses and appends.
//!
//! ```text
//! many threads: batches ──claim──► frames ──queue──► compress threads ──log lock──► open pack
//! ```
//! A piece is claimed before it is compressed: if the index has it or another thread has handed it
//! in, it is dropped. A claim is made only for pieces that go to the queue at once, so a builder that
//! is given up or waits for its peer holds nothing that others rely on. A *ticket* is drawn before
//! the first claim of a batch and given back when the last of its frames is in the pack's map;
//! [`Writer::sync`] waits for all tickets drawn before it. So whoever left a piece out because it was
//! claimed waits for it too, and the failure of one is the failure of all that come after.
//!
//! Memory: [`IN_FLIGHT_BYTES_MAX`] of raw bytes between claim and append, one compression context
//! and buffer per thread, the open pack's map (16 MiB at most), the builders' batches.
//!
//! Cost: zstd -3 bounds it, 250 to 350 MB/s a core; an append is one `pwrite` of about 20 KiB.

use crate::core::{Core, lock};
use crate::directory::{Directory, Node};
use crate::error::{CastoreError, IoContext, PoisonCause};
use crate::lease::Operation;
use crate::log::{Log, ToSync, write_mark};
use crate::pack::{
    self, BuildKeyHasher, Codec, FRAME_PIECES_MAX, FRAME_RAW_BYTES, FrameHeader, Key, Kind,
    PIECE_BYTES_MAX, Piece, frame_header_len,
};
use crossbeam_channel::{Receiver, Sender};
use std::collections::{BTreeSet, HashSet};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use zstd::zstd_safe::CParameter;

/// Raw bytes between claim and append: some tens of frames per thread on any machine.
const IN_FLIGHT_BYTES_MAX: usize = 32 << 20;
/// Those that wait for room are woken when no more than this is in flight: else each frame that is done wakes all
/// of them for the room of one. The threads have work for some tens of milliseconds left.
const IN_FLIGHT_BYTES_LOW: usize = IN_FLIGHT_BYTES_MAX / 4 * 3;
/// Frames in the queue; many of them may be small.
const QUEUE_FRAMES_MAX: usize = 1024;
/// What a thread's output buffer may keep: any usual frame.
const FRAME_BUFFER_BYTES_KEPT: usize = 1 << 20;
/// What a frame counts at least, for its table and bookkeeping.
const FRAME_COST_MIN: usize = 4096;
/// A batch of small files of all builders together, and of one builder.
const BATCHES_BYTES: usize = 32 << 20;
const BATCH_BYTES: std::ops::RangeInclusive<usize> = 1 << 20..=16 << 20;
/// Compression threads: more than this never paid on one log.
const THREADS_MAX: usize = 64;
/// Compressed bytes that zstd aims at for a block.
const BLOCK_BYTES: u32 = 8 << 10;

/// The writer: takes pieces, groups, compresses and appends them. Shared by all threads of a process.
pub struct Writer {
    shared: Arc<Shared>,
    queue: Option<Sender<Job>>,
    threads: Vec<JoinHandle<()>>,
    directories: Mutex<Batch>,
}

/// What a writer and its threads have in common.
struct Shared {
    core: Arc<Core>,
    log: Mutex<Log>,
    /// Frames known to be durable, by the log's count.
    synced: Mutex<u64>,
    poison: Mutex<Option<PoisonCause>>,
    poisoned: AtomicBool,
    claims: Mutex<HashSet<Key, BuildKeyHasher>>,
    tickets: Mutex<Tickets>,
    ticket_back: Condvar,
    in_flight_bytes: Mutex<usize>,
    in_flight_freed: Condvar,
    builders: AtomicUsize,
    counts: Counts,
}

#[derive(Default)]
struct Counts {
    given: AtomicU64,
    file_duplicate: AtomicU64,
    chunk_duplicate: AtomicU64,
    masked_duplicate: AtomicU64,
    masked_files: AtomicU64,
    new: AtomicU64,
    stored: AtomicU64,
}

#[derive(Default)]
struct Tickets {
    next: u64,
    out: BTreeSet<u64>,
}

/// Given back when dropped.
struct Ticket {
    shared: Arc<Shared>,
    number: u64,
}

impl Drop for Ticket {
    fn drop(&mut self) {
        lock(&self.shared.tickets).out.remove(&self.number);
        self.shared.ticket_back.notify_all();
    }
}

/// A frame on its way. Dropping one that was not appended poisons the writer: others may have left
/// out pieces because this frame has them.
struct Job {
    pieces: Vec<Piece>,
    raw: Vec<u8>,
    appended: bool,
    cost: usize,
    ticket: Arc<Ticket>,
}

impl Drop for Job {
    fn drop(&mut self) {
        let shared = &self.ticket.shared;
        if !self.appended && !self.pieces.is_empty() {
            shared.fail(&CastoreError::Invalid(
                "a frame was lost before it was written".to_owned(),
            ));
        }
        if self.cost > 0 {
            let mut in_flight = lock(&shared.in_flight_bytes);
            *in_flight -= self.cost;
            // Who waits for more than that is told by the last one.
            let is_low = *in_flight <= IN_FLIGHT_BYTES_LOW;
            drop(in_flight);
            if is_low {
                shared.in_flight_freed.notify_all();
            }
        }
    }
}

/// Pieces that wait to be handed in; without doubles.
#[derive(Default)]
pub(crate) struct Batch {
    pieces: Vec<(Piece, usize)>,
    bytes: Vec<u8>,
    keys: HashSet<Key, BuildKeyHasher>,
}

impl Batch {
    pub(crate) fn bytes(&self) -> usize {
        self.bytes.len()
    }
    pub(crate) fn len(&self) -> usize {
        self.pieces.len()
    }
    pub(crate) fn has(&self, key: &Key) -> bool {
        self.keys.contains(key)
    }
    /// Adds a piece; false if the batch has it.
    pub(crate) fn push(&mut self, piece: Piece, bytes: &[u8]) -> bool {
        debug_assert_eq!(piece.len as usize, bytes.len());
        let new = self.keys.insert(piece.key());
        if new {
            self.pieces.push((piece, self.bytes.len()));
            self.bytes.extend_from_slice(bytes);
        }
        new
    }
    fn clear(&mut self) {
        self.pieces.clear();
        self.bytes.clear();
        self.keys.clear();
        // A huge directory must not keep its room.
        self.bytes.shrink_to(*BATCH_BYTES.end());
    }
}

impl Writer {
    pub(crate) fn new(core: &Arc<Core>) -> Result<Self, CastoreError> {
        let shared = Arc::new(Shared {
            log: Mutex::new(Log::open(core)?),
            core: Arc::clone(core),
            synced: Mutex::new(0),
            poison: Mutex::default(),
            poisoned: AtomicBool::new(false),
            claims: Mutex::default(),
            tickets: Mutex::default(),
            ticket_back: Condvar::new(),
            in_flight_bytes: Mutex::new(0),
            in_flight_freed: Condvar::new(),
            builders: AtomicUsize::new(0),
            counts: Counts::default(),
        });
        let threads = match core.options.compress_threads {
            0 => std::thread::available_parallelism().map_or(1, usize::from),
            count => count,
        }
        .min(THREADS_MAX);
        let (sender, receiver) = crossbeam_channel::bounded(QUEUE_FRAMES_MAX);
        let mut writer = Self {
            shared,
            queue: Some(sender),
            threads: Vec::with_capacity(threads),
            directories: Mutex::default(),
        };
        for number in 0..threads {
            let (shared, receiver) = (Arc::clone(&writer.shared), receiver.clone());
            let thread = std::thread::Builder::new()
                .name(format!("castore-zstd-{number}"))
                .spawn(move || compress_and_append(&shared, &receiver))
                .verb("starting a thread for", &core.dir)?;
            writer.threads.push(thread);
        }
        Ok(writer)
    }

    /// Stores a directory; its children must be stored already. A collection keeps it from when
    /// something that is published refers to it, or within a tree builder's life.
    ///
    /// # Errors
    /// I/O, poisoned, more than 64 MiB of encoded entries.
    pub fn put_directory(&self, directory: &Directory) -> Result<Node, CastoreError> {
        let bytes = directory.encode();
        let digest = directory_digest(&bytes)?;
        let mut batch = lock(&self.directories);
        self.add_directory(&mut batch, digest, &bytes)?;
        Ok(Node::Directory {
            digest,
            size: directory.size(),
        })
    }

    /// Waits until all that was put before is on disk (fsync), and visible to other processes.
    /// Only then may anything that refers to it be published.
    ///
    /// # Errors
    /// I/O, full disk, poisoned.
    pub fn sync(&self) -> Result<(), CastoreError> {
        self.hand_in(&mut lock(&self.directories), None)?;
        let shared = &self.shared;
        {
            let mut tickets = lock(&shared.tickets);
            let before = tickets.next;
            while tickets.out.first().is_some_and(|first| *first < before) {
                tickets = shared
                    .ticket_back
                    .wait(tickets)
                    .unwrap_or_else(PoisonError::into_inner);
            }
        }
        shared.check()?;
        shared
            .make_durable()
            .inspect_err(|error| shared.fail(error))?;
        shared.check()
    }

    /// What this writer was given and what it had to store, so far.
    pub fn counters(&self) -> WriterCounters {
        let counts = &self.shared.counts;
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        WriterCounters {
            given_bytes: get(&counts.given),
            file_duplicate_bytes: get(&counts.file_duplicate),
            chunk_duplicate_bytes: get(&counts.chunk_duplicate),
            masked_duplicate_bytes: get(&counts.masked_duplicate),
            masked_files: get(&counts.masked_files),
            new_bytes: get(&counts.new),
            stored_bytes: get(&counts.stored),
        }
    }

    /// True if it takes nothing more.
    pub fn is_poisoned(&self) -> bool {
        self.shared.poisoned.load(Ordering::Acquire)
    }

    pub(crate) fn check(&self) -> Result<(), CastoreError> {
        self.shared.check()
    }

    /// True if it has a pack open.
    pub(crate) fn has_pack(&self) -> bool {
        lock(&self.shared.log).to_sync().1.is_some()
    }

    /// Syncs the open pack and leaves it to whoever comes next, if nothing is under way.
    pub(crate) fn give_up_pack(&self) -> Result<(), CastoreError> {
        let shared = &self.shared;
        if self.is_poisoned() || !shared.core.leases.is_idle() {
            return Ok(());
        }
        let mut synced = lock(&shared.synced);
        let mut log = lock(&shared.log);
        let (appended, file) = log.to_sync();
        if let Some(ToSync { file, open, len }) = file {
            let path = &open.pack.path;
            let medium = &*shared.core.medium;
            medium.sync_data(&file, path).verb("syncing", path)?;
            write_mark(&shared.core, open.pack.id, len);
        }
        *synced = appended;
        log.close();
        Ok(())
    }

    /// True if the piece is stored or handed in.
    pub(crate) fn has(&self, key: &Key) -> bool {
        lock(&self.shared.claims).contains(key) || self.shared.core.has_for_writer(key)
    }

    /// Adds a directory to a batch and hands the batch in when it fills a frame.
    pub(crate) fn add_directory(
        &self,
        batch: &mut Batch,
        digest: crate::Digest,
        bytes: &[u8],
    ) -> Result<(), CastoreError> {
        let piece = Piece {
            digest,
            kind: Kind::Directory,
            len: bytes.len() as u32,
        };
        if bytes.is_empty() || self.has(&piece.key()) {
            return self.check();
        }
        batch.push(piece, bytes);
        if batch.bytes() >= FRAME_RAW_BYTES || batch.len() >= FRAME_PIECES_MAX {
            self.hand_in(batch, None)?;
        }
        Ok(())
    }

    /// Bytes that one builder's batch of small files may have now.
    pub(crate) fn batch_bytes(&self) -> usize {
        let builders = self.shared.builders.load(Ordering::Relaxed).max(1);
        (BATCHES_BYTES / builders).clamp(*BATCH_BYTES.start(), *BATCH_BYTES.end())
    }

    pub(crate) fn builder_begins(&self) -> Operation {
        self.shared.builders.fetch_add(1, Ordering::Relaxed);
        Operation::begin(&self.shared.core)
    }
    pub(crate) fn builder_ends(&self) {
        self.shared.builders.fetch_sub(1, Ordering::Relaxed);
    }

    /// Counts a file of so many bytes.
    pub(crate) fn count_file(&self, bytes: u64, file: FileCounts) {
        let counts = &self.shared.counts;
        let add = |counter: &AtomicU64, bytes: u64| counter.fetch_add(bytes, Ordering::Relaxed);
        add(&counts.given, bytes);
        add(&counts.file_duplicate, file.file_duplicate);
        add(&counts.chunk_duplicate, file.chunk_duplicate);
        add(&counts.masked_duplicate, file.masked_duplicate);
        add(&counts.masked_files, u64::from(file.is_masked));
    }

    pub(crate) fn core(&self) -> &Arc<Core> {
        &self.shared.core
    }

    /// True if the piece is handed in, and not yet to be found.
    pub(crate) fn is_claimed(&self, key: &Key) -> bool {
        lock(&self.shared.claims).contains(key)
    }

    /// Claims the pieces of a batch that are new, and queues them in frames, in `order` if given.
    /// Empties the batch.
    pub(crate) fn hand_in(
        &self,
        batch: &mut Batch,
        order: Option<&[u32]>,
    ) -> Result<(), CastoreError> {
        self.check()?;
        if batch.pieces.is_empty() {
            return Ok(());
        }
        let ticket = Arc::new(self.shared.draw_ticket());
        let mut job = Job::new(&ticket);
        for at in 0..batch.pieces.len() {
            let at = order.map_or(at, |order| order[at] as usize);
            let (piece, start) = batch.pieces[at];
            let len = piece.len as usize;
            if !self.shared.claim(piece.key()) {
                continue;
            }
            let full =
                job.raw.len() + len > FRAME_RAW_BYTES || job.pieces.len() == FRAME_PIECES_MAX;
            if full && !job.pieces.is_empty() {
                self.queue(std::mem::replace(&mut job, Job::new(&ticket)))?;
            }
            job.pieces.push(piece);
            if job.raw.is_empty() {
                job.raw
                    .reserve_exact(len.max(FRAME_RAW_BYTES.min(batch.bytes.len())));
            }
            job.raw.extend_from_slice(&batch.bytes[start..start + len]);
        }
        batch.clear();
        if !job.pieces.is_empty() {
            self.queue(job)?;
        }
        Ok(())
    }

    fn queue(&self, mut job: Job) -> Result<(), CastoreError> {
        let shared = &self.shared;
        let cost = job.raw.len().max(FRAME_COST_MIN);
        let mut in_flight = lock(&shared.in_flight_bytes);
        while *in_flight > 0 && *in_flight + cost > IN_FLIGHT_BYTES_MAX {
            in_flight = shared
                .in_flight_freed
                .wait(in_flight)
                .unwrap_or_else(PoisonError::into_inner);
        }
        *in_flight += cost;
        drop(in_flight);
        job.cost = cost;
        if let Some(queue) = &self.queue
            && let Err(lost) = queue.send(job)
        {
            drop(lost);
        }
        shared.check()
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        self.queue = None;
        for thread in self.threads.drain(..) {
            // A thread that panicked has poisoned the writer; nobody is left to tell.
            let _ = thread.join();
        }
        lock(&self.shared.log).close();
    }
}

impl Job {
    fn new(ticket: &Arc<Ticket>) -> Self {
        Self {
            pieces: Vec::new(),
            raw: Vec::new(),
            appended: false,
            cost: 0,
            ticket: Arc::clone(ticket),
        }
    }
}

impl Shared {
    fn draw_ticket(self: &Arc<Self>) -> Ticket {
        let mut tickets = lock(&self.tickets);
        let number = tickets.next;
        tickets.next += 1;
        tickets.out.insert(number);
        Ticket {
            shared: Arc::clone(self),
            number,
        }
    }

    /// True if the piece is neither stored nor claimed: now it is the caller's to store.
    fn claim(&self, key: Key) -> bool {
        // In this order: a claim is given up only after the piece is in the index.
        let mut claims = lock(&self.claims);
        !claims.contains(&key) && !self.core.has_for_writer(&key) && claims.insert(key)
    }

    fn check(&self) -> Result<(), CastoreError> {
        if !self.poisoned.load(Ordering::Acquire) {
            return Ok(());
        }
        match &*lock(&self.poison) {
            Some(cause) => Err(CastoreError::Poisoned(cause.clone())),
            None => Ok(()),
        }
    }

    fn fail(&self, error: &CastoreError) {
        let mut poison = lock(&self.poison);
        if poison.is_none() {
            let cause = error.poison_cause();
            tracing::error!(%cause, "the castore's writer has failed");
            *poison = Some(cause);
            self.poisoned.store(true, Ordering::Release);
        }
    }

    /// Syncs the open pack, once for all who wait, and the packs of others that we relied on.
    fn make_durable(&self) -> Result<(), CastoreError> {
        let medium = &*self.core.medium;
        let (target, _) = lock(&self.log).to_sync();
        {
            let mut synced = lock(&self.synced);
            if *synced < target {
                let (appended, file) = lock(&self.log).to_sync();
                if let Some(ToSync { file, open, len }) = file {
                    let path = &open.pack.path;
                    medium.sync_data(&file, path).verb("syncing", path)?;
                    write_mark(&self.core, open.pack.id, len);
                }
                *synced = appended;
            }
        }
        for open in &self.core.state().open {
            if !open.ours.load(Ordering::Acquire) && open.relied_on.swap(false, Ordering::AcqRel) {
                let path = &open.pack.path;
                let file = match self.core.file(&open.pack) {
                    Ok(file) => file,
                    // Collected: so nobody relies on it any more.
                    Err(error) if error.is_not_found() => continue,
                    Err(error) => return Err(error),
                };
                if let Err(error) = medium.sync_data(&file, path) {
                    open.relied_on.store(true, Ordering::Release);
                    return Err(CastoreError::io("syncing", path, error));
                }
            }
        }
        Ok(())
    }

    fn append(&self, job: &mut Job, frame: &[u8], header: FrameHeader) -> Result<(), CastoreError> {
        self.check()?;
        let pieces = job.pieces.clone();
        let sealed = lock(&self.log).append(frame, header, pieces)?;
        job.appended = true;
        let mut claims = lock(&self.claims);
        for piece in &job.pieces {
            claims.remove(&piece.key());
        }
        drop(claims);
        let (new, stored) = (job.raw.len() as u64, frame.len() as u64);
        self.counts.new.fetch_add(new, Ordering::Relaxed);
        self.counts.stored.fetch_add(stored, Ordering::Relaxed);
        if sealed && let Err(error) = self.core.tidy_index() {
            // The index is derived: without it lookups are slower, nothing is lost.
            tracing::warn!(%error, "merging the index failed");
        }
        Ok(())
    }
}

/// A compression thread.
fn compress_and_append(shared: &Shared, jobs: &Receiver<Job>) {
    let mut frame = Vec::new();
    let mut compressor = compressor(shared.core.options.compression_level);
    for mut job in jobs {
        if shared.poisoned.load(Ordering::Acquire) {
            job.appended = true; // It is not, but the cause is known already.
            continue;
        }
        let result = match &mut compressor {
            Ok(compressor) => {
                let header = make_frame(compressor, &job.pieces, &job.raw, &mut frame);
                shared.append(&mut job, &frame, header)
            }
            Err(error) => Err(CastoreError::io(
                "setting up compression for",
                &shared.core.dir,
                std::io::Error::other(error.to_string()),
            )),
        };
        if let Err(error) = result {
            shared.fail(&error);
        }
        // A huge directory must not keep its room.
        frame.truncate(FRAME_RAW_BYTES);
        frame.shrink_to(FRAME_BUFFER_BYTES_KEPT);
    }
}

/// Makes what compresses frames. The blocks of a frame are short, so that who wants what is in its middle need not
/// decompress all of it; they share tables, which costs a thousandth of the size, and 3 % of the speed of reading.
pub(crate) fn compressor(level: i32) -> std::io::Result<zstd::bulk::Compressor<'static>> {
    let mut compressor = zstd::bulk::Compressor::new(level.clamp(1, 19))?;
    // The frame's header has the length and a checksum already.
    compressor.set_parameter(CParameter::ContentSizeFlag(false))?;
    compressor.set_parameter(CParameter::ChecksumFlag(false))?;
    compressor.set_parameter(CParameter::TargetCBlockSize(BLOCK_BYTES))?;
    Ok(compressor)
}

/// Puts a whole frame into `frame`. What does not get smaller is stored raw.
pub(crate) fn make_frame(
    compressor: &mut zstd::bulk::Compressor<'_>,
    pieces: &[Piece],
    raw: &[u8],
    frame: &mut Vec<u8>,
) -> FrameHeader {
    let header_len = frame_header_len(pieces.len());
    let room = header_len + zstd::zstd_safe::compress_bound(raw.len());
    frame.resize(room, 0);
    let compressed = compressor.compress_to_buffer(raw, &mut frame[header_len..]);
    let codec = match compressed {
        Ok(len) if len < raw.len() => {
            frame.truncate(header_len + len);
            Codec::Zstd
        }
        _ => {
            frame.truncate(header_len);
            frame.extend_from_slice(raw);
            Codec::Raw
        }
    };
    pack::encode_frame_header(frame, pieces, codec, raw.len() as u32);
    FrameHeader {
        codec,
        piece_count: pieces.len() as u32,
        stored_len: (frame.len() - header_len) as u32,
        raw_len: raw.len() as u32,
        payload_checksum: pack::u64_at(frame, 24),
    }
}

/// The digest of an encoded directory that is not too large to store.
pub(crate) fn directory_digest(bytes: &[u8]) -> Result<crate::Digest, CastoreError> {
    if bytes.len() > PIECE_BYTES_MAX {
        return Err(CastoreError::Invalid(format!(
            "a directory of {} encoded bytes, at most {PIECE_BYTES_MAX} can be stored",
            bytes.len()
        )));
    }
    Ok(crate::Digest::of(bytes))
}

/// What became of the bytes of one file.
#[derive(Default, Clone, Copy)]
pub(crate) struct FileCounts {
    /// All of them, if it was stored as a whole.
    pub(crate) file_duplicate: u64,
    /// Those of chunks that were stored.
    pub(crate) chunk_duplicate: u64,
    /// Those that were stored but for their hash parts.
    pub(crate) masked_duplicate: u64,
    /// It is kept as patches, and is new.
    pub(crate) is_masked: bool,
}

/// Progress of a writer since it was made.
#[derive(Debug, Clone, Copy, Default)]
pub struct WriterCounters {
    /// Bytes of file contents given.
    pub given_bytes: u64,
    /// Of these, bytes of files that were stored already as a whole.
    pub file_duplicate_bytes: u64,
    /// Of these, bytes of chunks that were stored already.
    pub chunk_duplicate_bytes: u64,
    /// Of these, bytes that were stored already but for the hash parts of store paths in them.
    pub masked_duplicate_bytes: u64,
    /// Files with such hash parts that were stored as patches of masked bytes.
    pub masked_files: u64,
    /// Uncompressed bytes that were new.
    pub new_bytes: u64,
    /// Bytes appended to packs.
    pub stored_bytes: u64,
}

impl WriterCounters {
    /// Adds what another writer did.
    pub(crate) fn add(&mut self, other: &Self) {
        self.given_bytes += other.given_bytes;
        self.file_duplicate_bytes += other.file_duplicate_bytes;
        self.chunk_duplicate_bytes += other.chunk_duplicate_bytes;
        self.masked_duplicate_bytes += other.masked_duplicate_bytes;
        self.masked_files += other.masked_files;
        self.new_bytes += other.new_bytes;
        self.stored_bytes += other.stored_bytes;
    }
}
