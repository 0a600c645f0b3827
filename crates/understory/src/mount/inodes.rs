//! The inodes that the kernel knows of, counted as it counts them.
//!
//! - A node id names one of: a file's (digest, executable) pair, a symlink's target, or a directory's
//!   (parent inode, name). Files and symlinks with equal contents share a node and thus page cache;
//!   directories may not, since the kernel refuses a directory with two names.
//! - `st_ino` is a hash of the same and so survives restarts. It is only a key: content is compared
//!   before a node is shared, and a collision takes the next free number.
//! - Each LOOKUP and each READDIRPLUS entry counts one; FORGET takes off. At zero the node goes, and
//!   its id may come again.
//!
//! Cost: 64 bytes a node, and 4 to 11 more in the index; 1,000,000 nodes are about 72 MB. Symlink
//! targets come on top. 16 shards, each behind a mutex that is held for about 100 ns.

use super::protocol::{Kind, ROOT_NODE};
use std::sync::{Mutex, MutexGuard, PoisonError};
use understory_castore::{Digest, Node};

/// Shards: more than threads that serve one mount.
const SHARDS: u64 = 16;
/// Slots per allocation: 256 KiB, so that an unused one goes back to the system.
const CHUNK_SLOTS: usize = 4096;
/// The first node id that is not the root's or reserved.
const FIRST_NODE: u64 = 2;
/// `st_ino` has 63 bits: some programs read it as a signed number.
const INO_MASK: u64 = (1 << 63) - 1;
/// The root's `st_ino`.
pub(super) const ROOT_INO: u64 = 1;
/// Marks the end of the list of vacant slots.
const NO_SLOT: u32 = u32::MAX;

/// What an inode is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Content {
    /// A directory, by its digest and its parent's `st_ino`.
    Directory { digest: Digest, parent_ino: u64 },
    /// A file.
    File {
        digest: Digest,
        size: u64,
        executable: bool,
    },
    /// A symlink.
    Symlink { target: Box<[u8]> },
    /// Nothing; the next vacant slot.
    Vacant { next: u32 },
}

impl Content {
    /// Its kind.
    pub(super) fn kind(&self) -> Kind {
        match self {
            Self::Directory { .. } => Kind::Directory,
            Self::File {
                executable: false, ..
            } => Kind::File,
            Self::File {
                executable: true, ..
            } => Kind::Executable,
            Self::Symlink { .. } | Self::Vacant { .. } => Kind::Symlink,
        }
    }
    /// `st_size`.
    pub(super) fn size(&self) -> u64 {
        match self {
            Self::File { size, .. } => *size,
            Self::Symlink { target } => target.len() as u64,
            Self::Directory { .. } | Self::Vacant { .. } => 0,
        }
    }
}

/// The kind of a node of the castore.
pub(super) fn kind_of(node: &Node) -> Kind {
    match node {
        Node::Directory { .. } => Kind::Directory,
        Node::File {
            executable: false, ..
        } => Kind::File,
        Node::File {
            executable: true, ..
        } => Kind::Executable,
        Node::Symlink { .. } => Kind::Symlink,
    }
}

/// The `st_ino` that `node` gets when no other content has it: under `name` in the directory `parent_ino`.
pub(super) fn ino_of(parent_ino: u64, name: &[u8], node: &Node) -> u64 {
    let raw = match node {
        Node::Directory { .. } => {
            let mut hasher = blake3::Hasher::new();
            hasher.update(&parent_ino.to_le_bytes()).update(name);
            first_u64(hasher.finalize().as_bytes())
        }
        // The digest is BLAKE3 already; the lowest bit tells executables apart.
        Node::File {
            digest, executable, ..
        } => first_u64(&digest.0) & !1 | u64::from(*executable),
        Node::Symlink { target } => first_u64(blake3::hash(target).as_bytes()),
    };
    valid_ino(raw)
}

fn valid_ino(raw: u64) -> u64 {
    (raw & INO_MASK).max(ROOT_INO + 1)
}

fn first_u64(hash: &[u8; 32]) -> u64 {
    let [a, b, c, d, e, f, g, h, ..] = *hash;
    u64::from_le_bytes([a, b, c, d, e, f, g, h])
}

/// What the table knows about a node.
#[derive(Debug, Clone)]
pub(super) struct Inode {
    /// What it is.
    pub(super) content: Content,
    /// Its `st_ino`.
    pub(super) ino: u64,
    /// The row of a store path that it was found in, or 0; to name it in errors.
    pub(super) store_path: u32,
}

struct Slot {
    content: Content,
    ino: u64,
    store_path: u32,
    /// What the kernel counts; stays at the maximum once there.
    lookups: u32,
}

/// All nodes.
pub(super) struct Inodes {
    shards: [Mutex<Shard>; SHARDS as usize],
}

impl Inodes {
    /// Makes an empty table.
    pub(super) fn new() -> Self {
        Self {
            shards: std::array::from_fn(|_| Mutex::new(Shard::new())),
        }
    }

    /// Returns the (node id, `st_ino`) of `node` under `name` in the directory `parent_ino`, and counts
    /// one lookup.
    pub(super) fn remember(
        &self,
        parent_ino: u64,
        name: &[u8],
        node: &Node,
        store_path: u32,
    ) -> (u64, u64) {
        self.remember_as(ino_of(parent_ino, name, node), parent_ino, node, store_path)
    }

    fn remember_as(&self, ino: u64, parent_ino: u64, node: &Node, store_path: u32) -> (u64, u64) {
        let content = match node {
            Node::Directory { digest, .. } => Content::Directory {
                digest: *digest,
                parent_ino,
            },
            Node::File {
                digest,
                size,
                executable,
            } => Content::File {
                digest: *digest,
                size: *size,
                executable: *executable,
            },
            Node::Symlink { target } => Content::Symlink {
                target: target.clone(),
            },
        };
        // The shard is chosen by high bits: neighbours that a collision leads to are in the same one.
        let number = (ino >> 59) % SHARDS;
        let (slot, ino) = lock(&self.shards[number as usize]).remember(ino, content, store_path);
        (FIRST_NODE + u64::from(slot) * SHARDS + number, ino)
    }

    /// Returns a node that the kernel knows.
    pub(super) fn get(&self, node: u64) -> Option<Inode> {
        let (number, slot) = place(node)?;
        let shard = lock(&self.shards[number]);
        let slot = shard.slot(slot)?;
        Some(Inode {
            content: slot.content.clone(),
            ino: slot.ino,
            store_path: slot.store_path,
        })
    }

    /// Takes `count` lookups off a node.
    pub(super) fn forget(&self, node: u64, count: u64) {
        if let Some((number, slot)) = place(node) {
            lock(&self.shards[number]).forget(slot, count);
        }
    }

    /// The number of nodes.
    pub(super) fn len(&self) -> usize {
        self.shards.iter().map(|shard| lock(shard).live).sum()
    }
}

fn place(node: u64) -> Option<(usize, u32)> {
    debug_assert_ne!(node, ROOT_NODE);
    let number = node.checked_sub(FIRST_NODE)?;
    Some((
        (number % SHARDS) as usize,
        u32::try_from(number / SHARDS).ok()?,
    ))
}

fn lock(shard: &Mutex<Shard>) -> MutexGuard<'_, Shard> {
    // No operation below panics half way; a poisoned shard is a whole one.
    shard.lock().unwrap_or_else(PoisonError::into_inner)
}

struct Shard {
    chunks: Vec<Vec<Slot>>,
    /// Open addressing with linear probing: slot number + 1, or 0. A power of two, at most 3/4 full.
    index: Vec<u32>,
    live: usize,
    vacant: u32,
}

/// Fewest places of an index.
const INDEX_PLACES_MIN: usize = 64;

impl Shard {
    fn new() -> Self {
        Self {
            chunks: Vec::new(),
            index: vec![0; INDEX_PLACES_MIN],
            live: 0,
            vacant: NO_SLOT,
        }
    }

    fn slot(&self, number: u32) -> Option<&Slot> {
        let slot = self
            .chunks
            .get(number as usize / CHUNK_SLOTS)?
            .get(number as usize % CHUNK_SLOTS)?;
        (!matches!(slot.content, Content::Vacant { .. })).then_some(slot)
    }

    fn slot_mut(&mut self, number: u32) -> &mut Slot {
        &mut self.chunks[number as usize / CHUNK_SLOTS][number as usize % CHUNK_SLOTS]
    }

    fn remember(&mut self, ino: u64, content: Content, store_path: u32) -> (u32, u64) {
        let mut ino = ino;
        while let Some(number) = self.find(ino) {
            let slot = self.slot_mut(number);
            if slot.content == content {
                slot.lookups = slot.lookups.saturating_add(1);
                return (number, ino);
            }
            ino = collision_next(ino);
        }
        let number = self.allocate(Slot {
            content,
            ino,
            store_path,
            lookups: 1,
        });
        self.index_insert(number, ino);
        (number, ino)
    }

    fn forget(&mut self, number: u32, count: u64) {
        if self.slot(number).is_none() {
            return;
        }
        let slot = self.slot_mut(number);
        if slot.lookups == u32::MAX {
            return;
        }
        slot.lookups = slot
            .lookups
            .saturating_sub(u32::try_from(count).unwrap_or(u32::MAX));
        if slot.lookups == 0 {
            let ino = slot.ino;
            self.index_remove(ino);
            let next = self.vacant;
            self.slot_mut(number).content = Content::Vacant { next };
            self.vacant = number;
            self.live -= 1;
            if self.live == 0 {
                *self = Self::new();
            }
        }
    }

    fn allocate(&mut self, slot: Slot) -> u32 {
        self.live += 1;
        if self.vacant != NO_SLOT {
            let number = self.vacant;
            let place = self.slot_mut(number);
            if let Content::Vacant { next } = place.content {
                *place = slot;
                self.vacant = next;
                return number;
            }
            unreachable!("slot {number} is in the list of vacant ones");
        }
        if self
            .chunks
            .last()
            .is_none_or(|chunk| chunk.len() == CHUNK_SLOTS)
        {
            self.chunks.push(Vec::with_capacity(CHUNK_SLOTS));
        }
        let full = self.chunks.len() - 1;
        self.chunks[full].push(slot);
        (full * CHUNK_SLOTS + self.chunks[full].len() - 1) as u32
    }

    #[cfg(test)]
    fn memory_bytes(&self) -> usize {
        let slots: usize = self.chunks.iter().map(Vec::capacity).sum();
        slots * size_of::<Slot>() + self.index.capacity() * size_of::<u32>()
    }

    fn home(&self, ino: u64) -> usize {
        // The number is a hash but for its lowest bit, which may be an executable bit.
        (ino >> 1) as usize & (self.index.len() - 1)
    }

    fn ino_at(&self, place: usize) -> Option<u64> {
        let number = self.index[place].checked_sub(1)?;
        Some(self.chunks[number as usize / CHUNK_SLOTS][number as usize % CHUNK_SLOTS].ino)
    }

    fn find(&self, ino: u64) -> Option<u32> {
        self.find_place(ino).map(|place| self.index[place] - 1)
    }

    fn find_place(&self, ino: u64) -> Option<usize> {
        let mut place = self.home(ino);
        while let Some(found) = self.ino_at(place) {
            if found == ino {
                return Some(place);
            }
            place = (place + 1) & (self.index.len() - 1);
        }
        None
    }

    /// Adds a slot that is not in the index; `live` counts it already.
    fn index_insert(&mut self, number: u32, ino: u64) {
        if self.live * 4 > self.index.len() * 3 {
            let old = std::mem::take(&mut self.index);
            self.index = vec![0; old.len() * 2];
            for entry in old.into_iter().filter(|&entry| entry != 0) {
                let slot = entry - 1;
                let ino = self.chunks[slot as usize / CHUNK_SLOTS][slot as usize % CHUNK_SLOTS].ino;
                self.index_place(slot, ino);
            }
        }
        self.index_place(number, ino);
    }

    fn index_place(&mut self, number: u32, ino: u64) {
        let mut place = self.home(ino);
        while self.index[place] != 0 {
            place = (place + 1) & (self.index.len() - 1);
        }
        self.index[place] = number + 1;
    }

    /// Removes an entry and moves those behind it that the gap would hide.
    fn index_remove(&mut self, ino: u64) {
        let Some(mut gap) = self.find_place(ino) else {
            return;
        };
        let mask = self.index.len() - 1;
        let mut place = gap;
        loop {
            place = (place + 1) & mask;
            let Some(found) = self.ino_at(place) else {
                break;
            };
            let distance_home = place.wrapping_sub(self.home(found)) & mask;
            let distance_gap = place.wrapping_sub(gap) & mask;
            if distance_home >= distance_gap {
                self.index[gap] = self.index[place];
                gap = place;
            }
        }
        self.index[gap] = 0;
    }
}

/// The number to try after `ino`, in the same shard.
fn collision_next(ino: u64) -> u64 {
    const LOW: u64 = (1 << 59) - 1;
    ((ino & !LOW) | ((ino & LOW) + 1) & LOW).max(ROOT_INO + 1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::HashMap;

    fn file(seed: u64, executable: bool) -> Node {
        Node::File {
            digest: Digest(*blake3::hash(&seed.to_le_bytes()).as_bytes()),
            size: seed,
            executable,
        }
    }

    #[test]
    fn a_slot_has_64_bytes() {
        assert_eq!(size_of::<Slot>(), 64);
    }

    #[test]
    fn equal_contents_with_different_exec_bit_are_two_inodes() {
        let inodes = Inodes::new();
        let plain = inodes.remember(1, b"a", &file(1, false), 1);
        let executable = inodes.remember(1, b"b", &file(1, true), 1);
        assert_ne!(plain, executable);
        assert_ne!(plain.1, executable.1);
        assert_eq!(
            inodes.remember(7, b"other", &file(1, false), 2),
            plain,
            "equal files share"
        );
        assert_eq!(inodes.get(plain.0).unwrap().content.kind(), Kind::File);
        assert_eq!(
            inodes.get(executable.0).unwrap().content.kind(),
            Kind::Executable
        );
    }

    #[test]
    fn directories_are_per_path() {
        let inodes = Inodes::new();
        let directory = Node::Directory {
            digest: Digest([1; 32]),
            size: 0,
        };
        let a = inodes.remember(1, b"a", &directory, 1);
        let b = inodes.remember(1, b"b", &directory, 1);
        assert_ne!(a.0, b.0);
        assert_eq!(inodes.remember(1, b"a", &directory, 1), a);
    }

    #[test]
    fn colliding_numbers_never_share_a_node() {
        let inodes = Inodes::new();
        for ino in [5, INO_MASK, (1 << 59) - 1] {
            let a = inodes.remember_as(ino, 1, &file(1, false), 1);
            let b = inodes.remember_as(ino, 1, &file(2, false), 1);
            let c = inodes.remember_as(
                ino,
                1,
                &Node::Symlink {
                    target: b"x"[..].into(),
                },
                1,
            );
            assert!(a.0 != b.0 && b.0 != c.0 && a.1 != b.1 && b.1 != c.1);
            assert_eq!(inodes.remember_as(ino, 1, &file(2, false), 1), b);
            assert_eq!(inodes.get(b.0).unwrap().content.size(), 2);
            assert_eq!(inodes.get(c.0).unwrap().content.size(), 1);
        }
    }

    #[test]
    fn forgetting_all_leaves_nothing() {
        let inodes = Inodes::new();
        let nodes: Vec<u64> = (0..100_000)
            .map(|n| inodes.remember(1, b"n", &file(n, n % 3 == 0), 1).0)
            .collect();
        assert_eq!(inodes.len(), 100_000);
        for &node in &nodes {
            inodes.remember(
                1,
                b"n",
                &file(inodes.get(node).unwrap().content.size(), false),
                1,
            );
        }
        for &node in nodes.iter().rev() {
            inodes.forget(node, u64::MAX);
            assert!(inodes.get(node).is_none());
        }
        let rest: Vec<u64> = (0..100_000)
            .map(|n| inodes.remember(1, b"n", &file(n, false), 1).0)
            .collect();
        for node in rest {
            inodes.forget(node, 9);
        }
        assert_eq!(inodes.len(), 0);
        assert!(
            inodes
                .shards
                .iter()
                .all(|shard| lock(shard).chunks.is_empty())
        );
    }

    #[test]
    fn a_million_nodes_take_less_than_80_mb() {
        let inodes = Inodes::new();
        for number in 0..1_000_000 {
            inodes.remember(1, b"n", &file(number, false), 1);
        }
        let bytes: usize = inodes
            .shards
            .iter()
            .map(|shard| lock(shard).memory_bytes())
            .sum();
        assert!(bytes < 80_000_000, "{bytes}");
    }

    #[test]
    fn unknown_nodes_are_none() {
        let inodes = Inodes::new();
        assert!(inodes.get(u64::MAX).is_none());
        inodes.forget(12345, 1);
        assert!(inodes.get(0).is_none());
    }

    proptest! {
        /// Few different numbers, so that chains form, break and are mended.
        #[test]
        fn behaves_as_a_map(steps in prop::collection::vec((0u64..8, 0u64..40, any::<bool>()), 1..400)) {
            let inodes = Inodes::new();
            let mut model: HashMap<u64, (Node, u64)> = HashMap::new();
            for (ino, seed, add) in steps {
                if add {
                    let (node, _) = inodes.remember_as(ino + 2, 1, &file(seed, false), 1);
                    let entry = model.entry(node).or_insert((file(seed, false), 0));
                    prop_assert_eq!(&entry.0, &file(seed, false));
                    entry.1 += 1;
                } else if let Some(&node) = model.keys().nth(seed as usize % model.len().max(1)) {
                    let count = 1 + ino % 2;
                    inodes.forget(node, count);
                    let left = model[&node].1.saturating_sub(count);
                    if left == 0 { model.remove(&node); } else { model.get_mut(&node).unwrap().1 = left; }
                }
                prop_assert_eq!(inodes.len(), model.len());
                for (&node, (content, _)) in &model {
                    prop_assert_eq!(inodes.get(node).unwrap().content.size(), match content { Node::File { size, .. } => *size, _ => 0 });
                }
            }
        }
    }
}
