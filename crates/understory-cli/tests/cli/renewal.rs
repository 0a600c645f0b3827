//! Instances whose overlay moves on to new generations while it is read.

use super::Sandbox;
use super::support::{
    Child, Down, LIMIT, Stop, collect, may_mount_images, read_from_server, send, shown, wait_until,
    worker,
};
use rustix::process::Signal;
use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};
use understory::supervisor::Role;

/// One path is reason enough for an image, more than three newer ones for another.
const OPTIONS: [&str; 6] = [
    "--option",
    "image-paths-min",
    "1",
    "--option",
    "image-newer-paths-max",
    "3",
];

/// An instance, and what its overlay must show.
pub(super) struct Renewing {
    pub(super) sandbox: Sandbox,
    pub(super) files: Mutex<BTreeMap<PathBuf, String>>,
    number: AtomicU64,
}

impl Renewing {
    pub(super) fn new() -> Self {
        let this = Self {
            sandbox: Sandbox::new(),
            files: Mutex::default(),
            number: AtomicU64::new(0),
        };
        this.add(3);
        this
    }

    pub(super) fn up(&self) {
        // What it logs is looked at.
        self.sandbox
            .ok(&[&["up", "--detach"], &OPTIONS[..]].concat());
    }

    /// Adds so many paths.
    pub(super) fn add(&self, count: u64) {
        for _ in 0..count {
            let number = self.number.fetch_add(1, Ordering::SeqCst);
            let contents = format!("line of file {number}\n").repeat(5000);
            let path = self.sandbox.add_tree(&format!("t{number}"), &contents);
            let file = shown(&self.sandbox, &path).join("file");
            self.files.lock().unwrap().insert(file, contents);
        }
    }

    /// Keeps all that was added from being collected.
    fn root_all(&self) {
        for file in self.files.lock().unwrap().keys() {
            let name = file.parent().unwrap().file_name().unwrap();
            let path = format!("/nix/store/{}", name.to_str().unwrap());
            let link = self.sandbox.path().join(format!("root-{}", &path[11..]));
            self.sandbox
                .ok(&["-q", "root", "add", &path, link.to_str().unwrap()]);
        }
    }

    /// Reads all files, from the server.
    pub(super) fn read_all(&self) -> u64 {
        self.try_read_all()
            .unwrap_or_else(|error| panic!("{error}"))
    }

    /// The same, but a file that cannot be read is an error. One that differs fails the test.
    pub(super) fn try_read_all(&self) -> Result<u64, String> {
        let files = self
            .files
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone();
        for (file, expected) in &files {
            read_from_server(file, expected).map_err(|e| format!("{}: {e}", file.display()))?;
        }
        Ok(files.len() as u64)
    }

    /// Runs `then` while all files are read over and over, with pauses; returns the number of reads.
    fn while_read(&self, then: impl FnOnce()) -> u64 {
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let reader = scope.spawn(|| {
                let mut reads = 0;
                while !stop.load(Ordering::SeqCst) {
                    reads += self.read_all();
                    std::thread::sleep(Duration::from_millis(1));
                }
                reads
            });
            {
                let _stop = Stop(&stop);
                then();
            }
            reader.join().unwrap()
        })
    }

    /// Numbers of the generations that there are.
    pub(super) fn generations(&self) -> Vec<u64> {
        let list = self.sandbox.json(&["generation", "list"]);
        let all = list.as_array().unwrap().iter();
        all.map(|g| g["number"].as_u64().unwrap()).collect()
    }

    pub(super) fn standing(&self) -> serde_json::Value {
        self.sandbox.json(&["status"])["standing"].clone()
    }

    pub(super) fn wait_for(&self, what: &str, is_so: impl Fn(&serde_json::Value) -> bool) {
        let end = Instant::now() + LIMIT;
        loop {
            let standing = self.standing();
            if is_so(&standing) {
                return;
            }
            if Instant::now() >= end {
                let log = fs::read_to_string(self.sandbox.store().join("run/up.log"));
                panic!("waited for {what}: {standing}\n{}", log.unwrap_or_default());
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// Waits until the overlay stands on that generation, or a later one.
    pub(super) fn wait_for_generation(&self, number: u64) {
        self.wait_for(&format!("generation {number}"), |standing| {
            standing["generation"].as_u64() >= Some(number)
        });
    }

    /// Waits until the next generation waits because of that.
    fn wait_until_it_waits(&self, why: &str) {
        self.wait_for(why, |standing| {
            standing["waitsFor"]
                .as_str()
                .is_some_and(|text| text.contains(why))
        });
    }
}

pub(super) fn images(store: &Path) -> Vec<String> {
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    let of = format!("{}/image/", store.display());
    let lines = mounts.lines().filter(|line| line.contains(" - erofs "));
    lines
        .filter_map(|line| {
            let place = line.split(' ').nth(4)?;
            Some(place.strip_prefix(&of)?.to_owned())
        })
        .collect()
}

#[test]
fn an_overlay_moves_on_when_nobody_uses_it() {
    if !may_mount_images() {
        return;
    }
    let r = Renewing::new();
    let _down = Down(&r.sandbox);
    r.up();
    assert_eq!(r.standing()["generation"], 1);
    let first = r.files.lock().unwrap().keys().next().unwrap().clone();
    let reads = r.while_read(|| {
        // An open file.
        let open = File::open(&first).unwrap();
        r.add(4);
        r.wait_until_it_waits("open");
        assert_eq!(r.standing()["generation"], 1);
        assert_eq!(r.standing()["next"], 2);
        let status = r.sandbox.ok(&["status"]);
        let waits = "generation 2 waits: something in the overlay is open or runs";
        assert!(status.contains(waits), "{status}");
        drop(open);
        r.wait_for_generation(2);
        // A copy of the mount in another namespace, as that of a container.
        let copy = Command::new("unshare")
            .args(["--mount", "--propagation", "private", "sleep", "1000"])
            .spawn();
        let copy = Child(copy.unwrap());
        let own = fs::read_link("/proc/self/ns/mnt").unwrap();
        let ns = format!("/proc/{}/ns/mnt", copy.0.id());
        wait_until(
            || fs::read_link(&ns).is_ok_and(|theirs| theirs != own),
            || "it enters no namespace".to_owned(),
        );
        r.add(4);
        r.wait_until_it_waits("another mount namespace");
        assert_eq!(r.standing()["generation"], 2);
        drop(copy);
        r.wait_for_generation(3);
        // Another process that has the upper store open, as a Nix that builds.
        let state = r.sandbox.store().join("merged/nix/var/nix/db/big-lock");
        let nix = File::open(state).unwrap();
        rustix::fs::flock(&nix, rustix::fs::FlockOperation::LockShared).unwrap();
        r.add(4);
        r.wait_until_it_waits("Nix has the store open");
        assert_eq!(r.standing()["generation"], 3);
        // What is mounted beside it shows nothing, and is not written to.
        fs::write(r.sandbox.merged().join("written"), "before").unwrap();
        drop(nix);
        r.wait_for_generation(4);
        assert_eq!(
            fs::read_to_string(r.sandbox.merged().join("written")).unwrap(),
            "before"
        );
        // Packs are rewritten below it.
        r.sandbox.ok(&["-q", "repack", "--all"]);
        assert_eq!(names_shown(&r).len(), r.files.lock().unwrap().len() + 1);
    });
    assert!(reads > 100, "{reads}");
    assert_eq!(images(&r.sandbox.store()), ["4/store"]);
    // What nobody mounts is dropped, but one that is kept.
    let numbers = r.generations();
    assert_eq!(numbers, [3, 4]);
    // What comes later is seen and listed at once.
    r.add(1);
    r.read_all();
    // The next instance begins where this one was.
    r.sandbox.ok(&["-q", "down"]);
    assert!(images(&r.sandbox.store()).is_empty());
    r.up();
    assert_eq!(r.standing()["generation"], 4);
    r.read_all();
}

/// What is valid is shown, and nothing else.
fn shows_what_is_valid(r: &Renewing) -> bool {
    let mut options = understory::StoreOptions::default();
    options.castore.read_only = true;
    let store = understory::Store::open(&r.sandbox.store(), &options).unwrap();
    let valid = store.all_paths().unwrap();
    let valid = valid.iter().map(|path| path.base_name().to_owned());
    valid.collect::<BTreeSet<_>>() == names_shown(r)
}

fn names_shown(r: &Renewing) -> BTreeSet<String> {
    fs::read_dir(r.sandbox.merged())
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| !name.starts_with('.'))
        .collect()
}

#[test]
fn a_collection_puts_the_overlay_on_a_generation_without_what_is_dead() {
    if !may_mount_images() {
        return;
    }
    let r = Renewing::new();
    r.root_all();
    let old = r.sandbox.add_tree("old", "is in the generation\n");
    let _down = Down(&r.sandbox);
    r.up();
    assert_eq!(r.standing()["generation"], 1);
    let new = r.sandbox.add_tree("new", "is newer than it\n");
    assert!(shown(&r.sandbox, &new).join("file").exists());
    r.while_read(|| {
        let report = collect(&r.sandbox, &[]);
        let mut dead = [old.clone(), new];
        dead.sort();
        assert_eq!(report["paths"], serde_json::json!(dead), "{report}");
    });
    assert!(shows_what_is_valid(&r));
    let number = r.standing()["generation"].as_u64().unwrap();
    assert!(number > 1, "{number}");
    assert_eq!(images(&r.sandbox.store()), [format!("{number}/store")]);
    assert_eq!(r.sandbox.json(&["gc"])["paths"], serde_json::json!([]));
    assert_eq!(r.standing()["generation"], number, "nothing was dead");
    // It may come again, and so may others.
    assert_eq!(r.sandbox.add_tree("old", "is in the generation\n"), old);
    assert!(shown(&r.sandbox, &old).join("file").exists());
    r.add(1);
    r.read_all();
    assert!(shows_what_is_valid(&r));
    // The next instance takes the generation for what it is.
    r.sandbox.ok(&["-q", "down"]);
    r.up();
    assert_eq!(r.standing()["generation"], number);
    assert!(shows_what_is_valid(&r));
    r.read_all();
}

#[test]
fn processes_that_are_killed_while_they_collect() {
    if !may_mount_images() {
        return;
    }
    let r = Renewing::new();
    r.root_all();
    let _down = Down(&r.sandbox);
    r.up();
    r.while_read(|| {
        for round in 0..12_u64 {
            let role = match round % 2 {
                0 => Role::Daemon,
                _ => Role::Mount,
            };
            for number in 0..2 {
                r.sandbox.add_tree("dead", &format!("{round} {number}"));
            }
            std::thread::scope(|scope| {
                // Whatever it says.
                scope.spawn(|| r.sandbox.run(&["gc"]));
                std::thread::sleep(Duration::from_millis(6 * round));
                send(worker(&r.sandbox, role, None), Signal::KILL);
            });
            worker(&r.sandbox, Role::Mount, None);
            worker(&r.sandbox, Role::Daemon, None);
            wait_until(
                || shows_what_is_valid(&r),
                || format!("round {round}: what is valid is not what is shown"),
            );
        }
    });
    let files = r.files.lock().unwrap().len();
    wait_until(
        || {
            r.sandbox.ok(&["-q", "gc"]);
            names_shown(&r).len() == files
        },
        || "dead paths stay".to_owned(),
    );
    assert!(shows_what_is_valid(&r));
}

#[test]
fn processes_that_are_killed_while_the_overlay_moves_on() {
    if !may_mount_images() {
        return;
    }
    let r = Renewing::new();
    let _down = Down(&r.sandbox);
    r.up();
    r.while_read(|| {
        let mut generation = 1;
        for round in 0..4_u64 {
            r.add(4);
            let end = Instant::now() + LIMIT;
            let mut kills = 0_u64;
            while r.standing()["generation"].as_u64() <= Some(generation) {
                assert!(Instant::now() < end, "round {round}: it does not move on");
                let role = match (round + kills) % 3 {
                    0 => Role::Daemon,
                    _ => Role::Mount,
                };
                // A daemon needs to live for a while to find that it is time.
                let pause = if role == Role::Daemon { 2500 } else { 300 };
                std::thread::sleep(Duration::from_millis(pause + 37 * kills));
                send(worker(&r.sandbox, role, None), Signal::KILL);
                kills += 1;
            }
            generation = r.standing()["generation"].as_u64().unwrap();
        }
    });
    worker(&r.sandbox, Role::Mount, None);
    worker(&r.sandbox, Role::Daemon, None);
    r.add(1);
    r.read_all();
    // After the next one nothing is left of what was begun.
    let generation = r.standing()["generation"].as_u64().unwrap();
    r.add(4);
    r.wait_for_generation(generation + 1);
    let store = r.sandbox.store();
    wait_until(
        || images(&store).len() == 1,
        || format!("{:?}", images(&store)),
    );
    r.sandbox.ok(&["-q", "down"]);
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    assert!(!mounts.contains(store.to_str().unwrap()), "{mounts}");
}

#[test]
fn a_daemon_that_hears_of_mounts_all_the_time_is_alive() {
    const WATCHDOG: Duration = Duration::from_secs(1);
    if !may_mount_images() {
        return;
    }
    let r = Renewing::new();
    r.root_all();
    let _down = Down(&r.sandbox);
    let up = ["up", "--detach", "--watchdog", "1"];
    r.sandbox.ok(&[&up, &OPTIONS[..]].concat());
    // Each collection mounts a generation, of which the supervisor tells the daemon.
    let end = Instant::now() + 3 * WATCHDOG;
    let mut collections = 0;
    while Instant::now() < end || collections < 10 {
        r.sandbox.add_tree("dead", &format!("{collections}"));
        r.sandbox.ok(&["-q", "gc"]);
        collections += 1;
    }
    let status = r.sandbox.json(&["status"]);
    for worker in status["supervisor"]["workers"].as_array().unwrap() {
        assert_eq!(worker["restarts"], 0, "{status}");
    }
    r.read_all();
}

/// Unmounts it.
struct Small(PathBuf);
impl Drop for Small {
    fn drop(&mut self) {
        let _ = rustix::mount::unmount(&self.0, rustix::mount::UnmountFlags::DETACH);
    }
}

#[test]
fn a_full_disk_while_a_generation_is_made() {
    if !may_mount_images() {
        return;
    }
    let r = Renewing::new();
    let generations = r.sandbox.store().join("generations");
    fs::create_dir_all(&generations).unwrap();
    let flags = rustix::mount::MountFlags::empty();
    rustix::mount::mount("tmpfs", &generations, "tmpfs", flags, c"size=256k").unwrap();
    let small = Small(generations.clone());
    let down = Down(&r.sandbox);
    r.up();
    assert_eq!(r.standing()["generation"], 1);
    let filler = generations.join("filler");
    let reads = r.while_read(|| {
        let full = fs::write(&filler, vec![1; 1 << 20]).unwrap_err();
        assert_eq!(full.kind(), std::io::ErrorKind::StorageFull);
        r.add(4);
        let log = r.sandbox.store().join("run/up.log");
        let text = || fs::read_to_string(&log).unwrap();
        let said = "renewing the generation that the overlay stands on: ";
        wait_until(
            || text().contains(said) && text().contains("No space left on device"),
            text,
        );
        let mut names: Vec<_> = fs::read_dir(&generations)
            .unwrap()
            .map(|e| e.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        assert_eq!(names, ["1", "extents", "filler", "last", "lock"]);
        assert_eq!(r.standing()["generation"], 1);
        fs::remove_file(&filler).unwrap();
        r.wait_for_generation(2);
    });
    assert!(reads > 0);
    r.read_all();
    drop((down, small));
}
