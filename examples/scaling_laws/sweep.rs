//! The sweep file: which models are trained, on how many tokens, with which attention.

use std::{collections::BTreeSet, fs, path::Path};

use anyhow::{Context as _, Result, bail, ensure};
use serde::{Deserialize, Serialize};
use tch_moba::{HybridPolicy, MobaConfig, llama::LlamaConfig};

use crate::compute;

/// A sweep file; see `h100.toml` for one with comments.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Sweep {
    /// Training tokens per parameter, embeddings not counted.
    pub tokens_per_parameter: f64,
    /// Tokens of the held-out text in each measurement of the loss.
    pub held_out_tokens: u64,
    /// Most tokens in one forward pass: what the device's memory holds. An update of more adds gradients up.
    pub pass_tokens: u64,
    pub recipe: Recipe,
    #[serde(rename = "size")]
    pub sizes: Vec<Size>,
    #[serde(rename = "context")]
    pub contexts: Vec<Context>,
}

/// How every run is trained.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Recipe {
    /// Peak learning rate at a hidden size of 256; it falls with the square root of the size.
    pub lr: f64,
    /// The share of the run in which the learning rate rises. It then falls to a tenth along a cosine.
    pub warmup: f64,
    pub weight_decay: f64,
    /// Largest norm of the gradient.
    pub clip: f64,
}

/// A model, without what depends on the context.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Size {
    pub name: String,
    pub layers: usize,
    pub hidden: i64,
    pub heads: i64,
    /// Default: as many as `heads`.
    pub heads_k: Option<i64>,
    /// Size of the feed-forward layers. Default: 8/3 of `hidden`, rounded up to a multiple of 32.
    pub intermediate: Option<i64>,
    /// Tokens of an update.
    pub batch_tokens: u64,
}

/// Runs at one sequence length: every size with every policy and seed.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Context {
    pub seqlen: i64,
    pub block_size: i64,
    pub top_k: i64,
    pub sizes: Vec<String>,
    pub policies: Vec<HybridPolicy>,
    pub seeds: Vec<u64>,
    /// Default: that of the sweep.
    pub tokens_per_parameter: Option<f64>,
    /// Tokens of an update. Default: that of the size.
    pub batch_tokens: Option<u64>,
}

/// One training run of the sweep. Everything that decides its numbers, the text and the commit aside.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Run {
    #[serde(flatten)]
    pub size: Size,
    pub seqlen: i64,
    pub moba: MobaConfig,
    pub policy: HybridPolicy,
    pub seed: u64,
    pub tokens_per_parameter: f64,
    pub held_out_tokens: u64,
    pub pass_tokens: u64,
    pub recipe: Recipe,
}

impl Sweep {
    pub fn read(path: &Path) -> Result<Self> {
        let text = fs::read_to_string(path).with_context(|| format!("cannot read the sweep {}", path.display()))?;
        Self::parse(&text).with_context(|| format!("{}", path.display()))
    }

    pub fn parse(text: &str) -> Result<Self> {
        // One line: the library's own message draws the file around the place.
        let sweep: Self = toml::from_str(text).map_err(|error| {
            let line = error.span().map_or(0, |span| text[..span.start].matches('\n').count()) + 1;
            anyhow::anyhow!("line {line}: {}", error.message())
        })?;
        sweep.runs()?;
        Ok(sweep)
    }

    /// All runs in the order of the file, checked.
    pub fn runs(&self) -> Result<Vec<Run>> {
        let mut names = BTreeSet::new();
        let mut runs = Vec::new();
        ensure!(!self.sizes.is_empty(), "a sweep needs at least one [[size]]");
        ensure!(!self.contexts.is_empty(), "a sweep needs at least one [[context]]");
        for size in &self.sizes {
            let twice = self.sizes.iter().filter(|other| other.name == size.name).count() > 1;
            ensure!(!twice, "two sizes are called {:?}", size.name);
        }
        for context in &self.contexts {
            let moba = MobaConfig::new(context.block_size, context.top_k)
                .with_context(|| format!("the context of {} tokens", context.seqlen))?;
            for name in &context.sizes {
                let Some(size) = self.sizes.iter().find(|size| size.name == *name) else {
                    let known: Vec<_> = self.sizes.iter().map(|size| size.name.as_str()).collect();
                    bail!(
                        "the context of {} tokens names the size {name:?}; known: {}",
                        context.seqlen,
                        known.join(", ")
                    );
                };
                for policy in &context.policies {
                    for &seed in &context.seeds {
                        let batch_tokens = context.batch_tokens.unwrap_or(size.batch_tokens);
                        let run = Run {
                            size: Size { batch_tokens, ..size.clone() },
                            seqlen: context.seqlen,
                            moba,
                            policy: policy.clone(),
                            seed,
                            tokens_per_parameter: context.tokens_per_parameter.unwrap_or(self.tokens_per_parameter),
                            held_out_tokens: self.held_out_tokens,
                            pass_tokens: self.pass_tokens,
                            recipe: self.recipe,
                        };
                        run.check().with_context(|| format!("run {}", run.name()))?;
                        ensure!(
                            names.insert(run.name()),
                            "the sweep asks for the run {} twice: a name says tokens, size, policy and seed",
                            run.name()
                        );
                        runs.push(run);
                    }
                }
            }
        }
        ensure!(!runs.is_empty(), "the sweep asks for no run: a context has no sizes, policies or seeds");
        Ok(runs)
    }
}

impl Run {
    /// The file name of the run.
    pub fn name(&self) -> String {
        let policy = self.policy.to_string().replace([':', ','], "-");
        format!("{}-{}-{policy}-{}", self.seqlen, self.size.name, self.seed)
    }

    fn check(&self) -> Result<()> {
        let Self { seqlen, pass_tokens, held_out_tokens, recipe, .. } = *self;
        ensure!(
            seqlen >= 1 && seqlen % compute::POSITION_BINS as i64 == 0,
            "seqlen must be a multiple of {}, the number of bins of the position-wise loss, got {seqlen}",
            compute::POSITION_BINS
        );
        let length = seqlen as u64;
        for (name, tokens) in [
            ("batch_tokens", self.size.batch_tokens),
            ("pass_tokens", pass_tokens),
            ("held_out_tokens", held_out_tokens),
        ] {
            ensure!(tokens >= length, "{name} must hold at least one sequence of {seqlen} tokens, got {tokens}");
            ensure!(
                tokens % length == 0 || name == "pass_tokens",
                "{name} must be a multiple of the {seqlen} tokens of a sequence, got {tokens}"
            );
        }
        let (rows, pass) = (self.rows(), self.pass_rows());
        ensure!(
            rows % pass == 0,
            "an update of {rows} sequences must be a whole number of passes of {pass}: change batch_tokens or pass_tokens"
        );
        for (name, value) in
            [("tokens_per_parameter", self.tokens_per_parameter), ("lr", recipe.lr), ("clip", recipe.clip)]
        {
            ensure!(value.is_finite() && value > 0.0, "{name} must be positive, got {value}");
        }
        ensure!(
            (0.0..1.0).contains(&recipe.warmup),
            "warmup must be a share of the run below 1, got {}",
            recipe.warmup
        );
        ensure!(
            recipe.weight_decay.is_finite() && recipe.weight_decay >= 0.0,
            "weight_decay must not be negative, got {}",
            recipe.weight_decay
        );
        Ok(self.llama(256).check()?)
    }

    /// The model, for a tokenizer of `vocab_size`.
    pub fn llama(&self, vocab_size: i64) -> LlamaConfig {
        let Size { layers, hidden, heads, heads_k, intermediate, .. } = self.size;
        LlamaConfig {
            vocab_size,
            hidden_size: hidden,
            intermediate_size: intermediate.unwrap_or((hidden * 8 / 3 + 31) / 32 * 32),
            num_hidden_layers: layers,
            num_attention_heads: heads,
            num_key_value_heads: heads_k,
            max_position_embeddings: self.seqlen,
            initializer_range: (hidden as f64).powf(-0.5),
            tie_word_embeddings: true,
            moba: self.moba,
            policy: self.policy.clone(),
            ..LlamaConfig::default()
        }
    }

    /// Sequences of an update.
    pub fn rows(&self) -> i64 {
        self.size.batch_tokens as i64 / self.seqlen
    }

    /// Sequences of a forward pass.
    pub fn pass_rows(&self) -> i64 {
        (self.pass_tokens as i64 / self.seqlen).min(self.rows())
    }

    /// Updates; at least one.
    pub fn steps(&self) -> u64 {
        let wanted = self.tokens_per_parameter * compute::parameters(&self.llama(256)) as f64;
        (wanted / self.tokens_per_step() as f64).round().max(1.0) as u64
    }

    pub fn tokens_per_step(&self) -> u64 {
        (self.rows() * self.seqlen) as u64
    }

    /// The learning rate of the update after `step` others.
    pub fn lr(&self, step: u64) -> f64 {
        let peak = self.recipe.lr * (256.0 / self.size.hidden as f64).sqrt();
        let steps = self.steps() as f64;
        let warmup = (steps * self.recipe.warmup).ceil();
        let step = step as f64;
        if step < warmup {
            return peak * (step + 1.0) / warmup;
        }
        let done = (step - warmup) / (steps - warmup).max(1.0);
        peak * (0.55 + 0.45 * (std::f64::consts::PI * done.min(1.0)).cos())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MINIATURE: &str = include_str!("miniature.toml");
    const H100: &str = include_str!("h100.toml");

    /// The one line that a user sees.
    fn refusal(text: &str) -> String {
        let message = format!("{:#}", Sweep::parse(text).unwrap_err());
        assert!(!message.contains('\n'), "more than one line: {message}");
        message
    }

    #[test]
    fn shipped_sweeps_are_valid() {
        for text in [MINIATURE, H100] {
            let runs = Sweep::parse(text).unwrap().runs().unwrap();
            assert!(runs.iter().any(|run| run.policy == HybridPolicy::Moba));
            assert!(runs.iter().any(|run| run.policy == HybridPolicy::Full));
        }
    }

    #[test]
    fn errors_are_one_clear_line() {
        let change = |from: &str, to: &str| {
            assert!(MINIATURE.contains(from), "the miniature lacks {from:?}");
            refusal(&MINIATURE.replacen(from, to, 1))
        };
        assert!(refusal("tokens_per_parameter = ").starts_with("line 1: "));
        let unknown = change("[recipe]", "[recipe]\nlearning_rate = 1");
        assert!(unknown.starts_with("line ") && unknown.contains("unknown field `learning_rate`"), "{unknown}");
        let policy = change("\"moba\"", "\"mobba\"");
        assert!(policy.contains("policy must be moba, full"), "{policy}");
        let size = change("name = \"25K\"", "name = \"26K\"");
        assert_eq!(size, "the context of 512 tokens names the size \"25K\"; known: 26K, 85K, 200K");
        let top_k = change("top_k = 3", "top_k = 0");
        assert!(top_k.contains("top_k must be at least 1"), "{top_k}");
        let warmup = change("warmup = 0.05", "warmup = 1.5");
        assert!(warmup.contains("run 512-25K-moba-0: warmup must be a share of the run below 1, got 1.5"), "{warmup}");
        let seeds = change("seeds = [0]", "seeds = [0, 0]");
        assert!(seeds.starts_with("the sweep asks for the run 512-25K-moba-0 twice: "), "{seeds}");
        let batch = change("batch_tokens = 2048", "batch_tokens = 2049");
        assert!(batch.contains("batch_tokens must be a multiple of the 512 tokens of a sequence, got 2049"), "{batch}");
    }

    #[test]
    fn a_context_may_have_updates_of_its_own() {
        let text = MINIATURE.replacen("seeds = [0]", "seeds = [0]\nbatch_tokens = 4096", 1);
        let batches = |text: &str| -> Vec<(i64, u64)> {
            Sweep::parse(text).unwrap().runs().unwrap().iter().map(|run| (run.seqlen, run.size.batch_tokens)).collect()
        };
        for ((seqlen, usual), (_, own)) in batches(MINIATURE).into_iter().zip(batches(&text)) {
            assert_eq!(own, if seqlen == 512 { 4096 } else { usual });
        }
    }

    #[test]
    fn the_learning_rate_rises_and_falls() {
        let mut run = Sweep::parse(MINIATURE).unwrap().runs().unwrap().remove(0);
        run.size.hidden = 256;
        let (steps, peak) = (run.steps(), run.recipe.lr);
        let highest = (0..steps).map(|step| run.lr(step)).fold(0.0, f64::max);
        assert!((highest / peak - 1.0).abs() < 1e-12);
        assert!(run.lr(0) < 0.5 * peak);
        assert!((run.lr(steps) / peak - 0.1).abs() < 1e-12);
    }
}
