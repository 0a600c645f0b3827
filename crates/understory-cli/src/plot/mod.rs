//! A drawing of rectangles, lines and text, as SVG or PNG.
//!
//! Both forms are made of the same shapes and measured with the same font, so that what fits in one fits in the
//! other. Shapes are drawn by hand because charts are: `plotters` (last release 2024) would give axes of its own
//! looks and needs a font of the system or a file for bitmaps; `resvg` could turn our SVG into PNG, with a font
//! database, a shaper and forty crates. For PNG `tiny-skia` (BSD-3-Clause) fills paths and `ab_glyph` (Apache-2.0)
//! gives outlines of the one font that is built in: Ubuntu Light (Ubuntu font licence), from `epaint_default_fonts`.

mod png;
mod svg;

use ab_glyph::{Font, FontRef, ScaleFont};
use std::path::Path;

/// A colour, red, green and blue.
pub(crate) type Color = [u8; 3];

/// Where a text stands relative to its point.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Anchor {
    Start,
    Middle,
    End,
}

/// One thing that is drawn. Lengths are in pixels, from the upper left corner; a text's point is on its base line.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Shape {
    Rect {
        x: f32,
        y: f32,
        width: f32,
        height: f32,
        fill: Color,
    },
    Line {
        points: Vec<(f32, f32)>,
        width: f32,
        color: Color,
    },
    Area {
        points: Vec<(f32, f32)>,
        fill: Color,
    },
    Text {
        x: f32,
        y: f32,
        size: f32,
        bold: bool,
        anchor: Anchor,
        color: Color,
        text: String,
    },
}

/// A drawing.
#[derive(Debug, Clone, Default)]
pub(crate) struct Drawing {
    pub(crate) width: f32,
    pub(crate) height: f32,
    /// What it shows, for who cannot see it.
    pub(crate) title: String,
    pub(crate) shapes: Vec<Shape>,
}

/// The forms of a drawing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Format {
    Svg,
    Png,
}

impl Format {
    /// By the ending of a file's name.
    pub(crate) fn of(file: &Path) -> Option<Self> {
        let extension = file.extension()?.to_str()?;
        if extension.eq_ignore_ascii_case("svg") {
            Some(Self::Svg)
        } else if extension.eq_ignore_ascii_case("png") {
            Some(Self::Png)
        } else {
            None
        }
    }
}

impl Drawing {
    pub(crate) fn encode(&self, format: Format) -> Result<Vec<u8>, String> {
        match format {
            Format::Svg => Ok(svg::encode(self).into_bytes()),
            Format::Png => png::encode(self),
        }
    }
}

/// The built-in font; `None` would be a bug in its crate, and text is then left out of bitmaps.
fn font() -> Option<FontRef<'static>> {
    FontRef::try_from_slice(epaint_default_fonts::UBUNTU_LIGHT).ok()
}

/// The width of a text in pixels, a little more than it takes in the built-in font: viewers of SVG have others.
pub(crate) fn text_width(text: &str, size: f32) -> f32 {
    let Some(font) = font() else {
        return text.chars().map(|_| size * 0.6).sum();
    };
    let scaled = font.as_scaled(size * em_scale(&font));
    let width: f32 = text
        .chars()
        .map(|c| scaled.h_advance(scaled.glyph_id(c)))
        .sum();
    width * 1.08
}

/// `ab_glyph` scales by the height of lines, everybody else by the em.
fn em_scale(font: &FontRef<'_>) -> f32 {
    font.units_per_em()
        .map_or(1.0, |em| font.height_unscaled() / em)
}

/// The text, shortened in its middle until it fits.
pub(crate) fn fitting(text: &str, size: f32, width: f32) -> String {
    if text_width(text, size) <= width {
        return text.to_owned();
    }
    let chars: Vec<char> = text.chars().collect();
    for kept in (1..chars.len()).rev() {
        let (head, tail) = (kept.div_ceil(2), kept / 2);
        let short: String = chars[..head]
            .iter()
            .chain(&['…'])
            .chain(&chars[chars.len() - tail..])
            .collect();
        if text_width(&short, size) <= width {
            return short;
        }
    }
    "…".to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn drawing() -> Drawing {
        Drawing {
            width: 120.0,
            height: 60.0,
            title: "a < b & \"c\"".into(),
            shapes: vec![
                Shape::Rect {
                    x: 10.0,
                    y: 10.0,
                    width: 20.0,
                    height: 10.0,
                    fill: [255, 0, 0],
                },
                Shape::Line {
                    points: vec![(0.0, 50.0), (119.0, 50.0)],
                    width: 2.0,
                    color: [0, 0, 255],
                },
                Shape::Text {
                    x: 40.0,
                    y: 40.0,
                    size: 20.0,
                    bold: true,
                    anchor: Anchor::Start,
                    color: [0, 0, 0],
                    text: "<M&M>\u{1}".into(),
                },
            ],
        }
    }

    #[test]
    fn svg_is_well_formed() {
        let text = String::from_utf8(drawing().encode(Format::Svg).unwrap()).unwrap();
        assert!(text.starts_with("<svg xmlns="), "{text}");
        assert!(text.contains("&lt;M&amp;M&gt;"), "{text}");
        assert!(
            text.contains("<title>a &lt; b &amp; &quot;c&quot;</title>"),
            "{text}"
        );
        assert!(!text.contains('\u{1}'), "no control characters in XML");
    }

    #[test]
    fn png_has_the_shapes_and_ink_where_the_text_is() {
        let bytes = drawing().encode(Format::Png).unwrap();
        let image = tiny_skia::Pixmap::decode_png(&bytes).unwrap();
        assert_eq!((image.width(), image.height()), (240, 120));
        let at = |x: u32, y: u32| {
            let p = image.pixel(x * 2, y * 2).unwrap();
            [p.red(), p.green(), p.blue()]
        };
        assert_eq!(at(20, 15), [255, 0, 0]);
        assert_eq!(at(60, 50), [0, 0, 255]);
        assert_eq!(at(5, 5), [255, 255, 255]);
        let dark = (80..160)
            .flat_map(|x| (50..82).map(move |y| (x, y)))
            .filter(|(x, y)| image.pixel(*x, *y).unwrap().red() < 100)
            .count();
        assert!(dark > 100, "{dark} dark pixels: text is drawn");
    }

    #[test]
    fn texts_are_cut_to_fit() {
        let long = "a-very-long-name-of-a-package-1.2.3";
        let short = fitting(long, 12.0, 100.0);
        assert!(short.contains('…') && short.starts_with('a') && short.ends_with('3'));
        assert!(text_width(&short, 12.0) <= 100.0);
        assert_eq!(fitting("x", 12.0, 100.0), "x");
        assert!(text_width("MMMM", 12.0) > 2.0 * text_width("iiii", 12.0));
    }

    #[test]
    fn formats_by_name() {
        assert_eq!(Format::of(Path::new("a.SVG")), Some(Format::Svg));
        assert_eq!(Format::of(Path::new("x/a.png")), Some(Format::Png));
        assert_eq!(Format::of(Path::new("png")), None);
    }
}
