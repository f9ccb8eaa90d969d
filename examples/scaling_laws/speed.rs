//! How fast one size trains, beside the rate of a large matrix product on the same device.

use std::time::Instant;

use anyhow::{Context, Result, ensure};
use tch::{Device, Kind, Tensor};
use tch_moba::HybridPolicy;

use crate::{
    corpus::{Corpus, Identity},
    environment,
    sweep::{Run, Sweep},
    train::{Trainer, work},
};

/// Updates before the clock runs.
const WARM_UP: u64 = 3;
/// Measurements of a rate; the median counts.
const REPEATS: usize = 3;

pub struct Options<'a> {
    pub size: &'a str,
    pub seqlen: Option<i64>,
    pub policies: &'a [HybridPolicy],
    /// Updates in a measurement.
    pub updates: u64,
    pub vocab_size: i64,
    pub device: Device,
}

pub fn measure(sweep: &Sweep, options: &Options<'_>) -> Result<()> {
    let Options { device, updates, vocab_size, .. } = *options;
    let peak = product_rate(device)?;
    println!("{}, commit {}", environment::device(device), environment::commit()?);
    println!("matrix product: {:.2} TFLOP/s", peak / 1e12);
    println!("| run | ms an update | tokens an update | tokens/s | TFLOP/s | of the product |");
    println!("|---|---|---|---|---|---|");
    let mut corpus = None;
    for policy in options.policies {
        let run = run(sweep, options, policy)?;
        let corpus = match &corpus {
            Some(corpus) => corpus,
            None => corpus.insert(random_corpus(run.seqlen, vocab_size)),
        };
        let mut trainer = Trainer::new(&run, corpus, device)?;
        for _ in 0..WARM_UP {
            trainer.update()?;
        }
        trainer.wait()?;
        let seconds = median(|| {
            let start = Instant::now();
            for _ in 0..updates {
                trainer.update()?;
            }
            trainer.wait()?;
            Ok(start.elapsed().as_secs_f64() / updates as f64)
        })?;
        let rate = work(&run, vocab_size) / run.steps() as f64 / seconds;
        println!(
            "| {} | {:.1} | {} | {:.0} | {:.2} | {:.1} % |",
            run.name(),
            1e3 * seconds,
            run.tokens_per_step(),
            run.tokens_per_step() as f64 / seconds,
            rate / 1e12,
            100.0 * rate / peak
        );
    }
    Ok(())
}

/// A run of the wanted size that is long enough for the clock.
fn run(sweep: &Sweep, options: &Options<'_>, policy: &HybridPolicy) -> Result<Run> {
    let mut sweep = sweep.clone();
    let size = sweep.sizes.iter().find(|size| size.name == options.size);
    let known = || sweep.sizes.iter().map(|size| size.name.as_str()).collect::<Vec<_>>().join(", ");
    let size = size.with_context(|| format!("no size {:?} in the sweep; known: {}", options.size, known()))?.clone();
    let wanted = |context: &&crate::sweep::Context| options.seqlen.is_none_or(|seqlen| seqlen == context.seqlen);
    let context = sweep
        .contexts
        .iter()
        .find(wanted)
        .with_context(|| format!("no context of {} tokens in the sweep", options.seqlen.unwrap_or_default()))?;
    let mut context = context.clone();
    // The size's own updates, unless they hold no sequence of this length.
    if size.batch_tokens >= context.seqlen as u64 {
        context.batch_tokens = None;
    }
    context.sizes = vec![size.name];
    context.policies = vec![policy.clone()];
    context.seeds = vec![0];
    context.tokens_per_parameter = None;
    sweep.contexts = vec![context];
    let run = sweep.runs()?.pop().context("the sweep asks for no run")?;
    let needed = WARM_UP + REPEATS as u64 * options.updates;
    ensure!(run.steps() >= needed, "run {} has {} updates, {needed} are to be measured", run.name(), run.steps());
    Ok(run)
}

/// Tokens that mean nothing: the speed depends on their number alone.
fn random_corpus(seqlen: i64, vocab_size: i64) -> Corpus {
    let tokens = |count: i64| (0..count).map(|i| (i * i % 7919 * 31 % vocab_size) as i16).collect();
    let identity = Identity { corpus: "none".into(), tokenizer: "none".into(), vocab_size, bytes_per_token: f64::NAN };
    Corpus { identity, train: tokens(64 * seqlen), held_out: tokens(2 * seqlen) }
}

/// Operations a second of a large square product, in bfloat16 on a GPU and in float32 on a CPU.
fn product_rate(device: Device) -> Result<f64> {
    let (size, kind, count) = match device {
        Device::Cuda(_) => (8192, Kind::BFloat16, 50),
        _ => (1024, Kind::Float, 5),
    };
    let [left, right] = [(); 2].map(|()| Tensor::randn([size, size], (Kind::Float, device)).to_kind(kind));
    let wait = |product: &Tensor| f64::try_from(product.f_select(0, 0)?.f_select(0, 0)?).map_err(anyhow::Error::from);
    wait(&left.f_matmul(&right)?)?;
    let seconds = median(|| {
        let start = Instant::now();
        let mut product = left.f_matmul(&right)?;
        for _ in 1..count {
            product = left.f_matmul(&right)?;
        }
        wait(&product)?;
        Ok(start.elapsed().as_secs_f64() / f64::from(count))
    })?;
    Ok(2.0 * (size as f64).powi(3) / seconds)
}

fn median(mut measure: impl FnMut() -> Result<f64>) -> Result<f64> {
    let mut values = (0..REPEATS).map(|_| measure()).collect::<Result<Vec<_>>>()?;
    values.sort_by(f64::total_cmp);
    Ok(values[REPEATS / 2])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn updates_hold_at_least_a_sequence() {
        let sweep = Sweep::parse(include_str!("h100.toml")).unwrap();
        let update = |size: &str, seqlen| {
            let options = Options {
                size,
                seqlen: Some(seqlen),
                policies: &[],
                updates: 1,
                vocab_size: 4096,
                device: Device::Cpu,
            };
            run(&sweep, &options, &HybridPolicy::Moba).unwrap().tokens_per_step()
        };
        assert_eq!(update("5M", 8192), 16384);
        assert_eq!(update("5M", 32768), 32768, "that of the context");
        assert_eq!(update("100M", 32768), 65536, "that of the size");
    }
}
