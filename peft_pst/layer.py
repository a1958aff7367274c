"""PSTLayer: what the adapters of one linear layer hold, and how much of it they prune."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features
from torch import Tensor, nn

from .fingerprint import fingerprint, same_fingerprint
from .functional import Method
from .importance import IMPORTANCES
from .patterns import Pattern, pack_bits
from .quantized import backend_of, read
from .sharded import gathered
from .update import UPDATES

if TYPE_CHECKING:
    from .config import PSTConfig

METHODS = (*UPDATES.values(), *IMPORTANCES.values())
BUFFERS = tuple(dict.fromkeys(name for method in IMPORTANCES.values() for name in method.buffers))
PARAMETERS = tuple(dict.fromkeys(name for method in METHODS for name in method.names if name not in BUFFERS))


class PSTLayer(BaseTunerLayer):
    """The PST adapters of one linear layer.

    For each adapter it holds the parameters of its method, such as PST's factors `pst_U` [out, r], `pst_V` [r, in],
    `pst_A` [out, mask_r], `pst_B` [mask_r, in], `pst_R` [out], `pst_C` [in], in the layer's own features whatever
    order it stores its weight in; and buffers that are saved with the adapter:

    - `pst_num_pruned`, int64 scalar: how many entries are pruned now. It is the only place that knows, so that the
      sparsity survives every way of loading, casting and copying; an integer, so that no cast changes it.
    - `pst_mask`, uint8 [ceil(out * in / 8)], the mask as bits, where it is selected between the steps: for several
      weights together (`budget="global"`, coupled patterns) or for several steps (`mask_interval`).
    - `pst_fingerprint`, int64 [64]: entries of the weight that the adapter was made for, as bits of their float64.
    - what the importance keeps of data it has seen, such as `pst_input_squares` of `"wanda"`.
    """

    adapter_layer_names = PARAMETERS
    other_param_names = (
        *BUFFERS,
        "pst_config",
        "pst_pattern",
        "pst_group",
        "pst_num_pruned",
        "pst_mask",
        "pst_fingerprint",
        "_checked_fingerprints",
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
        for name in (*BUFFERS, "pst_num_pruned", "pst_mask", "pst_fingerprint"):
            setattr(self, name, BufferDict(persistent=True))
        self.merged_adapters = []
        self._disable_adapters = False
        self._checked_fingerprints: dict[str, tuple[Tensor, int]] = {}

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
        for part in Method.of(config):
            names = [name for name in part.names if name not in BUFFERS]
            for name, start in zip(names, part.starts(*self.shape), strict=True):
                getattr(self, name)[adapter_name] = nn.Parameter(start.draw(random=not config.init_weights))
        importance = IMPORTANCES[config.importance](config)
        for name, buffer in zip(importance.buffers, importance.empty_buffers(*self.shape), strict=True):
            getattr(self, name)[adapter_name] = buffer
        num_pruned = 0 if config.keeps_masks else pattern.num_pruned(self.shape, config.initial_sparsity)
        self.pst_num_pruned[adapter_name] = torch.tensor(num_pruned)
        if config.keeps_masks:
            self.pst_mask[adapter_name] = pack_bits(torch.ones(self.shape, dtype=torch.bool))
        self.pst_fingerprint[adapter_name] = fingerprint(self.frozen_weight())
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

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
        self.pst_mask[adapter_name].copy_(pack_bits(mask))
        self.pst_num_pruned[adapter_name].copy_(mask.numel() - torch.count_nonzero(mask))

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


def version(tensor: Tensor) -> int:
    """What changes when a tensor is written to; 0 if nothing does."""
    return 0 if tensor.is_inference() else tensor._version
