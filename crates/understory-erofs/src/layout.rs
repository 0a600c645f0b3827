//! The structures on disk that are written and read. All numbers are little-endian.
//!
//! ```text
//! block 0       0     1024  nothing
//!            1024      128  superblock
//!            1152      128  device slot (nothing if there is no extra device)
//!            1280       32  root inode, then other inodes to the end of the block
//! block 1..             inodes in slots of 32 bytes, small directories and symlinks behind theirs, and blocks of
//!                       larger directories
//! ```
//! An inode's number (nid) is its slot, counted from the start of the image. docs/disk-format.md draws the fields.

/// Bytes of a block. Linux reads images whose blocks are its pages or smaller.
pub const BLOCK_BYTES: u64 = 4096;
/// Bytes of a name, as on Linux (`NAME_MAX`).
pub const NAME_BYTES_MAX: usize = 255;
/// Bytes of a symlink target: Linux' `PATH_MAX` less the NUL.
pub const TARGET_BYTES_MAX: usize = 4095;
/// Bytes of a device's tag.
pub const TAG_BYTES_MAX: usize = 64;
/// The block at which the extra device begins in the address space of the image: metadata may take 16 GiB (150
/// million inodes), the device nearly 16 TiB.
pub const DEVICE_FIRST_BLOCK: u32 = 1 << 22;

pub(crate) const BLOCK: usize = BLOCK_BYTES as usize;
pub(crate) const BLOCK_BITS: u8 = 12;
pub(crate) const SUPERBLOCK_AT: usize = 1024;
pub(crate) const SUPERBLOCK_BYTES: usize = 128;
pub(crate) const DEVICE_SLOT_AT: usize = SUPERBLOCK_AT + SUPERBLOCK_BYTES;
pub(crate) const DEVICE_SLOT_BYTES: usize = 128;
/// Where the root inode is: its number is a u16 in the superblock.
pub(crate) const ROOT_AT: usize = DEVICE_SLOT_AT + DEVICE_SLOT_BYTES;
pub(crate) const SLOT: usize = 32;
pub(crate) const COMPACT_BYTES: usize = 32;
pub(crate) const EXTENDED_BYTES: usize = 64;
pub(crate) const DIRENT_BYTES: usize = 12;

pub(crate) const MAGIC: u32 = 0xe0f5_e1e2;
/// The checksum of the superblock's block is there.
pub(crate) const COMPAT_CHECKSUM: u32 = 1;
/// Times of inodes are mtimes. `mkfs.erofs` sets it.
pub(crate) const COMPAT_MTIME: u32 = 2;
pub(crate) const INCOMPAT_ZERO_PADDING: u32 = 1;
pub(crate) const INCOMPAT_CHUNKED: u32 = 4;
pub(crate) const INCOMPAT_DEVICES: u32 = 8;

pub(crate) const LAYOUT_PLAIN: u16 = 0;
pub(crate) const LAYOUT_INLINE: u16 = 2;
pub(crate) const LAYOUT_CHUNKED: u16 = 4;
pub(crate) const FORMAT_EXTENDED: u16 = 1;
pub(crate) const FORMAT_ALL: u16 = 0xf;

pub(crate) const MODE_TYPE: u16 = 0o170_000;
pub(crate) const MODE_DIRECTORY: u16 = 0o040_555;
pub(crate) const MODE_FILE: u16 = 0o100_444;
pub(crate) const MODE_EXECUTABLE: u16 = 0o100_555;
pub(crate) const MODE_SYMLINK: u16 = 0o120_777;

/// What an entry of a directory is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FileType {
    /// A regular file.
    File,
    /// A directory.
    Directory,
    /// A symlink.
    Symlink,
}

impl FileType {
    pub(crate) fn code(self) -> u8 {
        match self {
            Self::File => 1,
            Self::Directory => 2,
            Self::Symlink => 7,
        }
    }

    pub(crate) fn of_code(code: u8) -> Option<Self> {
        match code {
            1 => Some(Self::File),
            2 => Some(Self::Directory),
            7 => Some(Self::Symlink),
            _ => None,
        }
    }

    pub(crate) fn of_mode(mode: u16) -> Option<Self> {
        match mode & MODE_TYPE {
            0o100_000 => Some(Self::File),
            0o040_000 => Some(Self::Directory),
            0o120_000 => Some(Self::Symlink),
            _ => None,
        }
    }
}

/// What an inode says, before it is put into 32 or 64 bytes. Owner 0:0, one link.
#[derive(Debug, Clone, Copy)]
pub(crate) struct InodeFields {
    pub(crate) layout: u16,
    pub(crate) mode: u16,
    pub(crate) size: u64,
    pub(crate) block: u32,
    /// A running number, for 32-bit stat.
    pub(crate) number: u32,
    pub(crate) mtime: u64,
}

impl InodeFields {
    /// 32, or 64 where the size needs more than 32 bits.
    pub(crate) fn bytes(&self) -> usize {
        if u32::try_from(self.size).is_ok() {
            COMPACT_BYTES
        } else {
            EXTENDED_BYTES
        }
    }

    /// Writes it to the beginning of `out`, whose bytes are zero.
    pub(crate) fn put(&self, out: &mut [u8]) {
        let extended = self.bytes() == EXTENDED_BYTES;
        let format = self.layout << 1 | if extended { FORMAT_EXTENDED } else { 0 };
        put16(out, 0, format);
        put16(out, 4, self.mode);
        if extended {
            put64(out, 8, self.size);
            put32(out, 16, self.block);
            put32(out, 20, self.number);
            put64(out, 32, self.mtime);
            put32(out, 44, 1);
        } else {
            put16(out, 6, 1);
            #[expect(clippy::cast_possible_truncation, reason = "compact only if it fits")]
            put32(out, 8, self.size as u32);
            put32(out, 16, self.block);
            put32(out, 20, self.number);
        }
    }
}

pub(crate) fn put16(out: &mut [u8], at: usize, value: u16) {
    out[at..at + 2].copy_from_slice(&value.to_le_bytes());
}

pub(crate) fn put32(out: &mut [u8], at: usize, value: u32) {
    out[at..at + 4].copy_from_slice(&value.to_le_bytes());
}

pub(crate) fn put64(out: &mut [u8], at: usize, value: u64) {
    out[at..at + 8].copy_from_slice(&value.to_le_bytes());
}

/// Reads at a place that the caller knows to be inside.
pub(crate) fn get16(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes(array(bytes, at))
}

pub(crate) fn get32(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(array(bytes, at))
}

pub(crate) fn get64(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(array(bytes, at))
}

pub(crate) fn array<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    let mut out = [0; N];
    out.copy_from_slice(&bytes[at..at + N]);
    out
}
