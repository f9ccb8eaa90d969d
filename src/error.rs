//! One error type for the whole crate.

/// What the functions of this crate return.
pub type Result<T> = std::result::Result<T, Error>;

/// Why a call was refused. Every message names the argument, what was wanted and what was given.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A configuration that cannot be meant: found before any tensor is touched.
    #[error("invalid configuration: {0}")]
    Config(String),

    /// An operator refused its arguments or failed while running. The message is libtorch's own, without the C++ backtrace.
    #[error("{op}: {message}")]
    Torch {
        /// The operator as the dispatcher knows it, for example `moba::attention`.
        op: String,
        /// What it said.
        message: String,
    },

    /// Any other failure reported by tch.
    #[error(transparent)]
    Tch(#[from] tch::TchError),

    /// A gradient that does not agree with the central differences of its function.
    #[error("gradient check failed: {0}")]
    Gradient(String),
}

impl Error {
    /// An [`Error::Config`] from its message.
    pub fn config(message: impl Into<String>) -> Self {
        Self::Config(message.into())
    }
}
