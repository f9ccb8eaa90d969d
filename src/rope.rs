//! Rotary position embedding in the `rotate_half` convention of Hugging Face Llama.

use tch::{Kind, Tensor};

use crate::Result;

/// Cosines and sines of the positions `0..seqlen`, `[seqlen, 1, head_dim]`. All layers of a model share one.
pub(crate) struct Rotary {
    cos: Tensor,
    /// Negative in the first half of a head, where the rotation subtracts.
    signed_sin: Tensor,
}

impl Rotary {
    /// Tables like `xs`, which gives dtype and device. `head_dim` must be even. Angles are computed in float32 whatever the
    /// dtype of the model, as in Hugging Face's code.
    pub(crate) fn new(seqlen: i64, head_dim: i64, theta: f64, xs: &Tensor) -> Result<Self> {
        let (kind, device) = (xs.kind(), xs.device());
        let options = (Kind::Float, device);
        let exponent = Tensor::f_arange_start_step(0, head_dim, 2, options)?.f_div_scalar(head_dim as f64)?;
        let frequency = Tensor::f_full([1], theta, options)?.f_pow(&exponent)?.f_reciprocal()?;
        let angle = Tensor::f_arange(seqlen, options)?.f_outer(&frequency)?;
        let (cos, sin) = (angle.f_cos()?, angle.f_sin()?);
        let table =
            |first: &Tensor, second: &Tensor| Tensor::f_cat(&[first, second], -1)?.f_unsqueeze(1)?.f_to_kind(kind);
        Ok(Self { cos: table(&cos, &cos)?, signed_sin: table(&sin.f_neg()?, &sin)? })
    }

    /// Rotates `x [batch, seqlen, heads, head_dim]`, in the dtype of `x`.
    pub(crate) fn rotate(&self, x: &Tensor) -> Result<Tensor> {
        // Under autocast the projections have another dtype than the tables.
        let (cos, signed_sin) = (self.cos.f_to_kind(x.kind())?, self.signed_sin.f_to_kind(x.kind())?);
        let swapped = x.f_roll(x.size()[3] / 2, -1)?;
        Ok(x.f_mul(&cos)?.f_addcmul(&swapped, &signed_sin)?)
    }
}
