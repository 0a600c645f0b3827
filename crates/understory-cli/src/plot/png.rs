//! A drawing as PNG, with two pixels for each of its own, so that it is sharp on today's screens.

use super::{Anchor, Color, Drawing, Shape, em_scale, font};
use ab_glyph::{Font, FontRef, PxScale, ScaleFont, point};
use tiny_skia::{
    FillRule, Paint, PathBuilder, Pixmap, PremultipliedColorU8, Rect, Stroke, Transform,
};

const SCALE: f32 = 2.0;
/// What bold adds to the right of each glyph, as a share of its size.
const BOLD: f32 = 0.045;

pub(super) fn encode(drawing: &Drawing) -> Result<Vec<u8>, String> {
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "a drawing has some thousand pixels"
    )]
    let (width, height) = (
        (drawing.width * SCALE).ceil().max(1.0) as u32,
        (drawing.height * SCALE).ceil().max(1.0) as u32,
    );
    let mut image = Pixmap::new(width, height).ok_or("the drawing is too large")?;
    image.fill(tiny_skia::Color::WHITE);
    let font = font();
    let transform = Transform::from_scale(SCALE, SCALE);
    for shape in &drawing.shapes {
        match shape {
            Shape::Rect {
                x,
                y,
                width,
                height,
                fill,
            } => {
                if let Some(rect) = Rect::from_xywh(*x, *y, *width, *height) {
                    image.fill_rect(rect, &paint(*fill), transform, None);
                }
            }
            Shape::Line {
                points,
                width,
                color,
            } => {
                if let Some(path) = path(points, false) {
                    let stroke = Stroke {
                        width: *width,
                        ..Stroke::default()
                    };
                    image.stroke_path(&path, &paint(*color), &stroke, transform, None);
                }
            }
            Shape::Area { points, fill } => {
                // What has no area cannot be filled.
                if let Some(path) = path(points, true)
                    && path.bounds().width() > 0.0
                    && path.bounds().height() > 0.0
                {
                    image.fill_path(&path, &paint(*fill), FillRule::Winding, transform, None);
                }
            }
            Shape::Text {
                x,
                y,
                size,
                bold,
                anchor,
                color,
                text: words,
            } => {
                if let Some(font) = &font {
                    let line = Text {
                        at: (x * SCALE, y * SCALE),
                        size: size * SCALE,
                        bold: *bold,
                        anchor: *anchor,
                        color: *color,
                    };
                    line.draw(words, font, &mut image);
                }
            }
        }
    }
    image.encode_png().map_err(|e| e.to_string())
}

fn paint(color: Color) -> Paint<'static> {
    let mut paint = Paint::default();
    paint.set_color_rgba8(color[0], color[1], color[2], 255);
    paint.anti_alias = true;
    paint
}

fn path(points: &[(f32, f32)], close: bool) -> Option<tiny_skia::Path> {
    let mut builder = PathBuilder::new();
    for (number, (x, y)) in points.iter().enumerate() {
        if number == 0 {
            builder.move_to(*x, *y);
        } else {
            builder.line_to(*x, *y);
        }
    }
    if close {
        builder.close();
    }
    builder.finish()
}

/// How a text is drawn, in pixels of the image.
struct Text {
    at: (f32, f32),
    size: f32,
    bold: bool,
    anchor: Anchor,
    color: Color,
}

impl Text {
    fn draw(&self, text: &str, font: &FontRef<'_>, image: &mut Pixmap) {
        let scale = PxScale::from(self.size * em_scale(font));
        let scaled = font.as_scaled(scale);
        let width: f32 = text
            .chars()
            .map(|c| scaled.h_advance(scaled.glyph_id(c)))
            .sum();
        let mut x = match self.anchor {
            Anchor::Start => self.at.0,
            Anchor::Middle => self.at.0 - width / 2.0,
            Anchor::End => self.at.0 - width,
        };
        let passes = if self.bold { 2 } else { 1 };
        for c in text.chars() {
            let id = scaled.glyph_id(c);
            for pass in 0..passes {
                #[expect(clippy::cast_precision_loss, reason = "0 or 1")]
                let shift = pass as f32 * BOLD * self.size;
                let glyph = id.with_scale_and_position(scale, point(x + shift, self.at.1));
                if let Some(outline) = font.outline_glyph(glyph) {
                    let bounds = outline.px_bounds();
                    outline.draw(|dx, dy, coverage| {
                        self.ink(image, (bounds.min.x, bounds.min.y), (dx, dy), coverage);
                    });
                }
            }
            x += scaled.h_advance(id);
        }
    }

    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        clippy::cast_precision_loss,
        reason = "pixels of an image; what is outside is left out"
    )]
    fn ink(&self, image: &mut Pixmap, origin: (f32, f32), (dx, dy): (u32, u32), coverage: f32) {
        let (x, y) = (origin.0 + dx as f32, origin.1 + dy as f32);
        if x < 0.0 || y < 0.0 || x >= image.width() as f32 || y >= image.height() as f32 {
            return;
        }
        let at = y as usize * image.width() as usize + x as usize;
        let pixel = &mut image.pixels_mut()[at];
        let share = coverage.clamp(0.0, 1.0);
        let mix = |old: u8, new: u8| {
            (f32::from(old) + (f32::from(new) - f32::from(old)) * share).round() as u8
        };
        let mixed = PremultipliedColorU8::from_rgba(
            mix(pixel.red(), self.color[0]),
            mix(pixel.green(), self.color[1]),
            mix(pixel.blue(), self.color[2]),
            255,
        );
        if let Some(mixed) = mixed {
            *pixel = mixed;
        }
    }
}
