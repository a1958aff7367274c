"""Which layers go to which stage, so that no process is slower than it has to be."""

from __future__ import annotations

from itertools import accumulate, permutations

from .cost import Costs


def balance(costs: Costs, stages: int, processes: int | None = None) -> list[int]:
    """Split the layers of a model into consecutive stages.

    What is before the layers lies on the first stage, what is after them on the last; a stage's time is that of its
    forward and backward pass. With one stage for each process the slowest stage is as fast as possible, exactly, by
    dynamic programming over the layers.

    With several stages for each process (the interleaved schedule) what counts is the time of the slowest process,
    which each micro-batch costs, and that of the slowest stage, which fills and drains the pipeline: by the slowest
    process alone, chunks of one and seven layers would be as good as four and four. From the best split for the
    slowest stage single layers move to other stages as long as the sum of the two times falls. This is not exact: of
    450 random models, each beside all its splits, the worst was 3 % above the best, and with layers that cost about
    the same half a percent.

    Args:
        costs: of the model's layers, by `measure_costs`.
        stages: how many.
        processes: stage s lies on process s mod processes. By default each stage has its own.

    Returns:
        How many layers each stage has, at least one.

    Raises:
        ValueError: if there are fewer layers than stages, or the stages cannot be dealt out evenly to the processes.
    """
    processes = stages if processes is None else processes
    if stages < 1 or processes < 1 or stages % processes:
        raise ValueError(
            f"stages={stages!r} on processes={processes!r}: expected both to be positive, and as many stages on each "
            "process."
        )
    if stages > len(costs.layers):
        raise ValueError(
            f"stages={stages!r} is more than the model's {len(costs.layers)} layers, and each stage needs one: ask "
            "for fewer processes, or for fewer stages on each."
        )
    split = _fastest_slowest_stage(costs, stages)
    return split if processes == stages else _improve(costs, split, processes)


def _fastest_slowest_stage(costs: Costs, stages: int) -> list[int]:
    layers = len(costs.layers)
    until = [0.0, *accumulate(layer.seconds for layer in costs.layers)]
    until = [0.0, *(costs.before.seconds + seconds for seconds in until[1:-1]), costs.whole.seconds]
    # for each number of layers the slowest of the stages that have them so far, and how many layers each has
    found: dict[int, tuple[float, list[int]]] = {0: (0.0, [])}
    for left in reversed(range(stages)):
        following = {}
        for end in range(stages - left, layers - left + 1) if left else [layers]:
            splits = (
                (max(slowest, until[end] - until[first]), [*split, end - first])
                for first, (slowest, split) in found.items()
                if first < end
            )
            following[end] = min(splits)
        found = following
    return found[layers][1]


def _improve(costs: Costs, split: list[int], processes: int) -> list[int]:
    def seconds(split: list[int]) -> float:
        stages = [stage.seconds for stage in costs.of_stages(split)]
        return max(sum(stages[process::processes]) for process in range(processes)) + max(stages)

    best = seconds(split)
    while True:
        moved = []
        for giver, taker in permutations(range(len(split)), 2):
            if split[giver] > 1:
                moved.append([n - (i == giver) + (i == taker) for i, n in enumerate(split)])
        candidate = min(moved, key=seconds, default=split)
        if seconds(candidate) >= best:
            return split
        split, best = candidate, seconds(candidate)
