import warnings

import pytest
import torch
from peft import PeftConfig, get_peft_model
from torch import nn

from peft_pst import PSTConfig


@pytest.mark.parametrize("name", ["sparsity", "initial_sparsity"])
@pytest.mark.parametrize("value", [-0.1, 1, 1.0, 90])
def test_sparsity_is_a_share(name, value):
    with pytest.raises(ValueError, match=rf"{name}={value!r} .*expected 0 <= {name} < 1, such as 0.9 for 90 %"):
        PSTConfig(**{name: value})


def test_sparsity_does_not_shrink():
    with pytest.raises(ValueError, match="initial_sparsity=0.95 is larger than sparsity=0.9"):
        PSTConfig(initial_sparsity=0.95)


def test_ratios_fit_into_the_training():
    with pytest.raises(ValueError, match="warmup_ratio=0.5 and cooldown_ratio=0.6 add up to more than 1"):
        PSTConfig(warmup_ratio=0.5, cooldown_ratio=0.6)
    with pytest.raises(ValueError, match="warmup_ratio=-0.1 is not a share of the training"):
        PSTConfig(warmup_ratio=-0.1)
    PSTConfig(warmup_ratio=0.4, cooldown_ratio=0.6)


def test_schedule_is_known():
    with pytest.raises(ValueError, match=r"schedule='cosine' is unknown: expected one of \['cubic', 'linear', 'const"):
        PSTConfig(schedule="cosine")


@pytest.mark.parametrize("name", ["r", "mask_r"])
def test_ranks_are_whole_numbers(name):
    with pytest.raises(ValueError, match=f"{name}=0 is not a rank: expected an int of at least 1"):
        PSTConfig(**{name: 0})
    with pytest.raises(TypeError, match=f"{name}=2.5 is not a rank"):
        PSTConfig(**{name: 2.5})


@pytest.mark.parametrize("name", ["beta", "alpha1", "alpha2", "sparsity", "warmup_ratio"])
def test_numbers_are_finite_numbers(name):
    with pytest.raises(TypeError, match=f"{name}='0.5' is of type str: expected a number"):
        PSTConfig(**{name: "0.5"})
    with pytest.raises(ValueError, match=f"{name}=nan is not finite"):
        PSTConfig(**{name: float("nan")})


def test_targets():
    with pytest.raises(ValueError, match="bias='lora_only' is unknown"):
        PSTConfig(bias="lora_only")
    with pytest.raises(
        ValueError, match=r"layers_to_transform=\[1\] cannot be combined with a target_modules that is"
    ):
        PSTConfig(target_modules=".*query", layers_to_transform=[1])
    with pytest.raises(ValueError, match="layers_pattern='layer' has no effect without layers_to_transform"):
        PSTConfig(layers_pattern="layer")


def test_the_defaults_are_those_of_the_paper():
    config = PSTConfig()
    assert (config.r, config.mask_r, config.beta, config.alpha1, config.alpha2) == (8, 8, 1, 1, 1)
    assert (config.sparsity, config.initial_sparsity, config.schedule) == (0.9, 0, "cubic")
    assert (config.warmup_ratio, config.cooldown_ratio, config.bias) == (0.1, 0.3, "none")


def test_a_saved_config_is_the_same_config(tmp_path):
    config = PSTConfig(r=4, sparsity=0.8, schedule="linear", target_modules=["a", "b"], layers_to_transform=[0, 2])
    config.save_pretrained(tmp_path)
    assert PeftConfig.from_pretrained(tmp_path) == config
    assert PSTConfig.from_pretrained(tmp_path) == config


@pytest.mark.parametrize(("bias", "trained"), [("none", 0), ("pst_only", 1), ("all", 2)])
def test_bias(bias, trained):
    model = get_peft_model(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), PSTConfig(target_modules=["0"], bias=bias))
    assert sum(p.requires_grad for name, p in model.named_parameters() if name.endswith("bias")) == trained
    model(torch.randn(2, 4)).sum().backward()
    grads = [p.grad is not None for name, p in model.named_parameters() if name.endswith("bias")]
    assert sum(grads) == trained


def test_n_of_m_implies_its_sparsity():
    assert PSTConfig(pattern="2:4").sparsity == PSTConfig(pattern="2:4", sparsity=0.5).sparsity == 0.5
    assert PSTConfig(pattern="1:4").sparsity == 0.75
    assert PSTConfig(pattern="4:5").sparsity == PSTConfig(pattern="4:5", sparsity=1 - 4 / 5).sparsity == 0.2
    with pytest.raises(ValueError, match="sparsity=0.9 contradicts pattern='2:4', which prunes 0.5 of the entries"):
        PSTConfig(pattern="2:4", sparsity=0.9)
    with pytest.raises(ValueError, match="pattern='2of4' is unknown"):
        PSTConfig(pattern="2of4")


def test_a_saved_pattern_is_the_same_pattern(tmp_path):
    PSTConfig(pattern="1:3").save_pretrained(tmp_path)
    assert PSTConfig.from_pretrained(tmp_path) == PSTConfig(pattern="1:3")


@pytest.mark.parametrize("name", ["importance", "update", "budget"])
def test_a_choice_that_is_not_known_is_named(name):
    with pytest.raises(ValueError, match=rf"{name}='fancy' is unknown: expected one of \['"):
        PSTConfig(**{name: "fancy"})


def test_the_mask_interval_is_a_number_of_steps():
    with pytest.raises(ValueError, match="mask_interval=0 is not a number of steps: expected an int of at least 1"):
        PSTConfig(mask_interval=0)
    with pytest.raises(TypeError, match="mask_interval=2.5 is not a number of steps"):
        PSTConfig(mask_interval=2.5)


@pytest.mark.parametrize("importance", ["movement", "l0"])
@pytest.mark.parametrize("early", [{"initial_sparsity": 0.5}, {"schedule": "constant"}])
def test_pruning_before_the_scores_have_moved_is_a_warning(importance, early):
    with pytest.warns(UserWarning, match=f"importance='{importance}' starts with the same score everywhere"):
        PSTConfig(importance=importance, **early)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        PSTConfig(importance=importance)
        PSTConfig(importance="pst", **early)


def test_a_saved_choice_is_the_same_choice(tmp_path):
    config = PSTConfig(
        importance="l0", update="full", budget="global", mask_interval=5, penalty=2.0, pattern="neuron",
        coupled_modules=[["gate_proj", "up_proj", "down_proj"]],
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    assert PSTConfig.from_pretrained(tmp_path) == config
