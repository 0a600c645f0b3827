//! Hash parts are masked and come back.

use super::{assert_file, damage, fresh, noise, open, read_blob};
use crate::core::Core;
use crate::pack::{Class, Key, Kind};
use crate::patch::{PATCHES_MAX, masked_blob};
use crate::*;
use proptest::prelude::*;
use std::path::Path;
use std::sync::Arc;

const STORE: &str = "/nix/store";
const ALPHABET: &[u8; 32] = b"0123456789abcdfghijklmnpqrsvwxyz";

/// A hash part, the same for the same seed.
pub(crate) fn hash_part(seed: u64) -> [u8; 32] {
    let mut part = [0; 32];
    for (byte, out) in noise(seed, 32).iter().zip(&mut part) {
        *out = ALPHABET[usize::from(*byte) % 32];
    }
    part
}

fn masks(known: &[u64]) -> Arc<Masks> {
    let known = known.iter().map(|seed| hash_part(*seed));
    Arc::new(Masks::new(STORE.as_bytes(), known))
}

fn put(writer: &Arc<Writer>, masks: &Arc<Masks>, data: &[u8], part: usize) -> Node {
    let mut builder = TreeBuilder::with_masks(Arc::clone(writer), Arc::clone(masks));
    let mut sink = builder.file(None, false, data.len() as u64).unwrap();
    for part in data.chunks(part) {
        sink.write(part).unwrap();
    }
    assert_eq!(sink.finish().unwrap(), data.len() as u64);
    builder.finish().unwrap()
}

/// `len` bytes that do not compress, with these hash parts at these offsets.
fn with_parts(seed: u64, len: usize, parts: &[(usize, u64)]) -> Vec<u8> {
    let mut data = noise(seed, len);
    for (at, part) in parts {
        data[*at..at + 32].copy_from_slice(&hash_part(*part));
    }
    data
}

fn digest_of(node: &Node) -> Digest {
    let Node::File { digest, .. } = node else {
        panic!("{node:?}")
    };
    *digest
}

fn kinds(castore: &Castore, digest: &Digest) -> Vec<Kind> {
    [Class::Blob, Class::Patched]
        .iter()
        .filter_map(|class| castore.core().find(digest, *class)?.location.kind())
        .collect()
}

fn masked_digest(core: &Core, digest: &Digest) -> Digest {
    let place = core.find(digest, Class::Patched).unwrap();
    let bytes = core.piece(&place, digest).unwrap();
    masked_blob(&bytes).unwrap().0
}

/// A script and a library as a build writes them, and again with all hashes new.
#[test]
fn a_rebuild_adds_patches_only() {
    let (dir, castore) = fresh();
    let writer = castore.writer().unwrap();
    let generation = |number: u64| {
        let hash = |seed: u64| String::from_utf8(hash_part(number * 100 + seed).to_vec()).unwrap();
        let script = format!("#!{STORE}/{}-bash-5.2/bin/bash\n", hash(1)).into_bytes();
        let script = [script, noise(1, 3000)].concat();
        let mut library = noise(2, 700_000);
        for (at, seed) in [(0, 0), (262_100, 1), (300_000, 2), (699_900, 0)] {
            let text = format!("{STORE}/{}-glibc-2.40/lib", hash(seed));
            library[at..at + text.len()].copy_from_slice(text.as_bytes());
        }
        let masks = masks(&[number * 100, number * 100 + 1, number * 100 + 2]);
        [script, library].map(|data| (put(&writer, &masks, &data, 50_000), data))
    };
    let first = generation(1);
    writer.sync().unwrap();
    let (before, counted) = (castore.stats().unwrap(), writer.counters());
    assert_eq!(counted.masked_files, 2);
    assert_eq!(counted.masked_duplicate_bytes, 0);
    let second = generation(2);
    writer.sync().unwrap();
    let (after, counted) = (castore.stats().unwrap(), writer.counters());
    let added = after.raw_bytes - before.raw_bytes;
    assert!(added < 350, "{added}");
    assert_eq!(counted.masked_files, 4);
    let chunks_with_hashes = counted.masked_duplicate_bytes - second[0].1.len() as u64;
    assert!(
        (3 * 16_384..=700_000).contains(&chunks_with_hashes),
        "{counted:?}"
    );
    assert_eq!(
        counted.masked_duplicate_bytes + counted.chunk_duplicate_bytes,
        second
            .iter()
            .map(|(_, data)| data.len() as u64)
            .sum::<u64>(),
        "{counted:?}"
    );
    for (node, data) in first.iter().chain(&second) {
        assert_file(&castore, node, data);
        assert_eq!(kinds(&castore, &digest_of(node)), [Kind::Patched]);
    }
    let again = open(dir.path());
    for (node, data) in first.iter().chain(&second) {
        assert!(again.contains(&digest_of(node)));
        assert_file(&again, node, data);
    }
    assert_eq!(damage(&again), Vec::<String>::new());
    // Known as a whole: nothing is added, whatever is masked.
    for (masks, duplicate) in [(masks(&[]), 1), (masks(&[200, 201, 202]), 2)] {
        for (node, data) in &second {
            assert_eq!(put(&writer, &masks, data, 1 << 20), *node, "{duplicate}");
        }
    }
    writer.sync().unwrap();
    assert_eq!(castore.stats().unwrap().raw_bytes, after.raw_bytes);
}

#[test]
fn masking_can_be_turned_off_and_both_are_read_by_both() {
    let dir = tempfile::tempdir().unwrap();
    Castore::create(dir.path()).unwrap();
    let open = |mask_hash_parts| {
        let options = OpenOptions {
            mask_hash_parts,
            ..OpenOptions::default()
        };
        Castore::open(dir.path(), &options).unwrap()
    };
    let small = with_parts(1, 5000, &[(100, 7), (4968, 7)]);
    let large = with_parts(2, 500_000, &[(0, 7), (250_000, 7)]);
    let put_both = |castore: &Castore| {
        let writer = castore.writer().unwrap();
        let nodes = [&small, &large].map(|data| put(&writer, &masks(&[7]), data, 1000));
        writer.sync().unwrap();
        (nodes, writer.counters())
    };
    let (nodes, counted) = put_both(&open(false));
    assert_eq!(counted.masked_files, 0);
    for (node, kind) in nodes.iter().zip([Kind::Data, Kind::Recipe]) {
        assert_eq!(kinds(&open(true), &digest_of(node)), [kind]);
    }
    // A store from before: read, and what it has is not stored again under patches.
    let (again, counted) = put_both(&open(true));
    assert_eq!(again, nodes);
    assert_eq!(counted.masked_files, 0);
    assert_eq!(counted.file_duplicate_bytes, 505_000);
    for castore in [open(false), open(true)] {
        assert_file(&castore, &nodes[0], &small);
        assert_file(&castore, &nodes[1], &large);
        assert_eq!(damage(&castore), Vec::<String>::new());
    }
}

/// Files that hold other files' masked bytes, or whose masked bytes are another file that is
/// masked itself.
#[test]
fn masked_bytes_that_are_a_masked_file_themselves() {
    let (dir, castore) = fresh();
    let writer = castore.writer().unwrap();
    for len in [2000, 400_000] {
        let first = with_parts(len as u64, len, &[(100, 1), (1000, 2)]);
        let mut masked_once = first.clone();
        masked_once[100..132].fill(b'e');
        let mut masked_twice = masked_once.clone();
        masked_twice[1000..1032].fill(b'e');
        let files = [
            // Masked bytes of the next one, which is stored as patches of the last one.
            (put(&writer, &masks(&[2]), &masked_once, 999), masked_once),
            (put(&writer, &masks(&[1]), &first, 999), first),
            (
                put(&writer, &masks(&[1, 2]), &masked_twice, 999),
                masked_twice,
            ),
        ];
        writer.sync().unwrap();
        for castore in [&castore, &open(dir.path())] {
            for (node, data) in &files {
                assert_file(castore, node, data);
            }
            assert_eq!(damage(castore), Vec::<String>::new());
        }
    }
}

/// A builder that was given up has handed in patches; what they stand on never came.
#[test]
fn patches_whose_masked_bytes_are_gone_do_not_count() {
    for (len, known) in [(3000, 1), (3000, 2), (400_000, 1), (400_000, 2)] {
        let (dir, castore) = fresh();
        let data = with_parts(1, len, &[(100, 1), (2000, 2)]);
        let digest = Digest::of(&data);
        // Patches of something that is not stored, as a collection may leave them.
        let mut gone = data.clone();
        gone[100..132].fill(b'e');
        let mut patches = crate::patch::PatchBuilder::default();
        patches.push(100, &hash_part(1));
        let bytes = patches.encode(&Digest::of(&gone), len as u64);
        let writer = castore.writer().unwrap();
        let mut batch = crate::writer::Batch::default();
        batch.push(
            crate::pack::Piece {
                digest,
                kind: Kind::Patched,
                len: bytes.len() as u32,
            },
            &bytes,
        );
        writer.hand_in(&mut batch, None).unwrap();
        writer.sync().unwrap();
        assert!(castore.blob(&digest, len as u64).is_err());
        assert_eq!(damage(&castore), Vec::<String>::new());

        let node = put(&writer, &masks(&[known]), &data, 1000);
        writer.sync().unwrap();
        assert_eq!(digest_of(&node), digest);
        // Readers that know nothing of it find the whole one.
        for castore in [&castore, &open(dir.path())] {
            assert_file(castore, &node, &data);
            assert_eq!(damage(castore), Vec::<String>::new());
        }
        castore.rebuild_index().unwrap();
        assert_file(&open(dir.path()), &node, &data);
    }
}

/// An old recipe whose chunks were collected does not count, either.
#[test]
fn a_recipe_whose_chunks_are_gone_does_not_count() {
    let (dir, castore) = fresh();
    let data = with_parts(1, 400_000, &[(100, 1)]);
    let digest = Digest::of(&data);
    let writer = castore.writer().unwrap();
    let mut recipe = crate::recipe::RecipeBuilder::default();
    let mut none = |_, _: &[u8]| Ok::<(), CastoreError>(());
    recipe
        .push(Digest::of(b"gone"), 200_000, &mut none)
        .unwrap();
    recipe.push(Digest::of(b"too"), 200_000, &mut none).unwrap();
    let bytes = recipe.finish(&mut none).unwrap();
    let mut batch = crate::writer::Batch::default();
    batch.push(
        crate::pack::Piece {
            digest,
            kind: Kind::Recipe,
            len: bytes.len() as u32,
        },
        &bytes,
    );
    writer.hand_in(&mut batch, None).unwrap();
    writer.sync().unwrap();
    let node = put(&writer, &masks(&[1]), &data, 1000);
    writer.sync().unwrap();
    for castore in [&castore, &open(dir.path())] {
        assert_file(castore, &node, &data);
    }
}

#[test]
fn a_file_with_too_many_hash_parts_is_masked_in_its_first_part() {
    let (_dir, castore) = fresh();
    let writer = castore.writer().unwrap();
    let line = |number: u64| {
        let part = String::from_utf8(hash_part(number).to_vec()).unwrap();
        format!("{STORE}/{part}-x\n")
    };
    let mut text = String::new();
    for number in 0..PATCHES_MAX as u64 + 500 {
        text.push_str(&line(number));
    }
    let node = put(&writer, &masks(&[]), text.as_bytes(), 1 << 20);
    writer.sync().unwrap();
    assert_file(&castore, &node, text.as_bytes());
    let digest = digest_of(&node);
    let masked = masked_digest(castore.core(), &digest);
    let bytes = read_blob(&castore, &masked, text.len() as u64);
    let filler = bytes.windows(32).filter(|w| *w == [b'e'; 32]).count();
    assert_eq!(filler, PATCHES_MAX);
    // Keeping it open costs its patches.
    let blob = castore.blob(&digest, text.len() as u64).unwrap();
    let bytes = blob.memory_bytes();
    assert!(
        (16 * PATCHES_MAX as u64..10 << 20).contains(&(3 * bytes)),
        "{bytes} bytes"
    );
}

#[test]
fn small_files_and_files_without_hash_parts_stay_as_they_are() {
    let (_dir, castore) = fresh();
    let writer = castore.writer().unwrap();
    let tiny = with_parts(1, 300, &[(10, 1)]);
    let plain = with_parts(1, 300_000, &[]);
    for data in [&tiny, &plain] {
        let node = put(&writer, &masks(&[1]), data, 777);
        writer.sync().unwrap();
        assert_file(&castore, &node, data);
        assert!(!kinds(&castore, &digest_of(&node)).contains(&Kind::Patched));
    }
    assert_eq!(writer.counters().masked_files, 0);
}

/// Patches that decode and give other bytes than the digest says: a scrub reads the file to find it.
#[test]
fn a_scrub_finds_wrong_patches() {
    let (_dir, castore) = fresh();
    let writer = castore.writer().unwrap();
    let data = with_parts(1, 3000, &[(100, 1)]);
    let mut masked = data.clone();
    masked[100..132].fill(b'e');
    let node = put(&writer, &masks(&[]), &masked, 1000);
    let digest = Digest::of(&data);
    for wrong in [hash_part(2), hash_part(1)] {
        let (_dir, castore) = match wrong == hash_part(1) {
            true => fresh(),
            false => (tempfile::tempdir().unwrap(), castore.clone()),
        };
        let writer = castore.writer().unwrap();
        assert_eq!(put(&writer, &masks(&[]), &masked, 1000), node);
        let mut patches = crate::patch::PatchBuilder::default();
        patches.push(100, &wrong);
        let bytes = patches.encode(&Digest::of(&masked), 3000);
        let mut batch = crate::writer::Batch::default();
        batch.push(
            crate::pack::Piece {
                digest,
                kind: Kind::Patched,
                len: bytes.len() as u32,
            },
            &bytes,
        );
        writer.hand_in(&mut batch, None).unwrap();
        writer.sync().unwrap();
        let found = damage(&castore);
        if wrong == hash_part(1) {
            assert_eq!(found, Vec::<String>::new());
        } else {
            assert_eq!(found.len(), 1, "{found:?}");
            assert!(found[0].contains(&digest.to_string()), "{found:?}");
            assert!(castore.verify_blob(&digest, 3000).is_err());
        }
    }
}

/// A file as a test writes it down: length, hash parts (where, which), how many bytes at once.
fn any_file() -> impl Strategy<Value = (usize, Vec<(usize, u64)>, usize)> {
    let len = prop_oneof![
        32_usize..4000,
        131_000_usize..132_000,
        400_000_usize..1_500_000
    ];
    let places = proptest::collection::vec((any::<usize>(), 0_u64..4, 0_usize..4), 0..12);
    (len, places, 1_usize..300_000).prop_map(|(len, places, part)| {
        let mut places: Vec<(usize, u64)> = places
            .into_iter()
            .map(|(at, seed, near)| {
                // Often at borders of buffers and of the longest chunks, and often close together.
                let at = match near {
                    0 => at % len,
                    1 => (1 << 20) - 40 + at % 80,
                    2 => (256 << 10) - 40 + at % 80,
                    _ => at % 200,
                };
                (at.min(len - 32), seed)
            })
            .collect();
        places.sort_unstable();
        places.dedup_by(|b, a| b.0 < a.0 + 32);
        (len, places, part)
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    #[test]
    fn masked_files_come_back(
        (len, places, part) in any_file(),
        reads in proptest::collection::vec((any::<usize>(), 0_usize..300_000), 1..20),
        is_known: bool,
    ) {
        let (dir, castore) = fresh();
        let writer = castore.writer().unwrap();
        let data = with_parts(len as u64, len, &places);
        let masks = masks(if is_known { &[0, 1, 2] } else { &[3] });
        let node = put(&writer, &masks, &data, part);
        writer.sync().unwrap();
        assert_file(&castore, &node, &data);
        let digest = digest_of(&node);
        // Another way to hand it in gives the same bytes on disk.
        let before = castore.stats().unwrap().raw_bytes;
        put(&writer, &masks, &data, len);
        writer.sync().unwrap();
        prop_assert_eq!(castore.stats().unwrap().raw_bytes, before);
        let again = open(dir.path());
        let blob = again.blob(&digest, len as u64).unwrap();
        for (at, count) in reads {
            // Around hash parts, too.
            let at = match places.get(at % (places.len() + 1)) {
                Some((place, _)) => (place + at % 64).saturating_sub(32),
                None => at % len,
            };
            let mut buffer = vec![0; count];
            let read = blob.read_at(at as u64, &mut buffer).unwrap();
            let expected = &data[at.min(len)..(at + count).min(len)];
            prop_assert!(&buffer[..read] == expected);
        }
        prop_assert_eq!(damage(&again), Vec::<String>::new());
        let masked = places.iter().any(|(_, seed)| (*seed < 3) == is_known);
        let is_patched = castore.core().find(&digest, Class::Patched).is_some();
        prop_assert_eq!(is_patched, masked && len >= 512);
    }
}

/// Damages the patches' frame on disk.
#[test]
fn damaged_patches_are_corrupt_and_stored_again() {
    let (dir, castore) = fresh();
    let writer = castore.writer().unwrap();
    let data = with_parts(1, 3000, &[(100, 1)]);
    let node = put(&writer, &masks(&[1]), &data, 1000);
    writer.sync().unwrap();
    let digest = digest_of(&node);
    let place = castore.core().find(&digest, Class::Patched).unwrap();
    let pack = place.pack.path.clone();
    drop((writer, castore));
    flip_last_byte_of_frame(&pack, u64::from(place.location.frame_offset()));
    let castore = open(dir.path());
    let error = castore.blob(&digest, 3000).err().unwrap();
    assert!(matches!(error, CastoreError::Corrupt { .. }), "{error}");
    let writer = castore.writer().unwrap();
    assert_eq!(put(&writer, &masks(&[1]), &data, 1000), node);
    writer.sync().unwrap();
    assert_file(&castore, &node, &data);
    assert!(!writer.is_claimed(&Key::new(&digest, Class::Patched)));
}

fn flip_last_byte_of_frame(pack: &Path, offset: u64) {
    let mut bytes = std::fs::read(pack).unwrap();
    let header = crate::pack::FrameHeader::decode(&bytes[offset as usize..]).unwrap();
    let at = offset as usize + header.frame_len() - 1;
    bytes[at] ^= 1;
    std::fs::write(pack, bytes).unwrap();
}
