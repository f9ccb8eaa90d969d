//! Checkpoints: a directory that appears whole, by one rename, or not at all.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};
use serde::{Serialize, de::DeserializeOwned};
use tch::{Device, Tensor, nn};
use tch_moba::llama::{LlamaConfig, load_tensors, load_weights};

pub use crate::steps::newest;
use crate::{
    optimizer::AdamW,
    steps::{UNFINISHED, list},
};

/// Writes `step-NNNNNN` under `out`, then removes all others. `state` is what else a run needs to go on.
pub fn save(
    out: &Path,
    step: u64,
    state: &impl Serialize,
    config: &LlamaConfig,
    vs: &nn::VarStore,
    optimizer: &AdamW,
) -> Result<PathBuf> {
    let path = out.join(format!("step-{step:06}"));
    let unfinished = path.with_extension(UNFINISHED);
    let write = || -> Result<()> {
        if unfinished.exists() {
            fs::remove_dir_all(&unfinished)?;
        }
        fs::create_dir_all(&unfinished)?;
        write_tensors(&unfinished.join("model.safetensors"), vs.variables().into_iter().collect())?;
        write_tensors(&unfinished.join("optimizer.safetensors"), optimizer.state())?;
        fs::write(unfinished.join("config.json"), serde_json::to_string_pretty(config)?)?;
        fs::write(unfinished.join("state.json"), serde_json::to_string_pretty(state)?)?;
        if path.exists() {
            fs::remove_dir_all(&path)?;
        }
        Ok(fs::rename(&unfinished, &path)?)
    };
    write().with_context(|| format!("cannot write the checkpoint {}", path.display()))?;
    remove(out, Some(step))?;
    Ok(path)
}

/// Removes the checkpoints under `out` but that of the step `keep`, and those that a kill has left unfinished.
pub fn remove(out: &Path, keep: Option<u64>) -> Result<()> {
    for old in list(out)?.into_iter().filter(|old| !old.finished || Some(old.step) != keep) {
        let path = old.path;
        fs::remove_dir_all(&path).with_context(|| format!("cannot remove the old checkpoint {}", path.display()))?;
    }
    Ok(())
}

/// Reads weights and optimizer, and returns the state.
pub fn load<S: DeserializeOwned>(path: &Path, vs: &nn::VarStore, optimizer: &AdamW) -> Result<S> {
    load_weights(vs, path.join("model.safetensors"))?;
    load_tensors(optimizer.state(), path.join("optimizer.safetensors"))?;
    read_json(&path.join("state.json"))
}

pub fn read_json<T: DeserializeOwned>(path: &Path) -> Result<T> {
    let text = fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    serde_json::from_str(&text).with_context(|| {
        format!(
            "{} is damaged: remove its checkpoint, and training starts from the one before, or anew",
            path.display()
        )
    })
}

fn write_tensors(path: &Path, tensors: BTreeMap<String, Tensor>) -> Result<()> {
    let tensors: Vec<(String, Tensor)> =
        tensors.into_iter().map(|(name, tensor)| (name, tensor.detach().to_device(Device::Cpu).contiguous())).collect();
    Ok(Tensor::write_safetensors(&tensors, path)?)
}
