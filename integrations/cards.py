"""A model card: what a sparse model is, in numbers, and how to open it."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

import torch
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.utils import HFValidationError, validate_repo_id
from peft import PeftConfig, PeftModel
from transformers import PreTrainedModel
from transformers.modelcard import TASK_MAPPING

from peft_pst.config import PSTConfig
from peft_pst.report import TensorSparsity, format_table, layer_type, tensor_sparsity
from peft_pst.report.sparsity import remaining_parameters
from peft_pst.sparse.quantizer import QUANT_METHOD

AUTO_CLASSES = {
    "audio-classification": "AutoModelForAudioClassification",
    "fill-mask": "AutoModelForMaskedLM",
    "image-classification": "AutoModelForImageClassification",
    "image-text-to-text": "AutoModelForImageTextToText",
    "object-detection": "AutoModelForObjectDetection",
    "question-answering": "AutoModelForQuestionAnswering",
    "text-classification": "AutoModelForSequenceClassification",
    "text-generation": "AutoModelForCausalLM",
    "text2text-generation": "AutoModelForSeq2SeqLM",
    "token-classification": "AutoModelForTokenClassification",
}
"""What opens the models of a task; a model of any other is opened by its own class."""


def model_card(
    model: PreTrainedModel | PeftModel,
    folder: str | os.PathLike,
    repo_id: str,
    *,
    adapter: str | os.PathLike | None = None,
    base_model: str | None = None,
    results: Sequence[EvalResult] = (),
) -> ModelCard:
    """The card of a model or an adapter that is saved: method, sparsity, sizes, results, how to open it.

    Args:
        model (`PreTrainedModel` or `PeftModel`):
            The merged model, or one opened from a sparse checkpoint, or a model with a PST adapter.
        folder (`str` or `os.PathLike`):
            Where it is saved, for the sizes: the model, or of a `PeftModel` the adapter.
        repo_id (`str`):
            Where it will be on the Hub, as `owner/name`.
        adapter (`str` or `os.PathLike`, *optional*):
            The folder of an adapter that goes beside a merged model.
        base_model (`str`, *optional*):
            The Hub's name of the model that was trained. By default what the adapter or the model says, if that is
            such a name.
        results (`Sequence[EvalResult]`):
            What was measured: accuracy, latency and so on.

    Raises:
        TypeError: if it is no model of transformers.
        ValueError: if an adapter is not PST's, or its base model is not known.
    """
    is_adapter = isinstance(model, PeftModel)
    model = model.get_base_model() if is_adapter else model
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model_card got a {type(model).__name__}: expected a model of transformers.")
    adapter = folder if is_adapter else adapter
    config = None if adapter is None else pst_config(adapter)
    base_model = base_model or _hub_name(config.base_model_name_or_path if config else model.name_or_path)
    if config and base_model is None:
        raise ValueError(
            f"The adapter says that its base model is {config.base_model_name_or_path!r}, which is no name on the "
            "Hub, so nobody could open it: give base_model='owner/name'."
        )
    architecture = type(model).__name__
    task = next((task for task, names in TASK_MAPPING.items() if architecture in names.values()), None)
    name = repo_id.rpartition("/")[2]
    rows = tensor_sparsity(model)
    whole = _whole(model, rows)
    data = ModelCardData(
        base_model=base_model,
        library_name="peft" if is_adapter else "transformers",
        model_name=name if results else None,
        pipeline_tag=task,
        tags=["peft", "pst", "sparse"],
        eval_results=list(results) or None,
    )
    return ModelCard.from_template(
        data,
        template_str=files("peft_pst.model_cards").joinpath("card.md").read_text(encoding="utf-8"),
        name=name,
        repo_id=repo_id,
        is_adapter=is_adapter,
        has_adapter=config is not None,
        is_sparse=not is_adapter and _is_sparse(Path(folder)),
        auto_class=AUTO_CLASSES.get(task, architecture),
        base_link=f"[{base_model}](https://huggingface.co/{base_model})",
        base_arguments="" if model.config.num_labels == 2 else f", num_labels={model.config.num_labels}",
        targets=f"{_total('', rows).sparsity:.2%}",
        whole=f"{whole.sparsity:.2%}",
        method=config and _method(config),
        sparsity=_sparsity(rows, whole),
        sizes=_sizes(model, None if is_adapter else folder, adapter, whole.numel),
        results=_results(results),
    )


def pst_config(adapter: str | os.PathLike) -> PSTConfig:
    """The config of the PST adapter in a folder.

    Raises:
        ValueError: if there is none, or it is of another method.
    """
    config = PeftConfig.from_pretrained(str(adapter))
    if not isinstance(config, PSTConfig):
        raise ValueError(f"The adapter in {adapter} is of type {config.peft_type}: expected one of type PST.")
    return config


def _hub_name(name: str) -> str | None:
    """The name of a model, if it is one on the Hub and not a folder here."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return None if Path(name).exists() else name


def _is_sparse(folder: Path) -> bool:
    """Whether a model is saved in our layout."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return config.get("quantization_config", {}).get("quant_method") == QUANT_METHOD


def _total(name: str, rows: Sequence[TensorSparsity]) -> TensorSparsity:
    return TensorSparsity(name, sum(row.numel for row in rows), sum(row.zeros for row in rows))


def _whole(model: PreTrainedModel, rows: Sequence[TensorSparsity]) -> TensorSparsity:
    """All weights that the model has without an adapter, those of `rows` among them."""
    rest = [
        TensorSparsity("", parameter.numel(), parameter.numel() - int(torch.count_nonzero(parameter)))
        for parameter in remaining_parameters(model, [row.name for row in rows])
    ]
    return _total("the whole model", [*rows, *rest])


def _sparsity(rows: Sequence[TensorSparsity], whole: TensorSparsity) -> str:
    types: dict[str, list[TensorSparsity]] = {}
    for row in rows:
        types.setdefault(layer_type(row.name), []).append(row)
    totals = [_total(f"`{name}`", members) for name, members in types.items()]
    totals += [_total("these layers", rows), whole]
    return format_table(
        ("layers", "weights", "zeros", "sparsity"),
        [(row.name, f"{row.numel:,}", f"{row.zeros:,}", f"{row.sparsity:.2%}") for row in totals],
    )


def _method(config: PSTConfig) -> str:
    names = ("importance", "update", "pattern", "sparsity", "budget")
    return format_table(("choice", "value"), [(name, f"`{getattr(config, name)}`") for name in names])


def _sizes(
    model: PreTrainedModel, folder: str | os.PathLike | None, adapter: str | os.PathLike | None, numel: int
) -> str:
    """Bytes on disk of what is saved, model and adapter, and what the model would take dense."""
    sizes = {
        name: sum(file.stat().st_size for file in Path(place).glob("*.safetensors"))
        for name, place in (("model", folder), ("adapter", adapter))
        if place is not None
    }
    for dtype in dict.fromkeys((torch.float32, model.dtype)):
        sizes[f"model, stored dense in {str(dtype).removeprefix('torch.')}"] = numel * dtype.itemsize
    return format_table(("on disk", "MB"), [(name, f"{size / 1e6:,.2f}") for name, size in sizes.items()])


def _results(results: Sequence[EvalResult]) -> str:
    if not results:
        return ""
    return format_table(
        ("task", "data", "metric", "value"),
        [
            (r.task_name or r.task_type, r.dataset_name, r.metric_name or r.metric_type, r.metric_value)
            for r in results
        ],
    )
