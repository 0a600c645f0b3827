//! Generations while an instance runs: a thread of the daemon makes new ones, puts the overlay on them, and drops old ones;
//! and it deletes paths.
//!
//! - *Making*: when more than [`Thresholds::newer_paths_max`] paths came after the newest generation and nothing was published
//!   for [`QUIET`], or much more came. The thread runs at the lowest priority and holds nothing that readers or publications
//!   need; it spends at most one part in [`PAUSE_FACTOR`] of the time on it.
//! - *Switching*: the mount server mounts the generation beside the one in use; an overlay with the new lower directories
//!   and the same upper one is mounted below that in use; and that one is unmounted, which the kernel does in one step and
//!   only if nobody uses it. Whoever looks a name up sees one of the two, and both hold the same. See `mount::overlay`.
//! - *When*: no file is open, no program runs and nobody works in the overlay, in this mount namespace and those that hear
//!   of it (the kernel says so); no other namespace has a copy of the mount (a container, the sandbox of a build), since
//!   two overlays with one upper directory would be used at a time; and no other process has the upper store open: then Nix
//!   neither builds nor adds. That is held for as long as the switch takes, some milliseconds; who opens the store then waits.
//!   Operations of our own daemon need not be held: each of their system calls is done on one of the two overlays, and what
//!   they have open keeps the switch from happening.
//! - *Collecting*: names must not go below an overlay that is in use, and a generation keeps the paths that are in it. So a
//!   collection makes a generation without what is dead, puts the overlay on it as above, and deletes while nobody can make
//!   a temporary root. If the overlay is in use, or it turns out that something came to need a path, nothing is deleted; if
//!   that turns out when the overlay stands on the new generation, another one is made, of everything.
//! - *Not switched*: an overlay that is always in use (over `/nix/store`, where programs run from). The generation
//!   is there for the next start. [`Standing`] says what it waits for.
//! - *Killed half-way*: an overlay that waits below another one is found by the next daemon, which goes on. What a mount
//!   server has mounted and nobody uses is unmounted by the next one when it is told what to keep.
//!
//! Cost: one statement of the database each second; while a generation waits, a system call and a walk of `/proc` each second.

use super::{Shared, lock};
use crate::config::Layout;
use crate::control;
use crate::generation::Generations;
use crate::generation::stack::{
    self, GENERATIONS_KEPT, MountMode, Places, Standing, Thresholds, newer_name,
};
use crate::mount::{OverlayLayers, OverlayMount, RemoteMounts, mountinfo};
use crate::overlay::Overlay;
use crate::store::GcReport;
use crate::{Error, Result, Store, metrics, namespace};
use std::collections::VecDeque;
use std::path::PathBuf;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Between two looks.
const TICK: Duration = Duration::from_secs(1);
/// How long nothing must have been published before a generation is made.
const QUIET: Duration = Duration::from_secs(2);
/// So many times the threshold is too much to wait for quiet.
const MUCH: u64 = 16;
/// After a generation was made, none is for so many times as long as that took.
const PAUSE_FACTOR: u32 = 20;
/// How long the supervisor may take to pass a descriptor on.
const DEVICE_MAX: Duration = Duration::from_secs(10);
/// The first pause after an error; it doubles.
const FAILED_PAUSE_MIN: Duration = Duration::from_secs(2);
/// The longest pause after errors.
const FAILED_PAUSE_MAX: Duration = Duration::from_secs(600);
/// How often it is asked in a row whether the overlay is in use: readers that open and close files leave gaps.
const TRIES: u32 = 200;
/// Between two of these questions.
const TRY_PAUSE: Duration = Duration::from_micros(50);
/// The lowest priority.
const NICE: i32 = 19;
/// How long who asks for a collection waits.
const COLLECT_MAX: Duration = Duration::from_secs(600);
/// What the second work directory of the overlay is called, beside the first.
const OTHER_WORK: &str = "-2";

/// What is wanted of it.
pub(super) struct Options {
    pub(super) mode: MountMode,
    /// Else what the overlay stands on stays, and it only collects.
    pub(super) renews: bool,
    pub(super) thresholds: Thresholds,
    /// The mounts that publications are told to.
    pub(super) remotes: Arc<RemoteMounts>,
}

/// The thread. It ends soon after this is dropped.
pub(super) struct Renewal(Arc<Orders>);

/// What the thread is to do.
#[derive(Default)]
pub(super) struct Orders {
    asked: Mutex<Asked>,
    changed: Condvar,
}

#[derive(Default)]
struct Asked {
    stop: bool,
    collections: VecDeque<Order>,
}

/// A collection, and who waits for it.
struct Order {
    freed_bytes_max: u64,
    done: Sender<Result<GcReport>>,
}

impl Renewal {
    /// Starts it for an instance whose overlay is mounted. The lower directories below the castore's stay.
    pub(super) fn start(
        store: Store,
        overlay: Overlay,
        layout: Layout,
        shared: Arc<Shared>,
        options: Options,
        below: Vec<PathBuf>,
    ) -> Result<Self> {
        let orders = Arc::new(Orders::default());
        let mut work = Work {
            generations: Generations::of(&store),
            places: Places::of(&layout),
            orders: Arc::clone(&orders),
            store,
            overlay,
            layout,
            shared,
            options,
            below,
            looked_at: None,
            ready: None,
            changed: Instant::now(),
            seen: State::default(),
            make_at: Instant::now(),
            is_tidy: false,
            is_noted: false,
        };
        std::thread::Builder::new()
            .name("generations".into())
            .spawn(move || {
                if work.options.renews {
                    set_priority(NICE);
                }
                work.run();
            })
            .map_err(|e| Error::environment("starting a thread").with_source(e))?;
        Ok(Self(orders))
    }

    /// Who may give it orders.
    pub(super) fn orders(&self) -> Arc<Orders> {
        Arc::clone(&self.0)
    }
}

impl Drop for Renewal {
    fn drop(&mut self) {
        let mut asked = lock(&self.0.asked);
        asked.stop = true;
        asked.collections.clear();
        self.0.changed.notify_all();
    }
}

impl Orders {
    /// Has paths deleted that are dead; waits until that is done.
    ///
    /// # Errors
    /// The overlay is in use, the instance ends, it takes too long, and those of a collection.
    pub(super) fn collect(&self, freed_bytes_max: u64) -> Result<GcReport> {
        let (done, report) = mpsc::channel();
        {
            let mut asked = lock(&self.asked);
            if asked.stop {
                return Err(Error::environment(ENDS));
            }
            asked.collections.push_back(Order {
                freed_bytes_max,
                done,
            });
            self.changed.notify_all();
        }
        match report.recv_timeout(COLLECT_MAX) {
            Ok(report) => report,
            Err(RecvTimeoutError::Disconnected) => Err(Error::environment(ENDS)),
            Err(RecvTimeoutError::Timeout) => Err(Error::environment(format!(
                "the collection is not done after {} seconds",
                COLLECT_MAX.as_secs()
            ))),
        }
    }

    /// Waits, but not if a collection is asked for; true when it is to stop.
    fn wait(&self, time: Duration) -> bool {
        let waited = self
            .changed
            .wait_timeout_while(lock(&self.asked), time, |asked| {
                !asked.stop && asked.collections.is_empty()
            });
        waited.unwrap_or_else(PoisonError::into_inner).0.stop
    }
    fn next_collection(&self) -> Option<Order> {
        lock(&self.asked).collections.pop_front()
    }
    fn is_stop_asked(&self) -> bool {
        lock(&self.asked).stop
    }
}

struct Work {
    store: Store,
    generations: Generations,
    overlay: Overlay,
    layout: Layout,
    places: Places,
    shared: Arc<Shared>,
    options: Options,
    below: Vec<PathBuf>,
    orders: Arc<Orders>,
    /// The state of the store at which was decided whether a generation is due.
    looked_at: Option<State>,
    /// The generation to switch to.
    ready: Option<u64>,
    /// When the store changed last, as far as was seen, and its state then.
    changed: Instant,
    seen: State,
    /// No generation is made before.
    make_at: Instant,
    /// Nothing is mounted that is not used.
    is_tidy: bool,
    /// What the overlay stands on is what is noted.
    is_noted: bool,
}

/// The last row of a store, and how often rows were changed or went.
type State = (u64, u64);

/// What the overlay stands on now.
struct Now {
    mount: OverlayMount,
    /// None: the live mount.
    generation: Option<u64>,
    work: PathBuf,
    /// The generation of the overlay that waits below it.
    below: Option<u64>,
}

impl Work {
    fn run(&mut self) {
        let mut pause = TICK;
        let mut said = String::new();
        while !self.orders.wait(pause) {
            if let Some(order) = self.orders.next_collection() {
                let report = self.collect(order.freed_bytes_max);
                // It may not wait any more.
                let _ = order.done.send(report);
                continue;
            }
            if !self.options.renews {
                continue;
            }
            match self.step() {
                Ok(()) => pause = TICK,
                Err(error) => {
                    let text = error.chain();
                    match text == said {
                        true => tracing::debug!("{text}"),
                        false => tracing::warn!(
                            "renewing the generation that the overlay stands on: {text}{}",
                            error.hint().map(|h| format!("; {h}")).unwrap_or_default()
                        ),
                    }
                    said = text;
                    pause = (pause * 2).clamp(FAILED_PAUSE_MIN, FAILED_PAUSE_MAX);
                    self.is_tidy = false;
                }
            }
        }
    }

    fn step(&mut self) -> Result<()> {
        let now = self.now()?;
        if !self.is_noted {
            self.note(&now);
            self.is_noted = true;
        }
        if let Some(next) = now.below {
            return self.switch(&now, next);
        }
        if !self.is_tidy {
            self.tidy(&now)?;
        }
        self.look(&now)?;
        match self.ready {
            Some(next) => self.switch(&now, next),
            None => Ok(()),
        }
    }

    fn now(&self) -> Result<Now> {
        let upper = std::fs::canonicalize(&self.layout.upper)
            .map_err(|e| Error::io("resolving", &self.layout.upper, e))?;
        let stacked = OverlayMount::stacked(&self.layout.merged, &upper)?;
        let gone = || {
            Error::environment(format!(
                "no overlay of ours is mounted on {}",
                self.layout.merged.display()
            ))
        };
        let top = stacked.last().ok_or_else(gone)?;
        let generation = |entry: &mountinfo::MountEntry| {
            let lowers = entry.overlay_lower_dirs();
            self.places.number_of(&lowers)
        };
        let mount = OverlayMount::find(&self.layout.merged)?.ok_or_else(gone)?;
        Ok(Now {
            mount,
            generation: generation(top),
            work: top
                .super_option("workdir")
                .map_or_else(|| self.layout.work.clone(), PathBuf::from),
            below: match stacked.len() {
                0 | 1 => None,
                count => generation(&stacked[count - 2]),
            },
        })
    }

    /// Unmounts and drops what is not used.
    fn tidy(&mut self, now: &Now) -> Result<()> {
        let scratch = &self.places.scratch;
        if namespace::exists(scratch)
            && let Some(left) = OverlayMount::find(scratch)?
        {
            left.unmount()?;
        }
        let kept: Vec<u64> = now.generation.into_iter().chain(self.ready).collect();
        let served = self.mount_server()?.keep_generations(&kept)?;
        // What is in use out of sight is looked at again.
        self.is_tidy = served <= kept.len();
        let dropped = self.generations.prune(GENERATIONS_KEPT)?;
        if !dropped.numbers.is_empty() {
            tracing::info!("dropped generations {:?}", dropped.numbers);
        }
        Ok(())
    }

    /// Finds out whether there is a generation to switch to; makes one if it is due.
    fn look(&mut self, now: &Now) -> Result<()> {
        let state = (self.store.last_id()?, self.store.changes());
        if self.seen != state {
            (self.seen, self.changed) = (state, Instant::now());
        }
        if self.looked_at == Some(state) {
            return Ok(());
        }
        let thresholds = self.options.thresholds;
        let newer_than = |number: Option<u64>| -> Result<u64> {
            let row = match number {
                Some(number) => self.generations.get(number)?.last_row(),
                None => 0,
            };
            let much = thresholds.newer_paths_max.saturating_mul(MUCH);
            let wanted = usize::try_from(much).unwrap_or(usize::MAX - 1);
            Ok(self.store.list(row, wanted + 1)?.len() as u64)
        };
        let grown = newer_than(now.generation)?;
        self.shared.newer_paths.store(grown, Ordering::Relaxed);
        let wants = match now.generation {
            Some(number) => grown > thresholds.newer_paths_max || self.lacks_any(number)?,
            None => {
                self.options.mode == MountMode::Auto && self.store.count()? >= thresholds.paths_min
            }
        };
        if !wants {
            (self.ready, self.looked_at) = (None, Some(state));
            return Ok(());
        }
        let newest = self.generations.newest()?;
        let newest = newest.filter(|newest| Some(newest.number) > now.generation);
        if let Some(newest) = &newest {
            // Better than what is in use, whatever comes after it.
            self.ready = Some(newest.number);
            if !thresholds.is_outgrown(&self.store, newest)? {
                self.looked_at = Some(state);
                return Ok(());
            }
        }
        let much = thresholds.newer_paths_max.saturating_mul(MUCH);
        let is_quiet = self.changed.elapsed() >= QUIET || grown > much;
        if !is_quiet || Instant::now() < self.make_at {
            return Ok(());
        }
        let began = Instant::now();
        let made = stack::make(&self.generations);
        self.make_at = Instant::now() + began.elapsed() * PAUSE_FACTOR;
        self.ready = Some(made?.number);
        self.looked_at = Some(state);
        self.is_tidy = false;
        Ok(())
    }

    /// Puts the overlay on generation `next` if nobody uses it.
    fn switch(&mut self, now: &Now, next: u64) -> Result<()> {
        if let Some(why) = used(&now.mount)? {
            return self.put_off(next, why);
        }
        if now.below.is_none() {
            self.raise(next)?;
        }
        // Nothing here looks anything up in the overlay: that would be a use.
        let switched = self.overlay.alone(|| -> Result<Option<&'static str>> {
            self.replace(now, next, &mut lock(&self.shared.overlays))
        })?;
        match switched.transpose()?.unwrap_or(Some(STORE_IN_USE)) {
            Some(why) => self.put_off(next, why),
            None => self.stands_on(next),
        }
    }

    /// Puts an overlay on generation `next` in the place of that which is there, or says why not.
    fn replace(
        &self,
        now: &Now,
        next: u64,
        overlays: &mut Vec<OverlayMount>,
    ) -> Result<Option<&'static str>> {
        if self.orders.is_stop_asked() {
            return Ok(Some(ENDS));
        }
        if let Some(why) = used(&now.mount)? {
            return Ok(Some(why));
        }
        if now.below.is_none() {
            self.mount_beneath(now, next)?;
        }
        if !often(|| now.mount.unmount_if_unused())? {
            return Ok(Some(IN_USE));
        }
        // What looks up from now on looks here.
        if let Some(mount) = OverlayMount::find(&self.layout.merged)? {
            *overlays = vec![mount];
        }
        Ok(None)
    }

    /// To be called after the overlay was put on a generation.
    fn stands_on(&mut self, number: u64) -> Result<()> {
        metrics::generation_switched();
        self.ready = None;
        self.looked_at = None;
        let standing = self.standing(number);
        standing.note(&self.places);
        tracing::info!("the overlay stands on {}", standing.describe());
        self.tidy(&self.now()?)
    }

    /// True if there are paths that neither the generation nor what is newer shows: they were to be deleted, and were not.
    fn lacks_any(&self, number: u64) -> Result<bool> {
        let generation = self.generations.get(number)?;
        Ok(self.store.count_up_to(generation.last_row())? > generation.figures().paths)
    }

    /// Why names must not go below the overlay at this moment.
    fn in_the_way(&self, now: &Now) -> Result<Option<&'static str>> {
        if let Some(why) = used(&now.mount)? {
            return Ok(Some(why));
        }
        let set = now
            .generation
            .map(|number| self.places.set(number).lowers());
        let mut lowers: Vec<PathBuf> = set.into_iter().flatten().collect();
        lowers.push(self.layout.lower.clone());
        for place in lowers.clone() {
            let canonical = std::fs::canonicalize(&place);
            lowers.push(canonical.map_err(|e| Error::io("resolving", place, e))?);
        }
        let device = now.mount.entry()?.map_or((0, 0), |entry| entry.device);
        let is_below = mountinfo::is_below_another(&lowers, device)?;
        Ok(is_below.then_some("another overlay stands on its mounts"))
    }

    /// Deletes paths that are dead, as many as have `freed_bytes_max`.
    fn collect(&mut self, freed_bytes_max: u64) -> Result<GcReport> {
        let mut now = self.now()?;
        let refused = |why: &str| Error::environment(why.to_owned());
        if let Some(next) = now.below {
            self.switch(&now, next)?;
            now = self.now()?;
            if now.below.is_some() {
                return Err(refused(IN_USE));
            }
        }
        let dead = {
            let collection = self.store.begin_collection()?;
            collection.dead_but_for(now.generation, freed_bytes_max)?
        };
        if dead.is_empty() {
            return Ok(GcReport::default());
        }
        if let Some(why) = self.in_the_way(&now)? {
            return Err(refused(why));
        }
        // Whatever comes of it, all is looked at again.
        self.looked_at = None;
        self.is_noted = false;
        self.is_tidy = false;
        let next = match now.generation {
            Some(_) if !self.options.renews => {
                return Err(refused(
                    "it stays on its image, since the setting `image-renew` is off",
                ));
            }
            Some(_) => {
                let made = stack::make_without(&self.generations, &dead)?;
                self.raise(made.number)?;
                Some(made.number)
            }
            None => None,
        };
        // From here on nobody makes a temporary root, and clients may wait.
        let _hurry = Hurry::begin();
        let collection = self.store.begin_collection()?;
        let dead_now = collection.dead_but_for(now.generation, u64::MAX)?;
        if !dead.is_subset(&dead_now) {
            return Err(refused("something has come to need what was dead"));
        }
        let done = self.overlay.alone(|| -> Result<_> {
            let mut overlays = lock(&self.shared.overlays);
            if let Some(why) = self.in_the_way(&now)? {
                return Ok(Err(why));
            }
            if let Some(next) = next {
                if let Some(why) = self.replace(&now, next, &mut overlays)? {
                    return Ok(Err(why));
                }
                self.mount_server()?.keep_generations(&[next])?;
            }
            let report = collection.delete(&dead)?;
            if next.is_none() {
                overlays.iter().try_for_each(OverlayMount::remount)?;
            }
            Ok(Ok(report))
        })?;
        drop(collection);
        let report = done
            .transpose()?
            .unwrap_or(Err(STORE_IN_USE))
            .map_err(refused)?;
        if let Some(next) = next {
            if !self.lacks_any(next)? {
                self.generations.has_become_whole(next)?;
            }
            self.stands_on(next)?;
        }
        tracing::info!("deleted {} paths", report.paths.len());
        Ok(report)
    }

    fn raise(&self, next: u64) -> Result<()> {
        let mounted = self.mount_server()?.mount_generation(next)?;
        tracing::debug!("generation {next} is mounted: {}", mounted.route.describe());
        // Publications from now on are told to its live mount.
        match self.options.remotes.wait_for(&newer_name(next), DEVICE_MAX) {
            true => Ok(()),
            false => Err(Error::environment(format!(
                "the supervisor has not passed on the live mount beside generation {next}"
            ))),
        }
    }

    fn mount_beneath(&self, now: &Now, next: u64) -> Result<()> {
        let set = self.places.set(next);
        if !set.is_mounted(&mountinfo::mounts()?) {
            return Err(Error::environment(format!(
                "generation {next} was mounted and is gone"
            )));
        }
        let mut other = self.layout.work.clone().into_os_string();
        other.push(OTHER_WORK);
        let work = [self.layout.work.clone(), PathBuf::from(other)]
            .into_iter()
            .find(|work| std::fs::canonicalize(work).ok().as_ref() != Some(&now.work))
            .unwrap_or_default();
        for dir in [&work, &self.places.scratch] {
            std::fs::create_dir_all(dir).map_err(|e| Error::io("creating", dir, e))?;
        }
        let layers = OverlayLayers {
            lowers: set.lowers().into_iter().chain(self.below.clone()).collect(),
            upper: self.layout.upper.clone(),
            work,
        };
        let in_user_namespace = namespace::in_user_namespace();
        OverlayMount::mount_beneath(
            &layers,
            &self.layout.merged,
            &self.places.scratch,
            in_user_namespace,
        )
    }

    /// Says what it waits for.
    fn put_off(&self, next: u64, why: &str) -> Result<()> {
        let before = Standing::read(&self.layout).unwrap_or_default();
        let standing = Standing {
            next: Some(next),
            waits_for: Some(why.to_owned()),
            ..before.clone()
        };
        metrics::generation_put_off();
        if standing != before {
            tracing::info!("generation {next} waits: {why}");
            standing.note(&self.places);
        }
        Ok(())
    }

    /// Writes down what a daemon that was killed right after a switch has not.
    fn note(&self, now: &Now) {
        let noted = Standing::read(&self.layout).unwrap_or_default();
        if let Some(number) = now.generation
            && noted.generation != now.generation
        {
            self.standing(number).note(&self.places);
        }
    }

    fn standing(&self, generation: u64) -> Standing {
        // It is mounted: this only says how.
        let mounted = self
            .mount_server()
            .and_then(|mut server| server.mount_generation(generation))
            .inspect_err(|error| tracing::debug!("{}", error.chain()))
            .ok();
        Standing {
            generation: Some(generation),
            route: mounted.as_ref().map(|mounted| mounted.route),
            reason: mounted.and_then(|mounted| mounted.reason),
            ..Standing::default()
        }
    }

    fn mount_server(&self) -> Result<control::Client> {
        let at = self.layout.mount_control();
        control::Client::connect(&at)?.ok_or_else(|| {
            Error::environment(format!("no mount server listens on {}", at.display()))
        })
    }
}

const IN_USE: &str = "something in the overlay is open or runs";
const STORE_IN_USE: &str = "Nix has the store open";
const ENDS: &str = "the instance ends";

/// Asks until it is so, some times.
fn often(is_so: impl Fn() -> Result<bool>) -> Result<bool> {
    for _ in 0..TRIES {
        if is_so()? {
            return Ok(true);
        }
        std::thread::sleep(TRY_PAUSE);
    }
    Ok(false)
}

/// A thread with the usual priority, until it is dropped.
struct Hurry(i32);

impl Hurry {
    fn begin() -> Self {
        let before = rustix::process::getpriority_process(None).unwrap_or(0);
        if before > 0 {
            set_priority(0);
        }
        Self(before)
    }
}

impl Drop for Hurry {
    fn drop(&mut self) {
        if self.0 > 0 {
            set_priority(self.0);
        }
    }
}

/// On Linux this is the thread's own. Who may not raise it stays slow.
fn set_priority(nice: i32) {
    if let Err(error) = rustix::process::setpriority_process(None, nice) {
        tracing::debug!(%error, "setting the priority to {nice}");
    }
}

/// Who uses the overlay, as far as the kernel says.
fn used(mount: &OverlayMount) -> Result<Option<&'static str>> {
    if !often(|| mount.is_unused())? {
        return Ok(Some(IN_USE));
    }
    let Some(entry) = mount.entry()? else {
        return Ok(Some("the overlay is not mounted"));
    };
    Ok(mountinfo::held_elsewhere(&entry)?
        .map(|_| "another mount namespace has the overlay, such as a container or a build"))
}
