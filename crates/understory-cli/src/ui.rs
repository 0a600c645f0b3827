//! The terminal: data to stdout, talk to stderr, colour that only decorates.

use crate::env;
use crate::error::{CommandError, Result};
use clap::ValueEnum;
use std::io::{IsTerminal, Write};

/// When to use colour.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Default)]
pub(crate) enum ColorChoice {
    /// If the stream is a terminal and `NO_COLOR` is not set.
    #[default]
    Auto,
    /// Always.
    Always,
    /// Never.
    Never,
}

/// What is worth decorating.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Style {
    Error,
    Warning,
    Good,
    Hint,
    Bold,
}

impl Style {
    const fn code(self) -> &'static str {
        match self {
            Self::Error => "1;31",
            Self::Warning => "1;33",
            Self::Good => "1;32",
            Self::Hint => "1;36",
            Self::Bold => "1",
        }
    }
}

/// How to talk.
#[derive(Debug, Clone)]
pub(crate) struct Ui {
    color_out: bool,
    color_err: bool,
    quiet: bool,
    progress: bool,
}

impl Ui {
    pub(crate) fn new(color: ColorChoice, quiet: bool) -> Self {
        let dumb = env::var(env::TERM).is_some_and(|term| term == "dumb");
        let plain = dumb || env::var(env::NO_COLOR).is_some();
        let wants = |terminal: bool| match color {
            ColorChoice::Auto => terminal && !plain,
            ColorChoice::Always => true,
            ColorChoice::Never => false,
        };
        Self {
            color_out: wants(std::io::stdout().is_terminal()),
            color_err: wants(std::io::stderr().is_terminal()),
            quiet,
            progress: std::io::stderr().is_terminal() && !dumb && !quiet,
        }
    }
    /// True if a progress bar makes sense on stderr.
    pub(crate) fn shows_progress(&self) -> bool {
        self.progress
    }
    pub(crate) fn is_quiet(&self) -> bool {
        self.quiet
    }
    pub(crate) fn colors_out(&self) -> bool {
        self.color_out
    }
    pub(crate) fn colors_err(&self) -> bool {
        self.color_err
    }
    /// Decorates text that goes to stdout.
    pub(crate) fn style(&self, style: Style, text: &str) -> String {
        decorate(self.color_out, style, text)
    }
    /// Writes data to stdout.
    pub(crate) fn print(&self, text: impl AsRef<[u8]>) -> Result<()> {
        let mut out = std::io::stdout().lock();
        out.write_all(text.as_ref())
            .and_then(|()| out.flush())
            .map_err(|e| CommandError::io("writing to", "standard output", &e))
    }
    /// Writes one JSON document to stdout.
    pub(crate) fn print_json(&self, value: &impl serde::Serialize) -> Result<()> {
        let mut text = serde_json::to_string_pretty(value)
            .map_err(|e| CommandError::failed(format!("writing JSON: {e}")))?;
        text.push('\n');
        self.print(text)
    }
    /// Says something on stderr unless `--quiet`.
    pub(crate) fn say(&self, text: impl std::fmt::Display) {
        if !self.quiet {
            self.line(&text.to_string());
        }
    }
    pub(crate) fn warn(&self, text: impl std::fmt::Display) {
        self.line(&format!(
            "{} {text}",
            decorate(self.color_err, Style::Warning, "warning:")
        ));
    }
    pub(crate) fn hint(&self, text: impl std::fmt::Display) {
        self.line(&format!(
            "{} {text}",
            decorate(self.color_err, Style::Hint, "hint:")
        ));
    }
    /// `error: …`, the causes, the hints.
    pub(crate) fn error(&self, error: &CommandError) {
        if error.message.is_empty() {
            return;
        }
        self.line(&format!(
            "{} {}",
            decorate(self.color_err, Style::Error, "error:"),
            error.message
        ));
        for cause in &error.causes {
            self.line(&format!("  caused by: {cause}"));
        }
        for hint in &error.hints {
            self.hint(hint);
        }
    }
    fn line(&self, text: &str) {
        // Nothing can be done if stderr is closed.
        let _ = writeln!(std::io::stderr().lock(), "{text}");
    }
}

fn decorate(on: bool, style: Style, text: &str) -> String {
    if on {
        format!("\x1b[{}m{text}\x1b[0m", style.code())
    } else {
        text.to_owned()
    }
}

/// Bytes for people: `0 B`, `999 B`, `1.5 KB`, `23.4 MB`; powers of 1000.
pub(crate) fn bytes(n: u64) -> String {
    const UNITS: [&str; 6] = ["KB", "MB", "GB", "TB", "PB", "EB"];
    if n < 1000 {
        return format!("{n} B");
    }
    #[expect(clippy::cast_precision_loss, reason = "shown with three digits")]
    let mut value = n as f64 / 1000.0;
    let mut unit = 0;
    while value >= 999.5 && unit + 1 < UNITS.len() {
        value /= 1000.0;
        unit += 1;
    }
    let digits = if value < 9.995 {
        2
    } else if value < 99.95 {
        1
    } else {
        0
    };
    format!("{value:.digits$} {}", UNITS[unit])
}

/// A count with thousands separated: `12,345`.
pub(crate) fn count(n: u64) -> String {
    let digits = n.to_string();
    let mut out = String::new();
    for (i, c) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            out.push(',');
        }
        out.push(c);
    }
    out
}

/// `part` of `whole` in per cent.
pub(crate) fn percent(part: u64, whole: u64) -> String {
    if whole == 0 {
        return "-".into();
    }
    #[expect(clippy::cast_precision_loss, reason = "shown with three digits")]
    let value = part as f64 * 100.0 / whole as f64;
    format!("{value:.1} %")
}

/// Bytes a second.
pub(crate) fn rate(n: u64, time: std::time::Duration) -> String {
    let seconds = time.as_secs_f64().max(1e-6);
    #[expect(
        clippy::cast_precision_loss,
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "shown with three digits"
    )]
    let per_second = (n as f64 / seconds) as u64;
    format!("{}/s", bytes(per_second))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_for_people() {
        let cases = [
            (0, "0 B"),
            (999, "999 B"),
            (1000, "1.00 KB"),
            (1_994, "1.99 KB"),
            (23_440_000, "23.4 MB"),
            (999_499_999, "999 MB"),
            (999_500_000, "1.00 GB"),
            (u64::MAX, "18.4 EB"),
        ];
        for (n, text) in cases {
            assert_eq!(bytes(n), text);
        }
        assert_eq!(count(0), "0");
        assert_eq!(count(999), "999");
        assert_eq!(count(1_234_567), "1,234,567");
        assert_eq!(percent(1, 0), "-");
        assert_eq!(percent(1, 3), "33.3 %");
    }
}
