//! The blocks of an image's metadata as they come: the last ones in memory, those before written.
//!
//! Inodes take the room that is left in the last block that holds inodes, or in one before it; listings take whole
//! blocks at the end. Blocks leave the window in their order, so that the output is written in sequence but for
//! block 0 and late patches. Every byte enters the hash that gives the UUID.

use crate::error::ErofsError;
use crate::layout::{
    BLOCK, BLOCK_BYTES, COMPACT_BYTES, DEVICE_FIRST_BLOCK, InodeFields, ROOT_AT, SLOT, put64,
};
use std::io::{Seek, SeekFrom, Write};

/// Blocks of metadata: where the extra device begins, and what 32-bit inode numbers reach by far.
const METADATA_BLOCKS_MAX: u64 = DEVICE_FIRST_BLOCK as u64;
/// Blocks that wait for being written: patches to them cost nothing.
const WINDOW_BLOCKS_MAX: usize = 256;
/// Blocks of them that still wait after a write, so that the room in them can be filled.
const WINDOW_BLOCKS_KEPT: usize = 16;

/// The blocks of metadata as they come: the last ones in memory, the rest written.
pub(crate) struct Blocks<W> {
    out: W,
    hasher: blake3::Hasher,
    /// Blocks that are written.
    written: u32,
    /// Whole blocks that are not.
    window: Vec<u8>,
    /// Room for inodes in the last block that holds some, and in one before it: offsets.
    room: [Room; 2],
    /// Block 0, once written.
    first: Vec<u8>,
    /// Numbers for what was written without.
    late: Vec<(u64, u32)>,
    /// The last `number` of an inode.
    number: u32,
}

#[derive(Clone, Copy)]
struct Room {
    at: u64,
    end: u64,
}

impl Room {
    const NONE: Self = Self { at: 0, end: 0 };

    fn bytes(self) -> u64 {
        self.end - self.at
    }
}

impl<W: Write + Seek> Blocks<W> {
    pub(crate) fn new(out: W) -> Self {
        let rest = Room {
            at: (ROOT_AT + COMPACT_BYTES) as u64,
            end: BLOCK_BYTES,
        };
        Self {
            out,
            hasher: blake3::Hasher::new_derive_key("understory 2026-11 erofs image uuid"),
            written: 0,
            window: vec![0; BLOCK],
            room: [rest, Room::NONE],
            first: Vec::new(),
            late: Vec::new(),
            number: 1,
        }
    }

    /// The number of the block that comes next.
    pub(crate) fn next(&self) -> u32 {
        self.written + (self.window.len() / BLOCK) as u32
    }

    /// Adds a block, filled up with zeros, and returns its number.
    pub(crate) fn append(&mut self, bytes: &[u8]) -> Result<u32, ErofsError> {
        let block = self.next();
        if u64::from(block) >= METADATA_BLOCKS_MAX {
            return Err(ErofsError::TooLarge {
                what: "blocks of metadata",
                limit: METADATA_BLOCKS_MAX,
                found: u64::from(block) + 1,
            });
        }
        self.window.extend_from_slice(bytes);
        self.window
            .resize(self.window.len().next_multiple_of(BLOCK), 0);
        if self.window.len() / BLOCK > WINDOW_BLOCKS_MAX {
            self.write(self.window.len() / BLOCK - WINDOW_BLOCKS_KEPT)?;
        }
        Ok(block)
    }

    /// Places an inode and what is inline behind it, and returns its number.
    pub(crate) fn put(&mut self, mut inode: InodeFields, tail: &[u8]) -> Result<u32, ErofsError> {
        let bytes = (inode.bytes() + tail.len()).next_multiple_of(SLOT) as u64;
        if !self.room.iter().any(|room| room.bytes() >= bytes) {
            let block = u64::from(self.append(&[0; BLOCK])?) * BLOCK_BYTES;
            let [last, before] = self.room;
            if last.bytes() > before.bytes() {
                self.room[1] = last;
            }
            self.room[0] = Room {
                at: block,
                end: block + BLOCK_BYTES,
            };
        }
        // The older room first: what lies behind it is nearer.
        let Some(room) = self
            .room
            .iter_mut()
            .rev()
            .find(|room| room.bytes() >= bytes)
        else {
            return Err(ErofsError::Invalid(
                "an inode of more than a block".to_owned(),
            ));
        };
        let at = room.at;
        room.at += bytes;
        self.number = self.number.wrapping_add(1);
        inode.number = self.number;
        let start = (at - u64::from(self.written) * BLOCK_BYTES) as usize;
        let out = &mut self.window[start..start + bytes as usize];
        inode.put(out);
        out[inode.bytes()..][..tail.len()].copy_from_slice(tail);
        // 16 GiB of slots of 32 bytes
        Ok((at / SLOT as u64) as u32)
    }

    /// Puts the number of an inode into a listing.
    pub(crate) fn patch(&mut self, at: u64, number: u32) {
        match at.checked_sub(u64::from(self.written) * BLOCK_BYTES) {
            Some(at) => put64(&mut self.window, at as usize, u64::from(number)),
            None => self.late.push((at, number)),
        }
    }

    fn write(&mut self, blocks: usize) -> Result<(), ErofsError> {
        let bytes = &self.window[..blocks * BLOCK];
        self.hasher.update(bytes);
        self.out.write_all(bytes).map_err(ErofsError::Write)?;
        if self.written == 0 && blocks > 0 {
            self.first = bytes[..BLOCK].to_vec();
        }
        self.window.drain(..blocks * BLOCK);
        self.written += blocks as u32;
        let start = u64::from(self.written) * BLOCK_BYTES;
        for room in &mut self.room {
            if room.at < start {
                *room = Room::NONE;
            }
        }
        Ok(())
    }

    /// Writes all that is left but block 0, and returns the number of blocks.
    pub(crate) fn end(&mut self) -> Result<u32, ErofsError> {
        self.write(self.window.len() / BLOCK)?;
        self.late.sort_unstable();
        for (at, number) in &self.late {
            self.hasher.update(&at.to_le_bytes());
            self.hasher.update(&number.to_le_bytes());
            if *at < BLOCK_BYTES {
                put64(&mut self.first, *at as usize, u64::from(*number));
                continue;
            }
            self.out
                .seek(SeekFrom::Start(*at))
                .map_err(ErofsError::Write)?;
            self.out
                .write_all(&u64::from(*number).to_le_bytes())
                .map_err(ErofsError::Write)?;
        }
        Ok(self.written)
    }

    /// Block 0 with the root's inode.
    pub(crate) fn head(&self, root: &InodeFields) -> Vec<u8> {
        let mut head = self.first.clone();
        root.put(&mut head[ROOT_AT..]);
        head
    }

    /// A UUID (version 8) of all that is in the image.
    pub(crate) fn uuid(&mut self, head: &[u8], identity: &[u8]) -> [u8; 16] {
        self.hasher.update(head);
        self.hasher.update(identity);
        let mut uuid = [0; 16];
        uuid.copy_from_slice(&self.hasher.finalize().as_bytes()[..16]);
        uuid[6] = uuid[6] & 0x0f | 0x80;
        uuid[8] = uuid[8] & 0x3f | 0x80;
        uuid
    }

    pub(crate) fn write_head(mut self, head: &[u8]) -> Result<W, ErofsError> {
        let end = u64::from(self.written) * BLOCK_BYTES;
        let mut write = || {
            self.out.seek(SeekFrom::Start(0))?;
            self.out.write_all(head)?;
            self.out.seek(SeekFrom::Start(end))?;
            self.out.flush()
        };
        write().map_err(ErofsError::Write)?;
        Ok(self.out)
    }
}
