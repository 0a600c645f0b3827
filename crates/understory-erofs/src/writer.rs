//! Makes the metadata of an image from a tree that is fed to it, in one pass.
//!
//! The tree comes depth first: [`Writer::begin_directory`], its entries in any order, [`Writer::end_directory`]. When a
//! directory ends, the inodes of its entries are placed side by side, those of subdirectories with their listing
//! behind them, since all that is below has a number by then; so what a `stat` of each name reads lies together, and a
//! subtree is one stretch of the image. What is not known yet (a directory's own number and its parent's, for `.` and
//! `..`) is patched once it is: in memory mostly, by a write of 8 bytes where the block is out already.
//!
//! Equal files share an inode, and so page cache: files are equal if they begin at the same block and are both
//! executable or both not. Directories are never shared; every inode has one link. The bytes follow from what was
//! fed and its order alone.
//!
//! Cost: about 60 bytes and the name for each entry of the *open* directories, 9 to 18 bytes a unique file for the
//! whole image, 12 to 16 bytes for each directory whose parent was placed too late, and a window of 1 MiB. 1,000,000
//! inodes of ordinary shape (100,000 directories) take 32 MB (measured). On disk: 32 bytes an inode (64 for
//! a file on a device), 12 and the name an entry, little padding.

use crate::blocks::Blocks;
use crate::checksum::crc32c;
use crate::error::ErofsError;
use crate::layout::{
    BLOCK, BLOCK_BITS, BLOCK_BYTES, COMPACT_BYTES, COMPAT_CHECKSUM, COMPAT_MTIME,
    DEVICE_FIRST_BLOCK, DEVICE_SLOT_AT, DEVICE_SLOT_BYTES, DIRENT_BYTES, FileType,
    INCOMPAT_CHUNKED, INCOMPAT_DEVICES, InodeFields, LAYOUT_CHUNKED, LAYOUT_INLINE, LAYOUT_PLAIN,
    MAGIC, MODE_DIRECTORY, MODE_EXECUTABLE, MODE_FILE, MODE_SYMLINK, NAME_BYTES_MAX, ROOT_AT, SLOT,
    SUPERBLOCK_AT, TAG_BYTES_MAX, TARGET_BYTES_MAX, put16, put32, put64,
};
use std::collections::HashMap;
use std::io::{Seek, Write};

/// Where files without contents are said to begin.
const NO_BLOCK: u32 = u32::MAX;
/// What fits behind a small inode, in the same block.
const TAIL_BYTES_MAX: usize = BLOCK - COMPACT_BYTES;
/// Shown by `blkid`.
const VOLUME_NAME: &[u8; 16] = b"understory\0\0\0\0\0\0";

/// Where file contents are.
#[derive(Debug, Clone)]
pub enum Data {
    /// On an extra device, which is named when the image is mounted (`device=`).
    Device {
        /// What the image says of the device: at most 64 bytes, not empty.
        tag: Vec<u8>,
        /// Its size; extents beyond are refused.
        blocks: u32,
    },
    /// In the image itself, behind the metadata.
    Behind {
        /// The first block of data, which is what [`Figures::metadata_blocks`] of an equal tree says; 0 to find out.
        first_block: u32,
        /// Blocks of data.
        blocks: u32,
    },
}

/// How to write an image.
#[derive(Debug, Clone)]
pub struct Options {
    /// Where file contents are.
    pub data: Data,
    /// The mtime of everything, in seconds since 1970. Nix's is 1.
    pub mtime_s: u64,
}

/// A regular file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct File {
    /// Bytes.
    pub size: u64,
    /// The executable bit.
    pub executable: bool,
    /// Where its contents begin: a block of the device, or counted from the first block of data. Without meaning if
    /// the size is 0. Contents that are equal begin at the same block; those that differ do not.
    pub first_block: u32,
}

/// What an image has.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Figures {
    /// Inodes, shared ones once.
    pub inodes: u64,
    /// Directories, with the root.
    pub directories: u64,
    /// Names of regular files.
    pub files: u64,
    /// Names of symlinks.
    pub symlinks: u64,
    /// Blocks of metadata, which begin the image.
    pub metadata_blocks: u32,
    /// The image's UUID, a hash of all that is in it.
    pub uuid: [u8; 16],
}

/// Bytes of the index of one chunk, which stands behind its inode.
const CHUNK_BYTES: usize = 8;
/// The inode has indexes of chunks, with devices.
const CHUNK_INDEXES: u32 = 0x20;
/// The most that a chunk may be of blocks, as a power of two.
const CHUNK_BITS_MAX: u32 = 31;
/// The extra device; 0 is the image itself.
const DEVICE_NUMBER: u16 = 1;

/// Bytes of the largest chunk: 8 TiB.
const CHUNK_BYTES_MAX: u64 = BLOCK_BYTES << CHUNK_BITS_MAX;

/// How many times a block must be doubled until the file is one chunk, which may go beyond its end.
fn chunk_bits(size: u64) -> u32 {
    let blocks = size.div_ceil(BLOCK_BYTES);
    blocks
        .next_power_of_two()
        .trailing_zeros()
        .min(CHUNK_BITS_MAX)
}

/// Writes one image. Dropped before [`Writer::finish`], it leaves a file without superblock.
pub struct Writer<W> {
    options: Options,
    /// Added to a file's first block.
    data_start: u32,
    data_blocks: u32,
    blocks: Blocks<W>,
    /// The open directories, the root first. Empty after an error.
    open: Vec<Open>,
    /// Inodes of files by first block: not executable, executable.
    shared: [HashMap<u32, u32>; 2],
    figures: Figures,
}

/// A directory whose entries come.
#[derive(Default)]
struct Open {
    name: Box<[u8]>,
    entries: Vec<Entry>,
    /// Names, targets and tails of listings.
    bytes: Vec<u8>,
    /// Places of the `..` of the directories in `entries`' directories.
    grandchildren: Vec<u64>,
}

#[derive(Clone, Copy)]
struct Entry {
    name: Run,
    content: Content,
}

/// Bytes of [`Open::bytes`].
#[derive(Clone, Copy)]
struct Run {
    start: u32,
    len: u16,
}

#[derive(Clone, Copy)]
enum Content {
    Own,
    Parent,
    File(File),
    Symlink { target: Run },
    Directory(Listing),
}

/// The listing of a directory that has ended: whole blocks, which are placed, and a tail, which is not.
#[derive(Clone, Copy)]
struct Listing {
    first_block: u32,
    /// Bytes, with the tail.
    size: u64,
    /// What is placed behind the inode; less than a block, or nothing.
    tail: Run,
    /// Where in the listing the numbers of `.` and `..` belong.
    own_at: u64,
    parent_at: u64,
    /// Places of the `..` of its subdirectories, which wait for its number; in [`Open::grandchildren`].
    children: (u32, u32),
}

impl<W: Write + Seek> Writer<W> {
    /// Begins an image, which begins where `out` begins. The root is open.
    ///
    /// # Errors
    /// An invalid device.
    pub fn new(out: W, options: Options) -> Result<Self, ErofsError> {
        let (data_start, data_blocks) = match &options.data {
            Data::Device { tag, blocks } => {
                if tag.is_empty() || tag.len() > TAG_BYTES_MAX {
                    return Err(ErofsError::Invalid(format!(
                        "the tag of a device: expected 1 to {TAG_BYTES_MAX} bytes, found {}",
                        tag.len()
                    )));
                }
                (DEVICE_FIRST_BLOCK, *blocks)
            }
            Data::Behind {
                first_block,
                blocks,
            } => (*first_block, *blocks),
        };
        if data_start.checked_add(data_blocks).is_none() {
            return Err(ErofsError::TooLarge {
                what: "blocks of file contents",
                limit: u64::from(u32::MAX - data_start),
                found: u64::from(data_blocks),
            });
        }
        Ok(Self {
            options,
            data_start,
            data_blocks,
            blocks: Blocks::new(out),
            open: vec![Open::default()],
            shared: Default::default(),
            figures: Figures {
                inodes: 1,
                directories: 1,
                ..Figures::default()
            },
        })
    }

    /// Begins a directory in the one that is open.
    ///
    /// # Errors
    /// An invalid name.
    pub fn begin_directory(&mut self, name: &[u8]) -> Result<(), ErofsError> {
        check_name(name)?;
        self.current()?;
        self.figures.directories += 1;
        self.figures.inodes += 1;
        self.open.push(Open {
            name: name.into(),
            ..Open::default()
        });
        Ok(())
    }

    /// Ends the directory that was begun last.
    ///
    /// # Errors
    /// None is open but the root, two entries of a name, too large, I/O.
    pub fn end_directory(&mut self) -> Result<(), ErofsError> {
        if self.open.len() < 2 {
            return Err(ErofsError::Invalid(
                "a directory ends that was not begun".to_owned(),
            ));
        }
        let Some(ended) = self.open.pop() else {
            return Ok(());
        };
        let (listing, tail, children) =
            self.place(ended.entries, &ended.bytes, &ended.grandchildren)?;
        let parent = self.current()?;
        let start = index(parent.grandchildren.len())?;
        parent.grandchildren.extend_from_slice(&children);
        let content = Content::Directory(Listing {
            tail: parent.keep(&tail)?,
            children: (start, index(parent.grandchildren.len())?),
            ..listing
        });
        parent.add(&ended.name, content)
    }

    /// Adds a regular file to the open directory.
    ///
    /// # Errors
    /// An invalid name, an extent beyond the data.
    pub fn file(&mut self, name: &[u8], file: &File) -> Result<(), ErofsError> {
        check_name(name)?;
        let end = u64::from(file.first_block) + file.size.div_ceil(BLOCK_BYTES);
        if file.size > 0 && end > u64::from(self.data_blocks) {
            return Err(ErofsError::TooLarge {
                what: "the end of a file's extent in blocks",
                limit: u64::from(self.data_blocks),
                found: end,
            });
        }
        self.figures.files += 1;
        self.current()?.add(name, Content::File(*file))
    }

    /// Adds a symlink to the open directory.
    ///
    /// # Errors
    /// An invalid name or target.
    pub fn symlink(&mut self, name: &[u8], target: &[u8]) -> Result<(), ErofsError> {
        check_name(name)?;
        if target.is_empty() || target.len() > TARGET_BYTES_MAX || target.contains(&0) {
            return Err(ErofsError::Invalid(format!(
                "the target of symlink `{}`: expected 1 to {TARGET_BYTES_MAX} bytes without NUL, found {} bytes",
                name.escape_ascii(),
                target.len()
            )));
        }
        self.figures.symlinks += 1;
        self.figures.inodes += 1;
        let open = self.current()?;
        let target = open.keep(target)?;
        open.add(name, Content::Symlink { target })
    }

    /// Ends the root and writes what remains; `out` stands behind the metadata. `identity` says what the file contents
    /// are: it enters the UUID. The caller makes it durable.
    ///
    /// # Errors
    /// A directory is open, the metadata is not what [`Data::Behind`] said, I/O.
    pub fn finish(mut self, identity: &[u8]) -> Result<(W, Figures), ErofsError> {
        if self.open.len() > 1 {
            return Err(ErofsError::Invalid(format!(
                "{} directories were not ended",
                self.open.len() - 1
            )));
        }
        let root = self.current()?;
        let root = std::mem::take(root);
        let (listing, tail, children) =
            self.place(root.entries, &root.bytes, &root.grandchildren)?;
        if !tail.is_empty() {
            self.blocks.append(&tail)?;
        }
        let listing_at = u64::from(listing.first_block) * BLOCK_BYTES;
        let number = (ROOT_AT / SLOT) as u32;
        for at in [listing.own_at, listing.parent_at] {
            self.blocks.patch(listing_at + at, number);
        }
        for at in children {
            self.blocks.patch(at, number);
        }
        let inode = InodeFields {
            layout: LAYOUT_PLAIN,
            mode: MODE_DIRECTORY,
            size: listing.size,
            block: listing.first_block,
            number: 1,
            mtime: self.options.mtime_s,
        };
        let metadata_blocks = self.blocks.end()?;
        if let Data::Behind { first_block, .. } = self.options.data
            && first_block != 0
            && first_block != metadata_blocks
        {
            return Err(ErofsError::Invalid(format!(
                "metadata: expected {first_block} blocks, found {metadata_blocks}"
            )));
        }
        self.figures.metadata_blocks = metadata_blocks;
        let mut head = self.blocks.head(&inode);
        self.figures.uuid = self.blocks.uuid(&head, identity);
        self.put_superblock(&mut head);
        let out = self.blocks.write_head(&head)?;
        Ok((out, self.figures))
    }

    fn current(&mut self) -> Result<&mut Open, ErofsError> {
        self.open
            .last_mut()
            .ok_or_else(|| ErofsError::Invalid("the image is finished or has failed".to_owned()))
    }

    /// Places the inodes of the entries of a directory and the whole blocks of its listing. Returns the listing, its
    /// tail, and the places of the `..` of its subdirectories.
    fn place(
        &mut self,
        mut entries: Vec<Entry>,
        bytes: &[u8],
        grandchildren: &[u64],
    ) -> Result<(Listing, Vec<u8>, Vec<u64>), ErofsError> {
        for content in [Content::Own, Content::Parent] {
            let name = Run { start: 0, len: 0 };
            entries.push(Entry { name, content });
        }
        let name_of = |entry: &Entry| match entry.content {
            Content::Own => &b"."[..],
            Content::Parent => b"..",
            _ => entry.name.of(bytes),
        };
        entries.sort_unstable_by(|a, b| name_of(a).cmp(name_of(b)));
        if let Some(pair) = entries
            .windows(2)
            .find(|pair| name_of(&pair[0]) == name_of(&pair[1]))
        {
            return Err(ErofsError::Invalid(format!(
                "two entries of one directory are named `{}`",
                name_of(&pair[0]).escape_ascii()
            )));
        }
        let mut children = Vec::new();
        let mut numbers = Vec::with_capacity(entries.len());
        for entry in &entries {
            numbers.push(match entry.content {
                Content::Own | Content::Parent => 0,
                Content::File(file) => self.place_file(&file)?,
                Content::Symlink { target } => self.place_symlink(target.of(bytes))?,
                Content::Directory(listing) => {
                    let (number, parent_at) =
                        self.place_directory(&listing, bytes, grandchildren)?;
                    children.push(parent_at);
                    number
                }
            });
        }

        let mut listing = Listing {
            first_block: self.blocks.next(),
            size: 0,
            tail: Run { start: 0, len: 0 },
            own_at: 0,
            parent_at: 0,
            children: (0, 0),
        };
        let mut tail = Vec::new();
        let mut rest = &entries[..];
        let mut numbers = &numbers[..];
        while !rest.is_empty() {
            let mut used = 0;
            let count = rest
                .iter()
                .take_while(|entry| {
                    used += DIRENT_BYTES + name_of(entry).len();
                    used <= BLOCK
                })
                .count();
            tail.clear();
            let mut name_at = count * DIRENT_BYTES;
            for (entry, number) in rest.iter().zip(numbers).take(count) {
                let at = listing.size + tail.len() as u64;
                let kind = match entry.content {
                    Content::Own => {
                        listing.own_at = at;
                        FileType::Directory
                    }
                    Content::Parent => {
                        listing.parent_at = at;
                        FileType::Directory
                    }
                    Content::File(_) => FileType::File,
                    Content::Symlink { .. } => FileType::Symlink,
                    Content::Directory(_) => FileType::Directory,
                };
                tail.extend_from_slice(&u64::from(*number).to_le_bytes());
                tail.extend_from_slice(&(name_at as u16).to_le_bytes());
                tail.extend_from_slice(&[kind.code(), 0]);
                name_at += name_of(entry).len();
            }
            for entry in &rest[..count] {
                tail.extend_from_slice(name_of(entry));
            }
            (rest, numbers) = (&rest[count..], &numbers[count..]);
            if !rest.is_empty() {
                self.blocks.append(&tail)?;
                listing.size += BLOCK_BYTES;
            }
        }
        listing.size += tail.len() as u64;
        if tail.len() > TAIL_BYTES_MAX {
            self.blocks.append(&tail)?;
            tail.clear();
        }
        Ok((listing, tail, children))
    }

    fn place_file(&mut self, file: &File) -> Result<u32, ErofsError> {
        let key = if file.size == 0 {
            NO_BLOCK
        } else {
            file.first_block
        };
        if let Some(number) = self.shared[usize::from(file.executable)].get(&key) {
            return Ok(*number);
        }
        self.figures.inodes += 1;
        let mut inode = InodeFields {
            layout: LAYOUT_PLAIN,
            mode: if file.executable {
                MODE_EXECUTABLE
            } else {
                MODE_FILE
            },
            size: file.size,
            block: 0,
            number: 0,
            mtime: self.options.mtime_s,
        };
        let mut chunk = [0; CHUNK_BYTES];
        let tail = match file.size {
            0 => &[][..],
            // Plain where it can be; what is too large for a chunk as well.
            size if self.is_plain(size) => {
                inode.block = self.data_start + file.first_block;
                &[]
            }
            // One chunk that names the device, and not an address in the one space of all devices: for those Linux (6.18)
            // reads each page of a file-backed image by itself, 2.3 times slower in sequence.
            size => {
                inode.layout = LAYOUT_CHUNKED;
                inode.block = CHUNK_INDEXES | chunk_bits(size);
                put16(&mut chunk, 2, DEVICE_NUMBER);
                put32(&mut chunk, 4, file.first_block);
                &chunk
            }
        };
        let number = self.blocks.put(inode, tail)?;
        self.shared[usize::from(file.executable)].insert(key, number);
        Ok(number)
    }

    fn is_plain(&self, size: u64) -> bool {
        matches!(self.options.data, Data::Behind { .. }) || size > CHUNK_BYTES_MAX
    }

    fn place_symlink(&mut self, target: &[u8]) -> Result<u32, ErofsError> {
        let mut inode = InodeFields {
            layout: LAYOUT_INLINE,
            mode: MODE_SYMLINK,
            size: target.len() as u64,
            block: 0,
            number: 0,
            mtime: self.options.mtime_s,
        };
        if target.len() <= TAIL_BYTES_MAX {
            return self.blocks.put(inode, target);
        }
        inode.layout = LAYOUT_PLAIN;
        inode.block = self.blocks.append(target)?;
        self.blocks.put(inode, &[])
    }

    /// Returns the number and the place of its `..`.
    fn place_directory(
        &mut self,
        listing: &Listing,
        bytes: &[u8],
        grandchildren: &[u64],
    ) -> Result<(u32, u64), ErofsError> {
        let tail = listing.tail.of(bytes);
        let blocks_bytes = listing.size - tail.len() as u64;
        let inode = InodeFields {
            layout: if tail.is_empty() {
                LAYOUT_PLAIN
            } else {
                LAYOUT_INLINE
            },
            mode: MODE_DIRECTORY,
            size: listing.size,
            block: if blocks_bytes == 0 {
                0
            } else {
                listing.first_block
            },
            number: 0,
            mtime: self.options.mtime_s,
        };
        let number = self.blocks.put(inode, tail)?;
        let place = |at: u64| match at.checked_sub(blocks_bytes) {
            Some(in_tail) => u64::from(number) * SLOT as u64 + inode.bytes() as u64 + in_tail,
            None => u64::from(listing.first_block) * BLOCK_BYTES + at,
        };
        self.blocks.patch(place(listing.own_at), number);
        for at in &grandchildren[listing.children.0 as usize..listing.children.1 as usize] {
            self.blocks.patch(*at, number);
        }
        Ok((number, place(listing.parent_at)))
    }

    fn put_superblock(&self, head: &mut [u8]) {
        let device = match &self.options.data {
            Data::Device { tag, blocks } => Some((tag, *blocks)),
            Data::Behind { .. } => None,
        };
        let sb = &mut head[SUPERBLOCK_AT..];
        put32(sb, 0, MAGIC);
        put32(sb, 8, COMPAT_CHECKSUM | COMPAT_MTIME);
        sb[12] = BLOCK_BITS;
        put16(sb, 14, (ROOT_AT / SLOT) as u16);
        put64(sb, 16, self.figures.inodes);
        put64(sb, 24, self.options.mtime_s);
        let blocks = match device {
            Some(_) => self.figures.metadata_blocks,
            // Too many only where nobody has said where they begin, and nobody reads it.
            None => self
                .figures
                .metadata_blocks
                .saturating_add(self.data_blocks),
        };
        put32(sb, 36, blocks);
        sb[48..64].copy_from_slice(&self.figures.uuid);
        sb[64..80].copy_from_slice(VOLUME_NAME);
        if let Some((tag, blocks)) = device {
            put32(sb, 80, INCOMPAT_CHUNKED | INCOMPAT_DEVICES);
            put16(sb, 86, 1);
            put16(sb, 88, (DEVICE_SLOT_AT / DEVICE_SLOT_BYTES) as u16);
            let slot = &mut head[DEVICE_SLOT_AT..];
            slot[..tag.len()].copy_from_slice(tag);
            put32(slot, 64, blocks);
            put32(slot, 68, DEVICE_FIRST_BLOCK);
        }
        let sum = crc32c(&head[SUPERBLOCK_AT..]);
        put32(&mut head[SUPERBLOCK_AT..], 4, sum);
    }
}

impl Open {
    fn add(&mut self, name: &[u8], content: Content) -> Result<(), ErofsError> {
        let name = self.keep(name)?;
        self.entries.push(Entry { name, content });
        Ok(())
    }

    fn keep(&mut self, bytes: &[u8]) -> Result<Run, ErofsError> {
        let start = index(self.bytes.len())?;
        self.bytes.extend_from_slice(bytes);
        // Names, targets and tails are shorter than a block.
        let len = bytes.len() as u16;
        Ok(Run { start, len })
    }
}

impl Run {
    fn of(self, bytes: &[u8]) -> &[u8] {
        &bytes[self.start as usize..][..usize::from(self.len)]
    }
}

fn index(len: usize) -> Result<u32, ErofsError> {
    u32::try_from(len).map_err(|_| ErofsError::TooLarge {
        what: "names of one directory in bytes",
        limit: u64::from(u32::MAX),
        found: len as u64,
    })
}

fn check_name(name: &[u8]) -> Result<(), ErofsError> {
    if name.is_empty()
        || name.len() > NAME_BYTES_MAX
        || name.contains(&0)
        || name.contains(&b'/')
        || name == b"."
        || name == b".."
    {
        return Err(ErofsError::Invalid(format!(
            "the name `{}`: expected 1 to {NAME_BYTES_MAX} bytes without `/` and NUL, not `.` or `..`",
            name.escape_ascii()
        )));
    }
    Ok(())
}
