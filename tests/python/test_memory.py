"""Memory: what lies in fresh allocations never shows, runs repeat bit for bit, and a call can be captured in a CUDA graph."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

moba = torch.ops.moba

# seqlen, head_dim, block_size, top_k, heads, heads_k, dtype: for each set of kernels, with blocks and lengths that fill
# their tiles and that do not.
CASES = [
    (150, 8, 16, 3, 4, 2, torch.float64),
    (257, 24, 13, 4, 2, 1, torch.float32),
    (300, 80, 64, 2, 2, 2, torch.bfloat16),
    (512, 128, 128, 3, 2, 2, torch.bfloat16),
    (333, 64, 48, 4, 4, 1, torch.float16),
    (700, 128, 256, 2, 4, 2, torch.bfloat16),
    (401, 128, 16, 9, 2, 1, torch.float16),
    (200, 64, 64, 4, 2, 2, torch.bfloat16),
    (2999, 128, 128, 2, 2, 1, torch.bfloat16),
    (2999, 64, 256, 2, 2, 2, torch.float16),
]


def inputs(case, device):
    seqlen, head_dim, _, _, heads, heads_k, dtype = case
    generator = torch.Generator().manual_seed(seqlen)
    shapes = [(1, n, seqlen, head_dim) for n in (heads, heads_k, heads_k, heads)]
    q, k, v, dout = (torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    dlse = torch.randn((1, heads, seqlen), generator=generator).to(device, wide)
    return [x.requires_grad_() for x in (q, k, v)] + [dout, dlse]


def run(case, q, k, v, dout, dlse):
    block_size, top_k = case[2:4]
    out, lse = moba.attention(q, k, v, block_size, top_k, deterministic=True)
    return [moba.route(q, k, block_size, top_k), out, lse, *torch.autograd.grad((out, lse), (q, k, v), (dout, dlse))]


def run_packed(case, q, k, v, dout, dlse):
    block_size, top_k = case[2:4]
    seqlen = q.shape[2]
    cu = torch.tensor([0, 1, seqlen // 3, seqlen // 3, seqlen], dtype=torch.int32, device=q.device)
    rows = [x[0].transpose(0, 1) for x in (q, k, v)]
    out, lse = moba.attention_varlen(*rows, cu, cu, seqlen, seqlen, block_size, top_k, deterministic=True)
    return [out, lse, *torch.autograd.grad((out, lse), (q, k, v), (dout[0].transpose(0, 1), dlse[0]))]


@pytest.mark.parametrize("runner", [run, run_packed])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_fresh_memory_never_shows(device, case, runner):
    x = inputs(case, device)
    plain = runner(case, *x)
    again = runner(case, *x)
    torch.use_deterministic_algorithms(True)  # fills each new tensor with NaN or the largest integer
    try:
        assert torch.empty(100, device=device).isnan().all()
        poisoned = runner(case, *x)
    finally:
        torch.use_deterministic_algorithms(False)
    for n, (a, b, c) in enumerate(zip(plain, again, poisoned)):
        assert a.isfinite().all(), f"result {n}"
        assert torch.equal(a, b), f"result {n} differs from run to run"
        assert torch.equal(a, c), f"result {n} depends on what lay in fresh memory"


@pytest.mark.parametrize("case", CASES, ids=str)
def test_cuda_graph(device, case):
    if device == "cpu":
        pytest.skip("CUDA graphs need a GPU")
    q, k, v, dout, dlse = inputs(case, device)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run(case, q, k, v, dout, dlse)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        captured = run(case, q, k, v, dout, dlse)
    other = [x.detach().flip(2) for x in (q, k, v)]
    with torch.no_grad():
        for x, y in zip((q, k, v), other):
            x.copy_(y)
    graph.replay()
    torch.cuda.synchronize()
    for n, (a, b) in enumerate(zip(captured, run(case, q, k, v, dout, dlse))):
        assert torch.equal(a, b), f"result {n}"


@pytest.mark.parametrize("case", CASES, ids=str)
def test_cuda_graph_of_a_padded_batch(device, case):
    """Tokens after the last sequence: refused outside of a graph, and nothing (0, lse -inf) when one is replayed."""
    if device == "cpu":
        pytest.skip("CUDA graphs need a GPU")
    seqlen, _, block_size, top_k = case[:4]
    rows = [x.detach()[0].transpose(0, 1).contiguous() for x in inputs(case, device)[:4]]
    leaves = [x.requires_grad_() for x in rows[:3]]
    cu = torch.tensor([0, seqlen // 3, seqlen], dtype=torch.int32, device=device)

    def attend():
        out, lse = moba.attention_varlen(*leaves, cu, cu, seqlen, seqlen, block_size, top_k, deterministic=True)
        return [out, lse, *torch.autograd.grad(out, leaves, rows[3])]

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        attend()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        captured = attend()
    for x in captured:
        x.fill_(float("nan"))
    end = seqlen - 40
    cu.copy_(torch.tensor([0, seqlen // 3, end], dtype=torch.int32))
    graph.replay()
    torch.cuda.synchronize()
    out, lse, *grads = captured
    for x in (out, *grads):
        assert x[:end].isfinite().all() and x[:end].any() and not x[end:].any()
    assert lse[:, :end].isfinite().all() and lse[:, end:].isneginf().all()
    with pytest.raises(ValueError, match=f"cu_seqlens_q: wanted a last entry of {seqlen}"):
        attend()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_torch_deterministic(device, case):
    """torch.use_deterministic_algorithms means what deterministic=True means."""
    q, k, v, dout, dlse = inputs(case, device)
    wanted = run(case, q, k, v, dout, dlse)[1:]
    torch.use_deterministic_algorithms(True)
    try:
        out, lse = moba.attention(q, k, v, *case[2:4])
        found = [out, lse, *torch.autograd.grad((out, lse), (q, k, v), (dout, dlse))]
    finally:
        torch.use_deterministic_algorithms(False)
    for n, (a, b) in enumerate(zip(found, wanted)):
        assert torch.equal(a, b), f"result {n}"


@pytest.mark.parametrize("case", CASES, ids=str)
def test_kept_for_backward(device, case):
    """q, k, v, out, lse and the route: nothing of the size of queries times top_k times head_dim."""
    block_size, top_k = case[2:4]
    q, k, v = inputs(case, device)[:3]
    kept = {}

    def note(x):
        kept[x.data_ptr()] = x.nbytes
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        out, lse = moba.attention(q, k, v, block_size, top_k)
    assert {x.data_ptr() for x in (q, k, v, out, lse)} <= kept.keys()
    beyond = sum(kept.values()) - q.nbytes - k.nbytes - v.nbytes
    assert beyond <= out.nbytes + lse.nbytes + 4 * lse.numel() * top_k


@pytest.mark.parametrize("case", CASES, ids=str)
def test_activation_checkpointing(device, case):
    block_size, top_k = case[2:4]
    q, k, v, dout, dlse = inputs(case, device)
    attend = lambda q, k, v: moba.attention(q, k, v, block_size, top_k, deterministic=True)
    out, lse = checkpoint(attend, q, k, v, use_reentrant=False)
    found = [out, lse, *torch.autograd.grad((out, lse), (q, k, v), (dout, dlse))]
    for n, (a, b) in enumerate(zip(found, run(case, q, k, v, dout, dlse)[1:])):
        assert torch.equal(a, b), f"result {n}"


def limited(limit, f):
    """f() with at most `limit` bytes beyond what is held now."""
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties("cuda").total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + limit) / total)
    try:
        return f()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def peak(f):
    """What f() returns, and the bytes that it took at most."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = f()
    return result, torch.cuda.max_memory_allocated() - before


def test_short_memory(device):
    """Key heads are taken fewer at a time, with the same result; where not even one fits, the error says so.

    The same bits in forward. Backward shares out long lists by what there is to do, so other sums are rounded there.
    """
    if device == "cpu" or torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the kernels of compute capability 9.0 alone take workspace by key heads")
    heads = 2
    q, k, v, dout = inputs((65536, 128, 128, 8, heads, heads, torch.bfloat16), device)[:4]
    attend = lambda: moba.attention(q, k, v, 128, 8, deterministic=True)[0]
    out = attend()
    passes = [
        (lambda: [attend().detach()], q.nbytes, 0),
        (lambda: torch.autograd.grad(out, (q, k, v), dout, retain_graph=True), 3 * q.nbytes, 2**-8),
    ]
    for run_pass, results, tolerance in passes:
        plenty, taken = peak(run_pass)
        workspace = taken - results
        assert workspace > 100 << 20
        for a, b in zip(plenty, limited(results + 0.8 * workspace, run_pass)):
            assert (a - b).abs().max() <= tolerance * a.abs().max()
        del a, b, plenty
        # Room for the results and the route, but not for the workspace of one key head.
        with pytest.raises(torch.OutOfMemoryError, match=f"one of {heads} key heads"):
            limited(results + (60 << 20), run_pass)
