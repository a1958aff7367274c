"""What a method trains in each layer: tensors with a shape and a start."""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

Kind = Literal["factor", "delta", "score"]
"""Of a parameter: a low-rank factor, a dense change of the weight, a dense score. Each has its own learning rate."""


class Start(NamedTuple):
    """The shape of a parameter and the normal distribution that it is drawn from."""

    shape: tuple[int, ...]
    mean: float = 0.0
    std: float = 0.0

    def draw(self, random: bool) -> Tensor:
        """A fresh tensor, float32. `random` draws what would start at one value with a deviation of 0.02."""
        std = self.std or (0.02 if random else 0.0)
        return torch.normal(self.mean, std, self.shape) if std else torch.full(self.shape, self.mean)


def std_under(factor: float) -> float:
    """The deviation that the first matrix of a product starts with, such that `factor` times it has that of N(0, 1):
    a step of the second one then changes the product by as much whatever the factor is, and the first one learns the
    faster the larger it is."""
    return 1 / abs(factor) if factor else 1.0
