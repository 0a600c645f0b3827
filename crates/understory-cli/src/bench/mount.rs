//! Live and image mount under overlayfs against ext4 (or whatever the source lies on) under overlayfs, and images of
//! `mkfs.erofs` likewise.
//!
//! All overlays are mounted at once, each on an empty upper directory; the passes alternate between them and
//! the median counts. Cold: the kernel's caches of pages, entries and inodes are dropped before each pass; our
//! server's own bounded caches are not. One thread reads.

mod compile;
mod peers;

use super::environment::{Server, Work, drop_caches, run, understory};
use super::import::{Source, import};
use super::report::{Aim, Report, Row, Unit, median};
use super::sample::{LARGE_BYTES_MIN, Random, SMALL_BYTES_MAX, Scale};
use crate::error::{CommandError, Result};
use compile::Compiler;
use peers::{Contestant, Kind, RAW_BYTES_MAX};
use std::ffi::OsStr;
use std::fs::File;
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Instant;

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
        let mut random = Random::new();
        for list in [&mut plan.small, &mut plan.all] {
            list.sort();
            random.shuffle(list);
        }
        plan.large.sort();
        scale.choose(&mut plan.large, &mut random);
        plan.small.truncate(scale.small_files);
        plan.random = scale.pages(&plan.large, &mut random);
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

/// What each pass does, what it counts, and the aims, cold and warm, of live and image mount.
struct Measured {
    name: &'static str,
    pass: Pass,
    unit: Unit,
    live: (Aim, Aim),
    image: (Aim, Aim),
}

const PASSES: [Measured; 5] = [
    Measured {
        name: "find",
        pass: find,
        unit: Unit::PerSecond,
        live: (Aim::None, Aim::Ratio(1.0)),
        image: (Aim::Ratio(3.0), Aim::Ratio(1.2)),
    },
    Measured {
        name: "stat",
        pass: stat,
        unit: Unit::PerSecond,
        live: (Aim::None, Aim::None),
        image: (Aim::Ratio(1.0), Aim::Ratio(1.0)),
    },
    Measured {
        name: "small files",
        pass: small_files,
        unit: Unit::PerSecond,
        live: (Aim::None, Aim::Ratio(0.8)),
        image: (Aim::Ratio(0.8), Aim::Ratio(0.95)),
    },
    Measured {
        name: "read in sequence",
        pass: sequential,
        unit: Unit::BytesPerSecond,
        live: (Aim::Ratio(1.0), Aim::Ratio(0.9)),
        image: (Aim::Ratio(1.3), Aim::Ratio(1.2)),
    },
    Measured {
        name: "random 4 KiB",
        pass: random_4k,
        unit: Unit::PerSecond,
        live: (Aim::None, Aim::None),
        image: (Aim::Ratio(0.5), Aim::None),
    },
];

/// The aim of random reads with the raw tier, cold.
const RAW_RANDOM_AIM: Aim = Aim::Ratio(0.8);
/// The aim of compilation: CPU time as a part of the peer's.
const COMPILE_AIM: Aim = Aim::Part(1.05);

/// `bench mount`. Must run in a mount namespace of its own.
pub(crate) fn measure(
    work: &Work,
    source: &Source,
    scale: Scale,
    mkfs: &OsStr,
    report: &mut Report,
) -> Result<()> {
    let mut store = work.path("store");
    if !store.is_dir() {
        store = import(work, source, "store")?.0;
    }
    let plan = Plan::new(source, scale)?;
    let compiler = Compiler::new(work, &store, report)?;
    let mut contestants = vec![Contestant::live(work, &store)?];
    match image_mounts(work, &store, &plan) {
        Ok(images) => contestants.extend(images),
        Err(error) => report.missing.push(format!(
            "the image mount: {}: {}",
            error.message,
            error.causes.join("; ")
        )),
    }
    for zstd in [false, true] {
        contestants.extend(Contestant::mkfs(work, source, mkfs, zstd, report)?);
    }
    let peer = Contestant::source(work, source)?;
    let rows_before = report.rows.len();
    for measured in &PASSES {
        compare(measured, &contestants, &peer, &plan, scale, report)?;
    }
    if let Some(compiler) = &compiler
        && let Err(error) = compile(work, compiler, &contestants, scale, report)
    {
        // This machine's headers may need others than were taken.
        let causes = error.causes.join("; ");
        report
            .missing
            .push(format!("compilation: {}: {causes}", error.message));
    }
    for contestant in &contestants {
        if let Some(resident) = contestant.server.as_ref().and_then(Server::resident_bytes) {
            #[expect(clippy::cast_precision_loss, reason = "shown with three digits")]
            let here = resident as f64;
            report.rows.push(Row {
                group: contestant.group,
                name: "resident memory after it all".to_owned(),
                unit: Unit::Bytes,
                here,
                peer: None,
                aim: Aim::None,
            });
        }
    }
    // One table each, in the order in which they came.
    let groups: Vec<&str> = contestants
        .iter()
        .map(|contestant| contestant.group)
        .collect();
    report.rows[rows_before..]
        .sort_by_key(|row| groups.iter().position(|group| *group == row.group));
    for contestant in contestants.into_iter().chain([peer]) {
        contestant.end()?;
    }
    Ok(())
}

/// The image mount without and with the raw tier, which has what the plan reads at random.
fn image_mounts(work: &Work, store: &Path, plan: &Plan) -> Result<Vec<Contestant>> {
    run(understory(store)?.args(["generation", "make"]))?;
    let mut images = vec![Contestant::image(work, store, false)?];
    let mut paths: Vec<&OsStr> = plan
        .large
        .iter()
        .filter_map(|(name, _)| name.iter().next())
        .collect();
    paths.sort_unstable();
    paths.dedup();
    if !paths.is_empty() {
        run(understory(store)?
            .args(["generation", "heat", "--size", RAW_BYTES_MAX])
            .args(paths))?;
        images.push(Contestant::image(work, store, true)?);
    }
    Ok(images)
}

/// Measures one pass on all of them, in turns.
fn compare(
    measured: &Measured,
    contestants: &[Contestant],
    peer: &Contestant,
    plan: &Plan,
    scale: Scale,
    report: &mut Report,
) -> Result<()> {
    let Measured { name, pass, .. } = *measured;
    let all: Vec<&Contestant> = contestants.iter().chain([peer]).collect();
    let mut rates = vec![(Vec::new(), Vec::new()); all.len()];
    for _ in 0..scale.rounds {
        for (contestant, (cold, warm)) in all.iter().zip(&mut rates) {
            let dir = &contestant.merged;
            if drop_caches() {
                cold.push(rate(name, pass, dir, plan)?);
            } else {
                rate(name, pass, dir, plan)?;
            }
            // twice, as the first pass after dropping fills caches that are not only its own
            warm.push(rate(name, pass, dir, plan)?.max(rate(name, pass, dir, plan)?));
        }
    }
    let Some((mut theirs, rates)) = rates.pop().map(|theirs| (theirs, rates)) else {
        return Ok(());
    };
    if theirs.0.is_empty() {
        let why = format!("{name}, cold: caches cannot be dropped here");
        report.missing.push(why);
    }
    for (contestant, mut ours) in contestants.iter().zip(rates) {
        let (cold, warm) = contestant.aims(measured);
        let states = [
            ("cold", &mut ours.0, &mut theirs.0, cold),
            ("warm", &mut ours.1, &mut theirs.1, warm),
        ];
        for (state, ours, theirs, aim) in states {
            if ours.is_empty() {
                continue;
            }
            report.rows.push(Row {
                group: contestant.group,
                name: format!("{name}, {state}"),
                unit: measured.unit,
                here: median(ours),
                peer: Some((peer.group.into(), median(theirs))),
                aim,
            });
        }
    }
    Ok(())
}

impl Contestant {
    /// The aims of a pass, cold and warm.
    fn aims(&self, measured: &Measured) -> (Aim, Aim) {
        match self.kind {
            Kind::Live => measured.live,
            Kind::Image => measured.image,
            Kind::RawImage if measured.name == "random 4 KiB" => (RAW_RANDOM_AIM, Aim::None),
            Kind::RawImage | Kind::Other => (Aim::None, Aim::None),
        }
    }
}

/// CPU time of a compiler in the live and the image mount, and in a directory.
fn compile(
    work: &Work,
    compiler: &Compiler,
    contestants: &[Contestant],
    scale: Scale,
    report: &mut Report,
) -> Result<()> {
    let peer = Contestant::directory(work, &compiler.dir, "compiler-peer")?;
    let ours: Vec<&Contestant> = contestants
        .iter()
        .filter(|contestant| matches!(contestant.kind, Kind::Live | Kind::Image))
        .collect();
    let mut seconds = vec![Vec::new(); ours.len() + 1];
    for _ in 0..scale.rounds {
        for (contestant, seconds) in ours.iter().copied().chain([&peer]).zip(&mut seconds) {
            // The first one fills the caches.
            compiler.seconds(&contestant.merged)?;
            seconds.push(compiler.seconds(&contestant.merged)?);
        }
    }
    let theirs = seconds.pop().map_or(0.0, |mut theirs| median(&mut theirs));
    for (contestant, mut ours) in ours.iter().zip(seconds) {
        report.rows.push(Row {
            group: contestant.group,
            name: "CPU time of compiling and starting programs".to_owned(),
            unit: Unit::Seconds,
            here: median(&mut ours),
            peer: Some((peer.group.into(), theirs)),
            aim: if matches!(contestant.kind, Kind::Image) {
                COMPILE_AIM
            } else {
                Aim::None
            },
        });
    }
    peer.end()
}

fn rate(name: &str, pass: Pass, dir: &Path, plan: &Plan) -> Result<f64> {
    let start = Instant::now();
    let done = pass(dir, plan).map_err(|e| CommandError::io(name, dir.display(), &e))?;
    #[expect(clippy::cast_precision_loss, reason = "shown with three digits")]
    let rate = done as f64 / start.elapsed().as_secs_f64();
    Ok(rate)
}
