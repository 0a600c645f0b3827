//! Patched pieces: blobs that are kept as other bytes and a list of what to put back. Pure.
//!
//! A *hash part* is the 32 characters by which Nix tells store paths from each other. A rebuilt file often
//! differs from the last one in nothing else, so its hash parts are replaced by [`FILLER`] before it
//! is cut and deduplicated. What was there is kept here: the distinct hash parts and where each stood.
//! The piece lies under the digest of the real bytes; the masked bytes are an ordinary blob under
//! their own.
//!
//! ```text
//! u8      version, 1
//! 32      digest of the masked bytes
//! varint  bytes of the blob, the same masked or not
//! varint  number of distinct hash parts t, at least 1
//! 20 × t  hash parts, 5 bits a character, in the order in which they are first used
//! varint  number of patches n, at least t
//! n ×     varint: bytes between the end of the last patch and this one
//!         varint: number of the hash part, if t > 1
//! ```
//! A varint is little-endian, 7 bits a byte, the shortest that holds the number. One list of patches
//! has one encoding.

use crate::digest::Digest;
use std::collections::HashMap;

/// Characters of a hash part.
pub(crate) const HASH_PART_BYTES: usize = 32;
/// What stands in the masked bytes. `e` is no nix32 character, so it is never taken for a hash part
/// itself; Nix's own tools write it, too, where they remove a reference.
pub(crate) const FILLER: [u8; HASH_PART_BYTES] = [b'e'; HASH_PART_BYTES];
/// Patches of one blob: what is behind stays as it is. A list of a closure of 50,000 paths fits; an open
/// blob's patches take a megabyte at most.
pub(crate) const PATCHES_MAX: usize = 65_536;
/// An encoded piece: each patch with a hash part of its own and the longest varints.
pub(crate) const PATCH_PIECE_BYTES_MAX: usize =
    64 + PATCHES_MAX * (PACKED_BYTES + VARINT_BYTES_MAX + 3);

const VERSION: u8 = 1;
const PACKED_BYTES: usize = HASH_PART_BYTES * 5 / 8;
const VARINT_BYTES_MAX: usize = 10;
const ALPHABET: &[u8; 32] = b"0123456789abcdfghijklmnpqrsvwxyz";
const INVALID: u8 = 0xff;
const VALUES: [u8; 256] = {
    let mut values = [INVALID; 256];
    let mut value = 0;
    while value < 32 {
        values[ALPHABET[value as usize] as usize] = value;
        value += 1;
    }
    values
};

/// A hash part as it stands in a file.
pub(crate) type HashPart = [u8; HASH_PART_BYTES];

/// True for a character of a hash part.
pub(crate) fn is_digit(byte: u8) -> bool {
    VALUES[usize::from(byte)] != INVALID
}

/// The patches of one blob, decoded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Patches {
    /// Digest of the masked bytes.
    pub(crate) masked: Digest,
    /// Bytes of the blob.
    pub(crate) size: u64,
    hash_parts: Vec<HashPart>,
    /// Where each begins, and the number of its hash part; they do not overlap.
    list: Vec<(u64, u32)>,
}

/// Returns the digest and size of the masked bytes that a patched piece stands on, as a collection
/// needs them; says what is wrong with it.
pub(crate) fn masked_blob(bytes: &[u8]) -> Result<(Digest, u64), String> {
    let mut input = Input { bytes };
    input.head()
}

impl Patches {
    /// What it takes of memory.
    pub(crate) fn memory_bytes(&self) -> u64 {
        let hash_parts = self.hash_parts.capacity() * size_of::<HashPart>();
        (hash_parts + self.list.capacity() * size_of::<(u64, u32)>()) as u64
    }

    /// Reads a patched piece; says what is wrong with it. Whatever the bytes are, memory is bounded
    /// by [`PATCHES_MAX`], and patches lie within the blob and do not overlap.
    pub(crate) fn decode(bytes: &[u8]) -> Result<Self, String> {
        let mut input = Input { bytes };
        let (masked, size) = input.head()?;
        let hash_part_count = input.count("hash parts")?;
        let packed = input.take(hash_part_count * PACKED_BYTES)?;
        let hash_parts: Vec<HashPart> = packed.chunks_exact(PACKED_BYTES).map(unpack).collect();
        let patch_count = input.count("patches")?;
        if hash_part_count > patch_count {
            return Err(format!(
                "expected at most {patch_count} hash parts, found {hash_part_count}"
            ));
        }
        let mut list = Vec::with_capacity(patch_count);
        let (mut end, mut used) = (0_u64, 0);
        for number in 0..patch_count {
            let gap = input.varint()?;
            let part = if hash_part_count > 1 {
                input.varint()?
            } else {
                0
            };
            let start = end
                .checked_add(gap)
                .filter(|start| {
                    start
                        .checked_add(HASH_PART_BYTES as u64)
                        .is_some_and(|end| end <= size)
                })
                .ok_or_else(|| format!("patch {number} ends behind the blob's {size} bytes"))?;
            // In the order of first use: the next new one, or one that was used.
            if part > used || part >= hash_part_count as u64 {
                return Err(format!(
                    "patch {number}: expected a hash part of at most {used}, found {part}"
                ));
            }
            used = used.max(part + 1);
            list.push((start, part as u32));
            end = start + HASH_PART_BYTES as u64;
        }
        if used != hash_part_count as u64 {
            return Err(format!(
                "expected {hash_part_count} hash parts to be used, found {used}"
            ));
        }
        if !input.bytes.is_empty() {
            return Err(format!("{} bytes behind the last patch", input.bytes.len()));
        }
        Ok(Self {
            masked,
            size,
            hash_parts,
            list,
        })
    }

    /// Puts back what belongs into `buffer`, which holds the masked bytes from `offset` on.
    pub(crate) fn apply(&self, offset: u64, buffer: &mut [u8]) {
        self.for_overlaps(offset, buffer.len(), &mut |part, from, to, len| {
            buffer[to..to + len].copy_from_slice(&self.hash_parts[part][from..from + len]);
        });
    }

    /// The opposite: puts the filler where the patches say.
    pub(crate) fn mask(&self, buffer: &mut [u8]) {
        self.for_overlaps(0, buffer.len(), &mut |_, from, to, len| {
            buffer[to..to + len].copy_from_slice(&FILLER[from..from + len]);
        });
    }

    /// Calls `each` for what lies within `len` bytes from `offset` on: number of the hash part, where
    /// in it that begins, where it belongs, its length.
    fn for_overlaps(
        &self,
        offset: u64,
        len: usize,
        each: &mut dyn FnMut(usize, usize, usize, usize),
    ) {
        let end = offset.saturating_add(len as u64);
        let first = self
            .list
            .partition_point(|(start, _)| start + HASH_PART_BYTES as u64 <= offset);
        for (start, part) in &self.list[first..] {
            if *start >= end {
                break;
            }
            let from = offset.saturating_sub(*start);
            let at = start + from;
            let len = (start + HASH_PART_BYTES as u64).min(end) - at;
            each(
                *part as usize,
                from as usize,
                (at - offset) as usize,
                len as usize,
            );
        }
    }
}

/// Collects the patches of one blob, in order.
#[derive(Default)]
pub(crate) struct PatchBuilder {
    numbers: HashMap<HashPart, u32>,
    /// Packed, in the order of first use.
    hash_parts: Vec<u8>,
    list: Vec<(u64, u32)>,
}

impl PatchBuilder {
    /// Notes what stands at `offset`; patches come in rising order and do not overlap.
    ///
    /// # Panics
    /// In debug builds, if they do not.
    pub(crate) fn push(&mut self, offset: u64, hash_part: &HashPart) {
        debug_assert!(
            self.list
                .last()
                .is_none_or(|(last, _)| last + HASH_PART_BYTES as u64 <= offset)
        );
        let next = self.numbers.len() as u32;
        let number = *self.numbers.entry(*hash_part).or_insert_with(|| {
            self.hash_parts.extend_from_slice(&pack(hash_part));
            next
        });
        self.list.push((offset, number));
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.list.is_empty()
    }
    pub(crate) fn is_full(&self) -> bool {
        self.list.len() >= PATCHES_MAX
    }
    /// True if a patch begins in that range.
    pub(crate) fn has_in(&self, range: std::ops::Range<u64>) -> bool {
        let first = self.list.partition_point(|(at, _)| *at < range.start);
        self.list.get(first).is_some_and(|(at, _)| *at < range.end)
    }

    /// The encoded piece for a blob of `size` bytes whose masked bytes have that digest.
    pub(crate) fn encode(&self, masked: &Digest, size: u64) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(64 + self.hash_parts.len() + self.list.len() * 4);
        bytes.push(VERSION);
        bytes.extend_from_slice(&masked.0);
        put_varint(&mut bytes, size);
        put_varint(&mut bytes, self.numbers.len() as u64);
        bytes.extend_from_slice(&self.hash_parts);
        put_varint(&mut bytes, self.list.len() as u64);
        let mut end = 0;
        for (offset, number) in &self.list {
            put_varint(&mut bytes, offset - end);
            if self.numbers.len() > 1 {
                put_varint(&mut bytes, u64::from(*number));
            }
            end = offset + HASH_PART_BYTES as u64;
        }
        bytes
    }
}

/// What is left to decode.
struct Input<'a> {
    bytes: &'a [u8],
}

impl<'a> Input<'a> {
    fn take(&mut self, len: usize) -> Result<&'a [u8], String> {
        let (taken, rest) = self
            .bytes
            .split_at_checked(len)
            .ok_or_else(|| format!("expected {len} more bytes, found {}", self.bytes.len()))?;
        self.bytes = rest;
        Ok(taken)
    }

    fn head(&mut self) -> Result<(Digest, u64), String> {
        if self.bytes.len() > PATCH_PIECE_BYTES_MAX {
            return Err(format!(
                "expected at most {PATCH_PIECE_BYTES_MAX} bytes, found {}",
                self.bytes.len()
            ));
        }
        let version = self.take(1)?[0];
        if version != VERSION {
            return Err(format!(
                "not a patched piece of version {VERSION}: found {version}"
            ));
        }
        let mut digest = [0; 32];
        digest.copy_from_slice(self.take(32)?);
        Ok((Digest(digest), self.varint()?))
    }

    fn count(&mut self, what: &str) -> Result<usize, String> {
        match self.varint()? {
            count @ 1.. if count <= PATCHES_MAX as u64 => Ok(count as usize),
            count => Err(format!("expected 1 to {PATCHES_MAX} {what}, found {count}")),
        }
    }

    fn varint(&mut self) -> Result<u64, String> {
        let mut number = 0_u64;
        for at in 0..VARINT_BYTES_MAX {
            let byte = self.take(1)?[0];
            let bits = u64::from(byte & 0x7f);
            let shift = 7 * at as u32;
            if bits << shift >> shift != bits || (byte == 0 && at > 0) {
                break;
            }
            number |= bits << shift;
            if byte < 0x80 {
                return Ok(number);
            }
        }
        Err("a number that is too large, or longer than it need be".to_owned())
    }
}

fn put_varint(bytes: &mut Vec<u8>, mut number: u64) {
    while number >= 0x80 {
        bytes.push(number as u8 | 0x80);
        number >>= 7;
    }
    bytes.push(number as u8);
}

/// Eight characters are 40 bits, the first the lowest.
fn pack(hash_part: &HashPart) -> [u8; PACKED_BYTES] {
    let mut packed = [0; PACKED_BYTES];
    for (text, out) in hash_part.chunks_exact(8).zip(packed.chunks_exact_mut(5)) {
        let bits = text.iter().rev().fold(0_u64, |bits, byte| {
            bits << 5 | u64::from(VALUES[usize::from(*byte)] & 31)
        });
        out.copy_from_slice(&bits.to_le_bytes()[..5]);
    }
    packed
}

fn unpack(packed: &[u8]) -> HashPart {
    let mut hash_part = [0; HASH_PART_BYTES];
    for (bytes, text) in packed.chunks_exact(5).zip(hash_part.chunks_exact_mut(8)) {
        let mut bits = [0; 8];
        bits[..5].copy_from_slice(bytes);
        let bits = u64::from_le_bytes(bits);
        for (at, out) in text.iter_mut().enumerate() {
            *out = ALPHABET[(bits >> (5 * at)) as usize & 31];
        }
    }
    hash_part
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn any_hash_part() -> impl Strategy<Value = HashPart> {
        proptest::array::uniform32(0_usize..32).prop_map(|values| values.map(|at| ALPHABET[at]))
    }

    /// Gaps, and which of the hash parts stands behind each.
    fn any_patches() -> impl Strategy<Value = (Vec<HashPart>, Vec<(u64, usize)>)> {
        (
            proptest::collection::vec(any_hash_part(), 1..6),
            proptest::collection::vec((0_u64..300, any::<usize>()), 1..40),
        )
    }

    fn build(parts: &[HashPart], gaps: &[(u64, usize)], tail: u64) -> (Vec<u8>, Vec<u8>, Vec<u8>) {
        let (mut builder, mut real) = (PatchBuilder::default(), Vec::new());
        for (gap, at) in gaps {
            real.resize(real.len() + *gap as usize, b'-');
            let part = &parts[at % parts.len()];
            builder.push(real.len() as u64, part);
            real.extend_from_slice(part);
        }
        real.resize(real.len() + tail as usize, b'-');
        let masked = real
            .iter()
            .map(|byte| if *byte == b'-' { *byte } else { b'e' })
            .collect::<Vec<_>>();
        let piece = builder.encode(&Digest::of(&masked), real.len() as u64);
        (piece, real, masked)
    }

    #[test]
    fn golden() {
        let (piece, ..) = build(
            &[*b"0123456789abcdfghijklmnpqrsvwxyz"],
            &[(11, 0), (300, 0)],
            3,
        );
        assert_eq!(piece[0], 1);
        // 378 bytes, one hash part, two patches.
        assert_eq!(piece[33..36], [0xfa, 0x02, 1]);
        assert_eq!(piece[36..41], [0x20, 0x88, 0x41, 0x8a, 0x39]);
        assert_eq!(piece[56..], [2, 11, 0xac, 0x02]);
        assert_eq!(masked_blob(&piece).unwrap().1, 378);
    }

    proptest! {
        #[test]
        fn patches_come_back((parts, gaps) in any_patches(), tail in 0_u64..50) {
            let (piece, real, masked) = build(&parts, &gaps, tail);
            let patches = Patches::decode(&piece).unwrap();
            prop_assert_eq!(masked_blob(&piece).unwrap(), (patches.masked, patches.size));
            prop_assert_eq!(patches.size, real.len() as u64);
            let mut bytes = masked.clone();
            patches.apply(0, &mut bytes);
            prop_assert!(bytes == real);
            patches.mask(&mut bytes);
            prop_assert!(bytes == masked);
        }

        #[test]
        fn any_range_is_patched((parts, gaps) in any_patches(), from: usize, len: usize) {
            let (piece, real, masked) = build(&parts, &gaps, 7);
            let from = from % real.len();
            let to = from + len % (real.len() - from + 1);
            let mut bytes = masked[from..to].to_vec();
            Patches::decode(&piece).unwrap().apply(from as u64, &mut bytes);
            prop_assert!(bytes == real[from..to]);
        }

        #[test]
        fn what_is_cut_or_longer_is_refused((parts, gaps) in any_patches(), cut: usize, more: u8) {
            let (mut piece, ..) = build(&parts, &gaps, 0);
            prop_assert!(Patches::decode(&piece[..cut % piece.len()]).is_err());
            piece.push(more);
            prop_assert!(Patches::decode(&piece).is_err());
        }

        /// What is taken has one encoding, lies within the blob and can be applied anywhere.
        #[test]
        fn any_bytes_are_safe(
            (parts, gaps) in any_patches(),
            flips in proptest::collection::vec((any::<usize>(), any::<u8>()), 0..4),
            raw: Vec<u8>,
            like: bool,
            offset: u64,
        ) {
            let mut bytes = if like { build(&parts, &gaps, 0).0 } else { raw };
            for (at, value) in flips {
                let len = bytes.len().max(1);
                if let Some(byte) = bytes.get_mut(at % len) {
                    *byte = value;
                }
            }
            if let Ok(patches) = Patches::decode(&bytes) {
                let mut buffer = vec![0; 100];
                patches.apply(offset % patches.size, &mut buffer);
                patches.apply(offset, &mut buffer);
                let mut builder = PatchBuilder::default();
                for (at, part) in &patches.list {
                    builder.push(*at, &patches.hash_parts[*part as usize]);
                }
                // Twice the same hash part in the table is read, and never written.
                if builder.numbers.len() == patches.hash_parts.len() {
                    prop_assert!(builder.encode(&patches.masked, patches.size) == bytes);
                }
            }
        }
    }
}
