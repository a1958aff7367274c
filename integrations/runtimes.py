"""A saved model in other runtimes, to measure beside ours."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from peft_pst.bench import Runtime
from peft_pst.bench.variants import Forward

CALIBRATION_TEXTS = 100
"""How many texts OpenVINO's int8 takes the ranges of its activations from."""


def onnx_runtimes(
    folder: str | os.PathLike, work: Path, threads: int, texts: Sequence[str] | None
) -> dict[str, Runtime]:
    """ONNX Runtime with float32 and with dynamic int8, exported into `work` by `export`, which says what it needs."""
    from .onnx import export, load

    found = {}
    for name, quantize in (("ONNX Runtime fp32", None), ("ONNX Runtime int8", "int8")):
        made = export(folder, work / name, quantize=quantize)
        model = load(made, threads)
        generator = model if made.task.endswith("-with-past") else None
        found[name] = Runtime(_first_output(model), sum(now for _, now in made.sizes.values()), generator)
    return found


def openvino_runtimes(
    folder: str | os.PathLike, work: Path, threads: int, texts: Sequence[str] | None
) -> dict[str, Runtime]:
    """OpenVINO with float32, and where there are texts to calibrate it with, also with int8, its weights dense and,
    on a processor with AMX, sparse."""
    from .openvino import export_openvino, open_openvino

    cases = [("OpenVINO fp32", None, 1.0)]
    if texts:
        calibration = list(texts)[:CALIBRATION_TEXTS]
        cases += [("OpenVINO int8", calibration, 1.0), ("OpenVINO sparse int8", calibration, 0.75)]
    found = {}
    for name, chosen, sparse_rate in cases:
        exported = work / ("openvino-fp32" if chosen is None else "openvino-int8")
        if not exported.exists():
            export_openvino(folder, exported, texts=chosen)
        model = open_openvino(exported, sparse_rate=sparse_rate, threads=threads)
        found[name] = Runtime(model, sum(file.stat().st_size for file in exported.glob("*.bin")))
    return found


RUNTIMES = {"onnx": onnx_runtimes, "openvino": openvino_runtimes}


def parse_runtimes(text: str | None) -> list[str]:
    """Names of runtimes as the command has them, such as "onnx,openvino".

    Raises:
        ValueError: if one is unknown.
    """
    names = text.split(",") if text else []
    unknown = [name for name in names if name not in RUNTIMES]
    if unknown:
        raise ValueError(f"The runtimes {text!r} are not all known: expected {', '.join(RUNTIMES)}, or some of them.")
    return names


def _first_output(model: Any) -> Forward:
    """A graph, with the inputs that a model of transformers makes itself."""

    def forward(input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
        if "token_type_ids" in model.input_names:
            inputs["token_type_ids"] = torch.zeros_like(input_ids)
        if "position_ids" in model.input_names:
            inputs["position_ids"] = (attention_mask.cumsum(-1) - 1).clamp(min=0)
        output = model(**inputs)
        return output["logits"] if "logits" in output else next(iter(output.values()))

    return forward
