"""plan: what a training will need, before anything is downloaded."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from peft import PeftModel
from tqdm import tqdm
from transformers import PretrainedConfig, PreTrainedModel

from ..config import PSTConfig
from .files import adapter_entries, dense_entries, file_bytes, sparse_entries
from .models import LORA_RANK, add_lora, add_pst, build, make_batch, num_experts, task_of
from .sharding import CATEGORIES, SHARDINGS, gathered_bytes, shares_of
from .simulation import Device, peak_of_step

Sharding = Literal["none", "zero-1", "zero-2", "zero-3", "fsdp"]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Memory:
    """What one device holds at the peak of a training step, in bytes."""

    weights: int
    gradients: int
    optimizer_states: int
    activations: int
    """What the forward pass made, and the batch."""
    temporaries: int
    """What backward and optimizer made, gradients left out."""
    total: int


@dataclass(frozen=True)
class Training:
    """One way to train the model."""

    name: str
    trainable: int
    """How many parameters train."""
    parameters: int
    """How many there are, those of the adapter included."""
    memory: Memory
    adapter_bytes: int | None
    """The file of the adapter; None for full fine-tuning."""


@dataclass(frozen=True)
class Plan:
    """What `plan` has found; `to_dict()` gives it as JSON knows it."""

    model: str
    """The class of the model."""
    sparsity: float
    trainings: tuple[Training, ...]
    """PST, LoRA, full fine-tuning."""
    dense_bytes: int
    """The model's file, zeros stored like any value."""
    sparse_bytes: int
    """The file of `peft_pst.save_pretrained`, the model merged at that sparsity, its values kept exactly."""
    sparse_bf16_bytes: int
    """The same with values="bf16"."""

    def to_dict(self) -> dict[str, Any]:
        """All of it in what JSON knows."""
        return asdict(self)


def plan(
    config: PretrainedConfig,
    pst_config: PSTConfig | None = None,
    *,
    batch_size: int = 8,
    tokens: int = 512,
    dtype: Literal["float32", "bfloat16"] = "float32",
    device: Device = "cuda",
    devices: int = 1,
    sharding: Sharding = "none",
    gradient_checkpointing: bool = False,
) -> Plan:
    """What training a model by PST, by LoRA of rank 8 on the same modules, and in full will need, from its config.

    The model's own code runs one step of torch's AdamW on tensors without contents, so nothing is allocated, whatever
    the size of the model. Adapters train in float32, as PEFT has it; full fine-tuning in `dtype`, states included.
    What is counted are the bytes of tensors. Not counted are what a device needs before the first tensor (Python and
    its libraries, a CUDA context), what its allocator wastes, the workspaces of single operators, and the buffers of
    communication, except for those that `plan.sharding` describes.

    Args:
        config: of the model; weights that are not there cannot be read, so its dtype and quantization do not count.
        pst_config: by default `PSTConfig()`.
        batch_size: sequences a device and step.
        tokens: of a sequence, padding included.
        dtype: of the weights.
        device: what trains. The kernels of a GPU ("cuda", an NVIDIA one since Ampere, with Triton) keep less for
            backward than those of a CPU, and its AdamW has larger temporaries.
        devices: how many of them train together.
        sharding: what they share: `"none"` (DDP), `"zero-1"`, `"zero-2"`, `"zero-3"` or `"fsdp"`.
        gradient_checkpointing: whether each block is computed again in backward instead of kept.

    Raises:
        TypeError: if `config` is no config of transformers.
        ValueError: if an argument is out of range, or transformers has no such model to train.
    """
    if not isinstance(config, PretrainedConfig):
        raise TypeError(
            f"plan got a {type(config).__name__}: expected a config of transformers, such as "
            "AutoConfig.from_pretrained(...)."
        )
    _check_counts(batch_size=batch_size, tokens=tokens, devices=devices)
    for name, value, known in (
        ("dtype", dtype, list(DTYPES)),
        ("device", device, ["cpu", "cuda"]),
        ("sharding", sharding, list(SHARDINGS)),
    ):
        if value not in known:
            raise ValueError(f"{name}={value!r} is unknown: expected one of {known}.")
    pst_config = pst_config or PSTConfig()
    task = task_of(config, pst_config)

    def model() -> PreTrainedModel:
        return build(config, task, DTYPES[dtype], gradient_checkpointing)

    def training(name: str, trained: PreTrainedModel | PeftModel) -> Training:
        adapter_bytes = file_bytes(adapter_entries(trained)) if isinstance(trained, PeftModel) else None
        counts = (
            [p.numel() for p in trained.parameters() if p.requires_grad],
            [p.numel() for p in trained.parameters()],
        )
        gathered = gathered_bytes(trained, sharding, devices)
        batch = make_batch(task, batch_size, tokens)
        peak = peak_of_step(trained, batch, shares_of(sharding, devices), device, num_experts(config))
        peak = {category: peak[category] + gathered.get(category, 0) for category in CATEGORIES}
        return Training(name, *map(sum, counts), Memory(**peak, total=sum(peak.values())), adapter_bytes)

    full = model()
    dense = dense_entries(full)
    name = type(full).__name__
    pst = add_pst(model(), task, pst_config)
    if not any(parameter.requires_grad for parameter in pst.parameters()):
        raise ValueError(
            f"importance={pst_config.importance!r} with update={pst_config.update!r} trains nothing in a {name}: "
            "there is no training to plan."
        )
    lora = add_lora(model(), task, pst.peft_config["default"])
    exact, bf16 = (file_bytes(sparse_entries(pst, dense, size)) for size in (DTYPES[dtype].itemsize, 2))
    trainings = {"PST": pst, f"LoRA r={LORA_RANK}": lora, "full fine-tuning": full}
    return Plan(
        model=name,
        sparsity=pst.peft_config["default"].sparsity,
        trainings=tuple(training(*pair) for pair in tqdm(trainings.items(), desc="planning", disable=None)),
        dense_bytes=file_bytes(dense),
        sparse_bytes=exact,
        sparse_bf16_bytes=bf16,
    )


def _check_counts(**counts: int) -> None:
    for name, value in counts.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}={value!r} is not a number that can train: expected an int of at least 1.")


def plan_rows(plan: Plan) -> tuple[list[str], list[list[str]]]:
    """The header and the rows of a plan as a table, a column for each training."""
    trainings = plan.trainings

    def row(name: str, values: list[int | None]) -> list[str]:
        return [name, *("" if value is None else format_bytes(value) for value in values)]

    rows = [
        ["parameters trained", *(f"{training.trainable:,}" for training in trainings)],
        ["their share of the model", *(f"{training.trainable / training.parameters:.2%}" for training in trainings)],
        *(
            row(f"peak memory: {category.replace('_', ' ')}", [getattr(t.memory, category) for t in trainings])
            for category in (*CATEGORIES, "total")
        ),
        row("adapter file", [training.adapter_bytes for training in trainings]),
        row("model file, zeros stored like any value", [plan.dense_bytes] * len(trainings)),
        row(f"model file, {plan.sparsity:.0%} sparse", [plan.sparse_bytes, None, None]),
        row(f"model file, {plan.sparsity:.0%} sparse, bf16 values", [plan.sparse_bf16_bytes, None, None]),
    ]
    return ["", *(training.name for training in trainings)], rows


def format_bytes(size: int) -> str:
    """A number of bytes in a unit that suits it, of powers of ten."""
    for unit, power in (("TB", 12), ("GB", 9), ("MB", 6)):
        if size >= 10**power:
            return f"{size / 10**power:.1f} {unit}"
    return f"{size / 1000:.1f} kB"
