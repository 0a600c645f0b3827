//! `down`: stops what `up` started and removes what it left.

use crate::commands::up::LayoutArgs;
use crate::context::Context;
use crate::error::{CommandError, Result};
use std::time::Duration;
use understory::config::Layout;
use understory::control::Client;
use understory::up;

/// How long a process that does not answer any more may take to end.
const ENDING: Duration = Duration::from_secs(2);

/// Stop what `up` started
///
/// Does nothing if nothing runs, except that dead mounts and stale sockets are removed.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    layout: LayoutArgs,
    /// Seconds to wait for the instance to end
    #[arg(long, value_name = "SECONDS", default_value_t = 30)]
    timeout: u64,
}

pub(crate) fn run(args: &Args, cx: &Context) -> Result<()> {
    let layout = cx.layout(&args.layout.options())?;
    let timeout = Duration::from_secs(args.timeout);
    let mut stopped = None;
    if let Some(mut client) = Client::connect(&layout.control())? {
        let pid = match client.status() {
            Ok(status) => status.pid,
            // It was ending by itself, or was killed: its socket outlives it by a moment.
            Err(_) if up::wait_unlocked(&layout, ENDING)? => return report(cx, &layout, None),
            Err(error) => return Err(error.into()),
        };
        if !client.stop(timeout)? || !up::wait_unlocked(&layout, timeout)? {
            return Err(CommandError::environment(format!(
                "the instance (process {pid}) did not end within {} s",
                args.timeout
            ))
            .hint(format!(
                "look at {}; end it with `kill -9 {pid}`, then run `down` again",
                layout.log().display()
            )));
        }
        stopped = Some(pid);
    }
    report(cx, &layout, stopped)
}

/// Removes what is left and says what was done.
fn report(cx: &Context, layout: &Layout, stopped: Option<u32>) -> Result<()> {
    let mended = up::mend(layout)?;
    if cx.json {
        return cx
            .ui
            .print_json(&serde_json::json!({"stopped": stopped, "mended": mended}));
    }
    for what in &mended {
        cx.ui.say(format_args!("removed {what}"));
    }
    match stopped {
        Some(pid) => cx.ui.say(format_args!("stopped process {pid}")),
        None => cx.ui.say("nothing was running"),
    }
    Ok(())
}
