//! `top`: a running instance at work, in the terminal.
//!
//! Everything comes through the control socket: one `status` and one `metrics` a second, about 50 KiB and a
//! millisecond of the instance's time. The store's figures are a scan of its database and so are asked for
//! once a minute.
//!
//! `ratatui` (MIT) draws: it keeps two screens and sends what differs, knows how wide characters are, and
//! has a backend for tests; `crossterm` (MIT) is its terminal. By hand, with escape sequences, it would be the same work
//! again and worse; `cursive` and `tui-realm` bring widgets with a life of their own that a page of figures does not need.

mod model;
mod render;

use crate::commands::up::LayoutArgs;
use crate::context::Context;
use crate::error::{CommandError, Result};
use crate::signals;
use model::{Look, View};
use ratatui::crossterm::event::{self, Event, KeyCode, KeyEventKind, KeyModifiers};
use render::{HISTORY_MAX, Screen};
use std::io::IsTerminal;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};
use understory::control::Client;
use understory::store::{Store, StoreOptions, StoreStats};

/// How often the store's figures are asked for.
const STATS_INTERVAL: Duration = Duration::from_secs(60);
/// How long a key may wait for its effect, and a signal.
const KEY_MS_MAX: u64 = 100;
/// The longest interval.
const INTERVAL_S_MAX: f64 = 3600.0;

/// Watch a running instance at work
///
/// Requests of the kernel and of clients, hit rates, bytes, processes, mounts and clients, every second.
/// q or Ctrl-C ends it. Where standard output is no terminal, and with --once or --json, it looks twice, one
/// interval apart, and says what it saw.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    layout: LayoutArgs,
    /// Look twice, say what was seen, and end
    #[arg(long)]
    once: bool,
    /// Seconds between two looks
    #[arg(long, value_name = "SECONDS", default_value_t = 1.0)]
    interval: f64,
}

pub(crate) fn run(args: &Args, cx: &Context) -> Result<()> {
    if !(0.1..=INTERVAL_S_MAX).contains(&args.interval) {
        return Err(CommandError::usage(format!(
            "an interval of {} s: expected 0.1 to {INTERVAL_S_MAX}",
            args.interval
        )));
    }
    let interval = Duration::from_secs_f64(args.interval);
    let layout = cx.layout(&args.layout.options())?;
    let mut instance = Instance::new(layout.control());
    let Some(first) = instance.look()? else {
        return Err(CommandError::environment(format!(
            "no instance runs for {}",
            layout.state.display()
        ))
        .hint("start one with `understory up`"));
    };
    let stopped = signals::cancel_flag()?;
    if args.once || cx.json || !std::io::stdout().is_terminal() {
        return once(cx, instance, &first, interval, &stopped);
    }
    let mut watch = Watch {
        color: cx.ui.colors_out(),
        interval,
        instance,
        before: first.clone(),
        now: first,
        stats: None,
        history: Vec::new(),
        notice: None,
    };
    // Restores the terminal when we panic, too.
    let mut terminal =
        ratatui::try_init().map_err(|e| CommandError::io("setting up", "the terminal", &e))?;
    let result = watch.run(&mut terminal, &stopped);
    ratatui::restore();
    result.map_err(|e| CommandError::io("drawing on", "the terminal", &e))
}

fn once(
    cx: &Context,
    mut instance: Instance,
    first: &Look,
    interval: Duration,
    stopped: &AtomicBool,
) -> Result<()> {
    let end = Instant::now() + interval;
    while let Some(left) = end.checked_duration_since(Instant::now()) {
        if stopped.load(Ordering::Relaxed) {
            return Err(CommandError::interrupted());
        }
        std::thread::sleep(left.min(Duration::from_millis(KEY_MS_MAX)));
    }
    let now = instance
        .look()?
        .ok_or_else(|| CommandError::environment("the instance has stopped"))?;
    let stats = stats_of(&now);
    let view = View::new(first, &now, stats.as_ref(), unix_now());
    if cx.json {
        return cx.ui.print_json(&view);
    }
    let screen = Screen {
        view: &view,
        history: &[],
        color: false,
        notice: None,
        keys: false,
    };
    cx.ui.print(screen.to_text())
}

/// A connection to an instance, which may end and come back.
struct Instance {
    control: PathBuf,
    client: Option<Client>,
    started: Instant,
}

impl Instance {
    fn new(control: PathBuf) -> Self {
        Self {
            control,
            client: None,
            started: Instant::now(),
        }
    }
    /// Looks at it; `None` if nothing runs.
    fn look(&mut self) -> understory::Result<Option<Look>> {
        if self.client.is_none() {
            self.client = Client::connect(&self.control)?;
        }
        let Some(client) = &mut self.client else {
            return Ok(None);
        };
        let looked = client
            .status()
            .and_then(|status| Ok((status, client.metrics()?)));
        match looked {
            Ok((status, observed)) => Ok(Some(Look {
                status,
                observed,
                at: self.started.elapsed(),
            })),
            Err(error) => {
                // The next look connects anew.
                self.client = None;
                Err(error)
            }
        }
    }
}

/// What is being watched.
struct Watch {
    color: bool,
    interval: Duration,
    instance: Instance,
    before: Look,
    now: Look,
    stats: Option<(Instant, Option<StoreStats>)>,
    history: Vec<u64>,
    notice: Option<String>,
}

impl Watch {
    fn run(
        &mut self,
        terminal: &mut ratatui::DefaultTerminal,
        stopped: &AtomicBool,
    ) -> std::io::Result<()> {
        let mut next = Instant::now() + self.interval;
        loop {
            let view = self.view();
            terminal.draw(|frame| {
                Screen {
                    view: &view,
                    history: &self.history,
                    color: self.color,
                    notice: self.notice.as_deref(),
                    keys: true,
                }
                .draw(frame);
            })?;
            loop {
                if stopped.load(Ordering::Relaxed) {
                    return Ok(());
                }
                let left = next.saturating_duration_since(Instant::now());
                if left.is_zero() {
                    break;
                }
                if event::poll(left.min(Duration::from_millis(KEY_MS_MAX)))? {
                    let event = event::read()?;
                    if is_quit(&event) {
                        return Ok(());
                    }
                    if matches!(event, Event::Resize(..)) {
                        // Draws at once, in the new size.
                        terminal.draw(|frame| self.screen(&view).draw(frame))?;
                    }
                }
            }
            next = Instant::now() + self.interval;
            self.look();
        }
    }

    fn screen<'a>(&'a self, view: &'a View) -> Screen<'a> {
        Screen {
            view,
            history: &self.history,
            color: self.color,
            notice: self.notice.as_deref(),
            keys: true,
        }
    }

    fn look(&mut self) {
        match self.instance.look() {
            Ok(Some(look)) => {
                // Another process: its counters have nothing to do with those of the last.
                let same = look.status.started == self.now.status.started;
                let old = std::mem::replace(&mut self.now, look);
                self.before = if same { old } else { self.now.clone() };
                self.notice = None;
                let rate = self.view().all_per_second();
                #[expect(
                    clippy::cast_possible_truncation,
                    clippy::cast_sign_loss,
                    reason = "a bar of a graph"
                )]
                self.history.push(rate.max(0.0) as u64);
                if self.history.len() > HISTORY_MAX {
                    self.history.remove(0);
                }
            }
            Ok(None) => self.notice = Some("nothing runs: waiting for an instance".to_owned()),
            Err(error) => self.notice = Some(format!("no answer: {}", error.chain())),
        }
    }

    fn view(&mut self) -> View {
        let is_old = |(at, _): &(Instant, Option<StoreStats>)| at.elapsed() > STATS_INTERVAL;
        if self.stats.as_ref().is_none_or(is_old) {
            self.stats = Some((Instant::now(), stats_of(&self.now)));
        }
        let stats = self.stats.as_ref().and_then(|(_, stats)| stats.as_ref());
        View::new(&self.before, &self.now, stats, unix_now())
    }
}

fn is_quit(event: &Event) -> bool {
    let Event::Key(key) = event else {
        return false;
    };
    let control = key.modifiers.contains(KeyModifiers::CONTROL);
    key.kind == KeyEventKind::Press
        && match key.code {
            KeyCode::Char('q' | 'Q') | KeyCode::Esc => true,
            KeyCode::Char('c') => control,
            _ => false,
        }
}

/// The store's figures; none if it cannot be read from here, which is no reason to show nothing.
fn stats_of(look: &Look) -> Option<StoreStats> {
    let mut options = StoreOptions::default();
    options.castore.read_only = true;
    let stats = Store::open(&look.status.store, &options).and_then(|store| store.stats());
    match stats {
        Ok(stats) => Some(stats),
        Err(error) => {
            tracing::debug!(error = %error.chain(), "figures of the store");
            None
        }
    }
}

fn unix_now() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |d| d.as_secs())
}
