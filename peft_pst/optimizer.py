"""Learning rates that fit: factors start at N(0, 1), so a step of theirs ignores the weight's own scale; scores matter
only by their order; a dense delta is fine-tuning."""

from typing import Any

import torch
from torch import nn

from .boost import NAMES as BOOST
from .layer import METHODS, PARAMETERS, PSTLayer, active_layers
from .parameters import Kind

# the largest rate that the paper trains BERT-base with
MAX_FACTOR_LR = 5e-4


def create_pst_optimizer(
    model: nn.Module,
    optimizer_cls: type[torch.optim.Optimizer] = torch.optim.AdamW,
    *,
    lr: float | None = None,
    delta_lr: float = 1e-4,
    score_lr: float = 1e-2,
    head_lr: float = 1e-3,
    **kwargs: Any,
) -> torch.optim.Optimizer:
    """An optimizer with a learning rate for each kind of parameter that sparse training has, and one for the rest.

    Like PEFT's `create_loraplus_optimizer`; for the Trainer pass `optimizers=(create_pst_optimizer(model), None)`.

    Args:
        model: a model with PST layers.
        optimizer_cls: the class of the optimizer.
        lr: learning rate of low-rank factors: U, V, A, B, R and C. By default 3e-4, and 1e-4 for a sparsity of at most
            70 %: what docs/study.md chose at 90 and at 50 %, up to halfway.
        delta_lr: learning rate of the dense delta of `update="full"`, and of a boost.
        score_lr: learning rate of full score matrices: movement scores and hard concrete gates.
        head_lr: learning rate of all other trainable parameters: a new head, biases, `modules_to_save`.
        **kwargs: passed to the optimizer, such as `weight_decay`.

    Raises:
        ValueError: if the model has no PST layer or nothing that trains.
    """
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trainable or not any(isinstance(module, PSTLayer) for module in model.modules()):
        raise ValueError(
            f"{type(model).__name__} has no PST layer, or nothing in it trains: call get_peft_model(model, "
            "PSTConfig(...)) first, or load the adapter with is_trainable=True."
        )
    if lr is None:
        lr = 1e-4 if max(layer.active_config.sparsity for layer in active_layers(model)) <= 0.7 else 3e-4
    rates = {"factor": lr, "delta": delta_lr, "score": score_lr}
    kinds = parameter_kinds(model)
    groups: dict[Kind | None, list[nn.Parameter]] = {kind: [] for kind in (*rates, None)}
    for parameter in trainable:
        groups[kinds.get(id(parameter))].append(parameter)
    groups = [{"params": group, "lr": rates.get(kind, head_lr)} for kind, group in groups.items() if group]
    return optimizer_cls(groups, lr=lr, **kwargs)


def parameter_kinds(model: nn.Module) -> dict[int, Kind]:
    """Of each parameter of all PST adapters of a model, by its `id()`, whether it is a factor, a delta or a score."""
    kinds = {name: method.kind for method in METHODS for name in method.names} | dict.fromkeys(BOOST, "delta")
    layers = [module for module in model.modules() if isinstance(module, PSTLayer)]
    return {id(p): kinds[name] for layer in layers for name in PARAMETERS for p in getattr(layer, name).values()}
