"""Models with low-rank boosts (AST) after merging: checkpoints, kernels, reports, plans and what refuses them."""

import copy
import dataclasses
import json

import pytest
import torch
from peft import get_peft_model
from reference import same_bits
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

import peft_pst
from peft_pst import PSTConfig, SparseLinear, densify, report, save_pretrained, shrink, tensor_sparsity, verify
from peft_pst.bench.variants import write_variants
from peft_pst.boost import Boosted
from peft_pst.plan import plan

pytestmark = pytest.mark.filterwarnings("ignore:The model's sparse weights stay compressed")

TOKENS = torch.arange(2, 16).view(2, 7)
SIZES = {"vocab_size": 99, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "pad_token_id": 0}
MODELS = {
    "bert": (AutoModelForSequenceClassification, {**SIZES, "intermediate_size": 96}),
    "gpt2": (AutoModelForCausalLM, {"vocab_size": 99, "n_embd": 64, "n_layer": 2, "n_head": 4, "pad_token_id": 0}),
    "llama": (AutoModelForCausalLM, {**SIZES, "intermediate_size": 96, "num_key_value_heads": 2}),
}


def base(model_type, dtype=torch.float32, **sizes):
    torch.manual_seed(0)
    auto, config = MODELS[model_type]
    return auto.from_config(AutoConfig.for_model(model_type, **{**config, **sizes}), dtype=dtype)


def boosted(model, **choices):
    """An adapter on a model as after some training, pruned, with random boosts."""
    model = get_peft_model(model, PSTConfig.ast(**choices))
    model.base_model.set_sparsity(model.peft_config["default"].sparsity)
    for name, parameter in model.named_parameters():
        if "pst_boost" in name or "pst_projection" in name:
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def merged(model_type, dtype=torch.float32, **choices):
    return boosted(base(model_type, dtype), **choices).merge_and_unload()


def logits(model):
    with torch.no_grad():
        return model(input_ids=TOKENS).logits


def tensors(model):
    """The tensors of a model by the names of a dense one."""
    model = densify(copy.deepcopy(model))
    return model.state_dict()


def same_tensors(found, expected):
    return found.keys() == expected.keys() and all(same_bits(found[name], expected[name]) for name in expected)


def boosts(model):
    return [name for name, module in model.named_modules() if isinstance(module, Boosted)]


@pytest.mark.parametrize("projection", [False, True])
@pytest.mark.parametrize("model_type", MODELS)
def test_a_checkpoint_opens_with_its_boosts(model_type, projection, tmp_path):
    model = merged(model_type, boost_projection=projection)
    expected, names = logits(model), boosts(model)
    save_pretrained(model, tmp_path)
    entry = json.loads((tmp_path / "config.json").read_text())["quantization_config"]["boosts"]
    assert sorted(entry) == sorted(names) and len(names) > 7
    assert all(set(shapes) == {"boost", *(["projection"] if projection else [])} for shapes in entry.values())
    again, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert boosts(again) == names and not again.training
    assert all(isinstance(again.get_submodule(name).linear, SparseLinear) for name in names)
    assert all(parameter.requires_grad for parameter in again.parameters())  # as of any model that is opened
    assert same_tensors(tensors(again), model.state_dict())
    torch.testing.assert_close(logits(again), expected)
    dense = densify(again)
    assert boosts(dense) == names and not any(isinstance(module, SparseLinear) for module in dense.modules())
    assert torch.equal(logits(dense), expected)


def test_the_boost_matters(tmp_path):
    model = merged("llama")
    expected = logits(model)
    save_pretrained(model, tmp_path)
    again = densify(type(model).from_pretrained(tmp_path))
    for name in boosts(again):
        again.get_submodule(name).boost.data.zero_()
    assert (logits(again) - expected).abs().max() > 0.01


@pytest.mark.parametrize("journey", ["ours", "theirs", "densified, ours", "densified, theirs"])
def test_a_model_that_was_opened_can_be_saved_again(journey, tmp_path):
    model = merged("llama", boost_projection=True)
    save_pretrained(model, tmp_path / "one")
    again = type(model).from_pretrained(tmp_path / "one")
    if journey.startswith("densified"):
        again = densify(again)
    if journey.endswith("ours"):
        save_pretrained(again, tmp_path / "two")
    else:
        again.save_pretrained(tmp_path / "two")
    last = type(model).from_pretrained(tmp_path / "two")
    assert boosts(last) == boosts(model) and same_tensors(tensors(last), model.state_dict())


def test_what_transformers_saves_of_a_merged_model_opens_too(tmp_path):
    model = merged("llama", torch.bfloat16)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path, dtype="auto")
    assert boosts(again) == boosts(model) and same_tensors(again.state_dict(), model.state_dict())


def test_each_variant_of_bench_has_the_boosts(tmp_path):
    model = merged("llama")
    expected = logits(model)
    save_pretrained(model, tmp_path / "small")
    opened = type(model).from_pretrained(tmp_path / "small")
    for variant in write_variants(opened, tmp_path / "small", tmp_path):
        again = type(model).from_pretrained(variant.folder, dtype="auto")
        assert boosts(again) == boosts(model)
        tolerance = {"atol": 0.05, "rtol": 0.1} if again.dtype == torch.bfloat16 else {}
        torch.testing.assert_close(logits(again).float(), expected, **tolerance)


def test_opens_without_its_head(tmp_path):
    model = merged("bert")
    save_pretrained(model, tmp_path)
    again = AutoModel.from_pretrained(tmp_path)
    assert boosts(again) == [name.removeprefix("bert.") for name in boosts(model)]
    with torch.no_grad():
        torch.testing.assert_close(again(TOKENS)[0], model.bert(TOKENS)[0])
    again.save_pretrained(tmp_path / "theirs")
    last = type(model).from_pretrained(tmp_path / "theirs")  # with a new head
    assert same_tensors(tensors(last.bert), model.bert.state_dict())


def test_shards_and_dtypes(tmp_path):
    model = merged("llama", torch.bfloat16)
    save_pretrained(model, tmp_path, max_shard_size=20_000)
    files = list(tmp_path.glob("*.safetensors"))
    assert len(files) > 3
    stored = {key: tensor for file in files for key, tensor in load_file(file).items()}
    for name in boosts(model):  # exactly, whatever their dtype
        assert same_bits(stored[f"{name}.boost"], model.get_submodule(name).boost.detach())
    again = type(model).from_pretrained(tmp_path, dtype="auto")
    assert again.dtype == torch.bfloat16
    expected = {name: tensor.to(torch.bfloat16) for name, tensor in model.state_dict().items()}
    assert same_tensors(tensors(again), expected) and torch.equal(logits(densify(again)), logits(model))


@pytest.mark.parametrize("values", ["bf16", "int8"])
def test_rounded_values_leave_the_boost(values, tmp_path):
    model = merged("bert")
    save_pretrained(model, tmp_path / "exact")
    save_pretrained(type(model).from_pretrained(tmp_path / "exact"), tmp_path / "rounded", values=values)
    again = type(model).from_pretrained(tmp_path / "rounded")
    for name in boosts(model):
        assert same_bits(again.get_submodule(name).boost.detach(), model.get_submodule(name).boost.detach())
    assert not same_tensors(tensors(again), model.state_dict())
    torch.testing.assert_close(logits(again), logits(model), rtol=0.1, atol=0.02)
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("exact", "rounded")]
    assert sizes[1] < sizes[0]


def test_dense_has_no_place_for_a_boost(tmp_path):
    model = merged("bert")
    with pytest.raises(ValueError, match=r"low-rank boosts, such as that of 'bert.*query', and format='dense' has no"):
        save_pretrained(model, tmp_path / "dense", format="dense")
    assert not (tmp_path / "dense").exists()


def test_a_head(tmp_path):
    model = boosted(base("llama"), target_modules=["q_proj", "lm_head"]).merge_and_unload()
    save_pretrained(model, tmp_path / "untied")
    again = type(model).from_pretrained(tmp_path / "untied")
    assert "lm_head" in boosts(again) and torch.equal(logits(densify(again)), logits(model))
    tied = base("llama", tie_word_embeddings=True)
    with pytest.raises(ValueError, match="'lm_head' shares its weight with the embed"):
        boosted(tied, target_modules=["q_proj", "lm_head"])


def test_other_checkpoints_have_no_entry(tmp_path):
    save_pretrained(merged("bert", boost=None), tmp_path)
    assert "boosts" not in json.loads((tmp_path / "config.json").read_text())["quantization_config"]


def test_damage_is_an_error(tmp_path):
    model = merged("bert")
    save_pretrained(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    first = next(iter(config["quantization_config"]["boosts"].values()))
    first["boost"][1] *= 2
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="its digest is wrong"):
        type(model).from_pretrained(tmp_path)
    save_pretrained(model, tmp_path)
    file = tmp_path / "model.safetensors"
    content, boost = bytearray(file.read_bytes()), model.get_submodule(boosts(model)[0]).boost
    place = content.index(boost.detach().numpy().tobytes())
    content[place] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match="query.boost' is not the one that was saved: its checksum is wrong"):
        type(model).from_pretrained(tmp_path)
    wrong = {name: problems for name, problems in verify(tmp_path).items() if problems}
    assert list(wrong) == [f"{boosts(model)[0]}.boost"]
    save_pretrained(model, tmp_path / "again")
    assert any(verify(tmp_path / "again", against=tmp_path).values())
    save_pretrained(model, tmp_path)
    assert not any(verify(tmp_path / "again", against=tmp_path).values())


def test_a_shrunk_model_with_boosts(tmp_path):
    small = get_peft_model(
        base("bert"), PSTConfig(pattern="head", importance="magnitude", update="full", sparsity=0.5)
    )
    small.base_model.set_sparsity(0.5)
    with pytest.warns(UserWarning, match="cannot say how many heads"):
        small = shrink(small.merge_and_unload().eval())
    model = boosted(small).merge_and_unload()
    save_pretrained(model, tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert again.config.quantization_config.widths and boosts(again) == boosts(model)
    assert torch.equal(logits(densify(again)), logits(model))


def test_kernels_are_under_the_inner_layers(tmp_path, monkeypatch):
    pytest.importorskip("numba", reason="the kernels need the extra peft-pst[cpu]")
    from peft_pst.sparse import serving
    from peft_pst.sparse.feed_forward import FeedForward
    from peft_pst.sparse.kernels.layer import Layer

    calls, compute = [], Layer.__call__
    monkeypatch.setattr(Layer, "__call__", lambda self, x: (calls.append(1), compute(self, x))[1])
    monkeypatch.setattr(serving.Served, "runs_by_kernel", lambda self, tokens: True)
    for model_type in MODELS:
        model = merged(model_type, pattern="unstructured", sparsity=0.8)
        expected, names = logits(model), boosts(model)
        save_pretrained(model, tmp_path / model_type)
        fast = peft_pst.accelerate_sparse(copy.deepcopy(model))
        for one in (fast, type(model).from_pretrained(tmp_path / model_type)):
            assert [n for n, m in one.named_modules() if isinstance(m, SparseLinear)] == [f"{n}.linear" for n in names]
            assert not any(isinstance(value, FeedForward) for m in one.modules() for value in vars(m).values())
            calls.clear()
            torch.testing.assert_close(logits(one), expected)
            assert len(calls) == len(names)
            assert torch.equal(logits(densify(one)), expected)


def test_a_feed_forward_without_boosts_still_runs_as_one(monkeypatch):
    pytest.importorskip("numba", reason="the kernels need the extra peft-pst[cpu]")
    from peft_pst.sparse import serving
    from peft_pst.sparse.feed_forward import FeedForward

    monkeypatch.setattr(serving.Served, "runs_by_kernel", lambda self, tokens: True)
    choices = {"pattern": "unstructured", "sparsity": 0.8}
    model = boosted(base("llama"), target_modules=["q_proj"], **choices).merge_and_unload()
    rest = PSTConfig.ast(boost=None, target_modules=["up_proj", "gate_proj", "down_proj"], **choices)
    model = get_peft_model(model, rest)
    model.base_model.set_sparsity(0.8)
    model = model.merge_and_unload().eval()
    expected = logits(model)
    fast = peft_pst.accelerate_sparse(model)
    assert sum(isinstance(value, FeedForward) for m in fast.modules() for value in vars(m).values()) == 2
    torch.testing.assert_close(logits(fast), expected)


def costs(found):
    return {layer.name.rpartition("layers.")[2]: (layer.shape, layer.cost, layer.formats) for layer in found.layers}


@pytest.mark.parametrize("projection", [False, True])
def test_a_report_says_the_same_before_and_after_merging(projection, tmp_path):
    adapter = boosted(base("llama"), boost_projection=projection)
    before = report(adapter)
    adapter.merge_adapter()
    in_place = report(adapter)
    adapter.unmerge_adapter()
    targets = [row.name.removeprefix("base_model.model.") for row in tensor_sparsity(adapter)]
    model = adapter.merge_and_unload()
    after = report(model)
    assert costs(before) == costs(in_place)
    assert before.model == in_place.model
    head = costs(after)["lm_head"][1]  # linear too, and with an adapter one of the rest
    assert dataclasses.replace(before.model, flops=before.model.flops + head.flops) == dataclasses.replace(
        after.model, dense_flops=after.model.dense_flops - head.dense_flops
    )
    assert costs(before).items() <= costs(after).items() and len(after.layers) == len(before.layers) + 1
    assert after.model.parameters == sum(p.numel() for p in model.parameters())
    assert after.model.nonzeros == sum(int(torch.count_nonzero(p)) for p in model.parameters())
    rows = {layer.name: layer for layer in after.layers}
    up = rows["model.layers.0.mlp.up_proj.boost"]
    assert up.shape == (96, 4) and up.cost.flops == 2 * 96 * 4 and up.cost.bytes == up.cost.dense_bytes == 4 * 96 * 4
    assert ("model.layers.0.mlp.up_proj.projection" in rows) == projection
    assert "up_proj.boost" in after.table()
    assert all(row.sparsity == 0.5 for row in tensor_sparsity(model, targets))
    save_pretrained(model, tmp_path)
    content = (tmp_path / "model.safetensors").read_bytes()
    assert after.model.bytes == len(content) - 8 - int.from_bytes(content[:8], "little")
    assert report(type(model).from_pretrained(tmp_path)) == after


def test_a_report_without_the_adapter_has_no_boost():
    adapter = boosted(base("llama"))
    with adapter.disable_adapter():
        assert not any(layer.name.endswith("boost") for layer in report(adapter).layers)


@pytest.mark.parametrize("choices", [{}, {"boost_projection": True}, {"boost": None}])
def test_a_plan_predicts_parameters_and_files(choices, tmp_path):
    config = AutoConfig.for_model("llama", **MODELS["llama"][1])
    planned = plan(config, PSTConfig.ast(task_type="CAUSAL_LM", **choices), batch_size=1, tokens=4)
    training = planned.trainings[0]
    model = boosted(base("llama"), task_type="CAUSAL_LM", **choices)
    assert (training.trainable, training.parameters) == model.get_nb_trainable_parameters()
    model.save_pretrained(tmp_path / "adapter")
    model = model.merge_and_unload()
    save_pretrained(model, tmp_path / "sparse")
    save_pretrained(model, tmp_path / "bf16", values="bf16")
    for predicted, folder in (
        (training.adapter_bytes, "adapter"),
        (planned.sparse_bytes, "sparse"),
        (planned.sparse_bf16_bytes, "bf16"),
    ):
        saved = sum(file.stat().st_size for file in (tmp_path / folder).glob("*.safetensors"))
        assert predicted == pytest.approx(saved, rel=0.02), folder


def test_a_new_adapter_prunes_the_layer_inside(tmp_path):
    model = merged("llama")
    names, expected = boosts(model), logits(model)
    adapter = get_peft_model(copy.deepcopy(model), PSTConfig.ast())
    inside = [name.removeprefix("base_model.model.") for name, m in adapter.named_modules() if hasattr(m, "pst_boost")]
    assert inside == [f"{name}.linear" for name in names]
    assert torch.equal(logits(adapter.eval()), expected)
    adapter.base_model.set_sparsity(0.5)
    last = adapter.merge_and_unload()  # a boost in a boost
    assert len(boosts(last)) == 2 * len(names)
    save_pretrained(last, tmp_path)
    again = type(last).from_pretrained(tmp_path)
    assert same_tensors(tensors(again), last.state_dict())
    assert torch.equal(logits(densify(again)), logits(last))
    found = report(last)
    assert found.model.parameters == sum(p.numel() for p in last.parameters())
    assert sum(layer.name.endswith(".boost") for layer in found.layers) == len(boosts(last))
    with pytest.raises(TypeError, match="The target module 'model.layers.0.self_attn.q_proj' is a Boosted, but PST"):
        get_peft_model(model, PSTConfig(target_modules=["q_proj"]))


def test_shrink_refuses_boosts():
    message = r"low-rank boosts, such as that of .*q_proj., beside its weights: shrink it before it is trained"
    with pytest.raises(ValueError, match=message):
        shrink(merged("llama"))


def test_two_of_four_in_bf16_is_57_percent_of_dense(tmp_path):
    config = AutoConfig.for_model("llama", **{**MODELS["llama"][1], "hidden_size": 256, "intermediate_size": 704})
    model = AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    model = get_peft_model(model, PSTConfig.ast(boost=None))
    model.base_model.set_sparsity(0.5)
    model = model.merge_and_unload()
    save_pretrained(model, tmp_path / "sparse")
    save_pretrained(model, tmp_path / "dense", format="dense")
    sparse, dense = (load_file(tmp_path / name / "model.safetensors") for name in ("sparse", "dense"))
    pruned = [row.name for row in tensor_sparsity(model) if row.sparsity == 0.5]
    assert len(pruned) == 14 and all(sparse[f"{name}.weight_values"].dtype == torch.bfloat16 for name in pruned)
    weights = sum(dense[f"{name}.weight"].nbytes for name in pruned)
    stored = sum(tensor.nbytes for key, tensor in sparse.items() if ".weight_" in key)
    assert stored <= 0.57 * weights
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("sparse", "dense")]
    assert sizes[0] <= 0.57 * weights + (sizes[1] - weights)
    again = type(model).from_pretrained(tmp_path / "sparse", dtype="auto")
    assert again.dtype == torch.bfloat16 and same_tensors(tensors(again), model.state_dict())


def test_a_boost_beside_what_is_not_pruned(tmp_path):
    """Nothing is stored sparse, and the boosts are there all the same."""
    model = base("bert")
    layer = model.bert.encoder.layer[0].output
    layer.dense = Boosted(layer.dense, torch.randn(64, 6), None)
    save_pretrained(model.eval(), tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert isinstance(again.bert.encoder.layer[0].output.dense.linear, nn.Linear)
    assert same_tensors(again.state_dict(), model.state_dict()) and torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_onnx(model_type, tmp_path):
    onnx = pytest.importorskip("onnx", reason="exports need the extra peft-pst[onnx]")
    onnxruntime = pytest.importorskip("onnxruntime", reason="exports need the extra peft-pst[onnx]")
    from peft_pst.integrations.onnx import export, graph

    model = merged(model_type, pattern="unstructured", sparsity=0.8, boost_projection=model_type == "gpt2")
    save_pretrained(model, tmp_path / "sparse")
    made = export(tmp_path / "sparse", tmp_path / "onnx", task="text-generation")
    assert made.missing == [] and {f"{name}.linear.weight" for name in boosts(model)} <= made.zeros.keys()
    assert "quantization_config" not in json.loads((tmp_path / "onnx" / "config.json").read_text())
    file = tmp_path / "onnx" / "model.onnx"
    assert len(onnx.load(file).graph.sparse_initializer) == len(boosts(model))
    session = onnxruntime.InferenceSession(file, graph.session_options(1))
    inputs = {"input_ids": TOKENS, "attention_mask": torch.ones_like(TOKENS)}
    inputs["position_ids"] = torch.arange(7).expand(2, 7)
    named = {entry.name: inputs[entry.name].numpy() for entry in session.get_inputs()}
    torch.testing.assert_close(torch.from_numpy(session.run(["logits"], named)[0]), logits(model), atol=1e-4, rtol=0)


def test_openvino(tmp_path):
    pytest.importorskip("openvino", reason="needs the extra peft-pst[openvino]")
    from peft_pst.integrations.openvino import export_openvino, open_openvino

    model = merged("bert")
    save_pretrained(model, tmp_path / "sparse")
    export_openvino(tmp_path / "sparse", tmp_path / "openvino")
    assert "quantization_config" not in json.loads((tmp_path / "openvino" / "config.json").read_text())
    found = open_openvino(tmp_path / "openvino")(TOKENS, torch.ones_like(TOKENS))
    torch.testing.assert_close(found, logits(model))
