//! Where the sweep stands and how long it will take, by the operations that are done and to be done.

use std::time::{Duration, Instant};

use anyhow::Result;
use indicatif::{HumanDuration, ProgressBar, ProgressStyle};

use crate::{records::Record, sweep::Run};

pub struct Progress {
    bar: ProgressBar,
    runs: usize,
    /// Operations still to be done.
    left: f64,
    /// Operations done by this process, and since when.
    done: f64,
    since: Instant,
}

impl Progress {
    pub fn new(runs: usize, left: f64) -> Result<Self> {
        let style = ProgressStyle::with_template("{bar:30} {percent:>3} % {msg}")?;
        let bar = ProgressBar::new(1000).with_style(style);
        Ok(Self { bar, runs, left, done: 0.0, since: Instant::now() })
    }

    pub fn say(&self, line: &str) {
        self.bar.suspend(|| println!("{line}"));
    }

    /// A run begins, or goes on after `done` of its `whole` operations.
    pub fn begin(&mut self, run: &Run, whole: f64, done: f64) {
        self.left -= done;
        let tokens = run.steps() * run.tokens_per_step();
        let from = if done > 0.0 { format!(", from {:.0} % on", 100.0 * done / whole) } else { String::new() };
        self.say(&format!("{}: {} steps, {:.2} M tokens{from}", run.name(), run.steps(), tokens as f64 / 1e6));
    }

    pub fn advance(&mut self, run: &Run, record: &Record, operations: f64) {
        self.done += operations;
        self.left -= operations;
        self.bar.set_position((1000.0 * self.done / (self.done + self.left)) as u64);
        self.bar.set_message(format!(
            "{} step {} of {}, held-out loss {:.3}, {:.0} tokens/s; {} left",
            run.name(),
            record.step,
            run.steps(),
            record.held_out,
            record.tokens_per_second,
            self.time_left()
        ));
    }

    pub fn end(&mut self, run: &Run, records: &[Record]) {
        let Some(last) = records.last() else { return };
        self.say(&format!(
            "{}: held-out loss {:.4}, trailing {:.4}; {:.0} s, {:.0} tokens/s; {} left for the sweep of {} runs",
            run.name(),
            last.held_out,
            last.trailing,
            last.seconds,
            last.tokens as f64 / last.seconds,
            self.time_left(),
            self.runs
        ));
    }

    /// Another process does a run of so many operations.
    pub fn skip(&mut self, operations: f64) {
        self.left -= operations;
    }

    pub fn put_off(&mut self, run: &Run, needed: Duration) {
        self.say(&format!("{}: put off, it needs {} more", run.name(), HumanDuration(needed)));
    }

    pub fn finish(&self) {
        self.bar.finish_and_clear();
    }

    fn time_left(&self) -> HumanDuration {
        let seconds = self.since.elapsed().as_secs_f64() / self.done.max(1.0) * self.left.max(0.0);
        HumanDuration(Duration::from_secs_f64(seconds))
    }
}
