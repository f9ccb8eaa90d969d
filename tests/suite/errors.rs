//! Wrong arguments: each is an error that names the argument, what was wanted and what was given; tensors and process
//! stay as they were.

use tch::{Device, Kind, Tensor};
use tch_moba::{
    Error, MobaConfig, Packed, Result,
    dispatch::{Value, call},
    moba_attention, moba_attention_varlen, route, routed_attention,
};

use crate::kit::{Case, Inputs, assert_same_bits, devices};

/// Runs a bad call, looks for `needles` in its error, then runs a good call on the tensors it was given.
fn refused<T: std::fmt::Debug>(inputs: &Inputs, bad: impl FnOnce() -> Result<T>, needles: &[&str]) {
    let good = || moba_attention(&inputs.q, &inputs.k, &inputs.v, &MobaConfig::new(8, 2).unwrap()).unwrap();
    let before = good();
    let error = bad().expect_err(&format!("want an error that says {needles:?}"));
    let text = error.to_string();
    assert!(matches!(error, Error::Torch { .. }), "{error:?}");
    for needle in needles {
        assert!(text.contains(needle), "want {needle:?} in {text:?}");
    }
    assert!(!text.contains("Exception raised from") && !text.contains("frame #"), "no backtrace: {text}");
    assert_same_bits(&"a good call after a bad one", &before, &good());
}

fn inputs(device: Device) -> Inputs {
    Case::new(20, 16, 8, 2).heads(4, 2).batch(2).inputs(1, Kind::Float, device)
}

#[test]
fn configurations() {
    let text = |result: Result<MobaConfig>| result.unwrap_err().to_string();
    for (error, needles) in [
        (text(MobaConfig::new(0, 3)), ["block_size", "at least 1", "got 0"]),
        (text(MobaConfig::new(-512, 3)), ["block_size", "at least 1", "got -512"]),
        (text(MobaConfig::new(512, 0)), ["top_k", "at least 1", "got 0"]),
        (text(MobaConfig::default().with_softmax_scale(f64::NAN)), ["softmax_scale", "finite", "got NaN"]),
        (text("512".parse()), ["BLOCK_SIZExTOP_K", "512x3", "\"512\""]),
        (text("axb".parse()), ["BLOCK_SIZExTOP_K", "512x3", "\"axb\""]),
        (text("512x0".parse()), ["top_k", "at least 1", "got 0"]),
    ] {
        assert!(needles.iter().all(|needle| error.contains(needle)), "want {needles:?} in {error:?}");
    }
}

#[test]
fn configurations_round_trip() {
    let config = MobaConfig::new(64, 5).unwrap().with_softmax_scale(0.25).unwrap().with_deterministic(true);
    let json = serde_json::to_string(&config).unwrap();
    assert_eq!(serde_json::from_str::<MobaConfig>(&json).unwrap(), config);
    assert_eq!(serde_json::from_str::<MobaConfig>(r#"{"block_size":512,"top_k":3}"#).unwrap(), MobaConfig::default());
    assert_eq!(config.to_string().parse::<MobaConfig>().unwrap(), MobaConfig::new(64, 5).unwrap());
    for bad in [r#"{"block_size":0,"top_k":3}"#, r#"{"block_size":1}"#, r#"{"block_size":1,"top_k":1,"topk":2}"#] {
        serde_json::from_str::<MobaConfig>(bad).unwrap_err();
    }
}

/// What `MobaConfig` cannot hold still reaches the operators from Python and TorchScript.
#[test]
fn numbers_at_the_operator() {
    for device in devices() {
        let x = inputs(device);
        let qkv = || [Value::from(&x.q), Value::from(&x.k), Value::from(&x.v)];
        let attention = |block_size: i64, top_k: i64, scale: Value<'static>| {
            call("moba::attention", &[qkv().as_slice(), &[block_size.into(), top_k.into(), scale]].concat())
        };
        let none = Value::None;
        refused(&x, || attention(0, 2, none), &["block_size", "wanted at least 1", "got 0"]);
        refused(&x, || attention(-3, 2, none), &["block_size", "wanted at least 1", "got -3"]);
        refused(&x, || attention(8, 0, none), &["top_k", "wanted at least 1", "got 0"]);
        refused(&x, || attention(8, i64::MIN, none), &["top_k", "wanted at least 1", "got -9223372036854775808"]);
        for scale in [f64::NAN, f64::INFINITY] {
            refused(&x, || attention(8, 2, scale.into()), &["softmax_scale", "wanted a finite number", "got"]);
        }
        let route = |block_size: i64, top_k: i64| {
            call("moba::route", &[(&x.q).into(), (&x.k).into(), block_size.into(), top_k.into()])
        };
        refused(&x, || route(0, 1), &["block_size", "wanted at least 1", "got 0"]);
        refused(&x, || route(1, 0), &["top_k", "wanted at least 1", "got 0"]);
    }
}

#[test]
fn shapes_dtypes_and_devices() {
    for device in devices() {
        let x = inputs(device);
        let config = MobaConfig::new(8, 2).unwrap();
        let zeros = |size: &[i64]| Tensor::zeros(size, (Kind::Float, device));
        let with = |q: &Tensor, k: &Tensor, v: &Tensor, needles: &[&str]| {
            refused(&x, || moba_attention(q, k, v, &config), needles);
        };
        let (q, k, v) = (&x.q, &x.k, &x.v);
        with(&q.get(0), k, v, &["q", "wanted 4 dimensions [batch, heads, seqlen_q, head_dim]", "got 3", "[4, 20, 16]"]);
        with(q, &k.get(0), v, &["k", "wanted 4 dimensions", "got 3", "[2, 20, 16]"]);
        with(q, k, &v.get(0), &["v", "wanted 4 dimensions", "got 3", "[2, 20, 16]"]);
        with(&q.get(0).get(0).get(0).get(0), k, v, &["q", "wanted 4 dimensions", "got 0"]);
        with(&q.to_kind(Kind::Int64), k, v, &["q", "wanted dtype Float, Double, BFloat16 or Half", "got Long"]);
        with(&q.to_kind(Kind::ComplexFloat), k, v, &["q", "wanted dtype", "got Complex"]);
        with(q, &k.to_kind(Kind::Half), v, &["k", "wanted dtype Float as q", "got Half"]);
        with(q, k, &v.to_kind(Kind::Double), &["v", "wanted dtype Float as q", "got Double"]);
        with(q, &k.narrow(3, 0, 8), v, &["k", "wanted head_dim 16 as q", "got 8"]);
        with(q, k, &v.narrow(3, 0, 8), &["v", "wanted shape [2, 2, 20, 16] as k", "got [2, 2, 20, 8]"]);
        with(q, k, &v.narrow(2, 0, 19), &["v", "wanted shape [2, 2, 20, 16]", "got [2, 2, 19, 16]"]);
        with(q, &k.narrow(0, 0, 1), &v.narrow(0, 0, 1), &["k", "wanted batch 2 as q", "got 1"]);
        with(
            q,
            &zeros(&[2, 3, 20, 16]),
            &zeros(&[2, 3, 20, 16]),
            &["q", "multiple of the 3 heads of k", "got 4 heads"],
        );
        with(
            q,
            &zeros(&[2, 8, 20, 16]),
            &zeros(&[2, 8, 20, 16]),
            &["q", "multiple of the 8 heads of k", "got 4 heads"],
        );
        with(q, &zeros(&[2, 0, 20, 16]), &zeros(&[2, 0, 20, 16]), &["k", "at least 1 head", "got 0"]);
        with(q, &k.narrow(2, 0, 12), &v.narrow(2, 0, 12), &["q", "at most seqlen_k", "seqlen_q 20 and seqlen_k 12"]);
        let empty = zeros(&[2, 4, 20, 0]);
        with(&empty, &empty, &empty, &["q", "wanted head_dim of at least 1", "got 0"]);
        with(&Tensor::new(), k, v, &["q: wanted 4 dimensions", "got 1 dimensions [0]"]);
        refused(&x, || route(q, &k.narrow(3, 0, 8), &config), &["k", "wanted head_dim 16 as q", "got 8"]);
        refused(&x, || route(&q.get(0), k, &config), &["q", "wanted 4 dimensions", "got 3"]);
        if device.is_cuda() {
            with(q, &k.to_device(Device::Cpu), v, &["k", "wanted device cuda:0 as q", "got cpu"]);
            with(q, k, &v.to_device(Device::Cpu), &["v", "wanted device cuda:0 as q", "got cpu"]);
            with(&q.to_device(Device::Cpu), k, v, &["k", "wanted device cpu as q", "got cuda:0"]);
            let wide = zeros(&[1, 1, 4, 257]);
            with(&wide, &wide, &wide, &["head_dim", "256", "257"]);
        }
    }
}

#[test]
fn routes() {
    for device in devices() {
        let x = inputs(device);
        let config = MobaConfig::new(8, 2).unwrap();
        let chosen = route(&x.q, &x.k, &config).unwrap();
        let with = |chosen: &Tensor, needles: &[&str]| {
            refused(&x, || routed_attention(&x.q, &x.k, &x.v, chosen, &config), needles);
        };
        with(&chosen.to_kind(Kind::Int64), &["route", "wanted dtype Int", "got Long"]);
        with(&chosen.get(0), &["route", "wanted 4 dimensions", "got [4, 20, 2]"]);
        with(&chosen.narrow(3, 0, 0), &["route", "at least 1 slot", "got [2, 4, 20, 0]"]);
        with(&chosen.narrow(2, 0, 19), &["route", "wanted shape [2, 4, 20, 2]", "got [2, 4, 19, 2]"]);
        with(&chosen.narrow(1, 0, 2), &["route", "wanted shape [2, 4, 20, 2]", "got [2, 2, 20, 2]"]);
        if device.is_cuda() {
            with(&chosen.to_device(Device::Cpu), &["route", "wanted device cuda:0", "got cpu"]);
        }
    }
}

#[test]
fn packed_batches() {
    for device in devices() {
        let x = inputs(device);
        let config = MobaConfig::new(8, 2).unwrap();
        let [q, k, v] = [(30, 4), (30, 2), (30, 2)].map(|(n, h)| Tensor::ones([n, h, 16], (Kind::Float, device)));
        let cu = |entries: &[i32]| Tensor::from_slice(entries).to_device(device);
        let run = |q: &Tensor, k: &Tensor, v: &Tensor, cu_q: &Tensor, cu_k: &Tensor, max_q: i64, max_k: i64| {
            let packed = Packed { cu_seqlens_q: cu_q, cu_seqlens_k: cu_k, max_seqlen_q: max_q, max_seqlen_k: max_k };
            moba_attention_varlen(q, k, v, &packed, &config)
        };
        // Any bound is allowed that holds.
        const LONG: i64 = 1 << 40;
        let right = cu(&[0, 10, 30]);
        drop(run(&q, &k, &v, &right, &right, 20, 20).unwrap());
        let with_q = |bad: &Tensor, needles: &[&str]| refused(&x, || run(&q, &k, &v, bad, &right, LONG, LONG), needles);
        let with_k = |bad: &Tensor, needles: &[&str]| refused(&x, || run(&q, &k, &v, &right, bad, LONG, LONG), needles);
        with_q(&cu(&[0, 20, 10]), &["cu_seqlens_q", "non-decreasing", "got 20 then 10"]);
        with_k(&cu(&[0, 40, 30]), &["cu_seqlens_k", "got"]);
        with_k(&cu(&[0, 31, 30]), &["cu_seqlens_k", "got"]);
        with_q(&cu(&[1, 10, 30]), &["cu_seqlens_q", "first entry of 0", "got 1"]);
        with_q(&cu(&[-1, 10, 30]), &["cu_seqlens_q", "first entry of 0", "got -1"]);
        with_q(&cu(&[0, 10, 29]), &["cu_seqlens_q", "last entry of 30", "got 29"]);
        with_k(&cu(&[0, 10, 31]), &["cu_seqlens_k", "31"]);
        with_k(&cu(&[0, i32::MAX, 30]), &["cu_seqlens_k"]);
        with_k(&cu(&[0, i32::MIN, 30]), &["cu_seqlens_k", "non-decreasing", "-2147483648"]);
        with_k(&cu(&[0, 30]), &["cu_seqlens_k", "wanted 3 entries as cu_seqlens_q", "got 2"]);
        with_k(&cu(&[0, 9, 30]), &["cu_seqlens_q", "at most as many queries as keys", "10 queries and 9 keys"]);
        with_q(&cu(&[]), &["cu_seqlens_q", "wanted shape [sequences + 1]", "got [0]"]);
        with_q(&right.view([3, 1]), &["cu_seqlens_q", "wanted shape [sequences + 1]", "got [3, 1]"]);
        with_q(&right.to_kind(Kind::Int64), &["cu_seqlens_q", "wanted dtype Int", "got Long"]);
        with_k(&right.to_kind(Kind::Float), &["cu_seqlens_k", "wanted dtype Int", "got Float"]);
        refused(
            &x,
            || run(&q, &k, &v, &right, &right, 19, 20),
            &["max_seqlen_q", "longest sequence", "got 19", "20 tokens"],
        );
        refused(
            &x,
            || run(&q, &k, &v, &right, &right, 20, 5),
            &["max_seqlen_k", "longest sequence", "got 5", "10 tokens"],
        );
        refused(&x, || run(&q, &k, &v, &right, &right, -1, 20), &["max_seqlen_q", "got -1"]);
        let dense = q.unsqueeze(0);
        refused(
            &x,
            || run(&dense, &k, &v, &right, &right, 20, 20),
            &["q", "wanted 3 dimensions [tokens_q, heads, head_dim]", "got 4"],
        );
        refused(
            &x,
            || run(&q, &k, &v.narrow(0, 0, 29), &right, &right, 20, 20),
            &["v", "wanted shape [30, 2, 16]", "got [29, 2, 16]"],
        );
        if device.is_cuda() {
            with_q(&right.to_device(Device::Cpu), &["cu_seqlens_q", "wanted device cuda:0", "got cpu"]);
        }
        drop(run(&q, &k, &v, &right, &right, 20, 20).unwrap());
    }
}

/// A library without CUDA kernels must say so instead of failing in some other way.
#[test]
fn gpu_tensors_in_a_build_without_gpu_kernels() {
    let gpu = Device::cuda_if_available();
    if cfg!(feature = "cuda") || !gpu.is_cuda() {
        return;
    }
    let x = Tensor::zeros([1, 1, 4, 16], (Kind::Float, gpu));
    let text = moba_attention(&x, &x, &x, &MobaConfig::default()).unwrap_err().to_string();
    assert!(text.contains("feature `cuda`"), "{text}");
}
