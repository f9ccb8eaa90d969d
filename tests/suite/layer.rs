//! The attention layer and full attention: against plain tensor operations, causality, and switching by policy.

use rand::{SeedableRng, rngs::StdRng};
use tch::{Device, IndexOp, Kind, Tensor, nn};
use tch_moba::{Attention, AttentionConfig, HybridPolicy, MobaConfig, Step, full_attention, moba_attention, select};

use crate::kit::{
    Case, KINDS, assert_rounding, assert_same_bits, assert_within, devices, gradients, largest, normal, ulp,
};

fn random(seed: u64, size: &[i64], kind: Kind, device: Device) -> Tensor {
    normal(&mut StdRng::seed_from_u64(seed), size).to_kind(kind).to_device(device)
}

fn layer(policy: &str, device: Device) -> (nn::VarStore, Attention) {
    let vs = nn::VarStore::new(device);
    let config = AttentionConfig {
        num_heads_k: 2,
        head_dim: 12,
        bias: true,
        moba: MobaConfig::new(8, 2).unwrap(),
        policy: policy.parse().unwrap(),
        ..AttentionConfig::new(40, 4)
    };
    let layer = Attention::new(vs.root(), config).unwrap();
    tch::no_grad(|| {
        for (seed, (_, mut variable)) in
            vs.variables().into_iter().collect::<std::collections::BTreeMap<_, _>>().into_iter().enumerate()
        {
            variable.copy_(&(random(seed as u64, &variable.size(), Kind::Float, device) * 0.2));
        }
    });
    (vs, layer)
}

/// Hugging Face's rotation, position by position: the first half of a head turns against the second.
fn rotate(x: &Tensor, theta: f64) -> Tensor {
    let (seqlen, head_dim) = (x.size()[2], x.size()[3]);
    let half = head_dim / 2;
    let rotated = x.copy();
    for p in 0..seqlen {
        for c in 0..half {
            let angle = p as f64 / theta.powf(2.0 * c as f64 / head_dim as f64);
            let (a, b) = (x.i((.., .., p, c)), x.i((.., .., p, half + c)));
            rotated.i((.., .., p, c)).copy_(&(&a * angle.cos() - &b * angle.sin()));
            rotated.i((.., .., p, half + c)).copy_(&(&b * angle.cos() + &a * angle.sin()));
        }
    }
    rotated
}

#[test]
fn the_layer_is_its_parts() {
    for device in devices() {
        for policy in ["moba", "full"] {
            let (_vs, layer) = layer(policy, device);
            let xs = random(9, &[2, 30, 40], Kind::Float, device);
            let project = |linear: &nn::Linear, heads| {
                let flat = xs.linear(&linear.ws, linear.bs.as_ref());
                flat.view([2, 30, heads, 12]).transpose(1, 2).contiguous()
            };
            let (q, k) = (project(&layer.q_proj, 4), project(&layer.k_proj, 2));
            let [q, k] =
                [q, k].map(|x| tch::no_grad(|| rotate(&x.to_kind(Kind::Double), 10_000.0)).to_kind(Kind::Float));
            let v = project(&layer.v_proj, 2);
            let out = match policy {
                "moba" => moba_attention(&q, &k, &v, &MobaConfig::new(8, 2).unwrap()).unwrap(),
                _ => full_attention(&q, &k, &v, None).unwrap(),
            };
            let merged = out.transpose(1, 2).reshape([2, 30, 48]);
            let wanted = merged.linear(&layer.o_proj.ws, layer.o_proj.bs.as_ref());
            assert_rounding(
                &format!("{policy} on {device:?}"),
                &layer.forward(&xs, Step::train(0.0)).unwrap(),
                &wanted,
            );
        }
    }
}

#[test]
fn the_future_cannot_leak_through_a_layer() {
    for device in devices() {
        for policy in ["moba", "full"] {
            let (_vs, layer) = layer(policy, device);
            let xs = random(1, &[1, 50, 40], Kind::Float, device);
            let clean = layer.forward(&xs, Step::prefill(0.0)).unwrap();
            for from in [1, 7, 8, 9, 33, 49] {
                let spoilt = Tensor::cat(&[xs.narrow(1, 0, from), xs.narrow(1, from, 50 - from) * 5.0 + 1.0], 1);
                let spoilt = layer.forward(&spoilt, Step::prefill(0.0)).unwrap();
                assert_rounding(&policy, &spoilt.narrow(1, 0, from), &clean.narrow(1, 0, from));
            }
        }
    }
}

#[test]
fn switching_never_touches_parameters() {
    for device in devices() {
        let (vs, layer) = layer("two-stage:0.5", device);
        let before: Vec<Tensor> = vs.trainable_variables().iter().map(Tensor::copy).collect();
        let xs = random(2, &[1, 50, 40], Kind::Float, device);
        let [moba, full, decode] =
            [Step::train(0.4), Step::train(0.6), Step::decode()].map(|step| layer.forward(&xs, step).unwrap());
        assert!(largest(&(&moba - &full)) > 1e-3, "the two kinds differ on 50 tokens in blocks of 8");
        assert_same_bits(&"decoding is full", &full, &decode);
        assert_same_bits(&"and back", &moba, &layer.forward(&xs, Step::train(0.4)).unwrap());
        for (before, after) in before.iter().zip(vs.trainable_variables()) {
            assert_same_bits(&"parameter", before, &after);
        }
        assert_eq!(before.len(), 8);
    }
}

#[test]
fn gradients_reach_every_projection() {
    for device in devices() {
        let (vs, layer) = layer("moba", device);
        let xs = random(3, &[2, 30, 40], Kind::Float, device).set_requires_grad(true);
        let out = layer.forward(&xs, Step::train(0.0)).unwrap();
        let [dx] = gradients(&[&out], &[&random(4, &[2, 30, 40], Kind::Float, device)], &[&xs]);
        assert!(largest(&dx) > 0.0);
        layer.forward(&xs, Step::train(0.0)).unwrap().square().sum(Kind::Float).backward();
        for (name, variable) in vs.variables() {
            assert!(variable.grad().defined() && largest(&variable.grad()) > 0.0, "{name}");
        }
    }
}

#[test]
fn full_attention_is_attention() {
    let cases = [
        Case::new(40, 16, 1, 1).heads(4, 2).batch(2),
        Case::new(40, 16, 1, 1).queries(13).heads(4, 2),
        Case::new(40, 16, 1, 1).queries(1).heads(2, 1),
        Case::new(1, 16, 1, 1),
    ];
    for device in devices() {
        for kind in KINDS {
            for (n, case) in cases.iter().enumerate() {
                let x = case.inputs(n as u64, kind, device);
                let out = full_attention(&x.q, &x.k, &x.v, Some(0.3)).unwrap();
                let everything = Tensor::zeros([case.batch, case.heads, case.seqlen_q, 1], (Kind::Int, device));
                let one_block = Case { block_size: case.seqlen_k, ..*case };
                let truth = crate::oracle::attend(&one_block, &x, &everything, 0.3);
                // libtorch's kernels choose their own order and precision: a few units in the last place.
                let allowed = 8.0 * ulp(kind, largest(&truth.out));
                assert_within(&format!("{case:?} {kind:?} on {device:?}"), &out, &truth.out, allowed);
            }
        }
    }
}

#[test]
fn full_attention_refuses_what_moba_refuses() {
    let zeros = |size: &[i64], kind| Tensor::zeros(size, (kind, Device::Cpu));
    let good = || zeros(&[2, 4, 6, 8], Kind::Float);
    for (q, k, v, needles) in [
        (zeros(&[4, 6, 8], Kind::Float), good(), good(), ["q must be", "[4, 6, 8]"]),
        (good(), zeros(&[4, 6, 8], Kind::Float), good(), ["k must be", "[4, 6, 8]"]),
        (good(), good(), zeros(&[2, 4, 5, 8], Kind::Float), ["v must have the shape of k", "[2, 4, 5, 8]"]),
        (
            good(),
            zeros(&[2, 3, 6, 8], Kind::Float),
            zeros(&[2, 3, 6, 8], Kind::Float),
            ["multiple of heads_k", "4 and 3"],
        ),
        (good(), zeros(&[2, 4, 5, 8], Kind::Float), zeros(&[2, 4, 5, 8], Kind::Float), ["seqlen_q", "6 and 5"]),
        (good(), zeros(&[2, 4, 6, 8], Kind::Half), good(), ["k must be Float", "got Half"]),
    ] {
        let error = full_attention(&q, &k, &v, None).unwrap_err().to_string();
        assert!(needles.iter().all(|needle| error.contains(needle)), "want {needles:?} in {error:?}");
        assert_eq!(select(&q, &k, &v, &MobaConfig::default()).backend, None);
    }
}

#[test]
fn wrong_layers_are_refused() {
    let vs = nn::VarStore::new(Device::Cpu);
    let good = AttentionConfig::new(64, 4);
    for (config, wanted) in [
        (AttentionConfig { hidden_size: 0, ..good.clone() }, "hidden_size must be at least 1, got 0"),
        (
            AttentionConfig { num_heads_k: 3, ..good.clone() },
            "num_heads must be a positive multiple of num_heads_k = 3, got 4",
        ),
        (AttentionConfig { num_heads_k: 0, ..good.clone() }, "num_heads_k must be at least 1, got 0"),
        (AttentionConfig { rope_theta: 0.0, ..good.clone() }, "rope_theta must be positive and finite, got 0"),
        (AttentionConfig { layer: 2, num_layers: 2, ..good.clone() }, "layer must be below num_layers = 2, got 2"),
    ] {
        let error = Attention::new(vs.root(), config).unwrap_err().to_string();
        assert!(error.contains(wanted), "{error}");
    }
    assert!(vs.is_empty(), "a refused layer leaves no variables");
    let custom = HybridPolicy::custom("all full", |_, _, _| tch_moba::AttentionKind::Full);
    Attention::new(vs.root(), AttentionConfig { policy: custom, ..good }).unwrap();
}
