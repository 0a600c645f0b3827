use super::*;
use proptest::prelude::*;

fn file(name: &[u8], data: &[u8], executable: bool) -> Entry {
    Entry {
        name: name.into(),
        node: Node::File {
            digest: Digest::of(data),
            size: data.len() as u64,
            executable,
        },
    }
}

fn symlink(name: &[u8], target: &[u8]) -> Entry {
    Entry {
        name: name.into(),
        node: Node::Symlink {
            target: target.into(),
        },
    }
}

#[test]
fn the_empty_directory_is_no_bytes() {
    let empty = Directory::default();
    assert_eq!(empty.encode(), b"");
    assert_eq!(empty.digest(), Digest::EMPTY);
    assert_eq!(empty.size(), 0);
    assert_eq!(Directory::decode(b"").unwrap(), empty);
}

/// Each byte written by hand from the protobuf encoding's rules.
#[test]
fn encodes_as_written_by_hand() {
    let directory = Directory::new(vec![
        symlink(b"z", b"../t"),
        file(b"b", b"", false),
        file(b"a", b"hello", true),
        Entry {
            name: b"d".as_slice().into(),
            node: Node::Directory {
                digest: Digest::EMPTY,
                size: 300,
            },
        },
    ])
    .unwrap();
    let mut expected = Vec::new();
    // directories: { name: "d", digest, size: 300 }
    expected.extend([0x0a, 3 + 34 + 3, 0x0a, 1, b'd', 0x12, 32]);
    expected.extend(Digest::EMPTY.0);
    expected.extend([0x18, 0xac, 0x02]);
    // files: { name: "a", digest, size: 5, executable: true }
    expected.extend([0x12, 3 + 34 + 2 + 2, 0x0a, 1, b'a', 0x12, 32]);
    expected.extend(Digest::of(b"hello").0);
    expected.extend([0x18, 5, 0x20, 1]);
    // files: { name: "b", digest }
    expected.extend([0x12, 3 + 34, 0x0a, 1, b'b', 0x12, 32]);
    expected.extend(Digest::EMPTY.0);
    // symlinks: { name: "z", target: "../t" }
    expected.extend([0x1a, 3 + 6, 0x0a, 1, b'z', 0x12, 4]);
    expected.extend(b"../t");
    assert_eq!(directory.encode(), expected);
    assert_eq!(Directory::decode(&expected).unwrap(), directory);
    assert_eq!(directory.size(), 304);
    assert!(matches!(
        directory.get(b"a"),
        Some(Node::File {
            executable: true,
            ..
        })
    ));
    assert_eq!(directory.get(b"c"), None);
}

#[test]
fn invalid_entries_are_refused() {
    let long = vec![b'n'; 256];
    for (name, reason) in [
        (&b""[..], "invalid name ``: it is empty"),
        (b".", "invalid name `.`: it is reserved"),
        (b"..", "invalid name `..`: it is reserved"),
        (b"a/b", "invalid name `a/b`: it has a slash"),
        (b"a\0b", "invalid name `a\\x00b`: it has a NUL byte"),
    ] {
        let error = Directory::new(vec![file(name, b"", false)]).unwrap_err();
        assert_eq!(error.to_string(), reason);
    }
    let error = Directory::new(vec![file(&long, b"", false)]).unwrap_err();
    assert!(
        error
            .to_string()
            .ends_with("it has 256 bytes, at most 255 are allowed")
    );
    let error = Directory::new(vec![file(b"\xff", b"", false), symlink(b"\xff", b"t")]);
    assert_eq!(
        error.unwrap_err().to_string(),
        "two entries of one directory are named `\\xff`"
    );
    for target in [&b""[..], b"a\0", &[b'x'; 4096]] {
        assert!(Directory::new(vec![symlink(b"s", target)]).is_err());
    }
    assert!(Directory::new(vec![symlink(b"s", &[b'x'; 4095])]).is_ok());
    assert!(Directory::new(vec![file(&long[..255], b"", false)]).is_ok());
}

/// What a lenient protobuf reader would take.
#[test]
fn bytes_that_are_not_canonical_are_refused() {
    let name_a = [0x0a, 1, b'a'];
    let entry = |list: u8, fields: &[&[u8]]| -> Vec<u8> {
        let body = fields.concat();
        let mut bytes = vec![list << 3 | 2, body.len() as u8];
        bytes.extend(body);
        bytes
    };
    let digest = [&[0x12, 32], &[7_u8; 32][..]].concat();
    let good = entry(2, &[&name_a, &digest]);
    assert!(Directory::decode(&good).is_ok());
    let late = entry(1, &[&name_a, &digest]);
    for (what, bytes) in [
        ("size zero", entry(2, &[&name_a, &digest, &[0x18, 0]])),
        (
            "long varint",
            entry(2, &[&name_a, &digest, &[0x18, 0x81, 0]]),
        ),
        ("flag zero", entry(2, &[&name_a, &digest, &[0x20, 0]])),
        ("flag two", entry(2, &[&name_a, &digest, &[0x20, 2]])),
        ("order", entry(2, &[&digest, &name_a])),
        ("unknown field", entry(2, &[&name_a, &digest, &[0x28, 1]])),
        (
            "flag of a directory",
            entry(1, &[&name_a, &digest, &[0x20, 1]]),
        ),
        ("short digest", entry(2, &[&name_a, &[0x12, 2, 1, 1]])),
        ("no digest", entry(2, &[&name_a])),
        ("no name", entry(2, &[&digest])),
        ("no target", entry(3, &[&name_a, &[0x12, 0]])),
        ("twice", [good.clone(), good.clone()].concat()),
        ("twice in two lists", [late.clone(), good.clone()].concat()),
        ("lists out of order", [good.clone(), late].concat()),
        ("unknown list", entry(4, &[&name_a, &digest])),
        ("cut", good[..good.len() - 1].to_vec()),
        (
            "huge length",
            vec![
                0x0a, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 1,
            ],
        ),
        (
            "too long number",
            vec![
                0x0a, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 2,
            ],
        ),
    ] {
        assert!(Directory::decode(&bytes).is_err(), "{what}");
    }
}

fn any_node() -> impl Strategy<Value = Node> {
    prop_oneof![
        (any::<[u8; 32]>(), any::<u64>()).prop_map(|(digest, size)| Node::Directory {
            digest: Digest(digest),
            size
        }),
        (any::<[u8; 32]>(), any::<u64>(), any::<bool>()).prop_map(|(digest, size, executable)| {
            Node::File {
                digest: Digest(digest),
                size,
                executable,
            }
        }),
        proptest::collection::vec(1_u8..=255, 1..200).prop_map(|target| Node::Symlink {
            target: target.into()
        }),
    ]
}

proptest! {
    #[test]
    fn directories_round_trip(
        nodes in proptest::collection::btree_map(
            proptest::collection::vec(
                any::<u8>().prop_filter("no separators", |byte| !b"/\0.".contains(byte)),
                1..=255,
            ),
            any_node(),
            0..20,
        )
    ) {
        let entries: Vec<Entry> = nodes
            .into_iter()
            .map(|(name, node)| Entry { name: name.into(), node })
            .collect();
        let mut shuffled = entries.clone();
        shuffled.reverse();
        let directory = Directory::new(shuffled).unwrap();
        prop_assert_eq!(directory.entries(), &entries);
        let bytes = directory.encode();
        prop_assert_eq!(Directory::decode(&bytes).unwrap(), directory);
        // A changed byte gives an error or another directory with these very bytes.
        for at in 0..bytes.len().min(100) {
            let mut changed = bytes.clone();
            changed[at] ^= 1;
            if let Ok(other) = Directory::decode(&changed) {
                prop_assert_eq!(other.encode(), changed);
            }
        }
    }

    #[test]
    fn any_bytes_are_safe(bytes: Vec<u8>) {
        if let Ok(directory) = Directory::decode(&bytes) {
            prop_assert_eq!(directory.encode(), bytes);
        }
    }
}
