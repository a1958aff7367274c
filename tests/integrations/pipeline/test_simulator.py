import sys
from collections import Counter
from itertools import pairwise
from unittest.mock import MagicMock, patch

import pytest
from torch.distributed.pipelining import Schedule1F1B, ScheduleGPipe
from transformers import LlamaConfig

from peft_pst.integrations.pipeline import plan
from peft_pst.integrations.pipeline.cost import Cost, Costs
from peft_pst.integrations.pipeline.order import order_of
from peft_pst.integrations.pipeline.simulator import Link, simulate

K_AND_M = [(1, 4), (2, 2), (2, 8), (3, 6), (4, 4), (4, 16), (8, 32)]


def equal(stages, **cost):
    """Costs of a model whose stages cost the same: forward 1 s, backward 2 s."""
    return Costs(Cost(), (Cost(1, 2, **cost),) * stages, Cost(), hidden=0, shared=0)


@pytest.mark.parametrize(("processes", "micro_batches"), K_AND_M)
@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
def test_the_bubble_of_equal_stages_is_that_of_the_papers(schedule, processes, micro_batches):
    found = simulate(equal(processes), processes, micro_batches, schedule)
    assert found.bubble == pytest.approx((processes - 1) / (micro_batches + processes - 1))
    assert found.seconds == pytest.approx(3 * (micro_batches + processes - 1))
    assert found.speed_up == pytest.approx(processes * (1 - found.bubble))


@pytest.mark.parametrize(("processes", "micro_batches"), K_AND_M)
@pytest.mark.parametrize("chunks", [2, 4])
def test_chunks_divide_the_bubble(processes, micro_batches, chunks):
    found = simulate(equal(processes * chunks), processes, micro_batches, "interleaved", chunks=chunks)
    assert found.bubble == pytest.approx((processes - 1) / (chunks * micro_batches + processes - 1))


@pytest.mark.parametrize(("processes", "micro_batches"), K_AND_M)
def test_early_backward_passes_bound_what_is_alive(processes, micro_batches):
    costs = equal(processes, kept=100)
    early, late = (simulate(costs, processes, micro_batches, schedule) for schedule in ("1f1b", "gpipe"))
    assert early.alive == tuple(processes - stage for stage in range(processes))
    assert early.kept_bytes == tuple(100 * (processes - stage) for stage in range(processes))
    assert late.alive == (micro_batches,) * processes
    assert late.kept_bytes == (100 * micro_batches,) * processes


@pytest.mark.parametrize(("schedule", "cls"), [("gpipe", ScheduleGPipe), ("1f1b", Schedule1F1B)])
@pytest.mark.parametrize(("processes", "micro_batches"), K_AND_M)
def test_the_order_is_the_one_in_which_torch_runs(schedule, cls, processes, micro_batches):
    for process, own in enumerate(order_of(schedule, processes, micro_batches)):
        stage, ran = MagicMock(num_stages=processes, stage_index=process), []
        for name in ("get_fwd_recv_ops", "get_fwd_send_ops", "get_bwd_recv_ops", "get_bwd_send_ops"):
            getattr(stage, name).return_value = []
        stage.forward_one_chunk.side_effect = lambda i, *_, ran=ran, **__: ran.append(("F", i))
        stage.backward_one_chunk.side_effect = lambda i, ran=ran, **__: ran.append(("B", i))
        with patch.object(cls, "_initialize_stage"), patch.object(cls, "_maybe_get_loss"):
            cls(stage, micro_batches)._step_microbatches()
        assert [(step.operation.kind, step.operation.micro_batch) for step in own if step.verb == "run"] == ran


@pytest.mark.parametrize(("processes", "micro_batches"), K_AND_M)
@pytest.mark.parametrize(("schedule", "chunks"), [("gpipe", 1), ("1f1b", 1), ("interleaved", 3)])
def test_everything_runs_once_after_what_it_needs(schedule, chunks, processes, micro_batches):
    stages = processes * chunks
    layers = tuple(Cost(1 + stage % 3, 2 + stage % 5) for stage in range(stages))
    costs = Costs(Cost(), layers, Cost(), hidden=10, shared=0)
    found = simulate(costs, processes, micro_batches, schedule, chunks=chunks, link=Link(0.25, 40))
    transfer = 0.5 if processes > 1 else 0
    times = {event.operation: event for event in found.events}
    assert len(times) == len(found.events) == 2 * stages * micro_batches
    for (kind, stage, micro_batch), event in times.items():
        assert event.process == stage % processes
        assert event.end - event.start == pytest.approx(
            getattr(layers[stage], "forward" if kind == "F" else "backward")
        )
        before = stage - 1 if kind == "F" else stage + 1
        if 0 <= before < stages:
            assert event.start >= times[kind, before, micro_batch].end + transfer - 1e-9
        if kind == "B":
            assert event.start >= times["F", stage, micro_batch].end - 1e-9
    for process in range(processes):
        own = sorted((event.start, event.end) for event in found.events if event.process == process)
        assert all(end <= start + 1e-9 for (_, end), (start, _) in pairwise(own))
    busy = sum(event.end - event.start for event in found.events)
    assert found.bubble == pytest.approx(1 - busy / (processes * found.seconds))


def test_a_step_worked_out_by_hand():
    # stage 0: F 1 s, B 2 s; stage 1: F 3 s, B 4 s; a transfer takes 0.5 s and begins when both sides are free
    costs = Costs(Cost(), (Cost(1, 2), Cost(3, 4)), Cost(), hidden=10, shared=0)
    found = simulate(costs, 2, 2, "gpipe", link=Link(0.3, 50))
    times = {event.operation: (event.start, event.end) for event in found.events}
    assert times == {
        ("F", 0, 0): (0, 1),
        ("F", 0, 1): (1, 2),
        ("F", 1, 0): (1.5, 4.5),
        ("F", 1, 1): (5, 8),  # asked for at 4.5
        ("B", 1, 0): (8, 12),
        ("B", 1, 1): (12, 16),
        ("B", 0, 0): (12.5, 14.5),
        ("B", 0, 1): (16.5, 18.5),
    }
    assert found.seconds == 18.5
    assert found.bubble == pytest.approx(1 - 20 / 37)
    assert found.speed_up == pytest.approx(20 / 18.5)


def test_memory_worked_out_by_hand():
    layers = (Cost(1, 2, weights=10, gradients=4, optimizer_states=8, kept=100),) * 4
    costs = Costs(Cost(weights=1000), layers, Cost(weights=2000, kept=7), hidden=16, shared=5)
    found = simulate(costs, 2, 4, "1f1b", split=[3, 1])
    # one hidden state goes out for each micro-batch that is alive, and comes in through a buffer for each there is
    kept = (2 * (300 + 5 + 16), 100 + 5 + 7 - 16)
    assert found.kept_bytes == kept
    assert found.peak_bytes == (kept[0] + 1000 + 3 * 22 + 4 * 16, kept[1] + 2000 + 22 + 4 * 16)
    interleaved = simulate(costs, 2, 4, "interleaved", chunks=2, split=[1, 1, 1, 1])
    # process 0: the first stage has four micro-batches alive while the third one has two
    most = 4 * (105 + 16) + 1 * 105
    assert interleaved.alive == (4, 3, 2, 1)
    assert interleaved.kept_bytes[0] == most
    assert interleaved.peak_bytes[0] == most + 1000 + 2 * 22 + 3 * 4 * 16


def test_the_split_is_balanced_unless_it_is_given():
    costs = Costs(Cost(), (Cost(1, 2),) * 6, Cost(2, 4), hidden=0, shared=0)
    assert simulate(costs, 2, 4).split == (4, 2)
    assert simulate(costs, 2, 4, split=[1, 5]).split == (1, 5)
    assert simulate(costs, 2, 4, split=[1, 5]).seconds > simulate(costs, 2, 4).seconds


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"schedule": "dualpipe"}, "schedule='dualpipe'"),
        ({"schedule": "1f1b", "micro_batches": 1}, "micro_batches=1"),
        ({"schedule": "gpipe", "micro_batches": 0}, "micro_batches=0"),
        ({"schedule": "interleaved", "chunks": 2, "micro_batches": 5}, "micro_batches=5"),
        ({"schedule": "interleaved"}, "interleaved"),
        ({"schedule": "1f1b", "chunks": 2}, "1f1b"),
        ({"processes": 0}, "processes=0"),
        ({"processes": 9, "micro_batches": 9}, "8 layers"),
        ({"split": [4, 2, 2]}, "3 stages"),
        ({"split": [4, 3]}, "8 layers in all"),
    ],
)
def test_what_torch_cannot_run_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        simulate(equal(8), **{"processes": 2, "micro_batches": 4, **arguments})


@pytest.mark.parametrize("pst", [False, True])
def test_the_command_compares_pipelines(tmp_path, monkeypatch, capsys, pst):
    sizes = {"vocab_size": 99, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
    LlamaConfig(**sizes, num_hidden_layers=5, architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path)
    options = ["--processes", "2,3", "--micro-batches", "2,6", "--tokens", "2x8"] + ["--pst"] * pst
    monkeypatch.setattr(sys, "argv", ["plan", str(tmp_path), *options])
    plan.main()
    printed = capsys.readouterr().out
    rows = [line.split("|")[1:4] for line in printed.splitlines() if line.startswith("| ")][1:]
    assert Counter(tuple(cell.strip() for cell in row) for row in rows) == Counter(
        [("2", name, m) for name in ("gpipe", "1f1b", "interleaved") for m in ("2", "6")]
        + [("3", "gpipe", "2"), ("3", "gpipe", "6"), ("3", "1f1b", "6")]
    )
    assert "3 processes, 1f1b, 2 micro-batches: micro_batches=2" in printed
    assert "3 processes, interleaved, 6 micro-batches: stages=6 is more than the model's 5 layers" in printed
    assert ("PST adapters" in printed) == pst


@pytest.mark.parametrize("option", [["--tokens", "8"], ["--processes", "2,two"], ["--micro-batches", "8x128"]])
def test_the_command_names_an_option_that_it_cannot_read(monkeypatch, capsys, option):
    monkeypatch.setattr(sys, "argv", ["plan", "folder", *option])
    with pytest.raises(SystemExit):
        plan.main()
    error = capsys.readouterr().err
    assert option[0] in error and option[1] in error


def test_the_timeline_is_drawn(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is in .venv5 only")
    found = simulate(equal(4), 2, 4, "interleaved", chunks=2)
    figure = plan.plot_timeline(found, tmp_path / "timeline.png")
    assert (tmp_path / "timeline.png").read_bytes().startswith(b"\x89PNG")
    assert len(figure.axes[0].patches) == len(found.events)
