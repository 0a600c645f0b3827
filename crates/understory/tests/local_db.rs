//! Nix's database, written and read by us and by real Nix in turn and at the same time.

#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "helpers of tests; times are for who looks at them"
)]

use std::collections::BTreeSet;
use std::fs;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};
use understory::local::db::DrvOutputs;
use understory::local::{Database, LocalPaths, OpenMode};
use understory::overlay::lower;
use understory_nix::worker::{DrvOutput, WireRealisation};
use understory_nix::{Hash, HashAlgorithm, NarHash, PathInfo, SecretKey, StoreDir, StorePath, nar};
use understory_testkit::nix_root::{Bind, NixRoot, Version};

const PROLOGUE: &str = r#"
export NIX_CONFIG=$'experimental-features = nix-command ca-derivations\nbuild-users-group =\nsandbox = false\nsubstituters ='
cd /tmp
S='local?root=/w/root'
"#;

/// A store's directories, and the root that sees them below `/w`.
struct Place {
    dir: tempfile::TempDir,
    root: NixRoot,
    paths: LocalPaths,
}

impl Place {
    /// One for each Nix that is there.
    fn all() -> Vec<Self> {
        Version::SUPPORTED
            .into_iter()
            .filter_map(NixRoot::get)
            .map(|root| {
                let dir = tempfile::tempdir().unwrap();
                let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
                fs::set_permissions(dir.path(), mode).unwrap();
                let paths = LocalPaths::at_root(&dir.path().join("root"), StoreDir::default());
                Self { dir, root, paths }
            })
            .collect()
    }
    fn database(&self, mode: OpenMode) -> Database {
        Database::open(&self.paths.state, &self.paths.store_dir, mode).unwrap()
    }
    fn binds(&self) -> [Bind; 1] {
        [Bind::new(self.dir.path(), "/w")]
    }
    fn nix(&self, script: &str) -> String {
        self.root
            .run_ok(&self.binds(), 0, &format!("{PROLOGUE}\n{script}"))
    }
    /// Writes an object with a file and returns what is to be registered.
    fn object(&self, name: &str, contents: &str, references: &[&StorePath]) -> PathInfo {
        let path = path(name);
        let file = self.paths.object(&path);
        fs::write(&file, contents).unwrap();
        fs::set_permissions(&file, std::os::unix::fs::PermissionsExt::from_mode(0o444)).unwrap();
        info(&path, contents, references)
    }
}

fn path(name: &str) -> StorePath {
    let digest = Hash::of(HashAlgorithm::Sha1, name.as_bytes());
    let hash = understory_nix::nix32::encode(digest.digest());
    StorePath::from_base_name(&format!("{hash}-{name}")).unwrap()
}

fn info(path: &StorePath, contents: &str, references: &[&StorePath]) -> PathInfo {
    let mut archive = Vec::new();
    let mut writer = nar::Writer::new(&mut archive);
    writer.file(None, false, contents.len() as u64).unwrap();
    writer.contents(contents.as_bytes()).unwrap();
    writer.finish().unwrap();
    PathInfo {
        path: path.clone(),
        nar_hash: NarHash::try_from(Hash::of(HashAlgorithm::Sha256, &archive)).unwrap(),
        nar_size: archive.len() as u64,
        references: references.iter().map(|&path| path.clone()).collect(),
        deriver: None,
        registration_time: 1_700_000_000,
        ultimate: false,
        signatures: BTreeSet::new(),
        ca: None,
    }
}

fn no_outputs(_: &StorePath) -> understory::Result<DrvOutputs> {
    Ok(Vec::new())
}

fn full(path: &StorePath) -> String {
    StoreDir::default().print(path)
}

#[test]
fn real_nix_accepts_a_database_that_we_filled() {
    for place in Place::all() {
        place.paths.create().unwrap();
        let database = place.database(OpenMode::ReadWrite);
        let a = place.object("a", "a", &[&path("a")]);
        let mut b = place.object("b", "b", &[&a.path, &path("b")]);
        b.deriver = Some(path("b.drv"));
        b.ultimate = true;
        b.sign(&StoreDir::default(), &SecretKey::generate("k-1").unwrap());
        let c = place.object("c", "c", &[&b.path]);
        database
            .register(&[c.clone(), b.clone(), a.clone()], &no_outputs)
            .unwrap();
        database.set_note("lower", Some("castore 1")).unwrap();
        let id = format!("sha256:{}!out", "5".repeat(64));
        database
            .register_realisation(&WireRealisation {
                id: DrvOutput::Hash(id.clone()),
                out_path: c.path.clone(),
                signatures: BTreeSet::new(),
            })
            .unwrap();
        let signature = b.signatures.iter().next().unwrap();
        let text = place.nix(&format!(
            r#"
nix-store --store "$S" --verify --check-contents 2>&1 | tee /dev/stderr | (! grep -i 'error\|disappeared\|modified')
[[ $(nix-store --store "$S" -qR {c} | sort) == $(printf '%s\n' {a} {b} {c} | sort) ]]
[[ $(nix-store --store "$S" -q --referrers {a} | sort) == $(printf '%s\n' {a} {b} | sort) ]]
[[ $(nix-store --store "$S" -q --deriver {b}) == {drv} ]]
nix path-info --store "$S" --json {b} | jq -e '.[] | select(.narSize == {size} and .ultimate and (.signatures | tostring | contains("{signature}")))' >&2
[[ $(nix-store --store "$S" -q --hash {b}) == {hash} ]]
# Adds to it, and deletes what we registered.
echo new > new; nix-store --store "$S" --add new
nix-store --store "$S" --delete {c} >&2
"#,
            a = full(&a.path),
            b = full(&b.path),
            c = full(&c.path),
            drv = full(&path("b.drv")),
            size = b.nar_size,
            hash = b.nar_hash,
        ));
        let new = StoreDir::default().parse(text.trim().as_bytes()).unwrap();
        assert_eq!(
            database
                .valid(&[a.path.clone(), b.path.clone(), c.path, new])
                .unwrap(),
            [true, true, false, true]
        );
        assert_eq!(database.info(&b.path).unwrap(), Some(b));
        assert_eq!(database.realisation(&DrvOutput::Hash(id)).unwrap(), None);
        assert_eq!(
            database.note("lower").unwrap().as_deref(),
            Some("castore 1")
        );
    }
}

#[test]
fn real_nix_fills_a_database_that_we_read() {
    for place in Place::all() {
        fs::create_dir(place.dir.path().join("root")).unwrap();
        let text = place.nix(
            r#"
cat > all.nix <<'NIX'
let
  sh = name: script: extra: derivation ({
    inherit name; system = builtins.currentSystem; builder = "/bin/sh"; args = [ "-c" script ]; PATH = "/bin:/usr/bin";
  } // extra);
in rec {
  lib = sh "lib" "echo $out > $out" { };
  app = sh "app" "echo ${lib} > $out; echo $out > $dev" { outputs = [ "out" "dev" ]; };
  floating = sh "floating" "echo ${lib} > $out" {
    __contentAddressed = true; outputHashMode = "recursive"; outputHashAlgo = "sha256";
  };
}
NIX
nix-build --store "$S" --no-out-link all.nix >&2
nix key generate-secret --key-name t-1 > key
nix store sign --store "$S" --key-file key --all >&2
nix path-info --store "$S" --json --all > /w/infos.json
sqlite3 /w/root/nix/var/nix/db/db.sqlite \
  "select drvPath || '!' || outputName from Realisations join ValidPaths as V on V.id = outputPath where V.path like '%-floating' limit 1"
"#,
        );
        for mode in [OpenMode::ReadOnly, OpenMode::ReadWrite] {
            let database = place.database(mode);
            let json = fs::read_to_string(place.dir.path().join("infos.json")).unwrap();
            let json: serde_json::Value = serde_json::from_str(&json).unwrap();
            let dir = StoreDir::default();
            let paths = database.all_paths().unwrap();
            assert_eq!(paths.len(), json.as_object().unwrap().len());
            for (path, info) in paths.iter().zip(database.infos(&paths).unwrap()) {
                let (info, said) = (info.unwrap(), &json[full(path)]);
                assert_eq!(said["narHash"], info.nar_hash.to_hash().to_sri());
                assert_eq!(said["narSize"], info.nar_size);
                assert_eq!(said["registrationTime"], info.registration_time);
                assert_eq!(said["ultimate"], info.ultimate);
                let deriver = info.deriver.as_ref().map(full);
                assert_eq!(said["deriver"].as_str(), deriver.as_deref());
                let texts = |name: &str| -> BTreeSet<String> {
                    let list = said[name].as_array().unwrap().iter();
                    list.map(|item| item.as_str().unwrap().to_owned()).collect()
                };
                assert_eq!(
                    texts("references"),
                    info.references.iter().map(full).collect()
                );
                let signatures: BTreeSet<_> =
                    info.signatures.iter().map(ToString::to_string).collect();
                assert_eq!(texts("signatures"), signatures);
                assert_eq!(info.ca.is_some(), !said["ca"].is_null(), "{path}");
                assert!(!info.signatures.is_empty());
            }
            let find = |name: &str| paths.iter().find(|path| path.name() == name).unwrap();
            let outputs = database
                .derivation_outputs(find("app.drv"))
                .unwrap()
                .unwrap();
            assert_eq!(outputs["dev"], *find("app-dev"));
            assert_eq!(
                database.valid_derivers(find("app")).unwrap(),
                [find("app.drv").clone()].into()
            );
            assert_eq!(
                database.derivation_outputs(find("floating.drv")).unwrap(),
                Some([].into())
            );
            let id = DrvOutput::Hash(text.trim().to_owned());
            let realisation = database.realisation(&id).unwrap().unwrap();
            assert_eq!(realisation.out_path, *find("floating"));
            assert!(
                database
                    .referrers(find("lib"))
                    .unwrap()
                    .contains(find("lib"))
            );
            let graph = database.graph().unwrap();
            assert_eq!(graph.nodes.len(), paths.len());
            assert_eq!(graph.outputs.len(), 3);
            drop(dir);
        }
        // What we change, Nix sees.
        let database = place.database(OpenMode::ReadWrite);
        let floating = database
            .all_paths()
            .unwrap()
            .into_iter()
            .find(|path| path.name() == "floating")
            .unwrap();
        database.invalidate(&[floating]).unwrap();
        place
            .nix(r#"nix-store --store "$S" --verify 2>&1 | tee /dev/stderr | (! grep -i 'error')"#);
    }
}

#[test]
fn real_nix_and_we_write_at_the_same_time() {
    for place in Place::all() {
        place.paths.create().unwrap();
        let base = place.object("base", "base", &[]);
        place
            .database(OpenMode::ReadWrite)
            .register(std::slice::from_ref(&base), &no_outputs)
            .unwrap();
        let infos: Vec<PathInfo> = (0..200)
            .map(|number| place.object(&format!("o{number}"), "text", &[&base.path]))
            .collect();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                place.nix(
                    r#"
for i in {1..25}; do echo "$i" > "n$i"; nix-store --store "$S" --add "n$i" & nix-store --store "$S" --add "n$i"; wait; done >&2
"#,
                );
            });
            for part in infos.chunks(50) {
                let database = place.database(OpenMode::ReadWrite);
                scope.spawn(move || {
                    for info in part {
                        database
                            .register(std::slice::from_ref(info), &no_outputs)
                            .unwrap();
                        assert!(database.is_valid(&info.path).unwrap());
                    }
                    database.invalidate(&[part[0].path.clone()]).unwrap();
                });
            }
        });
        for part in infos.chunks(50) {
            fs::remove_file(place.paths.object(&part[0].path)).unwrap();
        }
        place.nix(
            r#"
nix-store --store "$S" --verify --check-contents 2>&1 | tee /dev/stderr | (! grep -i 'error\|disappeared\|modified')
[[ $(sqlite3 /w/root/nix/var/nix/db/db.sqlite 'pragma integrity_check; pragma foreign_key_check') == ok ]]
"#,
        );
        let database = place.database(OpenMode::ReadWrite);
        assert_eq!(database.all_paths().unwrap().len(), 1 + 196 + 25);
        assert_eq!(database.referrers(&base.path).unwrap().len(), 196);
    }
}

/// A daemon of real Nix; ended when dropped.
struct Daemon(Child);

impl Daemon {
    fn start(place: &Place) -> Self {
        let script = format!(
            "{PROLOGUE}\nexport NIX_DAEMON_SOCKET_PATH=/w/run/socket NIX_REMOTE=\"$S\"; rm -f /w/run/socket; exec nix-daemon --daemon"
        );
        let mut command = place.root.command(&place.binds(), 0, &[], "bash");
        let child = command
            .args(["-euo", "pipefail", "-c", &script])
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        Self(child)
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // Whatever it started dies with its pid namespace.
        let _ended = self.0.kill();
        let _status = self.0.wait();
    }
}

/// Waits until somebody listens.
fn connect(url: &str) -> std::sync::Arc<dyn lower::Lower> {
    let start = Instant::now();
    loop {
        match lower::open(url, &StoreDir::default()) {
            Ok(lower) => return lower,
            Err(error) => assert!(
                start.elapsed() < Duration::from_secs(30),
                "{}",
                error.chain()
            ),
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

#[test]
fn real_nix_daemon_is_a_lower_store() {
    for place in Place::all() {
        place.paths.create().unwrap();
        fs::create_dir(place.dir.path().join("run")).unwrap();
        let database = place.database(OpenMode::ReadWrite);
        let infos: Vec<PathInfo> = (0..2000)
            .map(|number| info(&path(&format!("o{number}")), "text", &[]))
            .collect();
        database.register(&infos[..1999], &no_outputs).unwrap();
        let daemon = Daemon::start(&place);
        let url = format!(
            "unix://{}/run/socket?real={}",
            place.dir.path().display(),
            place.paths.real.display()
        );
        let lower = connect(&url);
        let paths: Vec<StorePath> = infos.iter().map(|info| info.path.clone()).collect();
        check_daemon(&*lower, &infos, 1999);
        // Added a moment ago, asked for before: other processes of the daemon do not know better either.
        database.register(&infos[1999..], &no_outputs).unwrap();
        assert_eq!(lower.valid(&paths).unwrap(), [true; 2000]);
        drop(daemon);
        assert!(lower.valid(&paths).is_err());
        let _daemon = Daemon::start(&place);
        drop(connect(&url));
        check_daemon(&*lower, &infos, 2000);
    }
}

fn check_daemon(lower: &dyn lower::Lower, infos: &[PathInfo], count: usize) {
    let paths: Vec<StorePath> = infos.iter().map(|info| info.path.clone()).collect();
    let start = Instant::now();
    let found = lower.infos(&paths).unwrap();
    println!("{} path infos in {:?}", found.len(), start.elapsed());
    for (index, (found, expected)) in found.iter().zip(infos).enumerate() {
        assert_eq!(found.as_deref(), (index < count).then_some(expected));
    }
    assert_eq!(
        lower
            .valid(&paths)
            .unwrap()
            .iter()
            .filter(|&&valid| valid)
            .count(),
        count
    );
    assert_eq!(lower.all_paths().unwrap().len(), count);
    assert_eq!(
        lower
            .path_from_hash_part(paths[7].hash_part())
            .unwrap()
            .as_ref(),
        Some(&paths[7])
    );
    let id = DrvOutput::Hash(format!("sha256:{}!out", "5".repeat(64)));
    assert_eq!(lower.realisation(&id).unwrap(), None);
    assert!(lower.valid_derivers(&paths[0]).unwrap().is_empty());
}

#[test]
fn ten_thousand_infos_are_read_in_one_go() {
    let dir = tempfile::tempdir().unwrap();
    let database = Database::open(dir.path(), &StoreDir::default(), OpenMode::ReadWrite).unwrap();
    let paths: Vec<StorePath> = (0..10_000)
        .map(|number| path(&format!("o{number}")))
        .collect();
    let infos: Vec<PathInfo> = paths
        .iter()
        .enumerate()
        .map(|(index, path)| {
            let references: Vec<&StorePath> = (1..=10)
                .filter_map(|back| index.checked_sub(back * 7).map(|at| &paths[at]))
                .collect();
            info(path, "text", &references)
        })
        .collect();
    let timed = |what: &str, work: &mut dyn FnMut()| {
        let start = Instant::now();
        work();
        println!("{what}: {:?}", start.elapsed());
    };
    timed("register", &mut || {
        database.register(&infos, &no_outputs).unwrap();
    });
    timed("valid", &mut || {
        assert!(database.valid(&paths).unwrap().iter().all(|&valid| valid));
    });
    timed("infos", &mut || {
        let found = database.infos(&paths).unwrap();
        assert!(
            found
                .into_iter()
                .map(Option::unwrap)
                .eq(infos.iter().cloned())
        );
    });
    timed("graph", &mut || {
        assert_eq!(database.graph().unwrap().nodes.len(), 10_000);
    });
    timed("invalidate", &mut || database.invalidate(&paths).unwrap());
    assert!(Path::new(database.path()).exists());
}

/// Names the state directory to a process that is going to be killed.
const KILLED_STATE: &str = "UNDERSTORY_TEST_KILLED_STATE";

#[test]
fn registers_until_it_is_killed() {
    let Some(state) = std::env::var_os(KILLED_STATE) else {
        return;
    };
    let database =
        Database::open(Path::new(&state), &StoreDir::default(), OpenMode::ReadWrite).unwrap();
    let first = usize::try_from(database.last_id().unwrap()).unwrap();
    for number in first.. {
        let below = path(&format!("o{}", number.saturating_sub(1)));
        let new = path(&format!("o{number}"));
        database
            .register(&[info(&new, "text", &[&new, &below])], &no_outputs)
            .unwrap();
        println!("done {number}");
    }
}

#[test]
fn what_was_acknowledged_survives_kill_9() {
    let dir = tempfile::tempdir().unwrap();
    let mut done = 0;
    for round in 0..12 {
        let mut child = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "registers_until_it_is_killed", "--nocapture"])
            .env(KILLED_STATE, dir.path())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let numbers = lines.map_while(Result::ok).filter_map(|line| {
            let (_, number) = line.split_once("done ")?;
            number.parse::<usize>().ok()
        });
        for (count, number) in numbers.enumerate() {
            done = number;
            // The rest was in the pipe when it ended.
            if count == 7 * round + 1 {
                child.kill().unwrap();
            }
        }
        child.wait().unwrap();
        let database =
            Database::open(dir.path(), &StoreDir::default(), OpenMode::ReadWrite).unwrap();
        let paths: Vec<StorePath> = (0..=done)
            .map(|number| path(&format!("o{number}")))
            .collect();
        assert!(database.valid(&paths).unwrap().iter().all(|&valid| valid));
        // Each with its references, also one whose acknowledgement was not read.
        let all = database.all_paths().unwrap();
        for info in database.infos(&all).unwrap() {
            let info = info.unwrap();
            assert!(info.references.contains(&info.path), "{}", info.path);
        }
        assert_eq!(all.len() as u64, database.last_id().unwrap());
    }
    assert!(done > 300, "{done}");
}
