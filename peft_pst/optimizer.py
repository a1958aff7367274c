"""Learning rates that fit the factors: they start at N(0, 1), so a step of theirs ignores the weight's own scale."""

from typing import Any

import torch
from torch import nn

from .layer import FACTORS, PSTLayer

# the largest rate that the paper trains BERT-base with
MAX_FACTOR_LR = 5e-4


def create_pst_optimizer(
    model: nn.Module,
    optimizer_cls: type[torch.optim.Optimizer] = torch.optim.AdamW,
    *,
    lr: float = 3e-4,
    head_lr: float = 1e-3,
    **kwargs: Any,
) -> torch.optim.Optimizer:
    """An optimizer with one learning rate for the PST factors and one for everything else that trains.

    Like PEFT's `create_loraplus_optimizer`; for the Trainer pass `optimizers=(create_pst_optimizer(model), None)`.

    Args:
        model: a model with PST layers.
        optimizer_cls: the class of the optimizer.
        lr: learning rate of the factors U, V, A, B, R and C.
        head_lr: learning rate of all other trainable parameters: a new head, biases, `modules_to_save`.
        **kwargs: passed to the optimizer, such as `weight_decay`.

    Raises:
        ValueError: if no factor of a PST adapter trains.
    """
    factors = factor_ids(model)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trainable if id(p) in factors], "lr": lr},
        {"params": [p for p in trainable if id(p) not in factors], "lr": head_lr},
    ]
    if not groups[0]["params"]:
        raise ValueError(
            f"{type(model).__name__} has no PST factor that trains: call get_peft_model(model, PSTConfig(...)) first, "
            "or load the adapter with is_trainable=True."
        )
    return optimizer_cls([group for group in groups if group["params"]], lr=lr, **kwargs)


def factor_ids(model: nn.Module) -> set[int]:
    """The `id()` of each factor of all PST adapters of a model."""
    layers = [module for module in model.modules() if isinstance(module, PSTLayer)]
    return {id(factor) for layer in layers for name in FACTORS for factor in getattr(layer, name).values()}
