//! The store: publication, queries, roots, collection, several processes.
#![allow(
    clippy::unwrap_used,
    reason = "a test panics when something is not as expected"
)]

use std::collections::BTreeSet;
use std::io::Cursor;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use understory::error::ErrorKind;
use understory::nar::{ReadNar, read_nar, write_nar};
use understory::store::{CheckFinding, GcAction, Observer, Realisation};
use understory::{Store, StoreOptions};
use understory_nix::nar::Writer as NarWriter;
use understory_nix::{
    ContentAddress, Hash, HashAlgorithm, NarHash, PathInfo, Signature, StoreDir, StorePath,
};

struct Fixture {
    dir: tempfile::TempDir,
    store: Store,
}

impl Fixture {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        Store::create(&dir.path().join("s"), &StoreDir::default()).unwrap();
        let store = Store::open(&dir.path().join("s"), &StoreOptions::default()).unwrap();
        Self { dir, store }
    }
    fn dir(&self) -> PathBuf {
        self.dir.path().join("s")
    }
    fn reopen(&self) -> Store {
        Store::open(&self.dir(), &StoreOptions::default()).unwrap()
    }
    fn read_only(&self) -> Store {
        let mut options = StoreOptions::default();
        options.castore.read_only = true;
        Store::open(&self.dir(), &options).unwrap()
    }
    fn info(&self, name: &str, references: &[&str]) -> (PathInfo, ReadNar) {
        let read = file(&self.store, name.as_bytes());
        let info = PathInfo {
            path: path(name),
            nar_hash: read.nar_hash,
            nar_size: read.nar_size,
            references: set(references),
            deriver: None,
            registration_time: 0,
            ultimate: false,
            signatures: BTreeSet::new(),
            ca: None,
        };
        (info, read)
    }
    fn add(&self, name: &str, references: &[&str]) {
        let (info, read) = self.info(name, references);
        self.store.publish(vec![(info, read.root)]).unwrap();
    }
    fn print(&self, name: &str) -> String {
        self.store.store_dir().print(&path(name))
    }
}

/// A made-up path: its hash part follows from the name.
fn path(name: &str) -> StorePath {
    let hash = Hash::of(HashAlgorithm::Sha1, name.as_bytes());
    StorePath::from_base_name(&format!("{}-{name}", hash.to_nix32())).unwrap()
}

fn set(names: &[&str]) -> BTreeSet<StorePath> {
    names.iter().map(|name| path(name)).collect()
}

fn file(store: &Store, contents: &[u8]) -> ReadNar {
    let mut nar = Vec::new();
    let mut writer = NarWriter::new(&mut nar);
    writer.file(None, false, contents.len() as u64).unwrap();
    writer.contents(contents).unwrap();
    writer.finish().unwrap();
    read_nar(&store.writer().unwrap(), &mut Cursor::new(nar)).unwrap()
}

fn signature(key: &str) -> Signature {
    Signature::parse(&format!("{key}:{}==", "A".repeat(86))).unwrap()
}

const ALL_DEAD: GcAction = GcAction::DeleteDead {
    freed_bytes_max: u64::MAX,
};

#[test]
fn create_refuses_what_is_there() {
    let dir = tempfile::tempdir().unwrap();
    let at = dir.path().join("s");
    Store::create(&at, &StoreDir::default()).unwrap();
    let error = Store::create(&at, &StoreDir::default()).unwrap_err();
    assert_eq!(
        error.to_string(),
        format!("{} is a store already", at.display())
    );
    assert_eq!(error.kind(), ErrorKind::User);
    let other = dir.path().join("other");
    std::fs::create_dir(&other).unwrap();
    std::fs::write(other.join("precious"), "x").unwrap();
    let error = Store::create(&other, &StoreDir::default()).unwrap_err();
    assert_eq!(
        error.to_string(),
        format!(
            "cannot make a store in {}: it is not empty (it holds `precious`)",
            other.display()
        )
    );
    assert!(other.join("precious").exists());
}

#[test]
fn an_interrupted_creation_is_finished_by_the_next() {
    let dir = tempfile::tempdir().unwrap();
    let at = dir.path();
    Store::create(at, &StoreDir::default()).unwrap();
    // As if it had been killed before the last write.
    std::fs::remove_file(at.join("format")).unwrap();
    std::fs::write(at.join("creating"), "").unwrap();
    Store::create(at, &StoreDir::new("/other/store").unwrap()).unwrap();
    let store = Store::open(at, &StoreOptions::default()).unwrap();
    assert_eq!(store.store_dir().as_str(), "/other/store");
    assert!(!at.join("creating").exists());
}

#[test]
fn of_many_that_create_one_store_one_succeeds() {
    let dir = tempfile::tempdir().unwrap();
    let at = dir.path().join("s");
    let made: usize = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..8)
            .map(|_| scope.spawn(|| Store::create(&at, &StoreDir::default())))
            .collect();
        let results = threads.into_iter().map(|thread| thread.join().unwrap());
        results
            .map(|result| match result {
                Ok(()) => 1,
                Err(error) => {
                    assert_eq!(
                        error.to_string(),
                        format!("{} is a store already", at.display())
                    );
                    0
                }
            })
            .sum()
    });
    assert_eq!(made, 1);
    Store::open(&at, &StoreOptions::default()).unwrap();
}

#[test]
fn open_says_what_is_wrong() {
    let dir = tempfile::tempdir().unwrap();
    let open = |at: &Path| Store::open(at, &StoreOptions::default()).err().unwrap();
    let error = open(dir.path());
    assert_eq!(
        error.to_string(),
        format!("{} is not an understory store", dir.path().display())
    );
    assert!(error.hint().is_some());
    let fixture = Fixture::new();
    std::fs::write(fixture.dir().join("format"), "understory store 2\n").unwrap();
    let error = open(&fixture.dir());
    assert_eq!(
        error.to_string(),
        format!(
            "{} has format 2, this program knows format 1",
            fixture.dir().display()
        )
    );
    std::fs::write(fixture.dir().join("format"), "what").unwrap();
    assert_eq!(open(&fixture.dir()).kind(), ErrorKind::Corrupt);
}

#[test]
fn published_paths_are_found_in_every_way() {
    let fixture = Fixture::new();
    fixture.add("a", &[]);
    let (mut info, read) = fixture.info("b", &["a", "b"]);
    info.deriver = Some(path("b.drv"));
    info.registration_time = 12345;
    info.ultimate = true;
    info.signatures.insert(signature("k-1"));
    fixture
        .store
        .publish(vec![(info.clone(), read.root.clone())])
        .unwrap();

    for store in [fixture.store.clone(), fixture.reopen(), fixture.read_only()] {
        let row = store.path(&path("b")).unwrap().unwrap();
        assert_eq!(row.info, info);
        assert_eq!(row.root, read.root);
        assert_eq!(
            store.path(&path("b")).unwrap().unwrap(),
            row,
            "again, from memory"
        );
        let first = store.path(&path("a")).unwrap().unwrap();
        assert!(first.info.registration_time > 1_600_000_000, "now");
        assert!(first.id < row.id);
        assert_eq!(store.path(&path("c")).unwrap(), None);
        assert_eq!(
            store
                .valid_paths(&[path("c"), path("b"), path("a")])
                .unwrap(),
            [path("b"), path("a")]
        );
        assert_eq!(
            store
                .all_paths()
                .unwrap()
                .into_iter()
                .collect::<BTreeSet<_>>(),
            set(&["a", "b"])
        );
        assert_eq!(store.list(0, 10).unwrap().len(), 2);
        assert_eq!(
            store.list(first.id, 10).unwrap(),
            std::slice::from_ref(&row)
        );
        assert_eq!(store.list(0, 1).unwrap()[0].info.path, path("a"));
        assert_eq!(store.referrers(&path("a")).unwrap(), set(&["b"]));
        assert_eq!(store.referrers(&path("b")).unwrap(), set(&["b"]));
        assert_eq!(store.referrers(&path("c")).unwrap(), set(&[]));
        assert_eq!(
            store.path_from_hash_part(path("b").hash_part()).unwrap(),
            Some(path("b"))
        );
        assert_eq!(
            store.path_from_hash_part(path("c").hash_part()).unwrap(),
            None
        );
        assert_eq!(
            store.path_from_hash_part("short").unwrap_err().to_string(),
            "invalid hash part"
        );
        let closure = store.closure(&[path("b")]).unwrap();
        let names: Vec<_> = closure
            .iter()
            .map(|row| row.info.path.name().to_owned())
            .collect();
        assert_eq!(names, ["a", "b"]);
        assert!(
            store
                .closure(&[path("c")])
                .unwrap_err()
                .to_string()
                .ends_with("-c' is not valid")
        );
    }
    let mut nar = Vec::new();
    write_nar(fixture.store.castore(), &read.root, &mut nar).unwrap();
    assert_eq!(nar.len() as u64, info.nar_size);
}

#[test]
fn a_missing_reference_registers_nothing() {
    let fixture = Fixture::new();
    let (a, a_read) = fixture.info("a", &[]);
    let (b, b_read) = fixture.info("b", &["gone"]);
    let error = fixture
        .store
        .publish(vec![(a, a_read.root), (b, b_read.root)])
        .unwrap_err();
    assert_eq!(
        error.to_string(),
        format!("path '{}' is not valid", fixture.print("gone"))
    );
    assert_eq!(fixture.store.all_paths().unwrap(), []);
}

#[test]
fn references_may_come_in_any_order_and_not_in_circles() {
    let fixture = Fixture::new();
    let infos = [("c", vec!["b", "a"]), ("a", vec![]), ("b", vec!["a"])];
    let batch = infos.iter().map(|(name, references)| {
        let (info, read) = fixture.info(name, references);
        (info, read.root)
    });
    fixture.store.publish(batch.collect()).unwrap();
    let rows = fixture.store.list(0, 10).unwrap();
    let order: Vec<_> = rows.iter().map(|row| row.info.path.name()).collect();
    assert_eq!(order, ["a", "b", "c"], "references first");
    let (x, x_read) = fixture.info("x", &["y"]);
    let (y, y_read) = fixture.info("y", &["x"]);
    let error = fixture
        .store
        .publish(vec![(x, x_read.root), (y, y_read.root)])
        .unwrap_err();
    assert_eq!(
        error.to_string(),
        format!(
            "cycle detected in the references of '{}' from '{}'",
            fixture.print("x"),
            fixture.print("y")
        )
    );
    assert_eq!(fixture.store.path(&path("x")).unwrap(), None);
}

#[test]
fn registering_again_merges_signatures() {
    let fixture = Fixture::new();
    fixture.add("a", &[]);
    let other = fixture.reopen();
    assert!(
        other
            .path(&path("a"))
            .unwrap()
            .unwrap()
            .info
            .signatures
            .is_empty()
    );
    let (mut info, read) = fixture.info("a", &[]);
    info.signatures.insert(signature("k2"));
    info.ultimate = true;
    fixture.store.publish(vec![(info, read.root)]).unwrap();
    fixture
        .store
        .add_signatures(&path("a"), &BTreeSet::from([signature("k1")]))
        .unwrap();
    for store in [&fixture.store, &other] {
        let row = store.path(&path("a")).unwrap().unwrap();
        assert_eq!(
            row.info.signatures,
            BTreeSet::from([signature("k1"), signature("k2")])
        );
        assert!(row.info.ultimate);
    }
    let error = fixture
        .store
        .add_signatures(&path("z"), &BTreeSet::new())
        .unwrap_err();
    assert_eq!(
        error.to_string(),
        format!("path '{}' is not valid", fixture.print("z"))
    );
    // Another content of the same path: the first stays.
    let read = file(&fixture.store, b"different");
    let (mut info, _) = fixture.info("a", &[]);
    info.nar_hash = read.nar_hash;
    info.signatures.insert(signature("k3"));
    let before = fixture.store.path(&path("a")).unwrap().unwrap();
    fixture
        .store
        .publish(vec![(info.clone(), read.root.clone())])
        .unwrap();
    assert_eq!(fixture.store.path(&path("a")).unwrap().unwrap(), before);
    // Unless it is a repair.
    fixture
        .store
        .republish(vec![(info, read.root.clone())])
        .unwrap();
    let row = other.path(&path("a")).unwrap().unwrap();
    assert_eq!((row.info.nar_hash, &row.root), (read.nar_hash, &read.root));
    assert_eq!(row.info.signatures, BTreeSet::from([signature("k3")]));
}

#[test]
fn a_false_content_address_is_refused() {
    let fixture = Fixture::new();
    let (mut info, read) = fixture.info("a", &[]);
    info.ca = Some(ContentAddress::parse(&format!("fixed:r:{}", info.nar_hash)).unwrap());
    let error = fixture.store.publish(vec![(info, read.root)]).unwrap_err();
    let full = fixture.print("a");
    assert_eq!(
        error.to_string(),
        format!(
            "cannot add path '{full}' to the Nix store because it claims to be content-addressed but isn't"
        )
    );
}

#[derive(Default)]
struct Log(Mutex<Vec<String>>);
impl Observer for Log {
    fn published(&self, paths: &[StorePath]) {
        self.0
            .lock()
            .unwrap()
            .extend(paths.iter().map(|p| format!("+{}", p.name())));
    }
    fn deleted(&self, paths: &[StorePath]) {
        self.0
            .lock()
            .unwrap()
            .extend(paths.iter().map(|p| format!("-{}", p.name())));
    }
}

#[test]
fn observers_hear_of_what_is_new_and_what_is_gone() {
    let fixture = Fixture::new();
    let log = Arc::new(Log::default());
    fixture.store.observe(log.clone());
    fixture.add("a", &[]);
    fixture.add("a", &[]);
    fixture.add("b", &["a"]);
    fixture.store.collect(&ALL_DEAD).unwrap();
    assert_eq!(*log.0.lock().unwrap(), ["+a", "+b", "-b", "-a"]);
}

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

#[test]
fn realisations_are_kept_and_do_not_contradict() {
    let fixture = Fixture::new();
    let store = &fixture.store;
    fixture.add("a", &[]);
    fixture.add("b", &[]);
    let id = format!("sha256:{}!out", "0".repeat(64));
    let make = |name: &str, signature: &str| Realisation {
        id: id.clone(),
        out_path: path(name),
        signatures: BTreeSet::from([signature.to_owned()]),
    };
    assert_eq!(store.realisation(&id).unwrap(), None);
    store.add_realisation(&make("a", "k:1")).unwrap();
    store.add_realisation(&make("a", "k:2")).unwrap();
    let known = store.realisation(&id).unwrap().unwrap();
    assert_eq!(
        known.signatures,
        BTreeSet::from(["k:1".to_owned(), "k:2".to_owned()])
    );
    assert_eq!(store.realisations_of(&path("a")).unwrap(), [known]);
    let error = store.add_realisation(&make("b", "k:1")).unwrap_err();
    assert_eq!(
        error.to_string(),
        format!(
            "realisation '{id}' is recorded already: expected output path '{}', found '{}'",
            fixture.print("a"),
            fixture.print("b")
        )
    );
    let absent = Realisation {
        id: "x!out".to_owned(),
        ..make("c", "k:1")
    };
    let error = store.add_realisation(&absent).unwrap_err();
    assert_eq!(
        error.to_string(),
        format!("path '{}' is not valid", fixture.print("c"))
    );
    // It goes with its path.
    store
        .collect(&GcAction::DeleteSpecific { paths: set(&["a"]) })
        .unwrap();
    assert_eq!(store.realisation(&id).unwrap(), None);
}

#[test]
fn build_logs_are_kept_compressed() {
    let fixture = Fixture::new();
    let drv = path("a.drv");
    assert!(fixture.store.build_log(&drv).unwrap().is_none());
    let log = "line\n".repeat(10_000);
    fixture
        .store
        .add_build_log(&drv, &mut log.as_bytes())
        .unwrap();
    let mut text = String::new();
    let mut reader = fixture.store.build_log(&drv).unwrap().unwrap();
    std::io::Read::read_to_string(&mut reader, &mut text).unwrap();
    assert_eq!(text, log);
    let (first, rest) = drv.base_name().split_at(2);
    let file = fixture
        .dir()
        .join("log/drvs")
        .join(first)
        .join(format!("{rest}.zst"));
    assert!(file.metadata().unwrap().len() < 200);
}

#[test]
fn a_read_only_store_changes_nothing() {
    let fixture = Fixture::new();
    fixture.add("a", &[]);
    let store = fixture.read_only();
    let (info, read) = fixture.info("b", &[]);
    let error = store.publish(vec![(info, read.root)]).unwrap_err();
    assert_eq!(
        error.to_string(),
        format!("the store {} is open read-only", fixture.dir().display())
    );
    assert!(store.collect(&ALL_DEAD).is_err());
    assert_eq!(
        store.collect(&GcAction::ReturnDead).unwrap().paths,
        set(&["a"])
    );
    let owner = store.temp_root_owner().unwrap();
    store.add_temp_root(&owner, &path("a")).unwrap();
}

fn check(store: &Store) -> (u64, Vec<CheckFinding>) {
    let mut findings = Vec::new();
    let cancel = AtomicBool::new(false);
    let report = store
        .check(true, &mut |_| {}, &mut |f| findings.push(f), &cancel)
        .unwrap();
    assert_eq!(report.findings, findings.len() as u64);
    (report.paths_hurt, findings)
}

#[test]
fn content_that_is_not_what_its_row_says_is_found_and_named() {
    let fixture = Fixture::new();
    fixture.add("a", &[]);
    fixture.add("b", &[]);
    assert_eq!(check(&fixture.store), (0, vec![]));
    let row = fixture.store.path(&path("a")).unwrap().unwrap();
    let mut info = row.info.clone();
    info.nar_hash = NarHash([7; 32]);
    fixture
        .store
        .republish(vec![(info.clone(), row.root.clone())])
        .unwrap();
    let message = format!(
        "path '{}' was modified! expected hash '{}', got '{}'",
        fixture.print("a"),
        info.nar_hash,
        row.info.nar_hash
    );
    let finding = CheckFinding {
        message,
        paths: vec![path("a")],
    };
    assert_eq!(check(&fixture.store), (1, vec![finding]));
}

#[test]
fn a_hundred_thousand_paths_are_quick() {
    let fixture = Fixture::new();
    let count = 100_000;
    let read = file(&fixture.store, b"content");
    let started = std::time::Instant::now();
    let batch = (0..count).map(|n| {
        let steps = (1..=4).filter(|step| n >= step * 7);
        let info = PathInfo {
            path: path(&format!("p{n}")),
            nar_hash: read.nar_hash,
            nar_size: read.nar_size,
            references: steps
                .map(|step| path(&format!("p{}", n - step * 7)))
                .collect(),
            deriver: None,
            registration_time: 1,
            ultimate: false,
            signatures: BTreeSet::new(),
            ca: None,
        };
        (info, read.root.clone())
    });
    fixture.store.publish(batch.collect()).unwrap();
    println!("registered {count} paths in {:?}", started.elapsed());
    let started = std::time::Instant::now();
    let store = fixture.reopen();
    assert!(store.path(&path("p99999")).unwrap().is_some());
    let first = started.elapsed();
    println!("first answer after {first:?}");
    let started = std::time::Instant::now();
    let closure = store.closure(&[path("p14000")]).unwrap();
    println!(
        "closure of {} paths in {:?}",
        closure.len(),
        started.elapsed()
    );
    let started = std::time::Instant::now();
    let all = store.all_paths().unwrap();
    let valid = store.valid_paths(&all).unwrap();
    assert_eq!(valid.len(), count);
    println!("validity of {count} paths in {:?}", started.elapsed());
    let started = std::time::Instant::now();
    for path in &all {
        assert!(store.path(path).unwrap().is_some());
    }
    println!(
        "{count} lookups, mostly from the database, in {:?}",
        started.elapsed()
    );
    let started = std::time::Instant::now();
    for path in all[..1000].iter().cycle().take(count) {
        assert!(store.path(path).unwrap().is_some());
    }
    println!(
        "{count} lookups, mostly from memory, in {:?}",
        started.elapsed()
    );
    let started = std::time::Instant::now();
    assert_eq!(
        store.collect(&GcAction::ReturnDead).unwrap().paths.len(),
        count
    );
    println!("dead paths of {count} in {:?}", started.elapsed());
    let started = std::time::Instant::now();
    assert_eq!(store.collect(&ALL_DEAD).unwrap().paths.len(), count);
    println!("deleted {count} in {:?}", started.elapsed());
    // Generous: a busy machine and an unoptimised build.
    assert!(first.as_millis() < 1000);
}

/// A generator whose seed is printed by the assertions that use it.
struct Random(u64);
impl Random {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % bound
    }
}

#[test]
fn a_flipped_bit_in_the_database_is_never_served() {
    let fixture = Fixture::new();
    let mut expected = std::collections::BTreeMap::new();
    for number in 0..60 {
        let name = format!("path-{number}");
        let before = format!("path-{}", number / 2);
        let (mut info, read) = fixture.info(&name, &[&before, &name]);
        info.deriver = Some(path("some.drv"));
        info.signatures.insert(signature("key"));
        fixture.store.publish(vec![(info, read.root)]).unwrap();
        expected.insert(
            path(&name),
            fixture.store.path(&path(&name)).unwrap().unwrap(),
        );
    }
    let realisation = Realisation {
        id: format!("sha256:{}!out", "0".repeat(64)),
        out_path: path("path-7"),
        signatures: BTreeSet::from(["key:signature".to_owned()]),
    };
    fixture.store.add_realisation(&realisation).unwrap();
    let (dir, at) = (fixture.dir.path().to_owned(), fixture.dir());
    let Fixture { dir: _keep, store } = fixture;
    drop(store);
    let database = at.join("db.sqlite");
    assert!(
        !at.join("db.sqlite-wal").exists(),
        "closing empties the log"
    );
    let good = std::fs::read(&database).unwrap();
    let seed = 0x9e37_79b9_7f4a_7c15;
    let mut random = Random(seed);
    let (mut refused, mut missed, mut found) = (0, 0, 0);
    for round in 0..400 {
        let mut bytes = good.clone();
        let offset = random.below(bytes.len() as u64) as usize;
        bytes[offset] ^= 1 << random.below(8);
        let damaged = dir.join("damaged");
        let _ = std::fs::remove_dir_all(&damaged);
        std::fs::create_dir(&damaged).unwrap();
        std::os::unix::fs::symlink(at.join("castore"), damaged.join("castore")).unwrap();
        for name in ["format", "generation"] {
            std::fs::copy(at.join(name), damaged.join(name)).unwrap();
        }
        std::fs::write(damaged.join("db.sqlite"), &bytes).unwrap();
        let mut options = StoreOptions::default();
        options.castore.read_only = true;
        let Ok(store) = Store::open(&damaged, &options) else {
            refused += 1;
            continue;
        };
        let mut wrong = false;
        for (path, row) in &expected {
            match store.path(path) {
                Ok(Some(served)) => assert_eq!(
                    served.info, row.info,
                    "seed {seed}, round {round}, offset {offset}"
                ),
                Ok(None) => {
                    missed += 1;
                    wrong = true;
                }
                Err(error) => {
                    assert!(!error.to_string().is_empty());
                    refused += 1;
                    wrong = true;
                }
            }
        }
        match store.realisation(&realisation.id) {
            Ok(Some(served)) => assert_eq!(
                served, realisation,
                "seed {seed}, round {round}, offset {offset}"
            ),
            _ => wrong = true,
        }
        let mut findings = Vec::new();
        let cancel = AtomicBool::new(false);
        let checked = store.check(
            true,
            &mut |_| {},
            &mut |finding| findings.push(finding),
            &cancel,
        );
        let is_found = checked.is_err() || !findings.is_empty();
        found += usize::from(is_found);
        assert!(
            is_found || !wrong,
            "seed {seed}, round {round}, offset {offset}: not found by check"
        );
    }
    println!("refused {refused}, missed {missed}, found by check {found} of 400");
    assert!(found > 100);
}

#[test]
fn a_store_on_read_only_media_can_be_read() {
    let fixture = Fixture::new();
    fixture.add("a", &[]);
    let at = fixture.dir();
    let mount = fixture.dir.path().join("ro");
    std::fs::create_dir(&mount).unwrap();
    let target = mount.to_str().unwrap().to_owned();
    let Fixture { dir, store } = fixture;
    drop(store);
    if rustix::mount::mount_bind(&at, &mount).is_err() {
        understory_testkit::skip("mounting needs root");
        return;
    }
    let flags = rustix::mount::MountFlags::BIND | rustix::mount::MountFlags::RDONLY;
    rustix::mount::mount_remount(&mount, flags, "").unwrap();
    let result = std::panic::catch_unwind(|| {
        let mut options = StoreOptions::default();
        options.castore.read_only = true;
        let store = Store::open(Path::new(&target), &options).unwrap();
        assert!(store.path(&path("a")).unwrap().is_some());
        assert_eq!(store.all_paths().unwrap(), [path("a")]);
        let error = Store::open(Path::new(&target), &StoreOptions::default())
            .err()
            .unwrap();
        assert_eq!(error.kind(), ErrorKind::Environment);
        assert!(
            error.chain().contains("Read-only file system"),
            "{}",
            error.chain()
        );
    });
    rustix::mount::unmount(&mount, rustix::mount::UnmountFlags::DETACH).unwrap();
    drop(dir);
    if let Err(panic) = result {
        std::panic::resume_unwind(panic);
    }
}
