//! Plays systemd: a socket for notifications, a store of descriptors, and a service that is started with them.

use super::Sandbox;
use super::support::{LIMIT, send, wait_until};
use command_fds::{CommandFdExt, FdMapping};
use rustix::fd::{AsFd, OwnedFd};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags};
use rustix::process::Signal;
use std::fs::File;
use std::io::IoSliceMut;
use std::mem::MaybeUninit;
use std::os::unix::net::UnixDatagram;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// What the test itself says last.
const DRAIN: &str = "X_DRAIN=1";

/// What systemd would know of the service.
#[derive(Default)]
pub(super) struct Service {
    pub(super) store: Mutex<Vec<(String, OwnedFd)>>,
    pub(super) ready: AtomicU64,
    pub(super) alive: AtomicU64,
    drained: AtomicU64,
}

impl Service {
    pub(super) fn names(&self) -> Vec<String> {
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
        if text == DRAIN {
            self.drained.fetch_add(1, Ordering::SeqCst);
        }
        // A barrier's descriptor is closed by now.
    }
}

pub(super) struct Systemd<'a> {
    sandbox: &'a Sandbox,
    socket: PathBuf,
    pub(super) service: Arc<Service>,
    arguments: Vec<&'static str>,
    pub(super) environment: Vec<(&'static str, &'static str)>,
}

impl<'a> Systemd<'a> {
    pub(super) fn new(sandbox: &'a Sandbox, arguments: &[&'static str]) -> Self {
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

    /// Waits until all that was sent is heard: systemd, too, reads that before it looks at what has ended.
    fn drain(&self) {
        let before = self.service.drained.load(Ordering::SeqCst);
        let own = UnixDatagram::unbound().unwrap();
        own.send_to(DRAIN.as_bytes(), &self.socket).unwrap();
        wait_until(
            || self.service.drained.load(Ordering::SeqCst) > before,
            || "nobody hears".to_owned(),
        );
    }

    /// Starts the service with all that is stored, which stays stored, and waits until it is ready.
    pub(super) fn start(&self) -> Running {
        self.drain();
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
pub(super) struct Running {
    pub(super) process: Child,
    log: PathBuf,
}

impl Running {
    pub(super) fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap()
    }
    pub(super) fn end(&mut self, signal: Signal) -> ExitStatus {
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
