//! The live mount of a real store on real kernel mounts. They need root and /dev/fuse; without, each says so.

#![allow(clippy::unwrap_used, reason = "helpers of tests")]

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::fmt::Write as _;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex};
use understory::mount::{LiveMount, LiveOptions, OnlyRows, OverlayLayers, OverlayMount};
use understory::store::GcAction;
use understory::{Store, StoreOptions};
use understory_nix::{PathInfo, StoreDir, StorePath};
use understory_testkit::corpus;

struct Fixture {
    mount: Option<LiveMount>,
    store: Store,
    dir: tempfile::TempDir,
}

impl Fixture {
    fn new() -> Option<Self> {
        if !rustix::process::geteuid().is_root() || !Path::new("/dev/fuse").exists() {
            understory_testkit::skip("real mounts need root and /dev/fuse");
            return None;
        }
        let dir = tempfile::tempdir().unwrap();
        let at = dir.path().join("mnt");
        std::fs::create_dir(&at).unwrap();
        Store::create(&dir.path().join("store"), &StoreDir::default()).unwrap();
        let store = open(dir.path());
        let mount = Some(LiveMount::mount(&store, &at, &LiveOptions::default()).unwrap());
        Some(Self { mount, store, dir })
    }
    fn at(&self) -> PathBuf {
        self.dir.path().join("mnt")
    }
    fn path(&self, path: &StorePath) -> PathBuf {
        self.at().join(path.base_name())
    }
    fn names(&self) -> BTreeSet<OsString> {
        std::fs::read_dir(self.at())
            .unwrap()
            .map(|entry| entry.unwrap().file_name())
            .collect()
    }
    fn remount(&mut self) {
        self.mount = None;
        self.mount =
            Some(LiveMount::mount(&self.store, &self.at(), &LiveOptions::default()).unwrap());
    }
}

fn open(dir: &Path) -> Store {
    Store::open(&dir.join("store"), &StoreOptions::default()).unwrap()
}

fn store_path(number: u64) -> StorePath {
    StorePath::from_base_name(&format!("{number:032}-test-{number}")).unwrap()
}

/// Publishes what lies at `tree` as the path of that number.
fn publish(store: &Store, number: u64, tree: &Path) -> StorePath {
    let writer = store.castore().writer().unwrap();
    let read = understory::nar::read_path(&writer, tree).unwrap();
    let path = store_path(number);
    let info = PathInfo {
        path: path.clone(),
        nar_hash: read.nar_hash,
        nar_size: read.nar_size,
        references: BTreeSet::new(),
        deriver: None,
        registration_time: 0,
        ultimate: false,
        signatures: BTreeSet::new(),
        ca: None,
    };
    store.publish(vec![(info, read.root)]).unwrap();
    path
}

fn publish_text(store: &Store, number: u64, text: &str) -> StorePath {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), text).unwrap();
    publish(store, number, file.path())
}

/// Path → kind, size, contents or target, executable bit.
fn model(root: &Path) -> BTreeMap<PathBuf, (u32, Vec<u8>)> {
    fn walk(root: &Path, dir: &Path, out: &mut BTreeMap<PathBuf, (u32, Vec<u8>)>) {
        for entry in std::fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            let found = path.symlink_metadata().unwrap();
            let executable = if found.is_file() {
                found.mode() & 0o100
            } else {
                0
            };
            let contents = if found.is_symlink() {
                std::os::unix::ffi::OsStringExt::into_vec(
                    std::fs::read_link(&path).unwrap().into_os_string(),
                )
            } else if found.is_file() {
                // Sparse gigabytes are compared by size and ends.
                if found.size() > 64 << 20 {
                    ends(&path)
                } else {
                    std::fs::read(&path).unwrap()
                }
            } else {
                Vec::new()
            };
            out.insert(
                path.strip_prefix(root).unwrap().into(),
                ((found.mode() & 0o170_000) | executable, contents),
            );
            if found.is_dir() {
                walk(root, &path, out);
            }
        }
    }
    let mut out = BTreeMap::new();
    walk(root, root, &mut out);
    out
}

fn ends(path: &Path) -> Vec<u8> {
    let file = std::fs::File::open(path).unwrap();
    let size = file.metadata().unwrap().len();
    let mut out = size.to_le_bytes().to_vec();
    for part in 0..64 {
        let mut block = vec![0; 4096];
        let offset = (size - 4096) / 63 * part;
        std::os::unix::fs::FileExt::read_exact_at(&file, &mut block, offset).unwrap();
        out.extend(block);
    }
    out
}

fn drop_caches() {
    std::fs::write("/proc/sys/vm/drop_caches", "3").unwrap();
}

#[test]
fn trees_of_edge_cases_come_out_as_they_went_in() {
    let Some(mut f) = Fixture::new() else { return };
    let tree = tempfile::tempdir().unwrap();
    corpus::edge_cases(tree.path(), corpus::Size::Small).unwrap();
    let sparse = std::fs::File::create(tree.path().join("sparse")).unwrap();
    sparse.set_len(2 << 30).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&sparse, b"island", 1 << 30).unwrap();
    let path = publish(&f.store, 1, tree.path());
    let expected = model(tree.path());
    assert!(expected.len() > 100);
    let numbers = |at: &Path| -> BTreeMap<PathBuf, u64> {
        expected
            .keys()
            .map(|p| (p.clone(), at.join(p).symlink_metadata().unwrap().ino()))
            .collect()
    };
    let found = model(&f.path(&path));
    assert_eq!(
        found.keys().collect::<Vec<_>>(),
        expected.keys().collect::<Vec<_>>()
    );
    for (name, node) in &expected {
        assert!(found[name] == *node, "{}", name.display());
    }
    let before = numbers(&f.path(&path));
    f.remount();
    drop_caches();
    assert!(model(&f.path(&path)) == expected);
    assert_eq!(numbers(&f.path(&path)), before, "inode numbers survive");
    for name in expected.keys() {
        let found = f.path(&path).join(name).symlink_metadata().unwrap();
        assert_eq!(
            (found.nlink(), found.mtime(), found.uid()),
            (1, 1, 0),
            "{}",
            name.display()
        );
    }
}

#[test]
fn publications_of_this_and_other_handles_show() {
    let Some(f) = Fixture::new() else { return };
    assert!(f.names().is_empty());
    let early = f.path(&store_path(1));
    assert!(!early.exists());
    let mut expected = BTreeSet::new();
    for number in 1..20 {
        let path = publish_text(&f.store, number, &format!("text {number}"));
        expected.insert(OsString::from(path.base_name()));
        assert_eq!(
            std::fs::read_to_string(f.path(&path)).unwrap(),
            format!("text {number}")
        );
        assert_eq!(f.names(), expected);
    }
    // As another process does.
    let other = open(f.dir.path());
    assert!(!f.path(&store_path(50)).exists());
    let path = publish_text(&other, 50, "from elsewhere");
    assert_eq!(
        std::fs::read_to_string(f.path(&path)).unwrap(),
        "from elsewhere"
    );
    expected.insert(path.base_name().into());
    let start = std::time::Instant::now();
    while f.names() != expected {
        assert!(start.elapsed().as_secs() < 5, "the listing stays old");
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    assert!(!f.at().join(".links").exists());
}

#[test]
fn deleted_paths_go_and_may_come_again() {
    let Some(f) = Fixture::new() else { return };
    let (keep, gone) = (
        publish_text(&f.store, 1, "keep"),
        publish_text(&f.store, 2, "gone"),
    );
    assert_eq!(std::fs::read_to_string(f.path(&gone)).unwrap(), "gone");
    assert_eq!(f.names().len(), 2);
    let paths = BTreeSet::from([gone.clone()]);
    f.store
        .collect(&GcAction::DeleteSpecific { paths })
        .unwrap();
    assert!(!f.path(&gone).exists());
    assert_eq!(
        f.names(),
        BTreeSet::from([OsString::from(keep.base_name())])
    );
    publish_text(&f.store, 2, "again, and different");
    assert_eq!(
        std::fs::read_to_string(f.path(&gone)).unwrap(),
        "again, and different"
    );
    assert_eq!(f.names().len(), 2);
}

#[test]
fn an_overlay_shows_what_was_looked_up_too_early_after_a_remount() {
    let Some(f) = Fixture::new() else { return };
    for dir in ["upper", "work", "merged"] {
        std::fs::create_dir(f.dir.path().join(dir)).unwrap();
    }
    let dir = |name: &str| f.dir.path().join(name);
    let layers = OverlayLayers {
        lowers: vec![f.at()],
        upper: dir("upper"),
        work: dir("work"),
    };
    let overlay = OverlayMount::mount(&layers, &dir("merged"), false).unwrap();
    let path = store_path(1);
    let merged = dir("merged").join(path.base_name());
    let early = merged.exists();
    publish_text(&f.store, 1, "late");
    let hidden = overlay.is_hidden(path.base_name().as_ref());
    let remounted = overlay.remount();
    let text = std::fs::read_to_string(&merged);
    overlay.unmount().unwrap();
    assert!(!early && hidden.unwrap());
    remounted.unwrap();
    assert_eq!(text.unwrap(), "late");
}

/// Keeps what is logged as errors.
struct Log;

static LINES: Mutex<String> = Mutex::new(String::new());

impl tracing::Subscriber for Log {
    fn enabled(&self, metadata: &tracing::Metadata<'_>) -> bool {
        *metadata.level() == tracing::Level::ERROR
    }
    fn new_span(&self, _: &tracing::span::Attributes<'_>) -> tracing::span::Id {
        tracing::span::Id::from_u64(1)
    }
    fn record(&self, _: &tracing::span::Id, _: &tracing::span::Record<'_>) {}
    fn record_follows_from(&self, _: &tracing::span::Id, _: &tracing::span::Id) {}
    fn event(&self, event: &tracing::Event<'_>) {
        struct Line<'a>(&'a mut String);
        impl tracing::field::Visit for Line<'_> {
            fn record_debug(&mut self, field: &tracing::field::Field, value: &dyn std::fmt::Debug) {
                writeln!(self.0, "{field}={value:?}").unwrap();
            }
        }
        event.record(&mut Line(&mut LINES.lock().unwrap()));
    }
    fn enter(&self, _: &tracing::span::Id) {}
    fn exit(&self, _: &tracing::span::Id) {}
}

#[test]
fn a_flipped_bit_is_eio_and_the_log_names_the_store_path() {
    let Some(mut f) = Fixture::new() else { return };
    tracing::subscriber::set_global_default(Log).unwrap();
    let mut noise = vec![0; 300_000];
    getrandom::fill(&mut noise).unwrap();
    let tree = tempfile::tempdir().unwrap();
    std::fs::write(tree.path().join("noise"), &noise).unwrap();
    let path = publish(&f.store, 7, tree.path());
    assert!(std::fs::read(f.path(&path).join("noise")).unwrap() == noise);
    // Incompressible bytes lie in the pack as they are: flip one in the middle.
    let packs = f.dir.path().join("store/castore/packs");
    let needle = &noise[150_000..150_032];
    let pack = std::fs::read_dir(packs)
        .unwrap()
        .map(|e| e.unwrap().path())
        .find_map(|pack| {
            let bytes = std::fs::read(&pack).unwrap();
            let at = bytes
                .windows(needle.len())
                .position(|window| window == needle)?;
            Some((pack, at))
        });
    let (pack, at) = pack.expect("the noise is in a pack");
    let file = std::fs::OpenOptions::new().write(true).open(&pack).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, &[!needle[0]], at as u64).unwrap();
    // Without what is in memory.
    f.mount = None;
    f.store = open(f.dir.path());
    f.mount = Some(LiveMount::mount(&f.store, &f.at(), &LiveOptions::default()).unwrap());
    let error = std::fs::read(f.path(&path).join("noise")).unwrap_err();
    assert_eq!(
        error.raw_os_error(),
        Some(rustix::io::Errno::IO.raw_os_error())
    );
    assert!(f.path(&path).join("noise").exists(), "the rest goes on");
    let log = LINES.lock().unwrap();
    assert!(
        log.contains(&format!("reading a file of {path}: ")) && log.contains("is corrupt"),
        "{log}"
    );
}

#[test]
fn many_paths_are_listed_once_each() {
    let Some(f) = Fixture::new() else { return };
    let first = publish_text(&f.store, 1, "x");
    let row = f.store.path(&first).unwrap().unwrap();
    for chunk in (2..20_000).collect::<Vec<u64>>().chunks(2000) {
        let paths = chunk.iter().map(|&number| {
            let info = PathInfo {
                path: store_path(number),
                ..row.info.clone()
            };
            (info, row.root.clone())
        });
        f.store.publish(paths.collect()).unwrap();
    }
    let listed = Command::new("ls").arg("-U").arg(f.at()).output().unwrap();
    let listed = String::from_utf8(listed.stdout).unwrap();
    assert_eq!(listed.lines().count(), 19_999);
    assert_eq!(listed.lines().collect::<BTreeSet<_>>().len(), 19_999);
    assert_eq!(f.names().len(), 19_999);
}

#[test]
fn a_closure_is_all_that_is_there() {
    let Some(mut f) = Fixture::new() else { return };
    let hidden = publish_text(&f.store, 1, "hidden");
    let shown = publish_text(&f.store, 2, "shown");
    let closure = f.store.closure(std::slice::from_ref(&shown)).unwrap();
    let options = LiveOptions {
        filter: Some(Arc::new(OnlyRows::of(closure.iter().map(|row| &**row)))),
        ..LiveOptions::default()
    };
    f.mount = None;
    f.mount = Some(LiveMount::mount(&f.store, &f.at(), &options).unwrap());
    let only: BTreeSet<OsString> = BTreeSet::from([shown.base_name().into()]);
    for turn in 0..2 {
        assert_eq!(f.names(), only);
        assert_eq!(std::fs::read_to_string(f.path(&shown)).unwrap(), "shown");
        let error = std::fs::read(f.path(&hidden)).unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::NotFound);
        // What comes later is hidden too, and so is what comes again.
        let later = publish_text(&f.store, 3 + turn, "later");
        assert!(!f.path(&later).exists());
    }
    // Nothing but the root and the one file has a node: there is none to make a handle of.
    assert_eq!(f.mount.as_ref().unwrap().inode_count(), 1);
}
