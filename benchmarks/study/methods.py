"""How a method of the study trains: what `cells.yaml` says of it, made into a model and a Trainer."""

import copy
import math
import sys
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from task import Task
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, Trainer, TrainingArguments, set_seed

from peft_pst import DistillationConfig, PSTConfig, calibrate, create_pst_optimizer
from peft_pst.importance import IMPORTANCES, PST
from peft_pst.integrations import PSTTrainer
from peft_pst.layer import active_layers

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
import text_classification as example

HEAD_LR = 1e-3
"""Of a head, in every method; `create_pst_optimizer`'s."""


class PSTWithoutMagnitude(PST):
    """S = alpha1 · A B + alpha2 · (R 1ᵀ + 1 Cᵀ). At the start all entries are worth the same."""

    starts_equal = True

    def score(self, weight: Tensor, *arguments: Tensor) -> Tensor:
        return super().score(torch.zeros_like(weight), *arguments)

    def backward(self, G: Tensor, weight: Tensor, mask: Tensor, seed: None, *arguments: Tensor) -> tuple[Tensor, ...]:
        _, *of_scores = super().backward(G, weight.clone(), mask, seed, *arguments)
        return G.mul_(mask), *of_scores


IMPORTANCES["pst_without_magnitude"] = PSTWithoutMagnitude


def train(
    task: Task,
    choices: dict[str, Any],
    settings: dict[str, Any],
    sparsity: float,
    lr: float,
    seed: int,
    work: Path,
    tuned: Path | None = None,
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Train a model by a method: the model as it is served, and what the training took.

    Args:
        choices: of the method in `cells.yaml`.
        settings: the epochs and the batch size of the task there.
        work: a folder for what the Trainer writes.
        tuned: the folder of a dense model of the task, for a tuned teacher.
    """
    set_seed(seed)
    epochs, kind = settings["epochs"] * choices.get("longer", 1), choices.get("kind")
    model = task.load_model(str(tuned) if choices.get("start") == "tuned" else None)
    steps, start = 0, time.perf_counter()
    if learned := choices.get("learned", 0.0):
        trainer = make_trainer(task, with_lora(model, task), settings, learned * epochs, seed, work, lr=lr)
        trainer.train()
        model, steps = trainer.model.merge_and_unload(), trainer.state.global_step
    if kind == "dense":
        trainer = make_trainer(task, model, settings, epochs, seed, work, lr=lr)
    elif kind == "lora":
        trainer = make_trainer(task, with_lora(model, task), settings, epochs, seed, work, lr=lr)
    else:
        # a copy: PEFT adds the head to modules_to_save
        config = PSTConfig(task_type=task.task_type, sparsity=sparsity, **copy.deepcopy(choices.get("config", {})))
        model = get_peft_model(model, config)
        if config.importance == "wanda":
            calibrate(model, calibration_batches(task, settings["batch_size"]))
        if choices.get("inputs"):
            start_from_inputs(model, calibration_batches(task, settings["batch_size"]))
        trainer = make_trainer(
            task,
            model,
            settings,
            (1 - learned) * epochs,
            seed,
            work,
            lr=lr,
            distillation=distillation(task, choices, tuned),
        )
    trainer.train()
    minutes = (time.perf_counter() - start) / 60
    trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    model, zeros = trainer.model, 0.0
    if kind is None:
        targets = model.base_model.targeted_module_names
        model = model.merge_and_unload(safe_merge=True)
        zeros = example.share_of_zeros(model, targets)
    elif kind == "lora":
        model = model.merge_and_unload()
    return model, {"minutes": minutes, "steps": steps + trainer.state.global_step, "trained": trained, "zeros": zeros}


def with_lora(model: PreTrainedModel, task: Task) -> nn.Module:
    """LoRA on the layers that PST would train, with the same head, by PEFT's defaults otherwise."""
    pst = get_peft_model(model, PSTConfig(task_type=task.task_type))
    names, head = pst.base_model.targeted_module_names, pst.peft_config["default"].modules_to_save
    return get_peft_model(
        pst.unload(), LoraConfig(task_type=task.task_type, target_modules=names, modules_to_save=head)
    )


def distillation(task: Task, choices: dict[str, Any], tuned: Path | None) -> DistillationConfig | None:
    losses = choices.get("distillation")
    if losses is None:
        return None
    return DistillationConfig(None if tuned is None else task.load_model(str(tuned)), **losses)


@torch.no_grad()
def start_from_inputs(model: nn.Module, batches: Iterator[dict[str, Tensor]]) -> None:
    """Start C where PST's first mask at the final sparsity is Wanda's: with n the norms of the inputs and t the
    threshold of |W| n, an entry stays if |W| - t / n > 0."""
    names = model.base_model.targeted_module_names
    model.add_adapter("wanda", PSTConfig(importance="wanda", target_modules=names))
    model.set_adapter("wanda")
    calibrate(model, batches)
    model.set_adapter("default")
    for layer in active_layers(model):
        squares = layer.pst_input_squares["wanda"].view(torch.float64)
        n = (squares[:-1] / squares[-1]).sqrt().float().clamp(min=1e-3)
        weight = layer.get_base_layer().weight.abs()
        t = (weight * n).flatten().kthvalue(int(layer.active_config.sparsity * weight.numel())).values
        layer.pst_C["default"].copy_(-t / n)
    model.delete_adapter("wanda")


def calibration_batches(task: Task, batch_size: int, batches: int = 16) -> Iterator[dict[str, Tensor]]:
    rows = task.data["train"].shuffle(seed=0)
    return islice(DataLoader(rows, batch_size=batch_size, collate_fn=task.collator), batches)


def make_trainer(
    task: Task,
    model: nn.Module,
    settings: dict[str, Any],
    epochs: float,
    seed: int,
    work: Path,
    *,
    lr: float,
    **kwargs: Any,
) -> Trainer:
    """The Trainer of README.md, in bf16: AdamW, a linear decay, one rate for the update and one for a new head."""
    sparse = any(getattr(config, "peft_type", None) == "PST" for config in getattr(model, "peft_config", {}).values())
    steps = math.ceil(epochs * (len(task.data["train"]) // settings["batch_size"]))
    arguments = TrainingArguments(
        str(work / "checkpoints"),
        max_steps=steps,
        per_device_train_batch_size=settings["batch_size"],
        train_sampling_strategy="group_by_length",
        save_strategy="no",
        logging_steps=max(1, steps // 20),
        report_to="none",
        seed=seed,
        bf16=True,
        use_cpu=not torch.accelerator.is_available(),
    )
    make_optimizer = create_pst_optimizer if sparse else create_optimizer
    optimizer = make_optimizer(model, lr=lr, fused=True, **({"delta_lr": lr} if sparse else {}))
    return (PSTTrainer if sparse else Trainer)(
        model,
        arguments,
        train_dataset=task.data["train"],
        data_collator=task.collator,
        optimizers=(optimizer, None),
        **kwargs,
    )


def create_optimizer(model: nn.Module, *, lr: float, fused: bool) -> torch.optim.Optimizer:
    """AdamW with one rate for the head and one for everything else."""
    groups: dict[bool, list[nn.Parameter]] = {False: [], True: []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups["classifier" in name or "modules_to_save" in name].append(parameter)
    rates = {False: lr, True: HEAD_LR}
    return torch.optim.AdamW(
        [{"params": group, "lr": rates[new]} for new, group in groups.items() if group], fused=fused
    )
