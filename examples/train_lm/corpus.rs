//! Text as bytes: documents, the held-out split, and batches that are a pure function of the step.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, bail, ensure};
use rand::{SeedableRng, rngs::StdRng, seq::SliceRandom};
use tch::{Device, Kind, Tensor};

/// Files of one directory are joined up to this size: enough for long context, small enough for an even split.
const DOCUMENT_BYTES: usize = 256 << 10;
/// One document in so many is held out.
const HELD_OUT: u64 = 32;
/// Ends a document; text holds no NUL bytes.
const SEPARATOR: u8 = 0;

pub struct Corpus {
    pub train: Vec<u8>,
    pub held_out: Vec<u8>,
    pub documents: usize,
    /// Of the text, so that a run is not resumed on another.
    pub hash: u64,
}

impl Corpus {
    /// Reads `data`, or the C++ headers of libtorch if it is empty.
    pub fn load(data: &[PathBuf]) -> Result<Self> {
        let files = if data.is_empty() { libtorch_headers()? } else { given_files(data)? };
        let documents = documents(files)?;
        let (mut train, mut held_out) = (Vec::new(), Vec::new());
        for text in documents.values() {
            let part = if hash(text).is_multiple_of(HELD_OUT) { &mut held_out } else { &mut train };
            part.extend_from_slice(text);
            part.push(SEPARATOR);
        }
        // A few documents may all fall on one side: then the end of the text is held out.
        if held_out.is_empty() || train.is_empty() {
            train.append(&mut held_out);
            held_out = train.split_off(train.len() - train.len() / 20);
        }
        ensure!(!train.is_empty(), "the corpus is empty: name files with text after --data");
        let hash = hash(&train) ^ hash(&held_out).rotate_left(1);
        Ok(Self { train, held_out, documents: documents.len(), hash })
    }
}

/// Windows of `seqlen + 1` bytes over a text, each sharing one byte with the next: nothing is padded or left out.
pub struct Windows<'a> {
    text: &'a [u8],
    seqlen: usize,
    seed: u64,
    epoch: u64,
    order: Vec<usize>,
}

impl<'a> Windows<'a> {
    pub fn new(name: &str, text: &'a [u8], seqlen: i64, seed: u64) -> Result<Self> {
        let seqlen = seqlen as usize;
        ensure!(
            text.len() > seqlen,
            "the corpus is too small: its {name} part has {} bytes, a sequence takes {}; \
             give more text with --data, or a smaller --seqlen",
            text.len(),
            seqlen + 1
        );
        let mut windows = Self { text, seqlen, seed, epoch: 0, order: Vec::new() };
        windows.shuffle(0);
        Ok(windows)
    }

    /// The training batch of `step`, int64 `[batch, seqlen + 1]`. Every epoch has its own order.
    pub fn batch(&mut self, step: u64, batch: i64, device: Device) -> Tensor {
        let windows = self.order.len() as u64;
        let picked: Vec<usize> = (step * batch as u64..(step + 1) * batch as u64)
            .map(|index| {
                if index / windows != self.epoch {
                    self.shuffle(index / windows);
                }
                self.order[(index % windows) as usize]
            })
            .collect();
        self.gather(&picked, device)
    }

    /// At most `count` windows, spread evenly over the text, in batches.
    pub fn spread(&self, count: usize, batch: i64, device: Device) -> Vec<Tensor> {
        let windows = self.order.len();
        let count = count.min(windows);
        let picked: Vec<usize> = (0..count).map(|i| i * windows / count).collect();
        picked.chunks(batch as usize).map(|picked| self.gather(picked, device)).collect()
    }

    fn shuffle(&mut self, epoch: u64) {
        self.epoch = epoch;
        self.order = (0..(self.text.len() - 1) / self.seqlen).collect();
        self.order.shuffle(&mut StdRng::seed_from_u64(self.seed ^ epoch.rotate_left(32)));
    }

    fn gather(&self, picked: &[usize], device: Device) -> Tensor {
        let rows = picked.iter().flat_map(|&window| &self.text[window * self.seqlen..][..=self.seqlen]);
        let bytes: Vec<u8> = rows.copied().collect();
        let bytes = Tensor::from_slice(&bytes).view([picked.len() as i64, self.seqlen as i64 + 1]);
        bytes.to_device(device).to_kind(Kind::Int64)
    }
}

/// A file to read, and its name in the text.
struct File {
    path: PathBuf,
    name: String,
    /// Named on the command line itself: then it must be text.
    named: bool,
}

fn libtorch_headers() -> Result<Vec<File>> {
    let root = std::env::var_os("LIBTORCH").map_or_else(|| PathBuf::from(".libtorch/torch"), PathBuf::from);
    let include = root.join("include");
    let mut files = Vec::new();
    for directory in ["ATen", "c10", "torch"] {
        let directory = include.join(directory);
        ensure!(
            directory.is_dir(),
            "no {}: the default corpus is libtorch's headers; run `make libtorch`, set LIBTORCH, or name text with --data",
            directory.display()
        );
        walk(&directory, &include, &mut files)?;
    }
    // ATen/ops is thousands of nearly equal, machine-written files.
    files.retain(|file| file.name.ends_with(".h") && !file.name.starts_with("ATen/ops/"));
    Ok(files)
}

fn given_files(data: &[PathBuf]) -> Result<Vec<File>> {
    let mut files = Vec::new();
    for path in data {
        let metadata = fs::metadata(path).with_context(|| format!("--data {}", path.display()))?;
        if metadata.is_dir() {
            walk(path, path, &mut files)?;
        } else {
            files.push(File { path: path.clone(), name: path.display().to_string(), named: true });
        }
    }
    Ok(files)
}

/// All files below `directory`, named relative to `root`.
fn walk(directory: &Path, root: &Path, files: &mut Vec<File>) -> Result<()> {
    let context = || format!("cannot read the directory {}", directory.display());
    for entry in fs::read_dir(directory).with_context(context)? {
        let entry = entry.with_context(context)?;
        let (path, kind) = (entry.path(), entry.file_type()?);
        if kind.is_dir() {
            walk(&path, root, files)?;
        } else if kind.is_file() {
            let name = path.strip_prefix(root).unwrap_or(&path).display().to_string();
            files.push(File { path, name, named: false });
        }
    }
    Ok(())
}

/// Joins the files of each directory in the order of their names, every file under a line with its path.
fn documents(mut files: Vec<File>) -> Result<BTreeMap<String, Vec<u8>>> {
    files.sort_by(|a, b| a.name.cmp(&b.name));
    let mut documents = BTreeMap::<String, Vec<u8>>::new();
    let mut open: Option<(PathBuf, String)> = None;
    for File { path, name, named } in files {
        let text = fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
        if text.contains(&SEPARATOR) {
            if named {
                bail!("{} is a binary file (it has NUL bytes): --data takes text", path.display());
            }
            eprintln!("skipped {}: a binary file", path.display());
            continue;
        }
        if text.is_empty() {
            continue;
        }
        let parent = path.parent().unwrap_or(Path::new("")).to_owned();
        let key = match &open {
            Some((directory, key)) if *directory == parent && documents[key].len() + text.len() <= DOCUMENT_BYTES => {
                key.clone()
            }
            _ => name.clone(),
        };
        let document = documents.entry(key.clone()).or_default();
        document.extend_from_slice(format!("=== {name}\n").as_bytes());
        document.extend_from_slice(&text);
        open = Some((parent, key));
    }
    Ok(documents)
}

/// FNV-1a: the same in every version of Rust, unlike the standard library's hasher.
fn hash(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, &byte| (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3))
}
