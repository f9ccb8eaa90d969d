//! Several threads at once: same bits as alone, and an error in one does not disturb the others.

use std::thread;

use tch::Kind;
use tch_moba::{moba_attention, moba_attention_with_lse};

use crate::kit::{Case, Results, assert_same_bits, devices};

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
