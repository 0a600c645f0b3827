//! The index at a size that no test machine has content for: pieces in the castore's index, path infos in the database.
//!
//! Packs are made without their frames (`understory_castore::synthetic`): footers, merges, the opening and the lookups are
//! the real ones. Path infos are published by the store as an import does it. Both are filled by a process that
//! is this one; then they are opened again, and looked up in at random, in one thread.

use super::environment::{self, Work};
use super::report::{Aim, Report, Row, Unit};
use crate::error::{CommandError, Result};
use std::collections::BTreeSet;
use std::time::Instant;
use understory::{Store, StoreOptions};
use understory_castore::{Digest, TreeBuilder, synthetic};
use understory_nix::store_path::StorePathHash;
use understory_nix::{NarHash, PathInfo, StoreDir, StorePath, StorePathName};

/// How much.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Scale {
    /// Pieces in packs.
    pub(crate) pieces: u64,
    /// Path infos.
    pub(crate) paths: u64,
    /// Lookups of each kind.
    pub(crate) lookups: u64,
}

/// Paths of one publication, as an import's batch has them.
const BATCH: u64 = 2048;
/// Each path refers to so many that came before.
const REFERENCES: u64 = 2;
/// A stride that meets each number once, at random places of a sorted index.
const STRIDE: u64 = 7_919;

pub(crate) fn measure(work: &Work, scale: Scale, report: &mut Report) -> Result<()> {
    work.remove("index")?;
    let dir = work.path("index");
    Store::create(&dir, &StoreDir::default())?;
    report.condition(
        "index",
        format!(
            "{} pieces in packs without frames, {} path infos with {REFERENCES} references each; lookups at random, one thread",
            crate::ui::count(scale.pieces),
            crate::ui::count(scale.paths)
        ),
    );
    let mut rows = Rows(report);
    let filled = fill(&dir, scale, &mut rows)?;
    let disk = |name: &str| environment::disk_bytes(&dir.join(name));
    rows.bytes("merged indexes on disk", disk("castore/index")?);
    rows.bytes("footers and packs' headers on disk", disk("castore/packs")?);
    let database: u64 = ["db.sqlite", "db.sqlite-wal"]
        .iter()
        .filter_map(|name| std::fs::metadata(dir.join(name)).ok())
        .map(|metadata| metadata.len())
        .sum();
    rows.bytes("database on disk", database);
    rows.bytes("private memory while filling, at most", filled);

    let cold = environment::drop_caches();
    let start = Instant::now();
    let store = Store::open(&dir, &StoreOptions::default())?;
    let name = if cold { "open, cold" } else { "open" };
    rows.row(name, Unit::Seconds, seconds(start), Aim::Below(1.0));
    let before = memory("RssAnon:");
    let lookups = |wanted: bool, find: &dyn Fn(u64) -> Result<bool>| -> Result<f64> {
        let start = Instant::now();
        for number in 0..scale.lookups {
            if find(number)? != wanted {
                return Err(CommandError::environment(format!(
                    "lookup {number}: expected {wanted}"
                )));
            }
        }
        #[expect(clippy::cast_precision_loss, reason = "shown with three digits")]
        Ok(scale.lookups as f64 / seconds(start))
    };
    let castore = store.castore();
    let stored = |number: u64| digest(number.wrapping_mul(STRIDE) % scale.pieces);
    let hit = |number| Ok(synthetic::has(castore, &stored(number)));
    let miss = |number| Ok(synthetic::has(castore, &digest(u64::MAX - number)));
    let path = |number: u64| {
        let number = number.wrapping_mul(STRIDE) % scale.paths;
        Ok(store.path(&path(number)?)?.is_some())
    };
    let no_path = |number: u64| Ok(store.path(&self::path(u64::MAX - number)?)?.is_some());
    rows.rate("pieces found, first pass", lookups(true, &hit)?);
    rows.rate("pieces found, again", lookups(true, &hit)?);
    rows.rate("pieces missed", lookups(false, &miss)?);
    rows.rate("path infos found, first pass", lookups(true, &path)?);
    rows.rate("path infos found, again", lookups(true, &path)?);
    rows.rate("path infos missed", lookups(false, &no_path)?);
    rows.bytes(
        "private memory for it",
        memory("RssAnon:").saturating_sub(before),
    );
    rows.bytes("mapped pages in memory", memory("RssFile:"));
    drop(store);
    let start = Instant::now();
    Store::open(&dir, &StoreOptions::default())?;
    rows.row("open, warm", Unit::Seconds, seconds(start), Aim::Below(1.0));
    work.remove("index")
}

/// Fills both; returns the most private memory that was seen meanwhile.
fn fill(dir: &std::path::Path, scale: Scale, rows: &mut Rows<'_>) -> Result<u64> {
    let store = Store::open(dir, &StoreOptions::default())?;
    let mut most = 0;
    let start = Instant::now();
    let mut next = 0;
    while next < scale.pieces {
        let end = (next + synthetic::PIECES_MAX as u64).min(scale.pieces);
        let digests: Vec<Digest> = (next..end).map(digest).collect();
        synthetic::add_pack(store.castore(), &digests)?;
        most = most.max(memory("RssAnon:"));
        next = end;
    }
    #[expect(clippy::cast_precision_loss, reason = "shown with three digits")]
    let rate = |count: u64, start| count as f64 / seconds(start);
    rows.rate("pieces filled and merged", rate(scale.pieces, start));
    let mut tree = TreeBuilder::new(store.castore().writer()?);
    tree.file(None, false, 0)?.finish()?;
    let root = tree.finish()?;
    let start = Instant::now();
    let mut next = 0;
    while next < scale.paths {
        let end = (next + BATCH).min(scale.paths);
        let batch = (next..end)
            .map(|number| Ok((info(number)?, root.clone())))
            .collect::<Result<_>>()?;
        store.publish(batch)?;
        most = most.max(memory("RssAnon:"));
        next = end;
    }
    rows.rate("path infos published", rate(scale.paths, start));
    Ok(most)
}

fn digest(number: u64) -> Digest {
    Digest::of(&number.to_le_bytes())
}

fn path(number: u64) -> Result<StorePath> {
    let mut hash = [0; 20];
    hash.copy_from_slice(&digest(number).0[..20]);
    let name = StorePathName::new(&format!("package-{number}-1.0"))
        .map_err(|e| CommandError::environment(e.to_string()))?;
    Ok(StorePath::from_parts(StorePathHash(hash), &name))
}

fn info(number: u64) -> Result<PathInfo> {
    let references = (0..REFERENCES.min(number))
        .map(|at| path(number.wrapping_mul(STRIDE + at) % number))
        .collect::<Result<BTreeSet<_>>>()?;
    Ok(PathInfo {
        path: path(number)?,
        nar_hash: NarHash(digest(number).0),
        nar_size: 1000 + number,
        references,
        deriver: None,
        registration_time: 1_700_000_000,
        ultimate: false,
        signatures: BTreeSet::new(),
        ca: None,
    })
}

fn seconds(start: Instant) -> f64 {
    start.elapsed().as_secs_f64()
}

/// A figure of this process's status, in bytes.
fn memory(field: &str) -> u64 {
    let text = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    text.lines()
        .find_map(|line| line.strip_prefix(field))
        .and_then(|rest| rest.split_whitespace().next()?.parse::<u64>().ok())
        .map_or(0, |kib| kib * 1024)
}

struct Rows<'a>(&'a mut Report);

impl Rows<'_> {
    fn row(&mut self, name: &str, unit: Unit, here: f64, aim: Aim) {
        self.0.rows.push(Row {
            group: "index at scale",
            name: name.to_owned(),
            unit,
            here,
            peer: None,
            aim,
        });
    }
    fn rate(&mut self, name: &str, here: f64) {
        self.row(name, Unit::PerSecond, here, Aim::None);
    }
    #[expect(clippy::cast_precision_loss, reason = "shown with three digits")]
    fn bytes(&mut self, name: &str, bytes: u64) {
        self.row(name, Unit::Bytes, bytes as f64, Aim::None);
    }
}
