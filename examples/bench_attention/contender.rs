//! What is compared: MoBA and the dense attentions of libtorch, behind one call.

use std::fmt;

use anyhow::{Context, Result};
use clap::ValueEnum;
use tch::Tensor;
use tch_moba::{
    MobaConfig,
    dispatch::{Value, call},
    full_attention, moba_attention, route,
};

use crate::{
    data::{Data, Inputs},
    name,
};

#[derive(ValueEnum, Clone, Copy, Debug, PartialEq)]
#[value(rename_all = "snake_case")]
pub enum Impl {
    Moba,
    /// With gradients that repeat bit for bit.
    MobaDeterministic,
    SdpaFlash,
    SdpaCudnn,
    SdpaCpu,
}

#[derive(ValueEnum, Clone, Copy, Debug, PartialEq)]
#[value(rename_all = "snake_case")]
pub enum Pass {
    Forward,
    ForwardBackward,
    /// Block means, gate and top-k: the part of forward that chooses. MoBA only.
    Route,
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Contender {
    pub kind: Impl,
    /// Block size and top-k, for MoBA only.
    pub config: Option<MobaConfig>,
    pub data: Data,
}

impl Contender {
    /// One contender for each configuration of MoBA, one for a dense attention.
    pub fn all(kind: Impl, configs: &[MobaConfig], data: Data) -> Vec<Self> {
        match kind {
            Impl::Moba | Impl::MobaDeterministic => {
                let deterministic = kind == Impl::MobaDeterministic;
                let of =
                    |config: &MobaConfig| Self { kind, config: Some(config.with_deterministic(deterministic)), data };
                configs.iter().map(of).collect()
            }
            _ => vec![Self { kind, config: None, data }],
        }
    }

    pub fn forward(&self, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
        // The operators behind libtorch's SDPA, called by name: tch has no switch to choose one of them.
        let dense = |operator: &str, arguments: &[Value<'_>]| {
            let outputs = call(operator, arguments)?;
            outputs.into_iter().next().with_context(|| format!("{operator} returned no tensor"))
        };
        let (qkv, causal) = ([q.into(), k.into(), v.into()], Value::Bool(true));
        match (self.kind, self.config) {
            (Impl::Moba | Impl::MobaDeterministic, config) => Ok(moba_attention(q, k, v, &config.unwrap_or_default())?),
            (Impl::SdpaCpu, _) => Ok(full_attention(q, k, v, None)?),
            (Impl::SdpaFlash, _) => {
                let dropout = [Value::Double(0.0), causal];
                dense("aten::_scaled_dot_product_flash_attention", &[&qkv[..], &dropout].concat())
            }
            (Impl::SdpaCudnn, _) => {
                // attn_bias, compute_log_sumexp (the backward pass needs it), dropout_p, is_causal
                let rest = [Value::None, Value::Bool(q.requires_grad()), Value::Double(0.0), causal];
                dense("aten::_scaled_dot_product_cudnn_attention", &[&qkv[..], &rest].concat())
            }
        }
    }

    /// The output and the gradients of q, k and v for an output gradient of ones.
    pub fn forward_backward(&self, inputs: &Inputs) -> Result<(Tensor, [Tensor; 3])> {
        // Fresh leaves over the same memory: no gradient is left to be added to.
        let leaves = [&inputs.q, &inputs.k, &inputs.v].map(|tensor| tensor.detach().set_requires_grad(true));
        let [q, k, v] = &leaves;
        let out = self.forward(q, k, v)?;
        let gradients = Tensor::f_run_backward(&[&out], &leaves, false, false)?;
        let gradients =
            <[Tensor; 3]>::try_from(gradients).ok().context("libtorch returned another number of gradients")?;
        Ok((out, gradients))
    }

    /// One run of `pass`; the tensors are handed back so that the caller decides when they are freed.
    pub fn run(&self, pass: Pass, inputs: &Inputs) -> Result<Vec<Tensor>> {
        match pass {
            Pass::Forward => Ok(vec![tch::no_grad(|| self.forward(&inputs.q, &inputs.k, &inputs.v))?]),
            Pass::Route => {
                let config = self.config.context("only MoBA has a routing")?;
                Ok(vec![tch::no_grad(|| route(&inputs.q, &inputs.k, &config))?])
            }
            Pass::ForwardBackward => {
                let (out, gradients) = self.forward_backward(inputs)?;
                Ok(std::iter::once(out).chain(gradients).collect())
            }
        }
    }
}

impl fmt::Display for Contender {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&name(&self.kind))?;
        self.config.map_or(Ok(()), |config| write!(f, " {config}"))?;
        if self.data == Data::Uniform { Ok(()) } else { write!(f, " {}", name(&self.data)) }
    }
}
