//! From planned paths to published ones.
//!
//! The calling thread owns all state; job threads get a path and send back what it turned out to be.
//! A path is *unsettled* from when it is handed out until it is in a batch or has failed; while one of
//! its references is unsettled, a finished path is *parked*. So batches are in reference order, and a
//! path in a batch can only lack a reference that is neither in that batch nor valid: that is looked up
//! for the whole batch at once, just before it is published.

use super::decompress::decompress;
use super::{FAILURES_DESCRIBED_MAX, FAILURES_MAX, Failure, Options, Progress, Report, is_set};
use crate::add;
use crate::error::ErrorKind;
use crate::nar::ReadOptions;
use crate::store::{Realisation, TempRootOwner};
use crate::{Error, Result, Store};
use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, bounded};
use std::collections::{BTreeSet, HashMap, HashSet};
use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};
use understory_castore::store::WriterCounters;
use understory_castore::{Masks, Node, Writer};
use understory_nix::narinfo::Compression;
use understory_nix::store_path::StorePathHash;
use understory_nix::{PathInfo, PublicKeys, StorePath};

/// A batch is published when its NARs have this many bytes: about a second of work of two cores.
pub const BATCH_NAR_BYTES: u64 = 64 << 20;
/// A batch is published when it has this many paths. It bounds the transaction, and so how long other
/// writers wait; tiny paths come at some thousands a second, and each publication costs two syncs.
pub const BATCH_PATHS: usize = 2048;
/// A batch is published when its first path is that old: what a kill can lose.
pub const BATCH_MS: u64 = 1000;
/// Paths that are being read or wait for a reference. Enough that one large path does not stop the
/// others; at about 1 KiB a path a small part of the memory that an import takes.
pub const WINDOW_PATHS_MAX: usize = 1024;
/// Steps of the plan between two looks at what has been finished, so that planning (tens of
/// microseconds each) does not hold up a batch.
const STEPS_MAX: usize = 64;
/// Messages of a stream's reader that wait: it is one thread, and a batch takes them all.
const STREAM_MESSAGES_MAX: usize = 64;
/// How often `cancel` is looked at, and bytes are told.
const TICK_MS: u64 = 100;
/// How long threads may take to stop. They look at their flag at every buffer; only a read that does
/// not return (a silent pipe, a dead network file system) makes them late, and then they are left.
const STOP_MS_MAX: u64 = 700;
/// Paths known to be valid that are remembered, so that shared references are looked up once.
const KNOWN_PATHS_MAX: usize = 1 << 17;
/// Temporary roots in one group; the last two groups are kept. About 10 MiB.
const ROOTS_PER_GROUP_MAX: usize = 50_000;
/// Buffer in front of a compressed NAR file.
const FILE_BUFFER_BYTES: usize = 64 << 10;

/// A path to be read.
pub(super) struct Job {
    /// What the source says. A NAR size of 0 means that it does not know.
    pub(super) info: PathInfo,
    pub(super) content: Content,
}

/// Where a path's content is.
pub(super) enum Content {
    /// A file tree.
    Disk(PathBuf),
    /// A NAR in a file.
    NarFile {
        file: PathBuf,
        compression: Compression,
    },
}

/// What a plan comes to next.
pub(super) enum Step {
    /// A path; all its references have come before, are valid, or will never come.
    Job(Box<Job>),
    /// Something that cannot be imported.
    Failed {
        path: Option<StorePath>,
        error: Error,
    },
    /// Nothing more.
    End,
}

/// Paths in reference order.
pub(super) trait Plan {
    fn next(&mut self) -> Result<Step>;
    /// Paths and NAR bytes known so far.
    fn planned(&self) -> (u64, u64);
    /// Paths found valid since the last call.
    fn take_skipped(&mut self) -> u64 {
        0
    }
}

/// What job threads share with the calling thread.
pub(super) struct Shared {
    pub(super) writer: Arc<Writer>,
    /// Of an object of which nothing is known.
    pub(super) masks: Arc<Masks>,
    /// Ends all work.
    pub(super) stop: AtomicBool,
    /// NAR bytes read.
    pub(super) bytes: AtomicU64,
}

impl Shared {
    pub(super) fn is_stopping(&self) -> bool {
        is_set(&self.stop)
    }
}

/// What threads send back.
pub(super) enum Message {
    /// A job is done.
    Done {
        path: StorePath,
        result: Result<Box<Finished>>,
    },
    /// A stream had a path.
    Streamed(Box<Finished>),
    /// A stream ended.
    StreamEnd(Result<()>),
}

/// A path that is read and verified.
pub(super) struct Finished {
    pub(super) info: PathInfo,
    pub(super) root: Node,
}

/// One import under way.
pub(super) struct Run<'a> {
    pub(super) store: &'a Store,
    pub(super) cancel: &'a AtomicBool,
    progress: &'a dyn Progress,
    jobs: usize,
    shared: Arc<Shared>,
    started: Instant,
    report: Report,
    told: Instant,
    writer_before: WriterCounters,
    trusted_keys: Option<PublicKeys>,
    causes: u64,
    /// Handed out and not yet in a batch or failed; with the tickets of parked paths that wait for it.
    unsettled: HashMap<StorePathHash, Vec<u64>>,
    parked: HashMap<u64, (Finished, usize)>,
    ticket: u64,
    failed: HashSet<StorePathHash>,
    known: HashSet<StorePathHash>,
    batch: Vec<Finished>,
    batch_bytes: u64,
    batch_since: Option<Instant>,
    /// Keep what was published from a collection that runs meanwhile.
    roots: Vec<(TempRootOwner, usize)>,
    stream_error: Option<Error>,
}

impl<'a> Run<'a> {
    pub(super) fn new(
        store: &'a Store,
        options: &Options,
        progress: &'a dyn Progress,
        cancel: &'a AtomicBool,
    ) -> Result<Self> {
        let shared = Shared {
            writer: store.writer()?,
            masks: store.masks(None, &BTreeSet::new()),
            stop: AtomicBool::new(false),
            bytes: AtomicU64::new(0),
        };
        let writer_before = shared.writer.counters();
        let jobs = match options.jobs {
            0 => std::thread::available_parallelism().map_or(1, usize::from),
            jobs => jobs,
        };
        Ok(Self {
            store,
            cancel,
            progress,
            jobs,
            shared: Arc::new(shared),
            started: Instant::now(),
            report: Report::default(),
            told: Instant::now(),
            writer_before,
            trusted_keys: options.trusted_keys.clone(),
            causes: 0,
            unsettled: HashMap::new(),
            parked: HashMap::new(),
            ticket: 0,
            failed: HashSet::new(),
            known: HashSet::new(),
            batch: Vec::new(),
            batch_bytes: 0,
            batch_since: None,
            roots: Vec::new(),
            stream_error: None,
        })
    }

    pub(super) fn finish(mut self) -> Report {
        self.tell_now();
        self.report.elapsed = self.started.elapsed();
        self.report
    }

    pub(super) fn skip(&mut self, paths: u64) {
        self.report.counters.paths_valid += paths;
    }

    /// Takes over what a plan knows of its size.
    pub(super) fn planned(&mut self, (paths, nar_bytes): (u64, u64)) {
        self.report.counters.paths_total = paths;
        self.report.counters.nar_bytes_total = nar_bytes;
        self.tell();
    }

    /// Tells how far it is, not more often than anybody can see.
    fn tell(&mut self) {
        let due = self.told + Duration::from_millis(TICK_MS);
        if Instant::now() >= due {
            self.tell_now();
        }
    }

    fn tell_now(&mut self) {
        self.told = Instant::now();
        let counters = &mut self.report.counters;
        counters.nar_bytes_done = self.shared.bytes.load(Ordering::Relaxed);
        counters.writer = since(self.writer_before, self.shared.writer.counters());
        self.progress.update(counters);
    }

    /// True once the caller wants to stop; the report says so.
    pub(super) fn is_cancelled(&mut self) -> bool {
        self.report.cancelled |= is_set(self.cancel);
        self.report.cancelled
    }

    /// Records a realisation, unless it is recorded.
    pub(super) fn add_realisation(&mut self, realisation: &Realisation) -> Result<()> {
        if let Some(known) = self.store.realisation(&realisation.id)? {
            if known.out_path != realisation.out_path {
                tracing::warn!(id = realisation.id, here = %known.out_path, there = %realisation.out_path,
                    "the realisation that is recorded here stays");
                return Ok(());
            }
            if known.signatures.is_superset(&realisation.signatures) {
                return Ok(());
            }
        }
        self.store.add_realisation(realisation)?;
        self.report.realisations += 1;
        Ok(())
    }

    /// Imports what `plan` comes to.
    pub(super) fn drive(&mut self, plan: &mut dyn Plan) -> Result<()> {
        let (to_jobs, for_jobs) = bounded::<Box<Job>>(WINDOW_PATHS_MAX);
        // As many as there can be unsettled paths: a thread never waits to send.
        let (to_us, for_us) = bounded(WINDOW_PATHS_MAX);
        for index in 0..self.jobs {
            let (shared, store) = (self.shared.clone(), self.store.clone());
            let (jobs, done) = (for_jobs.clone(), to_us.clone());
            spawn(&format!("import-{index}"), move || {
                for job in jobs {
                    if shared.is_stopping() {
                        return;
                    }
                    let path = job.info.path.clone();
                    let result = guard(|| read(&shared, &store, *job)).map(Box::new);
                    if done.send(Message::Done { path, result }).is_err() {
                        return;
                    }
                }
            })?;
        }
        drop((for_jobs, to_us));
        self.pump(plan, Some(to_jobs), &for_us)
    }

    /// Imports what `read` sends from a thread of its own.
    pub(super) fn read_stream(
        &mut self,
        name: &str,
        read: impl FnOnce(&Shared, &Sender<Message>) -> Result<()> + Send + 'static,
    ) -> Result<()> {
        let (to_us, for_us) = bounded(STREAM_MESSAGES_MAX);
        let shared = self.shared.clone();
        spawn(name, move || {
            let result = guard(|| read(&shared, &to_us));
            // Nobody listens after a cancelled import.
            let _ = to_us.send(Message::StreamEnd(result));
        })?;
        self.pump(&mut Nothing, None, &for_us)?;
        self.stream_error.take().map_or(Ok(()), Err)
    }

    fn pump(
        &mut self,
        plan: &mut dyn Plan,
        to_jobs: Option<Sender<Box<Job>>>,
        messages: &Receiver<Message>,
    ) -> Result<()> {
        let result = self.pump_until_done(plan, to_jobs, messages);
        self.shared.stop.store(true, Ordering::Relaxed);
        // Whatever went wrong, what is complete is published; the first error counts.
        let flushed = self.flush();
        self.tell();
        result.and(flushed)?;
        let lost = self.unsettled.len();
        if lost > 0 && !self.report.cancelled {
            return Err(Error::internal(format!(
                "{lost} paths were handed out and never came back"
            )));
        }
        Ok(())
    }

    fn pump_until_done(
        &mut self,
        plan: &mut dyn Plan,
        mut to_jobs: Option<Sender<Box<Job>>>,
        messages: &Receiver<Message>,
    ) -> Result<()> {
        let tick = Duration::from_millis(TICK_MS);
        let mut stop_by: Option<Instant> = None;
        loop {
            if stop_by.is_none() && is_set(self.cancel) {
                self.report.cancelled = true;
                self.shared.stop.store(true, Ordering::Relaxed);
                stop_by = Some(Instant::now() + Duration::from_millis(STOP_MS_MAX));
                to_jobs = None;
            }
            if let Some(sender) = &to_jobs
                && self.hand_out(plan, sender)?
            {
                to_jobs = None;
            }
            self.tell();
            let has_room = to_jobs.is_some() && self.unsettled.len() < WINDOW_PATHS_MAX;
            let wait = if has_room { Duration::ZERO } else { tick };
            match messages.recv_timeout(wait) {
                Ok(message) => {
                    self.take(message)?;
                    while let Ok(message) = messages.try_recv() {
                        self.take(message)?;
                    }
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return Ok(()),
            }
            if stop_by.is_some_and(|by| Instant::now() > by) {
                tracing::debug!("threads that are still reading are left behind");
                return Ok(());
            }
            let age_max = Duration::from_millis(BATCH_MS);
            if self.batch_since.is_some_and(|at| at.elapsed() >= age_max) {
                self.flush()?;
            }
        }
    }

    /// Goes on with the plan while there is room; true at its end.
    fn hand_out(&mut self, plan: &mut dyn Plan, to_jobs: &Sender<Box<Job>>) -> Result<bool> {
        let mut steps = 0;
        let mut ended = false;
        while steps < STEPS_MAX && self.unsettled.len() < WINDOW_PATHS_MAX {
            steps += 1;
            match plan.next()? {
                Step::End => {
                    ended = true;
                    break;
                }
                Step::Failed { path, error } => self.fail(path, error, false)?,
                Step::Job(job) => self.start(job, to_jobs)?,
            }
        }
        if steps > 0 {
            self.planned(plan.planned());
            let skipped = plan.take_skipped();
            self.skip(skipped);
        }
        Ok(ended)
    }

    fn start(&mut self, job: Box<Job>, to_jobs: &Sender<Box<Job>>) -> Result<()> {
        // Nothing needs to be read of what cannot be published.
        if let Some(error) = self.objection(&job.info) {
            return self.fail(Some(job.info.path), error.0, error.1);
        }
        self.unsettled.insert(job.info.path.hash(), Vec::new());
        to_jobs
            .send(job)
            .map_err(|_| Error::internal("the threads of the import are gone"))
    }

    /// Why a path cannot be published, as far as that is known before its content; and whether
    /// the reason is a reference.
    fn objection(&self, info: &PathInfo) -> Option<(Error, bool)> {
        let dir = self.store.store_dir();
        if info.ca.is_some() && !info.is_content_addressed(dir) {
            let error = Error::user(format!(
                "path '{}' claims to be content-addressed but isn't",
                dir.print(&info.path)
            ));
            return Some((error, false));
        }
        if let Some(keys) = &self.trusted_keys
            && info.ca.is_none()
            && !info.is_signed_by(dir, keys)
        {
            let error = Error::user(format!(
                "cannot add path '{}' because it lacks a signature by a trusted key",
                dir.print(&info.path)
            ));
            return Some((error, false));
        }
        let failed = info.references.iter().find(|reference| {
            **reference != info.path && self.failed.contains(&reference.hash())
        })?;
        let error = Error::user(format!(
            "{}: reference '{}' was not imported",
            dir.print(&info.path),
            dir.print(failed)
        ));
        Some((error, true))
    }

    fn take(&mut self, message: Message) -> Result<()> {
        match message {
            Message::Done { path, result } => match result {
                Ok(finished) => self.finished(*finished),
                // Interrupted.
                Err(_) if self.shared.is_stopping() => Ok(()),
                Err(error) => {
                    // If the store cannot be written any more, no path is to blame.
                    self.shared.writer.sync()?;
                    self.fail(Some(path), error, false)
                }
            },
            Message::Streamed(finished) => {
                if self.store.is_valid(&finished.info.path)? {
                    self.skip(1);
                    return Ok(());
                }
                let counters = &mut self.report.counters;
                counters.paths_total += 1;
                counters.nar_bytes_total += finished.info.nar_size;
                self.finished(*finished)
            }
            Message::StreamEnd(result) => {
                self.stream_error = result.err();
                Ok(())
            }
        }
    }

    /// Parks a path or puts it into the batch.
    fn finished(&mut self, finished: Finished) -> Result<()> {
        let own = finished.info.path.hash();
        let ticket = self.ticket;
        let mut waits = 0;
        for reference in &finished.info.references {
            let hash = reference.hash();
            if hash != own
                && let Some(waiting) = self.unsettled.get_mut(&hash)
            {
                waiting.push(ticket);
                waits += 1;
            }
        }
        if waits > 0 {
            self.ticket += 1;
            self.parked.insert(ticket, (finished, waits));
            return Ok(());
        }
        let mut ready = vec![finished];
        while let Some(finished) = ready.pop() {
            let path = finished.info.path.clone();
            match self.objection(&finished.info) {
                Some((error, by_reference)) => {
                    self.note_failure(Some(path.clone()), error, by_reference)?;
                }
                None => {
                    self.batch_bytes += finished.info.nar_size;
                    self.batch_since.get_or_insert_with(Instant::now);
                    self.batch.push(finished);
                }
            }
            self.settle(&path, &mut ready);
            if self.batch.len() >= BATCH_PATHS || self.batch_bytes >= BATCH_NAR_BYTES {
                self.flush()?;
            }
        }
        Ok(())
    }

    /// Ends the waiting for a path; those that waited for nothing else go to `ready`.
    fn settle(&mut self, path: &StorePath, ready: &mut Vec<Finished>) {
        for ticket in self.unsettled.remove(&path.hash()).unwrap_or_default() {
            let Some((_, waits)) = self.parked.get_mut(&ticket) else {
                continue;
            };
            *waits -= 1;
            if *waits == 0
                && let Some((finished, _)) = self.parked.remove(&ticket)
            {
                ready.push(finished);
            }
        }
    }

    /// Records a failure and lets those that waited for the path fail too.
    fn fail(&mut self, path: Option<StorePath>, error: Error, by_reference: bool) -> Result<()> {
        self.note_failure(path.clone(), error, by_reference)?;
        if let Some(path) = path {
            let mut ready = Vec::new();
            self.settle(&path, &mut ready);
            for finished in ready {
                self.finished(finished)?;
            }
        }
        Ok(())
    }

    fn note_failure(
        &mut self,
        path: Option<StorePath>,
        error: Error,
        by_reference: bool,
    ) -> Result<()> {
        if let Some(path) = &path {
            self.failed.insert(path.hash());
        }
        tracing::debug!(error = error.chain(), "not imported");
        self.report.counters.paths_failed += 1;
        self.causes += u64::from(!by_reference);
        let failure = Failure {
            path: path.map_or_else(
                || error.to_string(),
                |path| self.store.store_dir().print(&path),
            ),
            error,
            by_reference,
        };
        if self.causes > FAILURES_MAX {
            let last = failure.error;
            return Err(Error::new(
                last.kind(),
                format!("the import ends after {FAILURES_MAX} failures"),
            )
            .with_source(last));
        }
        if self.report.failures.len() < FAILURES_DESCRIBED_MAX {
            self.report.failures.push(failure);
        }
        Ok(())
    }

    /// Publishes the batch, less what lacks a reference.
    fn flush(&mut self) -> Result<()> {
        let batch = std::mem::take(&mut self.batch);
        self.batch_bytes = 0;
        self.batch_since = None;
        if batch.is_empty() {
            return Ok(());
        }
        self.look_up_references(&batch)?;
        let mut here = HashSet::new();
        let mut good = Vec::with_capacity(batch.len());
        for Finished { info, root } in batch {
            let lacks = info.references.iter().find(|reference| {
                let hash = reference.hash();
                **reference != info.path && !here.contains(&hash) && !self.known.contains(&hash)
            });
            let Some(lacks) = lacks else {
                here.insert(info.path.hash());
                good.push((info, root));
                continue;
            };
            self.store.castore().release(&root);
            let by_reference = self.failed.contains(&lacks.hash());
            let (error, by_reference) = self.objection(&info).unwrap_or_else(|| {
                (
                    Error::user(format!(
                        "{}: reference '{}' is not valid",
                        self.store.store_dir().print(&info.path),
                        self.store.store_dir().print(lacks)
                    ))
                    .with_hint("import it with its closure"),
                    by_reference,
                )
            });
            self.note_failure(Some(info.path), error, by_reference)?;
        }
        self.publish(good)
    }

    /// Finds out which references from outside the batch are valid.
    fn look_up_references(&mut self, batch: &[Finished]) -> Result<()> {
        if self.known.len() > KNOWN_PATHS_MAX {
            self.known.clear();
        }
        let here: HashSet<StorePathHash> = batch.iter().map(|path| path.info.path.hash()).collect();
        let mut asked = HashSet::new();
        let mut unknown = Vec::new();
        for reference in batch.iter().flat_map(|path| &path.info.references) {
            let hash = reference.hash();
            if !here.contains(&hash) && !self.known.contains(&hash) && asked.insert(hash) {
                unknown.push(reference.clone());
            }
        }
        let valid = self.store.valid_paths(&unknown)?;
        self.known.extend(valid.iter().map(StorePath::hash));
        Ok(())
    }

    fn publish(&mut self, paths: Vec<(PathInfo, Node)>) -> Result<()> {
        self.keep(&paths)?;
        let done: Vec<(StorePath, u64)> = paths
            .iter()
            .map(|(info, _)| (info.path.clone(), info.nar_size))
            .collect();
        match self.store.publish(paths.clone()) {
            Ok(()) => {
                for (path, nar_bytes) in done {
                    self.known.insert(path.hash());
                    self.report.counters.paths_done += 1;
                    self.report.nar_bytes_imported += nar_bytes;
                }
                Ok(())
            }
            // One of them is to blame: a reference that was deleted since it was looked up.
            Err(error) if error.kind() == ErrorKind::User && paths.len() > 1 => {
                self.known.clear();
                for path in paths {
                    self.publish(vec![path])?;
                }
                Ok(())
            }
            Err(error) if error.kind() == ErrorKind::User => {
                let path = paths.into_iter().next().map(|(info, root)| {
                    self.store.castore().release(&root);
                    info.path
                });
                self.note_failure(path, error, false)
            }
            Err(error) => Err(error),
        }
    }

    /// Makes temporary roots of what is about to be published.
    fn keep(&mut self, paths: &[(PathInfo, Node)]) -> Result<()> {
        if self
            .roots
            .last()
            .is_none_or(|(_, count)| *count >= ROOTS_PER_GROUP_MAX)
        {
            if self.roots.len() == 2 {
                self.roots.remove(0);
            }
            self.roots.push((self.store.temp_root_owner()?, 0));
        }
        if let Some((owner, count)) = self.roots.last_mut() {
            let paths: Vec<StorePath> = paths.iter().map(|(info, _)| info.path.clone()).collect();
            self.store.add_temp_roots(owner, &paths)?;
            *count += paths.len();
        }
        Ok(())
    }
}

/// Plans nothing.
struct Nothing;

impl Plan for Nothing {
    fn next(&mut self) -> Result<Step> {
        Ok(Step::End)
    }
    fn planned(&self) -> (u64, u64) {
        (0, 0)
    }
}

fn spawn(name: &str, work: impl FnOnce() + Send + 'static) -> Result<()> {
    // Not joined: its channel's end tells that it is done.
    std::thread::Builder::new()
        .name(name.to_owned())
        .spawn(work)
        .map(drop)
        .map_err(|e| Error::environment("starting a thread of the import").with_source(e))
}

/// Turns a panic into an error, so that nobody waits for a thread that is gone.
fn guard<T>(work: impl FnOnce() -> Result<T>) -> Result<T> {
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|panic| {
        let text = panic
            .downcast_ref::<String>()
            .map(String::as_str)
            .or_else(|| panic.downcast_ref::<&str>().copied())
            .unwrap_or("no message");
        Err(Error::internal(format!(
            "a thread of the import panicked: {text}"
        )))
    })
}

/// What a writer did between two looks at it.
fn since(before: WriterCounters, now: WriterCounters) -> WriterCounters {
    WriterCounters {
        given_bytes: now.given_bytes - before.given_bytes,
        file_duplicate_bytes: now.file_duplicate_bytes - before.file_duplicate_bytes,
        chunk_duplicate_bytes: now.chunk_duplicate_bytes - before.chunk_duplicate_bytes,
        masked_duplicate_bytes: now.masked_duplicate_bytes - before.masked_duplicate_bytes,
        masked_files: now.masked_files - before.masked_files,
        new_bytes: now.new_bytes - before.new_bytes,
        stored_bytes: now.stored_bytes - before.stored_bytes,
    }
}

/// Reads a path's content into the castore and compares it with what the source says.
fn read(shared: &Shared, store: &Store, job: Job) -> Result<Finished> {
    let Job { mut info, content } = job;
    let options = ReadOptions {
        cancel: Some(&shared.stop),
        bytes: Some(&shared.bytes),
        ..ReadOptions::default()
    };
    let root = match &content {
        Content::Disk(path) => add::ingest_path_with(store, &mut info, path, &options),
        Content::NarFile { file, compression } => {
            read_nar_file(store, &info, file, compression, &options)
        }
    };
    match root {
        Ok(root) => Ok(Finished { info, root }),
        Err(error) => {
            let name = store.store_dir().print(&info.path);
            if error.to_string().contains(&format!("'{name}'")) {
                return Err(error);
            }
            let out = Error::new(error.kind(), name);
            let out = match error.hint() {
                Some(hint) => out.with_hint(hint),
                None => out,
            };
            Err(out.with_source(error.chain()))
        }
    }
}

fn read_nar_file(
    store: &Store,
    info: &PathInfo,
    file: &Path,
    compression: &Compression,
    options: &ReadOptions<'_>,
) -> Result<Node> {
    let path = format!("'{}'", store.store_dir().print(&info.path));
    let failed = |error: Error| {
        if error.to_string().contains(&path) {
            return error;
        }
        Error::new(error.kind(), format!("reading {}", file.display())).with_source(error.chain())
    };
    let open = File::open(file).map_err(|e| Error::io("opening", file, e))?;
    let stream = BufReader::with_capacity(FILE_BUFFER_BYTES, open);
    let mut stream = Limited {
        inner: decompress(stream, compression).map_err(failed)?,
        left: info.nar_size,
        size: info.nar_size,
    };
    let root = add::ingest_nar_with(store, info, &mut stream, options).map_err(failed)?;
    // The end of the file holds checksums, and nothing may follow the NAR.
    let rest = stream.inner.fill_buf();
    if !rest.map_err(|e| Error::io("reading", file, e))?.is_empty() {
        return Err(Error::corrupt(format!(
            "{} goes on after the NAR's {} bytes",
            file.display(),
            info.nar_size
        )));
    }
    Ok(root)
}

/// A stream of at most so many bytes; what goes on is an error, so that a small file cannot fill
/// the store.
struct Limited<R> {
    inner: R,
    left: u64,
    size: u64,
}

impl<R: BufRead> Limited<R> {
    fn exceeded(&self) -> std::io::Error {
        std::io::Error::new(
            std::io::ErrorKind::InvalidData,
            format!("expected a NAR of {} bytes, found more", self.size),
        )
    }
}

impl<R: BufRead> Read for Limited<R> {
    fn read(&mut self, out: &mut [u8]) -> std::io::Result<usize> {
        let buffered = self.fill_buf()?;
        let count = buffered.len().min(out.len());
        out[..count].copy_from_slice(&buffered[..count]);
        self.consume(count);
        Ok(count)
    }
}

impl<R: BufRead> BufRead for Limited<R> {
    fn fill_buf(&mut self) -> std::io::Result<&[u8]> {
        let left = usize::try_from(self.left).unwrap_or(usize::MAX);
        if left == 0 {
            return Err(self.exceeded());
        }
        let buffered = self.inner.fill_buf()?;
        Ok(&buffered[..buffered.len().min(left)])
    }
    fn consume(&mut self, count: usize) {
        self.left -= count as u64;
        self.inner.consume(count);
    }
}
