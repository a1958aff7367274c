import copy

import pytest
import torch
from peft import PeftModel, get_peft_model
from reference import plain_mask
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft_pst import PSTConfig, calibrate
from peft_pst.boost import Boosted, block_ones, boost

N, K, SIZE = 6, 16, 4


def two_of_four(weight):
    return torch.cat([plain_mask(group[None], 2) for group in weight.abs().reshape(-1, 4)]).view_as(weight)


def boosted(base=None, **choices):
    base = nn.Linear(K, N).double() if base is None else base
    config = PSTConfig.ast(target_modules=["0"], boost=SIZE, **choices)
    return get_peft_model(nn.Sequential(base), config, autocast_adapter_dtype=False).to(base.weight.dtype)


@pytest.mark.parametrize("projection", [False, True])
def test_the_branch_is_its_formula(projection):
    x, S = torch.randn(2, 3, K, dtype=torch.float64), torch.randn(N, K // SIZE, dtype=torch.float64)
    P = torch.zeros(K // SIZE, K, dtype=torch.float64)
    for i in range(K // SIZE):
        P[i, SIZE * i : SIZE * (i + 1)] = 1
    assert torch.equal(block_ones(K // SIZE, SIZE).double(), P)
    if projection:
        P = torch.randn_like(P)
    expected = torch.einsum("btk,gk,ng->btn", x, P, S)
    torch.testing.assert_close(boost(x, S, P if projection else None), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("base", [nn.Linear(K, N).double(), Conv1D(N, K).double()], ids=["Linear", "Conv1D"])
def test_it_starts_from_the_mean_of_what_the_first_mask_prunes(base):
    model = boosted(copy.deepcopy(base))
    layer = model.base_model.model[0]
    assert not layer.pst_boost["default"].any()
    model.base_model.set_sparsity(0.5)
    weight = (base.weight.T if isinstance(base, Conv1D) else base.weight).detach()
    pruned = weight * (1 - two_of_four(weight))
    expected = torch.stack([group.sum(1) / SIZE for group in pruned.split(SIZE, dim=1)], dim=1)
    torch.testing.assert_close(layer.pst_boost["default"].double(), expected, rtol=1e-6, atol=1e-6)
    before = layer.pst_boost["default"].detach().clone()
    with torch.no_grad():
        layer.pst_D["default"].normal_()
    model.base_model.set_sparsity(0.5)  # another mask is no other start
    assert torch.equal(layer.pst_boost["default"], before)


@pytest.mark.parametrize("interval", [1, 10])
def test_it_starts_with_a_mask_that_is_there_from_the_beginning(interval):
    started = boosted(nn.Linear(K, N), initial_sparsity=0.5, mask_interval=interval).base_model.model[0]
    pruned = started.base_layer.weight.detach().masked_fill(two_of_four(started.base_layer.weight.detach()) == 1, 0)
    torch.testing.assert_close(started.pst_boost["default"].detach(), pruned.unflatten(1, (-1, SIZE)).mean(-1))


def test_a_boost_that_has_trained_does_not_start_again():
    model = boosted()
    model.base_model.set_sparsity(0.5)
    S = model.base_model.model[0].pst_boost["default"]
    nn.init.ones_(S)
    for sparsity in (0, 0.5):  # as one looks at the dense model
        model.base_model.set_sparsity(sparsity)
    assert (S == 1).all()


def test_what_was_merged_in_place_and_unloaded_describes_its_boosts(bert):
    model = get_peft_model(bert(intermediate_size=64), PSTConfig.ast())
    model.base_model.set_sparsity(0.5)
    model.merge_adapter()
    model = model.unload()
    assert len(model.config.quantization_config.boosts) == 12


def test_under_wanda_it_starts_when_the_first_mask_is_selected():
    model = boosted(importance="wanda")
    calibrate(model, [torch.randn(8, K, dtype=torch.float64)])
    assert not model.base_model.model[0].pst_boost["default"].any()
    model.base_model.set_sparsity(0.5)
    assert model.base_model.model[0].pst_boost["default"].any()


@pytest.mark.parametrize("projection", [False, True])
def test_output_and_gradients_are_those_of_the_formula(projection):
    model = boosted(boost_projection=projection)
    model.base_model.set_sparsity(0.5)
    layer = model.base_model.model[0]
    S, D = layer.pst_boost["default"], layer.pst_D["default"]
    P = layer.pst_projection["default"] if projection else block_ones(K // SIZE, SIZE).double()
    assert ("default" in layer.pst_projection) == projection
    weight, bias = layer.base_layer.weight, layer.base_layer.bias
    x = torch.randn(5, K, dtype=torch.float64, requires_grad=True)
    y = model(x)
    mask = two_of_four(weight.detach())
    masked = mask * weight.detach() + (D - D.detach())  # the gradient goes straight through
    expected = x @ masked.T + bias + x @ P.double().T @ S.double().T
    torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-6)
    trained = [x, D, S, *([P] if projection else [])]
    dy = torch.randn_like(y)
    for mine, plain in zip(
        torch.autograd.grad(y, trained, dy), torch.autograd.grad(expected, trained, dy), strict=True
    ):
        torch.testing.assert_close(mine, plain, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("base", [nn.Linear(K, N), Conv1D(N, K)], ids=["Linear", "Conv1D"])
def test_it_stays_when_the_weight_is_merged(base):
    model = boosted(base, boost_projection=True, init_weights=False).eval()
    model.base_model.set_sparsity(0.5)
    x = torch.randn(5, K)
    with torch.no_grad():
        expected = model(x)
        model.merge_adapter()
        torch.testing.assert_close(model(x), expected)
        with model.disable_adapter():
            dense = model(x)
            torch.testing.assert_close(dense, model.base_model.model[0].base_layer(x))
        assert not torch.allclose(dense, expected)
        model.unmerge_adapter()
        assert torch.equal(model(x), expected)
        merged = model.merge_and_unload(safe_merge=True)
        torch.testing.assert_close(merged(x), expected)
    assert isinstance(merged[0], Boosted) and type(merged[0].linear) is type(base)
    assert int((merged[0].linear.weight == 0).sum()) == N * K // 2
    assert {name: list(p.shape) for name, p in merged[0].named_parameters()} == {
        "boost": [N, K // SIZE],
        "projection": [K // SIZE, K],
        "linear.weight": list(base.weight.shape),
        "linear.bias": [N],
    }


def test_without_a_merge_nothing_of_it_stays():
    model = boosted(init_weights=False)
    assert type(model.unload()[0]) is nn.Linear


def test_a_saved_adapter_brings_it(tmp_path):
    torch.manual_seed(3)
    base = nn.Linear(K, N)
    model = boosted(copy.deepcopy(base), boost_projection=True)
    model.base_model.set_sparsity(0.5)
    with torch.no_grad():
        model.base_model.model[0].pst_projection["default"].normal_()
    model.save_pretrained(tmp_path)
    opened = PeftModel.from_pretrained(nn.Sequential(copy.deepcopy(base)), tmp_path)
    x = torch.randn(5, K)
    with torch.no_grad():
        assert torch.equal(opened.eval()(x), model.eval()(x))
    S = opened.base_model.model[0].pst_boost["default"].detach().clone()
    opened.base_model.set_sparsity(0.5)
    assert torch.equal(opened.base_model.model[0].pst_boost["default"], S)


def test_what_it_needs():
    with pytest.raises(ValueError, match=r"boost=5 does not divide the inputs of '0', \[out=6, in=16\]"):
        get_peft_model(nn.Sequential(nn.Linear(K, N)), PSTConfig(target_modules=["0"], boost=5))
    with pytest.raises(ValueError, match="boost=0 is not the size of a group of inputs"):
        PSTConfig(boost=0)
    with pytest.raises(ValueError, match="boost=16 would keep alive what pattern='neuron' prunes"):
        PSTConfig(boost=16, pattern="neuron")
    with pytest.raises(ValueError, match="boost_projection=True has no effect without a boost"):
        PSTConfig(boost_projection=True)


def test_a_merged_boost_has_the_dtype_of_the_weight():
    model = get_peft_model(nn.Sequential(nn.Linear(K, N).bfloat16()), PSTConfig.ast(target_modules=["0"], boost=SIZE))
    model.base_model.set_sparsity(0.5)
    assert model.base_model.model[0].pst_boost["default"].dtype == torch.float32  # as it trains
    merged = model.merge_and_unload()
    assert {parameter.dtype for parameter in merged.parameters()} == {torch.bfloat16}
