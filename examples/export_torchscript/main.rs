//! A checkpoint of `train_lm` to TorchScript and back, with a sample of what the reloaded module writes.
//!
//!     cargo run --release --example export_torchscript -- target/train_lm
//!
//! The file runs wherever the `moba` operators are registered. In Python:
//!
//!     torch.ops.load_library("target/release/examples/libmoba_ops.so")     # cargo build --release --example moba_ops
//!     logits = torch.jit.load("model.pt")(tokens)                          # int64 [1, seqlen] -> [1, seqlen, vocab]
//!
//! In C++: link libmoba_ops.so (or `dlopen` it before), then `torch::jit::load("model.pt").forward({tokens})`.

#[path = "../common/device.rs"]
mod device;
mod generate;
#[path = "../common/steps.rs"]
mod steps;

use std::{
    fs,
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::{Context, Result, ensure};
use clap::Parser;
use serde_json::json;
use tch::{CModule, Device, Kind, Tensor, nn};
use tch_moba::{
    HybridPolicy, Step, dispatch,
    llama::{Llama, LlamaConfig, load_weights},
};

use crate::device::DeviceArg;

/// Export a checkpoint of train_lm to TorchScript.
#[derive(Parser, Debug)]
struct Args {
    /// A checkpoint (with config.json and model.safetensors), or the --out of a run: then its newest checkpoint
    checkpoint: PathBuf,
    /// The TorchScript file; default: model.pt beside the checkpoint. The facts about it go into FILE.json
    #[arg(long)]
    out: Option<PathBuf>,
    /// Attention of the exported model; default: what the checkpoint's policy says at the end of training
    #[arg(long)]
    policy: Option<HybridPolicy>,
    /// Length of the context, fixed in the file; default: that of training
    #[arg(long, value_parser = clap::value_parser!(i64).range(2..))]
    seqlen: Option<i64>,
    #[arg(long, value_enum, default_value = "cpu")]
    device: DeviceArg,
    /// Text to continue
    #[arg(long, default_value = "#include <ATen/")]
    prompt: String,
    /// Bytes to generate
    #[arg(long, default_value_t = 200)]
    sample: usize,
    /// 0 takes the likeliest byte every time
    #[arg(long, default_value_t = 0.7)]
    temperature: f64,
    #[arg(long, default_value_t = 0)]
    seed: i64,
}

fn main() -> ExitCode {
    match run(&Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: &Args) -> Result<()> {
    let device = args.device.resolve()?;
    let checkpoint = find_checkpoint(&args.checkpoint)?;
    let mut config = LlamaConfig::read(checkpoint.join("config.json"))?;
    if let Some(policy) = &args.policy {
        config.policy = policy.clone();
    }
    let seqlen = args.seqlen.unwrap_or(config.max_position_embeddings);
    let out = args.out.clone().unwrap_or_else(|| checkpoint.with_file_name("model.pt"));

    let mut vs = nn::VarStore::new(device);
    let model = Llama::new(vs.root(), &config)?;
    load_weights(&vs, checkpoint.join("model.safetensors"))?;
    vs.freeze();

    tch::manual_seed(args.seed);
    let tokens = Tensor::randint(config.vocab_size, [1, seqlen], (Kind::Int64, device));
    let module = trace(&model, &tokens)?;
    write_facts(&out, &config, &model, seqlen, device)?;
    module.save(&out).map_err(tch_moba::Error::from).with_context(|| format!("cannot write {}", out.display()))?;

    // The module below knows the operators by name only: without this call a program that merely loads it has none.
    dispatch::ensure_loaded();
    let reloaded = CModule::load_on_device(&out, device)
        .map_err(tch_moba::Error::from)
        .with_context(|| format!("cannot load {}", out.display()))?;
    // Other tokens than those of the trace: their routing is another, and must be computed anew.
    let tokens = Tensor::randint(config.vocab_size, [1, seqlen], (Kind::Int64, device));
    let difference = compare(&model, &reloaded, &tokens)?;
    println!("reloaded: logits equal those of the model (largest difference {difference:.1e})\n");

    let text = generate::sample(&reloaded, args.prompt.as_bytes(), args.sample, seqlen, args.temperature, device)?;
    println!("{}", String::from_utf8_lossy(&text));
    Ok(())
}

/// The checkpoint itself, or the newest of the run.
fn find_checkpoint(path: &Path) -> Result<PathBuf> {
    if path.join("config.json").is_file() {
        return Ok(path.to_owned());
    }
    steps::newest(path)?.with_context(|| {
        format!("no checkpoint in {}: train one with `cargo run --release --example train_lm`", path.display())
    })
}

/// Traces the model as after training. Sequence length and policy become part of the program.
fn trace(model: &Llama, tokens: &Tensor) -> Result<CModule> {
    // The closure cannot return an error, so the forward pass is tried once before.
    let forward = |tokens: &Tensor| tch::no_grad(|| model.forward(tokens, Step::prefill(1.0)));
    let _ = forward(tokens)?;
    let mut closure = |inputs: &[Tensor]| forward(&inputs[0]).map_or_else(|_| Vec::new(), |logits| vec![logits]);
    Ok(CModule::create_by_tracing("MobaLlama", "forward", &[tokens.shallow_clone()], &mut closure)?)
}

/// Says, and writes beside the module, what the trace has fixed.
fn write_facts(out: &Path, config: &LlamaConfig, model: &Llama, seqlen: i64, device: Device) -> Result<()> {
    let layers: Vec<String> = model.kinds(Step::prefill(1.0)).iter().map(ToString::to_string).collect();
    let facts = json!({
        "seqlen": seqlen,
        "vocab_size": config.vocab_size,
        // Weights are constants of a traced program, so moving the module later does not move them.
        "device": format!("{device:?}"),
        "moba": config.moba,
        "policy": config.policy,
        "attention_by_layer": layers,
        "operators": "load libmoba_ops.so (cargo build --release --example moba_ops) before this module",
    });
    let path = PathBuf::from(format!("{}.json", out.display()));
    fs::write(&path, serde_json::to_string_pretty(&facts)?)
        .with_context(|| format!("cannot write {}", path.display()))?;
    println!("exporting {} (facts in {})", out.display(), path.display());
    println!("fixed in it: {seqlen} tokens, policy {} (layers: {})", config.policy, layers.join(" "));
    Ok(())
}

fn compare(model: &Llama, reloaded: &CModule, tokens: &Tensor) -> Result<f64> {
    tch::no_grad(|| {
        let wanted = model.forward(tokens, Step::prefill(1.0))?;
        let given = reloaded.forward_ts(&[tokens])?;
        ensure!(
            given.size() == wanted.size(),
            "the reloaded module gives {:?}, wanted {:?}",
            given.size(),
            wanted.size()
        );
        let largest = |tensor: &Tensor| f64::try_from(tensor.abs().max());
        let (difference, scale) = (largest(&(&given - &wanted))?, largest(&wanted)?);
        // The same operators on the same numbers; only a fused elementwise kernel may round differently.
        ensure!(
            difference <= 1e-4 * scale.max(1.0),
            "the reloaded module's logits differ by {difference:e} from the model's, of size {scale}"
        );
        Ok(difference)
    })
}
