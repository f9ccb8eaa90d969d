//! A decoder-only language model of [`Attention`] layers: the Llama architecture (RMSNorm, rotary embedding, SwiGLU,
//! grouped heads) with the parameter names of Hugging Face's safetensors files.

mod config;
mod weights;

use std::borrow::Borrow;

use tch::{Kind, Tensor, nn};

pub use config::{LlamaConfig, RopeParameters};
pub use weights::{load_tensors, load_weights, read_tensors};

use crate::{
    Attention, AttentionConfig, AttentionKind, Error, Result, Step,
    attention::{linear, linear_forward},
    rope::Rotary,
};

/// The model: `tokens [batch, seqlen]` to `logits [batch, seqlen, vocab_size]`.
///
/// ```no_run
/// use tch::{Device, Kind, Tensor, nn};
/// use tch_moba::{Step, llama::{Llama, LlamaConfig, load_weights}};
/// let config = LlamaConfig::read("model/config.json")?;
/// let vs = nn::VarStore::new(Device::Cpu);
/// let model = Llama::new(vs.root(), &config)?;
/// load_weights(&vs, "model/model.safetensors")?;
/// let logits = model.forward(&Tensor::zeros([1, 4096], (Kind::Int64, Device::Cpu)), Step::prefill(1.0))?;
/// # Ok::<(), tch_moba::Error>(())
/// ```
#[derive(Debug)]
pub struct Llama {
    config: LlamaConfig,
    embed_tokens: Tensor,
    layers: Vec<Layer>,
    norm: RmsNorm,
    /// `None` when tied to `embed_tokens`.
    lm_head: Option<nn::Linear>,
}

impl Llama {
    /// Creates all parameters under `vs`, initialised as Hugging Face does: normal with `initializer_range`, norms 1.
    ///
    /// # Errors
    /// [`Error::Config`] names a wrong field of `config`.
    pub fn new<'a>(vs: impl Borrow<nn::Path<'a>>, config: &LlamaConfig) -> Result<Self> {
        config.check()?;
        let vs = vs.borrow();
        let model = vs / "model";
        let init = init(config);
        let embedding = [config.vocab_size, config.hidden_size];
        let embed_tokens = (&model / "embed_tokens").f_var("weight", &embedding, init)?;
        let layers = (0..config.num_hidden_layers)
            .map(|index| Layer::new(&(&model / "layers" / index), config, index))
            .collect::<Result<_>>()?;
        let norm = RmsNorm::new(&model / "norm", config)?;
        let lm_head = if config.tie_word_embeddings {
            None
        } else {
            Some(linear(vs / "lm_head", config.hidden_size, config.vocab_size, false, init)?)
        };
        Ok(Self { config: config.clone(), embed_tokens, layers, norm, lm_head })
    }

    /// The configuration given at construction.
    pub fn config(&self) -> &LlamaConfig {
        &self.config
    }

    /// What each layer runs at `step`.
    pub fn kinds(&self, step: Step) -> Vec<AttentionKind> {
        let layers = self.config.num_hidden_layers;
        (0..layers).map(|layer| self.config.policy.kind(layer, layers, step)).collect()
    }

    /// `tokens`, int64 `[batch, seqlen]` of values below `vocab_size`, to `logits [batch, seqlen, vocab_size]`.
    ///
    /// # Errors
    /// [`Error::Torch`] for a wrong shape or dtype of `tokens`, or whatever an operator reports.
    pub fn forward(&self, tokens: &Tensor, step: Step) -> Result<Tensor> {
        let size = tokens.size();
        let (&[_, seqlen], Kind::Int64) = (size.as_slice(), tokens.kind()) else {
            let message = format!("tokens must be Int64 [batch, seqlen], got {:?} {size:?}", tokens.kind());
            return Err(Error::Torch { op: "Llama".to_owned(), message });
        };
        let mut xs = Tensor::f_embedding(&self.embed_tokens, tokens, -1, false, false)?;
        let rotary = Rotary::new(seqlen, self.config.head_dim(), self.config.rope_theta(), &xs)?;
        for layer in &self.layers {
            xs = layer.forward(&xs, &rotary, step)?;
        }
        let xs = self.norm.forward(&xs)?;
        match &self.lm_head {
            Some(head) => linear_forward(head, &xs),
            None => Ok(xs.f_linear(&self.embed_tokens, None::<&Tensor>)?),
        }
    }
}

/// One decoder layer: attention and feed-forward, each after a norm and added to its input.
#[derive(Debug)]
struct Layer {
    input_layernorm: RmsNorm,
    self_attn: Attention,
    post_attention_layernorm: RmsNorm,
    mlp: Mlp,
}

impl Layer {
    fn new(vs: &nn::Path<'_>, config: &LlamaConfig, layer: usize) -> Result<Self> {
        let attention = AttentionConfig {
            num_heads_k: config.heads_k(),
            head_dim: config.head_dim(),
            rope_theta: config.rope_theta(),
            bias: config.attention_bias,
            ws_init: init(config),
            moba: config.moba,
            policy: config.policy.clone(),
            layer,
            num_layers: config.num_hidden_layers,
            ..AttentionConfig::new(config.hidden_size, config.num_attention_heads)
        };
        Ok(Self {
            input_layernorm: RmsNorm::new(vs / "input_layernorm", config)?,
            self_attn: Attention::new(vs / "self_attn", attention)?,
            post_attention_layernorm: RmsNorm::new(vs / "post_attention_layernorm", config)?,
            mlp: Mlp::new(vs / "mlp", config)?,
        })
    }

    fn forward(&self, xs: &Tensor, rotary: &Rotary, step: Step) -> Result<Tensor> {
        let attended = self.self_attn.forward_rotated(&self.input_layernorm.forward(xs)?, rotary, step)?;
        let xs = xs.f_add(&attended)?;
        Ok(xs.f_add(&self.mlp.forward(&self.post_attention_layernorm.forward(&xs)?)?)?)
    }
}

/// `down(silu(gate(x)) * up(x))`.
#[derive(Debug)]
struct Mlp {
    gate_proj: nn::Linear,
    up_proj: nn::Linear,
    down_proj: nn::Linear,
}

impl Mlp {
    fn new(vs: nn::Path<'_>, config: &LlamaConfig) -> Result<Self> {
        let LlamaConfig { hidden_size, intermediate_size, mlp_bias, .. } = *config;
        let linear = |name, inputs, outputs| linear(&vs / name, inputs, outputs, mlp_bias, init(config));
        Ok(Self {
            gate_proj: linear("gate_proj", hidden_size, intermediate_size)?,
            up_proj: linear("up_proj", hidden_size, intermediate_size)?,
            down_proj: linear("down_proj", intermediate_size, hidden_size)?,
        })
    }

    fn forward(&self, xs: &Tensor) -> Result<Tensor> {
        let gate = linear_forward(&self.gate_proj, xs)?.f_silu()?;
        linear_forward(&self.down_proj, &gate.f_mul(&linear_forward(&self.up_proj, xs)?)?)
    }
}

#[derive(Debug)]
struct RmsNorm {
    weight: Tensor,
    eps: f64,
}

impl RmsNorm {
    fn new(vs: nn::Path<'_>, config: &LlamaConfig) -> Result<Self> {
        Ok(Self { weight: vs.f_ones("weight", &[config.hidden_size])?, eps: config.rms_norm_eps })
    }

    fn forward(&self, xs: &Tensor) -> Result<Tensor> {
        Ok(xs.f_rms_norm(self.weight.size(), Some(&self.weight), self.eps)?)
    }
}

fn init(config: &LlamaConfig) -> nn::Init {
    nn::Init::Randn { mean: 0.0, stdev: config.initializer_range }
}
