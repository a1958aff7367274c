"""Export by torch.onnx.export(dynamo=True), with transformers 5: encoders, and decoders without past."""

from __future__ import annotations

import inspect
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.auto import modeling_auto

from . import graph

NAME = "torch.onnx"

OUTPUTS = {
    "text-generation": (modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, ["logits"]),
    "text-classification": (modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES, ["logits"]),
    "token-classification": (modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES, ["logits"]),
    "question-answering": (
        modeling_auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
        ["start_logits", "end_logits"],
    ),
    "fill-mask": (modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES, ["logits"]),
    "feature-extraction": (modeling_auto.MODEL_MAPPING_NAMES, ["last_hidden_state"]),
}
"""Of each task the classes of its models, and their outputs, as optimum names them."""


def tasks(model: PreTrainedModel) -> list[str]:
    """What a model of this class can be exported for.

    Raises:
        ValueError: if it is an encoder-decoder, or no model of texts.
    """
    if model.config.is_encoder_decoder:
        raise ValueError(
            f"With transformers 5 a {type(model).__name__}, an encoder-decoder, cannot be exported: optimum does it, "
            "with transformers 4.57, in an environment made by pip install 'peft-pst[onnx]'."
        )
    found = [task for task, (classes, _) in OUTPUTS.items() if type(model).__name__ in classes.values()]
    if not found:
        raise ValueError(f"A {type(model).__name__} cannot be exported: expected a model for {', '.join(OUTPUTS)}.")
    return found


def write(model: PreTrainedModel, task: str, folder: Path) -> None:
    """Write the graph of a model, and its configs."""
    tokens = torch.ones(2, 8, dtype=torch.long)
    inputs = {"input_ids": tokens, "attention_mask": tokens.clone()}  # one tensor for two would be one input
    names = inspect.signature(model.forward).parameters
    if task == "text-generation" and "position_ids" in names:
        inputs["position_ids"] = torch.arange(8).expand(2, 8)
    if getattr(model.config, "type_vocab_size", 0) > 1 and "token_type_ids" in names:
        inputs["token_type_ids"] = torch.zeros_like(tokens)
    axes = {0: torch.export.Dim("batch_size"), 1: torch.export.Dim("sequence_length")}
    program = torch.onnx.export(
        model,
        kwargs=inputs,
        dynamo=True,
        dynamic_shapes=dict.fromkeys(inputs, axes),
        input_names=list(inputs),
        output_names=OUTPUTS[task][1],
        verbose=False,
    )
    for node in program.model.graph.all_nodes():
        node.metadata_props.clear()  # where in which file of this machine each node comes from
    graph.write(program.model_proto, folder / "model.onnx")
    model.config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)


def load(folder: Path, task: str, threads: int | None = None) -> Session:
    """The export as ONNX Runtime opens it."""
    return Session(folder / "model.onnx", threads)


class Session:
    """A graph that is called like a model: by tensors, for a dict of tensors."""

    def __init__(self, file: Path, threads: int | None) -> None:
        from onnxruntime import InferenceSession

        self._session = InferenceSession(file, graph.session_options(threads))
        self.input_names = [entry.name for entry in self._session.get_inputs()]
        self._output_names = [entry.name for entry in self._session.get_outputs()]

    def __call__(self, **inputs: Tensor) -> dict[str, Tensor]:
        """The outputs, by name."""
        outputs = self._session.run(None, {name: value.numpy() for name, value in inputs.items()})
        return dict(zip(self._output_names, map(torch.from_numpy, outputs), strict=True))
