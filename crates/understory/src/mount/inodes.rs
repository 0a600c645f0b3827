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
//!
//! Nodes lie in a [`NodeTable`], which outlives the server: the next one finds them by looking through it.
//! A slot of eight words holds one:
//! ```text
//! word 0   lookups (low half) and kind; 0 lookups: the slot is vacant, or part of a symlink's target
//! word 1   st_ino                        vacant: the next vacant slot + 1
//! word 2   row of the store path (low half), first slot with more of the target + 1 (high half)
//! word 3   size of a file, parent's st_ino of a directory, length of a target
//! word 4…7 digest, or the first 32 bytes of a target
//! ```
//! More of a target: word 1 the next such slot + 1, words 2 to 7 48 bytes. Word 0 is stored last when a node is
//! made and first when it goes, and a count is raised before the kernel is answered: so after a kill at any
//! instruction each node that the kernel knows is there and no count is too low. One may be too high, when
//! the answer was not sent any more: such a node stays until the mount goes.
//!
//! Cost: 64 bytes a node, and 4 to 11 more in the index, which is made anew by each server (a look through
//! 1,000,000 nodes takes below 0.1 s); 1,000,000 nodes are about 72 MB. 16 shards, each behind a mutex that is held
//! for about 100 ns.

use super::protocol::{Kind, ROOT_NODE};
use super::table::{NodeTable, SHARDS, SLOT_WORDS, SLOTS_MAX};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use understory_castore::{Digest, Node};

/// The first node id that is not the root's or reserved.
const FIRST_NODE: u64 = 2;
/// `st_ino` has 63 bits: some programs read it as a signed number.
const INO_MASK: u64 = (1 << 63) - 1;
/// The root's `st_ino`.
pub(super) const ROOT_INO: u64 = 1;
/// Bytes of a symlink's target in its own slot, and in each further one.
const TARGET_BYTES_FIRST: usize = 32;
const TARGET_BYTES_MORE: usize = 48;
/// Kinds as word 0 has them, above the count.
const KIND_SHIFT: u32 = 32;
const KIND_DIRECTORY: u64 = 1;
const KIND_FILE: u64 = 2;
const KIND_EXECUTABLE: u64 = 3;
const KIND_SYMLINK: u64 = 4;
const LOOKUPS_MASK: u64 = u32::MAX as u64;

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
            Self::Symlink { .. } => Kind::Symlink,
        }
    }
    /// `st_size`.
    pub(super) fn size(&self) -> u64 {
        match self {
            Self::File { size, .. } => *size,
            Self::Symlink { target } => target.len() as u64,
            Self::Directory { .. } => 0,
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

/// All nodes.
pub(super) struct Inodes {
    table: NodeTable,
    shards: [Mutex<Shard>; SHARDS as usize],
}

/// There is no room for more nodes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Full;

impl Inodes {
    /// Uses `table`, and finds what lies in it already.
    pub(super) fn new(table: NodeTable) -> Self {
        let shards = std::array::from_fn(|number| Mutex::new(Shard::find(number as u64, &table)));
        Self { table, shards }
    }

    /// The memory that they lie in.
    pub(super) fn table(&self) -> &NodeTable {
        &self.table
    }

    /// Returns the (node id, `st_ino`) of `node` under `name` in the directory `parent_ino`, and counts
    /// one lookup.
    pub(super) fn remember(
        &self,
        parent_ino: u64,
        name: &[u8],
        node: &Node,
        store_path: u32,
    ) -> Result<(u64, u64), Full> {
        self.remember_as(ino_of(parent_ino, name, node), parent_ino, node, store_path)
    }

    fn remember_as(
        &self,
        ino: u64,
        parent_ino: u64,
        node: &Node,
        store_path: u32,
    ) -> Result<(u64, u64), Full> {
        // The shard is chosen by high bits: neighbours that a collision leads to are in the same one.
        let number = (ino >> 59) % SHARDS;
        let new = Packed::new(parent_ino, node);
        let (slot, ino) =
            lock(&self.shards[number as usize]).remember(&self.table, ino, &new, store_path)?;
        Ok((FIRST_NODE + u64::from(slot) * SHARDS + number, ino))
    }

    /// Returns a node that the kernel knows.
    pub(super) fn get(&self, node: u64) -> Option<Inode> {
        let (number, slot) = place(node)?;
        let shard = lock(&self.shards[number]);
        shard.get(&self.table, slot)
    }

    /// Takes `count` lookups off a node.
    pub(super) fn forget(&self, node: u64, count: u64) {
        if let Some((number, slot)) = place(node) {
            lock(&self.shards[number]).forget(&self.table, slot, count);
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

/// A node's content as its slot has it.
struct Packed<'a> {
    kind: u64,
    /// Word 3.
    size: u64,
    /// Words 4 to 7.
    first: [u64; 4],
    /// The rest of a target.
    more: &'a [u8],
}

impl<'a> Packed<'a> {
    fn new(parent_ino: u64, node: &'a Node) -> Self {
        match node {
            Node::Directory { digest, .. } => Self::fixed(KIND_DIRECTORY, parent_ino, digest),
            Node::File {
                digest,
                size,
                executable,
            } => {
                let kind = if *executable {
                    KIND_EXECUTABLE
                } else {
                    KIND_FILE
                };
                Self::fixed(kind, *size, digest)
            }
            Node::Symlink { target } => {
                let at = target.len().min(TARGET_BYTES_FIRST);
                let mut first = [0; TARGET_BYTES_FIRST];
                first[..at].copy_from_slice(&target[..at]);
                Self {
                    kind: KIND_SYMLINK,
                    size: target.len() as u64,
                    first: words_of(&first),
                    more: &target[at..],
                }
            }
        }
    }

    fn fixed(kind: u64, size: u64, digest: &Digest) -> Self {
        Self {
            kind,
            size,
            first: words_of(&digest.0),
            more: &[],
        }
    }
}

fn words_of(bytes: &[u8; 32]) -> [u64; 4] {
    std::array::from_fn(|at| word_of(&bytes[at * 8..]))
}

/// The first eight bytes, or as many as there are and zeros.
fn word_of(bytes: &[u8]) -> u64 {
    let mut word = [0; 8];
    let len = bytes.len().min(8);
    word[..len].copy_from_slice(&bytes[..len]);
    u64::from_ne_bytes(word)
}

/// Slot numbers as words have them: 0 is none.
fn slot_in(word: u64) -> Option<u32> {
    u32::try_from(word).ok()?.checked_sub(1)
}

type Slot = [AtomicU64; SLOT_WORDS];

fn load(slot: &Slot, word: usize) -> u64 {
    slot[word].load(Ordering::Relaxed)
}

fn store(slot: &Slot, word: usize, value: u64) {
    slot[word].store(value, Ordering::Relaxed);
}

fn lookups(slot: &Slot) -> u64 {
    load(slot, 0) & LOOKUPS_MASK
}

fn more_of(slot: &Slot) -> Option<u32> {
    slot_in(load(slot, 2) >> 32)
}

/// What one server knows of a shard; the nodes are in the table.
struct Shard {
    number: u64,
    /// Open addressing with linear probing: slot number + 1, or 0. A power of two, at most 3/4 full.
    index: Vec<u32>,
    live: usize,
    /// The first vacant slot + 1, or 0.
    vacant: u32,
    /// Slots that were ever in use.
    used: u32,
}

/// Fewest places of an index.
const INDEX_PLACES_MIN: usize = 64;

impl Shard {
    fn empty(number: u64) -> Self {
        Self {
            number,
            index: vec![0; INDEX_PLACES_MIN],
            live: 0,
            vacant: 0,
            used: 0,
        }
    }

    /// Looks through what an earlier server left.
    fn find(number: u64, table: &NodeTable) -> Self {
        let mut this = Self::empty(number);
        let used = table.used(number).load(Ordering::Acquire);
        this.used = u32::try_from(used).unwrap_or(0).min(SLOTS_MAX);
        if this.used == 0 {
            return this;
        }
        let mut taken = vec![false; this.used as usize];
        for slot in 0..this.used {
            if lookups(this.slot(table, slot)) == 0 {
                continue;
            }
            if let Some(parts) = this.parts(table, slot) {
                for part in parts {
                    taken[part as usize] = true;
                }
                this.live += 1;
                let ino = load(this.slot(table, slot), 1);
                this.index_insert(table, slot, ino);
            } else {
                tracing::error!("node {slot} of shard {number} makes no sense and is dropped");
            }
        }
        for slot in (0..this.used).rev().filter(|&slot| !taken[slot as usize]) {
            this.make_vacant(table, slot);
        }
        this
    }

    /// The slots that a node takes, its own first; `None` if that makes no sense.
    fn parts(&self, table: &NodeTable, number: u32) -> Option<Vec<u32>> {
        let mut parts = vec![number];
        let slot = self.slot(table, number);
        let mut rest = match load(slot, 0) >> KIND_SHIFT {
            KIND_DIRECTORY | KIND_FILE | KIND_EXECUTABLE => 0,
            KIND_SYMLINK => load(slot, 3).saturating_sub(TARGET_BYTES_FIRST as u64),
            _ => return None,
        };
        let mut next = more_of(slot);
        while rest > 0 {
            let part = next.filter(|&part| part < self.used && part != number)?;
            parts.push(part);
            next = slot_in(load(self.slot(table, part), 1));
            rest = rest.saturating_sub(TARGET_BYTES_MORE as u64);
        }
        Some(parts)
    }

    fn slot<'a>(&self, table: &'a NodeTable, number: u32) -> &'a Slot {
        table.slot(self.number, number)
    }

    fn get(&self, table: &NodeTable, number: u32) -> Option<Inode> {
        if number >= self.used {
            return None;
        }
        let slot = self.slot(table, number);
        if lookups(slot) == 0 {
            return None;
        }
        let size = load(slot, 3);
        let mut first = [0; TARGET_BYTES_FIRST];
        for (at, bytes) in first.chunks_exact_mut(8).enumerate() {
            bytes.copy_from_slice(&load(slot, 4 + at).to_ne_bytes());
        }
        let digest = Digest(first);
        let content = match load(slot, 0) >> KIND_SHIFT {
            KIND_DIRECTORY => Content::Directory {
                digest,
                parent_ino: size,
            },
            kind @ (KIND_FILE | KIND_EXECUTABLE) => Content::File {
                digest,
                size,
                executable: kind == KIND_EXECUTABLE,
            },
            _ => Content::Symlink {
                target: self.target(table, slot, &first),
            },
        };
        Some(Inode {
            content,
            ino: load(slot, 1),
            store_path: load(slot, 2) as u32,
        })
    }

    fn target(&self, table: &NodeTable, slot: &Slot, first: &[u8]) -> Box<[u8]> {
        let len = load(slot, 3) as usize;
        let mut target = Vec::with_capacity(len.next_multiple_of(8));
        target.extend_from_slice(&first[..len.min(first.len())]);
        let mut next = more_of(slot);
        while target.len() < len
            && let Some(part) = next
        {
            let part = self.slot(table, part);
            for word in 2..SLOT_WORDS {
                target.extend_from_slice(&load(part, word).to_ne_bytes());
            }
            next = slot_in(load(part, 1));
        }
        target.truncate(len);
        target.into_boxed_slice()
    }

    fn holds(&self, table: &NodeTable, number: u32, content: &Packed<'_>) -> bool {
        let slot = self.slot(table, number);
        let same = load(slot, 0) >> KIND_SHIFT == content.kind
            && load(slot, 3) == content.size
            && (0..4).all(|at| load(slot, 4 + at) == content.first[at]);
        let mut next = more_of(slot);
        same && content.more.chunks(TARGET_BYTES_MORE).all(|bytes| {
            let Some(part) = next.map(|part| self.slot(table, part)) else {
                return false;
            };
            next = slot_in(load(part, 1));
            let mut words = bytes.chunks(8).zip(2..);
            words.all(|(bytes, word)| load(part, word) == word_of(bytes))
        })
    }

    fn remember(
        &mut self,
        table: &NodeTable,
        ino: u64,
        content: &Packed<'_>,
        store_path: u32,
    ) -> Result<(u32, u64), Full> {
        let mut ino = ino;
        while let Some(number) = self.find_ino(table, ino) {
            if self.holds(table, number, content) {
                let slot = self.slot(table, number);
                // What stands at the maximum stays there.
                if lookups(slot) < LOOKUPS_MASK {
                    store(slot, 0, load(slot, 0) + 1);
                }
                return Ok((number, ino));
            }
            ino = collision_next(ino);
        }
        let number = self.allocate(table, ino, content, store_path)?;
        self.live += 1;
        self.index_insert(table, number, ino);
        Ok((number, ino))
    }

    fn forget(&mut self, table: &NodeTable, number: u32, count: u64) {
        if number >= self.used {
            return;
        }
        let slot = self.slot(table, number);
        let counted = lookups(slot);
        if counted == 0 || counted == LOOKUPS_MASK {
            return;
        }
        if counted > count {
            store(slot, 0, load(slot, 0) - count);
            return;
        }
        let ino = load(slot, 1);
        self.index_remove(table, ino);
        let mut next = more_of(slot);
        self.make_vacant(table, number);
        while let Some(part) = next.filter(|&part| part < self.used) {
            next = slot_in(load(self.slot(table, part), 1));
            self.make_vacant(table, part);
        }
        self.live -= 1;
        if self.live == 0 {
            let used = u64::from(self.used);
            *self = Self::empty(self.number);
            table.used(self.number).store(0, Ordering::Release);
            table.release(self.number, used);
        }
    }

    fn make_vacant(&mut self, table: &NodeTable, number: u32) {
        let slot = self.slot(table, number);
        slot[0].store(0, Ordering::Release);
        store(slot, 1, u64::from(self.vacant));
        self.vacant = number + 1;
    }

    fn take_vacant(&mut self, table: &NodeTable) -> Result<u32, Full> {
        if let Some(number) = slot_in(u64::from(self.vacant)) {
            self.vacant = load(self.slot(table, number), 1) as u32;
            return Ok(number);
        }
        if self.used == SLOTS_MAX {
            return Err(Full);
        }
        let number = self.used;
        self.used += 1;
        // What the last server of a shard that was emptied left there must not count.
        self.slot(table, number)[0].store(0, Ordering::Relaxed);
        let used = table.used(self.number);
        used.store(u64::from(self.used), Ordering::Release);
        Ok(number)
    }

    fn allocate(
        &mut self,
        table: &NodeTable,
        ino: u64,
        content: &Packed<'_>,
        store_path: u32,
    ) -> Result<u32, Full> {
        let number = self.take_vacant(table)?;
        let mut next = 0;
        let mut parts = Vec::new();
        for bytes in content.more.chunks(TARGET_BYTES_MORE).rev() {
            let part = match self.take_vacant(table) {
                Ok(part) => part,
                Err(full) => {
                    for part in parts.into_iter().chain([number]) {
                        self.make_vacant(table, part);
                    }
                    return Err(full);
                }
            };
            parts.push(part);
            let slot = self.slot(table, part);
            store(slot, 1, next);
            for word in 2..SLOT_WORDS {
                store(slot, word, bytes.get((word - 2) * 8..).map_or(0, word_of));
            }
            next = u64::from(part) + 1;
        }
        let slot = self.slot(table, number);
        store(slot, 1, ino);
        store(slot, 2, u64::from(store_path) | next << 32);
        store(slot, 3, content.size);
        for at in 0..4 {
            store(slot, 4 + at, content.first[at]);
        }
        // Last: now it is a node.
        slot[0].store(content.kind << KIND_SHIFT | 1, Ordering::Release);
        Ok(number)
    }

    #[cfg(test)]
    fn memory_bytes(&self) -> usize {
        self.used as usize * size_of::<Slot>() + self.index.capacity() * size_of::<u32>()
    }

    fn home(&self, ino: u64) -> usize {
        // The number is a hash but for its lowest bit, which may be an executable bit.
        (ino >> 1) as usize & (self.index.len() - 1)
    }

    fn ino_at(&self, table: &NodeTable, place: usize) -> Option<u64> {
        let number = self.index[place].checked_sub(1)?;
        Some(load(self.slot(table, number), 1))
    }

    fn find_ino(&self, table: &NodeTable, ino: u64) -> Option<u32> {
        self.find_place(table, ino)
            .map(|place| self.index[place] - 1)
    }

    fn find_place(&self, table: &NodeTable, ino: u64) -> Option<usize> {
        let mut place = self.home(ino);
        while let Some(found) = self.ino_at(table, place) {
            if found == ino {
                return Some(place);
            }
            place = (place + 1) & (self.index.len() - 1);
        }
        None
    }

    /// Adds a slot that is not in the index; `live` counts it already.
    fn index_insert(&mut self, table: &NodeTable, number: u32, ino: u64) {
        if self.live * 4 > self.index.len() * 3 {
            let old = std::mem::take(&mut self.index);
            self.index = vec![0; old.len() * 2];
            for entry in old.into_iter().filter(|&entry| entry != 0) {
                let slot = entry - 1;
                let ino = load(self.slot(table, slot), 1);
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
    fn index_remove(&mut self, table: &NodeTable, ino: u64) {
        let Some(mut gap) = self.find_place(table, ino) else {
            return;
        };
        let mask = self.index.len() - 1;
        let mut place = gap;
        loop {
            place = (place + 1) & mask;
            let Some(found) = self.ino_at(table, place) else {
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

    fn fresh() -> Inodes {
        Inodes::new(NodeTable::create().unwrap())
    }

    /// What the next server finds when this one is killed.
    fn killed(inodes: &Inodes) -> Inodes {
        let file = inodes.table().file().try_clone().unwrap();
        Inodes::new(NodeTable::take_over(file).unwrap())
    }

    fn symlink(len: usize) -> Node {
        let target: Vec<u8> = (0..len).map(|at| b'a' + (at % 23) as u8).collect();
        Node::Symlink {
            target: target.into(),
        }
    }

    #[test]
    fn a_slot_has_64_bytes() {
        assert_eq!(size_of::<Slot>(), 64);
    }

    #[test]
    fn targets_of_all_lengths_are_kept_and_given_back() {
        let inodes = fresh();
        let nodes: Vec<(usize, u64)> = (0..300)
            .chain([4095])
            .map(|len| (len, inodes.remember(1, b"l", &symlink(len), 1).unwrap().0))
            .collect();
        let again = killed(&inodes);
        for inodes in [&inodes, &again] {
            for &(len, node) in &nodes {
                let Node::Symlink { target } = symlink(len) else {
                    unreachable!()
                };
                assert_eq!(
                    inodes.get(node).unwrap().content,
                    Content::Symlink { target }
                );
            }
        }
        for &(len, node) in &nodes {
            assert_eq!(again.remember(1, b"l", &symlink(len), 1).unwrap().0, node);
            again.forget(node, 1);
            assert!(again.get(node).is_some());
            again.forget(node, 1);
            assert!(again.get(node).is_none());
        }
        assert_eq!(again.len(), 0);
        assert!(again.shards.iter().all(|shard| lock(shard).used == 0));
    }

    #[test]
    fn equal_contents_with_different_exec_bit_are_two_inodes() {
        let inodes = fresh();
        let plain = inodes.remember(1, b"a", &file(1, false), 1).unwrap();
        let executable = inodes.remember(1, b"b", &file(1, true), 1).unwrap();
        assert_ne!(plain, executable);
        assert_ne!(plain.1, executable.1);
        assert_eq!(
            inodes.remember(7, b"other", &file(1, false), 2).unwrap(),
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
        let inodes = fresh();
        let directory = Node::Directory {
            digest: Digest([1; 32]),
            size: 0,
        };
        let a = inodes.remember(1, b"a", &directory, 1).unwrap();
        let b = inodes.remember(1, b"b", &directory, 1).unwrap();
        assert_ne!(a.0, b.0);
        assert_eq!(inodes.remember(1, b"a", &directory, 1).unwrap(), a);
    }

    #[test]
    fn colliding_numbers_never_share_a_node() {
        let inodes = fresh();
        for ino in [5, INO_MASK, (1 << 59) - 1] {
            let a = inodes.remember_as(ino, 1, &file(1, false), 1).unwrap();
            let b = inodes.remember_as(ino, 1, &file(2, false), 1).unwrap();
            let c = inodes
                .remember_as(
                    ino,
                    1,
                    &Node::Symlink {
                        target: b"x"[..].into(),
                    },
                    1,
                )
                .unwrap();
            assert!(a.0 != b.0 && b.0 != c.0 && a.1 != b.1 && b.1 != c.1);
            assert_eq!(inodes.remember_as(ino, 1, &file(2, false), 1).unwrap(), b);
            assert_eq!(inodes.get(b.0).unwrap().content.size(), 2);
            assert_eq!(inodes.get(c.0).unwrap().content.size(), 1);
        }
    }

    #[test]
    fn forgetting_all_leaves_nothing() {
        let inodes = fresh();
        let nodes: Vec<u64> = (0..100_000)
            .map(|n| inodes.remember(1, b"n", &file(n, n % 3 == 0), 1).unwrap().0)
            .collect();
        assert_eq!(inodes.len(), 100_000);
        for &node in &nodes {
            inodes
                .remember(
                    1,
                    b"n",
                    &file(inodes.get(node).unwrap().content.size(), false),
                    1,
                )
                .unwrap();
        }
        for &node in nodes.iter().rev() {
            inodes.forget(node, u64::MAX);
            assert!(inodes.get(node).is_none());
        }
        let rest: Vec<u64> = (0..100_000)
            .map(|n| inodes.remember(1, b"n", &file(n, false), 1).unwrap().0)
            .collect();
        for node in rest {
            inodes.forget(node, 9);
        }
        assert_eq!(inodes.len(), 0);
        assert!(inodes.shards.iter().all(|shard| lock(shard).used == 0));
    }

    #[test]
    fn a_million_nodes_take_less_than_80_mb() {
        let inodes = fresh();
        for number in 0..1_000_000 {
            inodes.remember(1, b"n", &file(number, false), 1).unwrap();
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
        let inodes = fresh();
        assert!(inodes.get(u64::MAX).is_none());
        inodes.forget(12345, 1);
        assert!(inodes.get(0).is_none());
    }

    /// Files, and symlinks that take up to four slots.
    fn node_of(seed: u64) -> Node {
        if seed.is_multiple_of(3) {
            symlink(seed as usize * 4)
        } else {
            file(seed, false)
        }
    }

    proptest! {
        /// Few different numbers, so that chains form, break and are mended; and servers that are killed.
        #[test]
        fn behaves_as_a_map(steps in prop::collection::vec((0u64..8, 0u64..40, 0u8..9), 1..400)) {
            let mut inodes = fresh();
            let mut model: HashMap<u64, (Node, u64)> = HashMap::new();
            for (ino, seed, action) in steps {
                if action == 8 {
                    inodes = killed(&inodes);
                } else if action < 4 {
                    let (node, _) = inodes.remember_as(ino + 2, 1, &node_of(seed), 1).unwrap();
                    let entry = model.entry(node).or_insert((node_of(seed), 0));
                    prop_assert_eq!(&entry.0, &node_of(seed));
                    entry.1 += 1;
                } else if let Some(&node) = model.keys().nth(seed as usize % model.len().max(1)) {
                    let count = 1 + ino % 2;
                    inodes.forget(node, count);
                    let left = model[&node].1.saturating_sub(count);
                    if left == 0 { model.remove(&node); } else { model.get_mut(&node).unwrap().1 = left; }
                }
                prop_assert_eq!(inodes.len(), model.len());
                for (&node, (content, _)) in &model {
                    prop_assert_eq!(inodes.get(node).unwrap().content.size(), match content { Node::File { size, .. } => *size, Node::Symlink { target } => target.len() as u64, Node::Directory { .. } => 0 });
                }
            }
        }
    }
}
