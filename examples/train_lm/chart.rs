//! The loss curve as SVG.

use std::path::Path;

use anyhow::{Result, anyhow};
use plotters::prelude::*;

use crate::metrics::Record;

/// Colours that stay apart for colour-blind readers and in print.
const TRAIN: RGBColor = RGBColor(0x9e, 0xb9, 0xd9);
const HELD_OUT: RGBColor = RGBColor(0xb3, 0x3c, 0x00);

/// Draws training and held-out loss over the tokens trained on.
pub fn draw(path: &Path, title: &str, records: &[Record]) -> Result<()> {
    let tokens = records.iter().map(|record| record.tokens).max().unwrap_or(0);
    let (unit, name, digits) = if tokens < 2_000_000 { (1e3, "thousand", 0) } else { (1e6, "million", 1) };
    let curve = |loss: fn(&Record) -> Option<f64>| -> Vec<(f64, f64)> {
        records.iter().filter_map(|record| Some((record.tokens as f64 / unit, loss(record)?))).collect()
    };
    let (train, held_out) = (curve(|record| record.loss), curve(|record| record.held_out));
    let values = || train.iter().chain(&held_out);
    // Ranges come from the data: plotters draws points outside them as a false plateau on the edge.
    let end = values().map(|point| point.0).fold(f64::MIN_POSITIVE, f64::max);
    let top = values().map(|point| point.1).fold(0.1, f64::max) * 1.05;

    let root = SVGBackend::new(path, (840, 520)).into_drawing_area();
    let draw = || -> Result<(), Box<dyn std::error::Error + '_>> {
        root.fill(&WHITE)?;
        let mut chart = ChartBuilder::on(&root)
            .caption(title, ("sans-serif", 20))
            .margin(12)
            .margin_right(32)
            .x_label_area_size(48)
            .y_label_area_size(60)
            .build_cartesian_2d(0.0..end, 0.0..top)?;
        chart
            .configure_mesh()
            .x_desc(format!("{name} tokens (bytes) trained on"))
            .y_desc("loss, nats per byte")
            .x_label_formatter(&|x| format!("{x:.digits$}"))
            .y_label_formatter(&|y| format!("{y:.1}"))
            .light_line_style(WHITE)
            .bold_line_style(BLACK.mix(0.1))
            .axis_desc_style(("sans-serif", 16))
            .label_style(("sans-serif", 14))
            .draw()?;
        chart
            .draw_series(LineSeries::new(train.iter().copied(), TRAIN.stroke_width(2)))?
            .label("training batch")
            .legend(|(x, y)| PathElement::new([(x, y), (x + 20, y)], TRAIN.stroke_width(2)));
        chart
            .draw_series(LineSeries::new(held_out.iter().copied(), HELD_OUT.stroke_width(2)).point_size(3))?
            .label("held out")
            .legend(|(x, y)| PathElement::new([(x, y), (x + 20, y)], HELD_OUT.stroke_width(2)));
        chart
            .configure_series_labels()
            .position(SeriesLabelPosition::UpperRight)
            .background_style(WHITE.mix(0.9))
            .border_style(BLACK.mix(0.3))
            .label_font(("sans-serif", 15))
            .draw()?;
        root.present()?;
        Ok(())
    };
    draw().map_err(|error| anyhow!("cannot draw {}: {error}", path.display()))
}
