//! Text as bytes: documents, the held-out split, and batches that are a pure function of the step.

use std::path::PathBuf;

use anyhow::{Result, ensure};
use rand::{SeedableRng, rngs::StdRng, seq::SliceRandom};
use tch::{Device, Kind, Tensor};

use crate::text::{self, SEPARATOR};

/// Files of one directory are joined up to this size: enough for long context, small enough for an even split.
const DOCUMENT_BYTES: usize = 256 << 10;

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
        let documents = text::documents(data, DOCUMENT_BYTES)?;
        let (mut train, mut held_out) = (Vec::new(), Vec::new());
        for text in documents.values() {
            let part = if text::is_held_out(text) { &mut held_out } else { &mut train };
            part.extend_from_slice(text);
            part.push(SEPARATOR);
        }
        // A few documents may all fall on one side: then the end of the text is held out.
        if held_out.is_empty() || train.is_empty() {
            train.append(&mut held_out);
            held_out = train.split_off(train.len() - train.len() / 20);
        }
        ensure!(!train.is_empty(), "the corpus is empty: name files with text after --data");
        let hash = text::hash(&train) ^ text::hash(&held_out).rotate_left(1);
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
