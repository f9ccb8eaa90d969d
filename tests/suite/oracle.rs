//! Attention over a given routing in plain loops over float64, written from the contract alone. Slow and obviously right.

use tch::{Device, Kind, Tensor};

use crate::kit::{Case, Inputs, Results};

/// Attention over `route` and the gradients of `sum(out * dout) + sum(lse * dlse)`, all float64 on the CPU.
pub fn attend(case: &Case, inputs: &Inputs, route: &Tensor, softmax_scale: f64) -> Results {
    let (d, slots) = (case.head_dim as usize, route.size()[3] as usize);
    let (heads, group) = (case.heads as usize, (case.heads / case.heads_k) as usize);
    let (sq, sk) = (case.seqlen_q as usize, case.seqlen_k as usize);
    let [q, k, v, dout, dlse] = [&inputs.q, &inputs.k, &inputs.v, &inputs.dout, &inputs.dlse].map(numbers);
    let route = Vec::<i32>::try_from(route.to_device(Device::Cpu).contiguous().view(-1)).unwrap();
    let (mut out, mut lse, mut dq) = (vec![0.0; q.len()], vec![0.0; q.len() / d], vec![0.0; q.len()]);
    let (mut dk, mut dv) = (vec![0.0; k.len()], vec![0.0; k.len()]);
    for r in 0..q.len() / d {
        let (batch_head, i) = (r / sq, r % sq);
        let first_key = (batch_head / heads * case.heads_k as usize + batch_head % heads / group) * sk;
        let position = sk - sq + i;
        let chosen = &route[r * slots..(r + 1) * slots];
        let keys: Vec<usize> =
            (0..=position).filter(|&j| chosen.contains(&((j as i64 / case.block_size) as i32))).collect();
        let at = |j: usize| (first_key + j) * d..(first_key + j + 1) * d;
        let own = r * d..(r + 1) * d;
        let scores: Vec<f64> = keys.iter().map(|&j| softmax_scale * dot(&q[own.clone()], &k[at(j)])).collect();
        let largest = scores.iter().fold(f64::NEG_INFINITY, |a, &b| if a >= b { a } else { b });
        let sum: f64 = scores.iter().map(|s| (s - largest).exp()).sum();
        lse[r] = if keys.is_empty() { f64::NEG_INFINITY } else { largest + sum.ln() };
        let p: Vec<f64> = scores.iter().map(|s| (s - largest).exp() / sum).collect();
        let dp: Vec<f64> = keys.iter().map(|&j| dot(&dout[own.clone()], &v[at(j)])).collect();
        let delta = dot(&p, &dp);
        for (n, &j) in keys.iter().enumerate() {
            let ds = softmax_scale * p[n] * (dp[n] - delta + dlse[r]);
            for c in 0..d {
                let (x, y) = (r * d + c, (first_key + j) * d + c);
                out[x] += p[n] * v[y];
                dq[x] += ds * k[y];
                dk[y] += ds * q[x];
                dv[y] += p[n] * dout[x];
            }
        }
    }
    let (q_size, k_size) = (case.q_size(), case.k_size());
    let tensor = |x: Vec<f64>, size: &[i64]| Tensor::from_slice(&x).reshape(size);
    Results {
        out: tensor(out, &q_size),
        lse: tensor(lse, &q_size[..3]),
        dq: tensor(dq, &q_size),
        dk: tensor(dk, &k_size),
        dv: tensor(dv, &k_size),
    }
}

/// A sum of products with the rounding errors added back, so that the truth for float64 is better than float64.
pub fn dot(a: &[f64], b: &[f64]) -> f64 {
    let (mut sum, mut lost) = (0.0f64, 0.0f64);
    for (a, b) in a.iter().zip(b) {
        let product = a * b;
        let next = sum + product;
        let kept = next - sum;
        lost += a.mul_add(*b, -product) + (sum - (next - kept)) + (product - kept);
        sum = next;
    }
    // Infinities make the correction NaN.
    if lost.is_finite() { sum + lost } else { sum }
}

pub fn numbers(x: &Tensor) -> Vec<f64> {
    Vec::try_from(x.detach().to_device(Device::Cpu).to_kind(Kind::Double).contiguous().view(-1)).unwrap()
}
