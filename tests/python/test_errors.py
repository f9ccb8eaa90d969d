"""Wrong arguments from Python: the error names the argument, what was wanted and what was given; tensors and process
stay as they were."""

import pytest
import torch

moba = torch.ops.moba


def zeros(*size, dtype=torch.float32):
    return lambda x: torch.zeros(size, dtype=dtype, device=x[0].device)


def with_(index, change):
    def call(x):
        x = list(x)
        x[index] = change(x[index])
        return moba.attention(*x, 8, 2)

    return call


DENSE = {
    "block_size 0": (lambda x: moba.attention(*x, 0, 2), "block_size: wanted at least 1, got 0"),
    "top_k 0": (lambda x: moba.attention(*x, 8, 0), "top_k: wanted at least 1 .*, got 0"),
    "route top_k -1": (lambda x: moba.route(x[0], x[1], 8, -1), "top_k: wanted at least 1 .*, got -1"),
    "scale NaN": (lambda x: moba.attention(*x, 8, 2, softmax_scale=float("nan")), "softmax_scale: wanted a finite"),
    "q rank": (with_(0, lambda q: q[0]), r"q: wanted 4 dimensions \[batch, heads, seqlen_q, head_dim\], got 3"),
    "k rank": (with_(1, lambda k: k[None]), "k: wanted 4 dimensions .*, got 5"),
    "v rank": (with_(2, lambda v: v[0, 0]), "v: wanted 4 dimensions .*, got 2"),
    "q dtype": (with_(0, lambda q: q.long()), "q: wanted dtype Float, Double, BFloat16 or Half, got Long"),
    "k dtype": (with_(1, lambda k: k.half()), "k: wanted dtype Float as q, got Half"),
    "v dtype": (with_(2, lambda v: v.double()), "v: wanted dtype Float as q, got Double"),
    "k head_dim": (with_(1, lambda k: k[..., :4]), "k: wanted head_dim 8 as q, got 4"),
    "v shape": (with_(2, lambda v: v[:, :, 1:]), r"v: wanted shape \[2, 2, 20, 8\] as k, got \[2, 2, 19, 8\]"),
    "batch": (with_(1, lambda k: k[:1]), "k: wanted batch 2 as q, got 1"),
    "head ratio": (with_(0, lambda q: q[:, :3]), "q: wanted heads .* multiple of the 2 heads of k, got 3"),
    "seqlen": (with_(1, lambda k: k[:, :, :7]), "q: wanted seqlen_q of at most seqlen_k .* seqlen_q 20 and seqlen_k 7"),
    "device": (with_(1, lambda k: k.to("meta")), "k: wanted device .* as q, got meta"),
    "route dtype": (lambda x: moba.routed_attention(*x, moba.route(x[0], x[1], 8, 2).long(), 8), "route: wanted dtype Int"),
    "route shape": (
        lambda x: moba.routed_attention(*x, moba.route(x[0], x[1], 8, 2)[:, :, 1:], 8),
        r"route: wanted shape \[2, 4, 20, 2\] to match q, got \[2, 4, 19, 2\]",
    ),
}


@pytest.mark.parametrize("name", DENSE)
def test_dense(qkv, name):
    call, text = DENSE[name]
    x = qkv(batch=2, dtype=torch.float32, grad=False)
    before = moba.attention(*x, 8, 2)[0]
    with pytest.raises((ValueError, TypeError, RuntimeError), match=text):
        call(x)
    assert torch.equal(before, moba.attention(*x, 8, 2)[0])


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


PACKED = {
    "decreasing": (int32(0, 9, 5, 14), None, "cu_seqlens_q: wanted non-decreasing entries, got 9 then 5"),
    "start": (int32(1, 7, 7, 14), None, "cu_seqlens_q: wanted a first entry of 0, got 1"),
    "end": (int32(0, 7, 7, 13), None, r"cu_seqlens_q: wanted a last entry of 14 \(the number of tokens\), got 13"),
    "beyond": (None, int32(0, 7, 7, 20), "cu_seqlens_k: wanted a last entry of 19"),
    "entries": (None, int32(0, 7, 19), "cu_seqlens_k: wanted 4 entries as cu_seqlens_q, got 3"),
    "dtype": (int32(0, 7, 7, 14).long(), None, r"cu_seqlens_q: wanted dtype Int \(int32\), got Long"),
    "rank": (int32(0, 7, 7, 14)[None], None, r"cu_seqlens_q: wanted shape \[sequences \+ 1\], got \[1, 4\]"),
    "queries": (None, int32(0, 6, 7, 19), "cu_seqlens_q: wanted at most as many queries as keys .* 7 queries and 6 keys"),
}


@pytest.mark.parametrize("name", PACKED)
def test_packed(packed, name):
    bad_q, bad_k, text = PACKED[name]
    q, k, v, cu_q, cu_k = packed(grad=False)
    move = lambda bad, good: good if bad is None else bad.to(q.device)
    run = lambda cu_q, cu_k: moba.attention_varlen(q, k, v, cu_q, cu_k, 14, 19, 4, 2)[0]
    before = run(cu_q, cu_k)
    with pytest.raises((ValueError, TypeError, RuntimeError), match=text):
        run(move(bad_q, cu_q), move(bad_k, cu_k))
    assert torch.equal(before, run(cu_q, cu_k))


def test_max_seqlen(packed):
    q, k, v, cu_q, cu_k = packed(grad=False)
    with pytest.raises(ValueError, match="max_seqlen_q: wanted at least the longest sequence, got 6 for .* 7 tokens"):
        moba.attention_varlen(q, k, v, cu_q, cu_k, 6, 19, 4, 2)


def test_too_few_arguments(qkv):
    with pytest.raises(RuntimeError, match="top_k"):
        moba.attention(*qkv(), 8)
