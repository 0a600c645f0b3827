//! Verification of what U holds against the merged directory and the lowers, with repair.
//!
//! U is walked, not the lower: what only a lower knows is the lower's to verify. A row whose object is gone is dropped
//! only if nothing in U refers to it and no lower calls it valid. What a lower has lost is an error that names the lower,
//! since dropping the row would only hide it until the next query.
//!
//! Repair, in this order: a damaged upper copy is removed where a lower has a good one; a fresh copy is substituted into
//! the upper; the deriver is built anew. The lower is never written to.
//!
//! `gc.lock` is held shared meanwhile, as stock Nix does: what is found valid stays. Words are those of `local-store.cc`
//! of Nix 2.34.8.

use super::Overlay;
use super::delete::{Kind, kind_of};
use super::gc::Needed;
use super::session::Session;
use super::substitute::Counted;
use crate::daemon::Reporter;
use crate::local::lock::GcLock;
use crate::local::restore::dump_path;
use crate::local::temp_roots::TempRoots;
use crate::nar::HashRequest;
use crate::substitute::{Sink, Substituters};
use crate::{Error, Result};
use std::collections::{BTreeSet, HashSet};
use std::io::{BufRead, ErrorKind};
use std::path::Path;
use std::sync::atomic::AtomicU64;
use understory_nix::worker::{BuildMode, DerivedPath, OutputsSpec, Verbosity, WireRealisation};
use understory_nix::{NarHash, PathInfo, StorePath};

/// How to mend what is damaged.
pub(super) struct Repair<'a> {
    pub(super) substituters: &'a Substituters,
    pub(super) roots: &'a TempRoots,
    /// Builds all outputs of a derivation anew.
    pub(super) rebuild: &'a dyn Fn(&StorePath) -> Result<()>,
}

impl Overlay {
    /// VerifyStore: true if errors remain. Each is said to the reporter.
    ///
    /// # Errors
    /// I/O other than on the objects; interrupted.
    pub(super) fn verify_with(
        &self,
        check_contents: bool,
        repair: Option<&Repair<'_>>,
        reporter: &dyn Reporter,
    ) -> Result<bool> {
        // What is stale in overlayfs's cache would look damaged.
        self.remount(reporter);
        reporter.say(Verbosity::Info, "reading the Nix store...");
        let _lock = GcLock::shared(&self.local().state, reporter)?;
        let mut verification = Verification {
            overlay: self,
            repair,
            reporter,
            errors: false,
        };
        let done = verification.run(check_contents);
        self.remount(reporter);
        done.map(|()| verification.errors)
    }
}

impl Session {
    /// VerifyStore with what the client has chosen: its substituters, its builder.
    ///
    /// # Errors
    /// As [`Overlay::verify_with`].
    pub(super) fn verify_store(
        &self,
        check_contents: bool,
        repair: bool,
        reporter: &dyn Reporter,
    ) -> Result<bool> {
        if !repair {
            return self.overlay.verify_with(check_contents, None, reporter);
        }
        let substituters = self.substituters(reporter)?;
        let rebuild = |drv: &StorePath| {
            let wanted = DerivedPath::Built {
                drv: drv.clone(),
                through: Vec::new(),
                outputs: OutputsSpec::All,
            };
            self.build(&[wanted], BuildMode::Repair, reporter)
        };
        let how = Repair {
            substituters: &substituters,
            roots: &self.roots,
            rebuild: &rebuild,
        };
        self.overlay
            .verify_with(check_contents, Some(&how), reporter)
    }
}

struct Verification<'a> {
    overlay: &'a Overlay,
    repair: Option<&'a Repair<'a>>,
    reporter: &'a dyn Reporter,
    /// Some remain.
    errors: bool,
}

impl Verification<'_> {
    fn run(&mut self, check_contents: bool) -> Result<()> {
        self.reporter
            .say(Verbosity::Info, "checking path existence...");
        let present = self.check_existence()?;
        if check_contents {
            self.reporter
                .say(Verbosity::Info, "checking link hashes...");
            self.check_links()?;
            self.reporter
                .say(Verbosity::Info, "checking store hashes...");
            for path in &present {
                self.reporter.check()?;
                self.check_contents(path)?;
            }
        }
        Ok(())
    }

    /// Looks for the object of each row; returns those that are there.
    fn check_existence(&mut self) -> Result<Vec<StorePath>> {
        let mut needed = Needed::new(self.overlay.inner.db.graph()?);
        let (mut present, mut missing) = (Vec::new(), Vec::new());
        for path in self.overlay.inner.db.all_paths()? {
            self.reporter.check()?;
            match self.look_for(&path)? {
                Presence::There => {
                    needed.mark(&path);
                    present.push(path);
                }
                Presence::Hidden => needed.mark(&path),
                Presence::Missing => missing.push(path),
            }
        }
        let below = self.overlay.valid_below(&missing)?;
        for (path, below) in missing.iter().zip(&below) {
            if *below {
                needed.mark_references(path);
            }
        }
        let mut gone = Vec::new();
        for (path, below) in missing.into_iter().zip(below) {
            self.reporter.check()?;
            let shown = self.print(&path);
            let is_needed = needed.is_marked(&path);
            if !is_needed && !below {
                let text = format!("path '{shown}' disappeared, removing from database...");
                self.reporter.say(Verbosity::Info, &text);
                gone.push(path);
                continue;
            }
            if is_needed {
                self.say(&format!(
                    "path '{shown}' disappeared, but it still has valid referrers!"
                ));
            }
            if below {
                self.say(&format!(
                    "{} lost path '{shown}': it calls the path valid, but has no such file",
                    self.lower_of(&path)?
                ));
            }
            self.mend(&path)?;
        }
        if !gone.is_empty() {
            self.overlay.inner.db.invalidate(&gone)?;
        }
        Ok(present)
    }

    /// Whether the merged directory shows the object, after what hides it is out of the way.
    fn look_for(&mut self, path: &StorePath) -> Result<Presence> {
        let merged = self.overlay.local().object(path);
        let name = Path::new(path.base_name());
        let in_upper = kind_of(&self.overlay.inner.upper.join(name))?;
        let in_lower = self.overlay.is_in_lower_dir(name)?;
        if is_shown(&merged)? {
            if in_upper == Some(Kind::Object) || (in_upper.is_none() && in_lower) {
                return Ok(Presence::There);
            }
            // Neither has it: overlayfs remembers what is gone.
            self.overlay.inner.merged.remount()?;
        }
        match in_upper {
            Some(Kind::Whiteout) if in_lower => {
                let shown = self.print(path);
                if self.repair.is_none() {
                    self.say(&format!(
                        "path '{shown}' of the lower store is hidden by a whiteout in the upper directory"
                    ));
                    self.errors = true;
                    return Ok(Presence::Hidden);
                }
                self.overlay.delete_object(path)?;
                self.overlay.inner.merged.remount_if_due()?;
                let text = format!("removed the whiteout that hid path '{shown}'");
                self.reporter.say(Verbosity::Info, &text);
            }
            Some(Kind::Object) => self.overlay.inner.merged.show(std::slice::from_ref(path))?,
            None if in_lower => self.overlay.inner.merged.show(std::slice::from_ref(path))?,
            _ => return Ok(Presence::Missing),
        }
        Ok(if is_shown(&merged)? {
            Presence::There
        } else {
            Presence::Missing
        })
    }

    /// Compares the contents of an object with its row.
    fn check_contents(&mut self, path: &StorePath) -> Result<()> {
        let db = &self.overlay.inner.db;
        let shown = self.print(path);
        let Some(info) = db.info(path)? else {
            return Ok(());
        };
        let text = format!("checking contents of '{shown}'");
        self.reporter.say(Verbosity::Talkative, &text);
        let place = self.overlay.local().object(path);
        let mut hashed = self.hash(&place);
        let is_good = matches!(&hashed, Ok((hash, _)) if *hash == info.nar_hash);
        if !is_good && self.overlay.inner.merged.remount().is_ok() {
            // It may have been removed or replaced below the overlayfs: a removed directory shows as an empty one.
            hashed = self.hash(&place);
        }
        let (hash, size) = match hashed {
            Ok(found) => found,
            Err(error) => {
                self.reporter.check()?;
                self.say(&format!("path '{shown}': {}", error.chain()));
                return self.mend(path);
            }
        };
        if hash != info.nar_hash {
            self.say(&format!(
                "path '{shown}' was modified! expected hash '{}', got '{}'",
                print_hash(info.nar_hash),
                print_hash(hash)
            ));
            return self.mend(path);
        }
        if info.nar_size == 0 {
            let text = format!("updating size field on '{shown}' to {size}");
            self.reporter.say(Verbosity::Info, &text);
            let info = PathInfo {
                nar_size: size,
                ..info
            };
            db.register(&[info], &|_| Ok(Vec::new()))?;
        }
        Ok(())
    }

    /// Compares files in the upper's `.links` with their names.
    fn check_links(&mut self) -> Result<()> {
        let links = self.overlay.inner.upper.join(".links");
        let entries = match std::fs::read_dir(&links) {
            Ok(entries) => entries,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
            Err(error) => return Err(Error::io("reading", links, error)),
        };
        for entry in entries {
            self.reporter.check()?;
            let entry = entry.map_err(|e| Error::io("reading", &links, e))?;
            let (place, name) = (entry.path(), entry.file_name());
            // Of a link that is being made.
            if name.as_encoded_bytes().starts_with(b".tmp-link") {
                continue;
            }
            let text = format!("checking contents of '{}'", name.display());
            self.reporter.say(Verbosity::Talkative, &text);
            let hash = match self.hash(&place) {
                Ok((hash, _)) => hash.to_hash().to_nix32(),
                Err(_) if !place.is_symlink() && !place.exists() => continue,
                Err(error) => {
                    self.say(&format!("link '{}': {}", place.display(), error.chain()));
                    self.errors = true;
                    continue;
                }
            };
            if name == *hash {
                continue;
            }
            self.say(&format!(
                "link '{}' was modified! expected hash '{}', got '{hash}'",
                place.display(),
                name.display()
            ));
            if self.repair.is_some() {
                let name = Path::new(".links").join(&name);
                self.overlay.delete_name(name.as_os_str(), false)?;
                let text = format!("removed link '{}'", place.display());
                self.reporter.say(Verbosity::Info, &text);
            } else {
                self.errors = true;
            }
        }
        Ok(())
    }

    /// Repairs, if that is wanted; counts an error if not, or if it cannot be done.
    fn mend(&mut self, path: &StorePath) -> Result<()> {
        let Some(repair) = self.repair else {
            self.errors = true;
            return Ok(());
        };
        if let Err(error) = self.try_mend(path, repair) {
            self.reporter.check()?;
            let hint = error.hint().map_or(String::new(), |h| format!(" ({h})"));
            self.say(&format!(
                "cannot repair path '{}': {}{hint}",
                self.print(path),
                error.chain()
            ));
            self.errors = true;
        }
        Ok(())
    }

    fn try_mend(&self, path: &StorePath, repair: &Repair<'_>) -> Result<()> {
        repair.roots.add(std::slice::from_ref(path))?;
        if self.lower_is_good(path)? {
            self.overlay.delete_object(path)?;
            self.overlay.inner.merged.remount_if_due()?;
            let text = format!(
                "removed the upper copy of '{}': the lower store has a good one",
                self.print(path)
            );
            self.reporter.say(Verbosity::Info, &text);
            return Ok(());
        }
        let sink = OnePath {
            overlay: self.overlay,
            path,
            roots: repair.roots,
        };
        let wanted = BTreeSet::from([path.clone()]);
        let outcome = repair
            .substituters
            .substitute(&wanted, &sink, self.reporter)?;
        let Some(error) = outcome.failed.into_values().next() else {
            return Ok(());
        };
        let deriver = self
            .overlay
            .inner
            .db
            .info(path)?
            .and_then(|info| info.deriver);
        match deriver {
            Some(drv) if self.overlay.valid(std::slice::from_ref(&drv))? == [true] => {
                (repair.rebuild)(&drv)
            }
            _ => Err(error),
        }
    }

    /// True if the upper has a copy, and what the uppermost lower shows below it is what the row says.
    fn lower_is_good(&self, path: &StorePath) -> Result<bool> {
        if kind_of(&self.overlay.inner.upper.join(path.base_name()))?.is_none() {
            return Ok(false);
        }
        let Some(info) = self.overlay.inner.db.info(path)? else {
            return Ok(false);
        };
        for lower in &self.overlay.inner.lowers {
            let place = lower.real_dir().join(path.base_name());
            if is_shown(&place)? {
                return Ok(lower.valid(std::slice::from_ref(path))? == [true]
                    && self
                        .hash(&place)
                        .is_ok_and(|(hash, _)| hash == info.nar_hash));
            }
        }
        Ok(false)
    }

    /// Names the lower that calls the path valid.
    fn lower_of(&self, path: &StorePath) -> Result<String> {
        for lower in &self.overlay.inner.lowers {
            if lower.valid(std::slice::from_ref(path))? == [true] {
                return Ok(format!("lower store '{}'", lower.describe()));
            }
        }
        Ok("lower store".into())
    }

    fn hash(&self, place: &Path) -> Result<(NarHash, u64)> {
        let mut out = Interrupted(self.reporter);
        let dumped = dump_path(place, HashRequest::None, &mut out)?;
        Ok((dumped.nar_hash, dumped.nar_size))
    }
    fn say(&self, text: &str) {
        self.reporter.say(Verbosity::Error, text);
    }
    fn print(&self, path: &StorePath) -> String {
        self.overlay.store_dir().print(path)
    }
}

/// Where a row's object is.
enum Presence {
    /// In the merged directory.
    There,
    /// Below a whiteout, which is an error that was said.
    Hidden,
    Missing,
}

/// False if there is nothing, or what there was is stale.
fn is_shown(place: &Path) -> Result<bool> {
    match std::fs::symlink_metadata(place) {
        Ok(_) => Ok(true),
        Err(error)
            if error.kind() == ErrorKind::NotFound
                || error.raw_os_error() == Some(rustix::io::Errno::STALE.raw_os_error()) =>
        {
            Ok(false)
        }
        Err(error) => Err(Error::io("reading", place, error)),
    }
}

fn print_hash(hash: NarHash) -> String {
    format!("sha256:{}", hash.to_hash().to_nix32())
}

/// Takes an archive that is only hashed, until the client goes.
struct Interrupted<'a>(&'a dyn Reporter);

impl std::io::Write for Interrupted<'_> {
    fn write(&mut self, data: &[u8]) -> std::io::Result<usize> {
        if self.0.is_cancelled() {
            return Err(std::io::Error::other("interrupted by the user"));
        }
        Ok(data.len())
    }
    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// Takes one path into the upper, over what is there; whatever it refers to counts as valid.
struct OnePath<'a> {
    overlay: &'a Overlay,
    path: &'a StorePath,
    roots: &'a TempRoots,
}

impl Sink for OnePath<'_> {
    type Content = ();

    fn valid(&self, paths: &[StorePath]) -> Result<HashSet<StorePath>> {
        let others = paths.iter().filter(|path| *path != self.path);
        Ok(others.cloned().collect())
    }
    fn receive(
        &self,
        info: &PathInfo,
        archive: &mut dyn BufRead,
        bytes: &AtomicU64,
        reporter: &dyn Reporter,
    ) -> Result<()> {
        let mut archive = Counted {
            inner: archive,
            bytes,
        };
        self.overlay
            .add_to_upper(info.clone(), &mut archive, true, self.roots, reporter)
    }
    fn publish(&self, _paths: Vec<(PathInfo, ())>) -> Result<()> {
        // Registered when it was received.
        Ok(())
    }
    fn register(&self, _realisation: &WireRealisation) -> Result<()> {
        Ok(())
    }
}
