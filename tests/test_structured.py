import copy
import json
import subprocess
import sys
import warnings

import pytest
import torch
import transformers
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.functional import gelu, relu, silu
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    ViTConfig,
    ViTModel,
)

from peft_pst import PSTConfig, SparseLinear, accelerate_sparse, create_pst_optimizer, densify, save_pretrained, shrink
from peft_pst.coupling import find_couplings
from peft_pst.sparse.quantizer import widths_in

SIZES = {"vocab_size": 99, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 8, "pad_token_id": 0}
FFN = {**SIZES, "intermediate_size": 96}
T5 = {"vocab_size": 99, "d_model": 64, "d_kv": 8, "d_ff": 96, "num_heads": 8, "num_layers": 3, "pad_token_id": 0}
ENDS = {"bos_token_id": 1, "eos_token_id": 1}
MODELS = {
    "bert": (AutoModelForSequenceClassification, FFN),
    "bloom": (AutoModelForCausalLM, {"vocab_size": 99, "hidden_size": 64, "n_layer": 2, "n_head": 8}),
    "glm": (AutoModelForCausalLM, {**FFN, "num_key_value_heads": 4, "head_dim": 8, "eos_token_id": 1}),
    "gpt2": (AutoModelForCausalLM, {"vocab_size": 99, "n_embd": 64, "n_layer": 3, "n_head": 8, **ENDS}),
    "llama": (AutoModelForCausalLM, {**FFN, "num_key_value_heads": 4, "tie_word_embeddings": True}),
    "mt5": (AutoModelForSeq2SeqLM, {**T5, "feed_forward_proj": "gated-gelu", "decoder_start_token_id": 0}),
    "opt": (AutoModelForCausalLM, {**SIZES, "ffn_dim": 96, "word_embed_proj_dim": 64, **ENDS}),
    "qwen2": (AutoModelForCausalLM, {**FFN, "num_key_value_heads": 4}),
    "t5": (AutoModelForSeq2SeqLM, {**T5, "decoder_start_token_id": 0}),
}
FOUR = ["bert", "gpt2", "llama", "t5"]
TOKENS = torch.arange(2, 16).view(2, 7)
MASK = torch.ones_like(TOKENS)
MASK[1, :3] = 0
HAS_PRUNED_HEADS = transformers.__version__.startswith("4.")
OF_OURS = "ignore:.* cannot say how many"


@pytest.fixture(autouse=True)
def one_thread():
    """Models as small as these wait longer for a second thread than it helps them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def fresh(model_type, seed=0, **changes):
    torch.manual_seed(seed)
    auto, config = MODELS[model_type]
    model = auto.from_config(AutoConfig.for_model(model_type, **{**config, **changes})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))  # biases start at zero, and heads all alike
    return model


def prune(model, pattern, **choices):
    """Prune and train for two steps; merge."""
    method = PSTConfig(pattern=pattern, sparsity=0.5, initial_sparsity=0.5, **choices)
    model = get_peft_model(model, method).train()
    optimizer = create_pst_optimizer(model)
    for _ in range(2):
        output = model(**inputs_of(model))
        output[0].float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        model.base_model.set_sparsity(0.5)
    return model.merge_and_unload().eval()


def inputs_of(model):
    inputs = {"input_ids": TOKENS, "attention_mask": MASK}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = TOKENS.flip(1)
    return inputs


@torch.no_grad()
def logits(model):
    return model(**inputs_of(model))[0]


def assert_close(a, b, where=slice(None)):
    assert (logits(a) - logits(b))[where].abs().max() <= 1e-5


def zero(linear, rows=(), columns=()):
    with torch.no_grad():
        linear.weight[list(rows)] = 0
        linear.weight[:, list(columns)] = 0


def channels(*heads, size=8):
    return [size * head + i for head in heads for i in range(size)]


def block_parameters(model):
    names = [name for pattern in ("neuron", "head") for name in find_couplings(model, pattern)]
    return sum(model.get_submodule(name).weight.numel() for name in names)


def attentions(model):
    names = ("BertAttention", "GPT2Attention", "LlamaAttention", "Qwen2Attention", "T5Attention", "MT5Attention")
    return [module for module in model.modules() if type(module).__name__ in names]


@pytest.mark.filterwarnings(OF_OURS)
@pytest.mark.parametrize("model_type", [*FOUR, "glm", "mt5"])
def test_half_of_the_neurons_and_heads_go_and_the_outputs_stay(model_type):
    model = prune(prune(fresh(model_type), "neuron"), "head")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    smaller = shrink(model)
    assert type(smaller) is type(model) and smaller is not model
    assert_close(smaller, model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert block_parameters(smaller) == block_parameters(model) / 2
    if model.can_generate():
        inputs = {"input_ids": TOKENS, "attention_mask": MASK, "max_new_tokens": 12, "min_new_tokens": 12}
        kinds = ({"use_cache": True}, {"use_cache": False}, {"num_beams": 3})
        for kind in kinds:
            expected = model.generate(**inputs, **kind, do_sample=False, pad_token_id=0)
            assert torch.equal(smaller.generate(**inputs, **kind, do_sample=False, pad_token_id=0), expected)
        embedding, head = smaller.get_input_embeddings(), smaller.get_output_embeddings()
        tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
        assert (embedding.weight is head.weight) == tied
        assert tied or model_type in ("glm", "mt5")


@pytest.mark.filterwarnings(OF_OURS)
def test_it_still_trains_and_copies():
    model = shrink(prune(fresh("t5"), "head")).requires_grad_(True).train()
    model(**inputs_of(model), labels=TOKENS).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    again = copy.deepcopy(model.eval())
    assert torch.equal(logits(again), logits(model))


ACTIVATIONS = {"gelu": gelu, "relu": relu, "silu": silu, "sigmoid": torch.sigmoid}


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_neuron_without_weights_is_a_constant_of_the_next_bias(activation):
    model = fresh("bert", hidden_act=activation, num_hidden_layers=1)
    first, last = model.bert.encoder.layer[0].intermediate.dense, model.bert.encoder.layer[0].output.dense
    zero(first, rows=range(40))
    zero(last, columns=range(30, 60))  # 30 that are constant, 10 that are both, 20 that reach nothing
    x = torch.randn(5, 64, dtype=torch.float64)
    act = ACTIVATIONS[activation]

    def block(first, last):
        inner = act(x @ first.weight.double().T + first.bias.double())
        return inner @ last.weight.double().T + last.bias.double()

    smaller = shrink(model)
    small = smaller.bert.encoder.layer[0]
    assert small.intermediate.dense.weight.shape == (36, 64) and smaller.config.intermediate_size == 36
    torch.testing.assert_close(
        block(small.intermediate.dense, small.output.dense), block(first, last), rtol=0, atol=3e-6
    )
    assert_close(smaller, model)


def test_a_gated_neuron_is_constant_if_both_factors_are_or_one_is_zero():
    model = fresh("llama", mlp_bias=True, num_hidden_layers=1)
    mlp = model.model.layers[0].mlp
    zero(mlp.gate_proj, rows=[*range(10), *range(20, 30), *range(50, 60)])
    zero(mlp.up_proj, rows=[*range(10), *range(30, 40)])
    with torch.no_grad():
        mlp.up_proj.bias[30:35] = 0
        mlp.gate_proj.bias[50:53] = 0
    # 10 are constant, 5 are multiplied by zero, 3 are silu(0) = 0 times anything; all others depend on the input
    smaller = shrink(model)
    assert smaller.model.layers[0].mlp.down_proj.in_features == 96 - 18
    x = torch.randn(5, 64, dtype=torch.float64)

    def block(mlp):
        gate, up, down = ((m.weight.double(), m.bias.double()) for m in (mlp.gate_proj, mlp.up_proj, mlp.down_proj))
        return (silu(x @ gate[0].T + gate[1]) * (x @ up[0].T + up[1])) @ down[0].T + down[1]

    torch.testing.assert_close(block(smaller.model.layers[0].mlp), block(mlp), rtol=0, atol=1e-5)
    assert_close(smaller, model)


@pytest.mark.filterwarnings(OF_OURS)
def test_a_head_without_values_is_a_constant_and_one_without_queries_is_not():
    model = fresh("bert")
    for layer in model.bert.encoder.layer:
        zero(layer.attention.self.value, rows=channels(1, 6))
        zero(layer.attention.self.query, rows=channels(3))
        zero(layer.attention.self.key, rows=channels(3))
        zero(layer.attention.output.dense, columns=channels(7))
    smaller = shrink(model)
    assert [a.output.dense.in_features for a in attentions(smaller)] == [40] * 3
    assert_close(smaller, model)

    model = fresh("gpt2")
    for block in model.transformer.h:
        with torch.no_grad():
            block.attn.c_attn.weight[:, [128 + i for i in channels(2)]] = 0  # values
            block.attn.c_attn.weight[:, channels(4)] = 0  # queries
    smaller = shrink(model)
    assert [a.c_attn.weight.shape for a in attentions(smaller)] == [(64, 3 * 56)] * 3
    assert_close(smaller, model, where=MASK.bool())  # padding on the left attends to nothing, with weights of sum 0

    model = fresh("llama", attention_bias=True)
    for layer in model.model.layers:
        zero(layer.self_attn.v_proj, rows=channels(1, 3))
    smaller = shrink(model)
    assert smaller.config.num_key_value_heads == 2 and smaller.config.num_attention_heads == 4
    assert_close(smaller, model, where=MASK.bool())


def test_a_layer_keeps_one_unit_at_least():
    model = fresh("llama")
    for layer in model.model.layers:
        nn.init.zeros_(layer.mlp.down_proj.weight)
        nn.init.zeros_(layer.self_attn.o_proj.weight)
    smaller = shrink(model)
    assert (smaller.config.intermediate_size, smaller.config.num_key_value_heads) == (1, 1)
    assert_close(smaller, model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(dtype):
    model = fresh("bert").to(dtype)
    for layer in model.bert.encoder.layer:
        zero(layer.intermediate.dense, rows=range(50))
    smaller = shrink(model)
    assert smaller.config.intermediate_size == 46 and smaller.dtype == dtype
    close = {torch.bfloat16: 0.03, torch.float64: 1e-12}[dtype]
    assert (logits(smaller) - logits(model)).abs().max() <= close


def uniform_models():
    """What the config of the architecture can say."""
    return {
        "bert": prune(fresh("bert"), "neuron"),
        "gpt2": prune(fresh("gpt2"), "neuron"),
        "llama": prune(prune(fresh("llama"), "neuron"), "head"),
        "qwen2": prune(prune(fresh("qwen2"), "neuron"), "head"),
        "t5": prune(prune(fresh("t5"), "neuron"), "head"),
    }


def other_models():
    """What it cannot."""
    needs_bias = fresh("qwen2")
    for layer in needs_bias.model.layers:
        zero(layer.self_attn.v_proj, rows=channels(1))  # it has a bias, o_proj has none
    other_heads = fresh("t5")
    for i, attention in enumerate(attentions(other_heads)):
        zero(attention.o, columns=channels(i % 8, (i + 3) % 8))
    return {
        "bert": prune(prune(fresh("bert"), "neuron"), "head"),
        "gpt2": prune(fresh("gpt2"), "head"),
        "llama": prune(prune(fresh("llama"), "neuron", budget="global"), "head", budget="global"),
        "qwen2": needs_bias,
        "t5": other_heads,
        "mt5": prune(prune(fresh("mt5"), "head", budget="global"), "neuron"),
    }


PROCESS = """
import json, sys
from pathlib import Path
import torch, transformers
torch.set_num_threads(1)
if sys.argv[2] == "with":
    import peft_pst
found = {}
for folder in sorted(Path(sys.argv[1]).iterdir()):
    try:
        name = json.loads((folder / "config.json").read_text())["architectures"][0]
        model = getattr(transformers, name).from_pretrained(folder).eval()
        inputs = torch.load(folder.parent.parent / "inputs.pt")[folder.name.split("-")[0]]
        with torch.no_grad():
            torch.save(model(**inputs)[0], folder / "logits.pt")
        found[folder.name] = "opened"
    except RuntimeError as error:
        found[folder.name] = str(error)
assert ("peft_pst" in sys.modules) == (sys.argv[2] == "with")
print(json.dumps(found))
"""


def open_in_a_process(folder, which):
    run = subprocess.run([sys.executable, "-c", PROCESS, folder, which], capture_output=True, text=True, check=True)
    return json.loads(run.stdout.splitlines()[-1])


def save_inputs(models, tmp_path):
    torch.save({name: inputs_of(model) for name, model in models.items()}, tmp_path / "inputs.pt")
    (tmp_path / "models").mkdir()
    return tmp_path / "models"


@pytest.mark.filterwarnings("error")
def test_plain_transformers_opens_uniform_widths(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        models = uniform_models()
    folder, expected = save_inputs(models, tmp_path), {}
    for name, model in models.items():
        smaller = shrink(model)
        assert not hasattr(smaller.config, "quantization_config")
        smaller.save_pretrained(folder / name)
        save_pretrained(smaller, folder / f"{name}-ours", "dense")
        expected[name] = logits(model)
    assert set(open_in_a_process(folder, "without").values()) == {"opened"}
    for path in folder.iterdir():
        found = torch.load(path / "logits.pt")
        assert (found - expected[path.name.split("-")[0]]).abs().max() <= 1e-5, path.name
    config = json.loads((folder / "t5" / "config.json").read_text())
    assert (config["num_heads"], config["d_ff"]) == (4, 48)
    assert json.loads((folder / "gpt2" / "config.json").read_text())["n_inner"] == 128
    config = json.loads((folder / "llama" / "config.json").read_text())
    assert [config[key] for key in ("num_attention_heads", "num_key_value_heads", "head_dim")] == [4, 2, 8]


@pytest.mark.filterwarnings(OF_OURS)
def test_other_widths_open_with_this_package_and_fail_without(tmp_path):
    models = other_models()
    folder, expected = save_inputs(models, tmp_path), {}
    for name, model in models.items():
        with pytest.warns(UserWarning, match="opens only after `import peft_pst`"):
            smaller = shrink(model)
        smaller.save_pretrained(folder / name)
        save_pretrained(smaller, folder / f"{name}-auto")
        save_pretrained(smaller, folder / f"{name}-dense", "dense")
        expected[name] = expected[f"{name}-auto"] = expected[f"{name}-dense"] = logits(model)
    sparse = get_peft_model(shrink(models["llama"]), PSTConfig(initial_sparsity=0.9, sparsity=0.9)).merge_and_unload()
    save_pretrained(sparse, folder / "llama-sparse")  # no bias in it that has another size
    expected["llama-sparse"] = logits(sparse)
    sparse = get_peft_model(shrink(models["bert"]), PSTConfig(initial_sparsity=0.9, sparsity=0.9)).merge_and_unload()
    save_pretrained(sparse, folder / "bert-sparse")
    expected["bert-sparse"] = logits(sparse)
    without = open_in_a_process(folder, "without")
    assert len(without) == 20
    by_pruned_heads = {name for name in without if name.startswith(("bert", "gpt2")) and HAS_PRUNED_HEADS}
    by_pruned_heads.discard("bert-sparse")  # it would have random weights
    assert by_pruned_heads == {name for name, text in without.items() if text == "opened"}
    for name in by_pruned_heads:
        found = torch.load(folder / name / "logits.pt")
        assert (found - expected[name]).abs().max() <= 1e-5, name
        (folder / name / "logits.pt").unlink()
    # the words of transformers 4.57, and of 5
    failed = [text for text in without.values() if text != "opened"]
    assert all("size mismatch" in text or "mismatched_sizes" in text for text in failed), without
    assert set(open_in_a_process(folder, "with").values()) == {"opened"}
    for path in folder.iterdir():
        found = torch.load(path / "logits.pt")
        where = MASK.bool() if path.name.startswith("qwen2") else slice(None)  # padding that attends to nothing
        assert (found - expected[path.name])[where].abs().max() <= 1e-5, path.name
    widths = json.loads((folder / "bert" / "config.json").read_text())["quantization_config"]["widths"]
    assert widths == {f"bert.encoder.layer.{i}.attention.self.query": 4 for i in range(3)}
    assert json.loads((folder / "bert" / "config.json").read_text())["intermediate_size"] == 48
    biases = json.loads((folder / "qwen2" / "config.json").read_text())["quantization_config"]["biases"]
    assert biases == [f"model.layers.{i}.self_attn.o_proj" for i in range(3)]


@pytest.mark.filterwarnings(OF_OURS, "ignore:The model's sparse weights stay compressed")
def test_widths_survive_opening_and_saving(tmp_path):
    model = prune(fresh("bert"), "head")
    smaller = shrink(model)
    save_pretrained(smaller, tmp_path / "one")
    opened = type(model).from_pretrained(tmp_path / "one").eval()
    assert opened.hf_quantizer.is_trainable
    assert widths_in(opened.config) == widths_in(smaller.config) != ({}, [])
    opened.save_pretrained(tmp_path / "two")
    save_pretrained(densify(opened), tmp_path / "three")
    for name in ("two", "three"):
        assert torch.equal(logits(type(model).from_pretrained(tmp_path / name).eval()), logits(smaller))
    with torch.no_grad():
        opened.bert.encoder.layer[0].attention.self.query.weight.mul_(2)  # as a training does
    opened.save_pretrained(tmp_path / "trained")
    assert torch.equal(logits(type(model).from_pretrained(tmp_path / "trained").eval()), logits(opened))
    # a class without the head has other names
    base = AutoModel.from_pretrained(tmp_path / "one").eval()
    with torch.no_grad():
        assert torch.equal(base(TOKENS)[0], smaller.bert(TOKENS)[0])
    for layer in base.encoder.layer:
        zero(layer.output.dense, columns=[3])
    shrink(base).save_pretrained(tmp_path / "base")
    again = AutoModel.from_pretrained(tmp_path / "base").eval()
    assert again.config.intermediate_size == 95 and len(widths_in(again.config)[0]) == 3
    with torch.no_grad():
        torch.testing.assert_close(again(TOKENS)[0], base(TOKENS)[0], rtol=0, atol=1e-5)
    # what is unstructured sparse beside that is stored so, and runs
    unstructured = PSTConfig(
        initial_sparsity=0.9, sparsity=0.9, target_modules=["query", "value", "intermediate.dense"]
    )
    sparse = get_peft_model(smaller, unstructured).merge_and_unload()
    save_pretrained(sparse, tmp_path / "sparse")
    opened = type(model).from_pretrained(tmp_path / "sparse").eval()
    assert len(opened.config.quantization_config.weights) == 8 and not opened.hf_quantizer.is_trainable
    torch.testing.assert_close(logits(opened), logits(sparse), rtol=0, atol=1e-5)
    assert torch.equal(logits(densify(opened)), logits(sparse))


@pytest.mark.filterwarnings(OF_OURS)
def test_widths_that_were_edited_are_found_out(tmp_path):
    save_pretrained(shrink(prune(fresh("bert"), "head")), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["widths"]["bert.encoder.layer.0.attention.self.query"] = 5
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="its digest is wrong"):
        AutoModel.from_pretrained(tmp_path)


@pytest.mark.filterwarnings(OF_OURS)
def test_shrinking_again(tmp_path):
    model = fresh("t5")
    for i, attention in enumerate(attentions(model)):
        zero(attention.o, columns=channels(i % 8, (i + 3) % 8))
    once = shrink(model)
    for i, attention in enumerate(attentions(once)):
        zero(attention.o, columns=channels(i % 6))
    twice = shrink(once)
    assert all(attention.o.in_features == 40 for attention in attentions(twice))
    assert_close(twice, once)
    twice.save_pretrained(tmp_path)
    assert torch.equal(logits(type(model).from_pretrained(tmp_path).eval()), logits(twice))


def test_t5_blocks_that_lose_the_same_heads_share_their_bias_and_others_do_not():
    model = fresh("t5")
    for attention in attentions(model):
        zero(attention.o, columns=channels(0, 5))
    smaller = shrink(model)
    assert sum("relative_attention_bias" in name for name in smaller.state_dict()) == 2
    assert smaller.encoder.config.num_heads == smaller.decoder.config.num_heads == smaller.config.num_heads == 6
    assert_close(smaller, model)
    zero(model.encoder.block[2].layer[0].SelfAttention.o, columns=channels(7))  # in one block only
    with pytest.warns(UserWarning, match="T5Config cannot say how many heads each layer"):
        smaller = shrink(model)
    heads = [attention.n_heads for attention in attentions(smaller)]
    assert heads == [6, 6, 5] + [6] * 6
    assert_close(smaller, model)


def test_what_an_architecture_does_not_do_without_stays():
    model = prune(fresh("bloom"), "head")  # ALiBi: a slope for each head
    with pytest.warns(
        UserWarning, match="The heads of BloomForCausalLM that are pruned stay in it: without them it d"
    ):
        same = shrink(model)
    assert torch.equal(logits(same), logits(model))
    # no error, but another result
    model = prune(fresh("bert"), "neuron")
    for layer in model.bert.encoder.layer:
        layer.intermediate.intermediate_act_fn = nn.Softmax(-1)
    with pytest.warns(UserWarning, match="The neurons of BertFor.* stay in it: without them its outputs differ by"):
        same = shrink(model)
    assert torch.equal(logits(same), logits(model))
    assert same.config.intermediate_size == 96


def test_an_architecture_whose_config_is_not_known_still_shrinks(tmp_path):
    model = prune(fresh("opt"), "head")
    with pytest.warns(UserWarning, match="OPTConfig cannot say how many heads each layer of OPTForCausalLM has left"):
        smaller = shrink(model)
    assert_close(smaller, model)
    save_pretrained(smaller, tmp_path)
    assert torch.equal(logits(type(model).from_pretrained(tmp_path).eval()), logits(smaller))


def test_what_it_does_not_take():
    model = fresh("bert")
    with pytest.warns(UserWarning, match="found no neuron and no head of BertForSequenceClassification to remove"):
        same = shrink(model)
    assert torch.equal(logits(same), logits(model))
    adapted = get_peft_model(fresh("bert"), PSTConfig(pattern="neuron"))
    for unmerged in (adapted, adapted.base_model.model):
        with pytest.raises(
            ValueError, match="has an adapter that is not merged: call merged = model.merge_and_unload"
        ):
            shrink(unmerged)
    with pytest.raises(TypeError, match="shrink got a Linear: expected a model of transformers"):
        shrink(nn.Linear(2, 2))
    with torch.device("meta"):
        offloaded = AutoModel.from_config(AutoConfig.for_model("bert", **FFN))
    with pytest.raises(ValueError, match="not in memory, but offloaded"):
        shrink(offloaded)
    quantized = fresh("bert")
    quantized.classifier.weight = nn.Parameter(torch.ones(2, 64, dtype=torch.int8), requires_grad=False)
    with pytest.raises(TypeError, match="The weight of 'classifier' is a Tensor of torch.int8"):
        shrink(quantized)


def test_weights_that_are_stored_sparse_are_refused():
    pytest.importorskip("numba")
    model = get_peft_model(fresh("bert"), PSTConfig(initial_sparsity=0.9, sparsity=0.9)).merge_and_unload()
    with pytest.raises(ValueError, match=r"stored sparse: call model = densify\(model\) and shrink that"):
        shrink(accelerate_sparse(model))


@pytest.mark.filterwarnings(OF_OURS)
def test_an_accelerated_model_keeps_the_weight_that_fails_elsewhere(tmp_path):
    pytest.importorskip("numba")
    model = shrink(prune(fresh("llama"), "neuron", budget="global"))
    model = get_peft_model(model, PSTConfig(initial_sparsity=0.9, sparsity=0.9)).merge_and_unload().eval()
    expected, first = logits(model), next(iter(widths_in(model.config)[0]))
    save_pretrained(accelerate_sparse(model), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    assert f"{first}.weight" in tensors and f"{first}.weight_bits" not in tensors
    assert sum("weight_" in name for name in tensors) > 20
    assert torch.equal(logits(densify(type(model).from_pretrained(tmp_path)).eval()), expected)
    assert isinstance(model.get_submodule(first), SparseLinear)  # the model itself stays


def test_inputs_of_ones_own():
    config = ViTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48, image_size=8,
                       patch_size=4)  # fmt: skip
    torch.manual_seed(0)
    model = ViTModel(config).eval()
    last = [module for module in model.modules() if isinstance(module, nn.Linear) and module.in_features == 48]
    zero(last[0], columns=range(20))
    with pytest.raises(ValueError, match="ViTModel does not run on .* give it inputs"):
        shrink(model)
    pixels = torch.randn(2, 3, 8, 8)
    smaller = shrink(model, {"pixel_values": pixels})
    assert smaller.config.intermediate_size == 28
    with torch.no_grad():
        torch.testing.assert_close(smaller(pixels)[0], model(pixels)[0])


def test_the_stored_tensors_are_small(tmp_path):
    model = prune(prune(fresh("llama"), "neuron"), "head")
    shrink(model).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    assert tensors["model.layers.1.mlp.down_proj.weight"].shape == (64, 48)
    assert tensors["model.layers.1.self_attn.q_proj.weight"].shape == (32, 64)
    assert not any((tensor == 0).all(0).any() for name, tensor in tensors.items() if "down_proj" in name)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    assert torch.equal(logits(type(model).from_pretrained(tmp_path).eval()), logits(shrink(model)))
