//! MoBA's routing in plain loops over float64, written from the contract alone.

use tch::{Kind, Tensor};

use crate::{
    kit::Case,
    oracle::{dot, numbers},
};

/// Scores of all blocks before the current one, for one query row, and how far each may be off in another
/// implementation that sums in another order.
pub struct Gate {
    pub current: usize,
    pub scores: Vec<f64>,
    pub slack: Vec<f64>,
}

/// The gates of all rows, `[batch * heads * seqlen_q]`.
pub fn gates(case: &Case, q: &Tensor, k: &Tensor) -> Vec<Gate> {
    let (d, b) = (case.head_dim as usize, case.block_size as usize);
    let (heads, group) = (case.heads as usize, (case.heads / case.heads_k) as usize);
    let (sq, sk) = (case.seqlen_q as usize, case.seqlen_k as usize);
    let complete = sk / b;
    let means = block_means(k, sk, d, b);
    let q = numbers(q);
    let row = |r: usize| {
        let (batch_head, i) = (r / sq, r % sq);
        let key_head = batch_head / heads * case.heads_k as usize + batch_head % heads / group;
        let current = (sk - sq + i) / b;
        let q = &q[r * d..(r + 1) * d];
        let (scores, slack) = (0..current)
            .map(|block| {
                let at = (key_head * complete + block) * d;
                let (mean, doubt) = (&means.0[at..at + d], &means.1[at..at + d]);
                let margin = 4e-6 * dot(q, q).sqrt() * dot(mean, mean).sqrt();
                (dot(q, mean), margin + q.iter().zip(doubt).map(|(q, e)| (q * e).abs()).sum::<f64>())
            })
            .unzip();
        Gate { current, scores, slack }
    };
    (0..q.len() / d).map(row).collect()
}

/// Means of the complete blocks in the dtype of `k`, `[batch * heads_k, blocks, head_dim]`, and by how much the
/// rounding to that dtype may go the other way when the float32 sum is taken in another order.
fn block_means(k: &Tensor, seqlen: usize, d: usize, block: usize) -> (Vec<f64>, Vec<f64>) {
    let numbers = numbers(k);
    let (mut means, mut spread) = (Vec::new(), Vec::new());
    for head in numbers.chunks(seqlen * d) {
        for tokens in head.chunks_exact(block * d) {
            for c in 0..d {
                let column = || tokens.iter().skip(c).step_by(d);
                means.push(column().sum::<f64>() / block as f64);
                spread.push(column().map(|x| x.abs()).sum::<f64>() / block as f64 * 1e-6);
            }
        }
    }
    let kind = k.kind();
    let round = |x: Vec<f64>| Vec::<f64>::try_from(Tensor::from_slice(&x).to_kind(kind).to_kind(Kind::Double)).unwrap();
    let moved = |sign: f64| round(means.iter().zip(&spread).map(|(m, s)| m + sign * s).collect());
    let doubt = if matches!(kind, Kind::BFloat16 | Kind::Half) {
        moved(1.0).iter().zip(moved(-1.0)).map(|(high, low)| high - low).collect()
    } else {
        vec![0.0; means.len()]
    };
    (round(means), doubt)
}

/// The chosen blocks of one row: the current one, then the others from the best score down. Of equal scores the later
/// block wins; NaN comes after every number.
pub fn choose(gate: &Gate, top_k: i64) -> Vec<usize> {
    let score = |block: usize| gate.scores[block];
    let better = |a: usize, b: usize| score(a) > score(b) || (score(b).is_nan() && !score(a).is_nan());
    let mut others = Vec::new();
    for block in 0..gate.current {
        // Insert before the first one that is not better, so that of equals the later comes first.
        let place = others.iter().position(|&other| !better(other, block)).unwrap_or(others.len());
        others.insert(place, block);
    }
    std::iter::once(gate.current).chain(others).take(top_k as usize).collect()
}

/// int32 `[batch, heads, seqlen_q, slots]`, the oracle's own routing.
pub fn route(case: &Case, q: &Tensor, k: &Tensor) -> Tensor {
    let slots = case.top_k.min(case.blocks());
    let mut data = Vec::new();
    for gate in gates(case, q, k) {
        let chosen = choose(&gate, case.top_k);
        data.extend((0..slots as usize).map(|slot| chosen.get(slot).map_or(-1, |&block| block as i32)));
    }
    Tensor::from_slice(&data).reshape([case.batch, case.heads, case.seqlen_q, slots])
}
