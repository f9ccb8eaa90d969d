//! Peak memory of one run beyond its inputs; outputs and gradients count.

use std::{env, fs, os::unix::process::CommandExt, process::Command};

use anyhow::{Context, Result, bail};
use tch::{Device, Kind, Tensor};

use crate::{
    Arguments,
    contender::{Contender, Pass},
    data::Inputs,
    name,
    timer::Timer,
};

const MIB: f64 = 1024.0 * 1024.0;

pub fn peak_mib(
    arguments: &Arguments,
    seqlen: i64,
    contender: &Contender,
    pass: Pass,
    inputs: &Inputs,
    timer: &Timer,
) -> Result<f64> {
    match timer {
        Timer::Wall => in_fresh_process(arguments, seqlen, contender, pass),
        Timer::Events(stream) => {
            // What libtorch's allocator had to ask of the driver, in pages of 2 or 20 MiB.
            let used = || -> Result<usize> {
                let (free, total) = stream.context().mem_get_info()?;
                Ok(total - free)
            };
            empty_cache(arguments.device());
            stream.synchronize()?;
            let before = used()?;
            let outputs = contender.run(pass, inputs)?;
            stream.synchronize()?;
            let peak = used()?.saturating_sub(before);
            drop(outputs);
            Ok(peak as f64 / MIB)
        }
    }
}

/// Starts the program anew with an allocator that keeps pages instead of blocks: emptying its cache then leaves no free
/// parts of blocks behind, which a run would take unseen. Whoever has chosen settings keeps them.
pub fn keep_pages() -> Result<()> {
    const SETTINGS: &str = "PYTORCH_ALLOC_CONF";
    if env::var_os(SETTINGS).is_some() || env::var_os("PYTORCH_CUDA_ALLOC_CONF").is_some() {
        return Ok(());
    }
    let mut again = Command::new(env::current_exe()?);
    Err(again.args(env::args_os().skip(1)).env(SETTINGS, "expandable_segments:True").exec())
        .context("cannot start this program again")
}

/// tch cannot empty libtorch's cache of device memory, but libtorch does so itself before it gives up on a request.
fn empty_cache(device: Device) {
    const MORE_THAN_ANY_DEVICE: i64 = 1 << 44;
    let refused = Tensor::f_empty([MORE_THAN_ANY_DEVICE], (Kind::Uint8, device));
    debug_assert!(refused.is_err());
}

fn in_fresh_process(arguments: &Arguments, seqlen: i64, contender: &Contender, pass: Pass) -> Result<f64> {
    let mut command = Command::new(env::current_exe()?);
    let mut option = |flag: &str, value: String| {
        command.args([flag, &value]);
    };
    option("--dtype", name(&arguments.dtype));
    option("--batch", arguments.batch.to_string());
    option("--heads", arguments.heads.to_string());
    option("--heads-k", arguments.heads_k().to_string());
    option("--head-dim", arguments.head_dim.to_string());
    option("--seqlen", seqlen.to_string());
    option("--data", name(&contender.data));
    option("--moba", contender.config.unwrap_or_default().to_string());
    option("--impl", name(&contender.kind));
    option("--pass", name(&pass));
    // glibc then returns every large block to the system when it is freed, so the peak holds no leftovers.
    command.arg("--peak-only").env("MALLOC_MMAP_THRESHOLD_", "65536");
    let output = command.output().context("cannot start the process that measures memory")?;
    if !output.status.success() {
        bail!("measuring the memory of {contender}: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(String::from_utf8(output.stdout)?.trim().parse()?)
}

/// The other end of [`in_fresh_process`].
pub fn print_own_peak(arguments: &Arguments) -> Result<()> {
    let contenders: Vec<_> = arguments.data.iter().flat_map(|&data| arguments.contenders(data)).collect();
    let ([contender], [pass], [seqlen]) = (&contenders[..], &arguments.pass[..], &arguments.seqlen[..]) else {
        bail!("--peak-only takes one contender, one pass and one length")
    };
    // Code and thread stacks come into memory with the first run, so that one is a small one.
    drop(contender.run(*pass, &arguments.inputs(64, contender.data))?);
    let inputs = arguments.inputs(*seqlen, contender.data);
    fs::write("/proc/self/clear_refs", "5").context("cannot reset the peak of this process")?;
    let before = status_kib("VmRSS")?;
    let outputs = contender.run(*pass, &inputs)?;
    let peak = status_kib("VmHWM")?.saturating_sub(before);
    drop(outputs);
    println!("{}", peak as f64 * 1024.0 / MIB);
    Ok(())
}

fn status_kib(field: &str) -> Result<u64> {
    let status = fs::read_to_string("/proc/self/status").context("cannot read the memory of this process")?;
    let line = status.lines().find(|line| line.starts_with(field));
    let value = line.and_then(|line| line.split_whitespace().nth(1));
    Ok(value.with_context(|| format!("/proc/self/status has no {field}"))?.parse()?)
}
