"""How the weight trains: what is added to the frozen one."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Protocol

import torch
from torch import Tensor

from .parameters import Kind, Start, std_under

if TYPE_CHECKING:
    from .config import PSTConfig


class Update(Protocol):
    """W' from the frozen weight W, both [out, in], and the parameters called `names`."""

    names: ClassVar[tuple[str, ...]]
    kind: ClassVar[Kind]

    def __init__(self, config: PSTConfig) -> None: ...

    def starts(self, n: int, k: int) -> tuple[Start, ...]:
        """The start of each parameter for a weight [n, k]."""

    def weight(self, weight: Tensor, *parameters: Tensor) -> Tensor:
        """W', a new tensor in the dtype of the parameters."""

    def backward(self, dweight: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
        """The gradient of each parameter from that of W'."""


class LowRank:
    """W' = W + beta · U V  (PST, arXiv 2205.11005, section 3)."""

    names = ("pst_U", "pst_V")
    kind = "factor"

    def __init__(self, config: PSTConfig) -> None:
        self.r, self.beta = config.r, config.beta

    def starts(self, n: int, k: int) -> tuple[Start, ...]:
        return Start((n, self.r), std=std_under(self.beta)), Start((self.r, k))

    def weight(self, weight: Tensor, U: Tensor, V: Tensor) -> Tensor:
        return torch.addmm(weight.to(U.dtype), U, V, alpha=self.beta)

    def backward(self, dweight: Tensor, U: Tensor, V: Tensor) -> tuple[Tensor, Tensor]:
        return self.beta * (dweight @ V.T), self.beta * (U.T @ dweight)


class Full:
    """W' = W + D: a dense delta, so that every entry trains and the frozen weight is still there."""

    names = ("pst_D",)
    kind = "delta"

    def __init__(self, config: PSTConfig) -> None:
        pass

    def starts(self, n: int, k: int) -> tuple[Start]:
        return (Start((n, k)),)

    def weight(self, weight: Tensor, D: Tensor) -> Tensor:
        return D + weight.to(D.dtype)

    def backward(self, dweight: Tensor, D: Tensor) -> tuple[Tensor]:
        return (dweight,)


class Frozen:
    """W' = W: only the mask may train."""

    names = ()
    kind = "factor"

    def __init__(self, config: PSTConfig) -> None:
        pass

    def starts(self, n: int, k: int) -> tuple[()]:
        return ()

    def weight(self, weight: Tensor) -> Tensor:
        dtype = torch.promote_types(weight.dtype, torch.float32)
        return weight.to(dtype, memory_format=torch.contiguous_format, copy=True)

    def backward(self, dweight: Tensor) -> tuple[()]:
        return ()


UPDATES: dict[str, type[Update]] = {"low_rank": LowRank, "full": Full, "none": Frozen}
