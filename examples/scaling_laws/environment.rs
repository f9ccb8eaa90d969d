//! What the figures were taken on, and with which source.

use std::{env, fs, process::Command};

use anyhow::{Context, Result};
use tch::Device;

use crate::nvidia_smi;

/// The commit: `MOBA_COMMIT` where a bundle says it, else that of the git checkout in which the program runs. The latter is
/// the program's own only if cargo has built it there since (`cargo run` does): cargo would compile everything anew at each
/// commit that it had to write into the program.
pub fn commit() -> Result<String> {
    let told = env::var("MOBA_COMMIT").ok().filter(|commit| !commit.is_empty());
    let found = || output("git", &["describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]);
    let commit = told.or_else(found).context(
        "no commit to write into the records: run in the git checkout, or set MOBA_COMMIT to what was built",
    )?;
    if commit.ends_with("-dirty") {
        eprintln!("warning: commit {commit}: runs of other uncommitted changes would look like runs of these");
    }
    Ok(commit)
}

pub fn device(device: Device) -> String {
    match device {
        Device::Cuda(_) => nvidia_smi::query("name").unwrap_or_else(|| "unknown GPU".to_owned()),
        _ => {
            let info = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
            let name = info.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
            format!("{}, {} threads", name.map_or("unknown CPU", |(_, name)| name), tch::get_num_threads())
        }
    }
}

fn output(program: &str, arguments: &[&str]) -> Option<String> {
    let output = Command::new(program).args(arguments).output().ok().filter(|output| output.status.success())?;
    Some(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}
