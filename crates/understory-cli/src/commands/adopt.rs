//! `adopt`: gives an existing Nix store a castore underneath, and takes it away again.

use crate::context::Context;
use crate::error::{Code, CommandError, Result};
use crate::progress::{Done, Progress as Bar};
use crate::settings::MaskArgs;
use crate::ui::{self, Style, Ui};
use crate::{env, signals};
use std::io::{IsTerminal, Write};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;
use understory::adopt::{Adoption, Control, Examination, Options, Progress, Starter, Step};
use understory::config::Layout;
use understory::control::Client;
use understory::overlay_url::OverlayUrl;
use understory::{Error, Store, StoreOptions, up};

/// How long the instance may take to end.
const STOPPING: Duration = Duration::from_secs(60);

/// Give an existing Nix store a castore underneath, in place
///
/// Says first what is there and about what it would take. Then imports all paths, verifies them, and mounts the
/// overlay over the store directory, which stays as it was underneath: nothing is deleted before `--reclaim`, and
/// Nix's database stays the one it is. Can be interrupted at any time: the same command goes on, `--undo` goes
/// back. After a restart of the machine the same command brings the overlay back.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Directory that holds nix/store and nix/var/nix
    #[arg(default_value = "/", value_name = "ROOT")]
    root: PathBuf,
    /// Only say what is there, what it would take and what stands in the way
    #[arg(short = 'n', long, visible_alias = "report", conflicts_with_all = ["undo", "reclaim"])]
    dry_run: bool,
    /// Do not ask
    #[arg(short, long)]
    yes: bool,
    /// Delete the originals of paths that the castore has: this is what frees space
    #[arg(long, visible_alias = "delete-original", conflicts_with = "undo")]
    reclaim: bool,
    /// Give the store its own files back and unmount the overlay
    #[arg(long)]
    undo: bool,
    /// Do all but start the instance that mounts the overlay: a service does that
    #[arg(long, conflicts_with_all = ["undo", "reclaim"])]
    no_start: bool,
    /// Read every path through the overlay to verify it, not only a sample
    #[arg(long)]
    verify_all: bool,
    /// How long to wait for Nix processes that use the store
    #[arg(long, value_name = "SECONDS", default_value_t = 5)]
    wait: u64,
    /// Threads that read [default: all cores]
    #[arg(
        short,
        long,
        value_name = "N",
        default_value_t = 0,
        hide_default_value = true
    )]
    jobs: usize,
    /// zstd level, 1 to 19
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(i32).range(1..=19))]
    compression: i32,
    #[command(flatten)]
    mask: MaskArgs,
    /// Directory for sockets, mounts and the upper layer [default: the castore's directory]
    #[arg(long, value_name = "DIR")]
    state: Option<PathBuf>,
    /// The overlay's upper directory: what Nix adds on top [default: STATE/upper]
    #[arg(long, value_name = "DIR")]
    upper: Option<PathBuf>,
    /// The overlay's work directory, on the file system of the upper one [default: STATE/work]
    #[arg(long, value_name = "DIR")]
    work: Option<PathBuf>,
}

pub(crate) fn run(args: &Args, cx: &Context) -> Result<()> {
    let mut store_options = StoreOptions::default();
    store_options.castore.compression_level = args.compression;
    args.mask.apply(&mut store_options);
    store_options.castore.compress_threads = args.jobs;
    let adoption = Adoption::new(Options {
        root: args.root.clone(),
        store: cx.store_path()?,
        state: args.state.clone(),
        upper: args.upper.clone(),
        work: args.work.clone(),
        store_options,
        jobs: args.jobs,
        verify_all: args.verify_all,
        wait: Duration::from_secs(args.wait),
    })?;
    let cancel = signals::cancel_flag()?;
    let bars = Bars::new(&cx.ui);
    let tell = |progress: Progress| bars.tell(progress);
    let control = Control {
        progress: &tell,
        cancel: &cancel,
    };
    let done = if args.undo {
        undo(args, cx, &adoption, &control, &bars)
    } else if args.reclaim {
        reclaim(args, cx, &adoption, &control, &bars)
    } else {
        adopt(args, cx, &adoption, &control, &bars)
    };
    bars.finish();
    done.map_err(|error| end(error, &cancel))
}

fn end(mut error: CommandError, cancel: &AtomicBool) -> CommandError {
    if cancel.load(Ordering::Relaxed) {
        error.code = Code::Interrupted as u8;
    }
    error
}

fn adopt(
    args: &Args,
    cx: &Context,
    adoption: &Adoption,
    control: &Control<'_>,
    bars: &Bars,
) -> Result<()> {
    let state = adoption.state()?;
    let is_new = state.as_ref().is_none_or(|state| !state.phase.is_needed());
    let seen = if is_new || args.dry_run {
        let seen = adoption.examine(is_new, control)?;
        bars.finish();
        Some(seen)
    } else {
        None
    };
    if let Some(seen) = &seen {
        if args.dry_run && cx.json {
            return cx.ui.print_json(seen);
        }
        let text = table(&cx.ui, seen);
        if args.dry_run {
            cx.ui.print(text)?;
        } else {
            cx.ui.say(text.trim_end());
        }
        for obstacle in &seen.obstacles {
            cx.ui.warn(&obstacle.message);
            if let Some(hint) = &obstacle.hint {
                cx.ui.hint(hint);
            }
        }
        if args.dry_run {
            return Ok(());
        }
        confirm(args, cx, "Adopt this store?")?;
    }
    let starter = Starter {
        start: &start,
        stop: &stop,
    };
    let done = adoption.adopt((!args.no_start).then_some(starter), control)?;
    bars.finish();
    let layout = adoption.layout();
    let mut read_only = StoreOptions::default();
    read_only.castore.read_only = true;
    let store_dir = Store::open(&layout.store, &read_only)?.store_dir().clone();
    let url = OverlayUrl::of(layout, &store_dir)?;
    for path in &done.missing {
        cx.ui.warn(format_args!(
            "path '{path}' is valid and has no files anywhere: `nix-store --verify` drops it"
        ));
    }
    if cx.json {
        return cx.ui.print_json(&serde_json::json!({
            "examination": seen,
            "adopted": done,
            "merged": layout.merged,
            "castore": layout.store,
            "url": url.to_string(),
        }));
    }
    cx.ui.say(format_args!(
        "{} paths, {} imported, {} read back and verified{}",
        ui::count(done.paths),
        ui::count(done.imported),
        ui::count(done.verified),
        match done.caught_up {
            0 => String::new(),
            n => format!(", {} added meanwhile brought along", ui::count(n)),
        }
    ));
    cx.ui
        .print(format!("{url}\n\n# nix.conf\n{}", url.nix_conf()))?;
    next_steps(args, cx, layout, done.is_mounted);
    Ok(())
}

/// What is left for the user to do.
fn next_steps(args: &Args, cx: &Context, layout: &Layout, is_mounted: bool) {
    let us = format!(
        "understory --store {} adopt {}",
        layout.store.display(),
        args.root.display()
    );
    let merged = layout.merged.display();
    let ui = &cx.ui;
    ui.say("");
    if is_mounted {
        ui.say(format_args!("the overlay is mounted on {merged}; next:"));
    } else {
        ui.say(format_args!(
            "everything is ready, the overlay is not mounted on {merged} yet; next:"
        ));
        ui.say(format_args!(
            "  mount it:          understory --store {} up",
            layout.store.display()
        ));
    }
    ui.say("  tell Nix:          put the lines above into nix.conf, before Nix is used again");
    ui.say(format_args!(
        "  after a restart:   {us} --yes (as a service: docs/guide/adopt.md)"
    ));
    ui.say(format_args!("  free the space:    {us} --reclaim"));
    ui.say(format_args!("  go back:           {us} --undo"));
}

fn reclaim(
    args: &Args,
    cx: &Context,
    adoption: &Adoption,
    control: &Control<'_>,
    bars: &Bars,
) -> Result<()> {
    cx.ui.say(format_args!(
        "the originals under {} will be deleted: from then on the store is whole only while the overlay is mounted",
        adoption.layout().merged.display()
    ));
    confirm(args, cx, "Delete the originals?")?;
    let done = adoption.reclaim(control)?;
    bars.finish();
    if cx.json {
        return cx.ui.print_json(&done);
    }
    cx.ui.say(format_args!(
        "deleted {} originals, {} freed",
        ui::count(done.paths),
        ui::bytes(done.freed_bytes)
    ));
    if done.in_use > 0 {
        cx.ui.say(format_args!(
            "{} originals are in use by processes from before: run it again when these have ended",
            ui::count(done.in_use)
        ));
    }
    if done.kept > 0 {
        cx.ui.say(format_args!(
            "{} objects are not in the castore and stay",
            ui::count(done.kept)
        ));
    }
    Ok(())
}

fn undo(
    args: &Args,
    cx: &Context,
    adoption: &Adoption,
    control: &Control<'_>,
    bars: &Bars,
) -> Result<()> {
    confirm(args, cx, "Undo the adoption?")?;
    let done = adoption.undo(&stop, control)?;
    bars.finish();
    if cx.json {
        return cx.ui.print_json(&done);
    }
    cx.ui.say(format_args!(
        "{} paths are in {} again: {} restored from the castore, {} moved from the upper directory",
        ui::count(done.paths),
        adoption.layout().merged.display(),
        ui::count(done.restored),
        ui::count(done.moved)
    ));
    for path in &done.missing {
        cx.ui.warn(format_args!(
            "path '{path}' is valid and has no good files anywhere: `nix-store --verify --check-contents --repair`"
        ));
    }
    for path in &done.only_in_castore {
        cx.ui.warn(format_args!(
            "a root points to '{path}', which only the castore has: `understory export` it and import that"
        ));
    }
    cx.ui.say(format_args!(
        "take the lines of the overlay store out of nix.conf; the castore in {} is kept: delete it, or adopt again with it",
        adoption.layout().store.display()
    ));
    Ok(())
}

/// Asks, unless told not to.
fn confirm(args: &Args, cx: &Context, question: &str) -> Result<()> {
    if args.yes {
        return Ok(());
    }
    let refuse = || {
        CommandError::usage("nothing was done: this needs a yes")
            .hint("add --yes where nobody can be asked")
    };
    if cx.json || !std::io::stdin().is_terminal() {
        return Err(refuse());
    }
    let mut err = std::io::stderr().lock();
    let asked = write!(err, "{question} [y/N] ").and_then(|()| err.flush());
    asked.map_err(|e| CommandError::io("writing to", "standard error", &e))?;
    let mut answer = String::new();
    std::io::stdin()
        .read_line(&mut answer)
        .map_err(|e| CommandError::io("reading", "standard input", &e))?;
    if matches!(answer.trim(), "y" | "Y" | "yes") {
        return Ok(());
    }
    Err(CommandError::failed("nothing was done"))
}

/// Starts `understory up` in the background. The places are in the castore's directory by now.
fn start(layout: &Layout) -> understory::Result<()> {
    let program = std::env::current_exe()
        .map_err(|e| Error::environment("finding this program").with_source(e))?;
    let output = Command::new(program)
        .arg("--store")
        .arg(&layout.store)
        .args(["up", "--detach"])
        .env_remove(env::STORE)
        .stdin(Stdio::null())
        .output()
        .map_err(|e| Error::environment("starting the instance").with_source(e))?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    Err(
        Error::environment(format!("the instance did not start: {}", output.status))
            .with_source(said.trim().to_owned())
            .with_hint("the store is as it was; run the same command again, or with --undo"),
    )
}

/// Stops the instance, as `down` does.
fn stop(layout: &Layout) -> understory::Result<()> {
    let Some(client) = Client::connect(&layout.control())? else {
        return Ok(());
    };
    if client.stop(STOPPING)? && up::wait_unlocked(layout, STOPPING)? {
        return Ok(());
    }
    Err(Error::environment(format!(
        "the instance of {} did not end within {} s",
        layout.state.display(),
        STOPPING.as_secs()
    ))
    .with_hint(format!(
        "look at {}, end it, then run the same command again",
        layout.log().display()
    )))
}

/// The report as a table.
fn table(ui: &Ui, seen: &Examination) -> String {
    let mut out = String::new();
    let mut row = |name: &str, value: String| {
        out.push_str(&format!(
            "{}{}{value}\n",
            ui.style(Style::Bold, name),
            " ".repeat(16_usize.saturating_sub(name.len()))
        ));
    };
    row("store", seen.real.display().to_string());
    row("castore", seen.castore.display().to_string());
    row(
        "state",
        match seen.phase {
            None => "nothing was begun".into(),
            Some(phase) => format!(
                "{}{}{}",
                phase.describe(),
                if seen.is_mounted { ", mounted" } else { "" },
                if seen.reclaimed {
                    ", originals deleted"
                } else {
                    ""
                }
            ),
        },
    );
    row(
        "paths",
        format!(
            "{} valid ({} of NARs), {} in the castore already, {} leftovers",
            ui::count(seen.paths),
            ui::bytes(seen.nar_bytes),
            ui::count(seen.paths_in_castore),
            ui::count(seen.leftovers)
        ),
    );
    row(
        "files",
        format!(
            "{}, {}",
            ui::count(seen.files),
            ui::bytes(seen.apparent_bytes)
        ),
    );
    row("on disk", ui::bytes(seen.disk_bytes));
    if let Some(estimate) = &seen.estimate {
        let (min, max) = (estimate.castore_bytes_min, estimate.castore_bytes_max);
        row(
            "in the castore",
            format!(
                "about {} to {}: an estimate from {} paths ({})",
                ui::bytes(min),
                ui::bytes(max),
                ui::count(estimate.sample_paths),
                ui::bytes(estimate.sample_bytes)
            ),
        );
        row(
            "would save",
            format!(
                "about {} to {}, once the originals are deleted",
                ui::bytes(seen.disk_bytes.saturating_sub(max)),
                ui::bytes(seen.disk_bytes.saturating_sub(min))
            ),
        );
        row("time", format!("about {}", duration(estimate.seconds)));
    }
    row(
        "free",
        format!("{} where the castore lies", ui::bytes(seen.free_bytes)),
    );
    out
}

fn duration(seconds: u64) -> String {
    match seconds {
        0..=119 => format!("{seconds} s"),
        120..=7199 => format!("{} min", seconds.div_ceil(60)),
        _ => format!(
            "{:.1} h",
            Duration::from_secs(seconds).as_secs_f64() / 3600.0
        ),
    }
}

/// One progress bar after the other, as the steps come.
struct Bars {
    ui: Ui,
    now: Mutex<Option<(Step, Bar)>>,
}

impl Bars {
    fn new(ui: &Ui) -> Self {
        Self {
            ui: ui.clone(),
            now: Mutex::new(None),
        }
    }
    fn tell(&self, progress: Progress) {
        let mut now = self.now.lock().unwrap_or_else(PoisonError::into_inner);
        if now.as_ref().is_none_or(|(step, _)| *step != progress.step) {
            if let Some((_, bar)) = now.take() {
                bar.finish();
            }
            *now = Some((progress.step, Bar::new(&self.ui, verb(progress.step))));
        }
        if let Some((_, bar)) = &*now {
            bar.update(Done {
                paths: progress.paths,
                bytes: progress.bytes,
                new_bytes: progress.new_bytes,
            });
        }
    }
    fn finish(&self) {
        let mut now = self.now.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, bar)) = now.take() {
            bar.finish();
        }
    }
}

fn verb(step: Step) -> &'static str {
    match step {
        Step::Examining => "examining",
        Step::Sampling => "sampling",
        Step::Importing => "importing",
        Step::Verifying => "verifying",
        Step::Comparing => "reading through the overlay",
        Step::Reclaiming => "deleting originals",
        Step::Restoring => "restoring",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_for_people() {
        assert_eq!(duration(0), "0 s");
        assert_eq!(duration(119), "119 s");
        assert_eq!(duration(121), "3 min");
        assert_eq!(duration(9000), "2.5 h");
    }
}
