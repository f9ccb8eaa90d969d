//! The two numbers that define MoBA, checked once, on construction.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// What a MoBA attention call computes: block size *B*, top-k *k* (arXiv 2502.13189, section 2.2) and two options.
///
/// ```
/// use tch_moba::MobaConfig;
/// let config = MobaConfig::new(512, 3)?.with_deterministic(true);
/// assert_eq!(config, "512x3".parse::<MobaConfig>()?.with_deterministic(true));
/// assert!(MobaConfig::new(512, 0).is_err());
/// # Ok::<(), tch_moba::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "Fields", into = "Fields")]
pub struct MobaConfig {
    block_size: i64,
    top_k: i64,
    softmax_scale: Option<f64>,
    deterministic: bool,
}

impl MobaConfig {
    /// Blocks of `block_size` tokens, of which each query attends to `top_k`, the current block included.
    ///
    /// # Errors
    /// [`Error::Config`] if either number is below 1.
    pub fn new(block_size: i64, top_k: i64) -> Result<Self> {
        if block_size < 1 {
            return Err(Error::config(format!("block_size must be at least 1, got {block_size}")));
        }
        if top_k < 1 {
            return Err(Error::config(format!(
                "top_k must be at least 1 (the current block counts as one), got {top_k}"
            )));
        }
        Ok(Self { block_size, top_k, softmax_scale: None, deterministic: false })
    }

    /// Multiplies `q . k` by `scale` instead of `head_dim ** -0.5`.
    ///
    /// # Errors
    /// [`Error::Config`] if `scale` is not finite.
    pub fn with_softmax_scale(self, scale: f64) -> Result<Self> {
        if !scale.is_finite() {
            return Err(Error::config(format!("softmax_scale must be finite, got {scale}")));
        }
        Ok(Self { softmax_scale: Some(scale), ..self })
    }

    /// Asks for gradients that are bit for bit the same on repeated runs, as libtorch's `use_deterministic_algorithms` does
    /// for all of them. The forward pass always is.
    pub fn with_deterministic(self, deterministic: bool) -> Self {
        Self { deterministic, ..self }
    }

    /// Tokens in a block.
    pub fn block_size(&self) -> i64 {
        self.block_size
    }

    /// Blocks that a query attends to, the current one included.
    pub fn top_k(&self) -> i64 {
        self.top_k
    }

    /// The factor on `q . k`; `None` stands for `head_dim ** -0.5`.
    pub fn softmax_scale(&self) -> Option<f64> {
        self.softmax_scale
    }

    /// Whether gradients must be repeatable bit for bit.
    pub fn deterministic(&self) -> bool {
        self.deterministic
    }
}

impl Default for MobaConfig {
    /// Block 512, top-k 3: the paper's scaling-law setting (section 3.1).
    fn default() -> Self {
        Self { block_size: 512, top_k: 3, softmax_scale: None, deterministic: false }
    }
}

impl fmt::Display for MobaConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}x{}", self.block_size, self.top_k)
    }
}

impl FromStr for MobaConfig {
    type Err = Error;

    /// Reads `BLOCKxTOPK`, for example `512x3`.
    fn from_str(text: &str) -> Result<Self> {
        let wanted = || Error::config(format!("wanted BLOCK_SIZExTOP_K, for example 512x3, got {text:?}"));
        let (block_size, top_k) = text.split_once('x').ok_or_else(wanted)?;
        let number = |part: &str| part.trim().parse::<i64>().map_err(|_| wanted());
        Self::new(number(block_size)?, number(top_k)?)
    }
}

/// The serialized form; reading it goes through the same checks as the constructors.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Fields {
    block_size: i64,
    top_k: i64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    softmax_scale: Option<f64>,
    #[serde(default)]
    deterministic: bool,
}

impl TryFrom<Fields> for MobaConfig {
    type Error = Error;

    fn try_from(fields: Fields) -> Result<Self> {
        let config = Self::new(fields.block_size, fields.top_k)?.with_deterministic(fields.deterministic);
        fields.softmax_scale.map_or(Ok(config), |scale| config.with_softmax_scale(scale))
    }
}

impl From<MobaConfig> for Fields {
    fn from(config: MobaConfig) -> Self {
        let MobaConfig { block_size, top_k, softmax_scale, deterministic } = config;
        Self { block_size, top_k, softmax_scale, deterministic }
    }
}
