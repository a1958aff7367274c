"""gpu/step: the masked step by kernels is the paper's formula in float64, and a training with it the plain one."""

from types import SimpleNamespace

import pytest
import torch
from peft import get_peft_model
from reference import plain_importance, plain_mask, plain_pst, random_factors
from torch import nn
from torch.utils.checkpoint import checkpoint

from peft_pst import PSTConfig, SparsityScheduler, functional
from peft_pst.functional import Kept, Live, MaskedLinear, Method
from peft_pst.gpu import fused
from peft_pst.patterns import pack_bits, parse_pattern, unpack_bits

pytest.importorskip("triton")
from peft_pst.gpu import step

NUMBERS = (0.5, 2.0, 0.25)
SHAPES = [(33, 40, 3, 2), (70, 136, 8, 20)]


def inputs(n, k, r, mask_r, dtype, device, integers):
    factors = random_factors(n, k, r, mask_r, torch.float32, integers=integers)
    weight = (torch.randint(-2, 3, (n, k)).float() if integers else 0.5 * torch.randn(n, k)).to(dtype)
    return weight.to(device), tuple(factor.to(device) for factor in factors)


def in_float64(*tensors):
    return [tensor.detach().cpu().double() for tensor in tensors]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("integers", [False, True], ids=["reals", "ties"])
@pytest.mark.parametrize("sizes", SHAPES, ids=str)
def test_masked_weight_and_mask(device, sizes, integers, dtype):
    n, k, *_ = sizes
    weight, factors = inputs(*sizes, dtype, device, integers)
    updated, importance = plain_importance(*in_float64(weight, *factors), *NUMBERS)
    for sparsity in (0, 0.9):
        num_pruned = torch.tensor(int(n * k * sparsity), device=device)
        masked, bits = step.select(weight, num_pruned, factors, NUMBERS, torch.float32)
        mask = plain_mask(importance, int(num_pruned))
        assert torch.equal(unpack_bits(bits.cpu(), weight.shape, torch.float64), mask)
        torch.testing.assert_close(masked.cpu().double(), mask * updated, rtol=1e-6, atol=1e-6)
        again = step.masked_weight(weight, bits, *factors[:2], NUMBERS[0], torch.float32)
        assert torch.equal(again, masked)
        transposed = step.select(weight.T.contiguous().T, num_pruned, factors, NUMBERS, torch.float32)
        assert all(map(torch.equal, transposed, (masked, bits)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("straight_through", [False, True], ids=["masked", "straight through"])
@pytest.mark.parametrize("sizes", [*SHAPES, (20, 2056, 4, 4)], ids=str)
def test_gradients(device, sizes, straight_through, dtype):
    n, k, *_ = sizes
    weight, factors = inputs(*sizes, torch.float32, device, integers=False)
    mask, G = torch.rand(n, k) > 0.9, torch.randn(n, k).to(dtype)
    bits = None if straight_through else pack_bits(mask).to(device)
    found = step.gradients(G.to(device), weight, bits, factors, NUMBERS)
    base, *leaves = (tensor.requires_grad_() for tensor in in_float64(weight, *factors))
    updated, importance = plain_importance(base, *leaves, *NUMBERS)
    mask = torch.ones(n, k) if straight_through else mask.double()
    ((mask + importance - importance.detach()) * updated * G.double()).sum().backward()
    tolerance = 1e-2 if dtype == torch.bfloat16 and device.type == "cuda" else 2e-6
    for gradient, leaf in zip(found, leaves, strict=True):
        assert (gradient.cpu() - leaf.grad).norm() < tolerance * leaf.grad.norm()
    again = step.gradients(G.to(device), weight, bits, factors, NUMBERS)
    assert all(map(torch.equal, found, again))


@pytest.mark.parametrize("kept", [False, True], ids=["live", "kept"])
def test_the_autograd_function_is_the_formula(device, kept):
    weight, factors = inputs(24, 40, 3, 2, torch.float32, device, integers=False)
    config = SimpleNamespace(
        update="low_rank", importance="pst", straight_through=False, r=3, mask_r=2, beta=1.0, alpha1=1.0, alpha2=1.0
    )
    leaves = [tensor.clone().requires_grad_() for tensor in (torch.randn(2, 40, device=device), *factors)]
    wanted = [tensor.requires_grad_() for tensor in in_float64(*leaves)]
    mask = Live(parse_pattern("unstructured"), torch.tensor(700, device=device))
    if kept:
        _, importance = plain_importance(*in_float64(weight, *factors))
        mask = Kept(pack_bits(plain_mask(importance, 700).bool()).to(device))
    y = MaskedLinear.apply(leaves[0], None, mask, Method.of(config), None, weight, *leaves[1:])
    expected = plain_pst(wanted[0], None, 700, in_float64(weight)[0], *wanted[1:])
    torch.testing.assert_close(y.cpu().double(), expected, rtol=1e-5, atol=1e-5)
    y.sum().backward(), expected.sum().backward()
    for found, leaf in zip(leaves, wanted, strict=True):
        torch.testing.assert_close(found.grad.cpu().double(), leaf.grad, rtol=1e-4, atol=1e-4)


def small_model(device, **choices):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 8))
    config = PSTConfig(target_modules="all-linear", norms=False, **choices)
    return get_peft_model(model, config).to(device).train()


def without_kernels(monkeypatch):
    for module in (functional, fused):
        monkeypatch.setattr(module, "has_fused_step", lambda *args: False)


@pytest.mark.parametrize("choices", [{}, {"pattern": "2:4"}, {"mask_interval": 2}, {"budget": "global"}], ids=str)
def test_a_training_is_that_without_kernels(device, monkeypatch, choices):
    def train():
        model = small_model(device, **choices)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        scheduler = SparsityScheduler(model, 6)
        for _ in range(6):
            model(torch.randn(5, 16, device=device)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
        return model.merge_and_unload()

    rebuilt, run = [], step.masked_weight
    monkeypatch.setattr(step, "masked_weight", lambda *args: rebuilt.append(args) or run(*args))
    by_kernels = train()
    assert rebuilt
    without_kernels(monkeypatch)
    plain = train()
    for found, expected in zip(by_kernels.parameters(), plain.parameters(), strict=True):
        assert torch.equal(found == 0, expected == 0)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("way", ["compiled", "checkpointed", "under autocast"])
def test_a_step(device, monkeypatch, way):
    def gradients():
        model = small_model(device, initial_sparsity=0.5, init_weights=False)
        x = torch.randn(5, 16, device=device, requires_grad=True)
        run = torch.compile(model, backend="aot_eager") if way == "compiled" else model
        autocast = torch.autocast(device.type, torch.bfloat16, enabled=way == "under autocast")
        with autocast:
            y = checkpoint(run, x, use_reentrant=False) if way == "checkpointed" else run(x)
        y.float().square().sum().backward()
        return [x.grad, *(parameter.grad for parameter in model.parameters() if parameter.requires_grad)]

    calls, run = [], step.select
    monkeypatch.setattr(step, "select", lambda *args: calls.append(args) or run(*args))
    by_kernels = gradients()
    assert calls
    without_kernels(monkeypatch)
    torch.compiler.reset()
    tolerance = 0.02 if way == "under autocast" else 1e-5
    for found, expected in zip(by_kernels, gradients(), strict=True):
        assert (found - expected).norm() <= tolerance * expected.norm()


@pytest.mark.parametrize(
    "choices",
    [{"importance": "magnitude"}, {"update": "full"}, {"r": 33}, {"mask_r": 128}],
    ids=str,
)
def test_other_methods_do_without(device, choices):
    config = PSTConfig(**choices)
    weight, factors = inputs(8, 16, config.r, config.mask_r, torch.float32, device, integers=False)
    assert not fused.has_fused_step(Method.of(config), weight, factors)
    assert fused.has_fused_step(Method.of(PSTConfig()), weight, factors)
    assert not fused.has_fused_step(Method.of(PSTConfig()), weight[:, :12], factors)
    assert not fused.has_fused_step(Method.of(PSTConfig()), weight.double(), factors)
