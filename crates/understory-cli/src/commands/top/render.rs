//! How a view looks: the same on a terminal, in a test and as plain text. Pure.

use super::model::{Cache, Client, Generation, Operation, View};
use crate::ui;
use ratatui::Frame;
use ratatui::buffer::Buffer;
use ratatui::layout::{Constraint, Layout, Rect};
use ratatui::style::{Color, Modifier, Style};
use ratatui::text::{Line, Span};
use ratatui::widgets::{Paragraph, Row, Sparkline, Table, Widget};

/// Width of plain text.
pub(super) const PLAIN_COLUMNS: u16 = 110;
/// Looks that the graph remembers.
pub(super) const HISTORY_MAX: usize = 240;
/// Below this width tables stand one above the other.
const TWO_COLUMNS_MIN: u16 = 104;
/// Operations of daemons that are shown, those that happen most often.
const OPERATIONS_MAX: usize = 8;
/// Clients in plain text; a terminal shows what fits.
const PLAIN_CLIENTS_MAX: usize = 50;

/// What is on the screen besides the view.
pub(super) struct Screen<'a> {
    pub(super) view: &'a View,
    /// Requests a second at each look, the newest last.
    pub(super) history: &'a [u64],
    pub(super) color: bool,
    /// Something that the user must know.
    pub(super) notice: Option<&'a str>,
    /// Keys are explained.
    pub(super) keys: bool,
}

/// Draws into an area.
type Draw<'a> = dyn Fn(Rect, &mut Buffer) + 'a;

/// A block of lines.
struct Section<'a> {
    rows: u16,
    draw: Box<Draw<'a>>,
}

impl Screen<'_> {
    /// Draws all of it.
    pub(super) fn draw(&self, frame: &mut Frame<'_>) {
        let area = frame.area();
        self.draw_on(area, frame.buffer_mut());
    }

    /// As lines of text.
    pub(super) fn to_text(&self) -> String {
        let rows = 48
            + self.view.requests.len()
            + self.view.processes.len()
            + self.view.mounts.len()
            + self.view.generations.len()
            + self.view.clients.len().min(PLAIN_CLIENTS_MAX);
        let area = Rect::new(0, 0, PLAIN_COLUMNS, u16::try_from(rows).unwrap_or(u16::MAX));
        let mut buffer = Buffer::empty(area);
        self.draw_on(area, &mut buffer);
        let mut out = String::new();
        for y in 0..area.height {
            let line: String = (0..area.width)
                .map(|x| buffer[(x, y)].symbol().to_owned())
                .collect();
            out.push_str(line.trim_end());
            out.push('\n');
        }
        out.truncate(out.trim_end().len());
        out.push('\n');
        out
    }

    fn draw_on(&self, area: Rect, buffer: &mut Buffer) {
        let mut sections = vec![self.header(area.width)];
        if !self.history.is_empty() {
            sections.push(self.graph());
        }
        let two = area.width >= TWO_COLUMNS_MIN;
        let (requests, operations) = (
            self.operations("KERNEL", &self.view.requests, usize::MAX),
            self.operations("DAEMONS", &self.view.operations, OPERATIONS_MAX),
        );
        if two {
            sections.push(beside(requests, operations));
            sections.push(beside(self.flows(), self.caches()));
            sections.push(beside(self.processes(), self.counts()));
        } else {
            sections.extend([
                requests,
                operations,
                self.flows(),
                self.caches(),
                self.processes(),
                self.clients(),
                self.mounts(),
            ]);
            sections.extend(self.generations());
            sections.extend(self.raw_tier());
            sections.push(self.counts());
        }
        if two {
            sections.push(self.mounts());
            sections.extend(self.generations());
            sections.extend(self.raw_tier());
            sections.push(self.clients());
        }
        let mut y = area.y;
        let end = area.y + area.height - u16::from(self.keys && area.height > 1);
        for section in sections {
            if y >= end {
                break;
            }
            let rows = section.rows.min(end - y);
            (section.draw)(Rect::new(area.x, y, area.width, rows), buffer);
            y += rows + 1;
        }
        if end < area.y + area.height {
            let keys = Line::styled("q quit", self.dim());
            keys.render(Rect::new(area.x, end, area.width, 1), buffer);
        }
    }

    fn bold(&self) -> Style {
        Style::new().add_modifier(Modifier::BOLD)
    }
    fn dim(&self) -> Style {
        self.colored(Color::DarkGray)
    }
    fn colored(&self, color: Color) -> Style {
        if self.color {
            Style::new().fg(color)
        } else {
            Style::new()
        }
    }

    fn header(&self, columns: u16) -> Section<'_> {
        let view = self.view;
        let mut lines = vec![Line::from(vec![
            Span::styled(view.store.clone(), self.bold()),
            Span::raw(format!(
                "  up {}, process {}, version {}{}",
                span(view.uptime_seconds),
                view.pid,
                view.version,
                if view.private {
                    ", in a namespace of its own"
                } else {
                    ""
                }
            )),
        ])];
        if view.paths > 0 {
            let saved = view.deduplicated_bytes + view.compressed_bytes;
            let mut parts = vec![
                format!(
                    "{} paths, {} of NARs in {} on disk ({})",
                    ui::count(view.paths),
                    ui::bytes(view.nar_bytes),
                    ui::bytes(view.disk_bytes),
                    ui::percent(view.disk_bytes, view.nar_bytes)
                ),
                format!(
                    "saved {}: duplicates {}, compression {}",
                    ui::bytes(saved),
                    ui::bytes(view.deduplicated_bytes),
                    ui::bytes(view.compressed_bytes)
                ),
            ];
            if parts.iter().map(String::len).sum::<usize>() + 2 <= usize::from(columns) {
                parts = vec![parts.join("; ")];
            }
            lines.extend(parts.into_iter().map(Line::from));
        }
        if let Some(notice) = self.notice {
            let style = self.colored(Color::Yellow).add_modifier(Modifier::BOLD);
            lines.push(Line::styled(notice.to_owned(), style));
        }
        paragraph(lines)
    }

    fn graph(&self) -> Section<'_> {
        Section {
            rows: 4,
            draw: Box::new(|area, buffer| {
                let max = self.history.iter().copied().max().unwrap_or(0);
                let now = self.history.last().copied().unwrap_or(0);
                let title = Line::from(vec![
                    Span::styled("REQUESTS", self.bold()),
                    Span::raw(format!(
                        "  {} a second, at most {}",
                        ui::count(now),
                        ui::count(max)
                    )),
                ]);
                title.render(Rect { height: 1, ..area }, buffer);
                let below = Rect {
                    y: area.y + 1,
                    height: area.height.saturating_sub(1),
                    ..area
                };
                let shown = self.history.len().saturating_sub(usize::from(area.width));
                Sparkline::default()
                    .data(&self.history[shown..])
                    .style(self.colored(Color::Cyan))
                    .render(below, buffer);
            }),
        }
    }

    fn operations<'a>(
        &'a self,
        title: &'a str,
        all: &'a [Operation],
        count_max: usize,
    ) -> Section<'a> {
        let mut shown: Vec<&Operation> = all.iter().collect();
        // Stable: rows that jump are hard to read, so it goes by what has happened in all.
        shown.sort_by_key(|operation| std::cmp::Reverse(operation.total));
        let more = shown.len().saturating_sub(count_max);
        shown.truncate(count_max);
        let mut rows: Vec<Vec<String>> = shown
            .iter()
            .map(|operation| {
                vec![
                    match operation.of.as_str() {
                        "live" | "" => operation.name.clone(),
                        of => format!("{} ({of})", operation.name),
                    },
                    per_second(operation.per_second),
                    ui::count(operation.total),
                    time(operation.p50_seconds),
                    time(operation.p99_seconds),
                ]
            })
            .collect();
        if more > 0 {
            rows.push(vec![format!("and {more} more")]);
        }
        self.table(
            &[title, "/s", "total", "median", "99 %"],
            rows,
            &[0, 8, 11, 7, 7],
        )
    }

    fn flows(&self) -> Section<'_> {
        let rows = self.view.flows.iter().map(|flow| {
            vec![
                flow.name.to_owned(),
                format!("{}/s", ui::bytes(whole(flow.per_second))),
                ui::bytes(flow.total),
            ]
        });
        self.table(&["BYTES", "now", "total"], rows.collect(), &[0, 12, 10])
    }

    fn caches(&self) -> Section<'_> {
        let share = |share: Option<f64>| {
            share.map_or_else(|| "-".to_owned(), |share| format!("{:.1} %", share * 100.0))
        };
        let rows = self.view.caches.iter().map(|cache: &Cache| {
            vec![
                cache.name.to_owned(),
                share(cache.rate_now),
                share(cache.rate),
                ui::bytes(cache.bytes),
            ]
        });
        self.table(
            &["CACHES", "hits now", "of all", "memory"],
            rows.collect(),
            &[0, 9, 9, 10],
        )
    }

    fn processes(&self) -> Section<'_> {
        let all = &self.view.processes;
        let mut rows: Vec<Vec<String>> = all
            .iter()
            .map(|process| {
                vec![
                    process.name.clone(),
                    ui::bytes(process.resident_bytes),
                    ui::bytes(process.anonymous_bytes),
                    format!("{:.0} %", process.cpu * 100.0),
                    process.threads.to_string(),
                    process.restarts.to_string(),
                ]
            })
            .collect();
        if all.len() > 1 {
            rows.push(vec![
                "together".to_owned(),
                ui::bytes(all.iter().map(|p| p.resident_bytes).sum()),
                ui::bytes(all.iter().map(|p| p.anonymous_bytes).sum()),
                format!("{:.0} %", all.iter().map(|p| p.cpu).sum::<f64>() * 100.0),
                all.iter().map(|p| p.threads).sum::<u64>().to_string(),
                all.iter().map(|p| p.restarts).sum::<u64>().to_string(),
            ]);
        }
        self.table(
            &[
                "PROCESSES",
                "memory",
                "private",
                "CPU",
                "threads",
                "restarts",
            ],
            rows,
            &[0, 8, 8, 5, 7, 8],
        )
    }

    fn counts(&self) -> Section<'_> {
        let rows = self.view.counts.iter();
        let rows = rows.map(|count| vec![count.name.to_owned(), ui::count(count.total)]);
        self.table(&["EVENTS", "total"], rows.collect(), &[0, 12])
    }

    fn mounts(&self) -> Section<'_> {
        let rows = self.view.mounts.iter().map(|mount| {
            let text = match mount.note.as_str() {
                "" => mount.at.clone(),
                note => format!("{}  {note}", mount.at),
            };
            Line::from(format!("{:<9} {text}", mount.kind))
        });
        let title = Line::styled("MOUNTS", self.bold());
        paragraph(std::iter::once(title).chain(rows).collect())
    }

    /// Those that are used, the newest first; none if there are none at all.
    fn generations(&self) -> Option<Section<'_>> {
        let all = &self.view.generations;
        let row = |generation: &Generation| {
            let mut text = format!(
                "{:<9} {} paths, image of {}",
                generation.number,
                ui::count(generation.paths),
                ui::bytes(generation.image_bytes),
            );
            if generation.mounted {
                text.push_str(", mounted");
            }
            if generation.overlay {
                text.push_str(", the overlay stands on it");
            }
            if let Some(why) = &generation.waits_for {
                text.push_str(&format!(", waits: {why}"));
            }
            Line::from(text)
        };
        // An instance keeps few, a user may have made many.
        let is_used = |generation: &&Generation| {
            generation.mounted || generation.overlay || generation.waits_for.is_some()
        };
        let mut lines = vec![Line::styled("GENERATIONS", self.bold())];
        lines.extend(all.iter().rev().filter(is_used).map(row));
        let unused = all.len() + 1 - lines.len();
        if unused > 0 {
            lines.push(Line::from(format!("{unused} that nobody uses")));
        }
        (!all.is_empty()).then(|| paragraph(lines))
    }

    /// None if it is not used.
    fn raw_tier(&self) -> Option<Section<'_>> {
        let tier = self.view.raw_tier.as_ref()?;
        let held = format!(
            "{} files, {} of at most {}",
            ui::count(tier.files),
            ui::bytes(tier.bytes),
            ui::bytes(tier.bytes_max)
        );
        let read = format!(
            "{} a second, {} in all, {} blocks damaged",
            per_second(tier.hits_per_second),
            ui::count(tier.hits),
            ui::count(tier.misfits)
        );
        Some(paragraph(vec![
            Line::styled("RAW TIER", self.bold()),
            Line::from(format!("{:<9} {held}", "holds")),
            Line::from(format!("{:<9} {read}", "serves")),
        ]))
    }

    fn clients(&self) -> Section<'_> {
        let all = &self.view.clients;
        let row = |client: &Client| {
            vec![
                client.user.clone(),
                match client.pid {
                    0 => "-".to_owned(),
                    pid => pid.to_string(),
                },
                client.program.clone(),
                client.daemon.clone(),
                span(whole(client.connected_seconds)),
                per_second(client.per_second),
                match &client.operation {
                    None => "idle".to_owned(),
                    Some(operation) => {
                        format!("{operation} for {}", time(Some(client.operation_seconds)))
                    }
                },
            ]
        };
        let title = format!("CLIENTS {}", all.len());
        let headings = [
            title.as_str(),
            "pid",
            "program",
            "daemon",
            "since",
            "/s",
            "does",
        ];
        let widths = [12, 8, 16, 8, 9, 9, 40];
        let rows = u16::try_from(all.len() + 1).unwrap_or(u16::MAX);
        let headings = headings.map(str::to_owned);
        Section {
            rows,
            draw: Box::new(move |area, buffer| {
                // The last line says how many did not fit.
                let room = usize::from(area.height.saturating_sub(1));
                let fits = if all.len() > room {
                    room.saturating_sub(1)
                } else {
                    all.len()
                };
                let mut rows: Vec<Vec<String>> = all.iter().take(fits).map(row).collect();
                if fits < all.len() {
                    rows.push(vec![format!("{} more", all.len() - fits)]);
                }
                let headings: Vec<&str> = headings.iter().map(String::as_str).collect();
                // Text is easier to find at the left.
                (self.table_with(&headings, rows, &widths, &[1, 5]).draw)(area, buffer);
            }),
        }
    }

    /// A table whose first column is text and whose others are numbers.
    fn table<'a>(&self, headings: &[&str], rows: Vec<Vec<String>>, widths: &[u16]) -> Section<'a> {
        let numbers: Vec<usize> = (1..headings.len()).collect();
        self.table_with(headings, rows, widths, &numbers)
    }

    fn table_with<'a>(
        &self,
        headings: &[&str],
        rows: Vec<Vec<String>>,
        widths: &[u16],
        numbers: &[usize],
    ) -> Section<'a> {
        let line = |cells: Vec<Line<'static>>| Row::new(cells);
        let align = |at: usize, text: String| {
            let line = Line::from(text);
            if numbers.contains(&at) {
                line.right_aligned()
            } else {
                line
            }
        };
        let heading = headings
            .iter()
            .enumerate()
            .map(|(at, text)| align(at, (*text).to_owned()));
        let header = line(heading.collect()).style(self.bold());
        let count = u16::try_from(rows.len() + 1).unwrap_or(u16::MAX);
        let rows: Vec<Row<'static>> = rows
            .into_iter()
            .map(|cells| {
                let cells = cells.into_iter().enumerate();
                line(cells.map(|(at, text)| align(at, text)).collect())
            })
            .collect();
        // Names get the room that numbers leave.
        let name = match numbers.len() + 1 == headings.len() {
            true => Constraint::Fill(1),
            false => Constraint::Length(widths[0]),
        };
        let widths: Vec<Constraint> = std::iter::once(name)
            .chain(widths[1..].iter().map(|w| Constraint::Length(*w)))
            .collect();
        let table = Table::new(rows, widths).header(header).column_spacing(1);
        Section {
            rows: count,
            draw: Box::new(move |area, buffer| Widget::render(&table, area, buffer)),
        }
    }
}

fn paragraph<'a>(lines: Vec<Line<'a>>) -> Section<'a> {
    Section {
        rows: u16::try_from(lines.len()).unwrap_or(u16::MAX),
        draw: Box::new(move |area, buffer| Paragraph::new(lines.clone()).render(area, buffer)),
    }
}

/// Two sections beside each other.
fn beside<'a>(left: Section<'a>, right: Section<'a>) -> Section<'a> {
    Section {
        rows: left.rows.max(right.rows),
        draw: Box::new(move |area, buffer| {
            let halves = Layout::horizontal([Constraint::Fill(1), Constraint::Fill(1)]);
            let [one, two] = halves.spacing(3).areas(area);
            (left.draw)(one, buffer);
            (right.draw)(two, buffer);
        }),
    }
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "shown with three digits"
)]
fn whole(value: f64) -> u64 {
    value.max(0.0).round() as u64
}

/// A rate: with a digit after the point while it is small.
fn per_second(rate: f64) -> String {
    if rate == 0.0 {
        "0".to_owned()
    } else if rate < 9.95 {
        format!("{rate:.1}")
    } else {
        ui::count(whole(rate))
    }
}

/// A time: `12 µs`, `3.4 ms`, `1.2 s`.
fn time(seconds: Option<f64>) -> String {
    let Some(seconds) = seconds else {
        return "-".to_owned();
    };
    let (value, unit) = match seconds {
        s if s < 0.000_999_5 => (s * 1e6, "µs"),
        s if s < 0.999_5 => (s * 1e3, "ms"),
        s if s < 100.0 => (s, "s"),
        s => return span(whole(s)),
    };
    if value < 9.95 {
        format!("{value:.1} {unit}")
    } else {
        format!("{value:.0} {unit}")
    }
}

/// A longer time: `59 s`, `5 min`, `3 h 20`, `12 days`.
fn span(seconds: u64) -> String {
    match seconds {
        0..=119 => format!("{seconds} s"),
        120..=7_199 => format!("{} min", seconds / 60),
        7_200..=172_799 => format!("{} h {:02}", seconds / 3_600, seconds / 60 % 60),
        _ => format!("{} days", seconds / 86_400),
    }
}

#[cfg(test)]
mod tests;
