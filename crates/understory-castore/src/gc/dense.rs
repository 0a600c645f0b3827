//! Like beside like: the order of data pieces in a dense repack.
//!
//! zstd finds in a frame only what the frame has, so a frame should hold what is alike: versions of a file from
//! several paths, headers that begin with the same licence. Pieces of all packs are *noted* first (where each lies,
//! and what tells its likeness; never its bytes), then ordered, then read in that order, a window at a time, and
//! written in frames of twice the usual size or more.
//!
//! **The order.** Small files are grouped by how they begin, groups and their members in the order of places, which
//! is that of paths and names; chunks of large files keep that order. Then each piece, in that order, joins the
//! first that it shares [`AGREEING_MIN`] of its [`FEATURES`] with: the minima of several hashes over places that
//! the content itself picks, of which two pieces share as many as they have bytes in common (min-hash). What is
//! like nothing stays where it is, so that a path's files are not further apart than they must be.
//!
//! Memory: 48 bytes for a noted piece, and about 100 more for its features while the order is made, at most
//! [`NOTED_MAX`] pieces and one pack's; [`WINDOW_BYTES`] of contents. Cost: each frame is decompressed once to note
//! its pieces, and once more for each window that needs some of them: 1 GB/s a core, where zstd -9 compresses 50 MB/s.

use super::rewrite::Pool;
use crate::Digest;
use crate::core::{Core, Pack};
use crate::error::CastoreError;
use crate::frames::{frame_name, read_frame};
use crate::log::pack_bytes_max;
use crate::pack::{BuildKeyHasher, FRAME_PIECES_MAX, FRAME_RAW_BYTES_FAR, Kind, Piece};
use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;
use xxhash_rust::xxh3::xxh3_64;

/// Pieces that are ordered together: 80 MB of memory with the order in the making.
const NOTED_MAX: usize = 1 << 19;
/// Their contents, in full packs: 16 GiB. Old packs stay until all of these are in new ones: some 5 GB of disk.
const NOTED_PACKS_MAX: u64 = 64;
/// Contents that are read at once. What one window needs of a frame costs one decompression.
const WINDOW_BYTES: usize = 64 << 20;
/// Bytes read for a frame at first: most are shorter.
const FRAME_READ_BYTES: usize = 64 << 10;
/// How many hashes have their minimum taken. Eight find no more than four.
const FEATURES: usize = 4;
/// How many of them two pieces must share. With one, much joins that has little in common, away from its path: on a
/// third of the corpus that made the store larger, and reads of whole paths decompress twice as much.
const AGREEING_MIN: usize = 2;
/// A hash of the last 16 bytes counts if these bits of it are zero: at every 16th place of small files, ...
const SMALL_PLACES: u32 = 0xf << 24;
/// ... and at every 64th of chunks.
const CHUNK_PLACES: u32 = 0x3f << 24;
/// Multipliers that make several hashes of one: odd, and otherwise of no meaning.
const MULTIPLIERS: [u32; FEATURES] = [0x9e37_79b1, 0x85eb_ca77, 0xc2b2_ae3d, 0x27d4_eb2f];
/// Small files are grouped by so many of their first bytes.
const BEGINNINGS: [usize; 4] = [8, 32, 128, 512];
/// Chunks come behind small files.
const CHUNK_RANK: u128 = u128::MAX;
/// A feature of a piece without any.
const NO_FEATURE: u32 = u32::MAX;

/// Pieces of several packs that wait for their order.
#[derive(Default)]
pub(super) struct Dense {
    packs: Vec<Arc<Pack>>,
    noted: Vec<Noted>,
    bytes: u64,
    bytes_max: u64,
    /// Uncompressed bytes that a frame is filled up to.
    frame_bytes_max: usize,
    /// How many are written; the rest is in order as soon as one is.
    written: usize,
    written_bytes: u64,
}

/// A piece that waits.
struct Noted {
    /// What it is ordered by; before that, how it begins or that it is a chunk.
    rank: u128,
    features: [u32; FEATURES],
    /// Its pack, by number, and the frame's place in it.
    frame: (u32, u32),
    /// Its place in the frame.
    offset: u32,
    len: u32,
}

/// Where the bytes of a piece are to go.
struct Slot<'a> {
    noted: &'a Noted,
    piece: &'a mut Piece,
    bytes: &'a mut [u8],
}

impl Dense {
    pub(super) fn new(core: &Core, frame_bytes_max: usize) -> Self {
        Self {
            frame_bytes_max: frame_bytes_max.min(FRAME_RAW_BYTES_FAR),
            bytes_max: NOTED_PACKS_MAX * pack_bytes_max(core),
            ..Self::default()
        }
    }

    /// Notes a piece that lies in a frame of `pack`.
    pub(super) fn note(
        &mut self,
        pack: &Arc<Pack>,
        frame: u32,
        offset: u32,
        bytes: &[u8],
        is_chunk: bool,
    ) {
        if self.packs.last().is_none_or(|last| last.id != pack.id) {
            self.packs.push(Arc::clone(pack));
        }
        let (rank, places) = if is_chunk {
            (CHUNK_RANK, CHUNK_PLACES)
        } else {
            (beginning(bytes), SMALL_PLACES)
        };
        self.bytes += bytes.len() as u64;
        self.noted.push(Noted {
            rank,
            features: features(bytes, places),
            frame: (self.packs.len() as u32 - 1, frame),
            offset,
            len: bytes.len() as u32,
        });
    }

    /// True if what is noted should be written before more is.
    pub(super) fn is_full(&self) -> bool {
        self.noted.len() >= NOTED_MAX || self.bytes >= self.bytes_max
    }

    /// Thousandths of the noted bytes that are written.
    pub(super) fn written_permille(&self) -> u64 {
        self.written_bytes * 1000 / self.bytes.max(1)
    }

    /// Reads the next frames; none if nothing is left, and then notes begin anew.
    pub(super) fn next_frames(
        &mut self,
        core: &Core,
        threads: usize,
    ) -> Result<Vec<Pool>, CastoreError> {
        if self.written == 0 {
            put_in_order(&mut self.noted);
        }
        let cuts = self.cut_window();
        if cuts.is_empty() {
            *self = Self::new(core, self.frame_bytes_max);
            return Ok(Vec::new());
        }
        let mut frames: Vec<Pool> = cuts
            .iter()
            .map(|cut| Pool::of_size(&self.noted[cut.clone()]))
            .collect();
        let mut slots: Vec<Slot<'_>> = Vec::new();
        for (cut, frame) in cuts.into_iter().zip(&mut frames) {
            let mut rest = &mut frame.raw[..];
            for (noted, piece) in self.noted[cut].iter().zip(&mut frame.pieces) {
                let (bytes, behind) = std::mem::take(&mut rest).split_at_mut(noted.len as usize);
                rest = behind;
                slots.push(Slot {
                    noted,
                    piece,
                    bytes,
                });
            }
        }
        fill(core, &self.packs, slots, threads)?;
        for frame in &frames {
            self.written += frame.pieces.len();
            self.written_bytes += frame.raw.len() as u64;
        }
        Ok(frames)
    }

    /// What the next frames hold, up to a window.
    fn cut_window(&self) -> Vec<Range<usize>> {
        let mut cuts = Vec::new();
        let mut window_bytes = 0;
        let mut at = self.written;
        while at < self.noted.len() && window_bytes < WINDOW_BYTES {
            let mut frame_bytes = 0;
            let len = self.noted[at..]
                .iter()
                .take(FRAME_PIECES_MAX)
                .take_while(|noted| {
                    frame_bytes += noted.len as usize;
                    frame_bytes <= self.frame_bytes_max
                })
                .count()
                .max(1);
            cuts.push(at..at + len);
            window_bytes += frame_bytes;
            at += len;
        }
        cuts
    }
}

impl Pool {
    /// One with room for these pieces, and nothing in it yet.
    fn of_size(noted: &[Noted]) -> Self {
        let nothing = Piece {
            digest: Digest::EMPTY,
            kind: Kind::Data,
            len: 0,
        };
        Self {
            pieces: vec![nothing; noted.len()],
            raw: vec![0; noted.iter().map(|noted| noted.len as usize).sum()],
        }
    }
}

/// Reads what the slots want, each frame once.
fn fill(
    core: &Core,
    packs: &[Arc<Pack>],
    mut slots: Vec<Slot<'_>>,
    threads: usize,
) -> Result<(), CastoreError> {
    slots.sort_unstable_by_key(|slot| slot.noted.frame);
    let share = slots.len().div_ceil(threads.max(1)).max(1);
    std::thread::scope(|scope| {
        let mut readers = Vec::new();
        let mut rest = &mut slots[..];
        while !rest.is_empty() {
            let last = rest[share.min(rest.len()) - 1].noted.frame;
            let cut = rest.partition_point(|slot| slot.noted.frame <= last);
            let (part, behind) = std::mem::take(&mut rest).split_at_mut(cut);
            rest = behind;
            readers.push(scope.spawn(move || {
                part.chunk_by_mut(|a, b| a.noted.frame == b.noted.frame)
                    .try_for_each(|slots| fill_from_frame(core, packs, slots))
            }));
        }
        readers.into_iter().try_for_each(|reader| {
            reader
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    })
}

/// Reads what slots want of one frame.
fn fill_from_frame(
    core: &Core,
    packs: &[Arc<Pack>],
    slots: &mut [Slot<'_>],
) -> Result<(), CastoreError> {
    let Some(first) = slots.first() else {
        return Ok(());
    };
    let (pack, offset) = first.noted.frame;
    let pack = &packs[pack as usize];
    let file = core.file(pack)?;
    // It was sound when its pieces were noted; if it is not now, the next collection deals with it.
    let frame = read_frame(&file, pack, offset, FRAME_READ_BYTES).inspect_err(|error| {
        if matches!(error, CastoreError::Corrupt { .. }) {
            core.set_bad(pack, offset);
        }
    })?;
    for slot in slots {
        let (piece, bytes) = frame
            .piece_at(slot.noted.offset)
            .filter(|(piece, _)| piece.len == slot.noted.len)
            .ok_or_else(|| {
                CastoreError::corrupt(
                    frame_name(pack, offset),
                    format!(
                        "expected a piece of {} bytes at {}, as there was a moment ago",
                        slot.noted.len, slot.noted.offset
                    ),
                )
            })?;
        *slot.piece = *piece;
        slot.bytes.copy_from_slice(bytes);
    }
    Ok(())
}

/// Orders pieces so that like ones are neighbours.
fn put_in_order(noted: &mut [Noted]) {
    noted.sort_unstable_by_key(|noted| (noted.frame, noted.offset));
    rank_by_beginning(noted);
    noted.sort_unstable_by_key(|noted| (noted.rank, noted.frame, noted.offset));
    let mut groups: HashMap<u64, u32, BuildKeyHasher> = HashMap::default();
    let mut next_group = 0;
    for (place, piece) in noted.iter_mut().enumerate() {
        let keys = || {
            piece
                .features
                .iter()
                .zip(0_u64..)
                .filter(|(feature, _)| **feature != NO_FEATURE)
                .map(|(feature, number)| number << 32 | u64::from(*feature))
        };
        let found: Vec<u32> = keys().filter_map(|key| groups.get(&key).copied()).collect();
        let votes = |group: &u32| found.iter().filter(|other| *other == group).count();
        let group = found
            .iter()
            .filter(|group| votes(group) >= AGREEING_MIN)
            .max_by_key(|group| (votes(group), std::cmp::Reverse(**group)))
            .copied()
            .unwrap_or_else(|| {
                next_group += 1;
                next_group - 1
            });
        for key in keys() {
            groups.entry(key).or_insert(group);
        }
        piece.rank = u128::from(group) << 64 | place as u128;
    }
    noted.sort_unstable_by_key(|noted| noted.rank);
}

/// Puts those that begin with the same 8 bytes behind the first of them, among these those with the same 32, ...
/// So what is not alike stays where it was, beside the rest of its path.
fn rank_by_beginning(noted: &mut [Noted]) {
    let mut firsts: HashMap<u64, u32, BuildKeyHasher> = HashMap::default();
    for (place, piece) in (0_u32..).zip(noted) {
        if piece.rank == CHUNK_RANK {
            continue;
        }
        let hashes = piece.rank;
        piece.rank = 0;
        for level in 0..BEGINNINGS.len() as u32 {
            let hash = (hashes >> (32 * level)) as u32;
            let key = u64::from(level) << 32 | u64::from(hash);
            let first = *firsts.entry(key).or_insert(place);
            piece.rank = piece.rank << 32 | u128::from(first);
        }
    }
}

/// Hashes of the first bytes, the shortest run in the lowest bits.
fn beginning(bytes: &[u8]) -> u128 {
    let hash = |len: usize| xxh3_64(&bytes[..bytes.len().min(len)]) as u32;
    BEGINNINGS
        .iter()
        .rev()
        .fold(0, |hashes, len| hashes << 32 | u128::from(hash(*len)))
}

/// What tells likeness: see the module.
fn features(bytes: &[u8], places: u32) -> [u32; FEATURES] {
    let mut features = [NO_FEATURE; FEATURES];
    let mut hash = 0_u32;
    for byte in bytes {
        // Two bits a byte: what was 16 bytes ago is gone.
        hash = (hash << 2).wrapping_add(BYTE_HASHES[*byte as usize]);
        if hash & places == 0 {
            for (feature, multiplier) in features.iter_mut().zip(MULTIPLIERS) {
                let mixed = hash.wrapping_mul(multiplier);
                *feature = (*feature).min((mixed ^ mixed >> 15).wrapping_mul(multiplier));
            }
        }
    }
    features
}

/// A random number for each byte.
const BYTE_HASHES: [u32; 256] = {
    let mut hashes = [0; 256];
    let mut state = 0x9e37_79b9_u32;
    let mut at = 0;
    while at < hashes.len() {
        // Marsaglia's xorshift: any sequence of full period does.
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        hashes[at] = state;
        at += 1;
    }
    hashes
};

#[cfg(test)]
mod tests {
    use super::*;

    fn noise(seed: u32, len: usize) -> Vec<u8> {
        let mut state = seed.wrapping_mul(0x9e37_79b9) | 1;
        let next = |_| {
            state ^= state << 13;
            state ^= state >> 17;
            state ^= state << 5;
            (state >> 24) as u8
        };
        (0..len).map(next).collect()
    }

    fn noted(number: u32, bytes: &[u8], is_chunk: bool) -> Noted {
        let mut dense = Dense::default();
        let places = if is_chunk { CHUNK_PLACES } else { SMALL_PLACES };
        dense.noted.push(Noted {
            rank: if is_chunk {
                CHUNK_RANK
            } else {
                beginning(bytes)
            },
            features: features(bytes, places),
            frame: (0, number),
            offset: 0,
            len: bytes.len() as u32,
        });
        dense.noted.remove(0)
    }

    fn order(mut pieces: Vec<Noted>) -> Vec<u32> {
        put_in_order(&mut pieces);
        pieces.iter().map(|piece| piece.frame.1).collect()
    }

    #[test]
    fn versions_of_a_file_are_neighbours_wherever_they_differ() {
        let version = |family: u32, change: usize| {
            let mut bytes = noise(family, 9_000);
            let with = noise(1_000 + change as u32, 200);
            bytes[change * 700..][..200].copy_from_slice(&with);
            bytes
        };
        for is_chunk in [false, true] {
            let mut pieces = Vec::new();
            for change in 0..6 {
                for family in 0..20 {
                    pieces.push(noted(family, &version(family, change), is_chunk));
                }
            }
            let mut families = order(pieces);
            families.dedup();
            assert_eq!(families.len(), 20, "{families:?}");
        }
    }

    #[test]
    fn chunks_that_are_like_nothing_keep_their_order() {
        let pieces = (0..50).map(|number| noted(number, &noise(number, 5_000), true));
        assert_eq!(order(pieces.collect()), (0..50).collect::<Vec<_>>());
    }

    #[test]
    fn pieces_of_a_few_bytes_are_ordered_by_them() {
        let pieces = (0..60).map(|number| noted(number % 3, &[number as u8 % 3; 5], false));
        let mut kinds = order(pieces.collect());
        kinds.dedup();
        assert_eq!(kinds.len(), 3);
    }

    #[test]
    fn a_window_is_cut_into_frames_of_the_size_that_was_asked_for() {
        let mut dense = Dense {
            frame_bytes_max: 256 << 10,
            ..Dense::default()
        };
        for (number, len) in [200_000, 100_000, 1, 262_144, 262_144, 5]
            .into_iter()
            .enumerate()
        {
            dense.noted.push(Noted {
                rank: number as u128,
                features: [NO_FEATURE; FEATURES],
                frame: (0, 0),
                offset: 0,
                len,
            });
        }
        assert_eq!(dense.cut_window(), [0..1, 1..3, 3..4, 4..5, 5..6]);
        dense.frame_bytes_max = 600_000;
        assert_eq!(dense.cut_window(), [0..4, 4..6]);
        dense.noted.truncate(1);
        dense.noted[0].len = 1;
        for _ in 0..FRAME_PIECES_MAX {
            let [first, ..] = &dense.noted[..] else {
                panic!()
            };
            let again = Noted {
                features: first.features,
                ..*first
            };
            dense.noted.push(again);
        }
        let cuts = dense.cut_window();
        assert_eq!(
            cuts,
            [0..FRAME_PIECES_MAX, FRAME_PIECES_MAX..FRAME_PIECES_MAX + 1]
        );
    }
}
