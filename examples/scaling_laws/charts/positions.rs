//! Loss by position in the sequence, of every policy that one size was trained with.

use tch_moba::HybridPolicy;

use super::{Entry, Look, legend, length, look, name, pair, panel, stroke};
use crate::{axes::Scale, compute::POSITION_BINS, fit::compared, records::Finished, svg::Svg};

struct Line {
    name: String,
    look: Look,
    points: Vec<(f64, f64)>,
}

/// The size at `seqlen` with the most runs: its loss on the left, the difference from full attention on the right. `None`
/// without a run of full attention.
pub fn chart(runs: &[Finished], seqlen: i64) -> Option<Svg> {
    let here = || runs.iter().filter(move |run| run.header.run.seqlen == seqlen);
    let count = |size: &str| here().filter(|run| run.header.run.size.name == size).count();
    let chosen = here().max_by_key(|run| (count(&run.header.run.size.name), run.header.parameters))?;
    let size = &chosen.header.run.size.name;
    let runs: Vec<&Finished> = here().filter(|run| run.header.run.size.name == *size).collect();

    let (unit, unit_name) = if seqlen >= 4096 { (1024.0, "K tokens") } else { (1.0, "tokens") };
    let end = seqlen as f64 / unit;
    let losses = lines(&runs, end);
    let full = &losses.iter().find(|line| line.name == name(&HybridPolicy::Full))?.points;
    let beside = losses.iter().map(|line| {
        let points = line.points.iter().zip(full).map(|(&(x, loss), full)| (x, 100.0 * (loss / full.1 - 1.0)));
        Line { name: line.name.clone(), look: line.look, points: points.collect() }
    });

    let mut svg = pair();
    let x_label = format!("position in the sequence, {unit_name}");
    let panels = [
        (&losses, format!("{size} at {} tokens", length(seqlen)), "LM loss"),
        (&beside.collect(), "beside full attention".to_owned(), "difference, %"),
    ];
    for (index, (lines, title, y_label)) in panels.into_iter().enumerate() {
        let values = || lines.iter().flat_map(|line| line.points.iter().map(|point| point.1));
        let (low, high) = (values().fold(f64::INFINITY, f64::min), values().fold(f64::NEG_INFINITY, f64::max));
        let room = 0.08 * (high - low).max(1e-6);
        let y = Scale { low: low - room, high: high + room, log: false, step: None };
        let x = Scale { low: 0.0, high: end, log: false, step: Some(end / 4.0) };
        let panel = panel(index, x, y);
        panel.draw(&mut svg, &title, &x_label, y_label);
        panel.inside(&mut svg, |svg| {
            for line in lines {
                let points: Vec<_> = line.points.iter().map(|&point| panel.place(point)).collect();
                svg.line(&points, stroke(line.look, 1.8));
                for &point in &points {
                    svg.marker(point, line.look.marker, 2.6, line.look.colour);
                }
            }
        });
    }
    let entry = |line: &Line| Entry {
        text: line.name.clone(),
        stroke: stroke(line.look, 1.8),
        marker: Some((line.look.marker, line.look.colour)),
    };
    legend(&mut svg, &losses.iter().map(entry).collect::<Vec<_>>());
    Some(svg)
}

/// The policies of `runs`, MoBA and full attention first: the mean of their seeds over positions `0..end`.
fn lines(runs: &[&Finished], end: f64) -> Vec<Line> {
    let mut policies: Vec<HybridPolicy> = compared().into();
    for run in runs {
        if !policies.contains(&run.header.run.policy) {
            policies.push(run.header.run.policy.clone());
        }
    }
    let hybrids = policies[compared().len()..].to_vec();
    let line = |policy: &HybridPolicy| {
        let seeds: Vec<_> = runs.iter().filter(|run| run.header.run.policy == *policy).collect();
        let mean = |bin: usize| seeds.iter().map(|run| run.last().positions[bin]).sum::<f64>() / seeds.len() as f64;
        let middle = |bin: usize| (bin as f64 + 0.5) * end / POSITION_BINS as f64;
        let points = (0..POSITION_BINS).map(|bin| (middle(bin), mean(bin))).collect();
        (!seeds.is_empty()).then(|| Line { name: name(policy), look: look(policy, &hybrids), points })
    };
    policies.iter().filter_map(line).collect()
}
