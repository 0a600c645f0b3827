//! Tests of the castore as a whole.

mod collect;
mod crash;
mod damage;
pub(crate) mod masks;
mod parts;
mod processes;

use crate::*;
use proptest::prelude::*;
use std::path::Path;
use std::sync::Arc;

pub(crate) fn fresh() -> (tempfile::TempDir, Castore) {
    let dir = tempfile::tempdir().unwrap();
    Castore::create(dir.path()).unwrap();
    let castore = open(dir.path());
    (dir, castore)
}

pub(crate) fn open(dir: &Path) -> Castore {
    Castore::open(dir, &OpenOptions::default()).unwrap()
}

/// Bytes that do not compress, the same for the same seed.
pub(crate) fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    blake3::Hasher::new_derive_key("noise")
        .update(&seed.to_le_bytes())
        .finalize_xof()
        .fill(&mut bytes);
    bytes
}

pub(crate) fn put_file(writer: &Arc<Writer>, data: &[u8]) -> Node {
    let mut builder = TreeBuilder::new(Arc::clone(writer));
    let mut sink = builder.file(None, false, data.len() as u64).unwrap();
    for part in data.chunks(100_000) {
        sink.write(part).unwrap();
    }
    assert_eq!(sink.finish().unwrap(), data.len() as u64);
    builder.finish().unwrap()
}

pub(crate) fn read_blob(castore: &Castore, digest: &Digest, size: u64) -> Vec<u8> {
    let blob = castore.blob(digest, size).unwrap();
    let mut data = vec![0; size as usize];
    let mut at = 0;
    while at < data.len() {
        let count = blob.read_at(at as u64, &mut data[at..]).unwrap();
        assert!(count > 0);
        at += count;
    }
    data
}

pub(crate) fn assert_file(castore: &Castore, node: &Node, data: &[u8]) {
    let Node::File { digest, size, .. } = node else {
        panic!("{node:?}")
    };
    assert_eq!(*digest, Digest::of(data));
    assert_eq!(*size, data.len() as u64);
    assert!(read_blob(castore, digest, *size) == data);
    castore.verify_blob(digest, *size).unwrap();
}

#[test]
fn files_of_all_sizes_come_back() {
    let (dir, castore) = fresh();
    let writer = castore.writer().unwrap();
    let sizes = [
        0, 1, 100, 16_384, 131_071, 131_072, 131_073, 262_144, 262_145, 1_048_576, 1_048_577,
        5_000_000,
    ];
    let files: Vec<_> = sizes
        .iter()
        .map(|size| noise(*size as u64, *size))
        .map(|data| (put_file(&writer, &data), data))
        .collect();
    writer.sync().unwrap();
    for (node, data) in &files {
        assert_file(&castore, node, data);
    }
    let again = open(dir.path());
    for (node, data) in &files {
        assert_file(&again, node, data);
    }
    let zeros = vec![0; 3_000_000];
    let node = put_file(&writer, &zeros);
    writer.sync().unwrap();
    assert_file(&castore, &node, &zeros);
    assert_file(&again, &node, &zeros);
    let stats = castore.stats().unwrap();
    assert_eq!(stats, again.stats().unwrap());
    assert_eq!(stats.packs, 1);
    let mut damage = Vec::new();
    again
        .scrub(&mut |_, _| {}, &mut |d| damage.push(d))
        .unwrap();
    assert!(damage.is_empty(), "{damage:?}");
}

/// A tree as a test writes it down.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Tree {
    Directory(std::collections::BTreeMap<Vec<u8>, Tree>),
    File(Vec<u8>, bool),
    Symlink(Vec<u8>),
}

pub(crate) fn put_tree(writer: &Arc<Writer>, tree: &Tree) -> Node {
    fn add(builder: &mut TreeBuilder, name: Option<&[u8]>, tree: &Tree) {
        match tree {
            Tree::Directory(entries) => {
                builder.directory_begin(name).unwrap();
                // Not in the order of names, as a directory on disk is read.
                for (name, tree) in entries.iter().rev() {
                    add(builder, Some(name), tree);
                }
                builder.directory_end().unwrap();
            }
            Tree::File(data, executable) => {
                let mut sink = builder.file(name, *executable, 0).unwrap();
                for part in data.chunks(70_001) {
                    sink.write(part).unwrap();
                }
                sink.finish().unwrap();
            }
            Tree::Symlink(target) => builder.symlink(name, target).unwrap(),
        }
    }
    let mut builder = TreeBuilder::new(Arc::clone(writer));
    add(&mut builder, None, tree);
    builder.finish().unwrap()
}

pub(crate) fn get_tree(castore: &Castore, node: &Node) -> Tree {
    match node {
        Node::Directory { digest, size } => {
            let directory = castore.directory(digest).unwrap();
            assert_eq!(directory.size(), *size);
            Tree::Directory(
                directory
                    .entries()
                    .iter()
                    .map(|entry| (entry.name.to_vec(), get_tree(castore, &entry.node)))
                    .collect(),
            )
        }
        Node::File {
            digest,
            size,
            executable,
        } => Tree::File(read_blob(castore, digest, *size), *executable),
        Node::Symlink { target } => Tree::Symlink(target.to_vec()),
    }
}

fn any_tree() -> impl Strategy<Value = Tree> {
    let data = (
        any::<u8>(),
        prop_oneof![0_usize..300, 100_000_usize..600_000],
        any::<bool>(),
    )
        .prop_map(|(seed, len, noisy)| match noisy {
            true => noise(u64::from(seed), len),
            false => vec![seed; len],
        });
    let leaf = prop_oneof![
        4 => (data, any::<bool>()).prop_map(|(data, executable)| Tree::File(data, executable)),
        1 => proptest::collection::vec(1_u8..=255, 1..4096).prop_map(Tree::Symlink),
    ];
    let name = proptest::collection::vec(
        any::<u8>().prop_filter("a name's bytes", |byte| !b"/\0.".contains(byte)),
        1..=255,
    );
    leaf.prop_recursive(4, 40, 8, move |inner| {
        proptest::collection::btree_map(name.clone(), inner, 0..8).prop_map(Tree::Directory)
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]
    #[test]
    fn trees_come_back(trees in proptest::collection::vec(any_tree(), 1..4), pack in 12_u32..22) {
        let dir = tempfile::tempdir().unwrap();
        Castore::create(dir.path()).unwrap();
        let options = OpenOptions {
            pack_bytes_max: 1 << pack,
            compression_level: 1,
            frame_cache_bytes_max: 1 << 20,
            ..OpenOptions::default()
        };
        let castore = Castore::open(dir.path(), &options).unwrap();
        let writer = castore.writer().unwrap();
        let nodes: Vec<Node> = trees.iter().map(|tree| put_tree(&writer, tree)).collect();
        writer.sync().unwrap();
        let before = castore.stats().unwrap();
        for (node, tree) in nodes.iter().zip(&trees) {
            prop_assert_eq!(&get_tree(&castore, node), tree);
            // All of it is stored: the same again needs nothing.
            prop_assert_eq!(&put_tree(&writer, tree), node);
        }
        writer.sync().unwrap();
        let after = castore.stats().unwrap();
        prop_assert_eq!(before.raw_bytes, after.raw_bytes);
        let again = open(dir.path());
        for (node, tree) in nodes.iter().zip(&trees) {
            prop_assert_eq!(&get_tree(&again, node), tree);
        }
        again.rebuild_index().unwrap();
        for (node, tree) in nodes.iter().zip(&trees) {
            prop_assert_eq!(&get_tree(&again, node), tree);
        }
        prop_assert_eq!(damage(&again), Vec::<String>::new());
    }

    #[test]
    fn reads_at_any_place(offset in 0_u64..1_300_000, len in 0_usize..700_000) {
        static STORE: std::sync::OnceLock<(tempfile::TempDir, Castore, Node, Vec<u8>)> =
            std::sync::OnceLock::new();
        let (_, castore, node, data) = STORE.get_or_init(|| {
            let (dir, castore) = fresh();
            let data = [noise(9, 900_000), vec![1; 300_000]].concat();
            let writer = castore.writer().unwrap();
            let node = put_file(&writer, &data);
            writer.sync().unwrap();
            (dir, castore, node, data)
        });
        let Node::File { digest, size, .. } = node else { panic!() };
        let blob = castore.blob(digest, *size).unwrap();
        let mut buffer = vec![0xaa; len];
        let count = blob.read_at(offset, &mut buffer).unwrap();
        let start = (offset as usize).min(data.len());
        let expected = &data[start..(start + len).min(data.len())];
        prop_assert_eq!(count, expected.len());
        prop_assert!(&buffer[..count] == expected);
    }
}

pub(crate) fn damage(castore: &Castore) -> Vec<String> {
    let mut found = Vec::new();
    castore
        .scrub(&mut |_, _| {}, &mut |damage| {
            found.push(format!("{}: {}", damage.what, damage.reason));
        })
        .unwrap();
    found
}

#[test]
fn equal_files_with_another_exec_bit_are_two_nodes_and_one_piece() {
    let (_dir, castore) = fresh();
    let writer = castore.writer().unwrap();
    let tree = Tree::Directory(
        [
            (b"a".to_vec(), Tree::File(b"same".to_vec(), false)),
            (b"b".to_vec(), Tree::File(b"same".to_vec(), true)),
        ]
        .into(),
    );
    let node = put_tree(&writer, &tree);
    writer.sync().unwrap();
    assert_eq!(get_tree(&castore, &node), tree);
    let stats = castore.stats().unwrap();
    assert_eq!((stats.data_pieces, stats.directories), (1, 1));
    assert_eq!(writer.counters().file_duplicate_bytes, 4);
}

/// A file whose bytes are a directory's encoding has its digest too, and neither stands in for the
/// other.
#[test]
fn a_file_that_reads_as_a_directory_is_another_piece() {
    let (_dir, castore) = fresh();
    let writer = castore.writer().unwrap();
    let tree = Tree::Directory([(b"a".to_vec(), Tree::File(b"x".to_vec(), false))].into());
    let Node::Directory { digest, .. } = put_tree(&writer, &tree) else {
        panic!()
    };
    writer.sync().unwrap();
    let bytes = castore.directory(&digest).unwrap().encode();
    assert!(castore.blob(&digest, bytes.len() as u64).is_err());
    let node = put_file(&writer, &bytes);
    writer.sync().unwrap();
    assert_file(&castore, &node, &bytes);
    assert_eq!(castore.directory(&digest).unwrap().entries().len(), 1);
}

#[test]
fn wide_odd_and_empty_trees_come_back() {
    let (dir, castore) = fresh();
    let writer = castore.writer().unwrap();
    let mut wide = std::collections::BTreeMap::new();
    for number in 0..50_000_u32 {
        let tree = match number % 3 {
            0 => Tree::File(number.to_le_bytes().to_vec(), number % 2 == 0),
            1 => Tree::Symlink(number.to_string().into_bytes()),
            _ => Tree::Directory(std::collections::BTreeMap::new()),
        };
        wide.insert(format!("entry-{number}").into_bytes(), tree);
    }
    let odd = Tree::Directory(
        [
            (vec![b'n'; 255], Tree::File(Vec::new(), true)),
            (
                vec![0xff, 0xfe, b'\n'],
                Tree::File(b"not utf-8".to_vec(), false),
            ),
            (b"link".to_vec(), Tree::Symlink(vec![b't'; 4095])),
            (b"wide".to_vec(), Tree::Directory(wide)),
        ]
        .into(),
    );
    let nodes = [
        put_tree(&writer, &odd),
        put_tree(&writer, &Tree::Symlink(b"just a link".to_vec())),
        put_tree(&writer, &Tree::Directory(std::collections::BTreeMap::new())),
        put_tree(&writer, &Tree::File(Vec::new(), false)),
    ];
    writer.sync().unwrap();
    let again = open(dir.path());
    assert_eq!(get_tree(&again, &nodes[0]), odd);
    assert_eq!(
        nodes[2],
        Node::Directory {
            digest: Digest::EMPTY,
            size: 0
        }
    );
    assert!(again.contains(&Digest::EMPTY));
    assert_eq!(get_tree(&again, &nodes[3]), Tree::File(Vec::new(), false));
}

#[test]
fn events_out_of_order_are_refused() {
    let (_dir, castore) = fresh();
    let writer = castore.writer().unwrap();
    let begin = || TreeBuilder::new(Arc::clone(&writer));
    let text = |result: Result<Node, CastoreError>| result.unwrap_err().to_string();
    assert_eq!(text(begin().finish()), "the tree has no root");
    let mut builder = begin();
    builder.directory_begin(None).unwrap();
    assert_eq!(text(builder.finish()), "the tree ends inside 1 directories");
    let mut builder = begin();
    assert!(builder.directory_end().is_err());
    assert!(builder.directory_begin(Some(b"x")).is_err());
    builder.symlink(None, b"t").unwrap();
    assert_eq!(
        builder.symlink(None, b"t").unwrap_err().to_string(),
        "a second root"
    );
    let mut builder = begin();
    builder.directory_begin(None).unwrap();
    assert!(builder.symlink(None, b"t").is_err());
    assert!(builder.symlink(Some(b".."), b"t").is_err());
    builder.symlink(Some(b"a"), b"t").unwrap();
    builder.symlink(Some(b"a"), b"t").unwrap();
    assert_eq!(
        builder.directory_end().unwrap_err().to_string(),
        "two entries of one directory are named `a`"
    );
    let mut builder = begin();
    drop(builder.file(None, false, 0).unwrap());
    assert_eq!(text(builder.finish()), "the tree ends inside a file");
}

#[test]
fn a_castore_is_made_once_and_known_by_its_version() {
    let dir = tempfile::tempdir().unwrap();
    let open = || Castore::open(dir.path(), &OpenOptions::default()).map(drop);
    assert!(matches!(open(), Err(CastoreError::NotACastore { .. })));
    Castore::create(dir.path()).unwrap();
    assert!(Castore::create(dir.path()).is_err());
    let file = dir.path().join("castore");
    assert_eq!(std::fs::read(&file).unwrap(), b"understory castore 1\n");
    std::fs::write(&file, "understory castore 7\n").unwrap();
    let error = open().unwrap_err();
    assert_eq!(
        error.to_string(),
        format!(
            "castore {} has format 7, this program knows up to 1",
            dir.path().display()
        )
    );
    std::fs::write(&file, "something else").unwrap();
    assert!(matches!(open(), Err(CastoreError::Corrupt { .. })));
}

#[test]
fn what_is_not_there_is_missing_and_a_wrong_size_is_corrupt() {
    let (_dir, castore) = fresh();
    let digest = Digest::of(b"nothing");
    assert_eq!(
        castore.blob(&digest, 7).err().unwrap().to_string(),
        format!("blob {digest} is not in the castore")
    );
    assert_eq!(
        castore.directory(&digest).unwrap_err().to_string(),
        format!("directory {digest} is not in the castore")
    );
    let writer = castore.writer().unwrap();
    put_file(&writer, b"seven b");
    writer.sync().unwrap();
    let digest = Digest::of(b"seven b");
    assert_eq!(
        castore.blob(&digest, 8).err().unwrap().to_string(),
        format!("blob {digest} is corrupt: expected 8 bytes, found 7")
    );
    assert!(castore.blob(&Digest::EMPTY, 1).is_err());
}

#[test]
fn a_read_only_castore_is_left_as_it_is() {
    let (dir, castore) = fresh();
    let writer = castore.writer().unwrap();
    let node = put_file(&writer, b"data");
    writer.sync().unwrap();
    drop((writer, castore));
    std::fs::remove_dir_all(dir.path().join("index")).unwrap();
    let options = OpenOptions {
        read_only: true,
        ..OpenOptions::default()
    };
    let castore = Castore::open(dir.path(), &options).unwrap();
    assert_file(&castore, &node, b"data");
    assert!(castore.writer().is_err());
    assert!(castore.rebuild_index().is_err());
    assert!(!dir.path().join("index").exists());
}

#[test]
fn large_sparse_files_stream_through() {
    const LEN: u64 = 700 << 20;
    let (_dir, castore) = fresh();
    let writer = castore.writer().unwrap();
    let zeros = vec![0; 1 << 20];
    let mut builder = TreeBuilder::new(Arc::clone(&writer));
    let mut sink = builder.file(None, false, LEN).unwrap();
    let mut written = 0;
    while written < LEN {
        sink.write(&zeros).unwrap();
        written += zeros.len() as u64;
    }
    sink.write(b"the end").unwrap();
    sink.finish().unwrap();
    let node = builder.finish().unwrap();
    writer.sync().unwrap();
    let Node::File { digest, size, .. } = node else {
        panic!()
    };
    assert_eq!(size, LEN + 7);
    let stats = castore.stats().unwrap();
    assert!(stats.stored_bytes < 200_000, "{stats:?}");
    let blob = castore.blob(&digest, size).unwrap();
    let mut end = [1; 12];
    assert_eq!(blob.read_at(LEN - 4, &mut end).unwrap(), 11);
    assert_eq!(&end[..11], b"\0\0\0\0the end");
    assert_eq!(blob.read_at(LEN / 3, &mut end).unwrap(), 12);
    assert_eq!(end, [0; 12]);
    assert!(
        blob.memory_bytes() < 1 << 20,
        "{} bytes",
        blob.memory_bytes()
    );
}

#[test]
fn an_open_file_keeps_its_list_of_chunks_and_not_what_lies_beside_it() {
    let (_dir, castore) = fresh();
    let writer = castore.writer().unwrap();
    // Lists of chunks share a frame.
    let files: Vec<Node> = (0..8)
        .map(|seed| put_file(&writer, &noise(seed, 1 << 20)))
        .collect();
    writer.sync().unwrap();
    for node in files {
        let Node::File { digest, size, .. } = node else {
            panic!("no file");
        };
        let blob = castore.blob(&digest, size).unwrap();
        let bytes = blob.memory_bytes();
        // 8 to 128 chunks of 40 bytes.
        assert!((320..6 << 10).contains(&bytes), "{bytes} bytes");
    }
}

#[test]
fn what_a_sequential_reader_needs_next_is_read_ahead() {
    const READ_BYTES: usize = 256 << 10;
    let (dir, castore) = fresh();
    let writer = castore.writer().unwrap();
    let data = noise(1, 4 << 20);
    let Node::File { digest, size, .. } = put_file(&writer, &data) else {
        panic!("no file");
    };
    writer.sync().unwrap();
    drop((writer, castore));

    let castore = open(dir.path());
    let blob = castore.blob(&digest, size).unwrap();
    let mut buffer = vec![0; READ_BYTES];
    // One in the middle is none in sequence.
    blob.read_at(2 << 20, &mut buffer).unwrap();
    let decompressed = || castore.counters().decompressed_bytes;
    let after_one = decompressed();
    assert!(after_one < 2 * READ_BYTES as u64, "{after_one}");
    blob.read_at(0, &mut buffer).unwrap();
    blob.read_at(READ_BYTES as u64, &mut buffer).unwrap();
    let end = std::time::Instant::now() + std::time::Duration::from_secs(60);
    while decompressed() < after_one + 4 * READ_BYTES as u64 {
        assert!(
            std::time::Instant::now() < end,
            "{} bytes",
            decompressed() - after_one
        );
        std::thread::yield_now();
    }
    assert!(read_blob(&castore, &digest, size) == data);
}
