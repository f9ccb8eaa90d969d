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
/// The error of a small problem may vanish by luck, so the plain one is the largest of several problems that differ from
/// the given one in the signs of its numbers only: largest errors scatter by a factor of two to three between draws.
/// Draws stop as soon as they allow for ours.
pub fn assert_as_good(what: &str, case: &Case, inputs: &Inputs, route: &Tensor, softmax_scale: f64, ours: &Results) {
    const DRAWS: u64 = 12;
    let truth = oracle::attend(case, inputs, route, softmax_scale);
    let error = |name: &str, x: &Tensor, truth: &Tensor| max_error(&format!("{name}, {what}"), x, truth);
    let kind = inputs.q.kind();
    let mut plain = [0.0f64; 5];
    for draw in 1..=DRAWS {
        let other = (draw > 1).then(|| with_other_signs(inputs, draw));
        let other_truth = other.as_ref().map(|other| oracle::attend(case, other, route, softmax_scale));
        let naive = attend(case, other.as_ref().unwrap_or(inputs), route, softmax_scale);
        let drawn_truth = other_truth.as_ref().unwrap_or(&truth).named();
        for ((worst, (name, naive)), (_, truth)) in plain.iter_mut().zip(naive.named()).zip(drawn_truth) {
            *worst = worst.max(error(name, naive, truth));
        }
        let allowed = |n: usize| {
            let ((name, _), (_, truth)) = (ours.named()[n], truth.named()[n]);
            let unit = ulp(if name == "lse" { lse_kind(kind) } else { kind }, largest(truth));
            2.0 * plain[n] + unit + oracle_error(kind, unit)
        };
        let within = |n: usize| error(ours.named()[n].0, ours.named()[n].1, truth.named()[n].1) <= allowed(n);
        if draw < DRAWS && !(0..plain.len()).all(within) {
            continue;
        }
        for (n, (name, ours)) in ours.named().into_iter().enumerate() {
            let wanted = if name == "lse" { lse_kind(kind) } else { kind };
            assert_eq!((ours.kind(), ours.device()), (wanted, inputs.q.device()), "{name}, {what}");
            assert_within(&format!("{name}, {what}"), ours, truth.named()[n].1, allowed(n));
        }
        return;
    }
}

/// The oracle computes in float64, so for float64 it is no better than what it judges: its sums are compensated, but the
/// argument of each exponential is rounded, and scores of size 5 make that several units in the last place.
fn oracle_error(kind: Kind, unit: f64) -> f64 {
    if kind == Kind::Double { 8.0 * unit } else { 0.0 }
}

fn with_other_signs(inputs: &Inputs, seed: u64) -> Inputs {
    let mut rng = StdRng::seed_from_u64(seed);
    let signs: Vec<Tensor> = inputs.each().map(|x| normal(&mut rng, &x.size()).sign()).into();
    let mut signs = signs.iter();
    inputs.map(|x| x * signs.next().unwrap().to_kind(x.kind()).to_device(x.device()))
}
