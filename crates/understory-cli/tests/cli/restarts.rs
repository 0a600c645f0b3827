//! Processes of an instance that are killed, hang, crash or are upgraded, seen by those who use it.

use super::Sandbox;
use super::instance::{Down, may_mount};
use rustix::fs::{Advice, fadvise};
use rustix::process::{Pid, Signal, kill_process};
use std::io::Read;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};
use understory::daemon::{Client, ClientOptions};
use understory::supervisor::{Record, Role};

/// More than any of it takes on a busy machine.
pub(super) const LIMIT: Duration = Duration::from_secs(60);

pub(super) fn record(sandbox: &Sandbox) -> Option<Record> {
    let layout = understory::config::Layout::new(&sandbox.store(), &Default::default()).unwrap();
    Record::read(&layout).unwrap()
}

/// Waits for a worker of that role that serves and is not `other`.
pub(super) fn worker(sandbox: &Sandbox, role: Role, other: Option<u32>) -> u32 {
    let end = Instant::now() + LIMIT;
    loop {
        let record = record(sandbox);
        let found = record.as_ref().and_then(|record| record.worker(role));
        if let Some(worker) = found.filter(|worker| worker.ready && worker.pid != other)
            && let Some(pid) = worker.pid
        {
            return pid;
        }
        assert!(Instant::now() < end, "no other {role:?} worker: {record:?}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

pub(super) fn send(pid: u32, signal: Signal) {
    let pid = Pid::from_raw(pid.cast_signed()).unwrap();
    kill_process(pid, signal).unwrap();
}

/// Ends a worker and waits for the next one.
pub(super) fn replace(sandbox: &Sandbox, role: Role, signal: Signal) {
    let pid = worker(sandbox, role, None);
    send(pid, signal);
    worker(sandbox, role, Some(pid));
}

/// Reads `file` over and over, its pages dropped each time, while `during` runs; returns the number of reads.
pub(super) fn read_while(
    file: &std::path::Path,
    expected: &str,
    during: impl FnOnce(&AtomicU64),
) -> u64 {
    let (stop, reads) = (AtomicBool::new(false), AtomicU64::new(0));
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                while !stop.load(Ordering::SeqCst) {
                    let mut open = std::fs::File::open(file).unwrap();
                    let mut text = String::new();
                    open.read_to_string(&mut text).unwrap();
                    assert!(text == expected, "the content differs");
                    fadvise(&open, 0, None, Advice::DontNeed).unwrap();
                    reads.fetch_add(1, Ordering::SeqCst);
                }
            });
        }
        struct Stop<'a>(&'a AtomicBool);
        impl Drop for Stop<'_> {
            fn drop(&mut self) {
                self.0.store(true, Ordering::SeqCst);
            }
        }
        let _stop = Stop(&stop);
        during(&reads);
    });
    reads.into_inner()
}

#[test]
fn readers_of_an_image_wait_for_the_next_mount_server() {
    let erofs = std::fs::read_to_string("/proc/filesystems").unwrap_or_default();
    if !may_mount() {
        return;
    }
    if !erofs.contains("erofs") {
        understory_testkit::skip("the kernel has no EROFS");
        return;
    }
    let sandbox = Sandbox::new();
    let contents = "a line that is read from an image\n".repeat(100_000);
    let path = sandbox.add_tree("tree", &contents);
    let base = path.strip_prefix("/nix/store/").unwrap();
    let _down = Down(&sandbox);
    sandbox.ok(&["-q", "up", "--detach", "--mount", "image"]);
    let merged = sandbox.store().join("merged/nix/store");
    let status = sandbox.ok(&["status"]);
    assert!(
        status.contains("on        an image, generation 1: "),
        "{status}"
    );
    let reads = read_while(&merged.join(base).join("file"), &contents, |reads| {
        for round in 0..10 {
            let before = reads.load(Ordering::SeqCst);
            replace(&sandbox, Role::Mount, Signal::KILL);
            let end = Instant::now() + LIMIT;
            while reads.load(Ordering::SeqCst) < before + 2 {
                assert!(Instant::now() < end, "no read after kill {round}");
                std::thread::sleep(Duration::from_millis(1));
            }
        }
    });
    assert!(reads > 0);
    // What comes later is there, too.
    let newer = sandbox.add_tree("newer", "new");
    let newer = newer.strip_prefix("/nix/store/").unwrap();
    let found = std::fs::read_to_string(merged.join(newer).join("file")).unwrap();
    assert_eq!(found, "new");
}

#[test]
fn readers_wait_for_the_next_mount_server() {
    if !may_mount() {
        return;
    }
    let sandbox = Sandbox::new();
    let contents = "a line that is read\n".repeat(100_000);
    let path = sandbox.add_tree("tree", &contents);
    let base = path.strip_prefix("/nix/store/").unwrap();
    let _down = Down(&sandbox);
    sandbox.ok(&["-q", "up", "--detach", "--watchdog", "1"]);
    let file = sandbox
        .store()
        .join("merged/nix/store")
        .join(base)
        .join("file");
    let reads = read_while(&file, &contents, |reads| {
        for round in 0..10 {
            let before = reads.load(Ordering::SeqCst);
            let end = Instant::now() + LIMIT;
            while reads.load(Ordering::SeqCst) == before {
                assert!(Instant::now() < end, "round {round}: nothing is read");
                std::thread::sleep(Duration::from_millis(1));
            }
            replace(&sandbox, Role::Mount, Signal::KILL);
        }
        // One that hangs is seen by the watchdog.
        replace(&sandbox, Role::Mount, Signal::STOP);
    });
    assert!(reads > 10, "{reads}");
    let status = sandbox.json(&["status"]);
    assert_eq!(status["supervisor"]["workers"][0]["restarts"], 11);
    assert_eq!(status["supervisor"]["workers"][0]["last_end"], "signal 9");
    // What is published now is shown.
    let later = sandbox.add_tree("later", "later\n");
    let later = later.strip_prefix("/nix/store/").unwrap();
    let names = std::fs::read_dir(sandbox.store().join("mnt")).unwrap();
    assert!(names.flatten().any(|entry| entry.file_name() == later));
}

#[test]
fn clients_that_connect_while_there_is_no_daemon_wait() {
    if !may_mount() {
        return;
    }
    let sandbox = Sandbox::new();
    let _down = Down(&sandbox);
    sandbox.ok(&["-q", "up", "--detach"]);
    for _ in 0..3 {
        send(worker(&sandbox, Role::Daemon, None), Signal::KILL);
        for socket in ["run/daemon.sock", "run/overlay.sock"] {
            understory::up::ping(&sandbox.store().join(socket)).unwrap();
        }
    }
    sandbox.ok(&["status"]);
}

#[test]
fn an_upgrade_keeps_connections_and_mounts() {
    if !may_mount() {
        return;
    }
    let sandbox = Sandbox::new();
    let contents = "upgraded\n".repeat(10_000);
    let path = sandbox.add_tree("tree", &contents);
    let base = path.strip_prefix("/nix/store/").unwrap();
    let _down = Down(&sandbox);
    sandbox.ok(&["-q", "up", "--detach"]);
    let file = sandbox
        .store()
        .join("merged/nix/store")
        .join(base)
        .join("file");
    let stream = UnixStream::connect(sandbox.store().join("run/overlay.sock")).unwrap();
    let mut client = Client::handshake(stream, &ClientOptions::default()).unwrap();
    let before = record(&sandbox).unwrap();
    read_while(&file, &contents, |_| {
        sandbox.ok(&["-q", "upgrade"]);
    });
    let after = record(&sandbox).unwrap();
    assert_eq!((after.pid, after.upgrades), (before.pid, 1));
    let old = before.worker(Role::Daemon).unwrap().pid.unwrap();
    assert_eq!(after.draining, [old], "it has a client");
    client
        .query_path_from_hash_part(&"0".repeat(32))
        .expect("the old daemon serves it");
    drop(client);
    let end = Instant::now() + LIMIT;
    while !record(&sandbox).unwrap().draining.is_empty() {
        assert!(Instant::now() < end, "the old daemon stays without clients");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn an_instance_whose_mount_server_always_crashes_gives_up_and_says_so() {
    if !may_mount() {
        return;
    }
    let sandbox = Sandbox::new();
    let _down = Down(&sandbox);
    sandbox.ok(&["-q", "up", "--detach"]);
    let mut pid = None;
    for _ in 1..understory::supervisor::CRASHES_MAX {
        let next = worker(&sandbox, Role::Mount, pid);
        send(next, Signal::ABORT);
        pid = Some(next);
    }
    send(worker(&sandbox, Role::Mount, pid), Signal::ABORT);
    let end = Instant::now() + LIMIT;
    while record(&sandbox).is_some() {
        assert!(Instant::now() < end, "it goes on");
        std::thread::sleep(Duration::from_millis(5));
    }
    assert_eq!(sandbox.run(&["status"]).code, 3);
    let log = std::fs::read_to_string(sandbox.store().join("run/up.log")).unwrap();
    assert!(
        log.contains("the mount worker has ended 5 times within 10 s, at last by signal 6"),
        "{log}"
    );
    assert!(
        std::fs::read_dir(sandbox.store().join("mnt"))
            .unwrap()
            .next()
            .is_none()
    );
}

#[test]
fn a_program_that_does_not_serve_is_not_upgraded_to() {
    if !may_mount() {
        return;
    }
    let sandbox = Sandbox::new();
    let contents = "not upgraded\n".repeat(10_000);
    let path = sandbox.add_tree("tree", &contents);
    let base = path.strip_prefix("/nix/store/").unwrap();
    let _down = Down(&sandbox);
    sandbox.ok(&["-q", "up", "--detach"]);
    let file = sandbox
        .store()
        .join("merged/nix/store")
        .join(base)
        .join("file");
    let broken = sandbox.path().join("broken");
    std::fs::write(&broken, "#!/bin/sh\nexit 7\n").unwrap();
    let program = broken.to_str().unwrap();
    for (mode, why) in [
        (0o755, "worker: it ended by exit code 7"),
        (0o644, "starting a worker from"),
    ] {
        use std::os::unix::fs::PermissionsExt;
        std::fs::set_permissions(&broken, PermissionsExt::from_mode(mode)).unwrap();
        read_while(&file, &contents, |_| {
            let ran = sandbox.run(&["upgrade", "--to", program]);
            assert_eq!(ran.code, 3, "{}", ran.stderr);
            assert!(
                ran.stderr.contains("the new program does not serve: ") && ran.stderr.contains(why),
                "{}",
                ran.stderr
            );
        });
        for socket in ["run/daemon.sock", "run/overlay.sock"] {
            understory::up::ping(&sandbox.store().join(socket)).unwrap();
        }
    }
    // One that serves is upgraded to after that.
    sandbox.ok(&["-q", "upgrade"]);
    assert_eq!(record(&sandbox).unwrap().failed_upgrade, None);
}

#[test]
fn workers_of_a_detached_instance_find_files_that_were_named_relatively() {
    if !may_mount() {
        return;
    }
    for flag in [&["--config", "own.toml"][..], &["--config=own.toml"], &[]] {
        let sandbox = Sandbox::new();
        std::fs::write(sandbox.path().join("own.toml"), "trusted-users = [\"x\"]\n").unwrap();
        let _down = Down(&sandbox);
        let mut command = sandbox.command();
        command.args(["-q", "up", "--detach"]).args(flag);
        if flag.is_empty() {
            command.env("UNDERSTORY_CONFIG", "own.toml");
        }
        let ran = sandbox.ran(&command.output().unwrap());
        assert_eq!(ran.code, 0, "{}", ran.stderr);
        // The next one starts in another directory.
        replace(&sandbox, Role::Daemon, Signal::KILL);
        understory::up::ping(&sandbox.store().join("run/overlay.sock")).unwrap();
    }
}
