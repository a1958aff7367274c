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
    """The deviation that the first matrix of a product starts with, which is multiplied by `factor`: 1, or what makes
    it 1 with a larger factor. A step of the second matrix then changes the product no more than under 1, and the first
    one learns the faster the larger the factor is."""
    return 1 / max(1.0, abs(factor))
