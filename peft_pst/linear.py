"""Linear: a linear layer under a mask, in training, in evaluation, and merged."""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .boost import Boosted, boost
from .functional import Kept, Live, MaskedLinear, Method
from .layer import PARAMETERS, PSTLayer, check_one_adapter, version
from .operations import masked_linear
from .patterns import Pattern, pack_bits
from .quantized import backend_of, compute_dtype, dense_layer, kept_in_order, stored
from .sharded import assign, gathered, is_sharded, need

if TYPE_CHECKING:
    from .config import PSTConfig

SAMPLE_SIZE = 4096


class InferenceWeight(NamedTuple):
    """A masked weight that evaluation uses again as long as nothing that it was computed from has changed."""

    base: list[Tensor]  # what holds W, kept alive so that its address stays its own; nothing where it is sharded
    samples: list[Tensor]  # on a CPU, copies of everything else that it was computed from, or of entries of it
    versions: list[Any]  # the address and version of each of them, the dtype, and the numbers of the method
    kept: Tensor  # the weight; over a quantized or sharded base, which is to save its memory, only the mask as bits


class Linear(nn.Module, PSTLayer):
    """`nn.Linear` or transformers' `Conv1D` (which stores its weight [in, out]) with PST adapters.

    The arguments beside the base layer are those of `PSTLayer.update_layer`.
    """

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        config: PSTConfig,
        pattern: Pattern,
        group: str,
        inference_mode: bool,
    ) -> None:
        nn.Module.__init__(self)
        PSTLayer.__init__(self, base_layer)
        self._active_adapter = adapter_name
        self._dense_weight: Tensor | None = None
        self._quantized_layer: tuple[nn.Module] | None = None
        self.dense_dtype = torch.float32
        self._inference_weight: InferenceWeight | None = None
        self._is_sharded = False
        self.update_layer(adapter_name, config, pattern, group, inference_mode)

    def _oriented(self, weight: Tensor) -> Tensor:
        """The weight of the base layer as [out, in], or back again."""
        return weight.T if isinstance(self.get_base_layer(), Conv1D) else weight

    @torch.no_grad()
    def importance(self, adapter_name: str) -> Tensor:
        """What each entry of the weight is worth to an adapter now, [out, in]."""
        self.check_fingerprint(adapter_name)
        method, weight, arguments = self.inputs(adapter_name)
        return method.weight_and_importance(weight, *arguments)[1]

    def inputs(self, adapter_name: str) -> tuple[Method, Tensor, tuple[Tensor, ...]]:
        """The method of an adapter, the frozen weight [out, in], and the arguments of the method."""
        weight = self._oriented(self.frozen_weight())
        return Method.of(self.pst_config[adapter_name]), weight, self.arguments(adapter_name)

    def _mask(self, adapter_name: str) -> Live | Kept:
        if adapter_name in self.pst_mask:
            return Kept(self.pst_mask[adapter_name])
        return Live(self.pst_pattern[adapter_name], self.pst_num_pruned[adapter_name])

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Replace the base weight by the masked one, pruned entries being +0.0; the dense one is kept for `unmerge`.

        Args:
            safe_merge: check W' and the importance for NaN and infinity before.
            adapter_names: the adapter to merge; by default the active one.

        Raises:
            ValueError: if two adapters would be merged into this layer, or `safe_merge` finds a value not finite.
        """
        adapter_names = [n for n in check_adapters_to_merge(self, adapter_names) if n in self.pst_config]
        check_one_adapter([*self.merged_adapters, *adapter_names])
        for adapter_name in adapter_names:
            base_layer = self.get_base_layer()
            if safe_merge:
                self._check_finite(adapter_name)
            merged = self.masked_weight(adapter_name)
            if self.quantization_backend is None:
                merged = self._oriented(merged).to(base_layer.weight.dtype).contiguous()
                self._dense_weight = assign(base_layer.weight, merged)
            else:
                self._quantized_layer = (base_layer,)  # a tuple, or it would be a submodule
                self.base_layer = dense_layer(base_layer, merged, self.dense_dtype)
                self.quantization_backend = None
            self.merged_adapters.append(adapter_name)

    def unmerge(self) -> None:
        """Put the dense weight back, bit for bit."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        weight = self.get_base_layer().weight
        # the model may have been cast or moved in between
        if self._quantized_layer is None:
            assign(weight, self._dense_weight)
        else:
            (layer,) = self._quantized_layer
            self.base_layer = layer if layer.weight.device == weight.device else layer.to(weight.device)
            self.base_layer.train(self.training)
            self.quantization_backend = backend_of(self.base_layer)
        self._dense_weight = self._quantized_layer = None
        self.merged_adapters.clear()

    @torch.no_grad()
    def _check_finite(self, adapter_name: str) -> None:
        # the mask would hide what it prunes
        method, weight, arguments = self.inputs(adapter_name)
        of_boost = [tensor for tensor in self.boost(adapter_name) or () if tensor is not None]
        tensors = (*method.weight_and_importance(weight, *arguments), *arguments, *of_boost)
        if not all(torch.isfinite(tensor).all() for tensor in tensors):
            raise ValueError(
                f"NaNs detected in the merged weights. The adapter {adapter_name} seems to be broken: its weight or "
                "its importance is not finite everywhere. Train again with a lower learning rate for the factors."
            )

    @torch.no_grad()
    def masked_weight(self, adapter_name: str, mask: Kept | None = None) -> Tensor:
        """The masked weight, [out, in], in the dtype of the parameters; of a mask that is known, or else selected."""
        self.check_fingerprint(adapter_name)
        method, weight, arguments = self.inputs(adapter_name)
        updated, keep = method.weight_and_mask(mask or self._mask(adapter_name), weight, *arguments)
        gates = method.importance.gates(keep.to(updated.dtype), None, *method.split(arguments)[1])
        return updated.mul_(gates).masked_fill_(~keep, 0)  # a product alone would leave -0.0

    @torch.no_grad()
    def pruned_part(self, adapter_name: str) -> Tensor:
        """(1 - M) ∘ W', what the mask of an adapter hides now, [out, in]."""
        method, weight, arguments = self.inputs(adapter_name)
        updated, keep = method.weight_and_mask(self._mask(adapter_name), weight, *arguments)
        return updated.masked_fill_(keep, 0)

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """What takes the place of this layer without its adapters: the base layer, merged or not, with the boost of a
        merged adapter beside it."""
        if merge:
            self.merge(safe_merge, adapter_names)
        layer = self.get_base_layer()
        found = self.boost(self.merged_adapters[0]) if self.merged else None
        if found is None:
            return layer
        dtype = layer.weight.dtype
        return Boosted(layer, *(tensor if tensor is None else gathered(tensor).to(dtype) for tensor in found))

    @torch.compiler.disable  # a graph has no memory of its last call: in evaluation it breaks once a layer
    def _weight_for_inference(self, adapter_name: str, dtype: torch.dtype) -> Tensor:
        """The masked weight in `dtype`, from the last call if that is still right.

        On a CPU what it was computed from is compared by value, since a write through `.data` leaves no other trace;
        tensors as large as the weight by entries spread evenly over them. Elsewhere that would cost a
        synchronisation, and versions, `train()`, `eval()` and training steps decide.
        """
        base = stored(self.get_base_layer().weight)
        method, arguments = Method.of(self.pst_config[adapter_name]), self.arguments(adapter_name)
        sources = [*arguments, self.pst_num_pruned[adapter_name]]
        if adapter_name in self.pst_mask:
            sources.append(self.pst_mask[adapter_name])
        versions = [(tensor.data_ptr(), version(tensor)) for tensor in (*base, *sources)]
        versions += [dtype, *vars(method.update).values(), *vars(method.importance).values()]
        on_cpu = base[0].device.type == "cpu"
        samples = [self._sample(tensor) for tensor in sources] if on_cpu else []
        plain, last = self.quantization_backend is None and not self._is_sharded, self._inference_weight
        same = last is not None and last.versions == versions
        if not (same and all(map(torch.equal, last.samples, samples))):
            samples = [sample.clone() for sample in samples]
            kept = self.masked_weight(adapter_name).to(dtype) if plain else self._bits(adapter_name)
            # a whole weight that is kept here would stay when ZeRO-3 gives it back
            held = [] if self._is_sharded else [tensor.detach() for tensor in base]
            last = InferenceWeight(held, samples, versions, kept)
            self._inference_weight = last
        return last.kept if plain else self.masked_weight(adapter_name, Kept(last.kept)).to(dtype)

    def _bits(self, adapter_name: str) -> Tensor:
        method, weight, arguments = self.inputs(adapter_name)
        return pack_bits(method.weight_and_mask(self._mask(adapter_name), weight, *arguments)[1])

    def _sample(self, tensor: Tensor) -> Tensor:
        stride = tensor.numel() // SAMPLE_SIZE if tensor.shape == self.shape else 1
        return tensor.detach().reshape(-1)[:: max(1, stride)]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The masked weight times x, and the bias: [..., in] to [..., out], in the dtype that the base layer gives."""
        adapter_name = self.active_pst_adapter
        if self.disable_adapters and self.merged:
            self.unmerge()
        if self.disable_adapters or self.merged or adapter_name is None:
            with nullcontext() if self.quantization_backend is None else kept_in_order(self.get_base_layer()):
                y = self.base_layer(x, *args, **kwargs)
            return self._boosted(y, x, self.merged_adapters[0]) if self.merged else y
        return self._masked_forward(x, adapter_name)

    def _boosted(self, y: Tensor, x: Tensor, adapter_name: str) -> Tensor:
        found = self.boost(adapter_name)
        return y if found is None else y + boost(x, *found)

    def _masked_forward(self, x: Tensor, adapter_name: str) -> Tensor:
        base_layer, bias = self.get_base_layer(), self.get_base_layer().bias
        input_dtype, device = x.dtype, x.device.type
        autocast = torch.is_autocast_enabled(device)
        x = self._cast_input_dtype(x, torch.get_autocast_dtype(device) if autocast else compute_dtype(base_layer, x))
        bias = bias if bias is None else bias.to(x.dtype)
        with torch.autocast(device, enabled=False) if autocast else nullcontext():
            if self._trains(adapter_name) or (x.requires_grad and self.quantization_backend is not None):
                y = self._step(x.reshape(-1, self.in_features), bias, adapter_name)
                y = y.view(*x.shape[:-1], self.out_features)
            else:
                y = F.linear(x, self._weight_for_inference(adapter_name, x.dtype), bias)
            y = self._boosted(y, x, adapter_name)
        return y if autocast else y.to(input_dtype)

    def _step(self, x: Tensor, bias: Tensor | None, adapter_name: str) -> Tensor:
        self._check_while_compiling(adapter_name)
        quantized = self.quantization_backend is not None
        if quantized and torch.compiler.is_compiling():  # a graph would keep the dense weight for backward
            return torch.compiler.disable(self._step)(x, bias, adapter_name)
        method, arguments = Method.of(self.pst_config[adapter_name]), self.arguments(adapter_name)
        mask, seed = self._mask(adapter_name), method.importance.draw_seed() if self.training else None
        weight = self.frozen_weight if quantized else self._oriented(self.frozen_weight())
        if torch.compiler.is_compiling():
            return masked_linear(x, bias, mask, self.pst_config[adapter_name], seed, weight, arguments)
        self._inference_weight = None
        return MaskedLinear.apply(x, bias, mask, method, seed, weight, *arguments)

    @torch.compiler.assume_constant_result  # a compiler runs it once, where it traces the step
    def _check_while_compiling(self, adapter_name: str) -> None:
        self.check_fingerprint(adapter_name)

    def _trains(self, adapter_name: str) -> bool:
        if self.training or not torch.is_grad_enabled():
            return self.training  # under gradient checkpointing a training step runs without gradients first
        trained = (*self.arguments(adapter_name), self.get_base_layer().weight)
        return any(tensor.requires_grad for tensor in trained)

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        for name in PARAMETERS:
            for adapter_name, parameter in getattr(self, name).items():
                loaded = state_dict.get(f"{prefix}{name}.{adapter_name}")
                if loaded is not None and loaded.shape != parameter.shape:
                    raise ValueError(
                        f"The adapter does not fit: {prefix}{name} has shape {list(loaded.shape)} in the checkpoint, "
                        f"but this layer, [out={self.out_features}, in={self.in_features}], needs "
                        f"{list(parameter.shape)}. It was trained on a base model of another size, or with another r, "
                        "mask_r or boost: load it on the model and with the adapter_config.json it was saved with."
                    )
        super()._load_from_state_dict(state_dict, prefix, *args)

    def train(self, mode: bool = True) -> Linear:
        """Set training or evaluation mode; what evaluation keeps is computed anew after it."""
        self._inference_weight = None
        # in a forward a sharded weight is whole and looks like any other
        self._is_sharded = is_sharded(self.get_base_layer().weight)
        need(self, self.parameters())
        return super().train(mode)

    def _apply(self, fn: Any, recurse: bool = True) -> Linear:
        self._inference_weight = None
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_inference_weight": None}

    def __repr__(self) -> str:
        return "pst." + super().__repr__()
