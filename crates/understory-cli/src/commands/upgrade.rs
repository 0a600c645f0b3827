//! `upgrade`: lets a running instance go on with this program.

use crate::commands::up::LayoutArgs;
use crate::context::Context;
use crate::error::{CommandError, Result};
use std::path::PathBuf;
use std::time::{Duration, Instant};
use understory::config::Layout;
use understory::control::Client;
use understory::supervisor::{Phase, Record};

/// Between two looks at how far it is.
const POLL: Duration = Duration::from_millis(20);

/// Let the running instance go on with this program
///
/// The processes that serve are replaced by those of the program that this command belongs to, or of another one.
/// Nothing is unmounted: readers wait for some milliseconds. Clients that are connected are served by the old process
/// until they go; new ones get the new one. Settings are read again. The process that supervises stays as it is. If the
/// new program does not serve, the old one goes on.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    layout: LayoutArgs,
    /// Go on with this program [default: the one that this command belongs to]
    #[arg(long, value_name = "PROGRAM")]
    to: Option<PathBuf>,
    /// Seconds to wait for the new processes
    #[arg(long, value_name = "SECONDS", default_value_t = 60)]
    timeout: u64,
}

pub(crate) fn run(args: &Args, cx: &Context) -> Result<()> {
    let layout = cx.layout(&args.layout.options())?;
    let nothing_runs = || {
        CommandError::environment(format!("no instance runs for {}", layout.state.display()))
            .hint("start one with `understory up`")
    };
    let mut client = Client::connect(&layout.control())?.ok_or_else(nothing_runs)?;
    let before = Record::read(&layout)?.ok_or_else(|| {
        CommandError::failed("the running instance does without a supervisor")
            .hint("restart it with `understory down` and `understory up`")
    })?;
    let program = match &args.to {
        Some(program) => std::fs::canonicalize(program)
            .map_err(|e| CommandError::io("finding", program.display(), &e))?,
        None => {
            std::env::current_exe().map_err(|e| CommandError::io("finding", "this program", &e))?
        }
    };
    client.upgrade(Some(program))?;
    let after = wait(&layout, &before, Duration::from_secs(args.timeout))?;
    if cx.json {
        let record =
            serde_json::to_value(&after).map_err(|e| CommandError::failed(e.to_string()))?;
        return cx.ui.print_json(&record);
    }
    let draining = match after.draining.len() {
        0 => String::new(),
        _ => "; the old one still serves its clients".to_owned(),
    };
    let which = match &args.to {
        Some(program) => program.display().to_string(),
        None => "this program".into(),
    };
    cx.ui
        .say(format_args!("the instance goes on with {which}{draining}"));
    Ok(())
}

/// Waits until all new processes serve.
fn wait(layout: &Layout, before: &Record, timeout: Duration) -> Result<Record> {
    let end = Instant::now() + timeout;
    loop {
        let now = Record::read(layout)?
            .ok_or_else(|| CommandError::environment("the instance has ended meanwhile"))?;
        let replaced = now.workers.iter().all(|worker| {
            let old = before.worker(worker.role).and_then(|old| old.pid);
            worker.ready && worker.pid != old
        });
        if now.upgrades > before.upgrades && now.phase == Phase::Running && replaced {
            return match &now.failed_upgrade {
                Some(why) => Err(CommandError::environment(format!(
                    "the new program does not serve: {why}"
                ))
                .hint("the instance goes on with the program that it was started with")),
                None => Ok(now),
            };
        }
        if Instant::now() >= end {
            return Err(CommandError::environment(format!(
                "the new processes do not serve after {} s",
                timeout.as_secs()
            ))
            .hint(format!("look at {}", layout.log().display())));
        }
        std::thread::sleep(POLL);
    }
}
