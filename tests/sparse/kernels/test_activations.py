import math

import numpy as np
import pytest
import torch

pytest.importorskip("numba", reason="the kernels need the extra peft-pst[cpu]")

from numba import njit, types
from sparse.kernels.cases import FUNCTIONS

from peft_pst.sparse.kernels import activations, emit, worker
from peft_pst.sparse.kernels.layer import Layer
from peft_pst.sparse.kernels.layout import Kind, pack
from peft_pst.sparse.kernels.target import LANES


def apply(activation, x):
    """By a feed-forward block whose layers are the identity: a row of x is a token."""
    identity = pack(torch.eye(x.shape[1]), Kind.FP32)
    return Layer(identity, identity, None, activation)(x)


def test_all_of_them_are_tried():
    assert FUNCTIONS.keys() == activations.ACTIVATIONS.keys()


@pytest.mark.parametrize("activation", FUNCTIONS)
def test_ordinary_numbers(activation):
    x = torch.cat((torch.linspace(-30, 30, 6000), torch.linspace(-1, 1, 2000), torch.randn(192))).view(-1, 64)
    expected = FUNCTIONS[activation](x.double())
    assert ((apply(activation, x) - expected).abs() <= 4e-7 * x.abs()).all()


@pytest.mark.parametrize("activation", FUNCTIONS)
@pytest.mark.parametrize("rows", [1, 3, 40])
def test_extreme_numbers(activation, rows):
    sizes = [0.0, 1e-45, 1e-40, 1.2e-38, 1e-20, 50, 87, 88, 89, 104, 200, 1e4, 1e10, 1e19, 1e20, 3e38, math.inf]
    x = torch.tensor([*sizes, *(-size for size in sizes), math.nan]).expand(rows, -1)
    y, expected = apply(activation, x), FUNCTIONS[activation](x.double()).float()
    for test in (torch.isnan, torch.isposinf, torch.isneginf):
        assert torch.equal(test(y), test(expected))
    finite = torch.isfinite(expected)
    assert ((y - expected).abs()[finite] <= 1e-6 * expected.abs()[finite] + 1e-34).all()
    tiny = finite & (x.abs() < 1e-30)
    assert ((y - expected).abs()[tiny] <= 1e-6 * expected.abs()[tiny] + 3e-45).all()


def test_erf():
    @worker._machine(types.none, types.int64)
    def erf_of_vector(builder, address):
        vector = emit.load(builder, address, worker.VECTOR)
        emit.store(builder, activations.erf(builder, vector), address)

    @njit
    def apply_erf(address, count):
        for i in range(0, count, LANES):
            erf_of_vector(address + 4 * i)

    special = np.array([0, math.inf, -math.inf, 3.921875, -3.921875, 3.9218747, 10, -10, 1e30, 1e-40, -1e-40])
    x = np.concatenate((np.linspace(-5, 5, 160000 - len(special)), special)).astype(np.float32)
    y = x.copy()
    apply_erf(y.ctypes.data, len(y))
    assert np.abs(y - torch.erf(torch.from_numpy(x).double()).numpy()).max() <= 4e-7
    bad = np.full(LANES, np.nan, np.float32)
    apply_erf(bad.ctypes.data, LANES)
    assert np.isnan(bad).all()
