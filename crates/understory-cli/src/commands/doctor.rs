//! `doctor`: what is wrong with this machine or store, and how to mend it.

use crate::commands::up::LayoutArgs;
use crate::context::Context;
use crate::env;
use crate::error::{Code, CommandError, Result};
use crate::settings::SettingsArgs;
use crate::ui::Style;
use std::process::{Command, Stdio};
use understory::doctor::{self, Level, Options};
use understory::{config::Layout, namespace};

/// Find what is wrong with this machine or store, and how to mend it
///
/// Changes nothing. Exits with 3 if something would keep `up` from working.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    layout: LayoutArgs,
    #[command(flatten)]
    settings: SettingsArgs,
    /// Internal: try an overlay mount on the upper directory in a namespace of this process
    #[arg(long, hide = true)]
    try_overlay: bool,
}

pub(crate) fn run(args: &Args, cx: &Context) -> Result<()> {
    let layout = cx.layout(&args.layout.options())?;
    if args.try_overlay {
        let user = !namespace::may_mount();
        if user {
            namespace::enter_user_namespace()?;
        } else {
            namespace::enter_mount_namespace()?;
        }
        return Ok(doctor::probe_overlay(
            &layout.upper,
            user || namespace::in_user_namespace(),
        )?);
    }
    let resolved = args.settings.load();
    let checks = doctor::examine(&Options {
        overlay_trial: trial(&layout),
        layout,
        settings: resolved,
        nix: env::program("nix"),
        fusermount: env::program("fusermount3"),
    });
    let failed = checks.iter().filter(|c| c.level == Level::Fail).count();
    if cx.json {
        cx.ui
            .print_json(&serde_json::json!({"ok": failed == 0, "checks": checks}))?;
    } else {
        let mut out = String::new();
        for check in &checks {
            let (style, word) = match check.level {
                Level::Ok => (Style::Good, "ok  "),
                Level::Warn => (Style::Warning, "warn"),
                Level::Fail => (Style::Error, "FAIL"),
            };
            out.push_str(&format!(
                "{}  {:<15} {}\n",
                cx.ui.style(style, word),
                check.id,
                check.found
            ));
            if let Some(mend) = &check.mend {
                out.push_str(&format!(
                    "      {:<15} {} {mend}\n",
                    "",
                    cx.ui.style(Style::Hint, "mend:")
                ));
            }
        }
        cx.ui.print(out)?;
    }
    match failed {
        0 => Ok(()),
        1 => Err(CommandError::new(Code::Environment, "1 check failed")),
        n => Err(CommandError::new(
            Code::Environment,
            format!("{n} checks failed"),
        )),
    }
}

/// Tries the overlay in a process of its own, because it needs a namespace. `None` if that process
/// cannot be made.
fn trial(layout: &Layout) -> Option<Result<(), String>> {
    let output = Command::new(std::env::current_exe().ok()?)
        .args(["--color", "never", "doctor", "--try-overlay", "--store"])
        .arg(&layout.store)
        .arg("--upper")
        .arg(&layout.upper)
        .stdin(Stdio::null())
        .output()
        .ok()?;
    if output.status.success() {
        return Some(Ok(()));
    }
    let text = String::from_utf8_lossy(&output.stderr);
    let mut lines = text.lines().filter(|line| !line.starts_with("hint:"));
    let first = lines
        .next()
        .unwrap_or("it was killed")
        .trim_start_matches("error: ")
        .to_owned();
    let causes: Vec<String> = lines
        .map(|l| l.trim().trim_start_matches("caused by: ").to_owned())
        .collect();
    Some(Err([vec![first], causes].concat().join(": ")))
}
