//! Is the answer right? Sampled rows of the output, of dq and of the routing are recomputed in float64.

use std::fmt;

use anyhow::Result;
use tch::{Kind, Tensor};
use tch_moba::{MobaConfig, route};

use crate::{contender::Contender, data::Inputs};

/// Sampled positions, spread over the sequence.
const SAMPLES: i64 = 8;

/// Relative errors of the sampled rows, ||x - reference|| / ||reference||.
pub struct Errors {
    out: f64,
    dq: f64,
}

impl fmt::Display for Errors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "out {:.1e}, dq {:.1e}", self.out, self.dq)
    }
}

/// A wrong answer, as opposed to a contender that does not take these tensors.
#[derive(Debug)]
pub struct Disagreement(String);

impl fmt::Display for Disagreement {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Disagreement {}

/// Far above rounding in each dtype, far below what one wrong block does.
fn tolerance(kind: Kind) -> f64 {
    match kind {
        Kind::Double => 1e-11,
        Kind::Float => 1e-4,
        Kind::Half => 5e-3,
        _ => 2e-2,
    }
}

pub fn check(contender: &Contender, inputs: &Inputs) -> Result<Errors> {
    let (out, [dq, _, _]) = contender.forward_backward(inputs)?;
    let chosen =
        contender.config.map(|config| route(&inputs.q, &inputs.k, &config).map(|route| (config, route))).transpose()?;
    let (batch, heads, seqlen, _) = inputs.q.size4()?;
    let group = heads / inputs.k.size()[1];
    let mut rows: [Vec<Tensor>; 4] = Default::default();
    for sample in 0..SAMPLES {
        let (b, h) = (sample % batch, (sample * 3 + 1) % heads);
        let i = (seqlen - 1) * sample / (SAMPLES - 1);
        let at = |tensor: &Tensor, head: i64| tensor.get(b).get(head).to_kind(Kind::Double);
        let query = inputs.q.get(b).get(h).get(i);
        let (keys, values) = (inputs.k.get(b).get(h / group), at(&inputs.v, h / group));
        let tokens = match &chosen {
            Some((config, route)) => {
                let blocks = Vec::<i64>::try_from(route.get(b).get(h).get(i).to_kind(Kind::Int64))?;
                check_route(&query, &keys, i, &blocks, config)?;
                blocks.iter().filter(|&&block| block >= 0).flat_map(|&block| tokens_of(block, i, config)).collect()
            }
            None => (0..=i).collect::<Vec<_>>(),
        };
        let tokens = Tensor::from_slice(&tokens).to_device(query.device());
        let [keys, values] = [keys.to_kind(Kind::Double), values].map(|tensor| tensor.index_select(0, &tokens));
        let (expected, expected_dq) = attend(&query.to_kind(Kind::Double), &keys, &values)?;
        let row = [at(&out, h).get(i), expected, at(&dq, h).get(i), expected_dq];
        rows.iter_mut().zip(row).for_each(|(rows, row)| rows.push(row));
    }
    let [out, expected, dq, expected_dq] = rows.map(|rows| Tensor::stack(&rows, 0));
    let relative =
        |x: &Tensor, reference: &Tensor| (x - reference).norm().double_value(&[]) / reference.norm().double_value(&[]);
    let errors = Errors { out: relative(&out, &expected), dq: relative(&dq, &expected_dq) };
    let bound = tolerance(inputs.q.kind());
    // NaN is no agreement either.
    if errors.out <= bound && errors.dq <= bound {
        return Ok(errors);
    }
    Err(Disagreement(format!("{contender} disagrees with float64: {errors}, wanted at most {bound:.0e}")).into())
}

fn tokens_of(block: i64, query: i64, config: &MobaConfig) -> impl Iterator<Item = i64> + use<> {
    let start = block * config.block_size();
    start..(start + config.block_size()).min(query + 1)
}

/// One query's output, and its gradient for an output gradient of ones.
fn attend(query: &Tensor, keys: &Tensor, values: &Tensor) -> Result<(Tensor, Tensor)> {
    let query = query.detach().set_requires_grad(true);
    let scale = (query.size()[0] as f64).powf(-0.5);
    let out = (keys.matmul(&query) * scale).softmax(0, Kind::Double).unsqueeze(0).matmul(values).squeeze_dim(0);
    let gradients = Tensor::f_run_backward(&[&out], &[&query], false, false)?;
    Ok((out.detach(), gradients[0].shallow_clone()))
}

/// The current block first, then the best complete blocks before it, near-ties apart.
fn check_route(query: &Tensor, keys: &Tensor, i: i64, blocks: &[i64], config: &MobaConfig) -> Result<()> {
    let (size, head_dim) = (config.block_size(), keys.size()[1]);
    let current = i / size;
    let wanted = (config.top_k() - 1).min(current);
    let mut others: Vec<i64> = blocks[1..].iter().copied().filter(|&block| block >= 0).collect();
    others.sort_unstable();
    others.dedup();
    let wrong =
        |reason: String| Err(Disagreement(format!("query {i} at {config} selects {blocks:?}: {reason}")).into());
    if blocks[0] != current || others.len() as i64 != wanted || others.iter().any(|&block| block >= current) {
        return wrong(format!("wanted {current} and {wanted} distinct blocks before it"));
    }
    if wanted == 0 || wanted == current {
        return Ok(());
    }
    let sums = if keys.kind() == Kind::Double { Kind::Double } else { Kind::Float };
    let means = keys.narrow(0, 0, current * size).view([current, size, head_dim]).mean_dim(1, false, sums);
    // The contract rounds the means to the dtype of the keys.
    let means = means.to_kind(keys.kind()).to_kind(Kind::Double);
    let query = query.to_kind(Kind::Double);
    let scores = Vec::<f64>::try_from(means.matmul(&query))?;
    let longest = means.square().sum_dim_intlist(1, false, None::<Kind>).max().sqrt().double_value(&[]);
    let tie = 4e-6 * query.norm().double_value(&[]) * longest;
    let (mut worst_in, mut best_out) = (f64::INFINITY, f64::NEG_INFINITY);
    for (block, &score) in (0..).zip(&scores) {
        match others.binary_search(&block) {
            Ok(_) => worst_in = worst_in.min(score),
            Err(_) => best_out = best_out.max(score),
        }
    }
    if worst_in < best_out - tie {
        return wrong(format!("a selected block scores {worst_in}, one left out {best_out}"));
    }
    Ok(())
}
