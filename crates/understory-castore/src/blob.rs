//! Open blobs: small files by their place, large ones by their recipe, masked ones by their patches.
//!
//! Opening a small file is an index lookup, without I/O. Reading holds no lock during I/O. A large
//! file keeps its recipe's root and the last few inner nodes, out of their frames; each chunk is looked up when
//! it is read, so a file of terabytes costs a few hundred KiB, and one of 10 MiB costs 13. A patched blob reads the masked bytes and puts
//! back what belongs there; opening it reads its patches.
//!
//! What a recipe or a list of patches needs may be gone while another root of the same blob is whole
//! (see `tree.rs`): then that one is read.

use crate::core::{Core, Place, lock};
use crate::digest::Digest;
use crate::error::CastoreError;
use crate::frames::PieceBytes;
use crate::pack::{Class, Key, Kind};
use crate::patch::Patches;
use crate::read_ahead::{self, BlobReads};
use crate::recipe::{NODE_BYTES_MAX, RecipeEntry, RecipeNode};
use crate::writer::Writer;
use std::ops::Range;
use std::sync::{Arc, Mutex, OnceLock};

/// Inner recipe nodes kept per open blob: one per level and two more for a second reader.
const NODES_KEPT: usize = 4;
/// Bytes read at once when a whole blob is verified.
const VERIFY_BYTES: usize = 1 << 20;

/// An open blob: knows its pieces. Cheap to clone and to keep for small files.
#[derive(Clone)]
pub struct Blob {
    inner: Arc<BlobInner>,
}

struct BlobInner {
    core: Arc<Core>,
    digest: Digest,
    size: u64,
    body: Body,
    /// Where its root is, if what that needs may be gone and another root may be whole.
    root: Option<Place>,
    /// The blob by another root.
    other: OnceLock<Blob>,
}

/// An encoded recipe node, without the frame it came in.
type NodeBytes = Arc<[u8]>;
type KeptNodes = Mutex<Vec<(Digest, NodeBytes)>>;

enum Body {
    Empty,
    /// One piece.
    Whole(Place),
    Chunks {
        root: NodeBytes,
        nodes: KeptNodes,
        reads: BlobReads,
    },
    Patched {
        patches: Patches,
        masked: Blob,
    },
}

impl Blob {
    pub(crate) fn open(core: &Arc<Core>, digest: &Digest, size: u64) -> Result<Self, CastoreError> {
        if *digest == Digest::EMPTY {
            return if size == 0 {
                Ok(Self::new(core, digest, 0, Body::Empty, None))
            } else {
                Err(wrong_size(digest, size, 0))
            };
        }
        let place = core.find_blob(digest)?.ok_or(missing(digest))?;
        match Self::at(core, digest, size, &place, true) {
            Err(error @ CastoreError::Missing { .. }) => {
                match core.find_other_blob(digest, &place) {
                    Some(other) => Self::at(core, digest, size, &other, false),
                    None => Err(error),
                }
            }
            opened => opened,
        }
    }

    /// Opens a blob whose root is there. If not `is_first`, another root was tried before.
    fn at(
        core: &Arc<Core>,
        digest: &Digest,
        size: u64,
        place: &Place,
        is_first: bool,
    ) -> Result<Self, CastoreError> {
        let root = is_first.then(|| place.clone());
        match place.location.kind() {
            Some(Kind::Data) if u64::from(place.location.len()) == size => Ok(Self::new(
                core,
                digest,
                size,
                Body::Whole(place.clone()),
                None,
            )),
            Some(Kind::Data) => Err(wrong_size(digest, size, u64::from(place.location.len()))),
            Some(Kind::Recipe) => {
                let bytes: NodeBytes = core.piece(place, digest)?[..].into();
                let node = parse(&bytes, digest)?;
                if node.total() != size {
                    return Err(wrong_size(digest, size, node.total()));
                }
                let body = Body::Chunks {
                    root: bytes,
                    nodes: Mutex::default(),
                    reads: BlobReads::default(),
                };
                Ok(Self::new(core, digest, size, body, root))
            }
            Some(Kind::Patched) => {
                let patches = core.patches(place, digest)?;
                if patches.size != size {
                    return Err(wrong_size(digest, size, patches.size));
                }
                // Never patched itself, so this ends.
                let masked = core
                    .find_fresh(&patches.masked, Class::Blob)?
                    .ok_or(missing(&patches.masked))?;
                let masked = Self::at(core, &patches.masked, size, &masked, false)?;
                let body = Body::Patched { patches, masked };
                Ok(Self::new(core, digest, size, body, root))
            }
            kind => Err(CastoreError::corrupt(
                format!("blob {digest}"),
                format!("expected data, a recipe or patches, found {kind:?}"),
            )),
        }
    }

    fn new(core: &Arc<Core>, digest: &Digest, size: u64, body: Body, root: Option<Place>) -> Self {
        Self {
            inner: Arc::new(BlobInner {
                core: Arc::clone(core),
                digest: *digest,
                size,
                body,
                root,
                other: OnceLock::new(),
            }),
        }
    }

    /// Bytes.
    pub fn size(&self) -> u64 {
        self.inner.size
    }

    /// The digest of what is stored for it, if that differs in hash parts of store paths: these are put back
    /// on reading. Files that are equal but for such hash parts have the same.
    pub fn masked_digest(&self) -> Option<&Digest> {
        match &self.inner.body {
            Body::Patched { masked, .. } => Some(masked.digest()),
            _ => None,
        }
    }

    /// What keeping it open takes of memory at most, in bytes.
    pub fn memory_bytes(&self) -> u64 {
        let body = match &self.inner.body {
            Body::Empty | Body::Whole(_) => 0,
            Body::Chunks { root, .. } => {
                let kept = match parse(root, self.digest()).map(|node| node.level()) {
                    Ok(0) => 0,
                    _ => NODES_KEPT * NODE_BYTES_MAX,
                };
                (root.len() + kept) as u64
            }
            Body::Patched { patches, masked } => patches.memory_bytes() + masked.memory_bytes(),
        };
        size_of::<BlobInner>() as u64 + body
    }

    /// The digest it was opened by.
    pub fn digest(&self) -> &Digest {
        &self.inner.digest
    }

    /// Reads up to `buf.len()` bytes at `offset`; short only at the end of the blob.
    ///
    /// # Errors
    /// Corrupt, missing chunk, I/O.
    pub fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<usize, CastoreError> {
        if let Some(other) = self.inner.other.get() {
            return other.read_from(offset, buf);
        }
        match self.read_from(offset, buf) {
            Err(error @ CastoreError::Missing { .. }) => match self.by_another_root() {
                Some(other) => other.read_from(offset, buf),
                None => Err(error),
            },
            read => read,
        }
    }

    fn by_another_root(&self) -> Option<&Self> {
        let BlobInner {
            core,
            digest,
            size,
            root,
            other,
            ..
        } = &*self.inner;
        let place = core.find_other_blob(digest, root.as_ref()?)?;
        let opened = Self::at(core, digest, *size, &place, false).ok()?;
        Some(other.get_or_init(|| opened))
    }

    fn read_from(&self, offset: u64, buf: &mut [u8]) -> Result<usize, CastoreError> {
        let BlobInner {
            core,
            digest,
            size,
            body,
            ..
        } = &*self.inner;
        if offset >= *size {
            return Ok(0);
        }
        let wanted = (size - offset).min(buf.len() as u64) as usize;
        let buf = &mut buf[..wanted];
        match body {
            Body::Empty => {}
            Body::Whole(place) => {
                // Both fit: `size` is the piece's length.
                let part = offset as usize..offset as usize + wanted;
                let bytes = core.piece_part(place, digest, part.clone())?;
                buf.copy_from_slice(&bytes[part]);
            }
            Body::Chunks { root, nodes, reads } => {
                reads.before(self, offset, wanted);
                let mut done = 0;
                while done < wanted {
                    let (chunk, start) = self.chunk_at(root, nodes, offset + done as u64)?;
                    let at = (offset + done as u64 - start) as usize;
                    let len = (chunk.end - chunk.start) as usize;
                    let part = at..len.min(at + wanted - done);
                    let bytes = core.chunk(&chunk, digest, part.clone())?;
                    let count = part.len();
                    buf[done..done + count].copy_from_slice(&bytes[part]);
                    done += count;
                }
            }
            Body::Patched { patches, masked } => {
                let mut done = 0;
                while done < wanted {
                    done += masked.read_from(offset + done as u64, &mut buf[done..])?;
                }
                patches.apply(offset, buf);
            }
        }
        Ok(wanted)
    }

    /// Brings the frames with these bytes of a large file into the cache.
    pub(crate) fn load(&self, range: Range<u64>) -> Result<(), CastoreError> {
        let Body::Chunks { root, nodes, .. } = &self.inner.body else {
            return Ok(());
        };
        let mut at = range.start;
        while at < range.end.min(self.size()) {
            let (chunk, start) = self.chunk_at(root, nodes, at)?;
            let len = chunk.end - chunk.start;
            self.core().chunk(&chunk, self.digest(), 0..len as usize)?;
            at = start + len;
        }
        Ok(())
    }

    /// Has the kernel fetch the frames with these bytes of a large file.
    pub(crate) fn announce(&self, range: Range<u64>) -> Result<(), CastoreError> {
        let Body::Chunks { root, nodes, .. } = &self.inner.body else {
            return Ok(());
        };
        let core = self.core();
        let mut part: Option<(Place, Range<u64>)> = None;
        let mut at = range.start;
        while at < range.end.min(self.size()) {
            let (chunk, start) = self.chunk_at(root, nodes, at)?;
            at = start + (chunk.end - chunk.start);
            let Some(place) = core.find(&chunk.digest, Class::Blob) else {
                continue;
            };
            let offset = u64::from(place.location.frame_offset());
            let end = offset + place.location.frame_len_hint() as u64;
            match &mut part {
                // The next frame, or the same again.
                Some((first, frames))
                    if first.pack.serial == place.pack.serial
                        && (frames.start..=frames.end).contains(&offset) =>
                {
                    frames.end = frames.end.max(end);
                }
                _ => {
                    if let Some((first, frames)) = part.replace((place, offset..end)) {
                        read_ahead::announce(&*core.file(&first.pack)?, frames);
                    }
                }
            }
        }
        if let Some((first, frames)) = part {
            read_ahead::announce(&*core.file(&first.pack)?, frames);
        }
        Ok(())
    }

    pub(crate) fn core(&self) -> &Arc<Core> {
        &self.inner.core
    }

    /// Walks down to the chunk that holds the byte at `offset`; also says where it begins.
    fn chunk_at(
        &self,
        root: &NodeBytes,
        nodes: &KeptNodes,
        offset: u64,
    ) -> Result<(RecipeEntry, u64), CastoreError> {
        let core = &self.inner.core;
        let mut bytes = root.clone();
        let mut key = self.inner.digest;
        let mut start = 0;
        loop {
            let node = parse(&bytes, &key)?;
            let entry = node.find(offset - start).ok_or_else(|| {
                CastoreError::corrupt(
                    format!("recipe {key}"),
                    format!(
                        "expected more than {} bytes, found {}",
                        offset - start,
                        node.total()
                    ),
                )
            })?;
            // `find` is binary: with ends out of order it may give an entry that is elsewhere.
            if entry.start > offset - start || entry.end <= offset - start {
                return Err(CastoreError::corrupt(
                    format!("recipe {key}"),
                    format!("entries out of order around byte {}", offset - start),
                ));
            }
            let level = node.level();
            start += entry.start;
            if level == 0 {
                return Ok((entry, start));
            }
            let child = core.recipe_node(&entry, level - 1, nodes)?;
            (bytes, key) = (child, entry.digest);
        }
    }

    /// Says if a patched piece gives other bytes than those with its digest. If the masked bytes are
    /// missing or damaged, nothing can be said about the piece.
    pub(crate) fn check_patches(
        core: &Arc<Core>,
        digest: &Digest,
        patches: Patches,
    ) -> Result<Result<(), String>, CastoreError> {
        let (size, masked) = (patches.size, patches.masked);
        let checked = core
            .find_fresh(&masked, Class::Blob)?
            .ok_or(missing(&masked))
            .and_then(|place| Self::at(core, &masked, size, &place, false))
            .and_then(|masked| {
                let body = Body::Patched { patches, masked };
                Self::new(core, digest, size, body, None).digest_of_bytes()
            });
        match checked {
            Ok(found) if found == *digest => Ok(Ok(())),
            Ok(found) => Ok(Err(format!("its bytes have the digest {found}"))),
            Err(CastoreError::Missing { .. } | CastoreError::Corrupt { .. }) => Ok(Ok(())),
            Err(error) => Err(error),
        }
    }

    /// Reads all of it and compares the digest.
    pub(crate) fn verify(&self) -> Result<(), CastoreError> {
        let found = self.digest_of_bytes()?;
        if found == self.inner.digest {
            Ok(())
        } else {
            Err(CastoreError::corrupt(
                format!("blob {}", self.inner.digest),
                format!("its bytes have the digest {found}"),
            ))
        }
    }

    fn digest_of_bytes(&self) -> Result<Digest, CastoreError> {
        let mut hasher = blake3::Hasher::new();
        let mut buffer = vec![0; self.size().min(VERIFY_BYTES as u64) as usize];
        let mut offset = 0;
        while offset < self.size() {
            let count = self.read_at(offset, &mut buffer)?;
            hasher.update(&buffer[..count]);
            offset += count as u64;
        }
        Ok(Digest(*hasher.finalize().as_bytes()))
    }
}

fn wrong_size(digest: &Digest, expected: u64, found: u64) -> CastoreError {
    CastoreError::corrupt(
        format!("blob {digest}"),
        format!("expected {expected} bytes, found {found}"),
    )
}

fn missing(digest: &Digest) -> CastoreError {
    CastoreError::Missing {
        kind: "blob",
        digest: *digest,
    }
}

impl Writer {
    /// True if all that a blob without patches consists of is stored or handed in.
    pub(crate) fn is_whole(&self, digest: &Digest) -> Result<bool, CastoreError> {
        let Some(place) = self.core().find_for_writer(&Key::new(digest, Class::Blob)) else {
            // Handed in, and all that it needs before it.
            return Ok(self.has(&Key::new(digest, Class::Blob)));
        };
        if place.location.kind() == Some(Kind::Data) {
            return Ok(true);
        }
        let root = self.core().piece_of_kind(&place, digest, Kind::Recipe)?;
        self.has_all_of(&root, digest)
    }

    fn has_all_of(&self, node: &[u8], digest: &Digest) -> Result<bool, CastoreError> {
        let node = parse(node, digest)?;
        for entry in (0..node.count()).map(|at| node.entry(at)) {
            if node.level() == 0 {
                if !self.has(&Key::new(&entry.digest, Class::Blob)) {
                    return Ok(false);
                }
                continue;
            }
            let Some(place) = self
                .core()
                .find_for_writer(&Key::new(&entry.digest, Class::RecipeNode))
            else {
                return Ok(false);
            };
            let (core, kind) = (self.core(), Kind::RecipeNode);
            let child = core.piece_of_kind(&place, &entry.digest, kind)?;
            let is_below = parse(&child, &entry.digest)?.level() < node.level();
            if !is_below || !self.has_all_of(&child, &entry.digest)? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// True if patches of `blob` are stored or handed in, and so is all that they need. Of `masked` that
    /// is known. Patches that need what is gone are no longer found.
    pub(crate) fn has_patches(&self, blob: &Digest, masked: &Digest) -> Result<bool, CastoreError> {
        let key = Key::new(blob, Class::Patched);
        let core = self.core();
        while !self.is_claimed(&key) && self.has(&key) {
            let Some(place) = core.find_for_writer(&key) else {
                break;
            };
            match core.patches(&place, blob) {
                Ok(patches) if patches.masked == *masked => return Ok(true),
                Ok(patches) if self.is_whole(&patches.masked)? => return Ok(true),
                Ok(_) | Err(CastoreError::Corrupt { .. }) => {
                    core.set_bad(&place.pack, place.location.frame_offset());
                }
                Err(error) => return Err(error),
            }
            if !core.is_bad(&place) {
                // More is damaged than is remembered.
                return Ok(false);
            }
        }
        Ok(self.has(&key))
    }
}

pub(crate) fn parse<'a>(bytes: &'a [u8], key: &Digest) -> Result<RecipeNode<'a>, CastoreError> {
    RecipeNode::new(bytes).map_err(|reason| CastoreError::corrupt(format!("recipe {key}"), reason))
}

impl Core {
    /// Reads the patches of `blob`.
    pub(crate) fn patches(&self, place: &Place, blob: &Digest) -> Result<Patches, CastoreError> {
        let bytes = self.piece_of_kind(place, blob, Kind::Patched)?;
        Patches::decode(&bytes)
            .map_err(|reason| CastoreError::corrupt(format!("patches of blob {blob}"), reason))
    }

    /// The bytes of a chunk of `blob`; what is behind `wanted`, which lies in the chunk, may be missing.
    fn chunk(
        &self,
        entry: &RecipeEntry,
        blob: &Digest,
        wanted: Range<usize>,
    ) -> Result<PieceBytes, CastoreError> {
        let place = self
            .find_fresh(&entry.digest, Class::Blob)?
            .ok_or(CastoreError::Missing {
                kind: "chunk",
                digest: entry.digest,
            })?;
        let (location, expected) = (place.location, entry.end - entry.start);
        if location.kind() != Some(Kind::Data) || u64::from(location.len()) != expected {
            return Err(CastoreError::corrupt(
                format!("chunk {} of blob {blob}", entry.digest),
                format!(
                    "expected {expected} bytes of data, found {} of {:?}",
                    location.len(),
                    location.kind()
                ),
            ));
        }
        self.piece_part(&place, &entry.digest, wanted)
    }

    /// An inner node, which must be of that level and cover what its parent says.
    fn recipe_node(
        &self,
        entry: &RecipeEntry,
        level: u8,
        kept: &KeptNodes,
    ) -> Result<NodeBytes, CastoreError> {
        let known = lock(kept)
            .iter()
            .find(|(digest, _)| *digest == entry.digest)
            .map(|(_, bytes)| bytes.clone());
        if let Some(bytes) = known {
            return Ok(bytes);
        }
        let place =
            self.find_fresh(&entry.digest, Class::RecipeNode)?
                .ok_or(CastoreError::Missing {
                    kind: "recipe",
                    digest: entry.digest,
                })?;
        let bytes = self.piece_of_kind(&place, &entry.digest, Kind::RecipeNode)?;
        let bytes: NodeBytes = bytes[..].into();
        let node = parse(&bytes, &entry.digest)?;
        if node.level() != level || node.total() != entry.end - entry.start {
            return Err(CastoreError::corrupt(
                format!("recipe {}", entry.digest),
                format!(
                    "expected level {level} and {} bytes, found level {} and {} bytes",
                    entry.end - entry.start,
                    node.level(),
                    node.total()
                ),
            ));
        }
        let mut kept = lock(kept);
        if kept.len() >= NODES_KEPT {
            kept.remove(0);
        }
        kept.push((entry.digest, bytes.clone()));
        Ok(bytes)
    }
}
