//! Images as the kernel and `fsck.erofs` see them. They need root and erofs-utils; without, each says so.

#![allow(clippy::unwrap_used, reason = "helpers of tests")]

use std::fs::File as OsFile;
use std::io::{BufWriter, Seek, Write};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use understory_erofs::{Data, Figures, File, Options, Writer};
use understory_testkit::erofs::{Mounted, check};

/// Blocks of contents: each is full of its number.
const BLOCKS: u32 = 90;
/// The number of entries of the large directory.
const ENTRIES: u32 = 50_000;

fn block(number: u32) -> [u8; 4096] {
    [number.to_le_bytes()[0]; 4096]
}

fn file(first_block: u32, executable: bool) -> File {
    File {
        size: u64::from(first_block % 3) * 4096 + 904,
        executable,
        first_block,
    }
}

/// A tree with everything that is hard.
fn feed<W: Write + Seek>(writer: &mut Writer<W>) {
    writer.begin_directory(b"large").unwrap();
    for number in 0..ENTRIES {
        // Names that sort before and after the dots, the longest there are among them.
        let name = match number % 1000 {
            0 => format!("{number:n>255}"),
            1..500 => format!("!{number}"),
            _ => format!("name-of-{number}"),
        };
        writer
            .file(
                name.as_bytes(),
                &file(number % (BLOCKS - 3), number % 2 == 1),
            )
            .unwrap();
        if number.is_multiple_of(5000) {
            writer
                .begin_directory(format!("dir-{number}").as_bytes())
                .unwrap();
            writer
                .symlink(&[b'-', 0xff, 0xfe, b'\n'], b"../../a")
                .unwrap();
            writer.end_directory().unwrap();
        }
    }
    writer.end_directory().unwrap();
    for len in [1usize, 31, 32, 4063, 4064, 4065, 4095] {
        writer
            .symlink(format!("link-{len}").as_bytes(), &vec![b'x'; len])
            .unwrap();
    }
    // Listings around the size that fits behind an inode, and around a block.
    for entries in [0usize, 1, 14, 15, 16, 17, 18, 19, 40] {
        writer
            .begin_directory(format!("dir-{entries}").as_bytes())
            .unwrap();
        for number in 0..entries {
            writer
                .file(format!("{number:0>240}").as_bytes(), &file(7, false))
                .unwrap();
        }
        writer.end_directory().unwrap();
    }
    for depth in 0..300 {
        writer
            .begin_directory(format!("{depth}").as_bytes())
            .unwrap();
    }
    writer.file(b"deep", &file(1, true)).unwrap();
    for _ in 0..300 {
        writer.end_directory().unwrap();
    }
    let empty = File {
        size: 0,
        executable: false,
        first_block: 0,
    };
    writer.file(b"empty", &empty).unwrap();
}

fn build(image: &Path, data: Data) -> Figures {
    let out = BufWriter::new(OsFile::create(image).unwrap());
    let mut writer = Writer::new(out, Options { data, mtime_s: 1 }).unwrap();
    feed(&mut writer);
    writer.finish(b"").unwrap().1
}

/// Compares what is mounted with what was fed.
fn compare(root: &Path) {
    let mut names = 0;
    for entry in std::fs::read_dir(root.join("large")).unwrap() {
        let entry = entry.unwrap();
        names += 1;
        let name = entry.file_name().into_string().unwrap();
        if name.starts_with("dir-") {
            continue;
        }
        let number: u32 = name
            .trim_start_matches(|c: char| !c.is_ascii_digit())
            .parse()
            .unwrap();
        if !number.is_multiple_of(7) {
            continue;
        }
        let path = root.join("large").join(&name);
        let expected = file(number % (BLOCKS - 3), number % 2 == 1);
        let found = path.symlink_metadata().unwrap();
        assert_eq!(found.size(), expected.size, "{name}");
        let mode = if expected.executable {
            0o100_555
        } else {
            0o100_444
        };
        assert_eq!(
            (found.mode(), found.nlink(), found.mtime()),
            (mode, 1, 1),
            "{name}"
        );
        assert_eq!((found.uid(), found.gid()), (0, 0), "{name}");
        if number.is_multiple_of(70) {
            let bytes = std::fs::read(&path).unwrap();
            for (at, part) in bytes.chunks(4096).enumerate() {
                let expected = block(expected.first_block + u32::try_from(at).unwrap());
                assert!(part == &expected[..part.len()], "{name}, block {at}");
            }
        }
    }
    assert_eq!(names, ENTRIES + ENTRIES / 5000);
    let ino = |name: &str| root.join("large").join(name).metadata().unwrap().ino();
    assert_eq!(
        ino("!1"),
        ino(&format!("!{}", 1 + 2 * (BLOCKS - 3))),
        "equal files share an inode"
    );
    assert_ne!(
        ino("!1"),
        ino(&format!("!{}", 1 + (BLOCKS - 3))),
        "executable or not"
    );
    for len in [1usize, 31, 32, 4063, 4064, 4065, 4095] {
        let target = std::fs::read_link(root.join(format!("link-{len}"))).unwrap();
        assert_eq!(target.as_os_str().len(), len);
    }
    for entries in [0usize, 1, 14, 15, 16, 17, 18, 19, 40] {
        let dir = root.join(format!("dir-{entries}"));
        assert_eq!(std::fs::read_dir(&dir).unwrap().count(), entries);
        for number in 0..entries {
            dir.join(format!("{number:0>240}"))
                .symlink_metadata()
                .unwrap();
        }
        assert!(!dir.join("none").exists());
    }
    let mut deep = PathBuf::from(root);
    deep.extend((0..300).map(|depth| depth.to_string()));
    assert_eq!(std::fs::read(deep.join("deep")).unwrap().len(), 5000);
    let number = |path: &Path| path.metadata().unwrap().ino();
    let parent = deep.parent().unwrap();
    assert_eq!(number(&deep.join("..")), number(parent));
    assert_eq!(std::fs::read(root.join("empty")).unwrap(), b"");
}

#[test]
fn an_image_with_its_contents() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("image");
    let dry = build(
        &image,
        Data::Behind {
            first_block: 0,
            blocks: BLOCKS,
        },
    );
    let first_block = dry.metadata_blocks;
    build(
        &image,
        Data::Behind {
            first_block,
            blocks: BLOCKS,
        },
    );
    let out = OsFile::options().write(true).open(&image).unwrap();
    for number in 0..BLOCKS {
        let at = u64::from(first_block + number) * 4096;
        out.write_all_at(&block(number), at).unwrap();
    }
    // Reads all contents as well.
    check(&image, None, &["--extract"]);
    if let Some(mounted) = Mounted::new(&image, None) {
        compare(&mounted.path());
    }
}

#[test]
fn an_image_with_its_contents_on_a_device() {
    let dir = tempfile::tempdir().unwrap();
    let (image, device) = (dir.path().join("image"), dir.path().join("device"));
    let tag = b"contents".to_vec();
    let figures = build(
        &image,
        Data::Device {
            tag,
            blocks: BLOCKS,
        },
    );
    assert_eq!(
        image.metadata().unwrap().len(),
        u64::from(figures.metadata_blocks) * 4096
    );
    let mut out = OsFile::create(&device).unwrap();
    for number in 0..BLOCKS {
        out.write_all(&block(number)).unwrap();
    }
    check(&image, Some(&device), &["--extract"]);
    if let Some(mounted) = Mounted::new(&image, Some(&device)) {
        compare(&mounted.path());
    }
}

#[test]
fn a_file_of_more_than_four_gigabytes() {
    let dir = tempfile::tempdir().unwrap();
    let (image, device) = (dir.path().join("image"), dir.path().join("device"));
    let size = (5u64 << 30) + 17;
    let sparse = OsFile::create(&device).unwrap();
    sparse.set_len(6u64 << 30).unwrap();
    sparse
        .write_all_at(b"island", 4096 + (5 << 30) + 3)
        .unwrap();
    let data = Data::Device {
        tag: b"d".to_vec(),
        blocks: 6 << 18,
    };
    let out = OsFile::create(&image).unwrap();
    let mut writer = Writer::new(out, Options { data, mtime_s: 1 }).unwrap();
    let file = File {
        size,
        executable: false,
        first_block: 1,
    };
    writer.file(b"large", &file).unwrap();
    writer.finish(b"").unwrap();
    check(&image, Some(&device), &[]);
    if let Some(mounted) = Mounted::new(&image, Some(&device)) {
        let large = OsFile::open(mounted.path().join("large")).unwrap();
        assert_eq!(large.metadata().unwrap().size(), size);
        assert_eq!(large.metadata().unwrap().mtime(), 1);
        let mut end = [0; 17];
        large.read_exact_at(&mut end, 5 << 30).unwrap();
        assert_eq!(&end, b"\0\0\0island\0\0\0\0\0\0\0\0");
    }
}

/// 100 directories of 100 directories of 100 entries. Checked by our own reader and the kernel's superblock only:
/// `fsck.erofs` takes half a minute.
#[test]
fn a_million_inodes() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("image");
    let data = Data::Device {
        tag: b"d".to_vec(),
        blocks: 1 << 20,
    };
    let out = BufWriter::new(OsFile::create(&image).unwrap());
    let mut writer = Writer::new(out, Options { data, mtime_s: 1 }).unwrap();
    let mut next = 0;
    for outer in 0..100 {
        writer
            .begin_directory(format!("outer-directory-{outer}").as_bytes())
            .unwrap();
        for inner in 0..100 {
            writer
                .begin_directory(format!("inner-{inner}").as_bytes())
                .unwrap();
            for number in 0..99 {
                let file = File {
                    size: 4096,
                    executable: false,
                    first_block: next,
                };
                next += 1;
                writer
                    .file(format!("a-name-of-usual-size-{number}").as_bytes(), &file)
                    .unwrap();
            }
            writer.symlink(b"link", b"target").unwrap();
            writer.end_directory().unwrap();
        }
        writer.end_directory().unwrap();
    }
    let (_, figures) = writer.finish(b"").unwrap();
    assert_eq!(figures.inodes, 1 + 100 + 10_000 + 1_000_000);
    // What was asked for: 15 MB for each 127,000 inodes.
    let bytes = u64::from(figures.metadata_blocks) * 4096;
    assert!(
        bytes / figures.inodes < 15_000_000 / 127_000,
        "{bytes} bytes"
    );
    let Some(mounted) = Mounted::new(&image, Some(&image)) else {
        return;
    };
    let fs = rustix::fs::statvfs(mounted.path()).unwrap();
    assert_eq!(fs.f_files - fs.f_ffree, figures.inodes);
    let last = mounted
        .path()
        .join("outer-directory-99/inner-99/a-name-of-usual-size-98");
    assert_eq!(last.metadata().unwrap().size(), 4096);
}
