//! Is the answer right? Sampled rows of the output, of the gradients and of the routing are recomputed in float64.

use std::fmt;

use anyhow::Result;
use tch::{Kind, Tensor};
use tch_moba::{MobaConfig, moba_attention_with_lse, route};

use crate::{contender::Contender, data::Inputs};

/// Sampled positions, spread over the sequence.
const SAMPLES: i64 = 8;

/// Relative errors of the sampled rows, ||x - reference|| / ||reference||, and what they are errors of.
pub struct Errors(Vec<(&'static str, f64)>);

impl fmt::Display for Errors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let parts: Vec<String> = self.0.iter().map(|(what, error)| format!("{what} {error:.1e}")).collect();
        f.write_str(&parts.join(", "))
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

/// Where a sample lies.
#[derive(Clone, Copy)]
struct Place {
    batch: i64,
    head: i64,
    position: i64,
}

impl Place {
    fn sample(number: i64, batch: i64, heads: i64, seqlen: i64) -> Self {
        Self { batch: number % batch, head: (number * 3 + 1) % heads, position: (seqlen - 1) * number / (SAMPLES - 1) }
    }

    /// All rows of a head.
    fn head(self, tensor: &Tensor) -> Tensor {
        tensor.get(self.batch).get(self.head)
    }

    fn row(self, tensor: &Tensor) -> Tensor {
        self.head(tensor).get(self.position)
    }
}

pub fn check(contender: &Contender, inputs: &Inputs) -> Result<Errors> {
    let (out, [dq, dk, dv]) = contender.forward_backward(inputs)?;
    let chosen = match contender.config {
        Some(config) => Some((config, route(&inputs.q, &inputs.k, &config)?)),
        None => None,
    };
    let mut errors = query_errors(inputs, chosen.as_ref(), &out, &dq)?;
    if let Some((config, route)) = &chosen {
        errors.extend(key_errors(inputs, config, route, &dk, &dv)?);
    }
    let (errors, bound) = (Errors(errors), tolerance(inputs.q.kind()));
    // NaN is no agreement either.
    if errors.0.iter().all(|&(_, error)| error <= bound) {
        return Ok(errors);
    }
    Err(Disagreement(format!("{contender} disagrees with float64: {errors}, wanted at most {bound:.0e}")).into())
}

/// Of the output and dq of sampled queries.
fn query_errors(
    inputs: &Inputs,
    chosen: Option<&(MobaConfig, Tensor)>,
    out: &Tensor,
    dq: &Tensor,
) -> Result<Vec<(&'static str, f64)>> {
    let (batch, heads, seqlen, _) = inputs.q.size4()?;
    let group = heads / inputs.k.size()[1];
    let mut rows: [Vec<Tensor>; 4] = Default::default();
    for number in 0..SAMPLES {
        let place = Place::sample(number, batch, heads, seqlen);
        let place_k = Place { head: place.head / group, ..place };
        let (query, keys, i) = (place.row(&inputs.q), place_k.head(&inputs.k), place.position);
        let tokens = match chosen {
            Some((config, route)) => {
                let blocks = Vec::<i64>::try_from(place.row(route).to_kind(Kind::Int64))?;
                check_route(&query, &keys, i, &blocks, config)?;
                blocks.iter().filter(|&&block| block >= 0).flat_map(|&block| tokens_of(block, i, config)).collect()
            }
            None => (0..=i).collect::<Vec<_>>(),
        };
        let tokens = Tensor::from_slice(&tokens).to_device(query.device());
        let [keys, values] =
            [keys, place_k.head(&inputs.v)].map(|all| all.index_select(0, &tokens).to_kind(Kind::Double));
        let (expected, expected_dq) = attend(&query.to_kind(Kind::Double), &keys, &values)?;
        let row = [place.row(out), expected, place.row(dq), expected_dq];
        rows.iter_mut().zip(row).for_each(|(rows, row)| rows.push(row.to_kind(Kind::Double)));
    }
    let [out, expected, dq, expected_dq] = rows.map(|rows| Tensor::stack(&rows, 0));
    Ok(vec![("out", relative(&out, &expected)), ("dq", relative(&dq, &expected_dq))])
}

/// Of dk and dv of sampled keys of MoBA: what every query that selected the key's block adds to them.
fn key_errors(
    inputs: &Inputs,
    config: &MobaConfig,
    route: &Tensor,
    dk: &Tensor,
    dv: &Tensor,
) -> Result<Vec<(&'static str, f64)>> {
    let (batch, heads, seqlen, head_dim) = inputs.q.size4()?;
    let heads_k = inputs.k.size()[1];
    let (out, lse) = tch::no_grad(|| moba_attention_with_lse(&inputs.q, &inputs.k, &inputs.v, config))?;
    let scale = config.softmax_scale().unwrap_or((head_dim as f64).powf(-0.5));
    let positions = Tensor::arange(seqlen, (Kind::Int64, inputs.q.device()));
    let mut rows: [Vec<Tensor>; 4] = Default::default();
    for number in 0..SAMPLES {
        let place_k = Place::sample(number, batch, heads_k, seqlen);
        let [key, value] = [&inputs.k, &inputs.v].map(|tensor| place_k.row(tensor).to_kind(Kind::Double));
        let (mut expected_dk, mut expected_dv) = (key.zeros_like(), value.zeros_like());
        let group = heads / heads_k;
        for head in place_k.head * group..(place_k.head + 1) * group {
            let place = Place { head, ..place_k };
            let [q, out, lse] = [&inputs.q, &out, &lse].map(|tensor| place.head(tensor).to_kind(Kind::Double));
            let selects = place.head(route).eq(place.position / config.block_size()).any_dim(-1, false);
            let sees = selects.logical_and(&positions.ge(place.position)).to_kind(Kind::Double);
            let weights = (q.matmul(&key) * scale - lse).exp() * sees;
            // For an output gradient of ones: dP_ij is the sum of v_j, delta_i that of out_i.
            let delta = out.sum_dim_intlist(-1, false, Kind::Double);
            let ds = &weights * (value.sum(Kind::Double) - delta);
            expected_dk += ds.matmul(&q) * scale;
            expected_dv += weights.sum(Kind::Double);
        }
        let row = [place_k.row(dk), expected_dk, place_k.row(dv), expected_dv];
        rows.iter_mut().zip(row).for_each(|(rows, row)| rows.push(row.to_kind(Kind::Double)));
    }
    let [dk, expected_dk, dv, expected_dv] = rows.map(|rows| Tensor::stack(&rows, 0));
    Ok(vec![("dk", relative(&dk, &expected_dk)), ("dv", relative(&dv, &expected_dv))])
}

fn relative(x: &Tensor, reference: &Tensor) -> f64 {
    (x - reference).norm().double_value(&[]) / reference.norm().double_value(&[])
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
