//! The live file system: answers requests of the kernel from a [`Source`].
//!
//! - Root: names are looked up in the store each time the kernel has not cached them; a name that is
//!   not there is not cached, so that it shows as soon as it is published. Its listing is stateless:
//!   offsets are row numbers, so that the end of a buffer never loses or doubles an entry.
//! - Below: everything is immutable; names, absent names, attributes and pages may be kept for ever.
//! - Open and opendir are refused with ENOSYS once, after which the kernel does without (Linux keeps
//!   page cache and cached listings of such files by itself). A cached listing of the root is dropped
//!   when the root's mtime changes, so [`LiveFs`] moves its nanoseconds when rows have come or gone;
//!   the kernel asks for it at each start of a listing when its copy is older than
//!   [`ROOT_VALID_S`] or was invalidated, which publications of this process do.
//! - Whatever goes wrong is an EIO and a line in the log that names the store path.

use super::inodes::{Content, Full, Inode, Inodes, ROOT_INO, ino_of, kind_of};
use super::protocol::{
    Attributes, DIRENT_BYTES, ENTRY_BYTES, Kind, ROOT_NODE, Reply, Request, VALID_S_MAX,
    dirent_bytes, op,
};
use super::session::{Handler, Outcome};
use super::source::{Contents, Source};
use super::table::NodeTable;
use crate::open_files::{OpenFiles, open_files};
use crate::{Error, Result};
use rustix::io::Errno;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;
use understory_castore::{Digest, Directory, Node};

/// How long the kernel may keep the root's attributes: within this time a listing may miss what another
/// process has published. One request a second at most is what it costs.
const ROOT_VALID_S: u64 = 1;
/// Memory of the open blobs of large files: the recipes of 3 GiB of them. An instance has several such mounts.
const BLOBS_BYTES_MAX: u64 = 4 << 20;
/// Files up to this size are opened for each request: that is an index lookup, without I/O.
const SMALL_FILE_BYTES_MAX: u64 = 128 << 10;
/// Offsets 1 and 2 follow `.` and `..`.
const DOTS: u64 = 2;
/// Lines that one mount may log in a second: a reader may ask for a damaged file in a loop.
const LOG_LINES_PER_S_MAX: u64 = 20;
/// The shortest name of a root entry: 32 characters, a dash and a name.
const ROOT_NAME_BYTES_MIN: usize = 34;

/// The file system of one mount.
pub(super) struct LiveFs {
    source: Box<dyn Source>,
    inodes: Inodes,
    blobs: OpenFiles<Digest, Arc<dyn Contents>>,
    owner: (u32, u32),
    /// The highest row that a listing has seen, plus one; 0 before the first listing.
    listed_end: AtomicU64,
    /// For the limit of log lines: when it was made, the second of the last line, lines in it.
    made: Instant,
    log_second: AtomicU64,
    log_lines: AtomicU64,
}

impl Handler for LiveFs {
    fn handle(&self, request: &Request<'_>, reply: &mut Reply, counted: &mut Vec<u64>) -> Outcome {
        let result = match request.opcode {
            op::LOOKUP => self.lookup(request, reply, counted),
            op::GETATTR => self.getattr(request.node, reply),
            op::READ => self.read(request, reply),
            op::READDIR => self.readdir(request, reply, None),
            op::READDIRPLUS => self.readdir(request, reply, Some(counted)),
            op::READLINK => self.readlink(request.node, reply),
            op::FORGET | op::BATCH_FORGET => {
                for (node, count) in request.forgets().filter(|&(node, _)| node != ROOT_NODE) {
                    self.inodes.forget(node, count);
                }
                return Outcome::Silent;
            }
            op::INTERRUPT | op::NOTIFY_REPLY => return Outcome::Silent,
            op::STATFS => self.statfs(reply),
            op::DESTROY | op::RELEASE | op::RELEASEDIR => Ok(()),
            // Refused once each; the kernel then does without and asks no more.
            op::OPEN
            | op::OPENDIR
            | op::ACCESS
            | op::FLUSH
            | op::FSYNC
            | op::FSYNCDIR
            | op::GETXATTR
            | op::LISTXATTR => Err(Errno::NOSYS),
            writing if op::WRITING.contains(&writing) => Err(Errno::ROFS),
            _ => Err(Errno::NOSYS),
        };
        match result {
            Ok(()) => Outcome::Data,
            Err(errno) => Outcome::Error(errno),
        }
    }

    fn forget(&self, counted: &[u64]) {
        for &node in counted {
            self.inodes.forget(node, 1);
        }
    }
}

impl LiveFs {
    /// Makes a file system whose files belong to `owner`; `table` holds the nodes that the kernel knows already.
    pub(super) fn new(source: Box<dyn Source>, owner: (u32, u32), table: NodeTable) -> Self {
        // What was listed before is not known here, so that a listing in the kernel's cache may be old.
        table.root_version().fetch_add(1, Ordering::AcqRel);
        Self {
            source,
            inodes: Inodes::new(table),
            blobs: open_files(BLOBS_BYTES_MAX),
            owner,
            listed_end: AtomicU64::new(0),
            made: Instant::now(),
            log_second: AtomicU64::new(0),
            log_lines: AtomicU64::new(0),
        }
    }

    /// The root's listing has changed.
    pub(super) fn root_changed(&self) {
        let version = self.inodes.table().root_version();
        version.fetch_add(1, Ordering::AcqRel);
    }

    /// How many servers have taken the mount over so far.
    pub(super) fn takeovers(&self) -> u64 {
        self.inodes.table().takeovers()
    }

    /// Inodes that the kernel holds.
    pub(super) fn inode_count(&self) -> usize {
        self.inodes.len()
    }

    fn lookup(
        &self,
        request: &Request<'_>,
        reply: &mut Reply,
        counted: &mut Vec<u64>,
    ) -> Result<(), Errno> {
        let name = request.name()?;
        if request.node == ROOT_NODE {
            // ENOENT, unlike a negative entry, is not kept by the kernel.
            let entry = self
                .source
                .find(name)
                .map_err(|e| self.failed(0, "looking up", &e))?
                .ok_or(Errno::NOENT)?;
            self.put_entry(
                ROOT_INO,
                name,
                &entry.node,
                row32(entry.row),
                reply,
                counted,
            )?;
            return Ok(());
        }
        let (inode, directory) = self.directory(request.node)?;
        match directory.get(name) {
            Some(node) => {
                self.put_entry(inode.ino, name, node, inode.store_path, reply, counted)?;
            }
            None => reply.put_negative_entry(),
        }
        Ok(())
    }

    fn put_entry(
        &self,
        parent: u64,
        name: &[u8],
        node: &Node,
        row: u32,
        reply: &mut Reply,
        counted: &mut Vec<u64>,
    ) -> Result<u64, Errno> {
        let remembered = self.inodes.remember(parent, name, node, row);
        let (id, ino) = remembered.map_err(|Full| Errno::NFILE)?;
        counted.push(id);
        let size = match node {
            Node::Directory { .. } => 0,
            Node::File { size, .. } => *size,
            Node::Symlink { target } => target.len() as u64,
        };
        reply.put_entry(id, &self.attributes(ino, kind_of(node), size));
        Ok(ino)
    }

    fn attributes(&self, ino: u64, kind: Kind, size: u64) -> Attributes {
        Attributes {
            ino,
            size,
            kind,
            owner: self.owner,
            mtime_ns: 0,
            valid_s: VALID_S_MAX,
        }
    }

    fn getattr(&self, node: u64, reply: &mut Reply) -> Result<(), Errno> {
        if node == ROOT_NODE {
            reply.put_attr_out(&self.root_attributes());
            return Ok(());
        }
        let inode = self.inodes.get(node).ok_or(Errno::STALE)?;
        reply.put_attr_out(&self.attributes(inode.ino, inode.content.kind(), inode.content.size()));
        Ok(())
    }

    /// Both grow only, so that a change of either changes the sum.
    fn root_version(&self) -> u64 {
        let own = self.inodes.table().root_version().load(Ordering::Acquire);
        own.wrapping_add(self.source.changes())
    }

    fn root_attributes(&self) -> Attributes {
        // Published by other processes since the last listing?
        if let Some(listed) = self.listed_end.load(Ordering::Acquire).checked_sub(1)
            && self
                .source
                .list(listed, 1)
                .is_ok_and(|more| !more.is_empty())
        {
            self.root_changed();
        }
        Attributes {
            ino: ROOT_INO,
            size: 0,
            kind: Kind::Directory,
            owner: self.owner,
            mtime_ns: (self.root_version() % 1_000_000_000) as u32,
            valid_s: ROOT_VALID_S,
        }
    }

    fn readlink(&self, node: u64, reply: &mut Reply) -> Result<(), Errno> {
        match self.inodes.get(node).ok_or(Errno::STALE)?.content {
            Content::Symlink { target } => reply.put(&target),
            _ => return Err(Errno::INVAL),
        }
        Ok(())
    }

    fn read(&self, request: &Request<'_>, reply: &mut Reply) -> Result<(), Errno> {
        let (offset, bytes) = request.range()?;
        let inode = self.inodes.get(request.node).ok_or(Errno::STALE)?;
        let Content::File { digest, size, .. } = inode.content else {
            return Err(Errno::ISDIR);
        };
        let bytes = usize::try_from(size.saturating_sub(offset))
            .unwrap_or(usize::MAX)
            .min(bytes);
        if bytes == 0 {
            return Ok(());
        }
        let result = self.blob(&digest, size).and_then(|blob| {
            let read = blob.read_at(offset, reply.data_mut(bytes))?;
            if read == bytes {
                return Ok(());
            }
            Err(Error::corrupt(format!(
                "blob {digest} at {offset}: expected {bytes} bytes, found {read}"
            )))
        });
        result.map_err(|e| self.failed(inode.store_path, "reading a file of", &e))
    }

    fn blob(&self, digest: &Digest, size: u64) -> Result<Arc<dyn Contents>> {
        if size <= SMALL_FILE_BYTES_MAX {
            return self.source.blob(digest, size);
        }
        if let Some(blob) = self.blobs.get(digest) {
            return Ok(blob);
        }
        let blob = self.source.blob(digest, size)?;
        self.blobs.insert(*digest, Arc::clone(&blob));
        Ok(blob)
    }

    fn directory(&self, node: u64) -> Result<(Inode, Arc<Directory>), Errno> {
        let inode = self.inodes.get(node).ok_or(Errno::STALE)?;
        let Content::Directory { digest, .. } = &inode.content else {
            return Err(Errno::NOTDIR);
        };
        let directory = self
            .source
            .directory(digest)
            .map_err(|e| self.failed(inode.store_path, "reading a directory of", &e))?;
        Ok((inode, directory))
    }

    fn readdir(
        &self,
        request: &Request<'_>,
        reply: &mut Reply,
        plus: Option<&mut Vec<u64>>,
    ) -> Result<(), Errno> {
        let (offset, bytes_max) = request.range()?;
        let listing = Listing {
            fs: self,
            reply,
            bytes_max,
            plus,
        };
        if request.node == ROOT_NODE {
            return listing.root(offset);
        }
        let (inode, directory) = self.directory(request.node)?;
        let Content::Directory { parent_ino, .. } = inode.content else {
            return Err(Errno::NOTDIR);
        };
        listing.directory(offset, &inode, parent_ino, &directory);
        Ok(())
    }

    fn statfs(&self, reply: &mut Reply) -> Result<(), Errno> {
        let figures = self
            .source
            .figures()
            .map_err(|e| self.failed(0, "examining", &e))?;
        reply.put_statfs(&figures);
        Ok(())
    }

    /// Logs an error and returns what the kernel is told.
    fn failed(&self, row: u32, what: &str, error: &Error) -> Errno {
        let second = self.made.elapsed().as_secs();
        if self.log_second.swap(second, Ordering::Relaxed) != second {
            self.log_lines.store(0, Ordering::Relaxed);
        }
        if self.log_lines.fetch_add(1, Ordering::Relaxed) >= LOG_LINES_PER_S_MAX {
            return Errno::IO;
        }
        let name = match u64::from(row)
            .checked_sub(1)
            .map(|after| self.source.list(after, 1))
        {
            Some(Ok(found)) => found
                .into_iter()
                .find(|entry| row32(entry.row) == row)
                .map(|entry| entry.name),
            _ => None,
        };
        match name {
            Some(store_path) => {
                tracing::error!(%store_path, "{what} {store_path}: {}", error.chain());
            }
            None => tracing::error!("{what} the store: {}", error.chain()),
        }
        Errno::IO
    }
}

/// A row as the inode table keeps it: only for error messages, so that one above 4 billion may be lost.
fn row32(row: u64) -> u32 {
    u32::try_from(row).unwrap_or(0)
}

/// One READDIR or READDIRPLUS reply being filled.
struct Listing<'a> {
    fs: &'a LiveFs,
    reply: &'a mut Reply,
    bytes_max: usize,
    plus: Option<&'a mut Vec<u64>>,
}

impl Listing<'_> {
    fn entry_bytes(&self, name_len: usize) -> usize {
        dirent_bytes(name_len) + if self.plus.is_some() { ENTRY_BYTES } else { 0 }
    }

    fn fits(&self, name: &[u8]) -> bool {
        self.reply.len() + self.entry_bytes(name.len()) <= self.bytes_max
    }

    /// Adds `.` and `..` where the offset demands; false when the buffer is full.
    fn dots(&mut self, offset: u64, own: u64, parent: u64) -> bool {
        for (at, (name, ino)) in [(&b"."[..], own), (&b".."[..], parent)]
            .into_iter()
            .enumerate()
        {
            if (at as u64) < offset {
                continue;
            }
            if !self.fits(name) {
                return false;
            }
            if self.plus.is_some() {
                self.reply.put_no_entry();
            }
            self.reply
                .put_dirent(ino, at as u64 + 1, Kind::Directory, name);
        }
        true
    }

    /// Adds an entry; false when the buffer is full.
    fn entry(&mut self, parent: u64, name: &[u8], node: &Node, row: u32, next: u64) -> bool {
        if !self.fits(name) {
            return false;
        }
        let ino = match &mut self.plus {
            Some(counted) => {
                let put = self
                    .fs
                    .put_entry(parent, name, node, row, self.reply, counted);
                put.unwrap_or_else(|_| {
                    // The name is told; the kernel asks for the rest, and is told that there is no room.
                    self.reply.put_no_entry();
                    ino_of(parent, name, node)
                })
            }
            None => ino_of(parent, name, node),
        };
        self.reply.put_dirent(ino, next, kind_of(node), name);
        true
    }

    fn root(mut self, offset: u64) -> Result<(), Errno> {
        if !self.dots(offset, ROOT_INO, ROOT_INO) {
            return Ok(());
        }
        // As many rows as may fit, so that one query serves one buffer.
        let count = self.bytes_max / self.entry_bytes(ROOT_NAME_BYTES_MIN) + 1;
        let mut after = offset.saturating_sub(DOTS);
        loop {
            let rows = self
                .fs
                .source
                .list(after, count)
                .map_err(|e| self.fs.failed(0, "listing", &e))?;
            for row in &rows {
                if !self.entry(
                    ROOT_INO,
                    row.name.as_bytes(),
                    &row.node,
                    row32(row.row),
                    row.row + DOTS,
                ) {
                    return Ok(());
                }
                after = row.row;
            }
            self.fs.listed_end.fetch_max(after + 1, Ordering::AcqRel);
            if rows.len() < count {
                return Ok(());
            }
        }
    }

    fn directory(mut self, offset: u64, inode: &Inode, parent_ino: u64, directory: &Directory) {
        if !self.dots(offset, inode.ino, parent_ino) {
            return;
        }
        let first = usize::try_from(offset.saturating_sub(DOTS)).unwrap_or(usize::MAX);
        for (at, entry) in directory.entries().iter().enumerate().skip(first) {
            if !self.entry(
                inode.ino,
                &entry.name,
                &entry.node,
                inode.store_path,
                at as u64 + 1 + DOTS,
            ) {
                return;
            }
        }
    }
}

const _: () = assert!(DIRENT_BYTES == 24 && ENTRY_BYTES == 128);
