//! Tracing, saving and loading: the same numbers, the same gradients, other lengths.

use std::path::PathBuf;

use tch::{CModule, Kind, Tensor, nn};
use tch_moba::{
    Step,
    llama::{Llama, LlamaConfig},
    moba_attention_with_lse, route, routed_attention,
};

use crate::kit::{Case, Inputs, assert_rounding, assert_same_bits, devices, gradients};

/// A file in the system's temporary directory, removed at the end.
pub struct TemporaryFile(pub PathBuf);

impl TemporaryFile {
    pub fn new(name: &str) -> Self {
        Self(std::env::temp_dir().join(format!("tch_moba_{}_{name}", std::process::id())))
    }
}

impl Drop for TemporaryFile {
    fn drop(&mut self) {
        // Nothing to do about a file that is gone already.
        let _ = std::fs::remove_file(&self.0);
    }
}

fn save_and_load(name: &str, inputs: &[Tensor], mut f: impl FnMut(&[Tensor]) -> Vec<Tensor>) -> CModule {
    let file = TemporaryFile::new(&format!("{name}.pt"));
    CModule::create_by_tracing(name, "forward", inputs, &mut f).unwrap().save(&file.0).unwrap();
    CModule::load(&file.0).unwrap()
}

#[test]
fn a_saved_trace_gives_the_same_numbers_and_gradients() {
    for device in devices() {
        for kind in [Kind::Float, Kind::BFloat16] {
            let case = Case::new(50, 16, 8, 3).heads(4, 2);
            let config = case.config().with_softmax_scale(0.3).unwrap().with_deterministic(true);
            let ours = |q: &Tensor, k: &Tensor, v: &Tensor| {
                let (out, lse) = moba_attention_with_lse(q, k, v, &config).unwrap();
                out + lse.unsqueeze(-1).to_kind(kind)
            };
            let traced_with = Case::new(24, 16, 8, 3).heads(4, 2).inputs(1, kind, device);
            let traced_with = [traced_with.q, traced_with.k, traced_with.v];
            let name = format!("attention_{kind:?}_{}", device.is_cuda());
            let loaded = save_and_load(&name, &traced_with, |x| vec![ours(&x[0], &x[1], &x[2])]);
            // Another length than the trace has seen.
            let inputs = case.inputs(2, kind, device);
            let run = |f: &dyn Fn(&Tensor, &Tensor, &Tensor) -> Tensor| {
                let [q, k, v] = inputs.leaves();
                let out = f(&q, &k, &v);
                let [dq, dk, dv] = gradients(&[&out], &[&inputs.dout], &[&q, &k, &v]);
                [out, dq, dk, dv]
            };
            // The second run of a loaded module takes the optimised path.
            for _ in 0..3 {
                let theirs = run(&|q, k, v| loaded.forward_ts(&[q, k, v]).unwrap());
                for (n, (a, b)) in run(&ours).iter().zip(theirs).enumerate() {
                    assert_same_bits(&format!("result {n} {kind:?} on {device:?}"), a, &b);
                }
            }
        }
    }
}

#[test]
fn route_and_routed_attention() {
    for device in devices() {
        let case = Case::new(40, 16, 8, 3);
        let config = case.config();
        let Inputs { q, k, v, .. } = case.inputs(3, Kind::Float, device);
        let ours = |x: &[Tensor]| {
            let chosen = route(&x[0], &x[1], &config).unwrap();
            routed_attention(&x[0], &x[1], &x[2], &chosen, &config).unwrap().0
        };
        let inputs = [q, k, v];
        let loaded = save_and_load(&format!("routed_{}", device.is_cuda()), &inputs, |x| vec![ours(x)]);
        assert_same_bits(&"out", &ours(&inputs), &loaded.forward_ts(&inputs).unwrap());
    }
}

/// A whole model: parameters become constants of the file, the policy is the one at the time of tracing.
#[test]
fn a_language_model() {
    for device in devices() {
        let config: LlamaConfig = serde_json::from_str(
            r#"{"vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
                "num_attention_heads": 4, "num_key_value_heads": 2, "moba": {"block_size": 8, "top_k": 2},
                "policy": "two-stage:0.5"}"#,
        )
        .unwrap();
        let mut vs = nn::VarStore::new(device);
        let model = Llama::new(vs.root(), &config).unwrap();
        vs.freeze(); // libtorch makes no constant of a tensor that requires a gradient
        let tokens = |seed: i64| (Tensor::arange(60, (Kind::Int64, device)) * seed).remainder(40).view([2, 30]);
        let name = format!("llama_{}", device.is_cuda());
        for step in [Step::prefill(0.4), Step::prefill(1.0)] {
            let loaded = save_and_load(&name, &[tokens(7)], |x| vec![model.forward(&x[0], step).unwrap()]);
            let logits = model.forward(&tokens(11), step).unwrap();
            assert_rounding(&"logits", &loaded.forward_ts(&[tokens(11)]).unwrap(), &logits);
        }
    }
}

/// An error inside a loaded module is an error of the call, not the end of the process.
#[test]
fn a_bad_input_to_a_loaded_module() {
    let case = Case::new(20, 16, 8, 2);
    let Inputs { q, k, v, .. } = case.inputs(4, Kind::Float, tch::Device::Cpu);
    let config = case.config();
    let inputs = [q, k, v];
    let loaded =
        save_and_load("bad_input", &inputs, |x| vec![moba_attention_with_lse(&x[0], &x[1], &x[2], &config).unwrap().0]);
    let [q, k, v] = &inputs;
    let text = loaded.forward_ts(&[q, &k.narrow(3, 0, 8), v]).unwrap_err().to_string();
    assert!(text.contains("k: wanted head_dim 16 as q, got 8"), "{text}");
    drop(loaded.forward_ts(&[q, k, v]).unwrap());
}
