//! The live file system on real kernel mounts, over a made-up source that can also fail.
//!
//! They need root and /dev/fuse; without, each says so and passes.

mod contents;
mod life;
mod overlaid;
mod processes;

use super::live_mount::{LiveMount, LiveOptions};
use super::protocol::FileSystemFigures;
use super::source::{Contents, RootEntry, Source};
use crate::{Error, Result};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::ffi::{OsStr, OsString};
use std::io::{Read, Seek, SeekFrom};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use tempfile::TempDir;
use understory_castore::{CastoreError, Digest, Directory, Entry, Node};

#[derive(Clone)]
enum Data {
    Bytes(Arc<[u8]>),
    Zeros,
    Damaged,
    Panics,
    Short,
}

impl crate::open_files::Weigh for (Data, u64) {
    fn memory_bytes(&self) -> u64 {
        1
    }
}

impl Contents for (Data, u64) {
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<usize, CastoreError> {
        match &self.0 {
            Data::Bytes(bytes) => {
                let rest = &bytes[(offset as usize).min(bytes.len())..];
                let count = rest.len().min(buffer.len());
                buffer[..count].copy_from_slice(&rest[..count]);
                Ok(count)
            }
            Data::Zeros => {
                buffer.fill(0);
                Ok(buffer.len())
            }
            Data::Damaged => Err(CastoreError::Corrupt {
                what: "frame 7".into(),
                reason: "expected 1, found 2".into(),
            }),
            Data::Panics => panic!("a bug in a handler"),
            Data::Short => Ok(buffer.len() / 2),
        }
    }
}

/// A store in memory. Clones are the same one.
#[derive(Clone, Default)]
struct Memory(Arc<Mutex<Shelves>>);

#[derive(Default)]
struct Shelves {
    root: BTreeMap<u64, (String, Node)>,
    last_row: u64,
    directories: HashMap<Digest, Arc<Directory>>,
    blobs: HashMap<Digest, (Data, u64)>,
    finds: u64,
}

impl Memory {
    fn file(&self, bytes: &[u8], executable: bool) -> Node {
        let digest = Digest::of(bytes);
        let size = bytes.len() as u64;
        self.0
            .lock()
            .unwrap()
            .blobs
            .insert(digest, (Data::Bytes(bytes.into()), size));
        Node::File {
            digest,
            size,
            executable,
        }
    }
    fn special(&self, seed: &str, data: Data, size: u64) -> Node {
        let digest = Digest::of(seed.as_bytes());
        self.0.lock().unwrap().blobs.insert(digest, (data, size));
        Node::File {
            digest,
            size,
            executable: false,
        }
    }
    fn directory(&self, entries: Vec<(&[u8], Node)>) -> Node {
        let entries = entries
            .into_iter()
            .map(|(name, node)| Entry {
                name: name.into(),
                node,
            })
            .collect();
        let directory = Directory::new(entries).unwrap();
        let (digest, size) = (directory.digest(), directory.size());
        self.0
            .lock()
            .unwrap()
            .directories
            .insert(digest, Arc::new(directory));
        Node::Directory { digest, size }
    }
    fn publish(&self, name: &str, node: Node) {
        let mut shelves = self.0.lock().unwrap();
        shelves.last_row += 1;
        let row = shelves.last_row;
        shelves.root.insert(row, (name.to_owned(), node));
    }
    fn remove(&self, name: &str) {
        self.0
            .lock()
            .unwrap()
            .root
            .retain(|_, (found, _)| found != name);
    }
}

impl Source for Memory {
    fn find(&self, name: &[u8]) -> Result<Option<RootEntry>> {
        let mut shelves = self.0.lock().unwrap();
        shelves.finds += 1;
        let found = shelves
            .root
            .iter()
            .find(|(_, (found, _))| found.as_bytes() == name);
        Ok(found.map(|(&row, (name, node))| RootEntry {
            row,
            name: name.as_str().into(),
            node: node.clone(),
        }))
    }
    fn list(&self, after: u64, count: usize) -> Result<Vec<RootEntry>> {
        let shelves = self.0.lock().unwrap();
        let rows = shelves.root.range(after + 1..).take(count);
        Ok(rows
            .map(|(&row, (name, node))| RootEntry {
                row,
                name: name.as_str().into(),
                node: node.clone(),
            })
            .collect())
    }
    fn changes(&self) -> u64 {
        0
    }
    fn directory(&self, digest: &Digest) -> Result<Arc<Directory>> {
        self.0
            .lock()
            .unwrap()
            .directories
            .get(digest)
            .cloned()
            .ok_or_else(|| Error::corrupt("no such directory"))
    }
    fn blob(&self, digest: &Digest, _size: u64) -> Result<Arc<dyn Contents>> {
        let blob = self.0.lock().unwrap().blobs.get(digest).cloned();
        Ok(Arc::new(
            blob.ok_or_else(|| Error::corrupt("no such blob"))?,
        ))
    }
    fn figures(&self) -> Result<FileSystemFigures> {
        Ok(FileSystemFigures {
            block_bytes: 4096,
            blocks: 1000,
            blocks_free: 600,
            blocks_available: 500,
            files: 10,
            files_free: 5,
        })
    }
}

struct Fixture {
    memory: Memory,
    mount: LiveMount,
    dir: TempDir,
}

impl Fixture {
    /// `None`, with a word on stderr, where mounts are not possible.
    fn new() -> Option<Self> {
        Self::with(Memory::default())
    }
    fn with(memory: Memory) -> Option<Self> {
        if !rustix::process::geteuid().is_root() || !Path::new("/dev/fuse").exists() {
            understory_testkit::skip("real mounts need root and /dev/fuse");
            return None;
        }
        let dir = tempfile::tempdir().unwrap();
        let mount = mount(&memory, dir.path()).unwrap();
        Some(Self { memory, mount, dir })
    }
    fn path(&self, name: impl AsRef<OsStr>) -> std::path::PathBuf {
        self.dir.path().join(name.as_ref())
    }
    fn names(&self, below: &str) -> Vec<OsString> {
        std::fs::read_dir(self.path(below))
            .unwrap()
            .map(|entry| entry.unwrap().file_name())
            .collect()
    }
}

impl Drop for Fixture {
    fn drop(&mut self) {
        self.mount.unmount().unwrap();
    }
}

fn mount(memory: &Memory, at: &Path) -> Result<LiveMount> {
    LiveMount::mount_source(
        Box::new(memory.clone()),
        OsStr::new("understory:memory, of \\ tests"),
        at,
        &LiveOptions::default(),
    )
}

fn name(number: u64) -> String {
    format!("{number:032}-n")
}

fn drop_caches() {
    std::fs::write("/proc/sys/vm/drop_caches", "3").unwrap();
}

/// Waits for something that the kernel does in its own time.
fn eventually(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(10);
    while !done() {
        assert!(Instant::now() < deadline, "did not happen: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}
