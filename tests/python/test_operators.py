"""gradcheck, opcheck and the golden vectors: every public operator behaves as libtorch wants an operator to."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.library import opcheck

moba = torch.ops.moba




def test_golden_vectors(golden, device):
    tensors, metadata = golden
    t = {name: x.to(device) for name, x in tensors.items()}
    block_size, top_k = int(metadata["block_size"]), int(metadata["top_k"])
    q, k, v = (t[name].requires_grad_() for name in "qkv")
    longest = int(t["cu_seqlens"].diff().max())
    out, _ = moba.attention_varlen(q, k, v, t["cu_seqlens"], t["cu_seqlens"], longest, longest, block_size, top_k)
    grads = torch.autograd.grad(out, (q, k, v), t["grad_out"])
    for name, ours in zip(("out", "dq", "dk", "dv"), (out, *grads)):
        # Both are float32: 32 units in the last place of the largest value.
        allowed = 32 * torch.finfo(torch.float32).eps * t[name].abs().max().item()
        error = (ours - t[name]).abs().max().item()
        assert error <= allowed, f"{name}: {error} > {allowed}"


@pytest.mark.parametrize("deterministic", [False, True])
def test_gradcheck_attention(qkv, deterministic):
    f = lambda q, k, v: moba.attention(q, k, v, 8, 2, softmax_scale=0.4, deterministic=deterministic)
    assert torch.autograd.gradcheck(f, qkv(seqlen=19, head_dim=4))
    assert torch.autograd.gradcheck(f, qkv(seqlen=19, seqlen_q=5, head_dim=3))


def test_gradcheck_attention_varlen(packed):
    q, k, v, cu_q, cu_k = packed(head_dim=3)
    f = lambda q, k, v: moba.attention_varlen(q, k, v, cu_q, cu_k, 7, 12, 4, 2)
    assert torch.autograd.gradcheck(f, (q, k, v))


def test_gradcheck_routed_attention(qkv):
    q, k, v = qkv(seqlen=19, head_dim=4)
    route = moba.route(q, k, 4, 3)
    f = lambda q, k, v: moba.routed_attention(q, k, v, route, 4)
    assert torch.autograd.gradcheck(f, (q, k, v))


def test_route_has_no_gradient(qkv):
    q, k, _ = qkv()
    route = moba.route(q, k, 8, 2)
    assert route.dtype == torch.int32 and route.shape == (1, 4, 20, 2) and not route.requires_grad


DTYPES = [torch.float64, torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("grad", [True, False])
def test_opcheck_dense(qkv, dtype, grad):
    q, k, v = qkv(dtype=dtype, grad=grad, batch=2)
    opcheck(moba.route, (q, k, 8, 2))
    opcheck(moba.attention, (q, k, v, 8, 2))
    opcheck(moba.attention, (q, k, v, 8, 5), {"softmax_scale": 0.3, "deterministic": True})
    opcheck(moba.routed_attention, (q, k, v, moba.route(q, k, 8, 2), 8))


@pytest.mark.parametrize("grad", [True, False])
def test_opcheck_packed(packed, grad):
    q, k, v, cu_q, cu_k = packed(grad=grad)
    opcheck(moba.attention_varlen, (q, k, v, cu_q, cu_k, 7, 12, 4, 2))


def test_opcheck_internal(qkv, packed):
    """What the public operators are made of, the part that autograd and shape inference see."""
    q, k, v = qkv()
    opcheck(moba._route, (q, k, None, None, 20, 20, 8, 2))
    route = moba._route(q, k, None, None, 20, 20, 8, 2)
    opcheck(moba._attend, (q, k, v, route, None, None, 20, 20, 8, 0.3, False))
    with torch.no_grad():
        out, lse = moba._attend(q, k, v, route, None, None, 20, 20, 8, 0.3, False)
    args = [x.detach() for x in (out, lse, q, k, v, out, lse)]
    opcheck(moba._attend_backward, (*args, route, None, None, 20, 20, 8, 0.3, False))
    q, k, v, cu_q, cu_k = packed()
    opcheck(moba._route, (q, k, cu_q, cu_k, 7, 12, 4, 2))
    opcheck(moba._attend, (q, k, v, moba._route(q, k, cu_q, cu_k, 7, 12, 4, 2), cu_q, cu_k, 7, 12, 4, 0.3, False))


# Of [batch, heads, seqlen, head_dim]. The last two are nothing that TMA could read.
LAYOUTS = {
    "contiguous": lambda x: x.clone(),
    "transposed heads": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "transposed head_dim": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "rows that overlap": lambda x: x.flatten(2)[..., : x.size(2) + x.size(3) - 1].unfold(2, x.size(3), 1),
    "part of wider rows": lambda x: F.pad(x.transpose(1, 2), (0, 3)).contiguous().transpose(1, 2)[..., : x.size(3)],
    "off by one": lambda x: F.pad(x.transpose(1, 2).flatten(), (1, 0))[1:].view_as(x.transpose(1, 2)).transpose(1, 2),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_meta_says_what_runs(qkv, layout):
    """Shapes, dtypes and strides without data are those with data."""
    for dtype, head_dim in itertools.product(DTYPES, (8, 64)):
        tensors = [LAYOUTS[layout](x) for x in qkv(dtype=dtype, head_dim=head_dim, grad=False, batch=2)]

        def results(q, k, v):
            route, (out, lse) = moba.route(q, k, 8, 2), moba.attention(q, k, v, 8, 2)
            grads = moba._attend_backward(out, lse, q, k, v, out, lse, route, None, None, 20, 20, 8, 0.3, False)
            return route, out, lse, *grads

        # (x.to("meta") would give rows that overlap memory of their own.)
        on_meta = [torch.empty_strided(x.shape, x.stride(), dtype=dtype, device="meta") for x in tensors]
        for a, b in zip(results(*tensors), results(*on_meta)):
            assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())
            assert b.device.type == "meta"


def test_functional_transforms_of_the_gradient(qkv):
    """A second derivative is refused with an error that says so."""
    q, k, v = qkv()
    out, _ = moba.attention(q, k, v, 8, 2)
    (dq,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="moba.*second derivative"):
        torch.autograd.grad(dq.square().sum(), k)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(qkv, device, dtype):
    q, k, v = qkv(dtype=torch.float32)
    with torch.autocast(device, dtype=dtype):
        out, lse = moba.attention(q, k, v, 8, 2)
        route = moba.route(q, k, 8, 2)
        routed, _ = moba.routed_attention(q, k, v, route, 8)
    cast = [x.to(dtype) for x in (q, k, v)]
    assert out.dtype == dtype and lse.dtype == torch.float32
    assert torch.equal(out, moba.attention(*cast, 8, 2)[0])
    assert torch.equal(route, moba.route(cast[0], cast[1], 8, 2))
    assert torch.equal(routed, out)
    assert all(g.dtype == torch.float32 for g in torch.autograd.grad(out.float().sum(), (q, k, v)))


def test_dense_meets_packed(qkv):
    q, k, v = qkv(seqlen=33, dtype=torch.float32, grad=False)
    cu = torch.tensor([0, 33], dtype=torch.int32, device=q.device)
    pack = lambda x: x[0].transpose(0, 1).contiguous()
    out, lse = moba.attention_varlen(pack(q), pack(k), pack(v), cu, cu, 33, 33, 8, 2)
    dense, dense_lse = moba.attention(q, k, v, 8, 2)
    torch.testing.assert_close(out.transpose(0, 1)[None], dense)
    torch.testing.assert_close(lse[None], dense_lse)
