"""A 2:4 SparseLinear on a GPU. Where there is none, the CPU stands in for it, and torch's conversions on the CPU for
the semi-structured tensor: what they are given is stored as 2:4 and comes back dense, so that a weight of another
pattern or in the wrong order would give a wrong product."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.sparse import (
    SparseSemiStructuredTensor,
    SparseSemiStructuredTensorCUSPARSELT,
    SparseSemiStructuredTensorCUTLASS,
)
from torch.sparse._semi_structured_conversions import (
    sparse_semi_structured_from_dense_cutlass,
    sparse_semi_structured_to_dense_cutlass,
)
from transformers.pytorch_utils import Conv1D

from peft_pst import SparseLinear
from peft_pst.sparse import acceleration, gpu_serving, semi_structured, serving

OUT, SIZE = 64, 128
gpu = pytest.mark.skipif(
    not (torch.cuda.is_available() and semi_structured.is_able(torch.device("cuda", 0))),
    reason="needs a GPU of compute capability 8.0 or later, and cuSPARSELt",
)


def two_of_four(out=OUT, size=SIZE, kept=2, conv1d=False, bias=True, dtype=torch.bfloat16):
    """A layer whose weight has, along its inputs, two values of four; or fewer."""
    weight = torch.randn(out, size // 4, 4)
    places = torch.rand_like(weight).topk(kept, dim=-1).indices
    weight = torch.zeros_like(weight).scatter(-1, places, weight).view(out, size)
    linear = Conv1D(out, size) if conv1d else nn.Linear(size, out, bias=bias)
    linear.weight.data = (weight.T if conv1d else weight).contiguous()
    if linear.bias is not None:
        nn.init.normal_(linear.bias)
    return linear.to(dtype).requires_grad_(False)


def reference(linear, x):
    weight = linear.weight.T if isinstance(linear, Conv1D) else linear.weight
    bias = None if linear.bias is None else linear.bias.double()
    return nn.functional.linear(x.double(), weight.double(), bias)


def check(y, linear, x):
    expected = reference(linear, x)
    assert y.shape == expected.shape and y.dtype == x.dtype
    assert float((y.double() - expected).abs().max() / expected.abs().max()) < 1e-2


@pytest.fixture
def made(monkeypatch):
    """The CPU in the place of a GPU, and products from 16 tokens on semi-structured; the weights that were made so."""
    made = []

    def to_sparse_semi_structured(matrix):
        assert matrix.is_contiguous()
        made.append(sparse_semi_structured_to_dense_cutlass(*sparse_semi_structured_from_dense_cutlass(matrix)))
        return made[-1]

    monkeypatch.setattr(semi_structured, "is_able", lambda device: True)
    monkeypatch.setattr(semi_structured, "PRODUCT", OUT * SIZE * 16)
    monkeypatch.setattr(serving, "is_possible", lambda linear: False)
    monkeypatch.setattr(torch.sparse, "to_sparse_semi_structured", to_sparse_semi_structured)
    return made


@pytest.fixture
def decoded(monkeypatch):
    """The calls that decoded the whole weight."""
    calls = []
    monkeypatch.setattr(serving, "warn_that_it_is_slow", lambda: calls.append(1))
    return calls


def test_the_choice_by_shape_and_tokens():
    faster = semi_structured.is_faster
    assert not any(
        faster(shape, tokens) for shape in ((768, 768), (4096, 4096), (11008, 4096)) for tokens in (0, 1, 512)
    )
    assert faster((4096, 4096), 8192) and not faster((4096, 4096), 8191)
    assert faster((11008, 4096), 4096) and faster((4096, 11008), 4096)
    assert not faster((768, 768), 8192)


def test_torch_takes_what_fits():
    fits = semi_structured.fits
    assert fits((768, 3072), torch.bfloat16) and fits((64, 64), torch.float16)
    assert not any(fits((768, 3072), dtype) for dtype in (torch.float32, torch.float64, torch.int8))
    assert not fits((768, 3072 + 32), torch.bfloat16) and not fits((768 + 16, 3072), torch.bfloat16)
    for backend in (SparseSemiStructuredTensorCUSPARSELT, SparseSemiStructuredTensorCUTLASS):
        for dtype in semi_structured.DTYPES:
            rows, columns, *_ = backend._DTYPE_SHAPE_CONSTRAINTS[dtype]
            assert semi_structured.MULTIPLE % rows == semi_structured.MULTIPLE % columns == 0


@pytest.mark.parametrize(
    ("capability", "has_library", "hip", "able"),
    [((8, 0), True, None, True), ((9, 0), True, None, True), ((7, 5), True, None, False), ((8, 0), False, None, False),
     ((9, 4), True, "6.4", False)],
)  # fmt: skip
def test_which_devices_are_able(capability, has_library, hip, able, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: has_library)
    monkeypatch.setattr(torch.version, "hip", hip)
    is_able = semi_structured.is_able.__wrapped__
    assert is_able(torch.device("cuda", 0)) == able
    assert not is_able(torch.device("cpu")) and not is_able(torch.device("meta"))


def test_is_two_of_four():
    matrix = torch.tensor([[0.0, 1, 2, 0, 0, 0, 3, 0], [0, 0, 0, 0, 4, 0, -0.0, 5]])
    assert semi_structured.is_two_of_four(matrix)
    matrix[0, 3] = 1
    assert not semi_structured.is_two_of_four(matrix)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kernels", [True, False])
def test_the_cpu_never_goes_there(kernels, dtype, monkeypatch):
    if not kernels:
        monkeypatch.setattr(serving, "is_possible", lambda linear: False)
    monkeypatch.setattr(serving, "warn_that_it_is_slow", lambda: None)
    monkeypatch.setattr(semi_structured, "PRODUCT", 0)
    monkeypatch.setattr(torch.sparse, "to_sparse_semi_structured", None)
    linear, x = two_of_four(dtype=dtype), torch.randn(32, SIZE, dtype=dtype)
    sparse = SparseLinear.from_linear(linear)
    with torch.no_grad():
        check(sparse(x), linear, x)
    assert sparse.description.codec == "2:4" and sparse._on_gpu is None


@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 5), (16,), (2, 3, 9)], ids=str)
@pytest.mark.parametrize("kind", ["Linear", "no bias", "Conv1D", "zeros among the values", "int8"])
def test_the_product(kind, shape, made, decoded):
    kept = 1 if kind == "zeros among the values" else 2
    linear = two_of_four(kept=kept, conv1d=kind == "Conv1D", bias=kind != "no bias")
    sparse = SparseLinear.from_linear(linear, values="int8" if kind == "int8" else "exact")
    linear = sparse.to_linear().requires_grad_(False)
    x = torch.randn(*shape, SIZE, dtype=torch.bfloat16)
    for _ in range(3):
        y = sparse(x)
        assert y.shape == (*shape, OUT)
        if x.numel():
            check(y, linear, x)
    large = x.numel() // SIZE >= 16
    assert (len(made), len(decoded)) == ((1, 0) if large else (0, 3))
    assert (sparse.description.codec == "2:4") == (kind in ("Linear", "no bias"))


def test_few_tokens_are_left_to_the_kernels(made, monkeypatch):
    monkeypatch.setattr(gpu_serving, "is_possible", lambda linear, x: True)
    monkeypatch.setattr(serving, "serve", lambda linear, x: linear.plain(x))
    linear, x = two_of_four(), torch.randn(16, SIZE, dtype=torch.bfloat16)
    sparse = SparseLinear.from_linear(linear)
    check(sparse(x[:15]), linear, x[:15])
    assert not made and sparse._on_gpu is None
    check(sparse(x), linear, x)
    assert len(made) == 1


def test_it_is_made_once_a_dtype(made, monkeypatch):
    linear = two_of_four()
    sparse, decodes = SparseLinear.from_linear(linear), []
    weight = type(sparse).weight.fget
    monkeypatch.setattr(SparseLinear, "weight", property(lambda self: decodes.append(1) or weight(self)))
    for dtype in (torch.bfloat16, torch.float16):
        for count in (16, 17, 16):
            x = torch.randn(count, SIZE, dtype=dtype)
            check(sparse(x), linear, x)
    assert len(decodes) == 2 and [m.dtype for m in made] == [torch.bfloat16, torch.float16]


def test_strides_are_those_that_cusparselt_assumes(made, monkeypatch):
    seen = []
    multiply = nn.functional.linear
    monkeypatch.setattr(semi_structured.F, "linear", lambda x, *rest: seen.append(x) or multiply(x, *rest))
    linear = two_of_four()
    sparse = SparseLinear.from_linear(linear)
    wide = torch.randn(300, 300, dtype=torch.bfloat16)
    for x in (wide[:40, :SIZE], wide[:SIZE, :20].T, wide[:1, :SIZE].expand(24, -1), wide[:32, ::2][:, :SIZE]):
        check(sparse(x), linear, x)
    ours = [x for x in seen if x.dtype == torch.bfloat16]  # not those of the reference
    assert len(ours) == 4 and all(x.dim() == 2 and x.is_contiguous() for x in ours)


CHANGES = {
    "to": lambda sparse: sparse.to(torch.float32),
    "load": lambda sparse: sparse.load_state_dict({**sparse.state_dict(), "weight_values": 2 * sparse.weight_values}),
    "copy": copy.deepcopy,
    "pickle": lambda sparse: pickle.loads(pickle.dumps(sparse)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_was_made_goes_when_the_weight_may_change(change, made):
    linear, x = two_of_four(bias=False), torch.randn(16, SIZE, dtype=torch.bfloat16)
    sparse = SparseLinear.from_linear(linear)
    sparse(x)
    assert len(sparse._on_gpu._made) == 1
    after = CHANGES[change](sparse)
    after = after if isinstance(after, SparseLinear) else sparse
    assert after._on_gpu is None and set(after.state_dict()) == {"weight_positions", "weight_values"}
    if change == "load":
        linear.weight.mul_(2)
    check(after(x), linear, x)
    assert len(made) == 2


def test_another_pattern_is_looked_at_once_and_decoded_in_each_call(made, decoded, monkeypatch):
    looks = []
    monkeypatch.setattr(semi_structured, "is_two_of_four", lambda matrix: looks.append(1))
    linear, x = two_of_four(kept=3), torch.randn(16, SIZE, dtype=torch.bfloat16)
    sparse = SparseLinear.from_linear(linear)
    for _ in range(3):
        check(sparse(x), linear, x)
    assert not made and len(decoded) == 3 and len(looks) == 1


def test_a_conv1d_with_groups_along_its_rows_is_no_pattern_of_its_inputs(made, decoded):
    linear = two_of_four(SIZE, OUT, conv1d=True)  # stored [OUT, SIZE], 2:4 along the first
    linear.weight.data = two_of_four(OUT, SIZE).weight
    linear.nf = SIZE
    sparse, x = SparseLinear.from_linear(linear), torch.randn(16, OUT, dtype=torch.bfloat16)
    assert sparse.description.codec == "2:4"
    check(sparse(x), linear, x)
    assert not made and decoded


def test_other_dtypes_and_sizes_are_decoded(made, decoded):
    for linear, dtype in ((two_of_four(), torch.float32), (two_of_four(48), torch.bfloat16)):
        sparse, x = SparseLinear.from_linear(linear), torch.randn(64, SIZE, dtype=dtype)
        check(sparse(x), linear, x)
        assert sparse._on_gpu is None
    assert not made and len(decoded) == 2


def test_with_gradients_the_weight_is_decoded(made, decoded):
    linear, x = two_of_four(dtype=torch.float16), torch.randn(16, SIZE, dtype=torch.float16, requires_grad=True)
    sparse = SparseLinear.from_linear(linear)
    torch.testing.assert_close(torch.autograd.grad(sparse(x).sum(), x)[0], linear.weight.sum(0).expand(16, -1))
    sparse.bias.requires_grad_()
    assert torch.equal(torch.autograd.grad(sparse(x.detach()).sum(), sparse.bias)[0], torch.full_like(linear.bias, 16))
    assert len(decoded) == 2 and not made
    with torch.no_grad():
        check(sparse(x), linear, x)
    assert len(decoded) == 2 and len(made) == 1


def test_made_in_inference_mode(made):
    linear, x = two_of_four(), torch.randn(16, SIZE, dtype=torch.bfloat16)
    sparse = SparseLinear.from_linear(linear)
    with torch.inference_mode():
        check(sparse(x), linear, x)
    check(sparse(x), linear, x)
    assert len(made) == 1


def test_autocast_asks_for_the_dtype(made, decoded):
    linear, x = two_of_four(dtype=torch.float32), torch.randn(16, SIZE)
    sparse = SparseLinear.from_linear(linear)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, expected = sparse(x), linear(x)
        assert sparse(x.double()).dtype == torch.float64  # which autocast leaves as it is
    assert y.dtype == expected.dtype == torch.bfloat16 and made[0].dtype == torch.bfloat16 and len(decoded) == 1
    check(y, linear, x.bfloat16())


def test_compiled_it_is_the_plain_product(made, decoded, monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    linear, x = two_of_four(), torch.randn(16, SIZE, dtype=torch.bfloat16)
    check(SparseLinear.from_linear(linear)(x), linear, x)
    assert decoded and not made


@gpu
@pytest.mark.parametrize("tokens", [1, 7, 16, 129, 512])
@pytest.mark.parametrize("kind", ["Linear", "no bias", "Conv1D"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_on_a_gpu(context, dtype, kind, tokens, decoded, monkeypatch):
    out, size = 256, 192
    monkeypatch.setattr(semi_structured, "PRODUCT", out * size * 2)
    linear = two_of_four(out, size, conv1d=kind == "Conv1D", bias=kind != "no bias", dtype=dtype).cuda()
    sparse = SparseLinear.from_linear(linear)
    wide = torch.randn(2 * tokens, 2 * size, dtype=dtype, device="cuda")
    with context():
        for x in (wide[:tokens, :size], wide[::2, ::2], wide[: 2 * tokens, :size].view(2, tokens, size)):
            check(sparse(x), linear, x)
    if tokens > 1:
        assert any(isinstance(weight, SparseSemiStructuredTensor) for weight in sparse._on_gpu._made.values())
    assert not decoded


@gpu
def test_journeys_of_a_gpu(monkeypatch):
    monkeypatch.setattr(semi_structured, "PRODUCT", 0)
    linear = two_of_four(bias=False).cuda()
    sparse, x = SparseLinear.from_linear(linear), torch.randn(16, SIZE, dtype=torch.bfloat16, device="cuda")
    check(sparse(x), linear, x)
    sparse.load_state_dict({**sparse.state_dict(), "weight_values": 2 * sparse.weight_values})
    linear.weight.mul_(2)
    check(sparse(x), linear, x)
    again = pickle.loads(pickle.dumps(sparse))
    assert torch.equal(again(x), sparse(x))
    sparse.cpu()
    assert sparse._on_gpu is None
    check(sparse(x.cpu()), linear.cpu(), x.cpu())
    with torch.autocast("cuda", dtype=torch.float16):
        assert again(x.float()).dtype == torch.float16


@pytest.mark.parametrize("able", [False, True])
def test_opening_says_that_it_is_slow_only_where_no_kernel_can_run(monkeypatch, able):
    said = []
    monkeypatch.setattr(acceleration, "warn_that_it_is_slow", lambda: said.append(1))
    monkeypatch.setattr(acceleration, "has_kernels", lambda device: able)
    model = nn.Sequential(SparseLinear.from_linear(two_of_four()))
    monkeypatch.setattr(SparseLinear, "pack", lambda self: None)  # as on a GPU, which the kernels are not for
    acceleration.accelerate_opened(model)
    assert bool(said) != able
