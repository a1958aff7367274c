import json
import subprocess
import sys

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
)

from peft_pst import PSTConfig, SparseLinear, densify, save_pretrained, tensor_sparsity

pytestmark = pytest.mark.filterwarnings("ignore:The model's sparse weights stay compressed")

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
    with pytest.warns(UserWarning, match=r"decoded in each call, .* slow: peft_pst.densify\(model\) makes them dense"):
        again, info = type(model).from_pretrained(tmp_path / "sparse", dtype=dtype, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    stored = [name for name, module in again.named_modules() if isinstance(module, SparseLinear)]
    assert len(stored) == len([row for row in tensor_sparsity(model) if row.sparsity > 0.5]) > 6
    for name in stored:
        assert same_bits(again.get_submodule(name).weight, model.get_submodule(name).weight.detach())
    # as transformers saves and opens it: casting a model by hand also casts what it would not
    save_pretrained(model, tmp_path / "dense", format="dense")
    expected = logits(type(model).from_pretrained(tmp_path / "dense", dtype=dtype))
    assert torch.equal(logits(again), expected)
    dense = densify(again)
    assert not any(isinstance(module, SparseLinear) for module in dense.modules())
    assert torch.equal(logits(dense), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_opens_in_another_dtype(dtype, tmp_path):
    model = merged("bert")
    save_pretrained(model, tmp_path)
    again = type(model).from_pretrained(tmp_path, dtype=dtype)
    torch.testing.assert_close(logits(again), logits(model.to(dtype)))


def test_opens_without_its_head(tmp_path):
    model = merged("bert")
    save_pretrained(model, tmp_path)
    again = AutoModel.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(again(TOKENS)[0], model.bert(TOKENS)[0])
    assert any(isinstance(module, SparseLinear) for module in again.modules())


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
        assert torch.equal(logits(type(model).from_pretrained(tmp_path / folder)), logits(model))


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
    (tmp_path / "pytorch_model.bin").write_text("old weights")
    save_pretrained(merged("bert"), tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine" and (tmp_path / "runs").is_dir()
    assert not (tmp_path / "pytorch_model.bin").exists()
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


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_damaged_file_is_an_error(tmp_path, dtype):
    model = merged("bert")
    save_pretrained(model, tmp_path)
    file = tmp_path / "model.safetensors"
    whole = file.read_bytes()
    generator = torch.Generator().manual_seed(0)
    before = logits(type(model).from_pretrained(tmp_path, dtype=dtype))
    for position in torch.randint(len(whole), (20,), generator=generator).tolist():
        damaged = bytearray(whole)
        damaged[position] ^= 1 << int(torch.randint(8, (), generator=generator))
        file.write_bytes(damaged)
        try:
            again = type(model).from_pretrained(tmp_path, dtype=dtype)
        except Exception as error:
            assert str(error)
        else:  # a bit that a cast rounds away, or one in the header that means nothing
            assert torch.equal(logits(again), before)


def test_in_a_new_process(tmp_path):
    model = merged("gpt2")
    save_pretrained(model, tmp_path / "model")
    script = (
        "import sys, torch, peft_pst; from transformers import AutoModelForCausalLM;"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1]);"
        "torch.save(model(torch.arange(2, 16).view(2, 7)).logits, sys.argv[2])"
    )
    subprocess.run([sys.executable, "-c", script, tmp_path / "model", tmp_path / "logits"], check=True)
    assert torch.equal(torch.load(tmp_path / "logits"), logits(model))


def test_what_cannot_be_saved(bert, tmp_path):
    with pytest.raises(ValueError, match="The model has an adapter that is not merged: call merged = model.merge_and"):
        save_pretrained(get_peft_model(bert(), PSTConfig()), tmp_path)
    with pytest.raises(TypeError, match="save_pretrained got a Linear: expected a model of transformers"):
        save_pretrained(torch.nn.Linear(2, 2), tmp_path)
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
