//! Imports and additions, against real Nix.
#![allow(
    clippy::unwrap_used,
    reason = "a test panics when something is not as expected"
)]

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use understory::import::{Counters, Importer, Options, Progress, Report, Selection, Source};
use understory::nar::write_nar;
use understory::store::GcAction;
use understory::{Result, Store, StoreOptions};
use understory_nix::{
    ContentAddress, Hash, HashAlgorithm, PublicKeys, Signature, StoreDir, StorePath,
};
use understory_testkit::nix_root::{Bind, NixRoot, Version};

const SCRIPT: &str = include_str!("import/make-store.sh");

/// What a real Nix made, in a directory of its own.
struct Made {
    dir: tempfile::TempDir,
    infos: BTreeMap<StorePath, serde_json::Value>,
}

impl Made {
    /// One per version that is there.
    fn all() -> Vec<Self> {
        Version::SUPPORTED
            .into_iter()
            .filter_map(NixRoot::get)
            .map(|root| Self::with(&root))
            .collect()
    }
    fn with(root: &NixRoot) -> Self {
        let dir = tempfile::tempdir().unwrap();
        root.run_ok(&[Bind::new(dir.path(), "/out")], 0, SCRIPT);
        let text = fs::read_to_string(dir.path().join("infos.json")).unwrap();
        let json: serde_json::Value = serde_json::from_str(&text).unwrap();
        let infos = json
            .as_object()
            .unwrap()
            .iter()
            .map(|(path, info)| (parse(path), info.clone()))
            .collect();
        Self { dir, infos }
    }
    fn path(&self) -> &Path {
        self.dir.path()
    }
    fn find(&self, name: &str) -> StorePath {
        self.infos
            .keys()
            .find(|path| path.name() == name)
            .unwrap()
            .clone()
    }
}

fn parse(path: &str) -> StorePath {
    StorePath::from_base_name(path.rsplit('/').next().unwrap()).unwrap()
}

struct Fixture {
    dir: tempfile::TempDir,
    store: Store,
}

impl Fixture {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let at = dir.path().join("s");
        Store::create(&at, &StoreDir::default()).unwrap();
        let store = Store::open(&at, &StoreOptions::default()).unwrap();
        Self { dir, store }
    }
    fn import(&self, source: &str, selection: &Selection) -> Result<Report> {
        let source = Source::open(source, &self.store)?;
        self.import_with(source, selection, &Options::default())
    }
    fn import_with(
        &self,
        source: Source,
        selection: &Selection,
        options: &Options,
    ) -> Result<Report> {
        let importer = Importer::new(self.store.clone());
        importer.run(source, selection, options, &(), &AtomicBool::new(false))
    }
    fn import_all(&self, source: &str) -> Report {
        let report = self.import(source, &Selection::All).unwrap();
        if let Some(error) = report.error() {
            panic!("{error}");
        }
        report
    }
    fn check(&self) {
        let mut findings = Vec::new();
        let cancel = AtomicBool::new(false);
        let check = |findings: &mut Vec<_>| {
            self.store.check(
                true,
                &mut |_| {},
                &mut |finding| findings.push(finding),
                &cancel,
            )
        };
        check(&mut findings).unwrap();
        assert_eq!(findings, []);
    }
    /// Compares everything with what Nix said. `full` if the source keeps all.
    fn compare(&self, made: &Made, full: bool) {
        for (path, json) in &made.infos {
            let row = self
                .store
                .path(path)
                .unwrap()
                .unwrap_or_else(|| panic!("{path} is not valid"));
            let info = &row.info;
            let mut nar = Vec::new();
            write_nar(self.store.castore(), &row.root, &mut nar).unwrap();
            let expected = fs::read(made.path().join("nars").join(path.base_name())).unwrap();
            assert!(
                nar == expected,
                "the NAR of {path} differs from nix-store --dump"
            );
            assert_eq!(
                info.nar_hash.to_hash(),
                Hash::parse(json["narHash"].as_str().unwrap(), None).unwrap()
            );
            assert_eq!(info.nar_size, json["narSize"].as_u64().unwrap());
            let references: BTreeSet<_> = json["references"]
                .as_array()
                .unwrap()
                .iter()
                .map(|r| parse(r.as_str().unwrap()))
                .collect();
            assert_eq!(info.references, references, "{path}");
            assert_eq!(info.deriver, json["deriver"].as_str().map(parse), "{path}");
            if !full {
                continue;
            }
            let signatures: BTreeSet<_> = json["signatures"]
                .as_array()
                .map(|all| {
                    all.iter()
                        .map(|s| Signature::parse(s.as_str().unwrap()).unwrap())
                        .collect()
                })
                .unwrap_or_default();
            assert_eq!(info.signatures, signatures, "{path}");
            let ca = json["ca"]
                .as_str()
                .map(|ca| ContentAddress::parse(ca).unwrap());
            assert_eq!(info.ca, ca, "{path}");
        }
    }
}

#[test]
fn a_local_store_is_imported_with_everything_it_knows() {
    for made in Made::all() {
        let wal = made.path().join("nix/var/nix/db/db.sqlite-wal");
        assert!(
            wal.metadata().unwrap().len() > 0,
            "the test is about a log with content"
        );
        let fixture = Fixture::new();
        let source = made.path().to_str().unwrap();
        let report = fixture.import_all(source);
        assert_eq!(report.counters.paths_done, report.counters.paths_total);
        assert_eq!(
            report.counters.nar_bytes_done,
            report.counters.nar_bytes_total
        );
        fixture.compare(&made, true);
        for (path, json) in &made.infos {
            let info = &fixture.store.path(path).unwrap().unwrap().info;
            assert_eq!(
                info.registration_time,
                json["registrationTime"].as_u64().unwrap(),
                "{path}"
            );
            assert_eq!(
                info.ultimate,
                json["ultimate"].as_bool().unwrap_or(false),
                "{path}"
            );
        }
        // Derivations are known by their outputs.
        let (lib, drv) = (made.find("lib"), made.find("lib.drv"));
        assert_eq!(
            fixture.store.valid_derivers(&lib).unwrap(),
            BTreeSet::from([drv.clone()])
        );
        let outputs = fixture.store.derivation_outputs(&drv).unwrap().unwrap();
        assert_eq!(outputs, BTreeMap::from([("out".to_owned(), Some(lib))]));
        let outputs = fixture
            .store
            .derivation_outputs(&made.find("floating.drv"))
            .unwrap()
            .unwrap();
        assert_eq!(outputs, BTreeMap::from([("out".to_owned(), None)]));
        // Realisations of content-addressed derivations.
        assert!(report.realisations >= 2, "{report:?}");
        for name in ["floating", "selfish"] {
            assert_eq!(
                fixture
                    .store
                    .realisations_of(&made.find(name))
                    .unwrap()
                    .len(),
                1
            );
        }
        fixture.check();
        // Again: nothing to do.
        let again = fixture.import_all(source);
        assert_eq!((again.counters.paths_total, again.realisations), (0, 0));
        assert_eq!(again.counters.paths_valid, made.infos.len() as u64);
        // By a URL, and only a closure.
        let one = Fixture::new();
        let url = format!("local?root={source}");
        let selection = Selection::Paths {
            paths: BTreeSet::from([made.find("app")]),
            closure: true,
        };
        one.import(&url, &selection).unwrap();
        let names: BTreeSet<_> = one
            .store
            .all_paths()
            .unwrap()
            .iter()
            .map(|p| p.name().to_owned())
            .collect();
        assert_eq!(names, ["app", "lib", "note"].map(str::to_owned).into());
        // Without its closure a path cannot be valid.
        let none = Fixture::new();
        let selection = Selection::Paths {
            paths: BTreeSet::from([made.find("lib")]),
            closure: false,
        };
        let report = none.import(&url, &selection).unwrap();
        let message = report.error().unwrap().to_string();
        assert!(
            message.starts_with("1 of 1 paths were not imported:\n/nix/store/"),
            "{message}"
        );
        assert!(message.ends_with("' is not valid"), "{message}");
        assert_eq!(none.store.all_paths().unwrap(), []);
    }
}

#[test]
fn a_binary_cache_of_every_compression_is_imported() {
    for made in Made::all() {
        for compression in ["none", "xz", "zstd", "bzip2", "gzip", "br"] {
            let fixture = Fixture::new();
            let cache = made.path().join(format!("cache-{compression}"));
            let report = fixture.import_all(&format!("file://{}", cache.display()));
            fixture.compare(&made, true);
            if compression == "xz" {
                assert!(report.realisations >= 1, "{report:?}");
                assert_eq!(
                    fixture
                        .store
                        .realisations_of(&made.find("floating"))
                        .unwrap()
                        .len(),
                    1
                );
            }
            fixture.check();
            let again = fixture.import_all(cache.to_str().unwrap());
            assert_eq!(again.counters.paths_total, 0);
        }
        // Signatures can be asked for.
        let fixture = Fixture::new();
        let source = || {
            Source::open(
                &format!("file://{}/cache-xz", made.path().display()),
                &fixture.store,
            )
            .unwrap()
        };
        let key = fs::read_to_string(made.path().join("public-key")).unwrap();
        let trusted = Options {
            trusted_keys: Some(PublicKeys::parse(&key).unwrap()),
            ..Options::default()
        };
        let report = fixture
            .import_with(source(), &Selection::All, &trusted)
            .unwrap();
        assert!(report.error().is_none(), "{:?}", report.error());
        let fixture = Fixture::new();
        let nobody = Options {
            trusted_keys: Some(PublicKeys::default()),
            ..Options::default()
        };
        let report = fixture
            .import_with(source(), &Selection::All, &nobody)
            .unwrap();
        assert!(
            fixture.store.path(&made.find("tree")).unwrap().is_some(),
            "content-addressed"
        );
        assert_eq!(fixture.store.path(&made.find("lib")).unwrap(), None);
        assert!(
            report
                .error()
                .unwrap()
                .to_string()
                .contains("because it lacks a signature by a trusted key")
        );
    }
}

#[test]
fn an_export_is_imported() {
    for made in Made::all() {
        let fixture = Fixture::new();
        let stream = || {
            Source::Export(Box::new(
                fs::File::open(made.path().join("export")).unwrap(),
            ))
        };
        let report = fixture
            .import_with(stream(), &Selection::All, &Options::default())
            .unwrap();
        assert!(report.error().is_none());
        assert_eq!(report.counters.paths_done, made.infos.len() as u64);
        fixture.compare(&made, false);
        fixture.check();
        let again = fixture
            .import_with(stream(), &Selection::All, &Options::default())
            .unwrap();
        assert_eq!(
            (again.counters.paths_done, again.counters.paths_valid),
            (0, made.infos.len() as u64)
        );
        // Cut off: what came whole is kept.
        let bytes = fs::read(made.path().join("export")).unwrap();
        let fixture = Fixture::new();
        let half = Source::Export(Box::new(std::io::Cursor::new(
            bytes[..bytes.len() / 2].to_vec(),
        )));
        let error = fixture
            .import_with(half, &Selection::All, &Options::default())
            .unwrap_err();
        assert!(!error.to_string().is_empty());
        let count = fixture.store.count().unwrap();
        assert!(count > 0 && count < made.infos.len() as u64, "{count}");
        fixture.check();
    }
}

#[test]
fn damaged_files_are_named_and_keep_nothing_else_from_being_imported() {
    let Some(made) = Made::all().pop() else {
        return;
    };
    let lib = made.find("lib");
    let file = made
        .path()
        .join("nix/store")
        .join(lib.base_name())
        .join("plain");
    let mode = |mode| {
        fs::set_permissions(&file, std::os::unix::fs::PermissionsExt::from_mode(mode)).unwrap();
    };
    mode(0o644);
    fs::write(&file, "SAME\n").unwrap();
    mode(0o444);
    let fixture = Fixture::new();
    let report = fixture
        .import(made.path().to_str().unwrap(), &Selection::All)
        .unwrap();
    let message = report.error().unwrap().to_string();
    let expected = fixture_hash(&made, &lib);
    assert!(
        message.contains(&format!(
            "hash mismatch importing path '/nix/store/{lib}';\n  specified: {expected}\n  got:       sha256:"
        )),
        "{message}"
    );
    let app = made.find("app");
    assert!(
        message.contains(&format!(
            "/nix/store/{app}: reference '/nix/store/{lib}' was not imported"
        )),
        "{message}"
    );
    assert_eq!(report.failures.len(), 3, "with both outputs of app");
    assert_eq!(report.counters.paths_done, report.counters.paths_total - 3);
    assert_eq!(fixture.store.path(&lib).unwrap(), None);
    fixture.check();
    // Mended, the import goes on where it was.
    mode(0o644);
    fs::write(&file, "same\n").unwrap();
    let report = fixture.import_all(made.path().to_str().unwrap());
    assert_eq!(report.counters.paths_done, 3);
    fixture.compare(&made, true);
    // A damaged cache.
    let fixture = Fixture::new();
    let narinfo = made
        .path()
        .join("cache-none")
        .join(format!("{}.narinfo", lib.hash_part()));
    let text = fs::read_to_string(&narinfo).unwrap();
    let url = text
        .lines()
        .find_map(|line| line.strip_prefix("URL: "))
        .unwrap();
    let nar = made.path().join("cache-none").join(url);
    let mut bytes = fs::read(&nar).unwrap();
    bytes.truncate(bytes.len() - 8);
    fs::write(&nar, bytes).unwrap();
    let report = fixture
        .import(
            made.path().join("cache-none").to_str().unwrap(),
            &Selection::All,
        )
        .unwrap();
    assert_eq!(report.failures.len(), 3);
    assert!(
        report
            .error()
            .unwrap()
            .to_string()
            .contains(&nar.display().to_string())
    );
}

fn fixture_hash(made: &Made, path: &StorePath) -> Hash {
    Hash::parse(made.infos[path]["narHash"].as_str().unwrap(), None).unwrap()
}

/// Cancels as soon as something is published.
struct CancelSoon<'a>(&'a AtomicBool);
impl Progress for CancelSoon<'_> {
    fn update(&self, counters: &Counters) {
        if counters.paths_done > 0 {
            self.0.store(true, Ordering::Relaxed);
        }
    }
}

/// A cache with `count` paths in a chain, each of `bytes` that do not compress.
fn chain(dir: &Path, count: usize, bytes: u64) -> Vec<StorePath> {
    fs::create_dir_all(dir.join("nar")).unwrap();
    fs::write(dir.join("nix-cache-info"), "StoreDir: /nix/store\n").unwrap();
    let mut paths: Vec<StorePath> = Vec::new();
    for number in 0..count {
        let mut contents = Vec::new();
        understory_testkit::corpus::write_random(&mut contents, number as u64, bytes).unwrap();
        let mut nar = Vec::new();
        let mut writer = understory_nix::nar::Writer::new(&mut nar);
        writer.file(None, false, bytes).unwrap();
        writer.contents(&contents).unwrap();
        writer.finish().unwrap();
        let name = format!("part-{number}");
        let hash_part = Hash::of(HashAlgorithm::Sha1, name.as_bytes()).to_nix32();
        let path = StorePath::from_base_name(&format!("{hash_part}-{name}")).unwrap();
        fs::write(dir.join(format!("nar/{number}.nar")), &nar).unwrap();
        let references = paths.last().map(ToString::to_string).unwrap_or_default();
        let text = format!(
            "StorePath: /nix/store/{path}\nURL: nar/{number}.nar\nCompression: none\nNarHash: {}\nNarSize: {}\nReferences: {references}\n",
            Hash::of(HashAlgorithm::Sha256, &nar),
            nar.len(),
        );
        fs::write(dir.join(format!("{hash_part}.narinfo")), text).unwrap();
        paths.push(path);
    }
    paths
}

#[test]
fn a_cancelled_import_keeps_what_was_done_and_goes_on_later() {
    let fixture = Fixture::new();
    let cache: PathBuf = fixture.dir.path().join("cache");
    let paths = chain(&cache, 400, 200_000);
    let cancel = AtomicBool::new(false);
    let source = Source::open(cache.to_str().unwrap(), &fixture.store).unwrap();
    let importer = Importer::new(fixture.store.clone());
    let options = Options {
        jobs: 2,
        ..Options::default()
    };
    let report = importer
        .run(
            source,
            &Selection::All,
            &options,
            &CancelSoon(&cancel),
            &cancel,
        )
        .unwrap();
    let done = fixture.store.count().unwrap();
    assert_eq!(done, report.counters.paths_done);
    assert!(report.failures.is_empty(), "{:?}", report.failures);
    fixture.check();
    let rest = fixture.import_all(cache.to_str().unwrap());
    assert_eq!(rest.counters.paths_done + done, paths.len() as u64);
    assert_eq!(rest.counters.paths_valid, done);
    let last = paths.last().unwrap().clone();
    assert_eq!(fixture.store.closure(&[last]).unwrap().len(), paths.len());
    // Imported paths are roots only while the import runs.
    assert_eq!(fixture.store.roots().unwrap(), []);
    let dead = fixture.store.collect(&GcAction::ReturnDead).unwrap();
    assert_eq!(dead.paths.len(), paths.len());
}

#[test]
fn what_is_no_source_is_said_so() {
    let fixture = Fixture::new();
    let open = |text: &str| Source::open(text, &fixture.store).err().unwrap();
    let dir = fixture.dir.path().join("nothing");
    fs::create_dir(&dir).unwrap();
    let error = open(dir.to_str().unwrap());
    assert_eq!(
        error.to_string(),
        format!(
            "there is no local Nix store here: {}/nix/var/nix/db/db.sqlite is not there",
            dir.display()
        )
    );
    let error = open(&format!("file://{}", dir.display()));
    assert_eq!(
        error.to_string(),
        format!(
            "{} does not appear to be a binary cache: it has no nix-cache-info",
            dir.display()
        )
    );
    fs::write(dir.join("nix-cache-info"), "StoreDir: /gnu/store\n").unwrap();
    let error = open(dir.to_str().unwrap());
    assert_eq!(
        error.to_string(),
        format!(
            "binary cache {} is for stores with prefix '/gnu/store', expected '/nix/store'",
            dir.display()
        )
    );
    let error = open("https://cache.example.org");
    assert_eq!(
        error.to_string(),
        "cannot import from https://cache.example.org: scheme `https` is not supported"
    );
    let error = open("local?store=/gnu/store");
    assert_eq!(
        error.to_string(),
        "the source has store directory '/gnu/store', expected '/nix/store'"
    );
    let error = open("local?rot=/x");
    assert_eq!(
        error.to_string(),
        "unknown parameter `rot` of a local store"
    );
}
