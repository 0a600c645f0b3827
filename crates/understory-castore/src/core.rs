//! What this process knows of a castore: its packs, where pieces lie, and the caches.
//!
//! [`State`] is an immutable snapshot behind a lock that is held only to clone an [`Arc`]; lookups
//! and reads hold no lock during I/O or decompression. [`Core::refresh`] brings the snapshot up to
//! date with what other processes did: it compares times and sizes first, and reads only what is
//! new. Whatever is in a snapshot is complete in its pack.

use crate::caches::{ByBytes, cache};
use crate::condemned::Condemned;
use crate::counters::{ReadCounts, Sharded};
use crate::digest::Digest;
use crate::directory::Directory;
use crate::error::{CastoreError, IoContext};
use crate::frames::Frame;
use crate::index::{Footer, Merged, PieceMap};
use crate::lease::Leases;
use crate::medium::Medium;
use crate::pack::{Class, FRAME_RAW_BYTES, Key, Location, PACK_HEADER_BYTES, PackId, Trailer};
use crate::read_ahead::{self, Ahead, FileReads};
use crate::scan::{self, Tail};
use crate::store::OpenOptions;
use quick_cache::sync::Cache;
use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::{Duration, SystemTime};

/// Descriptors of packs kept open: half of the usual soft limit of 1,024.
const PACK_FILES_MAX: usize = 512;
/// Time stamps of directories are as coarse as the kernel's tick (1 to 10 ms), or seconds on some
/// file systems: a directory that changed less than this before it was listed is listed again.
const LISTING_TRUSTED_AFTER: Duration = Duration::from_millis(2500);
/// Damaged frames that are remembered: more than a store that is worth mending has.
const BAD_FRAMES_MAX: usize = 65_536;

/// Where the root of a blob may be, in the order in which it is looked for.
const BLOB_CLASSES: [Class; 2] = [Class::Blob, Class::Patched];

pub(crate) const PACKS_DIR: &str = "packs";
pub(crate) const INDEX_DIR: &str = "index";
pub(crate) const MERGED_SUFFIX: &str = ".midx";
pub(crate) const TEMPORARY_SUFFIX: &str = ".tmp";

/// A pack as long as this process lives; stays the same when the pack is sealed.
pub(crate) struct Pack {
    pub(crate) id: PackId,
    /// Short name for cache keys.
    pub(crate) serial: u32,
    pub(crate) path: PathBuf,
    /// The epoch in which our lease names it; see `lease.rs`.
    pub(crate) relied: AtomicU64,
    /// A collection is about to delete it: writers do not stand on it.
    pub(crate) condemned: AtomicBool,
    /// It was deleted: what was found in it is elsewhere, or dead.
    pub(crate) gone: AtomicBool,
    /// Where frames are read.
    pub(crate) reads: FileReads,
}

/// No epoch has this number.
const NEVER_RELIED: u64 = u64::MAX;
/// Listings in a row during each of which a pack went: more collections than can run in that time.
const LISTINGS_MAX: usize = 64;

impl Pack {
    pub(crate) fn new(id: PackId, serial: u32, path: PathBuf) -> Self {
        Self {
            id,
            serial,
            path,
            relied: AtomicU64::new(NEVER_RELIED),
            condemned: AtomicBool::new(false),
            gone: AtomicBool::new(false),
            reads: FileReads::default(),
        }
    }
}

/// A pack that is a log still.
pub(crate) struct OpenPack {
    pub(crate) pack: Arc<Pack>,
    pub(crate) pieces: RwLock<PieceMap>,
    pub(crate) scan: Mutex<Scan>,
    /// This process's writer appends to it: nothing of it needs scanning.
    pub(crate) ours: AtomicBool,
    /// Our writer left something out because this pack has it; so a sync must make it durable.
    pub(crate) relied_on: AtomicBool,
}

/// How far an open pack has been read, and what was found.
#[derive(Default)]
pub(crate) struct Scan {
    pub(crate) offset: u64,
    /// Size and time of change at the last look: unchanged means nothing new.
    seen: (u64, i64, i64),
    pub(crate) counts: Trailer,
}

/// A sealed pack that no merged index covers.
pub(crate) struct SealedPack {
    pub(crate) pack: Arc<Pack>,
    pub(crate) trailer: Trailer,
    pub(crate) footer: Footer,
}

/// A merged index, its packs resolved. `None`: the pack is gone.
pub(crate) struct Covering {
    pub(crate) name: String,
    pub(crate) merged: Merged,
    pub(crate) packs: Vec<Option<Arc<Pack>>>,
}

/// A snapshot.
#[derive(Clone, Default)]
pub(crate) struct State {
    pub(crate) packs: HashMap<PackId, Arc<Pack>>,
    pub(crate) open: Vec<Arc<OpenPack>>,
    pub(crate) sealed: Vec<Arc<SealedPack>>,
    pub(crate) merged: Vec<Arc<Covering>>,
}

/// Where a piece lies.
#[derive(Clone)]
pub(crate) struct Place {
    pub(crate) pack: Arc<Pack>,
    pub(crate) location: Location,
}

/// What the last listing saw; guards all changes of the state.
#[derive(Default)]
pub(crate) struct Listing {
    packs_time: Option<SystemTime>,
    index_time: Option<SystemTime>,
}

/// The shared part of a castore: readers and the writer stand on it.
pub(crate) struct Core {
    pub(crate) dir: PathBuf,
    pub(crate) options: OpenOptions,
    pub(crate) medium: Arc<dyn Medium>,
    state: RwLock<Arc<State>>,
    pub(crate) listing: Mutex<Listing>,
    next_serial: AtomicU32,
    pub(crate) frame_cache: Cache<(u32, u32), Arc<Frame>, ByBytes>,
    pub(crate) directory_cache: Cache<Digest, Arc<Directory>, ByBytes>,
    files: Cache<u32, Arc<File>>,
    /// Frames that were found damaged, by serial of the pack and offset. Their pieces are taken from
    /// elsewhere if there is another copy, and stored again when they are put again.
    bad_frames: RwLock<HashSet<(u32, u32)>>,
    any_bad: AtomicBool,
    pub(crate) counts: Sharded<ReadCounts>,
    pub(crate) leases: Leases,
    condemned: RwLock<Arc<Condemned>>,
    pub(crate) ahead: Ahead,
}

/// Locks, also after a panic elsewhere: what these locks guard is valid after each statement.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Core {
    pub(crate) fn open(
        dir: &Path,
        options: &OpenOptions,
        medium: Arc<dyn Medium>,
    ) -> Result<Arc<Self>, CastoreError> {
        let core = Arc::new(Self {
            dir: dir.to_owned(),
            options: options.clone(),
            medium,
            state: RwLock::default(),
            listing: Mutex::default(),
            next_serial: AtomicU32::new(0),
            frame_cache: cache(options.frame_cache_bytes_max, 2 * FRAME_RAW_BYTES as u64),
            directory_cache: cache(options.directory_cache_bytes_max, 1 << 10),
            files: Cache::new(PACK_FILES_MAX),
            bad_frames: RwLock::default(),
            any_bad: AtomicBool::new(false),
            counts: Sharded::default(),
            leases: Leases::default(),
            condemned: RwLock::default(),
            ahead: Ahead::default(),
        });
        core.refresh()?;
        if let Err(error) = core.tidy_index() {
            // The index is derived: without it lookups are slower, nothing is lost.
            tracing::warn!(%error, "merging the index failed");
        }
        Ok(core)
    }

    pub(crate) fn packs_dir(&self) -> PathBuf {
        self.dir.join(PACKS_DIR)
    }
    pub(crate) fn index_dir(&self) -> PathBuf {
        self.dir.join(INDEX_DIR)
    }
    pub(crate) fn state(&self) -> Arc<State> {
        Arc::clone(&self.state.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Changes the snapshot. The listing's lock is what serializes changes.
    pub(crate) fn set_state(&self, _listing: &Listing, state: State) {
        *self.state.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(state);
    }

    pub(crate) fn new_pack(&self, id: PackId) -> Arc<Pack> {
        let serial = self.next_serial.fetch_add(1, Ordering::Relaxed);
        let pack = Pack::new(id, serial, self.packs_dir().join(id.file_name()));
        pack.condemned
            .store(self.condemned().has(&id), Ordering::Release);
        Arc::new(pack)
    }

    /// The list of condemned packs as it was last read.
    pub(crate) fn condemned(&self) -> Arc<Condemned> {
        Arc::clone(
            &self
                .condemned
                .read()
                .unwrap_or_else(PoisonError::into_inner),
        )
    }

    pub(crate) fn set_condemned(&self, list: Condemned) {
        let list = Arc::new(list);
        let mut slot = self
            .condemned
            .write()
            .unwrap_or_else(PoisonError::into_inner);
        *slot = Arc::clone(&list);
        // Under the lock, so that the flags are those of the last list.
        for pack in self.state().packs.values() {
            pack.condemned.store(list.has(&pack.id), Ordering::Release);
        }
    }

    /// The descriptor of a pack, opened when first used.
    pub(crate) fn file(&self, pack: &Pack) -> Result<Arc<File>, CastoreError> {
        let file = self.files.get_or_insert_with(&pack.serial, || {
            let file = File::open(&pack.path).verb("opening", &pack.path)?;
            read_ahead::only_when_told(&file);
            Ok(Arc::new(file))
        });
        if pack.gone.load(Ordering::Acquire) {
            // Deleted meanwhile: a descriptor that is kept would keep its space.
            self.files.remove(&pack.serial);
        }
        file
    }

    /// Forgets a pack that was deleted, and closes its descriptor.
    fn forget(&self, pack: &Pack) {
        pack.gone.store(true, Ordering::Release);
        self.files.remove(&pack.serial);
    }

    /// Finds a piece in what this process knows of.
    pub(crate) fn find(&self, digest: &Digest, class: Class) -> Option<Place> {
        self.find_key(&Key::new(digest, class), false)
    }

    fn find_key(&self, key: &Key, for_writer: bool) -> Option<Place> {
        self.state().find(key, for_writer, &|place| {
            !self.is_bad(place) && (!for_writer || self.may_rely(&place.pack))
        })
    }

    fn may_rely(&self, pack: &Pack) -> bool {
        !pack.condemned.load(Ordering::Acquire) && self.rely(pack)
    }

    /// Finds a piece in a frame that is not known to be damaged; else, what there is.
    pub(crate) fn find_or_bad(&self, key: &Key) -> Option<Place> {
        self.find_key(key, false).or_else(|| {
            self.any_bad
                .load(Ordering::Relaxed)
                .then(|| self.state().find(key, false, &|_| true))
                .flatten()
        })
    }

    pub(crate) fn is_bad(&self, place: &Place) -> bool {
        self.any_bad.load(Ordering::Relaxed)
            && self
                .bad_frames
                .read()
                .unwrap_or_else(PoisonError::into_inner)
                .contains(&(place.pack.serial, place.location.frame_offset()))
    }

    /// True if a frame of the pack is known to be damaged.
    pub(crate) fn has_bad(&self, pack: &Pack) -> bool {
        self.bad_frames
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .iter()
            .any(|(serial, _)| *serial == pack.serial)
    }

    /// Notes that a frame is damaged.
    pub(crate) fn set_bad(&self, pack: &Pack, frame_offset: u32) {
        let mut bad = self
            .bad_frames
            .write()
            .unwrap_or_else(PoisonError::into_inner);
        if bad.len() < BAD_FRAMES_MAX {
            if bad.insert((pack.serial, frame_offset)) {
                self.counts.local().damaged_frames.bump();
            }
            self.any_bad.store(true, Ordering::Relaxed);
        }
    }

    /// Like [`Core::find`]; a miss looks at what others have written, and at last makes sure that
    /// the miss is not due to a damaged index.
    pub(crate) fn find_fresh(
        &self,
        digest: &Digest,
        class: Class,
    ) -> Result<Option<Place>, CastoreError> {
        self.find_fresh_of(digest, &[class])
    }

    /// Finds the root of a blob: data, a recipe, or else patches. As fresh as [`Core::find_fresh`].
    pub(crate) fn find_blob(&self, digest: &Digest) -> Result<Option<Place>, CastoreError> {
        self.find_fresh_of(digest, &BLOB_CLASSES)
    }

    /// Finds the root of a blob elsewhere than at `but`, in what this process knows of.
    pub(crate) fn find_other_blob(&self, digest: &Digest, but: &Place) -> Option<Place> {
        let other = |place: &Place| {
            let differs = place.pack.id != but.pack.id || place.location != but.location;
            differs && !self.is_bad(place)
        };
        let state = self.state();
        BLOB_CLASSES
            .iter()
            .find_map(|class| state.find(&Key::new(digest, *class), false, &other))
    }

    /// Like [`Core::find_fresh`], by the key.
    pub(crate) fn find_fresh_key(&self, key: &Key) -> Result<Option<Place>, CastoreError> {
        self.find_fresh_keys(&[*key])
    }

    fn find_fresh_of(
        &self,
        digest: &Digest,
        classes: &[Class],
    ) -> Result<Option<Place>, CastoreError> {
        let keys: Vec<Key> = classes
            .iter()
            .map(|class| Key::new(digest, *class))
            .collect();
        self.find_fresh_keys(&keys)
    }

    fn find_fresh_keys(&self, keys: &[Key]) -> Result<Option<Place>, CastoreError> {
        for _ in 0..LISTINGS_MAX {
            let found = keys.iter().find_map(|key| self.find_key(key, false));
            if let Some(place) = found {
                return Ok(Some(place));
            }
            // Nothing new: it is not there. A pack that went may have been written anew.
            if !self.refresh()? {
                break;
            }
        }
        self.drop_unsound_indexes()?;
        Ok(keys.iter().find_map(|key| self.find_or_bad(key)))
    }

    /// True if our writer need not store the piece again. The answer binds: a later sync makes
    /// durable what it relied on.
    pub(crate) fn has_for_writer(&self, key: &Key) -> bool {
        self.find_for_writer(key).is_some()
    }

    /// Where the piece lies that our writer need not store again.
    pub(crate) fn find_for_writer(&self, key: &Key) -> Option<Place> {
        self.find_key(key, true)
    }

    /// Takes over what other processes did. True if anything is new.
    pub(crate) fn refresh(&self) -> Result<bool, CastoreError> {
        let mut listing = lock(&self.listing);
        let packs_changed = changed(&self.packs_dir(), listing.packs_time)?;
        let index_changed = changed(&self.index_dir(), listing.index_time)?;
        let mut new = false;
        if packs_changed.is_some() || index_changed.is_some() {
            new |= self.list(&listing)?;
            let now = SystemTime::now();
            let trusted = |time: SystemTime| {
                now.duration_since(time)
                    .is_ok_and(|age| age > LISTING_TRUSTED_AFTER)
            };
            if let Some(time) = packs_changed {
                listing.packs_time = Some(time).filter(|time| trusted(*time));
            }
            if let Some(time) = index_changed {
                listing.index_time = Some(time).filter(|time| trusted(*time));
            }
        }
        new |= self.refresh_open(&listing)?;
        Ok(new)
    }

    /// Lists packs and index files and takes over what has come and gone.
    pub(crate) fn list(&self, listing: &Listing) -> Result<bool, CastoreError> {
        let mut new = false;
        for _ in 0..LISTINGS_MAX {
            let (is_new, is_whole) = self.list_once(listing)?;
            new |= is_new;
            if is_whole {
                break;
            }
            // A pack was deleted between its listing and its opening. What lived in it is in a pack
            // that was there before the deletion, but maybe not before the listing.
        }
        Ok(new)
    }

    /// Returns whether anything is new, and whether all packs that were listed are there still.
    fn list_once(&self, listing: &Listing) -> Result<(bool, bool), CastoreError> {
        let old = self.state();
        let mut state = (*old).clone();
        let mut new = false;
        let packs_dir = self.packs_dir();
        let mut found = HashSet::new();
        for entry in std::fs::read_dir(&packs_dir).verb("listing", &packs_dir)? {
            let name = entry.verb("listing", &packs_dir)?.file_name();
            if let Some(id) = name.to_str().and_then(PackId::from_file_name) {
                found.insert(id);
                state.packs.entry(id).or_insert_with(|| {
                    new = true;
                    self.new_pack(id)
                });
            }
        }
        let before = state.packs.len();
        state.packs.retain(|id, _| found.contains(id));
        new |= state.packs.len() != before;
        let listed = state.packs.len();
        state.open.retain(|open| found.contains(&open.pack.id));
        state
            .sealed
            .retain(|sealed| found.contains(&sealed.pack.id));

        let merged = self.list_merged(&state)?;
        let same = merged.len() == state.merged.len()
            && merged
                .iter()
                .zip(&state.merged)
                .all(|(a, b)| Arc::ptr_eq(a, b));
        if new || !same {
            new = true;
            state.merged = merged;
            self.place_packs(&mut state)?;
        }
        let is_whole = state.packs.len() == listed;
        if new {
            let gone: Vec<Arc<Pack>> = old
                .packs
                .values()
                .filter(|pack| !state.packs.contains_key(&pack.id))
                .cloned()
                .collect();
            self.set_state(listing, state);
            // Afterwards: what is found from now on lies elsewhere.
            gone.iter().for_each(|pack| self.forget(pack));
        }
        Ok((new, is_whole))
    }

    /// Opens the merged index files that are of use, reusing those that are open.
    fn list_merged(&self, state: &State) -> Result<Vec<Arc<Covering>>, CastoreError> {
        let dir = self.index_dir();
        let mut all: Vec<Arc<Covering>> = Vec::new();
        for name in list_names(&dir)? {
            if !name.ends_with(MERGED_SUFFIX) {
                continue;
            }
            let resolve = |merged: &Merged| -> Vec<Option<Arc<Pack>>> {
                merged
                    .packs()
                    .iter()
                    .map(|id| state.packs.get(id).cloned())
                    .collect()
            };
            if let Some(known) = state.merged.iter().find(|known| known.name == name)
                && known
                    .packs
                    .iter()
                    .zip(resolve(&known.merged))
                    .all(|(a, b)| a.is_some() == b.is_some())
            {
                all.push(Arc::clone(known));
                continue;
            }
            match Merged::open(&dir.join(&name)) {
                Ok(merged) => all.push(Arc::new(Covering {
                    packs: resolve(&merged),
                    name,
                    merged,
                })),
                Err(reason) => {
                    tracing::warn!(file = name, reason, "ignoring a merged index");
                }
            }
        }
        // The largest first: what covers nothing more is superseded.
        all.sort_by(|a, b| (b.packs.len(), &b.name).cmp(&(a.packs.len(), &a.name)));
        let mut covered = HashSet::new();
        all.retain(|covering| {
            let mut useful = false;
            for pack in covering.packs.iter().flatten() {
                useful |= covered.insert(pack.id);
            }
            useful
        });
        Ok(all)
    }

    /// Sorts packs into covered, sealed and open ones.
    pub(crate) fn place_packs(&self, state: &mut State) -> Result<(), CastoreError> {
        let covered: HashSet<PackId> = state
            .merged
            .iter()
            .flat_map(|covering| covering.packs.iter().flatten())
            .map(|pack| pack.id)
            .collect();
        state
            .sealed
            .retain(|sealed| !covered.contains(&sealed.pack.id));
        state.open.retain(|open| !covered.contains(&open.pack.id));
        let known: HashSet<PackId> = state
            .sealed
            .iter()
            .map(|sealed| sealed.pack.id)
            .chain(state.open.iter().map(|open| open.pack.id))
            .collect();
        let mut missing: Vec<Arc<Pack>> = state
            .packs
            .values()
            .filter(|pack| !covered.contains(&pack.id) && !known.contains(&pack.id))
            .cloned()
            .collect();
        missing.sort_by_key(|pack| pack.serial);
        for pack in missing {
            match self.open_sealed(&pack) {
                // Gone since it was listed.
                Err(error) if error.is_not_found() => {
                    state.packs.remove(&pack.id);
                }
                Err(error) => return Err(error),
                Ok(Some(sealed)) => state.sealed.push(Arc::new(sealed)),
                Ok(None) => state.open.push(Arc::new(OpenPack {
                    pack,
                    pieces: RwLock::default(),
                    scan: Mutex::new(Scan {
                        offset: PACK_HEADER_BYTES as u64,
                        ..Scan::default()
                    }),
                    ours: AtomicBool::new(false),
                    relied_on: AtomicBool::new(false),
                })),
            }
        }
        Ok(())
    }

    /// Opens a pack as sealed, if it is.
    pub(crate) fn open_sealed(&self, pack: &Arc<Pack>) -> Result<Option<SealedPack>, CastoreError> {
        let file = File::open(&pack.path).verb("opening", &pack.path)?;
        let len = file.metadata().verb("reading", &pack.path)?.len();
        let Some(trailer) = scan::trailer(&file, &pack.path, len)? else {
            return Ok(None);
        };
        Ok(Some(SealedPack {
            footer: Footer::map(&file, &pack.path, &trailer)?,
            pack: Arc::clone(pack),
            trailer,
        }))
    }

    /// Reads what open packs of others have gained, and notices those that were sealed.
    fn refresh_open(&self, listing: &Listing) -> Result<bool, CastoreError> {
        let mut new = false;
        let mut sealed_now = Vec::new();
        for open in &self.state().open {
            if open.ours.load(Ordering::Acquire) {
                continue;
            }
            let mut scan = lock(&open.scan);
            let path = &open.pack.path;
            let metadata = match std::fs::metadata(path) {
                Ok(metadata) => metadata,
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => continue,
                Err(error) => return Err(CastoreError::io("reading", path, error)),
            };
            let len = metadata.len();
            // The time as well: a failed append that was cut off and a new one may agree in size.
            let seen = (len, metadata.mtime(), metadata.mtime_nsec());
            if seen == scan.seen {
                continue;
            }
            match self.open_sealed(&open.pack) {
                Ok(Some(sealed)) => {
                    sealed_now.push(Arc::new(sealed));
                    continue;
                }
                Ok(None) => {}
                Err(error) if error.is_not_found() => continue,
                Err(error) => return Err(error),
            }
            match self.scan_open(open, &mut scan, len) {
                Ok(found) => new |= found,
                Err(error) if error.is_not_found() => continue,
                Err(error) => return Err(error),
            }
            scan.seen = seen;
        }
        if !sealed_now.is_empty() {
            new = true;
            let mut state = (*self.state()).clone();
            for sealed in sealed_now {
                state.open.retain(|open| open.pack.id != sealed.pack.id);
                state.sealed.push(sealed);
            }
            self.set_state(listing, state);
        }
        Ok(new)
    }

    /// Indexes complete frames of an open pack from where the last scan ended.
    fn scan_open(&self, open: &OpenPack, scan: &mut Scan, len: u64) -> Result<bool, CastoreError> {
        let path = &open.pack.path;
        let file = self.file(&open.pack)?;
        let mut new = false;
        if len < PACK_HEADER_BYTES as u64 {
            return Ok(false);
        }
        let mut from = scan.offset;
        loop {
            let mut counts = scan.counts;
            let (end, tail) = scan::frames(&file, path, from, len, u64::MAX, &mut |frame| {
                let mut pieces = open.pieces.write().unwrap_or_else(PoisonError::into_inner);
                counts.count(&frame.header, &frame.pieces);
                index_frame(&mut pieces, &frame);
                new = true;
                Ok(())
            })?;
            scan.counts = counts;
            scan.offset = end;
            match tail {
                Tail::Damaged { next, reason } => {
                    tracing::warn!(
                        pack = %open.pack.id, offset = end, next, reason,
                        "an open pack is damaged"
                    );
                    from = next;
                }
                Tail::Clean | Tail::Torn(_) => break,
            }
        }
        Ok(new)
    }

    /// Puts a new pack of our writer into the state.
    pub(crate) fn add_own(&self, open: Arc<OpenPack>) {
        let listing = lock(&self.listing);
        let mut state = (*self.state()).clone();
        state.packs.insert(open.pack.id, Arc::clone(&open.pack));
        state.open.retain(|known| known.pack.id != open.pack.id);
        state.open.push(open);
        self.set_state(&listing, state);
    }

    /// Puts our writer's pack among the sealed ones.
    pub(crate) fn own_sealed(&self, sealed: SealedPack) {
        let listing = lock(&self.listing);
        let mut state = (*self.state()).clone();
        state.open.retain(|open| open.pack.id != sealed.pack.id);
        state.sealed.retain(|known| known.pack.id != sealed.pack.id);
        state.sealed.push(Arc::new(sealed));
        self.set_state(&listing, state);
    }

    /// Verifies the checksums of all indexes and replaces those that are damaged. True if any was.
    pub(crate) fn drop_unsound_indexes(&self) -> Result<bool, CastoreError> {
        let state = self.state();
        let unsound = |state: &State| {
            state
                .merged
                .iter()
                .any(|covering| !covering.merged.is_sound())
                || state.sealed.iter().any(|sealed| !sealed.footer.is_sound())
        };
        if !unsound(&state) {
            return Ok(false);
        }
        let listing = lock(&self.listing);
        let mut state = (*self.state()).clone();
        state.merged.retain(|covering| {
            let sound = covering.merged.is_sound();
            if !sound {
                tracing::warn!(file = covering.name, "a merged index is damaged");
                if !self.options.read_only {
                    let _ = self.medium.remove(&self.index_dir().join(&covering.name));
                }
            }
            sound
        });
        self.place_packs(&mut state)?;
        for sealed in &mut state.sealed {
            if !sealed.footer.is_sound() {
                tracing::warn!(pack = %sealed.pack.id, "the footer of a pack is damaged");
                *sealed = Arc::new(SealedPack {
                    pack: Arc::clone(&sealed.pack),
                    trailer: sealed.trailer,
                    footer: Footer::Scanned(self.scan_sealed(&sealed.pack, &sealed.trailer)?.0),
                });
            }
        }
        self.set_state(&listing, state);
        Ok(true)
    }

    /// Makes a sealed pack's index from its frames; tells whether all of them were sound.
    pub(crate) fn scan_sealed(
        &self,
        pack: &Pack,
        trailer: &Trailer,
    ) -> Result<(PieceMap, bool), CastoreError> {
        let file = self.file(pack)?;
        let mut pieces = PieceMap::default();
        let mut from = PACK_HEADER_BYTES as u64;
        let mut sound = true;
        loop {
            let end = trailer.footer_offset;
            let (_, tail) = scan::frames(&file, &pack.path, from, end, u64::MAX, &mut |frame| {
                index_frame(&mut pieces, &frame);
                Ok(())
            })?;
            match tail {
                Tail::Clean => return Ok((pieces, sound)),
                Tail::Torn(_) => return Ok((pieces, false)),
                Tail::Damaged { next, .. } => {
                    sound = false;
                    from = next;
                }
            }
        }
    }

    /// Allocated bytes of all packs, and of all index files.
    pub(crate) fn disk_bytes(&self) -> Result<(u64, u64), CastoreError> {
        let sum = |dir: &Path| -> Result<u64, CastoreError> {
            let mut bytes = 0;
            for entry in std::fs::read_dir(dir).verb("listing", dir)? {
                match entry.and_then(|entry| entry.metadata()) {
                    Ok(metadata) => bytes += metadata.blocks() * 512,
                    Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
                    Err(error) => return Err(CastoreError::io("listing", dir, error)),
                }
            }
            Ok(bytes)
        };
        Ok((sum(&self.packs_dir())?, sum(&self.index_dir())?))
    }
}

impl State {
    /// Finds a piece at a place that `accept` takes.
    pub(crate) fn find(
        &self,
        key: &Key,
        for_writer: bool,
        accept: &dyn Fn(&Place) -> bool,
    ) -> Option<Place> {
        let place = |pack: &Arc<Pack>, location: Location| {
            let place = Place {
                pack: Arc::clone(pack),
                location,
            };
            accept(&place).then_some(place)
        };
        for open in &self.open {
            let pieces = open.pieces.read().unwrap_or_else(PoisonError::into_inner);
            if let Some(location) = pieces.get(key)
                && let Some(place) = place(&open.pack, *location)
            {
                if for_writer {
                    open.relied_on.store(true, Ordering::Release);
                }
                return Some(place);
            }
        }
        for sealed in &self.sealed {
            if let Some(location) = sealed.footer.find(key)
                && let Some(place) = place(&sealed.pack, location)
            {
                return Some(place);
            }
        }
        for covering in &self.merged {
            let found = covering
                .merged
                .find(key)
                .find_map(|(slot, location)| place(covering.packs.get(slot)?.as_ref()?, location));
            if found.is_some() {
                return found;
            }
        }
        None
    }
}

/// Calls `each` for every piece of a frame.
pub(crate) fn for_pieces(frame: &scan::Scanned, each: &mut dyn FnMut(Key, Location)) {
    let mut offset = 0;
    for piece in &frame.pieces {
        let location = Location::new(
            frame.offset as u32,
            frame.header.frame_len(),
            piece.kind,
            offset,
            piece.len,
        );
        each(piece.key(), location);
        offset += piece.len;
    }
}

/// Puts the pieces of a frame into a map. The last place of a piece stays: one pack has a piece
/// twice only if the first was found damaged.
pub(crate) fn index_frame(pieces: &mut PieceMap, frame: &scan::Scanned) {
    for_pieces(frame, &mut |key, location| {
        pieces.insert(key, location);
    });
}

/// The time of a directory's last change, unless it is the known one.
fn changed(dir: &Path, known: Option<SystemTime>) -> Result<Option<SystemTime>, CastoreError> {
    match std::fs::metadata(dir).and_then(|metadata| metadata.modified()) {
        Ok(time) => Ok((Some(time) != known).then_some(time)),
        // A castore on read-only media may come without derived files.
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(CastoreError::io("reading", dir, error)),
    }
}

pub(crate) fn list_names(dir: &Path) -> Result<Vec<String>, CastoreError> {
    let entries = match std::fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(CastoreError::io("listing", dir, error)),
    };
    let mut names = Vec::new();
    for entry in entries {
        if let Ok(name) = entry.verb("listing", dir)?.file_name().into_string() {
            names.push(name);
        }
    }
    names.sort();
    Ok(names)
}

/// Sixteen random bytes.
pub(crate) fn random_id() -> Result<[u8; 16], CastoreError> {
    let mut id = [0; 16];
    getrandom::fill(&mut id).map_err(|error| {
        CastoreError::io(
            "reading",
            Path::new("/dev/urandom"),
            std::io::Error::other(error.to_string()),
        )
    })?;
    Ok(id)
}
