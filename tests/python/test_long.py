"""Long sequences on a GPU, again and again: what only shows once in many runs."""

import subprocess
import sys

import pytest
import torch
from conftest import LIBRARY

# Blocks whose keys stay in shared memory, with lists so short that many blocks have queries for one of two consumers only.
REPEATS = """
import sys, torch
torch.ops.load_library(sys.argv[1])
torch.manual_seed(0)
q, k, v = torch.randn(3, 1, 4, 524288, 128, device="cuda", dtype=torch.bfloat16)
first = torch.ops.moba.attention(q, k, v, 128, 8)
for n in range(100):
    again = torch.ops.moba.attention(q, k, v, 128, 8)
    assert all(torch.equal(a, b) for a, b in zip(first, again)), f"run {n} differs"
"""


def test_half_a_million_tokens(device):
    """A consumer that skipped a block once took the keys before for its own: wrong results, or a kernel without end."""
    if device == "cpu" or torch.cuda.mem_get_info()[0] < 16 << 30:
        pytest.skip("a test for GPUs with 16 GB to spare")
    # A process of its own, as a kernel without end would keep this one.
    subprocess.run([sys.executable, "-c", REPEATS, LIBRARY], timeout=120, check=True)
