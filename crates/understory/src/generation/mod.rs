//! Generations: what a store held at one time, as images that the kernel mounts by itself.
//!
//! A generation is a metadata-only EROFS image of store paths. The contents of its files lie on a virtual
//! device, in which each file has one permanent extent: see `space`. Images stay right when packs are
//! rewritten and when later generations are made. `mount::image` mounts them.
//!
//! ```text
//! STORE/generations/extents        the address space, one for all
//! STORE/generations/lock           empty; held while generations are made or dropped
//! STORE/generations/last           the highest number that was ever given
//! STORE/generations/<number>/image.erofs
//! STORE/generations/<number>/paths     rows and base names of its paths, by row
//! STORE/generations/<number>/info.json what it is; says how much of `extents` is published
//! STORE/generations/<number>/lock      held shared by whoever has it mounted
//! STORE/generations/.new-<hex>/    one that is being made
//! ```
//! - A generation is published by the renaming of its directory, after all in it and the extents were synced.
//! - While it is mounted, its paths are roots: a collection asks [`roots_in_use`].
//! - A generation whose paths are not valid any more, or whose image has other bytes than were written, is
//!   refused, and made anew by whoever needs one.
//!
//! Cost of making one: it reads directories, never files. See `build`.

mod build;
mod device;
mod hot;
mod metadata_ahead;
mod mounted;
mod space;
pub mod stack;

pub use build::{Figures, Progress};
pub(crate) use device::StoreDevice;
pub use hot::{HOT_BYTES_DEFAULT, HotFigures, HotOptions, clear as clear_hot};
pub use mounted::{
    MountOptions, MountedGeneration, MountedImage, READ_AHEAD_BYTES, serve, serve_held, take_over,
};

use crate::files::{open_or_create, remove_if_there};
use crate::import::Selection;
use crate::store::StoredPath;
use crate::{Error, Result, Store};
use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};
use space::{Appender, BLOCK_BYTES, Space};
use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;
use understory_nix::StorePath;

const DIR: &str = "generations";
const EXTENTS: &str = "extents";
const LOCK: &str = "lock";
const LAST: &str = "last";
const IMAGE: &str = "image.erofs";
const PATHS: &str = "paths";
const INFO: &str = "info.json";
/// What a generation that is being made is called.
const NEW_PREFIX: &str = ".new-";
/// Version of `info.json`.
const VERSION: u32 = 1;
/// More is no such file.
const INFO_BYTES_MAX: u64 = 64 << 10;
/// Generations of one store: each costs an image, and looking at all must stay quick.
const GENERATIONS_MAX: usize = 1000;
/// Bytes of an image that are hashed at once.
const HASH_BYTES: usize = 1 << 20;

/// All generations of a store.
#[derive(Clone)]
pub struct Generations {
    store: Store,
    dir: PathBuf,
}

/// One generation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Generation {
    /// Grows, never given twice.
    pub number: u64,
    dir: PathBuf,
    info: Info,
    made: SystemTime,
}

/// What `info.json` holds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Info {
    version: u32,
    /// Id of the address space, in hex.
    space: String,
    /// Extents that it relies on: all up to that number are published.
    extents: u64,
    /// True if it has all paths that were valid.
    all: bool,
    /// Path infos of later rows are not in it. 0 if it has only paths that were named.
    last_row: u64,
    image: ImageInfo,
    figures: Figures,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct ImageInfo {
    bytes: u64,
    /// BLAKE3, in hex.
    blake3: String,
}

impl Generation {
    /// The image.
    pub fn image(&self) -> PathBuf {
        self.dir.join(IMAGE)
    }
    /// Bytes of the image.
    pub fn image_bytes(&self) -> u64 {
        self.info.image.bytes
    }
    /// The BLAKE3 of the image, in hexadecimal.
    pub fn image_digest(&self) -> &str {
        &self.info.image.blake3
    }
    /// What is in it.
    pub fn figures(&self) -> &Figures {
        &self.info.figures
    }
    /// True if it has all paths that were valid when it was made, and not only some.
    pub fn has_all(&self) -> bool {
        self.info.all
    }
    /// The last row of the store that it has, if it has all.
    pub fn last_row(&self) -> u64 {
        self.info.last_row
    }
    /// True if somebody has it mounted.
    ///
    /// # Errors
    /// I/O.
    pub fn is_in_use(&self) -> Result<bool> {
        is_in_use(&self.dir)
    }
    /// When it was made.
    pub fn made(&self) -> SystemTime {
        self.made
    }

    /// Reads the image and compares its digest.
    fn verify_image(&self) -> Result<()> {
        let path = self.image();
        let io = |e| Error::io("reading", &path, e);
        let mut file = File::open(&path).map_err(io)?;
        let mut hasher = blake3::Hasher::new();
        let mut buffer = vec![0; HASH_BYTES];
        loop {
            match file.read(&mut buffer).map_err(io)? {
                0 => break,
                count => hasher.update(&buffer[..count]),
            };
        }
        let found = hasher.finalize().to_hex();
        if found.as_str() == self.info.image.blake3 {
            return Ok(());
        }
        Err(Error::corrupt(format!(
            "{}: expected BLAKE3 {}, found {found}",
            path.display(),
            self.info.image.blake3
        ))
        .with_hint(format!(
            "drop it with `understory generation drop {}` and make a new one",
            self.number
        )))
    }
}

/// Keeps a generation, and so the paths in it, from being dropped and collected.
#[derive(Debug)]
pub struct InUse {
    generation: Generation,
    lock: File,
}

impl InUse {
    /// Which one.
    pub fn generation(&self) -> &Generation {
        &self.generation
    }
    /// The descriptor whose lock says so; a duplicate of it keeps the generation, too.
    pub fn lock(&self) -> &File {
        &self.lock
    }
}

/// What was dropped.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Dropped {
    /// Numbers.
    pub numbers: Vec<u64>,
    /// Bytes of images that were freed.
    pub bytes: u64,
}

impl Generations {
    /// Those of `store`.
    pub fn of(store: &Store) -> Self {
        Self {
            store: store.clone(),
            dir: store.dir().join(DIR),
        }
    }

    /// All of them, by number. One that cannot be read is left out, with a line in the log.
    ///
    /// # Errors
    /// I/O.
    pub fn list(&self) -> Result<Vec<Generation>> {
        list_from(&self.dir)
    }

    /// The newest that has all paths of its time.
    ///
    /// # Errors
    /// I/O.
    pub fn newest(&self) -> Result<Option<Generation>> {
        Ok(self.list()?.into_iter().rfind(Generation::has_all))
    }

    /// The one with that number.
    ///
    /// # Errors
    /// There is none; it cannot be read.
    pub fn get(&self, number: u64) -> Result<Generation> {
        self.load(number)?.ok_or_else(|| {
            Error::user(format!("there is no generation {number}"))
                .with_hint("`understory generation list` shows what there is")
        })
    }

    fn load(&self, number: u64) -> Result<Option<Generation>> {
        load_from(&self.dir, number)
    }

    /// Takes a generation into use: makes sure that its image is as it was written and that all its paths are
    /// valid, and keeps them so until what is returned is dropped. Works on a store that is open read-only, where
    /// nothing can be kept from others.
    ///
    /// # Errors
    /// It is damaged, made for another address space, or has paths that are not valid any more.
    pub fn take(&self, generation: &Generation) -> Result<InUse> {
        let path = generation.dir.join(LOCK);
        let lock = File::open(&path).map_err(|e| Error::io("opening", &path, e))?;
        {
            // No collection decides between the lock and the look.
            let _collection = self.store.hold_collections()?;
            flock(&lock, FlockOperation::LockShared)
                .map_err(|e| Error::io("locking", &path, e.into()))?;
            self.check_paths(generation)?;
        }
        generation.verify_image()?;
        let space = self.space()?;
        if hex(&space.id()) != generation.info.space {
            return Err(Error::corrupt(format!(
                "generation {} is for address space {}, found {}",
                generation.number,
                generation.info.space,
                hex(&space.id())
            )));
        }
        Ok(InUse {
            generation: generation.clone(),
            lock,
        })
    }

    /// Compares the generation's rows with those of the store.
    fn check_paths(&self, generation: &Generation) -> Result<()> {
        const ROWS: usize = 1000;
        let mut rows = Vec::new();
        let mut at = 0;
        for_paths(&generation.dir, &mut |row, path| {
            // Both are sorted by row.
            while rows
                .get(at)
                .is_some_and(|found: &Arc<StoredPath>| found.id < row)
            {
                at += 1;
            }
            if at == rows.len() {
                rows = self.store.list(row.saturating_sub(1), ROWS)?;
                at = 0;
            }
            match rows.get(at) {
                Some(found) if found.id == row && found.info.path == path => {
                    at += 1;
                    Ok(())
                }
                _ => Err(Error::user(format!(
                    "generation {} has {}, which is not valid any more",
                    generation.number,
                    self.store.store_dir().print(&path)
                ))
                .with_hint("make a new one with `understory generation make`")),
            }
        })
    }

    /// Paths of a generation with their rows, by row.
    ///
    /// # Errors
    /// I/O, damaged.
    pub fn paths(&self, generation: &Generation) -> Result<Vec<(u64, StorePath)>> {
        let mut out = Vec::new();
        for_paths(&generation.dir, &mut |row, path| {
            out.push((row, path));
            Ok(())
        })?;
        Ok(out)
    }

    /// The file of the address space.
    fn extents(&self) -> PathBuf {
        self.dir.join(EXTENTS)
    }

    /// Opens the address space for reading, with all that is published.
    pub(crate) fn space(&self) -> Result<Space> {
        Space::open(&self.extents(), self.published()?)
    }

    /// Extents that generations rely on.
    fn published(&self) -> Result<u64> {
        Ok(self
            .list()?
            .iter()
            .map(|generation| generation.info.extents)
            .max()
            .unwrap_or(0))
    }

    /// Puts all files of the closures of `paths` into the raw tier, as far as they fit. They must be in a generation.
    /// Durable on return.
    ///
    /// # Errors
    /// A path that is not valid or in no generation; damaged content; a full disk; another process fills the tier.
    pub fn heat(&self, paths: &[StorePath], options: &HotOptions) -> Result<HotFigures> {
        let space = self.space()?;
        let tier = hot::RawTier::open(&self.store, &space, options)?;
        let table = Appender::open_read_only(&self.extents(), self.published()?)?;
        for row in self.store.closure(paths)? {
            build::for_files(&self.store, &row.root, &mut |digest, size| {
                let extent = table.find(digest, size)?.ok_or_else(|| {
                    Error::user(format!(
                        "{} is in no generation",
                        self.store.store_dir().print(&row.info.path)
                    ))
                    .with_hint("make one with `understory generation make`")
                })?;
                tier.insert(&self.store, &extent).map(drop)
            })?;
        }
        tier.sync()?;
        Ok(tier.figures())
    }

    /// Makes a generation of the paths of `selection`; those that are given are taken with their closures.
    /// Reads no file contents. `progress` is told how far it is.
    ///
    /// It is durable on return. What fails leaves nothing behind but extents that the next one cuts off.
    ///
    /// # Errors
    /// A path that is not valid; a full disk; the address space is full; the content is damaged.
    pub fn make(
        &self,
        selection: &Selection,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<Generation> {
        self.make_but(selection, &BTreeSet::new(), progress)
    }

    /// The same for all paths but those of `without`, which are to be deleted. It counts as one of some paths only
    /// until [`Self::has_become_whole`] says that they are.
    pub(crate) fn make_without(&self, without: &BTreeSet<StorePath>) -> Result<Generation> {
        self.make_but(&Selection::All, without, &mut |_| {})
    }

    /// To be called when there are no paths any more that a generation was made without.
    pub(crate) fn has_become_whole(&self, number: u64) -> Result<()> {
        let _lock = self.lock()?;
        let mut generation = self.get(number)?;
        generation.info.all = true;
        let new = generation.dir.join(format!("{INFO}.new"));
        write_synced(&new, &to_text(&generation.info)?)?;
        fs::rename(&new, generation.dir.join(INFO)).map_err(|e| Error::io("renaming", &new, e))?;
        sync_dir(&generation.dir)
    }

    fn make_but(
        &self,
        selection: &Selection,
        without: &BTreeSet<StorePath>,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<Generation> {
        if self.store.is_read_only() {
            return Err(Error::user("the store is open read-only"));
        }
        fs::create_dir_all(&self.dir).map_err(|e| Error::io("creating", &self.dir, e))?;
        let _lock = self.lock()?;
        self.sweep()?;
        if numbers(&self.dir)?.len() >= GENERATIONS_MAX {
            return Err(
                Error::user(format!("there are {GENERATIONS_MAX} generations already"))
                    .with_hint("drop old ones with `understory generation drop`"),
            );
        }
        // Nothing that is being put into it may go meanwhile.
        let _collection = self.store.hold_collections()?;
        let mut space = Appender::open(&self.extents(), self.published()?)?;
        let new = tempfile::Builder::new()
            .prefix(NEW_PREFIX)
            .tempdir_in(&self.dir)
            .map_err(|e| Error::io("creating a directory in", &self.dir, e))?;
        let built = build::build(
            &self.store,
            selection,
            without,
            &mut space,
            new.path(),
            progress,
        )?;
        space.commit()?;
        let info = Info {
            version: VERSION,
            space: hex(&space.id()),
            extents: space.count(),
            all: matches!(selection, Selection::All) && without.is_empty(),
            last_row: built.last_row,
            image: ImageInfo {
                bytes: built.image_bytes,
                blake3: built.image_blake3,
            },
            figures: built.figures,
        };
        self.publish(new, &info)
    }

    fn publish(&self, new: tempfile::TempDir, info: &Info) -> Result<Generation> {
        write_synced(&new.path().join(INFO), &to_text(info)?)?;
        write_synced(&new.path().join(LOCK), b"")?;
        sync_dir(new.path())?;
        let number = self.last_number()? + 1;
        let last = self.dir.join(format!("{NEW_PREFIX}{LAST}"));
        write_synced(&last, format!("{number}\n").as_bytes())?;
        fs::rename(&last, self.dir.join(LAST)).map_err(|e| Error::io("renaming", &last, e))?;
        let dir = self.dir.join(number.to_string());
        fs::rename(new.path(), &dir).map_err(|e| Error::io("renaming", new.path(), e))?;
        // It has another name now: nothing is there to be removed.
        let _ = new.keep();
        sync_dir(&self.dir)?;
        load_from(&self.dir, number)?
            .ok_or_else(|| Error::environment(format!("generation {number} was made and is gone")))
    }

    fn last_number(&self) -> Result<u64> {
        let path = self.dir.join(LAST);
        let noted = match fs::read_to_string(&path) {
            Ok(text) => text.trim().parse().unwrap_or(0),
            Err(error) if error.kind() == ErrorKind::NotFound => 0,
            Err(error) => return Err(Error::io("reading", path, error)),
        };
        Ok(numbers(&self.dir)?.last().copied().unwrap_or(0).max(noted))
    }

    /// Drops a generation.
    ///
    /// # Errors
    /// It is in use; there is none of that number; I/O.
    pub fn drop_one(&self, number: u64) -> Result<Dropped> {
        let _lock = self.lock()?;
        if !numbers(&self.dir)?.contains(&number) {
            return Err(Error::user(format!("there is no generation {number}"))
                .with_hint("`understory generation list` shows what there is"));
        }
        let mut dropped = Dropped::default();
        if !self.remove(number, &mut dropped)? {
            return Err(
                Error::user(format!("generation {number} is in use")).with_hint("unmount it first")
            );
        }
        Ok(dropped)
    }

    /// Drops all that nobody uses but the newest `keep`. If none is left, the address space is dropped as well, so that
    /// the next generation begins a new one.
    ///
    /// # Errors
    /// I/O.
    pub fn prune(&self, keep: usize) -> Result<Dropped> {
        if !self.dir.is_dir() {
            return Ok(Dropped::default());
        }
        let _lock = self.lock()?;
        self.sweep()?;
        let mut dropped = Dropped::default();
        for number in numbers(&self.dir)?.iter().rev().skip(keep) {
            self.remove(*number, &mut dropped)?;
        }
        dropped.numbers.sort_unstable();
        if numbers(&self.dir)?.is_empty() {
            remove_if_there(&self.extents())?;
            sync_dir(&self.dir)?;
        }
        Ok(dropped)
    }

    /// Removes one unless it is in use.
    fn remove(&self, number: u64, dropped: &mut Dropped) -> Result<bool> {
        let dir = self.dir.join(number.to_string());
        // Taking it into use needs no lock of ours; so its own is held until its name is gone.
        let lock = match File::open(dir.join(LOCK)) {
            Ok(lock) => Some(lock),
            Err(error) if error.kind() == ErrorKind::NotFound => None,
            Err(error) => return Err(Error::io("opening", dir.join(LOCK), error)),
        };
        if let Some(lock) = &lock {
            match flock(lock, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => {}
                Err(rustix::io::Errno::WOULDBLOCK) => return Ok(false),
                Err(error) => return Err(Error::io("locking", dir.join(LOCK), error.into())),
            }
        }
        let bytes = fs::metadata(dir.join(IMAGE)).map_or(0, |m| m.len());
        let gone = self.dir.join(format!("{NEW_PREFIX}gone-{number}"));
        fs::rename(&dir, &gone).map_err(|e| Error::io("renaming", &dir, e))?;
        fs::remove_dir_all(&gone).map_err(|e| Error::io("removing", &gone, e))?;
        sync_dir(&self.dir)?;
        dropped.numbers.push(number);
        dropped.bytes += bytes;
        Ok(true)
    }

    /// Removes what interrupted makings and removals left. The caller holds the lock.
    fn sweep(&self) -> Result<()> {
        let entries = fs::read_dir(&self.dir).map_err(|e| Error::io("reading", &self.dir, e))?;
        for entry in entries {
            let entry = entry.map_err(|e| Error::io("reading", &self.dir, e))?;
            if !entry.file_name().to_string_lossy().starts_with(NEW_PREFIX) {
                continue;
            }
            let path = entry.path();
            let removed = match entry.file_type() {
                Ok(kind) if kind.is_dir() => fs::remove_dir_all(&path),
                _ => fs::remove_file(&path),
            };
            removed.map_err(|e| Error::io("removing", &path, e))?;
        }
        Ok(())
    }

    /// Waits until nobody else makes or drops generations.
    fn lock(&self) -> Result<File> {
        let path = self.dir.join(LOCK);
        let file = open_or_create(&path)?;
        flock(&file, FlockOperation::LockExclusive)
            .map_err(|e| Error::io("locking", &path, e.into()))?;
        Ok(file)
    }
}

fn to_text(info: &Info) -> Result<Vec<u8>> {
    let mut text =
        serde_json::to_vec(info).map_err(|e| Error::internal("writing JSON").with_source(e))?;
    text.push(b'\n');
    Ok(text)
}

/// All generations of the store in `store`, as [`Generations::list`].
///
/// # Errors
/// I/O.
pub(crate) fn all_of(store: &Path) -> Result<Vec<Generation>> {
    list_from(&store.join(DIR))
}

fn list_from(dir: &Path) -> Result<Vec<Generation>> {
    let mut found = Vec::new();
    for number in numbers(dir)? {
        match load_from(dir, number) {
            Ok(Some(generation)) => found.push(generation),
            Ok(None) => {}
            Err(error) => tracing::warn!("generation {number}: {}", error.chain()),
        }
    }
    Ok(found)
}

/// The generation of that number of the store in `store`; `None` if there is none.
///
/// # Errors
/// It cannot be read.
pub(crate) fn load(store: &Path, number: u64) -> Result<Option<Generation>> {
    load_from(&store.join(DIR), number)
}

/// The image of a generation of that number, of the store in `store`.
fn image_of(store: &Path, number: u64) -> PathBuf {
    store.join(DIR).join(number.to_string()).join(IMAGE)
}

fn load_from(dir: &Path, number: u64) -> Result<Option<Generation>> {
    let dir = dir.join(number.to_string());
    let path = dir.join(INFO);
    let file = match File::open(&path) {
        Ok(file) => file,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(Error::io("opening", path, error)),
    };
    // Now: somebody may drop it at any moment.
    let made = file
        .metadata()
        .and_then(|metadata| metadata.modified())
        .map_err(|e| Error::io("examining", &path, e))?;
    let mut text = Vec::new();
    file.take(INFO_BYTES_MAX)
        .read_to_end(&mut text)
        .map_err(|e| Error::io("reading", &path, e))?;
    let info: Info = serde_json::from_slice(&text).map_err(|e| {
        Error::corrupt(format!("{} is not understood", path.display())).with_source(e)
    })?;
    if info.version != VERSION {
        return Err(Error::other_version(&path, info.version, VERSION));
    }
    Ok(Some(Generation {
        number,
        dir,
        info,
        made,
    }))
}

/// Paths of generations that are in use, of the store in `store`, but for one: they are roots. The caller holds the lock of
/// collections.
///
/// # Errors
/// I/O, damaged lists.
pub(crate) fn roots_in_use(store: &Path, but: Option<u64>) -> Result<Vec<(PathBuf, StorePath)>> {
    let generations = store.join(DIR);
    let mut roots = Vec::new();
    for number in numbers(&generations)? {
        let dir = generations.join(number.to_string());
        if Some(number) != but && is_in_use(&dir)? {
            for_paths(&dir, &mut |_, path| {
                roots.push((dir.clone(), path));
                Ok(())
            })?;
        }
    }
    Ok(roots)
}

/// Numbers of generations in the directory, sorted.
fn numbers(dir: &Path) -> Result<Vec<u64>> {
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(Error::io("reading", dir, error)),
    };
    let mut found = Vec::new();
    for entry in entries {
        let name = entry.map_err(|e| Error::io("reading", dir, e))?.file_name();
        if let Some(number) = name.to_str().and_then(|name| name.parse().ok()) {
            found.push(number);
        }
    }
    found.sort_unstable();
    Ok(found)
}

fn is_in_use(dir: &Path) -> Result<bool> {
    let path = dir.join(LOCK);
    let file = match File::open(&path) {
        Ok(file) => file,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(false),
        Err(error) => return Err(Error::io("opening", path, error)),
    };
    match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(false),
        Err(rustix::io::Errno::WOULDBLOCK) => Ok(true),
        Err(error) => Err(Error::io("locking", path, error.into())),
    }
}

/// Calls `each` with the row and the path of each line of `paths`.
fn for_paths(dir: &Path, each: &mut dyn FnMut(u64, StorePath) -> Result<()>) -> Result<()> {
    let path = dir.join(PATHS);
    let io = |e| Error::io("reading", &path, e);
    let reader = BufReader::new(File::open(&path).map_err(io)?);
    let mut last = 0;
    for line in reader.lines() {
        let line = line.map_err(io)?;
        let parsed = line.split_once(' ').and_then(|(row, name)| {
            Some((row.parse().ok()?, StorePath::from_base_name(name).ok()?))
        });
        match parsed {
            Some((row, store_path)) if row > last => {
                last = row;
                each(row, store_path)?;
            }
            _ => {
                return Err(Error::corrupt(format!(
                    "{}: line not understood: {line:?}",
                    path.display()
                )));
            }
        }
    }
    Ok(())
}

fn write_synced(path: &Path, bytes: &[u8]) -> Result<()> {
    let write = || -> std::io::Result<()> {
        let mut file = File::create(path)?;
        file.write_all(bytes)?;
        file.sync_all()
    };
    write().map_err(|e| Error::io("writing", path, e))
}

fn sync_dir(dir: &Path) -> Result<()> {
    File::open(dir)
        .and_then(|dir| dir.sync_all())
        .map_err(|e| Error::io("syncing", dir, e))
}

fn hex(bytes: &[u8]) -> String {
    data_encoding::HEXLOWER.encode(bytes)
}

fn lock_mutex<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
