//! A store in a directory that goes with it, and paths that are made up.

use std::collections::BTreeSet;
use std::io::Cursor;
use std::path::PathBuf;
use understory::nar::{ReadNar, read_nar};
use understory::store::GcAction;
use understory::{Store, StoreOptions};
use understory_nix::nar::Writer as NarWriter;
use understory_nix::{Hash, HashAlgorithm, PathInfo, Signature, StoreDir, StorePath};

pub(super) struct Fixture {
    pub(super) dir: tempfile::TempDir,
    pub(super) store: Store,
}

impl Fixture {
    pub(super) fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        Store::create(&dir.path().join("s"), &StoreDir::default()).unwrap();
        let store = Store::open(&dir.path().join("s"), &StoreOptions::default()).unwrap();
        Self { dir, store }
    }
    pub(super) fn dir(&self) -> PathBuf {
        self.dir.path().join("s")
    }
    pub(super) fn reopen(&self) -> Store {
        Store::open(&self.dir(), &StoreOptions::default()).unwrap()
    }
    pub(super) fn read_only(&self) -> Store {
        let mut options = StoreOptions::default();
        options.castore.read_only = true;
        Store::open(&self.dir(), &options).unwrap()
    }
    pub(super) fn info(&self, name: &str, references: &[&str]) -> (PathInfo, ReadNar) {
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
    pub(super) fn add(&self, name: &str, references: &[&str]) {
        let (info, read) = self.info(name, references);
        self.store.publish(vec![(info, read.root)]).unwrap();
    }
    pub(super) fn print(&self, name: &str) -> String {
        self.store.store_dir().print(&path(name))
    }
}

/// A made-up path: its hash part follows from the name.
pub(super) fn path(name: &str) -> StorePath {
    let hash = Hash::of(HashAlgorithm::Sha1, name.as_bytes());
    StorePath::from_base_name(&format!("{}-{name}", hash.to_nix32())).unwrap()
}

pub(super) fn set(names: &[&str]) -> BTreeSet<StorePath> {
    names.iter().map(|name| path(name)).collect()
}

pub(super) fn file(store: &Store, contents: &[u8]) -> ReadNar {
    let mut nar = Vec::new();
    let mut writer = NarWriter::new(&mut nar);
    writer.file(None, false, contents.len() as u64).unwrap();
    writer.contents(contents).unwrap();
    writer.finish().unwrap();
    read_nar(&store.writer().unwrap(), &mut Cursor::new(nar)).unwrap()
}

pub(super) fn signature(key: &str) -> Signature {
    Signature::parse(&format!("{key}:{}==", "A".repeat(86))).unwrap()
}

pub(super) const ALL_DEAD: GcAction = GcAction::DeleteDead {
    freed_bytes_max: u64::MAX,
};
