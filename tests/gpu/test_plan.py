"""plan: what it takes the kernels for allocates as much as they do."""

import torch
from reference import random_factors
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from peft_pst import PSTConfig, functional
from peft_pst.functional import Live, Method
from peft_pst.patterns import keep_largest, parse_pattern
from peft_pst.plan.simulation import _kernels


class Allocations(TorchDispatchMode):
    """The bytes of all tensors that operators make."""

    def __init__(self):
        super().__init__()
        self.kept = []
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in given:
                self.kept.append(tensor)
                self.bytes += tensor.untyped_storage().nbytes()
        return result


def allocated(run):
    with Allocations() as mode:
        run()
    return mode.bytes


def step(method, weight, factors, dtype):
    n, k = weight.shape
    mask = Live(parse_pattern("unstructured"), torch.tensor(1000, device=weight.device))
    x, dy = torch.ones(4, k, dtype=dtype, device=weight.device), torch.ones(4, n, dtype=dtype, device=weight.device)
    _, bits = functional.forward(x, None, mask, method, None, weight, *factors)
    functional.backward(dy, [True, False, False, *[True] * 6], method, None, x, weight, bits, *factors)


def test_of_a_step_and_of_a_selection(device):
    n, k = 192, 1152
    weight = torch.randn(n, k, device=device)
    factors = [factor.to(device) for factor in random_factors(n, k, 8, 8, torch.float32)]
    for run in (
        lambda: step(Method.of(PSTConfig()), weight, factors, torch.float32),
        lambda: step(Method.of(PSTConfig()), weight, factors, torch.bfloat16),
        lambda: keep_largest(weight, torch.tensor(1000, device=device)),
    ):
        real = allocated(run)
        with _kernels("cuda"):
            planned = allocated(run)
        # histograms and the state of a selection have one size whatever the weight's
        assert planned <= real < planned + 2**16
