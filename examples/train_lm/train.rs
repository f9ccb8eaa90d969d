//! The training loop.

use std::{
    path::Path,
    time::{Duration, Instant},
};

use anyhow::{Result, ensure};
use indicatif::{ProgressBar, ProgressStyle};
use serde::{Deserialize, Serialize};
use tch::{Device, Kind, Tensor, nn};
use tch_moba::{AttentionKind, Step, autocast, llama::Llama};

use crate::{
    chart, checkpoint,
    config::{Args, RunConfig},
    corpus::{Corpus, Windows},
    folder::Folder,
    metrics::{Metrics, Record},
    optimizer::AdamW,
};

/// Where a run stands. The batches are a function of the step, so the step is also the position in the data.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct State {
    step: u64,
    tokens: u64,
    corpus_hash: u64,
}

/// Held-out sequences per measurement.
const HELD_OUT_WINDOWS: usize = 16;

pub fn run(args: &Args) -> Result<()> {
    args.run.check()?;
    let device = args.run.device.resolve()?;
    let folder = Folder::open(args)?;
    let corpus = Corpus::load(&args.run.data)?;
    let (train, held_out) = (corpus.train.len() as f64 / 1e6, corpus.held_out.len() as f64 / 1e6);
    println!("corpus: {} documents, {train:.1} MB to train on, {held_out:.2} MB held out", corpus.documents);

    let mut trainer = Trainer::new(args, device, &corpus)?;
    if let Some(path) = &folder.resume_from {
        trainer.state = checkpoint::load(path, &trainer.vs, &trainer.optimizer)?;
        ensure!(
            trainer.state.corpus_hash == corpus.hash,
            "{} was trained on another text: give the same --data, or --restart",
            path.display()
        );
        println!("resumed {}", path.display());
    } else {
        // Last, so that a --restart whose arguments do not work loses nothing.
        folder.begin()?;
    }
    trainer.train()
}

struct Trainer<'a> {
    args: &'a Args,
    run: &'a RunConfig,
    device: Device,
    vs: nn::VarStore,
    model: Llama,
    optimizer: AdamW,
    windows: Windows<'a>,
    held_out: Vec<Tensor>,
    state: State,
}

impl<'a> Trainer<'a> {
    fn new(args: &'a Args, device: Device, corpus: &'a Corpus) -> Result<Self> {
        let run = &args.run;
        let windows = Windows::new("training", &corpus.train, run.seqlen, run.seed)?;
        let held_out = Windows::new("held-out", &corpus.held_out, run.seqlen, run.seed)?.spread(
            HELD_OUT_WINDOWS,
            run.batch,
            device,
        );
        tch::manual_seed(run.seed as i64);
        let vs = nn::VarStore::new(device);
        let model = Llama::new(vs.root(), &run.llama())?;
        let optimizer = AdamW::new(&vs, run.weight_decay, run.clip);
        let state = State { step: 0, tokens: 0, corpus_hash: corpus.hash };
        Ok(Self { args, run, device, vs, model, optimizer, windows, held_out, state })
    }

    fn train(&mut self) -> Result<()> {
        let (args, run) = (self.args, self.run);
        let parameters: usize = self.vs.variables().values().map(Tensor::numel).sum();
        println!(
            "model: {:.2} M parameters, policy {}, MoBA {}; {} steps of {} tokens on {:?}",
            parameters as f64 / 1e6,
            run.policy,
            run.moba,
            run.steps,
            run.tokens_per_step(),
            self.device
        );
        let mut metrics = Metrics::open(&args.out.join("metrics.jsonl"), self.state.step)?;
        let end = args.stop_at.map_or(run.steps, |stop| stop.min(run.steps));
        let bar = ProgressBar::new(run.steps).with_style(ProgressStyle::with_template(
            "{bar:30} {pos}/{len} {msg} [{elapsed_precise}, {eta_precise} left]",
        )?);
        bar.set_position(self.state.step);
        bar.reset_eta();
        if self.state.step == 0 {
            self.measure_held_out(&mut metrics)?;
        }

        let mut pending = Vec::new();
        let (mut interval, mut spent, mut trained) = (Instant::now(), Duration::ZERO, 0);
        while self.state.step < end {
            pending.push(self.step()?);
            let step = self.state.step;
            // A run cut by --stop-at measures nothing that the whole run would not.
            let log = step.is_multiple_of(args.log_every) || step == end;
            let evaluate = step.is_multiple_of(args.eval_every) || step == run.steps;
            let save = step.is_multiple_of(args.save_every) || step == end;
            if !(log || evaluate || save) {
                continue;
            }
            let tokens = pending.len() as u64 * run.tokens_per_step();
            let loss = self.read_back(&mut pending, interval, &mut metrics)?;
            spent += interval.elapsed();
            trained += tokens;
            bar.set_position(step);
            bar.set_message(format!("loss {loss:.3}, {:.0} tokens/s", trained as f64 / spent.as_secs_f64()));
            if evaluate {
                let loss = self.measure_held_out(&mut metrics)?;
                bar.suspend(|| println!("step {step:>6}  held-out loss {loss:.4}"));
                self.draw(&metrics)?;
            }
            // A resumed run repeats no step before its checkpoint, so their records come first.
            metrics.flush()?;
            if save {
                checkpoint::save(&args.out, step, &self.state, self.model.config(), &self.vs, &self.optimizer)?;
            }
            interval = Instant::now();
        }
        bar.finish_and_clear();
        self.draw(&metrics)?;
        summary(&args.out, &metrics.records, trained, spent);
        Ok(())
    }

    /// One update; loss and gradient norm stay on the device.
    fn step(&mut self) -> Result<Pending> {
        let step = self.state.step;
        let progress = step as f64 / self.run.steps as f64;
        let lr = self.run.lr_at(step);
        let batch = self.windows.batch(step, self.run.batch, self.device);
        self.optimizer.zero_grad()?;
        let loss = self.loss(&batch, Step::train(progress))?;
        loss.f_backward()?;
        self.optimizer.accumulate()?;
        let norm = self.optimizer.step(lr)?;
        self.state.step += 1;
        self.state.tokens += self.run.tokens_per_step();
        let record = Record { lr: Some(lr), ..self.record(progress) };
        Ok(Pending { record, loss: loss.detach(), norm })
    }

    /// Mean cross-entropy of `[batch, seqlen + 1]` tokens; on a GPU in bfloat16 with float32 weights.
    fn loss(&self, batch: &Tensor, step: Step) -> Result<Tensor> {
        let inputs = batch.narrow(1, 0, self.run.seqlen);
        let targets = batch.narrow(1, 1, self.run.seqlen).reshape([-1]);
        let logits = match self.device {
            Device::Cuda(_) => autocast(self.device, Kind::BFloat16, || self.model.forward(&inputs, step))??,
            _ => self.model.forward(&inputs, step)?,
        };
        let logits = logits.f_flatten(0, 1)?.f_to_kind(Kind::Float)?;
        Ok(logits.f_cross_entropy_loss(&targets, None::<&Tensor>, tch::Reduction::Mean, -100, 0.0)?)
    }

    /// Waits for the device and writes the records of the steps since the last call; returns their mean loss.
    fn read_back(&self, pending: &mut Vec<Pending>, since: Instant, metrics: &mut Metrics) -> Result<f64> {
        let read = |tensor: fn(&Pending) -> &Tensor, pending: &[Pending]| -> Result<Vec<f64>> {
            let stacked = Tensor::f_stack(&pending.iter().map(tensor).collect::<Vec<_>>(), 0)?;
            Ok(Vec::<f64>::try_from(stacked.to_device(Device::Cpu).to_kind(Kind::Double))?)
        };
        let (losses, norms) = (read(|step| &step.loss, pending)?, read(|step| &step.norm, pending)?);
        let rate = (pending.len() as u64 * self.run.tokens_per_step()) as f64 / since.elapsed().as_secs_f64();
        for (step, (&loss, &norm)) in pending.drain(..).zip(losses.iter().zip(&norms)) {
            ensure!(
                loss.is_finite() && norm.is_finite(),
                "training diverged at step {} (loss {loss}, gradient norm {norm}): try a smaller --lr",
                step.record.step
            );
            metrics.push(Record {
                loss: Some(loss),
                grad_norm: Some(norm),
                tokens_per_second: Some(rate.round()),
                ..step.record
            })?;
        }
        Ok(losses.iter().sum::<f64>() / losses.len() as f64)
    }

    fn measure_held_out(&self, metrics: &mut Metrics) -> Result<f64> {
        let progress = self.state.step as f64 / self.run.steps as f64;
        let (mut sum, mut rows) = (0.0, 0);
        tch::no_grad(|| -> Result<()> {
            for batch in &self.held_out {
                let size = batch.size()[0];
                sum += f64::try_from(self.loss(batch, Step::prefill(progress))?)? * size as f64;
                rows += size;
            }
            Ok(())
        })?;
        let loss = sum / rows as f64;
        metrics.push(Record { held_out: Some(loss), ..self.record(progress) })?;
        Ok(loss)
    }

    /// A record of the present state; the policy was, or will be, asked at `progress`.
    fn record(&self, progress: f64) -> Record {
        let kinds = self.model.kinds(Step::train(progress));
        let attention = [AttentionKind::Moba, AttentionKind::Full]
            .map(|kind| (kinds.iter().filter(|&&other| other == kind).count(), kind))
            .into_iter()
            .filter(|(count, _)| *count > 0)
            .map(|(count, kind)| format!("{count} {kind}"))
            .collect::<Vec<_>>()
            .join(" + ");
        let State { step, tokens, .. } = self.state;
        Record { step, tokens, attention, progress: step as f64 / self.run.steps as f64, ..Record::default() }
    }

    fn draw(&self, metrics: &Metrics) -> Result<()> {
        let title =
            format!("policy {}, MoBA {}, {} tokens of context", self.run.policy, self.run.moba, self.run.seqlen);
        chart::draw(&self.args.out.join("loss.svg"), &title, &metrics.records)
    }
}

/// A step whose numbers are still on the device.
struct Pending {
    record: Record,
    loss: Tensor,
    norm: Tensor,
}

fn summary(out: &Path, records: &[Record], trained: u64, spent: Duration) {
    let ends = |loss: fn(&Record) -> Option<f64>| {
        let mut losses = records.iter().filter_map(loss);
        let first = losses.next()?;
        Some((first, losses.next_back().unwrap_or(first)))
    };
    let (Some(train), Some(held_out)) = (ends(|record| record.loss), ends(|record| record.held_out)) else { return };
    println!("training loss {:.3} -> {:.3} nats per byte", train.0, train.1);
    println!("held-out loss {:.3} -> {:.3}", held_out.0, held_out.1);
    if trained > 0 {
        let seconds = spent.as_secs_f64();
        println!("{trained} tokens in {seconds:.0} s: {:.0} tokens/s", trained as f64 / seconds);
    }
    println!("checkpoint, metrics.jsonl and loss.svg are in {}", out.display());
}

#[cfg(test)]
mod tests {
    use std::fs;

    use clap::Parser;

    use super::*;

    fn text() -> Vec<u8> {
        (0..4000).map(|i| b'a' + (i * i % 251 % 26) as u8).collect()
    }

    /// Trains a tiny model on the text of `folder` into `folder/out`.
    fn train(folder: &Path, out: &str, more: &[&str]) -> Result<()> {
        let (data, out) = (folder.join("text"), folder.join(out));
        let model =
            ["--layers=2", "--hidden=16", "--heads=2", "--heads-k=1", "--seqlen=32", "--moba=8x2", "--warmup=2"];
        let every = ["--log-every=3", "--eval-every=2", "--save-every=4", "--policy=two-stage:0.5", "--steps=9"];
        let fixed = ["train_lm", "--data", data.to_str().unwrap(), "--out", out.to_str().unwrap()];
        run(&Args::try_parse_from(fixed.iter().chain(&model).chain(&every).chain(more))?)
    }

    /// All that does not depend on the clock: the records, and the checkpoint at the end.
    fn numbers(out: &Path) -> (Vec<Record>, [Vec<u8>; 2]) {
        let text = fs::read_to_string(out.join("metrics.jsonl")).unwrap();
        let records =
            text.lines().map(|line| Record { tokens_per_second: None, ..serde_json::from_str(line).unwrap() });
        let newest = checkpoint::newest(out).unwrap().unwrap();
        let tensors = ["model", "optimizer"].map(|name| fs::read(newest.join(format!("{name}.safetensors"))).unwrap());
        (records.collect(), tensors)
    }

    #[test]
    fn stopped_and_continued_is_the_same() {
        let folder = std::env::temp_dir().join(format!("train-lm-resume-{}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        fs::write(folder.join("text"), text()).unwrap();
        train(&folder, "whole", &[]).unwrap();
        train(&folder, "pieces", &["--stop-at=2"]).unwrap();
        train(&folder, "pieces", &["--stop-at=5", "--resume"]).unwrap();
        // A kill after the checkpoint: a record of a step to be done again, and half of the next.
        let metrics = folder.join("pieces/metrics.jsonl");
        let mut records = fs::read_to_string(&metrics).unwrap();
        records.push_str("{\"step\":6,\"loss\":1.0}\n{\"step\":7,\"lo");
        fs::write(&metrics, records).unwrap();
        train(&folder, "pieces", &["--resume"]).unwrap();

        let (whole, pieces) = (numbers(&folder.join("whole")), numbers(&folder.join("pieces")));
        assert_eq!(pieces.0, whole.0);
        assert!(pieces.1 == whole.1, "the weights, or the state of the optimizer, differ");
        let losses = |loss: fn(&Record) -> Option<f64>| whole.0.iter().filter_map(loss).count();
        assert_eq!((losses(|record| record.loss), losses(|record| record.held_out)), (9, 6));

        // A --restart that cannot start loses nothing.
        for (short, error) in [("", "the corpus is empty"), ("short", "the corpus is too small")] {
            fs::write(folder.join("text"), short).unwrap();
            let refusal = train(&folder, "pieces", &["--restart"]).unwrap_err().to_string();
            assert!(refusal.starts_with(error), "{refusal}");
        }
        fs::write(folder.join("text"), text()).unwrap();
        train(&folder, "pieces", &["--resume"]).unwrap();
        assert!(numbers(&folder.join("pieces")) == whole);
        fs::remove_dir_all(folder).unwrap();
    }
}
