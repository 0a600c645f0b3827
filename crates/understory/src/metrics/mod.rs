//! What this process has done, in numbers: counters, gauges and latencies, by name.
//!
//! Hot paths bump a few relaxed atomics of their own shard ([`Sharded`]); nothing is looked up by name,
//! allocated or locked there. Whoever wants the numbers takes a [`Snapshot`], which has names, and adds up
//! those of several processes. `docs/guide/observability.md` lists all names; they are stable.
//!
//! - A counter belongs to the process: two stores or mounts of one process share it.
//! - What *is* (bytes in caches, open connections, inodes) is asked of its owner when a snapshot is taken:
//!   the owner is a [`Source`] and [`register`]s itself.
//!
//! Cost: a FUSE request or an operation of the worker protocol costs two readings of the clock (20 ns each)
//! and three to five additions (1 to 5 ns each): below 1 % of the fastest request. A snapshot costs below
//! a millisecond and about 50 KiB. Memory: 64 KiB for each daemon, 25 KiB for each kind of mount.
//!
//! Why not a crate: `prometheus-client` and `metrics` keep their numbers behind maps by label, encode text only and
//! cannot add up what several processes counted; the exporter of `metrics` brings an async runtime. What is left of
//! them is the text format, which is forty lines.

mod endpoint;
mod process;
mod snapshot;
mod text;

pub use endpoint::{Address, Endpoint, Take};
pub use snapshot::{Bucket, Family, Kind, Sample, Snapshot, Value};

use rustix::io::Errno;
use std::sync::{Arc, LazyLock, Mutex, PoisonError, Weak};
use std::time::{Duration, Instant};
use understory_castore::counters::{Counter, Sharded};
use understory_nix::worker::Op;

/// Upper ends of the buckets of latencies, in nanoseconds: from a cached lookup to a stuck disk.
const BUCKETS_NS: [u64; 16] = [
    2_000,
    5_000,
    10_000,
    25_000,
    50_000,
    100_000,
    250_000,
    500_000,
    1_000_000,
    2_500_000,
    5_000_000,
    10_000_000,
    25_000_000,
    100_000_000,
    1_000_000_000,
    10_000_000_000,
];

/// Kinds of FUSE requests that are told apart.
const FUSE_KINDS: [&str; 11] = [
    "lookup",
    "getattr",
    "read",
    "readdir",
    "readdirplus",
    "readlink",
    "open",
    "opendir",
    "statfs",
    "forget",
    "other",
];
/// Errors that are told apart. `ENOENT` is a usual answer, `ENOSYS` tells the kernel not to ask again.
const ERRNOS: [(Errno, &str); 6] = [
    (Errno::NOENT, "ENOENT"),
    (Errno::NOSYS, "ENOSYS"),
    (Errno::IO, "EIO"),
    (Errno::ROFS, "EROFS"),
    (Errno::STALE, "ESTALE"),
    (Errno::NOTDIR, "ENOTDIR"),
];
/// Numbers of operations are below this.
const OPS: usize = 48;

/// How long something took, by bucket.
#[derive(Debug, Default)]
struct Latency {
    /// One for each of [`BUCKETS_NS`], one for what takes longer.
    buckets: [Counter; BUCKETS_NS.len() + 1],
    sum_ns: Counter,
}

impl Latency {
    fn record(&self, took: Duration) {
        let ns = u64::try_from(took.as_nanos()).unwrap_or(u64::MAX);
        self.buckets[BUCKETS_NS.partition_point(|end| *end < ns)].bump();
        self.sum_ns.add(ns);
    }
}

/// What FUSE requests are for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mount {
    /// The file system that shows what the store holds now.
    Live,
    /// What serves the contents of an image.
    Blob,
}

impl Mount {
    const ALL: [Self; 2] = [Self::Live, Self::Blob];
    fn name(self) -> &'static str {
        match self {
            Self::Live => "live",
            Self::Blob => "blob",
        }
    }
}

/// What a daemon serves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Daemon {
    /// The castore alone: the lower daemon.
    Castore,
    /// The overlay store.
    Overlay,
}

impl Daemon {
    const ALL: [Self; 2] = [Self::Castore, Self::Overlay];
    /// The value of the label `daemon`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Castore => "castore",
            Self::Overlay => "overlay",
        }
    }
}

#[derive(Default)]
struct FuseCounts {
    requests: [Latency; FUSE_KINDS.len()],
    errors: [Counter; ERRNOS.len() + 1],
    read_bytes: Counter,
}

#[derive(Default)]
struct OpCounts {
    latency: Latency,
    errors: Counter,
}

struct DaemonCounts {
    ops: [OpCounts; OPS],
    connections: Counter,
    refused: Counter,
}

impl Default for DaemonCounts {
    fn default() -> Self {
        Self {
            ops: std::array::from_fn(|_| OpCounts::default()),
            connections: Counter::new(),
            refused: Counter::new(),
        }
    }
}

/// What happens seldom enough to share a line.
#[derive(Default)]
struct Rare {
    publications: Counter,
    published_paths: Counter,
    remounts: Counter,
    generations_made: Counter,
    generations_made_ms: Counter,
    generation_switches: Counter,
    generation_put_offs: Counter,
    substituted_paths: Counter,
    substituted_nar_bytes: Counter,
    substituted_file_bytes: Counter,
    substitution_failures: Counter,
}

#[derive(Default)]
struct PathInfoCounts {
    hits: Counter,
    misses: Counter,
}

static FUSE: LazyLock<[Sharded<FuseCounts>; 2]> = LazyLock::new(Default::default);
static DAEMONS: LazyLock<[Sharded<DaemonCounts>; 2]> = LazyLock::new(Default::default);
static PATH_INFOS: LazyLock<Sharded<PathInfoCounts>> = LazyLock::new(Default::default);
static RARE: LazyLock<Rare> = LazyLock::new(Default::default);
static SOURCES: Mutex<Vec<Weak<dyn Source>>> = Mutex::new(Vec::new());

/// Who has numbers of its own that a snapshot asks for.
pub trait Source: Send + Sync {
    /// Adds its numbers. Called from any thread; must be quick and not take a snapshot itself.
    fn collect(&self, out: &mut Snapshot);
}

/// Lets snapshots of this process ask `source` for as long as it lives.
pub fn register(source: &Arc<impl Source + 'static>) {
    let weak: Weak<dyn Source> = Arc::downgrade(&(Arc::clone(source) as Arc<dyn Source>));
    let mut sources = SOURCES.lock().unwrap_or_else(PoisonError::into_inner);
    sources.retain(|source| source.strong_count() > 0);
    sources.push(weak);
}

/// A FUSE request was answered: it began at `began`; `bytes` of a file's contents were sent.
pub fn fuse_request(mount: Mount, opcode: u32, began: Instant, bytes: usize, error: Option<Errno>) {
    let counts = FUSE[mount as usize].local();
    counts.requests[fuse_kind(opcode)].record(began.elapsed());
    if bytes > 0 {
        counts.read_bytes.add(bytes as u64);
    }
    if let Some(error) = error {
        let known = ERRNOS.iter().position(|(errno, _)| *errno == error);
        counts.errors[known.unwrap_or(ERRNOS.len())].bump();
    }
}

/// The place in [`FUSE_KINDS`] of a number of `enum fuse_opcode` (`linux/fuse.h`).
fn fuse_kind(opcode: u32) -> usize {
    match opcode {
        1 => 0,
        3 => 1,
        15 => 2,
        28 => 3,
        44 => 4,
        5 => 5,
        14 => 6,
        27 => 7,
        17 => 8,
        2 | 42 => 9,
        _ => FUSE_KINDS.len() - 1,
    }
}

/// A client has connected to a daemon.
pub fn worker_connection(daemon: Daemon) {
    DAEMONS[daemon as usize].local().connections.bump();
}

/// A client was sent away.
pub fn worker_refused(daemon: Daemon) {
    DAEMONS[daemon as usize].local().refused.bump();
}

/// A daemon has answered an operation that it began to read at `began`.
pub fn worker_operation(daemon: Daemon, op: Op, began: Instant, failed: bool) {
    let counts = DAEMONS[daemon as usize].local();
    if let Some(counts) = counts.ops.get(op as usize) {
        counts.latency.record(began.elapsed());
        if failed {
            counts.errors.bump();
        }
    }
}

/// A path info was wanted and was in memory, or not.
pub fn path_info(hit: bool) {
    let counts = PATH_INFOS.local();
    if hit {
        counts.hits.bump();
    } else {
        counts.misses.bump();
    }
}

/// Paths were made valid in the castore by one commit.
pub fn published(paths: usize) {
    RARE.publications.bump();
    RARE.published_paths.add(paths as u64);
}

/// An overlay was remounted.
pub fn remounted() {
    RARE.remounts.bump();
}

/// A generation was made.
pub fn generation_made(took: Duration) {
    RARE.generations_made.bump();
    let ms = u64::try_from(took.as_millis()).unwrap_or(u64::MAX);
    RARE.generations_made_ms.add(ms);
}

/// An overlay was put on another generation.
pub fn generation_switched() {
    RARE.generation_switches.bump();
}

/// An overlay was in use and could not be put on another generation.
pub fn generation_put_off() {
    RARE.generation_put_offs.bump();
}

/// A path was fetched from a substituter: bytes of its NAR, and bytes that came over the wire.
pub fn substituted(nar_bytes: u64, file_bytes: u64) {
    RARE.substituted_paths.bump();
    RARE.substituted_nar_bytes.add(nar_bytes);
    RARE.substituted_file_bytes.add(file_bytes);
}

/// No substituter could give a path that one had promised.
pub fn substitution_failed() {
    RARE.substitution_failures.bump();
}

/// All numbers of this process. `role` tells it from the other processes of an instance.
pub fn snapshot(role: &str) -> Snapshot {
    let mut out = Snapshot::default();
    out.gauge(
        "understory_build_info",
        "Always 1; the version is in the label.",
        &[("version", env!("CARGO_PKG_VERSION")), ("process", role)],
        1,
    );
    for mount in Mount::ALL {
        collect_fuse(mount, &mut out);
    }
    for daemon in Daemon::ALL {
        collect_daemon(daemon, &mut out);
    }
    let count = |out: &mut Snapshot, name: &str, help: &str, value: u64| {
        out.counter(name, help, &[], value);
    };
    count(
        &mut out,
        "understory_path_info_cache_hits_total",
        "Path infos that were in memory when they were wanted.",
        PATH_INFOS.sum(|c| c.hits.get()),
    );
    count(
        &mut out,
        "understory_path_info_cache_misses_total",
        "Path infos that were looked for in the database.",
        PATH_INFOS.sum(|c| c.misses.get()),
    );
    let rare = [
        (
            "understory_publications_total",
            "Commits that made paths valid in the castore.",
            &RARE.publications,
        ),
        (
            "understory_published_paths_total",
            "Paths that were made valid in the castore.",
            &RARE.published_paths,
        ),
        (
            "understory_overlay_remounts_total",
            "Remounts of an overlay because it hid a new name.",
            &RARE.remounts,
        ),
        (
            "understory_generations_made_total",
            "Generations that were made.",
            &RARE.generations_made,
        ),
        (
            "understory_generation_switches_total",
            "How often an overlay was put on another generation while it was mounted.",
            &RARE.generation_switches,
        ),
        (
            "understory_generation_switches_put_off_total",
            "How often that was tried while the overlay was in use.",
            &RARE.generation_put_offs,
        ),
        (
            "understory_substituted_paths_total",
            "Paths fetched from substituters.",
            &RARE.substituted_paths,
        ),
        (
            "understory_substituted_nar_bytes_total",
            "Bytes of the NARs of these paths.",
            &RARE.substituted_nar_bytes,
        ),
        (
            "understory_substituted_file_bytes_total",
            "Bytes of these paths as they came, mostly compressed.",
            &RARE.substituted_file_bytes,
        ),
        (
            "understory_substitution_failures_total",
            "Attempts to fetch a path that failed.",
            &RARE.substitution_failures,
        ),
    ];
    for (name, help, counter) in rare {
        count(&mut out, name, help, counter.get());
    }
    #[expect(clippy::cast_precision_loss, reason = "seconds for people and graphs")]
    out.seconds(
        "understory_generation_make_seconds_total",
        "Time that it took to make generations.",
        &[],
        RARE.generations_made_ms.get() as f64 / 1e3,
    );
    let sources = SOURCES
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .clone();
    for source in sources.iter().filter_map(Weak::upgrade) {
        source.collect(&mut out);
    }
    process::collect("/proc/self", role, &mut out);
    out
}

/// Adds what the kernel says of another process of the instance, one that takes no snapshots itself.
pub fn add_process(pid: u32, role: &str, out: &mut Snapshot) {
    process::collect(&format!("/proc/{pid}"), role, out);
}

fn collect_fuse(mount: Mount, out: &mut Snapshot) {
    let counts = &FUSE[mount as usize];
    let mount = ("mount", mount.name());
    for (at, kind) in FUSE_KINDS.into_iter().enumerate() {
        let latency = histogram(|bucket| counts.sum(|c| bucket(&c.requests[at])));
        let labels = [mount, ("kind", kind)];
        out.counter(
            "understory_fuse_requests_total",
            "Requests of the kernel, by kind.",
            &labels,
            latency.count(),
        );
        out.histogram(
            "understory_fuse_request_seconds",
            "Time from the kernel's request to our answer.",
            &labels,
            latency,
        );
    }
    let names = ERRNOS.into_iter().map(|(_, name)| name).chain(["other"]);
    for (at, name) in names.enumerate() {
        out.counter(
            "understory_fuse_errors_total",
            "Requests answered with an error. ENOENT is a usual answer, ENOSYS tells the kernel not to ask again.",
            &[mount, ("errno", name)],
            counts.sum(|c| c.errors[at].get()),
        );
    }
    out.counter(
        "understory_fuse_read_bytes_total",
        "Bytes of files that the kernel was given.",
        &[mount],
        counts.sum(|c| c.read_bytes.get()),
    );
}

fn collect_daemon(daemon: Daemon, out: &mut Snapshot) {
    let counts = &DAEMONS[daemon as usize];
    let daemon = ("daemon", daemon.name());
    out.counter(
        "understory_worker_connections_total",
        "Clients that have connected.",
        &[daemon],
        counts.sum(|c| c.connections.get()),
    );
    out.counter(
        "understory_worker_refused_total",
        "Clients that were sent away: too many, not allowed, or not speaking the protocol.",
        &[daemon],
        counts.sum(|c| c.refused.get()),
    );
    for op in Op::ALL {
        let at = *op as usize;
        let latency = histogram(|bucket| counts.sum(|c| bucket(&c.ops[at].latency)));
        // Most of the operations never happen: their names come with their first use.
        if latency.count() == 0 {
            continue;
        }
        let labels = [daemon, ("operation", op.name())];
        out.counter(
            "understory_worker_operations_total",
            "Operations of the worker protocol that were answered, by Nix's names.",
            &labels,
            latency.count(),
        );
        out.histogram(
            "understory_worker_operation_seconds",
            "Time of operations, including the wait for their arguments and bodies.",
            &labels,
            latency,
        );
        out.counter(
            "understory_worker_errors_total",
            "Operations that were answered with an error.",
            &labels,
            counts.sum(|c| c.ops[at].errors.get()),
        );
    }
}

/// Adds a latency up; `sum` sums one number of it over the shards.
#[expect(clippy::cast_precision_loss, reason = "seconds for people and graphs")]
fn histogram(sum: impl Fn(&dyn Fn(&Latency) -> u64) -> u64) -> Value {
    let mut buckets = Vec::with_capacity(BUCKETS_NS.len());
    let mut count = 0;
    for (at, end) in BUCKETS_NS.into_iter().enumerate() {
        count += sum(&|latency| latency.buckets[at].get());
        buckets.push(Bucket {
            le: end as f64 / 1e9,
            count,
        });
    }
    count += sum(&|latency| latency.buckets[BUCKETS_NS.len()].get());
    Value::Histogram {
        count,
        sum: sum(&|latency| latency.sum_ns.get()) as f64 / 1e9,
        buckets,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    // The counters are the process's and other tests bump them, too: so at least.
    #[test]
    fn what_is_bumped_shows() {
        let before = snapshot("test");
        let began = Instant::now();
        fuse_request(Mount::Blob, 15, began, 4096, None);
        fuse_request(Mount::Blob, 1, began, 0, Some(Errno::NOENT));
        fuse_request(Mount::Blob, 999, began, 0, Some(Errno::INVAL));
        worker_connection(Daemon::Overlay);
        worker_operation(Daemon::Overlay, Op::AddPermRoot, began, true);
        substituted(10, 3);
        let after = snapshot("test");
        for (name, labels, more) in [
            (
                "understory_fuse_requests_total",
                &[("mount", "blob"), ("kind", "read")][..],
                1,
            ),
            (
                "understory_fuse_requests_total",
                &[("mount", "blob"), ("kind", "other")],
                1,
            ),
            (
                "understory_fuse_errors_total",
                &[("mount", "blob"), ("errno", "ENOENT")],
                1,
            ),
            (
                "understory_fuse_errors_total",
                &[("mount", "blob"), ("errno", "other")],
                1,
            ),
            (
                "understory_fuse_read_bytes_total",
                &[("mount", "blob")],
                4096,
            ),
            (
                "understory_worker_errors_total",
                &[("daemon", "overlay"), ("operation", "AddPermRoot")],
                1,
            ),
            ("understory_substituted_nar_bytes_total", &[], 10),
            ("understory_substituted_file_bytes_total", &[], 3),
        ] {
            let grown = after.total(name, labels) - before.total(name, labels);
            assert!(grown >= f64::from(more), "{name} {labels:?}: {grown}");
        }
        assert!(after.total("understory_process_resident_bytes", &[("process", "test")]) > 1e6);
    }

    #[test]
    fn a_latency_falls_into_its_bucket() {
        let latency = Latency::default();
        for ns in [0, 2_000, 2_001, 10_000_000_000, 10_000_000_001] {
            latency.record(Duration::from_nanos(ns));
        }
        let Value::Histogram {
            count,
            sum,
            buckets,
        } = histogram(|number| number(&latency))
        else {
            panic!("no histogram");
        };
        assert_eq!(count, 5);
        assert!((sum - 20.000_004_002).abs() < 1e-6, "{sum}");
        let counts: Vec<u64> = buckets.iter().map(|b| b.count).collect();
        assert_eq!(
            (counts[0], counts[1], counts[14], counts[15]),
            (2, 3, 3, 4),
            "{buckets:?}"
        );
    }

    #[test]
    fn every_operation_has_a_place() {
        assert!(Op::ALL.iter().all(|op| (*op as usize) < OPS));
    }

    struct Fixed(u64);
    impl Source for Fixed {
        fn collect(&self, out: &mut Snapshot) {
            out.gauge(
                "understory_test_things",
                "Things.",
                &[("what", "x")],
                self.0,
            );
        }
    }

    #[test]
    fn sources_are_asked_while_they_live() {
        let (one, two) = (Arc::new(Fixed(1)), Arc::new(Fixed(2)));
        register(&one);
        register(&two);
        let things = || snapshot("test").total("understory_test_things", &[]);
        assert!((things() - 3.0).abs() < 1e-9);
        drop(two);
        assert!((things() - 1.0).abs() < 1e-9);
    }
}
