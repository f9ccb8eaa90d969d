//! Vectors computed by the authors' reference implementation: see tests/golden/README.md.

use std::fs;

use safetensors::SafeTensors;
use tch::{Device, IndexOp, Kind, Tensor};
use tch_moba::{Packed, moba_attention_varlen, moba_attention_with_lse, route, routed_attention};

use crate::{
    gate,
    kit::{Case, Inputs, KINDS, Results, assert_within, devices, golden_dir, gradients, largest, max_error, ulp},
    naive, oracle,
};

const FILES: [&str; 6] = [
    "mha_d32_b16_k3",
    "mha_d64_b32_k2_tail",
    "gqa4_d16_b16_k4",
    "varlen_d32_b32_k3",
    "topk1_own_block_only",
    "topk_ge_blocks_is_full",
];

struct Golden {
    name: &'static str,
    block_size: i64,
    top_k: i64,
    cu_seqlens: Vec<i32>,
    tensors: Vec<(String, Tensor)>,
}

/// Inputs, and the reference's out, dq, dk and dv.
type Problem = (Case, Inputs, [(&'static str, Tensor); 4]);

impl Golden {
    fn read(name: &'static str) -> Self {
        let path = golden_dir().join(name).with_extension("safetensors");
        let bytes = fs::read(&path).unwrap();
        let (_, header) = SafeTensors::read_metadata(&bytes).unwrap();
        let metadata = header.metadata().clone().unwrap();
        let number = |key: &str| metadata[key].parse().unwrap();
        let tensors = Tensor::read_safetensors(&path).unwrap();
        let mut golden =
            Self { name, block_size: number("block_size"), top_k: number("top_k"), cu_seqlens: Vec::new(), tensors };
        golden.cu_seqlens = Vec::try_from(golden.get("cu_seqlens")).unwrap();
        golden
    }

    fn get(&self, name: &str) -> &Tensor {
        &self.tensors.iter().find(|(key, _)| key == name).unwrap().1
    }

    /// One sequence of a packed tensor in the dense layout, `[1, heads, seqlen, head_dim]`.
    fn dense(&self, name: &str, sequence: usize) -> Tensor {
        let range = i64::from(self.cu_seqlens[sequence])..i64::from(self.cu_seqlens[sequence + 1]);
        self.get(name).i(range).transpose(0, 1).unsqueeze(0)
    }

    /// Every sequence as a dense problem, with the reference's results.
    fn problems(&self) -> Vec<Problem> {
        let problem = |n: usize| {
            let [q, k, v, dout] = ["q", "k", "v", "grad_out"].map(|name| self.dense(name, n));
            let (q_size, k_size) = (q.size(), k.size());
            let case =
                Case { batch: 1, heads: q_size[1], heads_k: k_size[1], seqlen_q: q_size[2], ..self.shape(&k_size) };
            let dlse = Tensor::zeros(&q_size[..3], (Kind::Float, Device::Cpu));
            let expected = ["out", "dq", "dk", "dv"].map(|name| (name, self.dense(name, n)));
            (case, Inputs { q, k, v, dout, dlse }, expected)
        };
        (0..self.cu_seqlens.len() - 1).map(problem).collect()
    }

    fn shape(&self, k: &[i64]) -> Case {
        Case::new(k[2], k[3], self.block_size, self.top_k)
    }
}

fn get<'a>(results: &'a Results, name: &str) -> &'a Tensor {
    results.named().into_iter().find(|(key, _)| *key == name).unwrap().1
}

fn scale(case: &Case) -> f64 {
    (case.head_dim as f64).powf(-0.5)
}

#[test]
fn the_oracle_agrees() {
    for golden in FILES.map(Golden::read) {
        for (n, (case, inputs, expected)) in golden.problems().into_iter().enumerate() {
            let results = oracle::attend(&case, &inputs, &gate::route(&case, &inputs.q, &inputs.k), scale(&case));
            for (name, expected) in expected {
                // Sums of up to 150 float32 products, each rounded.
                let allowed = 16.0 * ulp(Kind::Float, largest(&expected));
                assert_within(&format!("{} {n} {name}", golden.name), get(&results, name), &expected, allowed);
            }
        }
    }
}

/// A problem of a golden file with the plain implementation's results and the oracle's.
struct Measured {
    case: Case,
    inputs: Inputs,
    expected: [(&'static str, Tensor); 4],
    chosen: Tensor,
    plain: Results,
    truth: Results,
}

impl Golden {
    /// `choose` gives the routing of the float32 inputs on `device`; the plain implementation runs in `kind`.
    fn measure(&self, kind: Kind, device: Device, choose: impl Fn(&Case, &Inputs) -> Tensor) -> Vec<Measured> {
        let measured = |(case, inputs, expected): Problem| {
            let chosen = choose(&case, &inputs.to(Kind::Float, device));
            let truth = oracle::attend(&case, &inputs, &chosen, scale(&case));
            let plain = naive::attend(&case, &inputs.to(kind, device), &chosen, scale(&case));
            Measured { case, inputs, expected, chosen, plain, truth }
        };
        self.problems().into_iter().map(measured).collect()
    }
}

/// How far from the golden results ours may lie: both are rounded, so both differ from the truth, ours by at most twice
/// the error of a plain implementation, the golden ones by what the oracle says. The sequences of a file are one result:
/// the gradients of a sequence of one token are zero, and say nothing of the size of rounding errors.
fn allowed(name: &str, kind: Kind, problems: &[Measured]) -> f64 {
    let over_all = |f: &dyn Fn(&Measured) -> f64| problems.iter().map(f).fold(0.0, f64::max);
    let golden = |m: &Measured| m.expected.iter().find(|(key, _)| *key == name).unwrap().1.shallow_clone();
    2.0 * over_all(&|m| max_error(&name, get(&m.plain, name), get(&m.truth, name)))
        + ulp(kind, over_all(&|m| largest(get(&m.truth, name))))
        + over_all(&|m| max_error(&name, &golden(m), get(&m.truth, name)))
}

#[test]
fn dense_and_packed_float32() {
    for device in devices() {
        for golden in FILES.map(Golden::read) {
            let config = Case::new(1, 1, golden.block_size, golden.top_k).config();
            let cu_seqlens = golden.get("cu_seqlens").to_device(device);
            let longest = golden.cu_seqlens.windows(2).map(|w| i64::from(w[1] - w[0])).max().unwrap();
            let packed = Packed {
                cu_seqlens_q: &cu_seqlens,
                cu_seqlens_k: &cu_seqlens,
                max_seqlen_q: longest,
                max_seqlen_k: longest,
            };
            let [q, k, v] = ["q", "k", "v"].map(|name| golden.get(name).to_device(device).set_requires_grad(true));
            let (out, _) = moba_attention_varlen(&q, &k, &v, &packed, &config).unwrap();
            let [dq, dk, dv] = gradients(&[&out], &[&golden.get("grad_out").to_device(device)], &[&q, &k, &v]);
            let packed = [("out", out), ("dq", dq), ("dk", dk), ("dv", dv)];
            let problems =
                golden.measure(Kind::Float, device, |case, x| gate::route(case, &x.q, &x.k).to_device(device));
            for (n, Measured { inputs, expected, .. }) in problems.iter().enumerate() {
                let on_device = inputs.to(Kind::Float, device);
                let dense = Results::of(&on_device, |q, k, v| moba_attention_with_lse(q, k, v, &config).unwrap());
                let range = i64::from(golden.cu_seqlens[n])..i64::from(golden.cu_seqlens[n + 1]);
                for ((name, expected), (_, packed)) in expected.iter().zip(&packed) {
                    let what = format!("{} {n} {name} on {device:?}", golden.name);
                    let allowed = allowed(name, Kind::Float, &problems);
                    assert_within(&what, get(&dense, name), expected, allowed);
                    let packed = packed.i(range.clone()).transpose(0, 1).unsqueeze(0);
                    assert_within(&format!("{what}, packed"), &packed, expected, allowed);
                }
            }
        }
    }
}

/// The other dtypes, given the routing of the float32 inputs, which rounding the inputs may change: as near to the
/// golden results as a plain implementation in that dtype comes.
#[test]
fn other_dtypes_given_the_routing() {
    for device in devices() {
        for golden in FILES.map(Golden::read) {
            for kind in KINDS.into_iter().filter(|&kind| kind != Kind::Float) {
                let problems = golden.measure(kind, device, |case, x| route(&x.q, &x.k, &case.config()).unwrap());
                for (n, Measured { case, inputs, expected, chosen, .. }) in problems.iter().enumerate() {
                    let (inputs, config) = (inputs.to(kind, device), case.config());
                    let ours = Results::of(&inputs, |q, k, v| routed_attention(q, k, v, chosen, &config).unwrap());
                    for (name, expected) in expected {
                        let what = format!("{} {n} {name} {kind:?} on {device:?}", golden.name);
                        assert_within(&what, get(&ours, name), expected, allowed(name, kind, &problems));
                    }
                }
            }
        }
    }
}
