//! Frames that are decompressed in part, and frames so large that pieces lie far in them.

use super::collect::{collect, thorough};
use super::*;
use crate::pack::{PACK_VERSION, PACK_VERSION_FAR};
use crate::store::CollectOptions;

const FILES: u64 = 120;
const FILE_BYTES: usize = 40_000;

/// Bytes that compress by half.
fn text(seed: u64, len: usize) -> Vec<u8> {
    let mut text: Vec<u8> = noise(seed, len.div_ceil(2))
        .iter()
        .flat_map(|byte| format!("{byte:02x}").into_bytes())
        .collect();
    text.truncate(len);
    text
}

/// A castore with files that share frames.
fn filled() -> (tempfile::TempDir, Vec<Node>) {
    let (dir, castore) = fresh();
    let writer = castore.writer().unwrap();
    let nodes: Vec<Node> = (0..FILES)
        .map(|seed| put_file(&writer, &text(seed, FILE_BYTES)))
        .collect();
    writer.sync().unwrap();
    nodes.iter().for_each(|node| castore.release(node));
    (dir, nodes)
}

fn blob_of(castore: &Castore, node: &Node) -> Blob {
    let Node::File { digest, size, .. } = node else {
        panic!("{node:?}")
    };
    castore.blob(digest, *size).unwrap()
}

fn pack_versions(dir: &Path) -> Vec<u32> {
    let mut versions: Vec<u32> = std::fs::read_dir(dir.join("packs"))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|end| end == "pack"))
        .map(|path| crate::pack::u32_at(&std::fs::read(path).unwrap(), 8))
        .collect();
    versions.sort_unstable();
    versions
}

#[test]
fn a_small_read_decompresses_no_more_than_it_must() {
    let (dir, nodes) = filled();
    let castore = open(dir.path());
    let decompressed = || castore.counters().decompressed_bytes;
    let mut buffer = [0; 4096];
    let read = |at: usize, offset: u64, buffer: &mut [u8]| {
        let blob = blob_of(&castore, &nodes[at]);
        assert_eq!(blob.read_at(offset, buffer).unwrap(), buffer.len());
        assert!(*buffer == text(at as u64, FILE_BYTES)[offset as usize..][..buffer.len()]);
    };
    // Three files are in a frame. The last pack is read at its end, far from its beginning.
    let first = FILES as usize - 30;
    read(first, 0, &mut buffer);
    let part = decompressed();
    assert!((1..=100_000).contains(&part), "{part}");
    assert!(castore.counters().frame_cache_bytes < part + 1000);
    // What is there is not decompressed again, ...
    read(first, 0, &mut buffer);
    assert_eq!(decompressed(), part);
    assert_eq!(castore.counters().frame_hits, 1);
    // ... and who wants what is behind gets all of the frame, which is then all that is kept of it.
    let mut all = vec![0; FILE_BYTES];
    for at in first..first + 3 {
        read(at, 0, &mut all);
    }
    let frames = castore.counters().frame_misses;
    assert!(frames <= 4, "{frames}");
    for at in first..first + 3 {
        read(at, 0, &mut all);
    }
    assert_eq!(castore.counters().frame_misses, frames);
    assert!(castore.counters().frame_cache_bytes < 300_000);
}

#[test]
fn readers_of_parts_do_not_disturb_each_other() {
    let (dir, nodes) = filled();
    let options = OpenOptions {
        frame_cache_bytes_max: 600_000,
        ..OpenOptions::default()
    };
    let castore = Castore::open(dir.path(), &options).unwrap();
    std::thread::scope(|scope| {
        for thread in 0..4_u64 {
            let (castore, nodes) = (&castore, &nodes);
            scope.spawn(move || {
                let places = noise(1000 + thread, 4 * 600);
                for place in places.chunks_exact(4) {
                    let seed = u64::from(place[0]) % FILES;
                    let blob = blob_of(castore, &nodes[seed as usize]);
                    let offset = usize::from(place[1]) * FILE_BYTES / 256;
                    let len = (usize::from(place[2]) * 60 + 1).min(FILE_BYTES - offset);
                    let mut buffer = vec![0; len];
                    assert_eq!(blob.read_at(offset as u64, &mut buffer).unwrap(), len);
                    assert!(buffer == text(seed, FILE_BYTES)[offset..offset + len]);
                }
            });
        }
    });
}

#[test]
fn pieces_far_in_their_frames_are_read_moved_and_copied() {
    let (dir, nodes) = filled();
    let castore = open(dir.path());
    castore.writer().unwrap().give_up_pack().unwrap();
    let check = |castore: &Castore, nodes: &[Node]| {
        // From behind, so that parts are asked for first.
        for (seed, node) in nodes.iter().enumerate().rev() {
            assert_file(castore, node, &text(seed as u64, FILE_BYTES));
        }
    };
    let repack = |dense, level| CollectOptions {
        all: true,
        level,
        dense,
        ..thorough()
    };
    let largest = Some(CollectOptions::DENSE_FRAME_BYTES_MAX);
    collect(&castore, nodes.iter(), &repack(largest, Some(3))).unwrap();
    assert_eq!(pack_versions(dir.path()), [PACK_VERSION_FAR]);
    check(&castore, &nodes);
    check(&open(dir.path()), &nodes);
    assert_eq!(damage(&open(dir.path())), Vec::<String>::new());
    // The index that is made of the packs says the same.
    castore.rebuild_index().unwrap();
    check(&open(dir.path()), &nodes);
    // Frames are copied as they are.
    collect(&castore, nodes.iter(), &repack(None, None)).unwrap();
    assert_eq!(pack_versions(dir.path()), [PACK_VERSION_FAR]);
    check(&open(dir.path()), &nodes);
    // And cut into usual ones again, without what is dead.
    let kept = &nodes[..100];
    collect(&castore, kept.iter(), &repack(None, Some(1))).unwrap();
    assert_eq!(pack_versions(dir.path()), [PACK_VERSION]);
    check(&open(dir.path()), kept);
}
