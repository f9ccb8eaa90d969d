//! From runs to laws: the compute-efficient frontier of each policy, its fit, and tables beside the paper's.

use std::{collections::BTreeSet, fmt::Write as _};

use serde::Serialize;
use tch_moba::HybridPolicy;

use crate::{
    law::{Fit, Law, Point, frontier},
    records::{Finished, Record},
};

/// Which loss is fitted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Loss {
    HeldOut,
    Trailing,
}

/// How compute is counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Compute {
    SixNd,
    Real,
}

/// The fit of one policy; `fit` is `None` if the frontier has fewer than three runs.
#[derive(Clone, Debug, Serialize)]
pub struct Fitted {
    pub seqlen: i64,
    pub loss: Loss,
    pub compute: Compute,
    pub policy: HybridPolicy,
    pub fit: Option<Fit>,
    /// The paper's law for the same loss, counted as 6 N D.
    pub paper: Option<Law>,
}

/// The paper's fits (arXiv 2502.13189, figure 3): loss at 8K tokens, and the trailing 2K tokens of 32K.
const PAPER: [(Loss, HybridPolicy, Law); 4] = [
    (Loss::HeldOut, HybridPolicy::Moba, Law { a: 2.625, b: 0.063 }),
    (Loss::HeldOut, HybridPolicy::Full, Law { a: 2.622, b: 0.063 }),
    (Loss::Trailing, HybridPolicy::Moba, Law { a: 1.546, b: 0.108 }),
    (Loss::Trailing, HybridPolicy::Full, Law { a: 1.464, b: 0.097 }),
];

impl Loss {
    pub fn of(self, record: &Record) -> f64 {
        match self {
            Self::HeldOut => record.held_out,
            Self::Trailing => record.trailing,
        }
    }

    pub fn name(self) -> &'static str {
        match self {
            Self::HeldOut => "LM loss",
            Self::Trailing => "trailing loss",
        }
    }
}

impl Compute {
    pub const BOTH: [Self; 2] = [Self::SixNd, Self::Real];

    pub fn of(self, record: &Record) -> f64 {
        match self {
            Self::SixNd => record.compute_6nd,
            Self::Real => record.compute_real,
        }
    }

    pub fn name(self) -> &'static str {
        match self {
            Self::SixNd => "6ND",
            Self::Real => "real",
        }
    }
}

/// The policies that are compared; the others are hybrids of them.
pub fn compared() -> [HybridPolicy; 2] {
    [HybridPolicy::Moba, HybridPolicy::Full]
}

/// Sequence lengths, shortest first.
pub fn lengths(runs: &[Finished]) -> Vec<i64> {
    runs.iter().map(|run| run.header.run.seqlen).collect::<BTreeSet<_>>().into_iter().collect()
}

/// The runs of one length and policy.
pub fn select<'a>(runs: &'a [Finished], seqlen: i64, policy: &HybridPolicy) -> Vec<&'a Finished> {
    let wanted = |run: &&Finished| run.header.run.seqlen == seqlen && run.header.run.policy == *policy;
    runs.iter().filter(wanted).collect()
}

/// The compute-efficient frontier of `runs`.
pub fn efficient(runs: &[&Finished], loss: Loss, compute: Compute) -> Vec<Point> {
    let point = |record: &Record| Point { compute: compute.of(record), loss: loss.of(record) };
    let ends: Vec<Point> = runs.iter().map(|run| point(run.last())).collect();
    let all: Vec<Point> = runs.iter().flat_map(|run| &run.records).map(point).collect();
    frontier(&ends, &all)
}

/// The loss over all tokens at the shortest length and over the last tokens at the longest, as in the paper.
pub fn fit(runs: &[Finished]) -> Vec<Fitted> {
    let lengths = lengths(runs);
    let wanted = [(lengths.first(), Loss::HeldOut), (lengths.last(), Loss::Trailing)];
    let mut fitted = Vec::new();
    for (seqlen, loss) in wanted.into_iter().filter_map(|(seqlen, loss)| Some((*seqlen?, loss))) {
        for compute in Compute::BOTH {
            for policy in compared() {
                let fit = Fit::of(&efficient(&select(runs, seqlen, &policy), loss, compute));
                let paper =
                    PAPER.iter().find(|paper| paper.0 == loss && paper.1 == policy && compute == Compute::SixNd);
                let paper = paper.map(|paper| paper.2);
                fitted.push(Fitted { seqlen, loss, compute, policy, fit, paper });
            }
        }
    }
    fitted
}

/// The fits as a Markdown table.
pub fn table(fitted: &[Fitted]) -> String {
    let mut text = String::from("| tokens | loss | compute | policy | a (95 %) | b (95 %) | runs | paper |\n");
    text.push_str("|---|---|---|---|---|---|---|---|\n");
    for Fitted { seqlen, loss, compute, policy, fit, paper } in fitted {
        let (a, b, points) = match fit {
            Some(Fit { law, a_interval: [a0, a1], b_interval: [b0, b1], points }) => (
                format!("{:.3} ({a0:.3} to {a1:.3})", law.a),
                format!("{:.4} ({b0:.4} to {b1:.4})", law.b),
                points.to_string(),
            ),
            None => ("-".into(), "-".into(), "fewer than 3".into()),
        };
        let paper = paper.map_or_else(String::new, |Law { a, b }| format!("{a} C^-{b}"));
        let (loss, compute) = (loss.name(), compute.name());
        let _ = writeln!(text, "| {seqlen} | {loss} | {compute} | {policy} | {a} | {b} | {points} | {paper} |");
    }
    text
}

/// Every size at every length: the end of each policy's runs, the mean over the seeds, beside full attention.
pub fn comparison(runs: &[Finished]) -> String {
    let mut text = String::from(
        "| tokens | size | policy | seeds | LM loss | beside full | trailing loss | beside full | tokens/s |\n\
         |---|---|---|---|---|---|---|---|---|\n",
    );
    for seqlen in lengths(runs) {
        let mut here: Vec<&Finished> = runs.iter().filter(|run| run.header.run.seqlen == seqlen).collect();
        here.sort_by_key(|run| (run.header.parameters, run.header.run.size.name.clone(), run.header.run.seed));
        let mut rows = Vec::new();
        for run in &here {
            let row = (&run.header.run.size.name, &run.header.run.policy);
            if !rows.contains(&row) {
                rows.push(row);
            }
        }
        for (size, policy) in rows {
            let ends = |policy: &HybridPolicy| -> Vec<&Finished> {
                let same = |run: &&&Finished| run.header.run.size.name == *size && run.header.run.policy == *policy;
                here.iter().filter(same).copied().collect()
            };
            let (ours, full) = (ends(policy), ends(&HybridPolicy::Full));
            let mean = |runs: &[&Finished], value: fn(&Record) -> f64| {
                runs.iter().map(|run| value(run.last())).sum::<f64>() / runs.len() as f64
            };
            let beside = |value: fn(&Record) -> f64| {
                let difference = 100.0 * (mean(&ours, value) / mean(&full, value) - 1.0);
                if difference.is_finite() { format!("{difference:+.2} %") } else { "-".to_owned() }
            };
            let _ = writeln!(
                text,
                "| {seqlen} | {size} | {policy} | {} | {:.4} | {} | {:.4} | {} | {:.0} |",
                ours.len(),
                mean(&ours, |record| record.held_out),
                beside(|record| record.held_out),
                mean(&ours, |record| record.trailing),
                beside(|record| record.trailing),
                mean(&ours, |record| record.tokens as f64 / record.seconds),
            );
        }
    }
    text
}

#[cfg(test)]
pub mod tests {
    use approx::assert_relative_eq;

    use super::*;
    use crate::records::example;

    /// A run that ends on `law`, by way of worse points.
    pub fn on_law(policy: &str, seqlen: i64, hidden: i64, law: Law) -> Finished {
        let header = example(seqlen, policy, hidden, 0);
        let end = 1e-9 * (hidden as f64).powi(2);
        let records = (1..=8u64).map(|step| {
            let compute = end * step as f64 / 8.0;
            let loss = law.loss(compute) * (1.0 + 0.02 * (8 - step) as f64);
            Record {
                step,
                tokens: 1000 * step,
                compute_6nd: compute,
                compute_real: 2.0 * compute,
                loss,
                held_out: loss,
                positions: (0..16).map(|i| loss * (1.1 - 0.2 * f64::from(i) / 15.0)).collect(),
                trailing: 0.9 * loss,
                tokens_per_second: 1e5,
                seconds: step as f64,
            }
        });
        Finished { records: records.collect(), header }
    }

    #[test]
    fn laws_from_runs() {
        let law = Law { a: 1.5, b: 0.05 };
        let runs: Vec<Finished> = [32, 64, 128, 256].map(|hidden| on_law("moba", 512, hidden, law)).into();
        let fitted = fit(&runs);
        let moba = |loss, compute| {
            let fitted = fitted
                .iter()
                .find(|fitted| fitted.loss == loss && fitted.compute == compute && fitted.policy == HybridPolicy::Moba);
            fitted.unwrap().fit.unwrap()
        };
        assert_relative_eq!(moba(Loss::HeldOut, Compute::SixNd).law.a, 1.5, max_relative = 1e-9);
        assert_relative_eq!(moba(Loss::Trailing, Compute::SixNd).law.a, 1.35, max_relative = 1e-9);
        let real = moba(Loss::HeldOut, Compute::Real).law;
        assert_relative_eq!(real.a, 1.5 * 2f64.powf(0.05), max_relative = 1e-9);
        assert_relative_eq!(real.b, 0.05, max_relative = 1e-9);
        // No run of full attention: no law, and the table says so.
        assert!(fitted.iter().filter(|fitted| fitted.policy == HybridPolicy::Full).all(|full| full.fit.is_none()));
        assert!(table(&fitted).contains("| 512 | LM loss | 6ND | full | - | - | fewer than 3 | 2.622 C^-0.063 |"));
    }

    #[test]
    fn sizes_beside_full_attention() {
        let law = |a| Law { a, b: 0.0 };
        let runs = [on_law("full", 512, 32, law(2.0)), on_law("moba", 512, 32, law(2.02))];
        let text = comparison(&runs);
        assert!(text.contains("| 512 | h32 | moba | 1 | 2.0200 | +1.00 % | 1.8180 | +1.00 % | 1000 |"), "{text}");
    }
}
