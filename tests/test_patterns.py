import numpy as np
import pytest
import torch
from reference import plain_mask

from peft_pst import patterns
from peft_pst.patterns import pack_bits, unpack_bits, unstructured_mask


def importances(kind, shape, dtype):
    scores = torch.randn(shape, dtype=torch.float64)
    if kind == "ties":
        scores = (2 * scores).round()
    if kind == "zeros":
        scores = scores.abs() * (torch.rand(shape) > 0.6)
    if kind == "equal":
        scores = torch.ones(shape, dtype=torch.float64)
    return scores.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["distinct", "ties", "zeros", "equal"])
@pytest.mark.parametrize("share", [0, 0.01, 0.3, 0.5, 0.9, 0.99, 1])
def test_prunes_exactly_the_least_important(kind, dtype, share):
    scores = importances(kind, (13, 29), dtype)
    num_pruned = int(share * scores.numel())
    mask = unstructured_mask(scores, num_pruned)
    assert mask.dtype == torch.bool and mask.shape == scores.shape
    assert (~mask).sum() == num_pruned
    assert torch.equal(mask, plain_mask(scores.float() if dtype != torch.float64 else scores, num_pruned).bool())


@pytest.mark.parametrize("kind", ["distinct", "ties", "zeros", "equal"])
@pytest.mark.parametrize("share", [0.01, 0.5, 0.99, 1])
def test_the_path_for_other_devices_gives_the_same_mask(kind, share):
    scores = importances(kind, (13, 29), torch.float32)
    num_pruned = int(share * scores.numel())
    assert torch.equal(patterns._mask_torch(scores, num_pruned), patterns._mask_numpy(scores, num_pruned))


def test_the_mask_does_not_depend_on_the_memory_layout():
    scores = importances("ties", (13, 29), torch.float32)
    assert torch.equal(unstructured_mask(scores, 200), unstructured_mask(scores.T.contiguous().T, 200))


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (8, 16), (7, 9)])
def test_bits_round_trip(shape):
    mask = torch.rand(shape) > 0.5
    bits = pack_bits(mask)
    assert torch.equal(bits, torch.from_numpy(np.packbits(mask.numpy())))
    assert torch.equal(unpack_bits(bits, mask.shape, torch.float32), mask.float())


class OtherDevice:
    """A tensor whose code path is that of a device other than the CPU."""

    def __init__(self, tensor):
        self.tensor = tensor

    def __getattr__(self, name):
        return type("device", (), {"type": "other"}) if name == "device" else getattr(self.tensor, name)

    def __getitem__(self, index):
        return self.tensor[index]

    def flatten(self):
        return OtherDevice(self.tensor.flatten())


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (8, 16), (7, 9)])
def test_bits_of_other_devices_are_the_same(shape):
    mask = torch.rand(shape) > 0.5
    ones = unpack_bits(OtherDevice(pack_bits(mask)), mask.shape, torch.float64)
    assert torch.equal(ones, mask.double())
