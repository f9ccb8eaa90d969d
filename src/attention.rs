//! The attention layer: projections, rotary embedding, grouped heads, and MoBA or full attention by policy.

use std::borrow::Borrow;

use tch::{Tensor, nn};

use crate::{
    AttentionKind, Error, HybridPolicy, MobaConfig, Result, Step, full::full_attention, ops::moba_attention,
    rope::Rotary,
};

/// Configuration of an [`Attention`] layer. Start from [`AttentionConfig::new`] and change fields.
#[derive(Clone, Debug)]
pub struct AttentionConfig {
    /// Size of the layer's input and output.
    pub hidden_size: i64,
    /// Query heads.
    pub num_heads: i64,
    /// Key and value heads; `num_heads` is a multiple of it.
    pub num_heads_k: i64,
    /// Size of a head, even; need not be `hidden_size / num_heads`.
    pub head_dim: i64,
    /// Base of the rotary embedding.
    pub rope_theta: f64,
    /// Whether the four projections add a bias.
    pub bias: bool,
    /// Initialization of the projections' weights.
    pub ws_init: nn::Init,
    /// Block size, top-k and options of MoBA. Its `softmax_scale` holds for full attention too.
    pub moba: MobaConfig,
    /// Chooses MoBA or full attention.
    pub policy: HybridPolicy,
    /// Which layer this is, for the policy; 0 is the first.
    pub layer: usize,
    /// Layers of the model, for the policy.
    pub num_layers: usize,
}

impl AttentionConfig {
    /// As many key heads as query heads, `head_dim = hidden_size / num_heads` rounded down, no bias, default MoBA in the
    /// only layer.
    pub fn new(hidden_size: i64, num_heads: i64) -> Self {
        Self {
            hidden_size,
            num_heads,
            num_heads_k: num_heads,
            head_dim: hidden_size / num_heads.max(1),
            rope_theta: 10_000.0,
            bias: false,
            ws_init: nn::LinearConfig::default().ws_init,
            moba: MobaConfig::default(),
            policy: HybridPolicy::default(),
            layer: 0,
            num_layers: 1,
        }
    }

    fn check(&self) -> Result<()> {
        let Self { hidden_size, num_heads, num_heads_k, head_dim, rope_theta, layer, num_layers, .. } = *self;
        let wrong = if hidden_size < 1 {
            format!("hidden_size must be at least 1, got {hidden_size}")
        } else if num_heads_k < 1 {
            format!("num_heads_k must be at least 1, got {num_heads_k}")
        } else if num_heads < 1 || num_heads % num_heads_k != 0 {
            format!("num_heads must be a positive multiple of num_heads_k = {num_heads_k}, got {num_heads}")
        } else if head_dim < 2 || head_dim % 2 != 0 {
            format!("head_dim must be even and at least 2 for the rotary embedding, got {head_dim}")
        } else if !(rope_theta.is_finite() && rope_theta > 0.0) {
            format!("rope_theta must be positive and finite, got {rope_theta}")
        } else if layer >= num_layers {
            format!("layer must be below num_layers = {num_layers}, got {layer}")
        } else {
            return self.policy.check();
        };
        Err(Error::Config(wrong))
    }
}

/// Causal self-attention over `[batch, seqlen, hidden_size]`.
///
/// The parameters do not depend on the policy: a checkpoint trained with one kind of attention runs with the other.
#[derive(Debug)]
pub struct Attention {
    /// `[num_heads * head_dim, hidden_size]`.
    pub q_proj: nn::Linear,
    /// `[num_heads_k * head_dim, hidden_size]`.
    pub k_proj: nn::Linear,
    /// `[num_heads_k * head_dim, hidden_size]`.
    pub v_proj: nn::Linear,
    /// `[hidden_size, num_heads * head_dim]`.
    pub o_proj: nn::Linear,
    config: AttentionConfig,
    progress: f64,
}

impl Attention {
    /// Creates the projections `q_proj`, `k_proj`, `v_proj` and `o_proj` under `vs`.
    ///
    /// # Errors
    /// [`Error::Config`] names a wrong field.
    pub fn new<'a>(vs: impl Borrow<nn::Path<'a>>, config: AttentionConfig) -> Result<Self> {
        config.check()?;
        let vs = vs.borrow();
        let AttentionConfig { hidden_size, num_heads, num_heads_k, head_dim, bias, ws_init, .. } = config;
        let linear = |name, inputs, outputs| linear(vs / name, inputs, outputs, bias, ws_init);
        Ok(Self {
            q_proj: linear("q_proj", hidden_size, num_heads * head_dim)?,
            k_proj: linear("k_proj", hidden_size, num_heads_k * head_dim)?,
            v_proj: linear("v_proj", hidden_size, num_heads_k * head_dim)?,
            o_proj: linear("o_proj", num_heads * head_dim, hidden_size)?,
            config,
            progress: 0.0,
        })
    }

    /// The configuration given at construction.
    pub fn config(&self) -> &AttentionConfig {
        &self.config
    }

    /// Tells [`forward_t`](nn::ModuleT::forward_t), whose signature has no [`Step`], how far training is (0 to 1).
    pub fn set_progress(&mut self, progress: f64) {
        self.progress = progress;
    }

    /// `xs [batch, seqlen, hidden_size]` to the same shape; positions count from 0.
    ///
    /// # Errors
    /// [`Error::Torch`] for a wrong shape, or whatever the operators report.
    pub fn forward(&self, xs: &Tensor, step: Step) -> Result<Tensor> {
        let size = xs.size();
        let &[_, seqlen, hidden] = size.as_slice() else { return Err(self.wrong_shape(&size)) };
        if hidden != self.config.hidden_size {
            return Err(self.wrong_shape(&size));
        }
        let rotary = Rotary::new(seqlen, self.config.head_dim, self.config.rope_theta, xs)?;
        self.forward_rotated(xs, &rotary, step)
    }

    /// [`forward`](Self::forward) with the rotary tables of the caller, who has checked the shape of `xs`.
    pub(crate) fn forward_rotated(&self, xs: &Tensor, rotary: &Rotary, step: Step) -> Result<Tensor> {
        let AttentionConfig { ref moba, ref policy, head_dim, layer, num_layers, .. } = self.config;
        let kind = policy.kind(layer, num_layers, step);
        tracing::debug!(layer, %kind, phase = ?step.phase, "attention");

        // Heads are split off after the token dimension and only then moved before it: the rotation then works on
        // contiguous memory, and the transposes are free because the kernels take any strides.
        let split = |projection| linear_forward(projection, xs)?.f_unflatten(-1, [-1, head_dim]).map_err(Error::from);
        let q = rotary.rotate(&split(&self.q_proj)?)?.f_transpose(1, 2)?;
        let k = rotary.rotate(&split(&self.k_proj)?)?.f_transpose(1, 2)?;
        let v = split(&self.v_proj)?.f_transpose(1, 2)?;
        let out = match kind {
            AttentionKind::Moba => moba_attention(&q, &k, &v, moba)?,
            AttentionKind::Full => full_attention(&q, &k, &v, moba.softmax_scale())?,
        };
        linear_forward(&self.o_proj, &out.f_transpose(1, 2)?.f_flatten(2, 3)?)
    }

    fn wrong_shape(&self, size: &[i64]) -> Error {
        let message = format!("xs must be [batch, seqlen, hidden_size = {}], got {size:?}", self.config.hidden_size);
        Error::Torch { op: "Attention".to_owned(), message }
    }
}

impl nn::ModuleT for Attention {
    /// [`Attention::forward`] in [`Phase::Train`](crate::Phase::Train) or [`Phase::Prefill`](crate::Phase::Prefill).
    ///
    /// # Panics
    /// On the errors of [`Attention::forward`]: like all of tch's modules, since the trait has no way to return them.
    fn forward_t(&self, xs: &Tensor, train: bool) -> Tensor {
        let step = if train { Step::train(self.progress) } else { Step::prefill(self.progress) };
        self.forward(xs, step).unwrap_or_else(|error| panic!("{error}"))
    }
}

/// A linear layer under `vs` as [`nn::linear`] makes it, but returning errors, and with the bias starting at zero.
pub(crate) fn linear(vs: nn::Path<'_>, inputs: i64, outputs: i64, bias: bool, ws_init: nn::Init) -> Result<nn::Linear> {
    let bs = if bias { Some(vs.f_zeros("bias", &[outputs])?) } else { None };
    Ok(nn::Linear { ws: vs.f_var("weight", &[outputs, inputs], ws_init)?, bs })
}

/// [`nn::Linear`]'s forward pass, returning errors.
pub(crate) fn linear_forward(linear: &nn::Linear, xs: &Tensor) -> Result<Tensor> {
    Ok(xs.f_linear(&linear.ws, linear.bs.as_ref())?)
}
