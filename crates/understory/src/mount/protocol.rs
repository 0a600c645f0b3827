//! The kernel's side of FUSE: request parsing and reply encoding, no I/O.
//!
//! Format: `linux/fuse.h`, versions 7.31 to 7.45; all fields are native-endian and packed by hand at
//! the offsets of that header, so no memory layout of Rust types takes part. Checked against Linux 6.18.
//!
//! Every read of a field is bounds-checked: a request that is too short for its kind is refused with
//! EIO, never a panic.

use rustix::io::Errno;

/// Our minor version: what we know of the header. The kernel speaks the lower of both.
pub(super) const MINOR_MAX: u32 = 45;
/// The oldest minor version that has what we rely on (Linux 5.4: `max_pages`, no-opendir, cached symlinks).
pub(super) const MINOR_MIN: u32 = 31;
/// Bytes of the header of each request.
pub(super) const IN_HEADER_BYTES: usize = 40;
/// Bytes of the header of each reply and notification.
pub(super) const OUT_HEADER_BYTES: usize = 16;
/// Bytes of `fuse_entry_out`.
pub(super) const ENTRY_BYTES: usize = 128;
/// Bytes of `fuse_dirent` before the name.
pub(super) const DIRENT_BYTES: usize = 24;
/// The root directory's node id.
pub(super) const ROOT_NODE: u64 = 1;
/// The longest data of one reply. A larger read-ahead comes as several requests, which threads decompress side
/// by side, and a page fault waits for one of them only. The kernel would take 1 MiB, which is slower.
pub(super) const DATA_BYTES_MAX: usize = 256 << 10;
/// Bytes of a buffer for requests: the kernel demands 8192 at least, and more only for writes, which
/// a read-only file system never gets. `INIT` sets `max_write` to 4096, so that any request fits.
pub(super) const REQUEST_BYTES_MAX: usize = 16 << 10;
/// The `max_write` of `INIT`; the kernel's least.
const WRITE_BYTES_MAX: u32 = 4096;
/// Page size that replies are aligned for; only speed depends on it.
const PAGE_BYTES: usize = 4096;

/// Operations, as `enum fuse_opcode` numbers them. Those that write are not named.
pub(super) mod op {
    pub(in super::super) const LOOKUP: u32 = 1;
    pub(in super::super) const FORGET: u32 = 2;
    pub(in super::super) const GETATTR: u32 = 3;
    pub(in super::super) const READLINK: u32 = 5;
    pub(in super::super) const OPEN: u32 = 14;
    pub(in super::super) const READ: u32 = 15;
    pub(in super::super) const STATFS: u32 = 17;
    pub(in super::super) const RELEASE: u32 = 18;
    pub(in super::super) const FSYNC: u32 = 20;
    pub(in super::super) const GETXATTR: u32 = 22;
    pub(in super::super) const LISTXATTR: u32 = 23;
    pub(in super::super) const FLUSH: u32 = 25;
    pub(in super::super) const INIT: u32 = 26;
    pub(in super::super) const OPENDIR: u32 = 27;
    pub(in super::super) const READDIR: u32 = 28;
    pub(in super::super) const RELEASEDIR: u32 = 29;
    pub(in super::super) const FSYNCDIR: u32 = 30;
    pub(in super::super) const ACCESS: u32 = 34;
    pub(in super::super) const INTERRUPT: u32 = 36;
    pub(in super::super) const DESTROY: u32 = 38;
    pub(in super::super) const NOTIFY_REPLY: u32 = 41;
    pub(in super::super) const BATCH_FORGET: u32 = 42;
    pub(in super::super) const READDIRPLUS: u32 = 44;
    /// Each operation that would change something: SETATTR, SYMLINK, MKNOD, MKDIR, UNLINK, RMDIR,
    /// RENAME, LINK, WRITE, SETXATTR, REMOVEXATTR, CREATE, FALLOCATE, RENAME2, COPY_FILE_RANGE,
    /// TMPFILE, COPY_FILE_RANGE_64.
    pub(in super::super) const WRITING: [u32; 17] = [
        4, 6, 8, 9, 10, 11, 12, 13, 16, 21, 24, 35, 43, 45, 47, 51, 53,
    ];
}

/// Flags of `INIT`, low and high words in one.
mod flag {
    pub(super) const ASYNC_READ: u64 = 1 << 0;
    pub(super) const BIG_WRITES: u64 = 1 << 5;
    pub(super) const AUTO_INVAL_DATA: u64 = 1 << 12;
    pub(super) const DO_READDIRPLUS: u64 = 1 << 13;
    pub(super) const READDIRPLUS_AUTO: u64 = 1 << 14;
    pub(super) const ASYNC_DIO: u64 = 1 << 15;
    pub(super) const NO_OPEN_SUPPORT: u64 = 1 << 17;
    pub(super) const PARALLEL_DIROPS: u64 = 1 << 18;
    pub(super) const MAX_PAGES: u64 = 1 << 22;
    pub(super) const CACHE_SYMLINKS: u64 = 1 << 23;
    pub(super) const NO_OPENDIR_SUPPORT: u64 = 1 << 24;
    pub(super) const INIT_EXT: u64 = 1 << 30;
    pub(super) const NO_EXPORT_SUPPORT: u64 = 1 << 38;
    pub(super) const HAS_RESEND: u64 = 1 << 39;
    pub(super) const ALLOW_IDMAP: u64 = 1 << 40;
}

/// What we ask for, where the kernel offers it.
///
/// - `AUTO_INVAL_DATA`: a changed mtime of a directory makes the kernel drop its cached listing, which
///   is how new store paths show up in the root; files never change theirs.
/// - `NO_EXPORT_SUPPORT`: node ids do not survive a restart, so file handles must not either.
/// - `ALLOW_IDMAP`: all is owned by root and permissions are the kernel's business.
const WANTED: u64 = flag::ASYNC_READ
    | flag::BIG_WRITES
    | flag::AUTO_INVAL_DATA
    | flag::DO_READDIRPLUS
    | flag::READDIRPLUS_AUTO
    | flag::ASYNC_DIO
    | flag::NO_OPEN_SUPPORT
    | flag::PARALLEL_DIROPS
    | flag::MAX_PAGES
    | flag::CACHE_SYMLINKS
    | flag::NO_OPENDIR_SUPPORT
    | flag::INIT_EXT
    | flag::NO_EXPORT_SUPPORT
    | flag::HAS_RESEND
    | flag::ALLOW_IDMAP;

/// What the live file system cannot do without.
const NEEDED: u64 = flag::NO_OPEN_SUPPORT | flag::NO_OPENDIR_SUPPORT;

/// What a file system asks for in INIT.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct InitRequest {
    /// Flags to take where the kernel offers them; those of `linux/fuse.h`, low and high word in one.
    pub(super) wanted: u64,
    /// Flags that it cannot do without; a part of `wanted`.
    pub(super) needed: u64,
    /// Read-ahead; the kernel takes the least of this, its own 128 KiB, and what sysfs says later.
    pub(super) read_ahead_bytes: u32,
}

impl InitRequest {
    /// What the live file system asks for.
    pub(super) fn live(read_ahead_bytes: u32) -> Self {
        Self {
            wanted: WANTED,
            needed: NEEDED,
            read_ahead_bytes,
        }
    }
}

impl InitRequest {
    /// What the blob server asks for: opening must not be refused, since it is what asks for direct I/O.
    pub(super) fn blob() -> Self {
        Self {
            wanted: flag::ASYNC_READ
                | flag::BIG_WRITES
                | flag::ASYNC_DIO
                | flag::MAX_PAGES
                | flag::INIT_EXT
                | flag::HAS_RESEND
                | flag::ALLOW_IDMAP,
            needed: 0,
            read_ahead_bytes: 128 << 10,
        }
    }
}

/// Requests that the kernel may queue in the background (read-ahead) at once; each is up to
/// [`DATA_BYTES_MAX`], so this bounds what a reader has in flight, not our memory.
const BACKGROUND_MAX: u16 = 64;

/// A request.
#[derive(Debug, Clone, Copy)]
pub(super) struct Request<'a> {
    /// Which operation; see [`op`].
    pub(super) opcode: u32,
    /// The number to reply with.
    pub(super) unique: u64,
    /// On which inode.
    pub(super) node: u64,
    /// The operation's own fields.
    pub(super) body: &'a [u8],
}

impl<'a> Request<'a> {
    /// Takes a message of the kernel apart; `None` if it is shorter than it says.
    pub(super) fn parse(message: &'a [u8]) -> Option<Self> {
        let bytes = u32_at(message, 0)? as usize;
        Some(Self {
            opcode: u32_at(message, 4)?,
            unique: u64_at(message, 8)?,
            node: u64_at(message, 16)?,
            body: message.get(IN_HEADER_BYTES..bytes)?,
        })
    }

    /// True if a server before us has read it, too, and has not answered.
    pub(super) fn is_resent(&self) -> bool {
        self.unique & UNIQUE_RESENT != 0
    }

    /// The name of a LOOKUP.
    pub(super) fn name(&self) -> Result<&'a [u8], Errno> {
        let end = self.body.iter().position(|&b| b == 0).ok_or(Errno::IO)?;
        Ok(&self.body[..end])
    }

    /// Offset and size of a READ, READDIR or READDIRPLUS.
    pub(super) fn range(&self) -> Result<(u64, usize), Errno> {
        let offset = u64_at(self.body, 8).ok_or(Errno::IO)?;
        let size = u32_at(self.body, 16).ok_or(Errno::IO)? as usize;
        Ok((offset, size.min(DATA_BYTES_MAX)))
    }

    /// The (node, count) pairs of a FORGET or BATCH_FORGET.
    pub(super) fn forgets(&self) -> impl Iterator<Item = (u64, u64)> + use<'a> {
        let (single, many) = match self.opcode {
            op::FORGET => (
                u64_at(self.body, 0).map(|count| (self.node, count)),
                &[][..],
            ),
            _ => {
                let count = u32_at(self.body, 0).unwrap_or(0) as usize;
                let pairs = self.body.get(8..).unwrap_or(&[]);
                (None, &pairs[..pairs.len().min(count.saturating_mul(16))])
            }
        };
        single.into_iter().chain(
            many.chunks_exact(16)
                .filter_map(|pair| Some((u64_at(pair, 0)?, u64_at(pair, 8)?))),
        )
    }
}

/// What `INIT` agreed on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub(super) struct Agreed {
    /// Minor version.
    pub(super) minor: u32,
    /// Flags that both sides have.
    pub(super) flags: u64,
}

impl Agreed {
    /// True if the kernel queues requests again when it is asked to.
    pub(super) fn can_resend(self) -> bool {
        self.flags & flag::HAS_RESEND != 0
    }
}

/// Why `INIT` failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum InitError {
    /// The message is not what it should be.
    Malformed,
    /// The kernel's major version is newer: reply with ours and wait for another INIT.
    MajorNewer,
    /// The kernel is too old; its version.
    TooOld(u32, u32),
    /// The kernel lacks these flags.
    Lacks(u64),
}

/// Answers an INIT: fills `reply` and says what was agreed.
pub(super) fn init(
    body: &[u8],
    wanted: &InitRequest,
    reply: &mut Reply,
) -> Result<Agreed, InitError> {
    let field = |at| u32_at(body, at).ok_or(InitError::Malformed);
    let (major, minor) = (field(0)?, field(4)?);
    if major > 7 {
        reply.put_u32(7);
        reply.put_u32(MINOR_MAX);
        reply.put_zeros(56);
        return Err(InitError::MajorNewer);
    }
    if major < 7 || minor < MINOR_MIN {
        return Err(InitError::TooOld(major, minor));
    }
    let low = u64::from(field(12)?);
    let offered = match u32_at(body, 16) {
        Some(high) if low & flag::INIT_EXT != 0 => low | u64::from(high) << 32,
        _ => low,
    };
    if offered & wanted.needed != wanted.needed {
        return Err(InitError::Lacks(wanted.needed & !offered));
    }
    let flags = offered & wanted.wanted;
    let minor = minor.min(MINOR_MAX);
    reply.put_u32(7);
    reply.put_u32(minor);
    reply.put_u32(field(8)?.max(wanted.read_ahead_bytes));
    reply.put_u32(flags as u32);
    reply.put_u16(BACKGROUND_MAX);
    reply.put_u16(BACKGROUND_MAX * 3 / 4);
    reply.put_u32(WRITE_BYTES_MAX);
    reply.put_u32(1); // time granularity, ns
    reply.put_u16((DATA_BYTES_MAX / PAGE_BYTES) as u16);
    reply.put_u16(0); // map alignment
    reply.put_u32((flags >> 32) as u32);
    reply.put_u32(0); // stack depth
    reply.put_zeros(24);
    Ok(Agreed { minor, flags })
}

/// Kinds of inode, with their mode bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// 0555.
    Directory,
    /// 0444.
    File,
    /// 0555.
    Executable,
    /// 0777.
    Symlink,
}

impl Kind {
    /// `st_mode`.
    pub(super) fn mode(self) -> u32 {
        match self {
            Self::Directory => 0o040_555,
            Self::File => 0o100_444,
            Self::Executable => 0o100_555,
            Self::Symlink => 0o120_777,
        }
    }
    /// `d_type`.
    pub(super) fn dirent_type(self) -> u32 {
        self.mode() >> 12
    }
}

/// Attributes of an inode.
#[derive(Debug, Clone, Copy)]
pub(super) struct Attributes {
    /// `st_ino`.
    pub(super) ino: u64,
    /// `st_size`.
    pub(super) size: u64,
    /// Type and permissions.
    pub(super) kind: Kind,
    /// `st_uid`, `st_gid`.
    pub(super) owner: (u32, u32),
    /// Nanoseconds of the modification time, whose seconds are 1.
    pub(super) mtime_ns: u32,
    /// How long the kernel may keep them, in seconds.
    pub(super) valid_s: u64,
}

/// The longest time the kernel may keep something: 136 years. It caps what is longer than its clock.
pub(super) const VALID_S_MAX: u64 = u32::MAX as u64;
/// `st_blksize`.
const BLOCK_BYTES: u32 = 4096;

/// A reply being written, or a notification. Reused for many; its data part is page-aligned, since the
/// kernel copies page by page.
pub(super) struct Reply {
    bytes: Vec<u8>,
    /// Where data begins; the header stands before it.
    start: usize,
    /// Where data ends.
    end: usize,
}

impl Reply {
    /// Makes a buffer for up to `data_bytes_max` bytes of data.
    pub(super) fn new(data_bytes_max: usize) -> Self {
        // Not zeros: each page is there from the start. If one had to be fetched while the process is being
        // killed, the kernel would end the request with an error instead of keeping it for the next server.
        let bytes = vec![0xff; PAGE_BYTES + OUT_HEADER_BYTES + data_bytes_max];
        let start = OUT_HEADER_BYTES
            + bytes[OUT_HEADER_BYTES..]
                .as_ptr()
                .align_offset(PAGE_BYTES)
                .min(PAGE_BYTES);
        Self {
            bytes,
            start,
            end: start,
        }
    }
    /// Empties it.
    pub(super) fn clear(&mut self) {
        self.end = self.start;
    }
    /// Bytes of data so far.
    pub(super) fn len(&self) -> usize {
        self.end - self.start
    }
    /// Makes data of `len` bytes, for the caller to fill.
    pub(super) fn data_mut(&mut self, len: usize) -> &mut [u8] {
        self.end = self.start + len;
        &mut self.bytes[self.start..self.end]
    }
    /// Appends bytes.
    pub(super) fn put(&mut self, bytes: &[u8]) {
        let end = self.end + bytes.len();
        self.bytes[self.end..end].copy_from_slice(bytes);
        self.end = end;
    }
    fn put_zeros(&mut self, count: usize) {
        let end = self.end + count;
        self.bytes[self.end..end].fill(0);
        self.end = end;
    }
    fn put_u16(&mut self, value: u16) {
        self.put(&value.to_ne_bytes());
    }
    pub(super) fn put_u32(&mut self, value: u32) {
        self.put(&value.to_ne_bytes());
    }
    pub(super) fn put_u64(&mut self, value: u64) {
        self.put(&value.to_ne_bytes());
    }

    /// Appends `struct fuse_attr`.
    fn put_attr(&mut self, a: &Attributes) {
        for value in [a.ino, a.size, a.size.div_ceil(512), 1, 1, 1] {
            self.put_u64(value);
        }
        let nlink = 1;
        for value in [
            0,
            a.mtime_ns,
            0,
            a.kind.mode(),
            nlink,
            a.owner.0,
            a.owner.1,
            0,
            BLOCK_BYTES,
            0,
        ] {
            self.put_u32(value);
        }
    }
    /// Appends `struct fuse_attr_out`.
    pub(super) fn put_attr_out(&mut self, a: &Attributes) {
        self.put_u64(a.valid_s);
        self.put_zeros(8);
        self.put_attr(a);
    }
    /// Appends `struct fuse_entry_out` for a name that is there.
    pub(super) fn put_entry(&mut self, node: u64, a: &Attributes) {
        self.put_u64(node);
        // A node id may come again for another inode: the generation tells handles of both apart.
        self.put_u64(a.ino & 0x7fff_ffff);
        self.put_u64(VALID_S_MAX);
        self.put_u64(a.valid_s);
        self.put_zeros(8);
        self.put_attr(a);
    }
    /// Appends `struct fuse_entry_out` for a name that will never be there.
    pub(super) fn put_negative_entry(&mut self) {
        self.put_zeros(16);
        self.put_u64(VALID_S_MAX);
        self.put_zeros(ENTRY_BYTES - 24);
    }
    /// Appends a `struct fuse_entry_out` that says nothing about its name, for `.` and `..`.
    pub(super) fn put_no_entry(&mut self) {
        self.put_zeros(ENTRY_BYTES);
    }
    /// Appends `struct fuse_dirent`; `next` is the offset of what follows it.
    pub(super) fn put_dirent(&mut self, ino: u64, next: u64, kind: Kind, name: &[u8]) {
        self.put_u64(ino);
        self.put_u64(next);
        self.put_u32(name.len() as u32);
        self.put_u32(kind.dirent_type());
        self.put(name);
        self.put_zeros(name.len().next_multiple_of(8) - name.len());
    }
    /// Appends `struct fuse_statfs_out`.
    pub(super) fn put_statfs(&mut self, fs: &FileSystemFigures) {
        for value in [
            fs.blocks,
            fs.blocks_free,
            fs.blocks_available,
            fs.files,
            fs.files_free,
        ] {
            self.put_u64(value);
        }
        self.put_u32(fs.block_bytes);
        self.put_u32(255); // longest name
        self.put_u32(fs.block_bytes);
        self.put_zeros(28);
    }

    /// Puts the header before the data and returns the message.
    pub(super) fn message(&mut self, unique: u64, result: Result<(), Errno>) -> &[u8] {
        let error = match result {
            Ok(()) => 0,
            Err(errno) => {
                self.clear();
                -errno.raw_os_error()
            }
        };
        self.header(unique, error)
    }
    /// Puts a notification's header before the data and returns the message.
    pub(super) fn notification(&mut self, code: Notify) -> &[u8] {
        self.header(0, code as i32)
    }
    fn header(&mut self, unique: u64, error: i32) -> &[u8] {
        let begin = self.start - OUT_HEADER_BYTES;
        let bytes = (self.end - begin) as u32;
        let header = &mut self.bytes[begin..self.start];
        header[..4].copy_from_slice(&bytes.to_ne_bytes());
        header[4..8].copy_from_slice(&error.to_ne_bytes());
        header[8..].copy_from_slice(&unique.to_ne_bytes());
        &self.bytes[begin..self.end]
    }
}

/// Bytes that a directory entry with a name of that length takes.
pub(super) fn dirent_bytes(name_len: usize) -> usize {
    (DIRENT_BYTES + name_len).next_multiple_of(8)
}

/// What statfs tells.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct FileSystemFigures {
    pub(super) block_bytes: u32,
    pub(super) blocks: u64,
    pub(super) blocks_free: u64,
    pub(super) blocks_available: u64,
    pub(super) files: u64,
    pub(super) files_free: u64,
}

/// What we may tell the kernel unasked, as `enum fuse_notify_code` numbers it.
#[derive(Debug, Clone, Copy)]
#[repr(i32)]
pub(super) enum Notify {
    /// Forget an inode's attributes.
    InvalidateInode = 2,
    /// Forget a name.
    InvalidateEntry = 3,
    /// Queue the requests again that were read and not answered, marked with [`UNIQUE_RESENT`]. Linux 6.9.
    Resend = 7,
}

/// In the number of a request that is queued again (`FUSE_UNIQUE_RESEND`).
pub(super) const UNIQUE_RESENT: u64 = 1 << 63;

/// Fills `reply` with a notification that an inode's attributes are old; its pages stay.
pub(super) fn invalidate_attributes(node: u64, reply: &mut Reply) {
    reply.clear();
    reply.put_u64(node);
    reply.put_u64(u64::MAX); // a negative offset leaves the pages alone
    reply.put_u64(0);
}

/// Fills `reply` with a notification that `name` in `parent` is gone.
pub(super) fn invalidate_entry(parent: u64, name: &[u8], reply: &mut Reply) {
    reply.clear();
    reply.put_u64(parent);
    reply.put_u32(name.len() as u32);
    reply.put_u32(0);
    reply.put(name);
    reply.put(&[0]);
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_ne_bytes(bytes.get(at..at + 8)?.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn request(opcode: u32, node: u64, body: &[u8]) -> Vec<u8> {
        let mut out = Vec::new();
        out.extend(((IN_HEADER_BYTES + body.len()) as u32).to_ne_bytes());
        out.extend(opcode.to_ne_bytes());
        out.extend(77u64.to_ne_bytes());
        out.extend(node.to_ne_bytes());
        out.extend([0; 16]);
        out.extend(body);
        out
    }

    #[test]
    fn replies_have_the_sizes_of_the_header_file() {
        let mut reply = Reply::new(4096);
        let a = Attributes {
            ino: 9,
            size: 1025,
            kind: Kind::File,
            owner: (0, 0),
            mtime_ns: 0,
            valid_s: 5,
        };
        reply.put_attr(&a);
        assert_eq!(reply.len(), 88);
        reply.clear();
        reply.put_attr_out(&a);
        assert_eq!(reply.len(), 104);
        reply.clear();
        reply.put_entry(2, &a);
        assert_eq!(reply.len(), ENTRY_BYTES);
        reply.clear();
        reply.put_negative_entry();
        assert_eq!(reply.len(), ENTRY_BYTES);
        reply.clear();
        reply.put_statfs(&FileSystemFigures::default());
        assert_eq!(reply.len(), 80);
        for name in [&b"a"[..], b"12345678", &[b'n'; 255]] {
            reply.clear();
            reply.put_dirent(1, 2, Kind::Symlink, name);
            assert_eq!(reply.len(), dirent_bytes(name.len()));
        }
        reply.clear();
        reply.put(b"xyz");
        let message = reply.message(77, Ok(()));
        assert_eq!(message.len(), 19);
        assert_eq!(u32_at(message, 0), Some(19));
        assert_eq!(u64_at(message, 8), Some(77));
        assert_eq!(
            reply.message(1, Err(Errno::NOENT))[4..8],
            (-2i32).to_ne_bytes()
        );
    }

    #[test]
    fn init_of_linux_6_18_and_of_too_old_kernels() {
        let mut reply = Reply::new(4096);
        let init_of = |major: u32, minor: u32, low: u32, high: u32, reply: &mut Reply| {
            let mut body = Vec::new();
            for field in [major, minor, 131_072, low, high] {
                body.extend(field.to_ne_bytes());
            }
            body.extend([0; 44]);
            reply.clear();
            init(&body, &InitRequest::live(1 << 20), reply)
        };
        let agreed = init_of(7, 45, 0x73ff_fffb, 0x7ff, &mut reply).unwrap();
        assert_eq!((agreed.minor, reply.len()), (45, 64));
        assert_ne!(agreed.flags & flag::HAS_RESEND, 0);
        assert_eq!(agreed.flags & !WANTED, 0);
        let agreed = init_of(7, 31, 0x03ff_fffb, 0x7ff, &mut reply).unwrap();
        assert_eq!(agreed.flags >> 32, 0, "no high flags without INIT_EXT");
        assert_eq!(
            init_of(7, 30, u32::MAX, 0, &mut reply),
            Err(InitError::TooOld(7, 30))
        );
        assert_eq!(init_of(8, 0, 0, 0, &mut reply), Err(InitError::MajorNewer));
        assert_eq!(reply.len(), 64);
        assert_eq!(
            init_of(7, 45, 1, 0, &mut reply),
            Err(InitError::Lacks(NEEDED))
        );
        assert_eq!(
            init(&[7, 0], &InitRequest::live(0), &mut reply),
            Err(InitError::Malformed)
        );
    }

    #[test]
    fn forgets_single_and_in_batches() {
        let single = request(op::FORGET, 5, &3u64.to_ne_bytes());
        assert_eq!(
            Request::parse(&single)
                .unwrap()
                .forgets()
                .collect::<Vec<_>>(),
            [(5, 3)]
        );
        let mut body = Vec::new();
        body.extend(2u32.to_ne_bytes());
        body.extend([0; 4]);
        for value in [7u64, 1, 8, 2, 9, 9] {
            body.extend(value.to_ne_bytes());
        }
        let batch = request(op::BATCH_FORGET, 0, &body);
        assert_eq!(
            Request::parse(&batch)
                .unwrap()
                .forgets()
                .collect::<Vec<_>>(),
            [(7, 1), (8, 2)]
        );
    }

    proptest! {
        #[test]
        fn any_message_is_parsed_or_refused(message: Vec<u8>) {
            if let Some(request) = Request::parse(&message) {
                let _ = (request.name(), request.range(), request.forgets().count());
                let _ = init(request.body, &InitRequest::live(0), &mut Reply::new(64));
            }
        }

        #[test]
        fn any_body_is_parsed_or_refused(opcode in 0u32..60, body: Vec<u8>) {
            let message = request(opcode, 1, &body);
            let request = Request::parse(&message).unwrap();
            prop_assert_eq!(request.body, &body[..]);
            let _ = (request.name(), request.range(), request.forgets().count());
        }
    }
}
