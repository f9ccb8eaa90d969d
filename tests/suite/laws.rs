//! Laws that hold for every input, tried on random problems.

use proptest::{prelude::*, test_runner::Config};
use rand::{SeedableRng, rngs::StdRng};
use tch::{IndexOp, Kind, Tensor};
use tch_moba::{
    MobaConfig, Packed, full_attention, moba_attention_varlen, moba_attention_with_lse, route, routed_attention,
};

use crate::kit::{
    Case, Inputs, KINDS, Results, assert_rounding, assert_same_bits, devices, gradients, leaf, max_error, normal,
    small, ulp,
};

prop_compose! {
    fn case()(
        batch in 1i64..3,
        heads_k in 1i64..4,
        group in 1i64..4,
        seqlen_k in 1i64..80,
        head_dim in 1i64..24,
        block_size in 1i64..24,
        top_k in 1i64..7,
        queries in 0.0f64..1.3,
    ) -> Case {
        // About a quarter of the cases have as many queries as keys.
        let seqlen_q = ((seqlen_k as f64 * queries).ceil() as i64).clamp(1, seqlen_k);
        Case { batch, heads: heads_k * group, heads_k, seqlen_q, seqlen_k, head_dim, block_size, top_k }
    }
}

/// The same problems in every run: a failure must be there again tomorrow.
fn config(cases: u32) -> Config {
    let rng_seed = proptest::test_runner::RngSeed::Fixed(2502_13189);
    Config { cases: if small() { 4 } else { cases }, failure_persistence: None, rng_seed, ..Config::default() }
}

fn moba(case: &Case, inputs: &Inputs) -> Results {
    let config = case.config().with_deterministic(true);
    Results::of(inputs, |q, k, v| moba_attention_with_lse(q, k, v, &config).unwrap())
}

/// For laws that hold up to the order of summation: float64, where no wrong term is as small as rounding.
fn assert_equal(what: &str, a: &Results, b: &Results) {
    for ((name, a), (_, b)) in a.named().iter().zip(b.named()) {
        assert_rounding(&format!("{name}: {what}"), a, b);
    }
}

proptest! {
    #![proptest_config(config(40))]

    #[test]
    fn the_future_cannot_leak(case in case(), seed: u64, at: prop::sample::Index, kind in 0usize..4) {
        for device in devices() {
            let kind = KINDS[kind];
            let (first, from) = (case.seqlen_k - case.seqlen_q, at.index(case.seqlen_k as usize) as i64);
            let past = (from - first).max(0);
            let inputs = case.inputs(seed, kind, device);
            let clean = moba(&case, &inputs);
            for poison in [f64::NAN, f64::INFINITY, 3.0] {
                let spoil = |x: &Tensor, from: i64| {
                    let x = x.copy();
                    let _ = x.i((.., .., from..)).fill_(poison);
                    x
                };
                let spoilt = Inputs {
                    q: spoil(&inputs.q, past),
                    k: spoil(&inputs.k, from),
                    v: spoil(&inputs.v, from),
                    dout: spoil(&inputs.dout, past),
                    dlse: spoil(&inputs.dlse, past),
                };
                let spoilt = moba(&case, &spoilt);
                for (name, a, b) in [("out", &clean.out, &spoilt.out), ("lse", &clean.lse, &spoilt.lse), ("dq", &clean.dq, &spoilt.dq)] {
                    let what = format!("{name} before token {from} after {poison} from there on, {kind:?} on {device:?}");
                    assert_rounding(&what, &a.narrow(2, 0, past), &b.narrow(2, 0, past));
                }
            }
        }
    }

    #[test]
    fn all_blocks_are_full_attention(case in case(), seed: u64) {
        for device in devices() {
            let case = Case { top_k: case.blocks() + case.top_k - 1, ..case };
            let inputs = case.inputs(seed, Kind::Double, device);
            let ours = moba(&case, &inputs);
            let full = full_attention(&inputs.q, &inputs.k, &inputs.v, None).unwrap();
            assert_rounding(&"out", &ours.out, &full);
        }
    }

    #[test]
    fn grouped_heads_are_repeated_heads(case in case(), seed: u64) {
        for device in devices() {
            let inputs = case.inputs(seed, Kind::Double, device);
            let group = case.heads / case.heads_k;
            let config = case.config();
            let grouped = Results::of(&inputs, |q, k, v| moba_attention_with_lse(q, k, v, &config).unwrap());
            let repeated = Results::of(&inputs, |q, k, v| {
                let [k, v] = [k, v].map(|x| x.repeat_interleave_self_int(group, 1, None));
                moba_attention_with_lse(q, &k, &v, &config).unwrap()
            });
            assert_equal("grouped and repeated", &grouped, &repeated);
        }
    }

    #[test]
    fn constant_values_come_out(case in case(), seed: u64, value in -100.0f64..100.0, kind in 0usize..4) {
        for device in devices() {
            let kind = KINDS[kind];
            let inputs = case.inputs(seed, kind, device);
            let v = inputs.v.full_like(value);
            let out = moba_attention_with_lse(&inputs.q, &inputs.k, &v, &case.config()).unwrap().0;
            let wanted = inputs.q.full_like(value);
            // In float32 the weights of n keys sum to 1 up to n roundings; the result is rounded once more.
            let sum = case.seqlen_k as f64 * ulp(if kind == Kind::Double { Kind::Double } else { Kind::Float }, value.abs());
            let error = max_error(&"out", &out, &wanted.to_kind(Kind::Double));
            prop_assert!(error <= sum + ulp(kind, value.abs()), "{error:e} for {value} {kind:?} on {device:?}");
        }
    }

    #[test]
    fn parts_merged_by_lse_are_the_whole(case in case(), seed: u64) {
        for device in devices() {
            let inputs = case.inputs(seed, Kind::Double, device);
            let config = case.config();
            let chosen = route(&inputs.q, &inputs.k, &config).unwrap();
            let odd = Tensor::arange(case.top_k, (Kind::Int, device)).remainder(2).to_kind(Kind::Bool);
            let halves = [chosen.masked_fill(&odd, -1), chosen.masked_fill(&odd.logical_not(), -1)];
            let whole = Results::of(&inputs, |q, k, v| routed_attention(q, k, v, &chosen, &config).unwrap());
            let merged = Results::of(&inputs, |q, k, v| {
                let [(out_a, lse_a), (out_b, lse_b)] =
                    halves.each_ref().map(|part| routed_attention(q, k, v, part, &config).unwrap());
                let lse = lse_a.logaddexp(&lse_b);
                let weight = |part: &Tensor| (part - &lse).exp().unsqueeze(-1);
                (out_a * weight(&lse_a) + out_b * weight(&lse_b), lse)
            });
            assert_equal("merged and whole", &merged, &whole);
        }
    }

    #[test]
    fn runs_repeat_bit_for_bit(case in case(), seed: u64, kind in 0usize..4) {
        for device in devices() {
            let inputs = case.inputs(seed, KINDS[kind], device);
            let first = moba(&case, &inputs);
            for _ in 0..3 {
                for ((name, a), (_, b)) in first.named().iter().zip(moba(&case, &inputs).named()) {
                    assert_same_bits(&format!("{name} on {device:?}"), a, b);
                }
            }
            let fast = moba_attention_with_lse(&inputs.q, &inputs.k, &inputs.v, &case.config()).unwrap();
            assert_same_bits(&"out, not asked to be deterministic", &fast.0, &first.out);
            assert_same_bits(&"lse, not asked to be deterministic", &fast.1, &first.lse);
        }
    }

    #[test]
    fn batch_and_heads_are_independent(case in case(), seed: u64) {
        for device in devices() {
            let inputs = case.inputs(seed, Kind::Float, device);
            let backwards = |n: i64| Tensor::arange_start_step(n - 1, -1, -1, (Kind::Int64, device));
            // Key heads in reverse order, each taking its group of query heads along.
            let group = case.heads / case.heads_k;
            let key_heads = backwards(case.heads_k);
            let within = Tensor::arange(group, (Kind::Int64, device));
            let heads = (key_heads.unsqueeze(-1) * group + within).view(-1);
            let swap = |x: &Tensor| {
                let by = if x.size()[1] == case.heads { &heads } else { &key_heads };
                x.index_select(0, &backwards(case.batch)).index_select(1, by)
            };
            let [q, k, v, dout, dlse] = [&inputs.q, &inputs.k, &inputs.v, &inputs.dout, &inputs.dlse].map(swap);
            let swapped = moba(&case, &Inputs { q, k, v, dout, dlse });
            for ((name, a), (_, b)) in moba(&case, &inputs).named().iter().zip(swapped.named()) {
                assert_rounding(&format!("{name} on {device:?}"), &swap(a), b);
            }
        }
    }

    #[test]
    fn the_scale_is_a_factor_on_q(case in case(), seed: u64) {
        for device in devices() {
            let inputs = case.inputs(seed, Kind::Float, device);
            let by = |scale: f64, q: &Tensor| {
                let config = case.config().with_softmax_scale(scale).unwrap();
                moba_attention_with_lse(q, &inputs.k, &inputs.v, &config).unwrap()
            };
            // Powers of two, so that no product is rounded differently.
            let (a, b) = (by(0.5, &inputs.q), by(2.0, &(&inputs.q * 0.25)));
            assert_same_bits(&"out", &a.0, &b.0);
            assert_same_bits(&"lse", &a.1, &b.1);
        }
    }

    #[test]
    fn packed_is_a_loop_over_sequences(
        lengths in prop::collection::vec((0i64..40, 0i64..30), 1..6),
        shape in case(),
        seed: u64,
        kind in 0usize..4,
    ) {
        for device in devices() {
            packed_is_a_loop(&lengths, &shape, seed, KINDS[kind], device);
        }
    }
}

/// `lengths`: queries, and keys beyond those, of each sequence.
fn packed_is_a_loop(lengths: &[(i64, i64)], shape: &Case, seed: u64, kind: Kind, device: tch::Device) {
    let mut rng = StdRng::seed_from_u64(seed);
    let ends = |length: &dyn Fn(&(i64, i64)) -> i64| -> Vec<i64> {
        std::iter::once(0)
            .chain(lengths.iter().scan(0, |end, x| {
                *end += length(x);
                Some(*end)
            }))
            .collect()
    };
    let (ends_q, ends_k) = (ends(&|x| x.0), ends(&|x| x.0 + x.1));
    let longest = |ends: &[i64]| ends.windows(2).map(|w| w[1] - w[0]).max().unwrap();
    let (tokens_q, tokens_k, d) = (*ends_q.last().unwrap(), *ends_k.last().unwrap(), shape.head_dim);
    let mut random = |tokens, heads| normal(&mut rng, &[tokens, heads, d]).to_kind(kind).to_device(device);
    let (q, dout) = (leaf(&random(tokens_q, shape.heads)), random(tokens_q, shape.heads));
    let [k, v] = [0; 2].map(|_| leaf(&random(tokens_k, shape.heads_k)));
    let to_tensor = |ends: &[i64]| Tensor::from_slice(ends).to_kind(Kind::Int).to_device(device);
    let (cu_seqlens_q, cu_seqlens_k) = (to_tensor(&ends_q), to_tensor(&ends_k));
    let packed = Packed {
        cu_seqlens_q: &cu_seqlens_q,
        cu_seqlens_k: &cu_seqlens_k,
        max_seqlen_q: longest(&ends_q) + 3,
        max_seqlen_k: longest(&ends_k) + 5,
    };
    let config = MobaConfig::new(shape.block_size, shape.top_k).unwrap();
    let (out, lse) = moba_attention_varlen(&q, &k, &v, &packed, &config).unwrap();
    assert_eq!((out.size(), lse.size()), (q.size(), vec![shape.heads, tokens_q]));
    let [dq, dk, dv] = gradients(&[&out], &[&dout], &[&q, &k, &v]);
    for n in 0..lengths.len() {
        let dense = |x: &Tensor, ends: &[i64]| x.detach().i(ends[n]..ends[n + 1]).transpose(0, 1).unsqueeze(0);
        let [q, dout, out, dq] = [&q, &dout, &out, &dq].map(|x| dense(x, &ends_q));
        let [k, v, dk, dv] = [&k, &v, &dk, &dv].map(|x| dense(x, &ends_k));
        let lse = lse.i((.., ends_q[n]..ends_q[n + 1])).unsqueeze(0);
        let case = Case { batch: 1, seqlen_q: q.size()[2], seqlen_k: k.size()[2], ..*shape };
        let inputs = Inputs { dlse: lse.zeros_like(), q, k, v, dout };
        let single = moba(&case, &inputs);
        let ours = [("out", out), ("lse", lse), ("dq", dq), ("dk", dk), ("dv", dv)];
        for ((name, ours), (_, single)) in ours.iter().zip(single.named()) {
            assert_rounding(&format!("{name} of sequence {n}, {kind:?} on {device:?}"), ours, single);
        }
    }
}
