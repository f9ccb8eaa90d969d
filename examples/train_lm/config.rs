//! The command line, and the part of it that decides the numbers of a run.

use std::path::PathBuf;

use anyhow::{Result, ensure};
use clap::Parser;
use serde::Serialize;
use serde_json::{Map, Value};
use tch_moba::{HybridPolicy, MobaConfig, llama::LlamaConfig};

use crate::device::DeviceArg;

/// Train a byte-level language model with MoBA attention.
#[derive(Parser, Debug)]
pub struct Args {
    /// Where checkpoint, metrics and chart go
    #[arg(long, default_value = "target/train_lm")]
    pub out: PathBuf,
    /// Continue the run in --out; the arguments that decide its numbers must be the same
    #[arg(long, conflicts_with = "restart")]
    pub resume: bool,
    /// Throw the run in --out away and start anew
    #[arg(long)]
    pub restart: bool,
    /// Write a checkpoint every so many steps, and at the end
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u64).range(1..))]
    pub save_every: u64,
    /// Measure the held-out loss every so many steps, and at the end
    #[arg(long, default_value_t = 50, value_parser = clap::value_parser!(u64).range(1..))]
    pub eval_every: u64,
    /// Read losses back from the device every so many steps
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u64).range(1..))]
    pub log_every: u64,
    /// Stop after this many steps of the whole run, with a checkpoint to --resume from
    #[arg(long)]
    pub stop_at: Option<u64>,
    #[command(flatten)]
    pub run: RunConfig,
}

/// Everything that decides the losses of a run. Saved as `run.json`; a resumed run must have the same.
#[derive(clap::Args, Clone, Debug, Serialize)]
pub struct RunConfig {
    /// The CPU computes in float32, a GPU in bfloat16 with float32 weights
    #[arg(long, value_enum, default_value = "cpu")]
    pub device: DeviceArg,
    /// Text files, or directories of them; default: the C++ headers of libtorch
    #[arg(long, num_args = 1..)]
    pub data: Vec<PathBuf>,
    /// moba, full, layer-wise:LAYERS, two-stage:FRACTION or hybrid:LAYERS,FRACTION
    #[arg(long, default_value = "moba")]
    pub policy: HybridPolicy,
    /// Block size and top-k
    #[arg(long, default_value = "128x3")]
    pub moba: MobaConfig,
    #[arg(long, default_value_t = 4)]
    pub layers: usize,
    #[arg(long, default_value_t = 192)]
    pub hidden: i64,
    /// Size of the feed-forward layers; default: 8/3 of --hidden, rounded up to a multiple of 32
    #[arg(long)]
    pub intermediate: Option<i64>,
    #[arg(long, default_value_t = 6)]
    pub heads: i64,
    #[arg(long, default_value_t = 2)]
    pub heads_k: i64,
    #[arg(long, default_value_t = 1024)]
    pub seqlen: i64,
    /// Sequences in a batch
    #[arg(long, default_value_t = 2)]
    pub batch: i64,
    #[arg(long, default_value_t = 400)]
    pub steps: u64,
    /// Peak learning rate, reached after the warm-up; it then falls to a tenth along a cosine
    #[arg(long, default_value_t = 3e-3)]
    pub lr: f64,
    #[arg(long, default_value_t = 20)]
    pub warmup: u64,
    #[arg(long, default_value_t = 0.1)]
    pub weight_decay: f64,
    /// Largest norm of the gradient
    #[arg(long, default_value_t = 1.0)]
    pub clip: f64,
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
}

impl RunConfig {
    pub fn check(&self) -> Result<()> {
        for (name, value) in [("seqlen", self.seqlen), ("batch", self.batch), ("steps", self.steps as i64)] {
            ensure!(value >= 1, "--{name} must be at least 1, got {value}");
        }
        for (name, value) in [("lr", self.lr), ("clip", self.clip)] {
            ensure!(value.is_finite() && value > 0.0, "--{name} must be positive, got {value}");
        }
        ensure!(
            self.weight_decay.is_finite() && self.weight_decay >= 0.0,
            "--weight-decay must not be negative, got {}",
            self.weight_decay
        );
        Ok(self.llama().check()?)
    }

    pub fn llama(&self) -> LlamaConfig {
        LlamaConfig {
            vocab_size: 256,
            hidden_size: self.hidden,
            intermediate_size: self.intermediate.unwrap_or((self.hidden * 8 / 3 + 31) / 32 * 32),
            num_hidden_layers: self.layers,
            num_attention_heads: self.heads,
            num_key_value_heads: Some(self.heads_k),
            max_position_embeddings: self.seqlen,
            // Hugging Face's 0.02 suits a width of thousands; a narrow model starts to learn later with it.
            initializer_range: (self.hidden as f64).powf(-0.5),
            tie_word_embeddings: true,
            moba: self.moba,
            policy: self.policy.clone(),
            ..LlamaConfig::default()
        }
    }

    pub fn tokens_per_step(&self) -> u64 {
        (self.batch * self.seqlen) as u64
    }

    /// Linear warm-up, then a cosine down to a tenth.
    pub fn lr_at(&self, step: u64) -> f64 {
        if step < self.warmup {
            return self.lr * (step + 1) as f64 / self.warmup as f64;
        }
        let done = (step - self.warmup) as f64 / (self.steps.saturating_sub(self.warmup)).max(1) as f64;
        self.lr * (0.55 + 0.45 * (std::f64::consts::PI * done.min(1.0)).cos())
    }

    /// The arguments that differ from those of `before`, a run.json, as text. Older ones do not name the device.
    pub fn differences(&self, before: &Map<String, Value>) -> Result<Vec<String>> {
        let ours = serde_json::to_value(self)?;
        let difference = |(name, value): (&String, &Value)| {
            let was = before.get(name).filter(|was| *was != value)?;
            Some(format!("--{} is {value}, was {was}", name.replace('_', "-")))
        };
        Ok(ours.as_object().into_iter().flatten().filter_map(difference).collect())
    }
}
