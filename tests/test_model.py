from contextlib import nullcontext

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import nn
from transformers import AutoConfig, AutoModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.pytorch_utils import Conv1D

from peft_pst import PSTConfig, PSTLayer, SparsityScheduler
from peft_pst.model import default_target_modules, is_plain_linear
from peft_pst.patterns import parse_pattern

LLAMA = {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"}
SWIGLU = {"mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"}
BERT = {"attention.self.query", "attention.self.key", "attention.self.value"}
BERT |= {"attention.output.dense", "intermediate.dense", "output.dense"}
BART = {f"{attention}.{name}_proj" for attention in ("self_attn", "encoder_attn") for name in ("q", "k", "v", "out")}
BART |= {"fc1", "fc2"}
T5 = {f"layer.0.SelfAttention.{name}" for name in "qkvo"} | {f"layer.1.EncDecAttention.{name}" for name in "qkvo"}
MT5 = T5 | {f"layer.{i}.DenseReluDense.{name}" for i in (1, 2) for name in ("wi_0", "wi_1", "wo")}
T5 |= {f"layer.{i}.DenseReluDense.{name}" for i in (1, 2) for name in ("wi", "wo")}
GPT2 = {"attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"}

# All linear layers of the blocks, read from the modeling files of transformers.
EXPECTED = {
    "bart": BART,
    "bert": BERT,
    "bloom": {"self_attention.query_key_value", "self_attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"},
    "codegen": {"attn.qkv_proj", "attn.out_proj", "mlp.fc_in", "mlp.fc_out"},
    "deberta": {"attention.self.in_proj"} | {"attention.output.dense", "intermediate.dense", "output.dense"},
    "deberta-v2": {f"attention.self.{name}_proj" for name in ("query", "key", "value")}
    | {"attention.output.dense", "intermediate.dense", "output.dense"},
    "electra": BERT,
    "falcon": {"self_attention.query_key_value", "self_attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"},
    "gemma": LLAMA | SWIGLU,
    "gemma2": LLAMA | SWIGLU,
    "gemma3_text": LLAMA | SWIGLU,
    "gpt2": GPT2,
    "gpt_bigcode": GPT2,
    "gpt_neo": {f"attn.attention.{name}_proj" for name in ("q", "k", "v", "out")} | {"mlp.c_fc", "mlp.c_proj"},
    "gpt_neox": {"attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"},
    "gptj": {f"attn.{name}_proj" for name in ("q", "k", "v", "out")} | {"mlp.fc_in", "mlp.fc_out"},
    "layoutlm": BERT,
    "llama": LLAMA | SWIGLU,
    "mistral": LLAMA | SWIGLU,
    "mpt": {"attn.Wqkv", "attn.out_proj", "ffn.up_proj", "ffn.down_proj"},
    "mt5": MT5,
    "opt": {"self_attn.k_proj", "self_attn.v_proj", "self_attn.q_proj", "self_attn.out_proj", "fc1", "fc2"},
    "phi": {f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "dense")} | {"mlp.fc1", "mlp.fc2"},
    "qwen2": LLAMA | SWIGLU,
    "qwen3": LLAMA | SWIGLU,
    "roberta": BERT,
    "rwkv": {f"attention.{name}" for name in ("key", "value", "receptance", "output")}
    | {f"feed_forward.{name}" for name in ("key", "receptance", "value")},
    "stablelm": LLAMA | SWIGLU,
    "t5": T5,
    "xlm-roberta": BERT,
}
# experts, several modalities or state space blocks: their layers differ between transformers 4 and 5
CHECKED_BELOW = {"mixtral", "llama4", "gemma4", "blip-2", "nemotron_h"}


def tiny(model_type):
    """An untrained model of that type with two blocks, on the meta device."""
    config = AutoConfig.for_model(model_type)
    for part in (config, getattr(config, "text_config", None)):
        for name in ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "encoder_layers", "decoder_layers"):
            if part is not None and hasattr(part, name):
                setattr(part, name, 2)
    if model_type == "gpt_neo":
        config.attention_types, config.attention_layers = [[["global", "local"], 1]], ["global", "local"]
    if hasattr(config, "layer_types") and config.layer_types:
        config.layer_types = config.layer_types[:2]
    with torch.device("meta"):
        return AutoModel.from_config(config)


def test_every_architecture_with_a_lora_default_is_checked():
    elsewhere = {name for name in TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING if name not in CONFIG_MAPPING}
    assert set(TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING) - elsewhere - CHECKED_BELOW == set(EXPECTED)


@pytest.mark.parametrize("model_type", EXPECTED)
def test_default_targets_are_all_linear_layers_of_the_blocks(model_type):
    model = tiny(model_type)
    targets = default_target_modules(model)
    assert targets == EXPECTED[model_type]
    # and as PEFT matches the names, nothing outside of the blocks is caught
    model = get_peft_model(model, PSTConfig(), low_cpu_mem_usage=True)
    assert all(any(part.isdigit() for part in name.split(".")) for name in model.base_model.targeted_module_names)
    assert not any(word in name for name in model.base_model.targeted_module_names for word in ("pool", "embed"))


def test_experts_are_pruned_and_their_router_is_not():
    experts_are_linear = transformers.__version__.startswith("4")
    with nullcontext() if experts_are_linear else pytest.warns(UserWarning, match="many experts in one tensor"):
        targets = default_target_modules(tiny("mixtral"))
    assert targets >= LLAMA and not any(name.endswith(("gate", "router")) for name in targets)
    assert experts_are_linear == ("block_sparse_moe.experts.0.w1" in targets)


@pytest.mark.filterwarnings("ignore:.*many experts in one tensor")
@pytest.mark.parametrize("model_type", ["blip-2", "llama4", "gemma4"])
def test_of_several_modalities_the_language_model_is_pruned(model_type):
    if model_type not in CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {model_type}")
    model = tiny(model_type)
    linears = {name for name, module in model.named_modules() if is_plain_linear(module)}
    wanted = {name for name in linears if "language_model." in name and ".layers." in name}
    model = get_peft_model(model, PSTConfig(), low_cpu_mem_usage=True)
    assert set(model.base_model.targeted_module_names) == wanted
    with pytest.raises(ValueError, match=r"layers_to_transform=\[0\] needs target_modules in a model of several"):
        get_peft_model(tiny(model_type), PSTConfig(layers_to_transform=[0]), low_cpu_mem_usage=True)


class Mixer(nn.Module):
    """Like Mamba's: a kernel reads the weights of its linear layers."""

    def __init__(self):
        super().__init__()
        self.A_log = nn.Parameter(torch.zeros(4))
        self.out_proj = nn.Linear(4, 4)


class Noisy(nn.Linear):
    def forward(self, x):
        return super().forward(x) + torch.randn(())


@pytest.mark.parametrize(
    ("module", "name", "message"),
    [
        (nn.Embedding(4, 4), "target", "The target module 'target' is a Embedding, but PST prunes plain linear"),
        (nn.LayerNorm(4), "target", "The target module 'target' is a LayerNorm, but PST prunes plain linear"),
        (nn.Conv2d(4, 4, 1), "target", "The target module 'target' is a Conv2d, but PST prunes plain linear"),
        (Noisy(4, 4), "target", "The target module 'target' is a Noisy, but PST prunes plain linear"),
        (nn.MultiheadAttention(4, 2), "out_proj", "lies in a MultiheadAttention, which reads its weight past"),
        (
            nn.TransformerEncoderLayer(4, 2),
            "linear1",
            "lies in a TransformerEncoderLayer, which reads its weight past",
        ),
        (Mixer(), "out_proj", "The target module 'target.out_proj' lies in a Mixer, which reads its weight past"),
    ],
)
def test_a_target_that_cannot_be_pruned_is_refused(module, name, message):
    model = nn.ModuleDict({"target": module})
    with pytest.raises(TypeError, match=message):
        get_peft_model(model, PSTConfig(target_modules=[name]))


def test_a_head_that_shares_the_embedding_is_refused():
    """Merging it would prune the embedding too, and change what every layer reads."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
    config = PSTConfig(target_modules=["q_proj", "lm_head"])
    for tied in (False, True):
        config_of_model = transformers.LlamaConfig(vocab_size=99, tie_word_embeddings=tied, **sizes)
        model = transformers.LlamaForCausalLM(config_of_model)
        with pytest.raises(ValueError, match="'lm_head' shares its weight with the emb") if tied else nullcontext():
            get_peft_model(model, config)


def test_what_cannot_be_pruned_is_no_default():
    model = nn.Module()
    model.config = transformers.BertConfig()
    model.blocks = nn.ModuleList(
        [nn.ModuleDict({"a": nn.MultiheadAttention(4, 2), "b": Mixer(), "c": nn.Linear(4, 4)})]
    )
    assert default_target_modules(model) == {"c"}


def test_without_blocks_there_is_no_default():
    with pytest.raises(ValueError, match="Please specify `target_modules` in `peft_config`: Sequential has no linear"):
        get_peft_model(nn.Sequential(nn.Linear(2, 2)), PSTConfig())


def test_on_top_of_another_method_is_refused(bert):
    model = get_peft_model(bert(), LoraConfig(target_modules=["query"]))
    with pytest.raises(TypeError, match="is a Linear, but PST prunes plain linear layers"), pytest.warns(UserWarning):
        get_peft_model(model, PSTConfig(target_modules=["query"]))


def test_layers_to_transform_with_the_default_targets(bert):
    model = get_peft_model(bert(), PSTConfig(layers_to_transform=[1]))
    names = model.base_model.targeted_module_names
    assert len(names) == 6 and all(".layer.1." in name for name in names)


def test_exclude_modules_with_the_default_targets(bert):
    model = get_peft_model(bert(), PSTConfig(exclude_modules=["query"]))
    assert len(model.base_model.targeted_module_names) == 10


def test_a_second_adapter_with_default_targets(bert):
    model = get_peft_model(bert(), PSTConfig(initial_sparsity=0.5))
    model.add_adapter("other", PSTConfig(initial_sparsity=0.25))
    assert model.peft_config["other"].target_modules == model.peft_config["default"].target_modules
    assert model.base_model.get_sparsity() == 0.5
    model.set_adapter("other")
    assert model.base_model.get_sparsity() == 0.25
    model.delete_adapter("other")
    assert model.base_model.get_sparsity() == 0.5
    for layer in (m for m in model.modules() if isinstance(m, PSTLayer)):
        assert all("other" not in getattr(layer, name) for name in layer.adapter_layer_names + layer.other_param_names)


def test_sparsity_is_that_of_all_targets(bert):
    model = get_peft_model(bert(), PSTConfig())
    model.base_model.set_sparsity(0.37)
    layers = [m for m in model.modules() if isinstance(m, PSTLayer)]
    sizes = [layer.out_features * layer.in_features for layer in layers]
    assert model.base_model.get_sparsity() == sum(int(0.37 * size) for size in sizes) / sum(sizes)


def test_the_head_trains_and_the_base_does_not(bert, tokens):
    model = get_peft_model(bert(), PSTConfig(task_type="SEQ_CLS"))
    model(input_ids=tokens, labels=torch.tensor([0, 1])).loss.backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    assert trained == {name for name, p in model.named_parameters() if p.requires_grad}
    assert any("classifier" in name for name in trained) and not any("base_layer" in name for name in trained)


def test_generation_is_that_of_the_merged_model():
    config = transformers.GPT2Config(vocab_size=99, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2)
    model = transformers.GPT2LMHeadModel(config)
    model = get_peft_model(model, PSTConfig(init_weights=False, initial_sparsity=0.5)).eval()
    prompt = torch.tensor([[5, 6, 7]])
    unmerged = model.generate(input_ids=prompt, max_new_tokens=8, do_sample=False, pad_token_id=0)
    assert any(isinstance(m, Conv1D) for m in model.modules())
    merged = model.merge_and_unload().generate(input_ids=prompt, max_new_tokens=8, do_sample=False, pad_token_id=0)
    assert torch.equal(unmerged, merged)


@pytest.mark.parametrize(
    ("pattern", "sparsity"),
    [("2:4", 0.5), ("1:4", 0.75), ("block:8x1", 0.9), ("block:16x16", 0.5), ("row", 0.5), ("column", 0.5)],
)
def test_a_pattern_holds_from_the_schedule_to_the_merged_model(bert, tokens, pattern, sparsity):
    config = PSTConfig(task_type="SEQ_CLS", pattern=pattern, sparsity=sparsity, init_weights=False)
    model = get_peft_model(bert(), config)
    names, scheduler = model.base_model.targeted_module_names, SparsityScheduler(model, total_steps=4)
    seen = []
    for _ in range(4):
        model(input_ids=tokens, labels=torch.tensor([0, 1])).loss.backward()
        scheduler.step()
        seen.append(model.base_model.get_sparsity())
    assert seen == sorted(seen)
    with torch.no_grad():
        logits = model.eval()(input_ids=tokens).logits
        merged = model.merge_and_unload()
        torch.testing.assert_close(merged(input_ids=tokens).logits, logits, rtol=1e-4, atol=1e-4)
    allowed = parse_pattern(pattern)
    for name in names:
        weight = merged.get_submodule(name).weight.detach()
        num_pruned = allowed.num_pruned(weight.shape, sparsity)
        assert (weight == 0).sum() == num_pruned
        # the zeros are whole units: pruning what is zero already changes nothing
        assert torch.equal(allowed.mask(weight.abs(), num_pruned), weight != 0)


def test_a_target_that_the_pattern_does_not_divide_is_named(bert):
    with pytest.raises(
        ValueError, match=r"pattern='block:48x48' does not divide the weight of 'bert.*query', \[out=32, i"
    ):
        get_peft_model(bert(), PSTConfig(pattern="block:48x48"))


def test_more_than_the_pattern_prunes_is_refused(bert):
    model = get_peft_model(bert(), PSTConfig(pattern="2:4"))
    with pytest.raises(ValueError, match="sparsity=0.6 is more than pattern='2:4' prunes: expected at most 0.5"):
        model.base_model.set_sparsity(0.6)
