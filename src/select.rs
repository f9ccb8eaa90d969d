//! Which kernels run for given tensors, and why not others: a list of named filters for each backend.

use std::fmt;

use tch::{Device, Kind, Tensor};

use crate::{MobaConfig, dispatch};

/// A set of kernels.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Backend {
    /// C++ on all cores.
    Cpu,
    /// CUDA kernels for any shape on GPUs of compute capability 8.0 and newer.
    CudaPortable,
    /// Tensor-core kernels for GPUs of compute capability 9.0 (H100, H200): bfloat16 and float16, head_dim 64 and 128,
    /// block_size a multiple of 16. More than 64 slots are routed by the portable kernels.
    CudaHopper,
}

impl fmt::Display for Backend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Cpu => "cpu",
            Self::CudaPortable => "cuda_portable",
            Self::CudaHopper => "cuda_hopper",
        })
    }
}

/// Why a backend does not run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// The backend that refused.
    pub backend: Backend,
    /// Name of the filter that refused.
    pub filter: &'static str,
    /// What it wants and what it got.
    pub reason: String,
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "not {}: {}: {}", self.backend, self.filter, self.reason)
    }
}

/// The answer of [`select`]; `Display` gives it as one line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Selection {
    /// The backend that runs, `None` if the call would be an error.
    pub backend: Option<Backend>,
    /// For every backend that does not take the tensors, its first filter that refused. A backend that takes them too and is
    /// only less preferred, such as the portable CUDA kernels beside those for Hopper, is not among them.
    pub refusals: Vec<Refusal>,
}

impl fmt::Display for Selection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.backend {
            Some(backend) => write!(f, "{backend}")?,
            None => f.write_str("none")?,
        }
        self.refusals.iter().try_for_each(|refusal| write!(f, "; {refusal}"))
    }
}

/// Says which backend [`moba_attention`](crate::moba_attention) runs for these tensors and why others do not take them.
/// Autocast is left out of account: where it is on, ask for tensors of its dtype. `moba_attention` logs the answer with
/// `tracing::debug!`.
///
/// ```
/// use tch::{Device, Kind, Tensor};
/// use tch_moba::{Backend, MobaConfig, select};
/// let q = Tensor::zeros([1, 2, 8, 16], (Kind::Float, Device::Cpu));
/// let selection = select(&q, &q, &q, &MobaConfig::default());
/// assert_eq!(selection.backend, Some(Backend::Cpu));
/// println!("{selection}"); // cpu; not cuda_hopper: device: want q on a CUDA device, got Cpu; not cuda_portable: ..
/// ```
pub fn select(q: &Tensor, k: &Tensor, v: &Tensor, config: &MobaConfig) -> Selection {
    let inputs = Inputs { q, k, v, config };
    let mut selection = Selection { backend: None, refusals: Vec::new() };
    for &(backend, first, last) in BACKENDS {
        let mut filters = first.iter().chain(COMMON).chain(last);
        let refused = filters.find_map(|(filter, accepts)| Some((*filter, accepts(&inputs).err()?)));
        match refused {
            Some((filter, reason)) => selection.refusals.push(Refusal { backend, filter, reason }),
            None => selection.backend = selection.backend.or(Some(backend)),
        }
    }
    tracing::debug!(%selection, %config, "moba attention");
    selection
}

struct Inputs<'a> {
    q: &'a Tensor,
    k: &'a Tensor,
    v: &'a Tensor,
    config: &'a MobaConfig,
}

/// A name, and a test that says what it wanted and what it got.
type Filter = (&'static str, fn(&Inputs<'_>) -> Result<(), String>);

/// In order of preference. The first filters of a backend run before the common ones, the last after them; each may rely
/// on those before it.
const BACKENDS: &[(Backend, &[Filter], &[Filter])] = &[
    (Backend::CudaHopper, &[("device", on_cuda), ("build", built_with_cuda)], &[("kernels", taken_by_hopper)]),
    (
        Backend::CudaPortable,
        &[
            ("device", on_cuda),
            ("build", built_with_cuda),
            ("capability", capability_at_least_8),
            ("head_dim", head_dim_at_most_256),
            ("tokens", tokens_fit_int32),
        ],
        &[],
    ),
    (Backend::Cpu, &[("device", on_cpu)], &[]),
];

const COMMON: &[Filter] = &[
    ("one_device", one_device),
    ("rank", rank),
    ("dtype", dtype),
    ("shape", shape),
    ("heads", heads),
    ("seqlen", seqlen),
];

fn on_cuda(inputs: &Inputs<'_>) -> Result<(), String> {
    let device = inputs.q.device();
    want(matches!(device, Device::Cuda(_)), || format!("want q on a CUDA device, got {device:?}"))
}

fn built_with_cuda(_: &Inputs<'_>) -> Result<(), String> {
    want(cfg!(feature = "cuda"), || "want a build with the feature `cuda`, got one without".to_owned())
}

/// The kernels' own conditions, which the operator itself asks before each call.
fn taken_by_hopper(inputs: &Inputs<'_>) -> Result<(), String> {
    let Inputs { q, k, v, config } = *inputs;
    let scale = config.softmax_scale().unwrap_or(1.0); // the default is positive, whatever it is
    let arguments = [q.into(), k.into(), v.into(), config.block_size().into(), scale.into()];
    let refusal = dispatch::call_text("moba::_hopper_refusal", &arguments).map_err(|error| error.to_string())?;
    want(refusal.is_empty(), || refusal)
}

/// The operator's own condition, asked with tensors of no tokens, over which it launches nothing.
fn capability_at_least_8(inputs: &Inputs<'_>) -> Result<(), String> {
    let empty = Tensor::f_zeros([1, 1, 0, 1], (Kind::Float, inputs.q.device())).map_err(|error| error.to_string())?;
    let arguments = [(&empty).into(), (&empty).into(), 1i64.into(), 1i64.into()];
    dispatch::call("moba::route", &arguments).map(drop).map_err(|error| error.to_string())
}

fn head_dim_at_most_256(inputs: &Inputs<'_>) -> Result<(), String> {
    let head_dim = inputs.q.size().last().copied().unwrap_or(0);
    want(head_dim <= 256, || format!("want at most 256, got {head_dim}"))
}

fn tokens_fit_int32(inputs: &Inputs<'_>) -> Result<(), String> {
    let tokens = [inputs.q, inputs.k].map(|x| x.size().get(2).copied().unwrap_or(0)).into_iter().max().unwrap_or(0);
    want(tokens <= i64::from(i32::MAX), || format!("want at most {} tokens, got {tokens}", i32::MAX))
}

fn on_cpu(inputs: &Inputs<'_>) -> Result<(), String> {
    let device = inputs.q.device();
    want(device == Device::Cpu, || format!("want q on the CPU, got {device:?}"))
}

fn one_device(inputs: &Inputs<'_>) -> Result<(), String> {
    let [q, k, v] = [inputs.q, inputs.k, inputs.v].map(Tensor::device);
    want(q == k && q == v, || format!("want q, k, v on one device, got {q:?}, {k:?}, {v:?}"))
}

fn rank(inputs: &Inputs<'_>) -> Result<(), String> {
    let [q, k, v] = [inputs.q, inputs.k, inputs.v].map(Tensor::dim);
    let wanted = "want q, k, v [batch, heads, seqlen, head_dim]";
    want(q == 4 && k == 4 && v == 4, || format!("{wanted}, got {q}, {k}, {v} dimensions"))
}

fn dtype(inputs: &Inputs<'_>) -> Result<(), String> {
    let [q, k, v] = [inputs.q, inputs.k, inputs.v].map(|x| x.f_kind().ok());
    let supported = matches!(q, Some(Kind::Float | Kind::Double | Kind::BFloat16 | Kind::Half));
    let wanted = "want q, k, v in one of float32, float64, bfloat16, float16";
    want(supported && q == k && q == v, || format!("{wanted}, got {q:?}, {k:?}, {v:?}"))
}

fn shape(inputs: &Inputs<'_>) -> Result<(), String> {
    let [q, k, v] = [inputs.q, inputs.k, inputs.v].map(Tensor::size);
    want(k == v && q[0] == k[0] && q[3] == k[3] && q[3] > 0, || {
        format!("want k and v of one shape, with the batch and head_dim (at least 1) of q, got {q:?}, {k:?}, {v:?}")
    })
}

fn heads(inputs: &Inputs<'_>) -> Result<(), String> {
    let (heads, heads_k) = (inputs.q.size()[1], inputs.k.size()[1]);
    let multiple = heads > 0 && heads_k > 0 && heads % heads_k == 0;
    want(multiple, || format!("want the heads of q to be a positive multiple of those of k, got {heads} and {heads_k}"))
}

fn seqlen(inputs: &Inputs<'_>) -> Result<(), String> {
    let (seqlen_q, seqlen_k) = (inputs.q.size()[2], inputs.k.size()[2]);
    want(seqlen_q <= seqlen_k, || format!("want no more queries than keys, got {seqlen_q} and {seqlen_k}"))
}

fn want(holds: bool, otherwise: impl FnOnce() -> String) -> Result<(), String> {
    if holds { Ok(()) } else { Err(otherwise()) }
}
