//! Images of closures, judged by `fsck.erofs`, the kernel and the trees that they were made of.

#![allow(clippy::unwrap_used, reason = "helpers of tests")]

use std::collections::BTreeSet;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use understory::image::{self, ImageOptions, ImageReport, UnnamedImage};
use understory::{Result, Store, StoreOptions};
use understory_erofs::{Image, ReadAt};
use understory_nix::{PathInfo, StoreDir, StorePath};
use understory_testkit::corpus;
use understory_testkit::erofs::{Mounted, check};

struct Fixture {
    store: Store,
    dir: tempfile::TempDir,
}

impl Fixture {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let at = dir.path().join("store");
        Store::create(&at, &StoreDir::default()).unwrap();
        let store = Store::open(&at, &StoreOptions::default()).unwrap();
        Self { store, dir }
    }

    fn at(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Publishes what lies at `tree` as the path of that number.
    fn publish(&self, number: u64, tree: &Path, references: &[&StorePath]) -> StorePath {
        let writer = self.store.castore().writer().unwrap();
        let read = understory::nar::read_path(&writer, tree).unwrap();
        let path = StorePath::from_base_name(&format!("{number:032}-test-{number}")).unwrap();
        let info = PathInfo {
            path: path.clone(),
            nar_hash: read.nar_hash,
            nar_size: read.nar_size,
            references: references.iter().map(|path| (*path).clone()).collect(),
            deriver: None,
            registration_time: number,
            ultimate: false,
            signatures: BTreeSet::new(),
            ca: None,
        };
        self.store.publish(vec![(info, read.root)]).unwrap();
        path
    }

    fn publish_text(&self, number: u64, text: &str, references: &[&StorePath]) -> StorePath {
        let file = self.at("text");
        std::fs::write(&file, text).unwrap();
        self.publish(number, &file, references)
    }

    fn try_write(
        &self,
        paths: &[&StorePath],
        target: &Path,
        options: &ImageOptions,
    ) -> Result<UnnamedImage> {
        let paths: Vec<StorePath> = paths.iter().map(|path| (*path).clone()).collect();
        let cancel = AtomicBool::new(false);
        image::write(&self.store, &paths, target, options, &|_, _| {}, &cancel)
    }

    fn write(&self, paths: &[&StorePath], name: &str, options: &ImageOptions) -> ImageReport {
        let written = self.try_write(paths, &self.at(name), options).unwrap();
        written.persist().unwrap()
    }
}

struct OsImage(std::fs::File);
impl ReadAt for OsImage {
    fn len(&self) -> u64 {
        self.0.metadata().unwrap().len()
    }
    fn read_exact_at(&self, offset: u64, buffer: &mut [u8]) -> std::io::Result<()> {
        self.0.read_exact_at(buffer, offset)
    }
}

/// Compares two trees: names, kinds, contents, targets, the executable bit.
fn compare(expected: &Path, found: &Path) {
    let (a, b) = (
        expected.symlink_metadata().unwrap(),
        found.symlink_metadata().unwrap(),
    );
    let at = expected.display();
    assert_eq!(a.file_type(), b.file_type(), "{at}");
    if a.is_symlink() {
        let targets = [expected, found].map(|path| std::fs::read_link(path).unwrap());
        assert_eq!(targets[0], targets[1], "{at}");
    } else if a.is_file() {
        assert_eq!(a.mode() & 0o100 == 0, b.mode() & 0o100 == 0, "{at}");
        assert!(
            std::fs::read(expected).unwrap() == std::fs::read(found).unwrap(),
            "{at}"
        );
    } else {
        let names = [expected, found].map(|path| {
            std::fs::read_dir(path)
                .unwrap()
                .map(|entry| entry.unwrap().file_name())
                .collect::<BTreeSet<_>>()
        });
        assert_eq!(names[0], names[1], "{at}");
        for name in &names[0] {
            compare(&expected.join(name), &found.join(name));
        }
    }
}

#[test]
fn trees_of_edge_cases_come_out_as_they_went_in() {
    let f = Fixture::new();
    let tree = f.at("tree");
    std::fs::create_dir(&tree).unwrap();
    corpus::edge_cases(&tree, corpus::Size::Small).unwrap();
    let path = f.publish(1, &tree, &[]);
    let report = f.write(&[&path], "image", &ImageOptions::default());
    let target = f.at("image");
    assert_eq!(target.metadata().unwrap().len(), report.image_bytes);
    let image = Image::open(OsImage(std::fs::File::open(&target).unwrap())).unwrap();
    let found = image.verify(true).unwrap();
    assert_eq!(
        (found.inodes, found.files),
        (report.figures.inodes, report.figures.files)
    );
    check(&target, None, &["--extract"]);
    if let Some(mounted) = Mounted::new(&target, None) {
        assert_eq!(std::fs::read_dir(mounted.path()).unwrap().count(), 1);
        compare(&tree, &mounted.path().join(path.base_name()));
    }
}

#[test]
fn the_same_closure_gives_the_same_bytes_from_any_store() {
    let mut images = Vec::new();
    for turn in 0..2 {
        let f = Fixture::new();
        let other = f.publish_text(7 + turn, "not in the closure", &[]);
        let needed = f.publish_text(3, "needed", &[]);
        let also = f.publish_text(2, "also needed", &[&needed]);
        let root = f.publish_text(5, "root", &[&also]);
        let options = ImageOptions {
            registration: true,
            threads: 1 + usize::try_from(turn).unwrap() * 3,
            ..ImageOptions::default()
        };
        let roots = [[&root, &needed], [&needed, &root]];
        let report = f.write(&roots[usize::try_from(turn).unwrap()], "image", &options);
        assert_eq!(report.paths, 3);
        images.push(std::fs::read(f.at("image")).unwrap());
        if let Some(mounted) = Mounted::new(&f.at("image"), None) {
            assert!(!mounted.path().join(other.base_name()).exists());
            let text = std::fs::read_to_string(mounted.path().join("nix-path-registration"));
            let text = text.unwrap();
            let lines: Vec<&str> = text.lines().collect();
            assert_eq!(lines.len(), 5 + 6 + 6);
            assert_eq!(lines[0], format!("/nix/store/{also}"));
            assert_eq!(lines[3..6], ["", "1", &format!("/nix/store/{needed}")]);
        }
    }
    assert!(images[0] == images[1]);
}

#[test]
fn equal_files_are_there_once_and_full_paths_lead_to_them() {
    let f = Fixture::new();
    let tree = f.at("tree");
    std::fs::create_dir(&tree).unwrap();
    for name in ["a", "b", "c"] {
        std::fs::write(tree.join(name), vec![b'x'; 1 << 20]).unwrap();
    }
    let path = f.publish(1, &tree, &[]);
    let options = ImageOptions {
        full_paths: true,
        ..ImageOptions::default()
    };
    let report = f.write(&[&path], "image", &options);
    assert_eq!((report.contents, report.content_bytes), (1, 1 << 20));
    assert_eq!(report.figures.files, 3);
    check(&f.at("image"), None, &["--extract"]);
    if let Some(mounted) = Mounted::new(&f.at("image"), None) {
        let at = mounted.path().join("nix/store").join(path.base_name());
        compare(&tree, &at);
        let numbers = ["a", "b", "c"].map(|name| at.join(name).metadata().unwrap().ino());
        assert!(numbers.iter().all(|number| *number == numbers[0]));
    }
}

#[test]
fn what_cannot_be_written_leaves_nothing_behind() {
    let f = Fixture::new();
    let path = f.publish_text(1, "text", &[]);
    let absent = StorePath::from_base_name(&format!("{:032}-absent", 9)).unwrap();
    let options = ImageOptions::default();
    let error = |result: Result<UnnamedImage>| result.map(|_| ()).unwrap_err();
    let said = error(f.try_write(&[&absent], &f.at("image"), &options)).to_string();
    assert_eq!(said, format!("path '/nix/store/{absent}' is not valid"));
    std::fs::write(f.at("there"), "precious").unwrap();
    let exists = error(f.try_write(&[&path], &f.at("there"), &options));
    assert!(
        exists.to_string().ends_with("/there is there already"),
        "{exists}"
    );
    assert!(exists.hint().unwrap().contains("--force"));
    assert_eq!(std::fs::read(f.at("there")).unwrap(), b"precious");
    error(f.try_write(&[&path], &f.at("no/such"), &options));
    let cancel = AtomicBool::new(true);
    let cancelled = image::write(
        &f.store,
        std::slice::from_ref(&path),
        &f.at("image"),
        &options,
        &|_, _| {},
        &cancel,
    );
    assert_eq!(error(cancelled).to_string(), "interrupted");
    // Dropped before it is named.
    drop(f.try_write(&[&path], &f.at("image"), &options).unwrap());
    let mut names: Vec<_> = std::fs::read_dir(f.dir.path())
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    assert_eq!(names, ["store", "text", "there"]);
    let replace = ImageOptions {
        replace: true,
        ..options
    };
    f.write(&[&path], "there", &replace);
    let bytes = std::fs::read(f.at("there")).unwrap();
    Image::open(bytes.as_slice()).unwrap().verify(true).unwrap();
}

#[test]
fn a_full_disk_is_told_before_contents_are_read() {
    if !rustix::process::geteuid().is_root() {
        understory_testkit::skip("a small file system needs root");
        return;
    }
    let f = Fixture::new();
    let small = f.at("small");
    std::fs::create_dir(&small).unwrap();
    let options = c"size=1m";
    let mounted = rustix::mount::mount(
        "none",
        &small,
        "tmpfs",
        rustix::mount::MountFlags::empty(),
        options,
    );
    if let Err(errno) = mounted {
        understory_testkit::skip(&format!("a small file system cannot be mounted: {errno}"));
        return;
    }
    std::fs::write(f.at("text"), vec![b'x'; 4 << 20]).unwrap();
    let path = f.publish(1, &f.at("text"), &[]);
    let result = f.try_write(&[&path], &small.join("image"), &ImageOptions::default());
    let left = std::fs::read_dir(&small).unwrap().count();
    rustix::mount::unmount(&small, rustix::mount::UnmountFlags::DETACH).unwrap();
    let error = result.map(|_| ()).unwrap_err();
    assert!(
        error.hint().unwrap().starts_with("free some space"),
        "{error:?}"
    );
    assert_eq!(left, 0);
}

#[test]
fn a_verity_tree_follows_from_the_image() {
    let f = Fixture::new();
    let path = f.publish_text(1, "text", &[]);
    let mut hashes = Vec::new();
    for name in ["one", "two"] {
        let written = f
            .try_write(&[&path], &f.at(name), &ImageOptions::default())
            .unwrap();
        let verity = match image::add_verity(&written) {
            Ok(verity) => verity,
            Err(error) if error.hint().is_some_and(|hint| hint.contains("cryptsetup")) => {
                understory_testkit::skip("veritysetup is not installed");
                return;
            }
            Err(error) => panic!("{}", error.chain()),
        };
        written.persist().unwrap();
        assert_eq!(
            std::fs::read_to_string(f.at(&format!("{name}.roothash"))).unwrap(),
            format!("{}\n", verity.root_hash)
        );
        hashes.push((verity.root_hash, std::fs::read(verity.tree).unwrap()));
    }
    assert!(hashes[0] == hashes[1]);
}
