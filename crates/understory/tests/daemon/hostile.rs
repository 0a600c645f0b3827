//! Clients that send nonsense, too much, or nothing; clients that vanish; the end of the server.

use crate::support::{Daemon, add, file_nar, info, path, resident_bytes, server_error};
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};
use understory::daemon::{Client, ClientOptions, Listener, ServerOptions, Shutdown};
use understory_nix::worker::{Request, SetOptions};

/// A reproducible stream of bytes.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
}

/// Sends `bytes` and drops the connection. That the server hangs up first is fine.
fn throw(stream: &mut UnixStream, bytes: &[u8]) {
    drop(stream.write_all(bytes));
}

fn greeted(daemon: &Daemon) -> UnixStream {
    let mut stream = UnixStream::connect(&daemon.socket).unwrap();
    let words: [u64; 5] = [0x6e69_7863, 0x126, 0, 0, 0];
    for word in words {
        stream.write_all(&word.to_le_bytes()).unwrap();
    }
    let mut head = [0; 16];
    stream.read_exact(&mut head).unwrap();
    stream
}

#[test]
fn random_bytes_do_no_harm() {
    let daemon = Daemon::start();
    let mut good = daemon.client();
    let a = add(&mut good, "a", &[]).path;
    let seed = 0x9e37_79b9_7f4a_7c15;
    println!("seed {seed:#x}");
    let mut random = Random(seed);
    for round in 0..400 {
        let mut stream = if round % 4 == 0 {
            UnixStream::connect(&daemon.socket).unwrap()
        } else {
            greeted(&daemon)
        };
        let mut bytes = Vec::new();
        for _ in 0..random.next() % 40 {
            // Mostly small numbers: operations, counts, lengths.
            let word = match random.next() % 4 {
                0 => random.next(),
                1 => random.next() % (1 << 20),
                _ => random.next() % 64,
            };
            bytes.extend(word.to_le_bytes());
        }
        throw(&mut stream, &bytes);
    }
    assert!(good.is_valid_path(&a).unwrap());
    drop(good);
    daemon.wait_until_alone();
    assert_eq!(daemon.server.request_bytes(), 0);
}

#[test]
fn huge_lengths_are_refused_without_memory() {
    let daemon = Daemon::start();
    let before = resident_bytes();
    for (op, words) in [
        (1_u64, vec![u64::MAX]),
        (1, vec![1 << 40]),
        (31, vec![u64::MAX]),
        (31, vec![16 << 20, 1 << 30]),
        (8, vec![4, 0x65_6d_61_6e, u64::MAX]),
        (19, vec![0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, u64::MAX]),
        (44, vec![0, 1, u64::MAX]),
    ] {
        let mut stream = greeted(&daemon);
        throw(&mut stream, &op.to_le_bytes());
        for word in words {
            throw(&mut stream, &word.to_le_bytes());
        }
        let mut answer = Vec::new();
        stream
            .set_read_timeout(Some(Duration::from_secs(10)))
            .unwrap();
        stream.read_to_end(&mut answer).unwrap();
        let text = String::from_utf8_lossy(&answer);
        assert!(op == 44 || text.contains("too long"), "{op}: {text}");
    }
    assert!(resident_bytes() < before + (32 << 20));
}

#[test]
fn requests_share_one_budget() {
    let daemon = Daemon::with(ServerOptions {
        request_bytes_max: 4 << 20,
        ..ServerOptions::default()
    });
    let mut stream = greeted(&daemon);
    // AddTextToStore of 64 MiB.
    for word in [8_u64, 1, u64::from(b'x'), 64 << 20] {
        throw(&mut stream, &word.to_le_bytes());
    }
    let chunk = vec![1; 1 << 20];
    for _ in 0..64 {
        throw(&mut stream, &chunk);
    }
    let mut answer = Vec::new();
    drop(stream.read_to_end(&mut answer));
    daemon.wait_until_alone();
    assert_eq!(daemon.server.request_bytes(), 0);
    let mut client = daemon.client();
    let text = Request::AddTextToStore {
        name: "x".to_owned(),
        text: vec![1; 1 << 20],
        references: std::collections::BTreeSet::default(),
    };
    client.path(&text).unwrap().unwrap();
    let text = Request::AddTextToStore {
        name: "x".to_owned(),
        text: vec![1; 8 << 20],
        references: std::collections::BTreeSet::default(),
    };
    let error = client.path(&text).unwrap_err().to_string();
    assert!(
        error.contains("more memory than the 4194304 bytes")
            || error.contains("worker protocol stream"),
        "{error}"
    );
}

#[test]
fn a_thousand_silent_connections_do_not_keep_others_out() {
    let daemon = Daemon::with(ServerOptions {
        handshake_ms_max: 3_000,
        ..ServerOptions::default()
    });
    let before = resident_bytes();
    let mut silent = Vec::new();
    for i in 0..1000 {
        let mut stream = UnixStream::connect(&daemon.socket).unwrap();
        // Nothing, a part of the greeting, or all but its end.
        throw(&mut stream, &0x6e69_7863_u64.to_le_bytes()[..i % 9]);
        silent.push(stream);
    }
    let start = Instant::now();
    let mut client = daemon.client();
    let a = add(&mut client, "a", &[]).path;
    assert!(start.elapsed() < Duration::from_secs(2));
    let grown = resident_bytes().saturating_sub(before);
    assert!(grown < (160 << 20), "{grown} bytes for 1000 connections");
    // They are thrown out when their time is up.
    while daemon.server.connection_count() > 1 {
        assert!(start.elapsed() < Duration::from_secs(20));
        std::thread::yield_now();
    }
    assert!(client.is_valid_path(&a).unwrap());
}

#[test]
fn one_connection_too_many_is_told_so() {
    let daemon = Daemon::with(ServerOptions {
        connections_max: 8,
        ..ServerOptions::default()
    });
    let mut clients: Vec<Client> = (0..8).map(|_| daemon.client()).collect();
    let refused = Client::connect(&daemon.socket, &ClientOptions::default()).map(drop);
    assert_eq!(
        server_error(refused),
        "too many connections: 8 are open, 8 are allowed"
    );
    for client in &mut clients {
        client.set_options(SetOptions::default()).unwrap();
    }
    clients.pop();
    let start = Instant::now();
    loop {
        match Client::connect(&daemon.socket, &ClientOptions::default()) {
            Ok(_) => break,
            Err(error) => assert!(start.elapsed() < Duration::from_secs(10), "{error}"),
        }
    }
}

#[test]
fn half_an_upload_leaves_nothing() {
    let daemon = Daemon::start();
    let archive = file_nar(&vec![3; 1 << 20]);
    let x = info(&path("x"), &archive, &[]);
    for cut in [0, 1, 8, 100, 65_536, archive.len() - 1] {
        let mut client = daemon.client();
        let mut encoder = understory_nix::worker::Encoder::new(
            Vec::new(),
            daemon.store.store_dir().clone(),
            client.protocol(),
        );
        let request = Request::AddToStoreNar {
            info: Box::new(x.clone()),
            repair: false,
            dont_check_sigs: true,
        };
        request.write(&mut encoder).unwrap();
        let mut bytes = encoder.into_inner();
        bytes.extend((archive.len() as u64).to_le_bytes());
        bytes.extend(&archive[..cut]);
        throw(client.stream(), &bytes);
    }
    daemon.wait_until_alone();
    let mut client = daemon.client();
    assert!(!client.is_valid_path(&x.path).unwrap());
    client
        .add_to_store_nar(&x, &mut &archive[..], false, true)
        .unwrap();
}

#[test]
fn a_client_that_vanishes_ends_its_operation() {
    let daemon = Daemon::start();
    // The kernel's buffers hold a few hundred KiB, the archive is larger.
    let archive = file_nar(&vec![5; 32 << 20]);
    let big = info(&path("big"), &archive, &[]);
    daemon
        .client()
        .add_to_store_nar(&big, &mut &archive[..], false, true)
        .unwrap();
    daemon.wait_until_alone();
    let mut client = daemon.client();
    let mut encoder = understory_nix::worker::Encoder::new(
        Vec::new(),
        daemon.store.store_dir().clone(),
        client.protocol(),
    );
    Request::NarFromPath(big.path.clone())
        .write(&mut encoder)
        .unwrap();
    throw(client.stream(), &encoder.into_inner());
    let mut head = [0; 64];
    client.stream().read_exact(&mut head).unwrap();
    drop(client);
    let start = Instant::now();
    daemon.wait_until_alone();
    assert!(start.elapsed() < Duration::from_secs(2));
}

#[test]
fn shutdown_closes_idle_connections_and_removes_the_socket() {
    let mut daemon = Daemon::start();
    let mut idle: Vec<Client> = (0..20).map(|_| daemon.client()).collect();
    let mut silent = UnixStream::connect(&daemon.socket).unwrap();
    let start = Instant::now();
    daemon.stop();
    assert!(
        start.elapsed() < Duration::from_secs(2),
        "{:?}",
        start.elapsed()
    );
    assert!(!daemon.socket.exists());
    for client in &mut idle {
        assert!(client.number(&Request::SyncWithGC).is_err());
    }
    let mut rest = Vec::new();
    assert_eq!(silent.read_to_end(&mut rest).unwrap(), 0);
}

#[test]
fn shutdown_cuts_off_what_does_not_end() {
    let mut daemon = Daemon::with(ServerOptions {
        grace_ms_max: 300,
        ..ServerOptions::default()
    });
    let archive = file_nar(&vec![5; 32 << 20]);
    let big = info(&path("big"), &archive, &[]);
    let mut client = daemon.client();
    client
        .add_to_store_nar(&big, &mut &archive[..], false, true)
        .unwrap();
    // Asks for much and reads nothing.
    let mut encoder = understory_nix::worker::Encoder::new(
        Vec::new(),
        daemon.store.store_dir().clone(),
        client.protocol(),
    );
    Request::NarFromPath(big.path.clone())
        .write(&mut encoder)
        .unwrap();
    throw(client.stream(), &encoder.into_inner());
    let mut head = [0; 8];
    client.stream().read_exact(&mut head).unwrap();
    let start = Instant::now();
    daemon.stop();
    let took = start.elapsed();
    assert!(
        took >= Duration::from_millis(300) && took < Duration::from_secs(2),
        "{took:?}"
    );
}

#[test]
fn sockets_are_replaced_only_when_nobody_listens() {
    use std::os::unix::fs::PermissionsExt;
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("a/b/socket");
    let first = Listener::bind(&socket).unwrap();
    let mode =
        |path: &std::path::Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o7777;
    assert_eq!(mode(&socket), 0o666);
    assert_eq!(mode(socket.parent().unwrap()), 0o755);
    assert_eq!(
        std::fs::read_dir(socket.parent().unwrap()).unwrap().count(),
        1,
        "no temporary file stays"
    );
    let error = Listener::bind(&socket).unwrap_err();
    assert_eq!(
        error.to_string(),
        format!("somebody listens on {} already", socket.display())
    );
    assert!(error.hint().unwrap().contains("stop it"));
    drop(first);
    assert!(!socket.exists());
    // What a killed server leaves.
    drop(std::os::unix::net::UnixListener::bind(&socket).unwrap());
    assert!(socket.exists());
    let second = Listener::bind(&socket).unwrap();
    UnixStream::connect(&socket).unwrap();
    // A socket that is no longer ours is not removed.
    std::fs::remove_file(&socket).unwrap();
    let third = Listener::bind(&socket).unwrap();
    drop(second);
    assert!(socket.exists());
    drop(third);
    std::fs::write(&socket, "").unwrap();
    let error = Listener::bind(&socket).unwrap_err();
    assert_eq!(
        error.to_string(),
        format!("{} is there and is not a socket", socket.display())
    );
    let long = dir.path().join("x".repeat(120));
    assert!(Listener::bind(&long).unwrap_err().hint().is_some());
}

#[test]
fn a_switch_that_is_on_ends_serve_at_once() {
    let shutdown = Shutdown::new().unwrap();
    assert!(!shutdown.is_triggered());
    shutdown.clone().trigger();
    assert!(shutdown.is_triggered());
}

/// Not a test of its own: what the next one starts as another process.
#[test]
fn helper_that_is_socket_activated() {
    let Some(dir) = std::env::var_os("UNDERSTORY_TEST_ACTIVATED") else {
        return;
    };
    let store = std::path::Path::new(&dir).join("store");
    understory::Store::create(&store, &understory_nix::StoreDir::default()).unwrap();
    let store = understory::Store::open(&store, &understory::StoreOptions::default()).unwrap();
    let listeners = Listener::activated().unwrap();
    assert_eq!(listeners.len(), 1);
    assert_eq!(listeners[0].path(), None);
    let server = understory::daemon::Server::new(store, ServerOptions::default());
    server.serve(&listeners, &Shutdown::new().unwrap()).unwrap();
}

#[test]
fn sockets_of_systemd_are_taken_over() {
    // Without the variables, or with those of another process, there are none.
    assert!(Listener::activated().unwrap().is_empty());
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("socket");
    let listening = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    // As systemd does it: the socket is descriptor 3, and LISTEN_PID is the process itself.
    let mut child = std::process::Command::new("sh")
        .arg("-c")
        .arg("exec 3<&0 </dev/null; export LISTEN_PID=$$ LISTEN_FDS=1; exec \"$0\" --exact hostile::helper_that_is_socket_activated")
        .arg(std::env::current_exe().unwrap())
        .env("UNDERSTORY_TEST_ACTIVATED", dir.path())
        .stdin(std::os::fd::OwnedFd::from(listening))
        .stdout(std::process::Stdio::null())
        .spawn()
        .unwrap();
    // The kernel's queue holds us until the daemon accepts.
    let mut client = Client::connect(&socket, &ClientOptions::default()).unwrap();
    assert!(client.query_all_valid_paths().unwrap().is_empty());
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(socket.exists(), "systemd's socket is not ours to remove");
}
