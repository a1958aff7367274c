import pytest
import torch
from peft import get_peft_model
from reference import FACTORS, plain_pst, random_factors
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft_pst import PSTConfig
from peft_pst.functional import Live, MaskedLinear, Method
from peft_pst.patterns import parse_pattern

NAMES = ("x", "bias", "weight", "U", "V", "A", "B", "R", "C")
SCALES = {"beta": 0.7, "alpha1": 1.3, "alpha2": 0.4}


def masked_linear(x, bias, num_pruned, *arguments):
    *tensors, beta, alpha1, alpha2 = arguments
    method = Method.of(PSTConfig(beta=beta, alpha1=alpha1, alpha2=alpha2))
    return MaskedLinear.apply(x, bias, Live(parse_pattern("unstructured"), num_pruned), method, None, *tensors)


def case(kind, n, k):
    """x, bias, weight and the factors, float64, all with gradients."""
    x, bias, weight = (torch.randn(shape, dtype=torch.float64) for shape in ((5, k), (n,), (n, k)))
    factors = random_factors(n, k)
    scales = tuple(SCALES.values())
    if kind == "ties":  # whole and half numbers: the sums are exact, so ties are ties for both
        weight, factors, scales = (2 * weight).round() / 2, random_factors(n, k, integers=True), (1.0, 1.0, 1.0)
    if kind == "zeros":
        weight = weight * (torch.rand(n, k) > 0.5)
        factors = [factors[0], torch.zeros_like(factors[1]), *factors[2:]]
    return [t.requires_grad_() for t in (x, bias, weight, *factors)], scales


def outputs_and_grads(function, tensors, num_pruned, scales, dy):
    x, bias, *others = tensors
    y = function(x, bias, num_pruned, *others, *scales)
    return [y, *torch.autograd.grad(y, tensors, dy)]


@pytest.mark.parametrize("sparsity", [0, 0.3, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("kind", ["distinct", "ties", "zeros"])
@pytest.mark.parametrize("layout", ["[out, in]", "[in, out]"])
def test_output_and_gradients_are_those_of_the_formula(kind, sparsity, layout):
    tensors, scales = case(kind, 12, 17)
    if layout == "[in, out]":
        tensors[2] = tensors[2].detach().T.contiguous().T.requires_grad_()
    num_pruned = torch.tensor(int(12 * 17 * sparsity))
    dy = torch.randn(5, 12, dtype=torch.float64)
    mine = outputs_and_grads(masked_linear, tensors, num_pruned, scales, dy)
    plain = outputs_and_grads(plain_pst, tensors, num_pruned, scales, dy)
    for name, a, b in zip(("y", *NAMES), mine, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("sparsity", [0, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("base", [nn.Linear(17, 12), nn.Linear(17, 12, bias=False), Conv1D(12, 17)], ids=str)
def test_the_layer_is_the_formula(base, sparsity):
    """As a user has it: the whole layer in float64, three-dimensional input, Linear and Conv1D."""
    torch.manual_seed(1)
    base = base.double()
    weight = (base.weight.T if isinstance(base, Conv1D) else base.weight).detach().clone()
    config = PSTConfig(r=3, mask_r=2, target_modules=["0"], init_weights=False, **SCALES)
    model = get_peft_model(nn.Sequential(base), config, autocast_adapter_dtype=False).train()
    model.base_model.set_sparsity(sparsity)
    layer = model.base_model.model[0]
    factors = layer.arguments("default")
    assert {name: list(getattr(layer, name)["default"].shape) for name in FACTORS} == {
        "pst_U": [12, 3], "pst_V": [3, 17], "pst_A": [12, 2], "pst_B": [2, 17], "pst_R": [12], "pst_C": [17],
    }  # fmt: skip
    x = torch.randn(2, 5, 17, dtype=torch.float64, requires_grad=True)
    y = model(x)
    expected = plain_pst(x, base.bias, int(12 * 17 * sparsity), weight, *factors, *SCALES.values())
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    dy = torch.randn_like(y)
    for a, b in zip(
        torch.autograd.grad(y, (x, *factors), dy), torch.autograd.grad(expected, (x, *factors), dy), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_gradients_that_nobody_needs_are_not_computed():
    (x, bias, weight, *factors), scales = case("distinct", 12, 17)
    y = masked_linear(x.detach(), bias.detach(), torch.tensor(100), weight.detach(), *factors, *scales)
    y.sum().backward()
    assert x.grad is None and weight.grad is None and all(factor.grad is not None for factor in factors)


def test_keeps_the_input_the_factors_and_one_bit_an_entry():
    (x, bias, weight, *factors), scales = case("distinct", 64, 96)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        masked_linear(x, bias, torch.tensor(5000), weight, *factors, *scales)
    new = [t for t in kept if all(t.data_ptr() != old.data_ptr() for old in (x, weight, *factors))]
    assert [(t.dtype, t.numel()) for t in new] == [(torch.uint8, 64 * 96 // 8)]


def test_the_output_may_be_changed_in_place_and_the_input_may_be_empty():
    layer_input = torch.randn(5, 1, 17, dtype=torch.float64)
    model = get_peft_model(nn.Sequential(nn.Linear(17, 12).double()), PSTConfig(target_modules=["0"]))
    model(layer_input).view(5, 12).mul_(2).sum().backward()
    assert model(layer_input[:0]).shape == (0, 1, 12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_the_mask_is_that_of_full_precision(dtype):
    if dtype == torch.float16 and not torch.amp.autocast_mode.is_autocast_available("cpu"):
        pytest.skip("this torch has no autocast for fp16 on a CPU")
    model = get_peft_model(
        nn.Sequential(nn.Linear(64, 48)), PSTConfig(target_modules=["0"], init_weights=False, initial_sparsity=0.8)
    )
    x = torch.randn(32, 64, requires_grad=True)
    exact = model(x)
    gradients = torch.autograd.grad(exact.square().mean(), list(model.base_model.model[0].arguments("default")))
    with torch.autocast("cpu", dtype=dtype):
        y = model(x)
    assert y.dtype == dtype
    # a mask from rounded importances would move whole entries, not only round the result
    torch.testing.assert_close(y.float(), exact, rtol=0.05, atol=0.05 * exact.std().item())
    rounded = torch.autograd.grad(y.float().square().mean(), list(model.base_model.model[0].arguments("default")))
    for a, b in zip(rounded, gradients, strict=True):
        assert a.dtype == torch.float32
        assert torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0) > 0.99


def test_a_bf16_model_keeps_its_dtype_and_its_factors_full_precision():
    model = get_peft_model(nn.Sequential(nn.Linear(64, 48).bfloat16()), PSTConfig(target_modules=["0"]))
    assert all(factor.dtype == torch.float32 for factor in model.base_model.model[0].arguments("default"))
    assert model(torch.randn(3, 64, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_backward_inside_autocast_is_not_rounded_twice():
    model = get_peft_model(nn.Sequential(nn.Linear(64, 48)), PSTConfig(target_modules=["0"], init_weights=False))
    factors = list(model.base_model.model[0].arguments("default"))
    x = torch.randn(32, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(x).float().square().mean()
        inside = torch.autograd.grad(loss, factors, retain_graph=True)
    for a, b in zip(inside, torch.autograd.grad(loss, factors), strict=True):
        assert torch.equal(a, b)


def test_compiled_is_eager_and_a_new_sparsity_recompiles_nothing():
    layers = nn.Sequential(nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, 8))
    model = get_peft_model(layers, PSTConfig(target_modules=["0", "2"], init_weights=False)).train()
    factors = [p for p in model.parameters() if p.requires_grad]
    x = torch.randn(5, 32)
    compiled = torch.compile(model, backend="aot_eager")
    compiled(x).sum().backward()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for sparsity in (0.1, 0.5, 0.9):
            model.base_model.set_sparsity(sparsity)
            results = [run(x) for run in (compiled, model)]
            assert torch.equal(*results)
            for a, b in zip(*(torch.autograd.grad(y.sum(), factors) for y in results), strict=True):
                assert torch.equal(a, b)
