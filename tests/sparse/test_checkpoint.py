import json
import pickle
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from reference import same_bits
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    BertForSequenceClassification,
)

from peft_pst import PSTConfig, SparseLinear, densify, save_pretrained, tensor_sparsity

pytestmark = pytest.mark.filterwarnings("ignore:The model's sparse weights stay compressed")

# kernels compute in fp32 and round once
CLOSE = {
    torch.float64: {},
    torch.float32: {},
    torch.bfloat16: {"rtol": 0.05, "atol": 0.02},
    torch.float16: {"rtol": 0.005, "atol": 0.002},
}
TOKENS = torch.arange(2, 16).view(2, 7)
BERT = {"vocab_size": 99, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
MODELS = {
    "bert": (AutoModelForSequenceClassification, BERT),
    "gpt2": (AutoModelForCausalLM, {"vocab_size": 99, "n_embd": 64, "n_layer": 2, "n_head": 4}),
    "llama": (AutoModelForCausalLM, {**BERT, "num_key_value_heads": 2, "tie_word_embeddings": True}),
    "t5": (AutoModelForSeq2SeqLM, {"vocab_size": 99, "d_model": 64, "d_kv": 16, "d_ff": 96, "num_heads": 4}),
}


def merged(model_type, sparsity=0.9, dtype=torch.float32):
    torch.manual_seed(0)
    auto, config = MODELS[model_type]
    model = auto.from_config(AutoConfig.for_model(model_type, pad_token_id=0, **config)).to(dtype)
    model = get_peft_model(model, PSTConfig(initial_sparsity=sparsity, sparsity=0.95))
    return model.merge_and_unload().eval()


def logits(model):
    extra = {"decoder_input_ids": TOKENS} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model(input_ids=TOKENS, **extra).logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model_type", MODELS)
def test_opens_like_any_model(model_type, dtype, tmp_path):
    model = merged(model_type, dtype=dtype)
    save_pretrained(model, tmp_path / "sparse")
    again, info = type(model).from_pretrained(tmp_path / "sparse", dtype=dtype, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    stored = [name for name, module in again.named_modules() if isinstance(module, SparseLinear)]
    assert len(stored) == len([row for row in tensor_sparsity(model) if row.sparsity > 0.5]) > 6
    for name in stored:
        assert same_bits(again.get_submodule(name).weight, model.get_submodule(name).weight.detach())
    # as transformers saves and opens it: casting a model by hand also casts what it would not
    save_pretrained(model, tmp_path / "dense", format="dense")
    expected = logits(type(model).from_pretrained(tmp_path / "dense", dtype=dtype))
    torch.testing.assert_close(logits(again), expected, **CLOSE[dtype])
    dense = densify(again)
    assert not dense.is_quantized and not hasattr(dense.config, "quantization_config")  # as the Trainer asks
    assert not any(isinstance(module, SparseLinear) for module in dense.modules())
    assert torch.equal(logits(dense), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_opens_in_another_dtype(dtype, tmp_path):
    model = merged("bert")
    save_pretrained(model, tmp_path)
    again = type(model).from_pretrained(tmp_path, dtype=dtype)
    torch.testing.assert_close(logits(again), logits(model.to(dtype)), **CLOSE[dtype])
    dense = densify(again)
    assert {parameter.dtype for parameter in dense.parameters()} == {dtype}
    logits(dense)


def test_opens_without_its_head(tmp_path):
    model = merged("bert")
    save_pretrained(model, tmp_path)
    again = AutoModel.from_pretrained(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(again(TOKENS)[0], model.bert(TOKENS)[0])
    assert any(isinstance(module, SparseLinear) for module in again.modules())


@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize("model_type", ["bert", "gpt2"])
def test_opens_with_a_new_head(model_type, stored, tmp_path):
    """Of another size than the one in the file, which is there as it is or in parts; that of GPT-2 has no bias."""
    _, sizes = MODELS[model_type]
    config = AutoConfig.for_model(model_type, pad_token_id=0, num_labels=3, **sizes)
    model = AutoModelForSequenceClassification.from_config(config)
    head = {"bert": "classifier", "gpt2": "score"}[model_type]
    with torch.no_grad():
        model.base_model.get_input_embeddings().weight.normal_()
        if stored:
            model.get_submodule(head).weight.fill_(0.5)
    save_pretrained(model, tmp_path / "a")
    described = json.loads((tmp_path / "a" / "config.json").read_text())["quantization_config"]["weights"]
    assert (head in described) == stored
    new = type(model).from_pretrained(tmp_path / "a", num_labels=5, ignore_mismatched_sizes=True)
    assert type(new.get_submodule(head)) is torch.nn.Linear and logits(new).shape[-1] == 5
    assert 0.01 < float(new.get_submodule(head).weight.std()) < 0.03  # random, as transformers makes it
    assert not list(new.get_submodule(head).buffers())
    found, expected = state(new.base_model), model.base_model.state_dict()
    assert all(same_bits(found[name], expected[name]) for name in expected if name in found)
    with pytest.raises(RuntimeError, match="size mismatch|ignore_mismatched_sizes"):
        type(model).from_pretrained(tmp_path / "a", num_labels=5)
    save_pretrained(new, tmp_path / "ours")
    new.save_pretrained(tmp_path / "theirs")
    for folder in ("ours", "theirs"):
        again, info = type(model).from_pretrained(tmp_path / folder, output_loading_info=True)
        assert not info["missing_keys"]
        torch.testing.assert_close(logits(again), logits(new))


class Doubled(torch.nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class BertWithItsOwnHead(BertForSequenceClassification):
    def __init__(self, config):
        super().__init__(config)
        self.classifier = Doubled(config.hidden_size, config.num_labels)


def test_a_layer_with_a_forward_of_its_own_keeps_it(tmp_path):
    plain = merged("bert")
    with torch.no_grad():
        plain.classifier.weight[:, 1:] = 0
    model = BertWithItsOwnHead(plain.config).eval()
    model.load_state_dict(plain.state_dict())
    save_pretrained(model, tmp_path / "own")
    again = BertWithItsOwnHead.from_pretrained(tmp_path / "own")
    assert type(again.classifier) is Doubled
    torch.testing.assert_close(logits(again), logits(model))
    save_pretrained(plain, tmp_path / "plain")  # as a writer would that takes all subclasses for nn.Linear
    with pytest.raises(ValueError, match="stores the weight of 'classifier' sparse, but that is a Doubled here"):
        BertWithItsOwnHead.from_pretrained(tmp_path / "plain")


@pytest.mark.parametrize("tie", [False, True])
def test_weights_that_are_shared(tie, tmp_path):
    """By the model they are one in the file; by hand, of which a new model knows nothing, they are there twice."""
    model = merged("llama")
    model.config.tie_word_embeddings = tie
    model.lm_head.weight = model.model.embed_tokens.weight
    one, other = (layer.mlp.up_proj for layer in model.model.layers)
    other.weight = one.weight
    rows = model.model.embed_tokens.weight.detach()[0]
    model.model.norm.weight = torch.nn.Parameter(rows)  # it begins where the embedding does
    save_pretrained(model, tmp_path)
    assert ("lm_head.weight" in load_file(tmp_path / "model.safetensors")) != tie
    again, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    torch.testing.assert_close(logits(again), logits(model))


def test_dequantize_is_the_dense_model(tmp_path):
    model = merged("bert")
    save_pretrained(model, tmp_path)
    again = type(model).from_pretrained(tmp_path).dequantize()
    assert not any(isinstance(module, SparseLinear) for module in again.modules())
    assert torch.equal(logits(again), logits(model))
    again.save_pretrained(tmp_path / "dense")
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())


def test_a_model_that_was_opened_can_be_saved_again(tmp_path):
    model = merged("bert")
    save_pretrained(model, tmp_path / "a")
    again = type(model).from_pretrained(tmp_path / "a")
    save_pretrained(again, tmp_path / "ours")
    again.save_pretrained(tmp_path / "theirs")
    for folder in ("ours", "theirs"):
        assert torch.equal(logits(densify(type(model).from_pretrained(tmp_path / folder))), logits(model))


@pytest.mark.parametrize("opened", [True, False])
def test_a_sparse_model_is_saved_dense_or_rounded_on_request(opened, tmp_path):
    model = merged("bert")
    expected = logits(model)
    save_pretrained(model, tmp_path / "sparse")
    save_pretrained(model, tmp_path / "int8", values="int8")
    if opened:
        sparse = type(model).from_pretrained(tmp_path / "sparse")
    else:
        sparse = model
        for layer in sparse.bert.encoder.layer:
            layer.output.dense = SparseLinear.from_linear(layer.output.dense)
    save_pretrained(sparse, tmp_path / "dense", format="dense")
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())
    assert torch.equal(logits(type(model).from_pretrained(tmp_path / "dense")), expected)
    save_pretrained(sparse, tmp_path / "again", values="int8")
    again, direct = (load_file(tmp_path / folder / "model.safetensors") for folder in ("again", "int8"))
    assert again.keys() == direct.keys() and all(torch.equal(again[key], direct[key]) for key in direct)
    assert any(isinstance(module, SparseLinear) for module in sparse.modules())  # it stays as it is


def test_the_file_is_smaller(tmp_path):
    model = merged("bert", sparsity=0.95, dtype=torch.bfloat16)
    save_pretrained(model, tmp_path / "sparse")
    save_pretrained(model, tmp_path / "dense", format="dense")
    assert torch.equal(logits(type(model).from_pretrained(tmp_path / "dense", dtype=torch.bfloat16)), logits(model))
    state = load_file(tmp_path / "sparse" / "model.safetensors")
    targets = sum(t.numel() * t.element_size() for name, t in state.items() if ".weight_" in name)
    dense = sum(4 * row.numel for row in tensor_sparsity(model) if row.sparsity > 0.5)
    assert targets <= 0.04 * dense
    sizes = {f: (tmp_path / f / "model.safetensors").stat().st_size for f in ("sparse", "dense")}
    assert sizes["sparse"] < 0.6 * sizes["dense"]


def test_shards(tmp_path):
    model = merged("bert")
    save_pretrained(model, tmp_path, max_shard_size=20_000)
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    assert torch.equal(logits(type(model).from_pretrained(tmp_path)), logits(model))
    save_pretrained(model, tmp_path)
    assert [file.name for file in tmp_path.glob("*.safetensors*")] == ["model.safetensors"]
    assert torch.equal(logits(type(model).from_pretrained(tmp_path)), logits(model))


def test_other_files_stay(tmp_path):
    (tmp_path / "README.md").write_text("mine")
    (tmp_path / "runs").mkdir()
    kept = ["training_args.bin", "optimizer.bin", "head.safetensors"]
    for name in (*kept, "pytorch_model.bin", "model-00001-of-00002.safetensors"):
        (tmp_path / name).write_text("old")
    save_pretrained(merged("bert"), tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine" and (tmp_path / "runs").is_dir()
    assert all((tmp_path / name).read_text() == "old" for name in kept)
    assert not (tmp_path / "pytorch_model.bin").exists()
    assert not (tmp_path / "model-00001-of-00002.safetensors").exists()
    assert [p.name for p in tmp_path.parent.iterdir() if p.name.startswith(f".{tmp_path.name}")] == []


@pytest.mark.parametrize("values", ["bf16", "int8"])
def test_rounded_values(values, tmp_path):
    model = merged("bert")
    save_pretrained(model, tmp_path / "exact")
    save_pretrained(model, tmp_path / "rounded", values=values)
    again = type(model).from_pretrained(tmp_path / "rounded")
    torch.testing.assert_close(logits(again), logits(model), rtol=0.1, atol=0.01)
    sizes = [(tmp_path / f / "model.safetensors").stat().st_size for f in ("exact", "rounded")]
    assert sizes[1] < sizes[0]


def state(model):
    """The tensors of a model, those that are stored sparse as they are computed with."""
    stored = {name: module.weight for name, module in model.named_modules() if isinstance(module, SparseLinear)}
    return {**model.state_dict(), **stored}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("damage", ["flipped", "truncated"])
def test_a_damaged_checkpoint_is_an_error(damage, dtype, tmp_path):
    """At 200 places of all its bytes, the config and the index included."""
    model = merged("bert")
    save_pretrained(model, tmp_path, max_shard_size=50_000)
    before = state(type(model).from_pretrained(tmp_path, dtype=dtype))
    whole = {file: file.read_bytes() for file in sorted(tmp_path.iterdir())}
    rng, wrong = random.Random(0), 0
    for file, place in rng.sample([(file, i) for file, content in whole.items() for i in range(len(content))], 200):
        content = whole[file]
        flipped = content[:place] + bytes([content[place] ^ 1 << rng.randrange(8)]) + content[place + 1 :]
        file.write_bytes(flipped if damage == "flipped" else content[:place])
        try:
            again, info = type(model).from_pretrained(tmp_path, dtype=dtype, output_loading_info=True)
        except Exception as error:
            assert len(str(error)) > 10
            wrong += 1
        else:  # a bit that a cast rounds away or that concerns no tensor; transformers names what it did not find
            after = state(again)
            right = all(torch.equal(after[name], before[name]) for name in before)
            assert right or (file.name == "config.json" and info["missing_keys"])
        file.write_bytes(content)
    assert wrong > 100


def test_a_damaged_description_is_an_error(tmp_path):
    model = merged("bert")
    save_pretrained(model, tmp_path)
    text = (tmp_path / "config.json").read_text()
    for before, after in (("layer.1.output.dense", "layer.1.outpwt.dense"), ('"tiles"', '"tilep"')):
        assert before in text
        (tmp_path / "config.json").write_text(text.replace(before, after, 1))
        with pytest.raises(ValueError, match=r"config.json is not the one that was saved: its digest is wrong"):
            type(model).from_pretrained(tmp_path)


def test_a_killed_save_leaves_the_old_model_or_the_new_one(tmp_path):
    script = Path(__file__).with_name("save_and_die.py")
    run = subprocess.run([sys.executable, script, tmp_path], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    *found, left = run.stdout.splitlines()
    assert len(found) == 40 and set(found) == {"old", "new"}, found
    assert left == "model"  # and the save after them removed what they left


class Planted:
    """What a pickle could do to whoever opens it."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_a_planted_pickle_is_not_opened(tmp_path):
    model, touched = merged("bert"), tmp_path / "touched"
    save_pretrained(model, tmp_path / "model")
    planted = pickle.dumps(Planted(touched))
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "model.pkl"):
        (tmp_path / "model" / name).write_bytes(planted)
    assert torch.equal(logits(type(model).from_pretrained(tmp_path / "model")), logits(model))
    (tmp_path / "model" / "model.safetensors").unlink()
    with pytest.raises(Exception, match="Unable to load weights|Weights only load failed"):
        type(model).from_pretrained(tmp_path / "model")  # transformers reads tensors out of it and runs nothing
    (tmp_path / "model" / "model.safetensors").write_bytes(planted)
    with pytest.raises(Exception, match=r"(?i)header"):
        type(model).from_pretrained(tmp_path / "model")
    assert not touched.exists()
    pickle.loads(planted).close()
    assert touched.exists()  # the trap works


LAYERS = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}


@pytest.mark.parametrize(
    "device_map", ["auto", "cpu", {"": "cpu"}, {**LAYERS, "model.layers.0": "cpu", "model.layers.1": "disk"}]
)
def test_device_map(device_map, tmp_path):
    model = merged("llama")
    save_pretrained(model, tmp_path, max_shard_size=50_000)
    again = type(model).from_pretrained(
        tmp_path, device_map=device_map, offload_folder=tmp_path / "offload", offload_buffers=True
    )
    assert any(isinstance(module, SparseLinear) for module in again.modules())
    assert torch.equal(logits(again), logits(model))


def test_in_a_new_process(tmp_path):
    model = merged("gpt2")
    save_pretrained(model, tmp_path / "model")
    script = (
        "import sys, torch, peft_pst; from transformers import AutoModelForCausalLM;"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1]);"
        "torch.save(model(torch.arange(2, 16).view(2, 7)).logits, sys.argv[2])"
    )
    subprocess.run([sys.executable, "-c", script, tmp_path / "model", tmp_path / "logits"], check=True)
    torch.testing.assert_close(torch.load(tmp_path / "logits"), logits(model))


def test_what_cannot_be_saved(bert, tmp_path):
    with pytest.raises(ValueError, match="The model has an adapter that is not merged: call merged = model.merge_and"):
        save_pretrained(get_peft_model(bert(), PSTConfig()), tmp_path)
    with pytest.raises(TypeError, match="save got a Linear: expected a model of transformers"):
        save_pretrained(torch.nn.Linear(2, 2), tmp_path)
    get_peft_model(bert(), PSTConfig()).save_pretrained(tmp_path / "adapter")
    before = sorted(file.name for file in (tmp_path / "adapter").iterdir())
    with pytest.raises(ValueError, match="holds an adapter, which transformers would open instead of the model"):
        save_pretrained(bert(), tmp_path / "adapter")
    assert sorted(file.name for file in (tmp_path / "adapter").iterdir()) == before
    offloaded = bert()
    offloaded.classifier.to("meta")
    with pytest.raises(ValueError, match="Some tensors of the model are not in memory, but offloaded"):
        save_pretrained(offloaded, tmp_path)
    quantized = bert()
    layer = quantized.bert.encoder.layer[0].output.dense
    layer.weight = torch.nn.Parameter(layer.weight.detach().to(torch.uint8), requires_grad=False)
    with pytest.raises(TypeError, match="of 'bert.encoder.layer.0.output.dense' is a Tensor of torch.uint8: expected"):
        save_pretrained(quantized, tmp_path)
    with pytest.raises(ValueError, match="format='zip' is unknown: expected 'auto' or 'dense'"):
        save_pretrained(bert(), tmp_path, format="zip")


def test_a_newer_layout_is_named(tmp_path):
    model = merged("bert")
    save_pretrained(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["version"] = 2
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="has version 2 of the layout pst_sparse, but this peft-pst reads up to 1"):
        type(model).from_pretrained(tmp_path)


def test_an_opened_model_may_change_and_be_saved_by_transformers(tmp_path):
    save_pretrained(merged("bert"), tmp_path / "one")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "one")
    with torch.no_grad():
        model.classifier.bias.add_(1)
    model.save_pretrained(tmp_path / "two")
    assert torch.equal(logits(AutoModelForSequenceClassification.from_pretrained(tmp_path / "two")), logits(model))
