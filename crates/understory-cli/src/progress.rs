//! Progress of long work: a bar on a terminal, a log line now and then otherwise.

use crate::ui::{self, Ui};
use indicatif::{ProgressBar, ProgressStyle};
use std::sync::Mutex;
use std::time::{Duration, Instant};

/// Between two log lines when stderr is no terminal.
const LOG_INTERVAL: Duration = Duration::from_secs(10);

/// What has been done so far.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Done {
    /// Paths done, and in all (0: not known).
    pub(crate) paths: (u64, u64),
    /// Bytes done, and in all (0: not known).
    pub(crate) bytes: (u64, u64),
    /// Bytes that were new to the store and what they take on disk.
    pub(crate) new_bytes: u64,
}

/// Shows progress; may be told from any thread.
pub(crate) struct Progress {
    verb: &'static str,
    ui: Ui,
    started: Instant,
    bar: Option<ProgressBar>,
    logged: Mutex<Instant>,
}

impl Progress {
    pub(crate) fn new(ui: &Ui, verb: &'static str) -> Self {
        let bar = ui.shows_progress().then(|| {
            let bar = ProgressBar::new(0);
            // The template is a constant: an error would be a bug, and the default style does.
            if let Ok(style) = ProgressStyle::with_template("{spinner} {prefix} {wide_bar} {msg}") {
                bar.set_style(style.progress_chars("━━ "));
            }
            bar.set_prefix(verb);
            bar.enable_steady_tick(Duration::from_millis(120));
            bar
        });
        let now = Instant::now();
        Self {
            verb,
            ui: ui.clone(),
            started: now,
            bar,
            logged: Mutex::new(now),
        }
    }
    pub(crate) fn update(&self, done: Done) {
        if let Some(bar) = &self.bar {
            let (at, all) = if done.bytes.1 > 0 {
                done.bytes
            } else {
                done.paths
            };
            bar.set_length(all.max(at));
            bar.set_position(at);
            bar.set_message(self.text(done));
            return;
        }
        if self.ui.is_quiet() {
            return;
        }
        let mut logged = match self.logged.lock() {
            Ok(logged) => logged,
            Err(poisoned) => poisoned.into_inner(),
        };
        if logged.elapsed() >= LOG_INTERVAL {
            *logged = Instant::now();
            self.ui
                .say(format_args!("{}: {}", self.verb, self.text(done)));
        }
    }
    /// Removes the bar and returns the time it took.
    pub(crate) fn finish(self) -> Duration {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
        self.started.elapsed()
    }
    fn text(&self, done: Done) -> String {
        let mut parts = Vec::new();
        match done.paths {
            (0, 0) => {}
            (n, 0) => parts.push(format!("{} paths", ui::count(n))),
            (n, all) => parts.push(format!("{}/{} paths", ui::count(n), ui::count(all))),
        }
        match done.bytes {
            (0, 0) => {}
            (n, 0) => parts.push(ui::bytes(n)),
            (n, all) => parts.push(format!("{}/{}", ui::bytes(n), ui::bytes(all))),
        }
        parts.push(ui::rate(done.bytes.0, self.started.elapsed()));
        if done.new_bytes > 0 {
            parts.push(format!("{} new", ui::percent(done.new_bytes, done.bytes.0)));
        }
        parts.join(", ")
    }
}
