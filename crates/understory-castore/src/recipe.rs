//! Recipes: the lists of chunks that large files consist of. Pure.
//!
//! A recipe is a tree of nodes of up to [`RECIPE_FANOUT`] entries, so that a file of terabytes needs
//! little memory to write and to read. An entry is a digest and the offset at which what it stands
//! for *ends*, counted from the start of its node: a search by offset is binary, on the encoded
//! bytes. Level 0 lists chunks, a higher level lists nodes of the level below.
//!
//! ```text
//! 0   u8      version, 1
//! 1   u8      level
//! 2   u16     0
//! 4   u32     number of entries n, at least 1
//! 8   n × 40  digest (32), end offset (u64)
//! ```

use crate::digest::Digest;
use crate::pack::{Kind, Piece, u32_at, u64_at};

/// Entries of one node: 160 KiB. At 32 KiB a chunk, one node covers 128 MiB, two levels 512 GiB.
pub(crate) const RECIPE_FANOUT: usize = 4096;
/// Levels: 4096⁵ chunks are more than 2⁶⁴ bytes.
const LEVELS_MAX: u8 = 5;
const VERSION: u8 = 1;
const HEADER_BYTES: usize = 8;
const ENTRY_BYTES: usize = 40;
/// Of the largest node.
pub(crate) const NODE_BYTES_MAX: usize = HEADER_BYTES + RECIPE_FANOUT * ENTRY_BYTES;

/// A view of an encoded node.
#[derive(Clone, Copy)]
pub(crate) struct RecipeNode<'a> {
    bytes: &'a [u8],
}

/// One entry of a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct RecipeEntry {
    pub(crate) digest: Digest,
    /// Where it begins, from the start of the node.
    pub(crate) start: u64,
    pub(crate) end: u64,
}

impl<'a> RecipeNode<'a> {
    /// Checks the bounds; says what is wrong. Ends are checked where they are used.
    pub(crate) fn new(bytes: &'a [u8]) -> Result<Self, String> {
        if bytes.len() < HEADER_BYTES + ENTRY_BYTES
            || bytes[0] != VERSION
            || bytes[1] >= LEVELS_MAX
            || bytes[2..4] != [0, 0]
            || u32_at(bytes, 4) as usize > RECIPE_FANOUT
            || bytes.len() != HEADER_BYTES + u32_at(bytes, 4) as usize * ENTRY_BYTES
        {
            return Err(format!(
                "not a recipe of version {VERSION}: {} bytes, beginning with `{}`",
                bytes.len(),
                bytes[..bytes.len().min(HEADER_BYTES)].escape_ascii()
            ));
        }
        Ok(Self { bytes })
    }

    pub(crate) fn level(&self) -> u8 {
        self.bytes[1]
    }
    pub(crate) fn count(&self) -> usize {
        u32_at(self.bytes, 4) as usize
    }
    /// Bytes of the file that it covers.
    pub(crate) fn total(&self) -> u64 {
        self.end(self.count() - 1)
    }
    fn end(&self, at: usize) -> u64 {
        u64_at(self.bytes, HEADER_BYTES + at * ENTRY_BYTES + 32)
    }
    pub(crate) fn entry(&self, at: usize) -> RecipeEntry {
        let place = HEADER_BYTES + at * ENTRY_BYTES;
        let mut digest = [0; 32];
        digest.copy_from_slice(&self.bytes[place..place + 32]);
        RecipeEntry {
            digest: Digest(digest),
            start: if at == 0 { 0 } else { self.end(at - 1) },
            end: self.end(at),
        }
    }
    /// The entry that holds the byte at `offset`; `None` behind the end.
    pub(crate) fn find(&self, offset: u64) -> Option<RecipeEntry> {
        let (mut low, mut high) = (0, self.count());
        while low < high {
            let middle = (low + high) / 2;
            if self.end(middle) <= offset {
                low = middle + 1;
            } else {
                high = middle;
            }
        }
        (low < self.count()).then(|| self.entry(low))
    }
    /// Says if an end is not after the one before.
    pub(crate) fn check_ends(&self) -> Result<(), String> {
        let mut last = 0;
        for at in 0..self.count() {
            let end = self.end(at);
            if end <= last {
                return Err(format!(
                    "entry {at} ends at {end}, the one before at {last}"
                ));
            }
            last = end;
        }
        Ok(())
    }
}

/// Collects the chunks of one file.
#[derive(Default)]
pub(crate) struct RecipeBuilder {
    levels: Vec<Vec<(Digest, u64)>>,
}

impl RecipeBuilder {
    /// Adds a chunk. `node` gets each inner node that is full.
    pub(crate) fn push<E>(
        &mut self,
        digest: Digest,
        len: u64,
        node: &mut impl FnMut(Piece, &[u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        self.push_at(0, digest, len, node)
    }

    fn push_at<E>(
        &mut self,
        level: usize,
        digest: Digest,
        len: u64,
        node: &mut impl FnMut(Piece, &[u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        if self.levels.len() == level {
            self.levels.push(Vec::new());
        }
        if self.levels[level].len() == RECIPE_FANOUT {
            self.close(level, node)?;
        }
        let entries = &mut self.levels[level];
        let start = entries.last().map_or(0, |(_, end)| *end);
        entries.push((digest, start + len));
        Ok(())
    }

    /// Closes the node at `level` and lists it one level above.
    fn close<E>(
        &mut self,
        level: usize,
        node: &mut impl FnMut(Piece, &[u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        let entries = std::mem::take(&mut self.levels[level]);
        let bytes = encode(level, &entries);
        let digest = Digest::of(&bytes);
        let total = entries.last().map_or(0, |(_, end)| *end);
        let piece = Piece {
            digest,
            kind: Kind::RecipeNode,
            len: bytes.len() as u32,
        };
        node(piece, &bytes)?;
        self.push_at(level + 1, digest, total, node)
    }

    /// Returns the bytes of the root.
    pub(crate) fn finish<E>(
        mut self,
        node: &mut impl FnMut(Piece, &[u8]) -> Result<(), E>,
    ) -> Result<Vec<u8>, E> {
        let mut level = 0;
        while level + 1 < self.levels.len() {
            self.close(level, node)?;
            level += 1;
        }
        Ok(encode(level, &self.levels[level]))
    }
}

fn encode(level: usize, entries: &[(Digest, u64)]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(HEADER_BYTES + entries.len() * ENTRY_BYTES);
    bytes.extend_from_slice(&[VERSION, level as u8, 0, 0]);
    bytes.extend_from_slice(&(entries.len() as u32).to_le_bytes());
    for (digest, end) in entries {
        bytes.extend_from_slice(&digest.0);
        bytes.extend_from_slice(&end.to_le_bytes());
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::HashMap;
    use std::convert::Infallible;

    fn build(lens: &[u64]) -> (Vec<u8>, HashMap<Digest, Vec<u8>>) {
        let mut nodes = HashMap::new();
        let mut keep = |piece: Piece, bytes: &[u8]| -> Result<(), Infallible> {
            assert_eq!(piece.digest, Digest::of(bytes));
            nodes.insert(piece.digest, bytes.to_vec());
            Ok(())
        };
        let mut builder = RecipeBuilder::default();
        for (number, len) in lens.iter().enumerate() {
            let digest = Digest::of(&number.to_le_bytes());
            builder.push(digest, *len, &mut keep).unwrap();
        }
        let root = builder.finish(&mut keep).unwrap();
        (root, nodes)
    }

    /// The number of the chunk with the byte at `offset`, by walking down.
    fn chunk_at(root: &[u8], nodes: &HashMap<Digest, Vec<u8>>, offset: u64) -> Option<Digest> {
        let mut bytes = root;
        let mut offset = offset;
        loop {
            let node = RecipeNode::new(bytes).unwrap();
            node.check_ends().unwrap();
            let entry = node.find(offset)?;
            if node.level() == 0 {
                return Some(entry.digest);
            }
            bytes = &nodes[&entry.digest];
            assert_eq!(
                RecipeNode::new(bytes).unwrap().total(),
                entry.end - entry.start
            );
            offset -= entry.start;
        }
    }

    #[test]
    fn a_long_list_is_a_tree() {
        for count in [1, 2, 4096, 4097, 8192, 8193, 10_000] {
            let lens: Vec<u64> = (0..count).map(|number| 1 + number % 7).collect();
            let (root, nodes) = build(&lens);
            let node = RecipeNode::new(&root).unwrap();
            assert_eq!(node.total(), lens.iter().sum::<u64>());
            assert_eq!(u64::from(node.level()), u64::from(count > 4096), "{count}");
            assert_eq!(
                nodes.len() as u64,
                if count > 4096 {
                    count.div_ceil(4096)
                } else {
                    0
                }
            );
            let mut start = 0;
            for (number, len) in lens.iter().enumerate() {
                let digest = Digest::of(&number.to_le_bytes());
                assert_eq!(chunk_at(&root, &nodes, start), Some(digest));
                assert_eq!(chunk_at(&root, &nodes, start + len - 1), Some(digest));
                start += len;
            }
            assert_eq!(chunk_at(&root, &nodes, start), None);
        }
    }

    #[test]
    fn terabytes_have_three_levels() {
        // 4096² chunks fill two levels; one more needs a third.
        let mut builder = RecipeBuilder::default();
        let mut nodes = 0;
        let mut keep = |_: Piece, _: &[u8]| -> Result<(), Infallible> {
            nodes += 1;
            Ok(())
        };
        let chunk = Digest::of(b"chunk");
        builder.levels.push(Vec::new());
        // The lower level by hand, so that the test is quick: whole nodes instead of chunks.
        for _ in 0..=RECIPE_FANOUT {
            builder.push_at(1, chunk, 1 << 28, &mut keep).unwrap();
        }
        builder.levels[0].push((chunk, 5));
        let root = builder.finish(&mut keep).unwrap();
        let node = RecipeNode::new(&root).unwrap();
        assert_eq!(node.level(), 2);
        assert_eq!(node.total(), (4097 << 28) + 5);
        assert_eq!(nodes, 3);
    }

    proptest! {
        #[test]
        fn any_bytes_are_safe(mut bytes: Vec<u8>, offset: u64, like: bool) {
            if like && bytes.len() >= 48 {
                bytes[..4].copy_from_slice(&[1, 0, 0, 0]);
                let count = (bytes.len() - 8) / 40;
                bytes.truncate(8 + count * 40);
                bytes[4..8].copy_from_slice(&(count as u32).to_le_bytes());
            }
            if let Ok(node) = RecipeNode::new(&bytes) {
                let _ = node.find(offset);
                let _ = node.check_ends();
                prop_assert!(node.count() >= 1);
            }
        }
    }
}
