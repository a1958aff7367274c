"""bench: how fast a whole saved model is, and what it takes in memory and on disk, dense and sparse side by side."""

from .benchmark import bench
from .figure import plot_bench
from .result import Bench, Latency, Measured
from .variants import Runtime

__all__ = ["Bench", "Latency", "Measured", "Runtime", "bench", "plot_bench"]
