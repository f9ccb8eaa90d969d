"""The operators inside programs: TorchScript, torch.export, torch.compile, another process, C++."""

import os
import shutil
import subprocess
import sys
import sysconfig
import warnings
from pathlib import Path

import pytest
import torch

from conftest import LIBRARY

moba = torch.ops.moba
HERE = Path(__file__).resolve().parent


def attend(q, k, v):
    out, lse = moba.attention(q, k, v, 8, 2)
    return out * 2 + lse.unsqueeze(-1).to(out.dtype)


class Attend(torch.nn.Module):
    def forward(self, q, k, v):
        return attend(q, k, v)


def results(f, tensors):
    """Output and gradients, on copies."""
    tensors = [x.detach().clone().requires_grad_() for x in tensors]
    out = f(*tensors)
    return [out.detach(), *torch.autograd.grad(out.sin().sum(), tensors)]


def assert_same(f, g, tensors):
    for a, b in zip(results(f, tensors), results(g, tensors), strict=True):
        torch.testing.assert_close(a, b)


def trace(tensors):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return torch.jit.trace(Attend(), tensors)


def test_torchscript(qkv, tmp_path):
    traced = trace(tuple(qkv(seqlen=16, dtype=torch.float32, grad=False)))
    traced.save(tmp_path / "attend.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        loaded = torch.jit.load(tmp_path / "attend.pt")
    # Another length than the trace has seen, three times: the later runs are of the optimised graph.
    for _ in range(3):
        assert_same(attend, loaded, qkv(seqlen=37, dtype=torch.float32))


def run_python(code, *arguments):
    return subprocess.run([sys.executable, "-W", "ignore", "-c", code, *arguments], capture_output=True, text=True)


def test_torchscript_in_another_process(qkv, tmp_path):
    q, k, v = qkv(dtype=torch.float32, grad=False)
    trace((q, k, v)).save(tmp_path / "attend.pt")
    torch.save([q, k, v, attend(q, k, v)], tmp_path / "tensors.pt")
    code = """
import sys, torch
torch.ops.load_library(sys.argv[1])
q, k, v, out = torch.load(sys.argv[3])
assert torch.equal(torch.jit.load(sys.argv[2])(q, k, v), out)
print("same")
"""
    done = run_python(code, str(LIBRARY), str(tmp_path / "attend.pt"), str(tmp_path / "tensors.pt"))
    assert done.returncode == 0 and done.stdout.strip() == "same", done.stderr


def test_torchscript_without_the_operator(tmp_path):
    x = torch.zeros(1, 1, 4, 8)
    trace((x, x, x)).save(tmp_path / "attend.pt")
    done = run_python("import sys, torch; torch.jit.load(sys.argv[1])", str(tmp_path / "attend.pt"))
    assert done.returncode == 1, "an exception, not a crash"
    assert "Unknown builtin op: moba::attention" in done.stderr, done.stderr


def test_export(qkv):
    tensors = qkv(dtype=torch.float32, grad=False, batch=2)
    program = torch.export.export(Attend(), tuple(tensors))
    assert torch.equal(program.module()(*tensors), attend(*tensors))


def test_export_with_dynamic_lengths(qkv, tmp_path):
    tensors = qkv(seqlen=40, dtype=torch.float32, grad=False, batch=2)
    seqlen, batch = torch.export.Dim("seqlen", min=2), torch.export.Dim("batch", min=1)
    shapes = {name: {0: batch, 2: seqlen} for name in "qkv"}
    program = torch.export.export(Attend(), tuple(tensors), dynamic_shapes=shapes)
    torch.export.save(program, tmp_path / "attend.pt2")
    module = torch.export.load(tmp_path / "attend.pt2").module()
    for length, size in [(40, 2), (9, 1), (133, 3), (3, 2)]:
        tensors = qkv(seqlen=length, dtype=torch.float32, grad=False, batch=size)
        assert torch.equal(module(*tensors), attend(*tensors)), f"seqlen {length}"


def test_export_holds_the_operator(qkv):
    """Export keeps moba calls whole: no ATen operator of a kernel's inside shows up in the graph."""
    program = torch.export.export(Attend(), tuple(qkv(dtype=torch.float32, grad=False)))
    calls = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert any(call.startswith("moba.") for call in calls), calls
    assert not any("bmm" in call or "softmax" in call for call in calls), calls


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_compile(qkv, device, backend):
    if backend == "inductor" and device == "cpu" and shutil.which("g++") is None:
        pytest.skip("inductor needs g++ for the CPU")
    if backend == "inductor" and not Path(sysconfig.get_path("include"), "Python.h").exists():
        pytest.skip("inductor needs Python.h, for example from the package python3-dev")
    torch.compiler.reset()
    compiled = torch.compile(attend, backend=backend, fullgraph=True)
    for seqlen in (24, 24, 37):
        assert_same(attend, compiled, qkv(seqlen=seqlen, dtype=torch.float32))


def test_compile_with_dynamic_lengths(qkv):
    torch.compiler.reset()
    compiles = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(attend, backend=compiles, fullgraph=True, dynamic=True)
    for seqlen in (24, 37, 130, 61):
        assert_same(attend, compiled, qkv(seqlen=seqlen, dtype=torch.float32))
    assert compiles.frame_count == 1, "one graph for all lengths"


def test_compile_packed_and_routed(qkv, packed):
    torch.compiler.reset()
    q, k, v, cu_q, cu_k = packed(dtype=torch.float32)

    def varlen(q, k, v):
        return moba.attention_varlen(q, k, v, cu_q, cu_k, 7, 12, 4, 2)[0]

    assert_same(varlen, torch.compile(varlen, backend="aot_eager", fullgraph=True), (q, k, v))

    def routed(q, k, v):
        return moba.routed_attention(q, k, v, moba.route(q, k, 4, 3), 4)[0]

    assert_same(routed, torch.compile(routed, backend="aot_eager", fullgraph=True), qkv(dtype=torch.float32))


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
@pytest.mark.parametrize("device", ["cpu"])
def test_cpp_program(qkv, device, tmp_path):
    """A C++ program that only knows libtorch opens the library and runs a saved module, also with wrong input."""
    root = Path(torch.__file__).parent
    program = tmp_path / "consumer"
    include = [f"-I{root / 'include'}", f"-I{root / 'include/torch/csrc/api/include'}"]
    libraries = [f"-L{root / 'lib'}", f"-Wl,-rpath,{root / 'lib'}", "-ltorch_cpu", "-lc10", "-ldl"]
    if (root / "lib/libtorch_cuda.so").exists():
        # As libtorch's own CMake configuration links programs.
        libraries += ["-Wl,--no-as-needed", "-ltorch_cuda", "-lc10_cuda"]
    command = ["g++", "-std=c++20", "-O0", *include, str(HERE / "consumer.cpp"), "-o", str(program), *libraries]
    subprocess.run(command, check=True)
    x = qkv(dtype=torch.float32, grad=False)
    trace(tuple(x)).save(tmp_path / "attend.pt")
    done = subprocess.run([program, LIBRARY, tmp_path / "attend.pt"], capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    ones = torch.ones(1, 4, 20, 8), torch.ones(1, 2, 20, 8), torch.ones(1, 2, 20, 8)
    assert abs(float(lines[0]) - attend(*ones).double().sum().item()) <= 1e-2
    assert "k: wanted head_dim 8 as q, got 4" in lines[1]
    assert lines[2] == lines[0], "the process goes on"


def environment():
    """Without the paths of this process, so that the program finds its libraries by itself."""
    return {name: value for name, value in os.environ.items() if name not in ("LD_LIBRARY_PATH", "LD_PRELOAD")}
