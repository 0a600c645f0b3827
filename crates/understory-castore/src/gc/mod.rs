//! Collection of content: what nothing published needs goes, and its space with it.
//!
//! A pack cannot lose pieces, so packs are written anew without what is dead and then deleted. All of
//! this runs beside readers, writers and mounts of any process; one collection at a time.
//!
//! 1. **Mark** (`mark.rs`): walk the trees of all roots; one bit per piece.
//! 2. **Choose** packs: those with enough dead bytes, small ones when there are many.
//! 3. **Condemn** them (`condemned.rs`): from then on no writer relies on what lies in them.
//! 4. **Wait** for the leases (`lease.rs`) that name one of them: these belong to operations that
//!    began before. Packs that are named still after [`CollectOptions::lease_wait`] are let go.
//! 5. **Mark again**: what those operations have published. Directories that are marked are not walked.
//!    Now nothing can come to need a condemned pack any more.
//! 6. **Delete** packs without a live piece; **rewrite** the others (`rewrite.rs`): live pieces go to new
//!    packs, which are sealed and synced before they get their names; then the old ones are deleted. Where the disk
//!    is nearly full that is done for each old pack, so the room it needs is what lives in one; and if that is not
//!    there, it ends, closes what it has deleted, and begins again with the room that this has given.
//!
//! A reader that finds a pack gone looks for the piece anew (`Core::piece`): it was moved before.
//!
//! **A crash** leaves a list of condemned packs, and maybe a new pack beside the old ones: everything is
//! there at least once. The next collection deletes what is condemned. A new pack without a name is
//! removed by the next writer or collector.
//!
//! Memory: two bits per piece (100,000,000 pieces: 25 MB); footers are mapped, and their pages belong to
//! the kernel. Cost: one or two index lookups per entry of each directory, one read of each directory and
//! chunk list; a rewrite reads and writes what lives, and compresses only frames that lose pieces.

mod dense;
mod mark;
mod rewrite;
mod secure;

use crate::condemned::Condemned;
use crate::core::{Core, Pack, lock};
use crate::error::{CastoreError, IoContext};
use crate::log::{mark_path, try_lock};
use crate::pack::{FRAME_RAW_BYTES_FAR, PackId};
use crate::{Castore, Node, lease};
use mark::Marks;
use rewrite::Rewriter;
use std::collections::{BTreeSet, HashMap, HashSet};
use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

const LOCK: &str = "collect.lock";
/// A pack below a quarter of its full size is small.
const SMALL_SHARE: u64 = 4;
/// Small packs that a collection leaves as they are.
const SMALL_PACKS_KEPT: usize = 7;
/// With less room than for so many packs, those of which least lives are written anew first.
const ROOM_PACKS: u64 = 2;
/// Old packs stay until the new ones take this part of the room.
const ROOM_PART: u64 = 4;
/// How often leases are looked at.
const LEASE_LOOK_EVERY: Duration = Duration::from_millis(20);
/// How often the lock is tried, with as much time between.
const LOCK_TRIES: u32 = 25;
/// Roots between two calls of the watcher.
const ROOTS_PER_STEP: u64 = 64;

/// What a collection does, and how far it goes.
#[derive(Debug, Clone)]
pub struct CollectOptions {
    /// A pack is written anew when at least so many thousandths of its content are dead.
    pub dead_permille_min: u32,
    /// Chooses packs until about so many bytes come free.
    pub freed_bytes_max: u64,
    /// Only reports.
    pub dry_run: bool,
    /// Writes all packs anew, whatever is dead in them.
    pub all: bool,
    /// Writes packs anew in which this process has found damaged frames, whatever is dead in them.
    pub damaged: bool,
    /// Joins small packs when there are at least two, not only when there are many.
    pub join_small: bool,
    /// Compresses all that is written anew with this zstd level (1 to 19). Else, frames whose pieces
    /// all live are copied as they are.
    pub level: Option<i32>,
    /// Puts data pieces of all packs that are written anew beside those that are like them, in frames of up to that
    /// many uncompressed bytes (from [`DENSE_FRAME_BYTES`](Self::DENSE_FRAME_BYTES) to
    /// [`DENSE_FRAME_BYTES_MAX`](Self::DENSE_FRAME_BYTES_MAX)): smaller, and a path's files lie among those of others.
    /// The old packs of up to 16 GiB of contents stay until the new ones are complete.
    pub dense: Option<usize>,
    /// How long to wait for operations that rely on a chosen pack.
    pub lease_wait: Duration,
    /// How long to wait for writers of other processes that have nothing to do to leave their open packs.
    pub pack_wait: Duration,
}

impl CollectOptions {
    /// Bytes of a frame of a dense repack, unless told otherwise: a read at random costs twice what it costs usually.
    pub const DENSE_FRAME_BYTES: usize = 256 << 10;
    /// The most: a seventh smaller than that, and a read at random costs sixteen times as much.
    pub const DENSE_FRAME_BYTES_MAX: usize = FRAME_RAW_BYTES_FAR;
}

impl Default for CollectOptions {
    fn default() -> Self {
        Self {
            dead_permille_min: 50,
            freed_bytes_max: u64::MAX,
            dry_run: false,
            all: false,
            damaged: false,
            join_small: false,
            level: None,
            dense: None,
            lease_wait: Duration::from_secs(30),
            pack_wait: Duration::from_millis(1500),
        }
    }
}

/// How far a collection is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CollectStep {
    /// Roots were marked, so many so far in this pass.
    Marking {
        /// Roots.
        roots: u64,
        /// Pieces that live.
        pieces: u64,
    },
    /// Waits for other operations.
    Waiting,
    /// Packs are written anew.
    Rewriting {
        /// Bytes of old packs that were gone through. A dense repack goes through them twice.
        done: u64,
        /// Of so many.
        total: u64,
    },
}

/// Packs that a collection left as they are, for one reason.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct KeptPacks {
    /// Packs.
    pub packs: u64,
    /// Bytes in them that are dead, about.
    pub dead_bytes: u64,
    /// Processes that are the reason, if any.
    pub processes: BTreeSet<u32>,
}

/// What a collection found and did.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct CollectReport {
    /// Roots that were walked.
    pub roots: u64,
    /// Pieces that live.
    pub live_pieces: u64,
    /// Pieces that were dead, in all packs, before.
    pub dead_pieces: u64,
    /// Bytes on disk (allocated) that are dead, about, before.
    pub dead_bytes: u64,
    /// Pieces that are needed and not there, or damaged: `check` tells which.
    pub missing_pieces: u64,
    /// Packs before.
    pub packs_before: u64,
    /// Packs afterwards.
    pub packs_after: u64,
    /// Packs deleted, or to be deleted in a dry run.
    pub packs_deleted: u64,
    /// Packs that were written in their place.
    pub packs_written: u64,
    /// Pieces that are gone, or would be.
    pub freed_pieces: u64,
    /// Bytes of frames that were copied.
    pub copied_bytes: u64,
    /// Allocated bytes of packs and index files before.
    pub disk_bytes_before: u64,
    /// The same afterwards; in a dry run, what is expected.
    pub disk_bytes_after: u64,
    /// Left alone: too little is dead in them, or enough was freed.
    pub kept_below: KeptPacks,
    /// Left alone: a writer appends to them.
    pub kept_open: KeptPacks,
    /// Left alone: operations rely on them that have published nothing yet.
    pub kept_leased: KeptPacks,
    /// Left alone: a live piece in them is damaged and nowhere else.
    pub kept_damaged: KeptPacks,
}

/// Calls its argument for each root.
pub type Roots<'a, E> =
    dyn FnMut(&mut dyn FnMut(&Node) -> Result<(), CastoreError>) -> Result<(), E> + 'a;

/// A pack as a collection sees it.
struct Candidate {
    pack: Arc<Pack>,
    /// Allocated bytes of its file.
    bytes: u64,
    live: u64,
    pieces: u64,
    /// About.
    dead_bytes: u64,
    /// Why it cannot be chosen.
    busy: bool,
    forced: bool,
}

impl Castore {
    /// Frees the space of what no root needs. `roots` is called twice, or more often on a full disk; between
    /// two calls, whatever began before and was published is seen. `watch` is told how far it is and may stop it; what is freed by
    /// then stays freed.
    ///
    /// # Errors
    /// Opened read-only (unless it is a dry run), another collection is at work, a directory or chunk list that a root needs cannot
    /// be read (nothing is deleted then), I/O, full disk, and those of `roots` and `watch`.
    pub fn collect<E: From<CastoreError>>(
        &self,
        roots: &mut Roots<'_, E>,
        options: &CollectOptions,
        watch: &mut dyn FnMut(CollectStep) -> Result<(), E>,
    ) -> Result<CollectReport, E> {
        let core = self.core();
        let read_only = core.options.read_only;
        if read_only && !options.dry_run {
            return Err(CastoreError::Invalid(
                "nothing can be collected: the castore is open read-only".to_owned(),
            )
            .into());
        }
        let _lock = if read_only {
            None
        } else {
            Some(core.lock_collection()?)
        };
        if let Some(writer) = self.idle_writer() {
            writer.give_up_pack()?;
        }
        let mut options = options.clone();
        let mut report: Option<CollectReport> = None;
        loop {
            let (next, is_done) = self.collect_once(roots, &options, watch)?;
            let freed = next.disk_bytes_before.saturating_sub(next.disk_bytes_after);
            options.freed_bytes_max = options.freed_bytes_max.saturating_sub(freed);
            let all = match report {
                Some(before) => before.and_then(next),
                None => next,
            };
            if is_done {
                return Ok(all);
            }
            report = Some(all);
        }
    }

    /// True if it has done all: else it has deleted packs, and then the disk was full. Their room comes free when
    /// nobody here has them open any more.
    fn collect_once<E: From<CastoreError>>(
        &self,
        roots: &mut Roots<'_, E>,
        options: &CollectOptions,
        watch: &mut dyn FnMut(CollectStep) -> Result<(), E>,
    ) -> Result<(CollectReport, bool), E> {
        let mut collection = Collection::begin(self, options)?;
        collection.mark(roots, watch)?;
        let victims = collection.choose(options)?;
        if options.dry_run {
            return Ok((collection.expect(&victims), true));
        }
        let result = if victims.is_empty() {
            Ok(())
        } else {
            collection.delete(victims, roots, options, watch)
        };
        // Whatever happened: what is left is not condemned any more, as nobody is at it.
        let acquitted = collection.acquit_all();
        // What is written anew whatever is in it would be so again and again.
        let goes_on = collection.was_full && collection.report.packs_deleted > 0 && !options.all;
        if !goes_on {
            result?;
        }
        acquitted?;
        Ok((collection.end()?, !goes_on))
    }
}

struct Collection<'a> {
    core: &'a Arc<Core>,
    marks: Marks<'a>,
    report: CollectReport,
    /// Open packs without a writer, which we hold instead.
    held: HashMap<PackId, File>,
    /// The disk was full while packs were written anew.
    was_full: bool,
}

impl<'a> Collection<'a> {
    fn begin(castore: &'a Castore, options: &CollectOptions) -> Result<Self, CastoreError> {
        let core = castore.core();
        let left_over = match Condemned::read(&core.dir) {
            Ok(list) => {
                let packs = list.packs().clone();
                core.set_condemned(list);
                packs
            }
            Err(error @ CastoreError::Corrupt { .. }) => {
                tracing::warn!(%error, "starting with no pack condemned");
                HashSet::new()
            }
            Err(error) => return Err(error),
        };
        let read_only = core.options.read_only;
        if !read_only {
            core.remove_temporaries()?;
        }
        core.refresh()?;
        let held = if read_only {
            HashMap::new()
        } else {
            core.hold_open_packs(if options.dry_run {
                Duration::ZERO
            } else {
                options.pack_wait
            })?
        };
        // Nobody appends to these any more.
        core.refresh()?;
        let (packs, index) = core.disk_bytes()?;
        let marks = Marks::new(castore, left_over)?;
        let packs_before = marks.packs();
        Ok(Self {
            core,
            report: CollectReport {
                packs_before,
                disk_bytes_before: packs + index,
                ..CollectReport::default()
            },
            marks,
            held,
            was_full: false,
        })
    }

    fn mark<E: From<CastoreError>>(
        &mut self,
        roots: &mut Roots<'_, E>,
        watch: &mut dyn FnMut(CollectStep) -> Result<(), E>,
    ) -> Result<(), E> {
        let mut count = 0;
        let mut stopped = None;
        let marks = &mut self.marks;
        let walked = roots(&mut |node| {
            marks.mark(node)?;
            count += 1;
            if count % ROOTS_PER_STEP == 0 {
                let step = CollectStep::Marking {
                    roots: count,
                    pieces: marks.live(),
                };
                if let Err(error) = watch(step) {
                    stopped = Some(error);
                    return Err(CastoreError::Invalid("stopped".to_owned()));
                }
            }
            Ok(())
        });
        if let Some(error) = stopped {
            return Err(error);
        }
        walked?;
        self.report.roots = count;
        watch(CollectStep::Marking {
            roots: count,
            pieces: self.marks.live(),
        })
    }

    fn choose(&mut self, options: &CollectOptions) -> Result<Vec<Candidate>, CastoreError> {
        let mut candidates = Vec::new();
        for (pack, shares) in self.marks.shares() {
            let bytes = match std::fs::metadata(&pack.path).verb("reading", &pack.path) {
                Ok(metadata) => metadata.blocks() * 512,
                Err(error) if error.is_not_found() => continue,
                Err(error) => return Err(error),
            };
            let dead_raw = shares.raw_bytes - shares.live_raw_bytes;
            let dead_bytes = (u128::from(bytes) * u128::from(dead_raw)
                / u128::from(shares.raw_bytes.max(1))) as u64;
            candidates.push(Candidate {
                bytes,
                live: shares.live,
                pieces: shares.pieces,
                // An empty pack is all dead.
                dead_bytes: if shares.raw_bytes == 0 {
                    bytes
                } else {
                    dead_bytes
                },
                // In a read-only castore nobody is asked.
                busy: shares.is_open
                    && !self.held.contains_key(&pack.id)
                    && !self.core.options.read_only,
                forced: options.all
                    || self.marks.is_left_over(&pack.id)
                    || (options.damaged && self.core.has_bad(&pack)),
                pack,
            });
        }
        for candidate in &candidates {
            self.report.dead_pieces += candidate.pieces - candidate.live;
            self.report.dead_bytes += candidate.dead_bytes;
        }
        self.report.live_pieces = self.marks.live();
        self.report.missing_pieces = self.marks.missing();
        let small = self.small_ones(&candidates, options);
        candidates.sort_by_key(|candidate| {
            std::cmp::Reverse((candidate.forced, permille(candidate), candidate.pack.id))
        });
        let mut freed = 0_u64;
        let mut victims = Vec::new();
        for candidate in candidates {
            let enough = freed >= options.freed_bytes_max;
            // Nothing but what was never used of it: a log to go on with.
            let is_fresh = candidate.pieces == 0 && !candidate.forced;
            let wanted = candidate.forced
                || small.contains(&candidate.pack.id)
                || (candidate.live < candidate.pieces
                    && permille(&candidate) >= options.dead_permille_min.max(1));
            if candidate.busy {
                self.report.kept_open.count(&candidate);
            } else if !wanted || is_fresh || (enough && !candidate.forced) {
                self.report.kept_below.count(&candidate);
            } else {
                freed = freed.saturating_add(candidate.dead_bytes);
                victims.push(candidate);
            }
        }
        Ok(victims)
    }

    /// Small packs that are to become one.
    fn small_ones(&self, candidates: &[Candidate], options: &CollectOptions) -> HashSet<PackId> {
        let limit = self.core.options.pack_bytes_max / SMALL_SHARE;
        let small: HashSet<PackId> = candidates
            .iter()
            .filter(|candidate| !candidate.busy && candidate.pieces > 0 && candidate.bytes < limit)
            .map(|candidate| candidate.pack.id)
            .collect();
        let kept = if options.join_small {
            1
        } else {
            SMALL_PACKS_KEPT
        };
        if small.len() > kept {
            small
        } else {
            HashSet::new()
        }
    }

    fn expect(mut self, victims: &[Candidate]) -> CollectReport {
        let freed: u64 = victims.iter().map(|victim| victim.dead_bytes).sum();
        self.report.packs_deleted = victims.len() as u64;
        self.report.packs_after = self.report.packs_before;
        self.report.freed_pieces = victims
            .iter()
            .map(|victim| victim.pieces - victim.live)
            .sum();
        self.report.disk_bytes_after = self.report.disk_bytes_before.saturating_sub(freed);
        self.report
    }

    fn condemn(&self, packs: &HashSet<PackId>) -> Result<(), CastoreError> {
        let list = Condemned::write(&*self.core.medium, &self.core.dir, packs)?;
        self.core.set_condemned(list);
        Ok(())
    }

    /// Takes the list of condemned packs away, if there is one.
    fn acquit_all(&self) -> Result<(), CastoreError> {
        match Condemned::read_name(&self.core.dir)? {
            None if self.core.condemned().name().is_none() => Ok(()),
            _ => self.condemn(&HashSet::new()),
        }
    }

    fn delete<E: From<CastoreError>>(
        &mut self,
        mut victims: Vec<Candidate>,
        roots: &mut Roots<'_, E>,
        options: &CollectOptions,
        watch: &mut dyn FnMut(CollectStep) -> Result<(), E>,
    ) -> Result<(), E> {
        let mut ids: HashSet<PackId> = victims.iter().map(|victim| victim.pack.id).collect();
        self.condemn(&ids)?;
        let leased = self.wait(&ids, options.lease_wait, watch)?;
        if !leased.is_empty() {
            victims.retain(|victim| {
                let Some(process) = leased.get(&victim.pack.id) else {
                    return true;
                };
                self.report.kept_leased.count(victim);
                self.report.kept_leased.processes.insert(*process);
                ids.remove(&victim.pack.id);
                false
            });
            self.condemn(&ids)?;
        }
        self.mark(roots, watch)?;
        self.report.live_pieces = self.marks.live();
        for victim in &mut victims {
            victim.live = self.marks.live_of(&victim.pack.id);
        }
        let (mut living, dead): (Vec<_>, Vec<_>) =
            victims.into_iter().partition(|victim| victim.live > 0);
        // First what costs nothing: it may make the room for the rest.
        self.report.packs_deleted = dead.len() as u64;
        self.report.freed_pieces = dead.iter().map(|victim| victim.pieces).sum();
        let dead: Vec<Arc<Pack>> = dead.into_iter().map(|victim| victim.pack).collect();
        self.core.delete_packs(&dead)?;
        if self.core.free_bytes() < ROOM_PACKS * self.core.options.pack_bytes_max {
            living.sort_by_key(Candidate::live_bytes);
        }
        let mut rewriter = Rewriter::new(self.core, &ids, options)?;
        let rewritten = self.rewrite(&mut rewriter, &living, options, watch);
        self.report.packs_deleted += rewriter.deleted;
        self.report.packs_written = rewriter.written;
        self.report.copied_bytes = rewriter.copied_bytes;
        rewritten
    }

    fn rewrite<E: From<CastoreError>>(
        &mut self,
        rewriter: &mut Rewriter<'_>,
        victims: &[Candidate],
        options: &CollectOptions,
        watch: &mut dyn FnMut(CollectStep) -> Result<(), E>,
    ) -> Result<(), E> {
        let passes = if options.dense.is_some() { 2 } else { 1 };
        let total = passes * victims.iter().map(|victim| victim.bytes).sum::<u64>();
        let mut done = 0;
        let mut noted = 0;
        let mut unpublished = 0;
        for (at, victim) in victims.iter().enumerate() {
            watch(CollectStep::Rewriting { done, total })?;
            let mut taken = rewriter.take(&victim.pack, &self.marks);
            unpublished += victim.live_bytes();
            // A dense repack needs all old packs.
            if options.dense.is_none()
                && taken.is_ok()
                && unpublished > self.core.free_bytes() / ROOM_PART
            {
                taken = rewriter.finish().and(taken);
                unpublished = 0;
            }
            if self.or_full(taken)? {
                self.report.freed_pieces += victim.pieces - victim.live;
            } else {
                self.report.kept_damaged.count(victim);
            }
            done += victim.bytes;
            if options.dense.is_some() {
                noted += victim.bytes;
            }
            if rewriter.is_full() || at + 1 == victims.len() {
                while let Some(permille) = self.or_full(rewriter.write_noted())? {
                    let done = done + noted * permille / 1000;
                    watch(CollectStep::Rewriting { done, total })?;
                }
                done += std::mem::take(&mut noted);
            }
        }
        self.or_full(rewriter.finish())?;
        watch(CollectStep::Rewriting { done, total })
    }

    /// Notes whether the disk is full.
    fn or_full<T>(&mut self, result: Result<T, CastoreError>) -> Result<T, CastoreError> {
        self.was_full |= result.as_ref().is_err_and(CastoreError::is_no_space);
        result
    }

    /// Waits for operations that rely on one of `packs`; returns the packs that are relied on still, and
    /// the process of each.
    fn wait<E: From<CastoreError>>(
        &self,
        packs: &HashSet<PackId>,
        at_most: Duration,
        watch: &mut dyn FnMut(CollectStep) -> Result<(), E>,
    ) -> Result<HashMap<PackId, u32>, E> {
        let until = Instant::now() + at_most;
        loop {
            let mut leased = HashMap::new();
            for lease in lease::living(&self.core.dir)? {
                for pack in lease.packs.intersection(packs) {
                    leased.insert(*pack, lease.process);
                }
            }
            if leased.is_empty() || Instant::now() >= until {
                return Ok(leased);
            }
            watch(CollectStep::Waiting)?;
            std::thread::sleep(LEASE_LOOK_EVERY);
        }
    }

    fn end(mut self) -> Result<CollectReport, CastoreError> {
        self.held.clear();
        if let Err(error) = self.core.compact_index() {
            // The index is derived: it has entries of what is gone, nothing is lost.
            tracing::warn!(%error, "merging the index failed");
        }
        let (packs, index) = self.core.disk_bytes()?;
        self.report.disk_bytes_after = packs + index;
        self.report.packs_after = self.core.state().packs.len() as u64;
        Ok(self.report)
    }
}

impl Candidate {
    /// About.
    fn live_bytes(&self) -> u64 {
        self.bytes.saturating_sub(self.dead_bytes)
    }
}

fn permille(candidate: &Candidate) -> u32 {
    (u128::from(candidate.dead_bytes) * 1000 / u128::from(candidate.bytes.max(1))) as u32
}

impl CollectReport {
    /// The report of one collection and another one that has gone on with what it left.
    fn and_then(self, next: Self) -> Self {
        Self {
            dead_pieces: self.dead_pieces,
            dead_bytes: self.dead_bytes,
            packs_before: self.packs_before,
            packs_deleted: self.packs_deleted + next.packs_deleted,
            packs_written: self.packs_written + next.packs_written,
            freed_pieces: self.freed_pieces + next.freed_pieces,
            copied_bytes: self.copied_bytes + next.copied_bytes,
            disk_bytes_before: self.disk_bytes_before,
            ..next
        }
    }
}

impl KeptPacks {
    fn count(&mut self, candidate: &Candidate) {
        self.packs += 1;
        self.dead_bytes += candidate.dead_bytes;
    }
}

/// Locks an open pack so that no writer goes on with it. `None` if one does already.
fn hold(pack: &Pack) -> Result<Option<File>, CastoreError> {
    let file = match File::open(&pack.path).verb("opening", &pack.path) {
        Ok(file) => file,
        Err(error) if error.is_not_found() => return Ok(None),
        Err(error) => return Err(error),
    };
    Ok(try_lock(&file, &pack.path)?.then_some(file))
}

impl Core {
    /// Only one collection may be at work.
    fn lock_collection(&self) -> Result<File, CastoreError> {
        let path = self.dir.join(LOCK);
        let file = File::options()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&path)
            .verb("opening", &path)?;
        // Those who only ask whether there is a collection hold it for a moment.
        for _ in 0..LOCK_TRIES {
            if try_lock(&file, &path)? {
                return Ok(file);
            }
            std::thread::sleep(LEASE_LOOK_EVERY);
        }
        Err(CastoreError::Busy {
            path: self.dir.clone(),
        })
    }

    /// Locks the open packs that no writer holds, so that none goes on with them; waits a little for writers
    /// that have nothing to do and leave theirs.
    fn hold_open_packs(&self, at_most: Duration) -> Result<HashMap<PackId, File>, CastoreError> {
        let until = Instant::now() + at_most;
        let mut held = HashMap::new();
        loop {
            let mut others = 0;
            for open in &self.state().open {
                if open.ours.load(Ordering::Acquire) || held.contains_key(&open.pack.id) {
                    continue;
                }
                match hold(&open.pack)? {
                    Some(file) => drop(held.insert(open.pack.id, file)),
                    None => others += 1,
                }
            }
            if others == 0 || Instant::now() >= until {
                return Ok(held);
            }
            std::thread::sleep(LEASE_LOOK_EVERY);
            self.refresh()?;
        }
    }

    /// What the file system of the packs has room for; much, if it does not say.
    fn free_bytes(&self) -> u64 {
        match rustix::fs::statvfs(self.packs_dir()) {
            Ok(stat) if stat.f_blocks > 0 => stat.f_bavail.saturating_mul(stat.f_frsize),
            _ => u64::MAX,
        }
    }

    /// True if some process collects.
    pub(crate) fn is_collecting(&self) -> Result<bool, CastoreError> {
        let path = self.dir.join(LOCK);
        match File::open(&path).verb("opening", &path) {
            Ok(file) => match file.try_lock_shared() {
                Ok(()) => Ok(false),
                Err(std::fs::TryLockError::WouldBlock) => Ok(true),
                Err(std::fs::TryLockError::Error(error)) => {
                    Err(CastoreError::io("locking", &path, error))
                }
            },
            Err(error) if error.is_not_found() => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Deletes packs, durably, and forgets them.
    fn delete_packs(&self, packs: &[Arc<Pack>]) -> Result<(), CastoreError> {
        if packs.is_empty() {
            return Ok(());
        }
        for pack in packs {
            match self.medium.remove(&pack.path).verb("removing", &pack.path) {
                Err(error) if !error.is_not_found() => return Err(error),
                _ => {}
            }
            let _ = std::fs::remove_file(mark_path(self, pack.id));
        }
        let dir = self.packs_dir();
        self.medium.sync_dir(&dir).verb("syncing", &dir)?;
        self.list(&lock(&self.listing))?;
        Ok(())
    }
}
