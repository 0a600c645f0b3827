//! Imports from stores, caches and exports that real Nix made.
#![allow(clippy::unwrap_used, reason = "helpers of tests")]

use rstest::rstest;
use std::collections::BTreeSet;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};
use tempfile::TempDir;
use understory::import::{Counters, Importer, Options, Progress, Report, Selection, Source};
use understory::{Result, Store, StoreOptions, nar};
use understory_nix::{NarHash, PathInfo, PublicKeys, StoreDir, StorePath};
use understory_testkit::nix_root::{Bind, NixRoot, Version};

/// Paths that only make the store larger.
const FILLERS: usize = 300;

/// Builds a little closure, signs it, and copies it wherever paths can come from.
const SCRIPT: &str = r#"
export NIX_CONFIG='experimental-features = nix-command ca-derivations
sandbox = false
build-users-group =
substituters ='
cat > /tmp/e.nix <<'END'
let
  mk = name: extra: text: derivation ({ inherit name; system = builtins.currentSystem; builder = "/bin/sh";
    args = [ "-c" text ]; PATH = "/usr/bin:/bin"; } // extra);
in rec {
  a = mk "a" { } "mkdir $out; echo hello > $out/f; ln -s f $out/l; echo hello > $out/x; chmod +x $out/x; echo $out > $out/self; : > $out/empty";
  b = mk "b" { } "mkdir $out; echo ${a} > $out/ref; head -c 3000000 /dev/urandom > $out/large";
  c = mk "c" { } "mkdir $out; echo ${b} ${a} > $out/refs";
  lone = mk "lone" { } "echo alone > $out";
  ca = mk "ca" { __contentAddressed = true; outputHashMode = "recursive"; outputHashAlgo = "sha256"; }
    "mkdir $out; echo $out > $out/self";
}
END
for n in c lone ca; do nix-build /tmp/e.nix -A $n --no-out-link > /out/path-$n; done
nix-build /tmp/e.nix -A a --no-out-link > /out/path-a
nix-build /tmp/e.nix -A b --no-out-link > /out/path-b
c=$(cat /out/path-c)
mkdir /tmp/fill
for i in $(seq FILLERS); do echo $i > /tmp/fill/filler-$i; done
nix-store --add /tmp/fill/* > /out/fillers
nix key generate-secret --key-name test-1 > /tmp/key
nix key convert-secret-to-public < /tmp/key > /out/public-key
nix store sign -k /tmp/key -r $c
for z in none xz zstd bzip2 gzip br; do nix copy --to "file:///out/cache-$z?compression=$z" $c; done
nix copy --to "file:///out/cache-ca" -f /tmp/e.nix ca
nix-store --export $(nix-store -qR $c) > /out/export
mkdir -p /out/src/nix/var
cp -a /nix/store /out/src/nix/store
cp -a /nix/var/nix /out/src/nix/var/nix
rm -rf /out/src/nix/store/.links
"#;

fn fixture(version: Version) -> Option<&'static Path> {
    static MADE: [OnceLock<Option<PathBuf>>; 2] = [const { OnceLock::new() }; 2];
    let index = Version::SUPPORTED
        .iter()
        .position(|v| *v == version)
        .unwrap();
    let make = || {
        let root = NixRoot::get(version)?;
        let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("import-{}", version.name()));
        let _ = std::fs::remove_dir_all(&dir);
        std::fs::create_dir_all(&dir).unwrap();
        let script = SCRIPT.replace("FILLERS", &FILLERS.to_string());
        root.run_ok(&[Bind::new(&dir, "/out")], 0, &script);
        Some(dir)
    };
    MADE[index].get_or_init(make).as_deref()
}

fn path(fixture: &Path, name: &str) -> StorePath {
    let text = std::fs::read_to_string(fixture.join(format!("path-{name}"))).unwrap();
    StoreDir::default()
        .parse(text.trim_end().as_bytes())
        .unwrap()
}

fn closure_of(path: &StorePath) -> Selection {
    Selection::Paths {
        paths: [path.clone()].into(),
        closure: true,
    }
}

fn store() -> (TempDir, Store) {
    let dir = tempfile::tempdir().unwrap();
    Store::create(&dir.path().join("s"), &StoreDir::default()).unwrap();
    let store = Store::open(&dir.path().join("s"), &StoreOptions::default()).unwrap();
    (dir, store)
}

fn run(store: &Store, source: &str, selection: &Selection) -> Result<Report> {
    run_with(store, source, selection, &())
}

fn run_with(
    store: &Store,
    source: &str,
    selection: &Selection,
    progress: &dyn Progress,
) -> Result<Report> {
    let source = Source::open(source, store)?;
    let options = Options {
        jobs: 2,
        ..Options::default()
    };
    Importer::new(store.clone()).run(
        source,
        selection,
        &options,
        progress,
        &AtomicBool::new(false),
    )
}

fn imported(store: &Store, source: &str, selection: &Selection) -> Report {
    let report = run(store, source, selection).unwrap();
    if let Some(error) = report.error() {
        panic!("{}", error.chain());
    }
    report
}

fn copy(from: &Path, to: &Path) {
    let done = Command::new("cp")
        .arg("-a")
        .arg(from)
        .arg(to)
        .status()
        .unwrap();
    assert!(done.success());
}

/// What the source's database says of all paths, read without our own reader.
fn expected_infos(database: &Path) -> Vec<PathInfo> {
    let connection = rusqlite::Connection::open(database).unwrap();
    let dir = StoreDir::default();
    let mut refs = connection
        .prepare(
            "select p.path from Refs join ValidPaths p on p.id = reference where referrer = ?1",
        )
        .unwrap();
    let mut statement = connection
        .prepare("select id, path, hash, narSize, registrationTime, deriver, ultimate, sigs, ca from ValidPaths order by path")
        .unwrap();
    let parse = |text: String| dir.parse(text.as_bytes()).unwrap();
    let rows = statement.query_map([], |row| {
        let text = |index| row.get::<_, Option<String>>(index);
        Ok(PathInfo {
            path: parse(row.get(1)?),
            nar_hash: NarHash::parse(&row.get::<_, String>(2)?).unwrap(),
            nar_size: row.get::<_, i64>(3)?.unsigned_abs(),
            references: refs
                .query_map([row.get::<_, i64>(0)?], |row| Ok(parse(row.get(0)?)))?
                .collect::<rusqlite::Result<_>>()?,
            deriver: text(5)?.map(parse),
            registration_time: row.get::<_, i64>(4)?.unsigned_abs(),
            ultimate: row.get::<_, Option<i64>>(6)? == Some(1),
            signatures: text(7)?
                .iter()
                .flat_map(|all| all.split(' '))
                .map(|text| understory_nix::Signature::parse(text).unwrap())
                .collect(),
            ca: text(8)?.map(|text| understory_nix::ContentAddress::parse(&text).unwrap()),
        })
    });
    rows.unwrap().collect::<rusqlite::Result<_>>().unwrap()
}

/// The NAR that the store gives back has the hash that it says.
fn check_nar(store: &Store, path: &StorePath) {
    let row = store.path(path).unwrap().unwrap();
    let mut out = Vec::new();
    nar::write_nar(store.castore(), &row.root, &mut out).unwrap();
    let hash = understory_nix::Hash::of(understory_nix::HashAlgorithm::Sha256, &out);
    assert_eq!(
        NarHash::try_from(hash).unwrap(),
        row.info.nar_hash,
        "{path}"
    );
}

#[rstest]
#[case(Version::Nix2_26)]
#[case(Version::Nix2_34)]
fn a_whole_local_store_verbatim(#[case] version: Version) {
    let Some(fixture) = fixture(version) else {
        return;
    };
    let (_dir, store) = store();
    let root = fixture.join("src");
    let source = format!("local?root={}", root.display());
    let report = imported(&store, &source, &Selection::All);
    let expected = expected_infos(&root.join("nix/var/nix/db/db.sqlite"));
    assert!(expected.len() > FILLERS + 5);
    assert!(expected.iter().any(|info| !info.signatures.is_empty()));
    assert!(
        expected
            .iter()
            .any(|info| info.ca.is_some() && info.references.contains(&info.path))
    );
    assert!(
        expected
            .iter()
            .any(|info| info.ultimate && info.deriver.is_some())
    );
    let found: Vec<_> = store
        .all_paths()
        .unwrap()
        .iter()
        .map(|path| store.path(path).unwrap().unwrap().info.clone())
        .collect();
    assert_eq!(found, expected);
    for info in &expected {
        check_nar(&store, &info.path);
    }
    let counters = report.counters;
    assert_eq!(
        (
            counters.paths_done,
            counters.paths_total,
            counters.paths_valid
        ),
        (expected.len() as u64, expected.len() as u64, 0)
    );
    let bytes = expected.iter().map(|info| info.nar_size).sum::<u64>();
    assert_eq!(
        (
            counters.nar_bytes_done,
            counters.nar_bytes_total,
            report.nar_bytes_imported
        ),
        (bytes, bytes, bytes)
    );
    let connection = rusqlite::Connection::open(root.join("nix/var/nix/db/db.sqlite")).unwrap();
    let realisations: i64 = connection
        .query_row("select count(*) from Realisations", [], |row| row.get(0))
        .unwrap();
    assert_eq!(report.realisations, realisations.unsigned_abs());
    assert_eq!(
        store.realisations_of(&path(fixture, "ca")).unwrap().len(),
        1
    );

    let again = imported(&store, &source, &Selection::All);
    assert_eq!(
        (
            again.counters.paths_done,
            again.counters.paths_valid,
            again.realisations
        ),
        (0, expected.len() as u64, 0)
    );
    assert_eq!(again.counters.writer.given_bytes, 0);
}

#[rstest]
#[case(Version::Nix2_26)]
#[case(Version::Nix2_34)]
fn a_closure_and_single_paths(#[case] version: Version) {
    let Some(fixture) = fixture(version) else {
        return;
    };
    let (_dir, store) = store();
    let source = fixture.join("src").display().to_string();
    let [a, b, c] = ["a", "b", "c"].map(|name| path(fixture, name));
    let alone = |path: &StorePath| Selection::Paths {
        paths: [path.clone()].into(),
        closure: false,
    };

    let report = run(&store, &source, &alone(&b)).unwrap();
    let error = report.error().unwrap();
    assert_eq!(
        error.to_string(),
        format!(
            "1 of 1 paths were not imported:\n/nix/store/{b}: reference '/nix/store/{a}' is not valid"
        )
    );
    assert_eq!(error.hint(), Some("import it with its closure"));
    assert!(store.all_paths().unwrap().is_empty());

    imported(&store, &source, &alone(&a));
    assert_eq!(store.all_paths().unwrap(), std::slice::from_ref(&a));
    let report = imported(&store, &source, &closure_of(&c));
    assert_eq!(
        (report.counters.paths_done, report.counters.paths_valid),
        (2, 1)
    );
    assert_eq!(
        store
            .all_paths()
            .unwrap()
            .into_iter()
            .collect::<BTreeSet<_>>(),
        [a, b, c].into()
    );

    let absent = StorePath::from_base_name("00000000000000000000000000000000-absent").unwrap();
    let error = run(&store, &source, &closure_of(&absent)).unwrap_err();
    assert_eq!(
        error.to_string(),
        format!(
            "path '/nix/store/{absent}' is not valid in the store of {source}/nix/var/nix/db/db.sqlite"
        )
    );
}

#[rstest]
#[case(Version::Nix2_26)]
#[case(Version::Nix2_34)]
fn binary_caches_of_every_compression(#[case] version: Version) {
    let Some(fixture) = fixture(version) else {
        return;
    };
    let c = path(fixture, "c");
    let expected = expected_infos(&fixture.join("src/nix/var/nix/db/db.sqlite"));
    for compression in ["none", "xz", "zstd", "bzip2", "gzip", "br"] {
        for selection in [Selection::All, closure_of(&c)] {
            let (_dir, store) = store();
            let source = format!("file://{}/cache-{compression}", fixture.display());
            let report = imported(&store, &source, &selection);
            assert_eq!(
                (report.counters.paths_done, report.counters.paths_total),
                (3, 3)
            );
            for path in store.all_paths().unwrap() {
                let mut info = store.path(&path).unwrap().unwrap().info.clone();
                let expected = expected.iter().find(|info| info.path == path).unwrap();
                assert_ne!(info.registration_time, 0);
                // A cache does not know these.
                info.registration_time = expected.registration_time;
                info.ultimate = expected.ultimate;
                assert_eq!(info, *expected);
                check_nar(&store, &path);
            }
            let again = imported(&store, &source, &selection);
            assert_eq!(again.counters.paths_done, 0);
        }
    }
    let (_dir, store) = store();
    let report = imported(
        &store,
        &fixture.join("cache-ca").display().to_string(),
        &Selection::All,
    );
    assert_eq!((report.counters.paths_done, report.realisations), (1, 1));
}

#[rstest]
#[case(Version::Nix2_26)]
#[case(Version::Nix2_34)]
fn an_export(#[case] version: Version) {
    let Some(fixture) = fixture(version) else {
        return;
    };
    let (_dir, store) = store();
    let file = fixture.join("export");
    let report = imported(&store, file.to_str().unwrap(), &Selection::All);
    assert_eq!(
        (report.counters.paths_done, report.counters.paths_total),
        (3, 3)
    );
    for info in expected_infos(&fixture.join("src/nix/var/nix/db/db.sqlite")) {
        let Some(row) = store.path(&info.path).unwrap() else {
            continue;
        };
        assert_eq!(
            (row.info.nar_hash, row.info.nar_size),
            (info.nar_hash, info.nar_size)
        );
        assert_eq!(
            (&row.info.references, &row.info.deriver),
            (&info.references, &info.deriver)
        );
        check_nar(&store, &info.path);
    }
    let again = imported(&store, file.to_str().unwrap(), &Selection::All);
    assert_eq!(
        (again.counters.paths_done, again.counters.paths_valid),
        (0, 3)
    );

    // Cut off in the second object: the first one stays.
    let bytes = std::fs::read(&file).unwrap();
    let (_dir, store) = self::store();
    let cut = Source::Export(Box::new(std::io::Cursor::new(
        bytes[..bytes.len() / 2].to_vec(),
    )));
    let error = Importer::new(store.clone())
        .run(
            cut,
            &Selection::All,
            &Options::default(),
            &(),
            &AtomicBool::new(false),
        )
        .unwrap_err();
    assert!(
        error
            .to_string()
            .starts_with("reading the export, object at byte "),
        "{}",
        error.chain()
    );
    assert_eq!(store.all_paths().unwrap().len(), 1);

    let source = fixture
        .join("cache-none/nix-cache-info")
        .display()
        .to_string();
    let error = run(&store, &source, &Selection::All).unwrap_err();
    assert!(
        error
            .chain()
            .contains("input doesn't look like something created by 'nix-store --export'"),
        "{}",
        error.chain()
    );
}

#[test]
fn damaged_paths_take_only_their_referrers_with_them() {
    let Some(fixture) = fixture(Version::Nix2_34) else {
        return;
    };
    let [a, b, c, lone] = ["a", "b", "c", "lone"].map(|name| path(fixture, name));
    let temp = tempfile::tempdir().unwrap();
    let root = temp.path().join("src");
    copy(&fixture.join("src"), &root);
    let file = root.join("nix/store").join(b.base_name()).join("ref");
    std::fs::set_permissions(&file, PermissionsExt::from_mode(0o644)).unwrap();
    let text = std::fs::read_to_string(&file).unwrap();
    std::fs::write(&file, text.replacen('/', "X", 1)).unwrap();
    std::fs::remove_file(root.join("nix/store").join(lone.base_name())).unwrap();

    let (_dir, store) = store();
    let report = run(&store, root.to_str().unwrap(), &Selection::All).unwrap();
    let error = report.error().unwrap().to_string();
    let real = root.join("nix/store").display().to_string();
    assert!(error.starts_with("3 of "), "{error}");
    assert!(
        error.contains(&format!(
            "\nhash mismatch importing path '/nix/store/{b}';\n  specified: sha256:"
        )),
        "{error}"
    );
    assert!(error.contains("\n  got:       sha256:"), "{error}");
    assert!(
        error.contains(&format!(
            "\n/nix/store/{c}: reference '/nix/store/{b}' was not imported"
        )),
        "{error}"
    );
    assert!(
        error.contains(&format!(
            "\n/nix/store/{lone}: reading {real}/{lone}: No such file"
        )),
        "{error}"
    );
    assert_eq!(report.counters.paths_done + 3, report.counters.paths_total);
    assert!(store.is_valid(&a).unwrap());
    for path in [&b, &c, &lone] {
        assert!(!store.is_valid(path).unwrap());
    }

    // Mended, the rest follows.
    std::fs::write(&file, text).unwrap();
    std::fs::write(root.join("nix/store").join(lone.base_name()), "alone\n").unwrap();
    let report = imported(&store, root.to_str().unwrap(), &Selection::All);
    assert_eq!(report.counters.paths_done, 3);
}

#[test]
fn damaged_caches() {
    let Some(fixture) = fixture(Version::Nix2_34) else {
        return;
    };
    let [a, b, c] = ["a", "b", "c"].map(|name| path(fixture, name));
    let attempt = |compression: &str, damage: &dyn Fn(&Path)| {
        let temp = tempfile::tempdir().unwrap();
        let dir = temp.path().join("cache");
        copy(&fixture.join(format!("cache-{compression}")), &dir);
        damage(&dir);
        let (_dir, store) = store();
        let report = run(&store, dir.to_str().unwrap(), &closure_of(&c)).unwrap();
        let error = report.error().unwrap().to_string();
        let text = error.replace(dir.to_str().unwrap(), "CACHE");
        (text, store.all_paths().unwrap())
    };
    let narinfo = |dir: &Path, path: &StorePath| dir.join(format!("{}.narinfo", path.hash_part()));
    let edit = |dir: &Path, path: &StorePath, key: &str, value: &str| {
        let file = narinfo(dir, path);
        let text = std::fs::read_to_string(&file).unwrap();
        let lines: Vec<_> = text
            .lines()
            .map(|line| match line.starts_with(key) {
                true => format!("{key}: {value}\n"),
                false => format!("{line}\n"),
            })
            .collect();
        std::fs::write(&file, lines.concat()).unwrap();
    };
    let nar_file = |dir: &Path, path: &StorePath| {
        let text = std::fs::read_to_string(narinfo(dir, path)).unwrap();
        dir.join(
            text.lines()
                .find_map(|line| line.strip_prefix("URL: "))
                .unwrap(),
        )
    };
    let refused = |path: &StorePath, reference: &StorePath| {
        format!("/nix/store/{path}: reference '/nix/store/{reference}' was not imported")
    };

    let (error, valid) = attempt("xz", &|dir| {
        let file = nar_file(dir, &b);
        let bytes = std::fs::read(&file).unwrap();
        std::fs::write(&file, &bytes[..bytes.len() - 20]).unwrap();
    });
    assert!(
        error.starts_with(&format!(
            "2 of 3 paths were not imported:\n/nix/store/{b}: reading CACHE/nar/"
        )),
        "{error}"
    );
    assert!(error.ends_with(&refused(&c, &b)), "{error}");
    assert_eq!(valid, std::slice::from_ref(&a));

    let wrong = "sha256:0000000000000000000000000000000000000000000000000000";
    let (error, valid) = attempt("zstd", &|dir| edit(dir, &b, "NarHash", wrong));
    assert!(error.starts_with(&format!("2 of 3 paths were not imported:\nhash mismatch importing path '/nix/store/{b}';\n  specified: {wrong}\n  got:       sha256:")), "{error}");
    assert_eq!(valid, std::slice::from_ref(&a));

    let (error, _) = attempt("none", &|dir| edit(dir, &b, "NarSize", "1000"));
    assert!(
        error.contains("expected a NAR of 1000 bytes, found more"),
        "{error}"
    );
    let (error, _) = attempt("none", &|dir| edit(dir, &b, "NarSize", "99999999"));
    assert!(
        error.contains(&format!(
            "size mismatch importing path '/nix/store/{b}';\n  specified: 99999999\n"
        )),
        "{error}"
    );
    let (error, _) = attempt("none", &|dir| edit(dir, &b, "Compression", "rot13"));
    assert!(
        error.contains("unknown compression 'rot13': expected none, xz, zstd, bzip2, gzip, br, lzip, lzma or lz4"),
        "{error}"
    );
    let (error, _) = attempt("none", &|dir| edit(dir, &b, "URL", "../outside"));
    assert!(error.contains(&format!("/nix/store/{b}: the URL '../outside' of its NAR does not lead into the binary cache CACHE")), "{error}");
    let (error, _) = attempt("none", &|dir| {
        let file = nar_file(dir, &b);
        let mut bytes = std::fs::read(&file).unwrap();
        bytes.push(0);
        std::fs::write(&file, bytes).unwrap();
    });
    assert!(error.contains(" goes on after the NAR's "), "{error}");
    let (error, valid) = attempt("none", &|dir| {
        std::fs::remove_file(narinfo(dir, &a)).unwrap();
    });
    assert!(error.starts_with(&format!("3 of 3 paths were not imported:\npath '/nix/store/{a}' is not valid here and not in the binary cache CACHE\n")), "{error}");
    assert!(
        error.contains(&refused(&b, &a)) && valid.is_empty(),
        "{error}"
    );
    let (error, _) = attempt("none", &|dir| {
        std::fs::remove_file(nar_file(dir, &b)).unwrap();
    });
    assert!(
        error.contains(&format!("/nix/store/{b}: opening CACHE/nar/")),
        "{error}"
    );
    let (error, _) = attempt("none", &|dir| {
        std::fs::write(narinfo(dir, &b), "StorePath: x\n").unwrap();
    });
    assert!(
        error.contains(&format!("CACHE/{}.narinfo", b.hash_part())),
        "{error}"
    );
}

#[test]
fn only_signed_paths() {
    let Some(fixture) = fixture(Version::Nix2_34) else {
        return;
    };
    let [lone, c] = ["lone", "c"].map(|name| path(fixture, name));
    let key = std::fs::read_to_string(fixture.join("public-key")).unwrap();
    let options = Options {
        jobs: 1,
        trusted_keys: Some(PublicKeys::parse(&key).unwrap()),
    };
    let (_dir, store) = store();
    let try_import = |path| {
        let source = Source::open(fixture.join("src").to_str().unwrap(), &store).unwrap();
        Importer::new(store.clone())
            .run(
                source,
                &closure_of(path),
                &options,
                &(),
                &AtomicBool::new(false),
            )
            .unwrap()
    };
    assert!(try_import(&c).error().is_none());
    let error = try_import(&lone).error().unwrap().to_string();
    assert_eq!(
        error,
        format!(
            "1 of 1 paths were not imported:\ncannot add path '/nix/store/{lone}' because it lacks a signature by a trusted key"
        )
    );
}

/// Cancels when so many paths are done.
struct CancelAt<'a>(u64, &'a AtomicBool);

impl Progress for CancelAt<'_> {
    fn update(&self, counters: &Counters) {
        if counters.nar_bytes_done >= self.0 {
            self.1.store(true, Ordering::Relaxed);
        }
    }
}

#[test]
fn a_cancelled_import_goes_on_where_it_ended() {
    let Some(fixture) = fixture(Version::Nix2_34) else {
        return;
    };
    let (dir, store) = store();
    let text = fixture.join("src").display().to_string();
    let total = expected_infos(&fixture.join("src/nix/var/nix/db/db.sqlite")).len() as u64;
    let mut done = 0;
    for round in 0.. {
        let cancel = AtomicBool::new(false);
        let source = Source::open(&text, &store).unwrap();
        let started = std::time::Instant::now();
        // The first round ends at once, later ones get further.
        let progress = CancelAt(round * 20_000, &cancel);
        let report = Importer::new(store.clone())
            .run(
                source,
                &Selection::All,
                &Options {
                    jobs: 1,
                    ..Options::default()
                },
                &progress,
                &cancel,
            )
            .unwrap();
        assert!(report.error().is_none());
        assert!(started.elapsed().as_secs() < 10);
        done += report.counters.paths_done;
        if !report.cancelled {
            assert_eq!(
                report.counters.paths_valid + report.counters.paths_done,
                total
            );
            break;
        }
        // What was acknowledged is there for another process too.
        let other = Store::open(&dir.path().join("s"), &StoreOptions::default()).unwrap();
        assert_eq!(other.all_paths().unwrap().len() as u64, done);
    }
    assert_eq!(done, total);
}

#[test]
fn another_store_directory() {
    let Some(fixture) = fixture(Version::Nix2_34) else {
        return;
    };
    let temp = tempfile::tempdir().unwrap();
    Store::create(&temp.path().join("s"), &StoreDir::new("/t/store").unwrap()).unwrap();
    let store = Store::open(&temp.path().join("s"), &StoreOptions::default()).unwrap();
    let root = fixture.join("src").display().to_string();
    let error = run(&store, &root, &Selection::All).unwrap_err();
    assert_eq!(
        error.to_string(),
        format!(
            "the store of {root}/nix/var/nix/db/db.sqlite has store directory '/nix/store', expected '/t/store'"
        )
    );
    assert_eq!(
        error.hint(),
        Some(
            "paths are valid in their own store directory only: import into a store that was made for /nix/store"
        )
    );
    let cache = fixture.join("cache-none").display().to_string();
    let error = run(&store, &cache, &Selection::All).unwrap_err();
    assert_eq!(
        error.to_string(),
        format!("binary cache {cache} is for stores with prefix '/nix/store', expected '/t/store'")
    );
}

const READ_ONLY_DIR: &str = "UNDERSTORY_TEST_READ_ONLY_DIR";

/// Runs in a mount namespace where the directory is read-only.
#[test]
fn inside_a_read_only_mount() {
    let Some(dir) = std::env::var_os(READ_ONLY_DIR) else {
        return;
    };
    let dir = PathBuf::from(dir);
    assert!(std::fs::write(dir.join("x"), "").is_err());
    let (_dir, store) = store();
    imported(&store, dir.to_str().unwrap(), &Selection::All);
    let mut times: Vec<_> = store
        .all_paths()
        .unwrap()
        .iter()
        .map(|path| store.path(path).unwrap().unwrap().info.registration_time)
        .collect();
    times.dedup();
    let expected = std::fs::read_to_string(dir.join("expected-time")).unwrap();
    assert_eq!(times, [expected.parse::<u64>().unwrap()]);
}

#[test]
fn a_wal_that_is_not_merged_and_a_directory_that_cannot_be_written() {
    let Some(fixture) = fixture(Version::Nix2_34) else {
        return;
    };
    let temp = tempfile::tempdir().unwrap();
    let (live, still) = (temp.path().join("live"), temp.path().join("still"));
    copy(&fixture.join("src"), &live);
    let database = |root: &Path| root.join("nix/var/nix/db/db.sqlite");
    let connection = rusqlite::Connection::open(database(&live)).unwrap();
    connection
        .pragma_update(None, "wal_autocheckpoint", 0)
        .unwrap();
    let set = |time: i64| {
        connection
            .execute("update ValidPaths set registrationTime = ?1", [time])
            .unwrap();
        std::fs::write(live.join("expected-time"), time.to_string()).unwrap();
    };
    set(12345);
    assert!(
        std::fs::metadata(live.join("nix/var/nix/db/db.sqlite-wal"))
            .unwrap()
            .len()
            > 0
    );

    // In place, while somebody has it open.
    let (_dir, store) = store();
    imported(&store, live.to_str().unwrap(), &Selection::All);
    for path in store.all_paths().unwrap() {
        assert_eq!(
            store.path(&path).unwrap().unwrap().info.registration_time,
            12345
        );
    }
    assert!(
        std::fs::metadata(live.join("nix/var/nix/db/db.sqlite-wal"))
            .unwrap()
            .len()
            > 0,
        "not merged by us"
    );

    let read_only = |dir: &Path| {
        let done = Command::new("unshare")
            .args(["--mount", "sh", "-euc", r#"mount --bind "$1" "$1"; mount -o remount,ro,bind "$1"; exec "$0" --exact inside_a_read_only_mount --nocapture"#])
            .arg(std::env::current_exe().unwrap())
            .arg(dir)
            .env(READ_ONLY_DIR, dir)
            .output()
            .unwrap();
        assert!(
            done.status.success(),
            "{}{}",
            String::from_utf8_lossy(&done.stdout),
            String::from_utf8_lossy(&done.stderr)
        );
    };
    // With a WAL left by a process that died, without its shared memory, and after a merge.
    copy(&live, &still);
    std::fs::remove_file(still.join("nix/var/nix/db/db.sqlite-shm")).unwrap();
    read_only(&still);
    read_only(&live);
    set(54321);
    connection.close().unwrap();
    let _ = std::fs::remove_file(live.join("nix/var/nix/db/db.sqlite-wal"));
    let _ = std::fs::remove_file(live.join("nix/var/nix/db/db.sqlite-shm"));
    read_only(&live);
}

#[test]
fn a_symlink_as_root_of_a_path_and_odd_directories() {
    let Some(fixture) = fixture(Version::Nix2_34) else {
        return;
    };
    let temp = tempfile::tempdir().unwrap();
    let link = temp.path().join("a b%c");
    symlink(fixture.join("src"), &link).unwrap();
    let (_dir, store) = store();
    let encoded = link
        .display()
        .to_string()
        .replace('%', "%25")
        .replace(' ', "%20");
    imported(
        &store,
        &format!("local?root={encoded}"),
        &closure_of(&path(fixture, "a")),
    );
    imported(
        &store,
        link.to_str().unwrap(),
        &closure_of(&path(fixture, "c")),
    );
}
