//! What the kernel says of processes of ours: memory, time, descriptors. Source: proc(5).
//!
//! Cost: three small files of `/proc`, 0.1 ms. What cannot be read is left out.

use super::snapshot::Snapshot;
use std::fs;

/// Adds what the kernel says of a process of ours. `proc` is its directory: `/proc/self`, or by its number.
pub(super) fn collect(proc: &str, role: &str, out: &mut Snapshot) {
    let labels = [("process", role)];
    let status = fs::read_to_string(format!("{proc}/status")).unwrap_or_default();
    // "VmRSS:\t   1234 kB"
    let field = |name: &str| {
        status.lines().find_map(|line| {
            let rest = line.strip_prefix(name)?.strip_prefix(':')?;
            rest.split_whitespace().next()?.parse::<u64>().ok()
        })
    };
    let gauges = [
        (
            "understory_process_resident_bytes",
            "Memory that the process has in RAM, with the pages of mapped files.",
            field("VmRSS").map(|kib| kib << 10),
        ),
        (
            "understory_process_anonymous_bytes",
            "Memory in RAM that belongs to no file.",
            field("RssAnon").map(|kib| kib << 10),
        ),
        (
            "understory_process_resident_max_bytes",
            "The most memory that the process has had in RAM.",
            field("VmHWM").map(|kib| kib << 10),
        ),
        (
            "understory_process_threads",
            "Threads of the process.",
            field("Threads"),
        ),
        (
            "understory_process_open_files",
            "Descriptors that the process has open.",
            fs::read_dir(format!("{proc}/fd"))
                .ok()
                .map(|dir| dir.count() as u64),
        ),
    ];
    for (name, help, value) in gauges {
        if let Some(value) = value {
            out.gauge(name, help, &labels, value);
        }
    }
    if let Some(seconds) = cpu_seconds(proc) {
        out.seconds(
            "understory_process_cpu_seconds_total",
            "Time that the process has spent on processors.",
            &labels,
            seconds,
        );
    }
}

/// User and system time.
#[expect(clippy::cast_precision_loss, reason = "seconds for people and graphs")]
fn cpu_seconds(proc: &str) -> Option<f64> {
    let stat = fs::read_to_string(format!("{proc}/stat")).ok()?;
    // The name in parentheses may hold anything; utime and stime are the 12th and 13th fields after it.
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace().skip(11);
    let user: u64 = fields.next()?.parse().ok()?;
    let system: u64 = fields.next()?.parse().ok()?;
    let ticks = rustix::param::clock_ticks_per_second().max(1);
    Some((user + system) as f64 / ticks as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_has_memory_threads_and_files() {
        let mut out = Snapshot::default();
        collect("/proc/self", "me", &mut out);
        for name in ["resident_bytes", "anonymous_bytes", "threads", "open_files"] {
            let name = format!("understory_process_{name}");
            assert!(out.total(&name, &[("process", "me")]) >= 1.0, "{name}");
        }
        assert!(cpu_seconds("/proc/self").unwrap() >= 0.0);
    }
}
