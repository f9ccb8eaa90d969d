//! The charts: loss against compute with the fitted laws, and the position-wise loss.

use std::path::{Path, PathBuf};

use anyhow::Result;
use tch_moba::HybridPolicy;

use crate::{
    axes::{LABEL, Panel, Scale},
    compute::POSITION_BINS,
    fit::{Compute, Loss, compared, efficient, lengths, select},
    law::{Fit, Point},
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
const WIDTH: f64 = 460.0;
const HEIGHT: f64 = 380.0;
const LEFT: f64 = 82.0;
const TOP: f64 = 44.0;
const GAP: f64 = 92.0;

/// Draws all charts that `runs` allow into `folder`; returns them without their extension.
pub fn draw(runs: &[Finished], folder: &Path) -> Result<Vec<PathBuf>> {
    let lengths = lengths(runs);
    let (Some(&shortest), Some(&longest)) = (lengths.first(), lengths.last()) else { return Ok(Vec::new()) };
    let mut charts = vec![(folder.join("loss"), against_compute(runs, shortest, Loss::HeldOut))];
    charts.push((folder.join("trailing"), against_compute(runs, longest, Loss::Trailing)));
    charts.extend(positions(runs, longest).map(|chart| (folder.join("positions"), chart)));
    charts
        .into_iter()
        .map(|(path, svg)| {
            svg.write(&path)?;
            Ok(path)
        })
        .collect()
}

fn look(policy: &HybridPolicy, hybrids: &[HybridPolicy]) -> Look {
    match policy {
        HybridPolicy::Moba => MOBA,
        HybridPolicy::Full => FULL,
        other => HYBRIDS[hybrids.iter().position(|hybrid| hybrid == other).unwrap_or(0) % HYBRIDS.len()],
    }
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
pub fn length(tokens: i64) -> String {
    if tokens % 1024 == 0 { format!("{}K", tokens / 1024) } else { tokens.to_string() }
}

fn empty_pair() -> Svg {
    Svg::new(LEFT + 2.0 * WIDTH + GAP + 24.0, TOP + HEIGHT + 62.0)
}

fn corner(panel: usize) -> (f64, f64) {
    (LEFT + panel as f64 * (WIDTH + GAP), TOP)
}

/// Two panels: compute as 6 N D, and with attention's real operations.
fn against_compute(runs: &[Finished], seqlen: i64, loss: Loss) -> Svg {
    let mut svg = empty_pair();
    let titles = ["C = 6ND, as in the paper", "C with attention’s real operations"];
    for (index, (compute, title)) in Compute::BOTH.into_iter().zip(titles).enumerate() {
        let y_label = match loss {
            Loss::HeldOut => format!("LM loss (seqlen = {})", length(seqlen)),
            Loss::Trailing => {
                let bin = length(seqlen / POSITION_BINS as i64);
                format!("trailing LM loss (seqlen = {}, last {bin})", length(seqlen))
            }
        };
        let groups = compared().map(|policy| (select(runs, seqlen, &policy), policy));
        let panel = compute_panel(&groups.each_ref().map(|group| &group.0[..]), loss, compute, corner(index));
        panel.draw(&mut svg, title, "PFLOP/s-days", &y_label);
        panel.inside(&mut svg, |svg| {
            for (runs, policy) in &groups {
                curves(svg, &panel, runs, loss, compute, look(policy, &[]));
            }
        });
        let mut legend = Vec::new();
        for (runs, policy) in &groups {
            let look = look(policy, &[]);
            let fit = Fit::of(&efficient(runs, loss, compute));
            if let Some(fit) = fit {
                panel.inside(&mut svg, |svg| projection(svg, &panel, &fit, look));
            }
            let law = fit.map(|Fit { law, .. }| {
                let exponent = format!("{:.3}", -law.b).replace('-', "−");
                format!("{} projection: {:.3} × C^{{{exponent}}}", name(policy), law.a)
            });
            legend.extend(law.map(|law| (law, Stroke { width: 3.2, ..stroke(look) }, None)));
            let runs = format!("{} runs", name(policy));
            legend.push((runs, Stroke { width: 1.1, ..stroke(look) }, Some((look.marker, look.colour))));
        }
        ends(&mut svg, &panel, &groups, loss, compute);
        key(&mut svg, &panel, Place::LowerLeft, &legend);
    }
    svg
}

/// A panel in which all ends of runs, and their laws, have their place.
fn compute_panel(groups: &[&[&Finished]], loss: Loss, compute: Compute, corner: (f64, f64)) -> Panel {
    let ends: Vec<Point> = groups
        .iter()
        .flat_map(|runs| runs.iter().map(|run| run.last()))
        .map(|record| Point { compute: compute.of(record), loss: loss.of(record) })
        .collect();
    let least = |value: fn(&Point) -> f64| ends.iter().map(value).fold(f64::INFINITY, f64::min);
    let most = |value: fn(&Point) -> f64| ends.iter().map(value).fold(f64::MIN_POSITIVE, f64::max);
    let (low, high) = (least(|end| end.loss), most(|end| end.loss));
    // Room for the legend below the curves, and for the steep beginnings of the runs.
    let y = Scale {
        low: low * (low / high).powf(0.25).min(0.93),
        high: high * (high / low).powf(0.5).max(1.15),
        log: true,
        step: None,
    };
    let x = Scale { low: least(|end| end.compute) / 8.0, high: most(|end| end.compute) * 2.5, log: true, step: None };
    Panel { corner, size: (WIDTH, HEIGHT), x, y }
}

fn stroke(look: Look) -> Stroke {
    Stroke { colour: look.colour, width: 2.0, dash: look.dash, opacity: 1.0 }
}

fn curves(svg: &mut Svg, panel: &Panel, runs: &[&Finished], loss: Loss, compute: Compute, look: Look) {
    for run in runs {
        let points: Vec<_> =
            run.records.iter().map(|record| panel.place((compute.of(record), loss.of(record)))).collect();
        svg.line(&points, Stroke { width: 1.1, opacity: 0.75, ..stroke(look) });
    }
}

fn projection(svg: &mut Svg, panel: &Panel, fit: &Fit, look: Look) {
    // Straight on both logarithmic scales.
    let points = [panel.x.low, panel.x.high].map(|compute| panel.place((compute, fit.law.loss(compute))));
    let dash = if look.dash.is_empty() { "" } else { "11 6" };
    svg.line(&points, Stroke { width: 3.2, dash, opacity: 0.9, ..stroke(look) });
}

/// The ends of the runs, and beside those of MoBA their sizes.
fn ends(svg: &mut Svg, panel: &Panel, groups: &[(Vec<&Finished>, HybridPolicy); 2], loss: Loss, compute: Compute) {
    for (runs, policy) in groups.iter().rev() {
        let look = look(policy, &[]);
        for run in runs {
            let end = panel.place((compute.of(run.last()), loss.of(run.last())));
            svg.marker(end, look.marker, 3.6, look.colour);
        }
    }
    let mut named: Vec<&str> = Vec::new();
    for run in &groups[0].0 {
        let size = &run.header.run.size.name;
        if !named.contains(&size.as_str()) {
            named.push(size);
            let (x, y) = panel.place((compute.of(run.last()), loss.of(run.last())));
            let style = Type { size: 11.5, anchor: "end", colour: "#444444", ..LABEL };
            svg.text((x - 7.0, y + 13.0), style, size);
        }
    }
}

type Entry = (String, Stroke, Option<(Marker, &'static str)>);

/// Where curves that fall leave room.
#[derive(Clone, Copy, PartialEq)]
enum Place {
    LowerLeft,
    UpperRight,
}

/// The legend.
fn key(svg: &mut Svg, panel: &Panel, place: Place, entries: &[Entry]) {
    let ((left, top), (width, height)) = (panel.corner, panel.size);
    // A letter is about half as wide as high.
    let letters = entries.iter().map(|(text, ..)| text.chars().filter(|letter| !"^{}".contains(*letter)).count()).max();
    let size = (68.0 + 0.51 * LABEL.size * letters.unwrap_or(0) as f64, 12.0 + 20.0 * entries.len() as f64);
    let corner = match place {
        Place::LowerLeft => (left + 8.0, top + height - size.1 - 8.0),
        Place::UpperRight => (left + width - size.0 - 8.0, top + 8.0),
    };
    svg.rectangle(corner, size, "#ffffff", 0.92);
    for (index, (text, stroke, marker)) in entries.iter().enumerate() {
        let y = corner.1 + 18.0 + 20.0 * index as f64;
        svg.line(&[(corner.0 + 8.0, y - 4.5), (corner.0 + 46.0, y - 4.5)], *stroke);
        if let Some((marker, colour)) = marker {
            svg.marker((corner.0 + 46.0, y - 4.5), *marker, 3.4, colour);
        }
        svg.text((corner.0 + 56.0, y), Type { anchor: "start", ..LABEL }, text);
    }
}

/// Loss by position of all policies at one length and the largest size that has most of them, and what it is beside
/// full attention's; `None` without full attention.
fn positions(runs: &[Finished], seqlen: i64) -> Option<Svg> {
    let here: Vec<&Finished> = runs.iter().filter(|run| run.header.run.seqlen == seqlen).collect();
    let count = |size: &str| here.iter().filter(|run| run.header.run.size.name == size).count();
    let chosen = here.iter().max_by_key(|run| (count(&run.header.run.size.name), run.header.parameters))?;
    let size = &chosen.header.run.size.name;
    let mut policies: Vec<&HybridPolicy> = Vec::new();
    let of_size: Vec<&Finished> = here.iter().filter(|run| run.header.run.size.name == *size).copied().collect();
    for run in &of_size {
        if !policies.contains(&&run.header.run.policy) {
            policies.push(&run.header.run.policy);
        }
    }
    policies.sort_by_key(|policy| compared().iter().position(|other| other == *policy).unwrap_or(usize::MAX));
    let hybrids: Vec<HybridPolicy> =
        policies.iter().filter(|policy| !compared().contains(policy)).map(|&policy| policy.clone()).collect();
    let mean = |policy: &HybridPolicy| -> Vec<f64> {
        let runs: Vec<_> = of_size.iter().filter(|run| run.header.run.policy == *policy).collect();
        (0..POSITION_BINS)
            .map(|bin| runs.iter().map(|run| run.last().positions[bin]).sum::<f64>() / runs.len() as f64)
            .collect()
    };
    let full = policies.contains(&&HybridPolicy::Full).then(|| mean(&HybridPolicy::Full))?;
    let (unit, unit_name) = if seqlen >= 4096 { (1024.0, "K tokens") } else { (1.0, "tokens") };
    let end = seqlen as f64 / unit;
    let middle = |bin: usize| (bin as f64 + 0.5) * end / POSITION_BINS as f64;
    let losses = |values: Vec<f64>| -> Vec<(f64, f64)> {
        values.into_iter().enumerate().map(|(bin, loss)| (middle(bin), loss)).collect()
    };
    let lines: Vec<(String, Look, Vec<(f64, f64)>)> =
        policies.iter().map(|policy| (name(policy), look(policy, &hybrids), losses(mean(policy)))).collect();
    let beside: Vec<_> = lines
        .iter()
        .map(|(name, look, line)| {
            let line = line.iter().zip(&full).map(|(&(x, loss), full)| (x, 100.0 * (loss / full - 1.0)));
            (name.clone(), *look, line.collect::<Vec<_>>())
        })
        .collect();

    let mut svg = empty_pair();
    let titles = [
        (&lines, format!("{size} at {} tokens", length(seqlen)), "LM loss"),
        (&beside, "beside full attention".to_owned(), "difference, %"),
    ];
    for (index, (lines, title, label)) in titles.into_iter().enumerate() {
        let values = || lines.iter().flat_map(|line| line.2.iter().map(|point| point.1));
        let (low, high) = (values().fold(f64::INFINITY, f64::min), values().fold(f64::NEG_INFINITY, f64::max));
        let room = (high - low).max(1e-6);
        let y = Scale { low: low - 0.1 * room, high: high + 0.12 * room, log: false, step: None };
        let x = Scale { low: 0.0, high: end, log: false, step: Some(end / 4.0) };
        let panel = Panel { corner: corner(index), size: (WIDTH, HEIGHT), x, y };
        panel.draw(&mut svg, &title, &format!("position in the sequence, {unit_name}"), label);
        panel.inside(&mut svg, |svg| {
            for (_, look, line) in lines {
                let points: Vec<_> = line.iter().map(|&point| panel.place(point)).collect();
                svg.line(&points, Stroke { width: 1.8, ..stroke(*look) });
                for &point in &points {
                    svg.marker(point, look.marker, 2.6, look.colour);
                }
            }
        });
        if index == 0 {
            let entries: Vec<Entry> = lines
                .iter()
                .map(|(name, look, _)| (name.clone(), stroke(*look), Some((look.marker, look.colour))))
                .collect();
            key(&mut svg, &panel, Place::UpperRight, &entries);
        }
    }
    Some(svg)
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
