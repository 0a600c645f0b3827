//! What an instance mounts so that its overlay stands on an image: the blob server, a generation, and a live mount of
//! what is newer than it.
//!
//! ```text
//! overlay   lowerdir=STATE/image/7/newer:STATE/image/7/store
//!           7/newer: FUSE, paths that were published after generation 7
//!           7/store: EROFS, the generation; contents from STATE/image/blob (FUSE)
//! ```
//! Overlayfs merges directories that two lowers have, at the cost of both: so no path is in both. The live mount of
//! everything, which stock Nix and tools look at, stays where it is.
//!
//! - Which generation: the newest, if it is sound and the store has not grown by more than some paths since
//!   ([`Thresholds`]); else one is made. That is what happens when an instance starts, while nobody uses its overlay. Later
//!   the daemon may ask for another generation beside it ([`Stack::raise`]), put the overlay on it, and let go of the one before
//!   ([`Stack::keep_only`]); see `up::renewal`.
//! - If it cannot be done, the live mount serves alone, and [`Standing`] says why.
//! - The server of the FUSE mounts may die: see [`Stack::go_on`]. The images stay mounted meanwhile, and their readers
//!   wait. A generation's lock is held with its live mount.
//! - What somebody uses out of sight, such as a container with an overlay of its own, is served until it does not any more.

use super::mounted::{MountOptions, MountedImage};
use super::{Generation, Generations, HotOptions, InUse};
use crate::config::Layout;
use crate::import::Selection;
use crate::mount::{
    BlobMount, Handover, LiveHandover, LiveMount, LiveOptions, Route, RowsAfter, mountinfo,
};
use crate::{Error, Result, Store, StoreOptions, namespace};
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::mount::UnmountFlags;
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use understory_nix::StorePath;

/// Generations that stay when a new one is made, besides those that are mounted.
pub(crate) const GENERATIONS_KEPT: usize = 2;
/// Generations that are mounted at a time: one that is used, one that shall be, and some that are let go of.
const MOUNTED_MAX: usize = 8;
/// Under which name the blob server is held.
const HELD_BLOB: &str = "image-blob";
/// What the names begin with under which the live mounts of what is newer are held: the generation's lock, then as every
/// live mount.
const HELD_NEWER: &str = "image-newer-";
/// Which of these notifications go through: the device, after the lock and the memory of the nodes.
const NOTIFY_NEWER: usize = 2;

/// When an image pays.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Thresholds {
    /// A store with fewer paths is quick enough without an image, unless one is asked for.
    pub paths_min: u64,
    /// Paths that the live part may have before a new generation is made; each lookup that misses them asks the server.
    pub newer_paths_max: u64,
}

impl Default for Thresholds {
    fn default() -> Self {
        Self {
            paths_min: 100,
            newer_paths_max: 64,
        }
    }
}

impl Thresholds {
    /// True if the store has grown by more than the live part may have since `generation` was made.
    pub(crate) fn is_outgrown(&self, store: &Store, generation: &Generation) -> Result<bool> {
        let wanted = usize::try_from(self.newer_paths_max).unwrap_or(usize::MAX - 1);
        Ok(store.list(generation.last_row(), wanted + 1)?.len() > wanted)
    }
}

/// What an overlay shall stand on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum MountMode {
    /// An image where it pays and can be mounted, else the live mount.
    #[default]
    Auto,
    /// The live mount.
    Live,
    /// An image, or nothing is started.
    Image,
}

/// How an instance mounts.
#[derive(Debug, Clone, Copy, Default)]
pub struct StackOptions {
    /// What the overlay stands on.
    pub mode: MountMode,
    /// Use the raw tier.
    pub hot: Option<HotOptions>,
    /// When an image pays.
    pub thresholds: Thresholds,
}

/// Where the mounts are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Places {
    dir: PathBuf,
    /// The blob server.
    pub blob: PathBuf,
    /// Where an overlay is made before it goes to its place.
    pub(crate) scratch: PathBuf,
    /// What [`Standing`] is kept in.
    note: PathBuf,
}

/// Where the mounts of one generation are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SetPlaces {
    dir: PathBuf,
    /// The image.
    pub image: PathBuf,
    /// The live mount of what is newer.
    pub newer: PathBuf,
}

impl Places {
    /// Those of an instance.
    pub fn of(layout: &Layout) -> Self {
        let dir = layout.state.join("image");
        Self {
            blob: dir.join("blob"),
            scratch: dir.join("overlay"),
            note: layout.run.join("image.json"),
            dir,
        }
    }

    /// Those of a generation.
    pub fn set(&self, number: u64) -> SetPlaces {
        let dir = self.dir.join(number.to_string());
        SetPlaces {
            image: dir.join("store"),
            newer: dir.join("newer"),
            dir,
        }
    }

    /// All that may be mounted here, what lies on others first.
    pub(crate) fn all(&self) -> Vec<(PathBuf, &'static str)> {
        let mut all = vec![(self.scratch.clone(), "overlay")];
        let sets: Vec<_> = self.numbers().into_iter().map(|n| self.set(n)).collect();
        all.extend(
            sets.iter()
                .map(|set| (set.image.clone(), crate::mount::EROFS_TYPE)),
        );
        all.extend(
            sets.into_iter()
                .map(|set| (set.newer, crate::mount::FUSE_TYPE)),
        );
        all.push((self.blob.clone(), crate::mount::FUSE_TYPE));
        all
    }

    /// Removes the directories of generations that are not mounted.
    pub(crate) fn remove_unused(&self) {
        for number in self.numbers() {
            self.set(number).remove();
        }
    }

    /// Generations that have a place, sorted.
    fn numbers(&self) -> Vec<u64> {
        super::numbers(&self.dir).unwrap_or_default()
    }

    /// The generation whose mounts these lower directories of an overlay are.
    pub(crate) fn number_of(&self, lowers: &[PathBuf]) -> Option<u64> {
        let newer = lowers.first()?;
        let number = newer.parent()?.file_name()?.to_str()?.parse().ok()?;
        let dir = std::fs::canonicalize(&self.dir).ok()?;
        (newer.parent()?.parent()? == dir).then_some(number)
    }

    /// The newest generation that is mounted.
    ///
    /// # Errors
    /// Mountinfo cannot be read.
    pub fn mounted(&self) -> Result<Option<u64>> {
        let mounts = mountinfo::mounts()?;
        let is_mounted = |number: &u64| self.set(*number).is_mounted(&mounts);
        Ok(self.numbers().into_iter().rev().find(is_mounted))
    }
}

impl SetPlaces {
    /// The lower directories of an overlay that stands on it, uppermost first.
    pub fn lowers(&self) -> [PathBuf; 2] {
        [self.newer.clone(), self.image.clone()]
    }

    /// True if both are among `mounts`.
    pub(crate) fn is_mounted(&self, mounts: &[mountinfo::MountEntry]) -> bool {
        let is = |path: &Path, fs_type: &str| {
            std::fs::canonicalize(path)
                .ok()
                .and_then(|path| mountinfo::topmost_at(mounts, &path))
                .is_some_and(|entry| entry.fs_type == fs_type)
        };
        is(&self.image, crate::mount::EROFS_TYPE) && is(&self.newer, crate::mount::FUSE_TYPE)
    }
}

/// Generations that the overlays of an instance stand on, the lowest first. Asks nothing that is mounted.
pub(crate) fn stood_on(layout: &Layout) -> Result<Vec<u64>> {
    let Some((dir, name)) = layout.merged.parent().zip(layout.merged.file_name()) else {
        return Ok(Vec::new());
    };
    let merged = match std::fs::canonicalize(dir) {
        Ok(dir) => dir.join(name),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(Error::io("resolving", dir, e)),
    };
    let (mounts, places) = (mountinfo::mounts()?, Places::of(layout));
    let overlays = mountinfo::stacked_at(&mounts, &merged);
    let number = |entry: &mountinfo::MountEntry| places.number_of(&entry.overlay_lower_dirs());
    Ok(overlays.into_iter().filter_map(number).collect())
}

/// What an overlay stands on, and why.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Standing {
    /// The generation; none if the live mount serves alone.
    pub generation: Option<u64>,
    /// How the kernel reads the image.
    pub route: Option<Route>,
    /// Why it is no image, or not mounted in the best way.
    pub reason: Option<String>,
    /// The generation that waits to be used instead.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next: Option<u64>,
    /// What it waits for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub waits_for: Option<String>,
}

impl Standing {
    /// Reads what an instance has noted; `None` if it has noted nothing.
    pub fn read(layout: &Layout) -> Option<Self> {
        let text = std::fs::read(Places::of(layout).note).ok()?;
        serde_json::from_slice(&text).ok()
    }

    /// One line for people.
    pub fn describe(&self) -> String {
        let mut text = match (self.generation, self.route) {
            (Some(number), Some(route)) => {
                format!("an image, generation {number}: {}", route.describe())
            }
            (Some(number), None) => format!("an image, generation {number}"),
            (None, _) => "the live mount".to_owned(),
        };
        if let Some(reason) = &self.reason {
            text.push_str(&format!(" ({reason})"));
        }
        if let (Some(next), Some(why)) = (self.next, &self.waits_for) {
            text.push_str(&format!("; generation {next} waits: {why}"));
        }
        text
    }

    /// Writes it down, for [`Standing::read`].
    pub(crate) fn note(&self, places: &Places) {
        let new = places.note.with_extension("new");
        let written = serde_json::to_vec(self)
            .map_err(std::io::Error::from)
            .and_then(|text| std::fs::write(&new, text))
            .and_then(|()| std::fs::rename(&new, &places.note));
        if let Err(error) = written {
            tracing::warn!("writing {}: {error}", places.note.display());
        }
    }
}

/// Lets another process hold descriptors under a name.
pub trait Holder: Send + Sync {
    /// Holds them from now on, with what the next server must know, and the number of the descriptor that notifications go
    /// through. They are held when it returns.
    ///
    /// # Errors
    /// That process is gone.
    fn hold(
        &self,
        name: &str,
        state: &serde_json::Value,
        descriptors: &[BorrowedFd<'_>],
        notify: Option<usize>,
    ) -> Result<()>;

    /// Holds what is under that name no more.
    ///
    /// # Errors
    /// That process is gone.
    fn release(&self, name: &str) -> Result<()>;
}

/// What is held under a name.
pub struct HeldParts {
    /// The name.
    pub name: String,
    /// As it was given.
    pub state: serde_json::Value,
    /// In the same order.
    pub descriptors: Vec<OwnedFd>,
}

/// True if that is the name under which the live mount of what is newer than a generation is held.
pub(crate) fn is_newer(name: &str) -> bool {
    name.starts_with(HELD_NEWER)
}

/// The name under which the live mount of what is newer than a generation is held.
pub(crate) fn newer_name(number: u64) -> String {
    format!("{HELD_NEWER}{number}")
}

/// The mounts of one instance. [`Stack::unmount`] undoes them; a server that dies leaves them to the next one.
pub struct Stack {
    store: Store,
    places: Places,
    options: MountOptions,
    holder: Arc<dyn Holder>,
    mounts: Mutex<Mounts>,
}

#[derive(Default)]
struct Mounts {
    /// None until the first generation is mounted.
    blob: Option<BlobMount>,
    sets: Vec<Set>,
}

impl Mounts {
    fn push(&mut self, set: Set) {
        if let Some(blob) = &self.blob {
            blob.set_mounted(set.number, true);
        }
        self.sets.push(set);
    }
}

/// A generation and what is newer.
struct Set {
    number: u64,
    /// None after a takeover: then the kernel has it, and nobody else.
    image: Option<MountedImage>,
    newer: LiveMount,
    route: Route,
    reason: Option<String>,
    /// After a takeover: keeps the generation in use.
    _lock: Option<File>,
}

/// What the next server must know of a live mount of what is newer.
#[derive(Clone, Serialize, Deserialize)]
struct NewerState {
    handover: Handover,
    generation: u64,
    last_row: u64,
    route: Route,
    reason: Option<String>,
}

impl Stack {
    /// Mounts what is wanted for the store in `layout`; nothing if the live mount shall serve alone.
    ///
    /// # Errors
    /// An image was asked for and cannot be had.
    pub fn begin(
        store: &Store,
        layout: &Layout,
        options: &StackOptions,
        holder: Arc<dyn Holder>,
    ) -> Result<Self> {
        let stack = Self::new(store, layout, options, holder);
        let begun = match options.mode {
            MountMode::Live => Err(Error::user("an image was not asked for")),
            MountMode::Auto | MountMode::Image if namespace::in_user_namespace() => Err(
                Error::environment("EROFS cannot be mounted in a user namespace"),
            ),
            MountMode::Auto if store.count()? < options.thresholds.paths_min => {
                Err(Error::user(format!(
                    "the store has fewer than {} paths",
                    options.thresholds.paths_min
                )))
            }
            MountMode::Auto | MountMode::Image => {
                choose(layout, &options.thresholds).and_then(|in_use| stack.mount(in_use))
            }
        };
        let standing = match begun {
            Ok(standing) => standing,
            Err(error) if options.mode == MountMode::Image => return Err(error),
            Err(error) => Standing {
                reason: Some(error.chain()),
                ..Standing::default()
            },
        };
        tracing::info!("the overlay stands on {}", standing.describe());
        standing.note(&stack.places);
        Ok(stack)
    }

    fn new(
        store: &Store,
        layout: &Layout,
        options: &StackOptions,
        holder: Arc<dyn Holder>,
    ) -> Self {
        Self {
            store: store.clone(),
            places: Places::of(layout),
            options: MountOptions {
                hot: options.hot,
                ..MountOptions::default()
            },
            holder,
            mounts: Mutex::default(),
        }
    }

    /// Mounts a generation beside those that are mounted already.
    ///
    /// # Errors
    /// It cannot be had; too many are mounted.
    pub fn raise(&self, number: u64) -> Result<Standing> {
        {
            let mounts = super::lock_mutex(&self.mounts);
            if let Some(set) = mounts.sets.iter().find(|set| set.number == number) {
                if !set.newer.is_mounted() {
                    return Err(Error::environment(format!(
                        "generation {number} was unmounted and is in use somewhere"
                    )));
                }
                return Ok(set.standing());
            }
            if mounts.sets.len() >= MOUNTED_MAX {
                return Err(Error::environment(format!(
                    "{MOUNTED_MAX} generations are mounted or in use somewhere"
                )));
            }
        }
        let generations = Generations::of(&self.store);
        self.mount(generations.take(&generations.get(number)?)?)
    }

    fn mount(&self, in_use: InUse) -> Result<Standing> {
        let mut mounts = super::lock_mutex(&self.mounts);
        let lock = in_use
            .lock()
            .try_clone()
            .map_err(|e| Error::environment("duplicating a lock").with_source(e))?;
        let (number, last_row) = (in_use.generation().number, in_use.generation().last_row());
        let set = self.places.set(number);
        // Not the blob server's if it is mounted: a look at it would be answered by this process, and were that killed in
        // between, this thread would wait where no signal reaches it, and the mount could not end.
        let blob = mounts.blob.is_none().then_some(&self.places.blob);
        for dir in [&set.image, &set.newer].into_iter().chain(blob) {
            std::fs::create_dir_all(dir).map_err(|e| Error::io("creating", dir, e))?;
        }
        // What a server that was killed in the middle of this has left.
        crate::mount::ImageMount::unmount_at(&set.image)?;
        let blob = match &mounts.blob {
            Some(blob) => blob,
            None => {
                let blob = super::mounted::serve_held(
                    &self.store,
                    &self.places.blob,
                    &self.options,
                    &mut |live| self.hold_blob(live),
                )?;
                mounts.blob.insert(blob)
            }
        };
        let mounted = MountedImage::mount(in_use, blob.mountpoint(), &set.image, &self.options)
            .and_then(|image| {
                let route = image.mount_point().route();
                let reason = image.mount_point().reason().map(str::to_owned);
                let hold: &mut dyn FnMut(&LiveHandover<'_>) -> Result<()> = &mut |live| {
                    let state = NewerState {
                        handover: live.state.clone(),
                        generation: number,
                        last_row,
                        route,
                        reason: reason.clone(),
                    };
                    self.hold_newer(&state, &lock, live)
                };
                let options = newer_options(last_row);
                let newer = LiveMount::mount_held(&self.store, &set.newer, &options, hold)
                    // The image is unmounted by being dropped.
                    .inspect_err(|_| self.release(&newer_name(number)))?;
                Ok(Set {
                    number,
                    image: Some(image),
                    newer,
                    route,
                    reason,
                    _lock: None,
                })
            });
        match mounted {
            Ok(set) => {
                let standing = set.standing();
                mounts.push(set);
                Ok(standing)
            }
            Err(error) => {
                if mounts.sets.is_empty()
                    && let Some(blob) = mounts.blob.take()
                {
                    let _ = blob.unmount();
                    self.release(HELD_BLOB);
                }
                set.remove();
                Err(error)
            }
        }
    }

    /// Serves mounts whose server is dead, from what it had given to its holder. With `refuse_resent`, requests that the
    /// dead server had read are answered with EIO.
    ///
    /// # Errors
    /// What was held is not of this version.
    pub fn go_on(
        store: &Store,
        layout: &Layout,
        options: &StackOptions,
        held: Vec<HeldParts>,
        refuse_resent: bool,
        holder: Arc<dyn Holder>,
    ) -> Result<Self> {
        let stack = Self::new(store, layout, options, holder);
        let mut mounts = Mounts::default();
        let mut sets = Vec::new();
        for held in held {
            if held.name == HELD_BLOB {
                let blob = super::mounted::take_over(
                    store,
                    &from_json(held.state)?,
                    held.descriptors,
                    &stack.options,
                    refuse_resent,
                    &mut |live| stack.hold_blob(live),
                )?;
                mounts.blob = Some(blob);
            } else if is_newer(&held.name) {
                sets.push(stack.take_over(held, refuse_resent)?);
            }
        }
        sets.into_iter().for_each(|set| mounts.push(set));
        *super::lock_mutex(&stack.mounts) = mounts;
        Ok(stack)
    }

    fn take_over(&self, held: HeldParts, refuse_resent: bool) -> Result<Set> {
        let mut descriptors = held.descriptors;
        if descriptors.is_empty() {
            return Err(Error::internal(format!(
                "{} was handed over without a descriptor",
                held.name
            )));
        }
        let lock = File::from(descriptors.remove(0));
        let state: NewerState = from_json(held.state)?;
        let newer = LiveMount::take_over(
            &self.store,
            &state.handover,
            descriptors,
            &newer_options(state.last_row),
            refuse_resent,
            &mut |live| {
                let state = NewerState {
                    handover: live.state.clone(),
                    ..state.clone()
                };
                self.hold_newer(&state, &lock, live)
            },
        )?;
        Ok(Set {
            number: state.generation,
            image: None,
            newer,
            route: state.route,
            reason: state.reason,
            _lock: Some(lock),
        })
    }

    fn hold_blob(&self, live: &LiveHandover<'_>) -> Result<()> {
        let state = to_json(live.state)?;
        self.holder.hold(HELD_BLOB, &state, &live.descriptors, None)
    }

    fn hold_newer(&self, state: &NewerState, lock: &File, live: &LiveHandover<'_>) -> Result<()> {
        let mut all = vec![lock.as_fd()];
        all.extend(&live.descriptors);
        let name = newer_name(state.generation);
        self.holder
            .hold(&name, &to_json(state)?, &all, Some(NOTIFY_NEWER))
    }

    fn release(&self, name: &str) {
        if let Err(error) = self.holder.release(name) {
            tracing::warn!("{}", error.chain());
        }
    }

    /// Unmounts all generations but these; returns how many are served, with those that somebody uses out of sight.
    ///
    /// # Errors
    /// Not permitted; the others were unmounted nevertheless.
    pub fn keep_only(&self, numbers: &[u64]) -> Result<usize> {
        let mut mounts = super::lock_mutex(&self.mounts);
        let Mounts { blob, sets } = &mut *mounts;
        let mut failed = Ok(());
        sets.retain(|set| {
            if numbers.contains(&set.number) {
                return true;
            }
            let places = self.places.set(set.number);
            let ended = set
                .unmount_image(&places)
                .and_then(|()| set.newer.let_go())
                .unwrap_or_else(|error| {
                    failed = Err(error);
                    false
                });
            if ended {
                if let Some(blob) = blob {
                    blob.set_mounted(set.number, false);
                }
                self.release(&newer_name(set.number));
                places.remove();
            }
            !ended
        });
        for number in self.places.numbers() {
            if numbers.contains(&number) || mounts.sets.iter().any(|set| set.number == number) {
                continue;
            }
            // Of a server that was killed before anybody held it.
            let places = self.places.set(number);
            failed = failed.and(places.unmount_left());
            places.remove();
        }
        failed.map(|()| mounts.sets.len())
    }

    /// How long the request takes that has been worked on longest.
    pub fn busy_for(&self) -> Duration {
        let Ok(mounts) = self.mounts.try_lock() else {
            // Something is being mounted, which is work.
            return Duration::ZERO;
        };
        let newer = mounts.sets.iter().map(|set| set.newer.busy_for());
        let blob = mounts.blob.iter().map(BlobMount::busy_for);
        newer.chain(blob).max().unwrap_or_default()
    }

    /// Unmounts all; the overlay on top must be unmounted before.
    ///
    /// # Errors
    /// The first thing that failed; the rest was done nevertheless.
    pub fn unmount(&self) -> Result<()> {
        let mounts = super::lock_mutex(&self.mounts);
        let mut first = Ok(());
        for set in &mounts.sets {
            let places = self.places.set(set.number);
            first = first.and(set.unmount_image(&places));
            first = first.and(set.newer.unmount());
            places.remove();
        }
        let _ = std::fs::remove_file(&self.places.note);
        let blob = mounts.blob.as_ref().map_or(Ok(()), BlobMount::unmount);
        first.and(blob)
    }
}

impl Set {
    fn unmount_image(&self, places: &SetPlaces) -> Result<()> {
        match &self.image {
            Some(image) => image.mount_point().unmount(),
            None if !namespace::exists(&places.image) => Ok(()),
            None => crate::mount::ImageMount::unmount_at(&places.image),
        }
    }

    fn standing(&self) -> Standing {
        Standing {
            generation: Some(self.number),
            route: Some(self.route),
            reason: self.reason.clone(),
            ..Standing::default()
        }
    }
}

impl SetPlaces {
    /// Unmounts what nobody serves any more. Asks nothing that is mounted.
    fn unmount_left(&self) -> Result<()> {
        let dir =
            std::fs::canonicalize(&self.dir).map_err(|e| Error::io("resolving", &self.dir, e))?;
        let types = [crate::mount::EROFS_TYPE, crate::mount::FUSE_TYPE];
        for (path, own_type) in [&self.image, &self.newer].into_iter().zip(types) {
            let at = path
                .file_name()
                .map_or_else(|| dir.clone(), |name| dir.join(name));
            if mountinfo::mount_at(&at)?.is_some_and(|entry| entry.fs_type == own_type) {
                rustix::mount::unmount(&at, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW)
                    .map_err(|e| Error::io("unmounting", &at, e.into()))?;
                tracing::info!("unmounted {}, which nobody served", at.display());
            }
        }
        Ok(())
    }

    /// Removes the directories, which are empty unless something is mounted still.
    fn remove(&self) {
        for dir in [&self.image, &self.newer, &self.dir] {
            let _ = std::fs::remove_dir(dir);
        }
    }
}

/// The generation to mount; makes one if there is none that fits.
fn choose(layout: &Layout, thresholds: &Thresholds) -> Result<InUse> {
    // To make one it must be written; what serves it afterwards only reads.
    let store = Store::open(&layout.store, &StoreOptions::default())?;
    let generations = Generations::of(&store);
    if let Some(newest) = generations.newest()?
        && !thresholds.is_outgrown(&store, &newest)?
    {
        match generations.take(&newest) {
            Ok(in_use) => return Ok(in_use),
            Err(error) => tracing::info!("{}", error.chain()),
        }
    }
    let made = make(&generations)?;
    let in_use = generations.take(&made)?;
    generations.prune(GENERATIONS_KEPT)?;
    Ok(in_use)
}

/// Makes a generation of everything.
pub(crate) fn make(generations: &Generations) -> Result<Generation> {
    generations.make(&Selection::All, &mut |_| {}).map(count)
}

/// The same without `paths`, which are to be deleted.
pub(crate) fn make_without(
    generations: &Generations,
    paths: &BTreeSet<StorePath>,
) -> Result<Generation> {
    generations.make_without(paths).map(count)
}

fn count(made: Generation) -> Generation {
    let figures = made.figures();
    tracing::info!(
        "made generation {} of {} paths in {} ms, an image of {} bytes",
        made.number,
        figures.paths,
        figures.made_ms,
        made.image_bytes()
    );
    crate::metrics::generation_made(Duration::from_millis(figures.made_ms));
    made
}

fn newer_options(last_row: u64) -> LiveOptions {
    LiveOptions {
        filter: Some(Arc::new(RowsAfter::new(last_row))),
        ..LiveOptions::default()
    }
}

fn to_json(value: &impl Serialize) -> Result<serde_json::Value> {
    serde_json::to_value(value).map_err(|e| Error::internal("writing JSON").with_source(e))
}

fn from_json<T: for<'de> Deserialize<'de>>(value: serde_json::Value) -> Result<T> {
    serde_json::from_value(value)
        .map_err(|e| Error::internal("what is held of an image").with_source(e))
}
