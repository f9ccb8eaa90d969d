//! The signatures other programs rely on, frozen.

use tch_moba::dispatch::{Value, call, schema};

const FROZEN: [(&str, &str); 4] = [
    ("moba::route", "moba::route(Tensor q, Tensor k, int block_size, int top_k) -> Tensor"),
    (
        "moba::attention",
        "moba::attention(Tensor q, Tensor k, Tensor v, int block_size, int top_k, *, float? softmax_scale=None, \
         bool deterministic=False) -> (Tensor out, Tensor lse)",
    ),
    (
        "moba::attention_varlen",
        "moba::attention_varlen(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k, \
         SymInt max_seqlen_q, SymInt max_seqlen_k, int block_size, int top_k, *, float? softmax_scale=None, \
         bool deterministic=False) -> (Tensor out, Tensor lse)",
    ),
    (
        "moba::routed_attention",
        "moba::routed_attention(Tensor q, Tensor k, Tensor v, Tensor route, int block_size, *, \
         float? softmax_scale=None, bool deterministic=False) -> (Tensor out, Tensor lse)",
    ),
];

#[test]
fn as_frozen() {
    for (name, text) in FROZEN {
        assert_eq!(schema(name).unwrap(), text);
    }
}

#[test]
fn an_operator_that_does_not_exist() {
    for text in [schema("moba::attend").unwrap_err(), call("moba::attend", &[]).unwrap_err()].map(|e| e.to_string()) {
        assert!(text.contains("moba::attend"), "{text}");
        assert!(!text.contains("Exception raised from"), "the C++ backtrace is cut: {text}");
    }
    assert!(schema("moba::\0").is_err());
}

#[test]
fn arguments_that_do_not_fit_the_schema() {
    let x = tch::Tensor::zeros([1, 1, 4, 4], tch::kind::FLOAT_CPU);
    let missing = call("moba::route", &[(&x).into()]).unwrap_err().to_string();
    assert!(missing.contains("moba::route") && missing.contains("missing value for argument 'k'"), "{missing}");
    let extra = [(&x).into(), (&x).into(), Value::Int(2), Value::Int(2), Value::Int(2)];
    let extra = call("moba::route", &extra).unwrap_err().to_string();
    assert!(extra.contains("moba::route") && extra.contains("at most 4") && extra.contains("received 5"), "{extra}");
    let wrong = [(&x).into(), Value::Bool(true), Value::Int(2), Value::Int(2)];
    let wrong = call("moba::route", &wrong).unwrap_err().to_string();
    assert!(wrong.contains("argument 'k'") && wrong.contains("found type 'bool'"), "{wrong}");
    assert_eq!(call("moba::route", &[(&x).into(), (&x).into(), Value::Int(2), Value::Int(2)]).unwrap().len(), 1);
}

#[test]
fn outputs_of_other_operators() {
    let x = tch::Tensor::arange(65, tch::kind::INT64_CPU);
    let parts = |size| call("aten::split.Tensor", &[(&x).into(), Value::Int(size)]);
    let two = parts(40).unwrap();
    assert_eq!(two, [x.narrow(0, 0, 40), x.narrow(0, 40, 25)]);
    let error = parts(1).unwrap_err().to_string();
    assert!(error.contains("aten::split.Tensor") && error.contains("at most 64 tensors as output, got 65"), "{error}");
    // A bool.
    assert!(call("aten::is_same_size", &[(&x).into(), (&x).into()]).unwrap().is_empty());
}
