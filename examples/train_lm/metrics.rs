//! One JSON object a line: every training step, every held-out measurement.

use std::{
    fs,
    io::{BufWriter, ErrorKind, Write},
    path::Path,
};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use crate::replace::replace;

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Record {
    /// Updates done.
    pub step: u64,
    /// The share of the run that is done.
    pub progress: f64,
    /// Tokens trained on.
    pub tokens: u64,
    /// Layers of each kind, for example `3 moba + 1 full`.
    pub attention: String,
    /// Training loss of this step's batch, nats per byte.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub loss: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lr: Option<f64>,
    /// Before clipping.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub grad_norm: Option<f64>,
    /// Over the steps since losses were last read back, held-out measurements excluded.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tokens_per_second: Option<f64>,
    /// Held-out loss, nats per byte.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub held_out: Option<f64>,
}

pub struct Metrics {
    file: BufWriter<fs::File>,
    pub records: Vec<Record>,
}

impl Metrics {
    /// Opens `path`, keeping its records up to `step`: those after it are of steps that will be done again.
    pub fn open(path: &Path, step: u64) -> Result<Self> {
        let mut records = if step > 0 { read(path)? } else { Vec::new() };
        records.retain(|record| record.step <= step);
        let lines: Vec<String> = records.iter().map(line).collect::<Result<_>>()?;
        Ok(Self { file: BufWriter::new(replace(path, &lines.concat())?), records })
    }

    pub fn push(&mut self, record: Record) -> Result<()> {
        self.file.write_all(line(&record)?.as_bytes())?;
        self.records.push(record);
        Ok(())
    }

    pub fn flush(&mut self) -> Result<()> {
        Ok(self.file.flush()?)
    }
}

/// The records of `path`; none if there is no such file.
fn read(path: &Path) -> Result<Vec<Record>> {
    let text = match fs::read_to_string(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        text => text.with_context(|| format!("cannot read {}", path.display()))?,
    };
    // A killed run may leave half a line at the end.
    Ok(text.lines().map_while(|line| serde_json::from_str(line).ok()).collect())
}

fn line(record: &Record) -> Result<String> {
    Ok(serde_json::to_string(record)? + "\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_resumed_run_keeps_the_records_of_its_steps() {
        let path = std::env::temp_dir().join(format!("train-lm-metrics-{}.jsonl", std::process::id()));
        let record = |step| Record { step, loss: Some(0.1 + 0.2), ..Record::default() };
        // Nothing to keep is no error.
        let mut metrics = Metrics::open(&path, 1).unwrap();
        (1..4).for_each(|step| metrics.push(record(step)).unwrap());
        metrics.flush().unwrap();

        let mut metrics = Metrics::open(&path, 2).unwrap();
        assert_eq!(metrics.records, [record(1), record(2)]);
        metrics.push(record(3)).unwrap();
        drop(metrics);
        assert_eq!(read(&path).unwrap(), [record(1), record(2), record(3)]);
        assert_eq!(Metrics::open(&path, 0).unwrap().records, []);

        // A file that cannot be read is not one without records.
        fs::write(&path, b"\xff").unwrap();
        assert!(Metrics::open(&path, 1).err().unwrap().to_string().starts_with("cannot read "));
        assert_eq!(fs::read(&path).unwrap(), b"\xff");
        fs::remove_file(path).unwrap();
    }
}
