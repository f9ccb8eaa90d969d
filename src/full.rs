//! Full causal attention: libtorch's scaled dot product attention under this crate's conventions.

use tch::{Device, Kind, Tensor};

use crate::{Error, Result};

const NAME: &str = "full_attention";

/// Full causal attention, with the shapes and alignment of [`moba_attention`](crate::moba_attention):
/// `q [batch, heads, seqlen_q, head_dim]`, `k v [batch, heads_k, seqlen_k, head_dim]`, queries aligned to the end of
/// the keys. `softmax_scale` defaults to `head_dim ** -0.5`.
///
/// libtorch picks the kernel (flash attention on CPU and CUDA where it can). Only `1 < seqlen_q < seqlen_k` needs an
/// explicit mask, of `seqlen_q * seqlen_k` bytes.
///
/// # Errors
/// [`Error::Torch`] names the argument, what was wanted and what was given.
pub fn full_attention(q: &Tensor, k: &Tensor, v: &Tensor, softmax_scale: Option<f64>) -> Result<Tensor> {
    let [heads, seqlen_q, heads_k, seqlen_k] = check(q, k, v)?;
    // libtorch aligns its own causal mask to the first key, which is the same only for equal lengths; one query at the
    // end sees every key and needs no mask.
    let is_causal = seqlen_q == seqlen_k && seqlen_q > 1;
    let mask =
        (1 < seqlen_q && seqlen_q < seqlen_k).then(|| end_aligned_mask(seqlen_q, seqlen_k, q.device())).transpose()?;
    let grouped = heads != heads_k;
    Ok(Tensor::f_scaled_dot_product_attention(q, k, v, mask, 0.0, is_causal, softmax_scale, grouped)?)
}

/// `[seqlen_q, seqlen_k]`, true where the query may look.
fn end_aligned_mask(seqlen_q: i64, seqlen_k: i64, device: Device) -> Result<Tensor> {
    Ok(Tensor::f_ones([seqlen_q, seqlen_k], (Kind::Bool, device))?.f_tril(seqlen_k - seqlen_q)?)
}

/// `[heads, seqlen_q, heads_k, seqlen_k]`. libtorch checks these too, but in terms of its own matrices.
fn check(q: &Tensor, k: &Tensor, v: &Tensor) -> Result<[i64; 4]> {
    let refuse = |message: String| Err(Error::Torch { op: NAME.to_owned(), message });
    let (q_size, k_size, v_size) = (q.size(), k.size(), v.size());
    let &[batch, heads, seqlen_q, head_dim] = q_size.as_slice() else {
        return refuse(format!("q must be [batch, heads, seqlen_q, head_dim], got {q_size:?}"));
    };
    let &[batch_k, heads_k, seqlen_k, head_dim_k] = k_size.as_slice() else {
        return refuse(format!("k must be [batch, heads_k, seqlen_k, head_dim], got {k_size:?}"));
    };
    if batch_k != batch || head_dim_k != head_dim {
        return refuse(format!("k must have batch {batch} and head_dim {head_dim} as q has, got {k_size:?}"));
    }
    if v_size != k_size {
        return refuse(format!("v must have the shape of k {k_size:?}, got {v_size:?}"));
    }
    if heads_k == 0 || heads % heads_k != 0 {
        return refuse(format!("heads of q must be a multiple of heads_k, got {heads} and {heads_k}"));
    }
    if seqlen_q > seqlen_k {
        return refuse(format!("seqlen_q must be at most seqlen_k, got {seqlen_q} and {seqlen_k}"));
    }
    for (name, tensor) in [("k", k), ("v", v)] {
        if tensor.kind() != q.kind() || tensor.device() != q.device() {
            let (kind, device) = (q.kind(), q.device());
            return refuse(format!(
                "{name} must be {kind:?} on {device:?} as q is, got {:?} on {:?}",
                tensor.kind(),
                tensor.device()
            ));
        }
    }
    Ok([heads, seqlen_q, heads_k, seqlen_k])
}
