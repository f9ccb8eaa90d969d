//! The corners of the contract (docs: semantics, last table); wrong arguments are in errors.rs.

use tch::{Device, IndexOp, Kind, Tensor};
use tch_moba::{
    Packed, full_attention, moba_attention, moba_attention_varlen, moba_attention_with_lse, route, routed_attention,
};

use crate::{
    kit::{
        Case, Inputs, KINDS, Results, assert_rounding, assert_same_bits, devices, gradients, largest, leaf, max_error,
    },
    naive::{self, assert_as_good},
};

/// `out` and gradients of full attention in the dtype of the inputs.
fn full(inputs: &Inputs) -> [Tensor; 4] {
    let [q, k, v] = inputs.leaves();
    let out = full_attention(&q, &k, &v, None).unwrap();
    let [dq, dk, dv] = gradients(&[&out], &[&inputs.dout], &[&q, &k, &v]);
    [out, dq, dk, dv]
}

fn moba(inputs: &Inputs, case: &Case) -> [Tensor; 4] {
    let [q, k, v] = inputs.leaves();
    let out = moba_attention(&q, &k, &v, &case.config()).unwrap();
    let [dq, dk, dv] = gradients(&[&out], &[&inputs.dout], &[&q, &k, &v]);
    [out, dq, dk, dv]
}

fn assert_like_full(what: &str, ours: &[Tensor; 4], full: &[Tensor; 4]) {
    for ((name, ours), full) in ["out", "dq", "dk", "dv"].iter().zip(ours).zip(full) {
        assert_rounding(&format!("{name}, {what}"), ours, &full.to_kind(ours.kind()).to_device(ours.device()));
    }
}

#[test]
fn all_blocks_selected_is_full_attention() {
    let cases = [
        ("top_k = blocks", Case::new(130, 32, 16, 9).heads(4, 2)),
        ("top_k > blocks", Case::new(65, 16, 32, 100)),
        ("block_size = seqlen", Case::new(64, 16, 64, 1)),
        ("block_size > seqlen", Case::new(63, 16, 512, 3)),
        ("fewer queries", Case::new(90, 16, 16, 6).queries(33).heads(4, 1)),
        ("the largest block_size", Case::new(50, 64, i64::MAX, 3)),
        ("nearly the largest block_size", Case::new(50, 16, i64::MAX - 40, 1)),
    ];
    for device in devices() {
        for kind in KINDS {
            for (n, (name, case)) in cases.iter().enumerate() {
                let inputs = case.inputs(n as u64, kind, device);
                let what = format!("{name} {kind:?} on {device:?}");
                let double = full(&inputs.to(Kind::Double, Device::Cpu));
                assert_like_full(&what, &moba(&inputs, case), &double);
            }
        }
    }
}

#[test]
fn one_token_attends_to_itself() {
    for device in devices() {
        for kind in KINDS {
            let case = Case::new(1, 16, 512, 3).heads(4, 4);
            let x = case.inputs(2, kind, device);
            let [out, dq, dk, dv] = moba(&x, &case);
            assert_same_bits(&"out", &out, &x.v);
            assert_same_bits(&"dv", &dv, &x.dout);
            // The probability is 1 whatever q and k are; what is left is the rounding of sums of 16 products.
            assert!(largest(&dq).max(largest(&dk)) <= 1e-5, "{kind:?} on {device:?}");
        }
    }
}

#[test]
fn top_k_1_is_attention_inside_the_current_block() {
    for device in devices() {
        let case = Case::new(75, 16, 20, 1);
        let inputs = case.inputs(3, Kind::Float, device);
        let part = |x: &Tensor, start: i64| x.narrow(2, start, 20.min(75 - start)).contiguous();
        let by_block = |inputs: &Inputs| {
            let parts: Vec<[Tensor; 4]> = (0..75)
                .step_by(20)
                .map(|start| {
                    let [q, k, v, dout] = [&inputs.q, &inputs.k, &inputs.v, &inputs.dout].map(|x| part(x, start));
                    full(&Inputs { q, k, v, dout, dlse: inputs.dlse.shallow_clone() })
                })
                .collect();
            std::array::from_fn(|n| Tensor::cat(&parts.iter().map(|p| &p[n]).collect::<Vec<_>>(), 2))
        };
        let double = by_block(&inputs.to(Kind::Double, Device::Cpu));
        assert_like_full(&format!("{device:?}"), &moba(&inputs, &case), &double);
    }
}

#[test]
fn nothing_in_nothing_out() {
    for device in devices() {
        for kind in KINDS {
            for case in [
                Case::new(0, 16, 8, 2),
                Case::new(20, 16, 8, 2).batch(0),
                Case::new(20, 16, 8, 2).queries(0),
                Case::new(0, 16, 8, 2).batch(0),
            ] {
                let inputs = case.inputs(1, kind, device);
                let results = Results::of(&inputs, |q, k, v| moba_attention_with_lse(q, k, v, &case.config()).unwrap());
                let wanted = [&inputs.q, &inputs.dlse, &inputs.q, &inputs.k, &inputs.v];
                for ((name, x), wanted) in results.named().iter().zip(wanted) {
                    assert_eq!((x.size(), x.kind()), (wanted.size(), wanted.kind()), "{name} of {case:?}");
                    assert_eq!(max_error(name, x, &x.zeros_like()), 0.0, "{name} of {case:?}");
                }
                let chosen = route(&inputs.q, &inputs.k, &case.config()).unwrap();
                assert_eq!(chosen.size(), [case.batch, 2, case.seqlen_q, 2]);
            }
        }
    }
}

#[test]
fn empty_sequences_in_a_packed_batch() {
    for device in devices() {
        let case = Case::new(30, 16, 8, 2);
        let inputs = case.inputs(2, Kind::Float, device);
        let pack = |x: &Tensor| leaf(&x.squeeze_dim(0).transpose(0, 1));
        let config = case.config();
        let run = |cu: &[i32], keep: i64| {
            let [q, k, v] = [&inputs.q, &inputs.k, &inputs.v].map(|x| leaf(&pack(x).narrow(0, 0, keep)));
            let cu = Tensor::from_slice(cu).to_device(device);
            let packed = Packed { cu_seqlens_q: &cu, cu_seqlens_k: &cu, max_seqlen_q: 30, max_seqlen_k: 30 };
            let (out, lse) = moba_attention_varlen(&q, &k, &v, &packed, &config).unwrap();
            let [dq, dk, dv] = gradients(&[&out], &[&out.ones_like()], &[&q, &k, &v]);
            [out, lse, dq, dk, dv]
        };
        let plain = run(&[0, 11, 30], 30);
        for cu in [&[0, 0, 11, 30][..], &[0, 11, 11, 11, 30], &[0, 11, 30, 30, 30], &[0, 0, 0, 11, 11, 30, 30]] {
            for (n, (a, b)) in run(cu, 30).iter().zip(&plain).enumerate() {
                // Not bit for bit in the gradients, which may be summed in another order.
                assert!(max_error(&n, a, &b.to_kind(Kind::Double)) <= 1e-6, "{cu:?} on {device:?}, result {n}");
            }
        }
        for cu in [&[0][..], &[0, 0], &[0, 0, 0]] {
            let [out, lse, dq, dk, dv] = run(cu, 0);
            assert_eq!((out.size(), lse.size()), (vec![0, 2, 16], vec![2, 0]), "{cu:?}");
            assert!([dq, dk, dv].iter().all(|x| x.size() == [0, 2, 16]));
        }
    }
}

/// One long sequence among many short ones, in blocks that hold the long one: each is as if it were alone.
#[test]
fn sequences_of_very_different_lengths() {
    for device in devices() {
        for (kind, block_size, top_k) in [(Kind::Double, 1500, 1), (Kind::BFloat16, 1504, 1), (Kind::BFloat16, 192, 3)]
        {
            let lengths: Vec<i64> = (0..30).map(|i| i % 7).chain([1500]).chain((0..30).map(|i| 7 - i % 8)).collect();
            let mut ends = vec![0i32];
            ends.extend(lengths.iter().scan(0, |sum, length| {
                *sum += *length as i32;
                Some(*sum)
            }));
            let case = Case::new(lengths.iter().sum(), 64, block_size, top_k).heads(4, 2);
            let inputs = case.inputs(4, kind, device);
            let config = case.config();
            let [q, k, v, dout] =
                [&inputs.q, &inputs.k, &inputs.v, &inputs.dout].map(|x| leaf(&x.i(0).transpose(0, 1)));
            let cu = Tensor::from_slice(&ends).to_device(device);
            let packed = Packed { cu_seqlens_q: &cu, cu_seqlens_k: &cu, max_seqlen_q: 1500, max_seqlen_k: 1500 };
            let (out, _) = moba_attention_varlen(&q, &k, &v, &packed, &config).unwrap();
            let [dq, dk, dv] = gradients(&[&out], &[&dout], &[&q, &k, &v]);
            for (n, &length) in lengths.iter().enumerate().filter(|(_, length)| **length > 0) {
                let own = |x: &Tensor| x.narrow(2, ends[n] as i64, length);
                let alone = moba(&inputs.map(|x| own(x)), &case);
                for ((name, x), alone) in ["out", "dq", "dk", "dv"].iter().zip([&out, &dq, &dk, &dv]).zip(&alone) {
                    let x = own(&x.transpose(0, 1).unsqueeze(0));
                    assert_rounding(
                        &format!("{name} of sequence {n}, {length} tokens, {case:?} {kind:?} on {device:?}"),
                        &x,
                        alone,
                    );
                }
            }
        }
    }
}

/// A packed sequence may have keys but no query: its keys get zero gradients.
#[test]
fn a_sequence_of_keys_only() {
    for device in devices() {
        let [q, k, v] = Case::new(20, 8, 8, 2).queries(12).inputs(3, Kind::Double, device).leaves();
        let [q, k, v] = [q, k, v].map(|x| leaf(&x.squeeze_dim(0).transpose(0, 1)));
        let [cu_q, cu_k] = [[0i32, 5, 5, 12], [0, 5, 9, 20]].map(|x| Tensor::from_slice(&x).to_device(device));
        let packed = Packed { cu_seqlens_q: &cu_q, cu_seqlens_k: &cu_k, max_seqlen_q: 7, max_seqlen_k: 11 };
        let (out, _) = moba_attention_varlen(&q, &k, &v, &packed, &Case::new(1, 8, 8, 2).config()).unwrap();
        let [dk, dv] = gradients(&[&out], &[&out.ones_like()], &[&k, &v]);
        for x in [dk, dv] {
            assert_eq!(largest(&x.i(5..9)), 0.0);
            assert!(largest(&x.i(0..5)) > 0.0 && largest(&x.i(9..20)) > 0.0);
        }
    }
}

/// Keys of block 0 point away from every later query, so only block 0's own queries reach it.
#[test]
fn a_block_no_query_chose() {
    for device in devices() {
        for kind in KINDS {
            let case = Case::new(64, 16, 16, 2);
            let mut inputs = case.inputs(4, kind, device);
            inputs.q = inputs.q.abs();
            inputs.k = Tensor::cat(&[-inputs.k.i((.., .., 0..16)).abs(), inputs.k.i((.., .., 16..64)).abs()], 2);
            let config = case.config();
            let chosen = route(&inputs.q, &inputs.k, &config).unwrap();
            // Queries of block 1 have no other choice than block 0: they leave it too.
            let ones = chosen.narrow(2, 16, 48).eq(0).to_kind(Kind::Int);
            let chosen = Tensor::cat(&[chosen.narrow(2, 0, 16), chosen.narrow(2, 16, 48) - ones], 2);
            let of = |x: &Inputs| Results::of(x, |q, k, v| routed_attention(q, k, v, &chosen, &config).unwrap());
            let all = of(&inputs);
            let own = Tensor::cat(&[Tensor::ones([16], (kind, device)), Tensor::zeros([48], (kind, device))], 0);
            let only_own = Inputs {
                dout: &inputs.dout * own.view([1, 1, 64, 1]),
                dlse: &inputs.dlse * own.to_kind(inputs.dlse.kind()),
                ..inputs.to(kind, device)
            };
            let own = of(&only_own);
            for (name, all, own) in [("dk", &all.dk, &own.dk), ("dv", &all.dv, &own.dv)] {
                let (all, own) = (all.i((.., .., 0..16)), own.i((.., .., 0..16)));
                assert_eq!(max_error(&name, &all, &own.to_kind(Kind::Double)), 0.0, "{name} {kind:?} on {device:?}");
                assert!(largest(&own) > 0.0);
            }
            // And with no query of its own there is no gradient at all.
            let late = Case { seqlen_q: 32, ..case };
            let late_inputs = Inputs {
                q: inputs.q.narrow(2, 32, 32),
                dout: inputs.dout.narrow(2, 32, 32),
                dlse: inputs.dlse.narrow(2, 32, 32),
                ..inputs.to(kind, device)
            };
            let late = Results::of(&late_inputs, |q, k, v| moba_attention_with_lse(q, k, v, &late.config()).unwrap());
            assert_eq!(largest(&late.dk.i((.., .., 0..16))) + largest(&late.dv.i((.., .., 0..16))), 0.0);
        }
    }
}

/// Puts `value` into one key or value token and returns the rows `[1, 2, seqlen]` whose blocks hold it, by `chosen`.
fn poison(case: &Case, x: &Tensor, token: i64, value: f64, chosen: &Tensor) -> (Tensor, Tensor) {
    let poisoned = x.copy();
    let _ = poisoned.i((.., .., token, 1)).fill_(value);
    (poisoned, naive::mask(case, chosen).i((.., .., .., token)))
}

/// A value and the token that it is put into, in shapes of all kernels.
fn poisoned_cases() -> impl Iterator<Item = (Case, f64, i64)> {
    // Blocks of whole key tiles and of parts of them.
    let shapes = [(64, 16, 8), (200, 64, 64), (150, 128, 32), (300, 64, 128), (290, 128, 128)];
    let cases = shapes.map(|(seqlen, head_dim, block_size)| Case::new(seqlen, head_dim, block_size, 2));
    let poisons = [(f64::NAN, 13), (f64::INFINITY, 40), (f64::NEG_INFINITY, 0), (f64::NAN, 63)];
    cases.into_iter().flat_map(move |case| poisons.map(|(value, token)| (case, value, token)))
}

fn assert_rows(what: &dyn std::fmt::Display, reached: &Tensor, x: &Tensor, clean: &Tensor) {
    let non_finite = x.isfinite().logical_not();
    let rows = if x.dim() == 4 { non_finite.any_dim(3, false) } else { non_finite };
    assert!(rows.logical_and(&reached.logical_not()).any().int64_value(&[]) == 0, "{what}: reached a row it must not");
    let unreached = reached.logical_not();
    let unreached = if x.dim() == 4 { unreached.unsqueeze(-1) } else { unreached };
    assert_rounding(what, &x.masked_select(&unreached), &clean.masked_select(&unreached));
}

#[test]
fn a_non_finite_value_reaches_only_its_readers() {
    for device in devices() {
        for kind in KINDS {
            for (case, value, token) in poisoned_cases() {
                let inputs = case.inputs(5, kind, device);
                let config = case.config();
                let chosen = route(&inputs.q, &inputs.k, &config).unwrap();
                let (v, reached) = poison(&case, &inputs.v, token, value, &chosen);
                let run = |v: &Tensor| {
                    let inputs = Inputs { v: v.shallow_clone(), ..inputs.to(kind, device) };
                    Results::of(&inputs, |q, k, v| moba_attention_with_lse(q, k, v, &config).unwrap())
                };
                let (clean, dirty) = (run(&inputs.v), run(&v));
                let what = |name| format!("{name}: {value} in value {token}, {case:?} {kind:?} on {device:?}");
                assert_rows(&what("out"), &reached, &dirty.out, &clean.out);
                assert_rows(&what("dq"), &reached, &dirty.dq, &clean.dq);
                assert_rounding(&what("lse"), &dirty.lse, &clean.lse);
                let finite = dirty.out.i((.., .., .., 1)).isfinite();
                assert!(finite.equal(&reached.logical_not()), "{}", what("out"));
                // dv does not depend on v, and dk is spoiled only where a spoiled query looks.
                let readers = naive::mask(&case, &chosen).logical_and(&reached.unsqueeze(-1)).any_dim(2, false);
                assert_rows(&what("dk"), &readers, &dirty.dk, &clean.dk);
                assert_rounding(&what("dv"), &dirty.dv, &clean.dv);
            }
        }
    }
}

#[test]
fn a_non_finite_key_reaches_only_its_readers() {
    for device in devices() {
        for kind in KINDS {
            for (case, value, token) in poisoned_cases() {
                let inputs = case.inputs(6, kind, device);
                let config = case.config();
                let clean_route = route(&inputs.q, &inputs.k, &config).unwrap();
                let (k, _) = poison(&case, &inputs.k, token, value, &clean_route);
                let chosen = route(&inputs.q, &k, &config).unwrap();
                let (_, reached) = poison(&case, &inputs.k, token, value, &chosen);
                let what = |name| format!("{name}: {value} in key {token}, {case:?} {kind:?} on {device:?}");
                // The order of all other blocks is untouched: without the poisoned one, both routings list the same
                // blocks, up to the slot that it frees or takes.
                let (a, b) = [&clean_route, &chosen]
                    .map(|x| Vec::<i32>::try_from(x.to_device(Device::Cpu).view(-1)).unwrap())
                    .into();
                let poisoned = (token / case.block_size) as i32;
                for (a, b) in a.chunks(2).zip(b.chunks(2)) {
                    let agree = a == b || a.contains(&poisoned) || b.contains(&poisoned);
                    assert!(agree, "{}: {a:?} became {b:?}", what("route"));
                }
                let run = |k: &Tensor| {
                    let inputs = Inputs { k: k.shallow_clone(), ..inputs.to(kind, device) };
                    Results::of(&inputs, |q, k, v| routed_attention(q, k, v, &chosen, &config).unwrap())
                };
                let (clean, dirty) = (run(&inputs.k), run(&k));
                assert_rows(&what("out"), &reached, &dirty.out, &clean.out);
                assert_rows(&what("lse"), &reached, &dirty.lse, &clean.lse);
                assert_rows(&what("dq"), &reached, &dirty.dq, &clean.dq);
                let readers = naive::mask(&case, &chosen).logical_and(&reached.unsqueeze(-1)).any_dim(2, false);
                assert_rows(&what("dk"), &readers, &dirty.dk, &clean.dk);
                assert_rows(&what("dv"), &readers, &dirty.dv, &clean.dv);
                if value.is_nan() {
                    assert!(dirty.lse.isnan().equal(&reached), "{}", what("lse"));
                }
                let (out, _) = moba_attention_with_lse(&inputs.q, &k, &inputs.v, &config).unwrap();
                assert_same_bits(&what("out"), &out, &dirty.out);
            }
        }
    }
}

/// Scores so large that exp overflows without the subtraction of the maximum, and so small that all but one vanish.
#[test]
fn huge_scores_do_not_overflow() {
    for device in devices() {
        for kind in [Kind::Double, Kind::Float, Kind::BFloat16] {
            let case = Case::new(70, 16, 16, 3);
            let plain = case.inputs(7, kind, device);
            let inputs = Inputs { q: &plain.q * 256.0, k: &plain.k * 256.0, ..plain.to(kind, device) };
            let config = case.config();
            let chosen = route(&inputs.q, &inputs.k, &config).unwrap();
            let ours = Results::of(&inputs, |q, k, v| moba_attention_with_lse(q, k, v, &config).unwrap());
            assert_as_good(&format!("{kind:?} on {device:?}"), &case, &inputs, &chosen, 0.25, &ours);
        }
    }
}

/// Outputs are allocated without being cleared; every element of them must be written, gaps of the inputs never read.
#[test]
fn memory_full_of_nan_does_not_show() {
    for device in devices() {
        let case = Case::new(75, 24, 16, 2).heads(4, 2).queries(50);
        let inputs = case.inputs(8, Kind::Float, device);
        let config = case.config();
        let run = || Results::of(&inputs, |q, k, v| moba_attention_with_lse(q, k, v, &config).unwrap());
        let clean = run();
        for _ in 0..20 {
            // Freed at once, so the allocator hands the same pages to the next call.
            for size in [case.q_size(), case.k_size()] {
                drop([0; 8].map(|_| Tensor::full(size, f64::NAN, (Kind::Float, device))));
            }
            let again = run();
            assert_same_bits(&"out", &clean.out, &again.out);
            assert!(again.named().iter().all(|(_, x)| x.isfinite().all().int64_value(&[]) == 1));
        }
    }
}

#[test]
fn results_have_the_strides_of_the_inputs() {
    for device in devices() {
        let x = Case::new(20, 16, 8, 2).inputs(9, Kind::Float, device);
        let permuted = |x: &Tensor| leaf(&x.transpose(1, 2).contiguous()).transpose(1, 2);
        let [q, k, v] = [&x.q, &x.k, &x.v].map(permuted);
        let out = moba_attention(&q, &k, &v, &Case::new(20, 16, 8, 2).config()).unwrap();
        assert_eq!(out.stride(), q.stride(), "so that merging the heads needs no copy");
    }
}

/// Windows of one signal, each a step further: a token is a row, and rows share memory.
#[test]
fn rows_that_overlap() {
    for device in devices() {
        for kind in KINDS {
            // Fewer tokens than numbers in a row: libtorch's empty_like would lay such results out the other way round.
            let case = Case::new(40, 64, 16, 2);
            let plain = case.inputs(10, kind, device);
            let windows = |x: &Tensor| x.flatten(2, -1).narrow(2, 0, 40 + 64 - 1).unfold(2, 64, 1);
            let windows = Inputs {
                q: windows(&plain.q),
                k: windows(&plain.k),
                v: windows(&plain.v),
                dout: plain.dout,
                dlse: plain.dlse,
            };
            assert_eq!(windows.q.stride()[2..], [1, 1]);
            let config = case.config();
            let run =
                |inputs: &Inputs| Results::of(inputs, |q, k, v| moba_attention_with_lse(q, k, v, &config).unwrap());
            let copied = run(&windows.map(Tensor::contiguous));
            for ((name, a), (_, b)) in run(&windows).named().iter().zip(copied.named()) {
                assert_rounding(&format!("{name} {kind:?} on {device:?}"), a, b);
            }
        }
    }
}

/// Where every score is -inf a row sees nothing: out 0, lse -inf and no gradient, whatever is in the keys.
#[test]
fn a_row_whose_scores_are_all_infinite() {
    for device in devices() {
        for kind in KINDS {
            let case = Case::new(40, 64, 16, 2);
            let inputs = case.inputs(11, kind, device);
            let inputs = Inputs { q: inputs.q.abs() + 0.1, ..inputs };
            drop(inputs.k.i((.., .., 0)).fill_(f64::NEG_INFINITY));
            let ours = Results::of(&inputs, |q, k, v| moba_attention_with_lse(q, k, v, &case.config()).unwrap());
            for x in [&ours.out, &ours.dq] {
                assert_eq!(largest(&x.i((.., .., 0))), 0.0, "{kind:?} on {device:?}");
            }
            assert!(ours.lse.i((.., .., 0)).isneginf().all().int64_value(&[]) == 1, "{kind:?} on {device:?}");
        }
    }
}

/// Smaller than a float: all scores are 0, and every row is the mean of the values that it sees.
#[test]
fn a_softmax_scale_of_almost_nothing() {
    for device in devices() {
        for kind in KINDS {
            let case = Case::new(50, 64, 16, 4);
            let x = case.inputs(12, kind, device);
            let config = case.config().with_softmax_scale(1e-46).unwrap();
            let out = moba_attention(&x.q, &x.k, &x.v, &config).unwrap();
            let counts = Tensor::arange_start(1, 51, (Kind::Double, device)).view([-1, 1]);
            let means = x.v.to_kind(Kind::Double).cumsum(2, Kind::Double) / counts;
            assert_rounding(&format!("{kind:?} on {device:?}"), &out, &means.to_kind(kind));
        }
    }
}
