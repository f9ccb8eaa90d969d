//! Forward and backward against the oracle over a grid of shapes, dtypes and layouts. Each error may be at most twice
//! that of the same attention in plain torch operations.

use tch::{Device, Kind};
use tch_moba::{moba_attention_with_lse, route, routed_attention};

use crate::{
    kit::{Case, KINDS, LAYOUTS, Results, assert_rounding, assert_same_bits, devices, lay_out, small},
    naive::assert_as_good,
    routing::assert_route,
};

fn check(case: &Case, seed: u64, kind: Kind, device: Device) {
    let layout = LAYOUTS[seed as usize % LAYOUTS.len()];
    let what = format!("{case:?} {kind:?} {layout:?} on {device:?}");
    let plain = case.inputs(seed, kind, device);
    let inputs = plain.map(|x| if x.dim() == 4 { lay_out(x, layout) } else { x.shallow_clone() });
    let config = case.config();
    let ours = Results::of(&inputs, |q, k, v| moba_attention_with_lse(q, k, v, &config).unwrap());
    let chosen = route(&inputs.q, &inputs.k, &config).unwrap();
    assert_route(&what, case, &inputs.q, &inputs.k, &chosen);
    let scale = (case.head_dim as f64).powf(-0.5);
    assert_as_good(&what, case, &inputs, &chosen, scale, &ours);
    let (out, lse) = routed_attention(&inputs.q, &inputs.k, &inputs.v, &chosen, &config).unwrap();
    for (name, routed, whole) in [("out", &out, &ours.out), ("lse", &lse, &ours.lse)] {
        let what = format!("{name} of {what}, route given");
        if device.is_cuda() && (case.top_k == 1 || case.top_k >= case.blocks()) {
            // Nothing had to be chosen, so that kernels without a merge answered.
            assert_rounding(&what, routed, whole);
        } else {
            assert_same_bits(&what, routed, whole);
        }
    }
}

fn sweep(cases: &[Case]) {
    for device in devices() {
        for kind in KINDS {
            for (n, case) in cases.iter().enumerate().filter(|(_, case)| !small() || case.seqlen_k <= 70) {
                check(case, n as u64, kind, device);
            }
        }
    }
}

#[test]
fn head_dims() {
    let dims = [1, 2, 3, 5, 8, 16, 17, 33, 64, 80, 96, 128, 129, 192, 255, 256];
    sweep(&dims.map(|head_dim| Case::new(65, head_dim, 16, 3).heads(2, 1)));
    sweep(&[64, 128].map(|head_dim| Case::new(200, head_dim, 64, 2).heads(2, 2)));
}

#[test]
fn lengths_and_blocks() {
    let shapes = [
        (1, 16, 3),
        (2, 1, 2),
        (7, 16, 2),
        (16, 16, 1),
        (17, 16, 2),
        (31, 8, 3),
        (63, 64, 2),
        (65, 32, 2),
        (97, 13, 3),
        (127, 32, 2),
        (128, 32, 4),
        (129, 64, 2),
        (50, 1, 7),
        (100, 128, 3),
        (60, 8, 100),
        (251, 17, 4),
        (257, 128, 2),
    ];
    sweep(&shapes.map(|(seqlen, block, top_k)| Case::new(seqlen, 24, block, top_k)));
}

#[test]
fn head_groups_and_batches() {
    let groups = [(1, 1), (3, 3), (4, 2), (8, 2), (6, 1), (5, 5)];
    sweep(&groups.map(|(heads, heads_k)| Case::new(67, 20, 16, 3).heads(heads, heads_k).batch(2)));
}

#[test]
fn queries_at_the_end_of_longer_keys() {
    let shapes = [(1, 130, 32, 3), (1, 128, 32, 3), (1, 129, 32, 2), (31, 131, 16, 3), (64, 255, 64, 2), (5, 6, 4, 2)];
    sweep(&shapes.map(|(q, k, block, top_k)| Case::new(k, 40, block, top_k).queries(q).heads(4, 2).batch(2)));
}

#[test]
fn large_blocks_and_many_slots() {
    sweep(&[Case::new(300, 64, 256, 2), Case::new(300, 16, 4, 60), Case::new(290, 8, 3, 5).heads(4, 1)]);
}

/// Shapes that the tensor-core kernels take, around their tile sizes, in the dtypes that they take.
#[test]
fn shapes_of_the_tensor_core_kernels() {
    let mut cases = Vec::new();
    let lengths = [63, 64, 65, 127, 128, 129, 191, 251, 255, 257, 383, 509, 513];
    let blocks = [16, 32, 48, 64, 80, 96, 128, 144, 192, 256];
    for (n, seqlen) in lengths.into_iter().enumerate() {
        for head_dim in [64, 128] {
            let block = blocks[(3 * n + head_dim as usize / 64) % blocks.len()];
            let (heads, heads_k) = [(2, 2), (4, 1), (2, 1), (6, 3)][n % 4];
            let top_k = [2, 3, 5, 1, 8, 13][n % 6];
            cases.push(Case::new(seqlen, head_dim, block, top_k).heads(heads, heads_k));
        }
    }
    cases.push(Case::new(401, 128, 32, 4).queries(133).heads(4, 2).batch(2));
    cases.push(Case::new(300, 64, 16, 9).queries(1).heads(4, 1));
    cases.push(Case::new(640, 64, 512, 2).heads(2, 1));
    cases.push(Case::new(700, 128, 128, 3).heads(4, 2));
    cases.push(Case::new(900, 64, 256, 2).queries(333).heads(2, 1).batch(2));
    // Too long for masks, so by lists of blocks of whole key tiles.
    cases.push(Case::new(2999, 128, 128, 2).heads(2, 1));
    cases.push(Case::new(2999, 64, 256, 2));
    for device in devices() {
        for kind in [Kind::BFloat16, Kind::Half] {
            let longest = match (small(), device.is_cuda()) {
                (true, _) => 130,
                (false, true) => i64::MAX,
                (false, false) => 1000, // the oracle takes a minute for the others
            };
            for (n, case) in cases.iter().enumerate().filter(|(_, case)| case.seqlen_k <= longest) {
                check(case, n as u64, kind, device);
            }
        }
    }
}
