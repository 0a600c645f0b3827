//! Roots, and what a collection spares.

use super::support::{ALL_DEAD, Fixture, file, path, set};
use super::whole::assert_whole;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use understory::store::GcAction;
use understory::{Store, StoreOptions};
use understory_castore::store::CollectOptions;
use understory_nix::{StoreDir, StorePath};
use understory_testkit::SmallDisk;

#[test]
fn collection_spares_roots_and_what_they_refer_to() {
    let fixture = Fixture::new();
    let store = &fixture.store;
    fixture.add("lib", &[]);
    fixture.add("app", &["lib", "app"]);
    fixture.add("old", &["lib"]);
    fixture.add("temp", &[]);
    let link = fixture.dir.path().join("result");
    store.add_perm_root(&path("app"), &link).unwrap();
    assert_eq!(
        std::fs::read_link(&link).unwrap(),
        Path::new(&fixture.print("app"))
    );
    let owner = store.temp_root_owner().unwrap();
    store.add_temp_root(&owner, &path("temp")).unwrap();
    store.add_temp_root(&owner, &path("not-valid-yet")).unwrap();
    let pid = std::process::id();
    let roots = store.roots().unwrap();
    assert!(roots.contains(&(link.clone(), path("app"))), "{roots:?}");
    assert!(
        roots.contains(&(PathBuf::from(format!("{{temp:{pid}}}")), path("temp"))),
        "{roots:?}"
    );

    assert_eq!(
        store.collect(&GcAction::ReturnLive).unwrap().paths,
        set(&["app", "lib", "temp"])
    );
    assert_eq!(
        store.collect(&GcAction::ReturnDead).unwrap().paths,
        set(&["old"])
    );
    let other = fixture.reopen();
    let size = other.path(&path("old")).unwrap().unwrap().info.nar_size;
    let deleted = store.collect(&ALL_DEAD).unwrap();
    assert_eq!((deleted.paths, deleted.freed_bytes), (set(&["old"]), size));
    assert_eq!(
        other.path(&path("old")).unwrap(),
        None,
        "another process' cache"
    );
    // Temporary roots end with their owner, permanent ones with their link.
    drop(owner);
    assert_eq!(
        store.collect(&GcAction::ReturnDead).unwrap().paths,
        set(&["temp"])
    );
    std::fs::remove_file(&link).unwrap();
    assert_eq!(store.roots().unwrap(), []);
    assert_eq!(
        other.collect(&ALL_DEAD).unwrap().paths,
        set(&["app", "lib", "temp"])
    );
    assert_eq!(store.path(&path("app")).unwrap(), None);
    assert_eq!(
        std::fs::read_dir(fixture.dir().join("gcroots/auto"))
            .unwrap()
            .count(),
        0,
        "stale link"
    );
    // A number is never used twice.
    fixture.add("next", &[]);
    assert_eq!(store.list(0, 10).unwrap()[0].id, 5);
}

#[test]
fn collection_stops_when_enough_is_freed() {
    let fixture = Fixture::new();
    for name in ["a", "b", "c"] {
        fixture.add(name, &[]);
    }
    let report = fixture
        .store
        .collect(&GcAction::DeleteDead { freed_bytes_max: 0 })
        .unwrap();
    assert_eq!(report.paths.len(), 1);
    assert_eq!(fixture.store.count().unwrap(), 2);
}

#[test]
fn deleting_what_is_alive_fails_in_nix_words() {
    let fixture = Fixture::new();
    let store = &fixture.store;
    fixture.add("lib", &[]);
    fixture.add("app", &["lib"]);
    let delete = |names: &[&str]| store.collect(&GcAction::DeleteSpecific { paths: set(names) });
    // As Nix 2.26.3 and 2.34.8 say it.
    let words = |name: &str| {
        format!(
            "Cannot delete path '{}' since it is still alive. To find out why, use: \
             nix-store --query --roots and nix-store --query --referrers",
            fixture.print(name)
        )
    };
    assert_eq!(
        delete(&["lib"]).unwrap_err().to_string(),
        words("lib"),
        "it has a referrer"
    );
    let owner = store.temp_root_owner().unwrap();
    store.add_temp_root(&owner, &path("app")).unwrap();
    assert_eq!(delete(&["app"]).unwrap_err().to_string(), words("app"));
    assert!(delete(&["app", "lib"]).is_err());
    assert_eq!(store.count().unwrap(), 2, "all or nothing");
    drop(owner);
    let report = delete(&["app", "lib", "never-there"]).unwrap();
    assert_eq!(report.paths, set(&["app", "lib"]));
    assert!(report.freed_bytes > 0);
    assert_eq!(store.count().unwrap(), 0);
}

#[test]
fn permanent_roots_refuse_what_is_in_the_way() {
    let fixture = Fixture::new();
    let store = &fixture.store;
    fixture.add("a", &[]);
    fixture.add("b", &[]);
    let link = fixture.dir.path().join("x/../link");
    let real = fixture.dir.path().join("link");
    store.add_perm_root(&path("a"), &link).unwrap();
    store.add_perm_root(&path("b"), &real).unwrap();
    assert_eq!(store.roots().unwrap(), [(real, path("b"))]);
    let file = fixture.dir.path().join("file");
    std::fs::write(&file, "precious").unwrap();
    let error = store.add_perm_root(&path("a"), &file).unwrap_err();
    assert_eq!(
        error.to_string(),
        format!("cannot create symlink '{}'; already exists", file.display())
    );
    let inside = PathBuf::from(fixture.print("a")).join("root");
    let error = store.add_perm_root(&path("a"), &inside).unwrap_err();
    assert_eq!(
        error.to_string(),
        format!(
            "creating a garbage collector root ({}) in the Nix store is forbidden \
             (are you running nix-build inside the store?)",
            inside.display()
        )
    );
    let error = store
        .add_perm_root(&path("nope"), &fixture.dir.path().join("n"))
        .unwrap_err();
    assert_eq!(
        error.to_string(),
        format!("path '{}' is not valid", fixture.print("nope"))
    );
    let error = store.add_indirect_root(Path::new("relative")).unwrap_err();
    assert_eq!(error.to_string(), "not an absolute path: 'relative'");
}

#[test]
fn temporary_roots_of_a_dead_process_do_not_count() {
    let fixture = Fixture::new();
    fixture.add("a", &[]);
    let leftover = fixture.dir().join("temproots/999999-0");
    std::fs::write(&leftover, format!("{}\n", path("a"))).unwrap();
    assert_eq!(fixture.store.roots().unwrap(), []);
    assert!(leftover.exists(), "listing removes nothing");
    assert_eq!(
        fixture.store.collect(&GcAction::ReturnDead).unwrap().paths,
        set(&["a"])
    );
    assert!(!leftover.exists());
}

#[test]
fn a_collection_does_not_race_with_additions() {
    let fixture = Fixture::new();
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let collector = scope.spawn(|| {
            let store = fixture.reopen();
            while !stop.load(Ordering::Relaxed) {
                store.collect(&ALL_DEAD).unwrap();
            }
        });
        for round in 0..30 {
            let owner = fixture.store.temp_root_owner().unwrap();
            let (base, top) = (format!("base{round}"), format!("top{round}"));
            fixture
                .store
                .add_temp_roots(&owner, &[path(&base), path(&top)])
                .unwrap();
            fixture.add(&base, &[]);
            fixture.add(&top, &[&base]);
            assert!(fixture.store.is_valid(&path(&top)).unwrap());
        }
        stop.store(true, Ordering::Relaxed);
        collector.join().unwrap();
    });
}

/// A store in `disk` with `count` paths of a file of `bytes` that do not compress; every eighth has a root.
fn fill_store(disk: &SmallDisk, options: &StoreOptions, count: u64, bytes: u64) {
    let dir = disk.path().join("s");
    Store::create(&dir, &StoreDir::default()).unwrap();
    let fixture = Fixture {
        store: Store::open(&dir, options).unwrap(),
        dir: tempfile::tempdir().unwrap(),
    };
    let store = &fixture.store;
    for number in 0..count {
        let name = format!("path-{number}");
        let mut contents = Vec::new();
        understory_testkit::corpus::write_random(&mut contents, number, bytes).unwrap();
        let read = file(store, &contents);
        let (mut info, _) = fixture.info(&name, &[]);
        (info.nar_hash, info.nar_size) = (read.nar_hash, read.nar_size);
        store.publish(vec![(info, read.root)]).unwrap();
        if number % 8 == 0 {
            let link = disk.path().join(format!("root-{number}"));
            store.add_perm_root(&path(&name), &link).unwrap();
        }
    }
}

fn kept_of(count: u64) -> Vec<StorePath> {
    (0..count)
        .step_by(8)
        .map(|number| path(&format!("path-{number}")))
        .collect()
}

/// Collects in a store on a full disk.
fn collect_on_a_full_disk(disk: &SmallDisk, options: &StoreOptions, count: u64) -> Store {
    disk.fill();
    let store = Store::open(&disk.path().join("s"), options).unwrap();
    let deleted = store.collect(&ALL_DEAD).unwrap();
    assert_eq!(deleted.paths.len() as u64, count - count.div_ceil(8));
    store
        .reclaim(
            &CollectOptions::default(),
            &BTreeSet::new(),
            &mut |_| Ok(()),
        )
        .unwrap();
    let kept = kept_of(count);
    assert_eq!(store.valid_paths(&kept).unwrap(), kept);
    assert_whole(&store);
    store
}

#[test]
fn a_collection_makes_room_on_a_full_disk() {
    let Some(disk) = SmallDisk::new(12) else {
        return;
    };
    let (options, count) = (StoreOptions::default(), 1200);
    fill_store(&disk, &options, count, 4_000);
    let store = collect_on_a_full_disk(&disk, &options, count);
    // Most of it is free, and the room for the next time is kept.
    let disk = rustix::fs::statvfs(disk.path()).unwrap();
    let free = disk.f_bavail * disk.f_frsize;
    assert!(free > 2 << 20, "{free} bytes");
    let reserved = std::fs::metadata(store.dir().join("reserved")).unwrap();
    assert!(reserved.len() >= 1 << 20, "{reserved:?}");
}

#[test]
fn packs_are_written_anew_one_by_one_where_room_is_short() {
    let Some(disk) = SmallDisk::new(64) else {
        return;
    };
    let mut options = StoreOptions::default();
    options.castore.pack_bytes_max = 2 << 20;
    // A quarter of a megabyte lives in each pack of two: eight of them would be one new pack, for which there is no room.
    let count = 160;
    fill_store(&disk, &options, count, 256 << 10);
    collect_on_a_full_disk(&disk, &options, count);
}
