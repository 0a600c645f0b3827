//! Open blobs: small files by their place, large ones by their recipe.
//!
//! Opening a small file is an index lookup, without I/O. Reading holds no lock during I/O. A large
//! file keeps its recipe's root and the last few inner nodes; each chunk is looked up when it is
//! read, so a file of terabytes costs a few hundred KiB.

use crate::core::{Core, Place, lock};
use crate::digest::Digest;
use crate::error::CastoreError;
use crate::frames::PieceBytes;
use crate::pack::{Class, Kind};
use crate::recipe::{RecipeEntry, RecipeNode};
use std::sync::{Arc, Mutex};

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
}

enum Body {
    Empty,
    /// One piece.
    Whole(Place),
    Chunks {
        root: PieceBytes,
        nodes: Mutex<Vec<(Digest, PieceBytes)>>,
    },
}

impl Blob {
    pub(crate) fn open(core: &Arc<Core>, digest: &Digest, size: u64) -> Result<Self, CastoreError> {
        let body = Self::body(core, digest, size)?;
        Ok(Self {
            inner: Arc::new(BlobInner {
                core: Arc::clone(core),
                digest: *digest,
                size,
                body,
            }),
        })
    }

    fn body(core: &Core, digest: &Digest, size: u64) -> Result<Body, CastoreError> {
        let wrong_size = |found: u64| {
            CastoreError::corrupt(
                format!("blob {digest}"),
                format!("expected {size} bytes, found {found}"),
            )
        };
        if *digest == Digest::EMPTY {
            return if size == 0 {
                Ok(Body::Empty)
            } else {
                Err(wrong_size(0))
            };
        }
        let place = core
            .find_fresh(digest, Class::Blob)?
            .ok_or(CastoreError::Missing {
                kind: "blob",
                digest: *digest,
            })?;
        match place.location.kind() {
            Some(Kind::Data) if u64::from(place.location.len()) == size => Ok(Body::Whole(place)),
            Some(Kind::Data) => Err(wrong_size(u64::from(place.location.len()))),
            Some(Kind::Recipe) => {
                let root = core.piece(&place, digest)?;
                let node = parse(&root, digest)?;
                if node.total() != size {
                    return Err(wrong_size(node.total()));
                }
                Ok(Body::Chunks {
                    root,
                    nodes: Mutex::default(),
                })
            }
            kind => Err(CastoreError::corrupt(
                format!("blob {digest}"),
                format!("expected data or a recipe, found {kind:?}"),
            )),
        }
    }

    /// Bytes.
    pub fn size(&self) -> u64 {
        self.inner.size
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
        let BlobInner {
            core,
            digest,
            size,
            body,
        } = &*self.inner;
        if offset >= *size {
            return Ok(0);
        }
        let wanted = (size - offset).min(buf.len() as u64) as usize;
        let buf = &mut buf[..wanted];
        match body {
            Body::Empty => {}
            Body::Whole(place) => {
                let bytes = core.piece(place, digest)?;
                // Both fit: `size` is the piece's length.
                let at = offset as usize;
                buf.copy_from_slice(&bytes[at..at + wanted]);
            }
            Body::Chunks { root, nodes } => {
                let mut done = 0;
                while done < wanted {
                    let (chunk, start) = self.chunk_at(root, nodes, offset + done as u64)?;
                    let at = (offset + done as u64 - start) as usize;
                    let bytes = core.chunk(&chunk, digest)?;
                    let count = (bytes.len() - at).min(wanted - done);
                    buf[done..done + count].copy_from_slice(&bytes[at..at + count]);
                    done += count;
                }
            }
        }
        Ok(wanted)
    }

    /// Walks down to the chunk that holds the byte at `offset`; also says where it begins.
    fn chunk_at(
        &self,
        root: &PieceBytes,
        nodes: &Mutex<Vec<(Digest, PieceBytes)>>,
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

    /// Reads all of it and compares the digest.
    pub(crate) fn verify(&self) -> Result<(), CastoreError> {
        let mut hasher = blake3::Hasher::new();
        let mut buffer = vec![0; self.size().min(VERIFY_BYTES as u64) as usize];
        let mut offset = 0;
        while offset < self.size() {
            let count = self.read_at(offset, &mut buffer)?;
            hasher.update(&buffer[..count]);
            offset += count as u64;
        }
        let found = Digest(*hasher.finalize().as_bytes());
        if found == self.inner.digest {
            Ok(())
        } else {
            Err(CastoreError::corrupt(
                format!("blob {}", self.inner.digest),
                format!("its bytes have the digest {found}"),
            ))
        }
    }
}

pub(crate) fn parse<'a>(bytes: &'a [u8], key: &Digest) -> Result<RecipeNode<'a>, CastoreError> {
    RecipeNode::new(bytes).map_err(|reason| CastoreError::corrupt(format!("recipe {key}"), reason))
}

impl Core {
    /// The bytes of a chunk of `blob`.
    fn chunk(&self, entry: &RecipeEntry, blob: &Digest) -> Result<PieceBytes, CastoreError> {
        let place = self
            .find_fresh(&entry.digest, Class::Blob)?
            .ok_or(CastoreError::Missing {
                kind: "chunk",
                digest: entry.digest,
            })?;
        let bytes = self.piece_of_kind(&place, &entry.digest, Kind::Data)?;
        if bytes.len() as u64 != entry.end - entry.start {
            return Err(CastoreError::corrupt(
                format!("chunk {} of blob {blob}", entry.digest),
                format!(
                    "expected {} bytes, found {}",
                    entry.end - entry.start,
                    bytes.len()
                ),
            ));
        }
        Ok(bytes)
    }

    /// An inner node, which must be of that level and cover what its parent says.
    fn recipe_node(
        &self,
        entry: &RecipeEntry,
        level: u8,
        kept: &Mutex<Vec<(Digest, PieceBytes)>>,
    ) -> Result<PieceBytes, CastoreError> {
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
