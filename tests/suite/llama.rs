//! The language model: Hugging Face's logits from Hugging Face's files, and readable refusals of other files.

use std::{fs, path::PathBuf};

use tch::{Device, Kind, Tensor, nn, nn::ModuleT};
use tch_moba::{
    Attention, AttentionConfig, HybridPolicy, MobaConfig, Step,
    llama::{Llama, LlamaConfig, load_weights, read_tensors},
};

use crate::kit::{devices, golden_dir};

fn golden(name: &str) -> PathBuf {
    golden_dir().join("llama").join(name)
}

fn model(config: &LlamaConfig, device: Device) -> (nn::VarStore, Llama) {
    let vs = nn::VarStore::new(device);
    let model = Llama::new(vs.root(), config).unwrap();
    (vs, model)
}

fn largest(tensor: &Tensor) -> f64 {
    f64::try_from(tensor.abs().max()).unwrap()
}

/// A directory of this test's own, removed at its end.
struct Scratch(PathBuf);

impl Scratch {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("tch-moba-{name}-{}", std::process::id()));
        fs::create_dir_all(&path).unwrap();
        Self(path)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

#[test]
fn logits_of_hugging_face() {
    for name in ["tied", "untied"] {
        let expected = read_tensors(golden(name).join("expected.safetensors")).unwrap();
        for (device, policy, moba) in devices().into_iter().flat_map(|device| {
            // One block holds the whole sequence: MoBA then is full attention.
            [("full", "4x1"), ("moba", "64x1"), ("moba", "4x6")].map(|(policy, moba)| (device, policy, moba))
        }) {
            let mut config = LlamaConfig::read(golden(name).join("config.json")).unwrap();
            (config.policy, config.moba) = (policy.parse().unwrap(), moba.parse().unwrap());
            let (vs, model) = model(&config, device);
            load_weights(&vs, golden(name).join("model.safetensors")).unwrap();
            let logits = model.forward(&expected["tokens"].to_device(device), Step::prefill(1.0)).unwrap();
            let wanted = &expected["logits"];
            let error = largest(&(logits.to_device(Device::Cpu) - wanted));
            assert!(error <= 2e-6 * largest(wanted), "{name}, {policy} {moba} on {device:?}: {error:e}");
        }
    }
}

#[test]
fn sparse_attention_changes_the_logits() {
    let mut config = LlamaConfig::read(golden("tied").join("config.json")).unwrap();
    let expected = read_tensors(golden("tied").join("expected.safetensors")).unwrap();
    config.moba = MobaConfig::new(4, 2).unwrap();
    let (vs, model) = model(&config, Device::Cpu);
    load_weights(&vs, golden("tied").join("model.safetensors")).unwrap();
    let difference = model.forward(&expected["tokens"], Step::prefill(1.0)).unwrap() - &expected["logits"];
    // Two blocks are all there is to see for the first eight tokens, and fewer than all for the last.
    assert!(largest(&difference.narrow(1, 0, 8)) < 1e-5);
    assert!(largest(&difference.narrow(1, 20, 1)) > 1e-3);
}

#[test]
fn every_parameter_gets_a_gradient_under_every_policy() {
    let mut config = LlamaConfig::read(golden("untied").join("config.json")).unwrap();
    config.moba = MobaConfig::new(4, 2).unwrap();
    let tokens = Tensor::arange(2 * 21, (Kind::Int64, Device::Cpu)).remainder(31).view([2, 21]);
    let mut names = Vec::new();
    for policy in ["moba", "full", "layer-wise:1", "two-stage:0.5", "hybrid:1,0.5"] {
        config.policy = policy.parse().unwrap();
        let (vs, model) = model(&config, Device::Cpu);
        let logits = model.forward(&tokens, Step::train(0.4)).unwrap();
        assert_eq!(logits.size(), [2, 21, 31]);
        logits.square().mean(Kind::Float).backward();
        let variables: std::collections::BTreeMap<_, _> = vs.variables().into_iter().collect();
        for (name, variable) in &variables {
            assert!(variable.grad().defined() && largest(&variable.grad()) > 0.0, "{policy}: {name}");
        }
        names.push(variables.into_keys().collect::<Vec<_>>());
    }
    assert!(names.iter().all(|others| *others == names[0]), "the policy must not change the parameters");
}

#[test]
fn config_of_another_model_is_refused() {
    for (json, wanted) in [
        (r#"{"model_type": "gpt2"}"#, r#"model_type must be "llama", got "gpt2""#),
        (r#"{"hidden_act": "gelu"}"#, r#"hidden_act must be "silu", got "gelu""#),
        (r#"{"attention_dropout": 0.1}"#, "attention_dropout must be 0, got 0.1"),
        (r#"{"rope_scaling": {"type": "linear", "factor": 2.0}}"#, r#"rope_scaling must be null or of type "default""#),
        (
            r#"{"rope_scaling": {"factor": 2.0}}"#,
            r#"rope_scaling must be null or of type "default", got one without a type"#,
        ),
        (r#"{"rope_parameters": {"rope_type": "llama3"}}"#, r#"got type "llama3""#),
        (
            r#"{"num_key_value_heads": 5}"#,
            "num_attention_heads must be a multiple of num_key_value_heads, got 32 and 5",
        ),
        (r#"{"hidden_size": 100}"#, "hidden_size must be a multiple of num_attention_heads, got 100 and 32"),
        (r#"{"head_dim": 33}"#, "head_dim must be even and at least 2, got 33"),
        (r#"{"vocab_size": 0}"#, "vocab_size must be at least 1, got 0"),
        (r#"{"policy": "sometimes"}"#, "policy must be moba, full"),
        (r#"{"moba": {"block_size": 0, "top_k": 3}}"#, "block_size must be at least 1, got 0"),
        ("{", "not a Llama config.json"),
    ] {
        let scratch = Scratch::new("config");
        let path = scratch.0.join("config.json");
        fs::write(&path, json).unwrap();
        let error = LlamaConfig::read(&path).unwrap_err().to_string();
        assert!(error.contains(wanted) && error.contains("config.json"), "{json}: {error}");
        assert_eq!(error.lines().count(), 1, "{error}");
    }
}

#[test]
fn config_survives_a_round_trip() {
    let config = LlamaConfig::read(golden("tied").join("config.json")).unwrap();
    assert_eq!((config.heads_k(), config.head_dim(), config.rope_theta()), (2, 8, 5000.0));
    let policy = HybridPolicy::hybrid(3, 0.9).unwrap();
    let config = LlamaConfig { policy, moba: MobaConfig::new(256, 4).unwrap(), ..config };
    let json = serde_json::to_string(&config).unwrap();
    assert!(json.contains(r#""policy":"hybrid:3,0.9""#), "{json}");
    assert_eq!(serde_json::from_str::<LlamaConfig>(&json).unwrap(), config);
    let custom = LlamaConfig { policy: HybridPolicy::custom("mine", |_, _, _| panic!("not asked")), ..config };
    let error = serde_json::to_string(&custom).unwrap_err().to_string();
    assert!(error.contains("custom policy \"mine\" is a function and cannot be saved"), "{error}");
}

#[test]
fn weights_of_another_model_are_refused() {
    let config = LlamaConfig::read(golden("untied").join("config.json")).unwrap();
    let scratch = Scratch::new("weights");
    let whole = golden("untied").join("model.safetensors");
    let truncated = scratch.0.join("truncated.safetensors");
    let bytes = fs::read(&whole).unwrap();
    fs::write(&truncated, &bytes[..bytes.len() - 100]).unwrap();
    let other = LlamaConfig { vocab_size: 32, ..config.clone() };
    for (config, path, wanted) in [
        (&config, truncated, "not a whole safetensors file"),
        (&config, scratch.0.join("nowhere.safetensors"), "cannot be read"),
        (&config, golden("tied").join("model.safetensors"), "it lacks lm_head.weight; it has the unknown model.layers"),
        (&other, whole, "another shape for lm_head.weight (wanted [32, 16], got [31, 16]), model.embed_tokens.weight"),
    ] {
        let (vs, _model) = model(config, Device::Cpu);
        let before: Vec<_> = vs.variables().into_iter().map(|(name, tensor)| (name, tensor.copy())).collect();
        let error = load_weights(&vs, &path).unwrap_err().to_string();
        assert!(error.contains(wanted) && error.starts_with(&path.display().to_string()), "{error}");
        assert_eq!(error.lines().count(), 1, "{error}");
        let after = vs.variables();
        assert!(before.iter().all(|(name, tensor)| after[name].equal(tensor)), "a refused file changed a variable");
    }
}

#[test]
fn wrong_inputs_are_refused() {
    let config = LlamaConfig::read(golden("tied").join("config.json")).unwrap();
    let (_vs, model) = model(&config, Device::Cpu);
    let error = model.forward(&Tensor::zeros([4], (Kind::Float, Device::Cpu)), Step::decode()).unwrap_err();
    assert_eq!(error.to_string(), "Llama: tokens must be Int64 [batch, seqlen], got Float [4]");

    let vs = nn::VarStore::new(Device::Cpu);
    let attention = Attention::new(vs.root(), AttentionConfig::new(64, 4)).unwrap();
    let error = attention.forward(&Tensor::zeros([2, 3, 65], (Kind::Float, Device::Cpu)), Step::decode()).unwrap_err();
    assert_eq!(error.to_string(), "Attention: xs must be [batch, seqlen, hidden_size = 64], got [2, 3, 65]");
    let odd = AttentionConfig { head_dim: 7, ..AttentionConfig::new(64, 4) };
    let error = Attention::new(vs.root(), odd).unwrap_err().to_string();
    assert!(error.contains("head_dim must be even and at least 2"), "{error}");
}

#[test]
fn module_follows_train_and_progress() {
    let vs = nn::VarStore::new(Device::Cpu);
    let config = AttentionConfig {
        num_heads_k: 2,
        moba: MobaConfig::new(8, 2).unwrap(),
        policy: HybridPolicy::two_stage(0.5).unwrap(),
        ..AttentionConfig::new(64, 4)
    };
    let mut attention = Attention::new(vs.root(), config).unwrap();
    let xs = Tensor::randn([2, 50, 64], (Kind::Float, Device::Cpu));
    let (moba, full) =
        (attention.forward(&xs, Step::train(0.1)).unwrap(), attention.forward(&xs, Step::train(0.7)).unwrap());
    assert!(largest(&(&moba - &full)) > 1e-3);
    assert!(attention.forward_t(&xs, true).equal(&moba));
    attention.set_progress(0.5);
    assert!(attention.forward_t(&xs, true).equal(&full) && attention.forward_t(&xs, false).equal(&full));
    assert!(attention.forward_t(&Tensor::zeros([1, 0, 64], (Kind::Float, Device::Cpu)), true).size() == [1, 0, 64]);
}
