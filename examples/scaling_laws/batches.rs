//! Batches that are cut on the device: the tokens and the order of a whole run lie there from the start, so no step copies
//! from the host or waits for it.

use anyhow::{Result, ensure};
use rand::{Rng, SeedableRng, rngs::StdRng, seq::SliceRandom};
use tch::{Device, Kind, Tensor};

use crate::corpus::Corpus;

/// A part of the corpus on the device.
pub struct Text {
    /// `[tokens]` int16.
    tokens: Tensor,
    /// `[1, seqlen + 1]`.
    offsets: Tensor,
}

impl Text {
    fn new(tokens: &[i16], seqlen: i64, device: Device) -> Self {
        let offsets = Tensor::arange(seqlen + 1, (Kind::Int64, device)).unsqueeze(0);
        Self { tokens: Tensor::from_slice(tokens).to_device(device), offsets }
    }

    /// Int64 `[rows, seqlen + 1]` from the positions `starts [rows]`.
    fn gather(&self, starts: &Tensor) -> Result<Tensor> {
        let positions = starts.f_unsqueeze(1)?.f_add(&self.offsets)?;
        Ok(self.tokens.f_take(&positions)?.f_to_kind(Kind::Int64)?)
    }
}

/// The training batches of a run: a function of the seed and the step alone.
pub struct Training {
    text: Text,
    /// Where the sequences start, `[steps * rows]`.
    starts: Tensor,
    rows: i64,
}

impl Training {
    pub fn new(corpus: &Corpus, seqlen: i64, rows: i64, steps: u64, seed: u64, device: Device) -> Result<Self> {
        let starts = starts(corpus.train.len(), seqlen as usize, rows as usize * steps as usize, seed)?;
        let starts = Tensor::from_slice(&starts).to_device(device);
        Ok(Self { text: Text::new(&corpus.train, seqlen, device), starts, rows })
    }

    /// Int64 `[rows, seqlen + 1]`: `rows` sequences of the update `step`, from the sequence `first` on.
    pub fn batch(&self, step: u64, first: i64, rows: i64) -> Result<Tensor> {
        self.text.gather(&self.starts.f_narrow(0, step as i64 * self.rows + first, rows)?)
    }
}

/// The first `count` starts: windows side by side in random order, and in the next epoch, cut at other places, again.
fn starts(tokens: usize, seqlen: usize, count: usize, seed: u64) -> Result<Vec<i64>> {
    ensure!(
        tokens > 2 * seqlen,
        "the corpus is too small: its training part has {tokens} tokens, a sequence takes {}",
        seqlen + 1
    );
    let mut random = StdRng::seed_from_u64(seed);
    let mut starts = Vec::with_capacity(count);
    while starts.len() < count {
        let shift = random.random_range(0..seqlen);
        let mut epoch: Vec<i64> = (0..(tokens - shift - 1) / seqlen).map(|i| (shift + i * seqlen) as i64).collect();
        epoch.shuffle(&mut random);
        epoch.truncate(count - starts.len());
        starts.extend(epoch);
    }
    Ok(starts)
}

/// The sequences on which the loss is measured: the same for all runs of one length, spread evenly over the held-out text.
pub struct HeldOut {
    text: Text,
    starts: Tensor,
    rows: i64,
}

impl HeldOut {
    pub fn new(corpus: &Corpus, seqlen: i64, tokens: u64, rows: i64, device: Device) -> Result<Self> {
        let windows = (corpus.held_out.len().saturating_sub(1)) as i64 / seqlen;
        ensure!(
            windows >= 1,
            "the corpus is too small: its held-out part has {} tokens, a sequence takes {}",
            corpus.held_out.len(),
            seqlen + 1
        );
        let count = windows.min(tokens as i64 / seqlen).max(1);
        let starts: Vec<i64> = (0..count).map(|i| i * windows / count * seqlen).collect();
        let starts = Tensor::from_slice(&starts).to_device(device);
        Ok(Self { text: Text::new(&corpus.held_out, seqlen, device), starts, rows })
    }

    /// All sequences, in batches `[<= rows, seqlen + 1]`.
    pub fn batches(&self) -> impl Iterator<Item = Result<Tensor>> {
        self.starts.split(self.rows, 0).into_iter().map(|starts| self.text.gather(&starts))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::corpus::of_tokens;

    #[test]
    fn every_window_once_an_epoch() {
        let (tokens, seqlen) = (1000, 30);
        let starts = starts(tokens, seqlen, 100, 3).unwrap();
        assert_eq!(starts.len(), 100);
        let shift = starts[0] % 30;
        let epoch = (tokens - shift as usize - 1) / seqlen;
        let mut first = starts[..epoch].to_vec();
        first.sort_unstable();
        let wanted: Vec<i64> = (0..epoch as i64).map(|i| shift + 30 * i).collect();
        assert_eq!(first, wanted);
        assert!(starts.iter().all(|&start| start as usize + seqlen < tokens));
    }

    #[test]
    fn batches_follow_step_and_seed() {
        let corpus = of_tokens((0..1000).collect(), (0..100).collect(), 1000).unwrap();
        let batches = |seed| Training::new(&corpus, 8, 4, 5, seed, Device::Cpu).unwrap();
        let whole = batches(1).batch(2, 0, 4).unwrap();
        assert_eq!(whole.size(), [4, 9]);
        assert_eq!(whole.diff::<Tensor>(1, -1, None, None).unique_dim(0, true, false, false).0.size(), [1, 8]);
        assert_eq!(batches(1).batch(2, 2, 2).unwrap(), whole.narrow(0, 2, 2));
        assert_ne!(batches(2).batch(2, 0, 4).unwrap(), whole);
    }

    #[test]
    fn held_out_sequences_are_whole() {
        let corpus = of_tokens((0..100).collect(), (0..100).collect(), 100).unwrap();
        let held_out = HeldOut::new(&corpus, 8, 40, 2, Device::Cpu).unwrap();
        let batches: Vec<_> = held_out.batches().map(Result::unwrap).collect();
        assert_eq!(batches.iter().map(|batch| batch.size()[0]).collect::<Vec<_>>(), [2, 2, 1]);
        assert!(batches.iter().all(|batch| batch.size()[1] == 9));
    }
}
