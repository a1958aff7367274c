import copy
import pickle

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft_pst.sparse.linear import SparseLinear

BASES = {
    "Linear": lambda: nn.Linear(40, 24),
    "no bias": lambda: nn.Linear(40, 24, bias=False),
    "Conv1D": lambda: Conv1D(24, 40),
}


def pruned(kind, sparsity=0.9, dtype=torch.float32):
    linear = BASES[kind]().to(dtype)
    with torch.no_grad():
        linear.weight.masked_fill_(torch.rand(linear.weight.shape) < sparsity, 0)
    return linear


@pytest.mark.parametrize("sparsity", [0, 0.8, 0.99])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", BASES)
def test_computes_what_the_dense_layer_computes(kind, dtype, sparsity):
    linear = pruned(kind, sparsity, dtype)
    sparse = SparseLinear.from_linear(linear)
    assert torch.equal(sparse.weight, linear.weight) and sparse.weight.dtype == dtype
    assert (sparse.in_features, sparse.out_features) == (40, 24)
    x = torch.randn(3, 5, 40, dtype=dtype)
    torch.testing.assert_close(sparse(x), linear(x))
    again = sparse.to_linear()
    assert type(again) is type(linear) and torch.equal(again(x), linear(x))


def test_is_smaller_in_memory():
    sparse = SparseLinear.from_linear(nn.Linear(256, 256, bias=False))
    dense = sum(b.numel() * b.element_size() for b in sparse.buffers())
    linear = nn.Linear(256, 256, bias=False)
    with torch.no_grad():
        linear.weight.masked_fill_(torch.rand(256, 256) < 0.9, 0)
    kept = sum(b.numel() * b.element_size() for b in SparseLinear.from_linear(linear).buffers())
    assert dense == 4 * 256 * 256 and kept < 0.15 * dense


@pytest.mark.parametrize("journey", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
def test_copies_are_the_same(journey):
    sparse = SparseLinear.from_linear(pruned("Linear"))
    x = torch.randn(2, 40)
    assert torch.equal(journey(sparse)(x), sparse(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_cast_keeps_the_values_and_computes_in_the_dtype_of_the_input(dtype):
    sparse = SparseLinear.from_linear(pruned("Linear"))
    weight = sparse.weight.clone()
    sparse.to(dtype)
    assert torch.equal(sparse.weight, weight) and sparse.bias.dtype == dtype
    assert sparse(torch.randn(2, 40, dtype=dtype)).dtype == dtype


def test_the_state_dict_is_the_parts_and_the_bias():
    linear = pruned("Linear", sparsity=0.8)
    sparse = SparseLinear.from_linear(linear)
    state = sparse.state_dict()
    assert set(state) == {"weight_bits", "weight_values", "bias"}
    empty = SparseLinear(sparse.description, {n: torch.empty_like(getattr(sparse, f"weight_{n}"), device="meta")
                                              for n in sparse.part_names}, nn.Parameter(torch.zeros(24)))  # fmt: skip
    empty.load_state_dict(state, assign=True)
    assert torch.equal(empty.weight, linear.weight)


def test_the_bias_gets_a_gradient_and_the_input_too():
    sparse, x = SparseLinear.from_linear(pruned("Linear")), torch.randn(2, 40, requires_grad=True)
    sparse(x).sum().backward()
    torch.testing.assert_close(x.grad, sparse.weight.sum(0).expand(2, -1))
    assert sparse.bias.grad is not None


def test_what_is_no_linear_layer_is_named():
    with pytest.raises(
        TypeError, match=r"from_linear got a Embedding: expected torch.nn.Linear or transformers' Conv"
    ):
        SparseLinear.from_linear(nn.Embedding(3, 4))
