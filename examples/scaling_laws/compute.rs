//! Counting compute: 6 N D as the paper does, and the operations that attention really takes.
//!
//! A multiplication and an addition count as two operations. The backward pass counts twice the forward pass: what the
//! mathematics asks for, without the forward work that flash attention repeats.

use tch_moba::{AttentionKind, llama::LlamaConfig};

/// Bins of the position-wise loss; the last is the trailing loss (2K of 32K tokens in the paper).
pub const POSITION_BINS: usize = 16;

/// Operations in a PFLOP/s-day, the unit of the chart.
pub const PFLOP_S_DAY: f64 = 1e15 * 24.0 * 3600.0;

/// Weights without the token embedding, as the paper counts a model's size.
pub fn parameters(config: &LlamaConfig) -> u64 {
    let norms = (2 * config.num_hidden_layers as i64 + 1) * config.hidden_size;
    (matrices(config) + norms) as u64
}

/// The weights of the layers' matrices.
fn matrices(config: &LlamaConfig) -> i64 {
    let (hidden, width) = (config.hidden_size, config.head_dim());
    let attention = 2 * hidden * width * (config.num_attention_heads + config.heads_k());
    let feed_forward = 3 * hidden * config.intermediate_size;
    config.num_hidden_layers as i64 * (attention + feed_forward)
}

/// 6 N D.
pub fn six_nd(parameters: u64, tokens: u64) -> f64 {
    6.0 * parameters as f64 * tokens as f64
}

/// Operations of the forward and backward pass over one sequence whose layers run `kinds`.
pub fn sequence(config: &LlamaConfig, seqlen: i64, kinds: &[AttentionKind]) -> f64 {
    let head = config.hidden_size * config.vocab_size;
    let products = 6.0 * (matrices(config) + head) as f64 * seqlen as f64;
    let attention: f64 = kinds.iter().map(|&kind| attention(config, seqlen, kind)).sum();
    products + attention
}

fn attention(config: &LlamaConfig, seqlen: i64, kind: AttentionKind) -> f64 {
    let heads = config.num_attention_heads as f64;
    let width = config.head_dim() as f64;
    // Forward q k and p v, two operations an element each; three times that with the backward pass.
    let pair = 3.0 * 4.0 * width * heads;
    match kind {
        AttentionKind::Full => pair * (seqlen * (seqlen + 1) / 2) as f64,
        AttentionKind::Moba => {
            let Pairs { attended, scored } = moba_pairs(seqlen, config.moba.block_size(), config.moba.top_k());
            // The routing has no gradient: each score one product, each key added once to the mean of its block.
            let scores = 2.0 * width * heads * scored as f64;
            let means = width * config.heads_k() as f64 * seqlen as f64;
            pair * attended as f64 + scores + means
        }
    }
}

/// What the queries of one head do.
struct Pairs {
    /// Keys attended to.
    attended: i64,
    /// Blocks scored.
    scored: i64,
}

fn moba_pairs(seqlen: i64, block_size: i64, top_k: i64) -> Pairs {
    let mut pairs = Pairs { attended: 0, scored: 0 };
    for start in (0..seqlen).step_by(block_size as usize) {
        let queries = block_size.min(seqlen - start);
        let past = start / block_size;
        pairs.attended += queries * (queries + 1) / 2 + queries * past.min(top_k - 1) * block_size;
        pairs.scored += queries * past;
    }
    pairs
}

#[cfg(test)]
mod tests {
    use tch::{Device, Tensor, nn};
    use tch_moba::{MobaConfig, llama::Llama};

    use super::*;

    fn config() -> LlamaConfig {
        LlamaConfig {
            vocab_size: 10,
            hidden_size: 8,
            intermediate_size: 12,
            num_hidden_layers: 2,
            num_attention_heads: 2,
            num_key_value_heads: Some(1),
            tie_word_embeddings: true,
            moba: MobaConfig::new(2, 2).unwrap(),
            ..LlamaConfig::default()
        }
    }

    #[test]
    fn parameters_are_those_of_the_model() {
        let vs = nn::VarStore::new(Device::Cpu);
        Llama::new(vs.root(), &config()).unwrap();
        let variables = vs.variables();
        let all: usize = variables.values().map(Tensor::numel).sum();
        let embedding = variables["model.embed_tokens.weight"].numel();
        assert_eq!(parameters(&config()), (all - embedding) as u64);
    }

    #[test]
    fn pairs_by_hand() {
        // Blocks of 2 in 5 tokens, the current one and one other: 1, 2, 1 + 2, 2 + 2, 1 + 2 keys.
        let Pairs { attended, scored } = moba_pairs(5, 2, 2);
        assert_eq!(attended, 1 + 2 + 3 + 4 + 3);
        // Queries 2 and 3 score one block, query 4 scores two.
        assert_eq!(scored, 1 + 1 + 2);
        // All blocks selected: as many pairs as full attention.
        assert_eq!(moba_pairs(5, 2, 3).attended, 5 * 6 / 2);
    }

    #[test]
    fn a_sequence_by_hand() {
        // A layer: q and o 8 x 8, k and v 8 x 4, three matrices of 8 x 12; the head 8 x 10.
        let layer = 2 * 64 + 2 * 32 + 3 * 96;
        let products = (6 * (2 * layer + 80) * 5) as f64;
        let pair = 12.0 * 4.0 * 2.0;
        let full = pair * 15.0;
        // 4 scores of 2 heads with 2 * 4 operations, 5 keys of 4 numbers added up.
        let moba = pair * 13.0 + 4.0 * 2.0 * 8.0 + 5.0 * 4.0;
        let count = |kinds: &[AttentionKind]| sequence(&config(), 5, kinds);
        assert_eq!(count(&[AttentionKind::Full, AttentionKind::Full]), products + 2.0 * full);
        assert_eq!(count(&[AttentionKind::Moba, AttentionKind::Full]), products + moba + full);
    }

    #[test]
    fn the_paper_in_pflop_s_days() {
        // Table 1: 545 M parameters on 10.8 billion tokens.
        let days = six_nd(545_000_000, 10_800_000_000) / PFLOP_S_DAY;
        assert!((days - 0.4087).abs() < 1e-4);
    }
}
