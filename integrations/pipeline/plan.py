"""Pipelines of a model side by side, over more processes and with more micro-batches than there are here.

    python -m peft_pst.integrations.pipeline.plan MODEL --processes 2,4,8 --micro-batches 8,32 --tokens 8x128

The model's passes are measured on this machine, and their steps simulated (`simulate`).
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from peft import get_peft_model
from torch import Tensor, nn
from transformers import AutoConfig

from peft_pst import PSTConfig, format_table
from peft_pst.opening import AUTO_CLASSES
from peft_pst.plan.models import task_of
from peft_pst.report.figures import _figure, _written

from .cost import Costs, measure_costs
from .schedules import SCHEDULES
from .simulator import Link, Simulation, simulate

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def table(simulations: Sequence[Simulation]) -> str:
    """Simulations side by side, in Markdown."""
    rows = [
        [
            one.processes,
            one.schedule,
            one.micro_batches,
            " ".join(map(str, one.split)),
            f"{1000 * one.seconds:.1f} ms",
            f"{one.speed_up:.2f}",
            f"{100 * one.bubble:.1f} %",
            one.alive[0],
            f"{max(one.peak_bytes) / 2**20:.0f} MiB",
        ]
        for one in simulations
    ]
    header = ("processes", "schedule", "micro-batches", "layers of the stages", "step", "speed-up", "bubble")
    return format_table((*header, "alive on stage 0", "memory of the fullest"), rows)


def plot_timeline(simulation: Simulation, path: str | os.PathLike) -> Figure:
    """Draw when each process works on which micro-batch (forward passes pale, backward passes dark, a colour for each
    stage of a process) and write the figure to `path` (.png, .svg or .pdf).

    Raises:
        ImportError: if matplotlib is not installed.
    """
    figure = _figure(12, 1 + 0.5 * simulation.processes)
    axes = figure.add_subplot()
    for process, operation, start, end in simulation.events:
        chunk = operation.stage // simulation.processes
        pale = 0.45 if operation.kind == "F" else 1.0
        axes.barh(process, end - start, left=start, color=f"C{chunk}", alpha=pale, edgecolor="white", linewidth=0.5)
        axes.text((start + end) / 2, process, operation.micro_batch, ha="center", va="center", fontsize=6)
    axes.invert_yaxis()
    axes.yaxis.get_major_locator().set_params(integer=True)
    axes.set(xlim=(0, simulation.seconds), xlabel="seconds", ylabel="process")
    axes.set_title(f"{simulation.schedule}, {simulation.micro_batches} micro-batches, bubble {simulation.bubble:.1%}")
    return _written(figure, path)


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "model", type=Path, help="the folder of a model; its config is enough, since weights are random"
    )
    parser.add_argument("--processes", default="2,4,8", type=counts, help="over how many the model is spread")
    parser.add_argument("--micro-batches", default="4,8,16,32", type=counts, help="of a step")
    parser.add_argument("--tokens", default="8x128", type=shape, help="of one micro-batch: sequences x tokens")
    parser.add_argument("--schedules", default=",".join(SCHEDULES))
    parser.add_argument("--chunks", type=int, default=2, help="stages of a process in the interleaved schedule")
    parser.add_argument("--latency", type=float, default=50, help="of a transfer, microseconds")
    parser.add_argument("--bandwidth", type=float, default=1.0, help="of a link, gigabytes a second")
    parser.add_argument("--pst", action="store_true", help="train PST adapters, not the whole model")
    parser.add_argument("--threads", type=int, help="of a process; by default torch's")
    parser.add_argument("--figure", type=Path, help="draw the timeline of the last simulation")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    costs = measure_costs(*_random_model(args.model, args.tokens, args.pst))
    link = Link(args.latency / 1e6, args.bandwidth * 1e9)
    simulations, impossible = [], []
    for processes in args.processes:
        for schedule in args.schedules.split(","):
            for micro_batches in args.micro_batches:
                chunks = args.chunks if schedule == "interleaved" else 1
                try:
                    simulations.append(simulate(costs, processes, micro_batches, schedule, chunks=chunks, link=link))
                except ValueError as error:
                    impossible.append(f"- {processes} processes, {schedule}, {micro_batches} micro-batches: {error}")
    print(f"{args.model} with random weights{' and PST adapters' * args.pst}\n")
    print(f"{_describe(costs, args.tokens)}\nA transfer: {args.latency:g} us, and {args.bandwidth:g} GB/s.\n")
    print(table(simulations))
    if impossible:
        print("\nNot possible:\n" + "\n".join(impossible))
    if args.figure and simulations:
        plot_timeline(simulations[-1], args.figure)


def counts(text: str) -> list[int]:
    """Such as "2,4,8"; argparse names the option where it is something else."""
    return [int(count) for count in text.split(",")]


def shape(text: str) -> tuple[int, int]:
    """Sequences and tokens of "8x128"."""
    sequences, tokens = map(int, text.split("x"))
    return sequences, tokens


def _describe(costs: Costs, tokens: tuple[int, int]) -> str:
    whole = costs.whole
    held = whole.weights + whole.gradients + whole.optimizer_states
    batch, length = tokens
    return (
        f"A micro-batch of {batch}x{length} tokens, {len(costs.layers)} layers, {torch.get_num_threads()} threads: "
        f"{1000 * whole.forward:.1f} ms forward, {1000 * whole.backward:.1f} ms backward.\n"
        f"Weights, gradients and Adam's moments: {held / 2**20:.0f} MiB. Kept for a micro-batch: "
        f"{whole.kept / 2**20:.0f} MiB. A hidden state: {costs.hidden / 2**20:.2f} MiB."
    )


def _random_model(folder: Path, tokens: tuple[int, int], pst: bool) -> tuple[nn.Module, dict[str, Tensor]]:
    """A model of a folder's config in training mode, its weights random, and a micro-batch of random tokens."""
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(folder)
    task = task_of(config, PSTConfig())
    model = AUTO_CLASSES[task].from_config(config, dtype=torch.float32)
    if pst:
        model = get_peft_model(model, PSTConfig(task_type=task))
    ids = torch.randint(config.vocab_size, tokens)
    labels = torch.zeros_like(ids[:, 0]) if task == "SEQ_CLS" else ids
    return model.train(), {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


if __name__ == "__main__":
    main()
