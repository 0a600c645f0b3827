//! Builds a tree in the castore from events in archive (depth-first) order.
//!
//! Files below 128 KiB are kept whole, gathered in a batch and handed in sorted by
//! (extension, name): like stands by like in a frame, which is worth a tenth of the size. Larger
//! ones are cut by FastCDC as they stream through, each chunk deduplicated on its own; their recipe
//! is stored under the digest of the whole file. A file that FastCDC leaves in one piece is data.
//!
//! The cuts are part of what makes deduplication work between versions of this program, so their
//! parameters are fixed: FastCDC v2020 (crate `fastcdc` 5.0.0, seed 0), normalization level 1, 16 KiB
//! / 64 KiB / 256 KiB. They are no part of any digest.
//!
//! Memory of a builder: its batch (1 to 16 MiB, by how many builders there are), a megabyte for
//! the file that streams through, the open directories' entries (about 100 bytes each).

use crate::directory::{Directory, Entry, Node, check_name, check_target};
use crate::error::CastoreError;
use crate::pack::{FRAME_PIECES_MAX, FRAME_RAW_BYTES, Key, Kind, PIECE_BYTES_MAX, Piece};
use crate::recipe::RecipeBuilder;
use crate::writer::{Batch, Writer, directory_digest};
use crate::{Digest, pack::Class};
use fastcdc::v2020::{FastCDC, Normalization};
use std::sync::Arc;

/// Files of this size and above are cut into chunks.
pub(crate) const WHOLE_FILE_BYTES: usize = 128 << 10;
const CHUNK_BYTES_MIN: usize = 16 << 10;
const CHUNK_BYTES_AVG: usize = 64 << 10;
pub(crate) const CHUNK_BYTES_MAX: usize = 256 << 10;
/// Bytes of a large file that wait for being cut: several chunks, so that little is moved.
const STREAM_BYTES: usize = 1 << 20;
/// New chunks that wait for being handed in: eight frames.
const CHUNKS_BYTES: usize = 1 << 20;
/// Small files of one batch: bounds its bookkeeping (about 150 bytes each) where files are tiny.
const BATCH_FILES_MAX: usize = 32_768;
/// Directories within directories; deeper ones are refused. Linux cannot name what is deeper than
/// half of `PATH_MAX` in one system call.
const DEPTH_MAX: usize = 2048;

/// Takes the events of one tree and stores it. One per store path; many may run at once on one
/// writer. Small files are grouped per tree by (extension, name) in bounded batches. Names need not
/// come sorted. A dropped builder leaves only unreferenced pieces behind.
pub struct TreeBuilder {
    writer: Arc<Writer>,
    /// The open directories, the root first.
    open: Vec<OpenDirectory>,
    root: Option<Node>,
    /// A file was begun and not finished.
    in_file: bool,
    files: Batch,
    /// Sort keys of `files`, in the order of its pieces.
    file_names: Vec<Box<[u8]>>,
    chunks: Batch,
    recipes: Batch,
    directories: Batch,
    buffer: Vec<u8>,
}

struct OpenDirectory {
    /// `None` for the root.
    name: Option<Box<[u8]>>,
    entries: Vec<Entry>,
}

impl TreeBuilder {
    /// Starts a tree.
    pub fn new(writer: Arc<Writer>) -> Self {
        writer.builder_begins();
        Self {
            writer,
            open: Vec::new(),
            root: None,
            in_file: false,
            files: Batch::default(),
            file_names: Vec::new(),
            chunks: Batch::default(),
            recipes: Batch::default(),
            directories: Batch::default(),
            buffer: Vec::new(),
        }
    }

    /// Begins a directory; `name` is `None` for the root only.
    ///
    /// # Errors
    /// Invalid name, I/O.
    pub fn directory_begin(&mut self, name: Option<&[u8]>) -> Result<(), CastoreError> {
        self.check_place(name)?;
        if self.open.len() >= DEPTH_MAX {
            return Err(CastoreError::Invalid(format!(
                "a tree of more than {DEPTH_MAX} nested directories"
            )));
        }
        self.open.push(OpenDirectory {
            name: name.map(Into::into),
            entries: Vec::new(),
        });
        Ok(())
    }

    /// Ends the innermost directory.
    ///
    /// # Errors
    /// Double names, I/O.
    pub fn directory_end(&mut self) -> Result<(), CastoreError> {
        let Some(OpenDirectory { name, entries }) = self.open.pop() else {
            return Err(CastoreError::Invalid(
                "a directory ends that was not begun".to_owned(),
            ));
        };
        let directory = Directory::new(entries)?;
        let size = directory.size();
        let bytes = directory.encode();
        drop(directory);
        let digest = directory_digest(&bytes)?;
        self.writer
            .add_directory(&mut self.directories, digest, &bytes)?;
        self.add(name, Node::Directory { digest, size });
        Ok(())
    }

    /// Adds a symlink.
    ///
    /// # Errors
    /// Invalid name or target.
    pub fn symlink(&mut self, name: Option<&[u8]>, target: &[u8]) -> Result<(), CastoreError> {
        self.check_place(name)?;
        check_target(target)?;
        let target = target.into();
        self.add(name.map(Into::into), Node::Symlink { target });
        Ok(())
    }

    /// Begins a file; write its contents to the sink, then call [`FileSink::finish`].
    /// `size_hint` is the announced size; the real one counts.
    ///
    /// # Errors
    /// Invalid name.
    pub fn file<'a>(
        &'a mut self,
        name: Option<&[u8]>,
        executable: bool,
        size_hint: u64,
    ) -> Result<FileSink<'a>, CastoreError> {
        self.check_place(name)?;
        self.in_file = true;
        self.buffer.clear();
        // Room for a small file at once; a false announcement costs nothing.
        self.buffer
            .reserve(size_hint.min(WHOLE_FILE_BYTES as u64) as usize);
        Ok(FileSink {
            name: name.map(Into::into),
            executable,
            size: 0,
            hasher: blake3::Hasher::new(),
            large: None,
            builder: self,
        })
    }

    /// Ends the tree, hands all pending pieces to the writer and returns the root node. Durable only after [`Writer::sync`].
    ///
    /// # Errors
    /// The tree is not complete, I/O.
    pub fn finish(mut self) -> Result<Node, CastoreError> {
        if self.in_file {
            return Err(CastoreError::Invalid(
                "the tree ends inside a file".to_owned(),
            ));
        }
        if !self.open.is_empty() {
            return Err(CastoreError::Invalid(format!(
                "the tree ends inside {} directories",
                self.open.len()
            )));
        }
        let root = self
            .root
            .take()
            .ok_or_else(|| CastoreError::Invalid("the tree has no root".to_owned()))?;
        self.hand_in_files()?;
        self.writer.hand_in(&mut self.chunks, None)?;
        self.writer.hand_in(&mut self.recipes, None)?;
        self.writer.hand_in(&mut self.directories, None)?;
        Ok(root)
    }

    /// Refuses a node that cannot come here.
    fn check_place(&self, name: Option<&[u8]>) -> Result<(), CastoreError> {
        let misplaced = |what: &str| Err(CastoreError::Invalid(what.to_owned()));
        if self.in_file {
            return misplaced("a node after a file that was not finished");
        }
        match (name, self.open.is_empty()) {
            (Some(name), false) => check_name(name),
            (Some(_), true) => misplaced("a named node outside of any directory"),
            (None, false) => misplaced("a node without a name in a directory"),
            (None, true) if self.root.is_some() => misplaced("a second root"),
            (None, true) => Ok(()),
        }
    }

    fn add(&mut self, name: Option<Box<[u8]>>, node: Node) {
        match (self.open.last_mut(), name) {
            (Some(parent), Some(name)) => parent.entries.push(Entry { name, node }),
            // `check_place` has let no other nameless node through.
            _ => self.root = Some(node),
        }
    }

    /// Gathers a small file, or knows that it is stored. Returns true if it is.
    fn add_small(&mut self, name: &[u8], digest: Digest) -> Result<bool, CastoreError> {
        let piece = Piece {
            digest,
            kind: Kind::Data,
            len: self.buffer.len() as u32,
        };
        let key = piece.key();
        if self.buffer.is_empty() || self.files.has(&key) || self.writer.has(&key) {
            self.writer.check()?;
            return Ok(true);
        }
        if self.files.bytes() + self.buffer.len() > self.writer.batch_bytes()
            || self.files.len() >= BATCH_FILES_MAX
        {
            self.hand_in_files()?;
        }
        self.files.push(piece, &self.buffer);
        self.file_names.push(name.into());
        Ok(false)
    }

    fn hand_in_files(&mut self) -> Result<(), CastoreError> {
        let names = &self.file_names;
        let mut order: Vec<u32> = (0..names.len() as u32).collect();
        order.sort_by_key(|at| {
            let name = &*names[*at as usize];
            (extension(name), name)
        });
        self.writer.hand_in(&mut self.files, Some(&order))?;
        self.file_names.clear();
        Ok(())
    }

    /// Adds a recipe or a node of one to its batch.
    fn add_recipe(&mut self, piece: Piece, bytes: &[u8]) -> Result<(), CastoreError> {
        if self.writer.has(&piece.key()) {
            return Ok(());
        }
        self.recipes.push(piece, bytes);
        if self.recipes.bytes() >= FRAME_RAW_BYTES || self.recipes.len() >= FRAME_PIECES_MAX {
            self.writer.hand_in(&mut self.recipes, None)?;
        }
        Ok(())
    }
}

impl Drop for TreeBuilder {
    fn drop(&mut self) {
        self.writer.builder_ends();
    }
}

/// What follows the last dot of a name; nothing for hidden files.
fn extension(name: &[u8]) -> &[u8] {
    match name.iter().rposition(|byte| *byte == b'.') {
        Some(at) if at > 0 => &name[at + 1..],
        _ => b"",
    }
}

/// Takes the contents of one file.
pub struct FileSink<'a> {
    builder: &'a mut TreeBuilder,
    name: Option<Box<[u8]>>,
    executable: bool,
    size: u64,
    hasher: blake3::Hasher,
    large: Option<Large>,
}

/// A file that has turned out to be large.
#[derive(Default)]
struct Large {
    recipe: RecipeBuilder,
    chunks: u64,
    duplicate_bytes: u64,
}

impl FileSink<'_> {
    /// Adds bytes.
    ///
    /// # Errors
    /// I/O, poisoned writer.
    pub fn write(&mut self, data: &[u8]) -> Result<(), CastoreError> {
        self.hasher.update(data);
        self.size += data.len() as u64;
        let mut data = data;
        while !data.is_empty() {
            let room = STREAM_BYTES.saturating_sub(self.builder.buffer.len());
            let (now, later) = data.split_at(room.min(data.len()));
            self.builder.buffer.extend_from_slice(now);
            data = later;
            if self.builder.buffer.len() >= STREAM_BYTES {
                self.cut(false)?;
            }
        }
        Ok(())
    }

    /// Ends the file and adds it to its directory; returns its size.
    ///
    /// # Errors
    /// I/O, poisoned writer.
    pub fn finish(mut self) -> Result<u64, CastoreError> {
        let digest = Digest(*self.hasher.finalize().as_bytes());
        let size = self.size;
        let (mut file_duplicate, mut chunk_duplicate) = (0, 0);
        if size < WHOLE_FILE_BYTES as u64 {
            let name = self.name.as_deref().unwrap_or_default();
            if self.builder.add_small(name, digest)? {
                file_duplicate = size;
            }
        } else {
            // Asked before the last chunk is added: it may be the file itself.
            let key = Key::new(&digest, Class::Blob);
            let known = self.builder.writer.has(&key);
            self.cut(true)?;
            let large = self.large.take().unwrap_or_default();
            if known {
                file_duplicate = size;
            } else {
                chunk_duplicate = large.duplicate_bytes;
                if large.chunks > 1 {
                    self.add_root(large.recipe, digest)?;
                }
            }
        }
        let Self {
            builder,
            name,
            executable,
            ..
        } = self;
        builder.in_file = false;
        builder
            .writer
            .count_file(size, file_duplicate, chunk_duplicate);
        builder.add(
            name,
            Node::File {
                digest,
                size,
                executable,
            },
        );
        Ok(size)
    }

    /// Cuts what is buffered into chunks; without `all`, leaves what may belong to a longer one.
    fn cut(&mut self, all: bool) -> Result<(), CastoreError> {
        let buffer = std::mem::take(&mut self.builder.buffer);
        let mut large = self.large.take().unwrap_or_default();
        let mut start = 0;
        while start < buffer.len() && (all || buffer.len() - start >= CHUNK_BYTES_MAX) {
            let rest = &buffer[start..];
            let len = chunk_len(rest);
            self.add_chunk(&mut large, &rest[..len])?;
            start += len;
        }
        self.builder.buffer = buffer;
        self.builder.buffer.drain(..start);
        self.large = Some(large);
        Ok(())
    }

    fn add_chunk(&mut self, large: &mut Large, bytes: &[u8]) -> Result<(), CastoreError> {
        let digest = Digest::of(bytes);
        let piece = Piece {
            digest,
            kind: Kind::Data,
            len: bytes.len() as u32,
        };
        let key = piece.key();
        let builder = &mut *self.builder;
        if builder.chunks.has(&key) || builder.files.has(&key) || builder.writer.has(&key) {
            builder.writer.check()?;
            large.duplicate_bytes += bytes.len() as u64;
        } else {
            builder.chunks.push(piece, bytes);
            if builder.chunks.bytes() >= CHUNKS_BYTES {
                builder.writer.hand_in(&mut builder.chunks, None)?;
            }
        }
        large.chunks += 1;
        large
            .recipe
            .push(digest, bytes.len() as u64, &mut |piece, bytes| {
                builder.add_recipe(piece, bytes)
            })
    }

    fn add_root(&mut self, recipe: RecipeBuilder, digest: Digest) -> Result<(), CastoreError> {
        let builder = &mut *self.builder;
        let root = recipe.finish(&mut |piece, bytes| builder.add_recipe(piece, bytes))?;
        debug_assert!(root.len() <= PIECE_BYTES_MAX);
        let piece = Piece {
            digest,
            kind: Kind::Recipe,
            len: root.len() as u32,
        };
        builder.add_recipe(piece, &root)
    }
}

/// The length of the chunk that `bytes` begin with.
fn chunk_len(bytes: &[u8]) -> usize {
    let source = &bytes[..bytes.len().min(CHUNK_BYTES_MAX)];
    let (_, len) = FastCDC::with_level(
        source,
        CHUNK_BYTES_MIN,
        CHUNK_BYTES_AVG,
        CHUNK_BYTES_MAX,
        Normalization::Level1,
    )
    .cut(0, source.len());
    len
}
