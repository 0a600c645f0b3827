//! Fetches a closure: many archives at a time, larger ones early, each path published when all its references are.
//!
//! The calling thread coordinates and publishes; workers fetch. What was fetched waits, stored but invisible, until its
//! references are valid or go into the same publication. A path that another client of this process fetches at the
//! moment is not fetched again: when that has ended it is looked at again.
//!
//! When this returns, also early, all workers have ended and all claims are released.

use super::fetch::{Fetched, fetch};
use super::files::Context;
use super::find::{Candidate, Finder, nobody};
use super::in_flight::Claim;
use super::plan::Plan;
use super::{Outcome, Sink, Substituters};
use crate::daemon::Activity;
use crate::error::ErrorKind;
use crate::{Error, Result};
use crossbeam_channel::{Receiver, Sender, unbounded};
use std::collections::{BTreeMap, BinaryHeap, HashMap, HashSet};
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};
use understory_nix::worker::{ActivityType, Field, ResultType, Verbosity};
use understory_nix::{ContentAddress, StorePath};

/// Most paths in one publication.
pub const BATCH_PATHS_MAX: usize = 512;
/// How long a path that could be published waits for others, so that syncing the disk is paid for many.
pub const BATCH_AGE_MAX: Duration = Duration::from_secs(1);
/// How often the coordinator looks whether it is still wanted.
const TICK: Duration = Duration::from_millis(100);

/// What workers tell.
enum Event<C> {
    Stored(StorePath, Candidate, C, Claim),
    /// Valid already: someone else was quicker.
    Valid(StorePath),
    /// Someone else fetches it.
    Busy(StorePath),
    /// To be had from elsewhere with other references.
    Other(StorePath, Candidate),
    Failed(StorePath, Error),
    /// The sink cannot say what is valid, or the client has gone.
    Stop(Error),
}

/// Fetches `paths` and what they refer to.
pub(super) fn run<S: Sink>(
    all: &Substituters,
    paths: &BTreeMap<StorePath, Option<ContentAddress>>,
    sink: &S,
    context: Context<'_>,
) -> Result<Outcome> {
    let finder = all.finder(context);
    let mut plan = Plan::default();
    plan.extend(paths, &finder, sink, context)?;
    let realise = Activity::start(
        context.reporter,
        Verbosity::Error,
        ActivityType::Realise,
        "",
        Vec::new(),
        0,
    );
    let copies = Activity::start(
        context.reporter,
        Verbosity::Error,
        ActivityType::CopyPaths,
        "",
        Vec::new(),
        0,
    );
    let (events, incoming) = unbounded();
    let (released, releases) = unbounded();
    let queue = Queue::default();
    let shop = Shop {
        all,
        finder: &finder,
        wanted: paths,
        sink,
        context,
        queue: &queue,
        events,
        released,
        parent: copies.id(),
    };
    let jobs = all.settings.substitution_jobs.max(1);
    std::thread::scope(|scope| {
        let _closed = CloseOnDrop(&queue);
        for _ in 0..jobs.min(plan.candidates.len()) {
            scope.spawn(|| shop.work());
        }
        let coordinator = Coordinator {
            shop: &shop,
            plan,
            realise,
            copies,
            waiting: HashMap::new(),
            dependents: HashMap::new(),
            stored: HashMap::new(),
            batch: Vec::new(),
            batch_since: Instant::now(),
            outstanding: 0,
            busy: HashSet::new(),
            early: HashSet::new(),
            expected: (0, 0),
            outcome: Outcome::default(),
            told: [0; 4],
        };
        let result = coordinator.run(&incoming, &releases);
        if result.is_err() {
            // Ends the downloads that are going on.
            context.cancel.set();
        }
        result
    })
}

/// What coordinator and workers share.
struct Shop<'a, S: Sink> {
    all: &'a Substituters,
    finder: &'a Finder<'a>,
    wanted: &'a BTreeMap<StorePath, Option<ContentAddress>>,
    sink: &'a S,
    context: Context<'a>,
    queue: &'a Queue,
    events: Sender<Event<S::Content>>,
    released: Sender<StorePath>,
    parent: u64,
}

impl<S: Sink> Shop<'_, S> {
    fn ca(&self, path: &StorePath) -> Option<&ContentAddress> {
        self.wanted.get(path).and_then(Option::as_ref)
    }
    fn work(&self) {
        let _entered = self.context.cancel.enter();
        while let Some(job) = self.queue.take() {
            let path = job.path.clone();
            let mut answer = AnswerOnPanic {
                events: &self.events,
                path: Some(path),
            };
            let event = self.do_job(job);
            answer.path = None;
            // The coordinator ended early: nobody wants to know.
            let _ = self.events.send(event);
        }
    }
    fn do_job(&self, job: Job) -> Event<S::Content> {
        let Job {
            path, candidate, ..
        } = job;
        let Some(claim) = self.all.shared.in_flight.claim(&path, &self.released) else {
            return Event::Busy(path);
        };
        match self.sink.valid(std::slice::from_ref(&path)) {
            Ok(valid) if valid.contains(&path) => return Event::Valid(path),
            Ok(_) => {}
            Err(error) => return Event::Stop(error),
        }
        let fetched = fetch(
            &candidate,
            self.ca(&path),
            self.finder,
            &self.all.shared.store_dir,
            self.parent,
            self.sink,
            self.context,
        );
        match fetched {
            Ok(Fetched::Stored(candidate, content)) => {
                Event::Stored(path, candidate, content, claim)
            }
            Ok(Fetched::Other(candidate)) => Event::Other(path, candidate),
            Ok(Fetched::Failed(error)) => Event::Failed(path, error),
            Err(error) => Event::Stop(error),
        }
    }
}

/// Tells the coordinator when a worker panics, so that it does not wait for ever.
struct AnswerOnPanic<'a, C> {
    events: &'a Sender<Event<C>>,
    path: Option<StorePath>,
}

impl<C> Drop for AnswerOnPanic<'_, C> {
    fn drop(&mut self) {
        if let Some(path) = self.path.take() {
            let error = Error::internal(format!("a worker panicked at '{path}'"));
            let _ = self.events.send(Event::Stop(error));
        }
    }
}

/// A path to fetch. The largest is the greatest.
struct Job {
    bytes: u64,
    path: StorePath,
    candidate: Candidate,
}

impl PartialEq for Job {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other).is_eq()
    }
}
impl Eq for Job {}
impl PartialOrd for Job {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for Job {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (self.bytes, &other.path).cmp(&(other.bytes, &self.path))
    }
}

/// What is to be fetched.
#[derive(Default)]
struct Queue {
    inner: Mutex<(BinaryHeap<Job>, bool)>,
    changed: Condvar,
}

impl Queue {
    fn push(&self, job: Job) {
        self.lock().0.push(job);
        self.changed.notify_one();
    }
    /// The next job; `None` when there will be none.
    fn take(&self) -> Option<Job> {
        let mut inner = self.lock();
        loop {
            if inner.1 {
                return None;
            }
            if let Some(job) = inner.0.pop() {
                return Some(job);
            }
            inner = self
                .changed
                .wait(inner)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }
    fn lock(&self) -> std::sync::MutexGuard<'_, (BinaryHeap<Job>, bool)> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

struct CloseOnDrop<'a>(&'a Queue);

impl Drop for CloseOnDrop<'_> {
    fn drop(&mut self) {
        self.0.lock().1 = true;
        self.0.changed.notify_all();
    }
}

/// What was fetched and is not published.
struct Stored<C> {
    candidate: Candidate,
    content: C,
    claim: Claim,
}

/// Keeps the books.
struct Coordinator<'a, S: Sink> {
    shop: &'a Shop<'a, S>,
    plan: Plan,
    realise: Activity<'a>,
    copies: Activity<'a>,
    /// For each path that is not valid: references that are neither valid nor in the batch.
    waiting: HashMap<StorePath, HashSet<StorePath>>,
    /// The other way round.
    dependents: HashMap<StorePath, Vec<StorePath>>,
    stored: HashMap<StorePath, Stored<S::Content>>,
    /// To be published, references first.
    batch: Vec<(StorePath, Stored<S::Content>)>,
    batch_since: Instant,
    /// Jobs that no event has answered yet.
    outstanding: usize,
    /// Fetched by someone else.
    busy: HashSet<StorePath>,
    /// Released by someone else before we heard that they are busy.
    early: HashSet<StorePath>,
    /// NAR bytes and file bytes to come and done.
    expected: (u64, u64),
    outcome: Outcome,
    /// What was told last.
    told: [u64; 4],
}

impl<S: Sink> Coordinator<'_, S> {
    fn run(
        mut self,
        incoming: &Receiver<Event<S::Content>>,
        releases: &Receiver<StorePath>,
    ) -> Result<Outcome> {
        let first: Vec<StorePath> = self.plan.candidates.keys().cloned().collect();
        for path in self.plan.missing.clone() {
            let error = nobody(self.shop.all, &path);
            self.outcome.failed.insert(path, error);
        }
        self.add(first);
        loop {
            self.shop.context.cancel.check()?;
            self.publish_if_due()?;
            if self.outstanding == 0 && self.busy.is_empty() && self.batch.is_empty() {
                break;
            }
            crossbeam_channel::select! {
                recv(incoming) -> event => match event {
                    Ok(event) => self.take(event)?,
                    // The shop holds a sender.
                    Err(_) => return Err(Error::internal("the workers are gone")),
                },
                recv(releases) -> path => if let Ok(path) = path {
                    self.released(path)?;
                },
                default(TICK) => {}
            }
            self.tell();
        }
        // What is left waits for itself.
        let mut left: Vec<StorePath> = self.waiting.keys().cloned().collect();
        left.sort_unstable();
        for path in left {
            let text = format!(
                "cycle detected in the references of '{}'",
                self.shop.all.shared.store_dir.print(&path)
            );
            self.fail(path, Error::corrupt(text));
        }
        Ok(self.outcome)
    }

    /// Takes paths of the plan into the books.
    fn add(&mut self, paths: Vec<StorePath>) {
        let mut broken = Vec::new();
        for path in &paths {
            let candidate = self.plan.candidates[path].clone();
            self.expected.0 += candidate.info.nar_size;
            self.expected.1 += candidate.download_size();
            if let Some(missing) = self.link(path, &candidate) {
                broken.push((path.clone(), missing));
            }
        }
        let fields =
            |kind: ActivityType, bytes| vec![Field::Int(kind.to_wire()), Field::Int(bytes)];
        self.realise.result(
            ResultType::SetExpected,
            fields(ActivityType::CopyPath, self.expected.0),
        );
        self.realise.result(
            ResultType::SetExpected,
            fields(ActivityType::FileTransfer, self.expected.1),
        );
        for (path, _) in broken {
            let error = self.some_references(&path);
            self.fail(path, error);
        }
        for path in paths {
            self.start(&path);
        }
        self.tell();
    }
    /// Notes what a path waits for. Returns a reference that cannot be had.
    fn link(&mut self, path: &StorePath, candidate: &Candidate) -> Option<StorePath> {
        let mut missing = None;
        let mut waiting = HashSet::new();
        for reference in &candidate.info.references {
            if reference == path || self.is_done(reference) {
                continue;
            }
            if self.outcome.failed.contains_key(reference) {
                missing = Some(reference.clone());
            }
            waiting.insert(reference.clone());
            self.dependents
                .entry(reference.clone())
                .or_default()
                .push(path.clone());
        }
        self.waiting.insert(path.clone(), waiting);
        missing
    }
    /// Valid, or about to be published.
    fn is_done(&self, path: &StorePath) -> bool {
        self.plan.valid.contains(path)
    }
    /// Gives a path to the workers, unless it has failed meanwhile.
    fn start(&mut self, path: &StorePath) {
        if !self.waiting.contains_key(path) {
            return;
        }
        let candidate = self.plan.candidates[path].clone();
        self.outstanding += 1;
        self.shop.queue.push(Job {
            bytes: candidate.info.nar_size,
            path: path.clone(),
            candidate,
        });
    }

    fn take(&mut self, event: Event<S::Content>) -> Result<()> {
        self.outstanding -= 1;
        match event {
            Event::Stop(error) => return Err(error),
            Event::Valid(path) => self.done(&path),
            Event::Failed(path, error) => self.fail(path, error),
            Event::Busy(path) => {
                if self.early.remove(&path) {
                    self.look_again(&path)?;
                } else {
                    self.busy.insert(path);
                }
            }
            Event::Other(path, candidate) => self.replace(&path, &candidate)?,
            Event::Stored(path, candidate, content, claim) => {
                // Failed meanwhile, because a reference did.
                let Some(waiting) = self.waiting.get(&path) else {
                    return Ok(());
                };
                let ready = waiting.is_empty();
                self.stored.insert(
                    path.clone(),
                    Stored {
                        candidate,
                        content,
                        claim,
                    },
                );
                if ready {
                    self.put_in_batch(path);
                }
            }
        }
        Ok(())
    }
    /// Someone else is done with a path.
    fn released(&mut self, path: StorePath) -> Result<()> {
        if self.busy.remove(&path) {
            self.look_again(&path)
        } else {
            self.early.insert(path);
            Ok(())
        }
    }
    fn look_again(&mut self, path: &StorePath) -> Result<()> {
        let valid = self.shop.sink.valid(std::slice::from_ref(path))?;
        if valid.contains(path) {
            self.done(path);
        } else {
            self.start(path);
        }
        Ok(())
    }
    /// A path is to be had with other references than was thought.
    fn replace(&mut self, path: &StorePath, candidate: &Candidate) -> Result<()> {
        if !self.waiting.contains_key(path) {
            return Ok(());
        }
        let references: BTreeMap<StorePath, Option<ContentAddress>> = candidate
            .info
            .references
            .iter()
            .filter(|reference| *reference != path)
            .map(|reference| (reference.clone(), None))
            .collect();
        let fresh = self.plan.extend(
            &references,
            self.shop.finder,
            self.shop.sink,
            self.shop.context,
        )?;
        for missing in self.plan.missing.clone() {
            if !self.outcome.failed.contains_key(&missing) {
                let error = nobody(self.shop.all, &missing);
                self.outcome.failed.insert(missing, error);
            }
        }
        self.plan.candidates.insert(path.clone(), candidate.clone());
        self.add(fresh);
        if self.link(path, candidate).is_some() {
            let error = self.some_references(path);
            self.fail(path.clone(), error);
        } else {
            self.start(path);
        }
        Ok(())
    }

    /// Puts a path that waits for nothing into the batch, and what waited only for it, and so on.
    fn put_in_batch(&mut self, path: StorePath) {
        let mut ready = vec![path];
        while let Some(path) = ready.pop() {
            let Some(stored) = self.stored.remove(&path) else {
                continue;
            };
            if self.batch.is_empty() {
                self.batch_since = Instant::now();
            }
            self.batch.push((path.clone(), stored));
            ready.extend(self.relieve(&path));
        }
    }
    /// Takes a path from what others wait for. Returns those that are stored and wait for nothing more.
    fn relieve(&mut self, path: &StorePath) -> Vec<StorePath> {
        self.waiting.remove(path);
        self.plan.valid.insert(path.clone());
        let mut ready = Vec::new();
        for dependent in self.dependents.remove(path).unwrap_or_default() {
            let Some(waiting) = self.waiting.get_mut(&dependent) else {
                continue;
            };
            let was_last = waiting.remove(path) && waiting.is_empty();
            if was_last && self.stored.contains_key(&dependent) {
                ready.push(dependent);
            }
        }
        ready
    }
    /// A path is valid.
    fn done(&mut self, path: &StorePath) {
        for ready in self.relieve(path) {
            self.put_in_batch(ready);
        }
    }

    fn publish_if_due(&mut self) -> Result<()> {
        // Also when others are waited for: they may wait for these.
        let due = self.outstanding == 0
            || self.batch.len() >= BATCH_PATHS_MAX
            || self.batch_since.elapsed() >= BATCH_AGE_MAX;
        if self.batch.is_empty() || !due {
            return Ok(());
        }
        let batch = std::mem::take(&mut self.batch);
        let paths = batch
            .iter()
            .map(|(_, stored)| ((*stored.candidate.info).clone(), stored.content.clone()))
            .collect();
        match self.shop.sink.publish(paths) {
            Ok(()) => {
                for (path, _) in batch {
                    self.outcome.substituted.push(path.clone());
                    self.done(&path);
                }
            }
            // The store's trouble is everyone's.
            Err(error) if error.kind() != ErrorKind::User => return Err(error),
            // One that cannot be published does not keep the others from it.
            Err(_) => self.publish_singly(batch),
        }
        Ok(())
    }
    fn publish_singly(&mut self, batch: Vec<(StorePath, Stored<S::Content>)>) {
        for (path, stored) in batch {
            if self.outcome.failed.contains_key(&path) {
                continue;
            }
            let info = (*stored.candidate.info).clone();
            match self.shop.sink.publish(vec![(info, stored.content)]) {
                Ok(()) => {
                    drop(stored.claim);
                    self.outcome.substituted.push(path.clone());
                    self.done(&path);
                }
                Err(error) => self.fail(path, error),
            }
        }
    }

    /// A path cannot be had, nor what refers to it.
    fn fail(&mut self, path: StorePath, error: Error) {
        let mut failed = vec![(path, error)];
        while let Some((path, error)) = failed.pop() {
            self.waiting.remove(&path);
            self.stored.remove(&path);
            self.busy.remove(&path);
            self.plan.valid.remove(&path);
            for dependent in self.dependents.remove(&path).unwrap_or_default() {
                if !self.outcome.failed.contains_key(&dependent) {
                    let error = self.some_references(&dependent);
                    failed.push((dependent, error));
                }
            }
            self.outcome.failed.entry(path).or_insert(error);
        }
    }
    fn some_references(&self, path: &StorePath) -> Error {
        Error::user(format!(
            "some references of path '{}' could not be realised",
            self.shop.all.shared.store_dir.print(path)
        ))
    }

    /// Tells how many paths are done.
    fn tell(&mut self) {
        let done = self.outcome.substituted.len() as u64;
        let failed = self.outcome.failed.len() as u64;
        let expected = self.plan.candidates.len() as u64;
        let running = self
            .outstanding
            .min(self.shop.all.settings.substitution_jobs) as u64;
        let now = [done, expected.max(done), running, failed];
        if now != self.told {
            self.told = now;
            let [done, expected, running, failed] = now;
            self.copies.progress(done, expected, running, failed);
        }
    }
}
