//! Writing packs anew without what is dead.
//!
//! A frame whose pieces all live is copied as it is, after its checksums are verified. The live pieces of
//! others are gathered, in their order, into frames of the usual size, those of directories and chunk
//! lists apart from data; so are small frames, which many short-lived writers leave. New packs are made
//! without a name, and get it when they are sealed and synced; an old pack is deleted as soon as all of its
//! live pieces are in packs with a name. So no more room is needed than one pack takes.
//!
//! In a dense repack (`dense.rs`) data pieces are only noted at first, and written when many are; the packs they
//! lie in stay until then.
//!
//! Memory: [`JOBS_BYTES`] of frames, the pieces of one new pack (16 MiB), a write buffer.

use super::CollectOptions;
use super::dense::Dense;
use super::mark::Marks;
use crate::core::{Core, Pack, lock};
use crate::error::{CastoreError, IoContext};
use crate::frames::{frame_name, read_frame};
use crate::index::PieceMap;
use crate::log::{PACK_PIECES_MAX, pack_bytes_max};
use crate::pack::{
    self, Class, FRAME_PIECES_MAX, FRAME_RAW_BYTES, FrameHeader, Kind, Location, PACK_HEADER_BYTES,
    PACK_VERSION, PACK_VERSION_FAR, PackId, Piece, Trailer,
};
use crate::scan::{self, Scanned, Tail};
use crate::writer::{compressor, make_frame};
use std::collections::HashSet;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::Arc;
use xxhash_rust::xxh3::xxh3_64;

/// Bytes of frames that are compressed at once, on all cores.
const JOBS_BYTES: usize = 16 << 20;
/// Frames at once: bounds their bookkeeping where they are tiny.
const JOBS_MAX: usize = 1024;
/// Pieces of different classes are not mixed.
const CLASSES: usize = Class::Patched as usize + 1;
/// Bytes gathered for one write.
const WRITE_BYTES: usize = 1 << 20;
/// A frame with fewer uncompressed bytes is joined with others.
const SMALL_FRAME_BYTES: u32 = FRAME_RAW_BYTES as u32 / 2;

pub(super) struct Rewriter<'a> {
    core: &'a Core,
    /// All packs that are to go.
    condemned: &'a HashSet<PackId>,
    level: Option<i32>,
    dense: Option<Dense>,
    compressors: Vec<zstd::bulk::Compressor<'static>>,
    jobs: Vec<Job>,
    jobs_bytes: usize,
    /// Live pieces of mixed frames, by class.
    pools: [Pool; CLASSES],
    new: Option<NewPack>,
    /// Gone through; some of what lives in them is in the pools.
    pooled: Vec<Arc<Pack>>,
    /// Gone through; all that lives in them is in new packs, the last of which has no name yet.
    finished: Vec<Arc<Pack>>,
    pub(super) deleted: u64,
    pub(super) written: u64,
    pub(super) copied_bytes: u64,
}

#[derive(Default)]
pub(super) struct Pool {
    pub(super) pieces: Vec<Piece>,
    pub(super) raw: Vec<u8>,
}

/// What marks say of a piece.
struct PieceState {
    lives: bool,
    /// Only asked for where it matters.
    is_chunk: bool,
}

enum Job {
    /// A frame as it is.
    Copy {
        frame: Vec<u8>,
        header: FrameHeader,
        pieces: Vec<Piece>,
    },
    /// One to be made.
    Make(Pool),
}

impl<'a> Rewriter<'a> {
    pub(super) fn new(
        core: &'a Core,
        condemned: &'a HashSet<PackId>,
        options: &CollectOptions,
    ) -> Result<Self, CastoreError> {
        let threads = match core.options.compress_threads {
            0 => std::thread::available_parallelism().map_or(1, usize::from),
            count => count,
        };
        let level = options.level;
        let with_level = level.unwrap_or(core.options.compression_level);
        let compressors = (0..threads)
            .map(|_| compressor(with_level))
            .collect::<Result<_, _>>()
            .verb("setting up compression for", &core.dir)?;
        Ok(Self {
            core,
            condemned,
            level,
            dense: options.dense.map(|bytes| Dense::new(core, bytes)),
            compressors,
            jobs: Vec::new(),
            jobs_bytes: 0,
            pools: Default::default(),
            new: None,
            pooled: Vec::new(),
            finished: Vec::new(),
            deleted: 0,
            written: 0,
            copied_bytes: 0,
        })
    }

    /// Takes the live pieces of a pack. False: one of them is damaged and nowhere else, so the pack stays.
    pub(super) fn take(
        &mut self,
        pack: &Arc<Pack>,
        marks: &Marks<'_>,
    ) -> Result<bool, CastoreError> {
        let file = self.core.file(pack)?;
        let path = &pack.path;
        let len = file.metadata().verb("reading", path)?.len();
        let trailer = scan::trailer(&file, path, len)?;
        let end = trailer.map_or(len, |trailer| trailer.footer_offset);
        let mut from = PACK_HEADER_BYTES as u64;
        let mut whole = true;
        let mut taken = 0;
        loop {
            let (stop, tail) = scan::frames(&file, path, from, end, u64::MAX, &mut |frame| {
                whole &= self.frame(&file, pack, &frame, marks, &mut taken)?;
                Ok(())
            })?;
            match tail {
                Tail::Clean => break,
                Tail::Torn(_) if trailer.is_none() => break,
                Tail::Torn(_) => {
                    self.core.set_bad(pack, stop as u32);
                    break;
                }
                Tail::Damaged { next, .. } => {
                    self.core.set_bad(pack, stop as u32);
                    from = next;
                }
            }
        }
        // A frame whose header is damaged is not seen by a scan.
        whole &= taken == marks.live_of(&pack.id);
        if whole {
            self.pooled.push(Arc::clone(pack));
        }
        // Where packs are small, their small frames are joined across them; what is noted waits for all.
        if self.dense.is_none() && end >= pack_bytes_max(self.core) / super::SMALL_SHARE {
            self.empty_pools()?;
        }
        Ok(whole)
    }

    /// Takes the live pieces of a frame, and counts them; false if that cannot be.
    fn frame(
        &mut self,
        file: &File,
        pack: &Arc<Pack>,
        frame: &Scanned,
        marks: &Marks<'_>,
        taken: &mut u64,
    ) -> Result<bool, CastoreError> {
        let mut states = Vec::with_capacity(frame.pieces.len());
        crate::core::for_pieces(frame, &mut |key, location| {
            let lives = marks.is_live(&pack.id, &key, location);
            states.push(PieceState {
                lives,
                is_chunk: lives && self.dense.is_some() && marks.is_chunk(&pack.id, &key, location),
            });
        });
        let live = states.iter().filter(|state| state.lives).count();
        if live == 0 {
            return Ok(true);
        }
        let as_it_is = self.level.is_none()
            && self.dense.is_none()
            && live == states.len()
            && (frame.header.raw_len >= SMALL_FRAME_BYTES || live == FRAME_PIECES_MAX);
        let read = if as_it_is {
            self.copy(file, pack, frame)
        } else {
            self.gather(file, pack, frame, &states)
        };
        match read {
            Ok(()) => {
                *taken += live as u64;
                Ok(true)
            }
            Err(error @ CastoreError::Corrupt { .. }) => {
                tracing::error!(%error, "a live piece cannot be read");
                self.core.set_bad(pack, frame.offset as u32);
                // Elsewhere, and not in a pack that is to go as well?
                let all_elsewhere = frame.pieces.iter().zip(&states).all(|(piece, state)| {
                    !state.lives || marks.is_elsewhere(&piece.key(), self.condemned)
                });
                if all_elsewhere {
                    *taken += live as u64;
                }
                Ok(all_elsewhere)
            }
            Err(error) => Err(error),
        }
    }

    fn copy(&mut self, file: &File, pack: &Pack, frame: &Scanned) -> Result<(), CastoreError> {
        let mut bytes = vec![0; frame.header.frame_len()];
        file.read_exact_at(&mut bytes, frame.offset)
            .verb("reading", &pack.path)?;
        let payload = &bytes[frame.header.header_len()..];
        pack::check_payload(&frame.header, payload).map_err(|reason| {
            CastoreError::corrupt(frame_name(pack, frame.offset as u32), reason)
        })?;
        self.push(Job::Copy {
            frame: bytes,
            header: frame.header,
            pieces: frame.pieces.clone(),
        })
    }

    fn gather(
        &mut self,
        file: &File,
        pack: &Arc<Pack>,
        frame: &Scanned,
        states: &[PieceState],
    ) -> Result<(), CastoreError> {
        let at = frame.offset as u32;
        let read = read_frame(file, pack, at, frame.header.frame_len())?;
        let mut next = 0;
        for ((piece, bytes), state) in read.pieces().zip(states) {
            let offset = next;
            next += piece.len;
            if !state.lives {
                continue;
            }
            if let (Some(dense), Kind::Data) = (&mut self.dense, piece.kind) {
                dense.note(pack, at, offset, bytes, state.is_chunk);
                continue;
            }
            let pool = &mut self.pools[piece.kind.class() as usize];
            let full = pool.raw.len() + bytes.len() > FRAME_RAW_BYTES
                || pool.pieces.len() == FRAME_PIECES_MAX;
            let ready = (full && !pool.pieces.is_empty()).then(|| std::mem::take(pool));
            pool.pieces.push(*piece);
            pool.raw.extend_from_slice(bytes);
            if let Some(ready) = ready {
                self.push(Job::Make(ready))?;
            }
        }
        Ok(())
    }

    fn push(&mut self, job: Job) -> Result<(), CastoreError> {
        self.jobs_bytes += match &job {
            Job::Copy { frame, .. } => frame.len(),
            Job::Make(pool) => pool.raw.len(),
        };
        self.jobs.push(job);
        if self.jobs_bytes >= JOBS_BYTES || self.jobs.len() >= JOBS_MAX {
            self.write_jobs()?;
        }
        Ok(())
    }

    /// Compresses what is to be compressed and appends all, in order.
    fn write_jobs(&mut self) -> Result<(), CastoreError> {
        self.jobs_bytes = 0;
        let mut jobs = std::mem::take(&mut self.jobs);
        let share = jobs.len().div_ceil(self.compressors.len()).max(1);
        std::thread::scope(|scope| {
            for (jobs, compressor) in jobs.chunks_mut(share).zip(&mut self.compressors) {
                scope.spawn(move || {
                    for job in jobs {
                        if let Job::Make(pool) = job {
                            let mut frame = Vec::new();
                            let header =
                                make_frame(compressor, &pool.pieces, &pool.raw, &mut frame);
                            *job = Job::Copy {
                                frame,
                                header,
                                pieces: std::mem::take(&mut pool.pieces),
                            };
                        }
                    }
                });
            }
        });
        for job in jobs {
            if let Job::Copy {
                frame,
                header,
                pieces,
            } = job
            {
                self.append(&frame, header, &pieces)?;
            }
        }
        Ok(())
    }

    fn append(
        &mut self,
        frame: &[u8],
        header: FrameHeader,
        pieces: &[Piece],
    ) -> Result<(), CastoreError> {
        let new = match &mut self.new {
            Some(new) => new,
            none => none.insert(NewPack::create(self.core)?),
        };
        new.append(self.core, frame, header, pieces)?;
        self.copied_bytes += frame.len() as u64;
        if new.is_full(self.core) {
            self.publish()?;
        }
        Ok(())
    }

    /// Gives the new pack its name, and deletes the packs whose live pieces all have a place now.
    fn publish(&mut self) -> Result<(), CastoreError> {
        if let Some(new) = self.new.take() {
            new.publish(self.core)?;
            self.written += 1;
            // First it is seen, then the old ones are not.
            self.core.list(&lock(&self.core.listing))?;
        }
        let finished = std::mem::take(&mut self.finished);
        self.core.delete_packs(&finished)?;
        self.deleted += finished.len() as u64;
        Ok(())
    }

    /// True if what is noted should be written before another pack is taken.
    pub(super) fn is_full(&self) -> bool {
        self.dense.as_ref().is_some_and(Dense::is_full)
    }

    /// Writes some of what is noted; says how many thousandths of it are written, `None` if none is left.
    pub(super) fn write_noted(&mut self) -> Result<Option<u64>, CastoreError> {
        let Some(dense) = &mut self.dense else {
            return Ok(None);
        };
        let frames = dense.next_frames(self.core, self.compressors.len())?;
        let permille = dense.written_permille();
        if frames.is_empty() {
            self.empty_pools()?;
            return Ok(None);
        }
        for frame in frames {
            self.push(Job::Make(frame))?;
        }
        Ok(Some(permille))
    }

    /// Everything that was taken is on its way; nothing may be noted then.
    fn empty_pools(&mut self) -> Result<(), CastoreError> {
        for class in 0..CLASSES {
            let pool = std::mem::take(&mut self.pools[class]);
            if !pool.pieces.is_empty() {
                self.push(Job::Make(pool))?;
            }
        }
        self.write_jobs()?;
        self.finished.append(&mut self.pooled);
        Ok(())
    }

    /// Publishes all that was taken (what is noted must be written), and deletes the packs that it was taken from.
    pub(super) fn finish(&mut self) -> Result<(), CastoreError> {
        self.empty_pools()?;
        self.publish()
    }
}

/// A pack without a name.
struct NewPack {
    id: PackId,
    file: File,
    temporary: PathBuf,
    buffer: Vec<u8>,
    /// Bytes written and in the buffer.
    len: u64,
    pieces: PieceMap,
    counts: Trailer,
    /// Some piece lies far in its frame.
    has_far: bool,
}

impl NewPack {
    fn create(core: &Core) -> Result<Self, CastoreError> {
        let (id, file, temporary) = core.create_temporary()?;
        Ok(Self {
            id,
            file,
            temporary,
            buffer: pack::encode_pack_header(id, PACK_VERSION).to_vec(),
            len: PACK_HEADER_BYTES as u64,
            pieces: PieceMap::default(),
            counts: Trailer::default(),
            has_far: false,
        })
    }

    fn append(
        &mut self,
        core: &Core,
        frame: &[u8],
        header: FrameHeader,
        pieces: &[Piece],
    ) -> Result<(), CastoreError> {
        let mut offset = 0;
        for piece in pieces {
            let location = Location::new(
                self.len as u32,
                header.frame_len(),
                piece.kind,
                offset,
                piece.len,
            );
            self.pieces.insert(piece.key(), location);
            self.has_far |= Location::is_far(offset);
            offset += piece.len;
        }
        self.counts.count(&header, pieces);
        self.buffer.extend_from_slice(frame);
        self.len += frame.len() as u64;
        if self.buffer.len() >= WRITE_BYTES {
            self.flush(core)?;
        }
        Ok(())
    }

    fn flush(&mut self, core: &Core) -> Result<(), CastoreError> {
        let at = self.len - self.buffer.len() as u64;
        let written = core
            .medium
            .write_all_at(&self.file, &self.temporary, &self.buffer, at)
            .verb("writing", &self.temporary);
        self.buffer.clear();
        written
    }

    fn is_full(&self, core: &Core) -> bool {
        self.len >= pack_bytes_max(core)
            || self.counts.pieces + FRAME_PIECES_MAX as u32 > PACK_PIECES_MAX
    }

    fn publish(mut self, core: &Core) -> Result<(), CastoreError> {
        let medium = &*core.medium;
        let path = core.packs_dir().join(self.id.file_name());
        let pieces = std::mem::take(&mut self.pieces);
        let trailer = Trailer {
            footer_offset: self.len,
            pieces: pieces.len() as u32,
            ..self.counts
        };
        let footer = pack::encode_footer(pieces.into_iter().collect());
        let trailer = Trailer {
            footer_checksum: xxh3_64(&footer),
            ..trailer
        };
        for part in [&footer[..], &trailer.encode()[..]] {
            self.buffer.extend_from_slice(part);
            self.len += part.len() as u64;
        }
        self.flush(core)?;
        if self.has_far {
            let header = pack::encode_pack_header(self.id, PACK_VERSION_FAR);
            medium
                .write_all_at(&self.file, &self.temporary, &header, 0)
                .verb("writing", &self.temporary)?;
        }
        medium
            .sync_data(&self.file, &self.temporary)
            .verb("syncing", &self.temporary)?;
        medium
            .rename(&self.temporary, &path)
            .verb("renaming", &self.temporary)?;
        let dir = core.packs_dir();
        medium.sync_dir(&dir).verb("syncing", &dir)?;
        // It has another name now: there is nothing to remove.
        self.temporary = PathBuf::new();
        Ok(())
    }
}

impl Drop for NewPack {
    fn drop(&mut self) {
        if !self.temporary.as_os_str().is_empty() {
            let _ = std::fs::remove_file(&self.temporary);
        }
    }
}
