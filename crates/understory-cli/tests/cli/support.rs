//! What tests of running instances share: whether this machine lets us, where things show, waiting, workers.

use super::{Ran, Sandbox};
use rustix::fs::{Advice, fadvise};
use rustix::process::{Pid, Signal, kill_process};
use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};
use understory::supervisor::{Record, Role};

/// More than any of it takes on a busy machine.
pub(super) const LIMIT: Duration = Duration::from_secs(60);
/// Between two looks at what is waited for.
const LOOK_EVERY: Duration = Duration::from_millis(2);

/// True if this machine lets us mount as root; says why not otherwise.
pub(super) fn may_mount() -> bool {
    let may = understory::namespace::may_mount() && Path::new("/dev/fuse").exists();
    if !may {
        understory_testkit::skip("needs root, CAP_SYS_ADMIN and /dev/fuse");
    }
    may
}

/// The same for images.
pub(super) fn may_mount_images() -> bool {
    if !may_mount() {
        return false;
    }
    let types = fs::read_to_string("/proc/filesystems").unwrap_or_default();
    let may = types.contains("erofs");
    if !may {
        understory_testkit::skip("the kernel has no EROFS");
    }
    may
}

/// Ends what a failed test left.
pub(super) struct Down<'a>(pub(super) &'a Sandbox);
impl Drop for Down<'_> {
    fn drop(&mut self) {
        self.0.run(&["-q", "down"]);
    }
}

/// A process that is ended.
pub(super) struct Child(pub(super) std::process::Child);
impl Drop for Child {
    fn drop(&mut self) {
        // It may have ended.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Starts an instance in the background.
pub(super) fn up(sandbox: &Sandbox) -> Ran {
    up_with(sandbox, &[])
}

pub(super) fn up_with(sandbox: &Sandbox, arguments: &[&str]) -> Ran {
    let ran = sandbox.run(&[&["-q", "up", "--detach"], arguments].concat());
    assert_eq!(ran.code, 0, "{}{}", ran.stdout, ran.stderr);
    ran
}

/// Where the overlay of an instance shows a store path.
pub(super) fn shown(sandbox: &Sandbox, path: &str) -> PathBuf {
    sandbox.merged().join(base(path))
}

/// The name of a store path in the store directory.
pub(super) fn base(path: &str) -> &str {
    path.strip_prefix("/nix/store/").unwrap()
}

/// Waits until it is so; fails with what `otherwise` says.
pub(super) fn wait_until(mut is_so: impl FnMut() -> bool, otherwise: impl FnOnce() -> String) {
    let end = Instant::now() + LIMIT;
    while !is_so() {
        if Instant::now() >= end {
            panic!("{}", otherwise());
        }
        std::thread::sleep(LOOK_EVERY);
    }
}

/// What the supervisor says of itself.
pub(super) fn record(sandbox: &Sandbox) -> Option<Record> {
    let layout = understory::config::Layout::new(&sandbox.store(), &Default::default()).unwrap();
    Record::read(&layout).unwrap()
}

/// Waits for a worker of that role that serves and is not `other`.
pub(super) fn worker(sandbox: &Sandbox, role: Role, other: Option<u32>) -> u32 {
    let end = Instant::now() + LIMIT;
    loop {
        let record = record(sandbox);
        let found = record.as_ref().and_then(|record| record.worker(role));
        if let Some(worker) = found.filter(|worker| worker.ready && worker.pid != other)
            && let Some(pid) = worker.pid
        {
            return pid;
        }
        assert!(Instant::now() < end, "no other {role:?} worker: {record:?}");
        std::thread::sleep(LOOK_EVERY);
    }
}

pub(super) fn send(pid: u32, signal: Signal) {
    let pid = Pid::from_raw(pid.cast_signed()).unwrap();
    kill_process(pid, signal).unwrap();
}

/// Ends a worker and waits for the next one.
pub(super) fn replace(sandbox: &Sandbox, role: Role, signal: Signal) {
    let pid = worker(sandbox, role, None);
    send(pid, signal);
    worker(sandbox, role, Some(pid));
}

/// Waits until a process is gone.
pub(super) fn wait_for_end(pid: u32) {
    // A zombie has no namespaces.
    let namespace = PathBuf::from(format!("/proc/{pid}/ns/mnt"));
    wait_until(|| !namespace.exists(), || format!("process {pid} stays"));
}

/// Reads `file` over and over, its pages dropped each time, while `during` runs; returns the number of reads.
/// Collects until paths are deleted; returns the report. A mount namespace of another test may have a copy of the overlay.
pub(super) fn collect(sandbox: &Sandbox, arguments: &[&str]) -> serde_json::Value {
    let mut report = serde_json::Value::Null;
    wait_until(
        || {
            report = sandbox.json(&[&["gc"], arguments].concat());
            report["paths"] != serde_json::json!([])
        },
        || "nothing is deleted".to_owned(),
    );
    report
}

pub(super) fn read_while(file: &Path, expected: &str, during: impl FnOnce(&AtomicU64)) -> u64 {
    let (stop, reads) = (AtomicBool::new(false), AtomicU64::new(0));
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                while !stop.load(Ordering::SeqCst) {
                    read_from_server(file, expected).unwrap();
                    reads.fetch_add(1, Ordering::SeqCst);
                }
            });
        }
        let _stop = Stop(&stop);
        during(&reads);
    });
    reads.into_inner()
}

/// Says that it is over, also when a test fails.
pub(super) struct Stop<'a>(pub(super) &'a AtomicBool);
impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

/// Reads a file and compares it, then drops its pages so that the next time the server is asked again.
pub(super) fn read_from_server(file: &Path, expected: &str) -> std::io::Result<()> {
    let mut open = File::open(file)?;
    let mut text = String::new();
    open.read_to_string(&mut text)?;
    assert!(text == expected, "{} differs", file.display());
    fadvise(&open, 0, None, Advice::DontNeed)?;
    Ok(())
}

/// Waits for more of what is counted while files are read.
pub(super) fn wait_for_more(reads: &AtomicU64) {
    let before = reads.load(Ordering::SeqCst);
    wait_until(
        || reads.load(Ordering::SeqCst) >= before + 3,
        || "nothing is read".to_owned(),
    );
}
