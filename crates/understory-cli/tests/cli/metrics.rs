//! Metrics of a running instance: the address, the format by Prometheus's own parser, and what the numbers say.

use super::Sandbox;
use super::support::{Down, may_mount, shown, up_with};
use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Command, Stdio};

/// The body of what a URL of the form http://ADDRESS/PATH answers.
fn get(url: &str, path: &str) -> String {
    let address = url.strip_prefix("http://").unwrap().split('/').next();
    let mut stream = TcpStream::connect(address.unwrap()).unwrap();
    write!(stream, "GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    assert!(head.starts_with("HTTP/1.1 200 OK"), "{head}");
    body.to_owned()
}

/// The families that the Python client of Prometheus reads, as `name type samples` lines; `None` if it is not here.
fn parsed_by_prometheus(text: &str) -> Option<String> {
    const PROGRAM: &str = "
import sys
from prometheus_client.parser import text_string_to_metric_families as parse
for f in parse(sys.stdin.read()):
    print(f.name, f.type, len(f.samples), bool(f.documentation))
";
    // Debian's own Python, where its packages are.
    let python = "/usr/bin/python3";
    let has = Command::new(python)
        .args(["-c", "import prometheus_client"])
        .stderr(Stdio::null())
        .status()
        .is_ok_and(|status| status.success());
    if !has {
        understory_testkit::skip("needs Debian's python3-prometheus-client");
        return None;
    }
    let mut child = Command::new(python)
        .args(["-c", PROGRAM])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    child
        .stdin
        .take()
        .unwrap()
        .write_all(text.as_bytes())
        .unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success());
    Some(String::from_utf8(output.stdout).unwrap())
}

/// The sum of the samples of a name in the JSON document that have a label.
fn total(json: &serde_json::Value, name: &str, label: Option<(&str, &str)>) -> f64 {
    let samples = json[name]["samples"].as_array();
    let samples = samples.unwrap_or_else(|| panic!("{name} is not there"));
    samples
        .iter()
        .filter(|s| label.is_none_or(|(name, value)| s["labels"][name] == value))
        .map(|s| s["value"].as_f64().unwrap())
        .sum()
}

#[test]
fn served_numbers_are_read_by_prometheus_and_are_right() {
    if !may_mount() {
        return;
    }
    let sandbox = Sandbox::new();
    let contents = "x".repeat(10_000);
    let path = sandbox.add_tree("tree", &contents);
    let _down = Down(&sandbox);
    up_with(&sandbox, &["--metrics", "127.0.0.1:0"]);
    let status = sandbox.json(&["status"]);
    let url = status["instance"]["metrics"].as_str().unwrap();
    assert!(!url.contains(":0/"), "the port that was taken: {url}");

    let file = shown(&sandbox, &path).join("file");
    assert_eq!(fs::read_to_string(file).unwrap(), contents);
    // A check of the two sockets by the worker protocol.
    sandbox.ok(&["status"]);

    let text = get(url, "/metrics");
    let json: serde_json::Value = serde_json::from_str(&get(url, "/metrics.json")).unwrap();
    if let Some(read) = parsed_by_prometheus(&text) {
        for family in [
            "understory_fuse_requests counter",
            "understory_fuse_request_seconds histogram",
            "understory_fuse_inodes gauge",
            "understory_frame_cache_misses counter",
            "understory_worker_operations counter",
            "understory_process_resident_bytes gauge",
        ] {
            assert!(
                read.lines().any(|line| line.starts_with(family)),
                "{family} in {read}"
            );
        }
        assert!(
            read.lines().all(|line| line.ends_with(" True")),
            "each has a help text: {read}"
        );
        assert_eq!(
            read.lines().count(),
            json.as_object().unwrap().len(),
            "both forms have the same families"
        );
    }
    assert!(
        total(
            &json,
            "understory_fuse_requests_total",
            Some(("kind", "read"))
        ) >= 1.0
    );
    assert!(
        total(
            &json,
            "understory_fuse_requests_total",
            Some(("kind", "lookup"))
        ) >= 2.0
    );
    assert!(total(&json, "understory_fuse_read_bytes_total", None) >= 10_000.0);
    assert!(total(&json, "understory_castore_decompressed_bytes_total", None) >= 10_000.0);
    assert!(total(&json, "understory_fuse_inodes", None) >= 2.0);
    for daemon in ["castore", "overlay"] {
        let label = Some(("daemon", daemon));
        assert!(total(&json, "understory_worker_operations_total", label) >= 1.0);
        assert!(total(&json, "understory_worker_connections_total", label) >= 1.0);
    }
    assert!(total(&json, "understory_process_resident_bytes", None) > 1e6);
    // Conventions: counters end in `_total`, and every name is ours.
    for (name, family) in json.as_object().unwrap() {
        assert!(name.starts_with("understory_"), "{name}");
        assert_eq!(
            family["type"] == "counter",
            name.ends_with("_total"),
            "{name}"
        );
    }
}

#[test]
fn every_metric_is_in_the_guide() {
    if !may_mount() {
        return;
    }
    let sandbox = Sandbox::new();
    let _down = Down(&sandbox);
    let socket = format!("unix:{}", sandbox.path().join("m.sock").display());
    up_with(&sandbox, &["--metrics", &socket]);
    let mut stream =
        std::os::unix::net::UnixStream::connect(sandbox.path().join("m.sock")).unwrap();
    stream
        .write_all(b"GET /metrics.json HTTP/1.1\r\n\r\n")
        .unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    let body = answer.split_once("\r\n\r\n").unwrap().1;
    let json: serde_json::Value = serde_json::from_str(body).unwrap();
    let guide = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/guide/observability.md");
    let guide = fs::read_to_string(guide).unwrap();
    let missing: Vec<&String> = json
        .as_object()
        .unwrap()
        .keys()
        .filter(|name| !guide.contains(&format!("`{name}`")))
        .collect();
    assert!(missing.is_empty(), "{missing:?}");
}

#[test]
fn other_addresses_are_refused_before_anything_is_made() {
    let sandbox = Sandbox::new();
    let ran = sandbox.run(&["up", "--metrics", "0.0.0.0:9464"]);
    assert_eq!(ran.code, 1);
    assert_eq!(
        ran.stderr,
        "error: metrics are not served on 0.0.0.0:9464: it is no loopback address\n\
         hint: use a loopback address, such as 127.0.0.1:9464 or [::1]:9464, or a socket, such as \
         unix:/run/understory/metrics.sock; to reach it from elsewhere put a server with authentication in front\n"
    );
    let ran = sandbox.run(&["up", "--option", "metrics", "example.org:80"]);
    assert_eq!(ran.code, 1);
    assert!(
        ran.stderr.starts_with(
            "error: the command line: setting 'metrics': 'example.org:80' is no address for metrics"
        ),
        "{}",
        ran.stderr
    );
    assert!(!sandbox.store().exists());
}

#[test]
fn the_raw_tier_and_the_generations_are_seen() {
    if !may_mount() {
        return;
    }
    if !fs::read_to_string("/proc/filesystems").is_ok_and(|known| known.contains("erofs")) {
        understory_testkit::skip("the kernel has no EROFS");
        return;
    }
    let sandbox = Sandbox::new();
    let contents = "some words\n".repeat(10_000);
    let path = sandbox.add_tree("tree", &contents);
    sandbox.ok(&["-q", "generation", "make"]);
    sandbox.ok(&["-q", "generation", "heat", &path]);
    let _down = Down(&sandbox);
    sandbox.ok(&[
        "-q",
        "up",
        "--detach",
        "--mount=image",
        "--hot=raw",
        "--metrics=127.0.0.1:0",
    ]);
    let status = sandbox.json(&["status"]);
    let url = status["instance"]["metrics"].as_str().unwrap();
    let tier = || {
        let json: serde_json::Value = serde_json::from_str(&get(url, "/metrics.json")).unwrap();
        ["hits_total", "misfits_total", "files", "bytes", "bytes_max"]
            .map(|name| total(&json, &format!("understory_raw_tier_{name}"), None))
    };
    let file = sandbox
        .store()
        .join("merged/nix/store")
        .join(path.strip_prefix("/nix/store/").unwrap())
        .join("file");
    let read = || {
        fs::write("/proc/sys/vm/drop_caches", "3").unwrap();
        assert!(fs::read_to_string(&file).unwrap() == contents);
    };
    assert_eq!(tier(), [0.0, 0.0, 2.0, 114_688.0, f64::from(1 << 30)]);
    read();
    let [hits, misfits, ..] = tier();
    assert!(hits >= 1.0, "{hits}");
    assert_eq!(misfits, 0.0);

    let top = sandbox.json(&["top", "--interval", "0.1"]);
    assert_eq!(top["rawTier"]["hits"].as_f64(), Some(hits));
    assert_eq!(top["rawTier"]["bytes"], 114_688);
    let generation = &top["generations"][0];
    let image_bytes = generation["imageBytes"].as_u64().unwrap();
    assert!(image_bytes >= 4096, "{image_bytes}");
    assert_eq!(
        *generation,
        serde_json::json!({
            "number": 1, "paths": 1, "imageBytes": image_bytes,
            "mounted": true, "overlay": true, "waitsFor": null,
        })
    );
    let text = sandbox.ok(&["top", "--interval", "0.1"]);
    for part in [
        "GENERATIONS\n1         1 paths, image of ",
        ", mounted, the overlay stands on it\n",
        "RAW TIER\nholds     2 files, 115 KB of at most 1.07 GB\n",
        " in all, 0 blocks damaged\n",
    ] {
        assert!(text.contains(part), "{part}: {text}");
    }

    // A byte of the larger file is not as it was written: the file is taken out, and comes from packs.
    let raw = fs::File::options()
        .read(true)
        .write(true)
        .open(sandbox.store().join("hot/raw"))
        .unwrap();
    let mut byte = [0];
    raw.read_exact_at(&mut byte, 50_000).unwrap();
    raw.write_all_at(&[!byte[0]], 50_000).unwrap();
    read();
    read();
    assert_eq!(tier()[1..], [1.0, 1.0, 4096.0, f64::from(1 << 30)]);
    let text = sandbox.ok(&["top", "--interval", "0.1"]);
    assert!(text.contains(" in all, 1 blocks damaged\n"), "{text}");
}
