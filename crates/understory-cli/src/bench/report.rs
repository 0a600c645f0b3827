//! What a benchmark prints: each measurement with its peer from the same run, the ratio, and the aim.

use crate::ui::{Style, Ui};
use serde_json::{Value, json};

/// What a value counts, and whether more of it is better.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Unit {
    /// Less is better.
    Seconds,
    /// Bytes a second: more is better.
    BytesPerSecond,
    /// More is better.
    PerSecond,
    /// Less is better.
    Bytes,
}

impl Unit {
    const fn more_is_better(self) -> bool {
        matches!(self, Self::BytesPerSecond | Self::PerSecond)
    }
    const fn name(self) -> &'static str {
        match self {
            Self::Seconds => "s",
            Self::BytesPerSecond => "B/s",
            Self::PerSecond => "1/s",
            Self::Bytes => "B",
        }
    }
    fn show(self, value: f64) -> String {
        match self {
            Self::Seconds if value < 0.0995 => format!("{:.1} ms", value * 1e3),
            Self::Seconds if value < 9.995 => format!("{value:.2} s"),
            Self::Seconds => format!("{value:.1} s"),
            Self::BytesPerSecond => format!("{}/s", bytes(value)),
            Self::PerSecond if value >= 9_950.0 => format!("{:.1} k/s", value / 1e3),
            Self::PerSecond => format!("{value:.0} /s"),
            Self::Bytes => bytes(value),
        }
    }
}

fn bytes(value: f64) -> String {
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "sizes are positive and below 2^53"
    )]
    crate::ui::bytes(value.max(0.0) as u64)
}

/// What is aimed at.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Aim {
    /// Nothing: for information.
    None,
    /// The ratio to the peer is at least this.
    Ratio(f64),
    /// Our value is at most this part of the peer's.
    Part(f64),
    /// Our value is below this.
    Below(f64),
}

/// One measurement.
#[derive(Debug, Clone)]
pub(crate) struct Row {
    pub(crate) group: &'static str,
    pub(crate) name: String,
    pub(crate) unit: Unit,
    pub(crate) here: f64,
    /// Who was compared with, and its value.
    pub(crate) peer: Option<(String, f64)>,
    pub(crate) aim: Aim,
}

impl Row {
    /// How many times better we are than the peer.
    pub(crate) fn ratio(&self) -> Option<f64> {
        let (_, peer) = self.peer.as_ref()?;
        let (good, bad) = if self.unit.more_is_better() {
            (self.here, *peer)
        } else {
            (*peer, self.here)
        };
        (bad > 0.0).then(|| good / bad)
    }
    /// Our value as a part of the peer's.
    fn part(&self) -> Option<f64> {
        let (_, peer) = self.peer.as_ref()?;
        (*peer > 0.0).then(|| self.here / peer)
    }
    /// True if the aim is reached; `None` if there is none or the peer is missing.
    pub(crate) fn reached(&self) -> Option<bool> {
        match self.aim {
            Aim::None => None,
            Aim::Ratio(aim) => self.ratio().map(|ratio| ratio >= aim),
            Aim::Part(aim) => self.part().map(|part| part <= aim),
            Aim::Below(aim) => Some(self.here < aim),
        }
    }
    fn aim_text(&self) -> String {
        match self.aim {
            Aim::None => String::new(),
            Aim::Ratio(aim) => format!("≥ {aim:.1} ×"),
            Aim::Part(aim) if aim < 0.01 => format!("≤ {aim:.3}"),
            Aim::Part(aim) => format!("≤ {aim:.2}"),
            Aim::Below(aim) => format!("< {}", self.unit.show(aim)),
        }
    }
    fn ratio_text(&self) -> String {
        match self.aim {
            Aim::Part(_) => self.part().map_or_else(String::new, |part| match part {
                0.01.. => format!("{part:.3}"),
                _ => format!("{part:.5}"),
            }),
            _ => self
                .ratio()
                .map_or_else(String::new, |ratio| format!("{ratio:.2} ×")),
        }
    }
}

/// All measurements of a run.
#[derive(Debug, Default)]
pub(crate) struct Report {
    /// Machine, data, cache state, versions: name and text.
    pub(crate) conditions: Vec<(String, String)>,
    pub(crate) rows: Vec<Row>,
    /// Aims are for real amounts of data: not judged in a smoke run.
    pub(crate) smoke: bool,
    /// What was not measured, and why.
    pub(crate) missing: Vec<String>,
}

impl Report {
    pub(crate) fn condition(&mut self, name: &str, text: impl Into<String>) {
        self.conditions.push((name.to_owned(), text.into()));
    }

    pub(crate) fn to_json(&self) -> Value {
        let rows: Vec<Value> = self
            .rows
            .iter()
            .map(|row| {
                json!({
                    "group": row.group,
                    "name": row.name,
                    "unit": row.unit.name(),
                    "here": row.here,
                    "peerName": row.peer.as_ref().map(|(name, _)| name),
                    "peer": row.peer.as_ref().map(|(_, value)| value),
                    "ratio": row.ratio(),
                    "aim": row.aim_text(),
                    "reached": row.reached().filter(|_| !self.smoke),
                })
            })
            .collect();
        let conditions: serde_json::Map<String, Value> = self
            .conditions
            .iter()
            .map(|(name, text)| (name.clone(), text.as_str().into()))
            .collect();
        json!({"conditions": conditions, "rows": rows, "missing": self.missing})
    }

    /// A table with aligned columns; a mark says what is below its aim.
    pub(crate) fn to_text(&self, ui: &Ui) -> String {
        let mut out = String::new();
        for (name, text) in &self.conditions {
            out.push_str(&format!("{name:<10} {text}\n"));
        }
        let cells: Vec<[String; 6]> = self
            .rows
            .iter()
            .map(|row| {
                let peer = row.peer.as_ref();
                [
                    row.name.clone(),
                    row.unit.show(row.here),
                    peer.map_or_else(String::new, |(_, value)| row.unit.show(*value)),
                    row.ratio_text(),
                    row.aim_text(),
                    peer.map_or_else(String::new, |(name, _)| name.clone()),
                ]
            })
            .collect();
        let head = ["", "here", "peer", "ratio", "aim", "peer is"].map(str::to_owned);
        let mut width = [0; 6];
        for line in cells.iter().chain([&head]) {
            for (width, cell) in width.iter_mut().zip(line) {
                *width = (*width).max(cell.chars().count());
            }
        }
        let line = |cells: &[String; 6], mark: &str| {
            let mut text = pad(&cells[0], width[0], false);
            for column in 1..5 {
                text.push_str("  ");
                text.push_str(&pad(&cells[column], width[column], true));
            }
            format!("{text} {mark:<5} {}", cells[5])
                .trim_end()
                .to_owned()
        };
        let mut group = "";
        for (row, cells) in self.rows.iter().zip(&cells) {
            if row.group != group {
                group = row.group;
                out.push('\n');
                let mut titles = head.clone();
                group.clone_into(&mut titles[0]);
                out.push_str(&ui.style(Style::Bold, &line(&titles, "")));
                out.push('\n');
            }
            let mark = match row.reached().filter(|_| !self.smoke) {
                Some(true) => "yes",
                Some(false) => "below",
                None => "",
            };
            out.push_str(&line(cells, mark));
            out.push('\n');
        }
        for text in &self.missing {
            out.push_str(&format!("\nnot measured: {text}"));
        }
        if !self.missing.is_empty() {
            out.push('\n');
        }
        out.push_str("\nA ratio above 1 means better than the peer in the same run; for sizes it is the part of the peer's.\n");
        out
    }
}

/// Pads by characters, not bytes.
fn pad(text: &str, width: usize, right: bool) -> String {
    let fill = " ".repeat(width.saturating_sub(text.chars().count()));
    if right {
        format!("{fill}{text}")
    } else {
        format!("{text}{fill}")
    }
}

/// The median; the mean of the middle two of an even number.
pub(crate) fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    match values.len() {
        0 => f64::NAN,
        n if n % 2 == 1 => values[n / 2],
        n => f64::midpoint(values[n / 2 - 1], values[n / 2]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(unit: Unit, here: f64, peer: f64, aim: Aim) -> Row {
        Row {
            group: "g",
            name: "n".into(),
            unit,
            here,
            peer: Some(("p".into(), peer)),
            aim,
        }
    }

    #[test]
    fn ratios_say_how_much_better() {
        assert_eq!(
            row(Unit::Seconds, 1.0, 3.0, Aim::Ratio(3.0)).ratio(),
            Some(3.0)
        );
        assert_eq!(
            row(Unit::PerSecond, 8.0, 2.0, Aim::Ratio(4.0)).reached(),
            Some(true)
        );
        assert_eq!(
            row(Unit::Bytes, 24.0, 100.0, Aim::Part(0.24)).reached(),
            Some(true)
        );
        assert_eq!(
            row(Unit::Bytes, 25.0, 100.0, Aim::Part(0.24)).reached(),
            Some(false)
        );
        assert_eq!(
            row(Unit::Seconds, 0.2, 1.0, Aim::Below(0.1)).reached(),
            Some(false)
        );
        assert_eq!(row(Unit::Seconds, 0.0, 0.0, Aim::None).ratio(), None);
    }

    #[test]
    fn medians() {
        assert_eq!(median(&mut [3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(&mut [4.0, 1.0]), 2.5);
        assert!(median(&mut []).is_nan());
    }

    #[test]
    fn the_table_is_aligned() {
        let mut report = Report::default();
        report.condition("machine", "a");
        report
            .rows
            .push(row(Unit::Seconds, 0.5, 1.5, Aim::Ratio(3.0)));
        report
            .rows
            .push(row(Unit::Bytes, 2400.0, 9000.0, Aim::Part(0.24)));
        let text = report.to_text(&Ui::new(crate::ui::ColorChoice::Never, true));
        let expected = "\
machine    a

g     here     peer   ratio      aim       peer is
n   0.50 s   1.50 s  3.00 ×  ≥ 3.0 × yes   p
n  2.40 KB  9.00 KB   0.267   ≤ 0.24 below p
";
        assert!(text.starts_with(expected), "{text}");
    }
}
