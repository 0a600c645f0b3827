//! Supervisors, mount servers and daemons that are killed at every moment of a switch to another generation.

use super::renewal::{Renewing, images};
use super::support::{Child, Down, may_mount_images, record, send, wait_for_end, wait_until};
use super::systemd::Systemd;
use rustix::process::Signal;
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use understory::mount::mountinfo::{self, MountEntry};
use understory::supervisor::Role;

/// Each path that comes is reason enough for another generation.
const OPTIONS: [&str; 6] = [
    "--option",
    "image-paths-min",
    "1",
    "--option",
    "image-newer-paths-max",
    "0",
];
/// How often a switch is killed; more for a longer look.
const ROUNDS: &str = "UNDERSTORY_TEST_ROUNDS";
/// After each of these a kill comes. In the order in which they come.
const MOMENTS: [Moment; 7] = [
    Moment::Begun,
    Moment::Made,
    Moment::Image,
    Moment::Newer,
    Moment::Beneath,
    Moment::Switched,
    Moment::LetGo,
];

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Moment {
    /// A generation is being made.
    Begun,
    /// It is there.
    Made,
    /// Its image is mounted.
    Image,
    /// And the live mount beside it.
    Newer,
    /// The overlay on them waits below that in use.
    Beneath,
    /// It is that in use.
    Switched,
    /// What the one before stood on is unmounted.
    LetGo,
}

impl Moment {
    /// How far an instance is on its way from generation `from` to `to`.
    fn now(store: &Path, from: u64, to: u64) -> Option<Self> {
        let mounts = mountinfo::mounts().unwrap();
        let image = store.join("image");
        let is_there = |number: u64, name: &str| {
            let place = image.join(number.to_string()).join(name);
            mounts.iter().any(|entry| entry.mount_point == place)
        };
        let merged = store.join("merged/nix/store");
        let overlays = mountinfo::stacked_at(&mounts, &merged);
        let stands_on = |entry: &MountEntry, number: u64| {
            let newer = image.join(number.to_string()).join("newer");
            entry.overlay_lower_dirs().contains(&newer)
        };
        let generations = store.join("generations");
        let has_begun = || {
            let names = fs::read_dir(&generations).unwrap().flatten();
            let mut names = names.map(|entry| entry.file_name());
            names.any(|name| name.to_string_lossy().starts_with("new-"))
        };
        let top = overlays.last();
        Some(match () {
            () if top.is_some_and(|top| stands_on(top, to)) => match is_there(from, "newer") {
                true => Self::Switched,
                false => Self::LetGo,
            },
            () if overlays.len() > 1 => Self::Beneath,
            () if is_there(to, "newer") => Self::Newer,
            () if is_there(to, "store") => Self::Image,
            () if generations.join(to.to_string()).exists() => Self::Made,
            () if has_begun() => Self::Begun,
            () => return None,
        })
    }
}

fn rounds() -> u64 {
    let rounds = std::env::var(ROUNDS).ok();
    rounds.map_or(MOMENTS.len() as u64, |rounds| rounds.parse().unwrap())
}

/// Lets an overlay that stands on the newest generation move on, and kills processes at a moment of that which depends on
/// the round; the supervisor is the last of them. Returns what is killed when.
fn kill_at(r: &Renewing, round: u64, is_killed: &AtomicBool) -> String {
    let (store, count) = (r.sandbox.store(), MOMENTS.len() as u64);
    let moment = MOMENTS[usize::try_from(round % count).unwrap()];
    let supervisor = record(&r.sandbox).unwrap();
    let pid = |role| supervisor.worker(role).and_then(|worker| worker.pid);
    let first = match (round + round / count) % 3 {
        0 => None,
        1 => Some(Role::Mount),
        _ => Some(Role::Daemon),
    };
    let from = r.generations().last().copied().unwrap();
    r.add(1);
    let mut seen = None;
    wait_until(
        || {
            seen = Moment::now(&store, from, from + 1);
            seen >= Some(moment)
        },
        || {
            format!(
                "round {round}: {moment:?} does not come, {:?}",
                r.standing()
            )
        },
    );
    // From the second time on a little later each time.
    std::thread::sleep(Duration::from_millis(round / count));
    is_killed.store(true, Ordering::SeqCst);
    if let Some(pid) = first.and_then(pid) {
        send(pid, Signal::KILL);
        std::thread::sleep(Duration::from_millis(round / count % 4));
    }
    send(supervisor.pid, Signal::KILL);
    format!("round {round}: {first:?} and the supervisor at {moment:?}, which was {seen:?}")
}

/// Makes a file through the overlay and looks at all that were made so.
struct Upper(BTreeMap<String, String>);

impl Upper {
    fn check(&self, r: &Renewing, at: &str) {
        for (name, contents) in &self.0 {
            let found = fs::read_to_string(r.sandbox.merged().join(name));
            let found = found.unwrap_or_else(|e| panic!("{at}: {name}: {e}"));
            assert_eq!(found, *contents, "{at}");
        }
        let names = fs::read_dir(r.sandbox.merged()).unwrap();
        let names = names.map(|entry| entry.unwrap().file_name().into_string().unwrap());
        let shown = names.filter(|name| !name.starts_with('.')).count();
        let expected = self.0.len() + r.files.lock().unwrap().len();
        assert_eq!(shown, expected, "{at}");
    }
    fn write(&mut self, r: &Renewing, round: u64) {
        let (name, contents) = (format!("written-{round}"), format!("in round {round}"));
        fs::write(r.sandbox.merged().join(&name), &contents).unwrap();
        self.0.insert(name, contents);
    }
}

/// What an instance has mounted and keeps.
#[derive(Debug, PartialEq, Eq)]
struct Left {
    /// Places below the store's directory, each as often as something is mounted there.
    mounts: Vec<PathBuf>,
    /// What is in `image`.
    places: Vec<String>,
    generations: Vec<u64>,
}

impl Left {
    fn now(r: &Renewing) -> Self {
        let store = r.sandbox.store();
        let mounts = mountinfo::mounts().unwrap();
        let places = mounts.into_iter().map(|entry| entry.mount_point);
        let mut mounts: Vec<_> = places.filter(|place| place.starts_with(&store)).collect();
        mounts.sort();
        let names = fs::read_dir(store.join("image")).unwrap();
        let names = names.map(|entry| entry.unwrap().file_name().into_string().unwrap());
        let mut places: Vec<_> = names.collect();
        places.sort();
        let generations = r.generations();
        Self {
            mounts,
            places,
            generations,
        }
    }
    /// True if nothing is more than that needs that stands on generation `number`.
    fn is_only(&self, store: &Path, number: u64) -> bool {
        let mut mounts: Vec<_> = ["image/blob", "merged/nix/store", "mnt"]
            .into_iter()
            .map(str::to_owned)
            .chain(["newer", "store"].map(|name| format!("image/{number}/{name}")))
            .map(|place| store.join(place))
            .collect();
        mounts.sort();
        let is_place =
            |name: &String| *name == number.to_string() || name == "blob" || name == "overlay";
        self.mounts == mounts
            && self.places.iter().all(is_place)
            && self.generations.len() <= 2
            && self.generations.last() == Some(&number)
    }
}

/// Waits until the overlay stands on the newest generation and nothing else is mounted or left, and looks at all.
fn settle(r: &Renewing, upper: &Upper, at: &str, log: impl Fn() -> String) {
    let newest = r.generations().last().copied().unwrap();
    r.wait_for_generation(newest);
    let store = r.sandbox.store();
    wait_until(
        || Left::now(r).is_only(&store, newest),
        || format!("{at}: there are {:?}\n{}", Left::now(r), log()),
    );
    assert_eq!(r.standing()["generation"], newest, "{at}");
    r.read_all();
    upper.check(r, at);
}

/// Reads all over and over until `then` has returned. Before `may_fail` is set nothing may fail; afterwards a failure ends it.
fn while_walked<T>(r: &Renewing, may_fail: &AtomicBool, then: impl FnOnce() -> T) -> T {
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let reader = scope.spawn(|| {
            while !stop.load(Ordering::SeqCst) {
                let read = r.try_read_all();
                match read {
                    Ok(_) => std::thread::sleep(Duration::from_millis(1)),
                    Err(_) if may_fail.load(Ordering::SeqCst) => return,
                    Err(error) => panic!("{error}"),
                }
            }
        });
        let done = {
            let _stop = super::support::Stop(&stop);
            then()
        };
        reader.join().unwrap();
        done
    })
}

#[test]
fn instances_that_are_killed_while_they_move_on_start_again() {
    if !may_mount_images() {
        return;
    }
    let r = Renewing::new();
    let _down = Down(&r.sandbox);
    let log = || fs::read_to_string(r.sandbox.store().join("run/up.log")).unwrap_or_default();
    let up = || r.sandbox.ok(&[&["up", "--detach"], &OPTIONS[..]].concat());
    let mut upper = Upper(BTreeMap::new());
    let mut at = "at the start".to_owned();
    for round in 0..rounds() {
        up();
        settle(&r, &upper, &at, log);
        upper.write(&r, round);
        let pid = record(&r.sandbox).unwrap().pid;
        let is_killed = AtomicBool::new(false);
        at = while_walked(&r, &is_killed, || {
            let at = kill_at(&r, round, &is_killed);
            wait_for_end(pid);
            at
        });
    }
    up();
    settle(&r, &upper, &at, log);
    r.sandbox.ok(&["-q", "down"]);
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    assert!(
        !mounts.contains(r.sandbox.store().to_str().unwrap()),
        "{mounts}"
    );
}

#[test]
fn supervisors_that_are_killed_while_the_overlay_moves_on_are_gone_on_with() {
    if !may_mount_images() {
        return;
    }
    let r = Renewing::new();
    let _down = Down(&r.sandbox);
    let systemd = Systemd::new(&r.sandbox, &OPTIONS);
    let mut running = systemd.start();
    let mut upper = Upper(BTreeMap::new());
    let mut at = "at the start".to_owned();
    let nothing_fails = AtomicBool::new(false);
    let dev = || {
        use std::os::unix::fs::MetadataExt;
        fs::metadata(r.sandbox.store().join("mnt")).unwrap().dev()
    };
    let device = dev();
    for round in 0..rounds() {
        settle(&r, &upper, &at, || running.log());
        upper.write(&r, round);
        while_walked(&r, &nothing_fails, || {
            at = kill_at(&r, round, &AtomicBool::new(false));
            running.process.wait().unwrap();
            running = systemd.start();
        });
        let restored = record(&r.sandbox).unwrap().restored;
        assert!(restored, "{at}\n{}", running.log());
    }
    settle(&r, &upper, &at, || running.log());
    assert_eq!(dev(), device);
}

#[test]
fn what_a_container_uses_of_an_earlier_generation_is_served_by_the_next_supervisor() {
    if !may_mount_images() {
        return;
    }
    let r = Renewing::new();
    let _down = Down(&r.sandbox);
    let systemd = Systemd::new(&r.sandbox, &OPTIONS);
    let mut running = systemd.start();
    settle(&r, &Upper(BTreeMap::new()), "at the start", || {
        running.log()
    });
    let first = r.generations().last().copied().unwrap();
    // It has all that lies below the overlay, and not the overlay itself.
    let merged = r.sandbox.merged();
    let script = "umount \"$0\" && touch \"$1\" && exec sleep 1000";
    let is_there = r.sandbox.path().join("container");
    let container = Command::new("unshare")
        .args(["--mount", "--propagation", "private", "sh", "-c", script])
        .args([&merged, &is_there])
        .spawn();
    let container = Child(container.unwrap());
    wait_until(|| is_there.exists(), || "no container".to_owned());
    r.add(1);
    r.wait_for_generation(first + 1);
    let image = format!("{}/store", first + 1);
    let only_next = || images(&r.sandbox.store()) == [image.clone()];
    wait_until(only_next, || format!("{:?}", images(&r.sandbox.store())));
    let path = r.sandbox.add_tree("later", "later\n");
    let name = path.strip_prefix("/nix/store/").unwrap();
    let newer = format!("image/{first}/newer/{name}/file");
    let read_inside = || {
        let read = Command::new("nsenter")
            .args(["--mount", "--target", &container.0.id().to_string(), "cat"])
            .arg(r.sandbox.store().join(&newer))
            .output()
            .unwrap();
        String::from_utf8_lossy(&[read.stdout, read.stderr].concat()).into_owned()
    };
    assert_eq!(read_inside(), "later\n");
    for _ in 0..2 {
        running.end(Signal::KILL);
        running = systemd.start();
        assert!(record(&r.sandbox).unwrap().restored, "{}", running.log());
        assert_eq!(read_inside(), "later\n");
    }
    // When it is gone, so is what it used.
    drop(container);
    let held = || systemd.service.names();
    let of_first = format!("image-newer-{first}-");
    wait_until(
        || !held().iter().any(|name| name.contains(&of_first)) && r.generations().len() <= 2,
        || format!("{:?}, {:?}\n{}", held(), r.generations(), running.log()),
    );
    running.end(Signal::KILL);
    running = systemd.start();
    assert!(record(&r.sandbox).unwrap().restored, "{}", running.log());
    assert_eq!(
        std::fs::read_to_string(merged.join(name).join("file")).unwrap(),
        "later\n"
    );
}
