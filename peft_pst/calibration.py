"""What an importance needs to know of the inputs of each layer, from calibration data."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel

from .functional import Method
from .labels import IGNORED, without_adapter
from .layer import PSTLayer, active_layers
from .mode import evaluating


@torch.no_grad()
def calibrate(model: nn.Module, dataloader: Iterable[Any]) -> None:
    """Run calibration data through a model and note, for `importance="wanda"`, the squares of each layer's inputs.

    The model runs as it is now: before any pruning the inputs are those of the dense model. A call adds to what
    earlier calls have seen. Nothing is kept but one number an input, so the memory does not grow with the data. Tokens
    that an `attention_mask` leaves out do not count, and in the decoder of an encoder-decoder those that its own mask
    or a label of -100 does; but a layer that is given some of the tokens in another order, such as one expert of a
    mixture, counts all of them.

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
    padding = Padding(model)
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
    """Which tokens of the current batch count.

    Args:
        model: with or without an adapter.
    """

    def __init__(self, model: nn.Module) -> None:
        base = without_adapter(model)
        self._encoder, self._in_decoder = None, set()
        if isinstance(base, PreTrainedModel) and base.config.is_encoder_decoder:
            self._encoder, self._in_decoder = base.get_encoder(), set(base.get_decoder().modules())
        self._encoded: Tensor | None = None
        self.read({})

    def read(self, batch: Mapping[str, Any]) -> None:
        """Take the masks of a batch, bool [batch, tokens] each, or None if all tokens count."""
        self._mask = _as_mask(batch.get("attention_mask"))
        self._decoder_mask = _as_mask(batch.get("decoder_attention_mask"))
        if self._decoder_mask is None and isinstance(batch.get("labels"), Tensor):
            self._decoder_mask = _as_mask(batch["labels"] != IGNORED)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Know what the encoder gives, which the cross-attention of a decoder reads."""
        if self._encoder is None:
            yield
            return
        with self._encoder.register_forward_hook(self._note_encoded):
            yield
        self._encoded = None

    def _note_encoded(self, encoder: nn.Module, args: tuple, output: Any) -> None:
        self._encoded = output[0]

    def tokens(self, module: nn.Module, x: Tensor) -> Tensor:
        """Those of the input or output x of a module that count, [tokens that count, channels].

        Args:
            x: [batch, tokens, channels], or [batch * tokens, channels]; of another shape all count.
        """
        mask = self._decoder_mask if module in self._in_decoder and x is not self._encoded else self._mask
        rows = x.reshape(-1, x.shape[-1])
        counts = mask is not None and (x.shape[:2] == mask.shape if x.ndim == 3 else len(rows) == mask.numel())
        return rows[mask.flatten().to(x.device)] if counts else rows


def _as_mask(mask: Any) -> Tensor | None:
    return mask.bool() if isinstance(mask, Tensor) and mask.ndim == 2 else None


def run_batch(model: nn.Module, batch: Any, device: torch.device, padding: Padding) -> None:
    """Run a batch through a model: a mapping of keyword arguments, or the model's input itself."""
    with padding.watching():
        if not isinstance(batch, Mapping):
            padding.read({})
            model(batch.to(device))
            return
        batch = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}
        padding.read(batch)
        model(**batch)


def _note(padding: Padding, layer: PSTLayer, args: tuple[Tensor, ...]) -> None:
    Method.of(layer.active_config).importance.observe(padding.tokens(layer, args[0]), *_buffers(layer))


def _buffers(layer: PSTLayer) -> list[Tensor]:
    names = Method.of(layer.active_config).importance.buffers
    return [getattr(layer, name)[layer.active_pst_adapter] for name in names]
