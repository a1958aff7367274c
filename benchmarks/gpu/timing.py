"""Times and memory on a GPU; on a CPU, where the kernels run under Triton's interpreter, times mean nothing."""

import gc
import statistics
import time
from collections.abc import Callable

import torch
from tqdm import tqdm

WARM_UP = 3
"""Rounds that do not count."""


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def medians(ways: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Microseconds of a call of each, which take turns, so that a GPU that slows down slows all."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for turn in tqdm(range(WARM_UP + rounds), desc="rounds", leave=False):
        for name, call in ways.items():
            taken = _microseconds(call)
            if turn >= WARM_UP:
                times[name].append(taken)
    return {name: statistics.median(taken) for name, taken in times.items()}


def _microseconds(call: Callable[[], object]) -> float:
    if not torch.cuda.is_available():
        start = time.perf_counter()
        call()
        return 1e6 * (time.perf_counter() - start)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return 1000 * start.elapsed_time(end)


def as_graph(call: Callable[[], object]) -> Callable[[], object]:
    """The call as a CUDA graph, in which no time of the host counts; itself on a CPU."""
    if not torch.cuda.is_available():
        return call
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()

    def replay() -> Callable[[], object]:
        graph.replay()
        return call  # the graph reads its tensors, which live as long as it does

    return replay


def peak_bytes(call: Callable[[], object]) -> int:
    """What the device holds at most while a call runs, what was there before included; 0 on a CPU."""
    gc.collect()
    if not torch.cuda.is_available():
        call()
        return 0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


def bandwidth(size: int = 2**30) -> float:
    """Bytes a microsecond that a copy on the device reads and writes."""
    source = torch.empty(size, dtype=torch.uint8, device=device())
    target = torch.empty_like(source)
    return 2 * size / medians({"copy": lambda: target.copy_(source)}, 10)["copy"]
