//! Caches that tests make, stores that they fill, and who listens.

use std::collections::BTreeSet;
use std::io::Write;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use understory::daemon::Reporter;
use understory::settings::Settings;
use understory::substitute::{CastoreSink, Outcome, Substituters};
use understory::{Result, Store, StoreOptions};
use understory_nix::narinfo::{Compression, NarInfo};
use understory_nix::worker::{LogMessage, Verbosity};
use understory_nix::{Hash, HashAlgorithm, PathInfo, PublicKeys, SecretKey, StoreDir, StorePath};

/// A store path with a digest of `seed`.
pub(crate) fn path(name: &str, seed: &str) -> StorePath {
    const ALPHABET: &[u8; 32] = b"0123456789abcdfghijklmnpqrsvwxyz";
    let hash = blake3::hash(format!("{name} {seed}").as_bytes());
    let digest: String = hash
        .as_bytes()
        .iter()
        .map(|byte| char::from(ALPHABET[usize::from(byte % 32)]))
        .collect();
    StorePath::from_base_name(&format!("{digest}-{name}")).unwrap()
}

/// The NAR of a file.
pub(crate) fn nar(contents: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    let mut writer = understory_nix::nar::Writer::new(&mut out);
    writer.file(None, false, contents.len() as u64).unwrap();
    writer.contents(contents).unwrap();
    writer.finish().unwrap();
    out
}

/// Bytes that do not compress.
pub(crate) fn noise(len: usize, seed: u64) -> Vec<u8> {
    let mut bytes = vec![0; len];
    blake3::Hasher::new()
        .update(&seed.to_le_bytes())
        .finalize_xof()
        .fill(&mut bytes);
    bytes
}

pub(crate) fn compress(compression: &Compression, data: &[u8]) -> Vec<u8> {
    match compression {
        Compression::None => data.to_vec(),
        Compression::Zstd => zstd::encode_all(data, 3).unwrap(),
        Compression::Xz => {
            let mut encoder = liblzma::write::XzEncoder::new(Vec::new(), 1);
            encoder.write_all(data).unwrap();
            encoder.finish().unwrap()
        }
        Compression::Gzip => {
            let mut encoder =
                flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
            encoder.write_all(data).unwrap();
            encoder.finish().unwrap()
        }
        other => panic!("{other:?}"),
    }
}

/// A binary cache in a directory, signed.
pub(crate) struct Cache {
    pub(crate) dir: tempfile::TempDir,
    key: SecretKey,
}

impl Cache {
    pub(crate) fn new(priority: u32) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let info = format!("StoreDir: /nix/store\nWantMassQuery: 1\nPriority: {priority}\n");
        std::fs::write(dir.path().join("nix-cache-info"), info).unwrap();
        std::fs::create_dir(dir.path().join("nar")).unwrap();
        Self {
            dir,
            key: SecretKey::generate("test-1").unwrap(),
        }
    }
    /// Signs with the key of another cache.
    pub(crate) fn with_key_of(other: &Self, priority: u32) -> Self {
        Self {
            key: SecretKey::parse(&other.key.to_secret_text()).unwrap(),
            ..Self::new(priority)
        }
    }
    pub(crate) fn keys(&self) -> PublicKeys {
        [self.key.public()].into_iter().collect()
    }
    pub(crate) fn url(&self) -> String {
        format!("file://{}", self.dir.path().display())
    }
    pub(crate) fn file(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }
    pub(crate) fn narinfo_file(&self, path: &StorePath) -> PathBuf {
        self.file(&format!("{}.narinfo", path.hash_part()))
    }
    pub(crate) fn nar_file(&self, path: &StorePath) -> PathBuf {
        self.file(&format!("nar/{}.nar", path.hash_part()))
    }
    /// Adds a file as a path.
    pub(crate) fn add(&self, path: &StorePath, contents: &[u8], references: &[&StorePath]) {
        self.add_with(path, contents, references, &Compression::Zstd, |_| {});
    }
    pub(crate) fn add_with(
        &self,
        path: &StorePath,
        contents: &[u8],
        references: &[&StorePath],
        compression: &Compression,
        change: impl FnOnce(&mut NarInfo),
    ) {
        let nar = nar(contents);
        let file = compress(compression, &nar);
        let mut narinfo = NarInfo {
            info: PathInfo {
                path: path.clone(),
                nar_hash: Hash::of(HashAlgorithm::Sha256, &nar).try_into().unwrap(),
                nar_size: nar.len() as u64,
                references: references.iter().copied().cloned().collect(),
                deriver: None,
                registration_time: 0,
                ultimate: false,
                signatures: BTreeSet::new(),
                ca: None,
            },
            url: format!("nar/{}.nar", path.hash_part()),
            compression: compression.clone(),
            file_hash: Some(Hash::of(HashAlgorithm::Sha256, &file)),
            file_size: Some(file.len() as u64),
        };
        narinfo.info.sign(&StoreDir::default(), &self.key);
        change(&mut narinfo);
        std::fs::write(self.nar_file(path), file).unwrap();
        self.write(&narinfo);
    }
    pub(crate) fn write(&self, narinfo: &NarInfo) {
        let text = narinfo.print(&StoreDir::default());
        std::fs::write(self.narinfo_file(&narinfo.info.path), text).unwrap();
    }
    pub(crate) fn read(&self, path: &StorePath) -> NarInfo {
        let text = std::fs::read_to_string(self.narinfo_file(path)).unwrap();
        NarInfo::parse(&StoreDir::default(), "x", &text).unwrap()
    }
    pub(crate) fn resign(&self, narinfo: &mut NarInfo) {
        narinfo.info.signatures.clear();
        narinfo.info.sign(&StoreDir::default(), &self.key);
    }
}

/// Keeps what is said; can give up.
#[derive(Default)]
pub(crate) struct Listener {
    pub(crate) messages: Mutex<Vec<LogMessage>>,
    pub(crate) gone: AtomicBool,
}

impl Listener {
    /// The lines of text.
    pub(crate) fn text(&self) -> String {
        self.messages
            .lock()
            .unwrap()
            .iter()
            .filter_map(|message| match message {
                LogMessage::Next(text) => Some(String::from_utf8_lossy(text).into_owned()),
                _ => None,
            })
            .collect()
    }
}

impl Reporter for Listener {
    fn verbosity(&self) -> Verbosity {
        Verbosity::Info
    }
    fn is_cancelled(&self) -> bool {
        self.gone.load(Ordering::Relaxed)
    }
    fn send(&self, message: &LogMessage) {
        self.messages.lock().unwrap().push(message.clone());
    }
}

/// A store, substituters and a place for their cache.
pub(crate) struct Here {
    pub(crate) dir: tempfile::TempDir,
    pub(crate) store: Store,
    pub(crate) settings: Settings,
    pub(crate) listener: Listener,
}

impl Here {
    pub(crate) fn new(urls: &[&str], keys: PublicKeys) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let place = dir.path().join("store");
        Store::create(&place, &StoreDir::default()).unwrap();
        Self {
            store: Store::open(&place, &StoreOptions::default()).unwrap(),
            dir,
            settings: Settings {
                substituters: urls.iter().map(|url| (*url).to_owned()).collect(),
                trusted_public_keys: keys,
                stalled_timeout: Duration::from_secs(2),
                connect_timeout: Duration::from_secs(2),
                download_attempts: 3,
                ..Settings::default()
            },
            listener: Listener::default(),
        }
    }
    pub(crate) fn substituters(&self) -> Arc<Substituters> {
        let cache = self.cache_dir();
        Arc::new(Substituters::new(&self.settings, self.store.store_dir(), &cache).unwrap())
    }
    pub(crate) fn cache_dir(&self) -> PathBuf {
        self.dir.path().join("cache")
    }
    pub(crate) fn substitute(&self, paths: &[&StorePath]) -> Result<Outcome> {
        self.substitute_by(&self.substituters(), paths)
    }
    pub(crate) fn substitute_by(
        &self,
        substituters: &Substituters,
        paths: &[&StorePath],
    ) -> Result<Outcome> {
        let sink = CastoreSink::new(&self.store)?;
        let paths = paths.iter().map(|path| (*path).clone()).collect();
        substituters.substitute(&paths, &sink, &self.listener)
    }
    /// Substitutes, which must succeed, and returns what was fetched.
    pub(crate) fn fetched(&self, paths: &[&StorePath]) -> BTreeSet<StorePath> {
        let outcome = self.substitute(paths).unwrap();
        assert!(
            outcome.failed.is_empty(),
            "{:?}\n{}",
            outcome.failed,
            self.listener.text()
        );
        outcome.substituted.into_iter().collect()
    }
    /// Substitutes, which must fail, and returns why; nothing is valid then.
    pub(crate) fn refused(&self, path: &StorePath) -> String {
        let mut outcome = self.substitute(&[path]).unwrap();
        assert!(outcome.substituted.is_empty());
        assert!(!self.store.is_valid(path).unwrap());
        outcome.failed.remove(path).unwrap().chain()
    }
    /// The contents of a path that is a file, from the castore.
    pub(crate) fn contents(&self, path: &StorePath) -> Vec<u8> {
        let stored = self.store.path(path).unwrap().unwrap();
        let mut out = Vec::new();
        understory::nar::write_nar(self.store.castore(), &stored.root, &mut out).unwrap();
        out
    }
}

pub(crate) fn set(paths: &[&StorePath]) -> BTreeSet<StorePath> {
    paths.iter().map(|path| (*path).clone()).collect()
}
