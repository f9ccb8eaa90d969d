//! Which attention runs in which layer at which time: tables, text forms and refusals.

use tch::{Device, nn};
use tch_moba::{
    Attention, AttentionConfig,
    AttentionKind::{self, Full, Moba},
    HybridPolicy, Phase, Step,
    llama::LlamaConfig,
};

fn kinds(policy: &HybridPolicy, num_layers: usize, step: Step) -> Vec<AttentionKind> {
    (0..num_layers).map(|layer| policy.kind(layer, num_layers, step)).collect()
}

#[test]
fn table() {
    let table = [
        // policy, progress, what each of four layers runs
        ("moba", 0.0, [Moba; 4]),
        ("moba", 1.0, [Moba; 4]),
        ("full", 0.0, [Full; 4]),
        ("layer-wise:0", 0.5, [Moba; 4]),
        ("layer-wise:1", 0.0, [Moba, Moba, Moba, Full]),
        ("layer-wise:3", 1.0, [Moba, Full, Full, Full]),
        ("layer-wise:4", 0.0, [Full; 4]),
        ("layer-wise:99", 0.0, [Full; 4]),
        ("two-stage:0.9", 0.0, [Moba; 4]),
        ("two-stage:0.9", 0.899, [Moba; 4]),
        ("two-stage:0.9", 0.9, [Full; 4]),
        ("two-stage:0", 0.0, [Full; 4]),
        ("two-stage:1", 0.999, [Moba; 4]),
        ("two-stage:1", 1.0, [Full; 4]),
        ("hybrid:2,0.5", 0.4, [Moba, Moba, Full, Full]),
        ("hybrid:2,0.5", 0.5, [Full; 4]),
        ("hybrid:0,0.5", 0.4, [Moba; 4]),
    ];
    for (text, progress, wanted) in table {
        let policy: HybridPolicy = text.parse().unwrap();
        assert_eq!(kinds(&policy, 4, Step::train(progress)), wanted, "{text} in training at {progress}");
        assert_eq!(kinds(&policy, 4, Step::prefill(progress)), wanted, "{text} in prefill at {progress}");
        assert_eq!(kinds(&policy, 4, Step::decode()), [Full; 4], "{text} in decoding");
        assert_eq!(kinds(&policy, 0, Step::train(progress)), []);
    }
}

#[test]
fn a_function_of_the_callers() {
    let policy = HybridPolicy::custom("odd layers full", |layer, _, step| {
        if layer % 2 == 1 || step.phase == Phase::Prefill { Full } else { Moba }
    });
    assert_eq!(kinds(&policy, 3, Step::train(0.5)), [Moba, Full, Moba]);
    assert_eq!(kinds(&policy, 3, Step::prefill(0.5)), [Full; 3]);
    assert_eq!(kinds(&policy, 3, Step::decode()), [Moba, Full, Moba], "it decides for decoding too");
    assert_eq!(policy, policy.clone());
    assert_ne!(policy, HybridPolicy::custom("odd layers full", |_, _, _| Full));
    assert_eq!(policy.to_string(), "custom:odd layers full");
    let error = serde_json::to_string(&policy).unwrap_err().to_string();
    assert!(error.contains("odd layers full") && error.contains("cannot be saved"), "{error}");
}

#[test]
fn text_and_json_round_trips() {
    for text in ["moba", "full", "layer-wise:3", "two-stage:0.9", "two-stage:0", "hybrid:3,0.125", "hybrid:0,1"] {
        let policy: HybridPolicy = text.parse().unwrap();
        assert_eq!(policy.to_string(), text);
        let json = serde_json::to_string(&policy).unwrap();
        assert_eq!(serde_json::from_str::<HybridPolicy>(&json).unwrap(), policy, "{json}");
    }
    assert_eq!(HybridPolicy::default(), HybridPolicy::Moba);
    assert_eq!(HybridPolicy::two_stage(0.9).unwrap(), "two-stage:0.9".parse().unwrap());
    assert_eq!(HybridPolicy::hybrid(3, 0.9).unwrap(), "hybrid:3,0.9".parse().unwrap());
    assert_eq!(HybridPolicy::LayerWise { full_last: 3 }, "layer-wise:3".parse().unwrap());
}

#[test]
fn refusals() {
    for text in [
        "",
        "MoBA?",
        "layer-wise",
        "layer-wise:",
        "layer-wise:-1",
        "layer-wise:x",
        "two-stage:2",
        "two-stage:-0.1",
        "two-stage:NaN",
        "hybrid:1",
        "hybrid:1,2",
        "hybrid:1,0.5,3",
        "custom:mine",
    ] {
        let error = text.parse::<HybridPolicy>().unwrap_err().to_string();
        assert!(error.contains("got"), "{text}: {error}");
        serde_json::from_str::<HybridPolicy>(&serde_json::to_string(text).unwrap()).unwrap_err();
    }
    for switch_at in [-0.1, 1.1, f64::NAN, f64::INFINITY] {
        let error = HybridPolicy::two_stage(switch_at).unwrap_err().to_string();
        assert!(error.contains(&switch_at.to_string()), "{error}");
        HybridPolicy::hybrid(1, switch_at).unwrap_err();
        // Written down by its fields, it is refused where it is used.
        let policy = HybridPolicy::TwoStage { switch_at };
        let layer = Attention::new(
            nn::VarStore::new(Device::Cpu).root(),
            AttentionConfig { policy: policy.clone(), ..AttentionConfig::new(8, 2) },
        );
        assert_eq!(layer.unwrap_err().to_string(), error);
        assert_eq!(LlamaConfig { policy, ..LlamaConfig::default() }.check().unwrap_err().to_string(), error);
    }
}
