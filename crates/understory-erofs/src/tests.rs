use crate::checksum::crc32c;
use crate::layout::{get16, get32};
use crate::{Data, ErofsError, Figures, File, Options, Writer};
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

    let mut dry = Writer::new(std::io::empty(), behind(0)).unwrap();
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
