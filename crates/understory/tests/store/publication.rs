//! What is registered, and how it is found.

use super::support::{ALL_DEAD, Fixture, file, path, set, signature};
use std::collections::BTreeSet;
use std::sync::{Arc, Mutex};
use understory::nar::write_nar;
use understory::store::{GcAction, Observer, Realisation};
use understory_nix::{ContentAddress, PathInfo, StorePath};

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
