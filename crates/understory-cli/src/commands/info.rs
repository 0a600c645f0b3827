//! `info`: what is known about store paths.

use crate::context::Context;
use crate::error::{CommandError, Result};
use crate::resolve;
use crate::ui::{self, Style};
use serde_json::{Value, json};
use std::ffi::OsString;
use std::fmt::Write;
use std::sync::Arc;
use understory::Store;
use understory::store::StoredPath;
use understory_castore::Node;

/// Show what is known about store paths
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Store paths, base names or hash parts
    #[arg(required_unless_present = "all", value_name = "PATH")]
    paths: Vec<OsString>,
    /// All valid paths
    #[arg(long, conflicts_with = "paths")]
    all: bool,
    /// Add the paths that they need
    #[arg(short, long)]
    recursive: bool,
    /// Only print the paths
    #[arg(long)]
    names: bool,
}

/// Rows fetched at a time with `--all`.
const BATCH: usize = 1_000;

pub(crate) fn run(args: &Args, cx: &Context) -> Result<()> {
    let store = cx.open()?;
    if args.all {
        return all(args, cx, &store);
    }
    let mut paths = resolve::paths(&store, &args.paths)?;
    if args.recursive {
        let roots: Vec<_> = paths.iter().map(|p| p.info.path.clone()).collect();
        paths = store.closure(&roots)?;
    }
    if cx.json {
        let list: Vec<Value> = paths.iter().map(|p| to_json(&store, p)).collect();
        return cx.ui.print_json(&list);
    }
    for path in &paths {
        cx.ui.print(text(args, cx, &store, path))?;
    }
    Ok(())
}

fn all(args: &Args, cx: &Context, store: &Store) -> Result<()> {
    let (mut after, mut first) = (0, true);
    if cx.json {
        cx.ui.print("[")?;
    }
    loop {
        let rows: Vec<Arc<StoredPath>> = store.list(after, BATCH)?;
        let Some(last) = rows.last() else { break };
        after = last.id;
        let mut out = String::new();
        for row in &rows {
            if cx.json {
                let item = serde_json::to_string(&to_json(store, row))
                    .map_err(|e| CommandError::failed(format!("writing JSON: {e}")))?;
                out.push_str(if first { "\n" } else { ",\n" });
                out.push_str(&item);
                first = false;
            } else {
                out.push_str(&text(args, cx, store, row));
            }
        }
        cx.ui.print(out)?;
    }
    if cx.json {
        cx.ui.print("\n]\n")
    } else {
        Ok(())
    }
}

fn to_json(store: &Store, path: &StoredPath) -> Value {
    let dir = store.store_dir();
    let info = &path.info;
    json!({
        "path": dir.print(&info.path),
        "narHash": info.nar_hash.to_hash().to_sri(),
        "narSize": info.nar_size,
        "references": info.references.iter().map(|r| dir.print(r)).collect::<Vec<_>>(),
        "deriver": info.deriver.as_ref().map(|d| dir.print(d)),
        "registrationTime": info.registration_time,
        "ultimate": info.ultimate,
        "signatures": info.signatures.iter().map(|s| s.as_str()).collect::<Vec<_>>(),
        "ca": info.ca.map(|ca| ca.to_string()),
        "root": node_json(&path.root),
    })
}

fn node_json(node: &Node) -> Value {
    match node {
        Node::Directory { digest, size } => {
            json!({"type": "directory", "digest": digest.to_string(), "size": size})
        }
        Node::File {
            digest,
            size,
            executable,
        } => {
            json!({"type": "regular", "digest": digest.to_string(), "size": size, "executable": executable})
        }
        Node::Symlink { target } => {
            json!({"type": "symlink", "target": String::from_utf8_lossy(target)})
        }
    }
}

fn text(args: &Args, cx: &Context, store: &Store, path: &StoredPath) -> String {
    let dir = store.store_dir();
    let info = &path.info;
    if args.names {
        return format!("{}\n", dir.print(&info.path));
    }
    let mut out = format!("{}\n", cx.ui.style(Style::Bold, &dir.print(&info.path)));
    let mut line = |name: &str, value: &str| {
        // Writing to a string cannot fail.
        let _ = writeln!(out, "  {name:<11} {value}");
    };
    line("NAR hash", &info.nar_hash.to_string());
    line(
        "NAR size",
        &format!(
            "{} ({} bytes)",
            ui::bytes(info.nar_size),
            ui::count(info.nar_size)
        ),
    );
    line(
        "content",
        &match &path.root {
            Node::Directory { digest, size } => {
                format!("directory {digest}, {} entries", ui::count(*size))
            }
            Node::File {
                digest, executable, ..
            } => {
                format!(
                    "{} {digest}",
                    if *executable {
                        "executable file"
                    } else {
                        "file"
                    }
                )
            }
            Node::Symlink { target } => format!("symlink to {}", String::from_utf8_lossy(target)),
        },
    );
    line("registered", &utc(info.registration_time));
    if let Some(deriver) = &info.deriver {
        line("deriver", &dir.print(deriver));
    }
    if let Some(ca) = &info.ca {
        line("address", &ca.to_string());
    }
    if info.ultimate {
        line("ultimate", "yes");
    }
    for signature in &info.signatures {
        line("signature", signature.as_str());
    }
    for reference in &info.references {
        line("reference", &dir.print(reference));
    }
    out
}

/// Unix seconds as `2026-11-22 14:55:24 UTC`.
fn utc(seconds: u64) -> String {
    let (days, rest) = (seconds / 86_400, seconds % 86_400);
    // Howard Hinnant's civil_from_days, for days since 1970.
    let z = days + 719_468;
    let (era, doe) = (z / 146_097, z % 146_097);
    let yoe = (doe - doe / 1460 + doe / 36_524 - doe / 146_096) / 365;
    let doy = doe - (365 * yoe + yoe / 4 - yoe / 100);
    let mp = (5 * doy + 2) / 153;
    let day = doy - (153 * mp + 2) / 5 + 1;
    let month = if mp < 10 { mp + 3 } else { mp - 9 };
    let year = yoe + era * 400 + u64::from(month <= 2);
    format!(
        "{year:04}-{month:02}-{day:02} {:02}:{:02}:{:02} UTC",
        rest / 3600,
        rest / 60 % 60,
        rest % 60
    )
}

#[cfg(test)]
mod tests {
    #[test]
    fn dates() {
        assert_eq!(super::utc(0), "1970-01-01 00:00:00 UTC");
        assert_eq!(super::utc(951_782_399), "2000-02-28 23:59:59 UTC");
        assert_eq!(super::utc(951_782_400), "2000-02-29 00:00:00 UTC");
        assert_eq!(super::utc(1_795_359_324), "2026-11-22 14:55:24 UTC");
    }
}
