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
