//! NAR streams and file trees into the castore, NAR streams out of it.
//!
//! Everything is one pass: contents are hashed (the NAR's SHA-256, and another hash if a content
//! address asks for one) and cut, deduplicated and compressed by the castore as they go by. No file
//! is ever held whole.
//!
//! Cost per byte of a large file on one core: SHA-256 about 1 GB/s, BLAKE3 and chunking in the
//! castore 1.2 GB/s; compression happens on the castore's threads. Memory: one buffer of
//! [`BUFFER_BYTES`] per archive or tree, and the names of the directories that are open.

mod hashes;
mod walk;

pub use hashes::HashRequest;
pub(crate) use hashes::{NarSink, TreeHasher};
pub(crate) use walk::write_path;
pub use walk::{read_path, read_path_with};

use crate::{Error, Result};
use std::io::{BufRead, Read, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use understory_castore::{Castore, Masks, Node, TreeBuilder, Writer};
use understory_nix::nar::{Event, NarError, Reader, Writer as NarWriter};
use understory_nix::{Hash, NarHash};

/// Bytes read or written at once: large enough that system calls do not count, small enough for
/// the second-level cache.
pub const BUFFER_BYTES: usize = 256 * 1024;

/// What a NAR stream or a file tree turned out to be.
#[derive(Debug, Clone)]
pub struct ReadNar {
    /// The root node in the castore. Durable only after the writer's sync.
    pub root: Node,
    /// SHA-256 of the NAR.
    pub nar_hash: NarHash,
    /// Bytes of the NAR.
    pub nar_size: u64,
    /// The other hash, if one was asked for.
    pub content_hash: Option<Hash>,
}

/// How to read an archive or a tree.
#[derive(Clone, Copy, Default)]
pub struct ReadOptions<'a> {
    /// What the castore masks in file contents; see [`Store::masks`](crate::Store::masks).
    pub masks: Option<&'a Arc<Masks>>,
    /// Which other hash to make on the way.
    pub hash: HashRequest,
    /// Ends the work with an error when it becomes true.
    pub cancel: Option<&'a AtomicBool>,
    /// Is increased by NAR bytes as they are read.
    pub bytes: Option<&'a AtomicU64>,
}

impl ReadOptions<'_> {
    fn builder(&self, writer: &Arc<Writer>) -> TreeBuilder {
        match self.masks {
            Some(masks) => TreeBuilder::with_masks(writer.clone(), masks.clone()),
            None => TreeBuilder::new(writer.clone()),
        }
    }

    fn check_cancel(&self) -> Result<()> {
        match self.cancel {
            Some(cancel) if cancel.load(Ordering::Relaxed) => Err(Error::user("interrupted")),
            _ => Ok(()),
        }
    }
}

/// Reads exactly one NAR from `stream` into the castore; nothing past it is consumed.
///
/// # Errors
/// Malformed archive, stream error, castore error.
pub fn read_nar(writer: &Arc<Writer>, stream: &mut dyn BufRead) -> Result<ReadNar> {
    read_nar_with(writer, stream, &ReadOptions::default())
}

/// [`read_nar`] with options.
///
/// # Errors
/// As [`read_nar`]; a flat hash of something that is not a file; cancelled.
pub fn read_nar_with(
    writer: &Arc<Writer>,
    stream: &mut dyn BufRead,
    options: &ReadOptions<'_>,
) -> Result<ReadNar> {
    let mut tree = TreeHasher::new(options.hash);
    let mut builder = options.builder(writer);
    let source = HashingReader {
        inner: stream,
        sink: NarSink::new(options.hash, options.bytes),
    };
    let mut reader = Reader::new(source);
    loop {
        match reader.next_event()? {
            Event::DirectoryBegin { name } => {
                options.check_cancel()?;
                tree.directory_begin(name.as_deref());
                builder.directory_begin(name.as_deref())?;
            }
            Event::DirectoryEnd => {
                tree.directory_end();
                builder.directory_end()?;
            }
            Event::File {
                name,
                executable,
                size,
            } => {
                tree.file_begin(name.as_deref(), executable, size);
                let mut sink = builder.file(name.as_deref(), executable, size)?;
                loop {
                    let piece = reader.read_contents()?;
                    if piece.is_empty() {
                        break;
                    }
                    tree.contents(piece);
                    sink.write(piece)?;
                    options.check_cancel()?;
                }
                sink.finish()?;
                tree.file_end();
            }
            Event::Symlink { name, target } => {
                tree.symlink(name.as_deref(), &target);
                builder.symlink(name.as_deref(), &target)?;
            }
            Event::End => break,
        }
    }
    let (nar_hash, nar_size, raw_hash) = reader.into_inner().sink.finish();
    let content_hash = match raw_hash {
        Some(hash) => Some(hash),
        None => tree.finish()?,
    };
    Ok(ReadNar {
        root: builder.finish()?,
        nar_hash,
        nar_size,
        content_hash,
    })
}

/// Reads exactly one NAR from `stream` and throws it away; returns its size.
///
/// # Errors
/// Malformed archive, stream error.
pub fn skip_nar(stream: &mut dyn BufRead) -> Result<u64> {
    let mut reader = Reader::new(CountingReader {
        inner: stream,
        bytes: 0,
    });
    while reader.next_event()? != Event::End {}
    Ok(reader.into_inner().bytes)
}

/// Writes `root` as a NAR.
///
/// # Errors
/// Castore or stream error.
pub fn write_nar(castore: &Castore, root: &Node, out: &mut dyn Write) -> Result<()> {
    let mut writer = NarWriter::new(out);
    let mut buffer = Vec::new();
    write_node(castore, None, root, &mut writer, &mut buffer)?;
    writer.finish()?;
    Ok(())
}

/// Hashes `root` as a NAR, and otherwise as asked.
///
/// # Errors
/// Castore error; a flat hash of something that is not a file.
pub fn hash_node(castore: &Castore, root: &Node, request: HashRequest) -> Result<ReadNar> {
    let mut sink = NarSink::new(request, None);
    write_nar(castore, root, &mut sink)?;
    let (nar_hash, nar_size, raw_hash) = sink.finish();
    let content_hash = match raw_hash {
        Some(hash) => Some(hash),
        None => {
            let mut tree = TreeHasher::new(request);
            if tree.is_wanted() {
                hash_tree(castore, None, root, &mut tree, &mut Vec::new())?;
            }
            tree.finish()?
        }
    };
    Ok(ReadNar {
        root: root.clone(),
        nar_hash,
        nar_size,
        content_hash,
    })
}

fn write_node(
    castore: &Castore,
    name: Option<&[u8]>,
    node: &Node,
    writer: &mut NarWriter<&mut dyn Write>,
    buffer: &mut Vec<u8>,
) -> Result<()> {
    match node {
        Node::Symlink { target } => writer.symlink(name, target)?,
        Node::File {
            digest,
            size,
            executable,
        } => {
            writer.file(name, *executable, *size)?;
            read_blob(castore, digest, *size, buffer, |piece| {
                Ok(writer.contents(piece)?)
            })?;
        }
        Node::Directory { digest, .. } => {
            writer.directory_begin(name)?;
            let directory = castore.directory(digest)?;
            for entry in directory.entries() {
                write_node(castore, Some(&entry.name), &entry.node, writer, buffer)?;
            }
            writer.directory_end()?;
        }
    }
    Ok(())
}

fn hash_tree(
    castore: &Castore,
    name: Option<&[u8]>,
    node: &Node,
    tree: &mut TreeHasher,
    buffer: &mut Vec<u8>,
) -> Result<()> {
    match node {
        Node::Symlink { target } => tree.symlink(name, target),
        Node::File {
            digest,
            size,
            executable,
        } => {
            tree.file_begin(name, *executable, *size);
            read_blob(castore, digest, *size, buffer, |piece| {
                tree.contents(piece);
                Ok(())
            })?;
            tree.file_end();
        }
        Node::Directory { digest, .. } => {
            tree.directory_begin(name);
            let directory = castore.directory(digest)?;
            for entry in directory.entries() {
                hash_tree(castore, Some(&entry.name), &entry.node, tree, buffer)?;
            }
            tree.directory_end();
        }
    }
    Ok(())
}

/// Reads a whole blob, piece by piece. `buffer` is kept by the caller so that it is made once.
pub(crate) fn read_blob(
    castore: &Castore,
    digest: &understory_castore::Digest,
    size: u64,
    buffer: &mut Vec<u8>,
    mut take: impl FnMut(&[u8]) -> Result<()>,
) -> Result<()> {
    if size == 0 {
        return Ok(());
    }
    let blob = castore.blob(digest, size)?;
    let wanted = usize::try_from(size)
        .unwrap_or(BUFFER_BYTES)
        .min(BUFFER_BYTES);
    if buffer.len() < wanted {
        buffer.resize(wanted, 0);
    }
    let mut offset = 0;
    while offset < size {
        let count = blob.read_at(offset, &mut buffer[..wanted])?;
        if count == 0 {
            return Err(Error::corrupt(format!(
                "blob {digest}: expected {size} bytes, found {offset}"
            )));
        }
        take(&buffer[..count])?;
        offset += count as u64;
    }
    Ok(())
}

/// Hashes what is consumed.
pub(crate) struct HashingReader<'a, 'b> {
    pub(crate) inner: &'a mut dyn BufRead,
    pub(crate) sink: NarSink<'b>,
}

impl BufRead for HashingReader<'_, '_> {
    fn fill_buf(&mut self) -> std::io::Result<&[u8]> {
        self.inner.fill_buf()
    }
    fn consume(&mut self, count: usize) {
        // What was not read to its end is still in the buffer, so this reads nothing.
        if count > 0
            && let Ok(buffer) = self.inner.fill_buf()
        {
            self.sink.update(&buffer[..count]);
        }
        self.inner.consume(count);
    }
}

impl Read for HashingReader<'_, '_> {
    fn read(&mut self, out: &mut [u8]) -> std::io::Result<usize> {
        let count = self.inner.read(out)?;
        self.sink.update(&out[..count]);
        Ok(count)
    }
}

/// Counts what is consumed.
struct CountingReader<'a> {
    inner: &'a mut dyn BufRead,
    bytes: u64,
}

impl BufRead for CountingReader<'_> {
    fn fill_buf(&mut self) -> std::io::Result<&[u8]> {
        self.inner.fill_buf()
    }
    fn consume(&mut self, count: usize) {
        self.bytes += count as u64;
        self.inner.consume(count);
    }
}

impl Read for CountingReader<'_> {
    fn read(&mut self, out: &mut [u8]) -> std::io::Result<usize> {
        let count = self.inner.read(out)?;
        self.bytes += count as u64;
        Ok(count)
    }
}

impl From<NarError> for Error {
    fn from(error: NarError) -> Self {
        match error {
            NarError::Io(source) => Self::environment("NAR stream").with_source(source),
            malformed => Self::user(malformed.to_string()),
        }
    }
}
