import itertools

import numpy as np
import pytest
import torch

pytest.importorskip("numba", reason="the kernels need the extra peft-pst[cpu]")

from hypothesis import given, settings
from hypothesis import strategies as st
from sparse.kernels.cases import make

from peft_pst.sparse.kernels.layout import CHUNK, SLICE, Kind, retile, unpack
from peft_pst.sparse.kernels.target import HAS_BITMASK


def decode(packed):
    """The values [out, in], entry by entry, and how many zeros fill up slices; it checks that none is out of place."""
    out, size = packed.shape
    chunks, tiles, slices = -(-out // packed.chunk), -(-size // packed.tile), packed.chunk // SLICE
    values = torch.zeros(chunks * packed.chunk, tiles * packed.tile, dtype=packed.values.dtype)
    rows = packed.rows.numpy().reshape(chunks * tiles, packed.chunk)
    counts = packed.counts.numpy().reshape(chunks * tiles, slices)
    indices = packed.indices.numpy().reshape(-1, 1 if packed.blocks else SLICE)
    filled, filling, place = torch.zeros(values.shape, dtype=torch.bool), 0, 0
    for segment, (chunk, tile) in enumerate(itertools.product(range(chunks), range(tiles))):
        assert packed.starts[segment] == place
        assert sorted(rows[segment]) == list(range(packed.chunk))
        for number in range(slices):
            here = rows[segment, number * SLICE : (number + 1) * SLICE]
            for _ in range(counts[segment, number]):
                for i in range(SLICE):
                    value, index = packed.values[place * SLICE + i], indices[place, 0 if packed.blocks else i]
                    if index == packed.tile:
                        assert value == 0
                        filling += 1
                    else:
                        assert index < packed.tile
                        at = chunk * packed.chunk + int(here[i]), tile * packed.tile + int(index)
                        assert not filled[at]
                        values[at], filled[at] = value, True
                place += 1
    assert packed.values.numel() == place * SLICE and len(indices) == place
    assert not values[out:].any() and not values[:, size:].any()
    return values[:out, :size], filling


def decode_bitmask(packed):
    out, size = packed.shape
    values = torch.zeros(out, size, dtype=torch.int8)
    for row, words in enumerate(packed.bits.numpy().reshape(out, -1)):
        columns = [64 * i + bit for i, word in enumerate(words) for bit in range(64) if int(word) >> bit & 1]
        start = int(packed.byte_starts[row])
        assert packed.byte_sums[row] == packed.bytes[start : start + len(columns)].sum(dtype=torch.int64)
        values[row, columns] = packed.bytes[start : start + len(columns)]
    return values


def same_bits(a, b):
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    out=st.integers(1, 70),
    size=st.one_of(st.integers(1, 60), st.integers(61, 700)),
    density=st.sampled_from([0, 0.02, 0.1, 0.13, 0.5, 1]),
    kind=st.sampled_from(Kind),
    blocks=st.booleans(),
    empty=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_holds_the_weight_exactly(out, size, density, kind, blocks, empty, seed):
    weight = make(out, size, density, kind, blocks, True, seed, empty)
    packed = weight.pack()
    assert packed.chunk % 16 == 0 and packed.chunk <= CHUNK and packed.tile % 16 == 0 and packed.tile <= 255
    values, filling = decode(packed)
    assert same_bits(values, weight.values) and same_bits(unpack(packed), weight.values)
    if blocks and out >= SLICE:
        assert packed.blocks and filling == 0
    assert torch.equal(packed.bias[:out], weight.bias) and not packed.bias[out:].any()
    assert torch.equal(packed.scales[:out], torch.ones(out) if weight.scales is None else weight.scales)
    assert (packed.bits is not None) <= (HAS_BITMASK and kind is Kind.INT8)
    if packed.bits is not None:
        assert torch.equal(decode_bitmask(packed), weight.values)


@pytest.mark.parametrize("kind", Kind)
@pytest.mark.parametrize("blocks", [False, True])
def test_in_other_tiles(kind, blocks):
    weight = make(70, 300, 0.3, kind, blocks)
    packed = weight.pack()
    again = retile(packed, 240)
    assert again.tile == 240 != packed.tile and same_bits(decode(again)[0], weight.values)
    assert again.bias is packed.bias and again.scales is packed.scales and again.bits is packed.bits


@pytest.mark.parametrize("out", [1, 8, 1024, 1025, 4096, 4100])
def test_chunks(out):
    """Each row is in one, a multiple of four of them if there are rows enough, and none is without rows."""
    packed = make(out, 16, 0.2).pack()
    assert packed.chunk <= CHUNK and (packed.chunks - 1) * packed.chunk < out <= packed.chunks * packed.chunk
    assert packed.chunks % 4 == 0 or out < 1024 or packed.chunk * 4 * -(-packed.chunks // 4) >= out
    assert len(packed.starts) == packed.chunks * packed.tiles


@pytest.mark.parametrize(("density", "share"), [(0.2, 0.09), (0.1, 0.10), (0.05, 0.15)])
@pytest.mark.parametrize("shape", [(768, 3072), (3072, 768)])
def test_little_is_filled_up(density, share, shape):
    weight = make(*shape, density)
    packed = weight.pack()
    assert 1 - int((weight.values != 0).sum()) / packed.values.numel() <= share


def test_weights_that_are_no_numbers_are_kept():
    weight = make(20, 30, 0.2)
    weight.values[3, 4:7] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    values, _ = decode(weight.pack())
    assert same_bits(values, weight.values)


def test_rows_of_seven_are_no_block():
    """A block of 8x1 of which one value is missing is none."""
    weight = make(24, 30, 0.3, blocks=True)
    row, column = np.argwhere(weight.values.numpy() != 0)[5]
    weight.values[row, column] = 0
    packed = weight.pack()
    assert not packed.blocks and same_bits(decode(packed)[0], weight.values)
