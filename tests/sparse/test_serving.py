"""A SparseLinear on a CPU, as its users call it."""

import copy
import pickle
import subprocess
import sys
import warnings

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from transformers.pytorch_utils import Conv1D

from peft_pst import SparseLinear
from peft_pst.sparse import operations, serving

pytest.importorskip("numba", reason="the kernels need the extra peft-pst[cpu]")


def pruned(out=160, size=192, sparsity=0.9, conv1d=False, bias=True):
    linear = Conv1D(out, size) if conv1d else nn.Linear(size, out, bias=bias)
    with torch.no_grad():
        linear.weight.masked_fill_(torch.rand(linear.weight.shape) < sparsity, 0)
        if linear.bias is not None:
            linear.bias.normal_()
    return linear.requires_grad_(False)


def reference(linear, x):
    weight = linear.weight.T if isinstance(linear, Conv1D) else linear.weight
    return nn.functional.linear(x.double(), weight.double(), None if linear.bias is None else linear.bias.double())


def error(y, expected):
    return float((y.double() - expected).abs().max() / expected.abs().max())


@pytest.fixture
def by_kernel(monkeypatch):
    """Every call goes to the kernels; how many did."""
    calls = []
    compute = serving.Served.forward

    def call(self, x):
        calls.append(x.shape)
        return compute(self, x)

    monkeypatch.setattr(serving.Served, "forward", call)
    monkeypatch.setattr(serving.Served, "runs_by_kernel", lambda self, tokens: True)
    return calls


@pytest.mark.parametrize("shape", [(1,), (3,), (2, 5), (2, 1, 9), (70,), (0,)])
@pytest.mark.parametrize("kind", ["Linear", "no bias", "Conv1D"])
def test_the_product(kind, shape, by_kernel):
    linear = pruned(conv1d=kind == "Conv1D", bias=kind != "no bias")
    x = torch.randn(*shape, 192)
    y = SparseLinear.from_linear(linear)(x)
    assert y.shape == (*shape, 160) and by_kernel
    assert not x.numel() or error(y, reference(linear, x)) < 1e-6


def test_what_no_kernel_is_faster_for_is_not_packed(monkeypatch):
    """As a head of a model in bf16, which is stored so in fp32 too: packed it would take several times the memory."""
    from peft_pst.sparse.kernels import layout

    packed = []
    pack = layout.pack
    monkeypatch.setattr(layout, "pack", lambda values, *args: packed.append(values.shape) or pack(values, *args))
    for sparsity in (0.0, 0.9):
        linear, x = pruned(out=768, size=769, sparsity=sparsity), torch.randn(3, 769)
        y = SparseLinear.from_linear(linear, values="bf16").eval()(x)
        assert error(y, reference(linear, x)) < 5e-3
        assert packed == ([] if sparsity == 0 else [(768, 769)])


@pytest.mark.parametrize("packed_in", [torch.no_grad, torch.inference_mode])
def test_the_bias_is_that_of_now(packed_in, by_kernel):
    x = torch.randn(3, 192)
    with packed_in():
        sparse = SparseLinear.from_linear(pruned())
        sparse(x)
    sparse.bias = nn.Parameter(torch.ones(160), requires_grad=False)
    product = sparse(x) - 1
    sparse.bias.data.add_(5)
    torch.testing.assert_close(sparse(x), product + 6)
    sparse.bias = None
    torch.testing.assert_close(sparse(x), product)
    sparse.bias = nn.Parameter(torch.full((160,), 2.0, dtype=torch.bfloat16), requires_grad=False)
    torch.testing.assert_close(sparse(x), product + 2)


@pytest.mark.parametrize("tokens", [1, 20])
@pytest.mark.parametrize("conv1d", [False, True])
@pytest.mark.parametrize(("values", "bound"), [("bf16", 5e-3), ("fp16", 1e-3), ("int8", 2e-2)])
def test_rounded_values(values, bound, conv1d, tokens, by_kernel):
    linear, x = pruned(sparsity=0.6, conv1d=conv1d), torch.randn(tokens, 192)
    sparse = SparseLinear.from_linear(linear, values=values)
    assert error(sparse(x), reference(linear, x)) < bound
    rounded = sparse.to_linear()
    assert error(sparse(x), reference(rounded, x)) < 1e-4


def test_compute_in_fp16(by_kernel):
    linear, x = pruned(), torch.randn(32, 192)
    serving._warn_of_no_half.cache_clear()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        sparse = SparseLinear.from_linear(linear, compute="fp16")
        assert error(sparse(x), reference(linear, x)) < 2e-3
        SparseLinear.from_linear(linear, compute="fp16")(x)
    from peft_pst.sparse.kernels.target import HAS_HALF

    assert sum("no AVX512-FP16" in str(one.message) for one in said) == (0 if HAS_HALF else 1)
    linear.weight[0, 0] = 1e6
    with pytest.raises(ValueError, match=r"compute='fp16' turns weights as large as 1e\+06 into infinities"):
        SparseLinear.from_linear(linear, compute="fp16")(x)
    with pytest.raises(ValueError, match="compute='int4' is unknown: expected one of"):
        SparseLinear.from_linear(linear, compute="int4")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_inputs_in_fewer_bits_are_computed_in_fp32(dtype, by_kernel):
    linear, x = pruned(), torch.randn(4, 192, dtype=dtype)
    y = SparseLinear.from_linear(linear)(x)
    assert y.dtype == dtype and torch.equal(y, SparseLinear.from_linear(linear)(x.float()).to(dtype))


STRIDED = {
    "every other": lambda x: x[:, ::2],
    "transposed": lambda x: x.T,
    "inner": lambda x: x[1:7, 5:197],
    "expanded": lambda x: x[:1].expand(6, -1),
}


@pytest.mark.parametrize("change", STRIDED.values(), ids=STRIDED)
def test_strides(change, by_kernel):
    x = change(torch.randn(384, 384))
    linear = pruned(size=x.shape[1])
    assert error(SparseLinear.from_linear(linear)(x), reference(linear, x)) < 1e-6


def test_gradients(by_kernel):
    linear = pruned()
    linear.bias.requires_grad_()
    x = torch.randn(2, 3, 192, requires_grad=True)
    sparse = SparseLinear.from_linear(linear)
    grad = torch.randn(2, 3, 160)
    found = torch.autograd.grad(sparse(x), (x, sparse.bias), grad)
    expected = torch.autograd.grad(linear(x), (x, linear.bias), grad)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
    assert by_kernel


def test_the_bias_may_change(by_kernel):
    linear, x = pruned(), torch.randn(2, 192)
    sparse = SparseLinear.from_linear(linear)
    before = sparse(x)
    sparse.bias += 1
    torch.testing.assert_close(sparse(x), before + 1)
    sparse.bias = nn.Parameter(torch.zeros(160))
    torch.testing.assert_close(sparse(x), x @ linear.weight.T)
    state = {**sparse.state_dict(), "weight_values": 2 * sparse.weight_values}
    for assign in (False, True):
        sparse.load_state_dict(state, assign=assign)
        torch.testing.assert_close(sparse(x), 2 * x @ linear.weight.T)


@pytest.mark.parametrize("journey", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
def test_copies_have_a_weight_of_their_own(journey, by_kernel):
    sparse, x = SparseLinear.from_linear(pruned()), torch.randn(2, 192)
    expected = sparse(x)
    again = journey(sparse)
    del sparse
    torch.testing.assert_close(again(x), expected)


def test_made_in_inference_mode(by_kernel):
    with torch.inference_mode():
        linear = pruned()
        sparse, x = SparseLinear.from_linear(copy.deepcopy(linear)), torch.randn(2, 192)
        assert error(sparse(x), reference(linear, x)) < 1e-6
    assert error(sparse(x), reference(linear, x)) < 1e-6


def test_a_dense_product_where_it_is_faster(monkeypatch):
    linear, x = pruned(sparsity=0.05), torch.randn(3, 192)
    sparse = SparseLinear.from_linear(linear)
    monkeypatch.setattr("peft_pst.sparse.kernels.layer.Layer.__call__", None)
    assert error(sparse(x), reference(linear, x)) < 1e-6


def test_the_choice_follows_the_table():
    from peft_pst.sparse.kernels.choice import COSTS, kernel_is_faster, row_of
    from peft_pst.sparse.kernels.layout import Kind, pack

    def packed(out, size, density):
        return pack(torch.randn(out, size) * (torch.rand(out, size) < density), Kind.FP32)

    assert [row_of(tokens) for tokens in (1, 2, 3, 4, 31, 32, 63, 64, 4096)] == [0, 1, 1, 2, 4, 5, 5, 6, 6]
    assert all(row_of(cost.tokens) == row for row, cost in enumerate(COSTS))
    assert kernel_is_faster(packed(768, 768, 0.1)) == [True] * len(COSTS)
    assert not any(kernel_is_faster(packed(32, 32, 0.1))[: row_of(8) + 1])
    assert not any(kernel_is_faster(packed(768, 768, 0.9)))


def test_a_wrong_input_is_named():
    with pytest.raises(ValueError, match=r"input has shape \(2, 7\), but the layer reads 192 features"):
        SparseLinear.from_linear(pruned())(torch.randn(2, 7))


@pytest.mark.parametrize("grad", [False, True])
def test_compile_sees_one_operation(grad, by_kernel):
    model = nn.Sequential(SparseLinear.from_linear(pruned()), nn.ReLU(), SparseLinear.from_linear(pruned(96, 160)))
    graphs = []

    def backend(graph, _):
        graphs.append([node.target for node in graph.graph.nodes if node.op == "call_function"])
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    x = torch.randn(5, 192, requires_grad=grad)
    y = compiled(x)
    torch.testing.assert_close(y, model(x))
    assert graphs[0].count(torch.ops.peft_pst.sparse_linear) == 2
    if grad:
        torch.testing.assert_close(*(torch.autograd.grad(f(x).sum(), x)[0] for f in (compiled, model)))


def test_aot_autograd_and_dynamic_shapes(by_kernel):
    model = SparseLinear.from_linear(pruned())
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=True)
    for tokens in (2, 5, 9):
        x = torch.randn(tokens, 192, requires_grad=True)
        torch.testing.assert_close(compiled(x), model(x))
    torch.testing.assert_close(*(torch.autograd.grad(f(x).sum(), x)[0] for f in (compiled, model)))


def test_export(by_kernel):
    model, x = SparseLinear.from_linear(pruned()), torch.randn(5, 192)
    program = torch.export.export(model, (x,))
    assert "peft_pst.sparse_linear" in str(program.graph)
    torch.testing.assert_close(program.module()(x), model(x))


GRAPHS = {
    "torch.jit": lambda model, x: torch.jit.trace(model, (x,), check_trace=False),
    "make_fx": lambda model, x: make_fx(model)(x),
}


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace.* is deprecated", "ignore:The model's sparse weights stay")
@pytest.mark.parametrize("codec", ["bitmask", "tiles"])
@pytest.mark.parametrize("graph", GRAPHS.values(), ids=GRAPHS)
def test_a_graph_computes_what_the_layer_computes(graph, codec, by_kernel):
    """And not what was in the memory that it had."""
    linear = pruned(sparsity={"bitmask": 0.8, "tiles": 0.99}[codec])
    sparse = SparseLinear.from_linear(linear)
    assert sparse.description.codec == codec
    with torch.no_grad():
        traced = graph(sparse, torch.randn(40, 192))
        x = torch.randn(40, 192)
        torch.testing.assert_close(traced(x), linear(x))


TRANSFORMS = {
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (x + 1,))[1],
    "jacfwd": lambda f, x: torch.func.jacfwd(f)(x),
    "grad": lambda f, x: torch.func.grad(lambda x: f(x).sum())(x),
    "vmap": lambda f, x: torch.func.vmap(f)(x),
}


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_transforms(transform, grad, by_kernel):
    linear, x = pruned(), torch.randn(3, 192)
    sparse = SparseLinear.from_linear(linear)
    sparse.pack()
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(transform(sparse, x), transform(linear, x))


@pytest.mark.parametrize("grad", [False, True])
def test_tangents(grad, by_kernel):
    linear, x = pruned(), torch.randn(3, 192)
    sparse = SparseLinear.from_linear(linear)
    sparse.pack()
    with torch.set_grad_enabled(grad), forward_ad.dual_level():
        _, tangent = forward_ad.unpack_dual(sparse(forward_ad.make_dual(torch.zeros_like(x), x)))
        torch.testing.assert_close(tangent, x @ linear.weight.T)


def test_the_operations_are_registered_rightly(by_kernel):
    model = SparseLinear.from_linear(pruned())
    arguments = (torch.randn(3, 192, requires_grad=True), model._handle)
    torch.library.opcheck(operations._sparse_linear, arguments)
    del model
    with pytest.raises(ValueError, match=r"is not in this process: .* Export the dense model instead"):
        torch.ops.peft_pst.sparse_linear(*arguments)


WITHOUT_NUMBA = """
import importlib.util, sys, warnings
import torch
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "numba" else find(name, *rest)
sys.modules["numba"] = None
import peft_pst
linear = torch.nn.Linear(64, 32)
with torch.no_grad():
    linear.weight.masked_fill_(torch.rand(32, 64) < 0.9, 0)
sparse, x = peft_pst.SparseLinear.from_linear(linear), torch.randn(3, 64)
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    for _ in range(2):
        torch.testing.assert_close(sparse(x), linear(x))
assert len(said) == 1 and "pip install 'peft-pst[cpu]'" in str(said[0].message), said
try:
    peft_pst.accelerate_sparse(torch.nn.Sequential(linear))
except ImportError as error:
    assert "pip install 'peft-pst[cpu]'" in str(error)
else:
    raise SystemExit("no error")
"""


def test_without_numba_the_plain_path_serves_with_one_hint():
    subprocess.run([sys.executable, "-c", WITHOUT_NUMBA], check=True)


def test_importing_the_library_does_not_import_numba():
    command = "import sys, peft_pst; assert 'numba' not in sys.modules and 'llvmlite' not in sys.modules"
    subprocess.run([sys.executable, "-c", command], check=True)
