"""A model as OpenVINO IR."""

from __future__ import annotations

import copy
import io
import logging
import os
import warnings
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from peft import PeftModel
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoTokenizer, PreTrainedModel

from peft_pst.merged import check_merged
from peft_pst.opening import open_model
from peft_pst.sparse.files import replacing
from peft_pst.sparse.quantizer import densify

from .calls import FILE, example, imported, run

if TYPE_CHECKING:
    import openvino

CALIBRATION_TOKENS = 256
"""A text for the calibration is cut after so many tokens."""


def export_openvino(
    model: PreTrainedModel | str | os.PathLike,
    output: str | os.PathLike,
    *,
    texts: Sequence[str] | None = None,
    tokenizer: Any = None,
) -> None:
    """Write a model as OpenVINO IR, with its config and tokenizer; zeros stay zeros.

    The exported model takes `input_ids` and `attention_mask`, int64 [batch, tokens] of any size, and returns the
    logits, or the last hidden state of a model without a head, fp32. A language model is exported without its cache.

    Args:
        model:
            A model of text after `merge_and_unload()`, dense or sparse, or a folder that `open_model` opens: that of
            a model or of an adapter, which is merged. What is in memory stays as it is.
        output:
            A new or empty folder. It is written beside its place, and there as a whole or not at all.
        texts:
            Some 100 to 300 texts such as the model will read. With them weights and activations become int8: the
            ranges of the activations are those that the texts give. Without, the model stays in fp32.
        tokenizer:
            The model's; by default that in its folder.

    Raises:
        ImportError: if OpenVINO, or for int8 NNCF, is not installed.
        TypeError: if the model is none of transformers.
        ValueError: if the output folder holds files, an adapter is not merged, there are no texts in `texts` or no
            tokenizer for them, the model's input is not one text or its output neither logits nor a hidden state, or
            OpenVINO cannot convert it or what it converts computes something else.
    """
    ov = imported("openvino")
    nncf = None if texts is None else imported("nncf")
    output = Path(output).absolute()
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{str(output)!r} exists and is not an empty folder: choose another, or remove it.")
    folder = None if isinstance(model, nn.Module) else Path(model)
    if tokenizer is None and folder is not None and (folder / "tokenizer_config.json").is_file():
        tokenizer = AutoTokenizer.from_pretrained(folder)
    batches = None if texts is None else _tokenized(texts, tokenizer)
    model = copy.deepcopy(_checked(model)) if folder is None else _checked(_opened(folder))
    model = densify(model).float().cpu().eval()
    if hasattr(model.config, "quantization_config"):  # what widths and boosts need elsewhere
        del model.config.quantization_config
    converted = _converted(ov, model)
    if batches is not None:
        converted = _quantized(nncf, converted, batches)
    with replacing(output, lambda name: False) as written:
        ov.save_model(converted, written / FILE, compress_to_fp16=False)
        model.config.save_pretrained(written)
        if tokenizer is not None:
            tokenizer.save_pretrained(written)


def _opened(folder: Path) -> PreTrainedModel:
    model = open_model(folder)
    return model.merge_and_unload(safe_merge=True) if isinstance(model, PeftModel) else model


def _checked(model: PreTrainedModel) -> PreTrainedModel:
    check_merged(model, "export")
    if model.config.is_encoder_decoder or model.main_input_name != "input_ids":
        raise ValueError(
            f"{type(model).__name__} is not exported to OpenVINO here: expected an encoder, a classifier or a causal "
            "language model that reads one text."
        )
    return model


class _Logits(nn.Module):
    """A model that takes and returns tensors, as the converter wants it."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        self.options = {"use_cache": False} if model.can_generate() else {}

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        output = self.model(input_ids=input_ids, attention_mask=attention_mask, **self.options)
        return output["logits"] if "logits" in output else output["last_hidden_state"]


@torch.inference_mode()
def _converted(ov: Any, model: PreTrainedModel) -> openvino.Model:
    module = _Logits(model)
    inputs = example(2, 8)
    try:
        module(**inputs)
    except KeyError as error:
        raise ValueError(
            f"The output of {type(model).__name__} has neither logits nor a last hidden state: it is not exported to "
            "OpenVINO here."
        ) from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of tracing; the comparison below finds what went wrong
            converted = ov.convert_model(
                module, example_input=inputs, input=[(name, [-1, -1], ov.Type.i64) for name in inputs]
            )
    except Exception as error:  # OpenVINO's have no class of their own
        raise ValueError(
            f"OpenVINO cannot convert {type(model).__name__} of transformers {transformers.__version__}: many causal "
            "language models can be converted with transformers 5 only."
        ) from error
    other = example(3, 12)  # a trace may hold what is true of its example only
    precision = {ov.properties.hint.inference_precision(): ov.Type.f32}
    found, expected = run(ov.compile_model(converted, "CPU", precision), other), module(**other)
    error = float((found - expected).abs().max() / expected.abs().max())
    if not error < 1e-3:
        raise ValueError(
            f"{type(model).__name__} as OpenVINO has converted it is off by {error:.1e} of its largest result, for an "
            "input of another size than it was converted with: this architecture cannot be exported."
        )
    return converted


def _quantized(nncf: Any, model: openvino.Model, batches: list[Mapping[str, Any]]) -> openvino.Model:
    """int8 weights by row, symmetric, so that 0 is 0, and int8 activations."""
    nncf.set_log_level(logging.ERROR)
    with tqdm(desc="calibrating", unit="text") as progress, redirect_stdout(io.StringIO()):

        def count(batch: Mapping[str, Any]) -> Mapping[str, Any]:
            progress.update()
            return batch

        return nncf.quantize(
            model,
            nncf.Dataset(batches, count),
            model_type=nncf.ModelType.TRANSFORMER,
            subset_size=len(batches),
        )


def _tokenized(texts: Sequence[str], tokenizer: Any) -> list[Mapping[str, Any]]:
    """A batch for each text: int64 arrays [1, tokens]."""
    if tokenizer is None:
        raise ValueError("There is no tokenizer in the model's folder to read the texts with: give it as tokenizer.")
    if isinstance(texts, str) or not len(texts):
        raise ValueError(f"texts={texts!r}: expected a list of some 100 to 300 texts, or None to stay in fp32.")
    length = min(tokenizer.model_max_length, CALIBRATION_TOKENS)
    batches = [
        tokenizer(text, truncation=True, max_length=length, return_attention_mask=True, return_tensors="np")
        for text in texts
    ]
    empty = next((text for text, batch in zip(texts, batches, strict=True) if not batch["input_ids"].size), None)
    if empty is not None:
        raise ValueError(f"The tokenizer makes no token of the text {empty!r}: leave it out.")
    return [{name: batch[name].astype("int64") for name in ("input_ids", "attention_mask")} for batch in batches]
