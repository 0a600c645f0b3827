//! `gc`: deletes paths that no root needs, and frees the space of content that no path needs.

use crate::context::Context;
use crate::error::{CommandError, Result};
use crate::progress::{Done, Progress};
use crate::{signals, ui};
use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::atomic::Ordering;
use understory::Store;
use understory::control::Client;
use understory::store::{
    CollectOptions, CollectReport, CollectStep, GcAction, GcReport, KeptPacks,
};
use understory_nix::StorePath;

/// Delete paths that no root needs, and free their space
///
/// First the paths go that no root reaches, then the content that no path needs: packs are written anew
/// without it. Reads, imports and mounts go on meanwhile. While `understory up` runs, it deletes the paths, at
/// a moment at which nothing in its overlay is open; if there is none, paths stay, and only content goes that no
/// path needs.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Only say what would be deleted
    #[arg(short = 'n', long)]
    dry_run: bool,
    /// Only say what is alive
    #[arg(long, conflicts_with = "dry_run")]
    print_live: bool,
    /// Stop after about this many bytes: of NARs for paths, on disk for content; K, M, G, T for powers of 1000
    #[arg(long, value_name = "BYTES", value_parser = parse_bytes)]
    max_freed: Option<u64>,
    /// Write packs anew in which at least so many percent are dead
    #[arg(long, value_name = "PERCENT", default_value_t = 5, value_parser = clap::value_parser!(u8).range(1..=100))]
    min_dead: u8,
}

pub(crate) fn run(args: &Args, cx: &Context) -> Result<()> {
    if args.print_live {
        let store = cx.open()?;
        let report = store.collect(&GcAction::ReturnLive)?;
        return show(cx, &store, &report, "found");
    }
    let store = if args.dry_run {
        cx.open()?
    } else {
        cx.open_to_write()?
    };
    let keepers = store.keepers()?;
    let freed_bytes_max = args.max_freed.unwrap_or(u64::MAX);
    let overlays = if args.dry_run {
        Vec::new()
    } else {
        overlays(cx)?
    };
    let paths = if args.dry_run {
        store.collect(&GcAction::ReturnDead)?
    } else if overlays.is_empty() {
        store.collect(&GcAction::DeleteDead { freed_bytes_max })?
    } else {
        collect_below(cx, &store, overlays, freed_bytes_max)?
    };
    let options = CollectOptions {
        dead_permille_min: u32::from(args.min_dead) * 10,
        freed_bytes_max: args.max_freed.unwrap_or(u64::MAX),
        dry_run: args.dry_run,
        ..CollectOptions::default()
    };
    let content = reclaim(
        cx,
        &store,
        &options,
        &without(args.dry_run, &paths),
        "freeing space",
    )?;
    if cx.json {
        let dir = store.store_dir();
        let names: Vec<_> = paths.paths.iter().map(|p| dir.print(p)).collect();
        return cx.ui.print_json(&serde_json::json!({
            "paths": names,
            "freedBytes": paths.freed_bytes,
            "keptBy": {
                "permanentRoots": keepers.permanent,
                "temporaryRoots": keepers.temporary,
                "overlays": keepers.overlays,
            },
            "content": content_json(&content),
        }));
    }
    show(
        cx,
        &store,
        &paths,
        if args.dry_run { "found" } else { "deleted" },
    )?;
    cx.ui.say(format_args!(
        "kept: what {} paths with roots, {} temporary roots and {} paths of overlays need",
        ui::count(keepers.permanent),
        ui::count(keepers.temporary),
        ui::count(keepers.overlays),
    ));
    say_content(cx, &content, args.dry_run);
    Ok(())
}

/// Has paths deleted by the instance that has its overlay on the store.
fn collect_below(
    cx: &Context,
    store: &Store,
    mut overlays: Vec<Overlay>,
    freed_bytes_max: u64,
) -> Result<GcReport> {
    let before = store.all_paths()?;
    let why = match &mut overlays[..] {
        [overlay] => match overlay.instance.collect(freed_bytes_max) {
            Ok(collected) => {
                let now: BTreeSet<StorePath> = store.all_paths()?.into_iter().collect();
                let gone = before.into_iter().filter(|path| !now.contains(path));
                return Ok(GcReport {
                    paths: gone.collect(),
                    freed_bytes: collected.freed_bytes,
                });
            }
            Err(error) => error.chain(),
        },
        _ => format!("{} instances run over this store", overlays.len()),
    };
    if let Some(Overlay { at, pid, .. }) = overlays.first() {
        cx.ui.warn(format_args!(
            "dead paths stay: an overlay is mounted over this store at {} by process {pid}, and {why}",
            at.display(),
        ));
        cx.ui.hint(
            "files of deleted paths would fail with \"stale file handle\": try again when nothing in it is in use, or run `understory down` first",
        );
    }
    Ok(GcReport::default())
}

/// What a dry run takes for deleted.
fn without(dry_run: bool, report: &GcReport) -> BTreeSet<StorePath> {
    if dry_run {
        report.paths.clone()
    } else {
        BTreeSet::new()
    }
}

/// Frees space, with progress; may be interrupted.
pub(crate) fn reclaim(
    cx: &Context,
    store: &Store,
    options: &CollectOptions,
    without: &BTreeSet<StorePath>,
    verb: &'static str,
) -> Result<CollectReport> {
    let cancel = signals::cancel_flag()?;
    let progress = Progress::new(&cx.ui, verb);
    let report = store.reclaim(options, without, &mut |step| {
        progress.update(match step {
            CollectStep::Marking { roots, .. } => Done {
                paths: (roots, 0),
                ..Done::default()
            },
            CollectStep::Waiting => Done::default(),
            CollectStep::Rewriting { done, total } => Done {
                bytes: (done, total),
                ..Done::default()
            },
        });
        if cancel.load(Ordering::Relaxed) {
            return Err(understory::Error::user("interrupted"));
        }
        Ok(())
    });
    progress.finish();
    Ok(report?)
}

/// A content report as `--json` has it.
pub(crate) fn content_json(report: &CollectReport) -> serde_json::Value {
    let kept = |kept: &KeptPacks| {
        serde_json::json!({
            "packs": kept.packs,
            "deadBytes": kept.dead_bytes,
            "processes": kept.processes,
        })
    };
    serde_json::json!({
        "roots": report.roots,
        "livePieces": report.live_pieces,
        "deadPieces": report.dead_pieces,
        "deadBytes": report.dead_bytes,
        "missingFiles": report.missing_pieces,
        "packsBefore": report.packs_before,
        "packsAfter": report.packs_after,
        "packsDeleted": report.packs_deleted,
        "packsWritten": report.packs_written,
        "freedPieces": report.freed_pieces,
        "copiedBytes": report.copied_bytes,
        "diskBytesBefore": report.disk_bytes_before,
        "diskBytesAfter": report.disk_bytes_after,
        "kept": {
            "belowThreshold": kept(&report.kept_below),
            "openForWriting": kept(&report.kept_open),
            "leased": kept(&report.kept_leased),
            "damaged": kept(&report.kept_damaged),
        },
    })
}

/// Says what a collection of content did.
pub(crate) fn say_content(cx: &Context, report: &CollectReport, dry_run: bool) {
    let (before, after) = (report.disk_bytes_before, report.disk_bytes_after);
    cx.ui.say(format_args!(
        "content: {} on disk {}, {} afterwards; {} of {} pieces {}; {} packs {}, {} written",
        ui::bytes(before),
        if dry_run { "now" } else { "before" },
        ui::bytes(after),
        ui::count(report.freed_pieces),
        ui::count(report.live_pieces + report.dead_pieces),
        if dry_run { "would go" } else { "gone" },
        ui::count(report.packs_deleted),
        if dry_run { "would go" } else { "deleted" },
        ui::count(report.packs_written),
    ));
    let kept = [
        (&report.kept_below, "too little is dead in them"),
        (&report.kept_open, "a writer appends to them"),
        (
            &report.kept_leased,
            "additions that are under way rely on them",
        ),
        (&report.kept_damaged, "something in them is damaged"),
    ];
    for (kept, why) in kept {
        if kept.dead_bytes > 0 {
            let mut processes = String::new();
            for process in &kept.processes {
                processes.push_str(&format!(", process {process}"));
            }
            cx.ui.say(format_args!(
                "kept: about {} of dead content in {} packs: {why}{processes}",
                ui::bytes(kept.dead_bytes),
                ui::count(kept.packs),
            ));
        }
    }
    if report.missing_pieces > 0 {
        cx.ui.warn(format_args!(
            "{} files are not whole",
            ui::count(report.missing_pieces)
        ));
        cx.ui.hint("`understory check` says which paths they hurt");
    }
}

/// Removing a name under an overlay makes its files fail with ESTALE.
pub(crate) fn refuse_while_mounted(cx: &Context) -> Result<()> {
    let Some(Overlay { at, pid, .. }) = overlays(cx)?.into_iter().next() else {
        return Ok(());
    };
    Err(CommandError::failed(format!(
        "an overlay is mounted over this store at {} by process {pid}",
        at.display(),
    ))
    .hint(
        "files of deleted paths would fail with \"stale file handle\": run `understory down` first",
    ))
}

/// An overlay over this store.
struct Overlay {
    at: PathBuf,
    /// Of the process that mounted it.
    pid: u32,
    instance: Client,
}

fn overlays(cx: &Context) -> Result<Vec<Overlay>> {
    let mut found = Vec::new();
    for mut instance in understory::up::instances(&cx.store_path()?)? {
        let status = instance.status()?;
        if let Some(at) = status.overlays.into_iter().next() {
            found.push(Overlay {
                at,
                pid: status.pid,
                instance,
            });
        }
    }
    Ok(found)
}

pub(crate) fn show(cx: &Context, store: &Store, report: &GcReport, verb: &str) -> Result<()> {
    let dir = store.store_dir();
    if cx.json {
        let paths: Vec<_> = report.paths.iter().map(|p| dir.print(p)).collect();
        return cx
            .ui
            .print_json(&serde_json::json!({"paths": paths, "freedBytes": report.freed_bytes}));
    }
    let mut out = String::new();
    for path in &report.paths {
        out.push_str(&dir.print(path));
        out.push('\n');
    }
    cx.ui.print(out)?;
    cx.ui.say(format_args!(
        "{} paths {verb}, {} of NARs",
        ui::count(report.paths.len() as u64),
        ui::bytes(report.freed_bytes)
    ));
    Ok(())
}

/// `10G`, `500M`, `256KiB`, `1234`.
pub(crate) fn parse_bytes(text: &str) -> Result<u64, String> {
    let split = text
        .find(|c: char| !c.is_ascii_digit())
        .unwrap_or(text.len());
    let (digits, unit) = text.split_at(split);
    let factor: u64 = match unit.to_ascii_uppercase().trim_end_matches('B') {
        "" => 1,
        "K" => 1_000,
        "M" => 1_000_000,
        "G" => 1_000_000_000,
        "T" => 1_000_000_000_000,
        "KI" => 1 << 10,
        "MI" => 1 << 20,
        "GI" => 1 << 30,
        "TI" => 1 << 40,
        _ => return Err(format!("unknown unit {unit:?}, expected K, M, G or T")),
    };
    let n: u64 = digits
        .parse()
        .map_err(|_| format!("expected a number of bytes, found {text:?}"))?;
    n.checked_mul(factor)
        .ok_or_else(|| format!("{text:?} is too large"))
}

#[cfg(test)]
mod tests {
    use super::parse_bytes;

    #[test]
    fn sizes() {
        assert_eq!(parse_bytes("12"), Ok(12));
        assert_eq!(parse_bytes("3G"), Ok(3_000_000_000));
        assert_eq!(parse_bytes("3gb"), Ok(3_000_000_000));
        assert_eq!(parse_bytes("256KiB"), Ok(262_144));
        assert_eq!(parse_bytes("4mi"), Ok(4_194_304));
        assert_eq!(
            parse_bytes("x"),
            Err("unknown unit \"x\", expected K, M, G or T".into())
        );
        assert_eq!(
            parse_bytes(""),
            Err("expected a number of bytes, found \"\"".into())
        );
        assert_eq!(
            parse_bytes("99999999T"),
            Err("\"99999999T\" is too large".into())
        );
    }
}
