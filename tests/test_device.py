"""A training step on a device that is not the CPU asks for no value on the host, so the host never waits for it.

There is no such device here: the steps run on `meta`, which has no values to give. Whatever would read one raises, or
is caught by the modes below; so is what copies from the host, for which a GPU is waited for as well.
"""

from contextlib import contextmanager, nullcontext

import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from peft_pst import PSTConfig, SparsityScheduler, calibrate, layer

aten = torch.ops.aten
# the shape of what they return, or what they return, depends on values
WAITS = (
    aten.nonzero, aten.masked_select, aten.equal, aten._unique2, aten.unique_dim, aten.unique_consecutive,
    aten.bincount, aten.repeat_interleave, aten._local_scalar_dense, aten.is_nonzero,
)  # fmt: skip
INDEXES = (aten.index, aten.index_put, aten.index_put_, aten._unsafe_index_put)


class NoCopies(TorchFunctionMode):
    """Python numbers do not become tensors of the device."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func in (torch.tensor, torch.as_tensor, torch.asarray, torch.Tensor.new_tensor):
            assert result.device.type == "cpu", f"{func.__name__} copies numbers to the device"
        return result


class NoWaits(TorchDispatchMode):
    """No operation reads values of the device, and none has tensors on the device and on the host."""

    def __init__(self):
        super().__init__()
        self.operations = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        tensors = [t for t in tree_leaves((args, kwargs, result)) if isinstance(t, torch.Tensor)]
        if any(tensor.device.type == "meta" for tensor in tensors):
            self.operations += 1
            assert func.overloadpacket not in WAITS, f"{func} waits for the device"
            if func.overloadpacket in INDEXES:
                assert all(i.dtype == torch.int64 for i in args[1] if i is not None), f"{func} waits for a mask"
            # a number that the host has is an argument of the kernel, but no tensor crosses
            assert all(t.device.type == "meta" for t in tensors), f"{func} copies between host and device"
        return result


@contextmanager
def nothing_waits():
    with NoCopies(), NoWaits() as mode:
        yield
    assert mode.operations


@pytest.fixture(autouse=True)
def what_meta_lacks(monkeypatch):
    """It has neither random numbers nor autocast."""
    generator, rand = torch.Generator, torch.rand
    monkeypatch.setattr(torch, "Generator", lambda device: generator())
    monkeypatch.setattr(torch, "rand", lambda *args, generator, **kwargs: rand(*args, **kwargs))
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: False)
    monkeypatch.setattr(torch, "autocast", lambda device, enabled: nullcontext())


class FeedForward(nn.Module):
    def __init__(self):
        super().__init__()
        self.up_proj, self.down_proj = nn.Linear(16, 24), nn.Linear(24, 16)

    def forward(self, hidden_states):
        return self.down_proj(torch.tanh(self.up_proj(hidden_states)))


def make(**choices):
    model = get_peft_model(FeedForward(), PSTConfig(init_weights=False, **{"target_modules": "all-linear", **choices}))
    if model.active_peft_config.importance == "wanda":
        calibrate(model, [{"hidden_states": torch.randn(4, 16)}])
    return model.train()


def train(model, steps, scheduler=None):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    x = torch.empty(3, 5, 16, device="meta", requires_grad=True)
    for _ in range(steps):
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if scheduler:
            scheduler.step()


LIVE = {
    **{importance: {"importance": importance} for importance in ("pst", "magnitude", "movement", "l0", "wanda")},
    **{f"update={update}": {"update": update} for update in ("full", "none")},
    **{pattern: {"pattern": pattern} for pattern in ("2:4", "4:8", "block:8x1", "block:4x4", "row", "column")},
}
KEPT = {
    "mask_interval": {"mask_interval": 10},
    "global": {"budget": "global"},
    "soft_movement": {"importance": "soft_movement", "budget": "global"},
    "l0, global": {"importance": "l0", "budget": "global"},
    "neuron": {"pattern": "neuron", "coupled_modules": [["up_proj", "down_proj"]]},
}


@pytest.fixture
def fingerprints(monkeypatch):
    """Which layers compared their fingerprint, for which the host waits."""
    compared = []
    monkeypatch.setattr(layer, "same_fingerprint", lambda a, b: compared.append(a) or True)
    return compared


@pytest.mark.parametrize("choices", {**LIVE, **KEPT}.values(), ids={**LIVE, **KEPT})
def test_forward_backward_and_optimizer_wait_for_nothing(choices, fingerprints):
    model = make(**choices).to("meta")
    fingerprints.clear()
    with nothing_waits():
        train(model, steps=3)
    assert len(fingerprints) == 2  # one a layer, in the first step


@pytest.mark.parametrize("choices", [c for c in LIVE.values() if c.get("importance") != "wanda"], ids=str)
def test_with_live_masks_a_step_of_the_schedule_waits_for_nothing(choices, fingerprints):
    model = make(**choices).to("meta")
    scheduler = SparsityScheduler(model, 10)
    with nothing_waits():
        train(model, 10, scheduler)


def test_between_two_masks_a_step_of_the_schedule_waits_for_nothing(fingerprints):
    model = make(mask_interval=10).to("meta")
    scheduler = SparsityScheduler(model, 100, last_step=31)
    with nothing_waits():
        train(model, 8, scheduler)


@pytest.mark.parametrize(
    "choices",
    [{"mask_interval": 2}, {"budget": "global"}, {"mask_interval": 2, "pattern": "2:4"}, KEPT["neuron"]],
    ids=str,
)
def test_selecting_masks_that_are_kept_waits_for_nothing(choices, fingerprints):
    model = make(**choices).to("meta")
    scheduler = SparsityScheduler(model, 10)
    with nothing_waits():
        train(model, 10, scheduler)


@pytest.mark.parametrize(
    "read",
    [
        lambda t: t.item(),
        lambda t: bool(t),
        lambda t: t.cpu(),
        lambda t: t.numpy(),
        lambda t: t[None][t[None] > 0],
        lambda t: t[None].nonzero(),
        lambda t: t.new_tensor([1, 2]),
        lambda t: torch.tensor(3, device=t.device),
        lambda t: torch.arange(3).to(t.device),
        lambda t: t[None].masked_fill_(t[None] > 0, 1).index_put_((t[None] > 0,), t),
    ],
)
def test_the_modes_catch_what_waits(read):
    with pytest.raises((AssertionError, RuntimeError, NotImplementedError, TypeError)), nothing_waits():
        read(torch.empty((), device="meta"))
