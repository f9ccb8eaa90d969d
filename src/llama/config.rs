//! The model's configuration under the field names of Hugging Face's `config.json`.

use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::{Error, HybridPolicy, MobaConfig, Result};

/// Configuration of [`Llama`](super::Llama): the fields of a Hugging Face Llama `config.json` with the same defaults,
/// and `moba` and `policy` beside them. Fields unknown here are ignored on reading; features not built are refused.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
#[allow(missing_docs)] // The names and meanings are Hugging Face's.
pub struct LlamaConfig {
    pub model_type: String,
    pub vocab_size: i64,
    pub hidden_size: i64,
    pub intermediate_size: i64,
    pub num_hidden_layers: usize,
    pub num_attention_heads: i64,
    /// `None`: as many as `num_attention_heads`.
    pub num_key_value_heads: Option<i64>,
    /// `None`: `hidden_size / num_attention_heads`.
    pub head_dim: Option<i64>,
    pub hidden_act: String,
    /// Only told, never enforced: the rotary embedding has no end.
    pub max_position_embeddings: i64,
    pub initializer_range: f64,
    pub rms_norm_eps: f64,
    pub rope_theta: f64,
    /// Must be `None` or of type `default`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rope_scaling: Option<RopeParameters>,
    /// Where newer files keep `rope_theta` and the type of scaling.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rope_parameters: Option<RopeParameters>,
    pub attention_bias: bool,
    /// Must be 0.
    pub attention_dropout: f64,
    pub mlp_bias: bool,
    pub tie_word_embeddings: bool,
    /// Block size, top-k and options of MoBA.
    pub moba: MobaConfig,
    /// Which layers run MoBA, and when.
    pub policy: HybridPolicy,
}

/// The `rope_scaling` or `rope_parameters` object of a `config.json`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct RopeParameters {
    /// Only `default`, which is no scaling, is built.
    #[serde(alias = "type")]
    pub rope_type: Option<String>,
    /// That of `rope_parameters` overrides the configuration's `rope_theta`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rope_theta: Option<f64>,
}

impl Default for LlamaConfig {
    fn default() -> Self {
        Self {
            model_type: "llama".to_owned(),
            vocab_size: 32_000,
            hidden_size: 4096,
            intermediate_size: 11_008,
            num_hidden_layers: 32,
            num_attention_heads: 32,
            num_key_value_heads: None,
            head_dim: None,
            hidden_act: "silu".to_owned(),
            max_position_embeddings: 2048,
            initializer_range: 0.02,
            rms_norm_eps: 1e-6,
            rope_theta: 10_000.0,
            rope_scaling: None,
            rope_parameters: None,
            attention_bias: false,
            attention_dropout: 0.0,
            mlp_bias: false,
            tie_word_embeddings: false,
            moba: MobaConfig::default(),
            policy: HybridPolicy::default(),
        }
    }
}

impl LlamaConfig {
    /// Reads and checks a `config.json`.
    ///
    /// # Errors
    /// [`Error::File`] names the file and what is wrong with it.
    pub fn read(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let wrong = |message: String| Error::file(path, message);
        let text = std::fs::read_to_string(path).map_err(|error| wrong(format!("cannot be read: {error}")))?;
        let config: Self =
            serde_json::from_str(&text).map_err(|error| wrong(format!("not a Llama config.json: {error}")))?;
        config.check().map_err(|error| wrong(error.to_string()))?;
        Ok(config)
    }

    /// Key and value heads.
    pub fn heads_k(&self) -> i64 {
        self.num_key_value_heads.unwrap_or(self.num_attention_heads)
    }

    /// Size of a head.
    pub fn head_dim(&self) -> i64 {
        self.head_dim.unwrap_or(self.hidden_size / self.num_attention_heads.max(1))
    }

    /// Base of the rotary embedding.
    pub fn rope_theta(&self) -> f64 {
        self.rope_parameters.as_ref().and_then(|rope| rope.rope_theta).unwrap_or(self.rope_theta)
    }

    /// Checks what can be checked without building the model.
    ///
    /// # Errors
    /// [`Error::Config`] names the field, what is wanted and what was given.
    pub fn check(&self) -> Result<()> {
        let wrong = |message: String| Err(Error::Config(message));
        if self.model_type != "llama" {
            return wrong(format!("model_type must be \"llama\", got {:?}", self.model_type));
        }
        if self.hidden_act != "silu" {
            return wrong(format!("hidden_act must be \"silu\", got {:?}", self.hidden_act));
        }
        if self.attention_dropout != 0.0 {
            return wrong(format!("attention_dropout must be 0, got {}", self.attention_dropout));
        }
        for (name, rope) in [("rope_scaling", &self.rope_scaling), ("rope_parameters", &self.rope_parameters)] {
            if let Some(rope_type) = rope.as_ref().and_then(|rope| rope.rope_type.as_deref())
                && rope_type != "default"
            {
                return wrong(format!("{name} must be null or of type \"default\", got type {rope_type:?}"));
            }
        }
        // Without a type it would be an unknown scaling, silently left out.
        if self.rope_scaling.as_ref().is_some_and(|rope| rope.rope_type.is_none()) {
            return wrong("rope_scaling must be null or of type \"default\", got one without a type".to_owned());
        }
        let layers = i64::try_from(self.num_hidden_layers).unwrap_or(i64::MAX);
        for (name, value) in [
            ("vocab_size", self.vocab_size),
            ("hidden_size", self.hidden_size),
            ("intermediate_size", self.intermediate_size),
            ("num_hidden_layers", layers),
            ("num_attention_heads", self.num_attention_heads),
            ("num_key_value_heads", self.heads_k()),
        ] {
            if value < 1 {
                return wrong(format!("{name} must be at least 1, got {value}"));
            }
        }
        let (heads, heads_k) = (self.num_attention_heads, self.heads_k());
        if heads % heads_k != 0 {
            return wrong(format!(
                "num_attention_heads must be a multiple of num_key_value_heads, got {heads} and {heads_k}"
            ));
        }
        if self.head_dim.is_none() && self.hidden_size % heads != 0 {
            let hidden = self.hidden_size;
            return wrong(format!(
                "without head_dim, hidden_size must be a multiple of num_attention_heads, got {hidden} and {heads}"
            ));
        }
        let head_dim = self.head_dim();
        if head_dim < 2 || head_dim % 2 != 0 {
            return wrong(format!("head_dim must be even and at least 2, got {head_dim}"));
        }
        for (name, value) in [("rms_norm_eps", self.rms_norm_eps), ("initializer_range", self.initializer_range)] {
            if !(value.is_finite() && value >= 0.0) {
                return wrong(format!("{name} must be finite and not negative, got {value}"));
            }
        }
        if !(self.rope_theta().is_finite() && self.rope_theta() > 0.0) {
            return wrong(format!("rope_theta must be positive and finite, got {}", self.rope_theta()));
        }
        self.policy.check()
    }
}
