//! Flipped bits are found and never served; derived files can be lost.

use super::*;
use crate::pack::{PACK_HEADER_BYTES, TRAILER_BYTES};
use std::path::PathBuf;

fn files_in(dir: &Path, suffix: &str) -> Vec<PathBuf> {
    let mut files: Vec<_> = std::fs::read_dir(dir)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.to_str().unwrap().ends_with(suffix))
        .collect();
    files.sort();
    files
}

fn flip(path: &Path, at: usize, bit: u8) {
    let mut bytes = std::fs::read(path).unwrap();
    bytes[at] ^= 1 << bit;
    std::fs::write(path, bytes).unwrap();
}

fn small_packs() -> OpenOptions {
    OpenOptions {
        pack_bytes_max: 4096,
        compress_threads: 1,
        ..OpenOptions::default()
    }
}

fn tree(seed: u64) -> Tree {
    Tree::Directory(
        [
            (b"a".to_vec(), Tree::File(noise(seed, 700), false)),
            (b"b".to_vec(), Tree::File(vec![b'x'; 900], true)),
        ]
        .into(),
    )
}

/// Every tenth bit or so of a pack; all bytes are touched.
fn each_flip_is_found(sealed: bool) {
    let dir = tempfile::tempdir().unwrap();
    Castore::create(dir.path()).unwrap();
    let options = small_packs();
    let castore = Castore::open(dir.path(), &options).unwrap();
    let writer = castore.writer().unwrap();
    let trees = [tree(1), tree(2)];
    let mut nodes: Vec<_> = trees.iter().map(|tree| put_tree(&writer, tree)).collect();
    writer.sync().unwrap();
    let filler = Tree::File(noise(3, if sealed { 4000 } else { 1000 }), false);
    nodes.push(put_tree(&writer, &filler));
    writer.sync().unwrap();
    drop((writer, castore));
    let packs = files_in(&dir.path().join("packs"), ".pack");
    assert_eq!(packs.len(), 1);
    let good = std::fs::read(&packs[0]).unwrap();
    let tail = &good[good.len() - TRAILER_BYTES..];
    assert_eq!(tail.starts_with(b"USTYSEAL"), sealed);
    for at in 0..good.len() {
        let mut bad = good.clone();
        bad[at] ^= 1 << (at % 8);
        std::fs::write(&packs[0], &bad).unwrap();
        let castore = Castore::open(dir.path(), &options).unwrap();
        let found = damage(&castore);
        assert!(!found.is_empty(), "byte {at} of {}", good.len());
        // What can be read at all is right.
        for (node, tree) in nodes.iter().zip(trees.iter().chain([&filler])) {
            check_or_error(&castore, node, tree);
        }
    }
    std::fs::write(&packs[0], &good).unwrap();
    let castore = Castore::open(dir.path(), &options).unwrap();
    assert_eq!(damage(&castore), Vec::<String>::new());
}

fn check_or_error(castore: &Castore, node: &Node, tree: &Tree) {
    match (node, tree) {
        (Node::File { digest, size, .. }, Tree::File(data, _)) => {
            let mut buffer = vec![0; data.len()];
            if let Ok(blob) = castore.blob(digest, *size)
                && blob.read_at(0, &mut buffer).is_ok()
            {
                assert!(buffer == *data);
            }
        }
        (Node::Directory { digest, .. }, Tree::Directory(entries)) => {
            if let Ok(directory) = castore.directory(digest) {
                assert_eq!(directory.entries().len(), entries.len());
                for entry in directory.entries() {
                    check_or_error(castore, &entry.node, &entries[&*entry.name]);
                }
            }
        }
        _ => panic!("{node:?} is not {tree:?}"),
    }
}

#[test]
fn each_flipped_bit_of_an_open_pack_is_found() {
    each_flip_is_found(false);
}

#[test]
fn each_flipped_bit_of_a_sealed_pack_is_found() {
    each_flip_is_found(true);
}

#[test]
fn a_damaged_frame_is_named_and_its_neighbours_are_served() {
    let (dir, castore) = fresh();
    let writer = castore.writer().unwrap();
    let first = put_file(&writer, &noise(1, 5000));
    writer.sync().unwrap();
    let second = put_file(&writer, &noise(2, 5000));
    writer.sync().unwrap();
    let pack = files_in(&dir.path().join("packs"), ".pack").remove(0);
    let id = pack.file_stem().unwrap().to_str().unwrap().to_owned();
    flip(&pack, PACK_HEADER_BYTES + 1000, 0);
    let Node::File { digest, size, .. } = &first else {
        panic!()
    };
    let blob = castore.blob(digest, *size).unwrap();
    let error = blob.read_at(0, &mut [0; 10]).unwrap_err().to_string();
    let start = format!("frame at 64 of pack {id} is corrupt: payload checksum: expected ");
    assert!(error.starts_with(&start), "{error}");
    assert_file(&castore, &second, &noise(2, 5000));
    let mut lost = Vec::new();
    castore
        .scrub(&mut |_, _| {}, &mut |damage| lost.extend(damage.lost))
        .unwrap();
    assert_eq!(lost, [*digest]);
    // It is stored again when it is put again, also by a process that comes to know of the damage
    // only then, and is read from its new place.
    put_file(&writer, &noise(1, 5000));
    writer.sync().unwrap();
    assert_file(&castore, &first, &noise(1, 5000));
    drop((writer, castore));
    for _ in 0..2 {
        let castore = open(dir.path());
        assert_file(&castore, &first, &noise(1, 5000));
        assert_file(&castore, &second, &noise(2, 5000));
    }
}

/// The copy in another pack is found through a merged index as well.
#[test]
fn a_second_copy_is_read_when_the_first_is_damaged() {
    let dir = tempfile::tempdir().unwrap();
    Castore::create(dir.path()).unwrap();
    let castores = [0, 1].map(|_| Castore::open(dir.path(), &small_packs()).unwrap());
    let data = noise(0, 4500);
    let writers = castores.each_ref().map(|castore| castore.writer().unwrap());
    // Neither knows of the other's yet.
    let nodes = writers.each_ref().map(|writer| put_file(writer, &data));
    for writer in &writers {
        writer.sync().unwrap();
    }
    for seed in 1..40 {
        put_file(&writers[0], &noise(seed, 4500));
    }
    writers[0].sync().unwrap();
    assert!(!files_in(&dir.path().join("index"), ".midx").is_empty());
    let mut copies = 0;
    for pack in files_in(&dir.path().join("packs"), ".pack") {
        let good = std::fs::read(&pack).unwrap();
        if good[PACK_HEADER_BYTES + 32..][..32] != Digest::of(&data).0 {
            continue;
        }
        copies += 1;
        flip(&pack, PACK_HEADER_BYTES + 500, 2);
        let castore = Castore::open(dir.path(), &small_packs()).unwrap();
        assert_file(&castore, &nodes[0], &data);
        assert_file(&castore, &nodes[0], &data);
        std::fs::write(&pack, good).unwrap();
    }
    assert_eq!(copies, 2);
}

/// A bad header in the middle of the open pack must not cost what was acknowledged behind it.
#[test]
fn a_writer_does_not_cut_a_damaged_pack() {
    for (at_frame, marked) in [(0, false), (0, true), (1, true)] {
        let (dir, castore) = fresh();
        let writer = castore.writer().unwrap();
        let mut starts = Vec::new();
        let pack = || files_in(&dir.path().join("packs"), ".pack").remove(0);
        let nodes: Vec<_> = (0..2)
            .map(|seed| {
                starts.push(if seed == 0 {
                    PACK_HEADER_BYTES
                } else {
                    std::fs::metadata(pack()).unwrap().len() as usize
                });
                let node = put_file(&writer, &noise(seed, 5000));
                writer.sync().unwrap();
                node
            })
            .collect();
        drop((writer, castore));
        if !marked {
            std::fs::remove_dir_all(dir.path().join("index")).unwrap();
            std::fs::create_dir(dir.path().join("index")).unwrap();
        }
        flip(&pack(), starts[at_frame] + 9, 3);
        let before = std::fs::read(pack()).unwrap();
        let damaged = pack();
        let castore = open(dir.path());
        let writer = castore.writer().unwrap();
        let new = put_file(&writer, b"something new");
        writer.sync().unwrap();
        assert_eq!(std::fs::read(damaged).unwrap(), before);
        assert_file(&castore, &new, b"something new");
        assert_file(
            &castore,
            &nodes[1 - at_frame],
            &noise(1 - at_frame as u64, 5000),
        );
        assert_eq!(damage(&castore).len(), 1);
        // What is lost can be stored again.
        let node = put_file(&writer, &noise(at_frame as u64, 5000));
        writer.sync().unwrap();
        assert_eq!(node, nodes[at_frame]);
        assert_file(&castore, &node, &noise(at_frame as u64, 5000));
    }
}

#[test]
fn merged_indexes_come_together_and_can_be_lost_or_damaged() {
    let dir = tempfile::tempdir().unwrap();
    Castore::create(dir.path()).unwrap();
    let options = small_packs();
    let castore = Castore::open(dir.path(), &options).unwrap();
    let reader = Castore::open(dir.path(), &options).unwrap();
    let writer = castore.writer().unwrap();
    let mut files = Vec::new();
    for seed in 0..150 {
        let data = noise(seed, 4200);
        files.push((put_file(&writer, &data), data));
        writer.sync().unwrap();
    }
    let verify = |castore: &Castore| {
        for (node, data) in &files {
            assert_file(castore, node, data);
        }
    };
    verify(&castore);
    verify(&reader);
    let index = dir.path().join("index");
    let merged = files_in(&index, ".midx");
    // 150 packs: eight times seventeen, four of these merged once more, and the rest in footers.
    assert!((2..=6).contains(&merged.len()), "{merged:?}");
    let state = castore.core().state();
    assert!(state.sealed.len() <= crate::index::FOOTERS_MAX);
    assert_eq!(state.packs.len(), 150);
    assert_eq!(castore.stats().unwrap().data_pieces, 150);
    assert_eq!(damage(&castore), Vec::<String>::new());

    // Damaged anywhere: told by scrub, and no reader fails.
    for (number, file) in merged.iter().enumerate() {
        let good = std::fs::read(file).unwrap();
        for at in [0, 9, 20, 50, 60, 70, 700, good.len() / 2, good.len() - 1] {
            flip(file, at, (number % 8) as u8);
            let read_only = OpenOptions {
                read_only: true,
                ..options.clone()
            };
            let fresh = Castore::open(dir.path(), &read_only).unwrap();
            assert_eq!(damage(&fresh).len(), 1, "byte {at}");
            verify(&fresh);
            std::fs::write(file, &good).unwrap();
        }
    }
    // A writer replaces what is damaged; lost files come back by themselves.
    flip(&merged[0], 1000, 1);
    let fresh = Castore::open(dir.path(), &options).unwrap();
    verify(&fresh);
    std::fs::remove_dir_all(&index).unwrap();
    let fresh = Castore::open(dir.path(), &options).unwrap();
    verify(&fresh);
    assert!(!files_in(&index, ".midx").is_empty());
    // Those that were open all the time still read, and agree after a rebuild.
    verify(&reader);
    reader.rebuild_index().unwrap();
    for castore in [&castore, &reader, &fresh] {
        castore.refresh().unwrap();
        verify(castore);
        assert_eq!(damage(castore), Vec::<String>::new());
    }
}

#[test]
fn a_damaged_footer_is_written_again_by_a_rebuild() {
    let dir = tempfile::tempdir().unwrap();
    Castore::create(dir.path()).unwrap();
    let options = small_packs();
    let castore = Castore::open(dir.path(), &options).unwrap();
    let writer = castore.writer().unwrap();
    let node = put_file(&writer, &noise(1, 5000));
    writer.sync().unwrap();
    drop((writer, castore));
    let pack = files_in(&dir.path().join("packs"), ".pack").remove(0);
    let good = std::fs::read(&pack).unwrap();
    let entry = good.len() - TRAILER_BYTES - crate::pack::FOOTER_ENTRY_BYTES;
    for at in [entry, entry + 17, entry - 500] {
        flip(&pack, at, 0);
        let castore = Castore::open(dir.path(), &options).unwrap();
        if at != entry + 17 {
            // A wrong location shows when it is used; a key that is not found is looked into.
            assert_file(&castore, &node, &noise(1, 5000));
        }
        assert_eq!(damage(&castore).len(), 1);
        castore.rebuild_index().unwrap();
        assert_file(&castore, &node, &noise(1, 5000));
        assert_eq!(damage(&castore), Vec::<String>::new());
        assert!(std::fs::read(&pack).unwrap() == good);
    }
}

/// What is damaged cannot be moved, so its pack stays; what is sound goes on being read, from there or from new packs.
#[test]
fn a_repack_leaves_a_pack_with_a_damaged_frame_and_loses_nothing_else() {
    for dense in [None, Some(256 << 10), Some(4 << 20)] {
        let dir = tempfile::tempdir().unwrap();
        Castore::create(dir.path()).unwrap();
        let castore = Castore::open(dir.path(), &small_packs()).unwrap();
        let writer = castore.writer().unwrap();
        let nodes: Vec<Node> = (0..6)
            .map(|seed| {
                let node = put_file(&writer, &noise(seed, 3000));
                writer.sync().unwrap();
                node
            })
            .collect();
        nodes.iter().for_each(|node| castore.release(node));
        drop((writer, castore));
        // Two files are in a pack. The first of one is damaged.
        let packs = files_in(&dir.path().join("packs"), ".pack");
        assert_eq!(packs.len(), 3);
        flip(&packs[1], PACK_HEADER_BYTES + 1000, 0);
        let castore = Castore::open(dir.path(), &small_packs()).unwrap();
        let options = crate::store::CollectOptions {
            all: true,
            level: Some(3),
            dense,
            ..crate::store::CollectOptions::default()
        };
        let report = super::collect::collect(&castore, nodes.iter(), &options).unwrap();
        assert_eq!(report.kept_damaged.packs, 1, "{report:?}");
        assert_eq!(report.packs_deleted, 2, "{report:?}");
        assert!(packs[1].exists());
        for castore in [castore, open(dir.path())] {
            let (lost, sound): (Vec<_>, Vec<_>) = (0..).zip(&nodes).partition(|(_, node)| {
                let Node::File { digest, size, .. } = node else {
                    panic!()
                };
                let read = castore
                    .blob(digest, *size)
                    .and_then(|blob| blob.read_at(0, &mut [0; 3000]));
                read.is_err_and(|error| matches!(error, CastoreError::Corrupt { .. }))
            });
            assert_eq!(lost.len(), 1);
            for (seed, node) in sound {
                assert_file(&castore, node, &noise(seed, 3000));
            }
        }
    }
}
