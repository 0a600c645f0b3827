//! The bytes of handshakes, as the peers' sources have them: who says what first, and in which order.

use crate::support::Daemon;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;
use understory::daemon::ServerOptions;

const LAST: u64 = 0x616c_7473;

fn daemon() -> Daemon {
    Daemon::with(ServerOptions {
        version: "2.34.8".to_owned(),
        ..ServerOptions::default()
    })
}

fn connect(daemon: &Daemon) -> UnixStream {
    let stream = UnixStream::connect(&daemon.socket).unwrap();
    // A server that waits for what the client sends later would wait for ever.
    stream
        .set_read_timeout(Some(Duration::from_secs(20)))
        .unwrap();
    stream
}

fn send(stream: &mut UnixStream, words: &[u64]) {
    let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
    stream.write_all(&bytes).unwrap();
}

fn expect(stream: &mut UnixStream, words: &[u64]) {
    let mut bytes = vec![0; words.len() * 8];
    stream.read_exact(&mut bytes).unwrap();
    let found: Vec<u64> = bytes
        .chunks_exact(8)
        .map(|word| u64::from_le_bytes(word.try_into().unwrap()))
        .collect();
    assert_eq!(found, words, "{found:x?}");
}

/// `2.34.8` as a string.
fn version() -> [u64; 2] {
    [6, u64::from_le_bytes(*b"2.34.8\0\0")]
}

/// SetOptions as Nix 2.34 sends it.
const SET_OPTIONS: [u64; 14] = [19, 0, 0, 0, 3, 1, 0, 1, 7, 0, 0, 0, 1, 0];

#[test]
fn lix_and_old_clients_wait_for_the_greeting() {
    let daemon = daemon();
    let mut stream = connect(&daemon);
    send(&mut stream, &[0x6e69_7863]);
    expect(&mut stream, &[0x6478_696f, 0x126]);
    // Version, CPU affinity, reserved space in one packet.
    send(&mut stream, &[0x123, 0, 0]);
    expect(&mut stream, &version());
    expect(&mut stream, &[1, LAST]);
    send(&mut stream, &SET_OPTIONS);
    expect(&mut stream, &[LAST]);
}

#[test]
fn nix_since_2_26_sends_its_version_at_once() {
    let daemon = daemon();
    let mut stream = connect(&daemon);
    send(&mut stream, &[0x6e69_7863, 0x126]);
    expect(&mut stream, &[0x6478_696f, 0x126]);
    // No features.
    send(&mut stream, &[0]);
    let mut features = vec![2];
    for name in [
        "delete-dead-specific-referrers",
        "realisation-with-path-not-hash",
    ] {
        features.push(name.len() as u64);
        let mut padded = name.as_bytes().to_vec();
        padded.resize(name.len().next_multiple_of(8), 0);
        features.extend(
            padded
                .chunks_exact(8)
                .map(|word| u64::from_le_bytes(word.try_into().unwrap())),
        );
    }
    expect(&mut stream, &features);
    send(&mut stream, &[0, 0]);
    expect(&mut stream, &version());
    expect(&mut stream, &[1, LAST]);
    send(&mut stream, &SET_OPTIONS);
    expect(&mut stream, &[LAST]);
}

#[test]
fn nix_2_8_learns_the_version_but_not_the_trust() {
    let daemon = daemon();
    let mut stream = connect(&daemon);
    send(&mut stream, &[0x6e69_7863]);
    expect(&mut stream, &[0x6478_696f, 0x126]);
    send(&mut stream, &[0x121, 0, 0]);
    expect(&mut stream, &version());
    expect(&mut stream, &[LAST]);
    send(&mut stream, &SET_OPTIONS);
    expect(&mut stream, &[LAST]);
}
