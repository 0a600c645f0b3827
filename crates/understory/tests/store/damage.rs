//! Rows and content that are not what they were.

use super::support::{Fixture, path, signature};
use std::collections::BTreeSet;
use std::sync::atomic::AtomicBool;
use understory::store::{CheckFinding, Realisation};
use understory::{Store, StoreOptions};
use understory_nix::NarHash;

fn check(store: &Store) -> (u64, Vec<CheckFinding>) {
    let mut findings = Vec::new();
    let cancel = AtomicBool::new(false);
    let report = store
        .check(true, &mut |_| {}, &mut |f| findings.push(f), &cancel)
        .unwrap();
    assert_eq!(report.findings, findings.len() as u64);
    (report.paths_hurt, findings)
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
