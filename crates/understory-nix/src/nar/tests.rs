use super::*;
use proptest::prelude::*;
use std::collections::BTreeMap;
use std::io::BufReader;

type Entries = BTreeMap<Vec<u8>, Tree>;

/// A tree as the tests see it.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Tree {
    File(bool, Vec<u8>),
    Symlink(Vec<u8>),
    Directory(Entries),
}

fn write_tree(
    writer: &mut Writer<impl Write>,
    name: Option<&[u8]>,
    tree: &Tree,
) -> Result<(), NarError> {
    match tree {
        Tree::File(executable, data) => {
            writer.file(name, *executable, data.len() as u64)?;
            data.chunks(5000)
                .try_for_each(|piece| writer.contents(piece))
        }
        Tree::Symlink(target) => writer.symlink(name, target),
        Tree::Directory(entries) => {
            writer.directory_begin(name)?;
            entries
                .iter()
                .try_for_each(|(name, tree)| write_tree(writer, Some(name), tree))?;
            writer.directory_end()
        }
    }
}

fn nar_of(tree: &Tree) -> Vec<u8> {
    let mut writer = Writer::new(Vec::new());
    write_tree(&mut writer, None, tree).unwrap();
    let size = writer.offset();
    let nar = writer.finish().unwrap();
    assert_eq!(nar.len() as u64, size);
    nar
}

fn read_tree(reader: &mut Reader<impl BufRead>) -> Result<Tree, NarError> {
    let mut open = Vec::<(Option<Box<[u8]>>, Entries)>::new();
    let mut root = None;
    loop {
        let (name, tree) = match reader.next_event()? {
            Event::DirectoryBegin { name } => {
                open.push((name, BTreeMap::new()));
                continue;
            }
            Event::DirectoryEnd => {
                let (name, entries) = open.pop().unwrap();
                (name, Tree::Directory(entries))
            }
            Event::File {
                name,
                executable,
                size,
            } => {
                let mut data = Vec::new();
                reader.read_contents_to_end(&mut data)?;
                assert_eq!(data.len() as u64, size);
                (name, Tree::File(executable, data))
            }
            Event::Symlink { name, target } => (name, Tree::Symlink(target.into())),
            Event::End => return Ok(root.unwrap()),
        };
        match (open.last_mut(), name) {
            (Some((_, entries)), Some(name)) => {
                assert!(entries.insert(name.into(), tree).is_none());
            }
            (None, None) => root = Some(tree),
            other => panic!("{other:?}"),
        }
    }
}

fn string(bytes: &[u8]) -> Vec<u8> {
    let mut out = (bytes.len() as u64).to_le_bytes().to_vec();
    out.extend_from_slice(bytes);
    out.resize(out.len().next_multiple_of(8), 0);
    out
}

fn strings(tags: &[&[u8]]) -> Vec<u8> {
    tags.iter().flat_map(|tag| string(tag)).collect()
}

fn message(nar: &[u8]) -> String {
    let mut rest = nar;
    match read_tree(&mut Reader::new(&mut rest)).unwrap_err() {
        NarError::Io(error) => error.to_string(),
        error => error.to_string(),
    }
}

fn sample() -> Tree {
    Tree::Directory(BTreeMap::from([
        (b"a".to_vec(), Tree::File(false, b"hello".to_vec())),
        (b"b".to_vec(), Tree::File(true, vec![7; 20_000])),
        (
            b"c".to_vec(),
            Tree::Directory(BTreeMap::from([
                (b"\xff\xfe".to_vec(), Tree::File(true, Vec::new())),
                (b"d".to_vec(), Tree::Directory(BTreeMap::new())),
                (b"e".to_vec(), Tree::Symlink(b"../a".to_vec())),
            ])),
        ),
    ]))
}

#[test]
fn bytes_of_a_file() {
    let expected = strings(&[
        b"nix-archive-1",
        b"(",
        b"type",
        b"regular",
        b"executable",
        b"",
        b"contents",
        b"hi",
        b")",
    ]);
    assert_eq!(nar_of(&Tree::File(true, b"hi".to_vec())), expected);
    assert_eq!(
        read_tree(&mut Reader::new(&expected[..])).unwrap(),
        Tree::File(true, b"hi".to_vec())
    );
}

#[test]
fn a_second_archive_in_the_same_stream_is_not_touched() {
    for tree in [
        sample(),
        Tree::File(false, b"x".to_vec()),
        Tree::Symlink(b"t".to_vec()),
    ] {
        let nar = nar_of(&tree);
        let two = [&nar[..], &nar_of(&sample()), b"tail"].concat();
        for capacity in [1, 7, 64, 8192] {
            let mut stream = BufReader::with_capacity(capacity, &two[..]);
            let mut reader = Reader::new(&mut stream);
            assert_eq!(read_tree(&mut reader).unwrap(), tree);
            assert_eq!(reader.offset(), nar.len() as u64);
            assert_eq!(reader.next_event().unwrap(), Event::End);
            assert_eq!(read_tree(&mut Reader::new(&mut stream)).unwrap(), sample());
            let mut rest = Vec::new();
            io::Read::read_to_end(&mut stream, &mut rest).unwrap();
            assert_eq!(rest, b"tail");
        }
    }
}

/// Fails when it is asked for a byte past the end, as a socket would block.
struct Socket<'a>(&'a [u8]);
impl io::Read for Socket<'_> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        assert!(!self.0.is_empty(), "read past the end");
        io::Read::read(&mut self.0, out)
    }
}

#[test]
fn the_end_is_known_without_asking_for_more() {
    let nar = nar_of(&sample());
    let mut reader = Reader::new(BufReader::with_capacity(100, Socket(&nar)));
    assert_eq!(read_tree(&mut reader).unwrap(), sample());
}

#[test]
fn unread_contents_are_skipped() {
    let nar = nar_of(&sample());
    let mut reader = Reader::new(BufReader::with_capacity(50, &nar[..]));
    let mut files = 0;
    loop {
        match reader.next_event().unwrap() {
            Event::File { .. } => {
                files += 1;
                if files == 2 {
                    assert_eq!(reader.read_contents().unwrap()[0], 7);
                }
            }
            Event::End => break,
            _ => {}
        }
    }
    assert_eq!(files, 3);
}

#[test]
fn every_cut_is_an_early_end() {
    let nar = nar_of(&sample());
    for cut in 0..nar.len() {
        assert!(
            message(&nar[..cut]).starts_with("the archive ends early, at byte "),
            "{cut}"
        );
    }
}

#[test]
fn refuses_what_nix_refuses() {
    let entry = |name: &[u8]| {
        strings(&[
            b"entry", b"(", b"name", name, b"node", b"(", b"type", b"symlink", b"target", b"t",
            b")", b")",
        ])
    };
    let directory = |entries: &[Vec<u8>]| {
        [
            strings(&[b"nix-archive-1", b"(", b"type", b"directory"]),
            entries.concat(),
            string(b")"),
        ]
        .concat()
    };
    let node =
        |tags: &[&[u8]]| [strings(&[b"nix-archive-1", b"(", b"type"]), strings(tags)].concat();
    let long = vec![b'x'; 256];
    for (nar, expected) in [
        (
            strings(&[b"nix-archive-2", b"(", b"type"]),
            "malformed NAR at byte 56: expected tag \"nix-archive-1\", found \"nix-archive-2\"",
        ),
        (
            node(&[b"fifo", b")"]),
            "malformed NAR at byte 72: expected tag \"regular\", \"symlink\" or \"directory\", found \"fifo\"",
        ),
        (
            node(&[b"regular", b"executable", b"1", b"contents", b""]),
            "malformed NAR at byte 104: the executable marker has a value",
        ),
        (
            node(&[b"regular", b")"]),
            "malformed NAR at byte 88: expected tag \"contents\" or \"executable\", found \")\"",
        ),
        (
            node(&[b"regular", b"contents", b"", b"("]),
            "malformed NAR at byte 112: expected tag \")\", found \"(\"",
        ),
        (
            node(&[b"symlink", b"target", b"", b")"]),
            "malformed NAR at byte 96: expected a symlink target of 1 to 4095 bytes, found 0",
        ),
        (
            node(&[b"symlink", b"target", &[b'x'; 4096], b")"]),
            "malformed NAR at byte 96: expected a symlink target of 1 to 4095 bytes, found 4096",
        ),
        (
            node(&[b"symlink", b"target", b"a\0b", b")"]),
            "malformed NAR at byte 104: a symlink target holds a NUL byte",
        ),
        (
            directory(&[entry(b"b"), entry(b"a")]),
            "malformed NAR at byte 384: names are not sorted: 'a' comes after 'b'",
        ),
        (
            directory(&[entry(b"a"), entry(b"a")]),
            "malformed NAR at byte 384: names are not sorted: 'a' comes after 'a'",
        ),
        (
            directory(&[entry(b"")]),
            "malformed NAR at byte 136: expected a name of 1 to 255 bytes, found 0",
        ),
        (
            directory(&[entry(&long)]),
            "malformed NAR at byte 136: expected a name of 1 to 255 bytes, found 256",
        ),
        (
            directory(&[entry(b".")]),
            "malformed NAR at byte 192: invalid file name '.'",
        ),
        (
            directory(&[entry(b"..")]),
            "malformed NAR at byte 192: invalid file name '..'",
        ),
        (
            directory(&[entry(b"a/b")]),
            "malformed NAR at byte 192: invalid file name 'a/b'",
        ),
        (
            directory(&[entry(b"a\0b")]),
            "malformed NAR at byte 192: invalid file name 'a\\x00b'",
        ),
        (
            directory(&[strings(&[b"more", b""])]),
            "malformed NAR at byte 96: expected tag \"entry\" or \")\", found \"more\"",
        ),
    ] {
        let mut rest = &nar[..];
        let mut reader = Reader::new(&mut rest);
        let error = read_tree(&mut reader).unwrap_err();
        assert_eq!(error.to_string(), expected);
        assert!(
            reader
                .next_event()
                .unwrap_err()
                .to_string()
                .ends_with("the archive was already found to be bad")
        );
        assert!(reader.read_contents().is_err());
    }
    let huge = [
        strings(&[b"nix-archive-1", b"(", b"type"]),
        (1_u64 << 60).to_le_bytes().to_vec(),
        vec![b'x'; 8],
    ]
    .concat();
    assert_eq!(
        message(&huge),
        "malformed NAR at byte 72: expected tag \"regular\", \"symlink\" or \"directory\", found a string of 1152921504606846976 bytes"
    );
}

#[test]
fn non_zero_padding_is_refused() {
    let nar = nar_of(&sample());
    for (index, _) in nar.iter().enumerate().filter(|(_, byte)| **byte == 0) {
        let mut bad = nar.clone();
        bad[index] = 1;
        let mut rest = &bad[..];
        assert!(read_tree(&mut Reader::new(&mut rest)).is_err(), "{index}");
    }
}

#[test]
fn a_huge_size_reserves_little() {
    let head = strings(&[b"nix-archive-1", b"(", b"type", b"regular", b"contents"]);
    let nar = [&head[..], &u64::MAX.to_le_bytes(), b"abc"].concat();
    let mut reader = Reader::new(&nar[..]);
    assert!(matches!(
        reader.next_event().unwrap(),
        Event::File { size: u64::MAX, .. }
    ));
    let mut out = Vec::new();
    assert!(reader.read_contents_to_end(&mut out).is_err());
    assert!(out.capacity() <= 2 << 20);
}

fn nested(depth: usize) -> Tree {
    (0..depth).fold(Tree::Symlink(b"t".to_vec()), |tree, _| {
        Tree::Directory(BTreeMap::from([(b"d".to_vec(), tree)]))
    })
}

#[test]
fn depth_is_limited_both_ways() {
    // As Nix 2.34.8: 64 directories in each other, the innermost empty, or 63 with a leaf.
    let deepest = nested(DEPTH_MAX - 1);
    assert_eq!(
        read_tree(&mut Reader::new(&nar_of(&deepest)[..])).unwrap(),
        deepest
    );
    let mut writer = Writer::new(Vec::new());
    let error = write_tree(&mut writer, None, &nested(DEPTH_MAX))
        .unwrap_err()
        .to_string();
    assert!(
        error.ends_with("directory nesting exceeds the maximum depth of 64"),
        "{error}"
    );
    let inner = strings(&[
        b"directory",
        b"entry",
        b"(",
        b"name",
        b"d",
        b"node",
        b"(",
        b"type",
    ]);
    let deep = |depth| {
        [
            strings(&[b"nix-archive-1", b"(", b"type"]),
            inner.repeat(depth),
            strings(&[b"directory", b")"]),
        ]
        .concat()
    };
    assert!(
        message(&deep(DEPTH_MAX)).ends_with("directory nesting exceeds the maximum depth of 64")
    );
    assert!(message(&deep(DEPTH_MAX - 1)).starts_with("the archive ends early"));
}

#[test]
fn the_writer_checks_its_caller() {
    fn error(act: impl FnOnce(&mut Writer<Vec<u8>>) -> Result<(), NarError>) -> String {
        let mut writer = Writer::new(Vec::new());
        match act(&mut writer) {
            Ok(()) => writer.finish().unwrap_err().to_string(),
            Err(error) => error.to_string(),
        }
    }
    assert_eq!(
        error(|_| Ok(())),
        "malformed NAR at byte 0: the archive is empty"
    );
    assert_eq!(
        error(|w| w.file(None, false, 1)),
        "malformed NAR at byte 96: 1 bytes of a file's contents are missing"
    );
    assert_eq!(
        error(|w| w.directory_begin(None)),
        "malformed NAR at byte 80: 1 directories are still open"
    );
    assert_eq!(
        error(|w| w.symlink(Some(b"a"), b"t")),
        "malformed NAR at byte 0: the root must not have a name"
    );
    assert_eq!(
        error(|w| w.directory_end()),
        "malformed NAR at byte 0: a directory ends where none is open"
    );
    let bytes = |w: &mut Writer<Vec<u8>>| {
        w.file(None, false, 1)?;
        w.contents(b"ab")
    };
    assert_eq!(
        error(bytes),
        "malformed NAR at byte 96: expected 1 more bytes of contents, found 2"
    );
    let order = |w: &mut Writer<Vec<u8>>| {
        w.directory_begin(None)?;
        w.file(Some(b"b"), false, 0)?;
        w.file(Some(b"a"), false, 0)
    };
    assert!(error(order).ends_with("names are not sorted: 'a' comes after 'b'"));
}

fn trees() -> impl Strategy<Value = Tree> {
    let name = proptest::collection::vec(
        any::<u8>().prop_filter("slash or NUL", |b| !matches!(b, 0 | b'/')),
        1..20,
    )
    .prop_filter("dots", |name| name != b"." && name != b"..");
    let leaf = prop_oneof![
        (any::<bool>(), proptest::collection::vec(any::<u8>(), 0..40))
            .prop_map(|(x, data)| Tree::File(x, data)),
        (any::<bool>(), 0..40_000_usize).prop_map(|(x, len)| Tree::File(x, vec![1; len])),
        proptest::collection::vec(1..=255_u8, 1..40).prop_map(Tree::Symlink),
    ];
    leaf.prop_recursive(4, 40, 6, move |inner| {
        proptest::collection::btree_map(name.clone(), inner, 0..6).prop_map(Tree::Directory)
    })
}

proptest! {
    #[test]
    fn round_trip(tree in trees(), capacity in 1..200_usize) {
        let nar = nar_of(&tree);
        let mut reader = Reader::new(BufReader::with_capacity(capacity, &nar[..]));
        prop_assert_eq!(read_tree(&mut reader).unwrap(), tree);
        prop_assert_eq!(copy(&nar[..], Vec::new()).unwrap(), nar);
    }

    #[test]
    fn never_panics(tree in trees(), at: prop::sample::Index, byte: u8) {
        let mut nar = nar_of(&tree);
        let at = at.index(nar.len());
        nar[at] = byte;
        if let Ok(again) = copy(&nar[..], Vec::new()) {
            prop_assert_eq!(&again[..], &nar[..again.len()]);
        }
    }
}
