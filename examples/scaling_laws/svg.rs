//! The few shapes of a chart as SVG, and the same picture as PNG.

use std::{fmt::Write as _, fs, path::Path, sync::Arc};

use anyhow::{Context, Result};
use resvg::{tiny_skia, usvg};

/// Pixels of the PNG for one unit of the SVG.
const SCALE: f32 = 2.0;
/// The font of the PNG, carried along so that it looks the same everywhere; an SVG takes what its viewer has.
const FONT: &str = "Noto Sans";

pub struct Svg {
    width: f64,
    height: f64,
    body: String,
}

/// How a line is drawn.
#[derive(Clone, Copy)]
pub struct Stroke {
    pub colour: &'static str,
    pub width: f64,
    /// Lengths of dash and gap; empty for a solid line.
    pub dash: &'static str,
    pub opacity: f64,
}

/// How a text is set: `anchor` is `start`, `middle` or `end`.
#[derive(Clone, Copy)]
pub struct Type {
    pub size: f64,
    pub anchor: &'static str,
    pub colour: &'static str,
    pub bold: bool,
    /// Reads upwards.
    pub upright: bool,
}

#[derive(Clone, Copy)]
pub enum Marker {
    Disc,
    Square,
}

pub type Position = (f64, f64);

/// Keeps text readable on lines.
const HALO: &str =
    "<style>text { paint-order: stroke; stroke: white; stroke-width: 3px; stroke-linejoin: round }</style>";

impl Svg {
    pub fn new(width: f64, height: f64) -> Self {
        let mut svg = Self { width, height, body: String::new() };
        svg.rectangle((0.0, 0.0), (width, height), "#ffffff", 1.0);
        svg
    }

    pub fn rectangle(&mut self, (x, y): Position, (width, height): Position, fill: &str, opacity: f64) {
        let _ = writeln!(
            self.body,
            r#"<rect x="{x:.1}" y="{y:.1}" width="{width:.1}" height="{height:.1}" fill="{fill}" fill-opacity="{opacity}"/>"#
        );
    }

    pub fn line(&mut self, points: &[Position], stroke: Stroke) {
        let Stroke { colour, width, dash, opacity } = stroke;
        let mut path = String::new();
        for (x, y) in points {
            let _ = write!(path, "{x:.2},{y:.2} ");
        }
        let dash = if dash.is_empty() { String::new() } else { format!(r#" stroke-dasharray="{dash}""#) };
        let _ = writeln!(
            self.body,
            r#"<polyline points="{}" fill="none" stroke="{colour}" stroke-width="{width}" stroke-opacity="{opacity}" stroke-linejoin="round"{dash}/>"#,
            path.trim_end()
        );
    }

    /// Everything that `draw` adds is seen only inside the rectangle.
    pub fn clipped(&mut self, (x, y): Position, (width, height): Position, draw: impl FnOnce(&mut Self)) {
        let id = format!("clip{}", self.body.len());
        let _ = writeln!(
            self.body,
            r#"<clipPath id="{id}"><rect x="{x:.1}" y="{y:.1}" width="{width:.1}" height="{height:.1}"/></clipPath><g clip-path="url(#{id})">"#
        );
        draw(self);
        self.body.push_str("</g>\n");
    }

    /// A filled disc or an open square.
    pub fn marker(&mut self, (x, y): Position, marker: Marker, size: f64, colour: &str) {
        let _ = match marker {
            Marker::Disc => writeln!(
                self.body,
                r##"<circle cx="{x:.2}" cy="{y:.2}" r="{size}" fill="{colour}" stroke="#ffffff" stroke-width="0.8"/>"##
            ),
            Marker::Square => writeln!(
                self.body,
                r##"<rect x="{:.2}" y="{:.2}" width="{}" height="{}" fill="#ffffff" stroke="{colour}" stroke-width="1.6"/>"##,
                x - size,
                y - size,
                2.0 * size,
                2.0 * size
            ),
        };
    }

    /// `text` with what stands between `^{` and `}` raised.
    pub fn text(&mut self, (x, y): Position, style: Type, text: &str) {
        let Type { size, anchor, colour, bold, upright } = style;
        let mut content = text.replace('&', "&amp;").replace('<', "&lt;");
        while let Some((before, rest)) = content.clone().split_once("^{") {
            let (raised, after) = rest.split_once('}').unwrap_or((rest, ""));
            content = format!(
                r#"{before}<tspan dy="-0.38em" font-size="{:.1}">{raised}</tspan><tspan dy="0.27em">&#8203;{after}</tspan>"#,
                size * 0.72
            );
        }
        let weight = if bold { r#" font-weight="bold""# } else { "" };
        let turn = if upright { format!(r#" transform="rotate(-90 {x:.1} {y:.1})""#) } else { String::new() };
        let _ = writeln!(
            self.body,
            r#"<text x="{x:.1}" y="{y:.1}" font-size="{size}" text-anchor="{anchor}" fill="{colour}"{weight}{turn}>{content}</text>"#
        );
    }

    /// Writes `path` with the extensions `svg` and `png`.
    pub fn write(&self, path: &Path) -> Result<()> {
        let Self { width, height, body } = self;
        let text = format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width}\" height=\"{height}\" viewBox=\"0 0 {width} {height}\" \
             font-family=\"{FONT}, Helvetica, Arial, sans-serif\">\n{HALO}\n{body}</svg>\n"
        );
        let svg = path.with_extension("svg");
        fs::write(&svg, &text).with_context(|| format!("cannot write {}", svg.display()))?;
        let png = path.with_extension("png");
        rasterize(&text, &png).with_context(|| format!("cannot write {}", png.display()))
    }
}

fn rasterize(svg: &str, path: &Path) -> Result<()> {
    let mut fonts = usvg::fontdb::Database::new();
    for font in [notosans::REGULAR_TTF, notosans::BOLD_TTF] {
        fonts.load_font_data(font.to_vec());
    }
    let options = usvg::Options { font_family: FONT.to_owned(), fontdb: Arc::new(fonts), ..usvg::Options::default() };
    let tree = usvg::Tree::from_str(svg, &options)?;
    let size = tree.size();
    let (width, height) = ((size.width() * SCALE) as u32, (size.height() * SCALE) as u32);
    let mut pixels = tiny_skia::Pixmap::new(width, height).context("the picture is empty")?;
    resvg::render(&tree, tiny_skia::Transform::from_scale(SCALE, SCALE), &mut pixels.as_mut());
    Ok(pixels.save_png(path)?)
}
