"""What an importance needs to know of the inputs of each layer, from calibration data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from .functional import Method
from .layer import PSTLayer, active_layers
from .mode import evaluating


@torch.no_grad()
def calibrate(model: nn.Module, dataloader: Iterable[Any]) -> None:
    """Run calibration data through a model and note, for `importance="wanda"`, the squares of each layer's inputs.

    The model runs as it is now: before any pruning the inputs are those of the dense model. A call adds to what
    earlier calls have seen. Nothing is kept but one number an input, so the memory does not grow with the data. Tokens
    that an `attention_mask` leaves out do not count.

    In a training of several processes all of them call this, each with a part of the data or with all of it, and each
    learns what the others have seen, so that all prune the same entries.

    Args:
        model (`nn.Module`):
            A model with PST layers whose active adapter has `importance="wanda"`.
        dataloader (iterable):
            Batches: mappings, passed as keyword arguments, or the model's input itself. They are moved to the device
            of the model.

    Raises:
        ValueError: if no active adapter has `importance="wanda"`, the adapter is merged, or there is no batch.
    """
    layers = [layer for layer in active_layers(model) if _buffers(layer)]
    if not layers:
        raise ValueError(
            "calibrate() has nothing to note: no active adapter has importance='wanda', the only one that looks at "
            "inputs before the training."
        )
    if any(layer.merged for layer in layers):
        raise ValueError("The adapter is merged: call unmerge_adapter() before calibrate().")
    padding = Padding()
    seen = [buffer.view(torch.float64) for layer in layers for buffer in _buffers(layer)]
    before = [buffer.clone() for buffer in seen]
    handles = [layer.register_forward_pre_hook(partial(_note, padding)) for layer in layers]
    try:
        batch = None
        with evaluating(model):
            for batch in tqdm(dataloader, desc="calibrating", unit="batch"):
                run_batch(model, batch, layers[0].get_base_layer().weight.device, padding)
        if batch is None:
            raise ValueError("calibrate() got no batch: the dataloader is empty, or an iterator that was used up.")
    finally:
        for handle in handles:
            handle.remove()
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        for buffer, earlier in zip(seen, before, strict=True):
            buffer -= earlier
            torch.distributed.all_reduce(buffer)
            buffer += earlier


class Padding:
    """Which tokens of the current batch count: bool [batch, tokens], or None if all do."""

    mask: Tensor | None = None

    def tokens(self, x: Tensor) -> Tensor:
        """Those of x [batch, tokens, channels] that count, [tokens that count, channels]; all of another shape."""
        counts = self.mask is not None and x.shape[:2] == self.mask.shape
        return x[self.mask.to(x.device)] if counts and x.ndim == 3 else x.reshape(-1, x.shape[-1])


def run_batch(model: nn.Module, batch: Any, device: torch.device, padding: Padding) -> None:
    """Run a batch through a model: a mapping of keyword arguments, or the model's input itself."""
    if not isinstance(batch, Mapping):
        padding.mask = None
        model(batch.to(device))
        return
    batch = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}
    mask = batch.get("attention_mask")
    padding.mask = mask.bool() if isinstance(mask, Tensor) and mask.ndim == 2 else None
    model(**batch)


def _note(padding: Padding, layer: PSTLayer, args: tuple[Tensor, ...]) -> None:
    Method.of(layer.active_config).importance.observe(padding.tokens(args[0]), *_buffers(layer))


def _buffers(layer: PSTLayer) -> list[Tensor]:
    names = Method.of(layer.active_config).importance.buffers
    return [getattr(layer, name)[layer.active_pst_adapter] for name in names]
