//! Mixed precision: under autocast the operators take their inputs in the autocast dtype.

use std::panic::{AssertUnwindSafe, catch_unwind};

use tch::{Device, Kind, Tensor};
use tch_moba::{
    Error, Packed, autocast, moba_attention, moba_attention_varlen, moba_attention_with_lse, route, routed_attention,
};

use crate::kit::{Case, Results, assert_same_bits, devices};

#[test]
fn the_same_as_casting_by_hand() {
    for device in devices() {
        for kind in [Kind::BFloat16, Kind::Half] {
            let case = Case::new(70, 32, 16, 3).heads(4, 2);
            let config = case.config().with_deterministic(true);
            let inputs = case.inputs(1, Kind::Float, device);
            let auto = autocast(device, kind, || {
                Results::of(&inputs, |q, k, v| moba_attention_with_lse(q, k, v, &config).unwrap())
            })
            .unwrap();
            let cast = Results::of(&inputs, |q, k, v| {
                let [q, k, v] = [q, k, v].map(|x| x.to_kind(kind));
                moba_attention_with_lse(&q, &k, &v, &config).unwrap()
            });
            assert_eq!((auto.out.kind(), auto.lse.kind(), auto.dq.kind()), (kind, Kind::Float, Kind::Float));
            for ((name, auto), (_, cast)) in auto.named().iter().zip(cast.named()) {
                assert_same_bits(&format!("{name} {kind:?} on {device:?}"), auto, cast);
            }
        }
    }
}

#[test]
fn every_operator() {
    for device in devices() {
        let case = Case::new(40, 16, 8, 3);
        let (kind, config) = (Kind::BFloat16, case.config());
        let inputs = case.inputs(2, Kind::Float, device);
        let halves = inputs.to(kind, device);
        let cu_seqlens = Tensor::from_slice(&[0i32, 40]).to_device(device);
        let packed =
            Packed { cu_seqlens_q: &cu_seqlens, cu_seqlens_k: &cu_seqlens, max_seqlen_q: 40, max_seqlen_k: 40 };
        let pack = |x: &Tensor| x.squeeze_dim(0).transpose(0, 1);
        let run = |x: &crate::kit::Inputs| {
            let chosen = route(&x.q, &x.k, &config).unwrap();
            let routed = routed_attention(&x.q, &x.k, &x.v, &chosen, &config).unwrap();
            let varlen = moba_attention_varlen(&pack(&x.q), &pack(&x.k), &pack(&x.v), &packed, &config).unwrap();
            [chosen, routed.0, routed.1, varlen.0, varlen.1]
        };
        let auto = autocast(device, kind, || run(&inputs)).unwrap();
        for (n, (auto, cast)) in auto.iter().zip(run(&halves)).enumerate() {
            assert_same_bits(&format!("output {n} on {device:?}"), auto, &cast);
        }
    }
}

#[test]
fn inputs_of_mixed_dtypes_meet_in_the_autocast_dtype() {
    for device in devices() {
        let case = Case::new(20, 16, 8, 2);
        let x = case.inputs(3, Kind::Float, device);
        let (k, v) = (x.k.to_kind(Kind::BFloat16), x.v.to_kind(Kind::Half));
        assert!(moba_attention(&x.q, &k, &v, &case.config()).is_err());
        let out = autocast(device, Kind::BFloat16, || moba_attention(&x.q, &k, &v, &case.config())).unwrap().unwrap();
        assert_eq!(out.kind(), Kind::BFloat16);
    }
}

#[test]
fn the_state_before_comes_back() {
    for device in devices() {
        let case = Case::new(20, 16, 8, 2);
        let x = case.inputs(4, Kind::Float, device);
        let kind = || moba_attention(&x.q, &x.k, &x.v, &case.config()).unwrap().kind();
        assert_eq!(kind(), Kind::Float);
        autocast(device, Kind::BFloat16, || {
            assert_eq!(kind(), Kind::BFloat16);
            autocast(device, Kind::Half, || assert_eq!(kind(), Kind::Half)).unwrap();
            assert_eq!(kind(), Kind::BFloat16);
            assert_eq!(x.q.matmul(&x.k.transpose(2, 3)).kind(), Kind::BFloat16, "libtorch's own operators too");
        })
        .unwrap();
        assert_eq!(kind(), Kind::Float);
        let panicked = catch_unwind(AssertUnwindSafe(|| autocast(device, Kind::BFloat16, || panic!("on purpose"))));
        assert!(panicked.is_err());
        assert_eq!(kind(), Kind::Float);
    }
}

#[test]
fn what_cannot_be_meant_is_refused() {
    let text = |result: tch_moba::Result<()>| match result {
        Err(Error::Config(text)) => text,
        other => panic!("want a configuration error, got {other:?}"),
    };
    let kind = text(autocast(Device::Cpu, Kind::Int, || ()));
    assert!(kind.contains("floating-point") && kind.contains("Int"), "{kind}");
    let device = text(autocast(Device::Mps, Kind::Half, || ()));
    assert!(device.contains("Cpu or Cuda") && device.contains("Mps"), "{device}");
}
