//! A supervisor that ends, and the next one that goes on with what systemd has kept.

use super::Sandbox;
use super::support::{
    Down, may_mount, may_mount_images, read_while, record, shown, wait_for_more, wait_until,
};
use super::systemd::Systemd;
use rustix::fd::OwnedFd;
use rustix::fs::{MemfdFlags, SealFlags};
use rustix::process::Signal;
use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::Ordering;
use understory::daemon::{Client, ClientOptions};

/// How the name of the record begins.
const RECORD: &str = "understory-record-";

fn ask(socket: &Path) {
    let stream = UnixStream::connect(socket).unwrap();
    let mut client = Client::handshake(stream, &ClientOptions::default()).unwrap();
    client.query_path_from_hash_part(&"0".repeat(32)).unwrap();
}

/// Ends the supervisor by `signal` while somebody reads, and lets the next one go on.
fn goes_on_after(signal: Signal, arguments: &[&'static str]) {
    if !may_mount() {
        return;
    }
    let sandbox = Sandbox::new();
    let contents = "a line that is read\n".repeat(50_000);
    let file = shown(&sandbox, &sandbox.add_tree("tree", &contents)).join("file");
    let other = sandbox.add_tree("other", "never read before\n");
    let other = shown(&sandbox, &other).join("file");
    let _down = Down(&sandbox);
    let systemd = Systemd::new(&sandbox, arguments);
    let mut running = systemd.start();
    let lower = sandbox.store().join("mnt");
    let first = record(&sandbox).unwrap();
    assert!(first.kept && !first.restored, "{}", running.log());
    let device = std::fs::metadata(&lower).unwrap().dev();
    let merged = std::fs::metadata(sandbox.merged()).unwrap().dev();
    // But the record, which is stored last.
    let names = || {
        let mut names = systemd.service.names();
        let last = names.pop().unwrap();
        assert!(last.starts_with(RECORD), "{last}");
        names
    };
    let kept = names();
    read_while(&file, &contents, |reads| {
        for round in 0..5 {
            wait_for_more(reads);
            let status = running.end(signal);
            assert_eq!(status.success(), signal != Signal::KILL, "{status}");
            assert_eq!(names(), kept);
            // In the gap somebody connects to each socket, and somebody reads what no cache has.
            std::thread::scope(|scope| {
                let clients = ["run/daemon.sock", "run/overlay.sock"]
                    .map(|socket| sandbox.store().join(socket))
                    .map(|socket| scope.spawn(move || ask(&socket)));
                let reader = scope.spawn(|| std::fs::read_to_string(&other).unwrap());
                running = systemd.start();
                for client in clients {
                    client.join().unwrap();
                }
                assert_eq!(reader.join().unwrap(), "never read before\n");
            });
            let now = record(&sandbox).unwrap();
            assert!(now.restored, "round {round}: {}", running.log());
            assert_eq!(now.pid, running.process.id());
            wait_for_more(reads);
        }
    });
    assert_eq!(std::fs::metadata(&lower).unwrap().dev(), device);
    let status = sandbox.json(&["status"]);
    assert_eq!(status["supervisor"]["restored"], true);
    // What is added now is shown.
    let later = shown(&sandbox, &sandbox.add_tree("later", "later\n")).join("file");
    assert_eq!(std::fs::read_to_string(later).unwrap(), "later\n");
    // A stop leaves nothing.
    sandbox.ok(&["-q", "down"]);
    assert!(running.process.wait().unwrap().success());
    assert_eq!(systemd.service.names(), Vec::<String>::new());
    assert_ne!(std::fs::metadata(&lower).unwrap().dev(), device);
    let after = std::fs::metadata(sandbox.merged()).unwrap();
    assert_ne!(after.dev(), merged);
    for socket in ["daemon", "overlay", "control", "mount"] {
        let path = sandbox.store().join(format!("run/{socket}.sock"));
        assert!(!path.exists(), "{socket}");
    }
}

#[test]
fn readers_and_clients_wait_for_the_next_supervisor_when_one_is_killed() {
    goes_on_after(Signal::KILL, &["--mount", "live"]);
}

#[test]
fn readers_of_an_image_wait_for_the_next_supervisor() {
    if may_mount_images() {
        goes_on_after(Signal::KILL, &["--mount", "image"]);
    }
}

#[test]
fn a_restart_of_the_service_unmounts_nothing() {
    goes_on_after(Signal::USR1, &["--mount", "live"]);
}

/// Kills a supervisor, lets `spoil` change what is stored, and starts the next one: it must say `said`, and serve.
fn starts_afresh(said: &str, spoil: impl FnOnce(&mut Vec<(String, OwnedFd)>)) {
    starts_afresh_in(said, |_, store| spoil(store));
}

fn starts_afresh_in(said: &str, spoil: impl FnOnce(&Sandbox, &mut Vec<(String, OwnedFd)>)) {
    if !may_mount() {
        return;
    }
    let sandbox = Sandbox::new();
    let file = shown(&sandbox, &sandbox.add_tree("tree", "hello\n")).join("file");
    let _down = Down(&sandbox);
    let systemd = Systemd::new(&sandbox, &[]);
    let mut running = systemd.start();
    assert_eq!(std::fs::read_to_string(&file).unwrap(), "hello\n");
    running.end(Signal::KILL);
    spoil(&sandbox, &mut systemd.service.store.lock().unwrap());
    let mut running = systemd.start();
    let log = running.log();
    assert!(log.contains(said), "{log}");
    assert!(log.contains("everything is mounted anew"), "{log}");
    assert_eq!(std::fs::read_to_string(&file).unwrap(), "hello\n");
    ask(&sandbox.store().join("run/overlay.sock"));
    // What it has now is stored, and nothing else: it can be gone on with.
    let now = record(&sandbox).unwrap();
    assert!(now.kept && !now.restored, "{log}");
    running.end(Signal::KILL);
    let _running = systemd.start();
    assert!(record(&sandbox).unwrap().restored);
    assert_eq!(std::fs::read_to_string(&file).unwrap(), "hello\n");
}

fn memory_file(text: &str) -> File {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let mut file = File::from(rustix::fs::memfd_create("record", flags).unwrap());
    file.write_all(text.as_bytes()).unwrap();
    file
}

fn sealed(text: &str) -> OwnedFd {
    let file = memory_file(text);
    let seals = SealFlags::WRITE | SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL;
    rustix::fs::fcntl_add_seals(&file, seals).unwrap();
    file.into()
}

#[test]
fn without_the_record_nothing_is_gone_on_with() {
    starts_afresh("the record of what was kept is missing", |store| {
        store.retain(|(name, _)| !name.starts_with(RECORD));
    });
}

#[test]
fn without_all_descriptors_nothing_is_gone_on_with() {
    starts_afresh("was not kept", |store| {
        let at = store.iter().position(|(name, _)| name.ends_with("-live-1"));
        store.remove(at.unwrap());
    });
}

#[test]
fn what_another_version_has_kept_is_not_gone_on_with() {
    let said = "what was kept is of version 9.9.9: expected format 1 and protocol ";
    starts_afresh(said, |store| {
        let text = r#"{"format":99,"protocol":1,"version":"9.9.9","more":{}}"#;
        let record = store
            .iter_mut()
            .find(|(name, _)| name.starts_with(RECORD))
            .unwrap();
        record.1 = sealed(text);
    });
}

#[test]
fn a_record_that_anybody_could_change_is_none() {
    starts_afresh("the record of what was kept is none", |store| {
        let record = store
            .iter_mut()
            .find(|(name, _)| name.starts_with(RECORD))
            .unwrap();
        let mut text = String::new();
        let mut file = File::from(record.1.try_clone().unwrap());
        rustix::fs::seek(&file, rustix::fs::SeekFrom::Start(0)).unwrap();
        file.read_to_string(&mut text).unwrap();
        record.1 = memory_file(&text).into();
    });
}

#[test]
fn a_mount_that_is_gone_is_not_gone_on_with() {
    starts_afresh_in("that was kept is there no more", |sandbox, _| {
        for place in ["merged/nix/store", "mnt"] {
            let flags = rustix::mount::UnmountFlags::DETACH;
            rustix::mount::unmount(sandbox.store().join(place), flags).unwrap();
        }
    });
}

#[test]
fn what_the_next_mount_server_does_not_take_is_mounted_anew() {
    starts_afresh("what was kept cannot be gone on with", |store| {
        let nodes = store
            .iter_mut()
            .find(|(name, _)| name.ends_with("-live-0"))
            .unwrap();
        nodes.1 = sealed("no nodes");
    });
}

#[test]
fn where_nothing_may_be_kept_what_was_is_dropped() {
    if !may_mount() {
        return;
    }
    let sandbox = Sandbox::new();
    let file = shown(&sandbox, &sandbox.add_tree("tree", "hello\n")).join("file");
    let _down = Down(&sandbox);
    let mut systemd = Systemd::new(&sandbox, &[]);
    systemd.start().end(Signal::KILL);
    systemd.environment.push(("FDSTORE", "0"));
    let running = systemd.start();
    assert_eq!(systemd.service.names(), Vec::<String>::new());
    assert!(
        running.log().contains("is of no use here"),
        "{}",
        running.log()
    );
    assert!(!record(&sandbox).unwrap().kept);
    assert_eq!(std::fs::read_to_string(&file).unwrap(), "hello\n");
}

#[test]
fn a_stop_lets_systemd_keep_nothing() {
    if !may_mount() {
        return;
    }
    let sandbox = Sandbox::new();
    let _down = Down(&sandbox);
    let systemd = Systemd::new(&sandbox, &[]);
    let mut running = systemd.start();
    assert!(systemd.service.names().len() > 5);
    assert!(running.end(Signal::TERM).success());
    assert_eq!(systemd.service.names(), Vec::<String>::new());
}

#[test]
fn systemds_watchdog_hears_of_the_supervisor() {
    if !may_mount() {
        return;
    }
    let sandbox = Sandbox::new();
    let _down = Down(&sandbox);
    let mut systemd = Systemd::new(&sandbox, &[]);
    systemd.environment.push(("WATCHDOG_USEC", "200000"));
    let _running = systemd.start();
    wait_until(
        || systemd.service.alive.load(Ordering::SeqCst) >= 3,
        || "no sign of life".to_owned(),
    );
}
