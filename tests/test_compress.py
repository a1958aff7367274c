import copy
import json
import subprocess
import sys

import pytest
import torch
import transformers
from peft import get_peft_model
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
)

from peft_pst import PSTConfig, compress, shrink

SIZES = {"vocab_size": 99, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "pad_token_id": 0}
GROUPED = {**SIZES, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "eos_token_id": 1}
EACH = {**SIZES, "num_attention_heads": 4}
CAUSAL = AutoModelForCausalLM
GPT2 = {"vocab_size": 99, "n_embd": 64, "n_layer": 4, "n_head": 4, "bos_token_id": 1, "eos_token_id": 1}
BIASED = {**GROUPED, "attention_bias": True}
MODELS = {
    "bert": (AutoModelForSequenceClassification, EACH),
    "camembert": (AutoModelForSequenceClassification, EACH),
    "glm": (CAUSAL, BIASED),
    "glm4": (CAUSAL, BIASED),
    "granite": (CAUSAL, {**GROUPED, "attention_multiplier": 0.3, "residual_multiplier": 0.5}),
    "gpt2": (CAUSAL, GPT2),
    "gpt_neox": (CAUSAL, {**EACH, "rotary_pct": 0.5, "use_parallel_residual": False}),
    "llama": (CAUSAL, {**GROUPED, "tie_word_embeddings": True}),
    "mistral": (CAUSAL, GROUPED),
    "qwen2": (CAUSAL, {**GROUPED, "max_window_layers": 2}),
    "qwen3": (CAUSAL, GROUPED),
    "roberta": (AutoModelForSequenceClassification, EACH),
    "smollm3": (CAUSAL, GROUPED),
    "xlm-roberta": (AutoModelForSequenceClassification, EACH),
}
RMS = ["glm", "glm4", "granite", "llama", "mistral", "qwen2", "qwen3", "smollm3"]
TRANSFORMERS_4 = transformers.__version__.startswith("4.")
TOKENS = torch.arange(2, 26).view(2, 12)
MASK = torch.ones_like(TOKENS)
MASK[1, -4:] = 0


def fresh(model_type, **changes):
    torch.manual_seed(0)
    auto, config = MODELS[model_type]
    model = auto.from_config(AutoConfig.for_model(model_type, **{**config, **changes})).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms are all alike at the start
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@torch.no_grad()
def logits(model):
    return model(input_ids=TOKENS, attention_mask=MASK).logits


def assert_equal_outputs(found, expected):
    found, expected = logits(found), logits(expected)
    keep = MASK.bool() if found.ndim == 3 else slice(None)
    assert (found[keep] - expected[keep]).abs().max() <= 2e-5


NAMES = {
    "bert": ("attention.output.dense", "output.dense", "attention.self.query attention.self.key"),
    "gpt2": ("attn.c_proj", "mlp.c_proj", "attn.c_attn attn.c_attn"),
    "gpt_neox": ("attention.dense", "mlp.dense_4h_to_h", "attention.query_key_value attention.query_key_value"),
    "llama": ("self_attn.o_proj", "mlp.down_proj", "self_attn.q_proj self_attn.k_proj"),
}
NAMES |= dict.fromkeys(("camembert", "roberta", "xlm-roberta"), NAMES["bert"])


class Block:
    """The weights of one layer, [out, in], written out for each architecture."""

    def __init__(self, model, index):
        kind, config = model.config.model_type, model.config
        attended, down, made = NAMES.get(kind, NAMES["llama"])
        layer = layers_of(model)[index]
        self.attended, self.down = layer.get_submodule(attended), layer.get_submodule(down)
        self.queries, self.keys = (layer.get_submodule(name) for name in made.split())
        heads, size = config.num_attention_heads, weight(self.attended).shape[1] // config.num_attention_heads
        rows = torch.arange(len(weight(self.queries)))
        if kind == "gpt2":
            self.query_rows, self.key_rows, _ = rows.view(3, heads, size)
        elif kind == "gpt_neox":
            self.query_rows, self.key_rows, _ = rows.view(heads, 3, size).unbind(1)
        else:
            self.query_rows = rows.view(heads, size)
            self.key_rows = torch.arange(len(weight(self.keys))).view(-1, size)


def layers_of(model):
    count = model.config.num_hidden_layers
    return next(module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) == count)


def weight(linear):
    return linear.weight.data if isinstance(linear, nn.Linear) else linear.weight.data.T


def zero(linear, rows):
    weight(linear)[rows] = 0
    if linear.bias is not None:
        linear.bias.data[rows] = 0


def places(few, many):
    """The row of `many` that each row of `few` is."""
    same = (few[:, None] == many[None]).all(-1)
    assert (same.sum(1) == 1).all()
    return same.int().argmax(1)


def others(kept, count):
    return [i for i in range(count) if i not in set(kept.tolist())]


def with_zeros(model, smaller):
    """The model without the layers that the smaller one lacks, and with zeros for the channels that it lacks."""
    model, hidden = copy.deepcopy(model), model.config.hidden_size
    kept = torch.tensor(smaller.config.compression.get("channels", list(range(hidden))))
    stay = smaller.config.compression["layers"]
    layers = layers_of(model)
    gone = others(kept, hidden)
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            module.weight.data[:, gone] = 0
        if isinstance(module, nn.LayerNorm):
            module.bias.data[gone] = 0
    for name in ("bert.pooler.dense", "classifier.dense"):  # their outputs have the width of the stream
        if name in dict(model.named_modules()):
            zero(model.get_submodule(name), gone)
    for index, layer in enumerate(stay):
        block, small = Block(model, layer), Block(smaller, index)
        key_rows = block.key_rows
        for unit, rows in enumerate(key_rows):
            size = small.key_rows.shape[1]
            found = weight(small.keys)[small.key_rows[unit]]
            missing = others(places(found, weight(block.keys)[rows][:, kept]), len(rows))
            zero(block.keys, rows[missing])
            for queries in block.query_rows.chunk(len(key_rows))[unit]:
                zero(block.queries, queries[missing])
        assert size == small.query_rows.shape[1]
        for taker, found in ((block.attended, small.attended), (block.down, small.down)):
            columns = places(weight(found).T, weight(taker)[kept].T)
            weight(taker)[:, others(columns, weight(taker).shape[1])] = 0
            zero(taker, gone)
    for index in sorted(set(range(len(layers))) - set(stay), reverse=True):
        del layers[index]
    for index, layer in enumerate(layers):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = index
    model.config.num_hidden_layers = len(layers)
    return model


def without_means(model, kept):
    """The model, all that its LayerNorms see without a mean over the kept channels: then they are as RMSNorms."""

    def centre(tensor, dim):
        tensor -= tensor.index_select(dim, kept).mean(dim, keepdim=True)

    for module in model.modules():
        if isinstance(module, nn.Embedding):
            centre(module.weight.data, 1)
        if isinstance(module, nn.LayerNorm) and NAMES.get(model.config.model_type) is NAMES["bert"]:
            module.weight.data.fill_(1.3)
            centre(module.bias.data, 0)
    for index in range(model.config.num_hidden_layers):
        block = Block(model, index)
        for linear in (block.attended, block.down):
            centre(weight(linear), 0)
            centre(linear.bias.data, 0)
    return model


@pytest.mark.parametrize("model_type", MODELS)
def test_with_everything_kept_the_outputs_are_equal(model_type):
    model = fresh(model_type)
    same = compress(model, num_layers=4, width_ratio=1.0)
    assert torch.equal(logits(same), logits(model))
    assert same.config.compression == {"layers": [0, 1, 2, 3]}
    with torch.no_grad():
        next(same.parameters()).add_(1)  # its tensors are its own
    assert not torch.equal(next(same.parameters()), next(model.parameters()))


@pytest.mark.parametrize("layers", ["even", "importance", [0, 1, 3]])
@pytest.mark.parametrize("model_type", MODELS)
def test_fewer_layers(model_type, layers):
    model = fresh(model_type)
    smaller = compress(model, num_layers=3, layers=layers)
    assert len(layers_of(smaller)) == smaller.config.num_hidden_layers == 3
    assert_equal_outputs(smaller, with_zeros(model, smaller))


@pytest.mark.parametrize("channels", ["importance", "random"])
@pytest.mark.parametrize("head_dim", [4, 8, 12])
@pytest.mark.parametrize("model_type", RMS)
def test_narrower_heads_compute_what_zeroed_channels_do(model_type, head_dim, channels):
    model = fresh(model_type)
    smaller = compress(model, num_layers=3, head_dim=head_dim, channels=channels, seed=head_dim)
    assert smaller.config.hidden_size == 4 * head_dim and smaller.config.intermediate_size == 6 * head_dim
    assert smaller.config.num_attention_heads == 4 and smaller.config.num_key_value_heads == 2
    assert_equal_outputs(smaller, with_zeros(model, smaller))
    again = compress(model, num_layers=3, head_dim=head_dim, channels=channels, seed=head_dim)
    assert all(torch.equal(a, b) for a, b in zip(smaller.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize("head_dim", [8, 4])
@pytest.mark.parametrize("model_type", [name for name in MODELS if name not in RMS])
def test_layer_norms_without_a_mean_compute_what_zeroed_channels_do(model_type, head_dim):
    choices = {"num_layers": 3, "head_dim": head_dim, "channels": "random", "seed": 1}
    model = fresh(model_type)
    model = without_means(model, torch.tensor(compress(model, **choices).config.compression["channels"]))
    smaller = compress(model, **choices)
    assert smaller.config.hidden_size == 4 * head_dim
    assert_equal_outputs(smaller, with_zeros(model, smaller))


def test_by_importance_more_stays_than_at_random():
    """On data that only some channels matter for: those of the dropped layers do not count."""
    model, batches = fresh("llama"), [{"input_ids": TOKENS, "attention_mask": MASK}]
    loud = torch.arange(0, 64, 2)
    model.model.embed_tokens.weight.data[:, loud] *= 30
    smaller = compress(model, head_dim=8, calibration=batches)
    assert smaller.config.compression["channels"] == loud.tolist()


@pytest.mark.parametrize("turned", [[0, 2, 4, 6], [0, 1, 2, 3], [4, 5, 6, 7], [3, 4, 5, 6]])
def test_what_is_nearly_nothing_goes(turned):
    """Half of the channels of each kind are nearly zero: without them the outputs are nearly the same."""
    model = fresh("llama")
    quiet = [channel for channel in range(16) if channel % 8 not in turned]
    with torch.no_grad():
        model.model.embed_tokens.weight[:, ::2] *= 1e-4
        for index in range(4):
            block = Block(model, index)
            for taker in (block.attended, block.down):
                taker.weight[::2] *= 1e-4
                taker.weight[:, 1::2] *= 1e-4
            block.keys.weight[block.key_rows[:, quiet]] *= 1e-4
    smaller = compress(model, head_dim=8)
    assert smaller.config.compression["channels"] == list(range(1, 64, 2))
    assert (logits(smaller) - logits(model)).norm() < 1e-3 * logits(model).norm()


def test_importance_of_layers_is_how_far_they_turn_their_input():
    model = fresh("gpt2")
    for index in (0, 2):
        block = Block(model, index)
        for linear in (block.attended, block.down):
            weight(linear)[:] *= 1e-3
            linear.bias.data *= 1e-3
    calibration = [{"input_ids": TOKENS, "attention_mask": MASK}]
    model.train().transformer.h[1].eval()
    modes = [module.training for module in model.modules()]
    smaller = compress(model, num_layers=2, layers="importance", calibration=calibration)
    assert [module.training for module in model.modules()] == modes
    assert smaller.config.compression["layers"] == [1, 3]


def test_padding_is_no_calibration_data():
    model = fresh("bert")
    padded = {"input_ids": torch.nn.functional.pad(TOKENS, (0, 30), value=7), "attention_mask": MASK.new_zeros(2, 42)}
    padded["attention_mask"][:, :12] = 1
    plain = compress(model, head_dim=8, calibration=[{"input_ids": TOKENS, "attention_mask": torch.ones_like(MASK)}])
    longer = compress(model, head_dim=8, calibration=[padded])
    assert plain.config.compression == longer.config.compression


@pytest.mark.parametrize("rope_type", ["default", "linear", "llama3", "yarn"])
def test_rotary_frequencies_are_kept_ones(rope_type):
    scaled = {"rope_type": rope_type, "factor": 4.0, "original_max_position_embeddings": 512, "rope_theta": 1e4}
    if rope_type == "llama3":
        scaled |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    model = fresh("llama", **{"rope_scaling" if TRANSFORMERS_4 else "rope_parameters": scaled})
    for head_dim in (4, 8, 12):
        old = model.model.rotary_emb.inv_freq
        new = compress(model, head_dim=head_dim).model.rotary_emb.inv_freq
        assert all(torch.isclose(old, frequency, rtol=1e-5).any() for frequency in new)
        assert len(new) == head_dim // 2


@pytest.mark.parametrize("model_type", ["llama", "glm", "gpt2", "bert"])
def test_plain_transformers_opens_it(model_type, tmp_path):
    model = fresh(model_type).to(torch.bfloat16)
    smaller = compress(model, num_layers=2, head_dim=8)
    assert smaller.dtype == torch.bfloat16
    smaller.save_pretrained(tmp_path)
    torch.save(logits(smaller), tmp_path / "logits.pt")
    script = """
import sys, torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification
folder, tokens, mask = sys.argv[1], torch.arange(2, 26).view(2, 12), torch.ones(2, 12, dtype=torch.int64)
mask[1, -4:] = 0
auto = AutoModelForSequenceClassification if "Classification" in AutoConfig.from_pretrained(folder).architectures[0] \\
    else AutoModelForCausalLM
model = auto.from_pretrained(folder, dtype=torch.bfloat16)
assert torch.equal(model(input_ids=tokens, attention_mask=mask).logits, torch.load(folder + "/logits.pt"))
if auto is AutoModelForCausalLM:
    assert model.generate(tokens, max_new_tokens=5, do_sample=False).shape == (2, 17)
assert "peft_pst" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    kept = json.loads((tmp_path / "config.json").read_text())["compression"]
    assert kept["layers"] == [0, 3] and len(kept["channels"]) == 32


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"num_layers": 0}, "num_layers=0: expected 1 to 4"),
        ({"num_layers": 5}, "num_layers=5: expected 1 to 4"),
        ({"layers": "middle"}, "layers='middle': expected one of 'even'"),
        ({"layers": [0, 4]}, r"layers=\[0, 4\]: expected different numbers from 0 to 3"),
        ({"layers": [0, 1], "num_layers": 3}, "num_layers=3, but layers names 2"),
        ({"channels": "best"}, "channels='best': expected one of 'importance', 'random'"),
        ({"head_dim": 8, "width_ratio": 0.5}, "say the same"),
        ({"head_dim": 7}, "head_dim=7: the model has 16, and .* stay whole with 2, 4, 6, 8, 10, 12, 14, 16"),
        ({"head_dim": 32}, "head_dim=32: the model has 16"),
        ({"width_ratio": 1.5}, "width_ratio=1.5: expected more than 0 and at most 1"),
        ({"head_dim": 8, "calibration": []}, "no batch"),
    ],
)
def test_bad_choices(choices, message):
    with pytest.raises(ValueError, match=message):
        compress(fresh("llama"), **choices)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_scales_that_follow_the_place_of_a_layer(attention):
    changes = {"scale_attn_by_inverse_layer_idx": True, "attn_implementation": attention}
    model = fresh("gpt2", **changes)
    smaller = compress(model, layers=[1, 3])
    whole = copy.deepcopy(model)
    kept = [layer for index, layer in enumerate(whole.transformer.h) if index in (1, 3)]
    whole.transformer.h, whole.config.use_cache = nn.ModuleList(kept), False
    assert_equal_outputs(smaller, whole)


def test_compressed_twice_it_says_what_it_has_of_the_first():
    model = fresh("llama")
    first = compress(model, num_layers=3, head_dim=12)
    second = compress(compress(first, layers=[0, 2]), head_dim=8)
    before, after = first.config.compression, second.config.compression
    assert after["layers"] == [before["layers"][0], before["layers"][2]] and after["hidden_size"] == 64
    embedding, small = model.model.embed_tokens.weight, second.model.embed_tokens.weight
    assert torch.equal(embedding[:, after["channels"]], small)


def test_layers_of_different_widths_are_refused():
    model = fresh("bert")
    for linear in (Block(model, 0).attended,):
        weight(linear)[:, :16] = 0
    with pytest.warns(UserWarning, match="cannot say how many"):
        model = shrink(model)
    with pytest.raises(ValueError, match="differ in width.*compress first"):
        compress(model, num_layers=2)


def test_what_is_not_known_is_refused():
    torch.manual_seed(0)
    t5 = {"vocab_size": 99, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    with pytest.raises(TypeError, match="one stack of transformer layers"):
        compress(AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model("t5", **t5)), num_layers=1)
    phi = CAUSAL.from_config(AutoConfig.for_model("phi3", **GROUPED))
    with pytest.raises(TypeError, match="cannot narrow a model of the type 'phi3'.*leave out head_dim"):
        compress(phi, head_dim=8)
    assert len(layers_of(compress(phi, num_layers=2))) == 2
    neo = {"vocab_size": 99, "hidden_size": 64, "num_layers": 4, "num_heads": 4}
    neo = CAUSAL.from_config(AutoConfig.for_model("gpt_neo", attention_types=[[["global", "local"], 2]], **neo))
    with pytest.raises(TypeError, match="cannot leave out layers of a model of the type 'gpt_neo'"):
        compress(neo, num_layers=2)
    encoder = AutoModel.from_config(AutoConfig.for_model("modernbert", **EACH, global_attn_every_n_layers=2))
    with pytest.raises(
        TypeError, match="cannot leave out layers" if TRANSFORMERS_4 else "layers are of several kinds"
    ):
        compress(encoder, layers=[2, 3])
    assert len(layers_of(compress(encoder))) == 4
    scaled = {"rope_type": "longrope", "factor": 4.0, "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    key = "rope_scaling" if TRANSFORMERS_4 else "rope_parameters"
    model = fresh("llama", **{key: {**scaled, "rope_theta": 1e4, "original_max_position_embeddings": 512}})
    with pytest.raises(TypeError, match="scaled in a way that depends on the width"):
        compress(model, head_dim=8)
    with pytest.raises(ValueError, match="merge_and_unload"):
        compress(get_peft_model(fresh("llama"), PSTConfig()), num_layers=1)
