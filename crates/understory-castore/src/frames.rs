//! Reading frames: one `pread`, checksums, decompression, the cache.
//!
//! A frame that is read from disk is verified whole (header and payload); a piece is handed out only
//! if the frame's table has its full digest, kind and length at that place. Threads that want the
//! same frame at the same time share one read.
//!
//! **Parts.** A small read at a random place needs the frame up to there, and decompresses no more: its
//! blocks are short ([`crate::writer::compressor`]). Who then wants what is behind that decompresses all of it.
//!
//! Cost of a miss: one system call, XXH3 over about 20 KiB, and zstd: 25 µs for a frame of small files or a chunk of
//! a large one, on average two thirds of that for a random place in it. Of a hit: a hash lookup and a binary search.

use crate::core::{Core, Pack, Place, lock};
use crate::digest::Digest;
use crate::error::{CastoreError, IoContext};
use crate::pack::{self, Class, Codec, FrameHeader, Kind, Piece};
use std::cell::RefCell;
use std::fs::File;
use std::ops::{Deref, Range};
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use zstd::zstd_safe::{self, DCtx, InBuffer, OutBuffer, ResetDirective};

/// How often a piece is looked for anew while one reads it: each time a collection has moved it.
const MOVES_MAX: u32 = 64;

/// What a thread's read buffer may keep: the largest frame but those of huge directories.
const READ_BUFFER_BYTES_KEPT: usize = 1 << 20;
/// Who reads that many bytes at once reads in sequence, and will want the rest of the frame.
const PART_READ_BYTES_MAX: usize = 64 << 10;
/// The last part of a frame, one of so many, is not worth stopping before; and only a whole frame is known to be of the
/// right length.
const PARTS: usize = 8;

thread_local! {
    static SCRATCH: RefCell<Scratch> = const { RefCell::new(Scratch { buffer: Vec::new(), zstd: None }) };
}

/// What a thread reuses from frame to frame.
struct Scratch {
    buffer: Vec<u8>,
    zstd: Option<DCtx<'static>>,
}

/// How much of a frame is decompressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Extent {
    Whole,
    /// Up to this byte at least.
    UpTo(usize),
}

/// A verified frame, decompressed in whole or from its beginning up to some byte.
pub(crate) struct Frame {
    raw: Vec<u8>,
    pieces: Vec<Piece>,
    /// Where each piece begins.
    starts: Vec<u32>,
}

impl Frame {
    pub(crate) fn memory_bytes(&self) -> u64 {
        (self.raw.capacity() + self.pieces.len() * (size_of::<Piece>() + 4) + size_of::<Self>())
            as u64
    }

    fn new(raw: Vec<u8>, pieces: Vec<Piece>) -> Self {
        let mut start = 0;
        let starts = pieces
            .iter()
            .map(|piece| {
                let this = start;
                start += piece.len;
                this
            })
            .collect();
        Self {
            raw,
            pieces,
            starts,
        }
    }

    /// The pieces with their bytes, of a whole frame.
    pub(crate) fn pieces(&self) -> impl Iterator<Item = (&Piece, &[u8])> {
        self.pieces.iter().zip(&self.starts).map(|(piece, start)| {
            let start = *start as usize;
            (piece, &self.raw[start..start + piece.len as usize])
        })
    }

    /// The piece that begins at byte `offset`, and its bytes, of a whole frame.
    pub(crate) fn piece_at(&self, offset: u32) -> Option<(&Piece, &[u8])> {
        let start = offset as usize;
        let piece = self.entry_at(offset)?;
        Some((piece, &self.raw[start..start + piece.len as usize]))
    }

    fn entry_at(&self, offset: u32) -> Option<&Piece> {
        // Empty pieces are never stored, so starts are unique.
        Some(&self.pieces[self.starts.binary_search(&offset).ok()?])
    }

    /// Where the piece lies in `raw`, if it is that piece.
    fn range_of(&self, place: &Place, digest: &Digest) -> Result<Range<usize>, CastoreError> {
        let location = place.location;
        let piece = self.entry_at(location.offset());
        match piece {
            Some(piece)
                if piece.digest == *digest
                    && piece.len == location.len()
                    && Some(piece.kind) == location.kind() =>
            {
                let start = location.offset() as usize;
                Ok(start..start + piece.len as usize)
            }
            _ => Err(CastoreError::corrupt(
                format!(
                    "{} at byte {}",
                    frame_name(&place.pack, place.location.frame_offset()),
                    location.offset()
                ),
                format!(
                    "expected {digest} of {} bytes, found {}",
                    location.len(),
                    piece.map_or_else(
                        || "no piece".to_owned(),
                        |piece| format!("{} of {} bytes", piece.digest, piece.len)
                    )
                ),
            )),
        }
    }
}

/// The bytes of one piece, or of a piece's beginning, holding on to its frame.
#[derive(Clone)]
pub(crate) struct PieceBytes {
    frame: Arc<Frame>,
    range: Range<usize>,
}

impl Deref for PieceBytes {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        &self.frame.raw[self.range.clone()]
    }
}

/// How errors call a frame.
pub(crate) fn frame_name(pack: &Pack, offset: u32) -> String {
    format!("frame at {offset} of pack {}", pack.id)
}

impl Core {
    /// Returns the bytes of a piece, from the cache or from disk. If its frame is damaged, another
    /// copy is taken, if there is one; if its pack was deleted, the piece is looked for where it went.
    pub(crate) fn piece(&self, place: &Place, digest: &Digest) -> Result<PieceBytes, CastoreError> {
        self.piece_part(place, digest, 0..place.location.len() as usize)
    }

    /// As [`Self::piece`], but what is behind `wanted`, which lies in the piece, may be missing.
    pub(crate) fn piece_part(
        &self,
        place: &Place,
        digest: &Digest,
        wanted: Range<usize>,
    ) -> Result<PieceBytes, CastoreError> {
        let Some(class) = place.location.kind().map(Kind::class) else {
            return self.piece_at(place, digest, &wanted);
        };
        let mut place = place.clone();
        if self.is_bad(&place)
            && let Some(other) = self.find(digest, class)
        {
            place = other;
        }
        let mut moves = 0;
        loop {
            if place.pack.gone.load(Ordering::Acquire) {
                place = self.moved(&place, digest, class)?;
            }
            match self.piece_at(&place, digest, &wanted) {
                Err(error @ CastoreError::Corrupt { .. }) => {
                    tracing::error!(%error, %digest, "a stored piece cannot be read");
                    self.set_bad(&place.pack, place.location.frame_offset());
                    match self.find(digest, class) {
                        // Each step notes one more bad frame, so this ends; what is found may not
                        // be bad.
                        Some(other) if !self.is_bad(&other) && self.is_bad(&place) => {
                            place = other;
                        }
                        _ => return Err(error),
                    }
                }
                // A collection of any process deleted the pack. Whatever lives was moved before.
                Err(error) if error.is_not_found() && moves < MOVES_MAX => {
                    moves += 1;
                    self.list(&lock(&self.listing))?;
                    place = self.moved(&place, digest, class)?;
                }
                other => return other,
            }
        }
    }

    /// Where a piece of a deleted pack is now.
    fn moved(&self, place: &Place, digest: &Digest, class: Class) -> Result<Place, CastoreError> {
        self.find_fresh(digest, class)?
            .ok_or(CastoreError::Missing {
                kind: match (class, place.location.kind()) {
                    (Class::Directory, _) => "directory",
                    (Class::RecipeNode, _) | (_, Some(Kind::Recipe)) => "recipe",
                    _ => "blob",
                },
                digest: *digest,
            })
    }

    fn piece_at(
        &self,
        place: &Place,
        digest: &Digest,
        wanted: &Range<usize>,
    ) -> Result<PieceBytes, CastoreError> {
        let key = (place.pack.serial, place.location.frame_offset());
        let end = place.location.offset() as usize + wanted.end;
        let mut extent = if wanted.len() < PART_READ_BYTES_MAX {
            Extent::UpTo(end)
        } else {
            Extent::Whole
        };
        let counts = self.counts.local();
        loop {
            let mut missed = false;
            let frame = self.frame_cache.get_or_insert_with(&key, || {
                missed = true;
                let file = self.file(&place.pack)?;
                let hint = place.location.frame_len_hint();
                let near = place
                    .pack
                    .reads
                    .before(&file, u64::from(key.1), hint as u64);
                // Who goes through a pack wants what is behind.
                let extent = if near { Extent::Whole } else { extent };
                let frame = read_some(&file, &place.pack, key.1, hint, extent)?;
                counts.frame_misses.bump();
                counts.read_bytes.add(hint as u64);
                counts.decompressed_bytes.add(frame.raw.len() as u64);
                Ok(Arc::new(frame))
            })?;
            let range = frame.range_of(place, digest)?;
            if end <= frame.raw.len() {
                if !missed {
                    counts.frame_hits.bump();
                }
                let range = range.start..range.end.min(frame.raw.len());
                return Ok(PieceBytes { frame, range });
            }
            // A part, decompressed for somebody else. Once only: the next time it is the whole.
            extent = Extent::Whole;
            self.frame_cache
                .remove_if(&key, |held| Arc::ptr_eq(held, &frame));
        }
    }

    /// Returns a piece that must be of this kind.
    pub(crate) fn piece_of_kind(
        &self,
        place: &Place,
        digest: &Digest,
        kind: Kind,
    ) -> Result<PieceBytes, CastoreError> {
        match place.location.kind() {
            Some(found) if found == kind => self.piece(place, digest),
            found => Err(CastoreError::corrupt(
                format!("index entry of {digest}"),
                format!("expected kind {kind:?}, found {found:?}"),
            )),
        }
    }
}

/// Reads and verifies one frame. `hint` is its length or a little more.
pub(crate) fn read_frame(
    file: &File,
    pack: &Pack,
    offset: u32,
    hint: usize,
) -> Result<Frame, CastoreError> {
    pack.reads.before(file, u64::from(offset), hint as u64);
    read_some(file, pack, offset, hint, Extent::Whole)
}

/// Reads and verifies one frame, and decompresses it, or a part.
fn read_some(
    file: &File,
    pack: &Pack,
    offset: u32,
    hint: usize,
    extent: Extent,
) -> Result<Frame, CastoreError> {
    let corrupt = |reason: String| CastoreError::corrupt(frame_name(pack, offset), reason);
    SCRATCH.with_borrow_mut(|scratch| {
        let Scratch { buffer, zstd } = scratch;
        if buffer.len() < hint {
            buffer.resize(hint, 0);
        }
        let mut have =
            read_up_to(file, &mut buffer[..hint], u64::from(offset)).verb("reading", &pack.path)?;
        let header = FrameHeader::decode(&buffer[..have]).map_err(corrupt)?;
        let (header_len, frame_len) = (header.header_len(), header.frame_len());
        if have < frame_len {
            if buffer.len() < frame_len {
                buffer.resize(frame_len, 0);
            }
            let at = u64::from(offset) + have as u64;
            have +=
                read_up_to(file, &mut buffer[have..frame_len], at).verb("reading", &pack.path)?;
        }
        if have < frame_len {
            return Err(corrupt(format!("expected {frame_len} bytes, found {have}")));
        }
        let pieces = pack::decode_frame_table(&header, &buffer[..header_len]).map_err(corrupt)?;
        let payload = &buffer[header_len..frame_len];
        pack::check_payload(&header, payload).map_err(corrupt)?;
        let raw_len = header.raw_len as usize;
        let raw = match header.codec {
            Codec::Raw => payload.to_vec(),
            Codec::Zstd => {
                let zstd = zstd.get_or_insert_with(DCtx::create);
                decompress(zstd, payload, raw_len, extent).map_err(corrupt)?
            }
        };
        if buffer.len() > READ_BUFFER_BYTES_KEPT {
            *buffer = Vec::new();
        }
        Ok(Frame::new(raw, pieces))
    })
}

/// Decompresses a payload that gives `raw_len` bytes; says what is wrong.
fn decompress(
    zstd: &mut DCtx<'_>,
    payload: &[u8],
    raw_len: usize,
    extent: Extent,
) -> Result<Vec<u8>, String> {
    let failed = |code| format!("decompressing: {}", zstd_safe::get_error_name(code));
    let (expected, decompressed) = match extent {
        Extent::UpTo(end) if end <= raw_len - raw_len / PARTS => {
            let mut raw = Vec::with_capacity(end);
            zstd.reset(ResetDirective::SessionOnly).map_err(failed)?;
            let mut output = OutBuffer::around(&mut raw);
            let mut input = InBuffer::around(payload);
            // Both are whole: it stops where one of them ends.
            zstd.decompress_stream(&mut output, &mut input)
                .map_err(failed)?;
            (end, raw)
        }
        _ => {
            let mut raw = Vec::with_capacity(raw_len);
            zstd.decompress(&mut raw, payload).map_err(failed)?;
            (raw_len, raw)
        }
    };
    if decompressed.len() != expected {
        return Err(format!(
            "expected {expected} uncompressed bytes, found {}",
            decompressed.len()
        ));
    }
    Ok(decompressed)
}

fn read_up_to(file: &File, buffer: &mut [u8], offset: u64) -> std::io::Result<usize> {
    let mut have = 0;
    while have < buffer.len() {
        match file.read_at(&mut buffer[have..], offset + have as u64) {
            Ok(0) => break,
            Ok(count) => have += count,
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(have)
}
