"""What the parts of a model do on calibration data: how large channels are, how much a layer changes."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers.pytorch_utils import Conv1D

from ..calibration import Padding, run_batch
from ..mode import evaluating

SEQUENCES, TOKENS = 8, 64
"""The random tokens that a model is measured on without calibration data."""


class Measured(NamedTuple):
    """Sums over the tokens that count."""

    squares: dict[nn.Module, Tensor]
    """Of each linear layer the squares of its inputs, float64 [in]."""
    changes: list[float]
    """Of each layer 1 - cos(its input, its output), the mean  (block influence, ShortGPT, arXiv 2403.03853)."""


@torch.no_grad()
def measure(model: nn.Module, layers: nn.ModuleList, batches: Iterable[Any] | None) -> Measured:
    """Run batches through a model, in evaluation.

    Args:
        batches: mappings, passed as keyword arguments, or the model's input itself; None for random tokens.

    Raises:
        ValueError: if there is no batch.
    """
    padding, squares = Padding(model), {}
    turned, tokens = torch.zeros(len(layers), dtype=torch.float64), 0
    device = next(model.parameters()).device

    def note(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        x = padding.tokens(module, args[0]).double()
        squares[module] = squares.get(module, 0) + x.square().sum(0)

    def compare(index: int, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        nonlocal tokens
        before = padding.tokens(module, args[0] if args else kwargs["hidden_states"]).double()
        after = padding.tokens(module, output if isinstance(output, Tensor) else output[0]).double()
        turned[index] += (1 - torch.cosine_similarity(before, after, -1)).sum().cpu()
        tokens += len(before)

    batch = None
    with ExitStack() as stack:
        stack.enter_context(evaluating(model))
        for module in model.modules():
            if isinstance(module, (nn.Linear, Conv1D)):
                stack.callback(module.register_forward_pre_hook(note).remove)
        for index, layer in enumerate(layers):
            stack.callback(layer.register_forward_hook(partial(compare, index), with_kwargs=True).remove)
        for batch in tqdm(_random_tokens(model) if batches is None else batches, desc="calibrating", unit="batch"):
            run_batch(model, batch, device, padding)
    if batch is None:
        raise ValueError("calibration has no batch: the dataloader is empty, or an iterator that was used up.")
    return Measured(squares, (turned * len(layers) / tokens).tolist())


def _random_tokens(model: nn.Module) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    length = min(TOKENS, getattr(model.config, "max_position_embeddings", TOKENS) // 2)
    ids = torch.randint(model.config.vocab_size, (SEQUENCES, 1, length), generator=generator)
    return [{"input_ids": each} for each in ids]  # a classifier may know no padding
