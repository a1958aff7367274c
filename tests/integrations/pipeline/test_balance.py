import random
from itertools import combinations

import pytest

from peft_pst.integrations.pipeline.balance import balance
from peft_pst.integrations.pipeline.cost import Cost, Costs


def make(layers, numbers, before=0.0, after=0.0):
    """Costs of layers that differ."""
    parts = tuple(Cost(numbers.uniform(0.5, 2), numbers.uniform(1, 4)) for _ in range(layers))
    return Costs(Cost(before, before), parts, Cost(after, 2 * after), hidden=0, shared=0)


def splits(layers, stages):
    for cuts in combinations(range(1, layers), stages - 1):
        yield [end - start for start, end in zip((0, *cuts), (*cuts, layers), strict=True)]


def slowest_stage(costs, split):
    return max(stage.seconds for stage in costs.of_stages(split))


def slowest_process(costs, split, processes):
    times = [stage.seconds for stage in costs.of_stages(split)]
    return max(sum(times[process::processes]) for process in range(processes))


@pytest.mark.parametrize("seed", range(30))
def test_no_split_has_a_faster_slowest_stage(seed):
    numbers = random.Random(seed)
    layers = numbers.randint(1, 11)
    stages = numbers.randint(1, layers)
    costs = make(layers, numbers, before=numbers.uniform(0, 3), after=numbers.uniform(0, 6))
    split = balance(costs, stages)
    assert len(split) == stages
    best = min(slowest_stage(costs, other) for other in splits(layers, stages))
    assert slowest_stage(costs, split) == pytest.approx(best)


@pytest.mark.parametrize("seed", range(20))
def test_interleaved_stages_share_out_the_work_of_the_processes(seed):
    numbers = random.Random(seed)
    processes = numbers.randint(2, 3)
    costs = make(numbers.randint(2 * processes, 11), numbers, before=0.2, after=numbers.uniform(0, 6))
    split = balance(costs, 2 * processes, processes)

    def measure(split):
        return slowest_process(costs, split, processes) + slowest_stage(costs, split)

    best = min(measure(other) for other in splits(len(costs.layers), 2 * processes))
    assert measure(split) <= 1.04 * best


def test_the_slowest_process_counts_beside_the_slowest_stage():
    costs = Costs(Cost(), (Cost(1, 2),) * 6, Cost(2, 4), hidden=0, shared=0)
    split, other = balance(costs, 4, 2), balance(costs, 4)
    assert slowest_stage(costs, split) == slowest_stage(costs, other) == 9
    assert (slowest_process(costs, split, 2), slowest_process(costs, other, 2)) == (12, 15)


def test_the_head_makes_the_last_stage_shorter_and_the_embeddings_the_first():
    costs = Costs(Cost(1, 2), (Cost(1, 2),) * 8, Cost(3, 6), hidden=0, shared=0)
    assert balance(costs, 3) == [3, 4, 1]
    assert balance(costs, 1) == [8]
    assert balance(costs, 8) == [1] * 8


@pytest.mark.parametrize(
    ("stages", "processes", "message"),
    [
        (5, None, "more than the model's 4 layers"),
        (0, None, "stages=0"),
        (3, 2, "stages=3 on processes=2"),
        (4, 0, "processes=0"),
    ],
)
def test_impossible_splits_are_refused(stages, processes, message):
    costs = Costs(Cost(), (Cost(1, 2),) * 4, Cost(), hidden=0, shared=0)
    with pytest.raises(ValueError, match=message):
        balance(costs, stages, processes)
