//! Memory that outlives the process that uses it: where the inode table keeps its nodes.
//!
//! A server of a mount may be killed at any instruction, and the next one must know each node that the kernel
//! knows. So nodes lie in a memory file (`memfd_create(2)`) that is mapped shared, and that somebody else
//! holds, too (see `supervisor`). There is no log and no copy: what was stored is there, because a kill ends
//! threads between instructions and takes no stores back. Who stores must keep to an order in which each
//! prefix makes sense; `inodes` has it.
//!
//! Layout, all words 64 bits and native-endian, since it never leaves the machine:
//! ```text
//! word 0       magic and version
//! word 1       version of the root's listing
//! word 2       takeovers so far
//! word 32+s    slots of shard s that were ever in use, s < 16
//! byte 4096    chunks of 4096 slots of 64 bytes; chunk c of shard s is the one at c * 16 + s
//! ```
//! The file is sparse: what was never used or was given back takes no memory.
//!
//! Cost: 64 bytes a slot, in shared memory, counted in the server's resident memory once it is touched.

use crate::{Error, Result};
use memmap2::{MmapOptions, MmapRaw};
use rustix::fd::OwnedFd;
use rustix::fs::{FallocateFlags, MemfdFlags, SealFlags};
use std::sync::atomic::{AtomicU64, Ordering};

/// Shards: more than threads that serve one mount.
pub(super) const SHARDS: u64 = 16;
/// Slots per chunk: 256 KiB.
pub(super) const CHUNK_SLOTS: u64 = 4096;
/// Most slots of a shard: 64 million nodes in all, for which the kernel needs 60 GB itself.
pub(super) const SLOTS_MAX: u32 = 1 << 22;
/// Words of a slot.
pub(super) const SLOT_WORDS: usize = 8;

/// `USNODES` and a version: another layout gets another number.
const MAGIC: u64 = u64::from_le_bytes(*b"USNODES\x01");
const HEADER_BYTES: u64 = 4096;
const WORD_BYTES: u64 = 8;
const SLOT_BYTES: u64 = SLOT_WORDS as u64 * WORD_BYTES;
const CHUNK_BYTES: u64 = CHUNK_SLOTS * SLOT_BYTES;
const FILE_BYTES: u64 = HEADER_BYTES + SHARDS * SLOTS_MAX as u64 * SLOT_BYTES;
const WORD_ROOT_VERSION: u64 = 1;
const WORD_TAKEOVERS: u64 = 2;
const WORD_USED: u64 = 32;

/// The memory of one mount's nodes.
pub(super) struct NodeTable {
    map: MmapRaw,
    file: OwnedFd,
}

impl NodeTable {
    /// Makes an empty one.
    ///
    /// # Errors
    /// No memory files on this machine.
    pub(super) fn create() -> Result<Self> {
        let failed = |e: rustix::io::Errno| {
            Error::environment("making memory for the nodes of a mount")
                .with_source(std::io::Error::from(e))
        };
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let file = rustix::fs::memfd_create("understory-nodes", flags).map_err(failed)?;
        rustix::fs::ftruncate(&file, FILE_BYTES).map_err(failed)?;
        // Nobody can cut it, so that no access to the mapping can fail.
        rustix::fs::fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)
            .map_err(failed)?;
        let this = Self::map(file)?;
        this.word(0).store(MAGIC, Ordering::Release);
        Ok(this)
    }

    /// Takes over the one that another server has used; no other server may use it any more.
    ///
    /// # Errors
    /// It is not one, or of another version.
    pub(super) fn take_over(file: OwnedFd) -> Result<Self> {
        let found = rustix::fs::fstat(&file)
            .map_err(|e| Error::internal("examining the nodes of a mount").with_source(e))?;
        if found.st_size.cast_unsigned() != FILE_BYTES {
            return Err(Error::internal(format!(
                "the nodes of a mount: expected {FILE_BYTES} bytes, found {}",
                found.st_size
            )));
        }
        let this = Self::map(file)?;
        let magic = this.word(0).load(Ordering::Acquire);
        if magic != MAGIC {
            return Err(Error::environment(format!(
                "the nodes of a mount are of another version: expected {MAGIC:#x}, found {magic:#x}"
            ))
            .with_hint("restart with `understory down` and `understory up`"));
        }
        this.word(WORD_TAKEOVERS).fetch_add(1, Ordering::AcqRel);
        Ok(this)
    }

    fn map(file: OwnedFd) -> Result<Self> {
        let map = usize::try_from(FILE_BYTES)
            .map_err(std::io::Error::other)
            .and_then(|len| MmapOptions::new().len(len).map_raw(&file))
            .map_err(|e| Error::environment("mapping the nodes of a mount").with_source(e))?;
        Ok(Self { map, file })
    }

    /// The file, to hand on.
    pub(super) fn file(&self) -> &OwnedFd {
        &self.file
    }

    /// Moves when the root's listing has changed.
    pub(super) fn root_version(&self) -> &AtomicU64 {
        self.word(WORD_ROOT_VERSION)
    }

    /// How many servers have taken it over.
    pub(super) fn takeovers(&self) -> u64 {
        self.word(WORD_TAKEOVERS).load(Ordering::Acquire)
    }

    /// The number of slots of a shard that were ever in use.
    pub(super) fn used(&self, shard: u64) -> &AtomicU64 {
        debug_assert!(shard < SHARDS);
        self.word(WORD_USED + shard)
    }

    /// The words of a slot.
    ///
    /// # Panics
    /// `slot` is not below [`SLOTS_MAX`], or `shard` not below [`SHARDS`].
    pub(super) fn slot(&self, shard: u64, slot: u32) -> &[AtomicU64; SLOT_WORDS] {
        assert!(
            shard < SHARDS && slot < SLOTS_MAX,
            "slot {slot} of shard {shard}"
        );
        let at = chunk_at(shard, u64::from(slot) / CHUNK_SLOTS)
            + u64::from(slot) % CHUNK_SLOTS * SLOT_BYTES;
        let pointer = self.map.as_mut_ptr().wrapping_add(at as usize);
        #[allow(unsafe_code, reason = "memory that processes share")]
        // SAFETY: the mapping is FILE_BYTES long and page-aligned, `at` is a multiple of 64 that lies 64 bytes
        // or more before its end (asserted above), and the reference lives no longer than the mapping. Every
        // access by any process is atomic. The file is sealed against shrinking, so that no page goes away.
        unsafe {
            &*pointer.cast::<[AtomicU64; SLOT_WORDS]>()
        }
    }

    /// Gives the memory of a shard's first `slots` slots back to the system; they are zero afterwards.
    pub(super) fn release(&self, shard: u64, slots: u64) {
        for chunk in 0..slots.div_ceil(CHUNK_SLOTS) {
            let hole = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            if let Err(errno) =
                rustix::fs::fallocate(&self.file, hole, chunk_at(shard, chunk), CHUNK_BYTES)
            {
                // They are zeroed when they are used again in any case.
                tracing::debug!("giving back memory of nodes: {errno}");
                return;
            }
        }
    }

    fn word(&self, number: u64) -> &AtomicU64 {
        debug_assert!(number < HEADER_BYTES / WORD_BYTES);
        let pointer = self.map.as_mut_ptr().cast::<u64>();
        #[allow(unsafe_code, reason = "memory that processes share")]
        // SAFETY: as in `slot`; the header has 512 words, and the numbers are the constants above.
        unsafe {
            AtomicU64::from_ptr(pointer.wrapping_add(number as usize))
        }
    }
}

fn chunk_at(shard: u64, chunk: u64) -> u64 {
    HEADER_BYTES + (chunk * SHARDS + shard) * CHUNK_BYTES
}
