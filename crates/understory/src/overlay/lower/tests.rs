//! The same questions to each kind of lower store.

use super::*;
use crate::StoreOptions;
use crate::add::ingest_nar;
use crate::daemon::{Listener, Server, ServerOptions, Shutdown};
use crate::local::{Database, LocalPaths, OpenMode};
use crate::store::Realisation;
use std::path::PathBuf;
use std::thread::JoinHandle;
use tempfile::TempDir;
use understory_nix::{Hash, HashAlgorithm, NarHash, nar};

fn path(name: &str) -> StorePath {
    let digest = Hash::of(HashAlgorithm::Sha1, name.as_bytes());
    let hash = understory_nix::nix32::encode(digest.digest());
    StorePath::from_base_name(&format!("{hash}-{name}")).unwrap()
}

fn archive() -> Vec<u8> {
    let mut out = Vec::new();
    let mut writer = nar::Writer::new(&mut out);
    writer.file(None, false, 4).unwrap();
    writer.contents(b"text").unwrap();
    writer.finish().unwrap();
    out
}

fn info(path: &StorePath, references: &[&StorePath]) -> PathInfo {
    let archive = archive();
    PathInfo {
        path: path.clone(),
        nar_hash: NarHash::try_from(Hash::of(HashAlgorithm::Sha256, &archive)).unwrap(),
        nar_size: archive.len() as u64,
        references: references.iter().map(|&path| path.clone()).collect(),
        deriver: Some(self::path("deriver.drv")),
        registration_time: 1_700_000_000,
        ultimate: true,
        signatures: BTreeSet::new(),
        ca: None,
    }
}

fn realisation(out_path: &StorePath) -> WireRealisation {
    WireRealisation {
        id: DrvOutput::Hash(format!("sha256:{}!out", "4".repeat(64))),
        out_path: out_path.clone(),
        signatures: BTreeSet::new(),
    }
}

/// A store that can be added to, and seen as a lower one.
trait Bench {
    fn add(&self, info: &PathInfo);
    fn add_realisation(&self, realisation: &WireRealisation);
}

impl Bench for Store {
    fn add(&self, info: &PathInfo) {
        let root = ingest_nar(self, info, &mut &archive()[..]).unwrap();
        self.publish(vec![(info.clone(), root)]).unwrap();
    }
    fn add_realisation(&self, realisation: &WireRealisation) {
        Store::add_realisation(
            self,
            &Realisation {
                id: realisation.id.id(),
                out_path: realisation.out_path.clone(),
                signatures: realisation.signatures.clone(),
            },
        )
        .unwrap();
    }
}

impl Bench for Database {
    fn add(&self, info: &PathInfo) {
        self.register(std::slice::from_ref(info), &|_| Ok(Vec::new()))
            .unwrap();
    }
    fn add_realisation(&self, realisation: &WireRealisation) {
        self.register_realisation(realisation).unwrap();
    }
}

/// What every lower store must answer.
fn conforms(lower: &dyn Lower, bench: &dyn Bench, says_who_it_is: bool) {
    let [a, b, c] = ["a", "b", "c"].map(path);
    assert_eq!(lower.all_paths().unwrap(), []);
    assert_eq!(lower.infos(&[]).unwrap(), []);
    assert_eq!(lower.valid(&[]).unwrap(), [false; 0]);
    assert!(!lower.with_info(&a, &mut |_| panic!("not valid")).unwrap());
    let empty = lower.identity().unwrap();
    bench.add(&info(&a, &[&a]));
    bench.add(&info(&b, &[&a]));
    let first = lower.identity().unwrap();
    // What was added a moment ago is seen.
    let paths = [b.clone(), c.clone(), a.clone(), b.clone()];
    assert_eq!(lower.valid(&paths).unwrap(), [true, false, true, true]);
    let expected = [
        Some(info(&b, &[&a])),
        None,
        Some(info(&a, &[&a])),
        Some(info(&b, &[&a])),
    ];
    let found = lower.infos(&paths).unwrap();
    let found: Vec<_> = found.iter().map(|info| info.as_deref().cloned()).collect();
    assert_eq!(found, expected);
    let mut seen = None;
    assert!(
        lower
            .with_info(&b, &mut |i| seen = Some(i.clone()))
            .unwrap()
    );
    assert_eq!(seen, expected[0]);
    let sorted: BTreeSet<StorePath> = [a.clone(), b.clone()].into();
    assert_eq!(
        lower.all_paths().unwrap(),
        sorted.iter().cloned().collect::<Vec<_>>()
    );
    assert_eq!(lower.referrers(&a).unwrap(), sorted);
    assert_eq!(lower.referrers(&c).unwrap(), BTreeSet::new());
    assert_eq!(lower.valid_derivers(&a).unwrap(), BTreeSet::new());
    assert_eq!(
        lower.path_from_hash_part(b.hash_part()).unwrap(),
        Some(b.clone())
    );
    assert_eq!(lower.path_from_hash_part(c.hash_part()).unwrap(), None);
    let realised = realisation(&b);
    assert_eq!(lower.realisation(&realised.id).unwrap(), None);
    bench.add_realisation(&realised);
    assert_eq!(lower.realisation(&realised.id).unwrap(), Some(realised));
    let with_path = DrvOutput::Path {
        drv: path("x.drv"),
        output: "out".to_owned(),
    };
    assert_eq!(lower.realisation(&with_path).unwrap(), None);
    // More than are under way at a time.
    let many: Vec<StorePath> = (0..300).map(|number| path(&format!("n{number}"))).collect();
    for path in many.iter().step_by(2) {
        bench.add(&info(path, &[&a]));
    }
    let found = lower.infos(&many).unwrap();
    for (index, (path, found)) in many.iter().zip(found).enumerate() {
        let expected = (index % 2 == 0).then(|| info(path, &[&a]));
        assert_eq!(found.as_deref(), expected.as_ref());
    }
    let last = lower.identity().unwrap();
    if says_who_it_is {
        assert_eq!(last.id, first.id);
        assert!(last.generation > first.generation && first.generation > empty.generation);
    } else {
        assert_eq!((last.id, last.generation), (None, None));
    }
}

fn new_store(dir: &TempDir) -> Store {
    let place = dir.path().join("store");
    Store::create(&place, &StoreDir::default()).unwrap();
    Store::open(&place, &StoreOptions::default()).unwrap()
}

#[test]
fn castore() {
    let dir = tempfile::tempdir().unwrap();
    let store = new_store(&dir);
    let lower = CastoreLower::new(store.clone(), dir.path());
    conforms(&lower, &store, true);
    assert_eq!(
        lower.describe(),
        format!("castore {}/store", dir.path().display())
    );
    assert!(lower.castore().is_some());
    // Deletion does not turn the clock back.
    let before = lower.identity().unwrap();
    let action = crate::store::GcAction::DeleteDead {
        freed_bytes_max: u64::MAX,
    };
    store.collect(&action).unwrap();
    assert!(store.all_paths().unwrap().is_empty());
    assert_eq!(lower.identity().unwrap(), before);
}

#[test]
fn local_store() {
    let dir = tempfile::tempdir().unwrap();
    let paths = LocalPaths::at_root(dir.path(), StoreDir::default());
    paths.create().unwrap();
    let database = Database::open(&paths.state, &paths.store_dir, OpenMode::ReadWrite).unwrap();
    let url = format!("local?root={}", dir.path().display());
    let lower = open(&url, &StoreDir::default()).unwrap();
    assert_eq!(lower.real_dir(), paths.real);
    conforms(&*lower, &database, true);
    let other = StoreDir::new("/t/store").unwrap();
    let url = format!("local?root={}", dir.path().display());
    assert_eq!(
        open(&url, &other).err().unwrap().to_string(),
        format!(
            "the store of {} has store directory '/nix/store', expected '/t/store'",
            database.path().display()
        )
    );
    let url = format!("{}?real=/does/not/exist", dir.path().display());
    assert_eq!(
        open(&url, &StoreDir::default()).err().unwrap().to_string(),
        format!("lower store '{url}': opening /does/not/exist")
    );
}

/// Our daemon on a thread.
struct Daemon {
    shutdown: Shutdown,
    thread: Option<JoinHandle<()>>,
}

impl Daemon {
    fn start(store: &Store, socket: &Path) -> Self {
        let listener = Listener::bind(socket).unwrap();
        let server = Server::new(store.clone(), ServerOptions::default());
        let shutdown = Shutdown::new().unwrap();
        let switch = shutdown.clone();
        let thread = std::thread::spawn(move || server.serve(&[listener], &switch).unwrap());
        Self {
            shutdown,
            thread: Some(thread),
        }
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        self.shutdown.trigger();
        if let Some(thread) = self.thread.take() {
            thread.join().unwrap();
        }
    }
}

fn daemon_url(socket: &Path, real: &Path) -> String {
    format!("unix://{}?real={}", socket.display(), real.display())
}

#[test]
fn daemon() {
    let dir = tempfile::tempdir().unwrap();
    let store = new_store(&dir);
    let socket: PathBuf = dir.path().join("run/socket");
    let url = daemon_url(&socket, dir.path());
    let error = open(&url, &StoreDir::default()).err().unwrap();
    assert_eq!(
        error.to_string(),
        format!("connecting to the lower daemon at {}", socket.display())
    );
    let running = Daemon::start(&store, &socket);
    let lower = open(&url, &StoreDir::default()).unwrap();
    assert_eq!(lower.describe(), format!("unix://{}", socket.display()));
    assert_eq!(lower.real_dir(), dir.path());
    conforms(&*lower, &store, false);
    // A daemon that is restarted is not noticed by who asks.
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| assert!(lower.valid(&[path("a")]).unwrap()[0]));
        }
    });
    drop(running);
    let error = lower.valid(&[path("a")]).unwrap_err();
    assert_eq!(
        error.to_string(),
        format!("connecting to the lower daemon at {}", socket.display())
    );
    let _running = Daemon::start(&store, &socket);
    assert_eq!(lower.valid(&[path("a")]).unwrap(), [true]);
    assert_eq!(
        lower.path_from_hash_part("x").unwrap_err().to_string(),
        format!(
            "asking the lower daemon at {}: invalid hash part",
            socket.display()
        )
    );
    assert_eq!(lower.valid(&[path("b")]).unwrap(), [true]);
}
