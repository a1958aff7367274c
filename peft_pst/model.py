"""PSTModel: which modules of a model are replaced by PST layers."""

from __future__ import annotations

import re
import warnings
from typing import Any, ClassVar

import torch
from peft.tuners.tuners_utils import BaseTuner, _get_in_out_features
from torch import nn
from transformers.pytorch_utils import Conv1D

from .config import PSTConfig
from .layer import Linear, PSTLayer, active_layers, overall_sparsity
from .patterns import parse_pattern

# they decide which expert runs: tiny, and pruning them saves nothing
ROUTERS = ("router", "gate", "shared_expert_gate")


class PSTModel(BaseTuner):
    """Replaces linear layers of a model by PST layers; made by `get_peft_model(model, PSTConfig(...))`.

    Args:
        model (`nn.Module`): The model to train; its weights are frozen.
        config (`PSTConfig`): The configuration.
        adapter_name (`str`): The name of the adapter.
        low_cpu_mem_usage (`bool`): Create the factors on the meta device, to be loaded.
    """

    prefix = "pst_"
    tuner_layer_cls = PSTLayer
    target_module_mapping: ClassVar[dict[str, list[str]]] = {}  # no table: see default_target_modules

    def set_sparsity(self, sparsity: float) -> None:
        """Prune `int(units * sparsity)` units of the pattern in each target weight from now on, by the active adapter;
        single entries where it is unstructured.

        Raises:
            ValueError: if `sparsity` is not in [0, 1) or more than the pattern allows, or the adapter is merged.
        """
        for layer in active_layers(self):
            layer.set_sparsity(sparsity)

    def get_sparsity(self) -> float:
        """The share of the entries of all target weights that the active adapter prunes now."""
        return overall_sparsity(active_layers(self))

    def _prepare_adapter_config(self, peft_config: PSTConfig, model_config: dict) -> PSTConfig:
        if peft_config.target_modules is None:
            peft_config.target_modules = default_target_modules(self.model)
            if isinstance(peft_config.target_modules, str) and peft_config.layers_to_transform is not None:
                raise ValueError(
                    f"layers_to_transform={peft_config.layers_to_transform!r} needs target_modules in a model of "
                    "several modalities: name the layers to prune."
                )
        return peft_config

    def _create_and_replace(
        self,
        peft_config: PSTConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **kwargs: Any,
    ) -> None:
        if not isinstance(target, PSTLayer):
            check_target(target, parent, current_key)
        in_features, out_features = _get_in_out_features(getattr(target, "base_layer", target))
        parse_pattern(peft_config.pattern).check_shape(torch.Size((out_features, in_features)), current_key)
        if isinstance(target, PSTLayer):
            target.update_layer(adapter_name, peft_config, inference_mode=peft_config.inference_mode)
            return
        layer = Linear(target, adapter_name, peft_config, inference_mode=peft_config.inference_mode)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)


def is_plain_linear(module: nn.Module) -> bool:
    """Whether a module computes x Wᵀ + b and nothing else."""
    # transformers' FalconLinear overrides forward with the same formula
    forwards = (nn.Linear.forward, Conv1D.forward)
    return isinstance(module, (nn.Linear, Conv1D)) and (
        type(module).forward in forwards or type(module).__name__ == "FalconLinear"
    )


def bypasses_forward(parent: nn.Module) -> bool:
    """Whether a module hands the weights of its linear layers to a fused kernel, past the layers' forward."""
    is_state_space_mixer = hasattr(parent, "A_log")  # Mamba and its kin
    return isinstance(parent, (nn.MultiheadAttention, nn.TransformerEncoderLayer)) or is_state_space_mixer


def check_target(target: nn.Module, parent: nn.Module, key: str) -> None:
    """Raise TypeError if a target module is not a linear layer that PST can prune."""
    if not is_plain_linear(target):
        raise TypeError(
            f"The target module {key!r} is a {type(target).__name__}, but PST prunes plain linear layers "
            "(torch.nn.Linear, transformers' Conv1D, not quantized). Name such layers in target_modules, or leave it "
            "out and get all linear layers of the model's blocks."
        )
    if bypasses_forward(parent):
        raise TypeError(
            f"The target module {key!r} lies in a {type(parent).__name__}, which reads its weight past the layer's "
            "forward: it would silently stay dense. Leave it out of target_modules."
        )


def default_target_modules(model: nn.Module) -> set[str] | str:
    """The names, from the block downwards, of all linear layers in the blocks of a model.

    A block is an entry of an `nn.ModuleList`, as transformers builds its models; embeddings, poolers and heads lie
    outside. In a model of several modalities only the language model counts, as with PEFT's defaults; the names are
    then one regular expression.

    Raises:
        ValueError: if there is none.
    """
    modules = dict(model.named_modules())
    lists = [f"{name}." for name, module in modules.items() if isinstance(module, nn.ModuleList)]
    multimodal = any("language_model." in name for name in lists)
    targets, stacked = set(), []
    for name, module in modules.items():
        outermost = min((prefix for prefix in lists if name.startswith(prefix)), key=len, default=None)
        if outermost is None or (multimodal and "language_model." not in name):
            continue
        if not isinstance(module, nn.Conv1d):
            parameters = module.named_parameters(recurse=False)
            stacked += [f"{name}.{key}" for key, p in parameters if p.ndim == 3 and min(p.shape) > 1]
        parent, _, own_name = name.rpartition(".")
        if is_plain_linear(module) and own_name not in ROUTERS and not bypasses_forward(modules[parent]):
            # another adapter may be there already, around the layer
            targets.add(name[len(outermost) :].partition(".")[2].removesuffix(".base_layer"))
    if stacked:
        warnings.warn(
            f"{len(stacked)} weights, such as {stacked[0]}, stay dense: PST prunes linear layers, and these hold many "
            "experts in one tensor.",
            stacklevel=2,
        )
    targets.discard("")  # a list of bare linear layers holds heads, not blocks
    if not targets:
        raise ValueError(
            f"Please specify `target_modules` in `peft_config`: {type(model).__name__} has no linear layer inside a "
            "torch.nn.ModuleList, so there is no default. Name the layers to prune, or use 'all-linear'."
        )
    return rf".*language_model\..*\.({'|'.join(map(re.escape, sorted(targets)))})" if multimodal else targets
