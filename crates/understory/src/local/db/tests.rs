use super::*;
use rusqlite::params;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use tempfile::TempDir;
use understory_nix::worker::{DrvOutput, WireRealisation};
use understory_nix::{ContentAddress, Hash, HashAlgorithm, NarHash, PathInfo, SecretKey};

fn path(number: u64, name: &str) -> StorePath {
    let digits = b"0123456789abcdfghijklmnpqrsvwxyz";
    let mut hash = [b'0'; 32];
    for (index, digit) in hash.iter_mut().rev().enumerate().take(12) {
        *digit = digits[(number >> (5 * index)) as usize & 31];
    }
    let hash = std::str::from_utf8(&hash).unwrap();
    StorePath::from_base_name(&format!("{hash}-{name}")).unwrap()
}

fn info(path: &StorePath, references: &[&StorePath]) -> PathInfo {
    PathInfo {
        path: path.clone(),
        nar_hash: NarHash::try_from(Hash::of(HashAlgorithm::Sha256, path.name().as_bytes()))
            .unwrap(),
        nar_size: 120,
        references: references.iter().map(|&path| path.clone()).collect(),
        deriver: None,
        registration_time: 1_700_000_000,
        ultimate: false,
        signatures: BTreeSet::new(),
        ca: None,
    }
}

fn no_outputs(_: &StorePath) -> Result<DrvOutputs> {
    Ok(Vec::new())
}

struct Fixture {
    dir: TempDir,
    db: Database,
}

impl Fixture {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let db = open(&dir);
        Self { dir, db }
    }
    fn register(&self, infos: &[PathInfo]) -> Result<()> {
        self.db.register(infos, &no_outputs)
    }
    fn raw(&self) -> Connection {
        let raw = Connection::open(self.db.path()).unwrap();
        raw.busy_timeout(BUSY_TIMEOUT).unwrap();
        raw
    }
    fn read_only(&self) -> Database {
        Database::open(self.dir.path(), &StoreDir::default(), OpenMode::ReadOnly).unwrap()
    }
}

fn open(dir: &TempDir) -> Database {
    Database::open(dir.path(), &StoreDir::default(), OpenMode::ReadWrite).unwrap()
}

#[test]
fn files_are_those_of_nix() {
    let f = Fixture::new();
    let db = f.dir.path().join("db");
    assert_eq!(fs::read(db.join("schema")).unwrap(), b"10");
    let mode = |name: &str| fs::metadata(db.join(name)).unwrap().mode() & 0o777;
    assert_eq!(mode("big-lock"), 0o600);
    assert_eq!(mode("reserved"), 0o600);
    assert_eq!(fs::metadata(db.join("reserved")).unwrap().len(), 8 << 20);
    let Fixture { dir, db: database } = f;
    drop(database);
    // As Nix leaves them, for readers that may not write the directory.
    assert!(dir.path().join("db/db.sqlite-wal").exists());
    assert!(dir.path().join("db/db.sqlite-shm").exists());
    assert!(open(&dir).all_paths().unwrap().is_empty());
}

#[test]
fn infos_come_back_as_they_were_given() {
    let f = Fixture::new();
    let (a, b, c) = (path(1, "a"), path(2, "b"), path(3, "c"));
    let key = SecretKey::generate("k").unwrap();
    let dir = StoreDir::default();
    let mut full = info(&a, &[&a, &b]);
    full.deriver = Some(path(9, "a.drv"));
    full.ultimate = true;
    full.sign(&dir, &key);
    full.sign(&dir, &SecretKey::generate("l").unwrap());
    let mut unknown_size = info(&b, &[]);
    unknown_size.nar_size = 0;
    f.register(&[full.clone(), unknown_size.clone()]).unwrap();
    assert_eq!(f.db.info(&a).unwrap().as_ref(), Some(&full));
    assert_eq!(
        f.db.infos(&[b.clone(), c.clone(), a.clone()]).unwrap(),
        [Some(unknown_size), None, Some(full)]
    );
    assert_eq!(f.db.valid(&[c.clone(), a.clone()]).unwrap(), [false, true]);
    assert!(f.db.is_valid(&b).unwrap() && !f.db.is_valid(&c).unwrap());
    assert_eq!(f.db.all_paths().unwrap(), [a.clone(), b.clone()]);
    assert_eq!(f.db.referrers(&a).unwrap(), [a.clone()].into());
    assert_eq!(f.db.referrers(&b).unwrap(), [a.clone()].into());
    assert_eq!(
        f.db.path_from_hash_part(b.hash_part()).unwrap(),
        Some(b.clone())
    );
    assert_eq!(f.db.path_from_hash_part(c.hash_part()).unwrap(), None);
    assert_eq!(
        f.db.path_from_hash_part("x").unwrap_err().to_string(),
        "invalid hash part"
    );
    let raw: (String, Option<i64>, Option<i64>, Option<String>) = f
        .raw()
        .query_row(
            "select hash, narSize, ultimate, sigs from ValidPaths where path = ?1",
            [dir.print(&b)],
            |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?, row.get(3)?)),
        )
        .unwrap();
    assert!(raw.0.starts_with("sha256:") && raw.0.len() == 71, "{raw:?}");
    assert_eq!((raw.1, raw.2, raw.3), (None, None, None));
}

#[test]
fn registration_time_0_is_now() {
    let f = Fixture::new();
    let a = path(1, "a");
    let mut new = info(&a, &[]);
    new.registration_time = 0;
    f.register(&[new]).unwrap();
    assert!(f.db.info(&a).unwrap().unwrap().registration_time > 1_700_000_000);
}

#[test]
fn a_known_path_is_updated_as_nix_does() {
    let f = Fixture::new();
    let (a, b) = (path(1, "a"), path(2, "b"));
    let mut old = info(&a, &[&a]);
    old.deriver = Some(path(9, "a.drv"));
    old.ultimate = true;
    old.sign(&StoreDir::default(), &SecretKey::generate("k").unwrap());
    f.register(&[old.clone(), info(&b, &[])]).unwrap();
    let mut new = info(&a, &[&b]);
    new.nar_size = 7;
    new.registration_time = 5;
    f.register(&[new.clone()]).unwrap();
    let found = f.db.info(&a).unwrap().unwrap();
    assert_eq!(found.nar_size, 7);
    assert_eq!(found.references, [a.clone(), b.clone()].into(), "added");
    assert_eq!(found.deriver, old.deriver, "kept");
    assert_eq!(found.registration_time, old.registration_time, "kept");
    assert!(!found.ultimate && found.signatures.is_empty());
    // Copies of a lower store's do not touch what is there.
    old.nar_size = 9;
    let c = path(3, "c");
    f.db.register_above(&[old, info(&c, &[&a])], &[], &no_outputs)
        .unwrap();
    assert_eq!(f.db.info(&a).unwrap().unwrap(), found);
    assert_eq!(f.db.referrers(&a).unwrap(), [a, c].into());
}

#[test]
fn order_does_not_matter_and_what_is_missing_is_named() {
    let f = Fixture::new();
    let (a, b, c) = (path(1, "a"), path(2, "b"), path(3, "c"));
    let error = f
        .register(&[info(&b, &[]), info(&a, &[&b, &c])])
        .unwrap_err();
    assert_eq!(
        error.to_string(),
        "path '/nix/store/00000000000000000000000000000003-c' is not valid"
    );
    assert!(f.db.all_paths().unwrap().is_empty(), "nothing is changed");
    f.register(&[info(&a, &[&b, &c]), info(&b, &[&c]), info(&c, &[])])
        .unwrap();
    assert_eq!(f.db.all_paths().unwrap().len(), 3);
}

#[test]
fn cycles_are_refused() {
    let f = Fixture::new();
    let (a, b, c) = (path(1, "a"), path(2, "b"), path(3, "c"));
    let error = f
        .register(&[info(&a, &[&a, &b]), info(&b, &[&c]), info(&c, &[&a])])
        .unwrap_err();
    assert_eq!(
        error.to_string(),
        "cycle detected in the references of '/nix/store/00000000000000000000000000000001-a' \
         from '/nix/store/00000000000000000000000000000003-c'"
    );
    assert!(f.db.all_paths().unwrap().is_empty());
    // Also with references that rows had before.
    f.register(&[info(&a, &[&b]), info(&b, &[])]).unwrap();
    let error = f
        .register(&[info(&a, &[]), info(&b, &[&a])])
        .unwrap_err()
        .to_string();
    assert!(
        error.starts_with("cycle detected in the references of"),
        "{error}"
    );
    assert_eq!(f.db.info(&b).unwrap().unwrap().references, BTreeSet::new());
}

#[test]
fn a_long_chain_needs_no_stack() {
    let f = Fixture::new();
    let paths: Vec<StorePath> = (0..20_000).map(|number| path(number, "x")).collect();
    let infos: Vec<PathInfo> = paths
        .iter()
        .enumerate()
        .map(|(index, path)| match index.checked_sub(1) {
            Some(before) => info(path, &[&paths[before]]),
            None => info(path, &[]),
        })
        .collect();
    f.register(&infos).unwrap();
    let found = f.db.infos(&paths).unwrap();
    assert_eq!(found, infos.into_iter().map(Some).collect::<Vec<_>>());
    f.db.invalidate(&paths).unwrap();
    assert!(f.db.all_paths().unwrap().is_empty());
    assert_eq!(f.db.last_id().unwrap(), 20_000);
}

#[test]
fn a_content_address_must_make_the_path() {
    let f = Fixture::new();
    let a = path(1, "a");
    let mut bad = info(&a, &[]);
    bad.ca = ContentAddress::parse_optional(&format!(
        "fixed:r:{}",
        Hash::of(HashAlgorithm::Sha256, b"")
    ))
    .unwrap();
    let error = f.register(&[bad.clone()]).unwrap_err();
    assert_eq!(
        error.to_string(),
        "cannot add path '/nix/store/00000000000000000000000000000001-a' to the Nix store because it claims \
         to be content-addressed but isn't"
    );
    let references = understory_nix::content_address::References::of(&a, &BTreeSet::new());
    let dir = StoreDir::default();
    bad.path = bad
        .ca
        .as_ref()
        .unwrap()
        .make_path(&dir, &a.to_name(), &references)
        .unwrap();
    f.register(&[bad.clone()]).unwrap();
    assert_eq!(f.db.info(&bad.path).unwrap(), Some(bad));
}

#[test]
fn outputs_of_new_derivations() {
    let f = Fixture::new();
    let (drv, out, dev) = (path(1, "a.drv"), path(2, "a"), path(3, "a-dev"));
    let outputs = |asked: &StorePath| {
        assert_eq!(*asked, drv);
        Ok(vec![
            ("out".to_owned(), out.clone()),
            ("dev".to_owned(), dev.clone()),
        ])
    };
    f.db.register(&[info(&drv, &[])], &outputs).unwrap();
    let expected: BTreeMap<_, _> = [("out", &out), ("dev", &dev)]
        .map(|(name, path)| (name.to_owned(), path.clone()))
        .into();
    assert_eq!(f.db.derivation_outputs(&drv).unwrap(), Some(expected));
    assert_eq!(f.db.derivation_outputs(&out).unwrap(), None);
    assert_eq!(f.db.valid_derivers(&dev).unwrap(), [drv.clone()].into());
    // Not asked again for what is known.
    f.db.register(&[info(&drv, &[])], &|_| panic!("asked again"))
        .unwrap();
    let failing = |_: &StorePath| Err(Error::user("unreadable"));
    let other = path(4, "b.drv");
    let error = f.db.register(&[info(&other, &[])], &failing).unwrap_err();
    assert_eq!(error.to_string(), "unreadable");
    assert!(!f.db.is_valid(&other).unwrap());
    f.db.invalidate(&[drv]).unwrap();
    assert!(f.db.valid_derivers(&dev).unwrap().is_empty());
}

#[test]
fn what_is_in_use_is_not_removed() {
    let f = Fixture::new();
    let [a, b, c, d] = ["a", "b", "c", "d"].map(|name| path(u64::from(name.as_bytes()[0]), name));
    f.register(&[
        info(&a, &[&a]),
        info(&b, &[&a]),
        info(&c, &[&a]),
        info(&d, &[&a]),
    ])
    .unwrap();
    let dir = StoreDir::default();
    let error = f.db.invalidate(&[a.clone(), c.clone()]).unwrap_err();
    assert_eq!(
        error.to_string(),
        format!(
            "cannot delete path '{}' because it is in use by '{}', '{}'",
            dir.print(&a),
            dir.print(&b),
            dir.print(&d)
        )
    );
    assert_eq!(f.db.all_paths().unwrap().len(), 4, "nothing is changed");
    f.db.invalidate(&[a, b, path(1, "never"), d.clone(), c, d])
        .unwrap();
    assert!(f.db.all_paths().unwrap().is_empty());
    let left: i64 = f
        .raw()
        .query_row("select count(*) from Refs", [], |row| row.get(0))
        .unwrap();
    assert_eq!(left, 0);
}

#[test]
fn signatures_are_added() {
    let f = Fixture::new();
    let a = path(1, "a");
    let mut signed = info(&a, &[]);
    f.register(&[signed.clone()]).unwrap();
    let dir = StoreDir::default();
    let mut all = BTreeSet::new();
    for name in ["k", "l"] {
        signed.signatures.clear();
        signed.sign(&dir, &SecretKey::generate(name).unwrap());
        all.extend(signed.signatures.clone());
        f.db.add_signatures(&a, &signed.signatures).unwrap();
        f.db.add_signatures(&a, &signed.signatures).unwrap();
    }
    assert_eq!(f.db.info(&a).unwrap().unwrap().signatures, all);
    let error = f.db.add_signatures(&path(2, "b"), &all).unwrap_err();
    assert_eq!(
        error.to_string(),
        "path '/nix/store/00000000000000000000000000000002-b' is not valid"
    );
}

#[test]
fn realisations_of_both_kinds() {
    let f = Fixture::new();
    let (a, b, drv) = (path(1, "a"), path(2, "b"), path(3, "a.drv"));
    let hash = "3".repeat(64);
    for id in [
        DrvOutput::Hash(format!("sha256:{hash}!out")),
        DrvOutput::Path {
            drv: drv.clone(),
            output: "out".to_owned(),
        },
    ] {
        let realisation = |path: &StorePath, signatures: &[&str]| WireRealisation {
            id: id.clone(),
            out_path: path.clone(),
            signatures: signatures.iter().map(|&text| text.to_owned()).collect(),
        };
        assert_eq!(f.db.realisation(&id).unwrap(), None, "none yet");
        let error =
            f.db.register_realisation(&realisation(&a, &[]))
                .unwrap_err();
        assert_eq!(
            error.to_string(),
            "path '/nix/store/00000000000000000000000000000001-a' is not valid"
        );
        f.register(&[info(&a, &[]), info(&b, &[])]).unwrap();
        f.db.register_realisation(&realisation(&a, &["k:1"]))
            .unwrap();
        f.db.register_realisation(&realisation(&a, &["l:2"]))
            .unwrap();
        assert_eq!(
            f.db.realisation(&id).unwrap(),
            Some(realisation(&a, &["k:1", "l:2"]))
        );
        assert_eq!(
            f.read_only().realisation(&id).unwrap(),
            f.db.realisation(&id).unwrap()
        );
        let error =
            f.db.register_realisation(&realisation(&b, &[]))
                .unwrap_err();
        assert_eq!(
            error.to_string(),
            format!(
                "Trying to register a realisation of '{}', but we already have another one locally.\n\
                 Local:  /nix/store/00000000000000000000000000000001-a\n\
                 Remote: /nix/store/00000000000000000000000000000002-b",
                id.id()
            )
        );
        f.db.invalidate(&[a.clone(), b.clone()]).unwrap();
    }
    // Gone with its output, where the table has a foreign key.
    let id = DrvOutput::Hash(format!("sha256:{hash}!out"));
    assert_eq!(f.db.realisation(&id).unwrap(), None);
    let mut migrations: Vec<String> = f
        .raw()
        .prepare("select migration from SchemaMigrations order by migration")
        .unwrap()
        .query_map([], |row| row.get(0))
        .unwrap()
        .collect::<rusqlite::Result<_>>()
        .unwrap();
    migrations.sort();
    assert_eq!(
        migrations,
        ["20220326-ca-derivations", "20251017-ca-derivations"]
    );
}

#[test]
fn the_graph_is_all_there_is() {
    let f = Fixture::new();
    let (a, b, drv) = (path(1, "a"), path(2, "b"), path(3, "a.drv"));
    let gone = path(4, "gone");
    let mut first = info(&a, &[&a, &b]);
    first.deriver = Some(drv.clone());
    f.db.register(&[first, info(&b, &[]), info(&drv, &[&b])], &|_| {
        Ok(vec![("out".to_owned(), gone.clone())])
    })
    .unwrap();
    let graph = f.db.graph().unwrap();
    let nodes: Vec<_> = graph
        .nodes
        .iter()
        .map(|node| (&node.path, &node.deriver, &node.references[..]))
        .collect();
    assert_eq!(
        nodes,
        [
            (&a, &Some(drv.clone()), &[1][..]),
            (&b, &None, &[]),
            (&drv, &None, &[1])
        ]
    );
    assert_eq!(graph.outputs, [(2, gone)]);
}

#[test]
fn notes() {
    let f = Fixture::new();
    assert_eq!(f.db.note("x").unwrap(), None);
    assert_eq!(f.read_only().note("x").unwrap(), None, "no table");
    f.db.set_note("x", Some("1")).unwrap();
    f.db.set_note("x", Some("2")).unwrap();
    f.db.set_note("y", Some("")).unwrap();
    assert_eq!(f.db.note("x").unwrap().as_deref(), Some("2"));
    assert_eq!(f.read_only().note("y").unwrap().as_deref(), Some(""));
    f.db.set_note("x", None).unwrap();
    assert_eq!(f.db.note("x").unwrap(), None);
}

#[test]
fn numbers_grow_and_the_oldest_row_names_the_store() {
    let f = Fixture::new();
    assert_eq!(
        (f.db.last_id().unwrap(), f.db.fingerprint().unwrap()),
        (0, None)
    );
    let (a, b) = (path(1, "a"), path(2, "b"));
    f.register(&[info(&a, &[]), info(&b, &[])]).unwrap();
    let fingerprint = f.db.fingerprint().unwrap();
    f.db.invalidate(&[b]).unwrap();
    assert_eq!(f.db.last_id().unwrap(), 2);
    assert_eq!(f.db.fingerprint().unwrap(), fingerprint);
    assert_eq!(
        fingerprint.as_deref(),
        Some("1 /nix/store/00000000000000000000000000000001-a 1700000000")
    );
}

// -- schemas

/// What Nix 1.7 made: no `ultimate`, `sigs` and `ca`, a table that is gone since.
fn old_database(dir: &TempDir) {
    let db = dir.path().join("db");
    fs::create_dir(&db).unwrap();
    fs::write(db.join("schema"), "7").unwrap();
    let raw = Connection::open(db.join("db.sqlite")).unwrap();
    raw.execute_batch(
        "create table ValidPaths (id integer primary key autoincrement not null, path text unique not null,
           hash text not null, registrationTime integer not null, deriver text, narSize integer);
         create table Refs (referrer integer not null, reference integer not null,
           primary key (referrer, reference),
           foreign key (referrer) references ValidPaths(id) on delete cascade,
           foreign key (reference) references ValidPaths(id) on delete restrict);
         create table DerivationOutputs (drv integer not null, id text not null, path text not null,
           primary key (drv, id), foreign key (drv) references ValidPaths(id) on delete cascade);
         create table FailedPaths (path text primary key not null, time integer not null);",
    )
    .unwrap();
    raw.execute(
        "insert into ValidPaths (path, hash, registrationTime) values (?1, ?2, 3)",
        params![
            StoreDir::default().print(&path(1, "a")),
            format!("sha256:{}", "0".repeat(64))
        ],
    )
    .unwrap();
}

#[test]
fn older_schemas_are_upgraded() {
    let dir = tempfile::tempdir().unwrap();
    old_database(&dir);
    let error = Database::open(dir.path(), &StoreDir::default(), OpenMode::ReadOnly)
        .err()
        .unwrap();
    assert_eq!(
        error.to_string(),
        format!(
            "{}/db/schema: expected schema 10, found 7",
            dir.path().display()
        )
    );
    let db = open(&dir);
    assert_eq!(fs::read(dir.path().join("db/schema")).unwrap(), b"10");
    assert_eq!(
        db.info(&path(1, "a")).unwrap().unwrap().registration_time,
        3
    );
    db.register(&[info(&path(2, "b"), &[&path(1, "a")])], &no_outputs)
        .unwrap();
    // An upgrade that ended before the version was written is done again.
    drop(db);
    fs::write(dir.path().join("db/schema"), "8").unwrap();
    assert_eq!(open(&dir).all_paths().unwrap().len(), 2);
    assert_eq!(fs::read(dir.path().join("db/schema")).unwrap(), b"10");
}

#[test]
fn schemas_that_are_not_known() {
    let dir = tempfile::tempdir().unwrap();
    drop(open(&dir));
    let schema = dir.path().join("db/schema");
    let message = |text: &str| {
        fs::write(&schema, text).unwrap();
        Database::open(dir.path(), &StoreDir::default(), OpenMode::ReadWrite)
            .err()
            .unwrap()
            .to_string()
    };
    let place = schema.display();
    assert_eq!(
        message("11"),
        format!("{place}: current Nix store schema is version 11, but I only support 10")
    );
    assert_eq!(
        message("6"),
        format!("{place}: expected schema 7 to 10, found 6")
    );
    assert_eq!(
        message("x\n"),
        format!("'{place}' is corrupt: expected a number, found 'x\\n'")
    );
}

#[test]
fn damage_is_told_at_once() {
    let dir = tempfile::tempdir().unwrap();
    drop(open(&dir));
    let file = dir.path().join("db/db.sqlite");
    fs::write(&file, vec![7; 8192]).unwrap();
    for mode in [OpenMode::ReadWrite, OpenMode::ReadOnly] {
        let error = Database::open(dir.path(), &StoreDir::default(), mode)
            .err()
            .unwrap();
        assert_eq!(
            error.kind(),
            crate::error::ErrorKind::Corrupt,
            "{mode:?}: {}",
            error.chain()
        );
    }
}

// -- several at a time

#[test]
fn writers_wait_for_each_other() {
    let dir = tempfile::tempdir().unwrap();
    let shared = path(0, "shared");
    open(&dir)
        .register(&[info(&shared, &[])], &no_outputs)
        .unwrap();
    std::thread::scope(|scope| {
        for writer in 1..=4_u64 {
            let (dir, shared) = (&dir, &shared);
            scope.spawn(move || {
                let db = open(dir);
                for round in 0..25 {
                    let new = path(writer * 1000 + round, "x");
                    db.register(&[info(&new, &[shared])], &no_outputs).unwrap();
                    assert!(db.is_valid(&new).unwrap());
                    if round % 5 == 0 {
                        db.invalidate(&[new]).unwrap();
                    }
                }
            });
        }
        let (dir, shared) = (&dir, &shared);
        scope.spawn(move || {
            let db = open(dir);
            let mut last = 0;
            while db.all_paths().unwrap().len() < 81 {
                let now = db.last_id().unwrap();
                assert!(now >= last);
                last = now;
                assert!(db.is_valid(shared).unwrap());
            }
        });
    });
    assert_eq!(open(&dir).referrers(&shared).unwrap().len(), 80);
}

#[test]
fn a_failed_registration_leaves_the_writer_usable() {
    let f = Fixture::new();
    let a = path(1, "a");
    for _ in 0..3 {
        f.register(&[info(&a, &[&path(2, "b")])]).unwrap_err();
    }
    let panicked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        f.db.write(|_| -> Work<()> { panic!("on purpose") })
    }));
    assert!(panicked.is_err());
    f.register(&[info(&a, &[])]).unwrap();
    assert!(f.db.is_valid(&a).unwrap());
}

// -- read-only

#[test]
fn a_reader_sees_what_a_writer_has_just_committed() {
    let f = Fixture::new();
    let reader = f.read_only();
    for number in 0..5 {
        let new = path(number, "x");
        f.register(&[info(&new, &[])]).unwrap();
        assert!(reader.is_valid(&new).unwrap());
    }
    let error = reader.set_note("x", None).unwrap_err();
    assert_eq!(
        error.to_string(),
        format!("{} is open read-only", reader.path().display())
    );
}

#[test]
fn nothing_is_made_beside_a_database_that_is_only_read() {
    let dir = tempfile::tempdir().unwrap();
    let error = Database::open(dir.path(), &StoreDir::default(), OpenMode::ReadOnly)
        .err()
        .unwrap();
    assert_eq!(
        error.to_string(),
        format!(
            "there is no Nix store: {}/db/db.sqlite does not exist",
            dir.path().display()
        )
    );
    let a = path(1, "a");
    open(&dir).register(&[info(&a, &[])], &no_outputs).unwrap();
    let db = dir.path().join("db");
    // Checkpointed and closed by a program that leaves no log: what an image of a store looks like.
    let raw = Connection::open(db.join("db.sqlite")).unwrap();
    raw.execute_batch("pragma wal_checkpoint(truncate)")
        .unwrap();
    drop(raw);
    for name in ["db.sqlite-wal", "db.sqlite-shm", "big-lock", "reserved"] {
        let _gone = fs::remove_file(db.join(name));
    }
    let names = || {
        let mut names: Vec<_> = fs::read_dir(&db)
            .unwrap()
            .map(|entry| entry.unwrap().file_name())
            .collect();
        names.sort();
        names
    };
    assert_eq!(names(), ["db.sqlite", "schema"]);
    let reader = Database::open(dir.path(), &StoreDir::default(), OpenMode::ReadOnly).unwrap();
    assert_eq!(reader.all_paths().unwrap(), std::slice::from_ref(&a));
    assert_eq!(names(), ["db.sqlite", "schema"]);
    // Somebody opens it for writing after all.
    let writer = open(&dir);
    let b = path(2, "b");
    writer.register(&[info(&b, &[&a])], &no_outputs).unwrap();
    assert_eq!(reader.all_paths().unwrap(), [a, b.clone()]);
    assert!(reader.is_valid(&b).unwrap());
}

#[test]
fn a_log_that_was_left_over_is_honoured() {
    let dir = tempfile::tempdir().unwrap();
    let image = tempfile::tempdir().unwrap();
    let (a, b) = (path(1, "a"), path(2, "b"));
    let writer = open(&dir);
    writer.register(&[info(&a, &[])], &no_outputs).unwrap();
    let (from, to) = (dir.path().join("db"), image.path().join("db"));
    fs::create_dir(&to).unwrap();
    for name in ["db.sqlite", "db.sqlite-wal", "schema"] {
        fs::copy(from.join(name), to.join(name)).unwrap();
    }
    assert!(fs::metadata(to.join("db.sqlite-wal")).unwrap().len() > 0);
    fs::set_permissions(&to, fs::Permissions::from_mode(0o555)).unwrap();
    let reader = Database::open(image.path(), &StoreDir::default(), OpenMode::ReadOnly).unwrap();
    assert_eq!(reader.all_paths().unwrap(), std::slice::from_ref(&a));
    assert!(!to.join("db.sqlite-shm").exists());
    // What changes below the copy is seen.
    writer.register(&[info(&b, &[])], &no_outputs).unwrap();
    fs::copy(from.join("db.sqlite-wal"), to.join("db.sqlite-wal")).unwrap();
    assert_eq!(reader.all_paths().unwrap(), [a, b]);
}

#[test]
fn a_database_that_was_replaced_or_removed() {
    let f = Fixture::new();
    let reader = f.read_only();
    let file = f.db.path().to_path_buf();
    let other = Fixture::new();
    fs::rename(other.db.path(), &file).unwrap();
    assert_eq!(
        reader.all_paths().unwrap_err().to_string(),
        format!("{} was replaced while it was open", file.display())
    );
    fs::remove_file(&file).unwrap();
    assert_eq!(
        reader.all_paths().unwrap_err().to_string(),
        format!("{} was removed while it was open", file.display())
    );
}

/// Names the state directory to a test that runs in a mount namespace of its own.
const READ_ONLY_STATE: &str = "UNDERSTORY_TEST_READ_ONLY_STATE";

#[test]
fn inside_a_read_only_mount() {
    let Some(state) = std::env::var_os(READ_ONLY_STATE) else {
        return;
    };
    let state = Path::new(&state);
    assert!(fs::write(state.join("db/x"), "").is_err());
    let db = Database::open(state, &StoreDir::default(), OpenMode::ReadOnly).unwrap();
    assert_eq!(db.all_paths().unwrap(), [path(1, "a"), path(2, "b")]);
    let error = Database::open(state, &StoreDir::default(), OpenMode::ReadWrite)
        .err()
        .unwrap();
    assert_eq!(
        error.to_string(),
        format!("opening {}/db/big-lock", state.display())
    );
}

#[test]
fn a_directory_that_nobody_can_write() {
    if !rustix::process::geteuid().is_root() {
        understory_testkit::skip("a read-only mount needs root");
        return;
    }
    let live = tempfile::tempdir().unwrap();
    let writer = open(&live);
    let (a, b) = (path(1, "a"), path(2, "b"));
    writer
        .register(&[info(&a, &[]), info(&b, &[&a])], &no_outputs)
        .unwrap();
    let image = |names: &[&str]| {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("db")).unwrap();
        for name in names {
            let place = Path::new("db").join(name);
            fs::copy(live.path().join(&place), dir.path().join(&place)).unwrap();
        }
        dir
    };
    let left_over = image(&["db.sqlite", "db.sqlite-wal", "db.sqlite-shm", "schema"]);
    let without_shared_memory = image(&["db.sqlite", "db.sqlite-wal"]);
    for dir in [&live, &left_over, &without_shared_memory] {
        let done = std::process::Command::new("unshare")
            .args([
                "--mount",
                "sh",
                "-euc",
                r#"mount --bind "$1" "$1"; mount -o remount,ro,bind "$1"; exec "$0" --exact local::db::tests::inside_a_read_only_mount --nocapture"#,
            ])
            .arg(std::env::current_exe().unwrap())
            .arg(dir.path())
            .env(READ_ONLY_STATE, dir.path())
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&done.stdout);
        assert!(
            done.status.success() && said.contains("1 passed"),
            "{said}{}",
            String::from_utf8_lossy(&done.stderr)
        );
    }
    drop(writer);
}
