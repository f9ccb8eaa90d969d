//! The file of a run: JSON lines, first a header that says what was trained on what, then a record for each measurement.
//!
//! A run in progress is `NAME.jsonl.partial`, renamed when it is done: what ends in `.jsonl` is whole.

use std::{
    fs,
    io::{BufRead, BufReader, Write},
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};

use crate::{corpus::Identity, replace::replace, sweep::Run};

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Header {
    pub run: Run,
    /// Without embeddings.
    pub parameters: u64,
    pub steps: u64,
    pub text: Identity,
    pub commit: String,
    pub device: String,
}

/// One measurement. Losses are nats per token.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// Updates done.
    pub step: u64,
    /// Tokens trained on.
    pub tokens: u64,
    /// 6 N D, in PFLOP/s-days.
    pub compute_6nd: f64,
    /// With attention's real operations, in PFLOP/s-days.
    pub compute_real: f64,
    /// Mean of the training batches since the record before.
    pub loss: f64,
    pub held_out: f64,
    /// Held-out loss in equal parts of the sequence, first to last.
    pub positions: Vec<f64>,
    /// The last of `positions`.
    pub trailing: f64,
    /// While training, since the record before.
    pub tokens_per_second: f64,
    /// Spent on training so far.
    pub seconds: f64,
}

/// A whole run.
#[derive(Clone, Debug, PartialEq)]
pub struct Finished {
    pub header: Header,
    pub records: Vec<Record>,
}

impl Finished {
    pub fn last(&self) -> &Record {
        &self.records[self.records.len() - 1]
    }
}

pub fn path(folder: &Path, run: &Run) -> PathBuf {
    folder.join(format!("{}.jsonl", run.name()))
}

/// The finished run of `path`; `None` if there is none.
pub fn read(path: &Path) -> Result<Option<Finished>> {
    if !path.exists() {
        return Ok(None);
    }
    let (header, records) = lines(path)?;
    ensure!(!records.is_empty(), "{} holds no record: remove it", path.display());
    Ok(Some(Finished { header, records }))
}

/// What a run in progress has written. A kill may have left half a line at the end.
pub fn begun(path: &Path) -> Result<(Header, Vec<Record>)> {
    let partial = partial(path);
    let text = fs::read_to_string(&partial).with_context(|| format!("cannot read {}", partial.display()))?;
    let mut lines = text.lines();
    let header = lines.next().and_then(|line| serde_json::from_str(line).ok());
    let header = header.with_context(|| format!("{} is damaged: remove it and its checkpoint", partial.display()))?;
    Ok((header, lines.map_while(|line| serde_json::from_str(line).ok()).collect()))
}

/// All finished runs of a folder in the order of their names, which must belong together.
pub fn read_all(folder: &Path) -> Result<Vec<Finished>> {
    let entries = fs::read_dir(folder).with_context(|| format!("cannot read the runs in {}", folder.display()))?;
    let mut paths: Vec<PathBuf> = entries.map(|entry| Ok(entry?.path())).collect::<Result<_>>()?;
    paths.retain(|path| path.extension().is_some_and(|extension| extension == "jsonl"));
    paths.sort();
    let runs: Vec<_> = paths.iter().map(|path| read(path)).collect::<Result<_>>()?;
    let runs: Vec<_> = runs.into_iter().flatten().collect();
    for (index, run) in runs.iter().enumerate() {
        runs[..index].iter().try_for_each(|other| comparable(&other.header, &run.header))?;
    }
    Ok(runs)
}

/// Refuses to mix runs on other text, with other tokens, of other source, or trained or measured in another way.
pub fn comparable(one: &Header, other: &Header) -> Result<()> {
    let (run, beside) = (&one.run, &other.run);
    let difference = one
        .text
        .difference(&other.text)
        .or_else(|| (one.commit != other.commit).then(|| format!("commit {} and {}", one.commit, other.commit)))
        .or_else(|| (run.recipe != beside.recipe).then(|| format!("{:?} and {:?}", run.recipe, beside.recipe)))
        .or_else(|| {
            let [here, there] = [run, beside].map(|run| run.held_out_tokens);
            (here != there).then(|| format!("held_out_tokens {here} and {there}"))
        })
        .or_else(|| {
            let other_blocks = run.seqlen == beside.seqlen && run.moba != beside.moba;
            other_blocks.then(|| format!("{:?} and {:?}", run.moba, beside.moba))
        });
    match difference {
        Some(difference) => bail!("{} and {} do not belong together: {difference}", one.run.name(), other.run.name()),
        None => Ok(()),
    }
}

fn lines(path: &Path) -> Result<(Header, Vec<Record>)> {
    let file = fs::File::open(path).with_context(|| format!("cannot read {}", path.display()))?;
    let mut lines = BufReader::new(file).lines();
    let damaged = |line: usize| format!("{} is damaged in line {line}: remove it", path.display());
    let header = lines.next().with_context(|| damaged(1))??;
    let header = serde_json::from_str(&header).with_context(|| damaged(1))?;
    let mut records = Vec::new();
    for (index, line) in lines.enumerate() {
        records.push(serde_json::from_str(&line?).with_context(|| damaged(index + 2))?);
    }
    Ok((header, records))
}

/// The records of a run in progress.
pub struct Writer {
    file: fs::File,
    partial: PathBuf,
    path: PathBuf,
}

impl Writer {
    /// Begins the file of a run, with the `records` that it has so far.
    pub fn begin(path: &Path, header: &Header, records: &[Record]) -> Result<Self> {
        let partial = partial(path);
        let mut text = line(header)?;
        for record in records {
            text += &line(record)?;
        }
        Ok(Self { file: replace(&partial, &text)?, partial, path: path.to_owned() })
    }

    pub fn push(&mut self, record: &Record) -> Result<()> {
        Ok(self.file.write_all(line(record)?.as_bytes())?)
    }

    /// The run is whole.
    pub fn finish(self) -> Result<()> {
        self.file.sync_all()?;
        Ok(fs::rename(&self.partial, &self.path)?)
    }

    /// The run is given up.
    pub fn discard(self) -> Result<()> {
        Ok(fs::remove_file(&self.partial)?)
    }
}

fn line(value: &impl Serialize) -> Result<String> {
    Ok(serde_json::to_string(value)? + "\n")
}

fn partial(path: &Path) -> PathBuf {
    path.with_extension("jsonl.partial")
}

/// Of a header made up for tests.
#[cfg(test)]
pub fn example(seqlen: i64, policy: &str, hidden: i64, seed: u64) -> Header {
    let text = include_str!("miniature.toml");
    let mut run = crate::sweep::Sweep::parse(text).unwrap().runs().unwrap().remove(0);
    (run.seqlen, run.policy, run.seed) = (seqlen, policy.parse().unwrap(), seed);
    (run.size.hidden, run.size.name) = (hidden, format!("h{hidden}"));
    let text = Identity { corpus: "c".into(), tokenizer: "t".into(), vocab_size: 256, bytes_per_token: 1.0 };
    let parameters = crate::compute::parameters(&run.llama(256));
    Header { run, parameters, steps: 1, text, commit: "abc".into(), device: "cpu".into() }
}

#[cfg(test)]
mod tests {
    use tch_moba::MobaConfig;

    use super::*;

    fn record(step: u64) -> Record {
        Record {
            step,
            tokens: 10 * step,
            compute_6nd: 1e-9,
            compute_real: 2e-9,
            loss: 0.1 + 0.2,
            held_out: 3.5,
            positions: vec![4.0, 3.0],
            trailing: 3.0,
            tokens_per_second: 1e5,
            seconds: 1.0,
        }
    }

    #[test]
    fn a_run_appears_whole() {
        let folder = std::env::temp_dir().join(format!("scaling-records-{}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        let header = example(512, "moba", 32, 0);
        let path = path(&folder, &header.run);
        let mut writer = Writer::begin(&path, &header, &[record(1)]).unwrap();
        writer.push(&record(2)).unwrap();
        assert_eq!(read(&path).unwrap(), None);
        assert_eq!(read_all(&folder).unwrap(), []);
        writer.finish().unwrap();
        let finished = read(&path).unwrap().unwrap();
        assert_eq!(finished, Finished { header, records: vec![record(1), record(2)] });
        assert_eq!(read_all(&folder).unwrap(), [finished]);
        fs::remove_dir_all(folder).unwrap();
    }

    #[test]
    fn runs_that_do_not_belong_together_are_refused() {
        let (one, other) = (example(512, "moba", 32, 0), example(512, "full", 32, 0));
        assert!(comparable(&one, &other).is_ok());
        let refusal = |change: fn(&mut Header)| {
            let mut other = other.clone();
            change(&mut other);
            comparable(&one, &other).unwrap_err().to_string()
        };
        let names = "512-h32-moba-0 and 512-h32-full-0 do not belong together: ";
        assert_eq!(refusal(|header| header.text.corpus = "d".into()), format!("{names}corpus c and d"));
        assert_eq!(refusal(|header| header.text.tokenizer = "u".into()), format!("{names}tokenizer t and u"));
        assert_eq!(refusal(|header| header.commit = "abd".into()), format!("{names}commit abc and abd"));
        assert_eq!(refusal(|header| header.run.held_out_tokens = 1), format!("{names}held_out_tokens 16384 and 1"));
        assert!(refusal(|header| header.run.recipe.lr = 1.0).contains("lr: 1.0"));
        assert!(refusal(|header| header.run.moba = MobaConfig::new(32, 7).unwrap()).contains("top_k: 7"));
    }
}
