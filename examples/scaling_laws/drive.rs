//! The sweep: one run after the other, resumable at any point; other processes may take some of them.

use std::{
    fs,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use tch::Device;

use crate::{
    checkpoint,
    claim::Claim,
    compute,
    corpus::Corpus,
    environment,
    progress::Progress,
    records::{self, Header, Record, Writer},
    sweep::Run,
    train::{State, Trainer, work},
};

/// How long a sweep may take, and what it leaves behind when it is stopped.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Stop after this long.
    pub time: Option<Duration>,
    /// Leave a run that would not be done in time for the next call, instead of stopping in it with a checkpoint.
    pub whole_runs: bool,
    /// Between the checkpoints of a run.
    pub checkpoint: Duration,
}

/// What the runs of a sweep have in common.
pub struct Sweeper<'a> {
    pub out: &'a Path,
    pub corpus: &'a Corpus,
    pub device: Device,
    pub commit: String,
    pub limits: Limits,
}

enum Outcome {
    Finished,
    /// Another process is at it.
    Taken,
    /// Out of time, with a checkpoint.
    Stopped,
    /// Not begun, or given up: it needs more time than is left.
    PutOff,
}

impl Sweeper<'_> {
    /// Does what is left of `runs`, a part of the sweep `all`; returns how many are still to be done.
    pub fn sweep(&self, all: &[Run], runs: &[Run]) -> Result<usize> {
        let place = self.out.display();
        fs::create_dir_all(self.out).with_context(|| format!("cannot create {place}"))?;
        for finished in records::read_all(self.out)? {
            let name = finished.header.run.name();
            let run = all.iter().find(|run| run.name() == name);
            let run = run.with_context(|| format!("{place} holds the run {name}, which is not of this sweep"))?;
            self.belongs(&finished.header, &self.header(run))?;
        }
        let mut left: Vec<&Run> = Vec::new();
        for run in runs {
            if !records::path(self.out, run).exists() {
                left.push(run);
            }
        }
        let vocab_size = self.corpus.identity.vocab_size;
        let deadline = self.limits.time.map(|time| Instant::now() + time);
        let mut progress = Progress::new(runs.len(), left.iter().map(|run| work(run, vocab_size)).sum())?;
        progress.say(&format!("{} of {} runs are done", runs.len() - left.len(), runs.len()));
        let mut begun = false;
        for &run in &left {
            // One run is begun however short the time: each call comes further.
            if begun && deadline.is_some_and(|deadline| Instant::now() >= deadline) {
                break;
            }
            match self.claim(run, deadline, &mut progress).with_context(|| format!("run {}", run.name()))? {
                Outcome::Finished | Outcome::PutOff => begun = true,
                Outcome::Taken => progress.skip(work(run, vocab_size)),
                Outcome::Stopped => break,
            }
        }
        progress.finish();
        Ok(left.into_iter().filter(|run| !records::path(self.out, run).exists()).count())
    }

    fn header(&self, run: &Run) -> Header {
        Header {
            run: run.clone(),
            parameters: compute::parameters(&run.llama(self.corpus.identity.vocab_size)),
            steps: run.steps(),
            text: self.corpus.identity.clone(),
            commit: self.commit.clone(),
            device: environment::device(self.device),
        }
    }

    /// Whether what lies in the folder is of this sweep; the device may be another.
    fn belongs(&self, there: &Header, here: &Header) -> Result<()> {
        let place = self.out.display();
        records::comparable(there, here)
            .with_context(|| format!("{place} holds runs of another sweep: choose another --out, or remove it"))?;
        ensure!(
            there.run == here.run,
            "{place} holds the run {} with other settings: choose another --out, or remove it",
            here.run.name()
        );
        Ok(())
    }

    fn claim(&self, run: &Run, deadline: Option<Instant>, progress: &mut Progress) -> Result<Outcome> {
        let claim = Claim::take(&self.out.join(format!("{}.lock", run.name())))?;
        match claim {
            Some(_held) if !records::path(self.out, run).exists() => self.train(run, deadline, progress),
            _ => Ok(Outcome::Taken),
        }
    }

    fn train(&self, run: &Run, deadline: Option<Instant>, progress: &mut Progress) -> Result<Outcome> {
        let header = self.header(run);
        let path = records::path(self.out, run);
        let checkpoints = self.checkpoints(run);
        let mut trainer = Trainer::new(run, self.corpus, self.device)?;
        let mut done = Vec::new();
        if let Some(newest) = checkpoint::newest(&checkpoints)? {
            let (there, before) = records::begun(&path)?;
            self.belongs(&there, &header)?;
            trainer.state = checkpoint::load(&newest, &trainer.vs, &trainer.optimizer)?;
            done = before;
            // Records after the checkpoint are of steps that will be done again.
            done.retain(|record: &Record| record.step <= trainer.state.step);
        }
        let mut writer = Writer::begin(&path, &header, &done)?;
        let whole = work(run, self.corpus.identity.vocab_size);
        progress.begin(run, whole, trainer.state.operations);
        let mut saved = Instant::now();
        let mut warmed_up = false;
        while !trainer.done() {
            let before = trainer.state;
            let record = trainer.advance()?;
            writer.push(&record)?;
            progress.advance(run, &record, trainer.state.operations - before.operations);
            done.push(record);
            if trainer.done() {
                break;
            }
            // The first part of a run holds what happens once, such as the loading of kernels.
            let part = trainer.state.operations - before.operations;
            let rate = part / (trainer.state.seconds - before.seconds);
            let needed = Duration::from_secs_f64((whole - trainer.state.operations) / rate);
            let warm = std::mem::replace(&mut warmed_up, true);
            let late = |moment: Instant| deadline.is_some_and(|deadline| moment > deadline);
            let stop = late(Instant::now());
            if self.limits.whole_runs && (stop || warm && late(Instant::now() + needed)) {
                progress.put_off(run, needed);
                // With a checkpoint of an earlier call it goes on from there.
                if checkpoint::newest(&checkpoints)?.is_none() {
                    writer.discard()?;
                }
                return Ok(Outcome::PutOff);
            }
            if stop || !self.limits.whole_runs && saved.elapsed() >= self.limits.checkpoint {
                let State { step, .. } = trainer.state;
                checkpoint::save(
                    &checkpoints,
                    step,
                    &trainer.state,
                    trainer.config(),
                    &trainer.vs,
                    &trainer.optimizer,
                )?;
                saved = Instant::now();
            }
            if stop {
                progress.say(&format!("out of time in {}; the same command goes on from there", run.name()));
                return Ok(Outcome::Stopped);
            }
        }
        writer.finish()?;
        if checkpoints.exists() {
            fs::remove_dir_all(&checkpoints)?;
        }
        progress.end(run, &done);
        Ok(Outcome::Finished)
    }

    fn checkpoints(&self, run: &Run) -> PathBuf {
        self.out.join(format!("{}.checkpoint", run.name()))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;
    use crate::{corpus::of_tokens, sweep::Sweep};

    const SWEEP: &str = r#"
        tokens_per_parameter = 0.5
        held_out_tokens = 256
        pass_tokens = 64
        recipe = { lr = 3e-3, warmup = 0.05, weight_decay = 0.1, clip = 1.0 }
        size = [{ name = "tiny", layers = 2, hidden = 16, heads = 2, batch_tokens = 128 }]
        context = [{ seqlen = 64, block_size = 8, top_k = 3, sizes = ["tiny"], policies = ["moba", "two-stage:0.5"], seeds = [0] }]
    "#;

    fn corpus() -> Corpus {
        let tokens = |count: i64| (0..count).map(|i| (i * i % 251 % 50) as i16).collect();
        of_tokens(tokens(4000), tokens(700), 50).unwrap()
    }

    fn sweep(folder: &Path, corpus: &Corpus, time: Option<Duration>, whole_runs: bool, commit: &str) -> Result<usize> {
        let limits = Limits { time, whole_runs, checkpoint: Duration::from_secs(3600) };
        let runs = Sweep::parse(SWEEP)?.runs()?;
        // libtorch's seed is the process's: weights of tests that train at once would be drawn from one row of numbers.
        static ALONE: Mutex<()> = Mutex::new(());
        let _alone = ALONE.lock();
        Sweeper { out: folder, corpus, device: Device::Cpu, commit: commit.into(), limits }.sweep(&runs, &runs)
    }

    /// Losses and steps of all records, which do not depend on the clock.
    fn numbers(folder: &Path) -> Vec<Vec<(u64, f64, f64, f64)>> {
        let number = |record: &Record| (record.step, record.loss, record.held_out, record.compute_real);
        let runs = records::read_all(folder).unwrap();
        runs.iter().map(|run| run.records.iter().map(number).collect()).collect()
    }

    #[test]
    fn stopped_and_continued_is_the_same() {
        let folder = std::env::temp_dir().join(format!("scaling-drive-{}", std::process::id()));
        let (whole, pieces) = (folder.join("whole"), folder.join("pieces"));
        let corpus = corpus();
        assert_eq!(sweep(&whole, &corpus, None, false, "a").unwrap(), 0);

        // Without time, each call does one measurement, and the last one of a run finishes it.
        let mut calls = 0;
        while sweep(&pieces, &corpus, Some(Duration::from_nanos(1)), false, "a").unwrap() > 0 {
            calls += 1;
            assert!(calls < 100, "no progress");
            // A kill in the middle of a line, after the checkpoint.
            for entry in fs::read_dir(&pieces).unwrap() {
                let path = entry.unwrap().path();
                if path.extension().is_some_and(|extension| extension == "partial") {
                    let mut text = fs::read_to_string(&path).unwrap();
                    text.push_str("{\"step\":99,\"tok");
                    fs::write(&path, text).unwrap();
                }
            }
        }
        assert_eq!(numbers(&pieces), numbers(&whole));
        let last = numbers(&whole).concat();
        assert!(last.iter().all(|number| number.1.is_finite() && number.2.is_finite()));

        // Finished runs are left alone, and nothing else is mixed in.
        let path = pieces.join("64-tiny-moba-0.jsonl");
        let written = fs::metadata(&path).unwrap().modified().unwrap();
        assert_eq!(sweep(&pieces, &corpus, None, false, "a").unwrap(), 0);
        assert_eq!(fs::metadata(&path).unwrap().modified().unwrap(), written);
        let refusal = format!("{:#}", sweep(&pieces, &corpus, None, false, "b").unwrap_err());
        assert!(refusal.contains("another sweep") && refusal.contains("commit a and b"), "{refusal}");
        fs::remove_dir_all(folder).unwrap();
    }

    #[test]
    fn a_run_of_another_process_is_left_to_it() {
        let folder = std::env::temp_dir().join(format!("scaling-shared-{}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        let held = Claim::take(&folder.join("64-tiny-moba-0.lock")).unwrap().unwrap();
        assert_eq!(sweep(&folder, &corpus(), None, false, "a").unwrap(), 1);
        assert_eq!(records::read_all(&folder).unwrap().len(), 1);
        assert!(!folder.join("64-tiny-moba-0.jsonl.partial").exists());
        drop(held);
        assert_eq!(sweep(&folder, &corpus(), None, false, "a").unwrap(), 0);
        assert_eq!(fs::read_dir(&folder).unwrap().count(), 2, "only records are left");
        fs::remove_dir_all(folder).unwrap();
    }

    #[test]
    fn a_run_that_would_be_late_is_put_off() {
        let folder = std::env::temp_dir().join(format!("scaling-late-{}", std::process::id()));
        let left = sweep(&folder, &corpus(), Some(Duration::from_millis(1)), true, "a").unwrap();
        assert_eq!(left, 2);
        assert_eq!(fs::read_dir(&folder).unwrap().count(), 0);
        // Neither is what an earlier call has done of it lost.
        assert_eq!(sweep(&folder, &corpus(), Some(Duration::from_nanos(1)), false, "a").unwrap(), 2);
        assert_eq!(sweep(&folder, &corpus(), Some(Duration::from_nanos(1)), true, "a").unwrap(), 2);
        assert!(folder.join("64-tiny-moba-0.checkpoint").exists());
        assert_eq!(sweep(&folder, &corpus(), None, false, "a").unwrap(), 0);
        let whole = folder.join("whole");
        sweep(&whole, &corpus(), None, false, "a").unwrap();
        assert_eq!(numbers(&folder), numbers(&whole));
        fs::remove_dir_all(folder).unwrap();
    }
}
