//! The charts: loss against compute with the fitted laws, and the position-wise loss.

mod compute;
mod positions;

use std::path::{Path, PathBuf};

use anyhow::Result;
use tch_moba::HybridPolicy;

use crate::{
    axes::{LABEL, Panel, Scale},
    fit::{Loss, lengths},
    records::Finished,
    svg::{Marker, Stroke, Svg, Type},
};

/// The line of a policy: colours of Okabe and Ito, which colour-blind readers can tell apart, and dashes for print.
#[derive(Clone, Copy)]
struct Look {
    colour: &'static str,
    dash: &'static str,
    marker: Marker,
}

const MOBA: Look = Look { colour: "#0072b2", dash: "", marker: Marker::Disc };
const FULL: Look = Look { colour: "#d55e00", dash: "7 4", marker: Marker::Square };
const HYBRIDS: [Look; 4] = [
    Look { colour: "#009e73", dash: "", marker: Marker::Disc },
    Look { colour: "#cc79a7", dash: "", marker: Marker::Square },
    Look { colour: "#56b4e9", dash: "3 2", marker: Marker::Disc },
    Look { colour: "#000000", dash: "1.5 3", marker: Marker::Square },
];

const PANEL: (f64, f64) = (460.0, 380.0);
const LEFT: f64 = 82.0;
const TOP: f64 = 44.0;
const GAP: f64 = 92.0;
/// For the labels of the lower axis.
const BELOW: f64 = 62.0;
const LEGEND: f64 = 34.0;

/// Draws all charts that `runs` allow into `folder`; returns them without their extension.
pub fn draw(runs: &[Finished], folder: &Path) -> Result<Vec<PathBuf>> {
    let lengths = lengths(runs);
    let (Some(&shortest), Some(&longest)) = (lengths.first(), lengths.last()) else { return Ok(Vec::new()) };
    let charts = [
        ("loss", Some(compute::chart(runs, shortest, Loss::HeldOut))),
        ("trailing", Some(compute::chart(runs, longest, Loss::Trailing))),
        ("positions", positions::chart(runs, longest)),
    ];
    let mut drawn = Vec::new();
    for (name, svg) in charts {
        let Some(svg) = svg else { continue };
        let path = folder.join(name);
        svg.write(&path)?;
        drawn.push(path);
    }
    Ok(drawn)
}

/// Room for two panels and a legend.
fn pair() -> Svg {
    Svg::new(LEFT + 2.0 * PANEL.0 + GAP + 24.0, TOP + PANEL.1 + BELOW + LEGEND)
}

/// The left (0) or right (1) one of a pair.
fn panel(index: usize, x: Scale, y: Scale) -> Panel {
    Panel { corner: (LEFT + index as f64 * (PANEL.0 + GAP), TOP), size: PANEL, x, y }
}

struct Entry {
    text: String,
    stroke: Stroke,
    marker: Option<(Marker, &'static str)>,
}

/// The legend of both panels, a row below them.
fn legend(svg: &mut Svg, entries: &[Entry]) {
    const LINE: f64 = 40.0;
    const SPACE: f64 = 34.0;
    // A letter is about half as wide as high.
    let width = |entry: &Entry| LINE + 8.0 + 0.5 * LABEL.size * entry.text.chars().count() as f64;
    let all: f64 = entries.iter().map(width).sum::<f64>() + SPACE * entries.len().saturating_sub(1) as f64;
    let mut x = (LEFT + 2.0 * PANEL.0 + GAP + LEFT - all) / 2.0;
    let y = TOP + PANEL.1 + BELOW + 14.0;
    for entry in entries {
        svg.line(&[(x, y - 4.5), (x + LINE, y - 4.5)], entry.stroke);
        if let Some((marker, colour)) = entry.marker {
            svg.marker((x + LINE / 2.0, y - 4.5), marker, 3.4, colour);
        }
        svg.text((x + LINE + 8.0, y), Type { anchor: "start", ..LABEL }, &entry.text);
        x += width(entry) + SPACE;
    }
}

/// `hybrids` are the policies of a chart other than MoBA and full attention.
fn look(policy: &HybridPolicy, hybrids: &[HybridPolicy]) -> Look {
    match policy {
        HybridPolicy::Moba => MOBA,
        HybridPolicy::Full => FULL,
        other => HYBRIDS[hybrids.iter().position(|hybrid| hybrid == other).unwrap_or(0) % HYBRIDS.len()],
    }
}

fn stroke(look: Look, width: f64) -> Stroke {
    Stroke { colour: look.colour, width, dash: look.dash, opacity: 1.0 }
}

fn name(policy: &HybridPolicy) -> String {
    match policy {
        HybridPolicy::Moba => "MoBA".to_owned(),
        HybridPolicy::Full => "Full attention".to_owned(),
        HybridPolicy::LayerWise { full_last: 1 } => "last layer full".to_owned(),
        HybridPolicy::LayerWise { full_last } => format!("last {full_last} layers full"),
        HybridPolicy::TwoStage { switch_at } => format!("full after {:.0} %", 100.0 * switch_at),
        other => other.to_string(),
    }
}

/// 512, 8K, 32K.
fn length(tokens: i64) -> String {
    if tokens % 1024 == 0 { format!("{}K", tokens / 1024) } else { tokens.to_string() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{fit::tests::on_law, law::Law};

    #[test]
    fn charts_of_few_and_of_many_runs() {
        let folder = std::env::temp_dir().join(format!("scaling-charts-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        let law = |a| Law { a, b: 0.06 };
        let mut runs = vec![on_law("moba", 512, 32, law(1.4))];
        assert_eq!(draw(&runs, &folder).unwrap().len(), 2);
        for hidden in [32, 64, 128] {
            runs.push(on_law("full", 512, hidden, law(1.39)));
            runs.push(on_law("moba", 512, hidden, law(1.4)));
        }
        runs.push(on_law("layer-wise:1", 2048, 32, law(1.3)));
        runs.push(on_law("full", 2048, 32, law(1.29)));
        let charts = draw(&runs, &folder).unwrap();
        assert_eq!(charts.len(), 3);
        for chart in charts {
            let svg = std::fs::read_to_string(chart.with_extension("svg")).unwrap();
            assert!(!svg.contains("NaN") && !svg.contains("inf"), "{svg}");
            assert!(std::fs::metadata(chart.with_extension("png")).unwrap().len() > 10_000);
        }
        std::fs::remove_dir_all(folder).unwrap();
    }
}
