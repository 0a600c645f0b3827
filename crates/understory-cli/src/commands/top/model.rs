//! What is shown of an instance: rates between two looks, worked out of its counters. Pure.

use std::collections::HashMap;
use std::time::Duration;
use understory::control::{Observed, Status};
use understory::metrics::{Snapshot, Value};
use understory::store::StoreStats;

/// One look at an instance.
#[derive(Debug, Clone)]
pub(super) struct Look {
    pub(super) status: Status,
    pub(super) observed: Observed,
    /// When, on any clock that only goes forward.
    pub(super) at: Duration,
}

/// All that is shown.
#[derive(Debug, Clone, Default, serde::Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct View {
    pub(super) store: String,
    pub(super) version: String,
    pub(super) pid: u32,
    pub(super) private: bool,
    pub(super) uptime_seconds: u64,
    /// Seconds between the looks that rates are made of.
    pub(super) interval_seconds: f64,
    pub(super) paths: u64,
    pub(super) nar_bytes: u64,
    pub(super) disk_bytes: u64,
    pub(super) deduplicated_bytes: u64,
    pub(super) compressed_bytes: u64,
    pub(super) requests: Vec<Operation>,
    pub(super) operations: Vec<Operation>,
    pub(super) caches: Vec<Cache>,
    pub(super) flows: Vec<Flow>,
    pub(super) counts: Vec<Count>,
    pub(super) processes: Vec<Process>,
    pub(super) mounts: Vec<Mount>,
    pub(super) generations: Vec<Generation>,
    /// None if it is not used.
    pub(super) raw_tier: Option<RawTier>,
    pub(super) clients: Vec<Client>,
}

/// Requests of a kind.
#[derive(Debug, Clone, serde::Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Operation {
    /// The mount; empty for what all daemons do together.
    pub(super) of: String,
    pub(super) name: String,
    pub(super) per_second: f64,
    pub(super) total: u64,
    pub(super) errors: u64,
    /// Of the interval; of all time if nothing happened in it.
    pub(super) p50_seconds: Option<f64>,
    pub(super) p99_seconds: Option<f64>,
}

/// A cache.
#[derive(Debug, Clone, serde::Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Cache {
    pub(super) name: &'static str,
    /// Share of hits in the interval, if anything was asked of it.
    pub(super) rate_now: Option<f64>,
    /// Share of hits of all time.
    pub(super) rate: Option<f64>,
    pub(super) bytes: u64,
}

/// Bytes that go somewhere.
#[derive(Debug, Clone, serde::Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Flow {
    pub(super) name: &'static str,
    pub(super) per_second: f64,
    pub(super) total: u64,
}

/// Something that happens now and then.
#[derive(Debug, Clone, serde::Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Count {
    pub(super) name: &'static str,
    pub(super) total: u64,
}

/// A process of the instance.
#[derive(Debug, Clone, serde::Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Process {
    pub(super) name: String,
    pub(super) resident_bytes: u64,
    /// Of which no file's.
    pub(super) anonymous_bytes: u64,
    pub(super) resident_max_bytes: u64,
    /// Share of one processor in the interval.
    pub(super) cpu: f64,
    pub(super) threads: u64,
    pub(super) open_files: u64,
    pub(super) restarts: u64,
}

/// A mount.
#[derive(Debug, Clone, serde::Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Mount {
    pub(super) kind: &'static str,
    pub(super) at: String,
    pub(super) note: String,
}

/// A generation.
#[derive(Debug, Clone, serde::Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Generation {
    pub(super) number: u64,
    pub(super) paths: u64,
    pub(super) image_bytes: u64,
    /// By the instance or somebody else.
    pub(super) mounted: bool,
    /// The overlay stands on it.
    pub(super) overlay: bool,
    /// What the overlay waits for to be put on it, if it is the next one.
    pub(super) waits_for: Option<String>,
}

/// What the raw tier holds and serves.
#[derive(Debug, Clone, serde::Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct RawTier {
    pub(super) files: u64,
    pub(super) bytes: u64,
    pub(super) bytes_max: u64,
    pub(super) hits_per_second: f64,
    pub(super) hits: u64,
    /// Blocks that were not as they were written.
    pub(super) misfits: u64,
}

/// A client of a daemon.
#[derive(Debug, Clone, serde::Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Client {
    pub(super) user: String,
    pub(super) pid: i32,
    pub(super) program: String,
    pub(super) daemon: String,
    pub(super) connected_seconds: f64,
    pub(super) per_second: f64,
    pub(super) operations: u64,
    /// What it does now.
    pub(super) operation: Option<String>,
    pub(super) operation_seconds: f64,
}

/// Counters that never count much, in the order of their display.
const COUNTS: [(&str, &str); 7] = [
    ("paths published", "understory_published_paths_total"),
    ("substituted", "understory_substituted_paths_total"),
    (
        "failed substitutions",
        "understory_substitution_failures_total",
    ),
    ("overlay remounts", "understory_overlay_remounts_total"),
    ("clients", "understory_worker_connections_total"),
    ("refused clients", "understory_worker_refused_total"),
    ("damaged frames", "understory_castore_damaged_frames_total"),
];
const FLOWS: [(&str, &str); 6] = [
    ("to the kernel", "understory_fuse_read_bytes_total"),
    (
        "decompressed",
        "understory_castore_decompressed_bytes_total",
    ),
    ("from packs", "understory_castore_read_bytes_total"),
    ("substituted", "understory_substituted_nar_bytes_total"),
    ("added", "understory_added_bytes_total"),
    ("stored", "understory_added_stored_bytes_total"),
];
const CACHES: [(&str, &str); 3] = [
    ("frames", "understory_frame_cache"),
    ("directories", "understory_directory_cache"),
    ("path infos", "understory_path_info_cache"),
];

impl View {
    /// What `now` says, with rates since `before`; `unix` is the time of day.
    pub(super) fn new(before: &Look, now: &Look, stats: Option<&StoreStats>, unix: u64) -> Self {
        let pair = Pair {
            before: &before.observed.metrics,
            now: &now.observed.metrics,
            seconds: now.at.saturating_sub(before.at).as_secs_f64().max(1e-3),
        };
        let status = &now.status;
        let mut view = Self {
            store: status.store.display().to_string(),
            version: status.version.clone(),
            pid: status.pid,
            private: status.private,
            uptime_seconds: unix.saturating_sub(status.started),
            interval_seconds: pair.seconds,
            requests: pair.operations("understory_fuse_request_seconds", ("mount", "kind"), None),
            operations: pair.operations(
                "understory_worker_operation_seconds",
                ("", "operation"),
                Some("understory_worker_errors_total"),
            ),
            caches: CACHES.map(|(name, metric)| pair.cache(name, metric)).into(),
            flows: FLOWS
                .map(|(name, metric)| Flow {
                    name,
                    per_second: pair.rate(metric, &[]),
                    total: pair.total(metric),
                })
                .into(),
            counts: COUNTS
                .map(|(name, metric)| Count {
                    name,
                    total: pair.total(metric),
                })
                .into(),
            processes: pair.processes(),
            mounts: mounts(status),
            generations: generations(&now.observed),
            raw_tier: pair.raw_tier(),
            clients: clients(before, now, pair.seconds),
            ..Self::default()
        };
        if let Some(stats) = stats {
            view.paths = stats.paths;
            view.nar_bytes = stats.nar_bytes;
            view.disk_bytes = stats.castore.disk_bytes + stats.database_bytes;
            view.deduplicated_bytes = stats.deduplicated_bytes();
            view.compressed_bytes = stats.compressed_bytes();
        }
        view
    }

    /// Requests and operations a second.
    pub(super) fn all_per_second(&self) -> f64 {
        let all = self.requests.iter().chain(&self.operations);
        all.map(|operation| operation.per_second).sum()
    }
}

/// Two snapshots and the time between them.
struct Pair<'a> {
    before: &'a Snapshot,
    now: &'a Snapshot,
    seconds: f64,
}

impl Pair<'_> {
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "counters are whole and not negative"
    )]
    fn total(&self, name: &str) -> u64 {
        self.now.total(name, &[]) as u64
    }
    /// What was added a second; a process that has begun anew counts from 0.
    fn rate(&self, name: &str, labels: &[(&str, &str)]) -> f64 {
        let (before, now) = (
            self.before.total(name, labels),
            self.now.total(name, labels),
        );
        grown(before, now) / self.seconds
    }

    /// A line for each histogram of a name that has counted anything, by the labels `of` and `kind`; without
    /// `of`, by `kind` alone.
    fn operations(
        &self,
        name: &str,
        (of, kind): (&str, &str),
        errors: Option<&str>,
    ) -> Vec<Operation> {
        let mut out = Vec::new();
        for sample in self.now.samples(name, &[]) {
            let label = |name: &str| sample.labels.get(name).map_or("", String::as_str);
            let mut labels = vec![(kind, label(kind))];
            if !of.is_empty() {
                labels.push((of, label(of)));
            } else if out.iter().any(|o: &Operation| o.name == label(kind)) {
                continue;
            }
            let Some(value) = self.now.distribution(name, &labels) else {
                continue;
            };
            let total = value.count();
            if total == 0 {
                continue;
            }
            let before = self.before.distribution(name, &labels);
            let recent = before
                .as_ref()
                .map_or_else(|| value.clone(), |before| since(before, &value));
            let shown = if recent.count() > 0 { &recent } else { &value };
            #[expect(
                clippy::cast_possible_truncation,
                clippy::cast_sign_loss,
                reason = "counters are whole and not negative"
            )]
            let errors = errors.map_or(0, |errors| self.now.total(errors, &labels) as u64);
            out.push(Operation {
                of: label(of).to_owned(),
                name: label(kind).to_owned(),
                #[expect(clippy::cast_precision_loss, reason = "a rate")]
                per_second: recent.count() as f64 / self.seconds,
                total,
                errors,
                p50_seconds: shown.quantile(0.5),
                p99_seconds: shown.quantile(0.99),
            });
        }
        out
    }

    fn cache(&self, name: &'static str, metric: &str) -> Cache {
        let (hits, misses) = (
            format!("{metric}_hits_total"),
            format!("{metric}_misses_total"),
        );
        let share = |hits: f64, misses: f64| (hits + misses > 0.0).then(|| hits / (hits + misses));
        Cache {
            name,
            rate_now: share(self.rate(&hits, &[]), self.rate(&misses, &[])),
            rate: share(self.now.total(&hits, &[]), self.now.total(&misses, &[])),
            bytes: self.total(&format!("{metric}_bytes")),
        }
    }

    fn raw_tier(&self) -> Option<RawTier> {
        let name = |what: &str| format!("understory_raw_tier_{what}");
        let total = |what: &str| self.total(&name(what));
        self.now.samples(&name("bytes_max"), &[]).next()?;
        Some(RawTier {
            files: total("files"),
            bytes: total("bytes"),
            bytes_max: total("bytes_max"),
            hits_per_second: self.rate(&name("hits_total"), &[]),
            hits: total("hits_total"),
            misfits: total("misfits_total"),
        })
    }

    fn processes(&self) -> Vec<Process> {
        let mut out = Vec::new();
        for sample in self.now.samples("understory_process_resident_bytes", &[]) {
            let Some(name) = sample.labels.get("process") else {
                continue;
            };
            let labels = [("process", name.as_str())];
            #[expect(
                clippy::cast_possible_truncation,
                clippy::cast_sign_loss,
                reason = "gauges are whole and not negative"
            )]
            let gauge = |what: &str| {
                self.now
                    .total(&format!("understory_process_{what}"), &labels) as u64
            };
            out.push(Process {
                name: name.clone(),
                resident_bytes: gauge("resident_bytes"),
                anonymous_bytes: gauge("anonymous_bytes"),
                resident_max_bytes: gauge("resident_max_bytes"),
                cpu: self.rate("understory_process_cpu_seconds_total", &labels),
                threads: gauge("threads"),
                open_files: gauge("open_files"),
                restarts: gauge("restarts_total"),
            });
        }
        out
    }
}

fn grown(before: f64, now: f64) -> f64 {
    if now < before { now } else { now - before }
}

/// What a histogram has counted since; all of it if it has begun anew.
fn since(before: &Value, now: &Value) -> Value {
    let (
        Value::Histogram { count, buckets, .. },
        Value::Histogram {
            count: old_count,
            buckets: old,
            ..
        },
    ) = (now, before)
    else {
        return now.clone();
    };
    if count < old_count || buckets.len() != old.len() {
        return now.clone();
    }
    let buckets = buckets.iter().zip(old).map(|(now, old)| {
        let mut bucket = *now;
        bucket.count = now.count.saturating_sub(old.count);
        bucket
    });
    Value::Histogram {
        count: count - old_count,
        sum: 0.0,
        buckets: buckets.collect(),
    }
}

fn mounts(status: &Status) -> Vec<Mount> {
    let mut out = vec![Mount {
        kind: "live",
        at: status.lower.display().to_string(),
        note: String::new(),
    }];
    let upper = status.upper.as_ref();
    out.extend(status.overlays.iter().map(|overlay| Mount {
        kind: "overlay",
        at: overlay.display().to_string(),
        note: upper.map_or_else(String::new, |upper| format!("upper {}", upper.display())),
    }));
    out.extend(status.lowers.iter().skip(1).map(|lower| Mount {
        kind: "below",
        at: lower.clone(),
        note: String::new(),
    }));
    out
}

fn generations(observed: &Observed) -> Vec<Generation> {
    let all = observed.generations.iter();
    all.map(|generation| Generation {
        number: generation.number,
        paths: generation.paths,
        image_bytes: generation.image_bytes,
        mounted: generation.is_mounted,
        overlay: generation.has_overlay,
        waits_for: generation.waits_for.clone(),
    })
    .collect()
}

/// Busy ones first, then those that ask most.
fn clients(before: &Look, now: &Look, seconds: f64) -> Vec<Client> {
    let key = |c: &understory::daemon::ClientStatus| (c.daemon.clone(), c.pid, c.uid);
    // A process may have several connections: each has its own count, so only the sum is meaningful.
    let mut old: HashMap<_, u64> = HashMap::new();
    for client in &before.observed.clients {
        *old.entry(key(client)).or_default() += client.operations;
    }
    let mut out: Vec<Client> = Vec::new();
    let mut at: HashMap<_, usize> = HashMap::new();
    for client in &now.observed.clients {
        let place = *at.entry(key(client)).or_insert_with(|| {
            out.push(Client {
                user: client.user.clone(),
                pid: client.pid,
                program: client.program.clone().unwrap_or_default(),
                daemon: client.daemon.clone(),
                connected_seconds: 0.0,
                per_second: 0.0,
                operations: 0,
                operation: None,
                operation_seconds: 0.0,
            });
            out.len() - 1
        });
        let shown = &mut out[place];
        shown.operations += client.operations;
        shown.connected_seconds = shown.connected_seconds.max(client.connected_seconds);
        if client.operation.is_some() && client.operation_seconds >= shown.operation_seconds {
            shown.operation.clone_from(&client.operation);
            shown.operation_seconds = client.operation_seconds;
        }
    }
    for (key, place) in at {
        let before = old.get(&key).copied().unwrap_or(0);
        #[expect(clippy::cast_precision_loss, reason = "a rate")]
        let grown = out[place].operations.saturating_sub(before) as f64;
        out[place].per_second = grown / seconds;
    }
    out.sort_by(|a, b| {
        let busy = b.operation.is_some().cmp(&a.operation.is_some());
        busy.then(b.per_second.total_cmp(&a.per_second))
            .then(a.pid.cmp(&b.pid))
    });
    out
}
