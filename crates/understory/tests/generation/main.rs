//! Generations of real stores, mounted by the kernel. What mounts needs root, /dev/fuse and EROFS; without, it says so.

#![allow(clippy::unwrap_used, reason = "helpers of tests")]

mod raw_tier;

use rustix::fs::FlockOperation;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use understory::generation::{
    Generation, Generations, HotFigures, HotOptions, MountOptions, MountedGeneration, clear_hot,
};
use understory::import::Selection;
use understory::mount::Route;
use understory::store::{CollectOptions, GcAction};
use understory::{Store, StoreOptions};
use understory_nix::{PathInfo, StoreDir, StorePath};

struct Fixture {
    dir: tempfile::TempDir,
    store: Store,
}

impl Fixture {
    fn new() -> Self {
        Self::at(tempfile::tempdir().unwrap())
    }

    fn at(dir: tempfile::TempDir) -> Self {
        Store::create(&dir.path().join("store"), &StoreDir::default()).unwrap();
        let store = open(dir.path());
        Self { dir, store }
    }

    fn generations(&self) -> Generations {
        Generations::of(&self.store)
    }

    fn make(&self) -> Generation {
        self.generations()
            .make(&Selection::All, &mut |_| {})
            .unwrap()
    }

    /// Publishes a tree that has everything, all of it different for each number.
    fn publish(&self, number: u64, references: &[&StorePath]) -> StorePath {
        let tree = self.dir.path().join(format!("tree-{number}"));
        if !tree.exists() {
            make_tree(&tree, number);
        }
        let writer = self.store.writer().unwrap();
        let read = understory::nar::read_path(&writer, &tree).unwrap();
        let path = StorePath::from_base_name(&format!("{number:032}-test-{number}")).unwrap();
        let info = PathInfo {
            path: path.clone(),
            nar_hash: read.nar_hash,
            nar_size: read.nar_size,
            references: references.iter().copied().cloned().collect(),
            deriver: None,
            registration_time: 0,
            ultimate: false,
            signatures: BTreeSet::new(),
            ca: None,
        };
        self.store.publish(vec![(info, read.root)]).unwrap();
        path
    }

    fn tree(&self, number: u64) -> PathBuf {
        self.dir.path().join(format!("tree-{number}"))
    }

    fn make_dir(&self, name: &str) -> PathBuf {
        let dir = self.dir.path().join(name);
        fs::create_dir_all(&dir).unwrap();
        dir
    }

    fn mount(&self, generation: &Generation, route: Route) -> (MountedGeneration, PathBuf) {
        self.mount_hot(generation, route, None)
    }

    fn mount_hot(
        &self,
        generation: &Generation,
        route: Route,
        hot: Option<HotOptions>,
    ) -> (MountedGeneration, PathBuf) {
        self.mount_from(&self.store, generation, route, hot)
    }

    fn mount_from(
        &self,
        store: &Store,
        generation: &Generation,
        route: Route,
        hot: Option<HotOptions>,
    ) -> (MountedGeneration, PathBuf) {
        if hot.is_some() {
            self.wait_for_raw_tier();
        }
        let at = self.make_dir(&format!("image-{}", generation.number));
        let server = self.make_dir(&format!("server-{}", generation.number));
        let options = MountOptions {
            routes: vec![route],
            hot,
            ..MountOptions::default()
        };
        let mounted = MountedGeneration::mount(store, generation, &server, &at, &options).unwrap();
        assert_eq!(mounted.image().mount_point().route(), route);
        (mounted, at)
    }

    /// The threads of a server that was unmounted let go of it a little later.
    fn wait_for_raw_tier(&self) {
        let Ok(lock) = fs::File::open(self.dir.path().join("store/hot/lock")) else {
            return;
        };
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(60);
        while rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive).is_err() {
            assert!(std::time::Instant::now() < deadline, "it is never free");
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
    }

    fn heat(&self, path: &StorePath) -> HotFigures {
        self.wait_for_raw_tier();
        let paths = std::slice::from_ref(path);
        self.generations().heat(paths, &raw_tier::HOT).unwrap()
    }

    fn clear_hot(&self) {
        self.wait_for_raw_tier();
        clear_hot(&self.dir.path().join("store")).unwrap();
    }
}

fn open(dir: &Path) -> Store {
    Store::open(&dir.join("store"), &StoreOptions::default()).unwrap()
}

fn can_mount() -> bool {
    let erofs = fs::read_to_string("/proc/filesystems").unwrap_or_default();
    let can = rustix::process::geteuid().is_root()
        && Path::new("/dev/fuse").exists()
        && erofs.contains("erofs");
    if !can {
        understory_testkit::skip("mounting images needs root, /dev/fuse and EROFS");
    }
    can
}

fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(2_654_435_761) | 1;
    (0..len)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            // Half of it compresses.
            (state >> 24) as u8 & 0x5b
        })
        .collect()
}

fn make_tree(dir: &Path, number: u64) {
    fs::create_dir_all(dir.join("a/b/c")).unwrap();
    fs::create_dir_all(dir.join("empty")).unwrap();
    fs::create_dir_all(dir.join("many")).unwrap();
    fs::write(dir.join("nothing"), b"").unwrap();
    fs::write(dir.join("same"), b"the same in all trees").unwrap();
    for (name, len) in [
        ("one", 1),
        ("page", 4096),
        ("page-and-one", 4097),
        ("a/small", 20_000),
        ("a/b/middle", 200_000),
        ("a/b/c/large", 3_000_001),
    ] {
        fs::write(dir.join(name), noise(number * 10 + len as u64, len)).unwrap();
    }
    for file in 0..500_u64 {
        let name = format!("many/file-{file}");
        fs::write(dir.join(name), format!("{number} {file}\n").repeat(20)).unwrap();
    }
    let program = dir.join("program");
    fs::write(&program, format!("#!/bin/sh\necho {number}\n")).unwrap();
    fs::set_permissions(
        &program,
        std::os::unix::fs::PermissionsExt::from_mode(0o755),
    )
    .unwrap();
    symlink("a/b", dir.join("link")).unwrap();
    symlink("x".repeat(3000), dir.join("long-link")).unwrap();
}

/// What a tree holds: kind, executable bit, contents or target, by name.
fn contents(top: &Path) -> BTreeMap<PathBuf, (char, bool, Vec<u8>)> {
    let mut found = BTreeMap::new();
    let mut dirs = vec![PathBuf::new()];
    while let Some(dir) = dirs.pop() {
        for entry in fs::read_dir(top.join(&dir)).unwrap() {
            let name = dir.join(entry.unwrap().file_name());
            let full = top.join(&name);
            let meta = fs::symlink_metadata(&full).unwrap();
            let what = if meta.is_dir() {
                dirs.push(name.clone());
                ('d', false, Vec::new())
            } else if meta.is_symlink() {
                let target = fs::read_link(&full).unwrap();
                ('l', false, target.into_os_string().into_encoded_bytes())
            } else {
                ('f', meta.mode() & 0o111 != 0, fs::read(&full).unwrap())
            };
            found.insert(name, what);
        }
    }
    found
}

fn drop_caches() {
    let _ = fs::write("/proc/sys/vm/drop_caches", "3");
}

#[test]
fn each_way_of_mounting_shows_the_same() {
    if !can_mount() {
        return;
    }
    let f = Fixture::new();
    let paths = [f.publish(1, &[]), f.publish(2, &[])];
    let made = f.make();
    assert_eq!(made.figures().paths, 2);
    for route in Route::ALL {
        if route == Route::Loop && !Path::new("/dev/loop-control").exists() {
            understory_testkit::skip("there are no loop devices");
            continue;
        }
        let (mounted, at) = f.mount(&made, route);
        drop_caches();
        for (number, path) in (1..).zip(&paths) {
            let here = contents(&at.join(path.base_name()));
            assert!(
                here == contents(&f.tree(number)),
                "{route:?}: tree {number}"
            );
        }
        let meta = fs::metadata(at.join(paths[0].base_name()).join("same")).unwrap();
        assert_eq!((meta.nlink(), meta.mtime(), meta.mode()), (1, 1, 0o100_444));
        assert!(made.is_in_use().unwrap());
        mounted.unmount().unwrap();
        assert!(!made.is_in_use().unwrap());
    }
}

#[test]
fn metadata_of_a_mounted_image_is_read_ahead() {
    if !can_mount() {
        return;
    }
    // The directory for temporary files may be in memory.
    let f = Fixture::at(tempfile::tempdir_in("/var/tmp").unwrap());
    let tree = f.make_dir("tree-1");
    // In the order in which the image has them, so that the first ones need little of it.
    let name = |number: u32| format!("{number:05}");
    let text = |number: u32| name(number).repeat(800);
    for number in 0..4000 {
        fs::write(tree.join(name(number)), text(number)).unwrap();
    }
    let path = f.publish(1, &[]);
    let generation = f.make();
    let (mounted, at) = f.mount(&generation, Route::File);
    let missing = || {
        let cached = understory_testkit::cached_bytes(&generation.image());
        generation.image_bytes().saturating_sub(cached)
    };
    drop_caches();
    if missing() == 0 {
        understory_testkit::skip("this file system keeps all in memory");
        return;
    }
    let read = |numbers: std::ops::Range<u32>| {
        for number in numbers {
            let file = at.join(path.base_name()).join(name(number));
            assert!(fs::read_to_string(file).unwrap() == text(number));
        }
    };
    read(0..5);
    assert!(missing() > generation.image_bytes() / 2, "{}", missing());
    // Again when as many bytes were read as the image has: another test may empty the page cache.
    let is_there = (1..4).any(|round| {
        read(round * 100..round * 100 + 100);
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(2);
        while missing() > 0 && std::time::Instant::now() < deadline {
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        missing() == 0
    });
    assert!(is_there, "{}", missing());
    mounted.unmount().unwrap();
}

#[test]
fn older_generations_stay_right() {
    if !can_mount() {
        return;
    }
    let f = Fixture::new();
    let first = f.publish(1, &[]);
    let old = f.make();
    let (mounted_old, at_old) = f.mount(&old, Route::File);
    let second = f.publish(2, &[]);
    let new = f.make();
    assert_eq!((old.number, new.number), (1, 2));
    assert!(new.figures().new_extents < old.figures().new_extents);
    let (mounted_new, at_new) = f.mount(&new, Route::File);
    drop_caches();
    let trees = [contents(&f.tree(1)), contents(&f.tree(2))];
    assert!(contents(&at_old.join(first.base_name())) == trees[0]);
    assert!(contents(&at_new.join(first.base_name())) == trees[0]);
    assert!(contents(&at_new.join(second.base_name())) == trees[1]);
    assert!(!at_old.join(second.base_name()).exists());
    // The server of the old one, too, serves what was added since.
    mounted_new.unmount().unwrap();
    mounted_old.unmount().unwrap();
    let (again, at) = f.mount(&old, Route::File);
    drop_caches();
    assert!(contents(&at.join(first.base_name())) == trees[0]);
    again.unmount().unwrap();
}

/// Ends what waits for it, a failed test as well.
struct Stop<'a>(&'a AtomicBool);
impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

#[test]
fn packs_are_rewritten_under_a_generation_that_stays_mounted() {
    if !can_mount() {
        return;
    }
    let f = Fixture::new();
    let kept = [f.publish(1, &[]), f.publish(2, &[])];
    let mut dead = f.publish(3, &[]);
    let selection = Selection::Paths {
        paths: kept.iter().cloned().collect(),
        closure: true,
    };
    let first = f.generations().make(&selection, &mut |_| {}).unwrap();
    // As in another process; and what is read comes from packs, not from memory.
    let mut options = StoreOptions::default();
    options.castore.frame_cache_bytes_max = 0;
    let reading = Store::open(&f.dir.path().join("store"), &options).unwrap();
    let mount = || f.mount_from(&reading, &first, Route::File, None);
    let (mounted, at) = mount();
    let expected = [contents(&f.tree(1)), contents(&f.tree(2))];
    let check = || {
        drop_caches();
        for (path, expected) in kept.iter().zip(&expected) {
            let found = contents(&at.join(path.base_name()));
            assert!(found == *expected, "{}", path.base_name());
        }
    };
    let open_file = fs::File::open(at.join(kept[0].base_name()).join("a/b/c/large")).unwrap();
    let packs = || -> BTreeSet<_> {
        let names = fs::read_dir(f.dir.path().join("store/castore/packs")).unwrap();
        names.map(|entry| entry.unwrap().file_name()).collect()
    };
    let (stop, checked) = (AtomicBool::new(false), AtomicU64::new(0));
    std::thread::scope(|scope| {
        let _stop = Stop(&stop);
        let reader = scope.spawn(|| {
            let _stop = Stop(&stop);
            while !stop.load(Ordering::SeqCst) {
                check();
                checked.fetch_add(1, Ordering::SeqCst);
            }
        });
        let ways = [
            CollectOptions::default(),
            CollectOptions {
                all: true,
                level: Some(1),
                ..CollectOptions::default()
            },
            CollectOptions {
                all: true,
                dense: Some(CollectOptions::DENSE_FRAME_BYTES),
                join_small: true,
                ..CollectOptions::default()
            },
        ];
        for (number, way) in (4..).zip(&ways) {
            // A path comes, and an older one goes.
            let before = packs();
            let new = f.publish(number, &[]);
            let deleted = f
                .store
                .collect(&GcAction::DeleteSpecific {
                    paths: [std::mem::replace(&mut dead, new)].into(),
                })
                .unwrap();
            assert_eq!(deleted.paths.len(), 1);
            let report = f
                .store
                .reclaim(way, &BTreeSet::new(), &mut |_| Ok(()))
                .unwrap();
            assert!(report.freed_pieces > 0, "{report:?}");
            let left: Vec<_> = before.intersection(&packs()).cloned().collect();
            assert!(left.is_empty(), "{left:?}: {report:?}");
            // The look that began before this, and one more.
            let seen = checked.load(Ordering::SeqCst);
            while checked.load(Ordering::SeqCst) < seen + 2 && !stop.load(Ordering::SeqCst) {
                std::thread::sleep(std::time::Duration::from_millis(5));
            }
        }
        stop.store(true, Ordering::SeqCst);
        reader.join().unwrap();
    });
    drop_caches();
    let mut large = vec![0; 3_000_001];
    open_file.read_exact_at(&mut large, 0).unwrap();
    let name = Path::new("a/b/c/large");
    assert!(large == expected[0][name].2);
    drop(open_file);
    mounted.unmount().unwrap();
    // Another server finds it as it was.
    let (mounted, _) = mount();
    check();
    mounted.unmount().unwrap();
}

#[test]
fn the_same_store_gives_the_same_image() {
    let f = Fixture::new();
    let path = f.publish(1, &[]);
    let needs = f.publish(2, &[&path]);
    f.publish(3, &[]);
    let (one, two) = (f.make(), f.make());
    assert_eq!(one.image_digest(), two.image_digest());
    assert_eq!(two.figures().new_extents, 0);
    let selection = Selection::Paths {
        paths: [needs.clone()].into(),
        closure: true,
    };
    let some = f.generations().make(&selection, &mut |_| {}).unwrap();
    let names: BTreeSet<_> = f
        .generations()
        .paths(&some)
        .unwrap()
        .into_iter()
        .map(|(_, path)| path)
        .collect();
    assert_eq!(names, [path, needs].into());
    assert!(!some.has_all());
    assert_eq!(f.generations().newest().unwrap().unwrap().number, 2);
}

#[test]
fn the_kernels_own_checker_finds_nothing() {
    if Command::new("fsck.erofs")
        .arg("--version")
        .output()
        .is_err()
    {
        understory_testkit::skip("fsck.erofs is not installed");
        return;
    }
    let f = Fixture::new();
    f.publish(1, &[]);
    let made = f.make();
    // It reads files, too: of the right size, from a device of zeros.
    let device = f.dir.path().join("device");
    let file = fs::File::create(&device).unwrap();
    file.set_len(1 << 30).unwrap();
    let checked = Command::new("fsck.erofs")
        .arg("-d3")
        .arg(format!("--device={}", device.display()))
        .arg(made.image())
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&checked.stdout).into_owned()
        + &String::from_utf8_lossy(&checked.stderr);
    assert!(checked.status.success(), "{said}");
    assert!(said.contains("No errors found"), "{said}");
}

#[test]
fn what_is_mounted_is_kept_and_what_lost_paths_is_refused() {
    let f = Fixture::new();
    let path = f.publish(1, &[]);
    let made = f.make();
    let generations = f.generations();
    let in_use = generations.take(&made).unwrap();
    let all = GcAction::DeleteDead {
        freed_bytes_max: u64::MAX,
    };
    assert!(f.store.collect(&all).unwrap().paths.is_empty());
    let error = generations.drop_one(1).unwrap_err();
    assert_eq!(error.to_string(), "generation 1 is in use");
    assert!(generations.prune(0).unwrap().numbers.is_empty());
    drop(in_use);
    assert_eq!(f.store.collect(&all).unwrap().paths, [path.clone()].into());
    let error = generations.take(&made).unwrap_err();
    assert_eq!(
        error.to_string(),
        format!(
            "generation 1 has /nix/store/{}, which is not valid any more",
            path.base_name()
        )
    );
    // The same name once more is another path.
    f.publish(1, &[]);
    assert!(generations.take(&made).is_err());
    let again = f.make();
    generations.take(&again).unwrap();
    assert_eq!(generations.prune(1).unwrap().numbers, [1]);
    assert_eq!(generations.prune(0).unwrap().numbers, [2]);
    assert!(!f.dir.path().join("store/generations/extents").exists());
    // Numbers are never used twice.
    assert_eq!(f.make().number, 3);
}

#[test]
fn a_damaged_image_is_refused() {
    let f = Fixture::new();
    f.publish(1, &[]);
    let made = f.make();
    let file = fs::File::options().write(true).open(made.image()).unwrap();
    file.write_all_at(&[0x55], made.image_bytes() / 2).unwrap();
    let error = f.generations().take(&made).unwrap_err();
    assert_eq!(error.kind(), understory::error::ErrorKind::Corrupt);
    assert!(error.to_string().contains("expected BLAKE3"), "{error}");
}

#[test]
fn an_interrupted_making_leaves_nothing() {
    let f = Fixture::new();
    f.publish(1, &[]);
    let made = f.make();
    let dir = f.dir.path().join("store/generations");
    let extents = dir.join("extents");
    let published = fs::read(&extents).unwrap();
    // As a process leaves it that is killed before the renaming: extents behind the published ones, a directory.
    let mut longer = published.clone();
    longer.extend([0x17; 64 * 3 + 5]);
    fs::write(&extents, &longer).unwrap();
    fs::create_dir(dir.join(".new-123456")).unwrap();
    fs::write(dir.join(".new-123456/image.erofs"), b"half").unwrap();
    let again = f.make();
    assert_eq!(again.image_digest(), made.image_digest());
    assert!(fs::read(&extents).unwrap() == published);
    assert!(!dir.join(".new-123456").exists());
}

#[test]
fn a_damaged_frame_is_an_error_and_never_other_bytes() {
    if !can_mount() {
        return;
    }
    let f = Fixture::new();
    let path = f.publish(1, &[]);
    let made = f.make();
    drop(f.store.writer().unwrap());
    let expected = contents(&f.tree(1));
    // Damage in each of many places, read by a process that has seen nothing of it before.
    let pack = fs::read_dir(f.dir.path().join("store/castore/packs"))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .next()
        .unwrap();
    let bytes = fs::read(&pack).unwrap();
    let file = fs::File::options().write(true).open(&pack).unwrap();
    let (mounted, at) = f.mount(&made, Route::File);
    let mut failed = 0;
    for part in 0..8 {
        let offset = (bytes.len() * (2 * part + 1) / 16) as u64;
        file.write_all_at(&[!bytes[offset as usize]], offset)
            .unwrap();
    }
    drop_caches();
    for (name, (kind, _, wanted)) in &expected {
        if *kind != 'f' {
            continue;
        }
        match fs::read(at.join(path.base_name()).join(name)) {
            Ok(found) => assert!(found == *wanted, "{}", name.display()),
            Err(error) => {
                assert_eq!(error.raw_os_error(), Some(5), "{}", name.display());
                failed += 1;
            }
        }
    }
    assert!(failed > 0, "nothing was damaged");
    mounted.unmount().unwrap();
}

#[test]
fn an_overlay_stands_on_an_image_and_what_is_newer() {
    use understory::config::{Layout, LayoutOptions};
    use understory::generation::stack::{Holder, MountMode, Places, Stack, StackOptions, Standing};
    use understory::mount::{OverlayLayers, OverlayMount};
    if !can_mount() {
        return;
    }
    let f = Fixture::new();
    let old = f.publish(1, &[]);
    let layout = Layout::new(&f.dir.path().join("store"), &LayoutOptions::default()).unwrap();
    fs::create_dir_all(&layout.run).unwrap();
    /// Notes what it is given to hold.
    #[derive(Default)]
    struct Noted(std::sync::Mutex<BTreeSet<String>>);
    impl Holder for Noted {
        fn hold(
            &self,
            name: &str,
            _: &serde_json::Value,
            descriptors: &[rustix::fd::BorrowedFd<'_>],
            notify: Option<usize>,
        ) -> understory::Result<()> {
            assert!(notify.is_none_or(|at| at < descriptors.len()));
            self.0.lock().unwrap().insert(name.to_owned());
            Ok(())
        }
        fn release(&self, name: &str) -> understory::Result<()> {
            assert!(self.0.lock().unwrap().remove(name), "{name}");
            Ok(())
        }
    }
    let held = std::sync::Arc::new(Noted::default());
    let names = || Vec::from_iter(held.0.lock().unwrap().clone());
    let begin = |mode| {
        let options = StackOptions {
            mode,
            ..StackOptions::default()
        };
        Stack::begin(&f.store, &layout, &options, held.clone()).unwrap()
    };
    let places = Places::of(&layout);
    let is_nothing = |stack: Stack| {
        assert!(names().is_empty());
        assert_eq!(places.mounted().unwrap(), None);
        stack.unmount().unwrap();
    };
    // Few paths: not by itself, and it says why.
    let stack = begin(MountMode::Auto);
    let standing = Standing::read(&layout).unwrap();
    assert_eq!(
        standing.describe(),
        "the live mount (the store has fewer than 100 paths)"
    );
    is_nothing(stack);
    is_nothing(begin(MountMode::Live));
    let stack = begin(MountMode::Image);
    let standing = Standing::read(&layout).unwrap();
    assert_eq!(
        standing.describe(),
        "an image, generation 1: the kernel reads the image file itself"
    );
    assert_eq!(names(), ["image-blob", "image-newer-1"]);
    assert_eq!(places.mounted().unwrap(), Some(1));
    let first = places.set(1);
    let layers = OverlayLayers {
        lowers: first.lowers().to_vec(),
        upper: f.make_dir("upper"),
        work: f.make_dir("work"),
    };
    let merged = f.make_dir("merged");
    let overlay = OverlayMount::mount(&layers, &merged, false).unwrap();
    let new = f.publish(2, &[&old]);
    // No path is in both, and both are seen.
    let listed = |dir: &Path| -> BTreeSet<_> {
        fs::read_dir(dir)
            .unwrap()
            .map(|e| e.unwrap().file_name())
            .collect()
    };
    assert_eq!(listed(&first.image), [old.base_name().into()].into());
    assert_eq!(listed(&first.newer), [new.base_name().into()].into());
    let both = |at: &Path| {
        assert!(contents(&at.join(old.base_name())) == contents(&f.tree(1)));
        assert!(contents(&at.join(new.base_name())) == contents(&f.tree(2)));
    };
    both(&merged);
    assert!(!first.newer.join(old.base_name()).exists());
    // Another generation beside it, and an overlay on that below the one in use.
    let made = f.generations().make(&Selection::All, &mut |_| {}).unwrap();
    stack.raise(made.number).unwrap();
    assert_eq!(names(), ["image-blob", "image-newer-1", "image-newer-2"]);
    let second = places.set(2);
    assert_eq!(listed(&second.image).len(), 2);
    assert!(listed(&second.newer).is_empty());
    let open = fs::File::open(merged.join(old.base_name())).unwrap();
    assert!(!overlay.is_unused().unwrap());
    let layers = OverlayLayers {
        lowers: second.lowers().to_vec(),
        work: f.make_dir("work-2"),
        ..layers
    };
    let scratch = f.make_dir("scratch");
    OverlayMount::mount_beneath(&layers, &merged, &scratch, false).unwrap();
    let stacked = || OverlayMount::stacked(&merged, &layers.upper).unwrap();
    assert_eq!(stacked().len(), 2);
    assert_eq!(stacked()[1].overlay_lower_dirs(), first.lowers());
    fs::write(merged.join("written"), "written").unwrap();
    assert!(!overlay.unmount_if_unused().unwrap());
    drop(open);
    assert!(overlay.is_unused().unwrap() && overlay.is_unused().unwrap());
    assert!(overlay.unmount_if_unused().unwrap());
    assert_eq!(stacked().len(), 1);
    assert_eq!(stacked()[0].overlay_lower_dirs(), second.lowers());
    assert_eq!(fs::read(merged.join("written")).unwrap(), b"written");
    both(&merged);
    assert_eq!(stack.keep_only(&[2]).unwrap(), 1);
    assert_eq!(names(), ["image-blob", "image-newer-2"]);
    assert!(!f.generations().get(1).unwrap().is_in_use().unwrap());
    assert_eq!(f.generations().prune(1).unwrap().numbers, [1]);
    both(&merged);
    overlay.unmount().unwrap();
    stack.unmount().unwrap();
    assert_eq!(places.mounted().unwrap(), None);
    drop(stack);
    assert!(!f.generations().get(2).unwrap().is_in_use().unwrap());
}
