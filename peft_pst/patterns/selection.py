"""The exact selection under a budget."""

import numpy as np
import torch
from torch import Tensor


def keep_largest(importance: Tensor, num_pruned: int) -> Tensor:
    """Prune the `num_pruned` least important entries.

    Entries of equal importance are pruned in row-major order, so the count is exact and the mask does not depend on
    the device or on how the importance is laid out in memory.

    Args:
        importance: any shape, any floating dtype.
        num_pruned: from 0 to the number of entries.

    Returns:
        The mask, bool, of the same shape: True where an entry stays.
    """
    importance = importance.detach()
    if importance.dtype in (torch.float16, torch.bfloat16):
        importance = importance.float()  # exact, and numpy knows no bfloat16
    if num_pruned == 0:
        return torch.ones_like(importance, dtype=torch.bool)
    return (_mask_numpy if importance.device.type == "cpu" else _mask_torch)(importance, num_pruned)


def _mask_numpy(importance: Tensor, num_pruned: int) -> Tensor:
    # numpy's vectorized partition finds the threshold ten times faster than torch.kthvalue
    scores = importance.numpy().ravel()
    threshold = np.partition(scores, num_pruned - 1)[num_pruned - 1]
    keep = scores > threshold
    num_ties = scores.size - num_pruned - np.count_nonzero(keep)
    if num_ties:
        keep[np.flatnonzero(scores == threshold)[-num_ties:]] = True
    return torch.from_numpy(keep).view(importance.shape)


def _mask_torch(importance: Tensor, num_pruned: int) -> Tensor:
    scores = importance.flatten()
    threshold = scores.kthvalue(num_pruned).values
    keep = scores > threshold
    ties = scores == threshold
    num_ties_pruned = num_pruned - (~keep & ~ties).sum()
    keep |= ties & (ties.cumsum(0) > num_ties_pruned)
    return keep.view(importance.shape)
