use crate::checksum::crc32c;
use crate::layout::{get16, get32};
use crate::{
    Data, ErofsError, Figures, File, FileType, Image, Inode, Options, Place, ReadAt, Writer,
};
use proptest::prelude::*;
use std::collections::BTreeMap;
use std::io::{Cursor, Read, Seek, Write};

const FILE: File = File {
    size: 5000,
    executable: false,
    first_block: 3,
};

fn device() -> Options {
    Options {
        data: Data::Device {
            tag: b"blobs".to_vec(),
            blocks: 100,
        },
        mtime_s: 1,
    }
}

fn behind(first_block: u32) -> Options {
    Options {
        data: Data::Behind {
            first_block,
            blocks: 100,
        },
        mtime_s: 1,
    }
}

/// A tree with one of each, some of them hard.
fn feed<W: Write + Seek>(writer: &mut Writer<W>) -> Result<(), ErofsError> {
    writer.symlink(b"long", &[b'x'; 4095])?;
    writer.file(b"-before-dots", &FILE)?;
    writer.begin_directory(b"empty")?;
    writer.end_directory()?;
    writer.begin_directory(b"big")?;
    for number in 0..3000u32 {
        writer.file(format!("!{number}").as_bytes(), &FILE)?;
        if number % 100 == 0 {
            writer.begin_directory(format!("sub-{number}").as_bytes())?;
            writer.begin_directory(&[0xff; 255])?;
            writer.end_directory()?;
            writer.end_directory()?;
        }
    }
    writer.end_directory()?;
    writer.file(
        b"large",
        &File {
            size: 0,
            executable: true,
            first_block: 7,
        },
    )
}

fn image(options: Options) -> (Vec<u8>, Figures) {
    let mut writer = Writer::new(Cursor::new(Vec::new()), options).unwrap();
    feed(&mut writer).unwrap();
    let (out, figures) = writer.finish(b"").unwrap();
    (out.into_inner(), figures)
}

#[test]
fn equal_trees_give_equal_bytes_and_the_size_can_be_known_before() {
    let (bytes, figures) = image(device());
    assert_eq!(bytes, image(device()).0);
    assert_eq!(
        bytes.len() as u64,
        u64::from(figures.metadata_blocks) * 4096
    );
    assert_eq!(figures.directories, 1 + 2 + 2 * 30);
    assert_eq!(figures.files, 3002);
    // one file of FILE, one without contents
    assert_eq!(figures.inodes, figures.directories + figures.symlinks + 2);

    let unknown = Options {
        data: Data::Behind {
            first_block: 0,
            blocks: u32::MAX,
        },
        mtime_s: 1,
    };
    let mut dry = Writer::new(std::io::empty(), unknown).unwrap();
    feed(&mut dry).unwrap();
    let (_, dry) = dry.finish(b"").unwrap();
    assert_eq!(dry.metadata_blocks, figures.metadata_blocks);
    let (_, whole) = image(behind(dry.metadata_blocks));
    assert_eq!(whole.metadata_blocks, dry.metadata_blocks);

    let mut wrong = Writer::new(std::io::empty(), behind(1)).unwrap();
    feed(&mut wrong).unwrap();
    assert_eq!(
        wrong.finish(b"").unwrap_err().to_string(),
        format!("metadata: expected 1 blocks, found {}", dry.metadata_blocks)
    );
}

#[test]
fn the_superblock_says_what_is_there() {
    let (bytes, figures) = image(device());
    let sb = &bytes[1024..4096];
    assert_eq!(get32(sb, 0), 0xe0f5_e1e2);
    assert_eq!(get16(sb, 14), 40);
    assert_eq!(get32(sb, 36), figures.metadata_blocks);
    assert_eq!(&sb[48..64], &figures.uuid);
    let mut plain = sb.to_vec();
    plain[4..8].fill(0);
    assert_eq!(get32(sb, 4), crc32c(&plain));
    assert_eq!(&sb[128..133], b"blobs");
    assert_eq!((get32(sb, 192), get32(sb, 196)), (100, 1 << 22));
}

#[test]
fn the_uuid_follows_from_tree_and_identity() {
    let uuid = |name: &[u8], identity: &[u8]| {
        let mut writer = Writer::new(std::io::empty(), device()).unwrap();
        writer.file(name, &FILE).unwrap();
        writer.finish(identity).unwrap().1.uuid
    };
    assert_eq!(uuid(b"a", b"1"), uuid(b"a", b"1"));
    assert_ne!(uuid(b"a", b"1"), uuid(b"b", b"1"));
    assert_ne!(uuid(b"a", b"1"), uuid(b"a", b"2"));
}

#[test]
fn what_breaks_the_format_is_refused() {
    let mut writer = Writer::new(std::io::empty(), device()).unwrap();
    for name in [&b""[..], b".", b"..", b"a/b", b"a\0", &[b'n'; 256]] {
        assert!(matches!(
            writer.file(name, &FILE),
            Err(ErofsError::Invalid(_))
        ));
    }
    for target in [&b""[..], b"a\0", &[b't'; 4096]] {
        assert!(matches!(
            writer.symlink(b"s", target),
            Err(ErofsError::Invalid(_))
        ));
    }
    let beyond = File {
        size: 98 * 4096,
        ..FILE
    };
    assert_eq!(
        writer.file(b"f", &beyond).unwrap_err().to_string(),
        "the end of a file's extent in blocks: expected at most 100, found 101"
    );
    writer.end_directory().unwrap_err();
    writer.begin_directory(b"d").unwrap();
    writer.symlink(b"twice", b"1").unwrap();
    writer.file(b"twice", &FILE).unwrap();
    assert_eq!(
        writer.end_directory().unwrap_err().to_string(),
        "two entries of one directory are named `twice`"
    );
    let mut open = Writer::new(std::io::empty(), device()).unwrap();
    open.begin_directory(b"d").unwrap();
    assert_eq!(
        open.finish(b"").map(|_| ()).unwrap_err().to_string(),
        "1 directories were not ended"
    );
}

#[test]
fn the_output_stands_behind_the_metadata() {
    let mut writer = Writer::new(Cursor::new(Vec::new()), device()).unwrap();
    feed(&mut writer).unwrap();
    let (mut out, _) = writer.finish(b"").unwrap();
    let mut rest = Vec::new();
    out.read_to_end(&mut rest).unwrap();
    assert!(rest.is_empty());
}

fn open(bytes: &[u8]) -> Result<Image<&[u8]>, ErofsError> {
    assert_eq!(ReadAt::len(bytes), bytes.len() as u64);
    Image::open(bytes)
}

#[test]
fn what_was_written_is_read() {
    let (bytes, figures) = image(device());
    let image = open(&bytes).unwrap();
    assert_eq!(image.superblock().uuid, figures.uuid);
    assert_eq!(image.superblock().devices[0].tag, b"blobs");
    let found = image.verify(true).unwrap();
    assert_eq!(found.inodes, figures.inodes);
    assert_eq!(found.directories, figures.directories);
    assert_eq!(found.files, figures.files);
    assert_eq!(found.symlinks, figures.symlinks);
    let root = image.root().unwrap();
    let long = image.lookup(&root, b"long").unwrap().unwrap();
    assert_eq!(
        image.target(&image.inode(long.number).unwrap()).unwrap(),
        [b'x'; 4095]
    );
    let big = image.lookup(&root, b"big").unwrap().unwrap();
    let big = image.inode(big.number).unwrap();
    for number in 0..3000 {
        let name = format!("!{number}");
        let entry = image.lookup(&big, name.as_bytes()).unwrap().unwrap();
        assert_eq!(entry.kind, FileType::File);
    }
    for absent in [&b"!"[..], b"!3000", b"", b"zzz", b"/", &[0xff; 255]] {
        assert_eq!(image.lookup(&big, absent).unwrap(), None);
    }
    let file = image.lookup(&root, b"-before-dots").unwrap().unwrap();
    let file = image.inode(file.number).unwrap();
    assert_eq!((file.size, file.mode), (5000, 0o100_444));
    let extent = image.extent(&file, 4096).unwrap().unwrap();
    assert_eq!(
        (extent.bytes, extent.place),
        (904, Place::Device(0, 4 * 4096))
    );
    assert_eq!(image.extent(&file, 5000).unwrap(), None);
}

#[test]
fn files_beyond_four_gigabytes_have_large_inodes() {
    let options = Options {
        data: Data::Device {
            tag: b"d".to_vec(),
            blocks: u32::MAX - (1 << 22),
        },
        mtime_s: 1,
    };
    let mut writer = Writer::new(Cursor::new(Vec::new()), options).unwrap();
    for (name, size) in [
        (b"a", u64::from(u32::MAX)),
        (b"b", 1 << 32),
        (b"c", 15 << 40),
    ] {
        let file = File {
            size,
            executable: true,
            first_block: u32::from(name[0]),
        };
        writer.file(name, &file).unwrap();
    }
    let bytes = writer.finish(b"").unwrap().0.into_inner();
    let image = open(&bytes).unwrap();
    image.verify(true).unwrap();
    let root = image.root().unwrap();
    let entry = image.lookup(&root, b"c").unwrap().unwrap();
    let inode = image.inode(entry.number).unwrap();
    assert_eq!((inode.size, inode.mtime_s, inode.links), (15 << 40, 1, 1));
    let last = image.extent(&inode, inode.size - 1).unwrap().unwrap();
    assert_eq!(last.place, Place::Device(0, 99 * 4096 + (15 << 40) - 1));
}

/// A directory of a random tree, or what else there is.
#[derive(Debug, Clone)]
enum Node {
    File(File),
    Symlink(Vec<u8>),
    Directory(BTreeMap<Vec<u8>, Node>),
}

fn name() -> impl Strategy<Value = Vec<u8>> {
    let byte = (1u8..=255).prop_filter("no slash", |byte| *byte != b'/');
    prop::collection::vec(byte, 1..=255)
        .prop_filter("no dots", |name| name != b"." && name != b"..")
}

fn tree() -> impl Strategy<Value = BTreeMap<Vec<u8>, Node>> {
    let leaf = prop_oneof![
        // Equal blocks have equal sizes.
        (0u32..90, any::<bool>()).prop_map(|(first_block, executable)| Node::File(File {
            size: u64::from(first_block) * 411,
            executable,
            first_block,
        })),
        prop::collection::vec(1u8..=255, 1..=4095).prop_map(Node::Symlink),
        prop::collection::vec(1u8..=255, 1..=9).prop_map(Node::Symlink),
    ];
    let node = leaf.prop_recursive(5, 400, 60, |inner| {
        prop::collection::btree_map(name(), inner, 0..60).prop_map(Node::Directory)
    });
    prop::collection::btree_map(name(), node, 0..60)
}

fn feed_tree<W: Write + Seek>(writer: &mut Writer<W>, tree: &BTreeMap<Vec<u8>, Node>) {
    for (name, node) in tree {
        match node {
            Node::File(file) => writer.file(name, file).unwrap(),
            Node::Symlink(target) => writer.symlink(name, target).unwrap(),
            Node::Directory(below) => {
                writer.begin_directory(name).unwrap();
                feed_tree(writer, below);
                writer.end_directory().unwrap();
            }
        }
    }
}

fn compare(image: &Image<&[u8]>, directory: &Inode, tree: &BTreeMap<Vec<u8>, Node>) {
    let mut names = Vec::new();
    image
        .entries(directory, |entry| {
            names.push(entry.name);
            true
        })
        .unwrap();
    names.retain(|name| name != b"." && name != b"..");
    assert!(names.iter().eq(tree.keys()));
    for (name, node) in tree {
        let entry = image.lookup(directory, name).unwrap().unwrap();
        let inode = image.inode(entry.number).unwrap();
        match node {
            Node::File(file) => {
                assert_eq!(inode.size, file.size);
                let mode = if file.executable {
                    0o100_555
                } else {
                    0o100_444
                };
                assert_eq!(inode.mode, mode);
                if file.size > 0 {
                    let extent = image.extent(&inode, 0).unwrap().unwrap();
                    let at = u64::from(file.first_block) * 4096;
                    assert_eq!(extent.place, Place::Device(0, at));
                    assert_eq!(extent.bytes, file.size);
                }
            }
            Node::Symlink(target) => assert_eq!(image.target(&inode).unwrap(), *target),
            Node::Directory(below) => compare(image, &inode, below),
        }
    }
}

/// Everything a reader may be asked, on whatever the image says.
fn read_all(bytes: &[u8]) -> Result<(), ErofsError> {
    let image = open(bytes)?;
    let _ = image.verify(false);
    let root = image.root()?;
    let _ = image.lookup(&root, b"big");
    let mut numbers = Vec::new();
    image.entries(&root, |entry| {
        numbers.push(entry.number);
        numbers.len() < 50
    })?;
    for number in numbers {
        let inode = image.inode(number)?;
        let mut buffer = [0; 100];
        let _ = image.read_contents(&inode, 0, &mut buffer);
        let _ = image.target(&inode);
        let _ = image.extent(&inode, inode.size.saturating_sub(1));
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn any_tree_comes_back(tree in tree()) {
        let mut writer = Writer::new(Cursor::new(Vec::new()), device()).unwrap();
        feed_tree(&mut writer, &tree);
        let (out, figures) = writer.finish(b"").unwrap();
        let bytes = out.into_inner();
        let image = open(&bytes).unwrap();
        prop_assert_eq!(image.verify(true).unwrap().inodes, figures.inodes);
        compare(&image, &image.root().unwrap(), &tree);
    }

    #[test]
    fn any_bytes_are_an_error(mut bytes in prop::collection::vec(any::<u8>(), 0..20_000)) {
        prop_assert!(open(&bytes).is_err());
        if bytes.len() > 1120 {
            // Past the magic number: no features, no checksum.
            bytes[1024..1028].copy_from_slice(&0xe0f5_e1e2u32.to_le_bytes());
            bytes[1032] = 0;
            bytes[1036] = 12;
            bytes[1104..1108].fill(0);
            bytes[1114] = 0;
            let _ = read_all(&bytes);
        }
    }

    #[test]
    fn flipped_bits_neither_panic_nor_loop(flips in prop::collection::vec((any::<prop::sample::Index>(), 0u8..8), 1..40)) {
        let mut bytes = image(behind(0)).0;
        for (at, bit) in flips {
            let at = at.index(bytes.len());
            bytes[at] ^= 1 << bit;
        }
        // Without the checksum, which would stop most of it.
        bytes[1032] &= !1;
        let _ = read_all(&bytes);
    }
}

#[test]
fn a_wrong_checksum_and_other_formats_are_told_apart() {
    let (bytes, _) = image(device());
    let changed = |at: usize, value: u8| {
        let mut bytes = bytes.clone();
        bytes[at] = value;
        open(&bytes).unwrap_err().to_string()
    };
    assert!(changed(1040, 9).starts_with("the superblock is corrupt: expected checksum "));
    assert_eq!(
        changed(1024, 0),
        "not an EROFS image: expected the magic number e0f5e1e2, found e0f5e100"
    );
    assert_eq!(
        changed(1036, 9),
        "the image uses blocks of 2^9 bytes, which this program does not read"
    );
    assert_eq!(
        changed(1104, 0xff),
        "the image uses features 0xf2, which this program does not read"
    );
}

#[test]
fn what_contradicts_itself_is_found() {
    let (bytes, _) = image(device());
    let root = open(&bytes).unwrap().root().unwrap();
    let empty = open(&bytes)
        .unwrap()
        .lookup(&root, b"empty")
        .unwrap()
        .unwrap();
    let at = empty.number as usize * 32;
    let verify = |change: &dyn Fn(&mut [u8])| {
        let mut bytes = bytes.clone();
        change(&mut bytes);
        let image = open(&bytes).unwrap();
        image.verify(true).unwrap_err().to_string()
    };
    let wrong_parent = verify(&|bytes| bytes[at + 32 + 12] ^= 1);
    assert!(
        wrong_parent.contains("`..`: expected 40, found 41"),
        "{wrong_parent}"
    );
    let links = verify(&|bytes| bytes[at + 6] = 2);
    assert!(
        links.contains("attributes are not those of a store"),
        "{links}"
    );
    let is_file = verify(&|bytes| bytes[at + 5] = 0x81);
    assert!(is_file.contains("says Directory, it is File"), "{is_file}");
}
