//! What a sweep will cost, before it is run.

use tch_moba::HybridPolicy;

use crate::{
    compute::{self, PFLOP_S_DAY},
    sweep::Run,
    train::work,
};

/// The runs of a sweep with their compute, and their time if `rate` (operations a second, attention's real ones) is known.
pub fn table(runs: &[Run], vocab_size: i64, rate: Option<f64>) -> String {
    let mut text =
        String::from("| run | parameters | steps | tokens | 6ND, PFLOP/s-days | real, PFLOP/s-days | time |\n");
    text.push_str("|---|---|---|---|---|---|---|\n");
    let time = |work: f64| rate.map_or_else(|| "-".to_owned(), |rate| format!("{:.0} s", work / rate));
    let mut sum = 0.0;
    for run in runs {
        let parameters = compute::parameters(&run.llama(vocab_size));
        let tokens = run.steps() * run.tokens_per_step();
        let work = work(run, vocab_size);
        sum += work;
        text.push_str(&format!(
            "| {} | {:.2} M | {} | {:.2} M | {:.3e} | {:.3e} | {} |\n",
            run.name(),
            parameters as f64 / 1e6,
            run.steps(),
            tokens as f64 / 1e6,
            compute::six_nd(parameters, tokens) / PFLOP_S_DAY,
            work / PFLOP_S_DAY,
            time(work)
        ));
    }
    text.push_str(&format!("| {} runs | | | | | {:.3e} | {} |\n", runs.len(), sum / PFLOP_S_DAY, time(sum)));
    text.push_str(&span(runs, vocab_size));
    text
}

/// How far the compute of the runs with full attention reaches at each length.
fn span(runs: &[Run], vocab_size: i64) -> String {
    let mut lengths: Vec<i64> = runs.iter().map(|run| run.seqlen).collect();
    lengths.sort_unstable();
    lengths.dedup();
    let line = |seqlen: i64| {
        let full = runs.iter().filter(|run| run.seqlen == seqlen && run.policy == HybridPolicy::Full);
        let computes: Vec<f64> = full
            .map(|run| {
                compute::six_nd(compute::parameters(&run.llama(vocab_size)), run.steps() * run.tokens_per_step())
            })
            .collect();
        let low = computes.iter().copied().fold(f64::INFINITY, f64::min);
        let high = computes.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        format!("{seqlen} tokens: 6ND over {:.2} decades\n", (high / low).log10().max(0.0))
    };
    lengths.into_iter().map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sweep::Sweep;

    #[test]
    fn the_sum_is_that_of_the_runs() {
        let runs = Sweep::parse(include_str!("miniature.toml")).unwrap().runs().unwrap();
        let text = table(&runs, 512, Some(1e9));
        let seconds = |line: &str| -> f64 {
            line.rsplit('|').nth(1).unwrap().trim().strip_suffix(" s").unwrap().parse().unwrap()
        };
        let lines: Vec<&str> = text.lines().skip(2).collect();
        let of_runs: f64 = lines[..runs.len()].iter().map(|line| seconds(line)).sum();
        let sum = seconds(lines[runs.len()]);
        assert!((sum - of_runs).abs() <= 0.5 * runs.len() as f64, "{sum} and {of_runs}");
        assert!(text.contains("512 tokens: 6ND over 1.8"), "{text}");
        assert!(text.ends_with("2048 tokens: 6ND over 0.00 decades\n"), "{text}");
    }
}
