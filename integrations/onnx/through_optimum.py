"""Export by optimum: encoders, decoders with past, encoder-decoders."""

from __future__ import annotations

import copy
from pathlib import Path

from transformers import PreTrainedModel

from . import graph

NAME = "optimum"


def tasks(model: PreTrainedModel) -> list[str]:
    """What optimum can export a model of this class for, with past first.

    Raises:
        ValueError: if it knows nothing of the kind.
    """
    import optimum.exporters.onnx.model_configs  # noqa: F401 - registers what it knows
    from optimum.exporters.tasks import TasksManager

    kind = model.config.model_type
    try:
        task = TasksManager._infer_task_from_model_or_model_class(model=model)
        known = TasksManager.get_supported_tasks_for_model_type(kind, "onnx", library_name="transformers")
    except (KeyError, ValueError) as error:
        raise ValueError(f"optimum cannot export a {type(model).__name__} ({kind}): {error.args[0]}") from error
    found = [name for name in (f"{task}-with-past", task) if name in known]
    if not found:
        raise ValueError(f"optimum exports no {type(model).__name__}: of {kind} it knows {', '.join(sorted(known))}.")
    return found


def write(model: PreTrainedModel, task: str, folder: Path) -> None:
    """Write the graphs of a model, and its configs."""
    from optimum.exporters.onnx import onnx_export_from_model

    onnx_export_from_model(copy.deepcopy(model), folder, task=task, do_validation=False)  # a copy: it is changed
    if (folder / "decoder_model_merged.onnx").exists():  # both of them in one
        for name in ("decoder_model.onnx", "decoder_with_past_model.onnx"):
            for file in folder.glob(f"{name}*"):
                file.unlink()


def load(folder: Path, task: str, threads: int | None = None) -> object:
    """The export as its users open it."""
    import optimum.onnxruntime
    from optimum.exporters.tasks import TasksManager

    auto = TasksManager.get_model_class_for_task(task.removesuffix("-with-past")).__name__
    name = {"AutoModel": "ORTModelForFeatureExtraction"}.get(auto, auto.replace("AutoModel", "ORTModel"))
    options = {"use_cache": task.endswith("-with-past")} if "generation" in task else {}
    model_class = getattr(optimum.onnxruntime, name)
    return model_class.from_pretrained(folder, session_options=graph.session_options(threads), **options)
