"""Which layers and channels a smaller model keeps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .anatomy import Anatomy, Attention
from .measuring import Measured
from .rotary import turned_pairs
from .widths import weight_of

LAYERS = ("even", "first", "last", "importance", "random")
CHANNELS = ("importance", "random")


class Heads(NamedTuple):
    """The channels that the heads of one attention keep, ascending."""

    queries: Tensor
    """Of queries and keys, int64 [units, kept]."""
    values: Tensor
    """Of values, int64 [units, kept]."""


class Kept(NamedTuple):
    """What stays of a model, all indices ascending."""

    layers: list[int]
    hidden: Tensor | None
    """Of the residual stream, int64 [kept]; None if the widths stay."""
    heads: dict[str, Heads]
    """By the names of the attentions."""
    neurons: dict[str, Tensor]
    """By the names of the feed-forward blocks, int64 [kept]."""


def choose_layers(
    choice: str | Sequence[int], count: int, kept: int, changes: Sequence[float] | None, generator: torch.Generator
) -> list[int]:
    """The layers that stay, ascending.

    Args:
        choice: one of `LAYERS`, or the layers themselves.
        count: how many layers there are.
        kept: how many of them stay.
        changes: of each layer how much it changes its input, for `"importance"`.
        generator: for `"random"`.
    """
    if not isinstance(choice, str):
        return sorted(choice)
    if choice == "even":
        return [round(i * (count - 1) / max(kept - 1, 1)) for i in range(kept)]
    if choice in ("first", "last"):
        return list(range(kept) if choice == "first" else range(count - kept, count))
    scores = torch.rand(count, generator=generator) if choice == "random" else torch.tensor(changes)
    return scores.topk(kept).indices.sort().values.tolist()


class ChannelSelection:
    """Chooses the channels of a model that stay.

    Args:
        model: the model.
        anatomy: its parts.
        measured: what its linear layers take on calibration data; None to choose at random.
        layers: the layers that stay, since only these count.
        generator: for a random choice.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        anatomy: Anatomy,
        measured: Measured | None,
        layers: Sequence[int],
        generator: torch.Generator,
    ) -> None:
        self._model, self._anatomy, self._measured, self._generator = model, anatomy, measured, generator
        self._attentions = {n: a for n, a in anatomy.attentions.items() if anatomy.layer_of(n) in layers}
        self._neurons = {n: s for n, s in anatomy.neurons.items() if anatomy.layer_of(n) in layers}
        self._layers = {*layers, None}

    def hidden(self, size: int, kept: int) -> Tensor:
        """The channels of the residual stream, [kept]: of each the share in the outputs of the linear layers that
        read it, summed over these layers."""
        total = torch.zeros(size, dtype=torch.float64)
        for linear in self._readers(size):
            energy = self._energy(linear)
            total += energy / energy.sum().clamp_min(1e-30)
        return self._largest(total, kept)

    def neurons(self, kept: int) -> dict[str, Tensor]:
        """Of each feed-forward block the neurons, [kept], by what their values add to its output."""
        return {name: self._largest(self._energy(s.taker), kept) for name, s in self._neurons.items()}

    def heads(self, kept: int, frequencies: int, choices: Sequence[Tensor]) -> tuple[dict[str, Heads], int]:
        """Of each attention the channels that its heads keep, and which of the choices is the best.

        Args:
            kept: how many channels of each head stay.
            frequencies: how many the rotary positions have, each for two channels; 0 if there are none.
            choices: which of the frequencies may stay, int64 each; none if there are no rotary positions.
        """
        products = {name: self._products(attention) for name, attention in self._attentions.items()}
        best, turned, turning = 0, torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64)
        if choices:
            pairs = turned_pairs(next(iter(self._attentions.values())).structure.owner, frequencies)
            total = self._random_or(torch.stack([scores[:, pairs].sum((0, 2)) for scores in products.values()]).sum(0))
            best = max(range(len(choices)), key=lambda index: float(total[choices[index]].sum()))
            turning, turned = pairs.flatten(), pairs[choices[best]].flatten()
        heads = {}
        for name, attention in self._attentions.items():
            scores = products[name]
            if attention.norms:  # whose weights all heads share
                scores = scores.sum(0, keepdim=True).expand_as(scores)
            free = scores.clone()
            free[:, turning] = -1
            resting = self._largest(free, kept - len(turned), shared=bool(attention.norms))
            queries = torch.cat([turned.expand(len(scores), -1), resting], 1).sort(1).values
            heads[name] = Heads(queries, self._largest(self._values(attention), kept))
        return heads, best

    def _readers(self, size: int) -> Iterator[nn.Module]:
        """The linear layers that read the residual stream."""
        takers = {a.structure.taker for a in self._attentions.values()} | {s.taker for s in self._neurons.values()}
        for name, module in self._model.named_modules():
            reads = isinstance(module, (nn.Linear, Conv1D)) and weight_of(module).shape[1] == size
            if reads and module not in takers and self._anatomy.layer_of(name) in self._layers:
                yield module

    def _energy(self, linear: nn.Module) -> Tensor:
        """Of each input of a linear layer the squares that it adds to the output, float64 [in]."""
        weight = weight_of(linear).detach().double().square().sum(0)
        squares = 1.0 if self._measured is None else self._measured.squares.get(linear, torch.zeros_like(weight))
        return (weight * squares).cpu()

    def _products(self, attention: Attention) -> Tensor:
        """Of each channel of queries and keys the size of its products, float64 [units, channels]."""
        queries, keys = (self._rows(attention, role) for role in "qk")
        return (queries.sum(1) * keys.sum(1)).sqrt()

    def _rows(self, attention: Attention, role: str) -> Tensor:
        """Of each channel of one role the squares of its output, float64 [units, heads of the role, channels]."""
        linear, stacks, index = next(
            (linear, stacks, index)
            for (linear, _), stacks in zip(attention.structure.makers, attention.layouts, strict=True)
            for index, roles in enumerate(stacks)
            if role in roles
        )
        weight = weight_of(linear).detach().double().square()
        if self._measured is not None:
            weight = weight * self._measured.squares[linear]
        rows = weight.sum(1).chunk(len(stacks))[index].cpu().view(attention.units, -1, attention.head_dim)
        return rows[:, [place for place, letter in enumerate(stacks[index]) if letter == role]]

    def _values(self, attention: Attention) -> Tensor:
        """Of each channel of the values what it adds to the output, float64 [units, channels]."""
        return self._energy(attention.structure.taker).view(attention.units, attention.group, -1).sum(1)

    def _largest(self, scores: Tensor, kept: int, shared: bool = False) -> Tensor:
        """The indices of the largest along the last dimension, ascending."""
        excluded = scores < 0
        scores = self._random_or(scores, shared).masked_fill(excluded, -1)
        return scores.topk(kept).indices.sort(-1).values

    def _random_or(self, scores: Tensor, shared: bool = False) -> Tensor:
        if self._measured is not None:
            return scores
        drawn = torch.rand(scores.shape, generator=self._generator, dtype=torch.float64)
        return drawn[:1].expand_as(drawn) if shared else drawn
