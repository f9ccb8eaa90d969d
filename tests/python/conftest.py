"""The operators from Python: loads libmoba_ops.so once and lends devices, inputs and the golden vectors."""

import json
import os
import struct
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
LIBRARY = Path(os.environ.get("MOBA_OPS_LIBRARY", ROOT / "target/release/examples/libmoba_ops.so"))
GOLDEN = Path(os.environ.get("MOBA_GOLDEN_DIR", ROOT / "tests/golden"))

if not LIBRARY.is_file():
    raise SystemExit(f"no {LIBRARY}: run `cargo build --release --example moba_ops` or set MOBA_OPS_LIBRARY")
torch.ops.load_library(str(LIBRARY))


def devices():
    """The CPU, and the GPU where there is one and the library has kernels for it."""
    if torch.cuda.is_available() and has_cuda_kernels():
        return ["cpu", "cuda"]
    if os.environ.get("MOBA_REQUIRE_CUDA") == "1":
        raise SystemExit("MOBA_REQUIRE_CUDA=1, but there is no GPU or the library has no kernels for it")
    return ["cpu"]


def has_cuda_kernels():
    x = torch.zeros(1, 1, 1, 8, device="cuda")
    try:
        torch.ops.moba.attention(x, x, x, 1, 1)
    except NotImplementedError:
        return False
    return True


DEVICES = devices()


@pytest.fixture(params=DEVICES)
def device(request):
    return request.param


@pytest.fixture
def qkv(device):
    """Makes q, k, v: qkv(seqlen=20, heads=4, heads_k=2, ...)."""

    def make(seqlen=20, seqlen_q=None, batch=1, heads=4, heads_k=2, head_dim=8, dtype=torch.float64, grad=True, seed=0):
        generator = torch.Generator().manual_seed(seed)
        shapes = [(batch, heads, seqlen_q or seqlen, head_dim)] + 2 * [(batch, heads_k, seqlen, head_dim)]
        tensors = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
        return [x.to(device, dtype).requires_grad_(grad) for x in tensors]

    return make


@pytest.fixture
def packed(device):
    """Makes q, k, v, cu_seqlens_q, cu_seqlens_k: an empty sequence, equal lengths, and fewer queries than keys."""

    def make(dtype=torch.float64, grad=True, heads=4, heads_k=2, head_dim=8):
        generator = torch.Generator().manual_seed(1)
        shapes = [(14, heads, head_dim)] + 2 * [(19, heads_k, head_dim)]
        tensors = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
        cu = [torch.tensor(ends, dtype=torch.int32, device=device) for ends in ([0, 7, 7, 14], [0, 7, 7, 19])]
        return [x.to(device, dtype).requires_grad_(grad) for x in tensors] + cu

    return make


def read_safetensors(path):
    """Tensors and metadata of a safetensors file (eight bytes of header length, a JSON header, the data)."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    metadata = header.pop("__metadata__")
    kinds = {"F32": torch.float32, "I32": torch.int32}
    tensors = {}
    for name, entry in header.items():
        begin, end = (8 + length + offset for offset in entry["data_offsets"])
        tensor = torch.frombuffer(bytearray(data[begin:end]), dtype=kinds[entry["dtype"]])
        tensors[name] = tensor.reshape(entry["shape"])
    return tensors, metadata


@pytest.fixture(params=sorted(GOLDEN.glob("*.safetensors")), ids=lambda path: path.stem)
def golden(request):
    return read_safetensors(request.param)
