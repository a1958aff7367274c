"""The kernels become machine code of each generation of GPUs that has tf32 and bf16, and fit, without a GPU."""

import subprocess
import sys

import pytest

PROGRAM = """
import functools, sys
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

class Driver:
    get_current_target = lambda self: GPUTarget("cuda", int(sys.argv[1]), 32)
    get_current_device = lambda self: 0
    get_current_stream = lambda self, device: 0

driver.set_active(Driver())
compiled, run = [], JITFunction.run

def warmup(self, *args, **kwargs):
    kernel = run(self, *args, **{**kwargs, "warmup": True})
    compiled.append((self.__name__, kernel.metadata.shared, len(kernel.asm["cubin"])))

JITFunction.run = warmup

from peft_pst.gpu import fused, product, selection, step

selection.keep_largest(torch.randn(64, 128), torch.tensor(9))
for dtype in (torch.float32, torch.bfloat16):
    weight = torch.randn(64, 128).to(dtype)
    for r in (8, fused.MAX_RANK):
        factors = tuple(map(torch.randn, ((64, r), (r, 128), (64, r), (r, 128), (64,), (128,))))
        bits = torch.zeros(64 * 16, dtype=torch.uint8)
        step.gradients(weight, weight, bits, factors, (1.0, 1.0, 1.0))
        if r == 8:  # of the other kernels the rank only unrolls a loop
            step.select(weight, torch.tensor(9), factors, (1.0, 1.0, 1.0), dtype)
            step.masked_weight(weight, bits, *factors[:2], 1.0, dtype)
    offsets, indices = torch.zeros(64 * 16 + 1, dtype=torch.int32), torch.zeros(64 * 16 * 26, dtype=torch.uint8)
    tiles = product.Tiles(offsets, indices, torch.zeros(len(indices), dtype=dtype), (64, 4096))
    product.dense(tiles, dtype)
    for tokens in (1, 16):
        product.few_tokens(torch.randn(tokens, 4096).to(dtype), tiles, None)
for name, shared, size in compiled:
    assert size and shared <= int(sys.argv[2]), (name, shared, size)
print(*sorted({name for name, _, _ in compiled}))
"""


@pytest.fixture
def compiler(monkeypatch, tmp_path):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


SHARED = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024, 120: 99 * 1024}
"""Bytes of shared memory that a program may have, by compute capability."""


@pytest.mark.parametrize("capability", SHARED)
def test_for(compiler, capability):
    argv = [sys.executable, "-c", PROGRAM, str(capability), str(SHARED[capability])]
    found = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr[-4000:]
    names = {"_count_digits", "_count_ties", "_narrow", "_reduce", "_write", "_write_kept", "_write_selected"}
    names |= {"_dense", "_few_tokens"}
    assert set(found.stdout.split()) == names
