import copy
import ctypes
import itertools
import pickle
import threading

import pytest
import torch

pytest.importorskip("numba", reason="the kernels need the extra peft-pst[cpu]")

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sparse.kernels.cases import FUNCTIONS, allowed_error, error, in_half, make

from peft_pst.sparse.kernels import layer as module
from peft_pst.sparse.kernels.layer import Layer
from peft_pst.sparse.kernels.layout import Kind

TOKENS = [1, 2, 4, 5, 8, 9, 15, 16, 17, 32, 33, 63, 64, 65, 100, 130]
"""Every width of a panel, full and not, and several blocks."""
WIDER = {
    "contiguous": lambda x: x.clone(),
    "a slice": lambda x: torch.cat((torch.full_like(x, torch.nan), x, torch.full_like(x, torch.nan)), 1)[
        :, x.shape[1] : 2 * x.shape[1]
    ],
    "one of a batch": lambda x: torch.stack((torch.full_like(x, torch.nan), x), 1)[:, 1],
    "transposed": lambda x: x.T.contiguous().T,
    "expanded": lambda x: x[:1].expand(len(x), -1),
    "rows 2,048 bytes apart": lambda x: torch.cat((x, x.new_full((len(x), -x.shape[1] % 512), torch.nan)), 1)[
        :, : x.shape[1]
    ],
}
SIZES = st.one_of(st.integers(1, 40), st.integers(41, 700))


@settings(max_examples=200, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    out=SIZES,
    size=SIZES,
    tokens=st.sampled_from(TOKENS),
    density=st.sampled_from([0, 0.01, 0.05, 0.1, 0.2, 0.5, 0.9, 1]),
    kind=st.sampled_from(Kind),
    blocks=st.booleans(),
    bias=st.booleans(),
    empty=st.booleans(),
    wider=st.sampled_from(sorted(WIDER)),
    seed=st.integers(0, 1000),
)
def test_any_shape(out, size, tokens, density, kind, blocks, bias, empty, wider, seed):
    weight = make(out, size, density, kind, blocks, bias, seed, empty)
    x = WIDER[wider](torch.randn(tokens, size, generator=torch.Generator().manual_seed(seed)))
    packed = weight.pack()
    y = Layer(packed)(x)
    assert y.shape == (tokens, out) and y.dtype == torch.float32
    assert float((y - weight.reference(x)).abs().max()) <= weight.allowed(x, packed)


@pytest.mark.parametrize("kind", Kind)
@pytest.mark.parametrize("blocks", [False, True])
@pytest.mark.parametrize("density", [0.07, 0.4])
def test_every_width(kind, blocks, density):
    weight = make(203, 333, density, kind, blocks)
    packed = weight.pack()
    assert packed.blocks == blocks
    layer = Layer(packed)
    for tokens in TOKENS:
        x = torch.randn(tokens, 333)
        assert error(layer(x), weight.reference(x)) <= allowed_error(tokens, packed), tokens


@pytest.mark.parametrize(
    ("out", "size", "tokens", "density", "kind", "blocks"),
    [
        (768, 3072, 1, 0.1, Kind.FP32, False),
        (3072, 768, 128, 0.1, Kind.BF16, False),
        (3072, 768, 70, 0.2, Kind.INT8, True),
        (1100, 4096, 1, 0.2, Kind.INT8, False),
        (4096, 1024, 33, 0.05, Kind.BF16, False),
        (1030, 4096, 1, 0.3, Kind.FP16, True),
        (512, 512, 200, 1, Kind.FP32, False),
        (200, 96, 1024, 0.1, Kind.FP32, False),
        (200, 96, 1025, 0.3, Kind.INT8, False),
        (64, 512, 4096, 0.1, Kind.FP32, True),
    ],
)
def test_large(out, size, tokens, density, kind, blocks):
    weight = make(out, size, density, kind, blocks)
    packed, x = weight.pack(), torch.randn(tokens, size)
    assert error(Layer(packed)(x), weight.reference(x)) <= allowed_error(tokens, packed)


@pytest.mark.parametrize("wider", WIDER)
def test_more_tokens_than_are_computed_at_once(wider):
    weight, x = make(40, 50, 0.3), WIDER[wider](torch.randn(1100, 50))
    assert error(Layer(weight.pack())(x), weight.reference(x)) <= 1e-6


def test_nothing_to_do():
    weight = make(40, 50, 0.1)
    assert Layer(weight.pack())(torch.randn(0, 50)).shape == (0, 40)
    nothing = make(40, 50, 0.0)
    assert torch.equal(Layer(nothing.pack())(torch.full((3, 50), torch.nan)), nothing.bias.expand(3, -1))


def test_whatever_the_default_dtype_is():
    weight, x = make(300, 200, 0.1), torch.randn(20, 200)
    layer, default = Layer(weight.pack()), torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        y = Layer(weight.pack())(x)
        assert y.dtype == torch.float32 and torch.equal(y, layer(x))
    finally:
        torch.set_default_dtype(default)


def scattered(x, share, seed=0):
    """x with infinities of both signs and NaNs in a share of its places."""
    generator = torch.Generator().manual_seed(seed)
    kinds = torch.tensor([torch.inf, -torch.inf, torch.nan])[torch.randint(3, x.shape, generator=generator)]
    return torch.where(torch.rand(x.shape, generator=generator) < share, kinds, x)


def assert_same_numbers(weight, x):
    packed = weight.pack()
    y, expected = Layer(packed)(x), weight.reference(x)
    for test in (torch.isnan, torch.isposinf, torch.isneginf):
        assert torch.equal(test(y), test(expected))
    finite = torch.isfinite(expected)
    assert finite.any() and not finite.all()
    # an infinity or a NaN has no 16 bits: such a token is multiplied in fp32
    assert error(y[finite], expected[finite]) <= (4e-3 if in_half(packed, len(x)) else 1e-6)


@pytest.mark.parametrize("kind", Kind)
@pytest.mark.parametrize("blocks", [False, True])
@pytest.mark.parametrize("density", [0.05, 0.3])
@pytest.mark.parametrize("tokens", [1, 3, 7, 12, 20, 40, 70])
def test_pruned_weights_take_no_part(kind, blocks, density, tokens):
    weight = make(117, 150, density, kind, blocks, empty=True)
    x = scattered(torch.randn(tokens, 150), 0.015)
    assert_same_numbers(weight, x)


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
def test_one_bad_input_and_a_bitmask(bad):
    weight, x = make(117, 150, 0.3, Kind.INT8), torch.randn(1, 150)
    x[0, 149] = bad
    assert_same_numbers(weight, x)


@pytest.mark.parametrize("kind", [Kind.FP32, Kind.BF16, Kind.FP16])
@pytest.mark.parametrize("blocks", [False, True])
@pytest.mark.parametrize("tokens", [1, 3, 40])
def test_weights_that_are_no_numbers(kind, blocks, tokens):
    weight = make(117, 150, 0.2, kind, blocks)
    weight.values[scattered(torch.ones(117, 150), 0.005) != 1] *= torch.nan
    weight.values[scattered(torch.ones(117, 150), 0.005, seed=1) != 1] *= torch.inf
    x = torch.randn(tokens, 150)
    x[:, 70] = 0
    assert_same_numbers(weight, x)


@pytest.mark.parametrize("size", [1e-30, 1e-20, 1e20, 1e30])
def test_one_token_of_any_size(size):
    """In 16 bits its scale is its own."""
    weight, x = make(117, 150, 0.3, Kind.INT8, bias=False), torch.randn(1, 150) * size
    assert error(Layer(weight.pack())(x).double(), weight.reference(x)) <= 1e-4


def feed_forward(x, last, first, gate, activation):
    """In float64."""
    function = FUNCTIONS[activation]
    hidden = first.reference(x)
    hidden = function(hidden) if gate is None else hidden * function(gate.reference(x))
    return last.reference(hidden)


def assert_feed_forward(x, last, first, gate=None, activation="relu"):
    packed = [weight.pack() for weight in (last, first, gate) if weight is not None]
    y = Layer(*packed, activation=activation)(x)
    assert error(y, feed_forward(x, last, first, gate, activation)) <= allowed_error(len(x), *packed, exact=2e-6)


@pytest.mark.parametrize("activation", FUNCTIONS)
@pytest.mark.parametrize("gated", [False, True])
def test_feed_forward_blocks(activation, gated):
    kinds = itertools.cycle(itertools.product(Kind, Kind))
    for tokens, (inputs, hidden, out) in itertools.product(
        [1, 3, 7, 12, 30, 50, 130], [(70, 131, 45), (300, 517, 96)]
    ):
        kind, last_kind = next(kinds)
        first, gate = make(hidden, inputs, 0.1, kind), make(hidden, inputs, 0.1, kind, seed=1) if gated else None
        x = torch.randn(tokens, inputs) / 4
        assert_feed_forward(x, make(out, hidden, 0.1, last_kind, seed=2), first, gate, activation)


@pytest.mark.parametrize("densities", list(itertools.product([0.05, 0.3], repeat=3)))
@pytest.mark.parametrize("tokens", [1, 4, 65])
def test_feed_forward_with_bitmasks(densities, tokens):
    """With a bitmask in some layers and not in others; the two densities make other tiles of 200 inputs."""
    shapes = [(200, 417), (417, 200), (417, 200)]
    weights = [
        make(*shape, density, Kind.INT8, seed=i)
        for i, (shape, density) in enumerate(zip(shapes, densities, strict=True))
    ]
    assert_feed_forward(torch.randn(tokens, 200) / 8, *weights, "silu")


@pytest.mark.parametrize("tokens", [1, 20])
def test_feed_forward_of_blocks(tokens):
    first, gate, last = (
        make(*shape, 0.2, blocks=True, seed=i) for i, shape in enumerate([(88, 60), (88, 60), (64, 88)])
    )
    assert_feed_forward(torch.randn(tokens, 60), last, first, gate, "gelu")


def test_a_gate_in_tiles_of_its_own_follows_its_bias():
    """The bias of a packed weight may be changed in place."""
    first, gate, last = make(90, 200, 0.05), make(90, 200, 0.3, seed=1), make(70, 90, 0.2)
    packed = [weight.pack() for weight in (last, first, gate)]
    assert packed[1].tile != packed[2].tile
    layer, x = Layer(*packed, "silu"), torch.randn(5, 200)
    packed[2].bias[:90] = gate.bias.neg_()
    assert error(layer(x), feed_forward(x, last, first, gate, "silu")) <= 2e-6


def test_a_gate_in_another_precision():
    first, gate, last = make(90, 200, 0.1), make(90, 200, 0.1, Kind.FP16), make(70, 90, 0.2)
    with pytest.raises(ValueError, match="FP16"):
        Layer(last.pack(), first.pack(), gate.pack())


@pytest.mark.parametrize("again", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_copies(again):
    first, gate, last = make(90, 200, 0.3, Kind.INT8), make(90, 200, 0.3, Kind.INT8, seed=1), make(70, 90, 0.2)
    packed = [weight.pack() for weight in (last, first, gate)]
    layer, x = Layer(*packed, "silu"), torch.randn(1, 200)
    expected = layer(x)
    other = again(layer)
    for weight in packed:  # what the first one reads
        for part in weight:
            if isinstance(part, torch.Tensor):
                part.zero_()
    del layer
    assert torch.equal(other(x), expected) and expected.abs().max() > 0


class Guarded:
    """Stands for torch and ctypes in layer.py: hands out memory between guards, as badly aligned as it may be."""

    GUARD = 4096

    def __init__(self):
        self.buffers = []

    def __getattr__(self, name):
        return getattr(torch if hasattr(torch, name) else ctypes, name)

    def bytes(self, size, alignment):
        buffer = torch.full((size + 2 * self.GUARD + 64,), 0xA5, dtype=torch.uint8)
        start = self.GUARD + (alignment - (buffer.data_ptr() + self.GUARD)) % 64
        self.buffers.append((buffer, start, start + size))
        return buffer[start : start + size]

    def empty(self, *shape, **kwargs):
        count = torch.Size(shape).numel()
        return self.bytes(4 * count, 4).view(torch.float32).view(shape)

    def create_string_buffer(self, size):
        buffer = self.bytes(size, 16)
        return (ctypes.c_char * size).from_address(buffer.data_ptr())

    def check(self):
        assert len(self.buffers) >= 3  # outputs, what is computed with, and counters
        for buffer, start, end in self.buffers:
            assert (buffer[:start] == 0xA5).all() and (buffer[end:] == 0xA5).all()


def guard(monkeypatch):
    guarded = Guarded()
    monkeypatch.setattr(module, "torch", guarded)
    monkeypatch.setattr(module, "ctypes", guarded)
    monkeypatch.setattr(module, "_local", threading.local())
    return guarded


@pytest.mark.parametrize("kind", Kind)
@pytest.mark.parametrize("density", [0.1, 0.4])
@pytest.mark.parametrize("tokens", [1, 2, 7, 13, 16, 31, 40, 64, 65, 128, 1024, 1030])
def test_writes_only_where_it_may(kind, density, tokens, monkeypatch):
    """513 columns are some words of a bitmask and a bit; the first three weights fill their panels to the last row."""
    for first, gate, last in [
        (None, None, (32, 240)),
        (None, None, (512, 128)),
        ((240, 64), None, (64, 240)),
        ((130, 513), (130, 513), (37, 130)),
    ]:
        guarded = guard(monkeypatch)
        weights = [shape and make(*shape, density, kind) for shape in (last, first, gate)]
        packed = [weight.pack() for weight in weights if weight is not None]
        layer, x = Layer(*packed), torch.randn(tokens, (first or last)[1])
        y = layer(x)
        guarded.check()
        expected = weights[0].reference(x) if first is None else feed_forward(x, *weights, "relu")
        assert error(y, expected) <= allowed_error(tokens, *packed, exact=1e-4)


def test_memory_for_more_tokens_than_before(monkeypatch):
    """A call takes the memory of those before it where that is enough."""
    guarded = guard(monkeypatch)
    narrow, wide = make(40, 50, 0.2), make(300, 600, 0.2)
    layers = [(weight, Layer(weight.pack())) for weight in (narrow, wide)]
    for tokens, (weight, layer) in itertools.product([1, 900, 3, 1000], layers):
        x = torch.randn(tokens, weight.values.shape[1])
        assert error(layer(x), weight.reference(x)) <= 1e-6
    guarded.check()


@pytest.mark.parametrize("tokens", [64, 128])
def test_one_weight_as_both_layers(tokens, monkeypatch):
    """It needs two panels all the same."""
    guarded, weight, x = guard(monkeypatch), make(256, 256, 0.2), torch.randn(tokens, 256)
    packed = weight.pack()
    y = Layer(packed, packed)(x)
    guarded.check()
    assert error(y, feed_forward(x, weight, weight, None, "relu")) <= 2e-6
