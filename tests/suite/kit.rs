//! What every test needs: devices, dtypes, random inputs in awkward layouts, and one comparison.

use std::{env, fmt, path::PathBuf};

use half::{bf16, f16};
use rand::{Rng, SeedableRng, rngs::StdRng};
use tch::{Device, IndexOp, Kind, Tensor};
use tch_moba::MobaConfig;

pub const KINDS: [Kind; 4] = [Kind::Double, Kind::Float, Kind::BFloat16, Kind::Half];

/// The CPU, and the first GPU where there is one and the build has kernels for it. `MOBA_REQUIRE_CUDA=1` makes it a
/// failure to have none.
pub fn devices() -> Vec<Device> {
    let gpu = Device::cuda_if_available();
    let usable = gpu.is_cuda() && cfg!(feature = "cuda");
    assert!(
        usable || !cuda_required(),
        "MOBA_REQUIRE_CUDA=1, but the GPU is {gpu:?} and the feature `cuda` is {}",
        if cfg!(feature = "cuda") { "on" } else { "off" }
    );
    if usable { vec![Device::Cpu, gpu] } else { vec![Device::Cpu] }
}

pub fn cuda_required() -> bool {
    env::var("MOBA_REQUIRE_CUDA").is_ok_and(|value| value == "1")
}

/// `MOBA_SUITE_SMALL=1` leaves out the larger shapes, for runs under compute-sanitizer.
pub fn small() -> bool {
    env::var("MOBA_SUITE_SMALL").is_ok_and(|value| value == "1")
}

/// `tests/golden`, of the checkout or beside the place where the binary runs, or `MOBA_GOLDEN_DIR`.
pub fn golden_dir() -> PathBuf {
    let checkout = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden");
    let places = env::var("MOBA_GOLDEN_DIR").map_or_else(
        |_| vec![PathBuf::from("tests/golden"), PathBuf::from("golden"), PathBuf::from(checkout)],
        |dir| vec![PathBuf::from(dir)],
    );
    let found = places.iter().find(|dir| dir.join("README.md").is_file());
    found.unwrap_or_else(|| panic!("no golden vectors in any of {places:?}; set MOBA_GOLDEN_DIR")).clone()
}

/// One attention problem.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Case {
    pub batch: i64,
    pub heads: i64,
    pub heads_k: i64,
    pub seqlen_q: i64,
    pub seqlen_k: i64,
    pub head_dim: i64,
    pub block_size: i64,
    pub top_k: i64,
}

impl Case {
    /// One batch entry, two heads, as many queries as keys.
    pub fn new(seqlen: i64, head_dim: i64, block_size: i64, top_k: i64) -> Self {
        Self { batch: 1, heads: 2, heads_k: 2, seqlen_q: seqlen, seqlen_k: seqlen, head_dim, block_size, top_k }
    }

    pub fn batch(self, batch: i64) -> Self {
        Self { batch, ..self }
    }

    pub fn heads(self, heads: i64, heads_k: i64) -> Self {
        Self { heads, heads_k, ..self }
    }

    pub fn queries(self, seqlen_q: i64) -> Self {
        Self { seqlen_q, ..self }
    }

    pub fn config(&self) -> MobaConfig {
        MobaConfig::new(self.block_size, self.top_k).unwrap()
    }

    pub fn blocks(&self) -> i64 {
        (self.seqlen_k + self.block_size - 1) / self.block_size
    }

    pub fn q_size(&self) -> [i64; 4] {
        [self.batch, self.heads, self.seqlen_q, self.head_dim]
    }

    pub fn k_size(&self) -> [i64; 4] {
        [self.batch, self.heads_k, self.seqlen_k, self.head_dim]
    }

    pub fn inputs(&self, seed: u64, kind: Kind, device: Device) -> Inputs {
        let mut rng = StdRng::seed_from_u64(seed);
        let mut random = |size: &[i64], kind| normal(&mut rng, size).to_kind(kind).to_device(device);
        let [q, k, v, dout] = [self.q_size(), self.k_size(), self.k_size(), self.q_size()].map(|s| random(&s, kind));
        let dlse = random(&self.q_size()[..3], lse_kind(kind));
        Inputs { q, k, v, dout, dlse }
    }
}

pub struct Inputs {
    pub q: Tensor,
    pub k: Tensor,
    pub v: Tensor,
    pub dout: Tensor,
    pub dlse: Tensor,
}

impl Inputs {
    pub fn to(&self, kind: Kind, device: Device) -> Self {
        let to = |x: &Tensor, kind| x.to_kind(kind).to_device(device);
        let [q, k, v, dout] = [&self.q, &self.k, &self.v, &self.dout].map(|x| to(x, kind));
        Self { q, k, v, dout, dlse: to(&self.dlse, lse_kind(kind)) }
    }

    pub fn each(&self) -> [&Tensor; 5] {
        [&self.q, &self.k, &self.v, &self.dout, &self.dlse]
    }

    pub fn map(&self, f: impl FnMut(&Tensor) -> Tensor) -> Self {
        let [q, k, v, dout, dlse] = self.each().map(f);
        Self { q, k, v, dout, dlse }
    }

    /// Inputs whose gradients are wanted, sharing no graph with others.
    pub fn leaves(&self) -> [Tensor; 3] {
        [&self.q, &self.k, &self.v].map(leaf)
    }
}

pub fn leaf(x: &Tensor) -> Tensor {
    x.detach().set_requires_grad(true)
}

/// Forward result and gradients of one implementation.
pub struct Results {
    pub out: Tensor,
    pub lse: Tensor,
    pub dq: Tensor,
    pub dk: Tensor,
    pub dv: Tensor,
}

impl Results {
    /// Runs `f` and takes the gradient of `sum(out * dout) + sum(lse * dlse)`.
    pub fn of(inputs: &Inputs, f: impl FnOnce(&Tensor, &Tensor, &Tensor) -> (Tensor, Tensor)) -> Self {
        let [q, k, v] = inputs.leaves();
        let (out, lse) = f(&q, &k, &v);
        let [dq, dk, dv] = gradients(&[&out, &lse], &[&inputs.dout, &inputs.dlse], &[&q, &k, &v]);
        Self { out: out.detach(), lse: lse.detach(), dq, dk, dv }
    }

    pub fn named(&self) -> [(&'static str, &Tensor); 5] {
        [("out", &self.out), ("lse", &self.lse), ("dq", &self.dq), ("dk", &self.dk), ("dv", &self.dv)]
    }
}

/// Gradients of `sum(outputs * weights)`; zeros where an input has no influence.
pub fn gradients<const N: usize>(outputs: &[&Tensor], weights: &[&Tensor], inputs: &[&Tensor; N]) -> [Tensor; N] {
    let term = |(o, w): (&&Tensor, &&Tensor)| (o.to_kind(Kind::Double) * w.to_kind(Kind::Double)).sum(Kind::Double);
    let loss = outputs.iter().zip(weights).map(term).sum::<Tensor>();
    let found = Tensor::run_backward(&[loss], inputs, false, false);
    let mut found = found.into_iter().zip(inputs).map(|(g, x)| if g.defined() { g } else { x.zeros_like() });
    std::array::from_fn(|_| found.next().unwrap())
}

/// The dtype of `lse`.
pub fn lse_kind(kind: Kind) -> Kind {
    if kind == Kind::Double { Kind::Double } else { Kind::Float }
}

/// Standard normal numbers, the same on every machine.
pub fn normal(rng: &mut StdRng, size: &[i64]) -> Tensor {
    let draw = |_| {
        let (radius, angle): (f64, f64) = (rng.random_range(f64::EPSILON..1.0), rng.random());
        (-2.0 * radius.ln()).sqrt() * (std::f64::consts::TAU * angle).cos()
    };
    let data: Vec<f64> = (0..size.iter().product()).map(draw).collect();
    Tensor::from_slice(&data).reshape(size)
}

/// Ways to lay the same numbers out in memory.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Layout {
    Contiguous,
    /// `[batch, seqlen, heads, head_dim]` seen as `[batch, heads, seqlen, head_dim]`, as a projection gives it.
    Permuted,
    /// A slice of a wider tensor: gaps between rows.
    Sliced,
    /// The last dimension is not contiguous.
    Transposed,
}

pub const LAYOUTS: [Layout; 4] = [Layout::Contiguous, Layout::Permuted, Layout::Sliced, Layout::Transposed];

/// The numbers of `x` (four dimensions) in another layout.
pub fn lay_out(x: &Tensor, layout: Layout) -> Tensor {
    match layout {
        Layout::Contiguous => x.contiguous(),
        Layout::Permuted => x.transpose(1, 2).contiguous().transpose(1, 2),
        Layout::Sliced => {
            let d = x.size()[3];
            // What lies between the rows is NaN, so that reading it shows.
            let nan = x.full_like(f64::NAN);
            Tensor::cat(&[&nan, x, &nan], 3).i((.., .., .., d..2 * d))
        }
        Layout::Transposed => x.transpose(2, 3).contiguous().transpose(2, 3),
    }
}

/// One unit in the last place of `value` in `kind`.
pub fn ulp(kind: Kind, value: f64) -> f64 {
    let epsilon = match kind {
        Kind::Double => f64::EPSILON,
        Kind::Float => f64::from(f32::EPSILON),
        Kind::BFloat16 => f64::from(bf16::EPSILON),
        Kind::Half => f64::from(f16::EPSILON),
        other => panic!("no floating-point kind: {other:?}"),
    };
    if value == 0.0 { 0.0 } else { value.log2().floor().exp2() * epsilon }
}

/// Asserts shape, non-finite positions and the largest error. NaN never passes.
pub fn assert_within(what: &dyn fmt::Display, ours: &Tensor, reference: &Tensor, allowed: f64) {
    assert_eq!(ours.size(), reference.size(), "{what}: shape");
    let error = max_error(what, ours, reference);
    assert!(error <= allowed, "{what}: error {error:e}, allowed {allowed:e} (largest value {:e})", largest(reference));
}

/// Asserts that two results of one dtype differ by rounding only: in the accumulation dtype, where sums may be taken in
/// another order, and for 16-bit results in the result too. Non-finite positions must be the same.
pub fn assert_rounding(what: &dyn fmt::Display, a: &Tensor, b: &Tensor) {
    assert_eq!(a.kind(), b.kind(), "{what}: dtype");
    let sums = 256.0 * ulp(lse_kind(a.kind()), largest(b));
    let result = if a.kind() == lse_kind(a.kind()) { 0.0 } else { 4.0 * ulp(a.kind(), largest(b)) };
    assert_within(what, a, b, sums + result);
}

/// The largest finite magnitude, 0 if there is none.
pub fn largest(x: &Tensor) -> f64 {
    let x = finite(x).abs();
    if x.numel() == 0 { 0.0 } else { x.max().double_value(&[]) }
}

/// The largest difference from a float64 reference, once infinities and NaN are seen to lie at the same places.
pub fn max_error(what: &dyn fmt::Display, x: &Tensor, reference: &Tensor) -> f64 {
    let on_cpu = |t: &Tensor| t.detach().to_device(Device::Cpu).to_kind(Kind::Double);
    let (x, reference) = (on_cpu(x), on_cpu(reference));
    assert!(x.isnan().equal(&reference.isnan()), "{what}: NaN at other places");
    let infinite = |t: &Tensor| t.nan_to_num(0.0, 1.0, -1.0) * t.isinf().to_kind(Kind::Double);
    assert!(infinite(&x).equal(&infinite(&reference)), "{what}: infinities at other places");
    let error = (finite(&x) - finite(&reference)).abs();
    if error.numel() == 0 { 0.0 } else { error.max().double_value(&[]) }
}

fn finite(x: &Tensor) -> Tensor {
    let x = x.to_device(Device::Cpu).to_kind(Kind::Double);
    x.masked_select(&x.isfinite())
}

/// Asserts the same bits, NaN included.
pub fn assert_same_bits(what: &dyn fmt::Display, a: &Tensor, b: &Tensor) {
    assert_eq!((a.size(), a.kind(), a.device()), (b.size(), b.kind(), b.device()), "{what}");
    let width = a.kind().elt_size_in_bytes();
    let kind = [Kind::Uint8, Kind::Int16, Kind::Int, Kind::Int64][width.trailing_zeros() as usize];
    let bits = |x: &Tensor| x.detach().contiguous().view_dtype(kind);
    assert!(bits(a).equal(&bits(b)), "{what}: not the same bits");
}
