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

    /// A file that cannot be used, with the reason and, where there is one, the remedy.
    #[error("{}: {message}", path.display())]
    File {
        /// The file.
        path: std::path::PathBuf,
        /// What is wrong with it.
        message: String,
    },

    /// Any other failure reported by tch.
    #[error("{}", without_backtrace(.0))]
    Tch(tch::TchError),

    /// A gradient that does not agree with the central differences of its function.
    #[error("gradient check failed: {0}")]
    Gradient(String),
}

impl Error {
    /// An [`Error::Config`] from its message.
    pub fn config(message: impl Into<String>) -> Self {
        Self::Config(message.into())
    }

    /// An [`Error::File`] from its path and message.
    pub fn file(path: impl Into<std::path::PathBuf>, message: impl Into<String>) -> Self {
        Self::File { path: path.into(), message: message.into() }
    }
}

// Not `#[from]`: that would also make it the source, and whoever prints the chain would see the message twice, the
// second time with the backtrace.
impl From<tch::TchError> for Error {
    fn from(error: tch::TchError) -> Self {
        Self::Tch(error)
    }
}

/// tch hands on libtorch's message with the C++ backtrace after it.
fn without_backtrace(error: &tch::TchError) -> String {
    let text = error.to_string();
    text.split("\nException raised from").next().unwrap_or_default().to_owned()
}
