import copy
import pickle

import pytest
import torch
from peft import get_peft_model
from reference import FACTORS, plain_importance, plain_mask
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft_pst import PSTConfig, PSTLayer
from peft_pst.fingerprint import fingerprint, same_fingerprint
from peft_pst.update import LowRank

BASES = {"Linear": lambda: nn.Linear(17, 12), "Conv1D": lambda: Conv1D(12, 17)}


def adapted(kind="Linear", sparsity=0.7, dtype=torch.float32):
    torch.manual_seed(0)
    base = BASES[kind]()
    nn.init.normal_(base.bias)
    config = PSTConfig(target_modules=["0"], init_weights=False, initial_sparsity=sparsity, sparsity=0.999)
    return get_peft_model(nn.Sequential(base).to(dtype), config)


def the_layer(model) -> PSTLayer:
    return model.base_model.model[0]


def expected_weight(model):
    """M ∘ W', [out, in], float64, by the formula."""
    layer = the_layer(model)
    weight = layer.get_base_layer().weight
    weight = (weight.T if isinstance(layer.get_base_layer(), Conv1D) else weight).detach().double()
    factors = [factor.detach().double() for factor in layer.arguments("default")]
    updated, importance = plain_importance(weight, *factors, beta=layer.active_config.beta)
    return updated * plain_mask(importance, layer.num_pruned)


def output(model, x):
    with torch.no_grad():
        return model(x)


@pytest.mark.parametrize("factor", [1.0, 20.0, -4.0, 0.1, 0.0])
def test_a_large_factor_makes_no_product_start_with_more(factor):
    config = PSTConfig(target_modules=["0"], beta=factor, alpha1=factor)
    layer = the_layer(get_peft_model(nn.Sequential(nn.Linear(300, 400)), config))
    for name in ("pst_U", "pst_A"):
        left = getattr(layer, name)["default"]
        assert abs(left.std() * max(1, abs(factor)) - 1) < 0.05
    assert torch.equal(layer.masked_weight("default"), layer.get_base_layer().weight)


@pytest.mark.parametrize("kind", BASES)
def test_merged_weight_is_the_masked_weight_with_positive_zeros(kind):
    model = adapted(kind)
    expected, num_pruned = expected_weight(model), the_layer(model).num_pruned
    x = torch.randn(3, 17)
    before = output(model.eval(), x)
    model.merge_adapter(safe_merge=True)
    torch.testing.assert_close(output(model, x), before, rtol=1e-5, atol=1e-5)
    weight = model.merge_and_unload()[0].weight
    oriented = weight.T if kind == "Conv1D" else weight
    torch.testing.assert_close(oriented.detach().double(), expected, rtol=1e-5, atol=1e-6)
    pruned = weight[weight == 0]
    assert pruned.numel() == num_pruned == int(12 * 17 * 0.7) and not pruned.signbit().any()
    assert weight.is_contiguous()


@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unmerge_restores_every_bit(kind, dtype):
    model = adapted(kind, dtype=dtype)
    weight = the_layer(model).get_base_layer().weight
    before = weight.detach().clone()
    for _ in range(2):
        model.merge_adapter()
        assert not torch.equal(weight, before)
        model.unmerge_adapter()
        assert torch.equal(weight, before)


def test_disabling_a_merged_adapter_gives_the_base_model_back():
    model = adapted()
    x = torch.randn(3, 17)
    with model.disable_adapter():
        base = output(model, x)
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(output(model, x), base)


def test_a_merged_model_can_be_cast_and_then_unmerged():
    model = adapted()
    before = the_layer(model).get_base_layer().weight.detach().clone()
    model.merge_adapter()
    model.half()
    model.unmerge_adapter()
    assert torch.equal(the_layer(model).get_base_layer().weight, before.half())


@pytest.mark.parametrize("name", FACTORS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_safe_merge_refuses_what_the_mask_would_hide(name, value):
    model = adapted()
    weight = the_layer(model).get_base_layer().weight
    before = weight.detach().clone()
    with torch.no_grad():
        getattr(the_layer(model), name)["default"].view(-1)[0] = value
    with pytest.raises(ValueError, match="NaNs detected in the merged weights. The adapter default seems to be brok"):
        model.merge_adapter(safe_merge=True)
    assert torch.equal(weight, before) and not the_layer(model).merged


def test_sparsity_of_a_merged_adapter_cannot_change():
    model = adapted()
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"The adapter \['default'\] is merged: .* Call unmerge_adapter\(\) before"):
        model.base_model.set_sparsity(0.5)


@pytest.mark.parametrize("use", ["forward", "train", "merge", "sparsity"])
def test_two_adapters_on_one_layer_are_refused(use):
    model = adapted()
    model.add_adapter("other", PSTConfig(target_modules=["0"]))
    model.base_model.set_adapter(["default", "other"])
    message = r"The PST adapters \['default', 'other'\] are on the same layer: two masks on one weight do not compose"
    with pytest.raises(ValueError, match=message):
        {
            "forward": lambda: output(model.eval(), torch.randn(1, 17)),
            "train": lambda: model.train()(torch.randn(1, 17)),
            "merge": lambda: model.merge_adapter(),
            "sparsity": lambda: model.base_model.set_sparsity(0.5),
        }[use]()
    model.set_adapter("other")
    model.merge_adapter()
    with pytest.raises(ValueError, match=message.replace("'default', 'other'", "'other', 'default'")):
        model.merge_adapter(["default"])


# What evaluation keeps: never computed twice, never stale.


@pytest.fixture
def selections(monkeypatch):
    calls = []
    original = LowRank.weight
    monkeypatch.setattr(LowRank, "weight", lambda *a: calls.append(1) or original(*a))
    return calls


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_evaluation_computes_the_mask_once(selections, context):
    model = adapted().eval()
    with context():
        for _ in range(5):
            model(torch.randn(3, 17))
    assert len(selections) == 1


def test_evaluation_of_a_frozen_adapter_computes_the_mask_once_and_passes_gradients(selections):
    model = adapted().eval().requires_grad_(False)
    for _ in range(5):
        x = torch.randn(3, 17, requires_grad=True)
        model(x).sum().backward()
        torch.testing.assert_close(x.grad.double(), expected_weight(model).sum(0).expand(3, -1), rtol=1e-5, atol=1e-5)
    assert len(selections) == 1


def test_training_keeps_no_dense_weight():
    model = adapted().train()
    output(model, torch.randn(3, 17))  # the first pass of gradient checkpointing
    model(torch.randn(3, 17)).sum().backward()
    assert the_layer(model)._inference_weight is None
    output(model.eval(), torch.randn(3, 17))
    assert the_layer(model)._inference_weight is not None
    model.train()
    assert the_layer(model)._inference_weight is None


def test_samples_are_taken_on_a_cpu_alone(monkeypatch):
    model, taken = adapted().eval(), []
    monkeypatch.setattr(type(the_layer(model)), "_sample", lambda self, tensor: taken.append(tensor) or tensor)
    monkeypatch.setattr(type(the_layer(model)), "masked_weight", lambda self, name: torch.zeros(1))
    with torch.no_grad():
        the_layer(model)._weight_for_inference("default", torch.float32)
        assert taken
        taken.clear()
        the_layer(model.to("meta"))._weight_for_inference("default", torch.float32)
    assert not taken


def step_without_versions(model):
    for parameter in the_layer(model).arguments("default"):
        parameter.data.add_(torch.randn_like(parameter))


def step_of_an_optimizer(model):
    for factor in the_layer(model).arguments("default"):
        factor.grad = torch.randn_like(factor)
    torch.optim.AdamW(the_layer(model).arguments("default"), lr=1.0).step()


def new_base_weight(model):
    the_layer(model).get_base_layer().weight.data = torch.randn(12, 17)


def base_weight_in_place(model):
    with torch.no_grad():
        the_layer(model).get_base_layer().weight.mul_(-3)


def load_in_place(model):
    state = {k: torch.randn_like(v) if v.is_floating_point() else v for k, v in model.state_dict().items()}
    model.load_state_dict(state)


def assign(model):
    state = {k: torch.randn_like(v) if v.is_floating_point() else v for k, v in model.state_dict().items()}
    model.load_state_dict(state, assign=True)


def broadcast_of_buffers(model):
    the_layer(model).pst_num_pruned["default"].data.copy_(torch.tensor(11))


def replaced_buffer(model):
    the_layer(model).pst_num_pruned._buffers["default"] = torch.tensor(7)


def replaced_parameter(model):
    the_layer(model).pst_V.default = nn.Parameter(torch.randn(8, 17))


def scale(model):
    model.peft_config["default"].beta = 3.0


@pytest.mark.filterwarnings("ignore:The PST adapter")
@pytest.mark.parametrize(
    "change",
    [
        scale,
        step_without_versions,
        step_of_an_optimizer,
        new_base_weight,
        base_weight_in_place,
        load_in_place,
        assign,
        broadcast_of_buffers,
        replaced_buffer,
        replaced_parameter,
        lambda model: model.base_model.set_sparsity(0.2),
        lambda model: model.double().float(),
    ],
    ids=lambda change: change.__name__,
)
def test_evaluation_never_sees_a_stale_mask(change):
    model = adapted().eval()
    x = torch.randn(3, 17)
    output(model, x)
    change(model)
    expected = x.double() @ expected_weight(model).T + the_layer(model).bias.detach().double()
    torch.testing.assert_close(output(model, x).double(), expected, rtol=1e-4, atol=1e-4)


def drop_the_mask(model):
    for mask in the_layer(model).pst_mask.values():
        mask.data.fill_(255)


@pytest.mark.parametrize("change", [step_without_versions, drop_the_mask], ids=lambda change: change.__name__)
@pytest.mark.parametrize(
    "choices",
    [{"importance": "movement", "update": "full"}, {"importance": "l0"}, {"budget": "global"}, {"mask_interval": 9}],
    ids=str,
)
def test_evaluation_of_other_methods_never_sees_a_stale_mask(change, choices):
    config = PSTConfig(target_modules=["0"], init_weights=False, **choices)
    model = get_peft_model(nn.Sequential(nn.Linear(70, 80)), config).eval()
    model.base_model.set_sparsity(0.7)
    x = torch.randn(3, 70)
    before = output(model, x)
    change(model)
    after = output(model, x)
    assert torch.equal(after, output(copy.deepcopy(model), x))
    assert torch.equal(after, before) == (change is drop_the_mask and not len(the_layer(model).pst_mask))


def test_evaluation_in_another_dtype():
    model = adapted().eval()
    x = torch.randn(3, 17)
    full = output(model, x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert output(model, x).dtype == torch.bfloat16
    assert torch.equal(output(model, x), full)


def test_parameters_made_in_inference_mode():
    with torch.inference_mode():
        model = adapted().eval()
        x = torch.randn(3, 17)
        before = model(x)
        the_layer(model).pst_V["default"].add_(1)
        assert not torch.equal(model(x), before)


# The budget and the copies.


@pytest.mark.parametrize(
    "journey",
    [
        lambda model: copy.deepcopy(model),
        lambda model: pickle.loads(pickle.dumps(model)),
        lambda model: model.half(),
        lambda model: model.bfloat16(),
        lambda model: model.to(torch.float64),
    ],
    ids=["deepcopy", "pickle", "half", "bfloat16", "float64"],
)
@pytest.mark.parametrize("evaluated", [False, True])
def test_the_sparsity_survives(journey, evaluated):
    model = adapted(sparsity=0)
    model.base_model.set_sparsity(0.37)
    if evaluated:
        output(model.eval(), torch.randn(3, 17))
    model = journey(model)
    assert model.base_model.get_sparsity() == int(12 * 17 * 0.37) / (12 * 17)
    merged = model.merge_and_unload()
    assert (merged[0].weight == 0).sum() == int(12 * 17 * 0.37)


@pytest.mark.parametrize("sparsity", [0, 0.1, 0.29, 0.5, 0.9, 0.99, 0.999])
def test_the_count_is_exact(sparsity):
    model = adapted(sparsity=sparsity)
    merged = model.merge_and_unload()
    assert (merged[0].weight == 0).sum() == int(12 * 17 * sparsity)


def test_the_sparsity_is_a_share():
    with pytest.raises(ValueError, match="sparsity=1.0: expected 0 <= sparsity < 1, such as 0.9 for 90 %"):
        adapted().base_model.set_sparsity(1.0)


# The fingerprint of the weight that an adapter was made for.


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_cast_weight_is_the_same_weight(dtype):
    weight = torch.randn(30, 40) * torch.logspace(-3, 0, 40)
    assert same_fingerprint(fingerprint(weight), fingerprint(weight.to(dtype)))


def test_another_weight_is_another_weight():
    weight = torch.randn(30, 40)
    assert not same_fingerprint(fingerprint(weight), fingerprint(torch.randn(30, 40)))
    assert not same_fingerprint(fingerprint(weight), fingerprint(weight + 0.02 * torch.randn(30, 40)))


def test_a_weight_that_was_not_there_fits():
    assert same_fingerprint(fingerprint(torch.empty(3, 4, device="meta")), fingerprint(torch.randn(3, 4)))
