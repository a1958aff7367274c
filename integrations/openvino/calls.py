"""What exporting to OpenVINO and running there share."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import torch
from numpy.typing import ArrayLike
from torch import Tensor

if TYPE_CHECKING:
    import openvino

FILE = "openvino_model.xml"
"""The graph; its weights lie beside it in a .bin. These are optimum-intel's names."""


def imported(name: Literal["openvino", "nncf"]) -> Any:
    """A package of the extra. Both report imports and calls to Google Analytics unless the user has opted out, and do
    without the package that sends it: so it is hidden from them, unless someone has imported it before."""
    sys.modules.setdefault("openvino_telemetry", None)
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f"{name} is not installed: pip install 'peft-pst[openvino]'.") from error


def example(sequences: int, tokens: int) -> dict[str, Tensor]:
    """Token ids that every vocabulary has, and a mask that leaves out the end of the last sequence."""
    ids = torch.arange(sequences * tokens).view(sequences, tokens) % 10
    mask = torch.ones_like(ids)
    mask[-1, tokens // 2 :] = 0
    return {"input_ids": ids, "attention_mask": mask}


def run(compiled: openvino.CompiledModel, inputs: Mapping[str, ArrayLike | Tensor]) -> Tensor:
    """The first output, fp32."""
    arrays = {name: torch.as_tensor(values, dtype=torch.int64).numpy() for name, values in inputs.items()}
    return torch.from_numpy(compiled(arrays)[0])
