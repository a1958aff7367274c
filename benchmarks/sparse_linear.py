"""Sparse linear layers on a CPU beside the best dense ones: the two layers of BERT's feed-forward block.

    python benchmarks/sparse_linear.py                 speed-ups and errors, one thread
    python benchmarks/sparse_linear.py --scaling       what a second thread brings, 128 tokens
    python benchmarks/sparse_linear.py --choice        where a SparseLinear is least ahead of nn.Linear, or behind it
    python benchmarks/sparse_linear.py --costs         the table in peft_pst/sparse/kernels/choice.py

Dense is the faster of MKL (`torch.nn.functional.linear`) and oneDNN with a weight that was packed beforehand, in fp32.
All ways take turns in one process, some milliseconds each, so that a machine that slows down slows all of them; the
figures are medians of wall time. With one token the call goes through 24 layers in turn, as in a model whose weights
do not stay in the caches. Weights are random; the error is the largest difference from float64, relative to the
largest result. fp16 arithmetic needs AVX512-FP16.
"""

import argparse
import copy
import platform
import statistics
import time
import warnings
from collections.abc import Callable

import numba
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from peft_pst import SparseLinear, format_table, gemm
from peft_pst.bench.benchmark import _processor
from peft_pst.sparse.kernels.layer import Layer
from peft_pst.sparse.kernels.layout import Kind, pack
from peft_pst.sparse.kernels.target import HAS_HALF, LANES

SHAPES = ((3072, 768), (768, 3072))
GRID = ((64, 64), (128, 256), (384, 384), (576, 192), (1536, 384), (768, 3072), (3072, 768), (2048, 2048))
SPARSITIES = (0.8, 0.9, 0.95)
LAYERS = 24
ROUND = 0.004
"""Seconds that one way runs before the next has its turn, at least."""

IDLE = 1.9
"""How much faster two threads are, at least, at what needs nothing but cores, on a machine that does nothing else."""


def medians(ways: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Seconds of one call of each."""
    repeats = {}
    for name, way in ways.items():
        way()
        start = time.perf_counter()
        way()
        repeats[name] = max(1, round(ROUND / (time.perf_counter() - start)))
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            start = time.perf_counter()
            for _ in range(repeats[name]):
                way()
            times[name].append((time.perf_counter() - start) / repeats[name])
    return {name: statistics.median(taken) for name, taken in times.items()}


def pruned(out: int, size: int, sparsity: float, block: int = 1) -> nn.Linear:
    linear = nn.Linear(size, out).requires_grad_(False)
    mask = torch.rand(out // block, size) < sparsity
    linear.weight.normal_().masked_fill_(mask.repeat_interleave(block, 0), 0)
    return linear


def in_turn(layers: list[Callable[[Tensor], Tensor]], x: Tensor) -> Callable[[], object]:
    return lambda: [layer(x) for layer in layers]


def copies(layer: nn.Module, count: int) -> list[nn.Module]:
    return [layer, *(copy.deepcopy(layer) for _ in range(count - 1))]


def dense_ways(linear: nn.Linear, x: Tensor, count: int) -> dict[str, Callable[[], object]]:
    layers = copies(linear, count)
    packed = [torch.ops.mkldnn._reorder_linear_weight(layer.weight, len(x)) for layer in layers]

    def onednn() -> object:
        return [torch.ops.mkldnn._linear_pointwise(x, weight, linear.bias, "none", [], "") for weight in packed]

    return {"dense MKL": in_turn(layers, x), "dense oneDNN": onednn}


def dense_int8(linear: nn.Linear, x: Tensor, count: int) -> Callable[[], object]:
    """torch's dynamic quantization: int8 weights by row, activations quantized in each call."""
    linear = copy.deepcopy(linear)
    linear.qconfig = torch.ao.quantization.per_channel_dynamic_qconfig
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantized = torch.ao.nn.quantized.dynamic.Linear.from_float(linear)
        return in_turn(copies(quantized, count), x)


def error(y: Tensor, linear: nn.Linear, x: Tensor) -> float:
    expected = F.linear(x.double(), linear.weight.double(), linear.bias.double())
    return float((y - expected).abs().max() / expected.abs().max())


def speed_ups(rounds: int) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    kernels = {
        "fp32": ({}, 1, (1, 4, 32, 128)),
        "fp32, blocks of 8x1": ({}, 8, (1, 32, 128)),
        "bf16 values": ({"values": "bf16"}, 1, (1, 4, 32, 128)),
        "int8 values": ({"values": "int8"}, 1, (1, 4, 32, 128)),
    }
    if HAS_HALF:
        kernels["fp16"] = ({"compute": "fp16"}, 1, (32, 128))
    found: dict[tuple, dict[float, str]] = {}
    cases = [(shape, tokens, s) for shape in SHAPES for tokens in (1, 4, 32, 128) for s in (0.5, 0.7, *SPARSITIES)]
    for (out, size), tokens, sparsity in tqdm(cases, desc="layers"):
        x, count = torch.randn(tokens, size), LAYERS if tokens == 1 else 1
        linear, blocks = pruned(out, size, sparsity), pruned(out, size, sparsity, 8)
        ways, errors = dense_ways(linear, x, count), {}
        for name, (arguments, block, tokens_of_it) in kernels.items():
            if tokens in tokens_of_it:
                dense = linear if block == 1 else blocks
                layers = copies(SparseLinear.from_linear(dense, **arguments), count)
                ways[name], errors[name] = in_turn(layers, x), error(layers[0](x), dense, x)
        if tokens == 1:
            ways["dense int8"], errors["dense int8"] = dense_int8(linear, x, count), None
        taken = medians(ways, rounds)
        best = min(taken.pop("dense MKL"), taken.pop("dense oneDNN"))
        row = found.setdefault((f"{out}x{size}", tokens, "dense fp32"), {})
        row[sparsity] = f"{1e6 * best / count:,.0f} µs"
        for name, seconds in taken.items():
            row = found.setdefault((f"{out}x{size}", tokens, name), {})
            row[sparsity] = f"{best / seconds:.2f}x"
            row["error"] = max(row.get("error", 0), errors[name] or 0)
    rows = [
        (shape, str(tokens), name, *(row[s] for s in (0.5, 0.7, *SPARSITIES)), _error(row.get("error")))
        for (shape, tokens, name), row in found.items()
    ]
    return ("layer", "tokens", "kernel", "50 %", "70 %", "80 %", "90 %", "95 %", "error"), rows


def _error(value: float | None) -> str:
    return f"{value:.0e}" if value else ""


def scaling(rounds: int) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Only rounds count in which a yardstick, sines of what lies in the caches, shows that both cores are free."""
    yardstick, rows = torch.rand(200_000), []
    cases = [(shape, sparsity) for shape in SHAPES for sparsity in SPARSITIES]
    for (out, size), sparsity in tqdm(cases, desc="layers"):
        x, layer = torch.randn(128, size), SparseLinear.from_linear(pruned(out, size, sparsity))
        ways = {"ours": lambda layer=layer, x=x: layer(x), "yardstick": yardstick.sin}
        free = []
        for _ in range(4 * rounds):
            taken = {}
            for threads in (1, 2):
                torch.set_num_threads(threads)
                taken[threads] = medians(ways, 3)
            if taken[1]["yardstick"] >= IDLE * taken[2]["yardstick"]:
                free.append([taken[threads]["ours"] for threads in (1, 2)])
        if free:
            one, two = (statistics.median(times) for times in zip(*free, strict=True))
            cells = f"{1e6 * one:,.0f} µs", f"{1e6 * two:,.0f} µs", f"{one / two:.2f}x"
        else:
            cells = "", "", "the machine was never idle"
        rows.append((f"{out}x{size}", f"{sparsity:.0%}", *cells, f"{len(free)} of {4 * rounds}"))
    return ("layer", "sparsity", "1 thread", "2 threads", "speed-up", "rounds with both cores"), rows


def choice(rounds: int) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Of each shape and number of tokens the density at which a SparseLinear does worst against `nn.Linear`."""
    rows = []
    for out, size in tqdm(((128, 128), *GRID[2:]), desc="shapes"):
        for tokens in (1, 4, 16, 64, 256):
            worst = None
            for density in (0.05, 0.2, 0.35, 0.5, 0.7, 1.0):
                linear, x = pruned(out, size, 1 - density), torch.randn(tokens, size)
                sparse = SparseLinear.from_linear(linear)
                # one token: as many layers as do not fit into the caches together
                count = -(-64_000_000 // linear.weight.nbytes) if tokens == 1 and out * size > 2**20 else 1
                ways = {"dense": in_turn(copies(linear, count), x), "ours": in_turn(copies(sparse, count), x)}
                taken = {name: seconds / count for name, seconds in medians(ways, rounds).items()}
                ratio = taken["dense"] / taken["ours"]
                if worst is None or ratio < worst[0]:
                    by = "kernel" if sparse.pack().runs_by_kernel(tokens) else "dense product"
                    worst = ratio, density, by, 1e6 * (taken["ours"] - taken["dense"])
            ratio, density, by, more = worst
            rows.append((f"{out}x{size}", str(tokens), f"{density:.0%}", by, f"{ratio:.2f}x", f"{more:+.1f} µs"))
    return ("layer", "tokens", "values left", "by", "speed-up over nn.Linear", "difference"), rows


def costs(rounds: int) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """ns of a dense weight, of a value, and of an input or output, by least squares of relative errors."""
    kinds = {Kind.FP32: torch.float32, Kind.BF16: torch.bfloat16, Kind.INT8: torch.int8}
    rows = []
    for tokens in tqdm((1, 3, 6, 12, 24, 48, 128), desc="tokens"):
        measured: dict[str, list[tuple[list[float], float]]] = {}
        for out, size in GRID:
            for density in (0.05, 0.1, 0.2, 0.3, 0.5):
                linear, x = pruned(out, size, 1 - density), torch.randn(tokens, size)
                weight = linear.weight * 30
                ways = {"": lambda x=x, linear=linear: linear(x), "oneDNN": lambda x=x, w=weight: gemm.linear(x, w)}
                for kind, dtype in kinds.items():
                    layer = Layer(pack(weight.clamp(-127, 127).to(dtype), kind)._replace(bits=None))
                    ways[kind.name] = lambda x=x, layer=layer: layer(x)
                taken = medians(ways, rounds)
                dense = min(taken.pop(""), taken.pop("oneDNN"))
                measured.setdefault("dense", []).append(([1, out * size], dense))
                for name, seconds in taken.items():
                    of_it = [1, out + size, density * out * size]
                    measured.setdefault(name, []).append((of_it, seconds))
        fits = {}
        for name, points in measured.items():
            of_it, seconds = np.array([p[0] for p in points]), np.array([p[1] for p in points])
            fits[name] = 1e9 * np.linalg.lstsq(of_it / seconds[:, None], np.ones(len(points)), rcond=None)[0]
        row = [f"{fits['dense'][1]:.3f}", *(f"{fits[kind.name][-1]:.3f}" for kind in kinds)]
        rows.append((str(tokens), *row, f"{fits['FP32'][1]:.1f}"))
    return ("tokens", "dense", "fp32", "bf16", "int8", "moved"), rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    measures = {"scaling": scaling, "choice": choice, "costs": costs}
    for name in measures:
        parser.add_argument(f"--{name}", dest="measure", action="store_const", const=measures[name], default=speed_ups)
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    with torch.inference_mode():
        table = format_table(*args.measure(args.rounds))
    print(f"{_processor()}, vectors of {LANES} floats, {'AVX512-FP16' if HAS_HALF else 'no AVX512-FP16'}; Python")
    print(f"{platform.python_version()}, torch {torch.__version__}, numba {numba.__version__}\n\n{table}")


if __name__ == "__main__":
    main()
