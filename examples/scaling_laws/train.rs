//! One training run.

use std::time::Instant;

use anyhow::{Result, ensure};
use serde::{Deserialize, Serialize};
use tch::{Device, Kind, Reduction, Tensor, nn};
use tch_moba::{
    Step,
    llama::{Llama, LlamaConfig},
};

use crate::{
    batches::{HeldOut, Training},
    compute::{self, PFLOP_S_DAY, POSITION_BINS},
    corpus::Corpus,
    optimizer::AdamW,
    records::Record,
    sweep::Run,
};

/// Where a run stands, and what its records need from before.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct State {
    pub step: u64,
    /// Operations so far, attention's real ones.
    pub operations: f64,
    /// Spent on training so far.
    pub seconds: f64,
}

pub struct Trainer<'a> {
    run: &'a Run,
    steps: u64,
    pub vs: nn::VarStore,
    model: Llama,
    pub optimizer: AdamW,
    training: Training,
    held_out: HeldOut,
    pub state: State,
    /// Sum of the losses since the last record; stays on the device.
    losses: Tensor,
    summed: u64,
    since: Instant,
}

impl<'a> Trainer<'a> {
    pub fn new(run: &'a Run, corpus: &Corpus, device: Device) -> Result<Self> {
        let Run { seqlen, seed, held_out_tokens, recipe, .. } = *run;
        let (rows, pass, steps) = (run.rows(), run.pass_rows(), run.steps());
        tch::manual_seed(seed as i64);
        let mut vs = nn::VarStore::new(device);
        let model = Llama::new(vs.root(), &run.llama(corpus.identity.vocab_size))?;
        // A CPU gains nothing from bfloat16, and the small models of a trial lose by it.
        let optimizer = match device {
            Device::Cuda(_) => AdamW::with_master_weights(&mut vs, Kind::BFloat16, recipe.weight_decay, recipe.clip),
            _ => AdamW::new(&vs, recipe.weight_decay, recipe.clip),
        };
        Ok(Self {
            run,
            steps,
            vs,
            model,
            optimizer,
            training: Training::new(corpus, seqlen, rows, steps, seed, device)?,
            held_out: HeldOut::new(corpus, seqlen, held_out_tokens, pass, device)?,
            state: State { step: 0, operations: 0.0, seconds: 0.0 },
            losses: Tensor::zeros([], (Kind::Float, device)),
            summed: 0,
            since: Instant::now(),
        })
    }

    pub fn config(&self) -> &LlamaConfig {
        self.model.config()
    }

    pub fn done(&self) -> bool {
        self.state.step >= self.steps
    }

    /// Updates until the next measurement, and measures.
    pub fn advance(&mut self) -> Result<Record> {
        self.since = Instant::now();
        loop {
            self.update()?;
            if is_measured(self.state.step, self.steps) {
                return self.measure();
            }
        }
    }

    /// One update. Nothing here waits for the device.
    pub fn update(&mut self) -> Result<()> {
        let Self { run, state, .. } = *self;
        let (rows, pass) = (run.rows(), run.pass_rows());
        let progress = state.step as f64 / self.steps as f64;
        self.optimizer.zero_grad()?;
        for first in (0..rows).step_by(pass as usize) {
            let batch = self.training.batch(state.step, first, pass)?;
            let loss = self.loss(&batch, Step::train(progress), Reduction::Mean)?;
            let share = loss.f_mul_scalar(pass as f64 / rows as f64)?;
            share.f_backward()?;
            self.optimizer.accumulate()?;
            self.losses = self.losses.f_add(&share.detach())?;
        }
        let _norm = self.optimizer.step(run.lr(state.step))?;
        self.summed += 1;
        self.state.step += 1;
        self.state.operations += operations(run, self.model.config(), &self.model.kinds(Step::train(progress)));
        Ok(())
    }

    /// Waits until the device has done all updates.
    pub fn wait(&self) -> Result<()> {
        f64::try_from(&self.losses)?;
        Ok(())
    }

    /// Cross-entropy in float32 of `[rows, seqlen + 1]` tokens.
    fn loss(&self, batch: &Tensor, step: Step, reduction: Reduction) -> Result<Tensor> {
        let inputs = batch.f_narrow(1, 0, self.run.seqlen)?;
        let targets = batch.f_narrow(1, 1, self.run.seqlen)?.f_reshape([-1])?;
        let logits = self.model.forward(&inputs, step)?.f_flatten(0, 1)?.f_to_kind(Kind::Float)?;
        Ok(logits.f_cross_entropy_loss(&targets, None::<&Tensor>, reduction, -100, 0.0)?)
    }

    /// Waits for the device.
    fn measure(&mut self) -> Result<Record> {
        let State { step, operations, .. } = self.state;
        let loss = f64::try_from(&self.losses)? / self.summed as f64;
        let spent = self.since.elapsed().as_secs_f64();
        ensure!(loss.is_finite(), "training diverged before step {step} (loss {loss}): try a smaller lr");
        self.state.seconds += spent;
        let trained = self.summed * self.run.tokens_per_step();
        self.losses = self.losses.zeros_like();
        self.summed = 0;
        let positions = self.positions()?;
        let tokens = step * self.run.tokens_per_step();
        Ok(Record {
            step,
            tokens,
            compute_6nd: compute::six_nd(compute::parameters(self.model.config()), tokens) / PFLOP_S_DAY,
            compute_real: operations / PFLOP_S_DAY,
            loss,
            held_out: positions.iter().sum::<f64>() / positions.len() as f64,
            trailing: positions[positions.len() - 1],
            positions,
            tokens_per_second: (trained as f64 / spent).round(),
            seconds: self.state.seconds,
        })
    }

    /// The held-out loss in equal parts of the sequence.
    fn positions(&self) -> Result<Vec<f64>> {
        let step = Step::prefill(self.state.step as f64 / self.steps as f64);
        tch::no_grad(|| {
            let mut sum = Tensor::zeros([POSITION_BINS as i64], (Kind::Double, self.losses.device()));
            let mut rows = 0;
            for batch in self.held_out.batches() {
                let batch = batch?;
                let losses = self.loss(&batch, step, Reduction::None)?;
                let binned = losses.f_view([batch.size()[0], POSITION_BINS as i64, -1])?;
                sum = sum.f_add(
                    &binned.f_to_kind(Kind::Double)?.f_mean_dim(2, false, None)?.f_sum_dim_intlist(0, false, None)?,
                )?;
                rows += batch.size()[0];
            }
            Ok(Vec::<f64>::try_from(sum.f_div_scalar(rows as f64)?.to_device(Device::Cpu))?)
        })
    }
}

/// Operations of one update.
fn operations(run: &Run, config: &LlamaConfig, kinds: &[tch_moba::AttentionKind]) -> f64 {
    run.rows() as f64 * compute::sequence(config, run.seqlen, kinds)
}

/// Operations of the whole run, for the time left.
pub fn work(run: &Run, vocab_size: i64) -> f64 {
    let config = run.llama(vocab_size);
    let (layers, steps) = (config.num_hidden_layers, run.steps());
    let kinds = |step| -> Vec<_> {
        let step = Step::train(step as f64 / steps as f64);
        (0..layers).map(|layer| config.policy.kind(layer, layers, step)).collect()
    };
    (0..steps).map(|step| operations(run, &config, &kinds(step))).sum()
}

/// Each sixteenth of a run, and before the first of them each half of what is before it.
fn is_measured(step: u64, steps: u64) -> bool {
    const PARTS: u64 = 16;
    let linear = (1..=PARTS).any(|part| step == (steps * part).div_ceil(PARTS));
    let early = (1..=4).any(|halvings| step == steps.div_ceil(PARTS << halvings));
    linear || early
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn measured_early_and_to_the_end() {
        let measured = |steps| (1..=steps).filter(|&step| is_measured(step, steps)).collect::<Vec<_>>();
        assert_eq!(measured(1), [1]);
        assert_eq!(measured(3), [1, 2, 3]);
        let many = measured(1600);
        assert_eq!(many[..6], [7, 13, 25, 50, 100, 200]);
        assert_eq!((many.len(), many.last()), (20, Some(&1600)));
    }
    /// Two optimizers on the same function, one with float32 weights and one with masters behind bfloat16 weights.
    #[test]
    fn master_weights_follow_float32() {
        let start = Tensor::from_slice(&[0.5f32, -0.25, 1.0, 2.0]).view([2, 2]);
        let run = |masters: bool| {
            let mut vs = nn::VarStore::new(Device::Cpu);
            let weight = vs.root().var_copy("weight", &start);
            let mut optimizer = match masters {
                true => AdamW::with_master_weights(&mut vs, Kind::BFloat16, 0.1, 1.0),
                false => AdamW::new(&vs, 0.1, 1.0),
            };
            for _ in 0..50 {
                optimizer.zero_grad().unwrap();
                for part in [0.25, 0.75] {
                    // Sums of powers of two: the same in both dtypes.
                    ((&weight * 0.0 + 1.0) * part).sum(Kind::Float).backward();
                    optimizer.accumulate().unwrap();
                }
                // Far below what bfloat16 weights could take up.
                let _norm = optimizer.step(1e-5).unwrap();
            }
            let kind = weight.kind();
            let state = optimizer.state();
            (kind, state.get("master.weight").unwrap_or(&weight).detach().copy())
        };
        let ((float, single), (narrow, master)) = (run(false), run(true));
        assert_eq!((float, narrow, master.kind()), (Kind::Float, Kind::BFloat16, Kind::Float));
        assert_eq!(single, master);
        assert_ne!(single, start);
    }
}
