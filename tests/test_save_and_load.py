"""Every way by which users save and load an adapter; the sparsity and the mask survive each of them."""

import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from peft_pst import PSTConfig, PSTLayer

OLD_ADAPTER = Path(__file__).parent / "data" / "adapter_0.1.0"


METHODS = {
    "pst": {},
    "global": {"budget": "global"},
    "neuron": {"pattern": "neuron"},
    "interval": {"mask_interval": 7},
    "movement": {"importance": "movement", "update": "full"},
    "l0": {"importance": "l0"},
}


@pytest.fixture(params=METHODS)
def saved(request, bert, tokens, tmp_path):
    """An adapter on disk that prunes 37 %, though its config says 0 and 90 %, and the logits that it gives."""
    config = PSTConfig(task_type="SEQ_CLS", init_weights=False, **METHODS[request.param])
    model = get_peft_model(bert(), config).eval()
    model.base_model.set_sparsity(0.37)
    model.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        return tmp_path / "adapter", model(input_ids=tokens).logits, model.base_model.get_sparsity()


def peft_from_pretrained(base, folder):
    return PeftModel.from_pretrained(base, folder)


def peft_low_memory(base, folder):
    return PeftModel.from_pretrained(base, folder, low_cpu_mem_usage=True)


def peft_trainable(base, folder):
    return PeftModel.from_pretrained(base, folder, is_trainable=True)


def peft_load_adapter(base, folder):
    model = get_peft_model(base, PSTConfig.from_pretrained(folder), adapter_name="first")
    model.load_adapter(folder, adapter_name="second")
    model.set_adapter("second")
    return model


def peft_load_into_the_same_adapter(base, folder):
    """What the Trainer does on resume and for the best model."""
    model = get_peft_model(base, PSTConfig.from_pretrained(folder))
    model.load_adapter(folder, adapter_name="default", is_trainable=True)
    return model


def transformers_load_adapter(base, folder):
    base.load_adapter(str(folder))
    return base


JOURNEYS = [
    peft_from_pretrained,
    peft_low_memory,
    peft_trainable,
    peft_load_adapter,
    peft_load_into_the_same_adapter,
    transformers_load_adapter,
]


def sparsity(model):
    layers = [m for m in model.modules() if isinstance(m, PSTLayer)]
    return sum(layer.num_pruned for layer in layers) / sum(layer.out_features * layer.in_features for layer in layers)


@pytest.mark.parametrize("load", JOURNEYS, ids=lambda load: load.__name__)
def test_what_was_saved_is_what_is_loaded(load, bert, tokens, saved):
    folder, logits, pruned = saved
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="The PST adapter")
        model = load(bert(), folder).eval()
        assert sparsity(model) == pruned
        with torch.no_grad():
            torch.testing.assert_close(model(input_ids=tokens).logits, logits)


def test_a_model_that_has_evaluated_sees_the_loaded_adapter(bert, tokens, saved):
    folder, logits, _ = saved
    model = get_peft_model(bert(), PSTConfig.from_pretrained(folder)).eval()
    with torch.no_grad():
        model(input_ids=tokens)
        model.load_adapter(folder, adapter_name="default")
        torch.testing.assert_close(model(input_ids=tokens).logits, logits)


def test_the_file_holds_the_factors_the_budget_and_the_fingerprint(saved):
    state = load_file(saved[0] / "adapter_model.safetensors")
    kinds = {key.rpartition(".")[2] for key in state if "pst_" in key}
    config = PSTConfig.from_pretrained(saved[0])
    update = {"low_rank": {"pst_U", "pst_V"}, "full": {"pst_D"}}[config.update]
    importance = {"movement": {"pst_S"}, "l0": {"pst_log_alpha"}, "pst": {"pst_A", "pst_B", "pst_R", "pst_C"}}
    mask = {"pst_mask"} if config.keeps_masks else set()
    others = {"pst_norm_weight", "pst_norm_bias", "pst_num_pruned", "pst_fingerprint"}
    assert kinds == update | importance[config.importance] | mask | others
    assert all(v.dtype == torch.int64 for k, v in state.items() if k.endswith(("num_pruned", "fingerprint")))


@pytest.mark.parametrize("load", JOURNEYS, ids=lambda load: load.__name__)
def test_another_base_model_is_one_warning(load, bert, tokens, saved):
    with pytest.warns(UserWarning, match="The PST adapter") as caught:
        model = load(bert(seed=1), saved[0]).eval()
        for _ in range(2):
            model(input_ids=tokens)
    ours = [str(warning.message) for warning in caught if str(warning.message).startswith("The PST adapter")]
    name = "second" if load is peft_load_adapter else "default"
    assert len(ours) == 1 and ours[0].startswith(f"The PST adapter {name!r} was trained on another base model")
    assert "Load it on the model it was trained on" in ours[0]


def test_the_warning_comes_before_the_first_training_step(bert, tokens, saved):
    model = PeftModel.from_pretrained(bert(seed=1), saved[0], is_trainable=True).train()
    with pytest.warns(UserWarning, match="was trained on another base model"):
        model(input_ids=tokens)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_same_base_model_in_another_dtype_fits(dtype, bert, tokens, saved):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="The PST adapter")
        PeftModel.from_pretrained(bert().to(dtype), saved[0]).eval()(input_ids=tokens)


@pytest.mark.parametrize("load", [peft_from_pretrained, peft_low_memory])
def test_an_adapter_of_another_size_is_refused(load, bert, saved):
    message = (
        r"The adapter does not fit: .*pst_\w+ has shape \[.*\] in the checkpoint, but this layer, \[out=\d+, in=64\]"
    )
    with pytest.raises(ValueError, match=message):
        load(bert(hidden_size=64), saved[0])


@pytest.mark.parametrize("saved", ["pst"], indirect=True)
def test_an_adapter_of_another_rank_is_refused(bert, saved):
    config = json.loads((saved[0] / "adapter_config.json").read_text())
    (saved[0] / "adapter_config.json").write_text(json.dumps({**config, "r": 4}))
    with pytest.raises(
        ValueError, match=r"pst_U has shape \[32, 8\] in the checkpoint, .* needs \[32, 4\].*another r, "
    ):
        PeftModel.from_pretrained(bert(), saved[0])


def test_transformers_refuses_an_adapter_of_another_size_itself(bert, saved):
    with pytest.raises((RuntimeError, ValueError), match="size|shape|fit"):
        bert(hidden_size=64).load_adapter(str(saved[0]))


def test_the_merged_model_needs_nothing_of_ours(bert, tokens, saved, tmp_path):
    folder, logits, pruned = saved
    model = PeftModel.from_pretrained(bert(), folder)
    targets = model.base_model.targeted_module_names
    model.merge_and_unload(safe_merge=True).save_pretrained(tmp_path / "merged")
    again = type(bert()).from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        torch.testing.assert_close(again(input_ids=tokens).logits, logits)
    weights = [again.get_submodule(name).weight for name in targets]
    assert sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights) == pruned


def test_an_adapter_that_an_older_version_wrote(bert, tokens):
    """Made once by `write_adapter` below, with version 0.1.0; never made again."""
    expected = load_file(OLD_ADAPTER / "expected.safetensors")
    model = PeftModel.from_pretrained(bert(), OLD_ADAPTER).eval()
    # the base weights come from the seed: if torch draws others one day, the adapter cannot fit
    if not torch.equal(model.base_model.model.bert.embeddings.word_embeddings.weight[0], expected["base"]):
        pytest.skip("this torch draws other random numbers than the one that made the base model")
    assert model.base_model.get_sparsity() == pytest.approx(0.6, abs=1e-3)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("error", message="The PST adapter")
        torch.testing.assert_close(model(input_ids=tokens).logits, expected["logits"], rtol=1e-4, atol=1e-4)


def write_adapter(bert, tokens):
    shutil.rmtree(OLD_ADAPTER, ignore_errors=True)
    model = get_peft_model(bert(), PSTConfig(task_type="SEQ_CLS", r=2, mask_r=2, init_weights=False)).eval()
    model.base_model.set_sparsity(0.6)
    model.save_pretrained(OLD_ADAPTER)
    (OLD_ADAPTER / "README.md").unlink()
    with torch.no_grad():
        logits = model(input_ids=tokens).logits
    base = model.base_model.model.bert.embeddings.word_embeddings.weight[0].clone()
    save_file({"logits": logits, "base": base}, OLD_ADAPTER / "expected.safetensors")
