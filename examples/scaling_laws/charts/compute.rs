//! Loss against compute: the runs thin, the laws thick; compute counted as 6 N D on the left, with attention's real
//! operations on the right.

use tch_moba::HybridPolicy;

use super::{Entry, legend, length, look, name, pair, panel, stroke};
use crate::{
    axes::{LABEL, Panel, Scale},
    compute::POSITION_BINS,
    fit::{Compute, Loss, compared, efficient, select},
    law::{Fit, Point},
    records::Finished,
    svg::{Stroke, Svg, Type},
};

/// The runs of each compared policy.
type Groups<'a> = [(HybridPolicy, Vec<&'a Finished>); 2];

pub fn chart(runs: &[Finished], seqlen: i64, loss: Loss) -> Svg {
    let groups = compared().map(|policy| {
        let runs = select(runs, seqlen, &policy);
        (policy, runs)
    });
    let label = match loss {
        Loss::HeldOut => format!("LM loss (seqlen = {})", length(seqlen)),
        Loss::Trailing => {
            let bin = length(seqlen / POSITION_BINS as i64);
            format!("trailing LM loss (seqlen = {}, last {bin})", length(seqlen))
        }
    };
    let mut svg = pair();
    let titles = ["C = 6ND, as in the paper", "C with attention’s real operations"];
    for (index, (compute, title)) in Compute::BOTH.into_iter().zip(titles).enumerate() {
        let (x, y) = scales(&groups, loss, compute);
        let panel = panel(index, x, y);
        panel.draw(&mut svg, title, "PFLOP/s-days", &label);
        panel.inside(&mut svg, |svg| {
            curves(svg, &panel, &groups, loss, compute);
            laws(svg, &panel, &groups, loss, compute);
        });
        ends(&mut svg, &panel, &groups, loss, compute);
    }
    legend(&mut svg, &entries(&groups, loss));
    svg
}

/// Scales on which the ends of all runs have their place.
fn scales(groups: &Groups<'_>, loss: Loss, compute: Compute) -> (Scale, Scale) {
    let runs = groups.iter().flat_map(|group| &group.1);
    let ends: Vec<Point> =
        runs.map(|run| Point { compute: compute.of(run.last()), loss: loss.of(run.last()) }).collect();
    let least = |value: fn(&Point) -> f64| ends.iter().map(value).fold(f64::INFINITY, f64::min);
    let most = |value: fn(&Point) -> f64| ends.iter().map(value).fold(f64::MIN_POSITIVE, f64::max);
    let (low, high) = (least(|end| end.loss), most(|end| end.loss));
    // Room for the steep beginnings of the runs.
    let y = Scale { low: low * 0.95, high: high * (high / low).powf(0.5).max(1.15), log: true, step: None };
    // At least two decades, so that the axis has marks to read it by.
    let (from, to) = (least(|end| end.compute) / 5.0, most(|end| end.compute) * 2.5);
    let wider = (100.0 * from / to).max(1.0).sqrt();
    let x = Scale { low: from / wider, high: to * wider, log: true, step: None };
    (x, y)
}

fn curves(svg: &mut Svg, panel: &Panel, groups: &Groups<'_>, loss: Loss, compute: Compute) {
    for (policy, runs) in groups {
        for run in runs {
            let place = |record| panel.place((compute.of(record), loss.of(record)));
            let points: Vec<_> = run.records.iter().map(place).collect();
            svg.line(&points, Stroke { opacity: 0.8, ..stroke(look(policy, &[]), 1.1) });
        }
    }
}

/// The laws as lines, and their formulas in the upper right corner.
fn laws(svg: &mut Svg, panel: &Panel, groups: &Groups<'_>, loss: Loss, compute: Compute) {
    let (right, mut y) = (panel.corner.0 + panel.size.0 - 14.0, panel.corner.1 + 24.0);
    for (policy, runs) in groups {
        let Some(Fit { law, .. }) = Fit::of(&efficient(runs, loss, compute)) else { continue };
        let look = look(policy, &[]);
        // Straight on two logarithmic scales.
        let points = [panel.x.low, panel.x.high].map(|compute| panel.place((compute, law.loss(compute))));
        svg.line(&points, projection(stroke(look, 3.2)));
        let exponent = format!("{:.3}", -law.b).replace('-', "−");
        let formula = format!("{}: {:.3} × C^{{{exponent}}}", name(policy), law.a);
        svg.text((right, y), Type { size: 14.0, anchor: "end", colour: look.colour, bold: true, ..LABEL }, &formula);
        y += 22.0;
    }
}

/// Longer dashes for the thicker line.
fn projection(stroke: Stroke) -> Stroke {
    let dash = if stroke.dash.is_empty() { "" } else { "11 6" };
    Stroke { dash, opacity: 0.9, ..stroke }
}

/// The ends of the runs, and beside those of MoBA their sizes.
fn ends(svg: &mut Svg, panel: &Panel, groups: &Groups<'_>, loss: Loss, compute: Compute) {
    let place = |run: &Finished| panel.place((compute.of(run.last()), loss.of(run.last())));
    for (policy, runs) in groups.iter().rev() {
        let look = look(policy, &[]);
        for run in runs {
            svg.marker(place(run), look.marker, 3.6, look.colour);
        }
    }
    let mut named: Vec<&str> = Vec::new();
    for run in &groups[0].1 {
        let size = &run.header.run.size.name;
        if !named.contains(&size.as_str()) {
            named.push(size);
            let (x, y) = place(run);
            let style = Type { size: 11.5, anchor: "end", colour: "#444444", ..LABEL };
            svg.text((x - 7.0, y + 13.0), style, size);
        }
    }
}

fn entries(groups: &Groups<'_>, loss: Loss) -> Vec<Entry> {
    let mut entries = Vec::new();
    for (policy, runs) in groups {
        let (look, name) = (look(policy, &[]), name(policy));
        if Compute::BOTH.iter().any(|&compute| Fit::of(&efficient(runs, loss, compute)).is_some()) {
            let thick = projection(stroke(look, 3.2));
            entries.push(Entry { text: format!("{name} projection"), stroke: thick, marker: None });
        }
        let marker = Some((look.marker, look.colour));
        entries.push(Entry { text: format!("{name} runs"), stroke: stroke(look, 1.1), marker });
    }
    entries
}
