"""Weights that are spread over processes, by FSDP2 or by DeepSpeed's ZeRO-3: how they are read and written.

In a forward both hand whole tensors to a module. Elsewhere, where masks are selected for several steps or adapters are
merged, a parameter is only this process' part of it. Everything here that is about such a parameter runs in all
processes at once.
"""

from __future__ import annotations

import os
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor


def is_sharded(tensor: Tensor) -> bool:
    """Whether this process has only a part of a tensor."""
    return isinstance(tensor, DTensor) or is_partitioned(tensor)


def is_partitioned(tensor: Tensor) -> bool:
    """Whether it is a parameter of ZeRO-3 of which this process has only a part."""
    return hasattr(tensor, "ds_status") and tensor.ds_status.name == "NOT_AVAILABLE"


def whole_shape(tensor: Tensor) -> torch.Size:
    """The shape of the whole tensor; that of a part under ZeRO-3 is empty."""
    return tensor.ds_shape if is_partitioned(tensor) else tensor.shape


def gathered(tensor: Tensor) -> Tensor:
    """The whole tensor; itself if it is whole. Through that of FSDP2 goes a gradient, through that of ZeRO-3 none."""
    if isinstance(tensor, DTensor):
        return tensor.full_tensor()
    if is_partitioned(tensor):
        import deepspeed

        with deepspeed.zero.GatheredParameters([tensor]):
            return tensor.detach().clone()
    return tensor


def need(module: nn.Module, parameters: Iterable[Tensor]) -> None:
    """Tell ZeRO-3 that a module reads parameters of others, which it else finds out only if they are not there."""
    for parameter in parameters:
        if hasattr(parameter, "ds_id"):
            import deepspeed

            deepspeed.zero.register_external_parameter(module, parameter)


def reshard(model: nn.Module) -> None:
    """Give back what FSDP2 has gathered for a forward: the parameters of a model are this process' parts again."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def sharded_like(parameter: Tensor, value: Tensor) -> Tensor:
    """A whole tensor, which all processes have, sharded by FSDP2 as a parameter of the same shape is; itself if that
    is whole."""
    if isinstance(parameter, DTensor) and not isinstance(value, DTensor):
        return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
    return value


@torch.no_grad()
def assign(parameter: nn.Parameter, value: Tensor) -> Tensor:
    """Give a parameter another value, whole or sharded as it is itself. Returns the one that it had, for `assign`."""
    if isinstance(parameter, DTensor):
        before = parameter.detach().clone()
        parameter.copy_(sharded_like(parameter, value))  # in place: FSDP2 gathers from this memory
        return before
    if is_partitioned(parameter):
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
            before = parameter.detach().clone()
            parameter.copy_(value)
        return before
    before, parameter.data = parameter.data, value.to(parameter)
    return before


def check_launch() -> None:
    """Raise ValueError if accelerate is to hand out the weights of the first process under FSDP2.

    It does so for parameters only, while an adapter keeps its sparsity and its masks in buffers.
    """
    settings = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}
    if all(os.environ.get(name, "").lower() == value for name, value in settings.items()):
        raise ValueError(
            "fsdp_cpu_ram_efficient_loading is true, but under FSDP2 accelerate hands out parameters only, and a PST "
            "adapter keeps its sparsity and its masks in buffers: set fsdp_cpu_ram_efficient_loading: false in the "
            "config of accelerate, or cpu_ram_efficient_loading in the fsdp_config of TrainingArguments."
        )
