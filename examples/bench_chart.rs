//! Draws a CSV file of `bench_attention`: how many times faster MoBA is than the fastest dense attention in the
//! file, against the sequence length. Also prints the same numbers as a Markdown table.
//!
//! ```text
//! cargo run --release --example bench_chart -- docs/benchmarks/h100-forward.csv --svg docs/benchmarks/h100-forward.svg
//! ```

use std::{collections::BTreeMap, fs, path::PathBuf};

use anyhow::{Context, Result, ensure};
use clap::Parser;
use plotters::prelude::*;

#[derive(Parser)]
struct Arguments {
    /// What `bench_attention --csv` wrote; lines that start with # are passed over.
    csv: PathBuf,
    /// Where the chart goes.
    #[arg(long)]
    svg: PathBuf,
    #[arg(long, default_value = "forward")]
    pass: String,
    #[arg(long, default_value_t = 128)]
    head_dim: u32,
    #[arg(long, default_value = "uniform")]
    data: String,
    /// Query heads for each key head.
    #[arg(long, default_value_t = 1)]
    group: u64,
}

/// Milliseconds by sequence length and heads.
type Times = BTreeMap<(u64, u64), f64>;
/// Those of MoBA by block size and top-k.
type MobaTimes = BTreeMap<(u64, u64), Times>;

/// MoBA's times and the fastest dense ones.
fn read(arguments: &Arguments) -> Result<(MobaTimes, Times)> {
    let text = fs::read_to_string(&arguments.csv).with_context(|| arguments.csv.display().to_string())?;
    let mut lines = text.lines().filter(|line| !line.starts_with('#'));
    let header: Vec<&str> = lines.next().unwrap_or_default().split(',').collect();
    let (mut moba, mut dense) = (MobaTimes::new(), Times::new());
    for line in lines {
        let cells: Vec<&str> = line.split(',').collect();
        ensure!(cells.len() == header.len(), "wanted {} cells, got: {line}", header.len());
        let cell = |name: &str| {
            let place = header.iter().position(|title| *title == name);
            place.map(|place| cells[place]).with_context(|| format!("no column {name}"))
        };
        let chosen = cell("pass")? == arguments.pass
            && cell("head_dim")? == arguments.head_dim.to_string()
            && cell("data")? == arguments.data;
        let (heads, heads_k): (u64, u64) = (cell("heads")?.parse()?, cell("heads_k")?.parse()?);
        if !chosen || heads != heads_k * arguments.group {
            continue;
        }
        let (shape, ms) = ((cell("seqlen")?.parse()?, heads), cell("median_ms")?.parse::<f64>()?);
        if cell("impl")? == "moba" {
            let config = (cell("block_size")?.parse()?, cell("top_k")?.parse()?);
            moba.entry(config).or_default().insert(shape, ms);
        } else if cell("impl")?.starts_with("sdpa") {
            let fastest = dense.entry(shape).or_insert(f64::INFINITY);
            *fastest = fastest.min(ms);
        }
    }
    Ok((moba, dense))
}

fn tokens(seqlen: u64) -> String {
    match seqlen {
        _ if seqlen >= 1 << 20 => format!("{}M", seqlen >> 20),
        _ if seqlen >= 1 << 10 => format!("{}K", seqlen >> 10),
        _ => seqlen.to_string(),
    }
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    let (moba, dense) = read(&arguments)?;
    let mut lines = Vec::new();
    println!("| tokens | heads | block, top-k | dense ms | MoBA ms | faster |\n|---|---|---|---|---|---|");
    for ((block_size, top_k), times) in &moba {
        let mut points = Vec::new();
        for (&(seqlen, heads), ms) in times {
            let Some(full) = dense.get(&(seqlen, heads)) else { continue };
            let ratio = full / ms;
            println!("| {} | {heads} | {block_size}, {top_k} | {full:.2} | {ms:.2} | {ratio:.2}x |", tokens(seqlen));
            points.push(((seqlen as f64).log2(), ratio.log2()));
        }
        lines.push((format!("blocks of {block_size}, top-k {top_k}"), points));
    }
    let points = || lines.iter().flat_map(|(_, points)| points);
    ensure!(points().next().is_some(), "no MoBA row beside a dense one for these arguments");
    let span = |values: Vec<f64>| {
        let (low, high) = values.iter().fold((f64::MAX, f64::MIN), |(low, high), &v| (low.min(v), high.max(v)));
        low.floor() - 0.2..high.ceil() + 0.2
    };
    let (x, y) = (span(points().map(|p| p.0).collect()), span(points().map(|p| p.1).chain([0.0]).collect()));

    let root = SVGBackend::new(&arguments.svg, (760, 460)).into_drawing_area();
    root.fill(&WHITE)?;
    let mut chart =
        ChartBuilder::on(&root).margin(14).x_label_area_size(46).y_label_area_size(64).build_cartesian_2d(x, y)?;
    chart
        .configure_mesh()
        .x_desc("tokens")
        .y_desc(format!("times faster than dense ({})", arguments.pass.replace('_', " + ")))
        .x_labels(12)
        .y_labels(12)
        .x_label_formatter(&|v| if v.fract().abs() < 1e-9 { tokens(1 << *v as u64) } else { String::new() })
        .y_label_formatter(&|v| if v.fract().abs() < 1e-9 { format!("{}x", v.exp2()) } else { String::new() })
        .light_line_style(TRANSPARENT)
        .label_style(("sans-serif", 15))
        .axis_desc_style(("sans-serif", 16))
        .draw()?;
    // Colours that stay apart for colour-blind readers (Okabe and Ito).
    let colours = [RGBColor(0, 114, 178), RGBColor(213, 94, 0), RGBColor(0, 158, 115), RGBColor(204, 121, 167)];
    for (n, (label, points)) in lines.into_iter().enumerate() {
        let colour = colours[n % colours.len()];
        chart
            .draw_series(LineSeries::new(points.clone(), colour.stroke_width(3)))?
            .label(label)
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 22, y)], colour.stroke_width(3)));
        chart.draw_series(points.into_iter().map(|point| Circle::new(point, 4, colour.filled())))?;
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperLeft)
        .label_font(("sans-serif", 15))
        .background_style(WHITE.mix(0.9))
        .draw()?;
    root.present()?;
    Ok(())
}
