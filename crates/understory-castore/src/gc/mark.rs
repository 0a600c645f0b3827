//! Marking: one bit for each piece of each pack, by its place in the pack's sorted index; and one that says
//! whether it is a chunk of a large file.
//!
//! The bit of a directory or chunk list also says that what is below it is marked, so each is walked
//! once. Of a piece that lies in several packs one copy is marked, however often it is met. What is found in packs that came after the marks began is
//! remembered by its key: it is only what other processes write meanwhile.

use crate::core::{Core, Pack, Place};
use crate::error::CastoreError;
use crate::index::{Footer, PieceMap};
use crate::pack::{BuildKeyHasher, Class, Key, Kind, Location, PackId};
use crate::recipe::RecipeNode;
use crate::{Castore, Digest, Node};
use std::cell::RefCell;
use std::collections::{HashMap, HashSet};
use std::sync::{Arc, PoisonError};

pub(super) struct Marks<'a> {
    castore: &'a Castore,
    packs: HashMap<PackId, PackMarks>,
    /// Packs that an interrupted collection had condemned.
    left_over: HashSet<PackId>,
    /// Pieces without a bit.
    others: HashSet<Key, BuildKeyHasher>,
    live: u64,
    /// Files none of whose roots is whole.
    missing: HashSet<Key, BuildKeyHasher>,
    /// Roots and lists of which something is missing.
    broken: HashSet<Key, BuildKeyHasher>,
}

struct PackMarks {
    pack: Arc<Pack>,
    index: PackIndex,
    is_open: bool,
    bits: Vec<u64>,
    /// Pieces that are chunks of a large file.
    chunks: Vec<u64>,
    live: u64,
}

/// The pieces of a pack, sorted.
enum PackIndex {
    Footer(Footer),
    Sorted(Vec<(Key, Location)>),
}

/// What of a pack lives.
pub(super) struct Shares {
    pub(super) is_open: bool,
    pub(super) pieces: u64,
    pub(super) live: u64,
    pub(super) raw_bytes: u64,
    pub(super) live_raw_bytes: u64,
}

enum Found {
    /// It is marked now, and was not before.
    New,
    Known,
    Missing,
}

impl<'a> Marks<'a> {
    /// Begins with nothing marked, in all packs that there are now.
    pub(super) fn new(
        castore: &'a Castore,
        left_over: HashSet<PackId>,
    ) -> Result<Self, CastoreError> {
        let core = castore.core();
        let state = core.state();
        let mut packs = HashMap::new();
        let mut add = |pack: &Arc<Pack>, index: PackIndex, pieces: usize, is_open: bool| {
            packs.insert(
                pack.id,
                PackMarks {
                    pack: Arc::clone(pack),
                    index,
                    is_open,
                    bits: vec![0; pieces.div_ceil(64)],
                    chunks: vec![0; pieces.div_ceil(64)],
                    live: 0,
                },
            );
        };
        for open in &state.open {
            let pieces = open.pieces.read().unwrap_or_else(PoisonError::into_inner);
            let sorted = sorted(&pieces);
            let count = sorted.len();
            add(&open.pack, PackIndex::Sorted(sorted), count, true);
        }
        let open: HashSet<PackId> = state.open.iter().map(|open| open.pack.id).collect();
        for pack in state.packs.values() {
            if open.contains(&pack.id) {
                continue;
            }
            // Opened anew: what was found sound earlier may have changed.
            let sealed = match core.open_sealed(pack) {
                Ok(Some(sealed)) => sealed,
                // Its trailer is damaged, or it was deleted: nothing of it is ever deleted here.
                Ok(None) => continue,
                Err(error) if error.is_not_found() => continue,
                Err(error) => return Err(error),
            };
            let (index, count) = if sealed.footer.is_sound() {
                let count = sealed.trailer.pieces as usize;
                (PackIndex::Footer(sealed.footer), count)
            } else {
                let (pieces, _) = core.scan_sealed(pack, &sealed.trailer)?;
                let sorted = sorted(&pieces);
                let count = sorted.len();
                (PackIndex::Sorted(sorted), count)
            };
            add(pack, index, count, false);
        }
        Ok(Self {
            castore,
            packs,
            left_over,
            others: HashSet::default(),
            live: 0,
            missing: HashSet::default(),
            broken: HashSet::default(),
        })
    }

    /// Packs that have marks.
    pub(super) fn packs(&self) -> u64 {
        self.packs.len() as u64
    }

    /// Pieces that are marked.
    pub(super) fn live(&self) -> u64 {
        self.live
    }

    /// Files that are needed and not whole.
    pub(super) fn missing(&self) -> u64 {
        self.missing.len() as u64
    }

    /// Pieces of a pack that are marked.
    pub(super) fn live_of(&self, pack: &PackId) -> u64 {
        self.packs.get(pack).map_or(0, |marks| marks.live)
    }

    /// True if the piece that lies there is marked.
    pub(super) fn is_live(&self, pack: &PackId, key: &Key, location: Location) -> bool {
        self.packs.get(pack).is_some_and(|marks| {
            marks
                .index
                .position(key, location)
                .is_some_and(|at| marks.bits[at / 64] >> (at % 64) & 1 == 1)
        })
    }

    /// True if the piece that lies there is a chunk of a large file that is marked.
    pub(super) fn is_chunk(&self, pack: &PackId, key: &Key, location: Location) -> bool {
        self.packs.get(pack).is_some_and(|marks| {
            marks
                .index
                .position(key, location)
                .is_some_and(|at| marks.chunks[at / 64] >> (at % 64) & 1 == 1)
        })
    }

    /// True if an interrupted collection had condemned the pack.
    pub(super) fn is_left_over(&self, pack: &PackId) -> bool {
        self.left_over.contains(pack)
    }

    /// True if the piece may be read elsewhere than in one of `packs`.
    pub(super) fn is_elsewhere(&self, key: &Key, packs: &HashSet<PackId>) -> bool {
        let core = self.core();
        core.state()
            .find(key, false, &|place| {
                !core.is_bad(place) && !packs.contains(&place.pack.id)
            })
            .is_some()
    }

    /// What lives of each pack.
    pub(super) fn shares(&self) -> impl Iterator<Item = (Arc<Pack>, Shares)> {
        self.packs
            .values()
            .map(|marks| (Arc::clone(&marks.pack), marks.shares()))
    }

    /// Marks a tree.
    pub(super) fn mark(&mut self, root: &Node) -> Result<(), CastoreError> {
        let mut open = vec![root.clone()];
        while let Some(node) = open.pop() {
            match node {
                Node::Symlink { .. } | Node::File { size: 0, .. } => {}
                Node::File { digest, .. } => self.blob(&digest)?,
                Node::Directory { digest, .. } if digest == Digest::EMPTY => {}
                Node::Directory { digest, .. } => {
                    match self.set(&Key::new(&digest, Class::Directory))? {
                        Found::Known => {}
                        Found::Missing => {
                            return Err(CastoreError::Missing {
                                kind: "directory",
                                digest,
                            });
                        }
                        Found::New => {
                            let directory = self.castore.directory(&digest)?;
                            open.extend(directory.entries().iter().map(|entry| entry.node.clone()));
                        }
                    }
                }
            }
        }
        Ok(())
    }

    /// Marks a file, by the root that readers take: of a root whose parts are gone, another one.
    fn blob(&mut self, digest: &Digest) -> Result<(), CastoreError> {
        let core = self.core();
        let keys = [Class::Blob, Class::Patched].map(|class| Key::new(digest, class));
        let place = match keys.iter().find_map(|key| self.find_to_keep(key)) {
            Some(place) => Some(place),
            None => core.find_blob(digest)?,
        };
        let Some(place) = place else {
            self.missing.insert(keys[0]);
            return Ok(());
        };
        if self.blob_at(digest, &place)? {
            return Ok(());
        }
        if let Some(other) = core.find_other_blob(digest, &place)
            && self.blob_at(digest, &other)?
        {
            return Ok(());
        }
        self.missing.insert(keys[0]);
        Ok(())
    }

    /// Marks what a root needs; false if some of it is missing.
    fn blob_at(&mut self, digest: &Digest, place: &Place) -> Result<bool, CastoreError> {
        let kind = place.location.kind();
        let key = match kind {
            Some(kind) => Key::new(digest, kind.class()),
            None => return Ok(false),
        };
        if !self.set_at(&key, place) {
            return Ok(!self.broken.contains(&key));
        }
        let is_whole = match kind {
            Some(Kind::Data) => !self.core().is_bad(place),
            Some(Kind::Recipe) => {
                let bytes = self.core().piece(place, digest)?;
                self.recipe(&bytes, digest)?
            }
            Some(Kind::Patched) => {
                let masked = self.core().patches(place, digest)?.masked;
                self.raw(&masked)?
            }
            kind => {
                return Err(CastoreError::corrupt(
                    format!("index entry of {digest}"),
                    format!("expected data, a recipe or patches, found {kind:?}"),
                ));
            }
        };
        if !is_whole {
            self.broken.insert(key);
        }
        Ok(is_whole)
    }

    /// Marks bytes that are stored as they are; false if some are missing.
    fn raw(&mut self, digest: &Digest) -> Result<bool, CastoreError> {
        match self.find(&Key::new(digest, Class::Blob))? {
            Some(place) => self.blob_at(digest, &place),
            None => Ok(false),
        }
    }

    /// Marks a chunk of a large file; false if it is missing.
    fn chunk(&mut self, digest: &Digest) -> Result<bool, CastoreError> {
        let key = Key::new(digest, Class::Blob);
        let Some(place) = self.find(&key)? else {
            return Ok(false);
        };
        if let Some(marks) = self.packs.get_mut(&place.pack.id)
            && let Some(at) = marks.index.position(&key, place.location)
        {
            marks.chunks[at / 64] |= 1 << (at % 64);
        }
        self.blob_at(digest, &place)
    }

    /// Marks what a list of chunks needs; false if some of it is missing.
    fn recipe(&mut self, bytes: &[u8], digest: &Digest) -> Result<bool, CastoreError> {
        let node = RecipeNode::new(bytes)
            .map_err(|reason| CastoreError::corrupt(format!("recipe {digest}"), reason))?;
        let mut is_whole = true;
        for entry in (0..node.count()).map(|at| node.entry(at)) {
            if node.level() == 0 {
                is_whole &= self.chunk(&entry.digest)?;
                continue;
            }
            let key = Key::new(&entry.digest, Class::RecipeNode);
            let Some(place) = self.find(&key)? else {
                is_whole = false;
                continue;
            };
            if !self.set_at(&key, &place) {
                is_whole &= !self.broken.contains(&key);
                continue;
            }
            let bytes = self.core().piece(&place, &entry.digest)?;
            if !self.recipe(&bytes, &entry.digest)? {
                self.broken.insert(key);
                is_whole = false;
            }
        }
        Ok(is_whole)
    }

    fn core(&self) -> &'a Core {
        self.castore.core()
    }

    /// Finds a piece, and sets its bit if it is stored.
    fn set(&mut self, key: &Key) -> Result<Found, CastoreError> {
        Ok(match self.find(key)? {
            None => Found::Missing,
            Some(place) if self.set_at(key, &place) => Found::New,
            Some(_) => Found::Known,
        })
    }

    fn find(&self, key: &Key) -> Result<Option<Place>, CastoreError> {
        match self.find_to_keep(key) {
            Some(place) => Ok(Some(place)),
            None => self.core().find_fresh_key(key),
        }
    }

    /// Which copy of a piece is to stay: one that is marked already; else one outside of the packs that
    /// an interrupted collection had condemned; never a damaged one.
    fn find_to_keep(&self, key: &Key) -> Option<Place> {
        let best: RefCell<Option<Place>> = RefCell::default();
        let is_left_over = |place: &Place| self.left_over.contains(&place.pack.id);
        let core = self.core();
        let marked = core.state().find(key, false, &|place| {
            if core.is_bad(place) {
                return false;
            }
            if self.is_live(&place.pack.id, key, place.location) {
                return true;
            }
            let mut best = best.borrow_mut();
            if best
                .as_ref()
                .is_none_or(|best| is_left_over(best) && !is_left_over(place))
            {
                *best = Some(place.clone());
            }
            false
        });
        marked.or_else(|| best.into_inner())
    }

    /// Sets the bit of the piece at a place; false if it was set.
    fn set_at(&mut self, key: &Key, place: &Place) -> bool {
        let bit_of = self.packs.get_mut(&place.pack.id).and_then(|marks| {
            let at = marks.index.position(key, place.location)?;
            Some((marks, at))
        });
        let is_new = match bit_of {
            None => self.others.insert(*key),
            Some((marks, at)) => {
                let (word, bit) = (&mut marks.bits[at / 64], 1 << (at % 64));
                let is_new = *word & bit == 0;
                *word |= bit;
                marks.live += u64::from(is_new);
                is_new
            }
        };
        self.live += u64::from(is_new);
        is_new
    }
}

impl PackMarks {
    fn shares(&self) -> Shares {
        let mut shares = Shares {
            is_open: self.is_open,
            pieces: 0,
            live: self.live,
            raw_bytes: 0,
            live_raw_bytes: 0,
        };
        let mut count = |at: usize, location: &Location| {
            let len = u64::from(location.len());
            shares.pieces += 1;
            shares.raw_bytes += len;
            if self.bits[at / 64] >> (at % 64) & 1 == 1 {
                shares.live_raw_bytes += len;
            }
        };
        match &self.index {
            PackIndex::Sorted(entries) => entries
                .iter()
                .enumerate()
                .for_each(|(at, (_, location))| count(at, location)),
            PackIndex::Footer(footer) => footer
                .entries()
                .enumerate()
                .for_each(|(at, (_, location))| count(at, &location)),
        }
        shares
    }
}

impl PackIndex {
    /// The number of a piece among the pack's.
    fn position(&self, key: &Key, location: Location) -> Option<usize> {
        match self {
            Self::Footer(footer) => footer.position(key, location),
            Self::Sorted(entries) => {
                let first = entries.partition_point(|(other, _)| other < key);
                entries[first..]
                    .iter()
                    .take_while(|(other, _)| other == key)
                    .position(|(_, at)| *at == location)
                    .map(|at| first + at)
            }
        }
    }
}

fn sorted(pieces: &PieceMap) -> Vec<(Key, Location)> {
    let mut sorted: Vec<_> = pieces.iter().map(|(key, at)| (*key, *at)).collect();
    sorted.sort_unstable_by_key(|(key, _)| *key);
    sorted
}
