//! Times and checks MoBA attention beside libtorch's own dense attention: the one harness behind every figure.
//!
//! ```text
//! cargo run --release --example bench_attention -- --device cpu --seqlen 16384 --heads 4 --head-dim 64 --moba 512x3
//! ```
//!
//! For each sequence length all contenders work on the same tensors and take turns inside one run, so that a change of
//! clocks or a busy machine meets all of them. `forward` needs no gradient; `forward_backward` adds the gradients of q, k
//! and v. Sampled rows of every answer are checked against a float64 loop before anything is timed.

mod check;
mod contender;
mod data;
mod machine;
mod memory;
#[path = "../common/nvidia_smi.rs"]
mod nvidia_smi;
mod rates;
mod report;
mod timer;

use std::{path::PathBuf, process::ExitCode};

use anyhow::{Result, ensure};
use clap::{Parser, ValueEnum};
use contender::{Contender, Impl, Pass};
use data::{Data, Inputs};
use indicatif::{ProgressBar, ProgressStyle};
use report::{Report, Row};
use tch::{Device, Kind};
use tch_moba::MobaConfig;
use timer::Timer;

/// MoBA attention against libtorch's dense attention: time, peak memory and a check of the answers.
#[derive(Parser, Clone, Debug)]
struct Arguments {
    /// Where to run.
    #[arg(long, value_enum, default_value = "cpu")]
    device: DeviceName,
    /// Element type of q, k and v.
    #[arg(long, value_enum, default_value = "f32")]
    dtype: Dtype,
    #[arg(long, default_value_t = 1, value_parser = at_least_one())]
    batch: i64,
    /// Query heads.
    #[arg(long, default_value_t = 4, value_parser = at_least_one())]
    heads: i64,
    /// Key and value heads; as many as query heads unless given.
    #[arg(long, value_parser = at_least_one())]
    heads_k: Option<i64>,
    #[arg(long, default_value_t = 64, value_parser = at_least_one())]
    head_dim: i64,
    /// Tokens, one measurement for each length.
    #[arg(long, value_delimiter = ',', default_value = "8192,16384", value_parser = at_least_one())]
    seqlen: Vec<i64>,
    /// Block size and top-k of MoBA, one contender for each pair.
    #[arg(long, value_delimiter = ',', default_value = "512x3")]
    moba: Vec<MobaConfig>,
    /// uniform: Gaussian noise; clustered: plus topics that change every 1024 tokens; sink: the first block attracts
    /// every query.
    #[arg(long, value_enum, value_delimiter = ',', default_value = "uniform")]
    data: Vec<Data>,
    /// Timed runs of each contender.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    repeat: u32,
    /// Runs of each contender before the timed ones.
    #[arg(long, default_value_t = 1)]
    warmup: u32,
    /// Contenders, by default all that the device has, less moba_deterministic.
    #[arg(long = "impl", value_enum, value_delimiter = ',')]
    impls: Vec<Impl>,
    /// What to time.
    #[arg(long, value_enum, value_delimiter = ',', default_value = "forward,forward_backward")]
    pass: Vec<Pass>,
    /// Writes one row per measurement.
    #[arg(long, value_name = "PATH")]
    csv: Option<PathBuf>,
    /// Ends with MoBA's ratio to the fastest dense contender.
    #[arg(long)]
    summary: bool,
    /// Ends with MoBA's rate of useful operations beside that of the fastest dense contender, and its memory beyond inputs
    /// and outputs.
    #[arg(long)]
    rates: bool,
    /// Leaves peak memory out; each of its measurements costs one more run.
    #[arg(long)]
    skip_memory: bool,
    /// Only measures the peak memory of the single contender and pass that the other arguments name: the CPU's memory is
    /// measured in a fresh process, where no freed memory is lying around to be used again.
    #[arg(long, hide = true)]
    peak_only: bool,
}

#[derive(ValueEnum, Clone, Copy, Debug, PartialEq)]
enum DeviceName {
    Cpu,
    Cuda,
}

#[derive(ValueEnum, Clone, Copy, Debug)]
enum Dtype {
    F32,
    F64,
    Bf16,
    F16,
}

fn at_least_one() -> clap::builder::RangedI64ValueParser<i64> {
    clap::value_parser!(i64).range(1..)
}

/// The name that the command line and the CSV file use.
fn name(value: &impl ValueEnum) -> String {
    value.to_possible_value().map(|name| name.get_name().to_owned()).unwrap_or_default()
}

impl Arguments {
    fn device(&self) -> Device {
        match self.device {
            DeviceName::Cpu => Device::Cpu,
            DeviceName::Cuda => Device::Cuda(0),
        }
    }

    fn kind(&self) -> Kind {
        match self.dtype {
            Dtype::F32 => Kind::Float,
            Dtype::F64 => Kind::Double,
            Dtype::Bf16 => Kind::BFloat16,
            Dtype::F16 => Kind::Half,
        }
    }

    fn heads_k(&self) -> i64 {
        self.heads_k.unwrap_or(self.heads)
    }

    fn contenders(&self, data: Data) -> Vec<Contender> {
        let all = match self.device {
            DeviceName::Cpu => vec![Impl::Moba, Impl::SdpaCpu],
            DeviceName::Cuda => vec![Impl::Moba, Impl::SdpaFlash, Impl::SdpaCudnn],
        };
        let impls = if self.impls.is_empty() { all } else { self.impls.clone() };
        impls.into_iter().flat_map(|kind| Contender::all(kind, &self.moba, data)).collect()
    }

    fn inputs(&self, seqlen: i64, data: Data) -> Inputs {
        let sink = self.moba.iter().map(MobaConfig::block_size).max().unwrap_or(1);
        let shape = data::Shape { heads: self.heads, heads_k: self.heads_k(), seqlen, sink };
        data.generate(self.batch, &shape, self.head_dim, (self.kind(), self.device()))
    }

    fn row(&self, seqlen: i64, contender: Contender, pass: Pass) -> Row {
        Row {
            device: name(&self.device),
            dtype: name(&self.dtype),
            batch: self.batch,
            heads: self.heads,
            heads_k: self.heads_k(),
            head_dim: self.head_dim,
            seqlen,
            contender,
            pass,
            times_ms: Vec::new(),
            peak_mib: None,
        }
    }
}

fn main() -> ExitCode {
    match run(&Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments) -> Result<()> {
    ensure!(
        arguments.heads % arguments.heads_k() == 0,
        "--heads must be a multiple of --heads-k, got {} and {}",
        arguments.heads,
        arguments.heads_k()
    );
    if arguments.device().is_cuda() && !arguments.skip_memory {
        memory::keep_pages()?;
    }
    let timer = Timer::new(arguments.device())?;
    if arguments.peak_only {
        return memory::print_own_peak(arguments);
    }
    for line in machine::describe(&timer) {
        println!("{line}");
    }
    let mut report = Report::new(arguments.csv.as_deref())?;
    for &seqlen in &arguments.seqlen {
        measure(arguments, seqlen, &timer, &mut report)?;
    }
    println!("clocks after the run: {}", machine::clocks(&timer));
    if arguments.summary {
        report.print_summary();
    }
    if arguments.rates {
        report.print_rates();
    }
    Ok(())
}

/// All contenders on the tensors of one sequence length, the same ones for all on the same data.
fn measure(arguments: &Arguments, seqlen: i64, timer: &Timer, report: &mut Report) -> Result<()> {
    let inputs: Vec<_> = arguments.data.iter().map(|&data| (data, arguments.inputs(seqlen, data))).collect();
    println!("\nseqlen {seqlen}, data {}", arguments.data.iter().map(name).collect::<Vec<_>>().join(", "));
    let progress =
        ProgressBar::new(0).with_style(ProgressStyle::with_template("{elapsed} {bar:30} {pos}/{len} {msg}")?);
    let mut rows = Vec::new();
    for (data, inputs) in &inputs {
        for contender in arguments.contenders(*data) {
            progress.set_message(format!("checking {contender}"));
            // A dense kernel that does not take these tensors (dtype, head_dim) says so; MoBA has to take all of them.
            match check::check(&contender, inputs) {
                Ok(errors) => println!("{contender}: sampled rows agree with float64, relative error {errors}"),
                Err(error) if contender.config.is_none() && !error.is::<check::Disagreement>() => {
                    println!("{contender}: not run, {}", error.to_string().lines().next().unwrap_or_default());
                    continue;
                }
                Err(error) => return Err(error),
            }
            for &pass in arguments.pass.iter().filter(|&&pass| pass != Pass::Route || contender.config.is_some()) {
                rows.push((arguments.row(seqlen, contender, pass), inputs));
            }
        }
    }
    progress.set_length((rows.len() as u64) * u64::from(arguments.warmup + arguments.repeat));
    for round in 0..arguments.warmup + arguments.repeat {
        for (row, inputs) in &mut rows {
            progress.set_message(format!("{} {}", row.contender, name(&row.pass)));
            let ms = timer.ms(|| row.contender.run(row.pass, inputs))?;
            if round >= arguments.warmup {
                row.times_ms.push(ms);
            }
            progress.inc(1);
        }
    }
    for (row, inputs) in &mut rows {
        if !arguments.skip_memory {
            progress.set_message(format!("{} {} memory", row.contender, name(&row.pass)));
            row.peak_mib = Some(memory::peak_mib(arguments, seqlen, &row.contender, row.pass, inputs, timer)?);
        }
    }
    progress.finish_and_clear();
    report.add(rows.into_iter().map(|(row, _)| row))
}

#[test]
fn the_command_line_is_well_formed() {
    use clap::CommandFactory;
    Arguments::command().debug_assert();
}
