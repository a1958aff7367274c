"""The ways to run one model that are compared: dense in fp32 and bf16, sparse, and in other runtimes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel

from ..opening import open_model
from ..sparse.checkpoint import save_pretrained
from ..sparse.linear import SparseLinear
from ..sparse.quantizer import densify

Forward = Callable[..., Tensor]
"""Called with `input_ids` and `attention_mask`, int64 [sequences, tokens], gives the model's logits, or else its first
output."""


class Runtime(NamedTuple):
    """A model in another runtime."""

    forward: Forward
    file_bytes: int | None = None
    """Of its weights on disk."""
    generator: Any = None
    """What generates text with it, by `generate` as transformers has it."""


class Variant(NamedTuple):
    """One way to run a model, and the folder that it is opened from."""

    name: str
    folder: Path
    sparse: bool
    """Whether sparse kernels compute its products, in fp32."""

    def open(self) -> PreTrainedModel:
        """The model, in evaluation mode."""
        if not self.sparse:
            return open_model(self.folder)
        from ..sparse.acceleration import accelerate_sparse

        return accelerate_sparse(class_of(self.folder).from_pretrained(self.folder, dtype=torch.float32).eval())

    @property
    def file_bytes(self) -> int:
        """What its weights take on disk."""
        return sum(file.stat().st_size for file in self.folder.glob("*.safetensors"))


def forward_of(model: PreTrainedModel) -> Forward:
    """A model of transformers as what is compared."""

    def forward(**inputs: Tensor) -> Tensor:
        output = model(**inputs)
        return output.logits if "logits" in output else output[0]

    return forward


def class_of(folder: Path) -> type[PreTrainedModel]:
    """The class of a saved model."""
    return getattr(transformers, AutoConfig.from_pretrained(folder).architectures[0])


def write_variants(model: PreTrainedModel, folder: Path, work: Path) -> tuple[Variant, ...]:
    """Write a model in each form that it is measured in.

    Args:
        model: as `open_model` opened it. What it is afterwards is not said.
        folder: what it was opened from: where that is a sparse checkpoint, the sparse variant is opened from it too.
        work: where to. It takes 6 bytes a parameter, and where needed those of a sparse checkpoint.

    Raises:
        ValueError: if the model has an adapter.
    """
    sparse = folder
    if not any(isinstance(module, SparseLinear) for module in model.modules()):
        sparse = work / "sparse"
        save_pretrained(model, sparse)
    model = densify(model)
    model.float().save_pretrained(work / "fp32")
    model.bfloat16().save_pretrained(work / "bf16")
    return (
        Variant("dense fp32", work / "fp32", sparse=False),
        Variant("dense bf16", work / "bf16", sparse=False),
        Variant("sparse fp32", sparse, sparse=True),
    )
