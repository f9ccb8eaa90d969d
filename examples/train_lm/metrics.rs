//! One JSON object a line: every training step, every held-out measurement.

use std::{
    fs,
    io::{BufRead, BufReader, BufWriter, Write},
    path::Path,
};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

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
        let mut records = Vec::new();
        if step > 0
            && let Ok(file) = fs::File::open(path)
        {
            for line in BufReader::new(file).lines() {
                // A killed run may leave half a line at the end.
                let Ok(record) = serde_json::from_str::<Record>(&line?) else { break };
                if record.step <= step {
                    records.push(record);
                }
            }
        }
        let file = fs::File::create(path).with_context(|| format!("cannot write {}", path.display()))?;
        let mut metrics = Self { file: BufWriter::new(file), records: Vec::new() };
        for record in records {
            metrics.push(record)?;
        }
        metrics.flush()?;
        Ok(metrics)
    }

    pub fn push(&mut self, record: Record) -> Result<()> {
        serde_json::to_writer(&mut self.file, &record)?;
        writeln!(self.file)?;
        self.records.push(record);
        Ok(())
    }

    pub fn flush(&mut self) -> Result<()> {
        Ok(self.file.flush()?)
    }
}
