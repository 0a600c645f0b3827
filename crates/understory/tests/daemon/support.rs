//! A daemon on a thread, and things to put into it.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;
use understory::daemon::{Client, ClientOptions, Listener, Server, ServerOptions, Shutdown};
use understory::{Store, StoreOptions};
use understory_nix::worker::{Features, Version};
use understory_nix::{Hash, HashAlgorithm, NarHash, PathInfo, StoreDir, StorePath, nar};

/// A running daemon over a fresh store.
pub(crate) struct Daemon {
    pub(crate) store: Store,
    pub(crate) server: Arc<Server>,
    pub(crate) socket: PathBuf,
    shutdown: Shutdown,
    thread: Option<JoinHandle<()>>,
    _dir: tempfile::TempDir,
}

impl Daemon {
    pub(crate) fn start() -> Self {
        Self::with(ServerOptions::default())
    }

    /// Tests run as root, who is trusted by default.
    pub(crate) fn untrusted() -> Self {
        Self::with(ServerOptions {
            trusted_users: Vec::new(),
            ..ServerOptions::default()
        })
    }

    pub(crate) fn with(options: ServerOptions) -> Self {
        Self::serving(|store| Server::new(store, options))
    }

    pub(crate) fn serving(server: impl FnOnce(Store) -> Server) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let store_dir = dir.path().join("store");
        Store::create(&store_dir, &StoreDir::default()).unwrap();
        let store = Store::open(&store_dir, &StoreOptions::default()).unwrap();
        let socket = dir.path().join("run/socket");
        let listener = Listener::bind(&socket).unwrap();
        let server = Arc::new(server(store.clone()));
        let shutdown = Shutdown::new().unwrap();
        let (serving, switch) = (Arc::clone(&server), shutdown.clone());
        let thread = std::thread::spawn(move || serving.serve(&[listener], &switch).unwrap());
        Self {
            store,
            server,
            socket,
            shutdown,
            thread: Some(thread),
            _dir: dir,
        }
    }

    pub(crate) fn client(&self) -> Client {
        self.client_at(Version::NEWEST)
    }

    pub(crate) fn client_at(&self, version: Version) -> Client {
        // Lix knows nothing but 1.35 and waits for the greeting.
        let lix_order = version == Version::new(1, 35);
        let options = ClientOptions {
            version,
            lix_order,
            ..ClientOptions::default()
        };
        let mut client = Client::connect(&self.socket, &options).unwrap();
        client
            .set_options(understory_nix::worker::SetOptions::default())
            .unwrap();
        client
    }

    pub(crate) fn client_with_features(&self) -> Client {
        let features = Features {
            realisation_with_path: true,
            delete_dead_specific_referrers: true,
        };
        Client::connect(
            &self.socket,
            &ClientOptions {
                features,
                ..ClientOptions::default()
            },
        )
        .unwrap()
    }

    pub(crate) fn stop(&mut self) {
        self.shutdown.trigger();
        if let Some(thread) = self.thread.take() {
            thread.join().unwrap();
        }
    }

    /// Waits until the server has noticed that its clients have gone.
    pub(crate) fn wait_until_alone(&self) {
        let start = std::time::Instant::now();
        while self.server.connection_count() > 0 {
            assert!(start.elapsed().as_secs() < 20, "connections stay open");
            std::thread::yield_now();
        }
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        self.stop();
    }
}

/// The versions at which something changes that clients use today.
pub(crate) const VERSIONS: [Version; 9] = [
    Version::new(1, 21),
    Version::new(1, 22),
    Version::new(1, 25),
    Version::new(1, 27),
    Version::new(1, 30),
    // Nix 2.8.
    Version::new(1, 33),
    Version::new(1, 34),
    Version::new(1, 35),
    Version::new(1, 38),
];

/// A store path that is made of its name only.
pub(crate) fn path(name: &str) -> StorePath {
    let digest = Hash::of(HashAlgorithm::Sha1, name.as_bytes());
    let hash = understory_nix::nix32::encode(digest.digest());
    StorePath::from_base_name(&format!("{hash}-{name}")).unwrap()
}

/// The archive of a file.
pub(crate) fn file_nar(contents: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    let mut writer = nar::Writer::new(&mut out);
    writer.file(None, false, contents.len() as u64).unwrap();
    writer.contents(contents).unwrap();
    writer.finish().unwrap();
    out
}

/// The archive of a directory with a program, a symlink and an empty file.
pub(crate) fn tree_nar(seed: &str) -> Vec<u8> {
    let mut out = Vec::new();
    let mut writer = nar::Writer::new(&mut out);
    writer.directory_begin(None).unwrap();
    writer.directory_begin(Some(b"bin")).unwrap();
    writer.file(Some(b"run"), true, seed.len() as u64).unwrap();
    writer.contents(seed.as_bytes()).unwrap();
    writer.directory_end().unwrap();
    writer.file(Some(b"empty"), false, 0).unwrap();
    writer.symlink(Some(b"link"), b"bin/run").unwrap();
    writer.directory_end().unwrap();
    writer.finish().unwrap();
    out
}

/// The info that goes with an archive.
pub(crate) fn info(path: &StorePath, archive: &[u8], references: &[&StorePath]) -> PathInfo {
    PathInfo {
        path: path.clone(),
        nar_hash: NarHash::try_from(Hash::of(HashAlgorithm::Sha256, archive)).unwrap(),
        nar_size: archive.len() as u64,
        references: references.iter().map(|path| (*path).clone()).collect(),
        deriver: None,
        registration_time: 1_700_000_000,
        ultimate: false,
        signatures: BTreeSet::new(),
        ca: None,
    }
}

/// Adds a tree under `name` and returns its info.
pub(crate) fn add(client: &mut Client, name: &str, references: &[&StorePath]) -> PathInfo {
    let archive = tree_nar(name);
    let info = info(&path(name), &archive, references);
    client
        .add_to_store_nar(&info, &mut &archive[..], false, true)
        .unwrap();
    info
}

/// The text of a server's error.
pub(crate) fn server_error<T: std::fmt::Debug>(
    result: Result<T, understory::daemon::ClientError>,
) -> String {
    match result {
        Err(understory::daemon::ClientError::Server(error)) => {
            String::from_utf8(error.message).unwrap()
        }
        other => panic!("expected an error of the server, found {other:?}"),
    }
}

/// The full path as text.
pub(crate) fn full(path: &StorePath) -> String {
    StoreDir::default().print(path)
}

/// Resident memory of this process in bytes.
pub(crate) fn resident_bytes() -> u64 {
    let text = std::fs::read_to_string(Path::new("/proc/self/statm")).unwrap();
    let pages: u64 = text.split(' ').nth(1).unwrap().parse().unwrap();
    pages * rustix::param::page_size() as u64
}
