"""PSTModel: which modules of a model are replaced by PST layers."""

from __future__ import annotations

import re
import warnings
from collections.abc import Container
from contextlib import nullcontext
from typing import Any, ClassVar

import torch
from accelerate import init_empty_weights
from peft.tuners.tuners_utils import BaseTuner, _get_in_out_features
from peft.utils import _get_submodules
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .blocks import block_lists, outermost
from .budget import set_sparsity
from .config import PSTConfig
from .coupling import Coupling, find_couplings
from .functional import Method
from .labels import share_of_step
from .layer import PSTLayer, active_layers, overall_sparsity
from .linear import Linear
from .norm import PREFIX as NORM
from .norm import Norm, find_norms
from .patterns import COUPLED, parse_pattern
from .quantized import check_quantized, dense_dtype, is_quantized, make_dense
from .sharded import check_launch, gathered, is_partitioned
from .sparse.quantizer import describe_boosts

# what lies between the blocks and the logits of a classifier: the names that PEFT knows, and others of transformers
HEADS_OF_PEFT = ["classifier", "score"]
OTHER_HEADS = ["pooler", "pre_classifier", "sequence_summary", "classification_head", "logits_proj"]

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
    tuner_layer_cls = (PSTLayer, Norm)
    target_module_mapping: ClassVar[dict[str, list[str]]] = {}  # no table: see default_target_modules

    def set_sparsity(self, sparsity: float) -> None:
        """Prune that share of the entries of the target weights from now on, by the active adapter, as its pattern and
        its budget ask: `int(units * sparsity)` units of each weight, or of the whole model.

        Raises:
            ValueError: if `sparsity` is not in [0, 1) or more than the pattern allows, the adapter is merged, or its
                importance lacks calibration.
        """
        set_sparsity(active_layers(self), sparsity)

    def get_sparsity(self) -> float:
        """The share of the entries of all target weights that the active adapter prunes now."""
        return overall_sparsity(active_layers(self))

    def penalty(self) -> Tensor | float:
        """What the active adapter charges for its open gates, a scalar to add to the loss; 0.0 if nothing.

        `PSTConfig.penalty` times the mean over all target entries. In training it is part of the loss that the model
        returns.

        Raises:
            ValueError: if its gradient is asked for and DeepSpeed's ZeRO-3 holds the gates, which would not give it.
        """
        layers = [layer for layer in self.modules() if isinstance(layer, PSTLayer) and layer.active_pst_adapter]
        layers = [layer for layer in layers if layer.active_config.penalty]
        if not layers:
            return 0.0
        charges = []
        for layer in layers:
            importance = Method.of(layer.active_config).importance
            gates = [getattr(layer, name)[layer.active_pst_adapter] for name in importance.names]
            if torch.is_grad_enabled() and any(is_partitioned(gate) for gate in gates):
                raise ValueError(
                    "ZeRO-3 gathers a parameter for the forward of its layer, and outside of it without a gradient, "
                    "so the penalty of the adapter would be charged for nothing: set penalty=0, or train with FSDP2 "
                    "or ZeRO-2."
                )
            charges.append(layer.active_config.penalty * importance.penalty(*map(gathered, gates)))
        return sum(charge.to(charges[0].device) for charge in charges) / sum(layer.shape.numel() for layer in layers)

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        """Add an adapter to the target modules, as in PEFT, and prune them to its initial sparsity."""
        check_launch()
        config = self.peft_config[adapter_name]
        self._embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
        self._couplings: dict[str, Coupling] = {}
        if config.pattern in COUPLED:
            self._couplings = find_couplings(model, config.pattern, config.coupled_modules)
        if state_dict is not None:  # by its keys PEFT finds the targets
            state_dict = {key: value for key, value in state_dict.items() if NORM not in key}
        super().inject_adapter(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage, state_dict)
        if config.norms:
            with init_empty_weights() if low_cpu_mem_usage else nullcontext():
                self._add_norms(model, adapter_name)
        if not hasattr(self, "_hook"):
            # PEFT calls the model past this class where the config has no task_type, and so does transformers
            self._hook = model.register_forward_hook(self._charge_penalty, with_kwargs=True)
        if config.selects_at_start and config.initial_sparsity > 0:
            layers = [m for m in model.modules() if isinstance(m, PSTLayer) and adapter_name in m.pst_config]
            # on the meta device they wait for a checkpoint, which brings its masks
            if not any(parameter.is_meta for layer in layers for parameter in layer.parameters()):
                set_sparsity(layers, config.initial_sparsity, adapter_name)

    def _add_norms(self, model: nn.Module, adapter_name: str) -> None:
        config = self.peft_config[adapter_name]
        for name in find_norms(model, self.targeted_module_names):
            parent, target, target_name = _get_submodules(model, name)
            layer = target if isinstance(target, Norm) else Norm(target)
            layer.update_layer(adapter_name, config)
            layer.set_adapter(self.active_adapters, inference_mode=config.inference_mode)
            layer.train(target.training)
            setattr(parent, target_name, layer)

    def _charge_penalty(self, model: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        """After the model's forward: in training its loss, if it has one, holds the penalty too."""
        if model is not self.model or not model.training:  # a stage of a pipeline is a copy, and charges its own part
            return output
        if kwargs.get("fused_lm_head") and any(config.penalty for config in self.peft_config.values()):
            raise ValueError(
                "TRL's SFTTrainer takes its loss from a fused head and not from the model, whose loss has the penalty "
                "of this adapter in it: make a subclass with compute_loss = transformers.Trainer.compute_loss."
            )
        if isinstance(getattr(output, "loss", None), Tensor):
            penalty = self.penalty()
            if "num_items_in_batch" in kwargs:  # one of several batches of a step
                penalty = penalty * share_of_step(model, kwargs["labels"], kwargs["num_items_in_batch"])
            output.loss = output.loss + penalty
        return output

    def _prepare_adapter_config(self, peft_config: PSTConfig, model_config: dict) -> PSTConfig:
        classifies = peft_config.task_type == "SEQ_CLS" and peft_config.modules_to_save == HEADS_OF_PEFT
        if peft_config.is_new and classifies:
            peft_config.modules_to_save = HEADS_OF_PEFT + OTHER_HEADS
        if peft_config.target_modules is None and peft_config.coupled_modules is not None:
            peft_config.target_modules = {name for structure in peft_config.coupled_modules for name in structure}
        if peft_config.target_modules is None:
            among = self._couplings if peft_config.pattern in COUPLED else None
            peft_config.target_modules = default_target_modules(self.model, among)
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
        if id(getattr(target, "base_layer", target).weight) in self._embeddings:
            raise ValueError(
                f"The target module {current_key!r} shares its weight with the embedding: merging the adapter would "
                "change both, and the merged model would compute something else. Leave it out of target_modules, or "
                "open the base model with tie_word_embeddings=False."
            )
        in_features, out_features = _get_in_out_features(getattr(target, "base_layer", target))
        pattern, group = parse_pattern(peft_config.pattern), current_key
        if peft_config.pattern in COUPLED:
            group, pattern = self._coupling(peft_config, current_key)
        pattern.check_shape(torch.Size((out_features, in_features)), current_key)
        if isinstance(target, PSTLayer):
            target.update_layer(adapter_name, peft_config, pattern, group, peft_config.inference_mode)
            return
        layer = Linear(target, adapter_name, peft_config, pattern, group, peft_config.inference_mode)
        layer.dense_dtype = dense_dtype(self.model)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def _unload_and_optionally_merge(self, merge: bool = True, **kwargs: Any) -> nn.Module:
        model = super()._unload_and_optionally_merge(merge=merge, **kwargs)
        self._hook.remove()
        if merge:
            make_dense(model)
        describe_boosts(model)  # layers that were merged before stay so
        return model

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        if isinstance(new_module, self.tuner_layer_cls):
            super()._replace_module(parent, child_name, new_module, child)
        else:
            setattr(parent, child_name, new_module)  # PEFT would give it a weight, and heads and boosts have none

    def _coupling(self, peft_config: PSTConfig, key: str) -> Coupling:
        """The coupling of a target, all of whose partners are targets too."""
        if key not in self._couplings:
            raise ValueError(
                f"pattern={peft_config.pattern!r} prunes structures that lie in several weights, but {key!r} is not "
                "known to be part of one: leave it out of target_modules, or name it and its partners in "
                "coupled_modules."
            )
        coupling = self._couplings[key]
        for partner, (group, _) in self._couplings.items():
            if group == coupling.group and not self._check_target_module_exists(peft_config, partner):
                raise ValueError(
                    f"pattern={peft_config.pattern!r} prunes {key!r} together with {partner!r}, which is not among "
                    "the target modules: name both, or leave target_modules out."
                )
        return coupling


def is_plain_linear(module: nn.Module) -> bool:
    """Whether a module computes x Wᵀ + b and nothing else."""
    # transformers' FalconLinear overrides forward with the same formula
    forwards = (nn.Linear.forward, Conv1D.forward)
    return (
        isinstance(module, (nn.Linear, Conv1D))
        and (type(module).forward in forwards or type(module).__name__ == "FalconLinear")
        and not is_quantized(module)
    )


def bypasses_forward(parent: nn.Module) -> bool:
    """Whether a module hands the weights of its linear layers to a fused kernel, past the layers' forward."""
    is_state_space_mixer = hasattr(parent, "A_log")  # Mamba and its kin
    return isinstance(parent, (nn.MultiheadAttention, nn.TransformerEncoderLayer)) or is_state_space_mixer


def check_target(target: nn.Module, parent: nn.Module, key: str) -> None:
    """Raise TypeError if a target module is not a linear layer that PST can prune."""
    if is_quantized(target):
        check_quantized(target, key)
    elif not is_plain_linear(target):
        raise TypeError(
            f"The target module {key!r} is a {type(target).__name__}, but PST prunes plain linear layers "
            "(torch.nn.Linear, transformers' Conv1D, or quantized by bitsandbytes or torchao, no other library: PST "
            "reads the weight in each step). Name such layers in target_modules, or leave it out and get all linear "
            "layers of the model's blocks."
        )
    if bypasses_forward(parent):
        raise TypeError(
            f"The target module {key!r} lies in a {type(parent).__name__}, which reads its weight past the layer's "
            "forward: it would silently stay dense. Leave it out of target_modules."
        )


def default_target_modules(model: nn.Module, among: Container[str] | None = None) -> set[str] | str:
    """The names, from the block downwards, of all linear layers in the blocks of a model, or of those `among` them.

    A block is an entry of an `nn.ModuleList`, as transformers builds its models; embeddings, poolers and heads lie
    outside. In a model of several modalities only the language model counts, as with PEFT's defaults; the names are
    then one regular expression. Where names alone would catch more than they should, each begins with a block's index.

    Raises:
        ValueError: if there is none.
    """
    modules = dict(model.named_modules())
    lists = block_lists(modules)
    multimodal = any("language_model." in name for name in lists)
    targets, indexed, others, stacked = set(), set(), set(), []
    for name, module in modules.items():
        prefix = outermost(name, lists)
        if prefix is None or (multimodal and "language_model." not in name):
            continue
        if not isinstance(module, nn.Conv1d):
            parameters = module.named_parameters(recurse=False)
            stacked += [f"{name}.{key}" for key, p in parameters if p.ndim == 3 and min(p.shape) > 1]
        parent, _, own_name = name.rpartition(".")
        linear = is_plain_linear(module) or is_quantized(module)
        if linear and own_name not in ROUTERS and not bypasses_forward(modules[parent]):
            # another adapter may be there already, around the layer
            plain_name = name.removesuffix(".base_layer")
            wanted = among is None or plain_name in among
            index, _, below = plain_name[len(prefix) :].partition(".")
            (targets if wanted else others).add(below)
            if wanted:
                indexed.add(f"{index}.{below}")
    if stacked:
        warnings.warn(
            f"{len(stacked)} weights, such as {stacked[0]}, stay dense: PST prunes linear layers, and these hold many "
            "experts in one tensor.",
            stacklevel=2,
        )
    targets.discard("")  # a list of bare linear layers holds heads, not blocks
    if not targets:
        if among is not None:
            raise ValueError(
                f"{type(model).__name__} has no neurons or heads in its blocks that are known to this pattern: name "
                "the linear layers that share them in coupled_modules."
            )
        quantization = getattr(model, "quantization_method", None)
        if quantization is not None:
            raise TypeError(
                f"The linear layers of this {type(model).__name__} are quantized by "
                f"{getattr(quantization, 'value', quantization)}, and PST, which reads the weight in each step, does "
                "that only for bitsandbytes (load_in_4bit, load_in_8bit) and torchao (weights only): load the model "
                "with one of them, or without quantization."
            )
        raise ValueError(
            f"Please specify `target_modules` in `peft_config`: {type(model).__name__} has no linear layer inside a "
            "torch.nn.ModuleList, so there is no default. Name the layers to prune, or use 'all-linear'."
        )
    if multimodal:
        return rf".*language_model\..*\.({'|'.join(map(re.escape, sorted(targets)))})"
    catch_others = any(other.endswith(f".{name}") for other in others for name in targets)
    return indexed if catch_others else targets
