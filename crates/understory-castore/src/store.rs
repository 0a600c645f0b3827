//! The castore on disk: packs, their index, readers and the writer.
//!
//! Several processes may have one castore open, each with at most one writer. A reader sees
//! what any writer has synced after [`Castore::refresh`]; lookups that miss refresh by themselves.
//!
//! ```text
//! DIR/castore                 "understory castore 1\n"
//! DIR/packs/<32 hex>.pack     all content
//! DIR/index/                  derived: may be deleted at any time while nobody writes
//! DIR/leases/                 what living writers stand on: see `lease.rs`
//! DIR/condemned               packs that a collection is about to delete: see `condemned.rs`
//! ```
//! Which write publishes: see `log.rs`. What derived files are: see `index.rs`.

use crate::core::{Core, INDEX_DIR, PACKS_DIR, lock};
use crate::counters::{Counter, Counters, ReadCounts};
use crate::error::IoContext;
use crate::medium::{Medium, Os};
use crate::pack::{Class, Kind};
use crate::{CastoreError, Digest, Directory, Node};
use std::io::Write;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

pub use crate::blob::Blob;
pub use crate::gc::{CollectOptions, CollectReport, CollectStep, KeptPacks, Roots};
pub use crate::scrub::Damage;
pub use crate::writer::{Writer, WriterCounters};

const VERSION_FILE: &str = "castore";
const VERSION: u32 = 1;
const VERSION_PREFIX: &str = "understory castore ";
/// Bytes at which a pack is sealed: what one PUT to object storage should be.
const PACK_BYTES: u64 = 256 << 20;

/// How often [`Castore::keep_fresh`] looks. A collection waits for longer than that.
const KEEP_FRESH_EVERY: Duration = Duration::from_millis(700);

/// How to open a castore.
#[derive(Debug, Clone)]
pub struct OpenOptions {
    /// Nothing is created, locked or written; works on read-only media.
    pub read_only: bool,
    /// Bytes of decompressed frames kept in memory.
    pub frame_cache_bytes_max: u64,
    /// Bytes of decoded directories kept in memory.
    pub directory_cache_bytes_max: u64,
    /// zstd level for new frames, 1 to 19.
    pub compression_level: i32,
    /// Threads that compress; 0 = all cores.
    pub compress_threads: usize,
    /// Bytes at which a pack is sealed and a new one begun; 4 KiB to just below 4 GiB.
    pub pack_bytes_max: u64,
    /// Masks hash parts in new files, if the builder of a tree is told which; what is stored masked is
    /// read in any case.
    pub mask_hash_parts: bool,
}

impl Default for OpenOptions {
    fn default() -> Self {
        Self {
            read_only: false,
            frame_cache_bytes_max: 16 << 20,
            directory_cache_bytes_max: 8 << 20,
            compression_level: 3,
            compress_threads: 0,
            pack_bytes_max: PACK_BYTES,
            mask_hash_parts: true,
        }
    }
}

/// An open castore. Cheap to clone; all methods take `&self` and may be called from many threads.
#[derive(Clone)]
pub struct Castore {
    inner: Arc<Inner>,
}

struct Inner {
    core: Arc<Core>,
    writer: Mutex<Option<Arc<Writer>>>,
    /// What writers did that were replaced.
    replaced: Mutex<WriterCounters>,
    /// Ends the thread of [`Castore::keep_fresh`] when it is dropped.
    keeper: Mutex<Option<crossbeam_channel::Sender<()>>>,
}

impl Castore {
    /// Creates an empty castore in `dir` (made if absent, must be empty of a castore).
    ///
    /// # Errors
    /// I/O, or there is one already.
    pub fn create(dir: &Path) -> Result<(), CastoreError> {
        let version_file = dir.join(VERSION_FILE);
        for dir in [dir, &dir.join(PACKS_DIR), &dir.join(INDEX_DIR)] {
            std::fs::create_dir_all(dir).verb("creating", dir)?;
        }
        if version_file.exists() {
            return Err(CastoreError::Invalid(format!(
                "there is a castore in {} already",
                dir.display()
            )));
        }
        // The version file comes last and whole: it makes the directory a castore.
        let temporary = dir.join(format!("{VERSION_FILE}.tmp-{}", std::process::id()));
        let write = || -> std::io::Result<()> {
            let mut file = std::fs::File::create(&temporary)?;
            writeln!(file, "{VERSION_PREFIX}{VERSION}")?;
            file.sync_all()
        };
        write().verb("writing", &temporary)?;
        std::fs::rename(&temporary, &version_file).verb("renaming", &temporary)?;
        Os.sync_dir(dir).verb("syncing", dir)
    }

    /// Opens the castore in `dir`.
    ///
    /// # Errors
    /// None there, unknown version, I/O.
    pub fn open(dir: &Path, options: &OpenOptions) -> Result<Self, CastoreError> {
        Self::open_on(dir, options, Arc::new(Os))
    }

    /// Opens a castore above a given medium.
    pub(crate) fn open_on(
        dir: &Path,
        options: &OpenOptions,
        medium: Arc<dyn Medium>,
    ) -> Result<Self, CastoreError> {
        check_version(dir)?;
        Ok(Self {
            inner: Arc::new(Inner {
                core: Core::open(dir, options, medium)?,
                writer: Mutex::default(),
                keeper: Mutex::default(),
                replaced: Mutex::default(),
            }),
        })
    }

    /// True if a blob or directory of that digest is stored (what this process knows of; does not refresh).
    pub fn contains(&self, digest: &Digest) -> bool {
        *digest == Digest::EMPTY
            || self.core().find(digest, Class::Blob).is_some()
            || self.core().find(digest, Class::Patched).is_some()
            || self.core().find(digest, Class::Directory).is_some()
    }

    /// Reads a directory (cached).
    ///
    /// # Errors
    /// Missing, corrupt, I/O.
    pub fn directory(&self, digest: &Digest) -> Result<Arc<Directory>, CastoreError> {
        let core = self.core();
        if *digest == Digest::EMPTY {
            return Ok(Arc::default());
        }
        if let Some(directory) = core.directory_cache.get(digest) {
            core.counts.local().directory_hits.bump();
            return Ok(directory);
        }
        core.counts.local().directory_misses.bump();
        let place = core
            .find_fresh(digest, Class::Directory)?
            .ok_or(CastoreError::Missing {
                kind: "directory",
                digest: *digest,
            })?;
        let bytes = core.piece_of_kind(&place, digest, Kind::Directory)?;
        let directory = Directory::decode(&bytes).map_err(|error| match error {
            CastoreError::Corrupt { reason, .. } => {
                CastoreError::corrupt(format!("directory {digest}"), reason)
            }
            other => other,
        })?;
        let directory = Arc::new(directory);
        core.directory_cache.insert(*digest, Arc::clone(&directory));
        Ok(directory)
    }

    /// Opens a blob. `size` is the size the node states; a disagreement is corruption.
    ///
    /// # Errors
    /// Missing, corrupt, I/O.
    pub fn blob(&self, digest: &Digest, size: u64) -> Result<Blob, CastoreError> {
        Blob::open(self.core(), digest, size)
    }

    /// Looks at what other processes have written since. True if there was something new.
    ///
    /// # Errors
    /// I/O, corrupt pack.
    pub fn refresh(&self) -> Result<bool, CastoreError> {
        self.core().refresh()
    }

    /// Looks on from now on, for as long as this castore is open: a process that lives long and does little
    /// else closes packs that others deleted, so that their space comes free, and leaves its open pack to a
    /// collection that others begin, if nothing is under way. One thread, two `stat` calls a second.
    ///
    /// # Errors
    /// The thread cannot be started.
    pub fn keep_fresh(&self) -> Result<(), CastoreError> {
        let inner = Arc::downgrade(&self.inner);
        let mut slot = lock(&self.inner.keeper);
        if slot.is_some() {
            return Ok(());
        }
        let (stop, stopped) = crossbeam_channel::bounded::<()>(0);
        std::thread::Builder::new()
            .name("castore-fresh".to_owned())
            .spawn(move || {
                while stopped.recv_timeout(KEEP_FRESH_EVERY)
                    == Err(crossbeam_channel::RecvTimeoutError::Timeout)
                    && let Some(inner) = inner.upgrade()
                {
                    let castore = Self { inner };
                    if let Err(error) = castore.look_on() {
                        tracing::debug!(%error, "looking at what others did to the castore");
                    }
                }
            })
            .verb("starting a thread for", &self.core().dir)?;
        *slot = Some(stop);
        Ok(())
    }

    fn look_on(&self) -> Result<(), CastoreError> {
        let core = self.core();
        core.refresh()?;
        if let Some(writer) = self.idle_writer()
            && writer.has_pack()
            && core.leases.is_idle()
            && core.is_collecting()?
        {
            writer.give_up_pack()?;
        }
        Ok(())
    }

    /// The writer of this process, made at first use. One that has failed is replaced, so that a
    /// long-lived process recovers when, say, there is space again.
    ///
    /// # Errors
    /// Opened read-only, I/O.
    pub fn writer(&self) -> Result<Arc<Writer>, CastoreError> {
        if self.core().options.read_only {
            return Err(CastoreError::Invalid(
                "the castore is open read-only".to_owned(),
            ));
        }
        let mut slot = lock(&self.inner.writer);
        if let Some(writer) = &*slot
            && !writer.is_poisoned()
        {
            return Ok(Arc::clone(writer));
        }
        // The failed one first: its pack may be adopted once nobody else uses it.
        if let Some(failed) = slot.take() {
            lock(&self.inner.replaced).add(&failed.counters());
        }
        let writer = Arc::new(Writer::new(self.core())?);
        *slot = Some(Arc::clone(&writer));
        Ok(writer)
    }

    /// What the bytes on disk are, by kind of piece. Reads the indexes of all packs; `progress` gets
    /// (packs done, packs in all).
    ///
    /// # Errors
    /// I/O, a damaged pack.
    pub fn breakdown(
        &self,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<crate::Breakdown, CastoreError> {
        crate::breakdown::breakdown(self.core(), progress)
    }

    /// What this castore has done in this process. Waits for nothing but a writer that is being made.
    pub fn counters(&self) -> Counters {
        let core = self.core();
        let slot = lock(&self.inner.writer);
        let mut writer = *lock(&self.inner.replaced);
        if let Some(current) = &*slot {
            writer.add(&current.counters());
        }
        drop(slot);
        let sum = |number: fn(&ReadCounts) -> &Counter| core.counts.sum(|c| number(c).get());
        Counters {
            frame_hits: sum(|c| &c.frame_hits),
            frame_misses: sum(|c| &c.frame_misses),
            read_bytes: sum(|c| &c.read_bytes),
            decompressed_bytes: sum(|c| &c.decompressed_bytes),
            directory_hits: sum(|c| &c.directory_hits),
            directory_misses: sum(|c| &c.directory_misses),
            damaged_frames: sum(|c| &c.damaged_frames),
            frame_cache_bytes: core.frame_cache.weight(),
            directory_cache_bytes: core.directory_cache.weight(),
            writer,
        }
    }

    /// Sizes and counts.
    ///
    /// # Errors
    /// I/O.
    pub fn stats(&self) -> Result<Stats, CastoreError> {
        let core = self.core();
        core.refresh()?;
        let mut stats = Stats::default();
        let state = core.state();
        let mut counted = std::collections::HashSet::new();
        for open in &state.open {
            counted.insert(open.pack.id);
            stats.count(&lock(&open.scan).counts);
        }
        for sealed in &state.sealed {
            counted.insert(sealed.pack.id);
            stats.count(&sealed.trailer);
        }
        for (id, pack) in &state.packs {
            if counted.contains(id) {
                continue;
            }
            match core.open_sealed(pack) {
                Ok(Some(sealed)) => stats.count(&sealed.trailer),
                Ok(None) => {}
                // Collected meanwhile.
                Err(error) if error.is_not_found() => {}
                Err(error) => return Err(error),
            }
        }
        let (packs, index) = core.disk_bytes()?;
        stats.disk_bytes = packs + index;
        stats.index_bytes = index;
        Ok(stats)
    }

    /// Reads every frame of every pack and verifies checksums and the digest of every piece.
    /// `progress` gets (bytes done, bytes in all). `damaged` gets each finding; scrubbing goes on.
    ///
    /// # Errors
    /// I/O only; damage is told to `damaged`.
    pub fn scrub(
        &self,
        progress: &mut dyn FnMut(u64, u64),
        damaged: &mut dyn FnMut(Damage),
    ) -> Result<(), CastoreError> {
        crate::scrub::scrub(self.core(), progress, damaged)
    }

    /// Drops every derived index file and makes it anew from the packs.
    ///
    /// # Errors
    /// I/O.
    pub fn rebuild_index(&self) -> Result<(), CastoreError> {
        self.core().rebuild_index()
    }

    /// Reads a whole blob and compares its BLAKE3 with `digest`.
    ///
    /// # Errors
    /// Missing, corrupt, I/O.
    pub fn verify_blob(&self, digest: &Digest, size: u64) -> Result<(), CastoreError> {
        self.blob(digest, size)?.verify()
    }

    /// A tree that a builder of this castore finished is published: a row that a collection looks at
    /// needs it from now on. Or it never will be. Either way this process does not keep it any more.
    pub fn release(&self, root: &Node) {
        self.core().release(root);
    }

    /// The writer, if there is one.
    pub(crate) fn idle_writer(&self) -> Option<Arc<Writer>> {
        lock(&self.inner.writer).clone()
    }

    pub(crate) fn core(&self) -> &Arc<Core> {
        &self.inner.core
    }
}

fn check_version(dir: &Path) -> Result<(), CastoreError> {
    let path = dir.join(VERSION_FILE);
    let text = match std::fs::read(&path) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            return Err(CastoreError::NotACastore {
                path: dir.to_owned(),
            });
        }
        Err(error) => return Err(CastoreError::io("reading", &path, error)),
    };
    let found = std::str::from_utf8(&text)
        .ok()
        .and_then(|text| text.strip_prefix(VERSION_PREFIX))
        .and_then(|rest| rest.strip_suffix('\n'))
        .and_then(|number| number.parse().ok())
        .ok_or_else(|| {
            CastoreError::corrupt(
                format!("version file {}", path.display()),
                format!(
                    "expected `{VERSION_PREFIX}{VERSION}`, found `{}`",
                    text[..text.len().min(64)].escape_ascii()
                ),
            )
        })?;
    if found == VERSION {
        Ok(())
    } else {
        Err(CastoreError::Version {
            path: dir.to_owned(),
            found,
            known: VERSION,
        })
    }
}

/// Figures about a castore.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Stats {
    /// Packs, sealed and open.
    pub packs: u64,
    /// Frames in them.
    pub frames: u64,
    /// Pieces that hold file data (whole small files and chunks).
    pub data_pieces: u64,
    /// Directories.
    pub directories: u64,
    /// Chunk lists of large files.
    pub recipes: u64,
    /// Uncompressed bytes of all pieces.
    pub raw_bytes: u64,
    /// Compressed bytes of all frames, without headers.
    pub stored_bytes: u64,
    /// Bytes of pack and index files on disk (allocated).
    pub disk_bytes: u64,
    /// Bytes of derived index files, also in `disk_bytes`.
    pub index_bytes: u64,
}

impl Stats {
    fn count(&mut self, pack: &crate::pack::Trailer) {
        self.packs += 1;
        self.frames += u64::from(pack.frames);
        self.data_pieces += u64::from(pack.data_pieces);
        self.directories += u64::from(pack.directories);
        self.recipes += u64::from(pack.recipes);
        self.raw_bytes += pack.raw_bytes;
        self.stored_bytes += pack.stored_bytes;
    }
}
