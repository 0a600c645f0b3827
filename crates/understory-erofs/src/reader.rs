//! Reads an image: superblock, inodes, directories, extents.
//!
//! It knows what the writer makes and the other uncompressed layouts of `mkfs.erofs`: 4 KiB blocks, flat and chunked
//! files, devices. Whatever an image says is checked before it is used: a hostile image gives an error. One call does
//! work in proportion to what it returns and holds a block or two in memory; only [`Image::verify`] walks.
//!
//! Cost: an inode is one read of 64 bytes; a lookup reads a block for each halving of the directory's blocks.

use crate::checksum::crc32c;
use crate::error::ErofsError;
use crate::layout::{
    BLOCK, BLOCK_BITS, BLOCK_BYTES, COMPACT_BYTES, COMPAT_CHECKSUM, DEVICE_SLOT_BYTES,
    DIRENT_BYTES, EXTENDED_BYTES, FORMAT_ALL, FORMAT_EXTENDED, FileType, INCOMPAT_CHUNKED,
    INCOMPAT_DEVICES, INCOMPAT_ZERO_PADDING, LAYOUT_CHUNKED, LAYOUT_INLINE, LAYOUT_PLAIN, MAGIC,
    NAME_BYTES_MAX, SLOT, SUPERBLOCK_AT, SUPERBLOCK_BYTES, TAG_BYTES_MAX, TARGET_BYTES_MAX, array,
    get16, get32, get64,
};
use std::cmp::Ordering;
use std::io;

/// Devices that are read; Linux takes as many as a u16 counts, `mkfs.erofs` a handful.
const DEVICES_MAX: u16 = 64;
/// Bytes of a chunk index.
const CHUNK_INDEX_BYTES: u64 = 8;
/// Bytes of a chunk's block address where there is no index.
const CHUNK_ADDRESS_BYTES: u64 = 4;
const CHUNK_BITS: u16 = 0x1f;
const CHUNK_HAS_INDEX: u16 = 0x20;
/// The block address of a hole.
const HOLE: u32 = u32::MAX;

/// Bytes at offsets, of a known length.
pub trait ReadAt {
    /// The length in bytes.
    fn len(&self) -> u64;

    /// True if there is nothing.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Fills `buffer` with the bytes at `offset`.
    ///
    /// # Errors
    /// `UnexpectedEof` beyond the end; what reading gives.
    fn read_exact_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()>;
}

impl ReadAt for [u8] {
    fn len(&self) -> u64 {
        <[u8]>::len(self) as u64
    }

    fn read_exact_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        let bytes = usize::try_from(offset)
            .ok()
            .and_then(|start| self.get(start..start.checked_add(buffer.len())?))
            .ok_or(io::ErrorKind::UnexpectedEof)?;
        buffer.copy_from_slice(bytes);
        Ok(())
    }
}

impl<T: ReadAt + ?Sized> ReadAt for &T {
    fn len(&self) -> u64 {
        (**self).len()
    }

    fn read_exact_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        (**self).read_exact_at(offset, buffer)
    }
}

/// What the superblock says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Superblock {
    /// The root's inode number.
    pub root: u64,
    /// Inodes in the image.
    pub inodes: u64,
    /// Blocks of the image itself, without devices.
    pub blocks: u32,
    /// Block from which inode numbers count.
    pub metadata_block: u32,
    /// The mtime of compact inodes in seconds.
    pub mtime_s: u64,
    /// UUID.
    pub uuid: [u8; 16],
    /// True if the checksum is there (and right).
    pub checksum: bool,
    /// Extra devices.
    pub devices: Vec<Device>,
}

/// An extra device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Device {
    /// What the image says of it, without trailing NULs.
    pub tag: Vec<u8>,
    /// Its size in blocks.
    pub blocks: u32,
    /// Where it begins in the image's address space; 0 if it has no place there.
    pub first_block: u32,
}

/// An inode.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Inode {
    /// Its number.
    pub number: u64,
    /// What it is.
    pub kind: FileType,
    /// Type and permission bits.
    pub mode: u16,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Links.
    pub links: u32,
    /// Bytes.
    pub size: u64,
    /// In seconds since 1970.
    pub mtime_s: u64,
    layout: u16,
    block: u32,
    /// Where what follows the inode begins.
    behind: u64,
}

/// An entry of a directory, also `.` and `..`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DirectoryEntry {
    /// Its name.
    pub name: Vec<u8>,
    /// Its inode's number.
    pub number: u64,
    /// What the directory says that it is.
    pub kind: FileType,
}

/// Where an extent is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// At this offset of the image.
    Image(u64),
    /// At this offset of the device with this number, from 0.
    Device(usize, u64),
    /// Nowhere: zeros.
    Hole,
}

/// A run of a file's bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// Where in the file.
    pub offset: u64,
    /// Bytes.
    pub bytes: u64,
    /// Where they are.
    pub place: Place,
}

/// An open image.
#[derive(Debug)]
pub struct Image<R> {
    source: R,
    superblock: Superblock,
}

impl<R: ReadAt> Image<R> {
    /// Opens an image and checks its superblock.
    ///
    /// # Errors
    /// Not EROFS, unknown features, wrong checksum, I/O.
    pub fn open(source: R) -> Result<Self, ErofsError> {
        let mut block = [0; BLOCK];
        source
            .read_exact_at(0, &mut block)
            .map_err(ErofsError::Read)?;
        let sb = &block[SUPERBLOCK_AT..];
        let found = get32(sb, 0);
        if found != MAGIC {
            return Err(ErofsError::NotErofs { found });
        }
        if sb[12] != BLOCK_BITS || sb[90] != 0 {
            return Err(ErofsError::Unsupported(format!(
                "blocks of 2^{} bytes",
                sb[12].max(sb[90])
            )));
        }
        let features = get32(sb, 80);
        let known = INCOMPAT_ZERO_PADDING | INCOMPAT_CHUNKED | INCOMPAT_DEVICES;
        if features & !known != 0 {
            return Err(ErofsError::Unsupported(format!(
                "features {:#x}",
                features & !known
            )));
        }
        let checksum = get32(sb, 8) & COMPAT_CHECKSUM != 0;
        if checksum {
            let said = get32(sb, 4);
            block[SUPERBLOCK_AT + 4..SUPERBLOCK_AT + 8].fill(0);
            let found = crc32c(&block[SUPERBLOCK_AT..]);
            if found != said {
                return Err(ErofsError::corrupt(
                    "the superblock",
                    format!("expected checksum {said:08x}, found {found:08x}"),
                ));
            }
        }
        let sb = &block[SUPERBLOCK_AT..SUPERBLOCK_AT + SUPERBLOCK_BYTES];
        let mut superblock = Superblock {
            root: u64::from(get16(sb, 14)),
            inodes: get64(sb, 16),
            blocks: get32(sb, 36),
            metadata_block: get32(sb, 40),
            mtime_s: get64(sb, 24),
            uuid: array(sb, 48),
            checksum,
            devices: Vec::new(),
        };
        let count = match features & INCOMPAT_DEVICES {
            0 => 0,
            _ => get16(sb, 86),
        };
        if count > DEVICES_MAX {
            return Err(ErofsError::Unsupported(format!("{count} devices")));
        }
        let slots = u64::from(get16(sb, 88)) * DEVICE_SLOT_BYTES as u64;
        for number in 0..u64::from(count) {
            let mut slot = [0; DEVICE_SLOT_BYTES];
            source
                .read_exact_at(slots + number * DEVICE_SLOT_BYTES as u64, &mut slot)
                .map_err(ErofsError::Read)?;
            let tag = &slot[..TAG_BYTES_MAX];
            let end = tag
                .iter()
                .rposition(|byte| *byte != 0)
                .map_or(0, |at| at + 1);
            superblock.devices.push(Device {
                tag: tag[..end].to_vec(),
                blocks: get32(&slot, 64),
                first_block: get32(&slot, 68),
            });
        }
        Ok(Self { source, superblock })
    }

    /// What the superblock says.
    pub fn superblock(&self) -> &Superblock {
        &self.superblock
    }

    /// The bytes below.
    pub fn source(&self) -> &R {
        &self.source
    }

    /// Reads the root's inode.
    ///
    /// # Errors
    /// As [`Image::inode`]; it is not a directory.
    pub fn root(&self) -> Result<Inode, ErofsError> {
        let root = self.inode(self.superblock.root)?;
        if root.kind != FileType::Directory {
            return Err(corrupt_inode(root.number, "the root is not a directory"));
        }
        Ok(root)
    }

    /// Reads an inode.
    ///
    /// # Errors
    /// Beyond the image, not a file, directory or symlink, an unknown layout, I/O.
    pub fn inode(&self, number: u64) -> Result<Inode, ErofsError> {
        let start = u64::from(self.superblock.metadata_block) * BLOCK_BYTES;
        let at = number
            .checked_mul(SLOT as u64)
            .and_then(|at| at.checked_add(start))
            .filter(|at| *at < self.source.len())
            .ok_or_else(|| corrupt_inode(number, "it lies beyond the image"))?;
        let mut bytes = [0; EXTENDED_BYTES];
        let (first, rest) = bytes.split_at_mut(COMPACT_BYTES);
        self.read(at, first)?;
        let format = get16(first, 0);
        let extended = format & FORMAT_EXTENDED != 0;
        if extended {
            self.read(at + COMPACT_BYTES as u64, rest)?;
        }
        let layout = format >> 1;
        if format & !FORMAT_ALL != 0
            || !matches!(layout, LAYOUT_PLAIN | LAYOUT_INLINE | LAYOUT_CHUNKED)
        {
            return Err(ErofsError::Unsupported(format!(
                "inode {number} with format {format:#x}"
            )));
        }
        let mode = get16(&bytes, 4);
        let kind = FileType::of_mode(mode)
            .ok_or_else(|| ErofsError::Unsupported(format!("inode {number} with mode {mode:o}")))?;
        let attributes = match get16(&bytes, 2) {
            0 => 0,
            count => 12 + 4 * (u64::from(count) - 1),
        };
        let own = if extended {
            EXTENDED_BYTES
        } else {
            COMPACT_BYTES
        } as u64;
        Ok(Inode {
            number,
            kind,
            mode,
            uid: if extended {
                get32(&bytes, 24)
            } else {
                get16(&bytes, 24).into()
            },
            gid: if extended {
                get32(&bytes, 28)
            } else {
                get16(&bytes, 26).into()
            },
            links: if extended {
                get32(&bytes, 44)
            } else {
                get16(&bytes, 6).into()
            },
            size: if extended {
                get64(&bytes, 8)
            } else {
                get32(&bytes, 8).into()
            },
            mtime_s: if extended {
                get64(&bytes, 32)
            } else {
                self.superblock.mtime_s
            },
            layout,
            block: get32(&bytes, 16),
            behind: at + own + attributes,
        })
    }

    /// Calls `visit` with each entry of a directory, in order, until it returns false.
    ///
    /// # Errors
    /// The directory is corrupt: entries that are out of order, or whose names lie outside their block.
    pub fn entries(
        &self,
        directory: &Inode,
        mut visit: impl FnMut(DirectoryEntry) -> bool,
    ) -> Result<(), ErofsError> {
        self.check_directory(directory)?;
        let mut last = Vec::new();
        for number in 0..directory.size.div_ceil(BLOCK_BYTES) {
            let block = DirectoryBlock::read(self, directory, number)?;
            for at in 0..block.count {
                let entry = block.entry(at)?;
                if last >= entry.name {
                    return Err(block.corrupt("its names are out of order"));
                }
                last.clone_from(&entry.name);
                if !visit(entry) {
                    return Ok(());
                }
            }
        }
        Ok(())
    }

    /// Finds a name in a directory as the kernel does, by halving.
    ///
    /// # Errors
    /// A block that is looked at is corrupt.
    pub fn lookup(
        &self,
        directory: &Inode,
        name: &[u8],
    ) -> Result<Option<DirectoryEntry>, ErofsError> {
        self.check_directory(directory)?;
        let (mut low, mut high) = (0, directory.size.div_ceil(BLOCK_BYTES));
        // The block before `low` begins at or before the name.
        let mut candidate = None;
        while low < high {
            let middle = low + (high - low) / 2;
            let block = DirectoryBlock::read(self, directory, middle)?;
            match block.entry(0)?.name.as_slice().cmp(name) {
                Ordering::Greater => high = middle,
                _ => {
                    low = middle + 1;
                    candidate = Some(block);
                }
            }
        }
        let Some(block) = candidate else {
            return Ok(None);
        };
        let (mut low, mut high) = (0, block.count);
        while low < high {
            let middle = low + (high - low) / 2;
            let entry = block.entry(middle)?;
            match entry.name.as_slice().cmp(name) {
                Ordering::Equal => return Ok(Some(entry)),
                Ordering::Less => low = middle + 1,
                Ordering::Greater => high = middle,
            }
        }
        Ok(None)
    }

    /// Reads a symlink's target.
    ///
    /// # Errors
    /// It is not a symlink, or longer than a path may be.
    pub fn target(&self, symlink: &Inode) -> Result<Vec<u8>, ErofsError> {
        if symlink.kind != FileType::Symlink {
            return Err(corrupt_inode(symlink.number, "it is not a symlink"));
        }
        if symlink.size == 0 || symlink.size > TARGET_BYTES_MAX as u64 {
            return Err(corrupt_inode(
                symlink.number,
                format!("a target of {} bytes", symlink.size),
            ));
        }
        let mut target = vec![0; symlink.size as usize];
        self.read_contents(symlink, 0, &mut target)?;
        Ok(target)
    }

    /// The extent that holds the byte at `offset` of a file; it goes on to the end of what lies together. `None` at
    /// the end of the file.
    ///
    /// # Errors
    /// It lies outside image and devices.
    pub fn extent(&self, inode: &Inode, offset: u64) -> Result<Option<Extent>, ErofsError> {
        if offset >= inode.size {
            return Ok(None);
        }
        let corrupt = |reason: String| corrupt_inode(inode.number, reason);
        let in_tail = inode.size % BLOCK_BYTES;
        let extent = match inode.layout {
            LAYOUT_INLINE if in_tail > 0 && offset >= inode.size - in_tail => {
                let start = inode.size - in_tail;
                if inode.behind % BLOCK_BYTES + in_tail > BLOCK_BYTES {
                    return Err(corrupt("its inline data crosses a block".to_owned()));
                }
                Extent {
                    offset,
                    bytes: inode.size - offset,
                    place: Place::Image(inode.behind + (offset - start)),
                }
            }
            LAYOUT_INLINE | LAYOUT_PLAIN => {
                let end = match inode.layout {
                    LAYOUT_INLINE => inode.size - in_tail,
                    _ => inode.size,
                };
                Extent {
                    offset,
                    bytes: end - offset,
                    place: self.place(u64::from(inode.block) * BLOCK_BYTES, 0, inode, offset)?,
                }
            }
            _ => self.chunk(inode, offset)?,
        };
        let (room, at) = match extent.place {
            Place::Hole => return Ok(Some(extent)),
            Place::Image(at) => (self.source.len(), at),
            Place::Device(device, at) => {
                let blocks = self.superblock.devices.get(device).map_or(0, |d| d.blocks);
                (u64::from(blocks) * BLOCK_BYTES, at)
            }
        };
        match at.checked_add(extent.bytes) {
            Some(end) if end <= room => Ok(Some(extent)),
            _ => Err(corrupt(format!(
                "{} bytes at {at} lie outside the {room} bytes there are",
                extent.bytes
            ))),
        }
    }

    /// Fills `buffer` with a file's bytes at `offset`, which must be inside. Reads the image only: bytes on a device are
    /// refused.
    ///
    /// # Errors
    /// Beyond the end, on a device, I/O.
    pub fn read_contents(
        &self,
        inode: &Inode,
        mut offset: u64,
        mut buffer: &mut [u8],
    ) -> Result<(), ErofsError> {
        while !buffer.is_empty() {
            let extent = self
                .extent(inode, offset)?
                .ok_or_else(|| corrupt_inode(inode.number, "a read beyond its end"))?;
            let count = usize::try_from(extent.bytes)
                .unwrap_or(usize::MAX)
                .min(buffer.len());
            let (now, rest) = buffer.split_at_mut(count);
            match extent.place {
                Place::Image(at) => self.read(at, now)?,
                Place::Hole => now.fill(0),
                Place::Device(device, _) => {
                    return Err(ErofsError::Unsupported(format!(
                        "device {device} for inode {}",
                        inode.number
                    )));
                }
            }
            offset += count as u64;
            buffer = rest;
        }
        Ok(())
    }

    fn chunk(&self, inode: &Inode, offset: u64) -> Result<Extent, ErofsError> {
        let format = (inode.block & 0xffff) as u16;
        if format & !(CHUNK_BITS | CHUNK_HAS_INDEX) != 0 {
            return Err(ErofsError::Unsupported(format!(
                "inode {} with chunk format {format:#x}",
                inode.number
            )));
        }
        let chunk_bytes = BLOCK_BYTES << (format & CHUNK_BITS);
        let number = offset / chunk_bytes;
        let start = number * chunk_bytes;
        let indexed = format & CHUNK_HAS_INDEX != 0;
        let unit = if indexed {
            CHUNK_INDEX_BYTES
        } else {
            CHUNK_ADDRESS_BYTES
        };
        // The kernel aligns the indexes to their size.
        let at = number
            .checked_mul(unit)
            .and_then(|at| at.checked_add(inode.behind.next_multiple_of(unit)))
            .ok_or_else(|| corrupt_inode(inode.number, "its chunks lie beyond the image"))?;
        let mut index = [0; CHUNK_INDEX_BYTES as usize];
        self.read(at, &mut index[..unit as usize])?;
        let (device, block) = match indexed {
            true => (get16(&index, 2), get32(&index, 4)),
            false => (0, get32(&index, 0)),
        };
        let place = match block {
            HOLE => Place::Hole,
            _ => self.place(
                u64::from(block) * BLOCK_BYTES,
                device,
                inode,
                offset - start,
            )?,
        };
        Ok(Extent {
            offset,
            bytes: (start.saturating_add(chunk_bytes)).min(inode.size) - offset,
            place,
        })
    }

    /// Where the byte at `into` of what begins at `address` is. Devices may have a part of the image's addresses.
    fn place(
        &self,
        address: u64,
        device: u16,
        inode: &Inode,
        into: u64,
    ) -> Result<Place, ErofsError> {
        let devices = &self.superblock.devices;
        let corrupt = || corrupt_inode(inode.number, "its address overflows");
        let at = address.checked_add(into).ok_or_else(corrupt)?;
        if let Some(device) = device.checked_sub(1) {
            let device = usize::from(device);
            if device >= devices.len() {
                return Err(corrupt_inode(
                    inode.number,
                    format!("device {device} of {}", devices.len()),
                ));
            }
            return Ok(Place::Device(device, at));
        }
        for (number, device) in devices.iter().enumerate() {
            let start = u64::from(device.first_block) * BLOCK_BYTES;
            if start > 0 && at >= start && at - start < u64::from(device.blocks) * BLOCK_BYTES {
                return Ok(Place::Device(number, at - start));
            }
        }
        Ok(Place::Image(at))
    }

    fn check_directory(&self, inode: &Inode) -> Result<(), ErofsError> {
        if inode.kind != FileType::Directory {
            return Err(corrupt_inode(inode.number, "it is not a directory"));
        }
        if inode.size > self.source.len() {
            return Err(corrupt_inode(
                inode.number,
                format!("a listing of {} bytes is larger than the image", inode.size),
            ));
        }
        Ok(())
    }

    fn read(&self, at: u64, buffer: &mut [u8]) -> Result<(), ErofsError> {
        self.source
            .read_exact_at(at, buffer)
            .map_err(ErofsError::Read)
    }
}

/// A block of a directory.
struct DirectoryBlock {
    directory: u64,
    number: u64,
    bytes: Vec<u8>,
    count: usize,
}

impl DirectoryBlock {
    fn read<R: ReadAt>(
        image: &Image<R>,
        directory: &Inode,
        number: u64,
    ) -> Result<Self, ErofsError> {
        let start = number * BLOCK_BYTES;
        let mut block = Self {
            directory: directory.number,
            number,
            bytes: vec![0; (directory.size - start).min(BLOCK_BYTES) as usize],
            count: 0,
        };
        image.read_contents(directory, start, &mut block.bytes)?;
        // Names follow the entries: where the first one is says how many there are.
        let first = match block.bytes.len() {
            0..DIRENT_BYTES => 0,
            _ => usize::from(get16(&block.bytes, 8)),
        };
        if first == 0 || first % DIRENT_BYTES != 0 || first >= block.bytes.len() {
            return Err(block.corrupt(&format!("its first name is at {first}")));
        }
        block.count = first / DIRENT_BYTES;
        Ok(block)
    }

    fn name_at(&self, at: usize) -> usize {
        usize::from(get16(&self.bytes, at * DIRENT_BYTES + 8))
    }

    /// The entry at an index below `count`.
    fn entry(&self, at: usize) -> Result<DirectoryEntry, ErofsError> {
        let start = self.name_at(at);
        let name = if at + 1 < self.count {
            self.bytes.get(start..self.name_at(at + 1))
        } else {
            // The last name ends with the block or the first NUL.
            self.bytes.get(start..).map(|rest| {
                let end = rest.iter().position(|byte| *byte == 0);
                &rest[..end.unwrap_or(rest.len())]
            })
        };
        let Some(name) = name.filter(|_| start >= self.count * DIRENT_BYTES) else {
            return Err(self.corrupt("a name lies outside of it"));
        };
        if name.is_empty()
            || name.len() > NAME_BYTES_MAX
            || name.contains(&0)
            || name.contains(&b'/')
        {
            return Err(self.corrupt(&format!("the name `{}`", name.escape_ascii())));
        }
        let code = self.bytes[at * DIRENT_BYTES + 10];
        let kind = FileType::of_code(code)
            .ok_or_else(|| self.corrupt(&format!("an entry of type {code}")))?;
        Ok(DirectoryEntry {
            name: name.to_vec(),
            number: get64(&self.bytes, at * DIRENT_BYTES),
            kind,
        })
    }

    fn corrupt(&self, reason: &str) -> ErofsError {
        ErofsError::corrupt(
            format!("block {} of directory {}", self.number, self.directory),
            reason,
        )
    }
}

pub(crate) fn corrupt_inode(number: u64, reason: impl Into<String>) -> ErofsError {
    ErofsError::corrupt(format!("inode {number}"), reason)
}
