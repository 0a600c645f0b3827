//! The picture of a store: an analysis as bars and lines. Pure.

use super::Figures;
use super::analysis::Point;
use crate::plot::{Anchor, Color, Drawing, Shape, fitting, text_width};
use crate::ui;

const WIDTH: f32 = 1240.0;
const MARGIN: f32 = 36.0;
const GAP: f32 = 48.0;
/// Width of a panel of which two stand side by side.
const HALF: f32 = (WIDTH - 2.0 * MARGIN - GAP) / 2.0;
const ROW: f32 = 26.0;
const BAR: f32 = 16.0;
const LABEL_SIZE: f32 = 13.0;
const TITLE_SIZE: f32 = 17.0;
/// Height of a panel's title and subtitle.
const HEAD: f32 = 50.0;
const GROWTH_HEIGHT: f32 = 240.0;

const INK: Color = [33, 37, 41];
const GREY: Color = [108, 117, 125];
const GRID: Color = [222, 226, 230];
const BLUE: Color = [51, 102, 170];
const GREEN: Color = [60, 150, 90];
const ORANGE: Color = [224, 132, 50];
const LIGHT: Color = [178, 200, 226];

/// A bar with a name and a number.
struct Bar {
    name: String,
    /// From, to, colour; in the unit of the panel.
    parts: Vec<(f64, f64, Color)>,
    value: String,
}

/// The picture.
pub(super) fn draw(figures: &Figures) -> Drawing {
    let mut chart = Chart {
        shapes: Vec::new(),
        y: MARGIN,
    };
    let analysis = &figures.analysis;
    let whole = analysis.trees.bytes;
    chart.text(
        MARGIN,
        chart.y + 16.0,
        24.0,
        true,
        &fitting(
            &format!("Store {}", figures.store),
            24.0,
            WIDTH - 2.0 * MARGIN,
        ),
    );
    let mut about = format!(
        "{} paths, {} files, {}: on disk {}",
        ui::count(figures.paths),
        ui::count(analysis.trees.files),
        ui::bytes(whole),
        ui::bytes(figures.disk_bytes),
    );
    if whole > 0 {
        about.push_str(&format!(" ({})", ui::percent(figures.disk_bytes, whole)));
    }
    if analysis.is_estimate {
        about.push_str("; sums over files that differ are estimates");
    }
    chart.colored(MARGIN, chart.y + 42.0, 14.0, GREY, &about);
    chart.y += 70.0;

    chart.two(
        &Panel {
            title: "From what paths hold to what is stored",
            subtitle: "bytes of files, and what each step saves",
            legend: &[(BLUE, "kept"), (GREEN, "saved"), (ORANGE, "added")],
            bars: saved(figures),
        },
        &Panel {
            title: "What is on disk",
            subtitle: "by kind of piece, with frame headers",
            legend: &[],
            bars: on_disk(figures),
        },
    );
    let classes = analysis.classes.iter().map(|(name, class)| {
        let (unique, all) = (number(class.unique_bytes), number(class.bytes));
        Bar {
            name: (*name).to_owned(),
            parts: vec![(0.0, unique, BLUE), (unique, all, LIGHT)],
            value: ui::bytes(class.bytes),
        }
    });
    let mut classes: Vec<Bar> = classes.collect();
    classes.sort_by(|a, b| end_of(b).total_cmp(&end_of(a)));
    let closures = analysis.closures.iter().flatten();
    let closures = closures.map(|(name, bytes)| Bar {
        // The hash says nothing to people.
        name: name.get(33..).unwrap_or(name).to_owned(),
        parts: vec![(0.0, number(*bytes), BLUE)],
        value: ui::bytes(*bytes),
    });
    chart.two(
        &Panel {
            title: "By kind of file",
            subtitle: "bytes of files in all paths",
            legend: &[(BLUE, "once"), (LIGHT, "equal files")],
            bars: classes,
        },
        &Panel {
            title: "Largest closures",
            subtitle: match analysis.closures {
                Some(_) => "NAR bytes of paths that nothing refers to, with all that they need",
                None => "not computed: more than 300,000 paths",
            },
            legend: &[],
            bars: closures.collect(),
        },
    );
    chart.growth(&analysis.growth);
    Drawing {
        width: WIDTH,
        height: chart.y + MARGIN,
        title: format!("Store {}: {about}", figures.store),
        shapes: chart.shapes,
    }
}

/// From apparent size to what lies on disk.
fn saved(figures: &Figures) -> Vec<Bar> {
    let steps = figures.steps();
    let mut bars = vec![Bar {
        name: "files in all paths".into(),
        parts: vec![(0.0, number(steps.apparent), BLUE)],
        value: ui::bytes(steps.apparent),
    }];
    let mut at = steps.apparent;
    for (name, bytes) in [
        ("equal files", steps.file_duplicates),
        ("equal but for hash parts", steps.masked_duplicates),
        ("equal chunks", steps.chunk_duplicates),
        ("compression", steps.compression),
    ] {
        let after = at.saturating_sub(bytes);
        bars.push(Bar {
            name: name.into(),
            parts: vec![
                (0.0, number(after), LIGHT),
                (number(after), number(at), GREEN),
            ],
            value: if bytes == 0 {
                "0 B".into()
            } else {
                format!("− {}", ui::bytes(bytes))
            },
        });
        at = after;
    }
    bars.push(Bar {
        name: "directories, indexes, database".into(),
        parts: vec![
            (0.0, number(at), LIGHT),
            (number(at), number(at + steps.overhead), ORANGE),
        ],
        value: format!("+ {}", ui::bytes(steps.overhead)),
    });
    bars.push(Bar {
        name: "on disk".into(),
        parts: vec![(0.0, number(figures.disk_bytes), BLUE)],
        value: ui::bytes(figures.disk_bytes),
    });
    bars
}

fn on_disk(figures: &Figures) -> Vec<Bar> {
    let kinds = &figures.analysis.kinds;
    [
        ("contents", kinds.data.stored_bytes),
        ("directories", kinds.directories.stored_bytes),
        ("lists of chunks", kinds.recipes.stored_bytes),
        ("hash parts of masked files", kinds.patches.stored_bytes),
        ("footers, not in use any more", figures.rest_bytes()),
        ("merged index", figures.index_bytes),
        ("database", figures.database_bytes),
    ]
    .into_iter()
    .map(|(name, bytes)| Bar {
        name: name.into(),
        parts: vec![(0.0, number(bytes), BLUE)],
        value: ui::bytes(bytes),
    })
    .collect()
}

struct Panel<'a> {
    title: &'a str,
    subtitle: &'a str,
    legend: &'a [(Color, &'a str)],
    bars: Vec<Bar>,
}

impl Panel<'_> {
    #[expect(clippy::cast_precision_loss, reason = "some bars")]
    fn height(&self) -> f32 {
        HEAD + ROW * self.bars.len().max(1) as f32 + 34.0
    }
}

struct Chart {
    shapes: Vec<Shape>,
    /// Where the next row of panels begins.
    y: f32,
}

impl Chart {
    fn put(
        &mut self,
        (x, y): (f32, f32),
        size: f32,
        bold: bool,
        anchor: Anchor,
        color: Color,
        text: &str,
    ) {
        self.shapes.push(Shape::Text {
            x,
            y,
            size,
            bold,
            anchor,
            color,
            text: text.to_owned(),
        });
    }
    fn text(&mut self, x: f32, y: f32, size: f32, bold: bool, text: &str) {
        self.put((x, y), size, bold, Anchor::Start, INK, text);
    }
    fn colored(&mut self, x: f32, y: f32, size: f32, color: Color, text: &str) {
        self.put((x, y), size, false, Anchor::Start, color, text);
    }
    fn rect(&mut self, x: f32, y: f32, width: f32, height: f32, fill: Color) {
        // Thinner than that is not seen.
        if width > 0.05 && height > 0.05 {
            self.shapes.push(Shape::Rect {
                x,
                y,
                width,
                height,
                fill,
            });
        }
    }

    fn two(&mut self, left: &Panel<'_>, right: &Panel<'_>) {
        self.panel(MARGIN, left);
        self.panel(MARGIN + HALF + GAP, right);
        self.y += left.height().max(right.height());
    }

    fn head(&mut self, x: f32, width: f32, title: &str, subtitle: &str, legend: &[(Color, &str)]) {
        self.text(x, self.y + 14.0, TITLE_SIZE, true, title);
        self.colored(x, self.y + 33.0, LABEL_SIZE, GREY, subtitle);
        // From the right, so that it ends with the panel.
        let mut right = x + width;
        for (color, name) in legend.iter().rev() {
            right -= text_width(name, LABEL_SIZE);
            self.colored(right, self.y + 33.0, LABEL_SIZE, GREY, name);
            right -= 16.0;
            self.rect(right, self.y + 23.0, 11.0, 11.0, *color);
            right -= 14.0;
        }
    }

    fn panel(&mut self, x: f32, panel: &Panel<'_>) {
        self.head(x, HALF, panel.title, panel.subtitle, panel.legend);
        let widest = |texts: &mut dyn Iterator<Item = &String>| {
            texts
                .map(|text| text_width(text, LABEL_SIZE))
                .fold(0.0, f32::max)
        };
        let names = widest(&mut panel.bars.iter().map(|bar| &bar.name)).min(HALF * 0.42);
        let values = widest(&mut panel.bars.iter().map(|bar| &bar.value));
        let start = x + names + 10.0;
        let room = (x + HALF - values - 10.0 - start).max(1.0);
        let max = panel.bars.iter().map(end_of).fold(0.0, f64::max);
        let mut y = self.y + HEAD;
        if panel.bars.is_empty() {
            self.colored(x, y + BAR, LABEL_SIZE, GREY, "nothing");
        }
        for bar in &panel.bars {
            let name = fitting(&bar.name, LABEL_SIZE, names);
            let base = y + BAR - 4.0;
            self.put(
                (start - 10.0, base),
                LABEL_SIZE,
                false,
                Anchor::End,
                INK,
                &name,
            );
            for (from, to, color) in &bar.parts {
                let at = |value: f64| start + room * share(value, max);
                self.rect(at(*from), y, at(*to) - at(*from), BAR, *color);
            }
            let end = start + room * share(end_of(bar), max) + 8.0;
            self.colored(end, base, LABEL_SIZE, INK, &bar.value);
            y += ROW;
        }
        self.shapes.push(Shape::Line {
            points: vec![(start, self.y + HEAD - 4.0), (start, y - ROW + BAR + 4.0)],
            width: 1.0,
            color: GRID,
        });
    }

    fn growth(&mut self, points: &[Point]) {
        let width = WIDTH - 2.0 * MARGIN;
        self.head(
            MARGIN,
            width,
            "Growth",
            "bytes of files, as paths were added one after the other",
            &[(LIGHT, "all"), (BLUE, "without equal files")],
        );
        let Some(last) = points.last() else {
            self.colored(MARGIN, self.y + HEAD + BAR, LABEL_SIZE, GREY, "nothing");
            self.y += HEAD + ROW;
            return;
        };
        let max = nice_above(number(last.bytes.max(1)));
        let (left, right) = (MARGIN + 70.0, MARGIN + width - 10.0);
        let (top, bottom) = (self.y + HEAD, self.y + HEAD + GROWTH_HEIGHT);
        for step in 0..=4_u8 {
            let part = f64::from(step) / 4.0;
            let y = bottom - (bottom - top) * share(part, 1.0);
            self.shapes.push(Shape::Line {
                points: vec![(left, y), (right, y)],
                width: 1.0,
                color: GRID,
            });
            let label = ui::bytes(whole(max * part));
            self.put(
                (left - 8.0, y + 4.0),
                LABEL_SIZE,
                false,
                Anchor::End,
                GREY,
                &label,
            );
        }
        let x_of = |paths: u64| left + (right - left) * share(number(paths), number(last.paths));
        let y_of = |bytes: u64| bottom - (bottom - top) * share(number(bytes), max);
        for (value, color) in [
            ((|p: &Point| p.bytes) as fn(&Point) -> u64, LIGHT),
            (|p: &Point| p.unique_bytes, BLUE),
        ] {
            let mut area = vec![(left, bottom)];
            area.extend(points.iter().map(|p| (x_of(p.paths), y_of(value(p)))));
            area.push((right, bottom));
            self.shapes.push(Shape::Area {
                points: area,
                fill: color,
            });
        }
        let step = nice_above(number(last.paths) / 6.0).max(1.0);
        let mut at = 0.0;
        while at <= number(last.paths) {
            let x = x_of(whole(at));
            let label = ui::count(whole(at));
            self.put(
                (x, bottom + 18.0),
                LABEL_SIZE,
                false,
                Anchor::Middle,
                GREY,
                &label,
            );
            at += step;
        }
        self.put(
            ((left + right) / 2.0, bottom + 38.0),
            LABEL_SIZE,
            false,
            Anchor::Middle,
            GREY,
            "paths in the store",
        );
        self.y = bottom + 44.0;
    }
}

fn end_of(bar: &Bar) -> f64 {
    bar.parts.iter().map(|(_, to, _)| *to).fold(0.0, f64::max)
}

#[expect(clippy::cast_possible_truncation, reason = "a place in a picture")]
fn share(part: f64, whole: f64) -> f32 {
    if whole <= 0.0 {
        return 0.0;
    }
    (part / whole).clamp(0.0, 1.0) as f32
}

#[expect(clippy::cast_precision_loss, reason = "a place in a picture")]
fn number(n: u64) -> f64 {
    n as f64
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "a label"
)]
fn whole(value: f64) -> u64 {
    value.max(0.0).round() as u64
}

/// The next of 1, 2, 4, 5, 8 and their multiples by ten that is not below: ends of axes that divide well.
fn nice_above(value: f64) -> f64 {
    if value <= 0.0 {
        return 1.0;
    }
    let ten = 10_f64.powf(value.log10().floor());
    let found = [1.0, 2.0, 4.0, 5.0, 8.0, 10.0].map(|m| m * ten);
    found.into_iter().find(|n| *n >= value).unwrap_or(value)
}

#[cfg(test)]
mod tests {
    use super::super::Trees;
    use super::super::analysis::{Analysis, ClassBytes};
    use super::*;

    fn figures(paths: u64) -> Figures {
        let mut analysis = Analysis {
            trees: Trees {
                files: paths * 100,
                directories: paths * 10,
                symlinks: 0,
                bytes: paths * 6_300_000,
            },
            ..Analysis::default()
        };
        analysis.unique_bytes = paths * 5_000_000;
        analysis.closures = Some(
            (0..paths.min(10))
                .map(|n| {
                    (
                        format!("{:032}-a-package-with-quite-a-long-name-{n}-1.2.3", n),
                        1_000_000 * (20 - n),
                    )
                })
                .collect(),
        );
        analysis.growth = (1..=paths.min(500))
            .map(|n| Point {
                paths: n * paths / paths.min(500),
                registered: 0,
                bytes: n * 6_300_000,
                unique_bytes: n * 5_000_000,
            })
            .collect();
        if paths > 0 {
            analysis.classes = vec![(
                "shared libraries",
                ClassBytes {
                    files: 1,
                    bytes: 500,
                    unique_bytes: 400,
                },
            )];
        }
        Figures {
            store: "/var/lib/understory".into(),
            paths,
            disk_bytes: paths * 1_500_000,
            index_bytes: paths * 1_000,
            database_bytes: 100_000,
            analysis,
        }
    }

    /// Everything stays inside, and no two texts of a line overlap.
    #[test]
    fn nothing_overlaps_or_leaves_the_picture() {
        for paths in [0, 1, 2, 475, 1_000_000] {
            let drawing = draw(&figures(paths));
            let mut texts: Vec<(f32, f32, f32, &str)> = Vec::new();
            for shape in &drawing.shapes {
                match shape {
                    Shape::Rect {
                        x,
                        y,
                        width,
                        height,
                        ..
                    } => {
                        assert!(*x >= 0.0 && *y >= 0.0 && width.is_finite());
                        assert!(x + width <= drawing.width && y + height <= drawing.height);
                    }
                    Shape::Line { points, .. } | Shape::Area { points, .. } => {
                        assert!(points.iter().all(|(x, y)| (0.0..=drawing.width).contains(x)
                            && (0.0..=drawing.height).contains(y)));
                    }
                    Shape::Text {
                        x,
                        y,
                        size,
                        anchor,
                        text,
                        ..
                    } => {
                        // What is measured is more than it takes.
                        let width = text_width(text, *size) / 1.08;
                        let left = match anchor {
                            Anchor::Start => *x,
                            Anchor::Middle => x - width / 2.0,
                            Anchor::End => x - width,
                        };
                        assert!(left >= 0.0 && left + width <= drawing.width, "{text}");
                        assert!(*y <= drawing.height);
                        texts.push((*y, left, left + width, text));
                    }
                }
            }
            for (at, a) in texts.iter().enumerate() {
                for b in &texts[at + 1..] {
                    let apart = (a.0 - b.0).abs() > 10.0 || a.2 <= b.1 || b.2 <= a.1;
                    assert!(apart, "{paths} paths: '{}' over '{}'", a.3, b.3);
                }
            }
        }
    }

    #[test]
    fn ends_of_axes() {
        for (value, end) in [
            (0.0, 1.0),
            (1.0, 1.0),
            (3.1, 4.0),
            (6_300.0, 8_000.0),
            (9.5, 10.0),
        ] {
            assert!((nice_above(value) - end).abs() < 1e-9, "{value}");
        }
    }
}
