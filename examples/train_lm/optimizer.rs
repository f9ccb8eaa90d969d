//! AdamW through libtorch's fused kernel, with a state that can be saved, which tch's own optimizer does not give out.

use std::collections::BTreeMap;

use anyhow::Result;
use tch::{Kind, Tensor, nn};
use tch_moba::dispatch::{Value, call};

const BETA1: f64 = 0.9;
const BETA2: f64 = 0.95;
const EPS: f64 = 1e-8;

/// Parameters that share a weight decay, and their moments.
#[derive(Default)]
struct Group {
    weight_decay: f64,
    names: Vec<String>,
    parameters: Vec<Tensor>,
    exp_avgs: Vec<Tensor>,
    exp_avg_sqs: Vec<Tensor>,
    steps: Vec<Tensor>,
}

pub struct AdamW {
    groups: [Group; 2],
    clip: f64,
}

impl AdamW {
    /// Matrices decay by `weight_decay`; norms, biases and embeddings do not. Gradients are clipped to the norm `clip`.
    pub fn new(vs: &nn::VarStore, weight_decay: f64, clip: f64) -> Self {
        let mut groups = [Group { weight_decay, ..Group::default() }, Group::default()];
        for (name, parameter) in vs.variables().into_iter().collect::<BTreeMap<_, _>>() {
            let decays = parameter.dim() == 2 && !name.contains("embed_tokens");
            let group = &mut groups[usize::from(!decays)];
            group.exp_avgs.push(parameter.zeros_like());
            group.exp_avg_sqs.push(parameter.zeros_like());
            group.steps.push(Tensor::zeros([], (Kind::Float, parameter.device())));
            group.parameters.push(parameter);
            group.names.push(name);
        }
        Self { groups, clip }
    }

    pub fn zero_grad(&self) -> Result<()> {
        for group in &self.groups {
            let defined: Vec<Tensor> = group.gradients().into_iter().filter(Tensor::defined).collect();
            // Before the first backward pass there are none, and libtorch refuses an empty list.
            if !defined.is_empty() {
                call("aten::_foreach_zero_", &[Value::Tensors(&defined)])?;
            }
        }
        Ok(())
    }

    /// Updates the parameters from their gradients; returns the norm of the gradient before clipping. Nothing here
    /// waits for the device.
    pub fn step(&mut self, lr: f64) -> Result<Tensor> {
        tch::no_grad(|| {
            let gradients = [self.groups[0].gradients(), self.groups[1].gradients()];
            let norms: Vec<Tensor> = gradients.iter().flatten().map(Tensor::norm).collect();
            let norm = Tensor::f_stack(&norms, 0)?.f_norm()?;
            // The kernel divides every gradient by this on its way: clipping costs no pass of its own.
            let scale = norm.f_div_scalar(self.clip)?.f_clamp_min(1.0)?;
            for (group, gradients) in self.groups.iter().zip(&gradients) {
                call("aten::_foreach_add_.Scalar", &[Value::Tensors(&group.steps), Value::Int(1)])?;
                call(
                    "aten::_fused_adamw_",
                    &[
                        Value::Tensors(&group.parameters),
                        Value::Tensors(gradients),
                        Value::Tensors(&group.exp_avgs),
                        Value::Tensors(&group.exp_avg_sqs),
                        Value::Tensors(&[]),
                        Value::Tensors(&group.steps),
                        Value::Double(lr),
                        Value::Double(BETA1),
                        Value::Double(BETA2),
                        Value::Double(group.weight_decay),
                        Value::Double(EPS),
                        Value::Bool(false),
                        Value::Bool(false),
                        Value::Tensor(&scale),
                    ],
                )?;
            }
            Ok(norm)
        })
    }

    /// The moments and step counts by parameter, sharing memory with the optimizer.
    pub fn state(&self) -> BTreeMap<String, Tensor> {
        let mut state = BTreeMap::new();
        for group in &self.groups {
            for (kind, tensors) in
                [("exp_avg", &group.exp_avgs), ("exp_avg_sq", &group.exp_avg_sqs), ("step", &group.steps)]
            {
                let named = group.names.iter().zip(tensors);
                state.extend(named.map(|(name, tensor)| (format!("{kind}.{name}"), tensor.shallow_clone())));
            }
        }
        state
    }
}

impl Group {
    fn gradients(&self) -> Vec<Tensor> {
        self.parameters.iter().map(Tensor::grad).collect()
    }
}
