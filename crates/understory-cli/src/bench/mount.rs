//! The live mount under overlayfs against ext4 (or whatever the source lies on) under overlayfs.
//!
//! Both overlays are mounted at once, each on an empty upper directory; the passes alternate between them and
//! the median counts. Cold: the kernel's caches of pages, entries and inodes are dropped before each pass; our
//! server's own bounded caches are not. One thread reads.

use super::environment::{Server, Work, drop_caches, run, understory};
use super::import::{Source, import};
use super::report::{Aim, Report, Row, Unit, median};
use crate::error::{CommandError, Result};
use std::fs::File;
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

/// Files up to this size are small.
const SMALL_BYTES_MAX: u64 = 64 << 10;
/// Files from this size are read in sequence and at random.
const LARGE_BYTES_MIN: u64 = 1 << 20;
/// How much of the data a pass touches.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Scale {
    pub(crate) rounds: usize,
    pub(crate) small_files: usize,
    pub(crate) sequential_bytes: u64,
    pub(crate) random_reads: usize,
}

/// What is read, by names relative to the store directory.
struct Plan {
    small: Vec<PathBuf>,
    large: Vec<(PathBuf, u64)>,
    all: Vec<PathBuf>,
    random: Vec<(usize, u64)>,
}

impl Plan {
    fn new(source: &Source, scale: Scale) -> Result<Self> {
        let objects = source.objects();
        let mut plan = Self {
            small: Vec::new(),
            large: Vec::new(),
            all: Vec::new(),
            random: Vec::new(),
        };
        let mut dirs = vec![PathBuf::new()];
        while let Some(dir) = dirs.pop() {
            let full = objects.join(&dir);
            for entry in std::fs::read_dir(&full)
                .map_err(|e| CommandError::io("reading", full.display(), &e))?
            {
                let entry = entry.map_err(|e| CommandError::io("reading", full.display(), &e))?;
                let name = dir.join(entry.file_name());
                if name == Path::new(".links") {
                    continue;
                }
                let meta = entry
                    .metadata()
                    .map_err(|e| CommandError::io("reading", full.display(), &e))?;
                if meta.is_dir() {
                    dirs.push(name.clone());
                } else if meta.is_file() && meta.len() <= SMALL_BYTES_MAX {
                    plan.small.push(name.clone());
                } else if meta.is_file() && meta.len() >= LARGE_BYTES_MIN {
                    plan.large.push((name.clone(), meta.len()));
                }
                plan.all.push(name);
            }
        }
        let mut random = Random(0x9e37_79b9_7f4a_7c15);
        for list in [&mut plan.small, &mut plan.all] {
            list.sort();
            random.shuffle(list);
        }
        plan.large.sort();
        random.shuffle(&mut plan.large);
        plan.small.truncate(scale.small_files);
        let mut sum = 0;
        plan.large.retain(|(_, size)| {
            sum += size;
            sum - size < scale.sequential_bytes
        });
        if !plan.large.is_empty() {
            for _ in 0..scale.random_reads {
                let file = random.below(plan.large.len() as u64);
                let file = usize::try_from(file).unwrap_or_default();
                let pages = plan.large[file].1 / 4096;
                plan.random.push((file, random.below(pages.max(1)) * 4096));
            }
        }
        Ok(plan)
    }
}

/// One way to use a mount; returns how much it has done, in its unit.
type Pass = fn(&Path, &Plan) -> std::io::Result<u64>;

fn find(root: &Path, _: &Plan) -> std::io::Result<u64> {
    let mut seen = 0;
    let mut dirs = vec![root.to_owned()];
    while let Some(dir) = dirs.pop() {
        for entry in std::fs::read_dir(&dir)? {
            let entry = entry?;
            if dir == root && entry.file_name() == ".links" {
                continue;
            }
            seen += 1;
            if entry.file_type()?.is_dir() {
                dirs.push(entry.path());
            }
        }
    }
    Ok(seen)
}

fn stat(root: &Path, plan: &Plan) -> std::io::Result<u64> {
    for name in &plan.all {
        root.join(name).symlink_metadata()?;
    }
    Ok(plan.all.len() as u64)
}

fn small_files(root: &Path, plan: &Plan) -> std::io::Result<u64> {
    let mut buffer = Vec::new();
    for name in &plan.small {
        buffer.clear();
        File::open(root.join(name))?.read_to_end(&mut buffer)?;
    }
    Ok(plan.small.len() as u64)
}

fn sequential(root: &Path, plan: &Plan) -> std::io::Result<u64> {
    let mut buffer = vec![0; 1 << 20];
    let mut sum = 0;
    for (name, _) in &plan.large {
        let mut file = File::open(root.join(name))?;
        loop {
            let n = file.read(&mut buffer)?;
            if n == 0 {
                break;
            }
            sum += n as u64;
        }
    }
    Ok(sum)
}

fn random_4k(root: &Path, plan: &Plan) -> std::io::Result<u64> {
    let files = plan
        .large
        .iter()
        .map(|(name, _)| File::open(root.join(name)))
        .collect::<std::io::Result<Vec<_>>>()?;
    let mut buffer = [0; 4096];
    for (file, offset) in &plan.random {
        files[*file].read_exact_at(&mut buffer, *offset)?;
    }
    Ok(plan.random.len() as u64)
}

const PASSES: [(&str, Pass, Unit, Aim, Aim); 5] = [
    ("find", find, Unit::PerSecond, Aim::None, Aim::Ratio(1.0)),
    ("stat", stat, Unit::PerSecond, Aim::None, Aim::None),
    (
        "small files",
        small_files,
        Unit::PerSecond,
        Aim::None,
        Aim::Ratio(0.8),
    ),
    (
        "read in sequence",
        sequential,
        Unit::BytesPerSecond,
        Aim::Ratio(1.0),
        Aim::Ratio(0.9),
    ),
    (
        "random 4 KiB",
        random_4k,
        Unit::PerSecond,
        Aim::None,
        Aim::None,
    ),
];

/// `bench mount`. Must run in a mount namespace of its own.
pub(crate) fn measure(
    work: &Work,
    source: &Source,
    scale: Scale,
    report: &mut Report,
) -> Result<()> {
    let mut store = work.path("store");
    if !store.is_dir() {
        store = import(work, source, "store")?.0;
    }
    let plan = Plan::new(source, scale)?;
    let lower = work.make("lower")?;
    let socket = work.path("mount.sock");
    let mut server = Server::start(
        understory(&store)?
            .arg("serve")
            .arg("--socket")
            .arg(&socket)
            .arg("--mount")
            .arg(&lower),
        &work.path("mount.log"),
    )?;
    server.wait_for("the mount", || socket.exists().then_some(()))?;
    let here = overlay(work, &lower, "here")?;
    let peer = overlay(work, &source.objects(), "peer")?;

    for (name, pass, unit, cold_aim, warm_aim) in PASSES {
        let mut cold = (Vec::new(), Vec::new());
        let mut warm = (Vec::new(), Vec::new());
        for _ in 0..scale.rounds {
            for (dir, cold, warm) in [
                (&here, &mut cold.0, &mut warm.0),
                (&peer, &mut cold.1, &mut warm.1),
            ] {
                if drop_caches() {
                    cold.push(rate(name, pass, dir, &plan)?);
                } else {
                    rate(name, pass, dir, &plan)?;
                }
                // twice, as the first pass after dropping fills caches that are not only its own
                warm.push(rate(name, pass, dir, &plan)?.max(rate(name, pass, dir, &plan)?));
            }
        }
        for (state, (mut ours, mut theirs), aim) in
            [("cold", cold, cold_aim), ("warm", warm, warm_aim)]
        {
            if ours.is_empty() {
                report
                    .missing
                    .push(format!("{name}, cold: caches cannot be dropped here"));
                continue;
            }
            report.rows.push(Row {
                group: "mount under overlayfs",
                name: format!("{name}, {state}"),
                unit,
                here: median(&mut ours),
                peer: Some(("the source under overlayfs".into(), median(&mut theirs))),
                aim,
            });
        }
    }
    if let Some(resident) = server.resident_bytes() {
        #[expect(clippy::cast_precision_loss, reason = "shown with three digits")]
        let here = resident as f64;
        let name = "resident memory after it all".to_owned();
        report.rows.push(Row {
            group: "mount under overlayfs",
            name,
            unit: Unit::Bytes,
            here,
            peer: None,
            aim: Aim::None,
        });
    }
    for dir in [here, peer] {
        run(Command::new("umount").arg(&dir))?;
    }
    server.stop()
}

fn rate(name: &str, pass: Pass, dir: &Path, plan: &Plan) -> Result<f64> {
    let start = Instant::now();
    let done = pass(dir, plan).map_err(|e| CommandError::io(name, dir.display(), &e))?;
    #[expect(clippy::cast_precision_loss, reason = "shown with three digits")]
    let rate = done as f64 / start.elapsed().as_secs_f64();
    Ok(rate)
}

fn overlay(work: &Work, lower: &Path, name: &str) -> Result<PathBuf> {
    let upper = work.make(&format!("{name}-upper"))?;
    let workdir = work.make(&format!("{name}-work"))?;
    let merged = work.make(&format!("{name}-merged"))?;
    let options = format!(
        "lowerdir={},upperdir={},workdir={},index=off,metacopy=off,redirect_dir=off",
        lower.display(),
        upper.display(),
        workdir.display()
    );
    run(Command::new("mount")
        .args(["-t", "overlay", "overlay", "-o", &options])
        .arg(&merged))?;
    Ok(merged)
}

/// xorshift64*: the same reads in every run.
struct Random(u64);
impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }
    fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }
    fn shuffle<T>(&mut self, list: &mut [T]) {
        for i in (1..list.len()).rev() {
            let other = usize::try_from(self.below(i as u64 + 1)).unwrap_or_default();
            list.swap(i, other);
        }
    }
}
