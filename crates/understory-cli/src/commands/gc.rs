//! `gc`: deletes paths that no root needs.

use crate::context::Context;
use crate::error::{CommandError, Result};
use crate::ui;
use understory::Store;
use understory::store::{GcAction, GcReport};

/// Delete paths that no root needs
///
/// Path infos go at once. The space of their content is reclaimed by a later version.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Only say what would be deleted
    #[arg(short = 'n', long)]
    dry_run: bool,
    /// Only say what is alive
    #[arg(long, conflicts_with = "dry_run")]
    print_live: bool,
    /// Stop after about this many NAR bytes; K, M, G, T for powers of 1000
    #[arg(long, value_name = "BYTES", value_parser = parse_bytes)]
    max_freed: Option<u64>,
}

pub(crate) fn run(args: &Args, cx: &Context) -> Result<()> {
    let action = match args {
        Args {
            print_live: true, ..
        } => GcAction::ReturnLive,
        Args { dry_run: true, .. } => GcAction::ReturnDead,
        _ => GcAction::DeleteDead {
            freed_bytes_max: args.max_freed.unwrap_or(u64::MAX),
        },
    };
    let deletes = matches!(action, GcAction::DeleteDead { .. });
    let store = if deletes {
        cx.open_to_write()?
    } else {
        cx.open()?
    };
    if deletes {
        refuse_while_mounted(cx)?;
    }
    let report = store.collect(&action)?;
    show(
        cx,
        &store,
        &report,
        if deletes { "deleted" } else { "found" },
    )
}

/// Removing a name under an overlay makes its files fail with ESTALE.
pub(crate) fn refuse_while_mounted(cx: &Context) -> Result<()> {
    let mut overlay = None;
    for mut client in understory::up::instances(&cx.store_path()?)? {
        let status = client.status()?;
        overlay = status
            .overlays
            .first()
            .map(|at| (at.clone(), status.pid))
            .or(overlay);
    }
    let Some((at, pid)) = overlay else {
        return Ok(());
    };
    Err(CommandError::failed(format!(
        "an overlay is mounted over this store at {} by process {}",
        at.display(),
        pid
    ))
    .hint(
        "files of deleted paths would fail with \"stale file handle\": run `understory down` first",
    ))
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

/// `10G`, `500M`, `1234`.
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
