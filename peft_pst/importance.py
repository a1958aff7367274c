"""What an entry of a weight is worth: the entries with the largest importance stay."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from .parameters import Kind, Start, std_under

if TYPE_CHECKING:
    from .config import PSTConfig


class Importance:
    """The importance S of each entry of W', both [out, in], from the parameters and buffers called `names`.

    The masked weight is gates ∘ W'. Where a method says nothing else, the gates are the mask M. With G the gradient of
    the masked weight, the mask is differentiated straight through: dS = dM = G ∘ W'.
    """

    names: ClassVar[tuple[str, ...]] = ()
    kind: ClassVar[Kind] = "score"
    buffers: ClassVar[tuple[str, ...]] = ()
    starts_equal: ClassVar[bool] = False
    """Whether all entries are worth the same until the training has moved the scores."""

    def __init__(self, config: PSTConfig) -> None:
        pass

    def starts(self, n: int, k: int) -> tuple[Start, ...]:
        """The start of each parameter for a weight [n, k]."""
        return ()

    def empty_buffers(self, n: int, k: int) -> tuple[Tensor, ...]:
        """Each buffer for a weight [n, k] before any data was seen."""
        return ()

    def check_ready(self, layer_name: str, *buffers: Tensor) -> None:
        """Raise ValueError if the buffers cannot rank the entries yet."""

    def observe(self, tokens: Tensor, *buffers: Tensor) -> None:
        """Add to the buffers what inputs of the layer say, [tokens, in]."""

    def score(self, weight: Tensor, *arguments: Tensor) -> Tensor:
        """S, [out, in], from W' and the parameters and buffers."""
        raise NotImplementedError

    def draw_seed(self) -> Tensor | None:
        """The seed of this step's random gates, int64 scalar on the CPU; None if they are not random."""
        return None

    def gates(self, mask: Tensor, seed: Tensor | None, *arguments: Tensor) -> Tensor:
        """What each entry of W' is multiplied by, given the mask as ones and zeros; random only with a seed."""
        return mask

    def penalty(self, *arguments: Tensor) -> Tensor | None:
        """The sum over the entries of what the method charges for an open gate; None if it charges nothing."""
        return None

    def backward(
        self, G: Tensor, weight: Tensor, mask: Tensor, seed: Tensor | None, *arguments: Tensor
    ) -> tuple[Tensor, ...]:
        """The gradients of W' and of each parameter. May overwrite G and the weight."""
        return (G.mul_(mask),)


class PST(Importance):
    """S = |W'| + alpha1 · A B + alpha2 · (R 1ᵀ + 1 Cᵀ)  (PST, arXiv 2205.11005, section 3).

    A B, [out, mask_r] times [mask_r, in], is what the data says about single entries; R [out] and C [in] about whole
    rows and columns. |W'| is differentiated too: dW' = G ∘ M + dS ∘ sign(W') = G ∘ (M + |W'|).
    """

    names = ("pst_A", "pst_B", "pst_R", "pst_C")
    kind = "factor"

    def __init__(self, config: PSTConfig) -> None:
        self.mask_r, self.alpha1, self.alpha2 = config.mask_r, config.alpha1, config.alpha2

    def starts(self, n: int, k: int) -> tuple[Start, ...]:
        return Start((n, self.mask_r), std=std_under(self.alpha1)), Start((self.mask_r, k)), Start((n,)), Start((k,))

    def score(self, weight: Tensor, A: Tensor, B: Tensor, R: Tensor, C: Tensor) -> Tensor:
        # one product, which reads and writes S once
        ones = torch.ones_like
        left = torch.cat((self.alpha1 * A, self.alpha2 * R[:, None], self.alpha2 * ones(R)[:, None]), dim=1)
        return weight.abs().addmm_(left, torch.cat((B, ones(C)[None], C[None])))

    def backward(
        self, G: Tensor, weight: Tensor, mask: Tensor, seed: None, A: Tensor, B: Tensor, R: Tensor, C: Tensor
    ) -> tuple[Tensor, ...]:
        dS = G * weight
        row, column = self.alpha2 * torch.ones_like(C)[None], self.alpha2 * torch.ones_like(R)[:, None]
        dA, dR = (dS @ torch.cat((self.alpha1 * B, row)).T).tensor_split((-1,), dim=1)
        dB, dC = (torch.cat((self.alpha1 * A, column), dim=1).T @ dS).tensor_split((-1,))
        return weight.abs_().add_(mask).mul_(G), dA, dB, dR[:, 0], dC[0]


class Magnitude(Importance):
    """S = |W'|. Under a growing sparsity this is gradual magnitude pruning (Zhu and Gupta, arXiv 1710.01878)."""

    def score(self, weight: Tensor) -> Tensor:
        return weight.abs()


class Movement(Importance):
    """S is trained, [out, in], from 0: it grows where training moves W' away from 0 (arXiv 2005.07683, section 4)."""

    names = ("pst_S",)
    starts_equal = True

    def starts(self, n: int, k: int) -> tuple[Start]:
        return (Start((n, k)),)

    def score(self, weight: Tensor, S: Tensor) -> Tensor:
        return S

    def backward(self, G: Tensor, weight: Tensor, mask: Tensor, seed: None, S: Tensor) -> tuple[Tensor, Tensor]:
        dS = weight.mul_(G)
        return G.mul_(mask), dS


class SoftMovement(Movement):
    """Movement scores that compete across the model for one threshold, each charged sigmoid(S) (arXiv 2005.07683,
    section 4, "soft movement pruning"). The budget sets the threshold, where the paper tunes the charge until it fits.
    """

    def penalty(self, S: Tensor) -> Tensor:
        return S.sigmoid().sum()


class L0(Importance):
    """Hard concrete gates z (Louizos et al., arXiv 1712.01312, section 2.3): the weight is M ∘ z ∘ W'.

    S = log alpha, [out, in], the logit of a gate being open. The mask keeps the largest, so that the budget is exact,
    where the paper tunes a penalty until it fits. Each kept entry is multiplied by its gate, random in training and
    without noise in evaluation.
    """

    names = ("pst_log_alpha",)
    starts_equal = True
    GAMMA, ZETA, BETA = -0.1, 1.1, 2 / 3

    def starts(self, n: int, k: int) -> tuple[Start]:
        return (Start((n, k), mean=math.log(9), std=0.01),)  # open with a probability of 0.9

    def score(self, weight: Tensor, log_alpha: Tensor) -> Tensor:
        return log_alpha

    def draw_seed(self) -> Tensor:
        return torch.randint(2**62, (), device="cpu")

    def gates(self, mask: Tensor, seed: Tensor | None, log_alpha: Tensor) -> Tensor:
        return self._hard_concrete(log_alpha, seed)[0].mul_(mask)

    def penalty(self, log_alpha: Tensor) -> Tensor:
        return (log_alpha - self.BETA * math.log(-self.GAMMA / self.ZETA)).sigmoid().sum()

    def backward(
        self, G: Tensor, weight: Tensor, mask: Tensor, seed: Tensor, log_alpha: Tensor
    ) -> tuple[Tensor, Tensor]:
        z, s = self._hard_concrete(log_alpha, seed)
        moves = ((z > 0) & (z < 1)).to(z.dtype)  # a clipped gate does not move with log alpha
        dz = weight.mul_(G)
        dlog_alpha = dz.mul_(moves).mul_(s).mul_(1 - s).mul_((self.ZETA - self.GAMMA) / self._temperature(seed))
        return G.mul_(z.mul_(mask)), dlog_alpha

    def _temperature(self, seed: Tensor | None) -> float:
        return 1.0 if seed is None else self.BETA

    def _hard_concrete(self, log_alpha: Tensor, seed: Tensor | None) -> tuple[Tensor, Tensor]:
        """The gate z in [0, 1] and the sigmoid s that it is stretched and clipped from."""
        s = log_alpha
        if seed is not None:
            generator = torch.Generator(log_alpha.device).manual_seed(int(seed))
            u = torch.rand(log_alpha.shape, generator=generator, device=log_alpha.device, dtype=log_alpha.dtype)
            s = u.logit_(eps=1e-6).add_(log_alpha)
        s = (s / self._temperature(seed)).sigmoid_()
        return (s * (self.ZETA - self.GAMMA) + self.GAMMA).clamp_(0, 1), s


class Wanda(Importance):
    """S = |W'| · ‖x‖₂ with the norm of each input over calibration data (Sun et al., arXiv 2306.11695).

    Its buffer holds the sum of the squares of each input and the number of tokens, [in + 1], as bits of their float64,
    so that no cast changes them. The norm is that of the mean, which does not depend on how many tokens were seen.
    """

    names = ("pst_input_squares",)
    buffers = ("pst_input_squares",)

    def empty_buffers(self, n: int, k: int) -> tuple[Tensor]:
        return (torch.zeros(k + 1, dtype=torch.int64),)

    def check_ready(self, layer_name: str, input_squares: Tensor) -> None:
        if not input_squares[-1]:
            raise ValueError(
                f"importance='wanda' has seen no input of {layer_name!r} yet, so it cannot rank its entries: call "
                "peft_pst.calibrate(model, dataloader) before the sparsity grows."
            )

    def observe(self, tokens: Tensor, input_squares: Tensor) -> None:
        squares = tokens.double().square().sum(0)
        seen = input_squares.view(torch.float64)
        seen += torch.cat((squares, squares.new_tensor([len(tokens)])))

    def score(self, weight: Tensor, input_squares: Tensor) -> Tensor:
        squares = input_squares.view(torch.float64)
        norm = (squares[:-1] / squares[-1].clamp(min=1)).sqrt()
        return weight.abs().mul_(norm.to(weight.dtype))

    def backward(
        self, G: Tensor, weight: Tensor, mask: Tensor, seed: None, input_squares: Tensor
    ) -> tuple[Tensor, None]:
        return G.mul_(mask), None


IMPORTANCES: dict[str, type[Importance]] = {
    "pst": PST,
    "magnitude": Magnitude,
    "movement": Movement,
    "soft_movement": SoftMovement,
    "l0": L0,
    "wanda": Wanda,
}
