"""What models of other shapes are made from: ordinary dense ones."""

from __future__ import annotations

from torch import nn

from ..boost import Boosted
from ..merged import check_merged
from ..sparse.linear import SparseLinear


def check_dense(model: nn.Module, verb: str) -> None:
    """Refuse what is no ordinary model with dense weights; `verb` is what is done with it, such as "shrink".

    Raises:
        TypeError: if it is no model of transformers, or its weights are quantized or distributed.
        ValueError: if an adapter is not merged yet, the model is not all in memory, weights are stored sparse, or
            layers have low-rank boosts.
    """
    check_merged(model, verb)
    if any(isinstance(module, SparseLinear) for module in model.modules()):
        raise ValueError(
            f"The model's weights are stored sparse: call model = densify(model) and {verb} that. accelerate_sparse "
            "or save_pretrained take what comes out."
        )
    boosted = next((name for name, module in model.named_modules() if isinstance(module, Boosted)), None)
    if boosted is not None:
        raise ValueError(
            f"The model has low-rank boosts, such as that of {boosted!r}, beside its weights: {verb} it before it is "
            "trained with a boost, or train with PSTConfig(boost=None)."
        )
