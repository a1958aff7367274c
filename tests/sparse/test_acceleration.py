"""Whole models on the kernels."""

import copy
import pickle

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
)

from peft_pst import PSTConfig, SparseLinear, accelerate_sparse, densify, save_pretrained, tensor_sparsity
from peft_pst.sparse import serving
from peft_pst.sparse.feed_forward import FeedForward

pytest.importorskip("numba", reason="the kernels need the extra peft-pst[cpu]")

SIZES = {"vocab_size": 99, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
MODELS = {
    "bert": (AutoModelForSequenceClassification, {**SIZES, "intermediate_size": 144}),
    "roberta": (AutoModelForSequenceClassification, {**SIZES, "intermediate_size": 144, "hidden_act": "gelu_new"}),
    "gpt2": (AutoModelForCausalLM, {"vocab_size": 99, "n_embd": 64, "n_layer": 2, "n_head": 4}),
    "llama": (AutoModelForCausalLM, {**SIZES, "intermediate_size": 144, "num_key_value_heads": 2}),
    "gemma": (AutoModelForCausalLM, {**SIZES, "intermediate_size": 144, "num_key_value_heads": 2, "head_dim": 16}),
    "opt": (AutoModelForCausalLM, {**SIZES, "ffn_dim": 144, "word_embed_proj_dim": 64}),
    "phi": (AutoModelForCausalLM, {**SIZES, "intermediate_size": 144}),
    "t5": (AutoModelForSeq2SeqLM, {"vocab_size": 99, "d_model": 64, "d_kv": 16, "d_ff": 144, "num_heads": 4}),
    "t5-gated": (
        AutoModelForSeq2SeqLM,
        {"vocab_size": 99, "d_model": 64, "d_kv": 16, "d_ff": 144, "num_heads": 4, "feed_forward_proj": "gated-gelu"},
    ),
}
FUSED = {"bert": 2, "roberta": 2, "gpt2": 2, "llama": 2, "gemma": 2, "opt": 0, "phi": 2, "t5": 12, "t5-gated": 12}
TOKENS = torch.arange(2, 30).view(2, 14)


def merged(model_type, sparsity=0.9):
    torch.manual_seed(0)
    auto, config = MODELS[model_type]
    model = auto.from_config(
        AutoConfig.for_model(model_type.partition("-")[0], pad_token_id=0, decoder_start_token_id=0, **config)
    )
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.1)
    return get_peft_model(model, PSTConfig(initial_sparsity=sparsity, sparsity=0.95)).merge_and_unload().eval()


def logits(model, tokens=TOKENS):
    extra = {"decoder_input_ids": tokens} if model.config.is_encoder_decoder else {}
    with torch.inference_mode():
        return model(input_ids=tokens, **extra).logits


@pytest.fixture
def by_kernel(monkeypatch):
    """Every sparse product goes to the kernels, however small, and is counted: the layers that a call of them has."""
    from peft_pst.sparse.kernels.layer import Layer

    calls = []
    compute = Layer.__call__

    def call(self, x):
        calls.append(sum(weight is not None for weight in self._made_from[:3]))
        return compute(self, x)

    monkeypatch.setattr(Layer, "__call__", call)
    monkeypatch.setattr(serving.Served, "runs_by_kernel", lambda self, tokens: True)
    return calls


@pytest.mark.parametrize("model_type", MODELS)
def test_computes_the_same(model_type, by_kernel):
    model = merged(model_type)
    expected, targets = logits(model), [row.name for row in tensor_sparsity(model) if row.sparsity > 0.5]
    fast = copy.deepcopy(model)
    assert accelerate_sparse(fast) is fast
    assert [name for name, module in fast.named_modules() if isinstance(module, SparseLinear)] == targets
    assert sum(isinstance(f, FeedForward) for m in fast.modules() for f in vars(m).values()) == FUSED[model_type]
    by_kernel.clear()
    torch.testing.assert_close(logits(fast), expected)
    in_blocks = 3 if model_type in ("llama", "gemma", "t5-gated") else 2
    assert len([call for call in by_kernel if call == in_blocks]) == FUSED[model_type]
    if model_type != "t5" and model_type != "t5-gated":
        assert sum(by_kernel) == len(targets)
    dense = densify(fast)
    assert not any(isinstance(f, FeedForward) for m in dense.modules() for f in vars(m).values())
    assert torch.equal(logits(dense), expected)


@pytest.mark.parametrize("model_type", ["gpt2", "llama", "t5"])
def test_generates_the_same_with_its_cache(model_type, by_kernel):
    model = merged(model_type)
    fast = accelerate_sparse(copy.deepcopy(model))
    arguments = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    by_kernel.clear()
    found, expected = (one.generate(TOKENS[:1], **arguments) for one in (fast, model))
    assert torch.equal(found, expected) and by_kernel


@pytest.mark.parametrize("model_type", ["bert", "llama"])
def test_a_checkpoint_opens_on_the_kernels(model_type, by_kernel, tmp_path):
    model = merged(model_type)
    save_pretrained(model, tmp_path)
    opened = type(model).from_pretrained(tmp_path)
    by_kernel.clear()
    torch.testing.assert_close(logits(opened), logits(model))
    assert len(by_kernel) == {"bert": 10, "llama": 10}[model_type]
    save_pretrained(opened, tmp_path / "again")
    assert torch.equal(logits(densify(type(model).from_pretrained(tmp_path / "again"))), logits(model))


@pytest.mark.parametrize("journey", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
@pytest.mark.parametrize("model_type", ["bert", "llama"])
def test_copies(model_type, journey, by_kernel):
    fast = accelerate_sparse(merged(model_type))
    expected = logits(fast)
    again = journey(fast)
    for module in fast.modules():
        if isinstance(module, SparseLinear):
            module.weight_values.zero_()
            module._served = None
    by_kernel.clear()
    torch.testing.assert_close(logits(again), expected)
    assert max(by_kernel) == (2 if model_type == "bert" else 3)
    assert not torch.allclose(logits(fast), expected)


def test_a_bias_that_changes_reaches_a_block(by_kernel):
    fast = accelerate_sparse(merged("bert"))
    before = logits(fast)
    with torch.no_grad():
        fast.bert.encoder.layer[0].intermediate.dense.bias += 1
    assert not torch.allclose(logits(fast), before)
    torch.testing.assert_close(logits(fast), logits(densify(copy.deepcopy(fast))))


@pytest.mark.parametrize("name", ["intermediate", "intermediate.dense", "output.dense"])
def test_a_hook_in_a_block_is_called(name, by_kernel):
    fast, seen = accelerate_sparse(merged("bert")), []
    block = fast.bert.encoder.layer[0]
    handle = block.get_submodule(name).register_forward_hook(lambda module, args, output: seen.append(output.shape))
    with torch.no_grad():
        expected = fast(TOKENS).logits
        assert len(seen) == 1
        handle.remove()
        torch.testing.assert_close(fast(TOKENS).logits, expected)
        assert len(seen) == 1


def test_a_layer_that_was_replaced_counts(by_kernel):
    fast = accelerate_sparse(merged("bert"))
    fast.bert.encoder.layer[0].intermediate.dense = nn.Linear(64, 144)
    watched = fast(TOKENS).logits
    with torch.no_grad():
        torch.testing.assert_close(fast(TOKENS).logits, watched)


def test_training_and_gradients_take_the_block_apart(by_kernel):
    fast = accelerate_sparse(merged("llama"))
    embeddings = torch.randn(1, 5, 64, requires_grad=True)
    by_kernel.clear()
    found = torch.autograd.grad(fast(inputs_embeds=embeddings).logits.sum(), embeddings)[0]
    assert set(by_kernel) == {1}
    torch.testing.assert_close(
        found, torch.autograd.grad(densify(fast)(inputs_embeds=embeddings).logits.sum(), embeddings)[0]
    )


def test_compile_a_whole_model(by_kernel):
    fast = accelerate_sparse(merged("bert"))
    torch._dynamo.reset()
    compiled = torch.compile(fast, backend="aot_eager")
    torch.testing.assert_close(logits(compiled), logits(fast))
    assert torch._dynamo.explain(fast)(TOKENS).graph_break_count == 0


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace.* is deprecated")
def test_trace_a_whole_model(by_kernel):
    model = merged("bert")
    model.config.return_dict = False
    fast = accelerate_sparse(copy.deepcopy(model))
    with torch.no_grad():
        traced = torch.jit.trace(fast, (TOKENS,), check_trace=False)
        torch.testing.assert_close(traced(TOKENS.flip(1)), model(TOKENS.flip(1)))


def test_a_large_layer_that_stays_dense_uses_the_faster_library(monkeypatch):
    from peft_pst import gemm
    from peft_pst.sparse.dense_product import DenseProduct

    monkeypatch.setattr(gemm, "prefers_onednn", lambda: True)
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 2**14), nn.Linear(2**14, 8))
    with torch.no_grad():
        model[0].weight.masked_fill_(torch.rand(64, 64) < 0.9, 0)
    x = torch.randn(3, 64, requires_grad=True)
    expected, grad = model(x), torch.autograd.grad(model(x).sum(), x)[0]
    accelerate_sparse(model)
    assert [isinstance(vars(module).get("forward"), DenseProduct) for module in model] == [False, True, False]
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected)
        torch.testing.assert_close(copy.deepcopy(model)(x), expected)
        tangent = torch.func.jvp(model, (x.detach(),), (torch.ones_like(x),))[1]
    torch.testing.assert_close(tangent, torch.func.jvp(densify(copy.deepcopy(model)), (x,), (torch.ones_like(x),))[1])
    torch.testing.assert_close(torch.autograd.grad(model(x).sum(), x)[0], grad)
    assert not any("forward" in vars(module) for module in densify(model))


class Residual(nn.Module):
    """Its layers have the names of a block, but it computes something else."""

    def __init__(self):
        super().__init__()
        self.fc1, self.fc2, self.activation_fn = nn.Linear(64, 96), nn.Linear(96, 64), nn.ReLU()

    def forward(self, x):
        return x + self.fc2(self.activation_fn(self.fc1(x)))


def test_a_block_that_computes_something_else_is_not_fused():
    block = Residual()
    with torch.no_grad():
        for linear in (block.fc1, block.fc2):
            linear.weight.masked_fill_(torch.rand(linear.weight.shape) < 0.9, 0)
    x = torch.randn(3, 64)
    expected = block(x)
    accelerate_sparse(block)
    assert isinstance(block.fc1, SparseLinear) and "forward" not in vars(block)
    with torch.no_grad():
        torch.testing.assert_close(block(x), expected)


def test_what_is_shared_or_dense_stays():
    model = merged("llama")
    model.lm_head.weight = model.model.embed_tokens.weight
    with torch.no_grad():
        model.lm_head.weight[5:] = 0
    accelerate_sparse(model)
    assert type(model.lm_head) is nn.Linear and model.lm_head.weight is model.model.embed_tokens.weight
    bert = merged("bert")
    accelerate_sparse(bert)
    assert type(bert.classifier) is nn.Linear


def test_what_cannot_be_accelerated():
    with pytest.raises(ValueError, match="has no linear layer with enough zeros .* at most 60% of its weights left"):
        accelerate_sparse(nn.Sequential(nn.Linear(64, 64)))
    with pytest.raises(ValueError, match=r"The model is on \['meta'\], which has no kernels: expected a CPU, or"):
        accelerate_sparse(nn.Linear(8, 8, device="meta"))
