//! Trains a byte-level Llama with MoBA attention on text, and draws its loss curve.
//!
//!     cargo run --release --example train_lm
//!     cargo run --release --example train_lm -- --data book.txt sources/ --policy hybrid:1,0.9 --out runs/hybrid
//!     cargo run --release --example train_lm -- --out runs/hybrid --resume      (with the other arguments as before)
//!
//! Into `--out` go `run.json` (the resolved configuration), `metrics.jsonl`, `loss.svg` and the newest checkpoint,
//! `step-NNNNNN/`, whose `config.json` and `model.safetensors` have the names of Hugging Face Llama.

mod chart;
#[path = "../common/checkpoint.rs"]
mod checkpoint;
#[path = "../common/claim.rs"]
mod claim;
mod config;
mod corpus;
#[path = "../common/device.rs"]
mod device;
mod folder;
mod metrics;
#[path = "../common/optimizer.rs"]
mod optimizer;
#[path = "../common/replace.rs"]
mod replace;
#[path = "../common/steps.rs"]
mod steps;
#[path = "../common/text.rs"]
mod text;
mod train;

use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    tracing_subscriber::fmt()
        .with_env_filter(tracing_subscriber::EnvFilter::from_default_env())
        .with_writer(std::io::stderr)
        .init();
    match train::run(&config::Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
