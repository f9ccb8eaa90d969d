//! A panel of a chart: a rectangle with a scale along each side.

use crate::svg::{Position, Stroke, Svg, Type};

const INK: &str = "#222222";
const FAINT: &str = "#e4e4e4";
pub const LABEL: Type = Type { size: 13.0, anchor: "middle", colour: INK, bold: false, upright: false };

#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Scale {
    pub low: f64,
    pub high: f64,
    pub log: bool,
    /// Between the marks of a linear scale; by default a round number.
    pub step: Option<f64>,
}

pub struct Panel {
    pub corner: Position,
    pub size: Position,
    pub x: Scale,
    pub y: Scale,
}

impl Scale {
    /// Where `value` lies, 0 to 1.
    fn place(&self, value: f64) -> f64 {
        let part = |value: f64, low: f64, high: f64| (value - low) / (high - low);
        match self.log {
            true => part(value.max(f64::MIN_POSITIVE).ln(), self.low.ln(), self.high.ln()),
            false => part(value, self.low, self.high),
        }
    }

    /// The marked values and their labels; some have none.
    fn ticks(&self) -> Vec<(f64, String)> {
        if self.log && self.high / self.low > 20.0 { self.decades() } else { self.round() }
    }

    fn decades(&self) -> Vec<(f64, String)> {
        let range = self.low.log10().floor() as i32..=self.high.log10().ceil() as i32;
        let ticks = range.flat_map(|decade| (1..10).map(move |digit| (digit, decade)));
        let ticks = ticks.map(|(digit, decade)| {
            let label =
                if digit == 1 { format!("10^{{{}}}", decade.to_string().replace('-', "−")) } else { String::new() };
            (f64::from(digit) * 10f64.powi(decade), label)
        });
        ticks.filter(|(value, _)| self.holds(*value)).collect()
    }

    /// Four to nine round numbers at equal distances.
    fn round(&self) -> Vec<(f64, String)> {
        let rough = (self.high - self.low) / 5.0;
        let decade = 10f64.powf(rough.log10().floor());
        let step =
            [1.0, 2.0, 2.5, 5.0, 10.0].into_iter().map(|factor| factor * decade).find(|&step| step >= rough * 0.8);
        let step = self.step.or(step).unwrap_or(rough);
        let digits = (0..6).find(|&digits| {
            let scaled = step * 10f64.powi(digits);
            (scaled - scaled.round()).abs() < 1e-6
        });
        let digits = digits.unwrap_or(6) as usize;
        let first = (self.low / step).ceil() as i64;
        let ticks = (first..).map(|index| index as f64 * step).take_while(|value| *value <= self.high * (1.0 + 1e-12));
        ticks.map(|value| (value, format!("{:.digits$}", value + 0.0).replace('-', "−"))).collect()
    }

    fn holds(&self, value: f64) -> bool {
        let slack = 1.0 + 1e-9;
        self.low <= value * slack && value <= self.high * slack
    }
}

impl Panel {
    pub fn place(&self, (x, y): Position) -> Position {
        let (left, top) = self.corner;
        let (width, height) = self.size;
        (left + width * self.x.place(x), top + height * (1.0 - self.y.place(y)))
    }

    /// Grid, frame, marks and labels.
    pub fn draw(&self, svg: &mut Svg, title: &str, x_label: &str, y_label: &str) {
        let ((left, top), (width, height)) = (self.corner, self.size);
        let (right, bottom) = (left + width, top + height);
        let grid = Stroke { colour: FAINT, width: 0.8, dash: "", opacity: 1.0 };
        let frame = Stroke { colour: INK, width: 1.0, dash: "", opacity: 1.0 };
        for (value, label) in self.x.ticks() {
            let (x, _) = self.place((value, self.y.low));
            let length = if label.is_empty() { 3.0 } else { 6.0 };
            if !label.is_empty() {
                svg.line(&[(x, top), (x, bottom)], grid);
            }
            svg.line(&[(x, bottom), (x, bottom + length)], frame);
            svg.text((x, bottom + 21.0), LABEL, &label);
        }
        for (value, label) in self.y.ticks() {
            let (_, y) = self.place((self.x.low, value));
            svg.line(&[(left, y), (right, y)], grid);
            svg.line(&[(left - 6.0, y), (left, y)], frame);
            svg.text((left - 10.0, y + 4.5), Type { anchor: "end", ..LABEL }, &label);
        }
        svg.line(&[(left, top), (right, top), (right, bottom), (left, bottom), (left, top)], frame);
        let middle = (left + right) / 2.0;
        svg.text((middle, top - 12.0), Type { size: 14.5, bold: true, ..LABEL }, title);
        svg.text((middle, bottom + 44.0), Type { size: 14.0, ..LABEL }, x_label);
        let side = (left - 50.0, (top + bottom) / 2.0);
        svg.text(side, Type { size: 14.0, upright: true, ..LABEL }, y_label);
    }

    /// Draws what lies inside the panel.
    pub fn inside(&self, svg: &mut Svg, draw: impl FnOnce(&mut Svg)) {
        svg.clipped(self.corner, self.size, draw);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_round_and_inside() {
        let labels = |low, high, log| -> Vec<String> {
            Scale { low, high, log, step: None }
                .ticks()
                .into_iter()
                .map(|tick| tick.1)
                .filter(|label| !label.is_empty())
                .collect()
        };
        assert_eq!(labels(0.0, 8192.0, false), ["0", "2000", "4000", "6000", "8000"]);
        assert_eq!(labels(2.9, 4.6, true), ["3.0", "3.5", "4.0", "4.5"]);
        assert_eq!(labels(-1.2, 0.9, false), ["−1.0", "−0.5", "0.0", "0.5"]);
        assert_eq!(labels(3e-6, 2e-4, true), ["10^{−5}", "10^{−4}"]);
    }

    #[test]
    fn corners_are_corners() {
        let scale = |log| Scale { low: 1.0, high: 100.0, log, step: None };
        let panel = Panel { corner: (10.0, 20.0), size: (200.0, 100.0), x: scale(true), y: scale(false) };
        assert_eq!(panel.place((1.0, 1.0)), (10.0, 120.0));
        assert_eq!(panel.place((100.0, 100.0)), (210.0, 20.0));
        assert_eq!(panel.place((10.0, 50.5)), (110.0, 70.0));
    }
}
