"""One of several processes: its device, and the random numbers that are its own."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager

import torch
import torch.distributed as dist
from torch import Tensor, nn

from peft_pst.fingerprint import fingerprint


def default_device() -> torch.device:
    """The GPU of this process's local rank, or the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def start_processes(device: torch.device) -> None:
    """Connect the processes that torchrun started, unless they are connected: by nccl on GPUs, else by gloo.

    Raises:
        ValueError: if torchrun did not start this one.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if dist.is_initialized():
        return
    if "RANK" not in os.environ:
        raise ValueError(
            "A pipeline runs in several processes. Start the script with torchrun --nproc-per-node K, K being the "
            "number of stages, or call torch.distributed.init_process_group before."
        )
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")


def check_same_model(model: nn.Module) -> None:
    """Raise ValueError, on every process, if they were not all given the same model."""
    own = hash(tuple(int(fingerprint(parameter).sum()) for parameter in model.parameters()))
    found = [0] * dist.get_world_size()
    dist.all_gather_object(found, own)
    others = [rank for rank, value in enumerate(found) if value != found[0]]
    if others:
        names = ", ".join(f"rank {rank}" for rank in others)
        raise ValueError(
            f"The model of {names} is not that of rank 0: open it from the same folder everywhere, or call "
            "torch.manual_seed with the same number before weights or an adapter are drawn."
        )


def fork_random(device: torch.device) -> AbstractContextManager[None]:
    """A block after which the random numbers go on as if nothing had been drawn in it."""
    return torch.random.fork_rng([] if device.type == "cpu" else [device], device_type=device.type)


def random_state(device: torch.device) -> Tensor:
    """The state of the random numbers that are drawn on a device, uint8 [bytes]."""
    return torch.get_rng_state() if device.type == "cpu" else torch.get_device_module(device).get_rng_state(device)


def set_random_state(device: torch.device, state: Tensor) -> None:
    """Go on with the random numbers of a device from a state."""
    if device.type == "cpu":
        torch.set_rng_state(state)
    else:
        torch.get_device_module(device).set_rng_state(state, device)
