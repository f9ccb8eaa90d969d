//! Attention over a routing that the caller gives, also one that `route` would never return.

use rand::{Rng, SeedableRng, rngs::StdRng};
use tch::{Device, Kind, Tensor};
use tch_moba::{MobaConfig, routed_attention};

use crate::{
    kit::{Case, KINDS, Results, assert_rounding, assert_same_bits, devices, largest},
    naive::assert_as_good,
    oracle,
};

fn scale(case: &Case) -> f64 {
    (case.head_dim as f64).powf(-0.5)
}

/// Entries drawn from far below 0 to far beyond the last block; `keep` is put into every row's first slot.
fn wild_route(case: &Case, slots: i64, seed: u64, keep: Option<&[i32]>) -> Tensor {
    let mut rng = StdRng::seed_from_u64(seed);
    let rows = (case.batch * case.heads * case.seqlen_q) as usize;
    let mut data = Vec::new();
    for row in 0..rows {
        for slot in 0..slots {
            data.push(match rng.random_range(0..8) {
                0 => [i32::MIN, i32::MAX, -1, case.blocks() as i32][rng.random_range(0..4)],
                _ => rng.random_range(0..case.blocks() as i32),
            });
            if let (0, Some(keep)) = (slot, keep) {
                *data.last_mut().unwrap() = keep[row % case.seqlen_q as usize];
            }
        }
    }
    Tensor::from_slice(&data).view([case.batch, case.heads, case.seqlen_q, slots])
}

#[test]
fn any_entries_against_the_oracle() {
    let cases = [
        (Case::new(70, 16, 8, 1).heads(4, 2), 3),
        (Case::new(65, 33, 16, 1).batch(2), 9),
        (Case::new(90, 64, 32, 1).queries(20), 1),
        (Case::new(33, 8, 1, 1), 40),
        (Case::new(150, 64, 16, 1).heads(4, 2), 3),
        (Case::new(150, 128, 16, 1).queries(131), 8),
        (Case::new(150, 64, 16, 1).heads(2, 1), 11),
    ];
    for device in devices() {
        for kind in KINDS {
            for (n, (case, slots)) in cases.iter().enumerate() {
                let inputs = case.inputs(n as u64, kind, device);
                let first = case.seqlen_k - case.seqlen_q;
                let current: Vec<i32> = (0..case.seqlen_q).map(|i| ((first + i) / case.block_size) as i32).collect();
                let chosen = wild_route(case, *slots, n as u64, Some(&current)).to_device(device);
                let ours = Results::of(&inputs, |q, k, v| routed_attention(q, k, v, &chosen, &case.config()).unwrap());
                let what = format!("{case:?} {kind:?} on {device:?}");
                assert_as_good(&what, case, &inputs, &chosen, scale(case), &ours);
            }
        }
    }
}

/// Without the current block in every row, some rows see no key: out 0, lse -inf, no gradient.
#[test]
fn rows_without_keys() {
    for device in devices() {
        for kind in KINDS {
            let case = Case::new(70, 16, 8, 1).heads(4, 2);
            let inputs = case.inputs(5, kind, device);
            let chosen = wild_route(&case, 2, 5, None).to_device(device);
            let ours = Results::of(&inputs, |q, k, v| routed_attention(q, k, v, &chosen, &case.config()).unwrap());
            let truth = oracle::attend(&case, &inputs, &chosen, scale(&case));
            let empty = truth.lse.isneginf();
            let count = empty.sum(Kind::Int64).int64_value(&[]);
            assert!(count > 0 && count < empty.numel() as i64, "the routing has both kinds of rows");
            let empty = empty.to_device(device);
            assert!(ours.lse.isneginf().equal(&empty));
            for x in [&ours.out, &ours.dq] {
                assert_eq!(largest(&x.masked_select(&empty.unsqueeze(-1))), 0.0);
            }
            assert_as_good(&format!("{kind:?} on {device:?}"), &case, &inputs, &chosen, scale(&case), &ours);
        }
    }
}

/// In every row: so lanes of one warp name the same block at once, and name it again.
#[test]
fn a_block_named_twice_counts_once() {
    for device in devices() {
        for (kind, case) in [(Kind::Float, Case::new(64, 32, 16, 1)), (Kind::BFloat16, Case::new(192, 64, 32, 1))] {
            let inputs = case.inputs(6, kind, device);
            let config = case.config();
            let run =
                |chosen: &Tensor| Results::of(&inputs, |q, k, v| routed_attention(q, k, v, chosen, &config).unwrap());
            let current = Tensor::arange(case.seqlen_q, (Kind::Int, device));
            let current = current.divide_scalar_mode(case.block_size, "floor").to_kind(Kind::Int);
            let current = current.view([1, 1, -1, 1]).expand([1, case.heads, -1, 1], false).contiguous();
            let (previous, first): (Tensor, Tensor) = (&current - 1, current.zeros_like());
            let once = run(&Tensor::cat(&[&current, &previous, &first], 3));
            // New names in the same order, which is the order of the sums.
            for slots in [
                vec![&current, &current, &previous, &current, &first],
                vec![&current, &previous, &previous, &current, &first, &previous, &first, &first],
                vec![&current, &previous, &first, &first, &previous, &first, &current, &current, &previous, &first],
            ] {
                let often = run(&Tensor::cat(&slots, 3));
                for ((name, once), (_, often)) in once.named().iter().zip(often.named()) {
                    assert_rounding(&format!("{name} {kind:?} on {device:?}"), often, once);
                }
                assert_same_bits(&"out", &once.out, &often.out);
            }
        }
    }
}

/// From none to more than two tiles of queries: of blocks whose keys kernels keep, and of larger ones that they stream past
/// two tiles of queries at a time.
#[test]
fn lists_of_every_length() {
    for device in devices() {
        for (kind, block_size) in [(Kind::Float, 16), (Kind::BFloat16, 64), (Kind::Half, 112), (Kind::BFloat16, 144)] {
            let (heads, past) = (10, 14);
            let case = Case::new((past + 1) * block_size, 64, block_size, 1).heads(heads, heads).queries(140);
            let case = if block_size < 140 { case.queries(block_size) } else { case };
            let inputs = case.inputs(8, kind, device);
            // List i, counted through heads and blocks, has the first i queries.
            let length = Tensor::arange(heads * past, (Kind::Int64, Device::Cpu)).view([heads, 1, past]);
            let row = Tensor::arange(case.seqlen_q, (Kind::Int64, Device::Cpu)).view([1, -1, 1]);
            let block = Tensor::arange(past, (Kind::Int, Device::Cpu)).view([1, 1, -1]);
            let chosen = block.where_self(&row.less_tensor(&length), &Tensor::from(-1i32));
            let current = Tensor::full([heads, case.seqlen_q, 1], past, (Kind::Int, Device::Cpu));
            let chosen = Tensor::cat(&[chosen, current], 2).unsqueeze(0).to_device(device);
            let ours = Results::of(&inputs, |q, k, v| routed_attention(q, k, v, &chosen, &case.config()).unwrap());
            let what = format!("{case:?} {kind:?} on {device:?}");
            assert_as_good(&what, &case, &inputs, &chosen, scale(&case), &ours);
        }
    }
}

#[test]
fn the_order_of_the_slots_does_not_matter() {
    for device in devices() {
        let case = Case::new(96, 16, 8, 4);
        let inputs = case.inputs(7, Kind::Double, device);
        let config = MobaConfig::new(8, 1).unwrap();
        let chosen = tch_moba::route(&inputs.q, &inputs.k, &case.config()).unwrap();
        let run = |chosen: &Tensor| Results::of(&inputs, |q, k, v| routed_attention(q, k, v, chosen, &config).unwrap());
        let (forward, backward) = (run(&chosen), run(&chosen.flip([3])));
        for ((name, a), (_, b)) in forward.named().iter().zip(backward.named()) {
            assert_rounding(&format!("{name} on {device:?}"), a, b);
        }
    }
}
