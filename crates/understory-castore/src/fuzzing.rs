//! What fuzzers and any-bytes tests call: each takes any bytes as one structure of the format.
//!
//! Checksums are made right first, so that what they guard is reached: they find decay, and an adversary can make
//! them. Each function panics when something is taken that should not be, and else does nothing.

use crate::core::Pack;
use crate::frames::read_frame;
use crate::index::{Footer, MERGED_HEADER_BYTES, Merged, Source, merge};
use crate::medium::Os;
use crate::pack::{
    self, Class, FOOTER_ENTRY_BYTES, FOOTER_HEADER_BYTES, FRAME_FIXED_BYTES, FRAME_MAGIC,
    FrameHeader, Key, PACK_HEADER_BYTES, PackId, TRAILER_BYTES, TRAILER_MAGIC, Trailer,
};
use crate::patch::{self, Patches};
use crate::recipe::RecipeNode;
use crate::{Digest, Directory, scan};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use xxhash_rust::xxh3::xxh3_64;

/// Frames of up to this are tried; larger ones have nothing new.
const BYTES_MAX: usize = 1 << 20;
/// Three packs and a fan-out of eight bits.
const MERGED_SMALL_BYTES: usize = 3 * 32 + (8 << 8);

/// A frame: header, table, payload.
///
/// # Panics
/// If a frame is taken whose pieces are not its bytes.
pub fn frame(bytes: &[u8]) {
    let mut bytes = bytes[..bytes.len().min(BYTES_MAX)].to_vec();
    if bytes.len() < FRAME_FIXED_BYTES {
        assert!(FrameHeader::decode(&bytes).is_err());
        return;
    }
    bytes[..4].copy_from_slice(&FRAME_MAGIC);
    if let Ok(header) = FrameHeader::decode(&bytes)
        && bytes.len() >= header.frame_len()
    {
        let (head, len) = (header.header_len(), header.frame_len());
        let payload = xxh3_64(&bytes[head..len]).to_le_bytes();
        bytes[24..32].copy_from_slice(&payload);
        let checksum = xxh3_64(&bytes[..head - 8]).to_le_bytes();
        bytes[head - 8..head].copy_from_slice(&checksum);
    }
    let scratch = Scratch::new(&bytes);
    let pack = Pack::new(PackId([0; 16]), 0, scratch.path.clone());
    let frame = read_frame(&scratch.file, &pack, 0, FRAME_FIXED_BYTES);
    let mut frames = 0;
    let walked = scan::frames(
        &scratch.file,
        &scratch.path,
        0,
        bytes.len() as u64,
        0,
        &mut |_| {
            frames += 1;
            Ok(())
        },
    );
    assert!(walked.is_ok());
    if let Ok(frame) = frame {
        assert!(frames > 0);
        for (piece, bytes) in frame.pieces() {
            assert_eq!(bytes.len(), piece.len as usize);
            if let Ok(directory) = Directory::decode(bytes) {
                assert_eq!(directory.encode(), bytes);
            }
        }
    }
}

/// The end of a sealed pack: footer and trailer.
///
/// # Panics
/// If a lookup leaves the footer.
pub fn footer(bytes: &[u8]) {
    let mut bytes = bytes[..bytes.len().min(BYTES_MAX)].to_vec();
    if let Some(at) = bytes.len().checked_sub(TRAILER_BYTES) {
        // Half of what comes has the lengths that belong together.
        let room = at.checked_sub(PACK_HEADER_BYTES + FOOTER_HEADER_BYTES);
        if let (1, Some(room)) = (bytes[at] & 1, room) {
            let pieces = room / FOOTER_ENTRY_BYTES;
            let offset = at - FOOTER_HEADER_BYTES - pieces * FOOTER_ENTRY_BYTES;
            bytes[at + 8..at + 16].copy_from_slice(&(offset as u64).to_le_bytes());
            bytes[at + 20..at + 24].copy_from_slice(&(pieces as u32).to_le_bytes());
            bytes[at + 36..at + 40].fill(0);
            bytes[at + 64..at + 120].fill(0);
        }
        bytes[at..at + 8].copy_from_slice(&TRAILER_MAGIC);
        let checksum = xxh3_64(&bytes[at..at + 120]).to_le_bytes();
        bytes[at + 120..].copy_from_slice(&checksum);
    }
    let len = bytes.len() as u64;
    let _ = pack::check_pack_header(&bytes, PackId([0; 16]));
    let scratch = Scratch::new(&bytes);
    let Ok(Some(trailer)) = scan::trailer(&scratch.file, &scratch.path, len) else {
        return;
    };
    assert!(trailer.footer_offset >= PACK_HEADER_BYTES as u64);
    let Ok(footer) = Footer::map(&scratch.file, &scratch.path, &trailer) else {
        return;
    };
    let _ = footer.is_sound();
    let keys: Vec<Key> = footer.entries().map(|(key, _)| key).collect();
    assert_eq!(keys.len(), trailer.pieces as usize);
    for key in keys.iter().take(64).chain(&some_keys(&bytes)) {
        let _ = footer.find(key);
    }
    let encoded = Trailer::decode(&bytes[bytes.len() - TRAILER_BYTES..], len).map(|t| t.encode());
    assert_eq!(
        encoded.as_ref().map(|bytes| &bytes[..]),
        Some(&bytes[bytes.len() - TRAILER_BYTES..])
    );
}

/// A merged index.
///
/// # Panics
/// If a lookup or a merge leaves the file, or a merge of it cannot be opened.
pub fn merged(bytes: &[u8]) {
    let mut bytes = bytes[..bytes.len().min(BYTES_MAX)].to_vec();
    // Half of what comes has the lengths that belong together.
    if bytes.len() >= MERGED_HEADER_BYTES + MERGED_SMALL_BYTES && bytes[0] & 1 == 1 {
        let packs = bytes[12] % 4;
        let head = MERGED_HEADER_BYTES + usize::from(packs) * 32 + (8 << 8);
        let entries = (bytes.len() - head) / 32;
        bytes.truncate(head + entries * 32);
        bytes[..8].copy_from_slice(b"USTYMIDX");
        bytes[8..28].fill(0);
        (bytes[8], bytes[12], bytes[24]) = (1, packs, 8);
        bytes[16..24].copy_from_slice(&(entries as u64).to_le_bytes());
        for pack in 0..usize::from(packs) {
            bytes[MERGED_HEADER_BYTES + pack * 32 + 16..][..16].fill(0);
        }
    }
    if bytes.len() >= MERGED_HEADER_BYTES {
        let packs = pack::u32_at(&bytes, 12) as usize;
        let fan = 8 << pack::u32_at(&bytes, 24).min(16);
        let end = MERGED_HEADER_BYTES
            .saturating_add(packs.saturating_mul(32))
            .saturating_add(fan);
        if let Some(head) = bytes.get(..end) {
            let sum = xxh3_64(&[&head[..48], &head[56..]].concat());
            bytes[48..56].copy_from_slice(&sum.to_le_bytes());
        }
    }
    let scratch = Scratch::new(&bytes);
    let Ok(index) = Merged::open(&scratch.path) else {
        return;
    };
    let _ = index.is_sound();
    let keys: Vec<Key> = index.entries().take(64).map(|(key, ..)| key).collect();
    for key in keys.iter().chain(&some_keys(&bytes)) {
        for (slot, location) in index.find(key).take(64) {
            let _ = (index.packs().get(slot), location.kind());
        }
    }
    let (temporary, to) = (scratch.beside(".tmp"), scratch.beside(".merged"));
    let made = merge(
        &Os,
        vec![Source::merged(&index), Source::merged(&index)],
        &|_| true,
        &temporary,
        &to,
    );
    let again = made.map(|()| Merged::open(&to));
    let _ = std::fs::remove_file(&to);
    let _ = std::fs::remove_file(&temporary);
    assert!(matches!(again, Ok(Ok(_))));
}

/// A patched piece.
///
/// # Panics
/// If patches are taken that leave the blob.
pub fn patches(bytes: &[u8]) {
    let Ok(patches) = Patches::decode(bytes) else {
        return;
    };
    assert_eq!(
        patch::masked_blob(bytes),
        Ok((patches.masked, patches.size))
    );
    let mut whole = vec![0; patches.size.min(4096) as usize];
    patches.apply(0, &mut whole);
    let half = whole.len() / 2;
    let mut part = vec![0; whole.len() - half];
    patches.apply(half as u64, &mut part);
    assert_eq!(part, whole[half..]);
    patches.mask(&mut whole);
    patches.apply(patches.size - 1, &mut part);
    patches.apply(u64::MAX, &mut part);
}

/// A node of a recipe.
///
/// # Panics
/// If a search leaves the node, or misses in one whose ends rise.
pub fn recipe(bytes: &[u8]) {
    let Ok(node) = RecipeNode::new(bytes) else {
        return;
    };
    assert!(node.count() >= 1);
    let sound = node.check_ends().is_ok();
    for at in 0..node.count() {
        let entry = node.entry(at);
        let found = node.find(entry.start);
        if sound {
            assert_eq!(found, Some(entry));
        }
    }
    if sound {
        assert_eq!(node.find(node.total()), None);
    }
    let _ = node.find(u64::MAX);
}

fn some_keys(bytes: &[u8]) -> [Key; 3] {
    [
        Key([0; 16]),
        Key([0xff; 16]),
        Key::new(&Digest::of(bytes), Class::Blob),
    ]
}

/// The bytes as a file, removed when dropped.
struct Scratch {
    file: File,
    path: PathBuf,
}

impl Scratch {
    fn new(bytes: &[u8]) -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let name = format!("understory-fuzz.{}.{number}", std::process::id());
        let path = std::env::temp_dir().join(name);
        let file = File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(true)
            .open(&path);
        match file.and_then(|file| file.write_all_at(bytes, 0).map(|()| file)) {
            Ok(file) => Self { file, path },
            Err(error) => panic!("writing {}: {error}", path.display()),
        }
    }
    fn beside(&self, suffix: &str) -> PathBuf {
        let mut name = self.path.clone().into_os_string();
        name.push(suffix);
        name.into()
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tests::masks::hash_part;
    use crate::tests::noise;
    use crate::{Castore, OpenOptions, TreeBuilder};
    use proptest::prelude::*;
    use std::sync::{Arc, OnceLock};

    /// A frame, the end of a pack, a merged index, a patched piece and a recipe, as a writer makes them.
    fn real() -> &'static [Vec<u8>; 5] {
        static REAL: OnceLock<[Vec<u8>; 5]> = OnceLock::new();
        REAL.get_or_init(|| {
            let dir = tempfile::tempdir().unwrap();
            Castore::create(dir.path()).unwrap();
            let options = OpenOptions {
                pack_bytes_max: 16 << 10,
                ..OpenOptions::default()
            };
            let castore = Castore::open(dir.path(), &options).unwrap();
            let writer = castore.writer().unwrap();
            for number in 0..40 {
                let mut builder = TreeBuilder::new(Arc::clone(&writer));
                builder.directory_begin(None).unwrap();
                let data = noise(number, 20_000);
                let mut sink = builder.file(Some(b"file"), false, 0).unwrap();
                sink.write(&data).unwrap();
                sink.finish().unwrap();
                builder.directory_end().unwrap();
                builder.finish().unwrap();
                writer.sync().unwrap();
            }
            let pack = std::fs::read_dir(dir.path().join("packs"))
                .unwrap()
                .map(|entry| std::fs::read(entry.unwrap().path()).unwrap())
                .find(|bytes| {
                    Trailer::decode(&bytes[bytes.len() - 128..], bytes.len() as u64).is_some()
                })
                .unwrap();
            let index = std::fs::read_dir(dir.path().join("index"))
                .unwrap()
                .map(|entry| entry.unwrap().path())
                .find(|path| path.extension().is_some_and(|ext| ext == "midx"))
                .unwrap();
            let mut patches = patch::PatchBuilder::default();
            for (at, seed) in [(5, 1), (40, 2), (90, 1)] {
                patches.push(at, &hash_part(seed));
            }
            let mut recipe = crate::recipe::RecipeBuilder::default();
            let mut none = |_, _: &[u8]| Ok::<(), ()>(());
            for number in 0..5_u8 {
                recipe
                    .push(Digest::of(&[number]), 70_000, &mut none)
                    .unwrap();
            }
            [
                pack[PACK_HEADER_BYTES..].to_vec(),
                pack,
                std::fs::read(index).unwrap(),
                patches.encode(&Digest::of(b"masked"), 200),
                recipe.finish(&mut none).unwrap(),
            ]
        })
    }

    /// Random bytes, or the real thing with some bytes changed, at its ends most of the time, or cut.
    fn any_bytes(which: usize) -> impl Strategy<Value = Vec<u8>> {
        let flip = (any::<usize>(), any::<u8>(), 0_u8..3);
        let changes = (
            proptest::collection::vec(flip, 0..5),
            any::<usize>(),
            0_u8..4,
        );
        prop_oneof![
            1 => proptest::collection::vec(any::<u8>(), 0..600),
            4 => changes.prop_map(move |(flips, cut, cuts)| {
                let mut bytes = real()[which].clone();
                let len = bytes.len();
                for (at, value, place) in flips {
                    let at = match place {
                        0 => at % len,
                        1 => at % len.min(96),
                        _ => len - 1 - at % len.min(192),
                    };
                    bytes[at] = value;
                }
                if cuts == 0 {
                    bytes.truncate(cut % (len + 1));
                }
                bytes
            }),
        ]
    }

    #[test]
    fn the_real_things_are_taken() {
        let [first, pack, index, patched, recipe_node] = real();
        frame(first);
        footer(pack);
        merged(index);
        patches(patched);
        recipe(recipe_node);
        assert!(Patches::decode(patched).is_ok());
        assert!(RecipeNode::new(recipe_node).is_ok());
        let scratch = Scratch::new(index);
        assert!(Merged::open(&scratch.path).is_ok_and(|index| index.is_sound()));
    }

    proptest! {
        #[test]
        fn any_frame_is_safe(bytes in any_bytes(0)) {
            frame(&bytes);
        }
        #[test]
        fn any_end_of_a_pack_is_safe(bytes in any_bytes(1)) {
            footer(&bytes);
        }
        #[test]
        fn any_merged_index_is_safe(bytes in any_bytes(2)) {
            merged(&bytes);
        }
        #[test]
        fn any_patched_piece_is_safe(bytes in any_bytes(3)) {
            patches(&bytes);
        }
        #[test]
        fn any_recipe_is_safe(bytes in any_bytes(4)) {
            recipe(&bytes);
        }
    }
}
