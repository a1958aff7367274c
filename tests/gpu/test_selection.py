"""gpu/selection: the mask is that of a stable sort."""

import pytest
import torch

from peft_pst import gpu
from peft_pst.patterns import keep_largest

VALUES = {
    "normal": torch.randn,
    "few values": lambda shape: torch.randint(-3, 4, shape).float(),
    "zeros of both signs": lambda shape: torch.zeros(shape) * torch.randn(shape),
    "small and large": lambda shape: torch.randn(shape) * 10.0 ** torch.randint(-38, 38, shape),
    "infinite": lambda shape: torch.randn(shape).masked_fill(torch.rand(shape) > 0.5, torch.inf),
}


def sorted_mask(importance, num_pruned):
    mask = torch.ones(importance.numel(), dtype=torch.bool)
    mask[importance.cpu().flatten().argsort(stable=True)[:num_pruned]] = False
    return mask.view(importance.shape)


@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize("shape", [(1,), (1000,), (33, 257), (2, 3, 40)], ids=str)
def test_it_is_that_of_a_stable_sort(device, shape, values):
    importance = VALUES[values](shape).to(device)
    for share in (0, 0.1, 0.5, 0.9, 1):
        num_pruned = int(importance.numel() * share)
        mask = keep_largest(importance, torch.tensor(num_pruned, device=device))
        assert torch.equal(mask.cpu(), sorted_mask(importance, num_pruned))


def test_it_goes_by_rows_whatever_the_layout(device):
    importance = torch.randint(0, 3, (40, 24)).float().to(device).T
    mask = keep_largest(importance, torch.tensor(500, device=device))
    assert torch.equal(mask.cpu(), sorted_mask(importance, 500))


@pytest.mark.parametrize("mask", [False, True])
def test_a_triton_whose_histogram_takes_no_mask_has_no_kernels(monkeypatch, mask):
    import triton.language

    histogram = (lambda input, num_bins, mask=None: None) if mask else (lambda input, num_bins: None)
    monkeypatch.setattr(triton.language, "histogram", histogram)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.version, "hip", None)
    assert gpu._is_able.__wrapped__(torch.device("cuda", 0)) == mask


def test_it_is_taken(device, monkeypatch):
    from peft_pst.gpu import selection

    def fail(*args):
        raise ZeroDivisionError

    monkeypatch.setattr(selection, "keep_largest", fail)
    with pytest.raises(ZeroDivisionError):
        keep_largest(torch.randn(4, 8, device=device), torch.tensor(3, device=device))
