import pytest
import torch
from peft import get_peft_model
from test_model import EXPECTED, tiny
from torch import nn
from transformers import AutoConfig, AutoModel
from transformers.pytorch_utils import Conv1D

from peft_pst import PSTConfig, PSTLayer
from peft_pst.coupling import find_couplings
from peft_pst.model import default_target_modules

# Layers of the blocks that are no part of a known structure, and why.
NEITHER = {
    "codegen": {"attn.qkv_proj", "attn.out_proj"},  # heads are interleaved for four devices
    "falcon": {"self_attention.query_key_value", "self_attention.dense"},  # by default one key for all heads
    "gpt_bigcode": {"attn.c_attn", "attn.c_proj"},  # likewise
    "rwkv": {f"attention.{name}" for name in ("key", "value", "receptance", "output")} | {"feed_forward.receptance"},
}


@pytest.mark.parametrize("model_type", EXPECTED)
def test_every_known_architecture_is_neurons_and_heads(model_type):
    model = tiny(model_type)
    coupled = {name for pattern in ("neuron", "head") for name in find_couplings(model, pattern)}
    missing = {t for t in default_target_modules(model) if not any(name.endswith(f".{t}") for name in coupled)}
    assert missing == NEITHER.get(model_type, set())


SMALL = {"vocab_size": 99, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "pad_token_id": 0}
ROTARY = {**SMALL, "intermediate_size": 24}
GROUPED = {**ROTARY, "num_key_value_heads": 2}
GPT = {"vocab_size": 99, "n_embd": 16, "n_layer": 2, "n_head": 4}
T5 = {"vocab_size": 99, "d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 4}
# a head of 4 channels in each; the number of units of a head's structure
MODELS = {
    "bart": (
        {"vocab_size": 99, "d_model": 16, "encoder_layers": 2, "decoder_layers": 2}
        | {f"{part}_attention_heads": 4 for part in ("encoder", "decoder")}
        | {f"{part}_ffn_dim": 24 for part in ("encoder", "decoder")},
        4,
    ),
    "bert": (ROTARY, 4),
    "bloom": ({"vocab_size": 99, "hidden_size": 16, "n_layer": 2, "n_head": 4}, 4),
    "deberta": (ROTARY, 4),
    "deberta-v2": (ROTARY, 4),
    "electra": ({**ROTARY, "embedding_size": 16}, 4),
    "falcon": ({**SMALL, "new_decoder_architecture": True, "num_kv_heads": 2}, 2),
    "gemma": ({**GROUPED, "head_dim": 4}, 2),
    "gemma2": ({**GROUPED, "head_dim": 4}, 2),
    "glm": ({**GROUPED, "head_dim": 4}, 2),
    "gpt2": (GPT, 4),
    "gpt_bigcode": ({**GPT, "multi_query": False}, 4),
    "gpt_neo": ({"vocab_size": 99, "hidden_size": 16, "num_layers": 2, "num_heads": 4,
                 "attention_types": [[["global", "local"], 1]]}, 4),
    "gpt_neox": (ROTARY, 4),
    "gptj": ({**GPT, "rotary_dim": 2}, 4),
    "llama": (GROUPED, 2),
    "mistral": (GROUPED, 2),
    "mpt": ({"vocab_size": 99, "d_model": 16, "n_layers": 2, "n_heads": 4}, 4),
    "mt5": ({**T5, "feed_forward_proj": "gated-gelu"}, 4),
    "opt": ({**SMALL, "ffn_dim": 24, "word_embed_proj_dim": 16}, 4),
    "phi": (GROUPED, 2),
    "phi3": (GROUPED, 0),
    "qwen2": (GROUPED, 2),
    "qwen3": ({**GROUPED, "head_dim": 4}, 2),
    "roberta": (ROTARY, 4),
    "rwkv": ({"vocab_size": 99, "hidden_size": 16, "num_hidden_layers": 2, "attention_hidden_size": 16}, 0),
    "stablelm": (GROUPED, 2),
    "t5": (T5, 4),
}  # fmt: skip


def run(model):
    tokens = torch.arange(2, 12).view(2, 5)
    extra = {"decoder_input_ids": tokens} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model(input_ids=tokens, **extra)[0]


def lines_of(linear, part, unit):
    """Mask of the entries of one unit, in the orientation of the layer, and which outputs it has."""
    shape = torch.Size((linear.nf, linear.nx)) if isinstance(linear, Conv1D) else linear.weight.shape
    keep = torch.ones(part.units, dtype=torch.bool)
    keep[unit] = False
    entries = ~part.expand(keep, shape)
    return (entries.T if isinstance(linear, Conv1D) else entries), entries[:, 0]


def disturb(linear, part, unit):
    entries, outputs = lines_of(linear, part, unit)
    with torch.no_grad():
        linear.weight[entries] += 3 * torch.randn(int(entries.sum()))
        if linear.bias is not None:
            linear.bias[outputs] += 3 * torch.randn(int(outputs.sum()))


@pytest.mark.parametrize("pattern", ["neuron", "head"])
@pytest.mark.parametrize("model_type", MODELS)
def test_a_unit_without_its_inputs_to_the_last_layer_has_no_effect(model_type, pattern):
    """With the columns of a unit gone, nothing that its rows compute may reach the output, and all else still does."""
    config, num_heads = MODELS[model_type]
    if pattern == "head" and not num_heads:
        pytest.skip(f"{model_type} has no attention heads that are known")
    torch.manual_seed(0)
    model = AutoModel.from_config(AutoConfig.for_model(model_type, **config)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))  # some start at zero
    couplings = find_couplings(model, pattern)
    groups = {}
    for name, (group, part) in couplings.items():
        block = name.partition("SelfAttention")[0] if model_type in ("t5", "mt5") else ""
        groups.setdefault((group, block), []).append((model.get_submodule(name), part))
    assert groups
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for members in groups.values():
        assert len({part.units for _, part in members}) == 1
        assert pattern == "neuron" or members[0][1].units == num_heads
        *makers, (taker, taken) = sorted(members, key=lambda member: member[1].dim)
        entries, _ = lines_of(taker, taken, 1)
        with torch.no_grad():
            taker.weight.masked_fill_(entries, 0)
        before = run(model)
        for maker, made in makers:
            disturb(maker, made, 1)
        torch.testing.assert_close(run(model), before, rtol=1e-4, atol=1e-4)
        for maker, made in makers:
            for unit in {0, 2, 3} & set(range(made.units)):
                disturb(maker, made, unit)
            assert (run(model) - before).abs().max() > 1e-2
            before = run(model)
        model.load_state_dict(start)


@pytest.mark.parametrize("pattern", ["neuron", "head"])
def test_by_default_all_structures_of_the_blocks_are_targets(bert, pattern):
    model = get_peft_model(bert(), PSTConfig(pattern=pattern, sparsity=0.5))
    names = {name.partition(".layer.")[2][2:] for name in model.base_model.targeted_module_names}
    assert (
        names
        == {
            "neuron": {"intermediate.dense", "output.dense"},
            "head": {f"attention.self.{n}" for n in ("query", "key", "value")} | {"attention.output.dense"},
        }[pattern]
    )
    model.base_model.set_sparsity(0.5)
    groups = {}
    for layer in (m for m in model.modules() if isinstance(m, PSTLayer)):
        groups.setdefault(layer.pst_group["default"], set()).add(layer.num_pruned / layer.shape.numel())
    assert len(groups) == 2 and all(shares == {0.5} for shares in groups.values())


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 10), nn.Linear(10, 4)

    def forward(self, x):
        return self.b(self.a(x).relu())


def test_a_structure_of_ones_own():
    model = get_peft_model(Pair(), PSTConfig(pattern="neuron", coupled_modules=[["a", "b"]]))
    model.base_model.set_sparsity(0.3)
    x = torch.randn(5, 6)
    y = model.eval()(x)
    merged = model.merge_and_unload()
    dead = (merged.a.weight == 0).all(1)
    assert dead.sum() == 3 and torch.equal(dead, (merged.b.weight == 0).all(0))
    assert (merged.a.weight == 0).sum() == 3 * 6 and (merged.b.weight == 0).sum() == 3 * 4
    torch.testing.assert_close(merged(x), y)


def test_what_is_no_structure_is_named(bert):
    message = r"pattern='neuron' prunes structures that lie in several weights, but 'bert.*query' is not known"
    with pytest.raises(ValueError, match=message):
        get_peft_model(bert(), PSTConfig(pattern="neuron", target_modules=["query"]))
    message = "prunes 'bert.*layer.0.intermediate.dense' together with 'bert.*layer.0.output.dense', which is not amo"
    with pytest.raises(ValueError, match=message):
        get_peft_model(bert(), PSTConfig(pattern="neuron", target_modules=["intermediate.dense"]))
    with pytest.raises(ValueError, match=r"coupled_modules names \['b', 'a'\], but the model has no linear layers"):
        get_peft_model(Pair(), PSTConfig(pattern="neuron", coupled_modules=[["b", "a"]]))
    blocks = nn.ModuleDict({"blocks": nn.ModuleList([Pair()])})
    with pytest.raises(ValueError, match="ModuleDict has no neurons or heads in its blocks that are known to this"):
        get_peft_model(blocks, PSTConfig(pattern="neuron"))


def test_layers_to_transform_with_the_default_targets(bert):
    model = get_peft_model(bert(), PSTConfig(pattern="neuron", layers_to_transform=[1]))
    names = model.base_model.targeted_module_names
    assert len(names) == 2 and all(".layer.1." in name and "attention" not in name for name in names)


def test_a_second_adapter_finds_the_structures_too(bert):
    model = get_peft_model(bert(), PSTConfig(pattern="neuron", initial_sparsity=0.5))
    model.add_adapter("other", PSTConfig(pattern="neuron", initial_sparsity=0.25))
    model.set_adapter("other")
    assert model.base_model.get_sparsity() == 0.25


def test_blocks_of_t5_that_share_a_position_bias_share_their_heads():
    model = AutoModel.from_config(AutoConfig.for_model("t5", **T5))
    groups = {}
    for name, (group, _) in find_couplings(model, "head").items():
        groups.setdefault(group, []).append(name)
    own = [f"decoder.block.{i}.layer.1.EncDecAttention.(q, k, v, o)" for i in (0, 1)]
    shared = [f"{part}.block.0.layer.0.SelfAttention.(q, k, v, o)" for part in ("encoder", "decoder")]
    assert {group: len(names) for group, names in groups.items()} == dict.fromkeys(own, 4) | dict.fromkeys(shared, 8)
    umt5 = AutoModel.from_config(AutoConfig.for_model("umt5", **T5))  # a bias in each block
    assert len({group for group, _ in find_couplings(umt5, "head").values()}) == 6

    pruned = get_peft_model(model, PSTConfig(pattern="head", sparsity=0.5))
    pruned.base_model.set_sparsity(0.5)
    for part in (pruned.base_model.model.encoder, pruned.base_model.model.decoder):
        first, second = (block.layer[0].SelfAttention for block in part.block)
        for name in "qkvo":
            one, other = (getattr(attention, name).masked_weight("default") == 0 for attention in (first, second))
            assert torch.equal(one, other) and one.any()
