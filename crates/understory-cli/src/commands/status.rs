//! `status`: what runs.

use crate::commands::up::LayoutArgs;
use crate::context::Context;
use crate::error::{Code, CommandError, Result};
use crate::ui::{self, Style};
use understory::control::{Client, Status};
use understory::generation::stack::Standing;
use understory::store::{Store, StoreOptions};
use understory::supervisor::{Record, WorkerRecord};
use understory::up;

/// Say what runs
///
/// Exits with 0 if an instance runs and answers, else with 3.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    layout: LayoutArgs,
}

pub(crate) fn run(args: &Args, cx: &Context) -> Result<()> {
    let layout = cx.layout(&args.layout.options())?;
    let status = match Client::connect(&layout.control())? {
        Some(mut client) => Some(client.status()?),
        None => None,
    };
    let record = Record::read(&layout)?;
    let standing = status.as_ref().and_then(|_| Standing::read(&layout));
    let socket = status
        .as_ref()
        .map(|s| up::ping(&s.socket).map_err(|e| e.chain()));
    let overlay = status
        .as_ref()
        .and_then(|s| s.overlay_socket.as_deref())
        .map(|socket| up::ping(socket).map_err(|e| e.chain()));
    let stats = match &status {
        Some(status) => {
            let mut options = StoreOptions::default();
            options.castore.read_only = true;
            Some(Store::open(&status.store, &options)?.stats()?)
        }
        None => None,
    };
    if cx.json {
        let mut value = serde_json::json!({
            "running": status.is_some(),
            "store": layout.store,
            "state": layout.state,
        });
        if let Some(map) = value.as_object_mut() {
            if let Some(status) = &status {
                map.insert("url".into(), status.url.clone().into());
                map.insert("nixRemote".into(), status.nix_remote.clone().into());
                let text = serde_json::to_value(status)
                    .map_err(|e| CommandError::failed(e.to_string()))?;
                map.insert("instance".into(), text);
            }
            if let Some(record) = &record {
                let record = serde_json::to_value(record)
                    .map_err(|e| CommandError::failed(e.to_string()))?;
                map.insert("supervisor".into(), record);
            }
            if let Some(socket) = &socket {
                map.insert("socketAnswers".into(), socket.is_ok().into());
            }
            if let Some(overlay) = &overlay {
                map.insert("overlaySocketAnswers".into(), overlay.is_ok().into());
            }
            if let Some(standing) = &standing {
                map.insert("standing".into(), serde_json::json!(standing));
            }
            if let Some(stats) = &stats {
                map.insert("paths".into(), stats.paths.into());
                map.insert("narBytes".into(), stats.nar_bytes.into());
                map.insert(
                    "diskBytes".into(),
                    (stats.castore.disk_bytes + stats.database_bytes).into(),
                );
            }
        }
        cx.ui.print_json(&value)?;
    } else if let (Some(status), Some(stats), Some(socket)) = (&status, &stats, &socket) {
        cx.ui.print(text(
            cx,
            status,
            stats,
            socket,
            overlay.as_ref(),
            record.as_ref(),
            standing.as_ref(),
        ))?;
    }
    match (status, socket) {
        (None, _) => Err(CommandError::environment(format!(
            "no instance runs for {}",
            layout.state.display()
        ))
        .hint("start one with `understory up`")),
        (_, Some(Err(reason))) => Err(CommandError::new(
            Code::Environment,
            format!("the daemon does not answer: {reason}"),
        )
        .hint("run `understory doctor`")),
        _ => match overlay {
            Some(Err(reason)) => Err(CommandError::new(
                Code::Environment,
                format!("the overlay store does not answer: {reason}"),
            )
            .hint("run `understory doctor`")),
            _ => Ok(()),
        },
    }
}

/// `process 7, restarted 2 times, at last after signal 9`.
fn describe(worker: &WorkerRecord) -> String {
    let mut out = match (worker.pid, worker.ready) {
        (Some(pid), true) => format!("process {pid}"),
        (Some(pid), false) => format!("process {pid}, starting"),
        (None, _) => "waits to be started again".into(),
    };
    if worker.restarts > 0 {
        out.push_str(&format!(", restarted {} times", worker.restarts));
    }
    if let Some(end) = &worker.last_end {
        out.push_str(&format!(", at last after {end}"));
    }
    out
}

fn text(
    cx: &Context,
    status: &Status,
    stats: &understory::store::StoreStats,
    socket: &Result<(), String>,
    overlay: Option<&Result<(), String>>,
    record: Option<&Record>,
    standing: Option<&Standing>,
) -> String {
    let mut out = String::new();
    let mut line = |name: &str, value: String| out.push_str(&format!("{name:<9} {value}\n"));
    let state = cx.ui.style(Style::Good, "running");
    line(
        "instance",
        format!(
            "{state}, process {}, version {}",
            status.pid, status.version
        ),
    );
    for worker in record.iter().flat_map(|record| &record.workers) {
        line(worker.role.name(), describe(worker));
    }
    if record.is_some_and(|record| record.resend == Some(false)) {
        let what = "this kernel cannot resend: reads that are under way fail when a mount server is replaced (Linux 6.9 can)";
        line("restarts", what.into());
    }
    let disk = stats.castore.disk_bytes + stats.database_bytes;
    line(
        "store",
        format!(
            "{}: {} paths, {} of NARs in {} on disk",
            status.store.display(),
            ui::count(stats.paths),
            ui::bytes(stats.nar_bytes),
            ui::bytes(disk)
        ),
    );
    let private = if status.private {
        " (in a namespace of its own; see `understory shell`)"
    } else {
        ""
    };
    line("lower", format!("{}{private}", status.lower.display()));
    if let Some(standing) = standing {
        line("on", standing.describe());
    }
    for overlay in &status.overlays {
        line("merged", format!("{}{private}", overlay.display()));
    }
    if let Some(upper) = &status.upper {
        line("upper", upper.display().to_string());
    }
    let answers = if socket.is_ok() {
        "answers"
    } else {
        "does not answer"
    };
    line("socket", format!("{} ({answers})", status.socket.display()));
    if let Some(overlay) = overlay {
        let answers = if overlay.is_ok() {
            "answers"
        } else {
            "does not answer"
        };
        let at = status
            .overlay_socket
            .as_deref()
            .unwrap_or(std::path::Path::new("-"));
        line("overlay", format!("{} ({answers})", at.display()));
    }
    for lower in status.lowers.iter().skip(1) {
        line("below", lower.clone());
    }
    if let Some(remote) = &status.nix_remote {
        line("remote", remote.clone());
    }
    if let Some(url) = &status.url {
        line("url", url.clone());
    }
    if let Some(metrics) = &status.metrics {
        line("metrics", metrics.clone());
    }
    line(
        "told of",
        format!(
            "{} new paths, {} remounts",
            ui::count(status.published),
            ui::count(status.remounts)
        ),
    );
    out
}
