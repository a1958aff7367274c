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

from .functional import Kept, Live, MaskedLinear, Method
from .layer import PARAMETERS, PSTLayer, check_one_adapter, version
from .patterns import Pattern

if TYPE_CHECKING:
    from .config import PSTConfig

SAMPLE_SIZE = 4096


class InferenceWeight(NamedTuple):
    """A masked weight that evaluation uses again as long as nothing that it was computed from has changed."""

    base: Tensor  # W, kept alive so that its address stays its own
    samples: list[Tensor]  # copies of everything else that the weight was computed from, or of entries of it
    versions: list[Any]  # the address and version of each of them, the dtype, and the numbers of the method
    weight: Tensor


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
        self._inference_weight: InferenceWeight | None = None
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
        weight = self._oriented(self.get_base_layer().weight)
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
            self._dense_weight = base_layer.weight.data
            base_layer.weight.data = self._oriented(merged).to(base_layer.weight.dtype).contiguous()
            self.merged_adapters.append(adapter_name)

    def unmerge(self) -> None:
        """Put the dense weight back, bit for bit."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        weight = self.get_base_layer().weight
        weight.data = self._dense_weight.to(weight)  # the model may have been cast or moved in between
        self._dense_weight = None
        self.merged_adapters.clear()

    @torch.no_grad()
    def _check_finite(self, adapter_name: str) -> None:
        # the mask would hide what it prunes
        method, weight, arguments = self.inputs(adapter_name)
        tensors = (*method.weight_and_importance(weight, *arguments), *arguments)
        if not all(torch.isfinite(tensor).all() for tensor in tensors):
            raise ValueError(
                f"NaNs detected in the merged weights. The adapter {adapter_name} seems to be broken: its weight or "
                "its importance is not finite everywhere. Train again with a lower learning rate for the factors."
            )

    @torch.no_grad()
    def masked_weight(self, adapter_name: str) -> Tensor:
        """The masked weight, [out, in], in the dtype of the parameters."""
        self.check_fingerprint(adapter_name)
        method, weight, arguments = self.inputs(adapter_name)
        updated, keep = method.weight_and_mask(self._mask(adapter_name), weight, *arguments)
        gates = method.importance.gates(keep.to(updated.dtype), None, *method.split(arguments)[1])
        return updated.mul_(gates).masked_fill_(~keep, 0)  # a product alone would leave -0.0

    def _weight_for_inference(self, adapter_name: str, dtype: torch.dtype) -> Tensor:
        """The masked weight in `dtype`, from the last call if that is still right.

        On a CPU what it was computed from is compared by value, since a write through `.data` leaves no other trace;
        tensors as large as the weight by entries spread evenly over them. Elsewhere that would cost a
        synchronisation, and versions, `train()`, `eval()` and training steps decide.
        """
        weight = self.get_base_layer().weight
        method, _, arguments = self.inputs(adapter_name)
        sources = [*arguments, self.pst_num_pruned[adapter_name]]
        if adapter_name in self.pst_mask:
            sources.append(self.pst_mask[adapter_name])
        versions = [(tensor.data_ptr(), version(tensor)) for tensor in (weight, *sources)]
        versions += [dtype, *vars(method.update).values(), *vars(method.importance).values()]
        samples = [self._sample(tensor) for tensor in sources]
        last = self._inference_weight
        if last is not None and last.versions == versions:
            same = zip(last.samples, samples, strict=True)
            if weight.device.type != "cpu" or all(torch.equal(old, new) for old, new in same):
                return last.weight
        samples = [sample.clone() for sample in samples]
        masked = self.masked_weight(adapter_name).to(dtype)
        self._inference_weight = InferenceWeight(weight.detach(), samples, versions, masked)
        return masked

    def _sample(self, tensor: Tensor) -> Tensor:
        stride = tensor.numel() // SAMPLE_SIZE if tensor.shape == self.shape else 1
        return tensor.detach().reshape(-1)[:: max(1, stride)]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The masked weight times x, and the bias: [..., in] to [..., out], in the dtype that the base layer gives."""
        adapter_name = self.active_pst_adapter
        if self.disable_adapters and self.merged:
            self.unmerge()
        if self.disable_adapters or self.merged or adapter_name is None:
            return self.base_layer(x, *args, **kwargs)
        return self._masked_forward(x, adapter_name)

    @torch.compiler.disable  # the selection runs in numpy: one break in the graph a layer, and no recompilation
    def _masked_forward(self, x: Tensor, adapter_name: str) -> Tensor:
        weight, bias = self.get_base_layer().weight, self.get_base_layer().bias
        input_dtype, device = x.dtype, x.device.type
        autocast = torch.is_autocast_enabled(device)
        x = self._cast_input_dtype(x, torch.get_autocast_dtype(device) if autocast else weight.dtype)
        bias = bias if bias is None else bias.to(x.dtype)
        with torch.autocast(device, enabled=False) if autocast else nullcontext():
            if self._trains(adapter_name):
                self._inference_weight = None
                self.check_fingerprint(adapter_name)
                method, oriented, arguments = self.inputs(adapter_name)
                rows, mask = x.reshape(-1, self.in_features), self._mask(adapter_name)
                seed = method.importance.draw_seed() if self.training else None
                y = MaskedLinear.apply(rows, bias, mask, method, seed, oriented, *arguments)
                y = y.view(*x.shape[:-1], self.out_features)
            else:
                y = F.linear(x, self._weight_for_inference(adapter_name, x.dtype), bias)
        return y if autocast else y.to(input_dtype)

    def _trains(self, adapter_name: str) -> bool:
        # under gradient checkpointing a training step runs without gradients first
        trained = (*self.arguments(adapter_name), self.get_base_layer().weight)
        return self.training or (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in trained))

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        for name in PARAMETERS:
            for adapter_name, parameter in getattr(self, name).items():
                loaded = state_dict.get(f"{prefix}{name}.{adapter_name}")
                if loaded is not None and loaded.shape != parameter.shape:
                    raise ValueError(
                        f"The adapter does not fit: {prefix}{name} has shape {list(loaded.shape)} in the checkpoint, "
                        f"but this layer, [out={self.out_features}, in={self.in_features}], needs "
                        f"{list(parameter.shape)}. It was trained on a base model of another size, or with another r "
                        "or mask_r: load it on the model and with the adapter_config.json it was saved with."
                    )
        super()._load_from_state_dict(state_dict, prefix, *args)

    def train(self, mode: bool = True) -> Linear:
        """Set training or evaluation mode; what evaluation keeps is computed anew after it."""
        self._inference_weight = None
        return super().train(mode)

    def _apply(self, fn: Any, recurse: bool = True) -> Linear:
        self._inference_weight = None
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_inference_weight": None}

    def __repr__(self) -> str:
        return "pst." + super().__repr__()
