//! Crashes and full disks at each operation that changes a file.
//!
//! A medium counts operations and dies at a given one. A *killed* process loses nothing that reached
//! the kernel; a *power cut* also takes what was not synced: tails of files, new names. Afterwards the
//! castore is opened as it lies, and all that a sync acknowledged must be there and verify.

use super::masks::hash_part;
use super::{assert_file, noise, put_file};
use crate::medium::{Medium, Os};
use crate::{Castore, CastoreError, Masks, Node, OpenOptions, TreeBuilder};
use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

#[derive(Clone, Copy, PartialEq, Debug)]
pub(super) enum Mode {
    Kill,
    /// What was not synced is lost; the flag: or is there as zeros.
    PowerCut(bool),
    /// Writes fail until there is space again; all else works.
    NoSpace,
}

pub(super) struct Faulty {
    mode: Mode,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    operations: u64,
    fail_at: u64,
    failed: bool,
    space_again: bool,
    /// Durable lengths of files.
    synced: HashMap<PathBuf, u64>,
    /// Names that no directory sync has made durable.
    new_names: HashSet<PathBuf>,
    /// Names whose removal no directory sync has made durable.
    removed: HashSet<PathBuf>,
}

impl Faulty {
    pub(super) fn new(mode: Mode, fail_at: u64) -> Arc<Self> {
        Arc::new(Self {
            mode,
            state: Mutex::new(State {
                fail_at,
                ..State::default()
            }),
        })
    }

    /// Counts an operation; true if it is the one that fails, an error if all is over.
    fn operation(&self, writes: bool) -> io::Result<bool> {
        let mut state = self.state.lock().unwrap();
        state.operations += 1;
        if state.failed {
            return match self.mode {
                Mode::NoSpace if !writes || state.space_again => Ok(false),
                Mode::NoSpace => Err(io::Error::from_raw_os_error(28)),
                _ => Err(io::Error::other("crashed")),
            };
        }
        let now = state.operations >= state.fail_at
            && !state.space_again
            && (writes || self.mode != Mode::NoSpace);
        state.failed |= now;
        Ok(now)
    }

    fn error(&self) -> io::Error {
        match self.mode {
            Mode::NoSpace => io::Error::from_raw_os_error(28),
            _ => io::Error::other("crashed"),
        }
    }

    pub(super) fn operations(&self) -> u64 {
        self.state.lock().unwrap().operations
    }

    /// There is space again.
    pub(super) fn mend(&self) {
        self.state.lock().unwrap().space_again = true;
    }

    pub(super) fn cut_power(&self) {
        let Mode::PowerCut(zeros) = self.mode else {
            return;
        };
        let state = self.state.lock().unwrap();
        for path in &state.new_names {
            let _ = std::fs::remove_file(path);
        }
        // What was removed is there again, if nothing made the removal durable.
        for path in &state.removed {
            let _ = std::fs::rename(shadow(path), path);
        }
        for (path, synced) in &state.synced {
            let Ok(file) = File::options().write(true).open(path) else {
                continue;
            };
            let len = file.metadata().unwrap().len();
            if len > *synced {
                // The length may have survived in part, without the data.
                file.set_len(*synced).unwrap();
                if zeros {
                    file.set_len(synced + (len - synced) / 2).unwrap();
                }
            }
        }
    }
}

impl Medium for Faulty {
    fn create_new(&self, path: &Path) -> io::Result<File> {
        if self.operation(true)? {
            return Err(self.error());
        }
        self.state.lock().unwrap().synced.insert(path.into(), 0);
        Os.create_new(path)
    }
    fn write_all_at(&self, file: &File, path: &Path, data: &[u8], offset: u64) -> io::Result<()> {
        self.state
            .lock()
            .unwrap()
            .synced
            .entry(path.into())
            .or_insert(offset);
        if self.operation(true)? {
            file.write_all_at(&data[..data.len() * 2 / 3], offset)?;
            return Err(self.error());
        }
        Os.write_all_at(file, path, data, offset)
    }
    fn sync_data(&self, file: &File, path: &Path) -> io::Result<()> {
        if self.operation(false)? {
            return Err(self.error());
        }
        let len = file.metadata()?.len();
        self.state.lock().unwrap().synced.insert(path.into(), len);
        Ok(())
    }
    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        if self.operation(false)? {
            return Err(self.error());
        }
        let mut state = self.state.lock().unwrap();
        state.new_names.retain(|name| name.parent() != Some(path));
        state.removed.retain(|name| {
            let stays = name.parent() != Some(path);
            if !stays {
                let _ = std::fs::remove_file(shadow(name));
            }
            stays
        });
        Ok(())
    }
    fn truncate(&self, file: &File, path: &Path, len: u64) -> io::Result<()> {
        if self.operation(false)? {
            return Err(self.error());
        }
        Os.truncate(file, path, len)
    }
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        if self.operation(false)? {
            return Err(self.error());
        }
        let mut state = self.state.lock().unwrap();
        if let Some(synced) = state.synced.remove(from) {
            state.synced.insert(to.into(), synced);
        }
        state.new_names.insert(to.into());
        state.removed.remove(to);
        Os.rename(from, to)
    }
    fn remove(&self, path: &Path) -> io::Result<()> {
        if self.operation(false)? {
            return Err(self.error());
        }
        let mut state = self.state.lock().unwrap();
        let is_durable =
            !state.new_names.remove(path) && path.extension().is_none_or(|e| e != "tmp");
        if is_durable && matches!(self.mode, Mode::PowerCut(_)) {
            std::fs::rename(path, shadow(path))?;
            state.removed.insert(path.into());
            return Ok(());
        }
        Os.remove(path)
    }
}

/// Where a removed file is kept until its removal is durable.
fn shadow(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".removed");
    name.into()
}

fn options() -> OpenOptions {
    OpenOptions {
        compress_threads: 1,
        compression_level: 1,
        pack_bytes_max: 40_000,
        ..OpenOptions::default()
    }
}

/// What was acknowledged.
#[derive(Default)]
struct Model {
    files: Vec<(Node, Vec<u8>)>,
    trees: Vec<Node>,
}

impl Model {
    fn verify(&self, castore: &Castore) {
        for (node, data) in &self.files {
            assert_file(castore, node, data);
        }
        for tree in &self.trees {
            let Node::Directory { digest, size } = tree else {
                panic!("{tree:?}")
            };
            let directory = castore.directory(digest).unwrap();
            assert_eq!(directory.size(), *size);
            assert_eq!(directory.digest(), *digest);
            for entry in directory.entries() {
                if let Node::File { digest, size, .. } = &entry.node {
                    castore.verify_blob(digest, *size).unwrap();
                }
            }
        }
    }

    /// Two files and a tree, then a sync: only then they count.
    fn round(&mut self, castore: &Castore, round: u64) -> Result<(), CastoreError> {
        let writer = castore.writer()?;
        let mut files = Vec::new();
        let size = 20_000 + round as usize * 1_000;
        let data = noise(round, size);
        let mut old = noise(round / 2, 5_000);
        // Built again: but for this, one in two is as before.
        old[1_000..1_032].copy_from_slice(&hash_part(round));
        let masks = Arc::new(Masks::new(b"/nix/store", [hash_part(round)]));
        let mut builder = TreeBuilder::with_masks(Arc::clone(&writer), Arc::clone(&masks));
        builder.directory_begin(None)?;
        for (name, data) in [(&b"new"[..], &data[..]), (b"old", &old)] {
            let mut sink = builder.file(Some(name), false, 0)?;
            sink.write(data)?;
            sink.finish()?;
        }
        builder.directory_end()?;
        let tree = builder.finish()?;
        if round % 4 == 1 {
            let mut large = [noise(round / 8, 100_000), vec![0; 300_000]].concat();
            large[50_000..50_032].copy_from_slice(&hash_part(round));
            let mut builder = TreeBuilder::with_masks(Arc::clone(&writer), masks);
            let mut sink = builder.file(None, false, 0)?;
            sink.write(&large)?;
            sink.finish()?;
            files.push((builder.finish()?, large));
        }
        writer.sync()?;
        self.trees.push(tree);
        self.files.append(&mut files);
        Ok(())
    }
}

const ROUNDS: u64 = 24;

pub(super) fn assert_sound(castore: &Castore) {
    let mut damage = Vec::new();
    castore
        .scrub(&mut |_, _| {}, &mut |found| damage.push(found))
        .unwrap();
    assert!(damage.is_empty(), "{damage:?}");
}

pub(super) fn temporary() -> tempfile::TempDir {
    // Memory, if there is: this test syncs thousands of times.
    tempfile::tempdir_in("/dev/shm")
        .or_else(|_| tempfile::tempdir())
        .unwrap()
}

/// Runs the workload with a failure at operation `fail_at`; returns the operations made.
fn run(mode: Mode, fail_at: u64) -> u64 {
    let dir = temporary();
    Castore::create(dir.path()).unwrap();
    let medium = Faulty::new(mode, fail_at);
    let mut model = Model::default();
    let mut error = None;
    {
        let castore = Castore::open_on(dir.path(), &options(), medium.clone()).unwrap();
        for round in 0..ROUNDS {
            if let Err(failed) = model.round(&castore, round) {
                error = Some(failed);
                break;
            }
        }
        if mode == Mode::NoSpace {
            model.verify(&castore);
            if let Some(error) = error {
                assert!(error.is_no_space(), "{error}");
            }
            // The same process goes on when there is space again.
            medium.state.lock().unwrap().space_again = true;
            model.round(&castore, ROUNDS).unwrap();
            model.verify(&castore);
        }
    }
    let operations = medium.state.lock().unwrap().operations;
    medium.cut_power();
    let castore = Castore::open(dir.path(), &options()).unwrap();
    model.verify(&castore);
    assert_sound(&castore);
    for round in [ROUNDS + 1, 0, ROUNDS + 3] {
        model.round(&castore, round).unwrap();
    }
    model.verify(&castore);
    let again = Castore::open(dir.path(), &options()).unwrap();
    model.verify(&again);
    assert_sound(&again);
    operations
}

fn at_each_operation(mode: Mode) {
    let operations = run(mode, u64::MAX);
    assert!(operations > 150, "{operations}");
    for fail_at in 1..=operations {
        run(mode, fail_at);
    }
}

#[test]
fn what_was_acknowledged_survives_a_kill_at_each_operation() {
    at_each_operation(Mode::Kill);
}

#[test]
fn what_was_acknowledged_survives_a_power_cut_at_each_operation() {
    at_each_operation(Mode::PowerCut(false));
}

#[test]
fn what_was_acknowledged_survives_a_power_cut_that_leaves_zeros() {
    at_each_operation(Mode::PowerCut(true));
}

#[test]
fn a_full_disk_is_told_and_leaves_the_castore_usable() {
    at_each_operation(Mode::NoSpace);
}

#[test]
fn a_failed_writer_says_so_until_it_is_replaced() {
    let dir = temporary();
    Castore::create(dir.path()).unwrap();
    let medium = Faulty::new(Mode::NoSpace, 1);
    let castore = Castore::open_on(dir.path(), &options(), medium.clone()).unwrap();
    let writer = castore.writer().unwrap();
    let mut builder = TreeBuilder::new(Arc::clone(&writer));
    let mut sink = builder.file(None, false, 0).unwrap();
    sink.write(b"some bytes").unwrap();
    sink.finish().unwrap();
    builder.finish().unwrap();
    for _ in 0..2 {
        let error = writer.sync().unwrap_err();
        assert!(error.is_no_space());
        let text = error.to_string();
        assert!(
            text.starts_with("the castore's writer failed before: creating ")
                && text.ends_with("No space left on device (os error 28)"),
            "{text}"
        );
    }
    medium.state.lock().unwrap().space_again = true;
    assert!(writer.sync().is_err());
    let writer = castore.writer().unwrap();
    let node = put_file(&writer, b"some bytes");
    writer.sync().unwrap();
    assert_file(&castore, &node, b"some bytes");
}
