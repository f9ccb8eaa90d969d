//! What `nvidia-smi` says of the GPU in use.

use std::{env, process::Command};

/// What `nvidia-smi --query-gpu=QUERY` says of the first GPU that this process sees; `None` where it does not answer.
pub fn query(query: &str) -> Option<String> {
    // It takes numbers and UUIDs, as the variable does, which it does not heed itself.
    let visible = env::var("CUDA_VISIBLE_DEVICES").unwrap_or_default();
    let first = visible.split(',').next().map(str::trim).filter(|first| !first.is_empty()).unwrap_or("0");
    let arguments = [&format!("--query-gpu={query}"), "--format=csv,noheader", &format!("--id={first}")];
    let output = Command::new("nvidia-smi").args(arguments).output().ok().filter(|output| output.status.success())?;
    Some(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}
