"""What a PST adapter asks of all layers at once."""

from __future__ import annotations

from torch import nn

from peft_pst.layer import PSTLayer


def check_adapter(model: nn.Module, processes: int) -> None:
    """Raise ValueError if an adapter selects its masks over layers that lie on several processes."""
    if processes > 1 and any(layer.active_config.budget == "global" for layer in _adapted(model)):
        raise ValueError(
            "budget='global' selects what is pruned over all layers at once, and here each process has its own: train "
            "with budget='layer' in a pipeline, or in one process, with DistributedDataParallel or with FSDP2."
        )


def penalised_entries(model: nn.Module) -> int:
    """The entries of all weights that an adapter charges for."""
    return sum(layer.shape.numel() for layer in _adapted(model) if layer.active_config.penalty)


def _adapted(model: nn.Module) -> list[PSTLayer]:
    return [module for module in model.modules() if isinstance(module, PSTLayer) and module.active_pst_adapter]
