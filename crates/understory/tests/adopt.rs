//! Adoption of stores that real Nix made, without mounts: those are in `tests/real-nix/adopt.sh`.
#![allow(
    clippy::unwrap_used,
    reason = "a test panics when something is not as expected"
)]

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;
use understory::adopt::{Adopted, Adoption, Control, Options, Phase, Progress, State};
use understory::config::{Layout, LayoutOptions};
use understory::store::GcAction;
use understory::{Result, Store, StoreOptions};
use understory_nix::StorePath;
use understory_testkit::nix_root::{Bind, NixRoot, Version};

const SCRIPT: &str = include_str!("import/make-store.sh");

/// A store that a real Nix made.
struct Made {
    dir: tempfile::TempDir,
    root: NixRoot,
}

impl Made {
    fn all() -> Vec<Self> {
        Version::SUPPORTED
            .into_iter()
            .filter_map(NixRoot::get)
            .map(|root| {
                let dir = tempfile::tempdir().unwrap();
                root.run_ok(&[Bind::new(dir.path(), "/out")], 0, SCRIPT);
                fs::write(dir.path().join("nix/store/leftover"), "x").unwrap();
                Self { dir, root }
            })
            .collect()
    }
    fn path(&self) -> &Path {
        self.dir.path()
    }
    fn castore(&self) -> PathBuf {
        self.path().join("castore")
    }
    fn real(&self) -> PathBuf {
        self.path().join("nix/store")
    }
    fn options(&self) -> Options {
        Options {
            root: self.path().to_owned(),
            store: self.castore(),
            state: None,
            upper: None,
            work: None,
            store_options: StoreOptions::default(),
            jobs: 2,
            verify_all: false,
            wait: Duration::ZERO,
        }
    }
    fn adoption(&self) -> Adoption {
        Adoption::new(self.options()).unwrap()
    }
    fn adopt(&self) -> Result<Adopted> {
        self.adoption()
            .adopt(None, &control(&|_| {}, &AtomicBool::new(false)))
    }
    fn phase(&self) -> Option<Phase> {
        State::load(&self.castore())
            .unwrap()
            .map(|state| state.phase)
    }
    /// Base names of what Nix says is valid; the root may have leftovers of its own.
    fn valid(&self) -> Vec<String> {
        let text = fs::read_to_string(self.path().join("paths")).unwrap();
        let names = text.lines().map(|path| path.rsplit('/').next().unwrap());
        names.map(str::to_owned).collect()
    }
    fn objects(&self) -> BTreeMap<String, (u32, i64, u64)> {
        fs::read_dir(self.real())
            .unwrap()
            .map(|entry| {
                let entry = entry.unwrap();
                let found = fs::symlink_metadata(entry.path()).unwrap();
                let name = entry.file_name().into_string().unwrap();
                let size = if found.is_dir() { 0 } else { found.len() };
                (name, (found.mode(), found.mtime(), size))
            })
            .filter(|(name, _)| name != ".links")
            .collect()
    }
    /// Stock Nix's own opinion.
    fn verify(&self) {
        let binds = [Bind::new(self.path(), "/made")];
        let script = "nix-store --store /made --verify --check-contents 2>&1 || exit 1";
        let said = self.root.run_ok(&binds, 0, script);
        assert!(!said.contains("error"), "{said}");
        assert!(!said.contains("disappeared"), "{said}");
    }
}

fn control<'a>(progress: &'a (dyn Fn(Progress) + Sync), cancel: &'a AtomicBool) -> Control<'a> {
    Control { progress, cancel }
}

fn never(_: &Layout) -> Result<()> {
    panic!("nothing runs that could be stopped")
}

fn undo(made: &Made) -> Result<understory::adopt::Undone> {
    made.adoption()
        .undo(&never, &control(&|_| {}, &AtomicBool::new(false)))
}

#[test]
fn real_nix_stores_are_examined_adopted_and_given_back() {
    for made in Made::all() {
        let before = made.objects();
        let seen = made
            .adoption()
            .examine(true, &control(&|_| {}, &AtomicBool::new(false)))
            .unwrap();
        let valid = made.valid();
        assert_eq!(seen.paths, valid.len() as u64);
        let leftovers = (before.len() - valid.len()) as u64;
        assert_eq!((seen.leftovers, seen.paths_in_castore), (leftovers, 0));
        let estimate = seen.estimate.unwrap();
        assert!(estimate.castore_bytes_min <= estimate.castore_bytes_max);
        assert!(!made.castore().exists(), "nothing was made");

        let done = made.adopt().unwrap();
        assert_eq!(
            (done.paths, done.imported, done.verified),
            (seen.paths, seen.paths, seen.paths)
        );
        assert!(!done.is_mounted && done.missing.is_empty());
        assert_eq!(made.phase(), Some(Phase::Swapping));
        assert_eq!(made.objects(), before, "the store is as it was");
        let mut options = LayoutOptions::default();
        understory::adopt::complete_layout(&made.castore(), &mut options).unwrap();
        assert_eq!(options.merged, Some(made.real()));
        let store = Store::open(&made.castore(), &StoreOptions::default()).unwrap();
        let refused = store
            .collect(&GcAction::DeleteDead {
                freed_bytes_max: u64::MAX,
            })
            .unwrap_err();
        assert_eq!(
            refused.to_string(),
            format!(
                "the Nix store at {} needs what is in {}: nothing is deleted",
                made.real().display(),
                made.castore().display()
            )
        );
        let refused = made
            .adoption()
            .reclaim(&control(&|_| {}, &AtomicBool::new(false)))
            .unwrap_err();
        assert_eq!(
            refused.to_string(),
            format!(
                "the overlay is not mounted on {}: nothing is deleted",
                made.real().display()
            )
        );

        // An original is gone, another is damaged: both come back from the castore.
        let mut objects = valid
            .iter()
            .filter(|name| name.ends_with("-lib") || name.ends_with("-note"));
        let (gone, damaged) = (objects.next().unwrap(), objects.next().unwrap());
        remove(&made.real().join(gone));
        remove(&made.real().join(damaged));
        fs::write(made.real().join(damaged), "other").unwrap();
        let undone = undo(&made).unwrap();
        assert_eq!(
            (undone.paths, undone.restored, undone.moved),
            (seen.paths, 2, 0)
        );
        assert!(undone.missing.is_empty());
        assert_eq!(made.objects(), before);
        assert_eq!(made.phase(), None);
        made.verify();
        let nothing = undo(&made).unwrap_err();
        assert!(nothing.to_string().contains("has not adopted"), "{nothing}");
    }
}

#[test]
fn real_nix_store_in_use_is_not_swapped() {
    let Some(made) = Made::all().pop() else {
        return;
    };
    let lock = fs::File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(made.path().join("nix/var/nix/gc.lock"))
        .unwrap();
    lock.lock().unwrap();
    let error = made.adopt().unwrap_err();
    assert_eq!(
        error.to_string(),
        format!(
            "the Nix store in {} is in use: its locks are held",
            made.path().join("nix/var/nix").display()
        )
    );
    assert_eq!(made.phase(), Some(Phase::Verified), "only the swap waits");
    drop(lock);
    assert_eq!(made.adopt().unwrap().imported, 0);
    undo(&made).unwrap();
}

#[test]
fn real_nix_store_interrupted_at_every_step_goes_on() {
    let Some(made) = Made::all().pop() else {
        return;
    };
    let before = made.objects();
    let mut runs = 0;
    loop {
        // Ends at the n-th sign of life; each run comes further.
        let (signs, cancel) = (AtomicU64::new(0), AtomicBool::new(false));
        let stop_at = 3 + 7 * runs;
        let tell = |_: Progress| {
            if signs.fetch_add(1, Ordering::Relaxed) >= stop_at {
                cancel.store(true, Ordering::Relaxed);
            }
        };
        match made.adoption().adopt(None, &control(&tell, &cancel)) {
            Ok(_) => break,
            Err(error) => assert_eq!(error.to_string(), "interrupted"),
        }
        assert_eq!(made.objects(), before);
        runs += 1;
        assert!(runs < 200, "it does not come further");
    }
    assert!(runs > 0, "nothing was interrupted");
    for name in made.valid() {
        remove(&made.real().join(name));
    }
    let mut runs = 0;
    loop {
        let (signs, cancel) = (AtomicU64::new(0), AtomicBool::new(false));
        let tell = |_: Progress| {
            if signs.fetch_add(1, Ordering::Relaxed) >= 2 * (runs + 1) {
                cancel.store(true, Ordering::Relaxed);
            }
        };
        match made.adoption().undo(&never, &control(&tell, &cancel)) {
            Ok(_) => break,
            Err(error) => assert_eq!(error.to_string(), "interrupted"),
        }
        assert_eq!(made.phase(), Some(Phase::Undoing));
        let error = made.adopt().unwrap_err();
        assert!(
            error.to_string().starts_with("an undo of the adoption of "),
            "{error}"
        );
        runs += 1;
        assert!(runs < 200, "it does not come further");
    }
    assert_eq!(made.objects(), before);
    made.verify();
}

#[test]
fn real_nix_store_with_damage_or_other_contents_is_refused() {
    let Some(made) = Made::all().pop() else {
        return;
    };
    let name = made
        .objects()
        .into_keys()
        .find(|name| name.ends_with("-note"))
        .unwrap();
    let place = made.real().join(&name);
    let text = fs::read(&place).unwrap();
    remove(&place);
    fs::write(&place, "other").unwrap();
    let error = made.adopt().unwrap_err();
    assert!(
        error.to_string().contains("paths were not imported"),
        "{error}"
    );
    assert!(error.to_string().contains(&name), "{error}");
    assert_eq!(made.phase(), Some(Phase::Importing));
    remove(&place);
    fs::write(&place, text).unwrap();
    made.adopt().unwrap();
    undo(&made).unwrap();

    // A castore that has adopted one store takes no second one, and none inside of the store.
    made.adopt().unwrap();
    let other = tempfile::tempdir().unwrap();
    fs::create_dir_all(other.path().join("nix/store")).unwrap();
    fs::create_dir_all(other.path().join("nix/var/nix/db")).unwrap();
    fs::copy(
        made.path().join("nix/var/nix/db/db.sqlite"),
        other.path().join("nix/var/nix/db/db.sqlite"),
    )
    .unwrap();
    fs::write(other.path().join("nix/var/nix/db/schema"), "10").unwrap();
    let mut options = made.options();
    options.root = other.path().to_owned();
    let error = Adoption::new(options.clone()).unwrap_err();
    assert_eq!(
        error.to_string(),
        format!(
            "the castore in {} has adopted {} already, not {}",
            made.castore().display(),
            made.real().display(),
            other.path().join("nix/store").display()
        )
    );
    options.store = other.path().join("nix/store/x");
    let error = Adoption::new(options.clone()).unwrap_err();
    assert!(
        error
            .to_string()
            .contains("lies in the store that is to be adopted"),
        "{error}"
    );
    fs::write(other.path().join("nix/var/nix/db/schema"), "11").unwrap();
    let error = Adoption::new(options).unwrap_err();
    assert_eq!(
        error.to_string(),
        format!(
            "{} has schema 11, expected 10",
            other.path().join("nix/var/nix/db/db.sqlite").display()
        )
    );
}

#[test]
fn real_nix_store_that_grew_without_the_overlay_is_caught_up_with() {
    let Some(made) = Made::all().pop() else {
        return;
    };
    made.adopt().unwrap();
    let binds = [Bind::new(made.path(), "/made")];
    let script = "cd \"$(mktemp -d)\" && echo meanwhile > meanwhile && nix-store --store /made --add meanwhile";
    let added = made.root.run_ok(&binds, 0, script);
    let name = added.trim().rsplit('/').next().unwrap().to_owned();
    StorePath::from_base_name(&name).unwrap();
    let done = made.adopt().unwrap();
    assert_eq!((done.caught_up, done.imported), (1, 0));
    let above = made.castore().join("upper").join(&name);
    assert_eq!(fs::read_to_string(&above).unwrap(), "meanwhile\n");
    assert_eq!(made.adopt().unwrap().caught_up, 0);
    // Only the upper directory has it: undo moves it down.
    remove(&made.real().join(&name));
    let undone = undo(&made).unwrap();
    assert_eq!((undone.moved, undone.restored, undone.leftovers), (1, 0, 0));
    assert!(!above.exists());
    made.verify();
}

fn remove(path: &Path) {
    if path.is_symlink() || path.is_file() {
        fs::remove_file(path).unwrap();
    } else {
        fs::remove_dir_all(path).unwrap();
    }
}
