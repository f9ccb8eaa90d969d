//! Scaling laws: loss against compute for MoBA and for full attention, over several model sizes, with a power law fitted
//! to each (arXiv 2502.13189, section 3.1).
//!
//!     scaling_laws corpus --data sources/ --vocab 4096 --out corpus.safetensors
//!     scaling_laws repeats corpus.safetensors
//!     scaling_laws shuffle corpus.safetensors --out pieces/corpus.safetensors
//!     scaling_laws plan sweep.toml
//!     scaling_laws run sweep.toml --corpus corpus.safetensors --out runs --device cuda
//!     scaling_laws fit runs --out charts
//!
//! `run` may be stopped at any time; the same command goes on. `speed` measures how fast one size trains. The sweep files
//! beside this program are examples: `miniature.toml` for a CPU, `h100.toml` for one GPU.

mod axes;
mod batches;
mod charts;
#[path = "../common/checkpoint.rs"]
mod checkpoint;
#[path = "../common/claim.rs"]
mod claim;
mod command;
mod compute;
mod corpus;
#[path = "../common/device.rs"]
mod device;
mod drive;
mod environment;
mod fit;
mod law;
#[path = "../common/nvidia_smi.rs"]
mod nvidia_smi;
#[path = "../common/optimizer.rs"]
mod optimizer;
mod plan;
mod progress;
mod records;
mod repeats;
#[path = "../common/replace.rs"]
mod replace;
mod speed;
#[path = "../common/steps.rs"]
mod steps;
mod svg;
mod sweep;
#[path = "../common/text.rs"]
mod text;
mod tokenizer;
mod train;

use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    tracing_subscriber::fmt()
        .with_env_filter(tracing_subscriber::EnvFilter::from_default_env())
        .with_writer(std::io::stderr)
        .init();
    match command::Command::parse().run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
