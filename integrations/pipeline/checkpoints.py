"""Checkpoints of a pipeline: the model's own files, as one process writes them, and beside them one for each process,
with its optimizer and its random numbers.

`pipeline-RANK.safetensors` holds the tensors `NAME/KEY`, KEY of the optimizer's state of the parameter that the model
calls NAME, `NAME/fingerprint` of the parameter itself, and `random_state`. Its metadata is JSON: `step`, `layers` of
each stage, `groups` of the optimizer, and `numbers`, what is no tensor in its state.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from peft_pst.fingerprint import fingerprint
from peft_pst.sparse.files import replacing

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from .pipeline import Pipeline

FILES = "pipeline-*.safetensors"
FINGERPRINT = "fingerprint"


def gather(pipeline: Pipeline) -> nn.Module | None:
    """Bring what trains on all stages into the model of rank 0, and return it there."""
    changing = {name: p for p, name in pipeline.names.items() if p.requires_grad}
    for stage in pipeline.stages:
        changing |= dict(stage.model.named_buffers())
    model = pipeline.whole_model()
    places = {} if model is None else dict(model.named_parameters()) | dict(model.named_buffers())
    with torch.no_grad():
        for tensors in collect({} if pipeline.rank == 0 else changing, pipeline.device):
            for name, tensor in tensors.items():
                places[name].copy_(tensor)
    return model


def save(
    pipeline: Pipeline, folder: Path, optimizer: Optimizer, step: int, tokenizer: PreTrainedTokenizerBase | None
) -> None:
    """See `Pipeline.save`."""
    state, notes = describe(pipeline, optimizer)
    all_notes: list[Any] = [None] * pipeline.processes
    dist.all_gather_object(all_notes, {"step": step, "layers": pipeline.layers, **notes})
    model = gather(pipeline)
    with nullcontext() if model is None else replacing(folder, _is_ours) as written:
        if model is not None:
            model.save_pretrained(written)
            if tokenizer is not None:
                tokenizer.save_pretrained(written)
        for rank, tensors in enumerate(collect(state, pipeline.device)):
            metadata = {key: json.dumps(value) for key, value in all_notes[rank].items()}
            save_file(tensors, written / FILES.replace("*", str(rank)), metadata)
    dist.barrier()  # from here on all count on it


def _is_ours(name: str) -> bool:
    path = Path(name)
    return path.match(FILES) or path.match("model*.safetensors*") or path.match("adapter_*")


def describe(pipeline: Pipeline, optimizer: Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What this process adds to a checkpoint: tensors, and what is no tensor."""
    state_dict = optimizer.state_dict()
    names = _names(pipeline, optimizer, state_dict)
    tensors = {f"{name}/{FINGERPRINT}": fingerprint(p) for p, name in pipeline.names.items() if p.requires_grad}
    tensors["random_state"] = pipeline.random_state
    numbers: dict[str, Any] = {}
    for index, state in state_dict["state"].items():
        for key, value in state.items():
            (tensors if isinstance(value, Tensor) else numbers)[f"{names[index]}/{key}"] = value
    groups = [{**group, "params": [names[index] for index in group["params"]]} for group in state_dict["param_groups"]]
    return tensors, {"groups": groups, "numbers": numbers}


def resume(pipeline: Pipeline, folder: Path, optimizer: Optimizer) -> int:
    """See `Pipeline.resume`."""
    files = [folder / FILES.replace("*", str(rank)) for rank in range(len(list(folder.glob(FILES))))]
    if not files:
        raise ValueError(
            f"{folder} holds no checkpoint of a pipeline: expected {FILES} in it, as Pipeline.save writes."
        )
    state_dict = optimizer.state_dict()
    names = _names(pipeline, optimizer, state_dict)
    state: dict[str, dict[str, Any]] = {}
    options: dict[str, dict[str, Any]] = {}
    for rank, path in enumerate(files):
        with safe_open(path, "pt") as file:
            notes = {key: json.loads(value) for key, value in file.metadata().items()}
            for group in notes["groups"]:
                chosen = {key: value for key, value in group.items() if key != "params"}
                options |= dict.fromkeys(group["params"], chosen)
            wanted = set(pipeline.names.values())
            for key in file.keys():  # noqa: SIM118
                name, _, entry = key.rpartition("/")
                if name in wanted:
                    state.setdefault(name, {})[entry] = file.get_tensor(key)
            for key, value in notes["numbers"].items():
                name, _, entry = key.rpartition("/")
                state.setdefault(name, {})[entry] = value
            if rank == pipeline.rank and notes["layers"] == pipeline.layers:
                pipeline.random_state = file.get_tensor("random_state")
    for parameter, name in pipeline.names.items():
        if parameter.requires_grad:
            _check_parameter(folder, name, parameter, state.get(name, {}).pop(FINGERPRINT, None))
    state_dict["state"] = {index: state[name] for index, name in names.items() if state.get(name)}
    for group in state_dict["param_groups"]:
        if group["params"]:  # all of a group may lie on another stage
            group |= options.get(names[group["params"][0]], {})
    optimizer.load_state_dict(state_dict)
    return notes["step"]


def _check_parameter(folder: Path, name: str, parameter: nn.Parameter, expected: Tensor | None) -> None:
    if expected is None or not torch.equal(expected, fingerprint(parameter).cpu()):
        raise ValueError(
            f"{name} is not what it was when {folder} was written"
            f"{' (there it did not train)' if expected is None else ''}: open the model from that folder, with "
            "from_pretrained, or its adapter with PeftModel.from_pretrained(base, folder, is_trainable=True), in the "
            "dtype that it had, before you make the Pipeline."
        )


def _names(pipeline: Pipeline, optimizer: Optimizer, state_dict: Mapping[str, Any]) -> dict[int, str]:
    """The names in the model of the parameters that an optimizer knows by numbers."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
    if any(parameter not in pipeline.names for parameter in parameters):
        raise ValueError(
            "The optimizer has parameters that this process does not train: make it from those of the pipeline, such "
            "as AdamW(pipeline.parameters())."
        )
    return {number: pipeline.names[p] for number, p in zip(numbers, parameters, strict=True)}


def collect(tensors: Mapping[str, Tensor], device: torch.device) -> Iterator[dict[str, Tensor]]:
    """On rank 0 the tensors of each process, on the CPU, one process after another by rank; on the others nothing.

    Args:
        tensors: those of this process by their names.
        device: where it computes.
    """
    shapes: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(shapes, {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()})
    if dist.get_rank() > 0:
        for tensor in tensors.values():
            dist.send(tensor.detach().to(device).contiguous().reshape(-1).view(torch.uint8), 0)
        return
    yield {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    for rank in range(1, len(shapes)):
        received = {}
        for name, (shape, dtype) in shapes[rank].items():
            tensor = torch.empty(shape, dtype=dtype, device=device)
            dist.recv(tensor.view(-1).view(torch.uint8), rank)
            received[name] = tensor.cpu()
        yield received
