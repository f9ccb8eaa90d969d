//! Offsets beyond 2^31 elements: an int anywhere in an address would read or write elsewhere.

use std::fs;

use cudarc::driver::CudaContext;
use tch::{Device, IndexOp, Kind, Tensor};
use tch_moba::{MobaConfig, moba_attention_with_lse};

use crate::kit::{Case, Inputs, Results, assert_same_bits, cuda_required, devices, small};

const GIB: u64 = 1 << 30;

/// Bytes that can be allocated now.
fn free_memory(device: Device) -> u64 {
    if device.is_cuda() {
        return CudaContext::new(0).unwrap().mem_get_info().unwrap().0 as u64;
    }
    let text = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    line.and_then(|line| line.trim().trim_end_matches(" kB").parse().ok()).map_or(0, |kib: u64| kib << 10)
}

fn enough(test: &str, device: Device, bytes: u64) -> bool {
    let free = free_memory(device);
    let fits = free >= bytes;
    // A GPU was asked for to see this run.
    assert!(
        fits || small() || !device.is_cuda() || !cuda_required(),
        "{test}: {} GiB free, {} wanted",
        free / GIB,
        bytes / GIB
    );
    if !fits || small() {
        println!("{test} on {device:?}: left out, {} GiB free, {} wanted", free / GIB, bytes / GIB);
    }
    fits && !small()
}

/// The numbers of `x` in a buffer where neighbours in `dim` lie `stride` elements apart.
fn spread(x: &Tensor, dim: usize, stride: i64) -> Tensor {
    let (size, mut strides) = (x.size(), x.contiguous().stride());
    strides[dim] = stride;
    // Pages that nobody touches cost no memory on the CPU.
    let buffer = Tensor::empty([stride * size[dim]], (x.kind(), x.device()));
    let mut view = buffer.as_strided(&size, &strides, 0);
    view.copy_(x);
    view
}

/// Each stride in turn is so large that the last element lies beyond 2^31 elements.
#[test]
fn strides_beyond_two_to_the_31() {
    for device in devices() {
        if !enough("strides", device, 10 * GIB) {
            continue;
        }
        let case = Case::new(33, 16, 8, 2).heads(2, 2).batch(2);
        let inputs = case.inputs(1, Kind::BFloat16, device);
        let config = case.config().with_deterministic(true);
        let run = |x: &Inputs| Results::of(x, |q, k, v| moba_attention_with_lse(q, k, v, &config).unwrap());
        let compact = run(&inputs);
        for (dim, stride) in [(0, (1 << 31) + 64), (1, (1 << 31) + 64), (2, (1 << 26) + 64)] {
            for which in 0..3 {
                let mut x = [&inputs.q, &inputs.k, &inputs.v].map(Tensor::shallow_clone);
                x[which] = spread(&x[which], dim, stride);
                let [q, k, v] = x;
                let spread = run(&Inputs { q, k, v, ..inputs.to(Kind::BFloat16, device) });
                for ((name, a), (_, b)) in compact.named().iter().zip(spread.named()) {
                    assert_same_bits(&format!("{name}, input {which}, dimension {dim} on {device:?}"), a, b);
                }
            }
        }
    }
}

/// Tensors of more than 2^31 elements, inputs and outputs; the last sequence must come out as if it were alone.
#[test]
fn tensors_beyond_two_to_the_31() {
    for device in devices().into_iter().filter(|device| device.is_cuda()) {
        if !enough("tensors", device, 60 * GIB) {
            continue;
        }
        let (batch, heads, seqlen, head_dim) = (5, 64, 32768, 208);
        assert!(batch * heads * seqlen * head_dim > 1 << 31);
        let config = MobaConfig::new(64, 1).unwrap();
        let options = (Kind::BFloat16, device);
        let one = |_| Tensor::randn([1, heads, seqlen, head_dim], options);
        let last = [0; 3].map(one);
        let [q, k, v] = last.each_ref().map(|x| {
            let whole = Tensor::zeros([batch, heads, seqlen, head_dim], options);
            whole.i(batch - 1).copy_(&x.squeeze_dim(0));
            whole.set_requires_grad(true)
        });
        let [q1, k1, v1] = last.map(|x| x.set_requires_grad(true));
        let (out, lse) = moba_attention_with_lse(&q, &k, &v, &config).unwrap();
        let (out1, lse1) = moba_attention_with_lse(&q1, &k1, &v1, &config).unwrap();
        assert_same_bits(&"out", &out.i(batch - 1), &out1.i(0));
        assert_same_bits(&"lse", &lse.i(batch - 1), &lse1.i(0));
        out.i(batch - 1).sum(Kind::Float).backward();
        out1.sum(Kind::Float).backward();
        for (n, (whole, alone)) in [(&q, &q1), (&k, &k1), (&v, &v1)].into_iter().enumerate() {
            assert_same_bits(&format!("gradient {n}"), &whole.grad().i(batch - 1), &alone.grad().i(0));
        }
    }
}
