//! Which attention a layer runs: MoBA, full, or one after the other (arXiv 2502.13189, section 3.2).
//!
//! MoBA has no parameters of its own, so a layer may change its kind at any time. A policy is a pure function of the
//! layer, the progress of training and the phase; nothing else is remembered.

use std::{fmt, str::FromStr, sync::Arc};

use serde::{Deserialize, Deserializer, Serialize, Serializer, de, ser};

use crate::{Error, Result};

/// The attention that a layer runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum AttentionKind {
    /// [`moba_attention`](crate::moba_attention).
    Moba,
    /// [`full_attention`](crate::full_attention).
    Full,
}

/// What the model is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Phase {
    /// A forward pass that a backward pass may follow.
    Train,
    /// Whole sequences without gradients: evaluation, and the prompt before decoding.
    Prefill,
    /// A few new queries against the keys of everything before them.
    Decode,
}

/// A moment in the life of a model, for [`HybridPolicy::kind`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Step {
    /// The share of training that is done, 0 to 1; a trained model stands at 1.
    pub progress: f64,
    /// What the model is doing.
    pub phase: Phase,
}

impl Step {
    /// Training, with the share `progress` of it done.
    pub fn train(progress: f64) -> Self {
        Self { progress, phase: Phase::Train }
    }

    /// Whole sequences without gradients, with the share `progress` of training done.
    pub fn prefill(progress: f64) -> Self {
        Self { progress, phase: Phase::Prefill }
    }

    /// Decoding with a trained model.
    pub fn decode() -> Self {
        Self { progress: 1.0, phase: Phase::Decode }
    }
}

/// Chooses the [`AttentionKind`] of every layer at every [`Step`].
///
/// In [`Phase::Decode`] all built-in policies answer [`AttentionKind::Full`], as the authors' implementation does: a
/// single query against all keys is cheap. [`Phase::Train`] and [`Phase::Prefill`] are treated alike.
///
/// Text form, on a command line and in serialized configurations: `moba`, `full`, `layer-wise:3`, `two-stage:0.9`,
/// `hybrid:3,0.9`.
///
/// ```
/// use tch_moba::{AttentionKind, HybridPolicy, Step};
/// let policy: HybridPolicy = "hybrid:1,0.9".parse()?;
/// assert_eq!(policy.kind(0, 4, Step::train(0.5)), AttentionKind::Moba);
/// assert_eq!(policy.kind(3, 4, Step::train(0.5)), AttentionKind::Full);
/// assert_eq!(policy.kind(0, 4, Step::train(0.9)), AttentionKind::Full);
/// # Ok::<(), tch_moba::Error>(())
/// ```
#[derive(Clone, Debug, Default, PartialEq)]
pub enum HybridPolicy {
    /// MoBA in every layer.
    #[default]
    Moba,
    /// Full attention in every layer.
    Full,
    /// The layer-wise hybrid: full attention in the last layers, MoBA below.
    LayerWise {
        /// Number of last layers with full attention; all layers if there are fewer.
        full_last: usize,
    },
    /// The two-stage hybrid: MoBA for the first part of training, then full attention.
    TwoStage {
        /// The progress, 0 to 1, from which on attention is full; the paper switches at 0.9.
        switch_at: f64,
    },
    /// Layer-wise until `switch_at`, then full attention in every layer.
    Hybrid {
        /// As in [`LayerWise`](Self::LayerWise).
        full_last: usize,
        /// As in [`TwoStage`](Self::TwoStage).
        switch_at: f64,
    },
    /// A function of the caller's; see [`HybridPolicy::custom`].
    Custom(CustomPolicy),
}

impl HybridPolicy {
    /// A checked [`TwoStage`](Self::TwoStage).
    ///
    /// # Errors
    /// [`Error::Config`] if `switch_at` is not within 0 and 1.
    pub fn two_stage(switch_at: f64) -> Result<Self> {
        Ok(Self::TwoStage { switch_at: fraction(switch_at)? })
    }

    /// A checked [`Hybrid`](Self::Hybrid).
    ///
    /// # Errors
    /// [`Error::Config`] if `switch_at` is not within 0 and 1.
    pub fn hybrid(full_last: usize, switch_at: f64) -> Result<Self> {
        Ok(Self::Hybrid { full_last, switch_at: fraction(switch_at)? })
    }

    /// A policy of the caller's: `kind(layer, num_layers, step)`. It decides for every phase, [`Phase::Decode`]
    /// included. It has a `name` for logs, and cannot be serialized.
    pub fn custom(
        name: impl Into<String>,
        kind: impl Fn(usize, usize, Step) -> AttentionKind + Send + Sync + 'static,
    ) -> Self {
        Self::Custom(CustomPolicy { name: name.into(), kind: Arc::new(kind) })
    }

    /// Whether a policy that was written down by its fields is one.
    pub(crate) fn check(&self) -> Result<()> {
        match *self {
            Self::TwoStage { switch_at } | Self::Hybrid { switch_at, .. } => fraction(switch_at).map(|_| ()),
            Self::Moba | Self::Full | Self::LayerWise { .. } | Self::Custom(_) => Ok(()),
        }
    }

    /// What layer `layer` (0 is the first) of `num_layers` runs at `step`.
    pub fn kind(&self, layer: usize, num_layers: usize, step: Step) -> AttentionKind {
        let last = |full_last| layer >= num_layers.saturating_sub(full_last);
        let full = match *self {
            Self::Custom(ref policy) => return (policy.kind)(layer, num_layers, step),
            _ if step.phase == Phase::Decode => true,
            Self::Moba => false,
            Self::Full => true,
            Self::LayerWise { full_last } => last(full_last),
            Self::TwoStage { switch_at } => step.progress >= switch_at,
            Self::Hybrid { full_last, switch_at } => last(full_last) || step.progress >= switch_at,
        };
        if full { AttentionKind::Full } else { AttentionKind::Moba }
    }
}

/// The function behind [`HybridPolicy::Custom`]; equal only to its own clones.
#[derive(Clone)]
pub struct CustomPolicy {
    name: String,
    kind: Arc<dyn Fn(usize, usize, Step) -> AttentionKind + Send + Sync>,
}

impl CustomPolicy {
    /// The name given at construction.
    pub fn name(&self) -> &str {
        &self.name
    }
}

impl fmt::Debug for CustomPolicy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CustomPolicy").field("name", &self.name).finish_non_exhaustive()
    }
}

impl PartialEq for CustomPolicy {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.kind, &other.kind)
    }
}

impl fmt::Display for AttentionKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Moba => "moba",
            Self::Full => "full",
        })
    }
}

impl fmt::Display for HybridPolicy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Moba => f.write_str("moba"),
            Self::Full => f.write_str("full"),
            Self::LayerWise { full_last } => write!(f, "layer-wise:{full_last}"),
            Self::TwoStage { switch_at } => write!(f, "two-stage:{switch_at}"),
            Self::Hybrid { full_last, switch_at } => write!(f, "hybrid:{full_last},{switch_at}"),
            Self::Custom(policy) => write!(f, "custom:{}", policy.name),
        }
    }
}

impl FromStr for HybridPolicy {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let wanted = || {
            Error::config(format!(
                "policy must be moba, full, layer-wise:LAYERS, two-stage:FRACTION or hybrid:LAYERS,FRACTION, got {text:?}"
            ))
        };
        let layers = |part: &str| part.trim().parse::<usize>().map_err(|_| wanted());
        let share = |part: &str| part.trim().parse::<f64>().map_err(|_| wanted());
        match text.split_once(':') {
            None if text == "moba" => Ok(Self::Moba),
            None if text == "full" => Ok(Self::Full),
            Some(("layer-wise", last)) => Ok(Self::LayerWise { full_last: layers(last)? }),
            Some(("two-stage", at)) => Self::two_stage(share(at)?),
            Some(("hybrid", both)) => {
                let (last, at) = both.split_once(',').ok_or_else(wanted)?;
                Self::hybrid(layers(last)?, share(at)?)
            }
            _ => Err(wanted()),
        }
    }
}

impl Serialize for HybridPolicy {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        match self {
            Self::Custom(policy) => Err(ser::Error::custom(format!(
                "the custom policy {:?} is a function and cannot be saved: store a built-in policy, or set it in code",
                policy.name
            ))),
            built_in => serializer.collect_str(built_in),
        }
    }
}

impl<'de> Deserialize<'de> for HybridPolicy {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(de::Error::custom)
    }
}

fn fraction(switch_at: f64) -> Result<f64> {
    if (0.0..=1.0).contains(&switch_at) {
        Ok(switch_at)
    } else {
        Err(Error::config(format!("switch_at must be a share of training within 0 and 1, got {switch_at}")))
    }
}
