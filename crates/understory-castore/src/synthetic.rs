//! Packs without contents, for measurements of the index at a size that no machine has content for.
//!
//! Header, footer and trailer are real; where the frames should be is a hole of the sparse file. So everything that
//! works on indexes is the real thing (opening, merging, looking up), and nothing can be read.

use crate::core::random_id;
use crate::error::IoContext;
use crate::log::PACK_PIECES_MAX;
use crate::pack::{self, Class, Kind, Location, PACK_HEADER_BYTES, PackId, Piece, Trailer};
use crate::{Castore, CastoreError, Digest};
use std::os::unix::fs::FileExt;

/// Pieces of one frame, its length in the pack and that of each piece: as those of usual trees are.
const FRAME_PIECES: usize = 8;
const FRAME_BYTES: usize = 8 << 10;
const PIECE_BYTES: u32 = 4000;

/// Pieces that a pack can have.
pub const PIECES_MAX: usize = PACK_PIECES_MAX as usize;

/// Adds a sealed pack that claims to hold these data pieces, and merges the index as a writer does after a seal.
///
/// # Errors
/// I/O; no pieces, or more than [`PIECES_MAX`].
pub fn add_pack(castore: &Castore, digests: &[Digest]) -> Result<(), CastoreError> {
    if digests.is_empty() || digests.len() > PIECES_MAX {
        return Err(CastoreError::Invalid(format!(
            "a pack of {} pieces, at most {PIECES_MAX} fit",
            digests.len()
        )));
    }
    let core = castore.core();
    let pieces: Vec<_> = digests
        .iter()
        .enumerate()
        .map(|(number, digest)| {
            let piece = Piece {
                digest: *digest,
                kind: Kind::Data,
                len: PIECE_BYTES,
            };
            let frame = PACK_HEADER_BYTES + number / FRAME_PIECES * FRAME_BYTES;
            let offset = (number % FRAME_PIECES) as u32 * PIECE_BYTES;
            let location = Location::new(frame as u32, FRAME_BYTES, piece.kind, offset, piece.len);
            (piece.key(), location)
        })
        .collect();
    let frames = digests.len().div_ceil(FRAME_PIECES);
    let footer_offset = (PACK_HEADER_BYTES + frames * FRAME_BYTES) as u64;
    let mut end = pack::encode_footer(pieces);
    let trailer = Trailer {
        footer_offset,
        frames: frames as u32,
        pieces: digests.len() as u32,
        data_pieces: digests.len() as u32,
        raw_bytes: digests.len() as u64 * u64::from(PIECE_BYTES),
        stored_bytes: (frames * FRAME_BYTES) as u64,
        footer_checksum: xxhash_rust::xxh3::xxh3_64(&end),
        ..Trailer::default()
    };
    end.extend_from_slice(&trailer.encode());
    let id = PackId(random_id()?);
    let dir = core.packs_dir();
    let temporary = dir.join(format!("{id}.tmp"));
    let file = std::fs::File::create_new(&temporary).verb("creating", &temporary)?;
    file.write_all_at(&pack::encode_pack_header(id, pack::PACK_VERSION), 0)
        .and_then(|()| file.write_all_at(&end, footer_offset))
        .verb("writing", &temporary)?;
    let path = dir.join(id.file_name());
    std::fs::rename(&temporary, &path).verb("renaming", &temporary)?;
    core.refresh()?;
    core.tidy_index()
}

/// Looks a data piece up in the index, as a writer or a reader does: no I/O but page faults of mapped indexes.
pub fn has(castore: &Castore, digest: &Digest) -> bool {
    castore.core().find(digest, Class::Blob).is_some()
}
