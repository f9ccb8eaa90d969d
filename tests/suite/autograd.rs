//! Gradients: gradcheck with the routing fixed, and how the operators sit in autograd.

use tch::{Device, Kind, Tensor};
use tch_moba::{
    Error, GradcheckOptions, MobaConfig, Packed, gradcheck, moba_attention, moba_attention_varlen,
    moba_attention_with_lse, route, routed_attention,
};

use crate::kit::{Case, assert_same_bits, devices, gradients, largest, leaf, max_error, small};

#[test]
fn gradcheck_with_the_routing_fixed() {
    let cases = [
        ("plain", Case::new(12, 4, 4, 2)),
        ("grouped heads", Case::new(10, 3, 3, 2).heads(4, 2)),
        ("tail block of one token", Case::new(9, 5, 4, 3).batch(2)),
        ("fewer queries than keys", Case::new(11, 4, 3, 2).queries(4)),
        ("one query", Case::new(11, 4, 3, 2).queries(1).heads(2, 1)),
    ];
    for device in devices() {
        for (n, (name, case)) in cases.iter().enumerate().skip(if small() { 4 } else { 0 }) {
            let inputs = case.inputs(n as u64, Kind::Double, device);
            let chosen = route(&inputs.q, &inputs.k, &case.config()).unwrap();
            for deterministic in [false, true] {
                let config = case.config().with_softmax_scale(0.7).unwrap().with_deterministic(deterministic);
                let run = |x: &[Tensor]| routed_attention(&x[0], &x[1], &x[2], &chosen, &config);
                let points = [&inputs.q, &inputs.k, &inputs.v].map(Tensor::shallow_clone);
                let options = GradcheckOptions::default();
                let what = format!("{name} on {device:?}");
                gradcheck(|x| Ok(run(x)?.0), &points, &options).unwrap_or_else(|e| panic!("out, {what}: {e}"));
                gradcheck(|x| Ok(run(x)?.1), &points, &options).unwrap_or_else(|e| panic!("lse, {what}: {e}"));
                gradcheck(|x| run(x).map(|(out, lse)| out * lse.unsqueeze(-1)), &points, &options)
                    .unwrap_or_else(|e| panic!("out and lse, {what}: {e}"));
            }
        }
    }
}

/// The whole operator: at a random point no two scores are so near that a step of 1e-6 changes the selection.
#[test]
fn gradcheck_through_the_selection() {
    for device in devices() {
        let case = Case::new(40, 8, 8, 3).heads(4, 2);
        let inputs = case.inputs(8, Kind::Double, device);
        let points = [inputs.q, inputs.k, inputs.v];
        // Too many elements to move one by one: each input along one direction.
        let options = GradcheckOptions { max_elements: 0, ..Default::default() };
        gradcheck(|x| moba_attention(&x[0], &x[1], &x[2], &case.config()), &points, &options).unwrap();
        let cu_seqlens = Tensor::from_slice(&[0i32, 3, 3, 20, 40]).to_device(device);
        let packed =
            Packed { cu_seqlens_q: &cu_seqlens, cu_seqlens_k: &cu_seqlens, max_seqlen_q: 20, max_seqlen_k: 20 };
        let points = points.map(|x| x.squeeze_dim(0).transpose(0, 1).contiguous());
        let run = |x: &[Tensor]| moba_attention_varlen(&x[0], &x[1], &x[2], &packed, &case.config());
        gradcheck(|x| run(x).map(|(out, lse)| out * lse.transpose(0, 1).unsqueeze(-1)), &points, &options).unwrap();
    }
}

/// What 16-bit gradients say of a step along a direction, against differences of the operator in float64 with the same
/// routing.
#[test]
fn directions_in_16_bits_against_float64() {
    let cases = [
        Case::new(130, 64, 16, 3).heads(4, 2),
        Case::new(120, 128, 32, 2),
        Case::new(700, 128, 128, 3).heads(2, 1),
        Case::new(900, 64, 144, 2),
        Case::new(600, 80, 64, 4),
    ];
    for device in devices() {
        for (n, case) in cases.iter().enumerate().filter(|(_, case)| !small() || case.seqlen_k <= 130) {
            for (kind, unit) in [(Kind::BFloat16, 2f64.powi(-8)), (Kind::Half, 2f64.powi(-11))] {
                let inputs = case.inputs(30 + n as u64, kind, device);
                let chosen = route(&inputs.q, &inputs.k, &case.config()).unwrap();
                let run = |[q, k, v]: &[Tensor; 3]| routed_attention(q, k, v, &chosen, &case.config()).unwrap();
                let points = inputs.leaves();
                let (out, lse) = run(&points);
                let found = gradients(&[&out, &lse], &[&inputs.dout, &inputs.dlse], &points.each_ref());
                let wide = inputs.to(Kind::Double, device);
                let directions = case.inputs(60 + n as u64, Kind::Double, device);
                let (from, along) = ([&wide.q, &wide.k, &wide.v], [&directions.q, &directions.k, &directions.v]);
                for (moved, name) in ["dq", "dk", "dv"].into_iter().enumerate() {
                    let loss = |step: f64| {
                        let mut x = from.map(Tensor::shallow_clone);
                        x[moved] = from[moved] + step * along[moved];
                        let (out, lse) = run(&x);
                        (out * &wide.dout).sum(Kind::Double) + (lse * &wide.dlse).sum(Kind::Double)
                    };
                    let difference = ((loss(1e-4) - loss(-1e-4)) / 2e-4).double_value(&[]);
                    let terms = found[moved].to_kind(Kind::Double) * along[moved];
                    let error = (terms.sum(Kind::Double).double_value(&[]) - difference).abs();
                    // Independent errors of a few roundings in each term; a term left out costs more.
                    let allowed = 4.0 * unit * terms.norm().double_value(&[]);
                    assert!(error <= allowed, "{name} of {case:?}, {kind:?} on {device:?}: {error} > {allowed}");
                }
            }
        }
    }
}

#[test]
fn gradcheck_sees_a_wrong_gradient() {
    let x = Tensor::from_slice(&[0.5, -1.0, 2.0, 3.0]).view([2, 2]);
    let options = GradcheckOptions::default();
    let text = |result: tch_moba::Result<()>| match result {
        Err(Error::Gradient(text)) => text,
        other => panic!("want a gradient error, got {other:?}"),
    };
    gradcheck(|x| Ok(&x[0] * &x[1]), &[x.copy(), x.copy()], &options).unwrap();
    let half = text(gradcheck(|x| Ok(&x[0] * x[1].detach() * &x[1]), &[x.copy(), x.copy()], &options));
    assert!(half.contains("input 1, element [0, 0]") && half.contains("autograd says"), "{half}");
    let along = GradcheckOptions { max_elements: 3, ..options };
    let along = text(gradcheck(|x| Ok(x[0].detach() * &x[0]), &[x.copy()], &along));
    assert!(along.contains("input 0, along a direction"), "{along}");
    let nan = text(gradcheck(|x| Ok(x[0].log()), &[x.copy()], &options));
    assert!(nan.contains("NaN"), "{nan}");
    let kind = text(gradcheck(|x| Ok(x[0].square()), &[x.to_kind(Kind::Float)], &options));
    assert!(kind.contains("input 0 must be float64, got Float"), "{kind}");
    let constant = text(gradcheck(|x| Ok(x[0].detach()), &[x.copy()], &options));
    assert!(constant.contains("depends on no input"), "{constant}");
    let unused = gradcheck(|x| Ok(x[0].square()), &[x.copy(), x.copy()], &options);
    unused.unwrap();
}

#[test]
fn a_second_derivative_is_refused() {
    for device in devices() {
        let case = Case::new(20, 8, 4, 2);
        let [q, k, v] = case.inputs(9, Kind::Float, device).leaves();
        let out = moba_attention(&q, &k, &v, &case.config()).unwrap();
        let first = Tensor::run_backward(&[out.square().sum(Kind::Float)], &[&q], true, true);
        let refusal = Tensor::f_run_backward(&[first[0].square().sum(Kind::Float)], &[&k], false, false);
        let text = refusal.unwrap_err().to_string();
        assert!(text.contains("moba") && text.contains("second derivative"), "{text}");
        // Nothing is left behind: an ordinary gradient works as before.
        let out = moba_attention(&q, &k, &v, &case.config()).unwrap();
        assert!(largest(&Tensor::run_backward(&[out.sum(Kind::Float)], &[&v], false, false)[0]) > 0.0);
    }
}

#[test]
fn only_the_wanted_gradients() {
    for device in devices() {
        let case = Case::new(20, 8, 4, 2);
        let inputs = case.inputs(10, Kind::Float, device);
        let all = inputs.leaves();
        let (out, lse) = moba_attention_with_lse(&all[0], &all[1], &all[2], &case.config()).unwrap();
        let wanted = gradients(&[&out, &lse], &[&inputs.dout, &inputs.dlse], &[&all[0], &all[1], &all[2]]);
        for only in 0..3 {
            let mut x = [&inputs.q, &inputs.k, &inputs.v].map(Tensor::detach);
            x[only] = leaf(&x[only]);
            let (out, lse) = moba_attention_with_lse(&x[0], &x[1], &x[2], &case.config()).unwrap();
            let [found] = gradients(&[&out, &lse], &[&inputs.dout, &inputs.dlse], &[&x[only]]);
            let error = max_error(&only, &found, &wanted[only].to_kind(Kind::Double));
            assert!(error <= 1e-5, "input {only} on {device:?}: {error:e}");
        }
        let out = moba_attention(&inputs.q, &inputs.k, &inputs.v, &case.config()).unwrap();
        assert!(!out.requires_grad());
        let out = tch::no_grad(|| moba_attention(&all[0], &all[1], &all[2], &case.config())).unwrap();
        assert!(!out.requires_grad());
    }
}

/// A loss that uses one of the two outputs gives the other an undefined gradient.
#[test]
fn losses_of_one_output() {
    for device in devices() {
        let case = Case::new(33, 8, 8, 2).heads(4, 2);
        let inputs = case.inputs(11, Kind::Double, device);
        let [q, k, v] = inputs.leaves();
        let run = || moba_attention_with_lse(&q, &k, &v, &case.config()).unwrap();
        let both = |dout: &Tensor, dlse: &Tensor| {
            let (out, lse) = run();
            gradients(&[&out, &lse], &[dout, dlse], &[&q, &k, &v])
        };
        let (no_dout, no_dlse) = (inputs.dout.zeros_like(), inputs.dlse.zeros_like());
        let out_only = gradients(&[&run().0], &[&inputs.dout], &[&q, &k, &v]);
        let lse_only = gradients(&[&run().1], &[&inputs.dlse], &[&q, &k, &v]);
        for (found, wanted) in [(out_only, both(&inputs.dout, &no_dlse)), (lse_only, both(&no_dout, &inputs.dlse))] {
            for (name, (found, wanted)) in ["dq", "dk", "dv"].iter().zip(found.iter().zip(&wanted)) {
                assert!(max_error(name, found, wanted) <= 1e-12, "{name} on {device:?}");
            }
        }
        let [_, _, dv] = gradients(&[&run().1], &[&inputs.dlse], &[&q, &k, &v]);
        assert_eq!(largest(&dv), 0.0, "lse does not depend on v");
    }
}

#[test]
fn a_graph_can_be_walked_twice() {
    for device in devices() {
        let case = Case::new(33, 8, 8, 2);
        let [q, k, v] = case.inputs(12, Kind::Float, device).leaves();
        let config = MobaConfig::new(8, 2).unwrap().with_deterministic(true);
        let loss = moba_attention(&q, &k, &v, &config).unwrap().square().sum(Kind::Float);
        let first = Tensor::run_backward(&[&loss], &[&q, &k, &v], true, false);
        let second = Tensor::run_backward(&[&loss], &[&q, &k, &v], false, false);
        for (first, second) in first.iter().zip(&second) {
            assert_same_bits(&"gradient", first, second);
        }
    }
}

/// An input changed in place after the forward pass would give wrong gradients; libtorch must notice.
#[test]
fn a_change_in_place_is_noticed() {
    let case = Case::new(16, 8, 8, 2);
    let [q, k, v] = case.inputs(13, Kind::Float, Device::Cpu).leaves();
    let mut moved: Tensor = &k * 1.0;
    let out = moba_attention(&q, &moved, &v, &case.config()).unwrap();
    let _ = moved.fill_(0.0);
    let text = Tensor::f_run_backward(&[out.sum(Kind::Float)], &[&q], false, false).unwrap_err().to_string();
    assert!(text.contains("modified by an inplace operation"), "{text}");
}

/// The step from a gradient on the CPU to one on the GPU, at a size no oracle reaches.
#[test]
fn the_gpu_agrees_with_the_cpu() {
    for device in devices().into_iter().filter(|device| device.is_cuda()) {
        if small() {
            continue;
        }
        let case = Case::new(3000, 64, 256, 3).heads(4, 2);
        let run = |device| {
            let inputs = case.inputs(14, Kind::Double, device);
            crate::kit::Results::of(&inputs, |q, k, v| moba_attention_with_lse(q, k, v, &case.config()).unwrap())
        };
        let (cpu, gpu) = (run(Device::Cpu), run(device));
        for ((name, cpu), (_, gpu)) in cpu.named().iter().zip(gpu.named()) {
            assert!(max_error(name, gpu, cpu) <= 1e-11 * (1.0 + largest(cpu)), "{name}");
        }
    }
}
