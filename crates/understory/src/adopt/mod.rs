//! Adoption: an existing Nix store gets a castore underneath, in place, and can have it taken away again.
//!
//! What `/nix/store` holds is copied into a castore, read back, and the overlay (castore below, a fresh upper
//! directory on top) is mounted *over* the store directory, which stays as it was underneath. Nix's own database
//! and state directory become those of the overlay store as they are: rows of paths that the lower store has are
//! what an overlay store keeps anyhow. Space comes back when [`Adoption::reclaim`] deletes originals.
//!
//! Invariants
//! - Nothing of Nix's is changed before everything is in the castore and verified; its database never.
//! - An original is deleted only after its bytes were read back from the castore and hashed, and only while the
//!   overlay shows it.
//! - Whenever it stops, running the same command again goes on; [`Adoption::undo`] works from every state. What is
//!   done is found by looking (`state` has only the phase): valid paths of the castore, objects in the upper
//!   directory, objects in the store directory.
//! - The swap happens under Nix's `big-lock` and `gc.lock`: no Nix has the store open, nothing is added. Processes
//!   that use files of the store go on: what they have open stays open.
//! - Adding to the store directory while the overlay is not mounted (after a restart, say) is allowed: the next
//!   adoption or start brings it to the upper directory (see [`Adoption::adopt`]).
//!
//! Cost: the import reads every file once (see [`crate::import`]), verification reads the castore once. The swap
//! holds Nix's locks for a look at each row (some 10 µs) and a second, mostly empty, import.

mod examine;
mod nix_store;
mod reclaim;
mod state;
mod tree;
mod undo;
mod verify;

pub use examine::{Estimate, Examination};
pub use nix_store::User;
pub use reclaim::Reclaimed;
pub(crate) use state::refuse_deletion;
pub use state::{FILE, Phase, State, complete_layout};
pub use undo::Undone;

use crate::config::{Layout, LayoutOptions, absolute};
use crate::doctor::is_locked;
use crate::import::{self, Importer, LocalSource, Selection, Source};
use crate::mount::mountinfo;
use crate::{Error, Result, Store, StoreOptions, control, namespace, supervisor, up};
use nix_store::{NixStore, Original, Valid};
use serde::Serialize;
use std::collections::HashMap;
use std::fs::{self, File};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;
use understory_nix::{NarHash, StoreDir, StorePath};

/// Paths without an object that an outcome names.
const MISSING_NAMED_MAX: usize = 20;
/// Paths whose trees are read through the mount unless all are.
pub const MOUNT_SAMPLE_PATHS: usize = 64;
/// Rows of the castore that are looked at together.
const ROWS_MAX: usize = 1000;

/// What to adopt, and where to.
#[derive(Debug, Clone)]
pub struct Options {
    /// The directory that holds `nix/store` and `nix/var/nix`; `/` is this machine's.
    pub root: PathBuf,
    /// The castore; made if there is none.
    pub store: PathBuf,
    /// State directory of the instance; the castore's directory by default.
    pub state: Option<PathBuf>,
    /// The overlay's upper directory.
    pub upper: Option<PathBuf>,
    /// The overlay's work directory.
    pub work: Option<PathBuf>,
    /// How the castore is opened.
    pub store_options: StoreOptions,
    /// Threads that read; 0 is one for each core.
    pub jobs: usize,
    /// Reads every path through the mount, instead of [`MOUNT_SAMPLE_PATHS`].
    pub verify_all: bool,
    /// How long to wait for those who use the store.
    pub wait: Duration,
}

/// What is being done, for whoever watches.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// The store is looked at.
    Examining,
    /// A sample goes into a castore of its own.
    Sampling,
    /// Paths go into the castore.
    Importing,
    /// The castore is read back.
    Verifying,
    /// Paths are read through the mount.
    Comparing,
    /// Originals are deleted.
    Reclaiming,
    /// Originals are compared and made.
    Restoring,
}

/// How far a step is. Totals of 0 are not known.
#[derive(Debug, Clone, Copy)]
pub struct Progress {
    /// The step.
    pub step: Step,
    /// Paths done, and of how many.
    pub paths: (u64, u64),
    /// Bytes done, and of how many.
    pub bytes: (u64, u64),
    /// Bytes that were new to the castore.
    pub new_bytes: u64,
}

/// What an adoption, a reclaim or an undo is given by whoever asks for it.
pub struct Control<'a> {
    /// Is told how it goes on, from any thread.
    pub progress: &'a (dyn Fn(Progress) + Sync),
    /// Ends the work early when it becomes true; what was done is kept.
    pub cancel: &'a AtomicBool,
}

/// Does something with the instance of a layout.
pub type Call<'a> = &'a dyn Fn(&Layout) -> Result<()>;

/// How an instance is started and stopped. It must be another process: one that reads through a mount that it
/// serves itself cannot be killed.
#[derive(Clone, Copy)]
pub struct Starter<'a> {
    /// Starts it (`understory up`); returns when its overlay is mounted.
    pub start: Call<'a>,
    /// Stops it; returns when its overlay is unmounted.
    pub stop: Call<'a>,
}

/// What an adoption did.
#[derive(Debug, Clone, Default, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Adopted {
    /// Valid paths.
    pub paths: u64,
    /// Of these, imported by this run.
    pub imported: u64,
    /// Paths read back and hashed by this run.
    pub verified: u64,
    /// Objects that were added while the overlay was not mounted, brought to the upper directory by this run.
    pub caught_up: u64,
    /// True if the overlay is mounted.
    pub is_mounted: bool,
    /// Valid paths whose objects are nowhere, at most twenty; those were lost before.
    pub missing: Vec<String>,
}

/// One Nix store and the castore that it gets.
#[derive(Debug)]
pub struct Adoption {
    nix: NixStore,
    layout: Layout,
    options: Options,
}

impl Adoption {
    /// Looks at what is to be adopted; changes nothing.
    ///
    /// # Errors
    /// There is no Nix store of the known kind; the castore has adopted another one; places that cannot be.
    pub fn new(options: Options) -> Result<Self> {
        let nix = NixStore::open(&options.root)?;
        let store = absolute(&options.store)?;
        let state = State::load(&store)?;
        let wanted = LayoutOptions {
            state: options.state.clone(),
            upper: options.upper.clone(),
            work: options.work.clone(),
            merged: Some(nix.real.clone()),
            nix_state: Some(nix.state.clone()),
            nix_log: Some(nix.log.clone()),
            socket: None,
            overlay_socket: None,
        };
        let layout = match &state {
            None => Layout::new(&store, &wanted)?,
            Some(state) if state.real != nix.real => {
                return Err(Error::user(format!(
                    "the castore in {} has adopted {} already, not {}",
                    store.display(),
                    state.real.display(),
                    nix.real.display()
                ))
                .with_hint("use a castore of its own for each store, with --store"));
            }
            Some(state) => {
                let begun = Layout::new(&store, &state.layout_options())?;
                let named = [&options.state, &options.upper, &options.work];
                let wanted = Layout::new(&store, &wanted)?;
                if named.iter().any(|n| n.is_some())
                    && (&wanted.state, &wanted.upper, &wanted.work)
                        != (&begun.state, &begun.upper, &begun.work)
                {
                    return Err(Error::user(format!(
                        "this adoption was begun with the state directory {} and the upper directory {}",
                        begun.state.display(),
                        begun.upper.display()
                    ))
                    .with_hint("leave --state, --upper and --work away"));
                }
                begun
            }
        };
        for dir in [&layout.store, &layout.state, &layout.upper, &layout.work] {
            if dir.starts_with(&nix.real) {
                return Err(Error::user(format!(
                    "{} lies in the store that is to be adopted, {}",
                    dir.display(),
                    nix.real.display()
                ))
                .with_hint("choose another place with --store, --state or --upper"));
            }
        }
        Ok(Self {
            nix,
            layout,
            options,
        })
    }

    /// Where everything lies, as `up` needs it.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// How far it is; `None` if nothing was begun.
    ///
    /// # Errors
    /// As [`State::load`].
    pub fn state(&self) -> Result<Option<State>> {
        State::load(&self.layout.store)
    }

    /// True if the overlay is mounted on the store directory and its instance runs.
    ///
    /// # Errors
    /// The list of mounts cannot be read.
    pub fn is_mounted(&self) -> Result<bool> {
        Ok(self.overlay()?.is_some() && is_locked(&self.layout.lock()))
    }

    /// Adopts the store, or goes on where an earlier run ended, or brings an adopted store back after a restart.
    ///
    /// Without `starter`, everything is done but mounting the overlay: whoever mounts it (a service) does so before
    /// Nix is used again.
    ///
    /// # Errors
    /// Paths that cannot be imported or do not verify; the store is in use; the overlay cannot be mounted;
    /// interrupted. Nix's store works as before then, unless the overlay is mounted already.
    pub fn adopt(&self, starter: Option<Starter<'_>>, control: &Control<'_>) -> Result<Adopted> {
        let at = &self.layout.store;
        let store = self.open_or_create()?;
        let _lock = state::lock(at)?;
        let mut state = match State::load(at)? {
            Some(state) => state,
            None => {
                let state = State::new(&self.options.root, &self.layout);
                state.save(at)?;
                state
            }
        };
        if state.phase == Phase::Undoing {
            return Err(Error::user(format!(
                "an undo of the adoption of {} was begun and did not end",
                self.nix.real.display()
            ))
            .with_hint("finish it with `understory adopt --undo`"));
        }
        self.check_may_mount(starter.is_some())?;
        let mut done = Adopted::default();
        if state.phase < Phase::Swapping {
            self.bring_in(&store, &mut state, &mut done, control)?;
        }
        self.swap(&store, &mut state, starter, &mut done, control)?;
        done.is_mounted = self.is_mounted()?;
        Ok(done)
    }

    /// Phases 1 and 2: everything into the castore, and read back.
    fn bring_in(
        &self,
        store: &Store,
        state: &mut State,
        done: &mut Adopted,
        control: &Control<'_>,
    ) -> Result<()> {
        let original = self.nix.original(&self.layout)?;
        if state.phase == Phase::Importing {
            // Paths that were deleted meanwhile fail and are not there the second time.
            if let Err(error) = self.import(store, &original, done, control) {
                tree::check(control.cancel)?;
                tracing::debug!("once more: {}", error.chain());
                self.import(store, &original, done, control)?;
            }
            state.phase = Phase::Verifying;
            state.save(&self.layout.store)?;
        }
        if state.phase == Phase::Verifying {
            let valid = self.valid(store)?;
            let known: Vec<Valid> = valid
                .into_iter()
                .filter_map(|path| {
                    store
                        .is_valid(&path.path)
                        .map(|is| is.then_some(path))
                        .transpose()
                })
                .collect::<Result<_>>()?;
            state.verified_row = last_row(store)?;
            done.verified += verify::castore(store, &known, self.options.jobs, control)?;
            state.phase = Phase::Verified;
            state.save(&self.layout.store)?;
        }
        Ok(())
    }

    fn import(
        &self,
        store: &Store,
        original: &Original,
        done: &mut Adopted,
        control: &Control<'_>,
    ) -> Result<()> {
        struct Told<'a>(&'a (dyn Fn(Progress) + Sync));
        impl import::Progress for Told<'_> {
            fn update(&self, counters: &import::Counters) {
                (self.0)(Progress {
                    step: Step::Importing,
                    paths: (counters.paths_done, counters.paths_total),
                    bytes: (counters.nar_bytes_done, counters.nar_bytes_total),
                    new_bytes: counters.writer.new_bytes,
                });
            }
        }
        let source = Source::Local(LocalSource {
            real: original.path.clone(),
            state: self.nix.state.clone(),
            store_dir: Some(store.store_dir().clone()),
        });
        let options = import::Options {
            jobs: self.options.jobs,
            trusted_keys: None,
        };
        let report = Importer::new(store.clone()).run(
            source,
            &Selection::All,
            &options,
            &Told(control.progress),
            control.cancel,
        )?;
        done.imported += report.counters.paths_done;
        if report.cancelled {
            return Err(interrupted());
        }
        match report.error() {
            None => Ok(()),
            Some(error) if error.hint().is_some() => Err(error),
            Some(error) => Err(error.with_hint(
                "`nix-store --verify --check-contents` finds what is damaged; with --repair it is fetched or built again",
            )),
        }
    }

    /// Phase 3: the overlay over the store directory.
    fn swap(
        &self,
        store: &Store,
        state: &mut State,
        starter: Option<Starter<'_>>,
        done: &mut Adopted,
        control: &Control<'_>,
    ) -> Result<()> {
        let at = &self.layout.store;
        let mounted = self.is_mounted()?;
        if state.phase >= Phase::Swapping && mounted {
            // Only what is behind needs the store for us alone.
            let original = self.nix.original(&self.layout)?;
            let (behind, missing) = self.behind(store, &original)?;
            if behind.is_empty() {
                done.missing = missing;
                done.paths = self.valid(store)?.len() as u64;
                state.phase = Phase::Swapped;
                return state.save(at);
            }
        }
        let instance = self.instance()?;
        if !instance.is_empty() && !mounted {
            return Err(Error::user(format!(
                "an instance runs for {} already, without the overlay on {}",
                self.layout.state.display(),
                self.nix.real.display()
            ))
            .with_hint("stop it with `understory down` first"));
        }
        let locks = self
            .nix
            .lock(self.options.wait, &instance, control.cancel)?;
        if !mounted && state.phase >= Phase::Swapping {
            for what in up::mend(&self.layout)? {
                tracing::info!("removed {what}");
            }
        }
        let original = self.nix.original(&self.layout)?;
        if state.phase < Phase::Swapping {
            self.import(store, &original, done, control)?;
            let valid = self.valid(store)?;
            let news = self.newer(store, &valid, state.verified_row)?;
            done.verified += verify::castore(store, &news, self.options.jobs, control)?;
            self.prepare_upper(&original)?;
            state.phase = Phase::Swapping;
            state.save(at)?;
        } else {
            self.prepare_upper(&original)?;
            self.catch_up(store, &original, mounted, done, control)?;
        }
        if mounted {
            state.phase = Phase::Swapped;
            return state.save(at);
        }
        let Some(starter) = starter else {
            done.paths = self.valid(store)?.len() as u64;
            return Ok(());
        };
        // What is started opens Nix's state directory itself.
        locks.share()?;
        let shown = (starter.start)(&self.layout).and_then(|()| self.prove(store, done, control));
        if let Err(error) = shown {
            // Nobody could add anything, so all is as before.
            if let Err(second) = (starter.stop)(&self.layout) {
                tracing::error!("{}", second.chain());
            }
            return Err(error);
        }
        state.phase = Phase::Swapped;
        state.save(at)
    }

    /// The overlay must be there, show every valid path, and give the bytes of a sample, or of all.
    fn prove(&self, store: &Store, done: &mut Adopted, control: &Control<'_>) -> Result<()> {
        if self.overlay()?.is_none() {
            return Err(Error::environment(format!(
                "no overlay shows on {} after the start",
                self.nix.real.display()
            ))
            .with_hint("the store is as it was; the instance's log says more"));
        }
        done.paths = self.expect_visible(store, &done.missing)?;
        let valid = self.valid(store)?;
        verify::overlay(self, store, &valid, control)
    }

    /// Every valid path must show through the overlay.
    fn expect_visible(&self, store: &Store, missing: &[String]) -> Result<u64> {
        let valid = self.valid(store)?;
        let dir = store.store_dir();
        for path in &valid {
            let place = self.nix.real.join(path.path.base_name());
            if !namespace::exists(&place) && !missing.contains(&dir.print(&path.path)) {
                return Err(Error::corrupt(format!(
                    "path '{}' does not show through the overlay",
                    dir.print(&path.path)
                ))
                .with_hint("the overlay was taken away again, the store is as it was"));
            }
        }
        Ok(valid.len() as u64)
    }

    /// Valid paths that were published in the castore after row `row`.
    fn newer(&self, store: &Store, valid: &[Valid], row: u64) -> Result<Vec<Valid>> {
        let mut news = Vec::new();
        for path in valid {
            match store.path(&path.path)? {
                Some(stored) if stored.info.nar_hash != path.nar_hash => {
                    return Err(differs(store, path, &stored.info.nar_hash));
                }
                Some(stored) if stored.id > row => news.push(path.clone()),
                Some(_) => {}
                None => {
                    return Err(Error::internal(format!(
                        "path '{}' was imported and is not there",
                        store.store_dir().print(&path.path)
                    )));
                }
            }
        }
        Ok(news)
    }

    /// Valid paths that neither the castore nor the upper directory has: those whose objects are with the
    /// originals, and names of some whose objects are nowhere.
    fn behind(&self, store: &Store, original: &Original) -> Result<(Vec<Valid>, Vec<String>)> {
        let (mut behind, mut missing) = (Vec::new(), Vec::new());
        for path in self.valid(store)? {
            let name = path.path.base_name();
            if store.is_valid(&path.path)? || namespace::exists(&self.layout.upper.join(name)) {
                continue;
            }
            if namespace::exists(&original.path.join(name)) {
                behind.push(path);
            } else if missing.len() < MISSING_NAMED_MAX {
                missing.push(store.store_dir().print(&path.path));
            }
        }
        Ok((behind, missing))
    }

    /// Copies objects that were added to the store directory while the overlay was not mounted to where the
    /// overlay has them.
    fn catch_up(
        &self,
        store: &Store,
        original: &Original,
        mounted: bool,
        done: &mut Adopted,
        control: &Control<'_>,
    ) -> Result<()> {
        // A mounted overlay's upper directory is written through the overlay only.
        let to = if mounted {
            &self.nix.real
        } else {
            &self.layout.upper
        };
        tree::sweep(to)?;
        let (behind, missing) = self.behind(store, original)?;
        let owner = self.nix.owner()?;
        for path in &behind {
            let name = path.path.base_name();
            let origin = tree::Origin::Disk(&original.path.join(name));
            tree::place(&origin, to, name, &path.nar_hash, owner, control.cancel)?;
            done.caught_up += 1;
        }
        state::sync_directory(to)?;
        done.missing = missing;
        Ok(())
    }

    /// Makes the upper directory; the overlay's root has its mode and owner, which must be the store directory's.
    fn prepare_upper(&self, original: &Original) -> Result<()> {
        let upper = &self.layout.upper;
        fs::create_dir_all(upper).map_err(|e| Error::io("creating", upper, e))?;
        let found =
            fs::metadata(&original.path).map_err(|e| Error::io("examining", &self.nix.real, e))?;
        std::os::unix::fs::chown(upper, Some(found.uid()), Some(found.gid()))
            .map_err(|e| Error::io("changing the owner of", upper, e))?;
        fs::set_permissions(
            upper,
            fs::Permissions::from_mode(found.permissions().mode() & 0o7777),
        )
        .map_err(|e| Error::io("changing the mode of", upper, e))?;
        state::sync_directory(upper)
    }

    fn check_may_mount(&self, wanted: bool) -> Result<()> {
        if !wanted || namespace::may_mount() {
            return Ok(());
        }
        Err(Error::environment(format!(
            "mounting on {} is not permitted",
            self.nix.real.display()
        ))
        .with_hint("run as root"))
    }

    /// The overlay's mount id, if it is mounted.
    fn overlay(&self) -> Result<Option<u64>> {
        let list = mountinfo::mounts()?;
        Ok(mountinfo::topmost_at(&list, &self.nix.real)
            .filter(|top| nix_store::is_overlay(top, &self.layout.upper))
            .map(|top| top.id))
    }

    /// The processes that run our instance; none if it does not run. An earlier daemon that still has clients is not
    /// among them: it is in use.
    fn instance(&self) -> Result<Vec<u32>> {
        if !is_locked(&self.layout.lock()) {
            return Ok(Vec::new());
        }
        let status = match control::Client::connect(&self.layout.control())? {
            Some(mut client) => client.status().ok(),
            None => None,
        };
        let status = status.ok_or_else(|| {
            Error::environment(format!(
                "the instance of {} does not answer",
                self.layout.state.display()
            ))
            .with_hint("wait until it has started or ended; `understory status` shows it")
        })?;
        let mut processes = vec![status.pid];
        if let Some(record) = supervisor::Record::read(&self.layout)? {
            processes.push(record.pid);
            processes.extend(record.workers.iter().filter_map(|worker| worker.pid));
        }
        Ok(processes)
    }

    /// The rows of Nix's database.
    fn valid(&self, store: &Store) -> Result<Vec<Valid>> {
        self.nix.valid(store.store_dir())
    }

    fn open_or_create(&self) -> Result<Store> {
        let at = &self.layout.store;
        let theirs = self.nix.store_dir()?;
        if !at.join("format").exists() {
            Store::create(at, theirs.as_ref().unwrap_or(&StoreDir::default()))?;
        }
        let store = Store::open(at, &self.options.store_options)?;
        if let Some(theirs) = theirs
            && theirs != *store.store_dir()
        {
            return Err(Error::user(format!(
                "the store at {} has store directory '{theirs}', the castore in {} has '{}'",
                self.nix.real.display(),
                at.display(),
                store.store_dir()
            ))
            .with_hint("name another castore with --store"));
        }
        store.observe(Arc::new(up::Notifier::new(at)));
        Ok(store)
    }

    /// Opens the castore of an adoption that was begun.
    fn begun(&self) -> Result<(Store, State, File)> {
        let at = &self.layout.store;
        let nothing = || {
            Error::user(format!(
                "the castore in {} has not adopted {}",
                at.display(),
                self.nix.real.display()
            ))
            .with_hint("--store names the castore that was used")
        };
        State::load(at)?.ok_or_else(nothing)?;
        let lock = state::lock(at)?;
        let state = State::load(at)?.ok_or_else(nothing)?;
        Ok((Store::open(at, &self.options.store_options)?, state, lock))
    }
}

/// The error that says that Nix's store and the castore disagree.
fn differs(store: &Store, path: &Valid, found: &NarHash) -> Error {
    Error::user(format!(
        "path '{}' differs: Nix's store has hash '{}', the castore '{found}'",
        store.store_dir().print(&path.path),
        path.nar_hash
    ))
    .with_hint("the castore got it from elsewhere: use a fresh one with --store, or `understory delete` it there")
}

fn interrupted() -> Error {
    Error::user("interrupted")
        .with_hint("run the same command again to go on, or with --undo to go back")
}

/// The number of the castore's newest row.
fn last_row(store: &Store) -> Result<u64> {
    let mut last = 0;
    loop {
        let rows = store.list(last, ROWS_MAX)?;
        match rows.last() {
            Some(row) => last = row.id,
            None => return Ok(last),
        }
    }
}

/// Rows by base name.
fn by_name(valid: &[Valid]) -> HashMap<&str, &Valid> {
    valid
        .iter()
        .map(|valid| (valid.path.base_name(), valid))
        .collect()
}

/// True for names that are store objects.
fn is_object(name: &Path) -> bool {
    name.to_str()
        .is_some_and(|name| StorePath::from_base_name(name).is_ok())
}
