//! MoBA in torch operations on whole matrices, in the dtype of the inputs: the yardstick for accuracy.

use rand::{SeedableRng, rngs::StdRng};
use tch::{Kind, Tensor};

use crate::{
    kit::{Case, Inputs, Results, assert_within, largest, lse_kind, max_error, normal, ulp},
    oracle,
};

/// `true` where a query sees a key: `[batch, heads, seqlen_q, seqlen_k]`.
pub fn mask(case: &Case, route: &Tensor) -> Tensor {
    let options = (Kind::Int64, route.device());
    let position = Tensor::arange(case.seqlen_q, options).unsqueeze(-1) + (case.seqlen_k - case.seqlen_q);
    let key = Tensor::arange(case.seqlen_k, options);
    let block = key.divide_scalar_mode(case.block_size, "floor");
    let chosen = route.unsqueeze(-1).eq_tensor(&block).any_dim(3, false);
    chosen.logical_and(&key.le_tensor(&position))
}

/// Attention over `route` and its gradients by the formulas of the contract: probabilities from `lse`, and
/// `ds = p * (dp - (sum(out * dout) - dlse))`. What needs float32 in the contract has it here.
pub fn attend(case: &Case, inputs: &Inputs, route: &Tensor, softmax_scale: f64) -> Results {
    let Inputs { q, k, v, dout, dlse } = inputs;
    let (kind, wide) = (q.kind(), lse_kind(q.kind()));
    let group = case.heads / case.heads_k;
    let repeat = |x: &Tensor| x.repeat_interleave_self_int(group, 1, None);
    let (k, v) = (repeat(k), repeat(v));
    let hidden = mask(case, route).logical_not();
    let scores = q.to_kind(wide).matmul(&k.to_kind(wide).transpose(2, 3)) * softmax_scale;
    let scores = scores.masked_fill(&hidden, f64::NEG_INFINITY);
    let lse = scores.logsumexp([-1].as_slice(), false);
    let out = scores.to_kind(kind).softmax(-1, kind).masked_fill(&hidden, 0.0).matmul(&v);
    let p = (scores - lse.unsqueeze(-1)).exp().masked_fill(&hidden, 0.0).to_kind(kind);
    let delta = (out.to_kind(wide) * dout.to_kind(wide)).sum_dim_intlist([-1].as_slice(), true, wide);
    let dp = dout.matmul(&v.transpose(2, 3)).to_kind(wide);
    let ds = (p.to_kind(wide) * (dp - (delta - dlse.unsqueeze(-1)))).to_kind(kind);
    let reduce = |x: Tensor| {
        let [b, _, s, d] = [0, 1, 2, 3].map(|n| x.size()[n]);
        x.view([b, case.heads_k, group, s, d]).sum_dim_intlist([2].as_slice(), false, kind)
    };
    Results {
        dq: ds.matmul(&k) * softmax_scale,
        dk: reduce(ds.transpose(2, 3).matmul(q) * softmax_scale),
        dv: reduce(p.transpose(2, 3).matmul(dout)),
        out,
        lse,
    }
}

/// Asserts that `ours` is as good as the plain implementation, both against the oracle: shape, dtype, non-finite
/// positions, then an error of at most twice the plain one plus one unit in the last place of the largest value.
///
/// The error of a small problem may vanish by luck, so the plain one is the largest of a few problems that differ from
/// the given one in the signs of its numbers only.
pub fn assert_as_good(what: &str, case: &Case, inputs: &Inputs, route: &Tensor, softmax_scale: f64, ours: &Results) {
    let mut plain = [0.0f64; 5];
    for seed in 0..4 {
        let inputs = if seed == 0 { inputs.map(Tensor::shallow_clone) } else { with_other_signs(inputs, seed) };
        let (naive, truth) =
            (attend(case, &inputs, route, softmax_scale), oracle::attend(case, &inputs, route, softmax_scale));
        for ((worst, (name, naive)), (_, truth)) in plain.iter_mut().zip(naive.named()).zip(truth.named()) {
            *worst = worst.max(max_error(&format!("plain {name}, {what}"), naive, truth));
        }
    }
    let truth = oracle::attend(case, inputs, route, softmax_scale);
    for ((plain, (name, ours)), (_, truth)) in plain.iter().zip(ours.named()).zip(truth.named()) {
        let kind = if name == "lse" { lse_kind(inputs.q.kind()) } else { inputs.q.kind() };
        assert_eq!((ours.kind(), ours.device()), (kind, inputs.q.device()), "{name}, {what}");
        assert_within(&format!("{name}, {what}"), ours, truth, 2.0 * plain + ulp(kind, largest(truth)));
    }
}

fn with_other_signs(inputs: &Inputs, seed: u64) -> Inputs {
    let mut rng = StdRng::seed_from_u64(seed);
    let signs: Vec<Tensor> = inputs.each().map(|x| normal(&mut rng, &x.size()).sign()).into();
    let mut signs = signs.iter();
    inputs.map(|x| x * signs.next().unwrap().to_kind(x.kind()).to_device(x.device()))
}
