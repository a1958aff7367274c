"""PSTLayer and its Linear: the factors of each adapter, the current budget, merge and unmerge."""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features, check_adapters_to_merge
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .functional import MaskedLinear, weight_and_importance
from .patterns import parse_pattern

if TYPE_CHECKING:
    from .config import PSTConfig

FACTORS = ("pst_U", "pst_V", "pst_A", "pst_B", "pst_R", "pst_C")
FINGERPRINT_SIZE = 64


class PSTLayer(BaseTunerLayer):
    """The PST adapters of one linear layer.

    For each adapter it holds the factors `pst_U` [out, r], `pst_V` [r, in], `pst_A` [out, mask_r], `pst_B`
    [mask_r, in], `pst_R` [out], `pst_C` [in], in the layer's own features whatever order it stores its weight in; and
    two buffers that are saved with the adapter:

    - `pst_num_pruned`, int64 scalar: how many entries are pruned now. It is the only place that knows, so that the
      sparsity survives every way of loading, casting and copying; an integer, so that no cast changes it.
    - `pst_fingerprint`, int64 [64]: entries of the weight that the adapter was made for, as bits of their float64.
    """

    adapter_layer_names = FACTORS
    other_param_names = ("pst_config", "pst_num_pruned", "pst_fingerprint", "_checked_fingerprints")

    def __init__(self, base_layer: nn.Module) -> None:
        self.base_layer = base_layer
        self.in_features, self.out_features = _get_in_out_features(base_layer)
        self.pst_config: dict[str, PSTConfig] = {}
        for name in FACTORS:
            setattr(self, name, nn.ParameterDict({}))
        self.pst_num_pruned = BufferDict(persistent=True)
        self.pst_fingerprint = BufferDict(persistent=True)
        self.merged_adapters = []
        self._disable_adapters = False
        self._checked_fingerprints: dict[str, tuple[Tensor, int]] = {}

    def update_layer(self, adapter_name: str, config: PSTConfig, inference_mode: bool = False) -> None:
        """Add an adapter with freshly drawn factors, at the config's initial sparsity."""
        n, k = self.out_features, self.in_features
        shapes = ((n, config.r), (config.r, k), (n, config.mask_r), (config.mask_r, k), (n,), (k,))
        self.pst_config[adapter_name] = config
        for name, shape in zip(FACTORS, shapes, strict=True):
            getattr(self, name)[adapter_name] = nn.Parameter(torch.zeros(shape))
        num_pruned = parse_pattern(config.pattern).num_pruned(torch.Size((n, k)), config.initial_sparsity)
        self.pst_num_pruned[adapter_name] = torch.tensor(num_pruned)
        self.pst_fingerprint[adapter_name] = fingerprint(self.get_base_layer().weight)
        self.reset_pst_parameters(adapter_name, config.init_weights)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def reset_pst_parameters(self, adapter_name: str, init_weights: bool) -> None:
        """Draw the factors: the paper's start, W' = W and S = |W|, or all of them at random."""
        drawn = ("pst_U", "pst_A") if init_weights else FACTORS
        for name in drawn:
            nn.init.normal_(getattr(self, name)[adapter_name], std=1.0 if name in ("pst_U", "pst_A") else 0.02)

    @property
    def active_pst_adapter(self) -> str | None:
        """The active adapter that this layer has, if any.

        Raises:
            ValueError: if it has more than one, since masks do not compose.
        """
        own = [name for name in self.active_adapters if name in self.pst_config]
        check_one_adapter(own)
        return own[0] if own else None

    @property
    def active_config(self) -> PSTConfig:
        """The config of the active adapter."""
        return self.pst_config[self.active_pst_adapter]

    @property
    def num_pruned(self) -> int:
        """How many entries the active adapter prunes now."""
        return int(self.pst_num_pruned[self.active_pst_adapter])

    def set_sparsity(self, sparsity: float) -> None:
        """Prune `int(units * sparsity)` units of the pattern from now on, by the active adapter; single entries where
        it is unstructured.

        Raises:
            ValueError: if `sparsity` is not in [0, 1) or more than the pattern allows, or the adapter is merged.
        """
        if not 0 <= sparsity < 1:
            raise ValueError(f"sparsity={sparsity!r}: expected 0 <= sparsity < 1, such as 0.9 for 90 %.")
        if self.merged:
            raise ValueError(
                f"The adapter {self.merged_adapters} is merged: its mask is already applied to the weight. Call "
                "unmerge_adapter() before changing the sparsity."
            )
        config = self.active_config
        pattern = parse_pattern(config.pattern)
        if sparsity > pattern.max_sparsity:
            raise ValueError(
                f"sparsity={sparsity!r} is more than pattern={config.pattern!r} prunes: expected at most "
                f"{pattern.max_sparsity:g}."
            )
        shape = torch.Size((self.out_features, self.in_features))
        self.pst_num_pruned[self.active_pst_adapter].fill_(pattern.num_pruned(shape, sparsity))

    def factors(self, adapter_name: str) -> tuple[Tensor, ...]:
        """U, V, A, B, R, C of an adapter."""
        return tuple(getattr(self, name)[adapter_name] for name in FACTORS)

    def check_fingerprint(self, adapter_name: str) -> None:
        """Warn once per adapter if it was trained on another base weight than the one that is here.

        It runs where the weight is used, since the buffers can be replaced without any method of this class running.
        """
        expected = self.pst_fingerprint[adapter_name]
        state = (expected, _version(expected))
        checked = self._checked_fingerprints.get(adapter_name)
        if checked is not None and checked[0] is expected and checked[1] == state[1]:
            return
        self._checked_fingerprints[adapter_name] = state
        config = self.pst_config[adapter_name]
        if same_fingerprint(expected, fingerprint(self.get_base_layer().weight)) or config.base_mismatch_warned:
            return
        config.base_mismatch_warned = True
        warnings.warn(
            f"The PST adapter {adapter_name!r} was trained on another base model: the weights that it prunes are not "
            "the ones it was made for, so its mask and its update do not fit and the results will be wrong. Load it "
            f"on the model it was trained on (base_model_name_or_path={config.base_model_name_or_path!r}).",
            stacklevel=2,
        )


class InferenceWeight(NamedTuple):
    """A masked weight that evaluation uses again as long as nothing that it was computed from has changed."""

    sources: tuple[Tensor, ...]  # W, which is kept alive, and copies of the factors and the budget
    versions: list[Any]  # the address and version of each of them, the dtype, and what counts of the config
    weight: Tensor


class Linear(nn.Module, PSTLayer):
    """`nn.Linear` or transformers' `Conv1D` (which stores its weight [in, out]) with PST adapters."""

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: PSTConfig, inference_mode: bool) -> None:
        nn.Module.__init__(self)
        PSTLayer.__init__(self, base_layer)
        self._active_adapter = adapter_name
        self._dense_weight: Tensor | None = None
        self._inference_weight: InferenceWeight | None = None
        self.update_layer(adapter_name, config, inference_mode)

    def _oriented(self, weight: Tensor) -> Tensor:
        """The weight of the base layer as [out, in], or back again."""
        return weight.T if isinstance(self.get_base_layer(), Conv1D) else weight

    def _arguments(self, adapter_name: str) -> tuple[Any, ...]:
        config = self.pst_config[adapter_name]
        weight = self._oriented(self.get_base_layer().weight)
        return weight, *self.factors(adapter_name), config.beta, config.alpha1, config.alpha2

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Replace the base weight by M ∘ W', pruned entries being +0.0; the dense weight is kept for `unmerge`.

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
            merged = self._masked_weight(adapter_name)
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
        # the importance holds |W'| and every factor; a mask would hide what it prunes
        updated, importance = weight_and_importance(*self._arguments(adapter_name))
        if not (torch.isfinite(updated).all() and torch.isfinite(importance).all()):
            raise ValueError(
                f"NaNs detected in the merged weights. The adapter {adapter_name} seems to be broken: its weight or "
                "its importance is not finite everywhere. Train again with a lower learning rate for the factors."
            )

    @torch.no_grad()
    def _masked_weight(self, adapter_name: str) -> Tensor:
        """M ∘ W', [out, in], in the dtype of the factors."""
        self.check_fingerprint(adapter_name)
        updated, importance = weight_and_importance(*self._arguments(adapter_name))
        pattern = parse_pattern(self.pst_config[adapter_name].pattern)
        mask = pattern.mask(importance, int(self.pst_num_pruned[adapter_name]))
        return updated.masked_fill_(~mask, 0)  # a product with the mask would leave -0.0

    def _weight_for_inference(self, adapter_name: str, dtype: torch.dtype) -> Tensor:
        """M ∘ W' in `dtype`, from the last call if that is still right.

        On a CPU the factors are compared by value, since a write through `.data` leaves no other trace. Elsewhere that
        would cost a synchronisation, and versions, `train()`, `eval()` and training steps decide.
        """
        weight, config = self.get_base_layer().weight, self.pst_config[adapter_name]
        sources = (weight, *self.factors(adapter_name), self.pst_num_pruned[adapter_name])
        versions = [(tensor.data_ptr(), _version(tensor)) for tensor in sources]
        versions += [dtype, config.pattern, config.beta, config.alpha1, config.alpha2]
        last = self._inference_weight
        if last is not None and last.versions == versions:
            same = zip(last.sources[1:], sources[1:], strict=True)
            if weight.device.type != "cpu" or all(torch.equal(old, new) for old, new in same):
                return last.weight
        copies = (weight.detach(), *(tensor.detach().clone() for tensor in sources[1:]))
        masked = self._masked_weight(adapter_name).to(dtype)
        self._inference_weight = InferenceWeight(copies, versions, masked)
        return masked

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """y = (M ∘ W') x + b, [..., in] to [..., out], in the dtype that the base layer would give."""
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
                rows, pattern = x.reshape(-1, self.in_features), parse_pattern(self.active_config.pattern)
                num_pruned = self.pst_num_pruned[adapter_name]
                y = MaskedLinear.apply(rows, bias, pattern, num_pruned, *self._arguments(adapter_name))
                y = y.view(*x.shape[:-1], self.out_features)
            else:
                y = F.linear(x, self._weight_for_inference(adapter_name, x.dtype), bias)
        return y if autocast else y.to(input_dtype)

    def _trains(self, adapter_name: str) -> bool:
        # under gradient checkpointing a training step runs without gradients first
        trained = (*self.factors(adapter_name), self.get_base_layer().weight)
        return self.training or (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in trained))

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        for name in FACTORS:
            for adapter_name, factor in getattr(self, name).items():
                loaded = state_dict.get(f"{prefix}{name}.{adapter_name}")
                if loaded is not None and loaded.shape != factor.shape:
                    raise ValueError(
                        f"The adapter does not fit: {prefix}{name} has shape {list(loaded.shape)} in the checkpoint, "
                        f"but this layer, [out={self.out_features}, in={self.in_features}], needs "
                        f"{list(factor.shape)}. It was trained on a base model of another size, or with another r or "
                        "mask_r: load it on the model and with the adapter_config.json it was saved with."
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


def check_one_adapter(adapter_names: list[str]) -> None:
    """Raise ValueError if there is more than one adapter of a layer in the list."""
    if len(adapter_names) > 1:
        raise ValueError(
            f"The PST adapters {adapter_names} are on the same layer: two masks on one weight do not compose, so only "
            f"one of them can be active or merged there. Choose one, for instance set_adapter({adapter_names[0]!r})."
        )


def active_layers(model: nn.Module) -> list[PSTLayer]:
    """The layers of a model that have an active PST adapter, in order.

    Raises:
        ValueError: if there is none.
    """
    layers = [m for m in model.modules() if isinstance(m, PSTLayer) and m.active_pst_adapter is not None]
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no layer with an active PST adapter: call "
            "get_peft_model(model, PSTConfig(...)) first, or set_adapter() if the adapter is not active."
        )
    return layers


def overall_sparsity(layers: list[PSTLayer]) -> float:
    """The share of the entries of all these layers' weights that their active adapters prune now."""
    return sum(layer.num_pruned for layer in layers) / sum(layer.out_features * layer.in_features for layer in layers)


@torch.no_grad()
def fingerprint(weight: Tensor) -> Tensor:
    """64 entries spread evenly over a weight, as the bits of their float64: int64 [64]. Zeros if it has no data."""
    if weight.device.type == "meta":
        return torch.zeros(FINGERPRINT_SIZE, dtype=torch.int64)
    indices = torch.arange(FINGERPRINT_SIZE, device=weight.device) * (weight.numel() - 1) // (FINGERPRINT_SIZE - 1)
    return weight.detach().reshape(-1)[indices].double().view(torch.int64)


def same_fingerprint(a: Tensor, b: Tensor) -> bool:
    """Whether two fingerprints are of the same weight, stored in whatever floating dtype.

    Entries may differ by 2⁻⁷ of their size, the rounding of bfloat16, and below it by float16's smallest step. A
    fingerprint of zeros stands for a weight that was not there to be read, and fits every other.
    """
    a, b = a.view(torch.float64), b.to(a.device).view(torch.float64)
    unknown = not (a.any() and b.any())
    return unknown or torch.allclose(a, b, rtol=2**-7, atol=2**-24, equal_nan=True)


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version
