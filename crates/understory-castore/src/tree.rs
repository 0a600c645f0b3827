//! Builds a tree in the castore from events in archive (depth-first) order.
//!
//! Files below 128 KiB are kept whole, gathered in a batch and handed in by extension, those of one
//! extension as they came, directory by directory: like stands by like in a frame, which is worth a
//! tenth of the size, and what is read together, too. (By extension and name it was 1.5 % more.) Larger
//! ones are cut by FastCDC as they stream through, each chunk deduplicated on its own; their recipe
//! is stored under the digest of the whole file. A file that FastCDC leaves in one piece is data.
//!
//! The cuts are part of what makes deduplication work between versions of this program, so their
//! parameters are fixed: FastCDC v2020 (crate `fastcdc` 5.0.0, seed 0), normalization level 1, 8 KiB
//! / 32 KiB / 128 KiB. They are no part of any digest.
//!
//! Where hash parts of store paths are to be masked ([`Masks`]), they are replaced in the buffer before
//! anything is cut or compared, and the file's own digest gets a patched piece (`patch.rs`) beside
//! the masked blob. For a file of a few hundred bytes that piece costs more than it can save.
//!
//! **What stands on other pieces is handed in after them**, so that a claim of it vouches for them in
//! this process. One that is stored vouches for nothing: after a crash or a collection what it needs
//! may be gone. So each chunk is looked for by itself, whatever is known of the file; and a root that
//! was made with other cuts or other masks counts only if all that it needs is there. If not, another
//! root is stored beside it, and readers find the one that is whole.
//!
//! Memory of a builder: its batch (1 to 16 MiB, by how many builders there are), a megabyte for
//! the file that streams through, the open directories' entries (about 100 bytes each).

use crate::directory::{Directory, Entry, Node, check_name, check_target};
use crate::error::CastoreError;
use crate::lease::Operation;
use crate::mask::{CONTEXT_BYTES, Masks};
use crate::pack::{FRAME_PIECES_MAX, FRAME_RAW_BYTES, Key, Kind, PIECE_BYTES_MAX, Piece};
use crate::patch::{FILLER, HASH_PART_BYTES, PatchBuilder};
use crate::recipe::RecipeBuilder;
use crate::writer::{Batch, FileCounts, Writer, directory_digest};
use crate::{Digest, pack::Class};
use fastcdc::v2020::{FastCDC, Normalization};
use std::sync::Arc;

/// Files of this size and above are cut into chunks.
pub(crate) const WHOLE_FILE_BYTES: usize = 128 << 10;
/// By measurement: chunks of 64 KiB on average save half a hundredth of disk, and cost a sixth of the rate of random reads.
const CHUNK_BYTES_MIN: usize = 8 << 10;
const CHUNK_BYTES_AVG: usize = 32 << 10;
pub(crate) const CHUNK_BYTES_MAX: usize = 128 << 10;
/// Bytes of a large file that wait for being cut: several chunks, so that little is moved.
const STREAM_BYTES: usize = 1 << 20;
/// New chunks that wait for being handed in: some tens of frames.
const CHUNKS_BYTES: usize = 1 << 20;
/// Small files of one batch: bounds its bookkeeping (about 150 bytes each) where files are tiny.
const BATCH_FILES_MAX: usize = 32_768;
/// Patches that wait for being handed in: a few frames.
const PATCHES_BYTES: usize = 1 << 20;
/// Files below this are never masked: the two tables' entries, the digest of the masked bytes and the
/// patches take some 150 bytes, about what such a file takes when it is compressed.
const MASKED_FILE_BYTES_MIN: usize = 512;
/// Directories within directories; deeper ones are refused. Linux cannot name what is deeper than
/// half of `PATH_MAX` in one system call.
const DEPTH_MAX: usize = 2048;

/// Takes the events of one tree and stores it. One per store path; many may run at once on one
/// writer. Small files are grouped per tree by extension in bounded batches. Names need not
/// come sorted. A dropped builder leaves only unreferenced pieces behind.
pub struct TreeBuilder {
    writer: Arc<Writer>,
    /// Keeps what the tree needs from being collected; goes over to the finished tree.
    operation: Option<Operation>,
    /// The open directories, the root first.
    open: Vec<OpenDirectory>,
    root: Option<Node>,
    /// A file was begun and not finished.
    in_file: bool,
    files: Batch,
    /// Sort keys of `files`, in the order of its pieces.
    file_extensions: Vec<Box<[u8]>>,
    chunks: Batch,
    recipes: Batch,
    patches: Batch,
    directories: Batch,
    buffer: Vec<u8>,
    masks: Option<Arc<Masks>>,
}

struct OpenDirectory {
    /// `None` for the root.
    name: Option<Box<[u8]>>,
    entries: Vec<Entry>,
}

impl TreeBuilder {
    /// Starts a tree.
    pub fn new(writer: Arc<Writer>) -> Self {
        let operation = Some(writer.builder_begins());
        Self {
            writer,
            operation,
            open: Vec::new(),
            root: None,
            in_file: false,
            files: Batch::default(),
            file_extensions: Vec::new(),
            chunks: Batch::default(),
            recipes: Batch::default(),
            patches: Batch::default(),
            directories: Batch::default(),
            buffer: Vec::new(),
            masks: None,
        }
    }

    /// Starts a tree in whose files hash parts are masked, unless the castore is opened without that.
    pub fn with_masks(writer: Arc<Writer>, masks: Arc<Masks>) -> Self {
        let is_wanted = writer.core().options.mask_hash_parts && !masks.is_empty();
        let mut builder = Self::new(writer);
        builder.masks = is_wanted.then_some(masks);
        builder
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
            large: None,
            builder: self,
        })
    }

    /// Ends the tree, hands all pending pieces to the writer and returns the root node. Durable only after [`Writer::sync`].
    /// A collection leaves it alone until it is given to [`Castore::release`](crate::Castore::release).
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
        self.hand_in_patches()?;
        self.writer.hand_in(&mut self.directories, None)?;
        if let Some(operation) = self.operation.take() {
            operation.finished(&root);
        }
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

    /// Takes the small file in the buffer.
    fn add_small(&mut self, name: &[u8]) -> Result<(Digest, FileCounts), CastoreError> {
        let buffer = std::mem::take(&mut self.buffer);
        let digest = Digest::of(&buffer);
        let counts = self.add_whole(name, digest, &buffer);
        self.buffer = buffer;
        Ok((digest, counts?))
    }

    fn add_whole(
        &mut self,
        name: &[u8],
        digest: Digest,
        bytes: &[u8],
    ) -> Result<FileCounts, CastoreError> {
        let size = bytes.len() as u64;
        let duplicate = Ok(FileCounts {
            file_duplicate: size,
            ..FileCounts::default()
        });
        if bytes.is_empty() || self.has_data(&Key::new(&digest, Class::Blob)) {
            self.writer.check()?;
            return duplicate;
        }
        let masks = self
            .masks
            .clone()
            .filter(|_| bytes.len() >= MASKED_FILE_BYTES_MIN);
        let (mut masked, mut patches) = (Vec::new(), PatchBuilder::default());
        if let Some(masks) = masks {
            if self.has_patched(name, &digest, bytes)? {
                return duplicate;
            }
            (masked, patches) = mask_whole(&masks, bytes);
        }
        if patches.is_empty() {
            self.add_data(name, digest, bytes)?;
            return Ok(FileCounts::default());
        }
        let masked_digest = Digest::of(&masked);
        let is_new = self.add_data(name, masked_digest, &masked)?;
        self.add_patches(digest, &patches.encode(&masked_digest, size))?;
        Ok(FileCounts {
            masked_duplicate: if is_new { 0 } else { size },
            is_masked: true,
            ..FileCounts::default()
        })
    }

    /// True if data is stored, or will be before anything that is handed in later.
    fn has_data(&self, key: &Key) -> bool {
        self.files.has(key) || self.chunks.has(key) || self.writer.has(key)
    }

    /// Gathers the bytes of a small file; false if they are stored.
    fn add_data(
        &mut self,
        name: &[u8],
        digest: Digest,
        bytes: &[u8],
    ) -> Result<bool, CastoreError> {
        let piece = Piece {
            digest,
            kind: Kind::Data,
            len: bytes.len() as u32,
        };
        if self.has_data(&piece.key()) {
            return Ok(false);
        }
        if self.files.bytes() + bytes.len() > self.writer.batch_bytes()
            || self.files.len() >= BATCH_FILES_MAX
        {
            self.hand_in_files()?;
        }
        self.files.push(piece, bytes);
        self.file_extensions.push(extension(name).into());
        Ok(true)
    }

    /// True if the small file with these bytes is stored as patches. Makes sure that the masked bytes are,
    /// too: with other masks they may be others than ours.
    fn has_patched(
        &mut self,
        name: &[u8],
        digest: &Digest,
        bytes: &[u8],
    ) -> Result<bool, CastoreError> {
        let key = Key::new(digest, Class::Patched);
        // Of what is handed in, the masked bytes were before.
        if self.patches.has(&key) || self.writer.is_claimed(&key) {
            return Ok(true);
        }
        if !self.writer.has(&key) {
            return Ok(false);
        }
        let core = Arc::clone(self.writer.core());
        let Some(place) = core.find_for_writer(&key) else {
            return Ok(false);
        };
        let Ok(patches) = core.patches(&place, digest) else {
            // Damaged: it is stored again.
            core.set_bad(&place.pack, place.location.frame_offset());
            return Ok(false);
        };
        let mut masked = bytes.to_vec();
        patches.mask(&mut masked);
        if Digest::of(&masked) != patches.masked {
            core.set_bad(&place.pack, place.location.frame_offset());
            return Ok(false);
        }
        self.add_data(name, patches.masked, &masked)?;
        Ok(true)
    }

    /// Adds the patched piece of a file to its batch; the masked blob was added before.
    fn add_patches(&mut self, digest: Digest, bytes: &[u8]) -> Result<(), CastoreError> {
        let piece = Piece {
            digest,
            kind: Kind::Patched,
            len: bytes.len() as u32,
        };
        if self.writer.has(&piece.key()) {
            return Ok(());
        }
        self.patches.push(piece, bytes);
        if self.patches.bytes() >= PATCHES_BYTES || self.patches.len() >= BATCH_FILES_MAX {
            self.hand_in_patches()?;
        }
        Ok(())
    }

    fn hand_in_patches(&mut self) -> Result<(), CastoreError> {
        self.hand_in_files()?;
        self.hand_in_recipes()?;
        self.writer.hand_in(&mut self.patches, None)
    }

    fn hand_in_recipes(&mut self) -> Result<(), CastoreError> {
        self.writer.hand_in(&mut self.chunks, None)?;
        self.writer.hand_in(&mut self.recipes, None)
    }

    fn hand_in_files(&mut self) -> Result<(), CastoreError> {
        let extensions = &self.file_extensions;
        let mut order: Vec<u32> = (0..extensions.len() as u32).collect();
        // Stable: files of one directory stay together.
        order.sort_by_key(|at| &extensions[*at as usize]);
        self.writer.hand_in(&mut self.files, Some(&order))?;
        self.file_extensions.clear();
        Ok(())
    }

    /// Adds a recipe or a node of one to its batch.
    fn add_recipe(&mut self, piece: Piece, bytes: &[u8]) -> Result<(), CastoreError> {
        if self.writer.has(&piece.key()) {
            return Ok(());
        }
        self.recipes.push(piece, bytes);
        if self.recipes.bytes() >= FRAME_RAW_BYTES || self.recipes.len() >= FRAME_PIECES_MAX {
            self.hand_in_recipes()?;
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

/// Replaces hash parts of a small file.
fn mask_whole(masks: &Masks, bytes: &[u8]) -> (Vec<u8>, PatchBuilder) {
    let (mut masked, mut patches) = (Vec::new(), PatchBuilder::default());
    masks.scan(bytes, 0, true, &mut |at, hash_part| {
        if patches.is_empty() {
            masked = bytes.to_vec();
        }
        patches.push(at as u64, hash_part);
        masked[at..at + HASH_PART_BYTES].copy_from_slice(&FILLER);
    });
    (masked, patches)
}

/// Takes the contents of one file.
pub struct FileSink<'a> {
    builder: &'a mut TreeBuilder,
    name: Option<Box<[u8]>>,
    executable: bool,
    size: u64,
    large: Option<Large>,
}

/// A file that has turned out to be large.
#[derive(Default)]
struct Large {
    /// Of the bytes as they came.
    hasher: blake3::Hasher,
    /// Of the masked bytes, from the first hash part on.
    masked_hasher: Option<blake3::Hasher>,
    patches: PatchBuilder,
    recipe: RecipeBuilder,
    chunks: u64,
    duplicate_bytes: u64,
    masked_duplicate_bytes: u64,
    /// Bytes of the file before the buffer.
    cut: u64,
    /// Bytes of the buffer that are hashed and masked.
    settled: usize,
}

impl FileSink<'_> {
    /// Adds bytes.
    ///
    /// # Errors
    /// I/O, poisoned writer.
    pub fn write(&mut self, data: &[u8]) -> Result<(), CastoreError> {
        self.size += data.len() as u64;
        let mut data = data;
        while !data.is_empty() {
            let room = STREAM_BYTES.saturating_sub(self.builder.buffer.len());
            let (now, later) = data.split_at(room.min(data.len()));
            self.builder.buffer.extend_from_slice(now);
            data = later;
            if self.builder.buffer.len() >= STREAM_BYTES {
                let mut large = self.large.take().unwrap_or_default();
                self.settle(&mut large, false);
                self.cut(&mut large, false)?;
                self.large = Some(large);
            }
        }
        Ok(())
    }

    /// Ends the file and adds it to its directory; returns its size.
    ///
    /// # Errors
    /// I/O, poisoned writer.
    pub fn finish(mut self) -> Result<u64, CastoreError> {
        let size = self.size;
        let (digest, counts) = if size < WHOLE_FILE_BYTES as u64 {
            self.builder
                .add_small(self.name.as_deref().unwrap_or_default())?
        } else {
            self.finish_large()?
        };
        let Self {
            builder,
            name,
            executable,
            ..
        } = self;
        builder.in_file = false;
        builder.writer.count_file(size, counts);
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

    fn finish_large(&mut self) -> Result<(Digest, FileCounts), CastoreError> {
        let mut large = self.large.take().unwrap_or_default();
        self.settle(&mut large, true);
        let digest = Digest(*large.hasher.finalize().as_bytes());
        // Asked before the last chunk is added: it may be the file itself.
        let is_known = self.builder.writer.has(&Key::new(&digest, Class::Blob));
        self.cut(&mut large, true)?;
        let counts = FileCounts {
            chunk_duplicate: large.duplicate_bytes - large.masked_duplicate_bytes,
            masked_duplicate: large.masked_duplicate_bytes,
            ..FileCounts::default()
        };
        let duplicate = FileCounts {
            file_duplicate: self.size,
            ..FileCounts::default()
        };
        let Some(masked_hasher) = large.masked_hasher.take() else {
            // What is known has the same cuts.
            if is_known {
                return Ok((digest, duplicate));
            }
            if large.chunks > 1 {
                self.add_root(large.recipe, digest)?;
            }
            return Ok((digest, counts));
        };
        // What is known was stored without masks.
        if is_known && self.builder.writer.is_whole(&digest)? {
            return Ok((digest, duplicate));
        }
        let masked = Digest(*masked_hasher.finalize().as_bytes());
        let is_masked_known = self.builder.writer.has(&Key::new(&masked, Class::Blob));
        if large.chunks > 1 && !is_masked_known {
            self.add_root(large.recipe, masked)?;
        }
        let patches = large.patches.encode(&masked, self.size);
        if self.builder.writer.has_patches(&digest, &masked)? {
            return Ok((digest, duplicate));
        }
        self.builder.add_patches(digest, &patches)?;
        let is_masked = true;
        Ok((
            digest,
            FileCounts {
                is_masked,
                ..counts
            },
        ))
    }

    /// Hashes what is new in the buffer, and masks it; without `all`, leaves what the bytes that
    /// follow may decide.
    fn settle(&mut self, large: &mut Large, all: bool) {
        let buffer = &mut self.builder.buffer;
        let from = large.settled;
        let mut found = Vec::new();
        let to = match &self.builder.masks {
            Some(masks) if !large.patches.is_full() => {
                masks.scan(buffer, from, all, &mut |at, hash_part| {
                    if !large.patches.is_full() {
                        large.patches.push(large.cut + at as u64, hash_part);
                        found.push(at);
                    }
                })
            }
            _ => buffer.len(),
        };
        if large.masked_hasher.is_none() && !found.is_empty() {
            large.masked_hasher = Some(large.hasher.clone());
        }
        large.hasher.update(&buffer[from..to]);
        for at in found {
            buffer[at..at + HASH_PART_BYTES].copy_from_slice(&FILLER);
        }
        if let Some(hasher) = &mut large.masked_hasher {
            hasher.update(&buffer[from..to]);
        }
        large.settled = to;
    }

    /// Cuts what is settled into chunks; without `all`, leaves what may belong to a longer one, and
    /// what masks look back at.
    fn cut(&mut self, large: &mut Large, all: bool) -> Result<(), CastoreError> {
        let buffer = std::mem::take(&mut self.builder.buffer);
        let settled = large.settled;
        let mut start = 0;
        while start < settled && (all || settled - start >= CHUNK_BYTES_MAX + CONTEXT_BYTES) {
            let rest = &buffer[start..settled];
            let len = chunk_len(rest);
            self.add_chunk(large, &rest[..len])?;
            start += len;
        }
        large.settled -= start;
        self.builder.buffer = buffer;
        self.builder.buffer.drain(..start);
        Ok(())
    }

    fn add_chunk(&mut self, large: &mut Large, bytes: &[u8]) -> Result<(), CastoreError> {
        let digest = Digest::of(bytes);
        let len = bytes.len() as u64;
        let piece = Piece {
            digest,
            kind: Kind::Data,
            len: bytes.len() as u32,
        };
        let builder = &mut *self.builder;
        if builder.has_data(&piece.key()) {
            builder.writer.check()?;
            large.duplicate_bytes += len;
            if large.patches.has_in(large.cut..large.cut + len) {
                large.masked_duplicate_bytes += len;
            }
        } else {
            builder.chunks.push(piece, bytes);
            if builder.chunks.bytes() >= CHUNKS_BYTES {
                builder.writer.hand_in(&mut builder.chunks, None)?;
            }
        }
        large.cut += len;
        large.chunks += 1;
        large.recipe.push(digest, len, &mut |piece, bytes| {
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
