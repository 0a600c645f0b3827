//! `bench size`: stores that were written anew, denser, against `tar | zstd`; and what their reads cost, as a
//! ratio to the store as it was imported.
//!
//! Reads go through the castore, with its frame cache empty and the packs in the kernel's page cache: what differs
//! between the stores is what they decompress. The passes alternate between the stores, and the median counts.

use super::environment::{Work, disk_bytes, run, understory};
use super::import::Source;
use super::report::{Aim, Report, Row, Unit, median};
use super::sample::{LARGE_BYTES_MIN, Random, SMALL_BYTES_MAX, Scale};
use crate::error::{CommandError, Result};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};
use understory::{Store, StoreOptions};
use understory_castore::{Castore, Digest, Node, OpenOptions};

/// What one read of a sequence asks for: as the kernel does.
const READ_BYTES: usize = 128 << 10;
/// How often a process is looked at for its memory.
const LOOK_EVERY: Duration = Duration::from_millis(20);
/// Rows fetched at a time.
const ROWS: usize = 100;
/// The part of the apparent size that the smallest store is to take.
const AIM: Aim = Aim::Part(0.22);

/// How a store is written anew.
struct Variant {
    name: &'static str,
    arguments: &'static [&'static str],
    /// The level of the peer.
    level: u32,
    aim: Aim,
}

const VARIANTS: [Variant; 4] = [
    Variant {
        name: "repack --level 9",
        arguments: &["--level", "9"],
        level: 9,
        aim: Aim::Part(0.24),
    },
    Variant {
        name: "repack --dense",
        arguments: &["--dense"],
        level: 9,
        aim: AIM,
    },
    Variant {
        name: "repack --dense=4MiB",
        arguments: &["--dense=4MiB"],
        level: 9,
        aim: AIM,
    },
    Variant {
        name: "repack --dense=4MiB --level 12",
        arguments: &["--dense=4MiB", "--level", "12"],
        level: 12,
        aim: AIM,
    },
];

/// Measures from the store in `store`, which stays as it is.
pub(crate) fn measure(
    work: &Work,
    source: &Source,
    scale: Scale,
    report: &mut Report,
) -> Result<()> {
    let plain = work.path("store");
    let plan = Plan::new(&plain, scale)?;
    let mut archives = Archives {
        source,
        sizes: Vec::new(),
    };
    let row = |name: String, unit, here: f64, peer: Option<(&str, f64)>, aim| Row {
        group: "size on disk",
        name,
        unit,
        here,
        peer: peer.map(|(name, value)| (name.to_owned(), value)),
        aim,
    };
    let apparent = to_f64(source.bytes);
    let size = to_f64(disk_bytes(&plain)?);
    archives.compare("import", size, 3, report);
    for variant in &VARIANTS {
        let dir = work.path("repacked");
        work.remove("repacked")?;
        run(Command::new("cp").arg("-a").arg(&plain).arg(&dir))?;
        let (seconds, peak) = watched(understory(&dir)?.arg("repack").args(variant.arguments))?;
        let size = to_f64(disk_bytes(&dir)?);
        let name = variant.name;
        report.rows.push(row(
            format!("{name}, against apparent size"),
            Unit::Bytes,
            size,
            Some(("apparent size of all files", apparent)),
            variant.aim,
        ));
        archives.compare(name, size, variant.level, report);
        for (what, unit, value) in [
            ("takes", Unit::Seconds, seconds),
            ("peak memory", Unit::Bytes, to_f64(peak)),
        ] {
            let name = format!("{name}: {what}");
            report.rows.push(row(name, unit, value, None, Aim::None));
        }
        for pass in &PASSES {
            let (here, peer) = compare(pass, &dir, &plain, &plan, scale.rounds)?;
            report.rows.push(row(
                format!("{name}: {}", pass.name),
                pass.unit,
                here,
                Some(("as imported", peer)),
                Aim::None,
            ));
        }
    }
    report.missing.extend(archives.missing());
    work.remove("repacked")
}

#[expect(clippy::cast_precision_loss, reason = "shown with three digits")]
fn to_f64(number: u64) -> f64 {
    number as f64
}

/// Archives of the source, by level.
struct Archives<'a> {
    source: &'a Source,
    sizes: Vec<(u32, std::result::Result<f64, String>)>,
}

impl Archives<'_> {
    fn compare(&mut self, name: &str, size: f64, level: u32, report: &mut Report) {
        if let Some(archive) = self.size(level) {
            report.rows.push(Row {
                group: "size on disk",
                name: format!("{name}, against an archive"),
                unit: Unit::Bytes,
                here: size,
                peer: Some((format!("tar | zstd -{level}"), archive)),
                aim: Aim::None,
            });
        }
    }

    fn size(&mut self, level: u32) -> Option<f64> {
        let known = self.sizes.iter().position(|(known, _)| *known == level);
        let at = known.unwrap_or_else(|| {
            let size = self.make(level);
            self.sizes.push((level, size));
            self.sizes.len() - 1
        });
        self.sizes[at].1.as_ref().ok().copied()
    }

    fn make(&self, level: u32) -> std::result::Result<f64, String> {
        let script = "tar -C \"$1\" --exclude ./.links -cf - . | zstd -q -T0 \"-$2\" -c | wc -c";
        let output = run(Command::new("bash")
            .args(["-euo", "pipefail", "-c", script, "-"])
            .arg(self.source.objects())
            .arg(level.to_string()))
        .map_err(|error| format!("{}: {}", error.message, error.causes.join("; ")))?;
        let text = String::from_utf8_lossy(&output.stdout);
        text.trim()
            .parse()
            .map_err(|_| format!("expected a number of bytes, found {text:?}"))
    }

    fn missing(&self) -> Option<String> {
        let error = self
            .sizes
            .iter()
            .find_map(|(_, size)| size.as_ref().err())?;
        Some(format!("archives by tar and zstd: {error}"))
    }
}

/// Runs a command; returns the seconds it took and its peak of resident memory, in bytes.
fn watched(command: &mut Command) -> Result<(f64, u64)> {
    let program = command.get_program().to_string_lossy().into_owned();
    let start = Instant::now();
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .spawn()
        .map_err(|e| CommandError::io("starting", &program, &e))?;
    let mut peak = 0;
    loop {
        // It only grows, and the last look is at most one interval before the end.
        peak = peak_bytes(child.id()).unwrap_or(0).max(peak);
        let ended = child
            .try_wait()
            .map_err(|e| CommandError::io("waiting for", &program, &e))?;
        match ended {
            None => std::thread::sleep(LOOK_EVERY),
            Some(status) if status.success() => return Ok((start.elapsed().as_secs_f64(), peak)),
            Some(status) => {
                return Err(CommandError::environment(format!(
                    "{program} failed: {status}"
                )));
            }
        }
    }
}

fn peak_bytes(process: u32) -> Option<u64> {
    let status = std::fs::read_to_string(format!("/proc/{process}/status")).ok()?;
    let line = status.lines().find(|line| line.starts_with("VmHWM:"))?;
    Some(line.split_ascii_whitespace().nth(1)?.parse::<u64>().ok()? * 1024)
}

/// What is read: digest and size of each file.
#[derive(Default)]
struct Plan {
    /// Small files, path by path, as in an archive.
    by_path: Vec<(Digest, u64)>,
    /// Small files of all paths, in no order.
    shuffled: Vec<(Digest, u64)>,
    large: Vec<(Digest, u64)>,
    /// Places in large files.
    places: Vec<(usize, u64)>,
}

impl Plan {
    fn new(dir: &Path, scale: Scale) -> Result<Self> {
        let store = open(dir)?;
        let mut plan = Self::default();
        let mut roots = Vec::new();
        let mut after = 0;
        loop {
            let rows = store.list(after, ROWS)?;
            let Some(last) = rows.last() else { break };
            after = last.id;
            roots.extend(rows.iter().map(|row| row.root.clone()));
        }
        let mut random = Random::new();
        random.shuffle(&mut roots);
        for root in &roots {
            plan.add(store.castore(), root)?;
        }
        plan.shuffled.clone_from(&plan.by_path);
        random.shuffle(&mut plan.shuffled);
        plan.by_path.truncate(scale.small_files);
        plan.shuffled.truncate(scale.small_files);
        scale.choose(&mut plan.large, &mut random);
        plan.places = scale.pages(&plan.large, &mut random);
        Ok(plan)
    }

    fn add(&mut self, castore: &Castore, node: &Node) -> Result<()> {
        match node {
            Node::Symlink { .. } | Node::File { size: 0, .. } => {}
            Node::File { digest, size, .. } => {
                if *size <= SMALL_BYTES_MAX {
                    self.by_path.push((*digest, *size));
                } else if *size >= LARGE_BYTES_MIN {
                    self.large.push((*digest, *size));
                }
            }
            Node::Directory { digest, .. } => {
                for entry in castore.directory(digest)?.entries() {
                    self.add(castore, &entry.node)?;
                }
            }
        }
        Ok(())
    }
}

/// One way to read; returns how much it has done, in its unit.
struct Pass {
    name: &'static str,
    unit: Unit,
    run: fn(&Castore, &Plan) -> Result<u64>,
}

const PASSES: [Pass; 4] = [
    Pass {
        name: "small files, path by path",
        unit: Unit::PerSecond,
        run: |castore, plan| read_whole(castore, &plan.by_path).map(|_| plan.by_path.len() as u64),
    },
    Pass {
        name: "small files at random",
        unit: Unit::PerSecond,
        run: |castore, plan| {
            read_whole(castore, &plan.shuffled).map(|_| plan.shuffled.len() as u64)
        },
    },
    Pass {
        name: "read in sequence",
        unit: Unit::BytesPerSecond,
        run: |castore, plan| read_whole(castore, &plan.large),
    },
    Pass {
        name: "random 4 KiB",
        unit: Unit::PerSecond,
        run: |castore, plan| {
            let mut buffer = [0; 4096];
            for (file, offset) in &plan.places {
                let (digest, size) = &plan.large[*file];
                castore.blob(digest, *size)?.read_at(*offset, &mut buffer)?;
            }
            Ok(plan.places.len() as u64)
        },
    },
];

fn read_whole(castore: &Castore, files: &[(Digest, u64)]) -> Result<u64> {
    let mut buffer = vec![0; READ_BYTES];
    let mut sum = 0;
    for (digest, size) in files {
        let blob = castore.blob(digest, *size)?;
        let mut offset = 0;
        while offset < *size {
            offset += blob.read_at(offset, &mut buffer)? as u64;
        }
        sum += size;
    }
    Ok(sum)
}

fn open(dir: &Path) -> Result<Store> {
    let options = StoreOptions {
        castore: OpenOptions {
            read_only: true,
            ..OpenOptions::default()
        },
    };
    Ok(Store::open(dir, &options)?)
}

/// Rates of a pass in two stores: medians.
fn compare(
    pass: &Pass,
    here: &Path,
    peer: &Path,
    plan: &Plan,
    rounds: usize,
) -> Result<(f64, f64)> {
    let mut rates = [Vec::new(), Vec::new()];
    for dir in [here, peer] {
        // Into the page cache.
        run(Command::new("bash")
            .args(["-euc", "cat \"$1\"/castore/packs/* > /dev/null", "-"])
            .arg(dir))?;
    }
    for _ in 0..rounds {
        for (dir, rates) in [here, peer].into_iter().zip(&mut rates) {
            let store = open(dir)?;
            let start = Instant::now();
            let done = (pass.run)(store.castore(), plan)?;
            rates.push(to_f64(done) / start.elapsed().as_secs_f64());
        }
    }
    let [mut here, mut peer] = rates;
    Ok((median(&mut here), median(&mut peer)))
}
