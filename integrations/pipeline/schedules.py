"""The schedules of `torch.distributed.pipelining`, and what is counted while one runs."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe, ScheduleInterleaved1F1B

from .stages import Stage

SCHEDULES = {"gpipe": ScheduleGPipe, "1f1b": Schedule1F1B, "interleaved": ScheduleInterleaved1F1B}


class CountedStage(PipelineStage):
    """A stage as a schedule runs it, for micro-batches of one size; it counts.

    Attributes:
        most_alive: how many micro-batches were alive at once since the last `reset`: whose forward pass had run, and
            whose backward pass had not.
        busy: for how many seconds the process computed for this stage since then.

    Args:
        stage: what it runs.
        stages: how many stages there are.
        device: where it runs.
        rows, tokens: the size of a micro-batch.
    """

    def __init__(self, stage: Stage, stages: int, device: torch.device, rows: int, tokens: int) -> None:
        hidden = stage.hidden_state(rows, tokens)
        ids = torch.empty(rows, tokens, dtype=torch.long, device="meta")
        loss = torch.empty((), device="meta")
        # with the sizes given, torch need not run the model to find them
        received, sent = ids if stage.is_first else hidden, loss if stage.is_last else hidden
        super().__init__(stage, stage.index, stages, device, input_args=received, output_args=sent)
        self.reset()

    def reset(self) -> None:
        """Count from zero."""
        self.alive = self.most_alive = 0
        self.busy = 0.0

    def forward_one_chunk(self, *args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        output = super().forward_one_chunk(*args, **kwargs)
        self.busy += time.perf_counter() - start
        self.alive += self.has_backward
        self.most_alive = max(self.most_alive, self.alive)
        return output

    def backward_one_chunk(self, *args: Any, **kwargs: Any) -> None:
        start = time.perf_counter()
        super().backward_one_chunk(*args, **kwargs)
        self.busy += time.perf_counter() - start
        self.alive -= self.has_backward


def make_schedule(name: str, stages: Sequence[CountedStage], micro_batches: int) -> Any:
    """The schedule of a process that runs these stages."""
    return SCHEDULES[name](
        list(stages) if name == "interleaved" else stages[0],
        micro_batches,
        loss_fn=lambda loss, labels: loss,  # the last stage has made it
        scale_grads=False,
    )


def check_schedule(schedule: str, micro_batches: int, processes: int, stages: int) -> None:
    """Raise ValueError if a schedule cannot run with so many micro-batches, processes and stages."""
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule={schedule!r}: expected one of {', '.join(map(repr, SCHEDULES))}.")
    if schedule == "interleaved":
        if stages % processes or stages < 2 * processes:
            raise ValueError(
                f"{stages} stages cannot be interleaved on {processes} processes: expected two or more for each, such "
                f"as {2 * processes}, as many for all."
            )
        if micro_batches < 1 or micro_batches % max(1, micro_batches // processes):
            raise ValueError(
                f"micro_batches={micro_batches} do not go through interleaved stages of {processes} processes: "
                f"expected a multiple of {processes}."
            )
    elif stages != processes:
        raise ValueError(
            f"{stages} stages on {processes} processes: {schedule!r} has one for each process. Start as many as "
            "stages, or take schedule='interleaved'."
        )
    elif micro_batches < (stages if schedule == "1f1b" else 1):
        raise ValueError(
            f"micro_batches={micro_batches} are too few for {schedule!r} with {stages} stages: expected at least "
            f"{stages if schedule == '1f1b' else 1}."
        )
