//! Collection: half of a store is given up and collected while a reader compares every byte of the other half with
//! its source, through a mount.
//!
//! What should come free is measured, not computed: what the store takes before, less what a fresh store takes that
//! has only the surviving half.

use super::environment::{Server, Work, disk_bytes, run, understory};
use super::import::{self, Source};
use super::report::{Aim, Report, Row, Unit};
use crate::error::{CommandError, Result};
use std::collections::BTreeSet;
use std::fs::File;
use std::io::Read;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use understory::{Store, StoreOptions};
use understory_nix::StorePath;

/// How long a process that lives on may keep deleted packs open.
const CLOSED_WITHIN: Duration = Duration::from_secs(3);
/// Bytes compared at once.
const BUFFER_BYTES: usize = 256 << 10;

pub(crate) fn measure(work: &Work, source: &Source, report: &mut Report) -> Result<()> {
    let (dir, _) = import::import(work, source, "collected")?;
    let (kept, names) = give_up_half(&dir, work)?;
    let fresh = work.path("half");
    work.remove("half")?;
    run(understory(&fresh)?
        .arg("import")
        .arg(&source.root)
        .args(&kept))?;
    let castore = |store: &Path| disk_bytes(&store.join("castore"));
    let (before, alone) = (castore(&dir)?, castore(&fresh)?);
    work.remove("half")?;

    let mnt = work.make("mnt")?;
    let mut server = Server::start(
        understory(&dir)?.arg("mount").arg(&mnt),
        &work.path("mount.log"),
    )?;
    let first = names.first().cloned().unwrap_or_default();
    server.wait_for("the mount", || {
        std::fs::symlink_metadata(mnt.join(&first)).ok()
    })?;
    let done = AtomicBool::new(false);
    let (seconds, read) = std::thread::scope(|scope| -> Result<_> {
        let reader = scope.spawn(|| compare(&source.objects(), &mnt, &names, &done));
        let start = Instant::now();
        let collected = run(understory(&dir)?.arg("gc"));
        let seconds = start.elapsed().as_secs_f64();
        done.store(true, Ordering::Relaxed);
        let read = reader
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
        collected?;
        Ok((seconds, read))
    })?;
    // What the mount keeps open of deleted packs takes space that `du` does not see.
    let ended = Instant::now();
    let mut open = deleted_and_open(&server, &dir);
    while open > 0 && ended.elapsed() < CLOSED_WITHIN {
        std::thread::sleep(CLOSED_WITHIN / 100);
        open = deleted_and_open(&server, &dir);
    }
    let closed_after = ended.elapsed().as_secs_f64();
    server.stop()?;
    let after = castore(&dir)?;
    let should = before.saturating_sub(alone);
    let stays = (after + open).saturating_sub(alone);
    report.condition(
        "collection",
        format!(
            "{} of {} paths survive; the castore takes {} before, {} afterwards, and {} with nothing else in it; \
             {} of deleted packs held open by the mount {closed_after:.1} s later; the reader compared {} meanwhile, all equal",
            crate::ui::count(names.len() as u64),
            crate::ui::count(source.paths),
            crate::ui::bytes(before),
            crate::ui::bytes(after),
            crate::ui::bytes(alone),
            crate::ui::bytes(open),
            crate::ui::bytes(read),
        ),
    );
    #[expect(clippy::cast_precision_loss, reason = "shown with three digits")]
    let row = |name: &str, unit, here, peer: Option<(&str, u64)>, aim| Row {
        group: "collection",
        name: name.to_owned(),
        unit,
        here,
        peer: peer.map(|(name, value)| (name.to_owned(), value as f64)),
        aim,
    };
    #[expect(clippy::cast_precision_loss, reason = "shown with three digits")]
    report.rows.extend([
        row(
            "dead bytes that stay",
            Unit::Bytes,
            stays as f64,
            Some(("before, less a fresh store with that half", should)),
            Aim::Part(0.05),
        ),
        row("gc of half", Unit::Seconds, seconds, None, Aim::None),
    ]);
    work.remove("collected")
}

/// Roots closures until they have half of the bytes; returns the roots, and the names of all that they keep.
fn give_up_half(dir: &Path, work: &Work) -> Result<(Vec<String>, Vec<String>)> {
    let store = Store::open(dir, &StoreOptions::default())?;
    let mut rows = Vec::new();
    let mut after = 0;
    loop {
        let some = store.list(after, 1_000)?;
        let Some(last) = some.last() else { break };
        after = last.id;
        rows.extend(some);
    }
    let all: u64 = rows.iter().map(|row| row.info.nar_size).sum();
    // Hash parts are random: their order has nothing to do with when and with what a path came.
    rows.sort_by(|a, b| a.info.path.cmp(&b.info.path));
    let links = work.make("roots")?;
    let mut kept: BTreeSet<StorePath> = BTreeSet::new();
    let mut roots = Vec::new();
    let mut bytes = 0;
    for row in &rows {
        if bytes * 2 >= all {
            break;
        }
        if kept.contains(&row.info.path) {
            continue;
        }
        let mut open = vec![row.info.path.clone()];
        while let Some(path) = open.pop() {
            if let Some(row) = store.path(&path)?
                && kept.insert(path)
            {
                bytes += row.info.nar_size;
                open.extend(row.info.references.iter().cloned());
            }
        }
        store.add_perm_root(&row.info.path, &links.join(row.info.path.base_name()))?;
        roots.push(store.store_dir().print(&row.info.path));
    }
    let names = kept
        .iter()
        .map(|path| path.base_name().to_owned())
        .collect();
    Ok((roots, names))
}

/// Compares every file below `names` in two directories, again and again until `done`, and at least once; returns
/// the bytes.
fn compare(there: &Path, here: &Path, names: &[String], done: &AtomicBool) -> Result<u64> {
    let mut bytes = 0;
    let mut is_first = true;
    while is_first || !done.load(Ordering::Relaxed) {
        for name in names {
            if !is_first && done.load(Ordering::Relaxed) {
                break;
            }
            bytes += compare_trees(&there.join(name), &here.join(name))?;
        }
        is_first = false;
    }
    Ok(bytes)
}

fn compare_trees(there: &Path, here: &Path) -> Result<u64> {
    let reading =
        |path: &Path, error: &std::io::Error| CommandError::io("reading", path.display(), error);
    let kind = std::fs::symlink_metadata(there).map_err(|e| reading(there, &e))?;
    if kind.is_symlink() {
        let target = |path: &Path| std::fs::read_link(path).map_err(|e| reading(path, &e));
        return same(target(there)? == target(here)?, here, 0);
    }
    if kind.is_file() {
        return compare_files(there, here);
    }
    let list = |path: &Path| -> Result<Vec<std::ffi::OsString>> {
        let mut names = Vec::new();
        for entry in std::fs::read_dir(path).map_err(|e| reading(path, &e))? {
            names.push(entry.map_err(|e| reading(path, &e))?.file_name());
        }
        names.sort_by(|a, b| a.as_bytes().cmp(b.as_bytes()));
        Ok(names)
    };
    let names = list(there)?;
    same(names == list(here)?, here, 0)?;
    let mut bytes = 0;
    for name in names {
        bytes += compare_trees(&there.join(&name), &here.join(&name))?;
    }
    Ok(bytes)
}

fn compare_files(there: &Path, here: &Path) -> Result<u64> {
    let open =
        |path: &Path| File::open(path).map_err(|e| CommandError::io("opening", path.display(), &e));
    let (mut a, mut b) = (open(there)?, open(here)?);
    let (mut one, mut two) = (vec![0; BUFFER_BYTES], vec![0; BUFFER_BYTES]);
    let mut bytes = 0;
    loop {
        let fill = |file: &mut File, path: &Path, buffer: &mut [u8]| -> Result<usize> {
            let mut have = 0;
            while have < buffer.len() {
                match file.read(&mut buffer[have..]) {
                    Ok(0) => break,
                    Ok(count) => have += count,
                    Err(error) => return Err(CommandError::io("reading", path.display(), &error)),
                }
            }
            Ok(have)
        };
        let count = fill(&mut a, there, &mut one)?;
        let other = fill(&mut b, here, &mut two)?;
        same(one[..count] == two[..other], here, 0)?;
        bytes += count as u64;
        if count < BUFFER_BYTES {
            return Ok(bytes);
        }
    }
}

fn same(equal: bool, path: &Path, bytes: u64) -> Result<u64> {
    if equal {
        return Ok(bytes);
    }
    Err(CommandError::environment(format!(
        "{} differs from its source",
        path.display()
    )))
}

/// Bytes of deleted packs that a process keeps open.
fn deleted_and_open(server: &Server, store: &Path) -> u64 {
    let fds = format!("/proc/{}/fd", server.id());
    std::fs::read_dir(fds)
        .into_iter()
        .flatten()
        .filter_map(|fd| {
            let fd = fd.ok()?.path();
            let target = std::fs::read_link(&fd).ok()?;
            let is_deleted = target.as_os_str().as_bytes().ends_with(b" (deleted)");
            (is_deleted && target.starts_with(store))
                .then(|| std::fs::metadata(fd).map_or(0, |meta| meta.len()))
        })
        .sum()
}
