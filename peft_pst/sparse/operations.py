"""Products with sparse weights as torch custom operations: torch.compile and torch.export see one operation that names
its layer by a number."""

from __future__ import annotations

import itertools
import weakref
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .serving import gradient, product

if TYPE_CHECKING:
    from .linear import SparseLinear

_HANDLES: weakref.WeakValueDictionary[int, SparseLinear] = weakref.WeakValueDictionary()
_next_handle = itertools.count()


def register(linear: SparseLinear) -> int:
    """The number by which a graph names a layer."""
    handle = next(_next_handle)
    _HANDLES[handle] = linear
    return handle


def _layer(handle: int) -> SparseLinear:
    if handle not in _HANDLES:
        raise ValueError(
            f"The sparse layer {handle} is not in this process: a graph with peft_pst.sparse_linear runs only where it"
            " was made. Export the dense model instead: peft_pst.densify(model)."
        )
    return _HANDLES[handle]


@torch.library.custom_op("peft_pst::sparse_linear", mutates_args=(), device_types=("cpu", "cuda"))
def _sparse_linear(x: Tensor, handle: int) -> Tensor:
    return product(_layer(handle), x)


@_sparse_linear.register_fake
def _(x: Tensor, handle: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], _layer(handle).out_features)


@torch.library.custom_op("peft_pst::sparse_linear_gradient", mutates_args=(), device_types=("cpu", "cuda"))
def _sparse_linear_gradient(grad: Tensor, handle: int) -> Tensor:
    return gradient(_layer(handle), grad)


@_sparse_linear_gradient.register_fake
def _(grad: Tensor, handle: int) -> Tensor:
    return grad.new_empty(*grad.shape[:-1], _layer(handle).in_features)


def _remember_handle(ctx: object, inputs: tuple, output: Tensor) -> None:
    ctx.handle = inputs[1]


def _backward(ctx: object, grad: Tensor) -> tuple[Tensor, None]:
    return torch.ops.peft_pst.sparse_linear_gradient(grad, ctx.handle), None


_sparse_linear.register_autograd(_backward, setup_context=_remember_handle)
