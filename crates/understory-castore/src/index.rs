//! Where pieces lie: maps of open packs, footers of sealed ones, merged index files.
//!
//! A sealed pack's footer is its index, mapped as it lies in the pack. Where many sealed packs have
//! come together, a *merged index* covers them in one sorted file. Merged files form tiers as in a
//! log-structured merge tree: [`TIER_FANOUT`] of about the same size become one. So a miss costs at
//! most [`FOOTERS_MAX`] + [`TIER_FANOUT`] × log₄(packs / 16) binary searches.
//!
//! A merged file names the packs that it covers; a file whose packs are all covered by another one
//! is superseded. That makes a manifest needless: the directory's listing is the state, the rename
//! of a finished file is what publishes it, and files that are superseded, damaged or half-written
//! are ignored and removed by whoever holds `index/lock`.
//!
//! Everything here can be made anew from the packs.

use crate::error::{CastoreError, IoContext};
use crate::mapped::Mapped;
use crate::medium::Medium;
use crate::pack::{
    BuildKeyHasher, FOOTER_ENTRY_BYTES, FOOTER_HEADER_BYTES, FOOTER_MAGIC, Key, Location, PackId,
    Trailer, u32_at, u64_at,
};
use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};
use std::fs::File;
use std::path::Path;
use std::sync::OnceLock;
use xxhash_rust::xxh3::{Xxh3, xxh3_64};

/// Sealed packs that are searched one by one before a merged index is made of them.
pub(crate) const FOOTERS_MAX: usize = 16;
/// Merged files of one tier that become one of the next.
pub(crate) const TIER_FANOUT: usize = 4;

pub(crate) type PieceMap = HashMap<Key, Location, BuildKeyHasher>;

const MERGED_MAGIC: [u8; 8] = *b"USTYMIDX";
const MERGED_VERSION: u32 = 1;
pub(crate) const MERGED_HEADER_BYTES: usize = 64;
const MERGED_PACK_BYTES: usize = 32;
const MERGED_ENTRY_BYTES: usize = 32;
/// Bytes gathered for one write of a merged file.
const MERGED_WRITE_BYTES: usize = 1 << 20;

/// The index of one sealed pack.
pub(crate) enum Footer {
    /// As it lies in the pack.
    Mapped {
        map: Mapped,
        checksum: u64,
        sound: OnceLock<bool>,
    },
    /// Its bytes are damaged: made of the frames' headers.
    Scanned(PieceMap),
}

impl Footer {
    pub(crate) fn map(file: &File, path: &Path, trailer: &Trailer) -> Result<Self, CastoreError> {
        let map =
            Mapped::new(file, trailer.footer_offset, trailer.footer_len()).verb("mapping", path)?;
        Ok(Self::Mapped {
            map,
            checksum: trailer.footer_checksum,
            sound: OnceLock::new(),
        })
    }

    /// Verifies the checksum once. Lookups do without it: a wrong hit shows in the frame, and
    /// before a piece is called missing, this is asked.
    pub(crate) fn is_sound(&self) -> bool {
        match self {
            Self::Mapped {
                map,
                checksum,
                sound,
            } => *sound.get_or_init(|| {
                map.bytes()[..8] == FOOTER_MAGIC && xxh3_64(map.bytes()) == *checksum
            }),
            Self::Scanned(_) => true,
        }
    }

    pub(crate) fn find(&self, key: &Key) -> Option<Location> {
        match self {
            Self::Scanned(pieces) => pieces.get(key).copied(),
            Self::Mapped { map, .. } => {
                let entries = &map.bytes()[FOOTER_HEADER_BYTES..];
                let first = first_of(map.bytes(), key);
                equal(entries, FOOTER_ENTRY_BYTES, first, *key)
                    .next()
                    .map(|entry| Location::from_bytes(&entry[16..]))
            }
        }
    }

    /// The number of an entry among the sorted ones; `None` if there is no such entry, or no order.
    pub(crate) fn position(&self, key: &Key, location: Location) -> Option<usize> {
        let Self::Mapped { map, .. } = self else {
            return None;
        };
        let first = first_of(map.bytes(), key);
        let wanted = location.to_bytes();
        equal(
            &map.bytes()[FOOTER_HEADER_BYTES..],
            FOOTER_ENTRY_BYTES,
            first,
            *key,
        )
        .position(|entry| entry[16..] == wanted)
        .map(|at| first + at)
    }

    /// All entries, sorted.
    pub(crate) fn entries(&self) -> Box<dyn Iterator<Item = (Key, Location)> + '_> {
        match self {
            Self::Mapped { map, .. } => Box::new(
                map.bytes()[FOOTER_HEADER_BYTES..]
                    .chunks_exact(FOOTER_ENTRY_BYTES)
                    .map(|entry| (key_at(entry), Location::from_bytes(&entry[16..]))),
            ),
            Self::Scanned(pieces) => {
                let mut entries: Vec<_> = pieces.iter().map(|(k, l)| (*k, *l)).collect();
                entries.sort_unstable_by_key(|(key, _)| *key);
                Box::new(entries.into_iter())
            }
        }
    }
}

/// The number of the first entry of a mapped footer that is not below `key`.
fn first_of(bytes: &[u8], key: &Key) -> usize {
    let fan = |at: usize| u32_at(bytes, 8 + at * 4) as usize;
    let first = usize::from(key.0[0]);
    let low = if first == 0 { 0 } else { fan(first - 1) };
    let entries = &bytes[FOOTER_HEADER_BYTES..];
    search(entries, FOOTER_ENTRY_BYTES, low, fan(first), key)
}

fn key_at(entry: &[u8]) -> Key {
    let mut key = [0; 16];
    key.copy_from_slice(&entry[..16]);
    Key(key)
}

/// Binary search for the first of the sorted entries `low..high` with `key`; returns its number.
/// Bounds may be nonsense if the bytes are damaged.
fn search(entries: &[u8], entry_bytes: usize, low: usize, high: usize, key: &Key) -> usize {
    let (mut low, mut high) = (low, high.min(entries.len() / entry_bytes));
    while low < high {
        let middle = low + (high - low) / 2;
        if entries[middle * entry_bytes..][..16] < key.0[..] {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    low
}

/// The entries with `key` from number `first` on.
fn equal(
    entries: &[u8],
    entry_bytes: usize,
    first: usize,
    key: Key,
) -> impl Iterator<Item = &[u8]> {
    entries
        .get(first.saturating_mul(entry_bytes)..)
        .unwrap_or_default()
        .chunks_exact(entry_bytes)
        .take_while(move |entry| entry[..16] == key.0)
}

/// A merged index file, open.
pub(crate) struct Merged {
    map: Mapped,
    packs: Vec<PackId>,
    entries: u64,
    fan_bits: u32,
    fan_at: usize,
    entries_at: usize,
    sound: OnceLock<bool>,
}

impl Merged {
    /// Opens one; says why it is of no use. Header, pack table and fan-out are verified here, the
    /// entries when [`Merged::is_sound`] is asked.
    pub(crate) fn open(path: &Path) -> Result<Self, String> {
        let open = || -> std::io::Result<(u64, Mapped)> {
            let file = File::open(path)?;
            let len = file.metadata()?.len();
            let map_len = usize::try_from(len).map_err(std::io::Error::other)?;
            Ok((len, Mapped::new(&file, 0, map_len)?))
        };
        let (len, map) = open().map_err(|error| error.to_string())?;
        let bytes = map.bytes();
        if bytes.len() < MERGED_HEADER_BYTES
            || bytes[..8] != MERGED_MAGIC
            || u32_at(bytes, 8) != MERGED_VERSION
        {
            return Err(format!("not a merged index of version {MERGED_VERSION}"));
        }
        let pack_count = u64::from(u32_at(bytes, 12));
        let entries = u64_at(bytes, 16);
        let fan_bits = u32_at(bytes, 24);
        let fan_at = MERGED_HEADER_BYTES as u64 + pack_count * MERGED_PACK_BYTES as u64;
        let entries_at = fan_at + (8 << fan_bits.min(16));
        let expected = entries
            .checked_mul(MERGED_ENTRY_BYTES as u64)
            .and_then(|bytes| bytes.checked_add(entries_at));
        if (fan_bits != 8 && fan_bits != 16) || expected != Some(len) {
            return Err(format!("expected {expected:?} bytes, found {len}"));
        }
        let (fan_at, entries_at) = (fan_at as usize, entries_at as usize);
        let mut hash = Xxh3::new();
        hash.update(&bytes[..48]);
        hash.update(&bytes[56..entries_at]);
        if hash.digest() != u64_at(bytes, 48) {
            return Err("the checksum of its header is wrong".to_owned());
        }
        let packs = bytes[MERGED_HEADER_BYTES..fan_at]
            .chunks_exact(MERGED_PACK_BYTES)
            .map(|entry| PackId(key_at(entry).0))
            .collect();
        if bytes[MERGED_HEADER_BYTES..fan_at]
            .chunks_exact(MERGED_PACK_BYTES)
            .any(|entry| entry[16..].iter().any(|byte| *byte != 0))
        {
            return Err("a pack lies in a place that this version does not know".to_owned());
        }
        Ok(Self {
            packs,
            entries,
            fan_bits,
            fan_at,
            entries_at,
            sound: OnceLock::new(),
            map,
        })
    }

    pub(crate) fn packs(&self) -> &[PackId] {
        &self.packs
    }

    /// Verifies the entries' checksum once.
    pub(crate) fn is_sound(&self) -> bool {
        *self.sound.get_or_init(|| {
            let bytes = self.map.bytes();
            xxh3_64(&bytes[self.entries_at..]) == u64_at(bytes, 56)
        })
    }

    /// Finds a piece: the places in [`Merged::packs`] of packs that have it, and its locations.
    pub(crate) fn find(&self, key: &Key) -> impl Iterator<Item = (usize, Location)> {
        let bytes = self.map.bytes();
        let prefix = usize::from(key.0[0]) << 8 | usize::from(key.0[1]);
        let first = prefix >> (16 - self.fan_bits);
        let fan = |at: usize| u64_at(bytes, self.fan_at + at * 8) as usize;
        let low = if first == 0 { 0 } else { fan(first - 1) };
        let entries = &bytes[self.entries_at..];
        let first = search(entries, MERGED_ENTRY_BYTES, low, fan(first), key);
        equal(entries, MERGED_ENTRY_BYTES, first, *key).map(|entry| {
            let slot = u32_at(entry, 16) as usize;
            (slot, Location::from_bytes(&entry[20..]))
        })
    }

    /// All entries, sorted: key, place of the pack, location.
    pub(crate) fn entries(&self) -> impl Iterator<Item = (Key, u32, Location)> + '_ {
        self.map.bytes()[self.entries_at..]
            .chunks_exact(MERGED_ENTRY_BYTES)
            .map(|entry| {
                (
                    key_at(entry),
                    u32_at(entry, 16),
                    Location::from_bytes(&entry[20..]),
                )
            })
    }
}

/// Something to merge: its packs, and its sorted entries with the place of the pack among them.
pub(crate) struct Source<'a> {
    pub(crate) packs: Vec<PackId>,
    /// At most so many entries.
    pub(crate) entries_max: u64,
    pub(crate) entries: Box<dyn Iterator<Item = (Key, u32, Location)> + 'a>,
}

impl<'a> Source<'a> {
    pub(crate) fn footer(pack: PackId, footer: &'a Footer, pieces: u32) -> Self {
        Self {
            packs: vec![pack],
            entries_max: u64::from(pieces),
            entries: Box::new(footer.entries().map(|(key, location)| (key, 0, location))),
        }
    }
    pub(crate) fn merged(merged: &'a Merged) -> Self {
        Self {
            packs: merged.packs.clone(),
            entries_max: merged.entries,
            entries: Box::new(merged.entries()),
        }
    }
}

/// Merges `sources` into the file `to`, by way of `temporary`. Entries of packs that `keep` refuses
/// are left out. Memory: the packs' names, one entry per source, one write buffer, the fan-out.
pub(crate) fn merge(
    medium: &dyn Medium,
    sources: Vec<Source<'_>>,
    keep: &dyn Fn(&PackId) -> bool,
    temporary: &Path,
    to: &Path,
) -> Result<(), CastoreError> {
    const DROPPED: u32 = u32::MAX;
    let entries_max: u64 = sources.iter().map(|source| source.entries_max).sum();
    let fan_bits: u32 = if entries_max < 1 << 18 { 8 } else { 16 };
    let mut packs: Vec<PackId> = Vec::new();
    let mut slots: Vec<Vec<u32>> = Vec::new();
    for source in &sources {
        let mut of_source = Vec::new();
        for pack in &source.packs {
            of_source.push(if keep(pack) {
                packs.push(*pack);
                (packs.len() - 1) as u32
            } else {
                DROPPED
            });
        }
        slots.push(of_source);
    }
    let fan_at = MERGED_HEADER_BYTES + packs.len() * MERGED_PACK_BYTES;
    let entries_at = fan_at + (8 << fan_bits);
    let mut fan = vec![0_u64; 1 << fan_bits];

    let file = medium.create_new(temporary).verb("creating", temporary)?;
    let mut offset = entries_at as u64;
    let mut count = 0_u64;
    let mut hash = Xxh3::new();
    let mut buffer: Vec<u8> = Vec::with_capacity(MERGED_WRITE_BYTES + MERGED_ENTRY_BYTES);
    let mut flush = |buffer: &mut Vec<u8>| -> Result<(), CastoreError> {
        medium
            .write_all_at(&file, temporary, buffer, offset)
            .verb("writing", temporary)?;
        hash.update(buffer);
        offset += buffer.len() as u64;
        buffer.clear();
        Ok(())
    };

    let mut iterators: Vec<_> = sources.into_iter().map(|source| source.entries).collect();
    let mut heap = BinaryHeap::new();
    for (at, iterator) in iterators.iter_mut().enumerate() {
        if let Some((key, slot, location)) = iterator.next() {
            heap.push(Reverse((key, at, slot, location.to_bytes())));
        }
    }
    let mut last = None;
    while let Some(Reverse((key, at, slot, location))) = heap.pop() {
        if let Some((key, slot, location)) = iterators[at].next() {
            heap.push(Reverse((key, at, slot, location.to_bytes())));
        }
        let slot = slots[at].get(slot as usize).copied().unwrap_or(DROPPED);
        // A piece may lie in several packs, and all places are kept: one may be damaged. Files that
        // cover the same pack have the same entries of it.
        let this = Some((key, slot, location));
        if slot == DROPPED || last == this {
            continue;
        }
        last = this;
        let prefix = usize::from(key.0[0]) << 8 | usize::from(key.0[1]);
        fan[prefix >> (16 - fan_bits)] += 1;
        count += 1;
        buffer.extend_from_slice(&key.0);
        buffer.extend_from_slice(&slot.to_le_bytes());
        buffer.extend_from_slice(&location);
        if buffer.len() >= MERGED_WRITE_BYTES {
            flush(&mut buffer)?;
        }
    }
    flush(&mut buffer)?;
    let entries_checksum = hash.digest();

    let mut head = vec![0; MERGED_HEADER_BYTES];
    head[..8].copy_from_slice(&MERGED_MAGIC);
    head[8..12].copy_from_slice(&MERGED_VERSION.to_le_bytes());
    head[12..16].copy_from_slice(&(packs.len() as u32).to_le_bytes());
    head[16..24].copy_from_slice(&count.to_le_bytes());
    head[24..28].copy_from_slice(&fan_bits.to_le_bytes());
    head[56..64].copy_from_slice(&entries_checksum.to_le_bytes());
    for pack in &packs {
        head.extend_from_slice(&pack.0);
        head.extend_from_slice(&[0; MERGED_PACK_BYTES - 16]);
    }
    let mut below = 0;
    for number in fan {
        below += number;
        head.extend_from_slice(&below.to_le_bytes());
    }
    let mut hash = Xxh3::new();
    hash.update(&head[..48]);
    hash.update(&head[56..]);
    let checksum = hash.digest();
    head[48..56].copy_from_slice(&checksum.to_le_bytes());
    medium
        .write_all_at(&file, temporary, &head, 0)
        .verb("writing", temporary)?;
    medium
        .sync_data(&file, temporary)
        .verb("syncing", temporary)?;
    medium.rename(temporary, to).verb("renaming", temporary)?;
    if let Some(dir) = to.parent() {
        medium.sync_dir(dir).verb("syncing", dir)?;
    }
    Ok(())
}
