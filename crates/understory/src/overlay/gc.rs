//! Collection of garbage in the upper: liveness from U, candidates from U and the upper directory.
//!
//! The lower's listing is never read, and the lower is asked only about names that are to be deleted from the upper
//! directory, in bulk: a collection costs what the upper costs, however large the lower is. Rows that are copies of a
//! lower's infos go silently when nothing in U needs them any more: nothing is deleted, so nothing is reported.
//!
//! Order: `gc.lock`, the socket for temporary roots, roots, snapshot of U, upper directory. What is registered after the
//! snapshot is a temporary root of whoever registers it; each path is claimed from the [`RootServer`] right before it
//! goes, which refuses temporary roots and makes those who add one wait. Rows go in batches, referrers first, then the
//! files of the batch: after a crash there are files without a row, which the next collection takes.
//!
//! Words are those of `gc.cc` of Nix 2.34.8.

mod liveness;

use super::Overlay;
use super::delete::is_whiteout;
use crate::daemon::Reporter;
use crate::files::remove_if_there;
use crate::local::db::Graph;
use crate::local::lock::{GcLock, try_flock};
use crate::local::roots;
use crate::local::temp_roots::RootServer;
use crate::store::GcReport;
use crate::{Error, Result};
use liveness::{Liveness, Rules};
use rustix::fs::FlockOperation;
use std::collections::{BTreeSet, HashSet};
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::ErrorKind;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Arc;
use understory_nix::worker::{GcActionKind, GcRequest, Verbosity};
use understory_nix::{PathInfo, StorePath};

/// Rows that go in one transaction, and files that a crash may leave for the next collection.
const BATCH_ROWS: usize = 256;
/// How often a collection plans anew because somebody registered a referrer of a dead path in between. That takes a
/// client that did not make the path a temporary root: once is rare.
const PLANS_MAX: u32 = 16;
/// Paths of which a lower is asked at a time.
const QUERY_PATHS: usize = 10_000;

impl Overlay {
    /// CollectGarbage.
    ///
    /// # Errors
    /// A path to be deleted is alive; I/O; interrupted.
    pub(super) fn collect(&self, request: &GcRequest, reporter: &dyn Reporter) -> Result<GcReport> {
        if request.ignore_liveness {
            return Err(Error::user("you are not allowed to ignore liveness"));
        }
        let mut collection = Collection::begin(self, request, reporter)?;
        let done = collection.run();
        self.remount(reporter);
        done.map(|()| collection.report)
    }

    /// Remounts if it is due; a failure is a warning for the client.
    pub(super) fn remount(&self, reporter: &dyn Reporter) {
        if let Err(error) = self.inner.merged.remount_if_due() {
            tracing::warn!(error = %error.chain(), "remounting the merged store");
            let hint = error.hint().map_or(String::new(), |h| format!(" ({h})"));
            reporter.say(
                Verbosity::Warn,
                &format!("warning: {}{hint}", error.chain()),
            );
        }
    }

    /// For each of `paths`, whether a lower calls it valid.
    pub(super) fn valid_below(&self, paths: &[StorePath]) -> Result<Vec<bool>> {
        let mut valid = vec![false; paths.len()];
        for lower in &self.inner.lowers {
            for (some, flags) in paths.chunks(QUERY_PATHS).zip(valid.chunks_mut(QUERY_PATHS)) {
                for (flag, found) in flags.iter_mut().zip(lower.valid(some)?) {
                    *flag |= found;
                }
            }
        }
        Ok(valid)
    }
}

/// One collection. Fields are dropped in order: the socket before the lock.
struct Collection<'a> {
    overlay: &'a Overlay,
    request: &'a GcRequest,
    reporter: &'a dyn Reporter,
    server: Arc<RootServer>,
    _lock: GcLock,
    roots: BTreeSet<StorePath>,
    liveness: Liveness,
    /// What the upper directory has.
    upper: Upper,
    report: GcReport,
}

/// The names at the top of the upper directory.
#[derive(Default)]
struct Upper {
    /// Names that are store paths.
    objects: HashSet<StorePath>,
    /// Whiteouts of overlayfs, whatever their names: neither we nor Nix make them.
    whiteouts: Vec<OsString>,
    /// All others but `.links`.
    others: Vec<OsString>,
}

/// Paths that are claimed from the server; given back one by one, or when it is dropped.
struct Claims {
    server: Arc<RootServer>,
    paths: Vec<StorePath>,
    done: usize,
}

impl Claims {
    fn none(server: &Arc<RootServer>) -> Self {
        Self {
            server: server.clone(),
            paths: Vec::new(),
            done: 0,
        }
    }
    /// False if it is a temporary root.
    fn add(&mut self, path: StorePath) -> bool {
        let claimed = self.server.claim(&path);
        if claimed {
            self.paths.push(path);
        }
        claimed
    }
    /// Gives back those up to `path`, in the order in which they were claimed.
    fn release_until(&mut self, path: &StorePath) {
        while let Some(next) = self.paths.get(self.done) {
            self.server.release(next);
            self.done += 1;
            if next == path {
                break;
            }
        }
    }
}
impl Drop for Claims {
    fn drop(&mut self) {
        for path in &self.paths[self.done..] {
            self.server.release(path);
        }
    }
}

/// Why a step ended early.
enum Stop {
    /// More than `maxFreed` bytes are freed.
    Limit,
    /// A dead path has got a referrer: plan anew.
    InUse(Error),
    Failed(Error),
}
impl From<Error> for Stop {
    fn from(error: Error) -> Self {
        Self::Failed(error)
    }
}

impl<'a> Collection<'a> {
    fn begin(
        overlay: &'a Overlay,
        request: &'a GcRequest,
        reporter: &'a dyn Reporter,
    ) -> Result<Self> {
        let local = overlay.local();
        if deletes(request) {
            remove_if_there(&local.state.join("db/reserved"))?;
        }
        let lock = GcLock::exclusive(&local.state, reporter)?;
        let (server, temporary) = RootServer::start(&local.state, &local.store_dir)?;
        reporter.say(Verbosity::Info, "finding garbage collector roots...");
        // Whether a target is valid is seen from the snapshot.
        let permanent = roots::permanent_roots(local, true, &|_| Ok(true))?;
        let roots = permanent
            .into_iter()
            .map(|(_, path)| path)
            .chain(temporary.into_iter().map(|(_, path)| path))
            .collect();
        reporter.check()?;
        let mut collection = Self {
            overlay,
            request,
            reporter,
            server: Arc::new(server),
            _lock: lock,
            roots,
            liveness: Liveness::new(overlay.inner.db.graph()?, rules(overlay)),
            upper: Upper::read(&overlay.inner.upper)?,
            report: GcReport::default(),
        };
        collection.mark_roots();
        Ok(collection)
    }

    fn run(&mut self) -> Result<()> {
        match (self.request.action, &self.request.paths) {
            (GcActionKind::ReturnLive, wanted) => self.return_live(wanted.as_ref()),
            (GcActionKind::ReturnDead, None) => {
                self.say("determining live/dead paths...");
                self.return_dead();
                Ok(())
            }
            (GcActionKind::ReturnDead, Some(wanted)) => {
                let dead = self.dead_of(&self.rows_of(wanted));
                self.report.paths = dead
                    .into_iter()
                    .map(|row| self.liveness.path(row).clone())
                    .chain(self.leftovers_of(wanted))
                    .filter(|path| self.upper.objects.contains(path))
                    .collect();
                Ok(())
            }
            (GcActionKind::DeleteDead, None) => {
                if self.request.freed_bytes_max > 0 {
                    self.say("deleting garbage...");
                    self.until_done(|this| this.delete_garbage())?;
                }
                self.remove_unused_links()
            }
            (GcActionKind::DeleteDead, Some(wanted)) => {
                self.until_done(|this| this.delete_wanted(wanted))?;
                self.remove_unused_links()
            }
            (GcActionKind::DeleteSpecific, wanted) => {
                let none = BTreeSet::new();
                let wanted = wanted.as_ref().unwrap_or(&none);
                self.until_done(|this| {
                    this.refuse_living(wanted)?;
                    this.delete_wanted(wanted)
                })?;
                self.remove_unused_links()
            }
        }
    }

    /// Runs `step` until nobody has registered a referrer in between.
    fn until_done(&mut self, step: impl Fn(&mut Self) -> Result<(), Stop>) -> Result<()> {
        for _ in 0..PLANS_MAX {
            match step(self) {
                Ok(()) | Err(Stop::Limit) => return Ok(()),
                Err(Stop::Failed(error)) => return Err(error),
                Err(Stop::InUse(error)) => {
                    tracing::info!(error = %error.chain(), "planning the collection anew");
                }
            }
            let graph = self.overlay.inner.db.graph()?;
            self.liveness = Liveness::new(graph, rules(self.overlay));
            self.upper = Upper::read(&self.overlay.inner.upper)?;
            self.mark_roots();
        }
        Err(Error::environment(format!(
            "other processes registered referrers of dead paths {PLANS_MAX} times during the collection"
        ))
        .with_hint("collect garbage when fewer processes add to the store"))
    }

    // -- what to do

    fn mark_roots(&mut self) {
        for row in self.liveness.rows() {
            let path = self.liveness.path(row);
            if self.roots.contains(path) || self.server.is_root(path) {
                self.liveness.mark(row);
            }
        }
    }

    /// Live rows; and roots that only a lower has, with what they refer to.
    fn return_live(&mut self, wanted: Option<&BTreeSet<StorePath>>) -> Result<()> {
        self.say("determining live/dead paths...");
        let live = self
            .liveness
            .rows()
            .filter(|row| self.liveness.is_alive(*row));
        let mut paths: BTreeSet<StorePath> =
            live.map(|row| self.liveness.path(row).clone()).collect();
        let mut open: Vec<StorePath> = self.roots.difference(&paths).cloned().collect();
        while !open.is_empty() {
            self.reporter.check()?;
            let mut next = BTreeSet::new();
            for info in self.infos_below(&open)? {
                if paths.insert(info.path.clone()) {
                    next.extend(info.references.iter().cloned());
                }
            }
            open = next.difference(&paths).cloned().collect();
        }
        if let Some(wanted) = wanted {
            paths.retain(|path| wanted.contains(path));
        }
        self.report.paths = paths;
        Ok(())
    }

    fn infos_below(&self, paths: &[StorePath]) -> Result<Vec<Arc<PathInfo>>> {
        let mut missing = paths.to_vec();
        let mut infos = Vec::new();
        for lower in &self.overlay.inner.lowers {
            let mut left = Vec::new();
            for some in missing.chunks(QUERY_PATHS) {
                for (path, info) in some.iter().zip(lower.infos(some)?) {
                    match info {
                        Some(info) => infos.push(info),
                        None => left.push(path.clone()),
                    }
                }
            }
            missing = left;
        }
        Ok(infos)
    }

    fn return_dead(&mut self) {
        let rows = self.liveness.dead().into_iter();
        self.report.paths = rows
            .map(|row| self.liveness.path(row))
            .filter(|path| self.upper.objects.contains(*path))
            .cloned()
            .chain(self.leftovers())
            .collect();
    }

    fn delete_garbage(&mut self) -> Result<(), Stop> {
        for name in std::mem::take(&mut self.upper.whiteouts) {
            self.delete_whiteout(&name)?;
        }
        for name in std::mem::take(&mut self.upper.others) {
            self.delete_other(&name)?;
        }
        let leftovers = self.leftovers();
        self.delete_leftovers(&leftovers)?;
        self.delete_rows(&self.liveness.dead())
    }

    /// Deletes those of `wanted` that are dead.
    fn delete_wanted(&mut self, wanted: &BTreeSet<StorePath>) -> Result<(), Stop> {
        let leftovers = self.leftovers_of(wanted);
        self.delete_leftovers(&leftovers)?;
        let rows = self.dead_of(&self.rows_of(wanted));
        let only_below: Vec<StorePath> = wanted
            .iter()
            .filter(|path| !self.upper.objects.contains(*path))
            .cloned()
            .collect();
        for (path, valid) in only_below
            .iter()
            .zip(self.overlay.valid_below(&only_below)?)
        {
            if valid {
                self.reporter.say(
                    Verbosity::Notice,
                    &format!(
                        "'{}' is in the lower store and stays there",
                        self.print(path)
                    ),
                );
            }
        }
        self.delete_rows(&rows)
    }

    /// # Errors
    /// One of `wanted` is alive; nothing is deleted then.
    fn refuse_living(&self, wanted: &BTreeSet<StorePath>) -> Result<()> {
        let dead: BTreeSet<u32> = self.dead_of(&self.rows_of(wanted)).into_iter().collect();
        let is_alive = |path: &&StorePath| match self.liveness.find(path) {
            Some(row) => !dead.contains(&row),
            None => self.roots.contains(*path) || self.server.is_root(path),
        };
        match wanted.iter().find(is_alive) {
            Some(path) => Err(self.is_alive(path)),
            None => Ok(()),
        }
    }

    fn is_alive(&self, path: &StorePath) -> Error {
        Error::user(format!(
            "Cannot delete path '{}' since it is still alive. To find out why, use: \
             nix-store --query --roots and nix-store --query --referrers",
            self.print(path)
        ))
    }

    fn rows_of(&self, paths: &BTreeSet<StorePath>) -> Vec<u32> {
        paths
            .iter()
            .filter_map(|path| self.liveness.find(path))
            .collect()
    }
    fn dead_of(&self, rows: &[u32]) -> Vec<u32> {
        if self.request.delete_referrers {
            self.liveness.dead_with_keepers(rows)
        } else {
            self.liveness.dead_among(rows)
        }
    }
    /// Store paths in the upper directory that are no rows: of a crash, lock files, directories of builds.
    fn leftovers(&self) -> Vec<StorePath> {
        let paths = self.upper.objects.iter();
        let mut paths: Vec<StorePath> = paths
            .filter(|path| self.liveness.find(path).is_none() && !self.server.is_root(path))
            .cloned()
            .collect();
        paths.sort();
        paths
    }
    fn leftovers_of(&self, wanted: &BTreeSet<StorePath>) -> Vec<StorePath> {
        let mut paths = self.leftovers();
        paths.retain(|path| wanted.contains(path));
        paths
    }

    // -- deletion

    /// Deletes dead rows and their objects.
    fn delete_rows(&mut self, rows: &[u32]) -> Result<(), Stop> {
        let batch_rows = self.batch_rows();
        let mut order = self.liveness.referrers_first(rows).into_iter().peekable();
        while order.peek().is_some() {
            self.reporter.check()?;
            let mut batch = Claims::none(&self.server);
            for row in order.by_ref() {
                if self.liveness.is_alive(row) {
                    continue;
                }
                if !batch.add(self.liveness.path(row).clone()) {
                    let path = self.liveness.path(row);
                    tracing::debug!(%path, "cannot delete it because it is a temporary root");
                    self.liveness.mark(row);
                    continue;
                }
                if batch.paths.len() >= batch_rows {
                    break;
                }
            }
            if self.request.action == GcActionKind::DeleteSpecific
                && let Some(row) = rows.iter().find(|row| self.liveness.is_alive(**row))
            {
                return Err(self.is_alive(self.liveness.path(*row)).into());
            }
            let done = self.delete_batch(batch, true);
            self.overlay.remount(self.reporter);
            done?;
        }
        Ok(())
    }

    fn delete_leftovers(&mut self, paths: &[StorePath]) -> Result<(), Stop> {
        for some in paths.chunks(self.batch_rows()) {
            self.reporter.check()?;
            let mut batch = Claims::none(&self.server);
            for path in some {
                batch.add(path.clone());
            }
            let done = self.delete_batch(batch, false);
            self.overlay.remount(self.reporter);
            done?;
        }
        Ok(())
    }

    /// Rows of which are deleted at a time: with a limit one, so that no more goes than is wanted.
    fn batch_rows(&self) -> usize {
        if self.request.freed_bytes_max == u64::MAX {
            BATCH_ROWS
        } else {
            1
        }
    }

    /// Deletes claimed paths: rows, then files. What has become a row since the snapshot stays.
    fn delete_batch(&mut self, mut claims: Claims, are_rows: bool) -> Result<(), Stop> {
        let db = &self.overlay.inner.db;
        let mut in_upper: Vec<StorePath> = claims
            .paths
            .iter()
            .filter(|path| self.upper.objects.contains(*path))
            .cloned()
            .collect();
        if !are_rows {
            let mut is_row = db.valid(&in_upper)?.into_iter();
            in_upper.retain(|_| is_row.next() != Some(true));
        }
        let below = self.overlay.valid_below(&in_upper)?;
        if are_rows && let Err(error) = db.invalidate(&claims.paths) {
            return Err(if error.to_string().contains("because it is in use by") {
                Stop::InUse(error)
            } else {
                Stop::Failed(error)
            });
        }
        for (path, valid_below) in in_upper.iter().zip(below) {
            self.reporter.check()?;
            self.say(&format!("deleting '{}'", self.print(path)));
            let freed = self
                .overlay
                .delete_name(path.base_name().as_ref(), valid_below)?;
            self.upper.objects.remove(path);
            claims.release_until(path);
            self.report.paths.insert(path.clone());
            self.count(freed)?;
        }
        Ok(())
    }

    fn delete_whiteout(&self, name: &OsStr) -> Result<()> {
        if self.overlay.is_in_lower_dir(Path::new(name))? {
            let store_dir = self.overlay.store_dir();
            self.reporter.say(
                Verbosity::Warn,
                &format!(
                    "warning: '{store_dir}/{}' of the lower store was hidden by a whiteout that another program \
                     left in the upper directory; removing the whiteout",
                    name.display()
                ),
            );
        }
        self.overlay.delete_name(name, false)?;
        Ok(())
    }

    /// Deletes a name that is no store path.
    fn delete_other(&mut self, name: &OsStr) -> Result<(), Stop> {
        self.reporter.check()?;
        // Somebody may be working in it. The lock is taken where they take it, in the merged directory, and held until
        // it is gone.
        let place = self.overlay.local().real.join(name);
        let mut _held = None;
        if name.as_bytes().starts_with(b"tmp-") {
            match lock_directory(&place)? {
                Some(file) => _held = Some(file),
                None => {
                    tracing::debug!("skipping locked tempdir '{}'", place.display());
                    return Ok(());
                }
            }
        }
        let store_dir = self.overlay.store_dir();
        self.say(&format!("deleting '{store_dir}/{}'", name.display()));
        let freed = self.overlay.delete_name(name, false)?;
        self.count(freed)
    }

    fn count(&mut self, freed: u64) -> Result<(), Stop> {
        self.report.freed_bytes = self.report.freed_bytes.saturating_add(freed);
        if self.report.freed_bytes > self.request.freed_bytes_max {
            self.say(&format!(
                "deleted more than {} bytes; stopping",
                self.request.freed_bytes_max
            ));
            return Err(Stop::Limit);
        }
        Ok(())
    }

    /// Removes files of `.links` that nothing is linked to any more.
    fn remove_unused_links(&self) -> Result<()> {
        self.say("deleting unused links...");
        let upper = self.overlay.inner.upper.join(".links");
        let entries = match std::fs::read_dir(&upper) {
            Ok(entries) => entries,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
            Err(error) => return Err(Error::io("reading", upper, error)),
        };
        let (mut actual, mut unshared) = (0_u64, 0_u64);
        for entry in entries {
            let entry = entry.map_err(|e| Error::io("reading", &upper, e))?;
            let metadata = match entry.metadata() {
                Ok(metadata) => metadata,
                Err(error) if error.kind() == ErrorKind::NotFound => continue,
                Err(error) => return Err(Error::io("reading", entry.path(), error)),
            };
            if metadata.nlink() != 1 {
                actual = actual.saturating_add(metadata.size());
                let others = metadata.nlink().saturating_sub(1);
                unshared = unshared.saturating_add(others.saturating_mul(metadata.size()));
                continue;
            }
            self.reporter.check()?;
            self.reporter.say(
                Verbosity::Talkative,
                &format!("deleting unused link '{}'", entry.path().display()),
            );
            let name = Path::new(".links").join(entry.file_name());
            self.overlay.delete_name(name.as_os_str(), false)?;
        }
        let overhead = std::fs::symlink_metadata(&upper).map_or(0, |m| m.blocks() * 512);
        let saved = unshared as f64 - actual as f64 - overhead as f64;
        self.say(&format!(
            "note: currently hard linking saves {:.2} MiB",
            saved / f64::from(1 << 20)
        ));
        Ok(())
    }

    fn say(&self, text: &str) {
        self.reporter.say(Verbosity::Info, text);
    }
    fn print(&self, path: &StorePath) -> String {
        self.overlay.store_dir().print(path)
    }
}

impl Upper {
    fn read(dir: &Path) -> Result<Self> {
        let mut upper = Self::default();
        for entry in std::fs::read_dir(dir).map_err(|e| Error::io("reading", dir, e))? {
            let entry = entry.map_err(|e| Error::io("reading", dir, e))?;
            let name = entry.file_name();
            if name == ".links" {
                continue;
            }
            if is_whiteout(&entry)? {
                upper.whiteouts.push(name);
                continue;
            }
            let path = name
                .to_str()
                .and_then(|name| StorePath::from_base_name(name).ok());
            match path {
                Some(path) => {
                    upper.objects.insert(path);
                }
                None => upper.others.push(name),
            }
        }
        Ok(upper)
    }
}

/// Which rows others refer to, directly or not: for whoever wants to drop rows.
pub(super) struct Needed(Liveness);

impl Needed {
    /// Nothing is marked yet.
    pub(super) fn new(graph: Graph) -> Self {
        let rules = Rules {
            keep_derivations: false,
            keep_outputs: false,
        };
        Self(Liveness::new(graph, rules))
    }
    /// Marks a path and what it refers to.
    pub(super) fn mark(&mut self, path: &StorePath) {
        if let Some(row) = self.0.find(path) {
            self.0.mark(row);
        }
    }
    /// Marks what a path refers to.
    pub(super) fn mark_references(&mut self, path: &StorePath) {
        if let Some(row) = self.0.find(path) {
            let references: Vec<u32> = self.0.references(row).collect();
            for reference in references {
                self.0.mark(reference);
            }
        }
    }
    /// True for what was marked.
    pub(super) fn is_marked(&self, path: &StorePath) -> bool {
        self.0.find(path).is_some_and(|row| self.0.is_alive(row))
    }
}

/// The store paths that the upper directory has copies of.
pub(super) fn upper_objects(upper: &Path) -> Result<HashSet<StorePath>> {
    Ok(Upper::read(upper)?.objects)
}

fn deletes(request: &GcRequest) -> bool {
    matches!(
        request.action,
        GcActionKind::DeleteDead | GcActionKind::DeleteSpecific
    )
}

fn rules(overlay: &Overlay) -> Rules {
    Rules {
        keep_derivations: overlay.inner.settings.keep_derivations,
        keep_outputs: overlay.inner.settings.keep_outputs,
    }
}

/// `None` if somebody holds it, or it is gone or no directory.
fn lock_directory(place: &Path) -> Result<Option<File>> {
    let flags = rustix::fs::OFlags::DIRECTORY | rustix::fs::OFlags::NOFOLLOW;
    let opened = File::options()
        .read(true)
        .custom_flags(flags.bits().cast_signed())
        .open(place);
    let Ok(file) = opened else {
        return Ok(None);
    };
    let locked = try_flock(&file, FlockOperation::NonBlockingLockExclusive, place)?;
    Ok(locked.then_some(file))
}
