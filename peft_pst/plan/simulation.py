"""One training step of a model without any data, and what it holds in memory at its peak.

The model's own code runs, on tensors that have a shape and a device but no contents (torch's `FakeTensorMode`), so the
figures follow from the architecture and no table of formulas is needed. A dispatch mode sees every tensor that an
operator returns and when it dies. What an operator allocates and frees inside itself stays unseen.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .. import functional
from ..budget import Target, _set_sparsity
from ..functional import Method
from ..gpu import fused
from ..layer import PSTLayer
from ..patterns import COUPLED, bits, selection
from .sharding import CATEGORIES, Shares

Device = Literal["cpu", "cuda"]

aten = torch.ops.aten


def peak_of_step(
    model: nn.Module, batch: dict[str, Tensor], shares: Shares, device: Device, experts: int
) -> dict[str, int]:
    """What a training step holds at its peak, the optimizer's states being there from the start.

    Args:
        model: on the meta device, in training mode; its forward takes the batch and returns a loss. It cannot be used
            afterwards.
        batch: on the meta device.
        shares: the share of each category that a device holds.
        device: whose kernels run.
        experts: how many experts the tokens are spread over, evenly.

    Returns:
        Bytes by category (`CATEGORIES`) at the moment at which their sum is largest.
    """
    ledger = Ledger(shares, experts)
    mode = FakeTensorMode()
    _fake(model, mode)
    batch = {name: FakeTensor(mode, tensor, torch.device("cpu")) for name, tensor in batch.items()}
    with mode, _kernels(device), ledger:
        for tensor in (*model.parameters(), *model.buffers()):
            ledger.hold(tensor, "weights")
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        for parameter in trainable:
            parameter.register_post_accumulate_grad_hook(lambda p: ledger.hold(p.grad, "gradients"))
        # torch's default is one kernel over all parameters on a GPU, one parameter after the other on a CPU
        optimizer = torch.optim.AdamW(trainable, foreach=device == "cuda")
        _create_states(optimizer, trainable, ledger)

        ledger.peak = dict(ledger.live)
        ledger.category = "activations"
        for tensor in batch.values():
            ledger.hold(tensor, "activations")
        loss = model(**batch).loss
        ledger.category = "temporaries"
        loss.backward()
        ledger.temporaries_share = shares["optimizer_states"]
        optimizer.step()
        optimizer.zero_grad()
        _select_kept_masks(model)
    return {category: round(size) for category, size in ledger.peak.items()}


class Ledger(TorchDispatchMode):
    """Follows the storages that live on this device, by category, and keeps the largest total."""

    def __init__(self, shares: Shares, experts: int) -> None:
        super().__init__()
        self.shares, self.experts = shares, experts
        self.category = "temporaries"
        """That of the storages which operators make now."""
        self.temporaries_share = shares["temporaries"]
        self.live = dict.fromkeys(CATEGORIES, 0.0)
        self.peak = dict(self.live)
        self._entries: dict[int, tuple[str, float]] = {}

    def hold(self, tensor: Tensor, category: str) -> None:
        """Count a tensor's storage under a category, from now until it is freed."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._entries:
            self._release(key)
        else:
            weakref.finalize(storage, self._release, key)
        share = self.temporaries_share if category == "temporaries" else self.shares[category]
        size = share * storage.nbytes()
        self._entries[key] = category, size
        self.live[category] += size
        if sum(self.live.values()) > sum(self.peak.values()):
            self.peak = dict(self.live)

    def _release(self, key: int) -> None:
        category, size = self._entries.pop(key)
        self.live[category] -= size

    def __torch_dispatch__(
        self, func: Callable, types: tuple, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is aten._local_scalar_dense.default:
            return _answer(*args)
        if func is aten.nonzero.default:
            return self._nonzero(*args)
        if func is aten._grouped_mm.default:  # torch knows the shape of what it gives in bfloat16 alone
            dtype, args = args[0].dtype, [a.bfloat16() if a.is_floating_point() else a for a in args]
            result = func(*args, **(kwargs or {})).to(dtype)
        else:
            result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in self._entries:
                self.hold(tensor, self.category)
        return result

    def _nonzero(self, mask: Tensor) -> Tensor:
        """Where a mask is set: mixtures of experts ask which experts have tokens (all), and which tokens they have."""
        count = mask.numel() if mask.numel() == self.experts else -(-mask.numel() // self.experts)
        return mask.new_empty((count, mask.ndim), dtype=torch.int64)


def _answer(scalar: Tensor) -> bool | int:
    """The value of an entry when the model asks for it: False, so that no mask is full, as in a padded batch; of a
    list of experts, which one it is; of any other number 1."""
    if scalar.dtype == torch.bool:
        return False
    is_entry = scalar.untyped_storage().nbytes() > scalar.element_size()
    return scalar.storage_offset() if is_entry else 1


@contextmanager
def _kernels(device: Device) -> Iterator[None]:
    """Gives attention, dropout and PST's selection what they have on a device, by what they allocate and keep.

    Tensors without contents are on a CPU as far as torch knows, which is right for everything else.
    """
    attention, dropout = F.scaled_dot_product_attention, F.dropout
    pack, unpack = _pack_numpy, _unpack_numpy
    if device == "cuda":
        attention, dropout = partial(_fused_attention, attention), _fused_dropout
        pack, unpack = bits._pack_torch, bits._unpack_torch
    with (
        patch.object(F, "scaled_dot_product_attention", attention),
        patch.object(F, "dropout", dropout),
        patch.object(fused, "has_kernels", lambda _: device == "cuda"),
        patch.object(functional, "select", _select),
        patch.object(functional, "FusedRebuilt", _Rebuilt),
        patch.object(selection, "has_kernels", lambda _: device == "cuda"),
        patch.object(selection, "_mask_triton", _mask_triton),
        patch.object(selection, "_mask_numpy", _mask_numpy),
        patch.object(bits, "_pack_numpy", pack),
        patch.object(bits, "_unpack_numpy", unpack),
    ):
        yield


def _fused_attention(
    attention: Callable[..., Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Attention that never holds a whole matrix of scores, with dropout or without; on a CPU only without."""
    return attention(query, key, value, attn_mask, 0.0, is_causal, scale=scale, enable_gqa=enable_gqa)


def _fused_dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """Dropout that keeps one byte an entry; a CPU keeps the factors."""
    return torch.native_dropout(input, p, training)[0] if training and p else input


def _mask_numpy(importance: Tensor, num_pruned: int) -> Tensor:
    partitioned = importance.clone()
    threshold = partitioned.flatten()[0].clone()
    del partitioned
    return importance > threshold


def _mask_triton(importance: Tensor, num_pruned: int | Tensor) -> Tensor:
    _count_ties(importance)
    return torch.empty_like(importance, dtype=torch.bool)


def _count_ties(importance: Tensor) -> None:
    counts = importance.new_empty(-(-importance.numel() // 128), dtype=torch.int32)
    counts.cumsum(0, dtype=torch.int32) - counts


def _select(
    method: Method, weight: Tensor, num_pruned: Tensor | int, arguments: tuple[Tensor, ...], dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    masked, packed = weight.new_empty(weight.shape, dtype=dtype), _pack_numpy(weight)
    _count_ties(weight)
    return masked, packed


class _Rebuilt(fused.Rebuilt):
    def masked(self, dtype: torch.dtype) -> Tensor:
        return self.weight.new_empty(self.weight.shape, dtype=dtype)

    def gradients(self, G: Tensor) -> tuple[None, tuple[Tensor, ...]]:
        U, V, A, *_ = self.arguments
        (n, k), width = self.weight.shape, U.shape[1] + A.shape[1] + 1
        rows, columns = fused.CHUNK
        of_rows = U.new_empty((-(-k // columns), n, width)).sum(0)
        of_columns = V.new_empty((-(-n // rows), width, k)).sum(0)
        sizes = U.shape[1], A.shape[1], 1
        (dU, dA, dR), (dV, dB, dC) = of_rows.split(sizes, dim=1), of_columns.split(sizes)
        return None, (dU, dV, dA, dB, dR[:, 0], dC[0])


def _pack_numpy(mask: Tensor) -> Tensor:
    return mask.new_empty(-(-mask.numel() // 8), dtype=torch.uint8)


def _unpack_numpy(packed: Tensor, numel: int) -> Tensor:
    return packed.new_empty(numel)


def _fake(model: nn.Module, mode: FakeTensorMode) -> None:
    """Put a model's tensors from the meta device on a CPU without contents; tied ones stay tied."""
    fakes: dict[int, Tensor] = {}

    def fake(tensor: Tensor) -> Tensor:
        if id(tensor) not in fakes:
            new = FakeTensor(mode, tensor.detach(), torch.device("cpu"))
            is_parameter = isinstance(tensor, nn.Parameter)
            fakes[id(tensor)] = nn.Parameter(new, tensor.requires_grad) if is_parameter else new
        return fakes[id(tensor)]

    for module in model.modules():
        # rotary embeddings keep tensors that are no buffers
        for tensors in (module._parameters, module._buffers, vars(module)):
            tensors.update({name: fake(tensor) for name, tensor in tensors.items() if isinstance(tensor, Tensor)})


def _create_states(optimizer: torch.optim.Optimizer, trainable: list[nn.Parameter], ledger: Ledger) -> None:
    for parameter in trainable:
        parameter.grad = torch.empty_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    for state in optimizer.state.values():
        for tensor in state.values():
            ledger.hold(tensor, "optimizer_states")


def _select_kept_masks(model: nn.Module) -> None:
    """Masks that are kept between the steps are selected after the optimizer's."""
    targets = [Target(m, m.active_pst_adapter) for m in model.modules() if isinstance(m, PSTLayer)]
    if targets:
        config = targets[0].layer.active_config
        if config.pattern in (*COUPLED, "row", "column"):
            # how units of several sizes share a budget depends on the data; they are too few to matter
            config.budget = "layer"
        _set_sparsity(targets, config.sparsity)
