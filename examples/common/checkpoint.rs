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

use crate::optimizer::AdamW;

/// Writes `step-NNNNNN` under `out`, then removes older checkpoints. `state` is what else a run needs to go on.
pub fn save(
    out: &Path,
    step: u64,
    state: &impl Serialize,
    config: &LlamaConfig,
    vs: &nn::VarStore,
    optimizer: &AdamW,
) -> Result<PathBuf> {
    let path = out.join(format!("step-{step:06}"));
    let unfinished = path.with_extension("unfinished");
    let older = list(out)?;
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
    for (_, old) in older.into_iter().filter(|(other, _)| *other != step) {
        fs::remove_dir_all(&old).with_context(|| format!("cannot remove the old checkpoint {}", old.display()))?;
    }
    Ok(path)
}

/// The newest checkpoint under `out`.
pub fn newest(out: &Path) -> Result<Option<PathBuf>> {
    Ok(list(out)?.pop_last().map(|(_, path)| path))
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

/// All finished checkpoints under `out` by step.
fn list(out: &Path) -> Result<BTreeMap<u64, PathBuf>> {
    let mut found = BTreeMap::new();
    let Ok(entries) = fs::read_dir(out) else { return Ok(found) };
    for entry in entries {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if let Some(step) = name.strip_prefix("step-").and_then(|step| step.parse().ok()) {
            found.insert(step, path);
        }
    }
    Ok(found)
}

fn write_tensors(path: &Path, tensors: BTreeMap<String, Tensor>) -> Result<()> {
    let tensors: Vec<(String, Tensor)> =
        tensors.into_iter().map(|(name, tensor)| (name, tensor.detach().to_device(Device::Cpu).contiguous())).collect();
    Ok(Tensor::write_safetensors(&tensors, path)?)
}
