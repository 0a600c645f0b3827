//! Clients that mean harm, or are broken: the daemon stays up, answers others, and its memory stays bounded.

#![allow(
    clippy::unwrap_used,
    clippy::print_stderr,
    reason = "a test that cannot start must fail, and says its seed"
)]

#[expect(dead_code, reason = "the benchmarks need more of it")]
#[path = "../src/bench/client.rs"]
mod client;

use client::Client;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use understory_testkit::process::resident_bytes;

/// What the daemon may have in memory at most while it is attacked: its caches, a budget for large
/// requests, and 1,000 connections.
const RESIDENT_BYTES_MAX: u64 = 256 << 20;
/// Bounds every wait.
const PATIENCE: Duration = Duration::from_secs(20);

struct Daemon {
    child: Child,
    dir: tempfile::TempDir,
    /// A path that is valid, its content 32 MiB that do not compress.
    path: String,
}

impl Daemon {
    fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let big = dir.path().join("big");
        let mut file = std::fs::File::create(&big).unwrap();
        understory_testkit::corpus::write_random(&mut file, 1, 32 << 20).unwrap();
        let program = env!("CARGO_BIN_EXE_understory");
        let store = dir.path().join("store");
        let out = Command::new(program)
            .arg("--store")
            .arg(&store)
            .arg("add")
            .arg(&big)
            .output()
            .unwrap();
        assert!(
            out.status.success(),
            "{}",
            String::from_utf8_lossy(&out.stderr)
        );
        let path = String::from_utf8(out.stdout)
            .unwrap()
            .lines()
            .last()
            .unwrap()
            .to_owned();
        let mut child = Command::new(program)
            .arg("--store")
            .arg(&store)
            .args(["serve", "--socket"])
            .arg(dir.path().join("socket"))
            .args(["--trusted-users", "*"])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(std::fs::File::create(dir.path().join("log")).unwrap())
            .spawn()
            .unwrap();
        let start = Instant::now();
        while UnixStream::connect(dir.path().join("socket")).is_err() {
            assert!(child.try_wait().unwrap().is_none(), "the daemon ended");
            assert!(start.elapsed() < PATIENCE, "the daemon does not listen");
            std::thread::sleep(Duration::from_millis(2));
        }
        let daemon = Self { child, dir, path };
        // It listens before it has opened all that it keeps open; it answers after that.
        assert!(
            daemon
                .client()
                .query_path_info(&daemon.path)
                .unwrap()
                .is_some()
        );
        daemon
    }
    fn socket(&self) -> PathBuf {
        self.dir.path().join("socket")
    }
    fn client(&self) -> Client {
        Client::connect(&self.socket()).unwrap()
    }
    /// A stream after a handshake, to send anything over.
    fn raw(&self) -> UnixStream {
        handshaken(&self.socket())
    }
    fn threads(&self) -> usize {
        std::fs::read_dir(format!("/proc/{}/task", self.child.id()))
            .unwrap()
            .count()
    }
    fn open_files(&self) -> Vec<PathBuf> {
        std::fs::read_dir(format!("/proc/{}/fd", self.child.id()))
            .unwrap()
            .filter_map(|file| std::fs::read_link(file.unwrap().path()).ok())
            .collect()
    }
    /// The daemon answers, and has used no more memory than it may.
    fn assert_well(&mut self) {
        assert!(self.child.try_wait().unwrap().is_none(), "the daemon ended");
        assert!(self.client().query_path_info(&self.path).unwrap().is_some());
        let (_, most) = resident_bytes(self.child.id()).unwrap();
        assert!(
            most < RESIDENT_BYTES_MAX,
            "{} MiB of resident memory",
            most >> 20
        );
    }
    /// Waits until what clients cost is given back.
    fn assert_settles(&self, threads: usize, files: usize) {
        let start = Instant::now();
        while self.threads() > threads || self.open_files().len() > files {
            assert!(
                start.elapsed() < PATIENCE,
                "expected at most {threads} threads and {files} open files, found {} and {:#?}",
                self.threads(),
                self.open_files()
            );
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            let log = std::fs::read_to_string(self.dir.path().join("log")).unwrap_or_default();
            let lines: Vec<&str> = log.lines().collect();
            eprintln!(
                "--- end of the daemon's log\n{}",
                lines[lines.len().saturating_sub(20)..].join("\n")
            );
        }
    }
}

fn number(value: u64) -> [u8; 8] {
    value.to_le_bytes()
}

fn handshaken(socket: &Path) -> UnixStream {
    let mut stream = UnixStream::connect(socket).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.set_write_timeout(Some(PATIENCE)).unwrap();
    let hello = [0x6e69_7863, 1 << 8 | 37, 0, 0].map(number).concat();
    stream.write_all(&hello).unwrap();
    let mut answer = [0; 16];
    stream.read_exact(&mut answer).unwrap(); // magic, version
    let mut length = [0; 8];
    stream.read_exact(&mut length).unwrap();
    let length = usize::try_from(u64::from_le_bytes(length)).unwrap();
    let mut rest = vec![0; length.next_multiple_of(8) + 16]; // version, trust, LAST
    stream.read_exact(&mut rest).unwrap();
    assert_eq!(rest[rest.len() - 8..], number(0x616c_7473));
    stream
}

/// Reads until the other side has no more to say or closes; returns how much it said.
fn drain(mut stream: UnixStream) -> usize {
    let _ = stream.shutdown(std::net::Shutdown::Write);
    let mut sum = 0;
    let mut buffer = [0; 4096];
    loop {
        match stream.read(&mut buffer) {
            Ok(0) => return sum,
            Ok(n) => sum += n,
            Err(e)
                if matches!(
                    e.kind(),
                    std::io::ErrorKind::ConnectionReset | std::io::ErrorKind::BrokenPipe
                ) =>
            {
                return sum;
            }
            Err(e) => panic!("the daemon neither answers nor closes: {e}"),
        }
    }
}

fn random_bytes(seed: u64, size: usize) -> Vec<u8> {
    let mut bytes = Vec::new();
    understory_testkit::corpus::write_random(&mut bytes, seed, size as u64).unwrap();
    bytes
}

#[test]
fn random_bytes_before_and_after_the_handshake() {
    let mut daemon = Daemon::start();
    let (threads, files) = (daemon.threads(), daemon.open_files().len());
    for seed in 0..300 {
        let mut stream = if seed % 2 == 0 {
            daemon.raw()
        } else {
            UnixStream::connect(daemon.socket()).unwrap()
        };
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut bytes = random_bytes(seed, 1 + (usize::try_from(seed).unwrap() * 37) % 5000);
        if seed % 4 == 0 {
            // a valid operation, then nonsense as its arguments
            bytes.splice(..0, number(seed % 50));
        }
        let _ = stream.write_all(&bytes); // it may hang up at any time
        drain(stream);
    }
    daemon.assert_well();
    daemon.assert_settles(threads, files);
}

#[test]
fn lengths_that_nobody_can_mean() {
    let mut daemon = Daemon::start();
    let (threads, files) = (daemon.threads(), daemon.open_files().len());
    for operation in 0..60_u64 {
        for length in [u64::MAX, 1 << 63, 1 << 40, (1 << 32) - 1, 1 << 30] {
            let mut stream = daemon.raw();
            let _ = stream.write_all(
                &[
                    number(operation),
                    number(length),
                    number(length),
                    number(length),
                ]
                .concat(),
            );
            let _ = stream.write_all(&[b'/'; 4096]);
            drain(stream);
        }
    }
    daemon.assert_well();
    daemon.assert_settles(threads, files);
}

#[test]
fn frames_and_archives_that_lie() {
    let mut daemon = Daemon::start();
    for (frame, payload) in [
        (u64::MAX, b"".as_slice()),
        (1 << 40, b"nix-archive-1"),
        (16, &[0xff; 16]),
        (8, &[0xff; 8]),
        (0, b""),
    ] {
        // AddToStore, version 1.25 and later: name, method, references, repair, then a framed NAR
        let mut stream = daemon.raw();
        let string = |text: &str| {
            let mut bytes = number(text.len() as u64).to_vec();
            bytes.extend_from_slice(text.as_bytes());
            bytes.resize(bytes.len().next_multiple_of(8), 0);
            bytes
        };
        let request = [
            number(7).to_vec(),
            string("lie"),
            string("fixed:r:sha256"),
            number(0).to_vec(),
            number(0).to_vec(),
        ];
        let _ = stream.write_all(&request.concat());
        let _ = stream.write_all(&[number(frame).as_slice(), payload].concat());
        drain(stream);
        // AddMultipleToStore: repair, no signature checks, then a framed count and path infos
        let mut stream = daemon.raw();
        let _ = stream.write_all(&[number(44), number(0), number(1)].concat());
        let _ = stream.write_all(&[number(frame).as_slice(), payload].concat());
        drain(stream);
    }
    daemon.assert_well();
}

#[test]
fn half_requests_hold_up_nobody() {
    let mut daemon = Daemon::start();
    let (threads, files) = (daemon.threads(), daemon.open_files().len());
    let mut halves = Vec::new();
    for i in 0..300_usize {
        let mut stream = if i % 2 == 0 {
            daemon.raw()
        } else {
            UnixStream::connect(daemon.socket()).unwrap()
        };
        let request = [
            number(26),
            number(4000),
            number(u64::from_le_bytes(*b"/nix/sto")),
        ]
        .concat();
        stream
            .write_all(&request[..1 + i % (request.len() - 1)])
            .unwrap();
        halves.push(stream);
    }
    let start = Instant::now();
    daemon.assert_well();
    assert!(
        start.elapsed() < Duration::from_secs(2),
        "an honest client waited {:?}",
        start.elapsed()
    );
    drop(halves);
    daemon.assert_settles(threads, files);
    daemon.assert_well();
}

#[test]
fn a_thousand_connections() {
    let mut daemon = Daemon::start();
    let (threads, files) = (daemon.threads(), daemon.open_files().len());
    // For this process only: the daemon was started before, and takes care of its own limit.
    let mut limit = rustix::process::getrlimit(rustix::process::Resource::Nofile);
    limit.current = limit.maximum;
    rustix::process::setrlimit(rustix::process::Resource::Nofile, limit).unwrap();
    let mut clients: Vec<Client> = (0..1000).map(|_| daemon.client()).collect();
    for client in clients.iter_mut().step_by(7) {
        assert!(client.query_path_info(&daemon.path).unwrap().is_some());
    }
    daemon.assert_well();
    drop(clients);
    daemon.assert_settles(threads, files);
    daemon.assert_well();
}

#[test]
fn clients_that_go_away_while_they_are_answered() {
    let mut daemon = Daemon::start();
    let leave_after = |bytes| {
        let mut stream = daemon.raw();
        let mut request = number(38).to_vec(); // NarFromPath
        request.extend_from_slice(&number(daemon.path.len() as u64));
        request.extend_from_slice(daemon.path.as_bytes());
        request.resize(request.len().next_multiple_of(8), 0);
        stream.write_all(&request).unwrap();
        stream.read_exact(&mut vec![0; bytes]).unwrap();
    };
    // The first large file that is read starts the threads that read ahead, which stay.
    leave_after(100_000);
    let (threads, files) = (daemon.threads(), daemon.open_files().len());
    for i in 0..100 {
        leave_after(1 + i * 1000);
    }
    daemon.assert_settles(threads, files);
    daemon.assert_well();
}

#[test]
fn an_operation_that_a_lower_store_does_not_do_leaves_the_connection_usable() {
    let mut daemon = Daemon::start();
    let mut client = daemon.client();
    for _ in 0..3 {
        client.put(9); // BuildPaths
        client.put(1);
        client.put_string("/nix/store/00000000000000000000000000000000-nothing.drv!out");
        client.put(0);
        client.send().unwrap();
        let error = client.log().unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::Other, "{error}");
        assert!(
            client.query_path_info(&daemon.path).unwrap().is_some(),
            "after: {error}"
        );
    }
    daemon.assert_well();
}
