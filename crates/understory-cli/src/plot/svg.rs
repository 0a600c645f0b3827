//! A drawing as SVG 1.1: text stays text.

use super::{Anchor, Color, Drawing, Shape};
use std::fmt::Write;

const FONTS: &str = "Ubuntu, 'DejaVu Sans', Verdana, Helvetica, Arial, sans-serif";

pub(super) fn encode(drawing: &Drawing) -> String {
    let mut out = String::new();
    // Writing to a string cannot fail.
    let _ = write_all(&mut out, drawing);
    out
}

fn write_all(out: &mut String, drawing: &Drawing) -> std::fmt::Result {
    let Drawing {
        width,
        height,
        title,
        shapes,
    } = drawing;
    writeln!(
        out,
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width}\" height=\"{height}\" \
         viewBox=\"0 0 {width} {height}\" font-family=\"{FONTS}\" role=\"img\">"
    )?;
    writeln!(out, "<title>{}</title>", escape(title))?;
    writeln!(
        out,
        "<rect width=\"{width}\" height=\"{height}\" fill=\"#ffffff\"/>"
    )?;
    for shape in shapes {
        match shape {
            Shape::Rect {
                x,
                y,
                width,
                height,
                fill,
            } => writeln!(
                out,
                "<rect x=\"{x:.1}\" y=\"{y:.1}\" width=\"{width:.1}\" height=\"{height:.1}\" fill=\"{}\"/>",
                hex(*fill)
            )?,
            Shape::Line {
                points,
                width,
                color,
            } => writeln!(
                out,
                "<polyline points=\"{}\" fill=\"none\" stroke=\"{}\" stroke-width=\"{width}\"/>",
                list(points),
                hex(*color)
            )?,
            Shape::Area { points, fill } => writeln!(
                out,
                "<polygon points=\"{}\" fill=\"{}\"/>",
                list(points),
                hex(*fill)
            )?,
            Shape::Text {
                x,
                y,
                size,
                bold,
                anchor,
                color,
                text,
            } => {
                let anchor = match anchor {
                    Anchor::Start => "start",
                    Anchor::Middle => "middle",
                    Anchor::End => "end",
                };
                let weight = if *bold { " font-weight=\"bold\"" } else { "" };
                writeln!(
                    out,
                    "<text x=\"{x:.1}\" y=\"{y:.1}\" font-size=\"{size}\" text-anchor=\"{anchor}\"{weight} fill=\"{}\">{}</text>",
                    hex(*color),
                    escape(text)
                )?;
            }
        }
    }
    writeln!(out, "</svg>")
}

fn list(points: &[(f32, f32)]) -> String {
    let points: Vec<String> = points
        .iter()
        .map(|(x, y)| format!("{x:.1},{y:.1}"))
        .collect();
    points.join(" ")
}

fn hex([red, green, blue]: Color) -> String {
    format!("#{red:02x}{green:02x}{blue:02x}")
}

/// Names of files come from anybody: nothing of them is markup, and control characters are not allowed in XML.
fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            c if c.is_control() => out.push('\u{fffd}'),
            c => out.push(c),
        }
    }
    out
}
