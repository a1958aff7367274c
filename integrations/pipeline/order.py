"""The order in which each process of a pipeline works, that of `torch.distributed.pipelining` (2.13)."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Literal, NamedTuple

from torch.distributed.pipelining import ScheduleInterleaved1F1B

from .schedules import check_schedule

Schedule = Literal["gpipe", "1f1b", "interleaved"]


class Operation(NamedTuple):
    """A pass of one micro-batch through one stage."""

    kind: Literal["F", "B"]
    """Forward or backward."""
    stage: int
    micro_batch: int


class Instruction(NamedTuple):
    """What a process does next: run an operation, or send or ask for the input of one."""

    verb: Literal["run", "send", "receive"]
    operation: Operation


def order_of(schedule: Schedule, processes: int, micro_batches: int, chunks: int = 1) -> list[list[Instruction]]:
    """What each process does in a step, from its first forward pass to its last backward pass.

    The interleaved schedule is asked of torch. GPipe's and 1F1B's are written out as their `_step_microbatches` runs
    them: what `Schedule1F1B.pipeline_order` says of the last stage leaves out its first micro-batch.

    Raises:
        ValueError: if torch has no such schedule.
    """
    check_schedule(schedule, micro_batches, processes, processes * chunks)
    if schedule == "interleaved":
        return _interleaved(processes, micro_batches, chunks)
    instructions = []
    for stage in range(processes):
        ahead = micro_batches if schedule == "gpipe" else processes - stage
        forward = [Operation("F", stage, i) for i in range(micro_batches)]
        backward = [Operation("B", stage, i) for i in range(micro_batches)]
        order = forward[:ahead]
        for i, operation in enumerate(backward):
            order += [operation, *forward[ahead + i : ahead + i + 1]]
        instructions.append([step for operation in order for step in _with_transfers(operation, processes)])
    return instructions


def _with_transfers(operation: Operation, stages: int) -> list[Instruction]:
    """A pass, what it waits for before it, and what it sends after it."""
    kind, stage, micro_batch = operation
    source, target = (stage - 1, stage + 1) if kind == "F" else (stage + 1, stage - 1)
    receive = [Instruction("receive", operation)] if 0 <= source < stages else []
    send = [Instruction("send", Operation(kind, target, micro_batch))] if 0 <= target < stages else []
    return [*receive, Instruction("run", operation), *send]


def _interleaved(processes: int, micro_batches: int, chunks: int) -> list[list[Instruction]]:
    # all that a schedule asks of its stages before a step runs
    stage = SimpleNamespace(
        num_stages=processes * chunks, group_size=processes, group_rank=0, is_last=False, submod=None
    )
    order = ScheduleInterleaved1F1B([stage] * chunks, micro_batches).pipeline_order_with_comms
    instructions = []
    for process in range(processes):
        instructions.append([])
        for action in order[process]:
            name, at, micro_batch = action.computation_type.name, action.stage_index, action.microbatch_index
            if name in ("FORWARD", "FULL_BACKWARD"):
                kind = "F" if name == "FORWARD" else "B"
                instructions[-1].append(Instruction("run", Operation(kind, at, micro_batch)))
            elif name.startswith("SEND"):
                target = at + 1 if name == "SEND_F" else at - 1
                instructions[-1].append(Instruction("send", Operation(name[-1], target, micro_batch)))
            elif name.startswith("RECV"):
                instructions[-1].append(Instruction("receive", Operation(name[-1], at, micro_batch)))
    return instructions
