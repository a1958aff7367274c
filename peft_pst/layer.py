"""PSTLayer: what the adapters of one linear layer hold, and how much of it they prune."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features
from torch import Tensor, nn

from .boost import NAMES as BOOST
from .boost import block_ones, mean_pruned
from .fingerprint import fingerprint, same_fingerprint
from .functional import Method
from .importance import IMPORTANCES
from .parameters import Start
from .patterns import Pattern, pack_bits, unpack_bits
from .quantized import backend_of, read
from .sharded import assign, gathered
from .update import UPDATES

if TYPE_CHECKING:
    from .config import PSTConfig

METHODS = (*UPDATES.values(), *IMPORTANCES.values())
BUFFERS = tuple(dict.fromkeys(name for method in IMPORTANCES.values() for name in method.buffers))
PARAMETERS = tuple(dict.fromkeys(name for method in METHODS for name in method.names if name not in BUFFERS)) + BOOST
COUNTED = ("pst_num_pruned", "pst_mask", "pst_first_mask", "pst_flips", "pst_fingerprint")
"""The buffers that say what is pruned, and of which weight."""


class PSTLayer(BaseTunerLayer):
    """The PST adapters of one linear layer.

    For each adapter it holds the parameters of its method, such as PST's factors `pst_U` [out, r], `pst_V` [r, in],
    `pst_A` [out, mask_r], `pst_B` [mask_r, in], `pst_R` [out], `pst_C` [in], in the layer's own features whatever
    order it stores its weight in; of a boost `pst_boost` [out, in / k], S, and where it trains `pst_projection`
    [in / k, in], P; and buffers that are saved with the adapter:

    - `pst_num_pruned`, int64 scalar: how many entries are pruned now. It is the only place that knows, so that the
      sparsity survives every way of loading, casting and copying; an integer, so that no cast changes it.
    - `pst_mask`, uint8 [ceil(out * in / 8)], the mask as bits, where it is selected between the steps: for several
      weights together (`budget="global"`, coupled patterns) or for several steps (`mask_interval`).
    - `pst_first_mask`, like it, the first mask that pruned anything, and `pst_flips`, int64 [2], how many entries of
      the mask differ from the one before and from the first: where no growing sparsity changes the mask.
    - `pst_fingerprint`, int64 [64]: entries of the weight that the adapter was made for, as bits of their float64.
    - what the importance keeps of data it has seen, such as `pst_input_squares` of `"wanda"`.
    """

    adapter_layer_names = PARAMETERS
    other_param_names = (
        *BUFFERS,
        "pst_config",
        "pst_pattern",
        "pst_group",
        *COUNTED,
        "_checked_fingerprints",
        "_boost_waits",
    )

    def __init__(self, base_layer: nn.Module) -> None:
        self.base_layer = base_layer
        self.in_features, self.out_features = _get_in_out_features(base_layer)
        self.quantization_backend = backend_of(self.get_base_layer())
        self.pst_config: dict[str, PSTConfig] = {}
        self.pst_pattern: dict[str, Pattern] = {}
        self.pst_group: dict[str, str] = {}
        for name in PARAMETERS:
            setattr(self, name, nn.ParameterDict({}))
        for name in (*BUFFERS, *COUNTED):
            setattr(self, name, BufferDict(persistent=True))
        self.merged_adapters = []
        self._disable_adapters = False
        self._checked_fingerprints: dict[str, tuple[Tensor, int]] = {}
        self._boost_waits: dict[str, bool] = {}

    @property
    def shape(self) -> torch.Size:
        """[out, in], whatever order the base layer stores its weight in."""
        return torch.Size((self.out_features, self.in_features))

    def frozen_weight(self) -> Tensor:
        """The weight of the base layer in its order; if it is held in 8 or 4 bits or sharded, a dense copy."""
        layer = self.get_base_layer()
        return gathered(layer.weight) if self.quantization_backend is None else read(layer, self.quantization_backend)

    def update_layer(
        self, adapter_name: str, config: PSTConfig, pattern: Pattern, group: str, inference_mode: bool = False
    ) -> None:
        """Add an adapter with freshly drawn parameters, at the config's initial sparsity.

        Args:
            pattern: the units of this weight. If the config's pattern is coupled, those that the weight shares.
            group: a name that the weights of a coupled structure have in common, and no other.
        """
        self.pst_config[adapter_name], self.pst_pattern[adapter_name] = config, pattern
        self.pst_group[adapter_name] = group
        method = Method.of(config)
        for part in (method.update, method.importance):
            names = [name for name in part.names if name not in BUFFERS]
            for name, start in zip(names, part.starts(*self.shape), strict=True):
                getattr(self, name)[adapter_name] = nn.Parameter(start.draw(random=not config.init_weights))
        if config.boost is not None:
            self._add_boost(adapter_name, config)
        for name, buffer in zip(method.importance.buffers, method.importance.empty_buffers(*self.shape), strict=True):
            getattr(self, name)[adapter_name] = buffer
        num_pruned = 0 if config.selects_at_start else pattern.num_pruned(self.shape, config.initial_sparsity)
        self.pst_num_pruned[adapter_name] = torch.tensor(num_pruned)
        if config.keeps_masks:
            self.pst_mask[adapter_name] = pack_bits(torch.ones(self.shape, dtype=torch.bool))
        if config.counts_flips:
            self.pst_first_mask[adapter_name] = self.pst_mask[adapter_name].clone()
            self.pst_flips[adapter_name] = torch.zeros(2, dtype=torch.int64)
        self.pst_fingerprint[adapter_name] = fingerprint(self.frozen_weight())
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def _add_boost(self, adapter_name: str, config: PSTConfig) -> None:
        groups, left = divmod(self.in_features, config.boost)
        if left:
            raise ValueError(
                f"boost={config.boost} does not divide the inputs of {self.pst_group[adapter_name]!r}, [out="
                f"{self.out_features}, in={self.in_features}]: choose a size that does, or leave the module out of "
                "target_modules."
            )
        start = Start((self.out_features, groups))
        self.pst_boost[adapter_name] = nn.Parameter(start.draw(random=not config.init_weights))
        if config.boost_projection:
            self.pst_projection[adapter_name] = nn.Parameter(block_ones(groups, config.boost))
        self._boost_waits[adapter_name] = config.init_weights

    def boost_waits(self, adapter_name: str) -> bool:
        """Whether nothing was pruned yet that the boost of an adapter could start from."""
        # what is pruned is looked up once, not in each step: it may be on another device
        waits = self._boost_waits.get(adapter_name, False) and not bool(self.pst_num_pruned[adapter_name])
        self._boost_waits[adapter_name] = waits
        return waits

    def start_boost(self, adapter_name: str) -> None:
        """Start S of a boost from what is pruned now."""
        groups = self.in_features // self.pst_config[adapter_name].boost
        assign(self.pst_boost[adapter_name], mean_pruned(self.pruned_part(adapter_name), groups))
        self._boost_waits[adapter_name] = False

    def boost(self, adapter_name: str) -> tuple[Tensor, Tensor | None] | None:
        """S and P of an adapter's boost, if it has one; P is None where it sums."""
        if adapter_name not in self.pst_boost:
            return None
        return self.pst_boost[adapter_name], self.pst_projection.get(adapter_name)

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

    def check_sparsity(self, adapter_name: str, sparsity: float) -> None:
        """Raise ValueError if an adapter cannot prune that share of the entries now."""
        if not 0 <= sparsity < 1:
            raise ValueError(f"sparsity={sparsity!r}: expected 0 <= sparsity < 1, such as 0.9 for 90 %.")
        if self.merged:
            raise ValueError(
                f"The adapter {self.merged_adapters} is merged: its mask is already applied to the weight. Call "
                "unmerge_adapter() before changing the sparsity."
            )
        config, pattern = self.pst_config[adapter_name], self.pst_pattern[adapter_name]
        if sparsity > pattern.max_sparsity:
            raise ValueError(
                f"sparsity={sparsity!r} is more than pattern={config.pattern!r} prunes: expected at most "
                f"{pattern.max_sparsity:g}."
            )
        if sparsity > 0:
            importance = IMPORTANCES[config.importance](config)
            buffers = (getattr(self, name)[adapter_name] for name in importance.buffers)
            importance.check_ready(self.pst_group[adapter_name], *buffers)

    def arguments(self, adapter_name: str) -> tuple[Tensor, ...]:
        """The parameters and buffers of an adapter's method, in its order."""
        names = Method.of(self.pst_config[adapter_name]).names
        return tuple(gathered(getattr(self, name)[adapter_name]) for name in names)

    def keep_mask(self, adapter_name: str, mask: Tensor) -> None:
        """Make `mask`, bool [out, in], the mask of an adapter until the next one is kept."""
        if adapter_name in self.pst_flips:
            self._count_flips(adapter_name, mask)
        self.pst_mask[adapter_name].copy_(pack_bits(mask))
        self.pst_num_pruned[adapter_name].copy_(mask.numel() - torch.count_nonzero(mask))

    def _count_flips(self, adapter_name: str, mask: Tensor) -> None:
        bits, is_first = pack_bits(mask), self.pst_num_pruned[adapter_name] == 0
        first = self.pst_first_mask[adapter_name]
        first.copy_(torch.where(is_first, bits, first))
        last = torch.where(is_first, bits, self.pst_mask[adapter_name])
        others = (unpack_bits(other, mask.shape, torch.bool) for other in (last, first))
        self.pst_flips[adapter_name].copy_(torch.stack([torch.count_nonzero(mask != other) for other in others]))

    def check_fingerprint(self, adapter_name: str) -> None:
        """Warn once per adapter if it was trained on another base weight than the one that is here.

        It runs where the weight is used, since the buffers can be replaced without any method of this class running.
        """
        expected = self.pst_fingerprint[adapter_name]
        state = (expected, version(expected))
        checked = self._checked_fingerprints.get(adapter_name)
        if checked is not None and checked[0] is expected and checked[1] == state[1]:
            return
        self._checked_fingerprints[adapter_name] = state
        config = self.pst_config[adapter_name]
        if same_fingerprint(expected, fingerprint(self.frozen_weight())) or config.base_mismatch_warned:
            return
        config.base_mismatch_warned = True
        warnings.warn(
            f"The PST adapter {adapter_name!r} was trained on another base model: the weights that it prunes are not "
            "the ones it was made for, so its mask and its update do not fit and the results will be wrong. Load it "
            f"on the model it was trained on (base_model_name_or_path={config.base_model_name_or_path!r}), with the "
            "quantization that it had.",
            stacklevel=2,
        )


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


def flip_rates(layers: list[PSTLayer]) -> dict[str, float]:
    """The share of the entries of all these layers' weights whose mask differs from the one before (`flip_rate`) and
    from the first one (`first_flip_rate`); nothing where no active adapter counts flips."""
    counting = [layer for layer in layers if layer.active_pst_adapter in layer.pst_flips]
    if not counting:
        return {}
    flips = sum(layer.pst_flips[layer.active_pst_adapter].cpu() for layer in counting)
    entries = sum(layer.shape.numel() for layer in counting)
    return dict(zip(("flip_rate", "first_flip_rate"), (flips.double() / entries).tolist(), strict=True))


def version(tensor: Tensor) -> int:
    """What changes when a tensor is written to; 0 if nothing does."""
    return 0 if tensor.is_inference() else tensor._version
