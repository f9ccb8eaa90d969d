//! Inputs whose routing is hard or easy in known ways.

use clap::ValueEnum;
use tch::{Device, Kind, Tensor};

#[derive(ValueEnum, Clone, Copy, Debug, PartialEq)]
pub enum Data {
    Uniform,
    Clustered,
    Sink,
}

pub struct Inputs {
    pub q: Tensor,
    pub k: Tensor,
    pub v: Tensor,
}

pub struct Shape {
    pub heads: i64,
    pub heads_k: i64,
    pub seqlen: i64,
    /// Tokens in the first block, the one that `sink` makes attractive.
    pub sink: i64,
}

/// Tokens that share a topic.
const TOPIC: i64 = 1024;
/// Stretches of text per topic: topics come back, so that distant blocks are worth choosing.
const RETURNS: i64 = 4;

impl Data {
    /// Reproducible: the seed is fixed.
    pub fn generate(self, batch: i64, shape: &Shape, head_dim: i64, (kind, device): (Kind, Device)) -> Inputs {
        let &Shape { heads, heads_k, seqlen, sink } = shape;
        tch::manual_seed(20250218);
        let noise = |heads: i64| Tensor::randn([batch, heads, seqlen, head_dim], (Kind::Float, device));
        let (q, k, v) = (noise(heads), noise(heads_k), noise(heads_k));
        let (q, k) = match self {
            Self::Uniform => (q, k),
            Self::Clustered => {
                let stretches = (seqlen + TOPIC - 1) / TOPIC;
                let topics = Tensor::randn([(stretches / RETURNS).max(2), head_dim], (Kind::Float, device));
                let of_stretch = Tensor::randint(topics.size()[0], [stretches], (Kind::Int64, device));
                let of_token = of_stretch.repeat_interleave_self_int(TOPIC, 0, None).narrow(0, 0, seqlen);
                let drift = topics.index_select(0, &of_token);
                (q + &drift, k + drift)
            }
            Self::Sink => {
                // Of length head_dim ** 0.5, like the noise: a first-block key scores head_dim above the others.
                let direction = Tensor::ones([head_dim], (Kind::Float, device));
                let first = Tensor::arange(seqlen, (Kind::Int64, device)).lt(sink).to_kind(Kind::Float).unsqueeze(1);
                (q + &direction, k + first * direction)
            }
        };
        let [q, k, v] = [q, k, v].map(|tensor| tensor.to_kind(kind));
        Inputs { q, k, v }
    }
}
