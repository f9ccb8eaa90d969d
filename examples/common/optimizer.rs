//! AdamW through libtorch's fused kernel, with a state that can be saved, which tch's own optimizer does not give out,
//! and with float32 master weights for a model that computes in bfloat16.

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
    /// The variables of the model.
    parameters: Vec<Tensor>,
    exp_avgs: Vec<Tensor>,
    exp_avg_sqs: Vec<Tensor>,
    steps: Vec<Tensor>,
    /// Only for a model in another dtype than float32.
    master: Option<Master>,
}

/// The float32 weights behind variables of a narrower dtype, and the sum of their gradients.
struct Master {
    weights: Vec<Tensor>,
    /// Views of `flat`, one for each of `weights`.
    gradients: Vec<Tensor>,
    /// All gradients one after the other: their norm is one kernel.
    flat: Tensor,
    /// Whether `gradients` holds the sum of this update, or that of the last.
    fresh: bool,
}

pub struct AdamW {
    /// None of them empty: libtorch refuses empty lists.
    groups: Vec<Group>,
    clip: f64,
}

impl AdamW {
    /// Matrices decay by `weight_decay`; norms, biases and embeddings do not. Gradients are clipped to the norm `clip`.
    pub fn new(vs: &nn::VarStore, weight_decay: f64, clip: f64) -> Self {
        let mut groups = [Group { weight_decay, ..Group::default() }, Group::default()];
        for (name, parameter) in vs.variables().into_iter().collect::<BTreeMap<_, _>>() {
            let decays = parameter.dim() == 2 && !name.contains("embed_tokens");
            let group = &mut groups[usize::from(!decays)];
            let float = (Kind::Float, parameter.device());
            group.exp_avgs.push(Tensor::zeros(parameter.size(), float));
            group.exp_avg_sqs.push(Tensor::zeros(parameter.size(), float));
            group.steps.push(Tensor::zeros([], float));
            group.parameters.push(parameter);
            group.names.push(name);
        }
        Self { groups: groups.into_iter().filter(|group| !group.names.is_empty()).collect(), clip }
    }

    /// Turns the variables of `vs` into `kind` and keeps float32 master weights, which alone are updated: the model
    /// computes in `kind` throughout, and no update is lost to its rounding. To be called before the first backward pass.
    #[allow(dead_code, reason = "shared by two examples, of which one trains under autocast")]
    pub fn with_master_weights(vs: &mut nn::VarStore, kind: Kind, weight_decay: f64, clip: f64) -> Self {
        let weights: BTreeMap<_, _> =
            vs.variables().into_iter().map(|(name, weight)| (name, weight.detach().copy())).collect();
        vs.set_kind(kind);
        let mut optimizer = Self::new(vs, weight_decay, clip);
        for group in &mut optimizer.groups {
            let weights: Vec<_> = group.names.iter().map(|name| weights[name].shallow_clone()).collect();
            let sizes: Vec<i64> = weights.iter().map(|weight| weight.numel() as i64).collect();
            let flat = Tensor::zeros([sizes.iter().sum::<i64>()], (Kind::Float, vs.device()));
            let parts = flat.split_with_sizes(&sizes, 0).into_iter().zip(&weights);
            let gradients = parts.map(|(part, weight)| part.view_as(weight)).collect();
            group.master = Some(Master { weights, gradients, flat, fresh: false });
        }
        optimizer
    }

    pub fn zero_grad(&self) -> Result<()> {
        // Master weights have their gradients moved away after each backward pass.
        for group in self.groups.iter().filter(|group| group.master.is_none()) {
            let defined: Vec<Tensor> = group.gradients().into_iter().filter(Tensor::defined).collect();
            // Before the first backward pass there are none, and libtorch refuses an empty list.
            if !defined.is_empty() {
                call("aten::_foreach_zero_", &[Value::Tensors(&defined)])?;
            }
        }
        Ok(())
    }

    /// To be called after each backward pass of an update: moves the gradients into the float32 sum, so that many small
    /// batches add up without the rounding of the model's dtype. Without master weights autograd itself keeps the sum.
    pub fn accumulate(&mut self) -> Result<()> {
        tch::no_grad(|| {
            for group in &mut self.groups {
                let gradients = group.gradients();
                let Some(master) = &mut group.master else { continue };
                let sums = Value::Tensors(&master.gradients);
                let add = if master.fresh { "aten::_foreach_add_.List" } else { "aten::_foreach_copy_" };
                call(add, &[sums, Value::Tensors(&gradients)])?;
                call("aten::_foreach_zero_", &[Value::Tensors(&gradients)])?;
                master.fresh = true;
            }
            Ok(())
        })
    }

    /// Updates the parameters from their gradients; returns the norm of the gradient before clipping. Nothing here
    /// waits for the device.
    pub fn step(&mut self, lr: f64) -> Result<Tensor> {
        tch::no_grad(|| {
            let gradients: Vec<_> = self.groups.iter().map(Group::summed_gradients).collect();
            let norms: Vec<Tensor> = self.groups.iter().flat_map(Group::norms).collect();
            let norm = Tensor::f_stack(&norms, 0)?.f_norm()?;
            // The kernel divides every gradient by this on its way: clipping costs no pass of its own.
            let scale = norm.f_div_scalar(self.clip)?.f_clamp_min(1.0)?;
            for (group, gradients) in self.groups.iter_mut().zip(&gradients) {
                let weights = group.master.as_ref().map_or(&group.parameters, |master| &master.weights);
                call("aten::_foreach_add_.Scalar", &[Value::Tensors(&group.steps), Value::Int(1)])?;
                call(
                    "aten::_fused_adamw_",
                    &[
                        Value::Tensors(weights),
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
                if let Some(master) = &mut group.master {
                    call(
                        "aten::_foreach_copy_",
                        &[Value::Tensors(&group.parameters), Value::Tensors(&master.weights)],
                    )?;
                    master.fresh = false;
                }
            }
            Ok(norm)
        })
    }

    /// The moments, step counts and master weights by parameter, sharing memory with the optimizer.
    pub fn state(&self) -> BTreeMap<String, Tensor> {
        let mut state = BTreeMap::new();
        for group in &self.groups {
            let master = group.master.as_ref().map_or(&[][..], |master| &master.weights);
            for (kind, tensors) in [
                ("exp_avg", &group.exp_avgs[..]),
                ("exp_avg_sq", &group.exp_avg_sqs),
                ("step", &group.steps),
                ("master", master),
            ] {
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

    /// In float32.
    fn summed_gradients(&self) -> Vec<Tensor> {
        match &self.master {
            Some(master) => master.gradients.iter().map(Tensor::shallow_clone).collect(),
            None => self.gradients(),
        }
    }
    /// Of the gradients: a few numbers whose norm is that of all of them.
    fn norms(&self) -> Vec<Tensor> {
        match &self.master {
            Some(master) => vec![master.flat.norm()],
            None => self.parameters.iter().map(|parameter| parameter.grad().norm()).collect(),
        }
    }
}
