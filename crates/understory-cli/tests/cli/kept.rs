//! A supervisor that ends, and the next one that goes on with what systemd has kept. The test plays systemd: a socket
//! for notifications, a store of descriptors, and services that are started with them.

use super::Sandbox;
use super::support::{
    Down, LIMIT, may_mount, may_mount_images, read_while, record, send, shown, wait_for_more,
    wait_until,
};
use command_fds::{CommandFdExt, FdMapping};
use rustix::fd::{AsFd, OwnedFd};
use rustix::fs::{MemfdFlags, SealFlags};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags};
use rustix::process::Signal;
use std::fs::File;
use std::io::{IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use understory::daemon::{Client, ClientOptions};

const RECORD: &str = "understory-record";

/// What systemd would know of the service.
#[derive(Default)]
struct Service {
    store: Mutex<Vec<(String, OwnedFd)>>,
    ready: AtomicU64,
    alive: AtomicU64,
}

impl Service {
    fn names(&self) -> Vec<String> {
        let store = self.store.lock().unwrap();
        store.iter().map(|(name, _)| name.clone()).collect()
    }

    fn hear(&self, text: &str, descriptors: Vec<OwnedFd>) {
        let value = |key: &str| {
            let mut lines = text.lines();
            lines.find_map(|line| line.strip_prefix(key)?.strip_prefix('='))
        };
        let mut store = self.store.lock().unwrap();
        if value("FDSTORE") == Some("1") {
            assert_eq!(value("FDPOLL"), Some("0"), "each request would wake us");
            let name = value("FDNAME").unwrap();
            for descriptor in descriptors {
                store.push((name.to_owned(), descriptor));
            }
        }
        if value("FDSTOREREMOVE") == Some("1") {
            let name = value("FDNAME").unwrap();
            store.retain(|(stored, _)| stored != name);
        }
        if value("READY") == Some("1") {
            self.ready.fetch_add(1, Ordering::SeqCst);
        }
        if value("WATCHDOG") == Some("1") {
            self.alive.fetch_add(1, Ordering::SeqCst);
        }
        // A barrier's descriptor is closed by now.
    }
}

struct Systemd<'a> {
    sandbox: &'a Sandbox,
    socket: PathBuf,
    service: Arc<Service>,
    arguments: Vec<&'static str>,
    environment: Vec<(&'static str, &'static str)>,
}

impl<'a> Systemd<'a> {
    fn new(sandbox: &'a Sandbox, arguments: &[&'static str]) -> Self {
        let socket = sandbox.path().join("notify");
        let listening = UnixDatagram::bind(&socket).unwrap();
        let service = Arc::new(Service::default());
        let heard = Arc::clone(&service);
        // Ends with the test's process.
        std::thread::spawn(move || {
            loop {
                let mut text = [0; 4096];
                let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
                let mut ancillary = RecvAncillaryBuffer::new(&mut space);
                let received = rustix::net::recvmsg(
                    listening.as_fd(),
                    &mut [IoSliceMut::new(&mut text)],
                    &mut ancillary,
                    RecvFlags::CMSG_CLOEXEC,
                );
                let bytes = received.unwrap().bytes;
                let mut descriptors = Vec::new();
                for message in ancillary.drain() {
                    if let RecvAncillaryMessage::ScmRights(more) = message {
                        descriptors.extend(more);
                    }
                }
                heard.hear(std::str::from_utf8(&text[..bytes]).unwrap(), descriptors);
            }
        });
        Self {
            sandbox,
            socket,
            service,
            arguments: arguments.to_vec(),
            environment: Vec::new(),
        }
    }

    /// Starts the service with all that is stored, which stays stored, and waits until it is ready.
    fn start(&self) -> Running {
        let before = self.service.ready.load(Ordering::SeqCst);
        let log = self.sandbox.path().join("log");
        let model = self.sandbox.command();
        let mut command = Command::new("sh");
        command
            .args(["-c", "export LISTEN_PID=$$; exec \"$@\"", "sh"])
            .arg(model.get_program())
            .args(model.get_args())
            .arg("up")
            .args(&self.arguments)
            .current_dir(self.sandbox.path())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(File::create(&log).unwrap())
            .env("NOTIFY_SOCKET", &self.socket)
            .env("FDSTORE", "128")
            .envs(self.environment.iter().copied());
        for (name, value) in model.get_envs() {
            match value {
                Some(value) => command.env(name, value),
                None => command.env_remove(name),
            };
        }
        let mut names = Vec::new();
        let mut mappings = Vec::new();
        for (at, (name, descriptor)) in self.service.store.lock().unwrap().iter().enumerate() {
            names.push(name.clone());
            mappings.push(FdMapping {
                parent_fd: descriptor.try_clone().unwrap(),
                child_fd: 3 + i32::try_from(at).unwrap(),
            });
        }
        if !names.is_empty() {
            command
                .env("LISTEN_FDS", names.len().to_string())
                .env("LISTEN_FDNAMES", names.join(":"));
        }
        command.fd_mappings(mappings).unwrap();
        let mut running = Running {
            process: command.spawn().unwrap(),
            log,
        };
        // The copies for it.
        drop(command);
        let end = Instant::now() + LIMIT;
        while self.service.ready.load(Ordering::SeqCst) == before {
            let ended = running.process.try_wait().unwrap();
            assert!(ended.is_none(), "it ended: {}", running.log());
            assert!(Instant::now() < end, "not ready: {}", running.log());
            std::thread::sleep(Duration::from_millis(2));
        }
        running
    }
}

/// As systemd when a service has ended for good.
impl Drop for Systemd<'_> {
    fn drop(&mut self) {
        self.service.store.lock().unwrap().clear();
    }
}

/// A process of the service. Killed if the test fails.
struct Running {
    process: Child,
    log: PathBuf,
}

impl Running {
    fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap()
    }
    fn end(&mut self, signal: Signal) -> ExitStatus {
        send(self.process.id(), signal);
        self.process.wait().unwrap()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // It may have ended.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

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
    let names = systemd.service.names();
    assert_eq!(names.last().unwrap(), RECORD, "it is stored last");
    read_while(&file, &contents, |reads| {
        for round in 0..5 {
            wait_for_more(reads);
            let status = running.end(signal);
            assert_eq!(status.success(), signal != Signal::KILL, "{status}");
            assert_eq!(systemd.service.names(), names);
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
        store.retain(|(name, _)| name != RECORD);
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
        let record = store.iter_mut().find(|(name, _)| name == RECORD).unwrap();
        record.1 = sealed(text);
    });
}

#[test]
fn a_record_that_anybody_could_change_is_none() {
    starts_afresh("the record of what was kept is none", |store| {
        let record = store.iter_mut().find(|(name, _)| name == RECORD).unwrap();
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
