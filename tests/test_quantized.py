"""Adapters over base weights that bitsandbytes or torchao hold in 8 or 4 bits."""

import copy
import warnings

import pytest
import torch
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training
from reference import FACTORS, plain_pst
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, GPT2Config, LlamaConfig, TorchAoConfig
from transformers.pytorch_utils import Conv1D

import peft_pst
from peft_pst import PSTConfig, PSTLayer
from peft_pst.quantized import is_quantized

bnb = pytest.importorskip("bitsandbytes")
torchao = pytest.importorskip("torchao.quantization")

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*autograd kernel was not registered", "ignore:.*starts with the same", "ignore:.*use_reentrant"
)

OUT, IN = 96, 128


def four_bits(quant_type, nested=False):
    def quantize(linear):
        layer = bnb.nn.Linear4bit(linear.in_features, linear.out_features, compute_dtype=torch.float32)
        layer.weight = bnb.nn.Params4bit(
            linear.weight.data, quant_type=quant_type, compress_statistics=nested, module=layer
        ).to("cpu")
        layer.bias = linear.bias
        return layer

    return quantize


def eight_bits(linear):
    layer = bnb.nn.Linear8bitLt(linear.in_features, linear.out_features, has_fp16_weights=False)
    layer.load_state_dict(linear.state_dict())
    return layer.to("cpu")


def by_torchao(config):
    def quantize(linear):
        model = nn.Sequential(linear)
        torchao.quantize_(model, config())
        return model[0]

    return quantize


KINDS = {
    "nf4": four_bits("nf4"),
    "nf4 nested": four_bits("nf4", nested=True),
    "fp4": four_bits("fp4"),
    "bnb int8": eight_bits,
    "torchao int8": by_torchao(torchao.Int8WeightOnlyConfig),
    "torchao float8": by_torchao(torchao.Float8WeightOnlyConfig),
    "torchao intx": by_torchao(torchao.IntxWeightOnlyConfig),
}


def linear(seed=0):
    torch.manual_seed(seed)
    layer = nn.Linear(IN, OUT)
    nn.init.normal_(layer.bias)
    return layer


def dense_weight(layer):
    """The weight that a quantized layer stands for, without PEFT."""
    if isinstance(layer, bnb.nn.Linear8bitLt):
        scales = layer.weight.SCB if layer.weight.SCB is not None else layer.state.SCB
        return layer.weight.data.float() * scales[:, None] / 127
    if isinstance(layer, bnb.nn.Linear4bit):
        return bnb.functional.dequantize_4bit(layer.weight.data, copy.deepcopy(layer.weight.quant_state))
    return layer.weight.dequantize()


def adapted(*layers, **config):
    config = {"sparsity": 0.9, "initial_sparsity": 0.7, "init_weights": False, **config}
    torch.manual_seed(1)
    return get_peft_model(
        nn.Sequential(*layers), PSTConfig(target_modules=[str(i) for i in range(len(layers))], **config)
    )


def layers_of(model):
    return [module for module in model.modules() if isinstance(module, PSTLayer)]


def twins(kind, **config):
    """An adapter over a quantized layer, and the same one over a plain layer that holds the dequantized weight."""
    quantized = KINDS[kind](linear())
    plain = linear()
    plain.weight.data = dense_weight(quantized).clone()
    return adapted(quantized, **config), adapted(plain, **config)


def step(model, x):
    """The output, and the gradients of a loss by every trained parameter and by x."""
    x = x.clone().requires_grad_()
    model.zero_grad()
    torch.manual_seed(2)
    y = model(x)
    (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
    trained = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    return y.detach(), x.grad, *[trained[name] for name in sorted(trained)]


@pytest.mark.parametrize("kind", KINDS)
def test_output_and_gradients_are_those_of_the_formula_over_the_dequantized_weight(kind):
    base = KINDS[kind](linear())
    model = adapted(base).train()
    assert type(layers_of(model)[0].get_base_layer()) is type(base)
    x = torch.randn(5, IN)
    y, dx, *_ = step(model, x)
    (layer,) = layers_of(model)
    factors = [f.detach().double().requires_grad_() for f in layer.arguments("default")]
    x64 = x.double().requires_grad_()
    expected = plain_pst(x64, base.bias.double(), layer.num_pruned, dense_weight(base).double(), *factors)
    (expected * torch.linspace(-1, 1, expected.numel()).view_as(expected)).sum().backward()
    torch.testing.assert_close(y.double(), expected.detach(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(dx.double(), x64.grad, rtol=1e-4, atol=1e-4)
    for name, factor in zip(FACTORS, factors, strict=True):
        torch.testing.assert_close(getattr(layer, name)["default"].grad.double(), factor.grad, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        for _ in range(2):  # the second time from what the first one keeps
            torch.testing.assert_close(model.eval()(x).double(), expected.detach(), rtol=1e-4, atol=1e-4)


METHODS = {
    "full, movement": {"update": "full", "importance": "movement"},
    "l0": {"importance": "l0"},
    "wanda": {"update": "none", "importance": "wanda", "initial_sparsity": 0.0},
    "global": {"budget": "global"},
    "interval": {"mask_interval": 3},
    "2:4": {"pattern": "2:4", "sparsity": 0.5, "initial_sparsity": 0.5},
}


@pytest.mark.parametrize("kind", ["nf4", "bnb int8", "torchao int8"])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_selects_and_trains_as_over_the_dequantized_weight(kind, method):
    quantized, plain = twins(kind, **METHODS[method])
    x = torch.randn(7, IN)
    for model in (quantized, plain):
        if "wanda" in method:
            peft_pst.calibrate(model, [x])
        model.base_model.set_sparsity(METHODS[method].get("sparsity", 0.8))
    (layer,), (expected,) = layers_of(quantized), layers_of(plain)
    assert layer.num_pruned == expected.num_pruned > 0
    weight, truth = layer.masked_weight("default"), expected.masked_weight("default")
    assert torch.equal(weight == 0, truth == 0)
    torch.testing.assert_close(weight, truth)
    for mode in (True, False):
        torch.manual_seed(3)
        results = step(quantized.train(mode), x)
        torch.manual_seed(3)
        for result, truth in zip(results, step(plain.train(mode), x), strict=True):
            torch.testing.assert_close(result, truth, rtol=1e-5, atol=1e-5)


def allocated(run):
    """The bytes that a function allocates and does not free, and its result."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = run()
    return sum(event.self_device_memory_usage + event.self_cpu_memory_usage for event in profile.events()), result


@pytest.mark.parametrize("kind", ["nf4", "bnb int8", "torchao int8"])
@pytest.mark.parametrize("mode", ["training", "evaluation", "evaluation with gradients"])
def test_no_dense_weight_is_kept(kind, mode, monkeypatch):
    layers = [KINDS[kind](nn.Linear(256, 256)) for _ in range(4)]
    model = adapted(*layers).train(mode == "training")
    if mode == "evaluation with gradients":
        model.requires_grad_(False)
    alive, most = [], 0
    read = PSTLayer.frozen_weight

    def count(layer):
        nonlocal most
        weight = read(layer)
        alive.append(StorageWeakRef(weight.untyped_storage()))
        most = max(most, sum(not ref.expired() for ref in alive))
        return weight

    monkeypatch.setattr(PSTLayer, "frozen_weight", count)
    x = torch.randn(2, 256, requires_grad=True)
    with torch.set_grad_enabled(mode != "evaluation"):
        model(x)  # checks the fingerprints
        model.train(model.training)  # forgets what evaluation keeps
        kept, y = allocated(lambda: model(x))
    assert alive and most == 1 and all(ref.expired() for ref in alive)
    assert kept < 256 * 256 * 4  # less than one dense weight, of four layers
    if mode != "evaluation":
        y.sum().backward()
        assert most == 1 and all(ref.expired() for ref in alive)


@pytest.mark.skipif(not bnb.functional.has_avx512bf16(), reason="bitsandbytes reorders weights on CPUs with bf16 only")
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("saved", [False, True])
def test_a_weight_that_the_cpu_kernel_has_reordered_is_read(nested, saved):
    base = four_bits("nf4", nested)(linear())
    expected = dense_weight(base)
    with torch.no_grad():
        base.eval()(torch.randn(3, IN))
    assert base.weight.quant_state.packing_format_for_cpu
    if saved:
        base.state_dict()
    (layer,) = layers_of(adapted(base))
    # the scales are rounded to bfloat16, and if they are held in 8 bits, to those once more
    torch.testing.assert_close(layer.frozen_weight(), expected, rtol=2**-6 if nested else 2**-8, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_the_free_teacher_is_the_base_model_and_leaves_it_as_it_is(kind):
    base = KINDS[kind](linear())
    model, x = adapted(base).eval(), torch.randn(3, IN)
    before = layers_of(model)[0].frozen_weight().clone()
    with torch.no_grad(), model.disable_adapter():
        y = model(x)
    torch.testing.assert_close(y, nn.functional.linear(x, before, base.bias), rtol=0, atol=0.05)
    assert torch.equal(layers_of(model)[0].frozen_weight(), before)


@pytest.mark.parametrize("kind", KINDS)
def test_merge_gives_a_plain_layer_with_exact_zeros_and_unmerge_the_quantized_one(kind):
    base = KINDS[kind](linear())
    model, x = adapted(base).eval(), torch.randn(3, IN)
    (layer,) = layers_of(model)
    with torch.no_grad():
        before, weight = model(x), dense_weight(base).clone()
        for _ in range(2):
            model.merge_adapter(safe_merge=True)
            assert type(layer.get_base_layer()) is nn.Linear
            torch.testing.assert_close(model(x), before, rtol=1e-5, atol=1e-5)
            model.unmerge_adapter()
            assert layer.get_base_layer() is base and torch.equal(dense_weight(base), weight)
            assert torch.equal(model(x), before)
        num_pruned = layer.num_pruned
        merged = model.merge_and_unload()[0]
    zeros = merged.weight[merged.weight == 0]
    assert type(merged) is nn.Linear and zeros.numel() == num_pruned and not zeros.signbit().any()


def test_a_merged_layer_is_in_the_dtype_of_the_model():
    model = nn.Sequential(nn.LayerNorm(IN, dtype=torch.bfloat16), KINDS["nf4"](linear()))
    model = get_peft_model(model, PSTConfig(target_modules=["1"])).eval()
    merged = model.merge_and_unload()
    assert merged[1].weight.dtype == merged[1].bias.dtype == torch.bfloat16
    merged(torch.randn(2, IN, dtype=torch.bfloat16))


LOADS = {
    "nf4": lambda: BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True),
    "bnb int8": lambda: BitsAndBytesConfig(load_in_8bit=True),
    "torchao int8": lambda: TorchAoConfig(torchao.Int8WeightOnlyConfig()),
}
LLAMA = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Unquantized checkpoints by model type; `other` is `llama` with other weights."""
    folder = tmp_path_factory.mktemp("bases")
    llama = LlamaConfig(vocab_size=99, num_hidden_layers=2, **LLAMA)
    gpt2 = GPT2Config(vocab_size=99, n_embd=64, n_layer=2, n_head=4, n_positions=32)
    for seed, (name, config) in enumerate({"llama": llama, "other": llama, "gpt2": gpt2}.items()):
        torch.manual_seed(seed)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder / name)
    return folder


def load(folder, kind):
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=LOADS[kind](), dtype=torch.float32)
    return prepare_model_for_kbit_training(model)


def train(model, optimizer, tokens, steps=2):
    model.train()
    for _ in range(steps):
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return loss.item()


def adam(model):
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)


def logits(model, tokens):
    with torch.no_grad():
        return model.eval()(input_ids=tokens).logits.float()


@pytest.mark.parametrize("kind", LOADS)
def test_train_save_resume_merge_save_and_open(kind, folders, tokens, tmp_path):
    model = get_peft_model(load(folders / "llama", kind), PSTConfig(task_type="CAUSAL_LM"))
    assert len(layers_of(model)) == 14 and all(is_quantized(layer.get_base_layer()) for layer in layers_of(model))
    assert all(".pst_" in name for name, p in model.named_parameters() if p.requires_grad)
    base = logits(model, tokens)
    optimizer = adam(model)
    for sparsity in (0.3, 0.6):
        model.base_model.set_sparsity(sparsity)
        train(model, optimizer, tokens)
    trained = logits(model, tokens)
    assert not torch.allclose(trained, base, atol=1e-2)
    model.save_pretrained(tmp_path / "adapter")

    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        resumed = PeftModel.from_pretrained(load(folders / "llama", kind), tmp_path / "adapter", is_trainable=True)
        assert torch.equal(logits(resumed, tokens), trained)
    restored = adam(resumed)
    restored.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert train(resumed, restored, tokens) == train(model, optimizer, tokens)

    expected, pruned = (
        logits(resumed, tokens),
        {n: m.num_pruned for n, m in resumed.named_modules() if isinstance(m, PSTLayer)},
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        merged = resumed.merge_and_unload()
    for name, num_pruned in pruned.items():
        weight = merged.get_submodule(name.removeprefix("base_model.model.")).weight
        assert type(weight) is nn.Parameter and weight.dtype == torch.float32
        assert int((weight == 0).sum()) == num_pruned > 0
    torch.testing.assert_close(logits(merged, tokens), expected, rtol=1e-4, atol=1e-4)
    for format in ("auto", "dense"):
        peft_pst.save_pretrained(merged, tmp_path / format, format)
        opened = AutoModelForCausalLM.from_pretrained(tmp_path / format)
        torch.testing.assert_close(logits(opened, tokens), logits(merged, tokens), rtol=1e-5, atol=1e-5)
    assert not hasattr(opened, "quantization_method") and not hasattr(opened.config, "quantization_config")
    merged.to(torch.bfloat16)  # transformers refuses to cast what it believes to be quantized


def test_another_base_model_is_noticed(folders, tokens, tmp_path):
    get_peft_model(load(folders / "llama", "nf4"), PSTConfig()).save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(load(folders / "other", "nf4"), tmp_path)
    with pytest.warns(UserWarning, match="trained on another base model"):
        logits(model, tokens)


@pytest.mark.filterwarnings("ignore:.*quantized layers without an adapter")
@pytest.mark.parametrize("pattern", ["neuron", "head"])
@pytest.mark.parametrize("kind", LOADS)
def test_coupled_patterns_prune_the_same_units_of_each_partner(kind, pattern, folders, tokens):
    model = get_peft_model(load(folders / "llama", kind), PSTConfig(pattern=pattern, sparsity=0.5))
    model.base_model.set_sparsity(0.5)
    train(model, adam(model), tokens)
    merged = model.merge_and_unload()
    block = merged.model.layers[1]
    if pattern == "neuron":
        dead = [block.mlp.up_proj.weight.eq(0).all(1), block.mlp.gate_proj.weight.eq(0).all(1)]
        dead.append(block.mlp.down_proj.weight.eq(0).all(0))
    else:
        dead = [block.self_attn.q_proj.weight.eq(0).all(1), block.self_attn.o_proj.weight.eq(0).all(0)]
    assert dead[0].sum() == len(dead[0]) // 2 and all(torch.equal(dead[0], other) for other in dead)


@pytest.mark.parametrize("kind", ["nf4", "bnb int8"])
def test_gpt2_gets_its_conv1d_back(kind, folders, tokens, tmp_path):
    model = get_peft_model(load(folders / "gpt2", kind), PSTConfig(task_type="CAUSAL_LM", initial_sparsity=0.5))
    expected = logits(model, tokens)
    merged = model.merge_and_unload()
    assert type(merged.transformer.h[0].mlp.c_fc) is Conv1D
    torch.testing.assert_close(logits(merged, tokens), expected, rtol=1e-4, atol=1e-4)
    peft_pst.save_pretrained(merged, tmp_path)
    opened = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(logits(opened, tokens), logits(merged, tokens), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", LOADS)
def test_layers_without_an_adapter_are_dequantized_at_the_merge_too(kind, folders, tokens, tmp_path):
    model = get_peft_model(load(folders / "llama", kind), PSTConfig(target_modules=["up_proj"], initial_sparsity=0.5))
    expected = logits(model, tokens)
    with pytest.warns(UserWarning, match="12 quantized layers without an adapter, such as model.layers.0.self_attn"):
        merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged, tokens), expected, rtol=0, atol=0.05)
    peft_pst.save_pretrained(merged, tmp_path)
    opened = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(logits(opened, tokens), logits(merged, tokens), rtol=1e-5, atol=1e-5)


def test_unload_gives_the_quantized_model_back(folders, tokens):
    model = load(folders / "llama", "nf4")
    before = {name: dense_weight(module) for name, module in model.named_modules() if is_quantized(module)}
    model = get_peft_model(model, PSTConfig(initial_sparsity=0.5))
    logits(model, tokens)
    unloaded = model.unload()
    assert all(torch.equal(dense_weight(unloaded.get_submodule(name)), weight) for name, weight in before.items())
    assert unloaded.config.quantization_config.load_in_4bit


def test_a_copy_stands_for_itself():
    model = adapted(KINDS["nf4"](linear())).eval()
    x = torch.randn(2, IN)
    with torch.no_grad():
        expected = model(x)
        again = copy.deepcopy(model)
        model.merge_adapter()
        merged = copy.deepcopy(model)
        assert torch.equal(again(x), expected)
        merged.unmerge_adapter()
        assert torch.equal(merged(x), expected)


def test_the_cached_mask_follows_the_factors_and_the_base():
    model = adapted(KINDS["torchao int8"](linear())).eval()
    (layer,), x = layers_of(model), torch.randn(2, IN)
    with torch.no_grad():
        before = model(x)
        other = KINDS["torchao int8"](linear(seed=5)).weight
        changes = [
            lambda: layer.pst_R["default"].data.copy_(torch.linspace(-1, 1, OUT)),
            lambda: setattr(layer.get_base_layer(), "weight", nn.Parameter(other, requires_grad=False)),
        ]
        for change in changes:
            change()
            y = model(x)
            assert not torch.allclose(y, before)
            assert torch.equal(y, model.train().eval()(x))  # where nothing is cached
            before = y


def test_an_adapter_can_be_added_while_another_is_merged():
    model = adapted(KINDS["nf4"](linear())).eval()
    model.merge_adapter()
    model.add_adapter("second", PSTConfig(target_modules=["0"]))
    assert type(model.merge_and_unload()[0]) is nn.Linear


class HQQLinear(nn.Module):
    """By name and shape like HQQ's: no PyTorch layer."""

    in_features, out_features = IN, OUT


def refusals():
    unquantized = bnb.nn.Linear4bit(IN, OUT)
    kept_in_16 = bnb.nn.Linear8bitLt(IN, OUT, has_fp16_weights=True)
    activations = by_torchao(torchao.Int8DynamicActivationInt8WeightConfig)(linear())
    return {
        "not quantized yet": (
            unquantized,
            "Linear4bit with a Params4bit of torch.float32, which is not quantized yet",
        ),
        "fp16 weights": (kept_in_16, "Linear8bitLt .* load it without llm_int8_has_fp16_weight=True"),
        "activations": (activations, "Linear with a Int8Tensor that quantizes activations too.*Int8WeightOnlyConfig"),
        "hqq": (HQQLinear(), "is a HQQLinear, but PST prunes .*bitsandbytes or torchao, no other library"),
    }


@pytest.mark.parametrize("case", ["not quantized yet", "fp16 weights", "activations", "hqq"])
def test_what_cannot_work_is_refused_when_the_adapter_is_made(case):
    layer, message = refusals()[case]
    with pytest.raises(TypeError, match=f"(?s)target module '0' is a {message}|'0' {message}"):
        adapted(layer)


def test_a_weight_that_cannot_be_dequantized_is_refused(monkeypatch):
    layer = KINDS["torchao int8"](linear())

    def dequantize(self):
        raise NotImplementedError

    monkeypatch.setattr(type(layer.weight), "dequantize", dequantize)
    with pytest.raises(TypeError, match="Int8Tensor, which torchao cannot dequantize"):
        adapted(layer)


def test_a_model_of_another_library_is_refused_by_its_name():
    model = nn.Module()
    model.layers = nn.ModuleList([nn.ModuleDict({"proj": HQQLinear()})])
    model.quantization_method = "hqq"
    with pytest.raises(TypeError, match=r"are quantized by hqq, and PST.*only for bitsandbytes"):
        get_peft_model(model, PSTConfig())


def test_products_run_in_the_compute_dtype_of_a_4_bit_layer():
    base = KINDS["nf4"](linear())
    base.compute_dtype = torch.bfloat16
    model, x = adapted(base).train(), torch.randn(3, IN)
    weight = layers_of(model)[0].masked_weight("default")
    expected = nn.functional.linear(x.bfloat16(), weight.bfloat16(), base.bias.bfloat16()).float()
    for mode in (True, False):
        with torch.set_grad_enabled(mode):
            y = model.train(mode)(x)
        assert y.dtype == torch.float32 and torch.equal(y.detach(), expected)
