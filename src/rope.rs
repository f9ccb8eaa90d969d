//! Rotary position embedding in the `rotate_half` convention of Hugging Face Llama.

use tch::{Device, Kind, Tensor};

use crate::Result;

/// Cosines and sines of the positions `0..seqlen`, float32 `[seqlen, 1, head_dim]`. All layers of a model share one.
pub(crate) struct Rotary {
    cos: Tensor,
    sin: Tensor,
}

impl Rotary {
    /// `head_dim` must be even. Angles are computed in float32 whatever the dtype of the model, as in Hugging Face's code.
    pub(crate) fn new(seqlen: i64, head_dim: i64, theta: f64, device: Device) -> Result<Self> {
        let options = (Kind::Float, device);
        let exponent = Tensor::f_arange_start_step(0, head_dim, 2, options)?.f_div_scalar(head_dim as f64)?;
        let frequency = Tensor::f_full([1], theta, options)?.f_pow(&exponent)?.f_reciprocal()?;
        let angle = Tensor::f_arange(seqlen, options)?.f_outer(&frequency)?;
        let angle = Tensor::f_cat(&[&angle, &angle], -1)?.f_unsqueeze(1)?;
        Ok(Self { cos: angle.f_cos()?, sin: angle.f_sin()? })
    }

    /// Rotates `x [batch, seqlen, heads, head_dim]`, in the dtype of `x`.
    pub(crate) fn rotate(&self, x: &Tensor) -> Result<Tensor> {
        let (cos, sin) = (self.cos.f_to_kind(x.kind())?, self.sin.f_to_kind(x.kind())?);
        let halves = x.f_chunk(2, -1)?;
        let rotated = Tensor::f_cat(&[&halves[1].f_neg()?, &halves[0]], -1)?;
        Ok(x.f_mul(&cos)?.f_addcmul(&rotated, &sin)?)
    }
}
