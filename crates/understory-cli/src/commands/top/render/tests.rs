//! Snapshots of the screen, on a backend that keeps what was drawn.

use super::super::model::{Look, View};
use super::*;
use ratatui::Terminal;
use ratatui::backend::TestBackend;
use std::time::Duration;
use understory::control::{GenerationStatus, Observed, Status};
use understory::daemon::ClientStatus;
use understory::metrics::{Bucket, Snapshot, Value};
use understory::store::StoreStats;

fn latency(count: u64) -> Value {
    Value::Histogram {
        count,
        sum: 1.0,
        buckets: vec![
            Bucket {
                le: 0.000_01,
                count: count / 2,
            },
            Bucket {
                le: 0.001,
                count: count * 99 / 100,
            },
            Bucket { le: 1.0, count },
        ],
    }
}

/// An instance after `n` seconds of work.
fn look(n: u64) -> Look {
    let mut m = Snapshot::default();
    for (kind, each) in [("lookup", 1_200), ("read", 350), ("getattr", 0)] {
        let labels = [("mount", "live"), ("kind", kind)];
        m.histogram(
            "understory_fuse_request_seconds",
            "",
            &labels,
            latency(each * n),
        );
    }
    for (op, each) in [("QueryPathInfo", 90), ("IsValidPath", 3)] {
        let labels = [("daemon", "overlay"), ("operation", op)];
        m.histogram(
            "understory_worker_operation_seconds",
            "",
            &labels,
            latency(each * n),
        );
        m.counter("understory_worker_errors_total", "", &labels, n);
    }
    for (name, each) in [
        ("understory_fuse_read_bytes_total", 40_000_000),
        ("understory_castore_read_bytes_total", 9_000_000),
        ("understory_frame_cache_hits_total", 980),
        ("understory_frame_cache_misses_total", 20),
        ("understory_published_paths_total", 2),
        ("understory_raw_tier_hits_total", 300),
        ("understory_raw_tier_misfits_total", 1),
    ] {
        m.counter(name, "", &[], each * n);
    }
    for (name, value) in [
        ("understory_frame_cache_bytes", 16 << 20),
        ("understory_raw_tier_files", 1_234),
        ("understory_raw_tier_bytes", 700_000_000),
        ("understory_raw_tier_bytes_max", 1 << 30),
    ] {
        m.gauge(name, "", &[], value);
    }
    for (process, bytes) in [("daemon", 31_000_000), ("mount", 42_000_000)] {
        let labels = [("process", process)];
        m.gauge("understory_process_resident_bytes", "", &labels, bytes);
        m.gauge("understory_process_threads", "", &labels, 9);
        #[expect(clippy::cast_precision_loss, reason = "small")]
        let cpu = n as f64 / 4.0;
        m.seconds("understory_process_cpu_seconds_total", "", &labels, cpu);
    }
    let client = |pid: i32, operations: u64, operation: Option<&str>| ClientStatus {
        daemon: "overlay".into(),
        pid,
        uid: 1000,
        user: "ada".into(),
        program: Some("nix".into()),
        connected_seconds: 75.0,
        operations,
        operation: operation.map(str::to_owned),
        operation_seconds: 0.25,
    };
    let generation = |number: u64| GenerationStatus {
        number,
        paths: 400 + number,
        image_bytes: 12_300_000,
        is_mounted: number >= 11,
        has_overlay: number == 11,
        waits_for: (number == 12).then(|| "something in the overlay is open or runs".into()),
    };
    Look {
        status: Status {
            pid: 7,
            version: "1.2.3".into(),
            started: 1_000,
            store: "/var/lib/understory".into(),
            store_dir: "/nix/store".into(),
            lower: "/var/lib/understory/mnt".into(),
            socket: "/s/daemon.sock".into(),
            overlays: vec!["/nix/store".into()],
            upper: Some("/var/lib/understory/upper".into()),
            url: None,
            overlay_socket: None,
            nix_remote: None,
            lowers: vec!["castore".into(), "unix:///other.sock".into()],
            private: false,
            published: 0,
            remounts: 0,
            metrics: None,
        },
        observed: Observed {
            metrics: m,
            clients: vec![
                client(100, 5 * n, None),
                client(101, 30 * n, Some("QueryMissing")),
                client(100, n, None),
            ],
            generations: (3..=12).map(generation).collect(),
        },
        at: Duration::from_secs(n),
    }
}

fn stats() -> StoreStats {
    let mut stats = StoreStats {
        paths: 475,
        nar_bytes: 3_000_000_000,
        ..StoreStats::default()
    };
    stats.castore.raw_bytes = 2_000_000_000;
    stats.castore.stored_bytes = 700_000_000;
    stats.castore.disk_bytes = 750_000_000;
    stats
}

fn drawn(columns: u16, rows: u16, color: bool) -> Terminal<TestBackend> {
    let view = View::new(&look(10), &look(12), Some(&stats()), 8_600);
    let mut terminal = Terminal::new(TestBackend::new(columns, rows)).unwrap();
    let screen = Screen {
        view: &view,
        history: &[0, 100, 1_700, 1_643],
        color,
        notice: None,
        keys: true,
    };
    terminal.draw(|frame| screen.draw(frame)).unwrap();
    terminal
}

#[test]
fn a_wide_terminal() {
    insta::assert_snapshot!("wide", drawn(120, 50, false).backend());
}

#[test]
fn a_usual_terminal() {
    insta::assert_snapshot!("usual", drawn(80, 64, false).backend());
}

#[test]
fn a_tiny_terminal_shows_what_fits() {
    insta::assert_snapshot!("tiny", drawn(40, 10, false).backend());
    for (columns, rows) in [(1, 1), (2, 3), (10, 1), (300, 2), (99, 100)] {
        drawn(columns, rows, true);
    }
}

#[test]
fn colour_is_there_only_if_it_is_wanted() {
    let has_color = |color: bool| {
        let terminal = drawn(120, 40, color);
        let cells = terminal.backend().buffer().content();
        cells.iter().any(|cell| cell.fg != Color::Reset)
    };
    assert!(has_color(true));
    assert!(!has_color(false));
}

#[test]
fn plain_text() {
    let view = View::new(&look(10), &look(12), Some(&stats()), 8_600);
    let screen = Screen {
        view: &view,
        history: &[],
        color: false,
        notice: Some("no answer: x"),
        keys: false,
    };
    insta::assert_snapshot!("plain", screen.to_text());
}

#[test]
fn an_idle_instance_has_nothing_to_divide_by() {
    let mut nothing = look(1);
    nothing.observed = Observed::default();
    let view = View::new(&nothing, &nothing, None, 0);
    let screen = Screen {
        view: &view,
        history: &[0],
        color: true,
        notice: None,
        keys: true,
    };
    let text = screen.to_text();
    assert!(!text.contains("NaN") && !text.contains("inf/s"), "{text}");
    assert!(text.contains("CLIENTS 0"), "{text}");
}

#[test]
fn a_process_that_began_anew_counts_from_nothing() {
    let view = View::new(&look(100), &look(2), None, 8_600);
    assert!(view.requests.iter().all(|r| r.per_second >= 0.0));
    assert!(view.flows.iter().all(|f| f.per_second >= 0.0));
    assert!(view.processes.iter().all(|p| p.cpu >= 0.0));
}

#[test]
fn times_for_people() {
    for (seconds, text) in [
        (0.000_000_4, "0.4 µs"),
        (0.000_012, "12 µs"),
        (0.003_4, "3.4 ms"),
        (0.25, "250 ms"),
        (1.25, "1.2 s"),
        (61.0, "61 s"),
        (125.0, "2 min"),
    ] {
        assert_eq!(time(Some(seconds)), text);
    }
    assert_eq!(time(None), "-");
    assert_eq!(span(7_300), "2 h 01");
    assert_eq!(span(200_000), "2 days");
    assert_eq!(per_second(0.26), "0.3");
    assert_eq!(per_second(12_345.0), "12,345");
}
