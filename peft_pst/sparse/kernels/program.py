"""What the machine code reads: records of int64 that Python writes. Tensors are addresses."""

from __future__ import annotations

import numpy as np


def _record(*fields: str | tuple[str, np.dtype]) -> np.dtype:
    return np.dtype([(field, np.int64) if isinstance(field, str) else field for field in fields])


WEIGHT = _record(
    "code",  # of its loops for one token, see emit.segment_code
    "out",
    "size",
    "tile",
    "tiles",
    "chunk",
    "chunks",
    "half",  # whether it is multiplied in fp16
    "index_bytes",  # of one step of a slice
    "value_bytes",
    "starts",
    "counts",
    "rows",
    "indices",
    "values",
    "scales",
    "bias",
    "words",  # of a bitmask, 0 if there is none
    "bits",
    "bytes",
    "byte_starts",
    "byte_sums",
)
"""A packed weight; see `layout.Packed`."""

LAYER = _record(
    "layers",  # 1, or 2 for a feed-forward block
    "gated",
    "activation",  # its place in activations.ACTIVATIONS
    ("first", WEIGHT),
    ("gate", WEIGHT),
    ("last", WEIGHT),
)
"""A linear layer or a feed-forward block. A linear layer has its weight as `first` and as `last`."""

CALL = _record(
    "threads",  # that may run it
    "next_thread",
    "layer",
    "tokens",
    "x",  # fp32 [tokens, in]
    "x_stride",  # floats from a token to the next
    "y",  # fp32 [tokens, out]
    "scratch",
)
"""One call. Behind it lie three counters for each block: how many of its tasks are taken, and how many of those of its
panel and of its hidden panel are done. They and `next_thread` begin at zero."""
