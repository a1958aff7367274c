"""The exact selection under a budget."""

import numpy as np
import torch
from torch import Tensor

from ..gpu import has_kernels


def keep_largest(importance: Tensor, num_pruned: int | Tensor) -> Tensor:
    """Prune the `num_pruned` least important entries.

    Entries of equal importance are pruned in row-major order, so the count is exact and the mask does not depend on
    the device or on how the importance is laid out in memory.

    Args:
        importance: any shape, any floating dtype.
        num_pruned: from 0 to the number of entries; as an int64 scalar it is not read from another device than the
            CPU, so that nothing waits for that device.

    Returns:
        The mask, bool, of the same shape: True where an entry stays.
    """
    importance = importance.detach()
    if importance.dtype in (torch.float16, torch.bfloat16):
        importance = importance.float()  # exact, and numpy knows no bfloat16
    if importance.dtype == torch.float32 and has_kernels(importance.device):
        return _mask_triton(importance, num_pruned)
    if importance.device.type != "cpu":
        return _mask_torch(importance, num_pruned)
    num_pruned = int(num_pruned)
    return _mask_numpy(importance, num_pruned) if num_pruned else torch.ones_like(importance, dtype=torch.bool)


def _mask_numpy(importance: Tensor, num_pruned: int) -> Tensor:
    # numpy's vectorized partition finds the threshold ten times faster than torch.kthvalue
    # .numpy() would fix the size of a memory that FSDP2 frees, where the importance is a parameter itself
    scores = np.from_dlpack(importance).ravel()
    threshold = np.partition(scores, num_pruned - 1)[num_pruned - 1]
    keep = scores > threshold
    num_ties = scores.size - num_pruned - np.count_nonzero(keep)
    if num_ties:
        keep[np.flatnonzero(scores == threshold)[-num_ties:]] = True
    return torch.from_numpy(keep).view(importance.shape)


def _mask_torch(importance: Tensor, num_pruned: int | Tensor) -> Tensor:
    order = importance.flatten().argsort(stable=True)
    keep = torch.arange(order.numel(), device=order.device) >= num_pruned
    return torch.empty_like(keep).scatter_(0, order, keep).view(importance.shape)


def _mask_triton(importance: Tensor, num_pruned: int | Tensor) -> Tensor:
    from ..gpu.selection import keep_largest as by_kernels

    return by_kernels(importance, num_pruned)
