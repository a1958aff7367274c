import numpy as np
import pytest
import torch
from reference import plain_mask, slow_units

from peft_pst.patterns import Slices, bits, keep_largest, pack_bits, parse_pattern, selection, unpack_bits


def importances(kind, shape, dtype):
    scores = torch.randn(shape, dtype=torch.float64)
    if kind == "ties":
        scores = (2 * scores).round()
    if kind == "zeros":
        scores = scores.abs() * (torch.rand(shape) > 0.6)
    if kind == "equal":
        scores = torch.ones(shape, dtype=torch.float64)
    return scores.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["distinct", "ties", "zeros", "equal"])
@pytest.mark.parametrize("share", [0, 0.01, 0.3, 0.5, 0.9, 0.99, 1])
def test_prunes_exactly_the_least_important(kind, dtype, share):
    scores = importances(kind, (13, 29), dtype)
    num_pruned = int(share * scores.numel())
    mask = keep_largest(scores, num_pruned)
    assert mask.dtype == torch.bool and mask.shape == scores.shape
    assert (~mask).sum() == num_pruned
    assert torch.equal(mask, plain_mask(scores.float() if dtype != torch.float64 else scores, num_pruned).bool())


@pytest.mark.parametrize("kind", ["distinct", "ties", "zeros", "equal"])
@pytest.mark.parametrize("share", [0.01, 0.5, 0.99, 1])
def test_the_path_for_other_devices_gives_the_same_mask(kind, share):
    scores = importances(kind, (13, 29), torch.float32)
    num_pruned = int(share * scores.numel())
    assert torch.equal(selection._mask_torch(scores, num_pruned), selection._mask_numpy(scores, num_pruned))


def test_the_mask_does_not_depend_on_the_memory_layout():
    scores = importances("ties", (13, 29), torch.float32)
    assert torch.equal(keep_largest(scores, 200), keep_largest(scores.T.contiguous().T, 200))


def slow_mask(pattern, importance, num_pruned):
    """Which entries stay: units in order, the cheapest first, in plain Python."""
    keep = torch.ones(importance.shape, dtype=torch.bool)
    pruned = 0
    for _, entries in sorted(slow_units(pattern, importance), key=lambda unit: unit[0]):
        if pruned == num_pruned:
            break
        for i, j in entries:
            keep[i, j] = False
            pruned += 1
    return keep


PATTERNS = ["unstructured", "row", "column", "2:4", "1:4", "4:8", "1:2", "3:4", "block:8x1", "block:4x4", "block:1x8"]


@pytest.mark.parametrize("text", PATTERNS)
@pytest.mark.parametrize("kind", ["distinct", "ties", "zeros", "equal"])
@pytest.mark.parametrize("share", [0, 0.3, 0.5, 0.9, 1])
def test_each_pattern_keeps_its_best_units(text, kind, share):
    pattern = parse_pattern(text)
    # whole eighths: sums are exact, so units that tie do so for both
    importance = (8 * importances(kind, (16, 24), torch.float64)).round() / 8
    pattern.check_shape(importance.shape, "weight")
    num_pruned = pattern.num_pruned(importance.shape, share * pattern.max_sparsity)
    mask = pattern.mask(importance, num_pruned)
    assert mask.dtype == torch.bool and mask.shape == importance.shape
    assert (~mask).sum() == num_pruned
    assert torch.equal(mask, slow_mask(text, importance, num_pruned))
    for dtype in (torch.float32, torch.bfloat16):
        if torch.equal(importance.to(dtype).double(), importance):
            assert torch.equal(pattern.mask(importance.to(dtype), num_pruned), mask)
    assert torch.equal(pattern.mask(importance.T.contiguous().T, num_pruned), mask)


@pytest.mark.parametrize("text", PATTERNS)
def test_the_budget_is_whole_units_and_at_most_the_sparsity(text):
    pattern, shape = parse_pattern(text), torch.Size((16, 24))
    unit = {"row": 24, "column": 16, "2:4": 2, "1:4": 3, "4:8": 4, "block:8x1": 8, "block:4x4": 16, "block:1x8": 8}
    for sparsity in (0, 0.1, 0.37, 0.5, 0.75, 0.9):
        if sparsity <= pattern.max_sparsity:
            pruned = pattern.num_pruned(shape, sparsity)
            assert pruned % unit.get(text, 1) == 0 and 0 <= 16 * 24 * sparsity - pruned < unit.get(text, 1) + 1e-9
    assert pattern.num_pruned(shape, pattern.max_sparsity) == round(16 * 24 * pattern.max_sparsity)


@pytest.mark.parametrize(("dim", "stacks"), [(0, 1), (1, 1), (0, 3)])
def test_slices_of_a_coupled_structure(dim, stacks):
    """Four units of a weight [24, 36], one line after the other, in plain Python."""
    units, importance = 4, torch.randn(24, 36, dtype=torch.float64)
    part = Slices(dim, units, stacks)
    lines = importance if dim == 0 else importance.T
    height = len(lines) // stacks
    unit_of_line = [line % height // (height // units) for line in range(len(lines))]
    scores = [sum(float(lines[i].sum()) for i, u in enumerate(unit_of_line) if u == unit) for unit in range(units)]
    torch.testing.assert_close(part.scores(importance), torch.tensor(scores, dtype=torch.float64))
    keep = torch.tensor([True, False, True, False])
    stays = torch.tensor([bool(keep[u]) for u in unit_of_line])
    expected = stays[:, None].expand(lines.shape)
    assert torch.equal(part.expand(keep, importance.shape), expected if dim == 0 else expected.T)
    assert part.unit_size(importance.shape) == 24 * 36 // units
    mask = part.mask(importance, part.num_pruned(importance.shape, 0.5))
    worst = sorted(range(units), key=lambda unit: scores[unit])[:2]
    kept = torch.tensor([u not in worst for u in unit_of_line])[:, None].expand(lines.shape)
    assert torch.equal(mask, kept if dim == 0 else kept.T)


@pytest.mark.parametrize("text", ["4:2", "0:4", "2:2", "block:0x4", "block:8", "blocks", "2:4:8", "1:300", "", 24])
def test_an_unknown_pattern_is_named(text):
    with pytest.raises(
        ValueError, match=f"pattern={text!r} is unknown: expected 'unstructured', 'row', 'column', 'N:M'"
    ):
        parse_pattern(text)


@pytest.mark.parametrize(("text", "shape"), [("2:4", (8, 6)), ("block:8x1", (12, 4)), ("block:2x3", (4, 4))])
def test_a_shape_that_the_pattern_does_not_divide_is_named(text, shape):
    with pytest.raises(
        ValueError, match=rf"pattern='{text}' does not divide the weight of 'fc', \[out={shape[0]}, in={shape[1]}"
    ):
        parse_pattern(text).check_shape(torch.Size(shape), "fc")


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (8, 16), (7, 9)])
def test_bits_round_trip(shape):
    mask = torch.rand(shape) > 0.5
    packed = pack_bits(mask)
    assert torch.equal(packed, torch.from_numpy(np.packbits(mask.numpy())))
    assert torch.equal(unpack_bits(packed, mask.shape, torch.float32), mask.float())


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (8, 16), (7, 9)])
def test_bits_on_other_devices_are_the_same(shape):
    flat = (torch.rand(shape) > 0.5).flatten()
    assert torch.equal(bits._pack_torch(flat), bits._pack_numpy(flat))
    assert torch.equal(bits._unpack_torch(bits._pack_numpy(flat), flat.numel()), flat)
