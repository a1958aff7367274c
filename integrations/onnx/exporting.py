"""export: merged, shrunk if asked, exported, its zeros left out of the file, and compared with PyTorch."""

from __future__ import annotations

import contextlib
import copy
import logging
import math
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import torch
import transformers
from peft import PeftModel
from transformers import AutoTokenizer, PreTrainedModel
from transformers.models.auto.tokenization_auto import get_tokenizer_config

from peft_pst.merged import check_merged
from peft_pst.opening import open_model
from peft_pst.report import format_table
from peft_pst.sparse.files import replacing
from peft_pst.sparse.quantizer import densify


@dataclass(frozen=True)
class Export:
    """What an export made, and how it compares with PyTorch.

    Args:
        folder: where it is.
        task: what the graph computes, in optimum's words.
        quantize: how its weights were quantized, None for float32.
        difference: the largest absolute difference of an output to PyTorch's, over random batches.
        scale: the largest absolute output of PyTorch there.
        zeros: of each weight that has zeros and is a tensor of the graph, how many there are, and in the graph.
        missing: weights that have zeros and are no tensor of the graph, such as a pooler that the task does not use.
        sizes: of each file, its bytes as the exporter wrote it, in float32, and as it is now.
    """

    folder: Path
    task: str
    quantize: str | None
    difference: float
    scale: float
    zeros: dict[str, tuple[int, int]]
    missing: list[str]
    sizes: dict[str, tuple[int, int]]

    def table(self) -> str:
        """A table in Markdown."""
        before, after = (sum(counts) for counts in zip((0, 0), *self.zeros.values(), strict=True))
        rows = [
            ("task", self.task),
            ("largest difference to PyTorch", f"{self.difference:.1e}, of outputs up to {self.scale:.1e}"),
            ("zeros in PyTorch's weights", f"{before:,} in {len(self.zeros)}"),
            ("of them zeros in the graph", f"{after:,}"),
            *(("not in the graph", name) for name in self.missing),
            *(
                (name, f"{now / 1e6:,.1f} MB, dense {dense / 1e6:,.1f} MB")
                for name, (dense, now) in self.sizes.items()
            ),
        ]
        return format_table((str(self.folder), self.quantize or "float32"), rows)


def export(
    model: PreTrainedModel | str | os.PathLike,
    output: str | os.PathLike,
    task: str | None = None,
    *,
    base: str | os.PathLike | None = None,
    shrink: bool = False,
    sparse: bool = True,
    quantize: Literal["int8"] | None = None,
    tolerance: float = 1e-4,
) -> Export:
    """Export a model to ONNX, compare it with PyTorch, and print how far they are apart and how many zeros are left.

    What comes out computes in float32 and opens in optimum's `ORTModelFor…`, with its config and tokenizer. With
    transformers 4.57 optimum exports encoders, decoders with past and encoder-decoders. With transformers 5, for which
    there is no optimum-onnx, `torch.onnx.export(dynamo=True)` exports encoders and decoders without past.

    The folder is written beside its place and renamed when everything is right: after an error there is nothing.

    Args:
        model (`PreTrainedModel`, `str` or `os.PathLike`):
            A merged model, dense or sparse, which is left as it is; or its folder; or the folder of an adapter, which
            is merged.
        output (`str` or `os.PathLike`):
            Where to: a folder that does not exist, or is empty.
        task (`str`, *optional*):
            What the graph computes, one of those that optimum knows for the class of the model, such as
            `"text-generation"`. By default the one with past where there is one.
        base (`str` or `os.PathLike`, *optional*):
            An adapter's base model, if not the one that it names.
        shrink (`bool`):
            Remove what is zero as a whole before, by `peft_pst.shrink`.
        sparse (`bool`):
            Store a weight as a `sparse_initializer` where that is smaller: 4 bytes and a value for each entry that is
            not zero, so float32 below a density of 50 %, int8 below 20 %. ONNX Runtime makes it dense when it opens
            the file, with the speed of a dense one. Its indices are int32 (int16 in small weights), which ONNX Runtime
            reads; the standard says int64, and `onnx.checker` insists.
        quantize (`str`, *optional*):
            `"int8"` quantizes the weights of matrix products and embeddings; ONNX Runtime quantizes the activations
            as they come. Zeros stay zeros.
        tolerance (`float`):
            How far an output may be from PyTorch's, absolute, or relative to the largest output where that is above
            1. With `quantize` it holds for the graph before, and what quantizing adds is only printed.

    Raises:
        FileExistsError: if there is something in the output folder.
        ImportError: if a package is missing.
        OSError: if the disk is full.
        TypeError: if it is no model of transformers.
        ValueError: if an adapter is not merged, the task is not one of the model's, the exporter fails, an output is
            further from PyTorch's than the tolerance, or a zero is lost.
    """
    output = Path(output).absolute()
    if quantize not in (None, "int8"):
        raise ValueError(f"quantize={quantize!r} is unknown: expected 'int8' or None.")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise FileExistsError(f"There is something at {str(output)!r} already: delete it, or choose another folder.")
    backend = _backend()
    model, sources = _prepared(model, base)
    task = _checked(task, model, backend.tasks(model))
    tokenizer = _tokenizer(sources)
    if shrink:
        from peft_pst import shrink as shrink_model

        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*cannot say how many")  # a graph needs no config for that
            model = shrink_model(model)
    if hasattr(model.config, "quantization_config"):  # what widths and boosts need elsewhere
        del model.config.quantization_config

    from . import graph, verification

    if "generation" in task:
        model.config.use_cache = task.endswith("-with-past")
    hint = (
        " Its heads may have shrunk, which exporters do not foresee: try the task without past, or without shrink."
        if shrink
        else ""
    )
    failing = f"{backend.NAME} could not export this {type(model).__name__} for {task!r}."

    def compare(folder: Path, tolerance: float) -> verification.Difference:
        with _one_error(failing, hint):
            found = verification.difference(model, backend.load(folder, task))
        verification.check(found, tolerance)
        return found

    with replacing(output, lambda name: False) as folder, _quiet():
        with _one_error(failing, hint):
            backend.write(model, task, folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        dense_sizes = _sizes(folder)
        places = verification.places(model, folder)
        if quantize:
            compare(folder, tolerance)
            graph.quantize(folder)
        if sparse:
            graph.make_sparse(folder)
        found = compare(folder, math.inf if quantize else tolerance)
        zeros = verification.count_zeros(model, folder, places)
        sizes = {name: (dense_sizes[name], size) for name, size in _sizes(folder).items()}
        missing = verification.missing(model, places)
        made = Export(output, task, quantize, found.largest, found.scale, zeros, missing, sizes)
    print(made.table())
    return made


def load(made: Export, threads: int | None = None) -> Any:
    """An export in ONNX Runtime, called like the model; it computes with so many threads, by default with all cores.
    With transformers 4.57 it is one of optimum's `ORTModelFor…`."""
    return _backend().load(made.folder, made.task, threads)


def _backend() -> ModuleType:
    """What exports: optimum with transformers 4, torch alone with transformers 5."""
    try:
        import onnxruntime  # noqa: F401

        from . import through_dynamo, through_optimum

        if not transformers.__version__.startswith("4."):
            import onnxscript  # noqa: F401

            return through_dynamo
        import optimum.exporters.onnx
        import optimum.onnxruntime  # noqa: F401

        return through_optimum
    except ImportError as error:
        raise ImportError(
            f"An export needs packages that are not here ({error}). With transformers 4.57 it goes through optimum: "
            "pip install 'peft-pst[onnx]'. With transformers 5, and only for encoders and decoders without past: "
            "pip install onnx onnxruntime onnxscript."
        ) from error


def _prepared(
    model: PreTrainedModel | str | os.PathLike, base: str | os.PathLike | None
) -> tuple[PreTrainedModel, list[str]]:
    """A dense float32 copy of a model that may be changed, and where its tokenizer may be."""
    sources = []
    if isinstance(model, (str, os.PathLike)):
        sources.append(os.fspath(model))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The model's sparse weights stay compressed")
            model = open_model(model, base)
        if isinstance(model, PeftModel):
            sources.append(os.fspath(base or model.active_peft_config.base_model_name_or_path))
            model = model.merge_and_unload(safe_merge=True)
    else:
        check_merged(model, "export")
        sources.append(model.config._name_or_path)
        model = copy.deepcopy(model)
    if model.main_input_name != "input_ids":
        raise ValueError(
            f"A {type(model).__name__} reads {model.main_input_name!r}: expected a model that reads tokens. Save it "
            "by save_pretrained(model, folder, 'dense'), and export that folder by optimum-cli export onnx."
        )
    model = densify(model).float().cpu().eval()
    model.config.dtype, model.config.architectures = torch.float32, [type(model).__name__]
    return model, sources


def _checked(task: str | None, model: PreTrainedModel, tasks: list[str]) -> str:
    if task is None:
        return tasks[0]
    if task not in tasks:
        raise ValueError(
            f"task={task!r} is not what a {type(model).__name__} does: expected {' or '.join(map(repr, tasks))}. For "
            "another task open the folder with that task's class, and export the model."
        )
    return task


@contextlib.contextmanager
def _one_error(failing: str, hint: str) -> Iterator[None]:
    """Exporters raise anything: here it is a ValueError, unless it comes of an OSError, such as a full disk."""
    try:
        yield
    except Exception as error:
        cause = error
        while cause.__cause__ is not None and not isinstance(cause, OSError):
            cause = cause.__cause__
        if isinstance(cause, OSError):
            raise cause from None
        line = str(cause).strip().partition("\n")[0]
        raise ValueError(f"{failing} It raised {type(cause).__name__}: {line}{hint}") from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what tracers and optimizers say to their own developers."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def _tokenizer(sources: list[str]) -> Any:
    """The first tokenizer that there is, None if there is none."""
    found = next((source for source in sources if source and get_tokenizer_config(source)), None)
    return None if found is None else AutoTokenizer.from_pretrained(found)


def _sizes(folder: Path) -> dict[str, int]:
    """The bytes of each graph, with the data beside it."""
    return {
        file.name: sum(part.stat().st_size for part in folder.glob(f"{file.name}*"))
        for file in sorted(folder.glob("*.onnx"))
    }
