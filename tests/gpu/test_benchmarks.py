"""benchmarks/gpu: its parts run, with small sizes. What they time on a CPU means nothing."""

import gc
import sys
import weakref
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import MagicMock

import pytest
import torch
from transformers import LlamaConfig

from peft_pst.sparse import serving


@pytest.fixture(autouse=True)
def benchmarks(monkeypatch):
    monkeypatch.setattr(serving, "HAS_KERNELS", False)
    monkeypatch.setattr(sys, "path", [str(Path(__file__).parents[2] / "benchmarks" / "gpu"), *sys.path])
    yield
    for name in ("timing", "step", "product", "large_model"):
        sys.modules.pop(name, None)


def test_a_graph_keeps_what_it_reads(monkeypatch):
    import timing

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name in ("Stream", "current_stream", "CUDAGraph"):
        monkeypatch.setattr(torch.cuda, name, MagicMock())
    for name in ("stream", "graph"):
        monkeypatch.setattr(torch.cuda, name, nullcontext)
    tensor = torch.ones(1)
    read = weakref.ref(tensor)
    replay = timing.as_graph(lambda tensor=tensor: tensor + 1)
    del tensor
    gc.collect()
    assert replay and read() is not None


def test_a_step_that_waits_is_told_of(monkeypatch):
    import step

    modes = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)

    def wait():
        assert modes[-1] == "error"
        raise RuntimeError("called a synchronizing CUDA operation\nmore")

    assert step.waits(wait) == ["called a synchronizing CUDA operation"]
    assert step.waits(lambda: None) == [] and modes == ["error", "default"] * 2


def test_step(monkeypatch):
    import step

    monkeypatch.setattr(step, "STEPS", 2)
    found = step.report(shapes=((64, 128),), tokens=8, rounds=1)
    assert found.count("| 64x128 | ") == 3 and "Copies to the host" in found


def test_product():
    import product

    found = product.report(shape=(16, 512), densities=(0.1,), tokens=(1, 17), rounds=1, beyond=2**12)
    assert found.count("| 90%") == 2


def test_large_model():
    import large_model

    config = LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4, vocab_size=99,
        tie_word_embeddings=False,
    )  # fmt: skip
    found = large_model.report(config, rounds=1)
    assert "| sparse" in found and "| dense" in found
    error = float(found.split("differ by ")[1].split(" ")[0])
    assert error < 1e-2
