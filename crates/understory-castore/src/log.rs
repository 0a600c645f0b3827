//! The writer's open pack: an append-only log, locked by its writing process.
//!
//! **What publishes.** A frame counts as stored as soon as all of its bytes are in the file: the
//! header's checksum and the length tell. It is durable after [`Log::sync`] (`fdatasync`). A pack
//! appears by the rename of a file that is locked, has its header and is synced. A seal syncs the
//! frames first, then writes footer and trailer, then syncs again: a trailer never vouches for frames
//! that a power cut may take. Nothing else in the castore is needed to read it back.
//!
//! **After a crash** a new writer adopts unlocked open packs: it verifies every frame, payloads
//! included (after a power cut a header may have survived its payload), and cuts a torn tail. Where a
//! sound frame follows the bad place it is damage, not a torn tail: such a pack is left as it is.
//!
//! **The mark** `index/<pack id>.synced` says how much of an open pack is durable; it is written after
//! each sync. What lies below it needs no second verification after a crash, and a bad frame below it
//! is damage whatever follows. It is derived: without it, everything is verified.
//!
//! **After an error** the pack is cut back to its last good frame and the writer is poisoned.

use crate::core::{Core, OpenPack, SealedPack, index_frame, lock, random_id};
use crate::error::{CastoreError, IoContext};
use crate::index::{Footer, PieceMap};
use crate::pack::{
    self, FRAME_RAW_BYTES_MAX, FrameHeader, PACK_HEADER_BYTES, PackId, Piece, TRAILER_BYTES,
    Trailer,
};
use crate::scan::{self, Scanned, Tail};
use std::fs::{File, TryLockError};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use xxhash_rust::xxh3::xxh3_64;

/// Pieces of one pack: its map takes 16 MiB while it is open.
pub(crate) const PACK_PIECES_MAX: u32 = 262_144;
/// Offsets of frames have 32 bits.
const PACK_BYTES_MAX: u64 = (u32::MAX as u64) - 2 * FRAME_RAW_BYTES_MAX as u64;
const PACK_BYTES_MIN: u64 = 4096;
const TEMPORARY_SUFFIX: &str = ".tmp";
pub(crate) const MARK_SUFFIX: &str = ".synced";
const MARK_BYTES: usize = 32;

pub(crate) struct Log {
    core: Arc<Core>,
    current: Option<Current>,
    /// Frames appended, and one for an adopted pack: all up to the last sync are durable.
    appended: u64,
}

/// The file that must be synced for what was appended.
pub(crate) struct ToSync {
    pub(crate) file: Arc<File>,
    pub(crate) open: Arc<OpenPack>,
    /// Its length.
    pub(crate) len: u64,
}

struct Current {
    open: Arc<OpenPack>,
    file: Arc<File>,
    len: u64,
    counts: Trailer,
}

impl Log {
    /// Takes over what writers before have left open.
    pub(crate) fn open(core: &Arc<Core>) -> Result<Self, CastoreError> {
        let mut log = Self {
            core: Arc::clone(core),
            current: None,
            appended: 0,
        };
        core.refresh()?;
        core.remove_temporaries()?;
        log.current = log.adopt_any()?;
        Ok(log)
    }

    /// Takes over an open pack that nobody holds. What a crash left of the others is mended, too.
    fn adopt_any(&mut self) -> Result<Option<Current>, CastoreError> {
        let mut adopted: Option<Current> = None;
        for open in &self.core.state().open {
            if !open.ours.load(Ordering::Acquire)
                && let Some(current) = self.adopt(open)?
                && adopted.is_none()
            {
                current.open.ours.store(true, Ordering::Release);
                adopted = Some(current);
                // What it has may not be durable.
                self.appended += 1;
            }
        }
        Ok(adopted)
    }

    /// Locks, verifies and mends an open pack. `None` if it is another's, sealed or damaged.
    fn adopt(&self, open: &Arc<OpenPack>) -> Result<Option<Current>, CastoreError> {
        let path = &open.pack.path;
        let opened = File::options().read(true).write(true).open(path);
        let file = match opened {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(CastoreError::io("opening", path, error)),
        };
        if !try_lock(&file, path)? {
            return Ok(None);
        }
        let metadata = file.metadata().verb("reading", path)?;
        // A collector had it, and has deleted it, or will.
        self.core.look_at_condemned()?;
        if metadata.nlink() == 0 || self.core.condemned().has(&open.pack.id) {
            return Ok(None);
        }
        let len = metadata.len();
        if scan::trailer(&file, path, len)?.is_some() {
            return Ok(None);
        }
        if let Err(reason) = scan::check_header(&file, path, open.pack.id, len)? {
            tracing::error!(pack = %open.pack.id, reason, "not appending to a damaged pack");
            return Ok(None);
        }
        let mut pieces = PieceMap::default();
        let mut counts = Trailer::default();
        let start = PACK_HEADER_BYTES as u64;
        let marked = read_mark(&self.core, open.pack.id);
        let (end, tail) = scan::frames(&file, path, start, len, marked, &mut |frame| {
            counts.count(&frame.header, &frame.pieces);
            index_frame(&mut pieces, &frame);
            Ok(())
        })?;
        match tail {
            _ if end < marked => {
                tracing::error!(
                    pack = %open.pack.id, expected = marked, found = end,
                    "not appending to a pack that has lost synced frames"
                );
                return Ok(None);
            }
            Tail::Clean => {}
            Tail::Torn(reason) => {
                tracing::warn!(
                    pack = %open.pack.id, offset = end, bytes = len - end, reason,
                    "cutting a torn tail"
                );
                self.core
                    .medium
                    .truncate(&file, path, end)
                    .verb("cutting", path)?;
            }
            Tail::Damaged { reason, next } => {
                tracing::error!(
                    pack = %open.pack.id, offset = end, next, reason,
                    "not appending to a damaged pack"
                );
                return Ok(None);
            }
        }
        let mut scan = lock(&open.scan);
        *open.pieces.write().unwrap_or_else(PoisonError::into_inner) = pieces;
        scan.offset = end;
        scan.counts = counts;
        drop(scan);
        Ok(Some(Current {
            open: Arc::clone(open),
            file: Arc::new(file),
            len: end,
            counts,
        }))
    }

    /// Makes an empty pack.
    fn create(&self) -> Result<Current, CastoreError> {
        let medium = &*self.core.medium;
        let (id, file, temporary) = self.core.create_temporary()?;
        let pack = self.core.new_pack(id);
        let path = &pack.path;
        let dir = self.core.packs_dir();
        let made = (|| {
            medium
                .write_all_at(
                    &file,
                    &temporary,
                    &pack::encode_pack_header(id, pack::PACK_VERSION),
                    0,
                )
                .verb("writing", &temporary)?;
            medium
                .sync_data(&file, &temporary)
                .verb("syncing", &temporary)?;
            medium
                .rename(&temporary, path)
                .verb("renaming", &temporary)?;
            medium.sync_dir(&dir).verb("syncing", &dir)
        })();
        if let Err(error) = made {
            let _ = medium.remove(&temporary);
            return Err(error);
        }
        let open = Arc::new(OpenPack {
            pack,
            pieces: RwLock::default(),
            scan: Mutex::default(),
            ours: AtomicBool::new(true),
            relied_on: AtomicBool::new(false),
        });
        self.core.add_own(Arc::clone(&open));
        Ok(Current {
            open,
            file: Arc::new(file),
            len: PACK_HEADER_BYTES as u64,
            counts: Trailer::default(),
        })
    }

    /// Appends a frame and makes its pieces known. Returns true if the pack was sealed by it.
    pub(crate) fn append(
        &mut self,
        frame: &[u8],
        header: FrameHeader,
        pieces: Vec<Piece>,
    ) -> Result<bool, CastoreError> {
        let mut current = match self.current.take() {
            Some(current) => current,
            None => match self.adopt_any()? {
                Some(current) => current,
                None => self.create()?,
            },
        };
        let path = &current.open.pack.path;
        let medium = &*self.core.medium;
        if let Err(error) = self.core.rely_on_own(&current.open.pack) {
            self.current = Some(current);
            return Err(error);
        }
        if let Err(error) = medium.write_all_at(&current.file, path, frame, current.len) {
            let error = CastoreError::io("writing", path, error);
            cut(medium, &current);
            self.current = Some(current);
            return Err(error);
        }
        let scanned = Scanned {
            offset: current.len,
            header,
            pieces,
        };
        current.counts.count(&header, &scanned.pieces);
        current.len += frame.len() as u64;
        self.appended += 1;
        index_frame(
            &mut current
                .open
                .pieces
                .write()
                .unwrap_or_else(PoisonError::into_inner),
            &scanned,
        );
        {
            let mut scan = lock(&current.open.scan);
            scan.offset = current.len;
            scan.counts = current.counts;
        }
        let full = current.len >= pack_bytes_max(&self.core)
            || current.counts.pieces + pack::FRAME_PIECES_MAX as u32 > PACK_PIECES_MAX;
        if !full {
            self.current = Some(current);
            return Ok(false);
        }
        match self.seal(&current) {
            Ok(()) => Ok(true),
            Err(error) => {
                cut(medium_of(&self.core), &current);
                self.current = Some(current);
                Err(error)
            }
        }
    }

    fn seal(&self, current: &Current) -> Result<(), CastoreError> {
        let path = &current.open.pack.path;
        let medium = &*self.core.medium;
        medium
            .sync_data(&current.file, path)
            .verb("syncing", path)?;
        // The map has each piece once; a pack that was adopted may hold one twice.
        let pieces: Vec<_> = {
            let pieces = current
                .open
                .pieces
                .read()
                .unwrap_or_else(PoisonError::into_inner);
            pieces.iter().map(|(key, at)| (*key, *at)).collect()
        };
        let trailer = Trailer {
            footer_offset: current.len,
            pieces: pieces.len() as u32,
            ..current.counts
        };
        let mut end = pack::encode_footer(pieces);
        let trailer = Trailer {
            footer_checksum: xxh3_64(&end),
            ..trailer
        };
        end.extend_from_slice(&trailer.encode());
        medium
            .write_all_at(&current.file, path, &end, current.len)
            .verb("writing", path)?;
        medium
            .sync_data(&current.file, path)
            .verb("syncing", path)?;
        debug_assert_eq!(end.len(), trailer.footer_len() + TRAILER_BYTES);
        let _ = std::fs::remove_file(mark_path(&self.core, current.open.pack.id));
        self.core.own_sealed(SealedPack {
            footer: Footer::map(&current.file, path, &trailer)?,
            pack: Arc::clone(&current.open.pack),
            trailer,
        });
        Ok(())
    }

    /// How many frames were appended so far, and the file to sync for those that are not in a
    /// sealed pack.
    pub(crate) fn to_sync(&self) -> (u64, Option<ToSync>) {
        let file = self.current.as_ref().map(|current| ToSync {
            file: Arc::clone(&current.file),
            open: Arc::clone(&current.open),
            len: current.len,
        });
        (self.appended, file)
    }

    /// Gives the open pack up to whoever comes next.
    pub(crate) fn close(&mut self) {
        if let Some(current) = self.current.take() {
            lock(&current.open.scan).offset = current.len;
            current.open.ours.store(false, Ordering::Release);
        }
    }
}

impl Core {
    /// Makes the file of a new pack, without its name, locked.
    pub(crate) fn create_temporary(&self) -> Result<(PackId, File, PathBuf), CastoreError> {
        loop {
            let id = PackId(random_id()?);
            let path = self.packs_dir().join(format!("{id}{TEMPORARY_SUFFIX}"));
            let file = self.medium.create_new(&path).verb("creating", &path)?;
            // Whoever cleans up may have taken it for a dead writer's before it was locked.
            if try_lock(&file, &path)? && file.metadata().verb("reading", &path)?.nlink() > 0 {
                return Ok((id, file, path));
            }
        }
    }

    /// Removes files of writers that died before their new pack had its name.
    pub(crate) fn remove_temporaries(&self) -> Result<(), CastoreError> {
        let dir = self.packs_dir();
        for entry in std::fs::read_dir(&dir).verb("listing", &dir)? {
            let path = entry.verb("listing", &dir)?.path();
            if path.extension().is_some_and(|ext| ext == "tmp")
                && let Ok(file) = File::open(&path)
                && try_lock(&file, &path)?
            {
                match self.medium.remove(&path) {
                    Err(error) if error.kind() != io::ErrorKind::NotFound => {
                        return Err(CastoreError::io("removing", &path, error));
                    }
                    _ => {}
                }
            }
        }
        Ok(())
    }
}

/// Bytes at which a pack is sealed.
pub(crate) fn pack_bytes_max(core: &Core) -> u64 {
    core.options
        .pack_bytes_max
        .clamp(PACK_BYTES_MIN, PACK_BYTES_MAX)
}

pub(crate) fn mark_path(core: &Core, id: PackId) -> PathBuf {
    core.index_dir().join(format!("{id}{MARK_SUFFIX}"))
}

/// Notes that the pack is durable up to `len`. A mark that cannot be written is only missed.
pub(crate) fn write_mark(core: &Core, id: PackId, len: u64) {
    let mut mark = [0; MARK_BYTES];
    mark[..8].copy_from_slice(&len.to_le_bytes());
    mark[8..24].copy_from_slice(&id.0);
    let checksum = xxh3_64(&mark[..24]);
    mark[24..].copy_from_slice(&checksum.to_le_bytes());
    let written = File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(mark_path(core, id))
        .and_then(|file| file.write_all_at(&mark, 0));
    if let Err(error) = written {
        tracing::debug!(pack = %id, %error, "no mark was written");
    }
}

/// Returns up to where the pack is known to be durable; 0 if nothing is known.
pub(crate) fn read_mark(core: &Core, id: PackId) -> u64 {
    match std::fs::read(mark_path(core, id)) {
        Ok(mark)
            if mark.len() == MARK_BYTES
                && mark[8..24] == id.0
                && pack::check_sum(&mark, "mark").is_ok() =>
        {
            pack::u64_at(&mark, 0)
        }
        _ => 0,
    }
}

fn medium_of(core: &Core) -> &dyn crate::medium::Medium {
    &*core.medium
}

/// Cuts a pack back to its last good frame; if that fails too, the next writer does it.
fn cut(medium: &dyn crate::medium::Medium, current: &Current) {
    let path = &current.open.pack.path;
    if let Err(error) = medium.truncate(&current.file, path, current.len) {
        tracing::warn!(path = %path.display(), %error, "a failed append could not be cut off");
    }
}

/// Takes an exclusive lock (`flock`); false if another has it.
pub(crate) fn try_lock(file: &File, path: &Path) -> Result<bool, CastoreError> {
    match file.try_lock() {
        Ok(()) => Ok(true),
        Err(TryLockError::WouldBlock) => Ok(false),
        Err(TryLockError::Error(error)) => Err(CastoreError::io("locking", path, error)),
    }
}
