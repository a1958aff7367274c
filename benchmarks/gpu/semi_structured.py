"""2:4 weights on a GPU as torch's semi-structured sparse tensors, beside dense ones, and when SparseLinear takes one.

    python benchmarks/gpu/semi_structured.py

Both are `torch.nn.functional.linear` in bf16, without a bias. They take turns, so that a GPU that slows down slows
both; the figures are medians of the time between two CUDA events, what torch does around a call included. A turn goes
through as many weights as do not fit into a GPU's caches together. The error is the largest difference from the
product in fp32, relative to the largest result.

Where a GPU says otherwise, put the last line into peft_pst/sparse/semi_structured.py.
"""

import argparse
from typing import NamedTuple

import torch
import torch.nn.functional as F
from timing import medians
from torch import Tensor
from tqdm import tqdm

from peft_pst import format_table
from peft_pst.sparse.semi_structured import CAPABILITY, PRODUCT, is_able, is_faster

SHAPES = ((768, 768), (3072, 768), (4096, 4096), (11008, 4096), (4096, 11008))
TOKENS = (1, 16, 128, 512, 2048, 8192)
BEYOND_CACHES = 2**28
"""Bytes of dense weights that a turn goes through, at least."""


class Cell(NamedTuple):
    """A shape, [out, in], and a number of tokens."""

    shape: tuple[int, int]
    tokens: int
    dense: float
    """Microseconds of a call."""
    semi_structured: float
    error: float

    @property
    def product(self) -> int:
        """Multiply-adds of the dense product."""
        return self.shape[0] * self.shape[1] * self.tokens

    @property
    def chosen(self) -> bool:
        """Whether SparseLinear takes the semi-structured product."""
        return is_faster(self.shape, self.tokens)

    @property
    def ratio(self) -> float:
        """How much faster the semi-structured product is."""
        return self.dense / self.semi_structured

    @property
    def is_right(self) -> bool:
        """Whether SparseLinear takes the semi-structured product where it is the faster one, and only there."""
        return self.chosen == (self.ratio > 1)


def two_of_four(out: int, size: int) -> Tensor:
    weight = torch.randn(out, size // 4, 4)
    places = torch.rand_like(weight).topk(2, dim=-1).indices
    return torch.zeros_like(weight).scatter(-1, places, weight).view(out, size).bfloat16()


def measure(shape: tuple[int, int], tokens: int, rounds: int) -> Cell:
    x, first = torch.randn(tokens, shape[1]).bfloat16(), two_of_four(*shape)
    dense = [first.clone() for _ in range(-(-BEYOND_CACHES // first.nbytes))]
    ways = {"dense": dense, "semi_structured": [torch.sparse.to_sparse_semi_structured(weight) for weight in dense]}
    y, expected = F.linear(x, ways["semi_structured"][0]), F.linear(x.float(), first.float())
    error = float((y - expected).abs().max() / expected.abs().max())
    turns = {name: lambda weights=weights: [F.linear(x, w) for w in weights] for name, weights in ways.items()}
    taken = {name: turn / len(dense) for name, turn in medians(turns, rounds).items()}
    return Cell(shape, tokens, **taken, error=error)


def threshold(cells: list[Cell]) -> int | None:
    """The smallest product from which on the semi-structured one is faster in every cell; None if in none."""
    slower = max((cell.product for cell in cells if cell.ratio <= 1), default=0)
    return min((cell.product for cell in cells if cell.product > slower), default=None)


def table(cells: list[Cell]) -> str:
    rows = [
        (
            "{}x{}".format(*cell.shape),
            f"{cell.tokens:,}",
            f"{cell.dense:,.1f} µs",
            f"{cell.semi_structured:,.1f} µs",
            f"{cell.ratio:.2f}x",
            f"{cell.error:.0e}",
            "semi-structured" if cell.chosen else "as others",
            "yes" if cell.is_right else "no",
        )
        for cell in cells
    ]
    columns = ("layer", "tokens", "dense", "semi-structured", "speed-up", "error", "SparseLinear", "the faster")
    return format_table(columns, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("This measures products on a GPU, and torch sees none here.")
    if not is_able(torch.device("cuda", 0)):
        raise SystemExit(
            f"{torch.cuda.get_device_name(0)}, torch {torch.__version__}: 2:4 needs a GPU of compute capability "
            f"{'.'.join(map(str, CAPABILITY))} or later, and a torch that has cuSPARSELt."
        )
    torch.manual_seed(0)
    torch.set_default_device("cuda")
    with torch.inference_mode():
        cases = [(shape, tokens) for shape in SHAPES for tokens in TOKENS]
        cells = [measure(shape, tokens, args.rounds) for shape, tokens in tqdm(cases, desc="products")]
    versions = f"torch {torch.__version__}, cuSPARSELt {torch.backends.cusparselt.version()}"
    print(f"{torch.cuda.get_device_name(0)}, {versions}\n\n{table(cells)}\n")
    wrong = sum(not cell.is_right for cell in cells)
    slower = f"the slower product in {wrong} of {len(cells)} cells"
    print(f"SparseLinear takes {slower if wrong else 'the faster product in every cell'}.")
    found = threshold(cells)
    print(f"PRODUCT = {found:_} fits this GPU; it is {PRODUCT:_}." if found else "No PRODUCT fits: the largest loses.")


if __name__ == "__main__":
    main()
