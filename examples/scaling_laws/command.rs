//! The command line.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use clap::{Parser, Subcommand, builder::RangedI64ValueParser};
use tch_moba::HybridPolicy;

use crate::{
    charts,
    corpus::{self, Corpus},
    device::DeviceArg,
    drive::{Limits, Sweeper},
    environment, fit, plan,
    records::{self, Finished},
    repeats,
    speed::{self, Options},
    sweep::{Run, Sweep},
    tokenizer::VOCAB_SIZES,
};

/// Loss against compute for MoBA and full attention, with a power law fitted to each.
#[derive(Parser, Debug)]
pub struct Command {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand, Debug)]
enum Verb {
    /// Turn text into tokens, once for all runs
    Corpus {
        /// Text files, or directories of them; default: the C++ headers of libtorch
        #[arg(long, num_args = 1..)]
        data: Vec<PathBuf>,
        /// Size of the vocabulary; 256 takes bytes as they are
        #[arg(long, default_value_t = 4096, value_parser = vocab_size())]
        vocab: i64,
        #[arg(long)]
        out: PathBuf,
    },
    /// Shuffle a corpus in pieces, as a control: then little comes again from far away
    Shuffle {
        corpus: PathBuf,
        /// Tokens of a piece
        #[arg(long, default_value_t = 1024, value_parser = clap::value_parser!(u64).range(1..))]
        piece: u64,
        #[arg(long)]
        out: PathBuf,
    },
    /// Count what comes again in the held-out text, near and far
    Repeats {
        corpus: PathBuf,
        #[arg(long, default_value_t = 8192, value_parser = clap::value_parser!(u64).range(1..))]
        seqlen: u64,
        /// The longest distance that counts as near
        #[arg(long, default_value_t = 1024)]
        near: u64,
    },
    /// Say what a sweep costs
    Plan {
        sweep: PathBuf,
        #[arg(long, default_value_t = 4096, value_parser = vocab_size())]
        vocab: i64,
        /// What the device does, for an estimate of the time
        #[arg(long)]
        tflops: Option<f64>,
    },
    /// Do what is left of a sweep
    Run {
        sweep: PathBuf,
        #[arg(long)]
        corpus: PathBuf,
        /// Folder of the records, one file a run
        #[arg(long)]
        out: PathBuf,
        #[arg(long, value_enum, default_value = "cpu")]
        device: DeviceArg,
        /// Only runs whose name contains one of these
        #[arg(long, num_args = 1..)]
        only: Vec<String>,
        /// Stop after so long, with a checkpoint; seen only when a run measures its loss, up to 20 times a run
        #[arg(long)]
        minutes: Option<f64>,
        /// With --minutes: leave a run that would not be done in time, instead of stopping in it
        #[arg(long, requires = "minutes")]
        whole_runs: bool,
        /// Least time between checkpoints, which are written only when a run measures; none with --whole-runs
        #[arg(long, default_value_t = 5.0)]
        checkpoint_minutes: f64,
    },
    /// Measure how fast a size trains
    Speed {
        sweep: PathBuf,
        #[arg(long)]
        size: String,
        /// Default: the first context of the sweep
        #[arg(long)]
        seqlen: Option<i64>,
        #[arg(long, num_args = 1.., default_values = ["full", "moba"])]
        policies: Vec<HybridPolicy>,
        /// Updates in a measurement
        #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u64).range(1..))]
        updates: u64,
        #[arg(long, default_value_t = 4096, value_parser = vocab_size())]
        vocab: i64,
        #[arg(long, value_enum, default_value = "cpu")]
        device: DeviceArg,
    },
    /// Fit the laws, print the tables and draw the charts
    Fit {
        /// Folder of the records
        runs: PathBuf,
        /// Where charts and tables go
        #[arg(long)]
        out: PathBuf,
    },
}

impl Command {
    pub fn run(self) -> Result<()> {
        match self.verb {
            Verb::Corpus { data, vocab, out } => corpus::build(&data, vocab as usize, &out),
            Verb::Shuffle { corpus, piece, out } => corpus::shuffle(&corpus, piece as usize, &out),
            Verb::Repeats { corpus, seqlen, near } => {
                print!("{}", repeats::table(&Corpus::read(&corpus)?.held_out, seqlen as usize, near as usize));
                Ok(())
            }
            Verb::Plan { sweep, vocab, tflops } => {
                let runs = Sweep::read(&sweep)?.runs()?;
                print!("{}", plan::table(&runs, vocab, tflops.map(|rate| rate * 1e12)));
                Ok(())
            }
            Verb::Run { sweep, corpus, out, device, only, minutes, whole_runs, checkpoint_minutes } => {
                let all = Sweep::read(&sweep)?.runs()?;
                let runs = chosen(all.clone(), &only)?;
                let limits = Limits {
                    time: minutes.map(duration).transpose()?,
                    whole_runs,
                    checkpoint: duration(checkpoint_minutes)?,
                };
                let (corpus, commit) = (Corpus::read(&corpus)?, environment::commit()?);
                let device = device.resolve()?;
                let left = Sweeper { out: &out, corpus: &corpus, device, commit, limits }.sweep(&all, &runs)?;
                match left {
                    0 => println!("all {} runs are done; the records are in {}", runs.len(), out.display()),
                    left => println!("{left} of {} runs are left; the same command goes on", runs.len()),
                }
                Ok(())
            }
            Verb::Speed { sweep, size, seqlen, policies, updates, vocab, device } => {
                let device = device.resolve()?;
                let options = Options { size: &size, seqlen, policies: &policies, updates, vocab_size: vocab, device };
                speed::measure(&Sweep::read(&sweep)?, &options)
            }
            Verb::Fit { runs, out } => fit_and_draw(&runs, &out),
        }
    }
}

fn vocab_size() -> RangedI64ValueParser<i64> {
    RangedI64ValueParser::new().range(VOCAB_SIZES)
}

fn duration(minutes: f64) -> Result<Duration> {
    Duration::try_from_secs_f64(60.0 * minutes).with_context(|| format!("wanted a number of minutes, got {minutes}"))
}

fn chosen(mut runs: Vec<Run>, only: &[String]) -> Result<Vec<Run>> {
    let names = runs.iter().map(Run::name).collect::<Vec<_>>().join(", ");
    runs.retain(|run| only.is_empty() || only.iter().any(|part| run.name().contains(part)));
    ensure!(!runs.is_empty(), "--only {}: no run of the sweep is called so; known: {names}", only.join(" "));
    Ok(runs)
}

/// The commit, which the runs share, and all devices that they were trained on.
fn origin(runs: &[Finished]) -> String {
    let devices: BTreeSet<&str> = runs.iter().map(|run| run.header.device.as_str()).collect();
    format!("Commit {}, {}.", runs[0].header.commit, Vec::from_iter(devices).join("; "))
}

fn fit_and_draw(folder: &Path, out: &Path) -> Result<()> {
    let runs = records::read_all(folder)?;
    ensure!(!runs.is_empty(), "{} holds no finished run: scaling_laws run makes them", folder.display());
    fs::create_dir_all(out).with_context(|| format!("cannot create {}", out.display()))?;
    let fitted = fit::fit(&runs);
    let laws = fit::table(&fitted);
    let comparison = fit::comparison(&runs);
    let tables = format!(
        "{}\n\nloss = a C^-b, C in PFLOP/s-days, losses in nats per token\n\n{laws}\n{comparison}",
        origin(&runs)
    );
    let written = |name: &str, text: String| -> Result<PathBuf> {
        let path = out.join(name);
        fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))?;
        Ok(path)
    };
    let mut files =
        vec![written("fit.json", serde_json::to_string_pretty(&fitted)?)?, written("tables.md", tables.clone())?];
    for chart in charts::draw(&runs, out)? {
        files.extend(["svg", "png"].map(|extension| chart.with_extension(extension)));
    }
    println!("{tables}");
    for file in files {
        println!("{}", file.display());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_sound() {
        Command::command().debug_assert();
    }

    #[test]
    fn tokens_are_two_bytes() {
        for verb in ["corpus --out out", "plan sweep", "speed sweep --size 5M"] {
            let parse = |vocab: &str| {
                Command::try_parse_from(format!("scaling_laws {verb} --vocab {vocab}").split(' ')).map(drop)
            };
            for vocab in ["0", "255", "32768", "40000"] {
                let error = parse(vocab).unwrap_err().to_string();
                assert!(error.contains("--vocab") && error.contains("not in 256..=32767"), "{error}");
            }
            parse("256").unwrap();
            parse("32767").unwrap();
        }
    }

    #[test]
    fn every_device_is_named() {
        let run = |device: &str| {
            let header = records::Header { device: device.into(), ..records::example(512, "moba", 32, 0) };
            Finished { header, records: Vec::new() }
        };
        assert_eq!(origin(&[run("an H100")]), "Commit abc, an H100.");
        assert_eq!(origin(&["an H200", "an H100", "an H200"].map(run)), "Commit abc, an H100; an H200.");
    }
}
