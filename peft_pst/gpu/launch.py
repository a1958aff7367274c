"""Where a kernel is launched, and by how many programs."""

from contextlib import AbstractContextManager, nullcontext

import torch
import triton
from torch import Tensor

PROGRAMS = 1024
"""Of a kernel that counts: each ends with an addition to every bin."""


def device_of(tensor: Tensor) -> AbstractContextManager:
    """The device of a tensor as the current one, where Triton launches."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def num_programs(shape: tuple[int, int], block_n: int, block_k: int) -> int:
    """Of a kernel whose programs take tiles in turn."""
    return min(PROGRAMS, triton.cdiv(shape[0], block_n) * triton.cdiv(shape[1], block_k))
