"""gpu/product and sparse/gpu_serving: products with a weight in tiles are those of float64."""

import copy

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from peft_pst import accelerate_sparse, densify
from peft_pst.sparse import acceleration, gpu_serving, operations, serving
from peft_pst.sparse.linear import SparseLinear

TOLERANCES = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}


@pytest.fixture(autouse=True)
def no_kernels_for_a_cpu(monkeypatch):
    monkeypatch.setattr(serving, "HAS_KERNELS", False)


def sparse_layer(out, size, density, dtype=torch.float32, conv1d=False, bias=True):
    linear = Conv1D(out, size) if conv1d else nn.Linear(size, out, bias=bias)
    if conv1d:
        nn.init.normal_(linear.bias)
    linear = linear.to(dtype).requires_grad_(False)
    linear.weight.masked_fill_(torch.rand(linear.weight.shape) >= density, 0)
    return linear


def expected(linear, x):
    weight = linear.weight.T if isinstance(linear, Conv1D) else linear.weight
    y = x.cpu().double() @ weight.double().T
    return y if linear.bias is None else y + linear.bias.double()


def check(found, truth, dtype):
    assert found.dtype == dtype and found.shape == truth.shape
    assert (found.cpu().double() - truth).norm() <= TOLERANCES[dtype] * truth.norm()


LAYERS = {
    "tiles as they are stored": ((24, 512, 0.05), {}),
    "one entry a row": ((9, 256, 0.004), {}),
    "rows of no whole tiles": ((7, 700, 0.05), {}),
    "bitmask": ((10, 300, 0.4), {}),
    "full tiles": ((5, 512, 1.0), {}),
    "no bias": ((8, 512, 0.1), {"bias": False}),
    "Conv1D": ((24, 512, 0.05), {"conv1d": True}),
    "bf16": ((24, 512, 0.05), {"dtype": torch.bfloat16}),
}


@pytest.mark.parametrize("name", LAYERS)
def test_products(device, name):
    (out, size, density), choices = LAYERS[name]
    linear = sparse_layer(out, size, density, **choices)
    sparse = SparseLinear.from_linear(linear).to(device)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for tokens in (1, 3, 16, 17):
            x = torch.randn(tokens, size).to(device, dtype)
            check(sparse(x), expected(linear, x), dtype)
    assert sparse(x[None, :4]).shape == (1, 4, out) and sparse(x[:0]).shape == (0, out)
    assert torch.equal(sparse(x), sparse(x))


def test_stored_tiles_are_not_copied(device):
    sparse = SparseLinear.from_linear(sparse_layer(24, 512, 0.05)).to(device)
    assert sparse.description.codec == "tiles"
    found = gpu_serving.in_tiles(sparse)
    assert found.values.data_ptr() == sparse.weight_values.data_ptr()
    assert found.indices.data_ptr() == sparse.weight_indices.data_ptr()
    assert gpu_serving.in_tiles(sparse) is found


@pytest.mark.parametrize("density", [0.5, 0.2, 0.1, 0.05])
def test_tiles_are_read_in_one_turn(density):
    linear = sparse_layer(64, 4096, density)
    tiles = gpu_serving.in_tiles(SparseLinear.from_linear(linear))
    together = tiles.offsets.diff().view(-1, tiles.slots).amax(1)
    assert (together <= tiles.width).float().mean() > 0.95


def test_int8_values(device):
    linear = sparse_layer(16, 512, 0.1)
    sparse = SparseLinear.from_linear(linear, values="int8").to(device)
    x = torch.randn(2, 512, device=device)
    torch.testing.assert_close(sparse(x).cpu(), sparse.plain(x).cpu(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("tokens", [2, 20])
def test_gradients(device, tokens):
    linear = sparse_layer(24, 512, 0.1).requires_grad_()
    sparse = SparseLinear.from_linear(linear).to(device)
    x = torch.randn(tokens, 512, device=device, requires_grad=True)
    y = sparse(x)
    dy = torch.randn(y.shape, device=device)
    y.backward(dy)
    dx = dy.cpu().double() @ linear.weight.detach().double()
    check(x.grad, dx, torch.float32)
    torch.testing.assert_close(sparse.bias.grad.cpu(), dy.sum(0).cpu())


@pytest.mark.parametrize("tokens", [2, 20])
def test_a_graph_has_no_break(device, tokens):
    linear = sparse_layer(24, 512, 0.05)
    sparse = SparseLinear.from_linear(linear).to(device).requires_grad_(False)
    compiled = torch.compile(sparse, backend="aot_eager", fullgraph=True)
    x = torch.randn(tokens, 512, device=device)
    check(compiled(x), expected(linear, x), torch.float32)


def test_a_graph_finds_the_tiles_made(device, monkeypatch):
    sparse = SparseLinear.from_linear(sparse_layer(24, 512, 0.4)).to(device).requires_grad_(False)
    found, run = [], operations.product
    monkeypatch.setattr(operations, "product", lambda layer, x: found.append(layer._tiles) or run(layer, x))
    torch.compile(sparse, backend="aot_eager", fullgraph=True)(torch.randn(2, 512, device=device))
    assert found == [sparse._tiles] and sparse._tiles is not None


def test_autocast_decides_the_dtype(device):
    sparse = SparseLinear.from_linear(sparse_layer(24, 512, 0.1)).to(device)
    for tokens in (2, 20):
        with torch.autocast(device.type, dtype=torch.bfloat16), torch.no_grad():
            assert sparse(torch.randn(tokens, 512, device=device)).dtype == torch.bfloat16


def test_a_changed_weight_is_read_again(device):
    sparse = SparseLinear.from_linear(sparse_layer(24, 512, 0.05)).to(device)
    other = SparseLinear.from_linear(sparse_layer(24, 512, 0.05, bias=True)).to(device)
    x = torch.randn(2, 512, device=device)
    sparse(x)
    # as many values in each tile, other ones
    sparse.load_state_dict({**sparse.state_dict(), "weight_values": -sparse.weight_values, "bias": 0 * sparse.bias})
    torch.testing.assert_close(sparse(x), sparse.plain(x), rtol=1e-5, atol=1e-6)
    other.weight_counts[0] += 1
    with pytest.raises(ValueError, match=r"tiles say \d+ values, but it has \d+ indices.*Download or save"):
        other(x)


def test_tiles_that_are_not_those_of_the_shape_are_refused(device):
    whole = SparseLinear.from_linear(sparse_layer(512, 512, 0.05)).to(device)
    row = SparseLinear.from_linear(sparse_layer(1, 512, 0.05)).to(device)
    broken = SparseLinear(whole.description, row.parts, None)
    with pytest.raises(ValueError, match=r"its shape has 1024 tiles, but it counts those of 2\. Download or save"):
        gpu_serving.in_tiles(broken)


def test_a_whole_model(device, monkeypatch):
    monkeypatch.setattr(acceleration, "HAS_KERNELS", False)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4, vocab_size=99
    )
    model = LlamaForCausalLM(config).eval().to(device)
    with torch.no_grad():
        for parameter in model.model.layers.parameters():
            parameter.masked_fill_(torch.rand_like(parameter) > 0.1, 0)
    tokens = torch.randint(0, 99, (1, 5), device=device)
    expected = model(tokens).logits
    sparse = accelerate_sparse(copy.deepcopy(model))
    assert sum(isinstance(module, SparseLinear) for module in sparse.modules()) == 7
    torch.testing.assert_close(sparse(tokens).logits, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(densify(sparse)(tokens).logits, expected, rtol=0, atol=0)
