//! MoBA in torch operations, as a user would write it: the yardstick for accuracy in each dtype.

use tch::{Kind, Tensor};

use crate::kit::{Case, Inputs, Results, lse_kind};

/// `true` where a query sees a key: `[batch, heads, seqlen_q, seqlen_k]`.
pub fn mask(case: &Case, route: &Tensor) -> Tensor {
    let options = (Kind::Int64, route.device());
    let position = Tensor::arange(case.seqlen_q, options).unsqueeze(-1) + (case.seqlen_k - case.seqlen_q);
    let key = Tensor::arange(case.seqlen_k, options);
    let block = key.divide_scalar_mode(case.block_size, "floor");
    let chosen = route.unsqueeze(-1).eq_tensor(&block).any_dim(3, false);
    chosen.logical_and(&key.le_tensor(&position))
}

/// Attention over `route` and its gradients, in the dtype of the inputs.
pub fn attend(case: &Case, inputs: &Inputs, route: &Tensor, softmax_scale: f64) -> Results {
    let hidden = mask(case, route).logical_not();
    Results::of(inputs, |q, k, v| {
        let group = case.heads / case.heads_k;
        let repeat = |x: &Tensor| x.repeat_interleave_self_int(group, 1, None);
        let (k, v) = (repeat(k), repeat(v));
        let scores = |kind| {
            let scores = q.to_kind(kind).matmul(&k.to_kind(kind).transpose(2, 3)) * softmax_scale;
            scores.masked_fill(&hidden, f64::NEG_INFINITY)
        };
        let out = scores(q.kind()).softmax(-1, q.kind()).matmul(&v);
        // The operator returns lse in float32 also for 16-bit inputs, whose products are exact there.
        (out, scores(lse_kind(q.kind())).logsumexp([-1].as_slice(), false))
    })
}
