//! Several threads at once: same bits as alone, and an error in one does not disturb the others.

use std::thread;

use tch::{Device, Kind};
use tch_moba::{moba_attention, moba_attention_with_lse};

use crate::kit::{Case, KINDS, Results, assert_same_bits, devices};

#[test]
fn the_same_bits_as_alone() {
    for device in devices() {
        let case = Case::new(200, 32, 32, 3).heads(4, 2);
        let config = case.config().with_deterministic(true);
        let run = move |seed: u64| {
            let inputs = case.inputs(seed, Kind::Float, device);
            Results::of(&inputs, |q, k, v| moba_attention_with_lse(q, k, v, &config).unwrap())
        };
        let alone: Vec<Results> = (0..4).map(run).collect();
        let together: Vec<_> = (0..4)
            .map(|seed| {
                thread::spawn(move || {
                    for _ in 0..5 {
                        let bad = case.inputs(seed, Kind::Float, device);
                        assert!(moba_attention(&bad.q, &bad.k.narrow(3, 0, 16), &bad.v, &config).is_err());
                        run(seed);
                    }
                    run(seed)
                })
            })
            .collect();
        for (thread, alone) in together.into_iter().zip(&alone) {
            let together = thread.join().unwrap();
            for ((name, a), (_, b)) in together.named().iter().zip(alone.named()) {
                assert_same_bits(&format!("{name} on {device:?}"), a, b);
            }
        }
    }
}

/// Different shapes at once, whose kernels are the same and need more or less shared memory.
#[test]
fn each_thread_has_a_shape_of_its_own() {
    for device in devices() {
        let shapes = [(3200, 16), (160, 16), (1600, 16), (480, 16)];
        let threads: Vec<_> = shapes
            .into_iter()
            .map(|(seqlen, block_size)| {
                thread::spawn(move || {
                    let case = Case::new(seqlen, 64, block_size, 4).heads(1, 1);
                    let config = case.config().with_deterministic(true);
                    let inputs = case.inputs(1, Kind::BFloat16, device);
                    let run = || Results::of(&inputs, |q, k, v| moba_attention_with_lse(q, k, v, &config).unwrap());
                    let first = run();
                    for _ in 0..if device.is_cuda() { 100 } else { 1 } {
                        for ((name, a), (_, b)) in run().named().iter().zip(first.named()) {
                            assert_same_bits(&format!("{name} of {case:?} on {device:?}"), a, b);
                        }
                    }
                })
            })
            .collect();
        threads.into_iter().for_each(|thread| thread.join().unwrap());
    }
}

/// Long enough that several threads share a head, with blocks of several tiles and with many queries for one block.
#[test]
fn the_same_bits_on_any_number_of_threads() {
    let cases = [Case::new(1500, 32, 16, 4).heads(4, 2), Case::new(1500, 64, 700, 2).heads(1, 1)];
    for (case, kind) in cases.into_iter().flat_map(|case| KINDS.map(|kind| (case, kind))) {
        let config = case.config().with_deterministic(true);
        let inputs = case.inputs(7, kind, Device::Cpu);
        let threads = tch::get_num_threads();
        let [one, two, five] = [1, 2, 5].map(|count| {
            tch::set_num_threads(count);
            let results = Results::of(&inputs, |q, k, v| moba_attention_with_lse(q, k, v, &config).unwrap());
            tch::set_num_threads(threads);
            results
        });
        for more in [two, five] {
            for ((name, a), (_, b)) in one.named().iter().zip(more.named()) {
                assert_same_bits(&format!("{name} of {case:?} {kind:?}"), a, b);
            }
        }
    }
}
