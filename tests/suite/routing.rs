//! Which blocks a query selects: as sets, in order, at ties, and with NaN and infinity in the keys.

use tch::{Device, Kind, Tensor};
use tch_moba::{MobaConfig, route};

use crate::{
    gate::{Gate, choose, gates},
    kit::{Case, KINDS, LAYOUTS, devices, lay_out, small},
};

/// Asserts that `chosen` is a right routing for `q` and `k`. A row may differ from the oracle's only where two scores
/// are nearer than another order of summation can move them.
pub fn assert_route(what: &str, case: &Case, q: &Tensor, k: &Tensor, chosen: &Tensor) {
    let slots = case.top_k as usize;
    assert_eq!(chosen.size(), [case.batch, case.heads, case.seqlen_q, case.top_k], "{what}: shape");
    assert_eq!((chosen.kind(), chosen.device()), (Kind::Int, q.device()), "{what}");
    let rows = Vec::<i32>::try_from(chosen.to_device(Device::Cpu).view(-1)).unwrap();
    for (r, (gate, row)) in gates(case, q, k).iter().zip(rows.chunks(slots)).enumerate() {
        assert_row(&format!("{what}, row {r}"), gate, row);
    }
}

fn assert_row(what: &str, gate: &Gate, row: &[i32]) {
    let wanted = choose(gate, row.len() as i64);
    assert_eq!(row[0], gate.current as i32, "{what}: the current block comes first, got {row:?}");
    let (used, unused) = row.split_at(wanted.len());
    assert!(unused.iter().all(|&block| block == -1), "{what}: want {} blocks, then -1, got {row:?}", wanted.len());
    let used: Vec<usize> = used.iter().map(|&block| usize::try_from(block).unwrap_or(usize::MAX)).collect();
    assert!(used[1..].iter().all(|&block| block < gate.current), "{what}: want blocks before the current, got {row:?}");
    let distinct = used.iter().enumerate().all(|(n, block)| !used[..n].contains(block));
    assert!(distinct, "{what}: a block twice in {row:?}");
    let near = |a: usize, b: usize| (gate.scores[a] - gate.scores[b]).abs() <= gate.slack[a].max(gate.slack[b]);
    for &missing in wanted.iter().filter(|block| !used.contains(block)) {
        let excused = used.iter().filter(|block| !wanted.contains(block)).any(|&instead| near(missing, instead));
        assert!(excused, "{what}: want {wanted:?}, got {row:?}, scores {:?}", gate.scores);
    }
    for pair in used[1..].windows(2) {
        let (first, second) = (gate.scores[pair[0]], gate.scores[pair[1]]);
        let in_order = first >= second || second.is_nan() || near(pair[0], pair[1]);
        assert!(in_order, "{what}: want the best first, got {row:?}, scores {:?}", gate.scores);
    }
}

#[test]
fn random_inputs() {
    let cases = [
        Case::new(1, 16, 16, 3),
        Case::new(100, 33, 128, 3),
        Case::new(255, 64, 16, 1),
        Case::new(256, 64, 16, 4),
        Case::new(257, 80, 16, 5).heads(4, 2).batch(2),
        Case::new(251, 16, 13, 7).heads(6, 1),
        Case::new(64, 128, 1, 9),
        Case::new(300, 5, 7, 64),
        Case::new(290, 32, 32, 3).queries(17),
        Case::new(290, 256, 32, 3).queries(1).heads(8, 2),
        Case::new(300, 1, 4, 3),
        Case::new(1100, 16, 2, 40),
        Case::new(600, 24, 1, 3).queries(9),
    ];
    for device in devices() {
        for kind in KINDS {
            for (n, case) in cases.iter().enumerate().filter(|(_, c)| !small() || c.seqlen_k <= 100) {
                let inputs = case.inputs(n as u64, kind, device);
                let layout = LAYOUTS[n % LAYOUTS.len()];
                let (q, k) = (lay_out(&inputs.q, layout), lay_out(&inputs.k, layout));
                let chosen = route(&q, &k, &case.config()).unwrap();
                assert_route(&format!("{case:?} {kind:?} {layout:?} on {device:?}"), case, &q, &k, &chosen);
            }
        }
    }
}

/// Small integers in blocks of a power of two: every mean and score is exact in every dtype, ties are everywhere, some
/// keys are not finite, and there are more blocks than any kernel looks at in one go. Rows must be the oracle's, entry
/// for entry.
#[test]
fn exact_numbers_give_exact_rows() {
    // head_dim, block_size, blocks
    for (head_dim, block, blocks) in [(3, 2, 350), (64, 16, 300), (128, 16, 130)] {
        let blocks = if small() { blocks / 10 } else { blocks };
        for (seed, top_k) in [1, 2, 3, 5, 8, 9, 17, 33, 64, 130, 400].into_iter().enumerate() {
            let case = Case::new(blocks * block + 1, head_dim, block, top_k).heads(2, 1);
            let x = case.inputs(seed as u64, Kind::Double, Device::Cpu);
            let (q, k) = (x.q.round().clamp(-2, 2), x.k.round().clamp(-1, 1));
            for (part, value) in [(18, f64::NAN), (20, f64::NAN), (44, f64::INFINITY), (65, f64::NEG_INFINITY)] {
                if seed % 2 == 1 {
                    let _ = k.narrow(2, blocks * block * part / 100, 1).narrow(3, 1, 1).fill_(value);
                }
            }
            let wanted: Vec<Vec<i32>> = gates(&case, &q, &k)
                .iter()
                .map(|gate| {
                    let mut row: Vec<i32> = choose(gate, top_k).into_iter().map(|block| block as i32).collect();
                    row.resize(top_k as usize, -1);
                    row
                })
                .collect();
            for device in devices() {
                for kind in KINDS {
                    let [q, k] = [&q, &k].map(|x| x.to_kind(kind).to_device(device));
                    let chosen = route(&q, &k, &case.config()).unwrap().to_device(Device::Cpu).view(-1);
                    let rows = Vec::<i32>::try_from(chosen).unwrap();
                    for (r, (wanted, row)) in wanted.iter().zip(rows.chunks(top_k as usize)).enumerate() {
                        assert_eq!(row, wanted, "row {r} of {case:?} {kind:?} on {device:?}");
                    }
                }
            }
        }
    }
}

/// Tens of thousands of tokens: the chosen sets against float64 scores, a near-tie excused.
#[test]
fn long_sequences() {
    for device in devices() {
        let seqlen = if small() {
            600
        } else if device.is_cuda() {
            65_536 + 77
        } else {
            8192 + 77
        };
        for (head_dim, block, top_k) in [(128, 128, 8), (64, 512, 3), (64, 64, 12)] {
            for kind in [Kind::BFloat16, Kind::Half] {
                let case = Case::new(seqlen, head_dim, block, top_k).heads(2, 1);
                let (q, k) = (
                    sixteenths(&case.q_size(), device).to_kind(kind),
                    sixteenths(&case.k_size(), device).to_kind(kind),
                );
                let chosen = route(&q, &k, &case.config()).unwrap();
                let what = format!("{case:?} {kind:?} on {device:?}");
                assert_best_sets(&what, &case, &q, &k, &chosen);
            }
        }
    }
}

/// Multiples of 1/16 below 4: the sum of a block is exact in float32, so that all round the same mean.
fn sixteenths(size: &[i64], device: Device) -> Tensor {
    (Tensor::randn(size, (Kind::Float, device)) * 16.0).round().clamp(-63, 63) / 16.0
}

/// Neither what the scores of a row have in common nor their size changes what is chosen, beyond the range of f16 too.
#[test]
fn scores_far_from_zero() {
    let seqlen = if small() { 130 } else { 2077 };
    for device in devices() {
        for (head_dim, block, top_k) in [(128, 32, 8), (64, 64, 3), (64, 16, 16), (128, 16, 20)] {
            for (size, q_shift, k_shift) in [(512.0, 0.0, 0.0), (1.0, 1.0, 1.0), (1.0, 1.0, -1.0), (512.0, 1.0, -1.0)] {
                for kind in [Kind::BFloat16, Kind::Half] {
                    let case = Case::new(seqlen, head_dim, block, top_k).heads(2, 1);
                    let q = ((sixteenths(&case.q_size(), device) + q_shift) * size).to_kind(kind);
                    let k = ((sixteenths(&case.k_size(), device) + k_shift) * size).to_kind(kind);
                    let chosen = route(&q, &k, &case.config()).unwrap();
                    let what =
                        format!("{case:?} {kind:?} on {device:?}, {size} times, shifted by {q_shift}, {k_shift}");
                    assert_best_sets(&what, &case, &q, &k, &chosen);
                }
            }
        }
    }
}

/// As `assert_route`, in torch operations on the device of the tensors: no score that was left out may exceed one that
/// was chosen by more than the order of summation can move them.
fn assert_best_sets(what: &str, case: &Case, q: &Tensor, k: &Tensor, chosen: &Tensor) {
    let (complete, kind, device) = (case.seqlen_k / case.block_size, k.kind(), k.device());
    let blocks = k.narrow(2, 0, complete * case.block_size).to_kind(Kind::Float);
    let blocks = blocks.view([case.batch, case.heads_k, complete, case.block_size, case.head_dim]);
    let means = blocks.mean_dim([3].as_slice(), false, Kind::Float).to_kind(kind).to_kind(Kind::Double);
    let means = means.repeat_interleave_self_int(case.heads / case.heads_k, 1, None);
    let length = |x: &Tensor| x.square().sum_dim_intlist([-1].as_slice(), true, Kind::Double).sqrt();
    const ROWS: i64 = 4096;
    for begin in (0..case.seqlen_q).step_by(ROWS as usize) {
        let rows = ROWS.min(case.seqlen_q - begin);
        let q = q.narrow(2, begin, rows).to_kind(Kind::Double);
        let scores = q.matmul(&means.transpose(2, 3));
        let position = Tensor::arange(rows, (Kind::Int64, device)) + begin + (case.seqlen_k - case.seqlen_q);
        let current = position.divide_scalar_mode(case.block_size, "floor").view([1, 1, -1, 1]);
        let past = Tensor::arange(complete, (Kind::Int64, device)).lt_tensor(&current);
        let route = chosen.narrow(2, begin, rows).to_kind(Kind::Int64);
        assert!(route.narrow(3, 0, 1).equal(&current.expand_as(&route.narrow(3, 0, 1))), "{what}: current block first");
        let others = route.narrow(3, 1, case.top_k - 1);
        let used = others.ge(0);
        let count = current.clamp_max(case.top_k - 1);
        assert!(
            used.sum_dim_intlist([-1].as_slice(), true, Kind::Int64).equal(&count.expand_as(&q.narrow(3, 0, 1))),
            "{what}"
        );
        // Which blocks are in the set; an unused slot marks a column of its own.
        let taken = Tensor::zeros([case.batch, case.heads, rows, complete + 1], (Kind::Bool, device));
        let taken = taken.scatter_value(3, &others.where_self(&used, &Tensor::from(complete).to_device(device)), 1);
        let taken = taken.narrow(3, 0, complete);
        assert!(
            taken.sum_dim_intlist([-1].as_slice(), true, Kind::Int64).equal(&count.expand_as(&q.narrow(3, 0, 1))),
            "{what}: a block twice"
        );
        assert!(taken.logical_and(&past.logical_not()).any().int64_value(&[]) == 0, "{what}: a block that is not past");
        let worst = scores.masked_fill(&taken.logical_not(), f64::INFINITY).amin([-1].as_slice(), true);
        let left =
            scores.masked_fill(&taken.logical_or(&past.logical_not()), f64::NEG_INFINITY).amax([-1].as_slice(), true);
        let slack = 4e-6 * length(&q) * length(&means).amax([2].as_slice(), true);
        assert!(left.le_tensor(&(worst + slack)).all().int64_value(&[]) == 1, "{what}: a better block was left out");
    }
}

#[test]
fn equal_scores_go_to_the_later_block() {
    for device in devices() {
        for kind in KINDS {
            let case = Case::new(64, 8, 8, 4);
            let inputs = case.inputs(1, kind, device);
            let chosen = route(&inputs.q.zeros_like(), &inputs.k, &case.config()).unwrap();
            for i in 0..case.seqlen_q {
                let current = (i / 8) as i32;
                let wanted: Vec<i32> = (0..4).map(|n| (current - n).max(-1)).collect();
                let row = Vec::<i32>::try_from(chosen.get(0).get(1).get(i)).unwrap();
                assert_eq!(row, wanted, "query {i} {kind:?} on {device:?}");
            }
        }
    }
}

/// One head, head_dim 1, query 1: the score of a block is its mean. Queries all lie in one more block at the end.
fn route_of_means(means: &[&[f64]], block_size: i64, top_k: i64, kind: Kind, device: Device) -> Vec<i32> {
    let mut keys = means.concat();
    keys.push(0.0);
    let k = Tensor::from_slice(&keys).to_kind(kind).to_device(device).view([1, 1, -1, 1]);
    let q = Tensor::ones([1, 1, 1, 1], (kind, device));
    Vec::try_from(route(&q, &k, &MobaConfig::new(block_size, top_k).unwrap()).unwrap().view(-1)).unwrap()
}

#[test]
fn a_nan_score_never_wins_over_a_number() {
    const NAN: f64 = f64::NAN;
    const INF: f64 = f64::INFINITY;
    for device in devices() {
        for kind in KINDS {
            let chosen = |means: &[f64], top_k| {
                let means: Vec<&[f64]> = means.chunks(1).collect();
                route_of_means(&means, 1, top_k, kind, device)
            };
            let what = format!("{kind:?} on {device:?}");
            assert_eq!(chosen(&[1.0, NAN, 2.0], 3), [3, 2, 0], "{what}");
            assert_eq!(chosen(&[-INF, NAN, 2.0], 3), [3, 2, 0], "{what}: -inf is a number");
            assert_eq!(chosen(&[1.0, NAN, 2.0], 4), [3, 2, 0, 1], "{what}: taken when a slot is left");
            assert_eq!(chosen(&[NAN, NAN, 2.0, NAN], 4), [4, 2, 3, 1], "{what}: of NaN and NaN the later");
            assert_eq!(chosen(&[-NAN, 1.0, NAN], 3), [3, 1, 2], "{what}: the sign of a NaN says nothing");
            assert_eq!(chosen(&[INF, 1.0, -INF, INF], 5), [4, 3, 0, 1, 2], "{what}");
            assert_eq!(chosen(&[0.0, -0.0], 3), [2, 1, 0], "{what}: -0 equals 0");
            assert_eq!(chosen(&[-0.0, 0.0], 2), [2, 1], "{what}: -0 equals 0");
        }
    }
}

#[test]
fn block_means_are_rounded_to_the_dtype_of_k() {
    for device in devices() {
        for (kind, bits) in [(Kind::BFloat16, 7), (Kind::Half, 10), (Kind::Float, 23)] {
            // The mean of block 0 lies half a unit above 1 and rounds to 1: a tie, which the later block wins.
            let above = 1.0 + f64::exp2(-f64::from(bits));
            let chosen = route_of_means(&[&[1.0, above], &[1.0, 1.0]], 2, 2, kind, device);
            assert_eq!(chosen, [2, 1], "{kind:?} on {device:?}");
        }
        let above = 1.0 + f64::exp2(-20.0);
        let chosen = route_of_means(&[&[1.0, above], &[1.0, 1.0]], 2, 2, Kind::Double, device);
        assert_eq!(chosen, [2, 0], "float64 on {device:?}");
    }
}

#[test]
fn means_of_16_bit_keys_are_summed_in_float32() {
    // 2048 + 1 is 2048 in float16 and 256 + 1 is 256 in bfloat16; a sum in that dtype would never grow further.
    for device in devices() {
        for kind in [Kind::BFloat16, Kind::Half] {
            let ones = vec![1.0; 4096];
            let less = vec![0.9375; 4096];
            let chosen = route_of_means(&[&ones, &less], 4096, 2, kind, device);
            assert_eq!(chosen, [2, 0], "{kind:?} on {device:?}");
        }
    }
}

#[test]
fn unused_slots_hold_minus_one_and_no_gradient_flows() {
    for device in devices() {
        let case = Case::new(10, 4, 4, 6);
        let inputs = case.inputs(3, Kind::Float, device);
        let [q, k, _] = inputs.leaves();
        let chosen = route(&q, &k, &case.config()).unwrap();
        assert!(!chosen.requires_grad());
        assert_route("more slots than blocks", &case, &q, &k, &chosen);
        assert_eq!(chosen.narrow(3, 3, 3).ne(-1).sum(Kind::Int64).int64_value(&[]), 0);
    }
}
