"""What each layer of a transformers model takes in a training step, measured on one micro-batch.

The model runs as it is. Hooks note when the hidden state enters each layer, and, in the backward pass, when its
gradient is there; `torch.autograd.graph.saved_tensors_hooks` sees what the forward pass keeps for the backward pass.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from peft_pst.labels import without_adapter

from .stages import call, find_parts

MOMENTS = 2
"""Tensors that Adam keeps for each trainable parameter, in its dtype."""


@dataclass(frozen=True)
class Cost:
    """What a part of a model takes for one micro-batch, and what it holds. Costs of parts add up."""

    forward: float = 0.0
    """Seconds of the forward pass."""
    backward: float = 0.0
    """Seconds of the backward pass, the gradients of the weights included."""
    weights: int = 0
    """Bytes of parameters and buffers, frozen ones too."""
    gradients: int = 0
    """Bytes of the gradients of the trainable parameters."""
    optimizer_states: int = 0
    """Bytes of Adam's two moments of the trainable parameters."""
    kept: int = 0
    """Bytes that stay for the backward pass, for each micro-batch whose backward pass is to come: each storage once,
    weights not, and the hidden state that a part gets, not the one that it gives."""

    def __add__(self, other: Cost) -> Cost:
        return Cost(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(self)))

    @property
    def seconds(self) -> float:
        """Forward and backward pass of a micro-batch."""
        return self.forward + self.backward


@dataclass(frozen=True)
class Costs:
    """What the parts of a model take, by `measure_costs`.

    The layers of a larger model of the same shape cost the same, so that
    `dataclasses.replace(costs, layers=costs.layers[:1] * 80)` stands for a model that fits on no machine here.
    """

    before: Cost
    """What comes before the layers, such as embeddings; on the first stage."""
    layers: tuple[Cost, ...]
    after: Cost
    """What comes after them, such as the last norm, the head and the loss; on the last stage."""
    hidden: int
    """Bytes of the hidden state that travels from stage to stage, and of its gradient that travels back."""
    shared: int
    """Bytes that every layer keeps and that are the same for all of them, such as a mask or rotary embeddings: each
    stage keeps them once for a micro-batch. They are in no layer's `kept`."""

    @property
    def whole(self) -> Cost:
        """The model on one machine."""
        return self.of_stages([len(self.layers)])[0]

    def of_stages(self, split: Sequence[int]) -> list[Cost]:
        """The cost of each stage.

        Args:
            split: how many consecutive layers each stage has.

        Raises:
            ValueError: if a stage has no layer, or the stages do not have all layers together.
        """
        if min(split, default=0) < 1 or sum(split) != len(self.layers):
            raise ValueError(
                f"split={list(split)!r} does not fit: expected at least one layer for each stage, and "
                f"{len(self.layers)} layers in all."
            )
        stages, first = [], 0
        for number in split:
            stages.append(sum(self.layers[first : first + number], Cost(kept=self.shared)))
            first += number
        stages[0] += self.before
        stages[-1] += self.after
        return stages


def measure_costs(model: nn.Module, batch: Mapping[str, Tensor], repeats: int = 5) -> Costs:
    """Run the model on a micro-batch, forward and backward, and measure its parts.

    Times are medians over the repeats, after a pass that does not count. Gradients are added to those that this pass
    has made, as a micro-batch adds them to those of the ones before. Parameters, gradients and the state of the random
    numbers are afterwards what they were before. What the backward pass allocates for a moment is not measured.

    Args:
        model: a causal language model or an encoder with a head, from transformers, with PST adapters or without, on
            the device and with the threads that a stage will have; in training mode if dropout is to count.
        batch: one micro-batch with labels, as the model takes it.
        repeats: how often the passes are timed.

    Raises:
        ValueError: if the model cannot be cut into stages, or returns no loss, or none of its parameters trains, or
            repeats is less than 1.
    """
    if repeats < 1:
        raise ValueError(f"repeats={repeats!r} is not possible: expected at least 1.")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(f"No parameter of this {type(model).__name__} trains: there is no backward pass to measure.")
    layers = without_adapter(model).base_model.get_submodule(find_parts(model).layers)
    device = next(model.parameters()).device
    gradients = {parameter: parameter.grad for parameter in model.parameters()}
    with torch.random.fork_rng([] if device.type == "cpu" else [device]):
        try:
            for parameter in gradients:
                parameter.grad = None
            seen = _look(model, batch, layers)
            passes = [_time(model, batch, layers, device) for _ in range(repeats)]
        finally:
            for parameter, gradient in gradients.items():
                parameter.grad = gradient
    forward, backward = torch.tensor(passes, dtype=torch.float64).median(dim=0).values.tolist()
    parts = [
        Cost(*seconds, *_held(tensors), kept)
        for *seconds, tensors, kept in zip(forward, backward, _tensors(model), seen.kept, strict=True)
    ]
    return Costs(parts[0], tuple(parts[1:-1]), parts[-1], seen.hidden, seen.shared)


@contextmanager
def _borders(layers: Sequence[nn.Module], visit: Callable[[int, Tensor], None]) -> Iterator[None]:
    """Call `visit` with the number of each layer and the hidden state [sequences, tokens, width] that enters it, and
    last with the number of layers and what leaves the last one."""

    def enter(number: int, args: tuple, kwargs: dict) -> None:
        visit(number, args[0] if args else kwargs["hidden_states"])

    def leave(module: nn.Module, args: tuple, output: Tensor | tuple) -> None:
        visit(len(layers), output if isinstance(output, Tensor) else output[0])

    handles = [
        layer.register_forward_pre_hook(lambda module, args, kwargs, i=i: enter(i, args, kwargs), with_kwargs=True)
        for i, layer in enumerate(layers)
    ]
    handles.append(layers[-1].register_forward_hook(leave))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Seen(NamedTuple):
    """What a pass keeps for its backward pass, in bytes."""

    kept: list[int]
    """By what is before the layers, each layer, and what is after them."""
    hidden: int
    shared: int


def _look(model: nn.Module, batch: Mapping[str, Tensor], layers: Sequence[nn.Module]) -> _Seen:
    """One pass. Addresses tell storages apart, since all that is kept lives until the backward pass."""
    part, hidden = 0, 0
    weights = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept: list[dict[int, int]] = [{} for _ in range(len(layers) + 2)]

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[part][storage.data_ptr()] = storage.nbytes()
        return tensor

    def visit(number: int, state: Tensor) -> None:
        nonlocal part, hidden
        part, hidden = number + 1, state.nbytes
        if 0 < number < len(layers):
            keep(state)  # a stage holds what it received, whether an operator needs it or not

    with _borders(layers, visit), saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = call(model, **batch).loss
    if loss is None:
        raise ValueError(f"The {type(model).__name__} gave no loss: expected a batch with labels, got {list(batch)}.")
    loss.backward()
    everywhere = [entries.keys() for entries in kept[1:-1]]
    shared = set.intersection(*map(set, everywhere)) if len(layers) > 1 else set()
    return _Seen(
        [sum(size for address, size in entries.items() if address not in shared) for entries in kept],
        hidden,
        sum(kept[1][address] for address in shared),
    )


def _time(
    model: nn.Module, batch: Mapping[str, Tensor], layers: Sequence[nn.Module], device: torch.device
) -> tuple[list[float], list[float]]:
    """Seconds of forward and of backward of what is before the layers, of each layer, and of what is after them."""
    entered: list[float] = []
    arrived: dict[int, float] = {}

    def visit(number: int, hidden: Tensor) -> None:
        entered.append(_now(device))
        if hidden.requires_grad:  # autograd calls this once all of the gradient is there
            hidden.register_hook(lambda gradient: arrived.__setitem__(number, _now(device)))

    start = _now(device)
    with _borders(layers, visit):
        loss = call(model, **batch).loss
    middle = _now(device)
    loss.backward()
    end = _now(device)
    # without a gradient at a border the backward pass ended behind it
    left = [end, *(arrived.get(number, end) for number in range(len(layers) + 1)), middle]
    forward = [after - before for before, after in pairwise([start, *entered, middle])]
    return forward, [before - after for before, after in pairwise(left)]


def _now(device: torch.device) -> float:
    """Seconds on a clock, all work of the device done."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()


def _tensors(model: nn.Module) -> list[list[Tensor]]:
    """Parameters and buffers of what is before the layers, of each layer, and of what is after them. A tied weight is
    in the first and in the last, as each end of a pipeline has its own."""
    parts, base = find_parts(model), without_adapter(model).base_model
    layers = base.get_submodule(parts.layers)
    before = [base.get_submodule(name) for name in (parts.embeddings, parts.added, *parts.between) if name]
    taken = {module for part in (*before, layers) for module in part.modules()}
    after = [module for module in model.modules() if module not in taken]
    return [
        [tensor for module in before for tensor in (*module.parameters(), *module.buffers())],
        *([*layer.parameters(), *layer.buffers()] for layer in layers),
        [t for module in after for t in (*module.parameters(recurse=False), *module.buffers(recurse=False))],
    ]


def _held(tensors: Iterable[Tensor]) -> tuple[int, int, int]:
    """Bytes of tensors, of the gradients of those that train, and of what Adam keeps for them."""
    distinct = {id(tensor): tensor for tensor in tensors}.values()
    gradients = sum(tensor.nbytes for tensor in distinct if tensor.requires_grad)
    return sum(tensor.nbytes for tensor in distinct), gradients, MOMENTS * gradients
