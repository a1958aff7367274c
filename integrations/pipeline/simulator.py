"""What a pipeline's step takes on machines that are not here: its time, its bubble, and the memory of each process.

A discrete simulation. Each process runs its operations in the order of `torch.distributed.pipelining`, each when its
input is there; times and bytes are those of `measure_costs`. A hidden state travels once it has been computed and the
process that needs it asks for it, as gloo and NCCL send: without overlap with the work before it in GPipe and 1F1B,
which ask when they have nothing else to do. It takes the link's latency and its bytes over the link's bandwidth,
whatever else travels. The optimizer's step is not part of it, nor is what torch does beside the passes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from .balance import balance
from .cost import Costs
from .order import Instruction, Operation, Schedule, order_of


class Link(NamedTuple):
    """What connects two processes."""

    latency: float = 0.0
    """Seconds until a message begins to arrive."""
    bandwidth: float = float("inf")
    """Bytes a second."""


INSTANT = Link()


class Event(NamedTuple):
    """When a process worked on what, in seconds since the step began."""

    process: int
    operation: Operation
    start: float
    end: float


@dataclass(frozen=True)
class Simulation:
    """One step of a pipeline."""

    schedule: Schedule
    processes: int
    micro_batches: int
    split: tuple[int, ...]
    """The number of layers of each stage; stage s lies on process s mod processes."""
    seconds: float
    """From the first forward pass to the last backward pass."""
    speed_up: float
    """How much longer one process takes that has all layers, and no transfers."""
    bubble: float
    """The share of the processes' time in which they wait: 1 - (sum of busy times) / (processes x seconds)."""
    alive: tuple[int, ...]
    """The most micro-batches of each stage that wait for their backward pass at a time."""
    kept_bytes: tuple[int, ...]
    """For each process the most bytes that it keeps for backward passes at a time."""
    peak_bytes: tuple[int, ...]
    """These, and weights, gradients, Adam's moments, and the buffers into which it receives: torch has one for each
    micro-batch and direction."""
    events: tuple[Event, ...]


def simulate(
    costs: Costs,
    processes: int,
    micro_batches: int,
    schedule: Schedule = "1f1b",
    *,
    chunks: int = 1,
    split: Sequence[int] | None = None,
    link: Link = INSTANT,
) -> Simulation:
    """Simulate one step.

    Args:
        costs: of the model, by `measure_costs`, for one micro-batch.
        processes: over how many the model is spread.
        micro_batches: of a step.
        schedule: `"gpipe"` (all forward passes, then all backward passes), `"1f1b"` (each backward pass as early as
            possible, DAPPLE's) or `"interleaved"` (the same with several stages on each process).
        chunks: how many stages a process has: 1, or at least 2 with `"interleaved"`.
        split: how many layers each stage has; by default what `balance` gives.
        link: between any two processes; by default one that takes no time.

    Raises:
        ValueError: if torch has no such schedule, or the model has too few layers.
    """
    if processes < 1 or chunks < 1:
        raise ValueError(f"processes={processes!r}, chunks={chunks!r}: expected both to be at least 1.")
    stages = processes * chunks
    instructions = order_of(schedule, processes, micro_batches, chunks)
    split = balance(costs, stages, processes) if split is None else list(split)
    if len(split) != stages:
        raise ValueError(f"split={split!r} has {len(split)} stages: expected processes x chunks = {stages}.")
    parts = costs.of_stages(split)
    durations = {("F", i): part.forward for i, part in enumerate(parts)}
    durations |= {("B", i): part.backward for i, part in enumerate(parts)}
    events = _run(instructions, durations, link.latency + costs.hidden / link.bandwidth)
    seconds = max(event.end for event in events)
    work = micro_batches * sum(part.seconds for part in parts)

    alive, kept_bytes, peak_bytes = [0] * stages, [], []
    for process, own in enumerate(instructions):
        waiting, kept, most = [0] * stages, 0, 0
        for operation in (instruction.operation for instruction in own if instruction.verb == "run"):
            stage = operation.stage
            change = 1 if operation.kind == "F" else -1
            waiting[stage] += change
            # its input lies in a buffer that is there all the time, its output stays until the gradient is back
            ends = (stage < stages - 1) - (stage > 0)
            kept += change * (parts[stage].kept + ends * costs.hidden)
            alive[stage], most = max(alive[stage], waiting[stage]), max(most, kept)
        kept_bytes.append(most)
        for stage in range(process, stages, processes):
            part, neighbours = parts[stage], (stage > 0) + (stage < stages - 1)
            most += part.weights + part.gradients + part.optimizer_states
            most += neighbours * micro_batches * costs.hidden
        peak_bytes.append(most)
    return Simulation(
        schedule=schedule,
        processes=processes,
        micro_batches=micro_batches,
        split=tuple(split),
        seconds=seconds,
        speed_up=micro_batches * costs.whole.seconds / seconds,
        bubble=1 - work / (processes * seconds),
        alive=tuple(alive),
        kept_bytes=tuple(kept_bytes),
        peak_bytes=tuple(peak_bytes),
        events=tuple(events),
    )


def _run(
    instructions: Sequence[Sequence[Instruction]], durations: dict[tuple[str, int], float], transfer: float
) -> list[Event]:
    """When each operation runs, if each process follows its instructions and a transfer takes so many seconds."""
    sent: dict[Operation, float] = {}
    asked: dict[Operation, float] = {}
    events: list[Event] = []
    clocks, positions = [0.0] * len(instructions), [0] * len(instructions)
    while any(position < len(own) for position, own in zip(positions, instructions, strict=True)):
        reached = sum(positions)
        for process, own in enumerate(instructions):
            while positions[process] < len(own):
                verb, operation = own[positions[process]]
                if verb == "send":
                    sent[operation] = clocks[process]
                elif verb == "receive":
                    asked[operation] = clocks[process]
                else:
                    start = clocks[process]
                    if operation in asked:
                        if operation not in sent:
                            break  # another process has to come first
                        start = max(start, max(sent[operation], asked[operation]) + transfer)
                    clocks[process] = start + durations[operation.kind, operation.stage]
                    events.append(Event(process, operation, start, clocks[process]))
                positions[process] += 1
        if sum(positions) == reached:
            raise RuntimeError("Each process of this schedule waits for another one: torch's order has changed.")
    return events
