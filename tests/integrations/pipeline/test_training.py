import json

import pytest
import torch
from pipeline_cases import fixed_seed, loss_of, make_batches, open_batches, open_model, train_alone, write_case
from safetensors.torch import load_file

from peft_pst.importance import L0

PST = {"sparsity": 0.6}
KEPT = {"sparsity": 0.5, "importance": "magnitude", "update": "full", "mask_interval": 2}
GATES = {"sparsity": 0.5, "importance": "l0", "penalty": 0.1, "task_type": "CAUSAL_LM"}
ALL = ("gpipe", "1f1b", "interleaved")
CASES = {
    "llama": ("llama", None, ALL),
    "llama-bf16": ("llama", None, ["1f1b"]),
    "gpt2": ("gpt2", None, ALL),
    "bert": ("bert", None, ALL),
    "bert-mlm": ("bert-mlm", None, ["1f1b"]),
    "pst": ("llama", PST, ALL),
    "pst-kept": ("bert", KEPT, ["interleaved"]),
    "pst-gates": ("gpt2", GATES, ["1f1b"]),
}


@pytest.fixture(autouse=True)
def fixed_gates(monkeypatch):
    monkeypatch.setattr(L0, "draw_seed", fixed_seed)


@pytest.fixture(scope="module")
def folder(start, tmp_path_factory):
    """What two processes have trained, by case."""
    folder = tmp_path_factory.mktemp("cases")
    for name, (kind, pst, schedules) in CASES.items():
        write_case(folder / name, kind, pst)
        (folder / name / "schedules.json").write_text(json.dumps(schedules))
    start("train_in_stages.py", 2, tmp_path_factory.mktemp("logs"), folder).check()
    return folder


@pytest.fixture(scope="module")
def alone(folder):
    """What one process trains, by case."""
    found = {}

    def get(case):
        if case not in found:
            model, batches = open_model(folder / case), open_batches(folder / case)
            dtype = torch.bfloat16 if case.endswith("bf16") else None
            losses, norms, gradients = train_alone(model, batches, dtype)
            model.eval()
            with torch.no_grad():
                evaluated = loss_of(model, batches[0], dtype).item()
            model.train()
            (loss_of(model, batches[0], dtype) + loss_of(model, batches[1], dtype)).backward()
            gradients |= {f"twice/{n}": p.grad for n, p in model.named_parameters() if p.grad is not None}
            found[case] = losses, norms, gradients, evaluated
        return found[case]

    return get


@pytest.mark.parametrize(("case", "schedule"), [(case, schedule) for case in CASES for schedule in CASES[case][2]])
def test_two_processes_train_what_one_does(folder, alone, case, schedule):
    losses, norms, gradients, evaluated = alone(case)
    results = [json.loads((folder / case / f"{schedule}-{rank}.json").read_text()) for rank in (0, 1)]
    found = [load_file(folder / case / f"{schedule}-{rank}.safetensors") for rank in (0, 1)]
    assert found[0].keys() | found[1].keys() == gradients.keys()
    assert {key.split("/")[0] for key in gradients} == {*map(str, range(10)), "twice"}
    # bfloat16 rounds the gradient of a weight for each micro-batch
    close, near = (5e-3, 2e-2) if case.endswith("bf16") else (1e-5, 1e-4)
    for result, own in zip(results, found, strict=True):
        assert result["losses"] == pytest.approx(losses, abs=close)
        assert result["norms"] == pytest.approx(norms, rel=near)
        assert result["evaluated"] == pytest.approx(evaluated, abs=close)
        assert len(own) >= len(gradients) // 4
        for key, gradient in own.items():
            assert (gradient - gradients[key]).abs().max() <= close, key


def test_different_batches_are_refused(folder):
    results = [json.loads((folder / "llama" / f"1f1b-{rank}.json").read_text()) for rank in (0, 1)]
    assert "Rank 0 got another batch than the last stage" in results[0]["refused"]
    assert "refused" not in results[1]


def test_models_that_two_processes_cannot_train(folder):
    for rank in (0, 1):
        another, whole_budget = json.loads((folder / f"refused-{rank}.json").read_text())
        assert another.startswith("The model of rank 1 is not that of rank 0")
        assert "budget='global' selects what is pruned over all layers at once" in whole_budget


def test_layers_are_balanced_alike_on_all_processes(folder):
    (layers, first), (others, second) = (json.loads((folder / f"balanced-{rank}.json").read_text()) for rank in (0, 1))
    assert layers == others == [1, 1, 1, 1]
    assert any(".h.2." in name for name in first) and any(".h.3." in name for name in second)


@pytest.mark.parametrize("case", ["llama", "gpt2", "bert-mlm"])
def test_a_tied_weight_lies_on_both_ends(folder, case):
    first, last = (json.loads((folder / case / f"1f1b-{rank}.json").read_text())["names"] for rank in (0, 1))
    assert len(set(first) & set(last)) == 1
    assert "embed" in (set(first) & set(last)).pop() or case == "gpt2"


def test_how_many_micro_batches_are_alive(folder):
    alive = {}
    for schedule in ALL:
        results = [json.loads((folder / "llama" / f"{schedule}-{rank}.json").read_text()) for rank in (0, 1)]
        alive[schedule] = [result["most_alive"] for result in results]
    assert alive["gpipe"] == [{"0": 4}, {"1": 4}]
    assert alive["1f1b"] == [{"0": 2}, {"1": 1}]
    assert [set(counts) for counts in alive["interleaved"]] == [{"0", "2"}, {"1", "3"}]


def test_the_means_of_micro_batches_are_not_the_loss():
    """What the tests above would miss if every micro-batch had as many labels."""
    labels = [batch["labels"] for batch in make_batches("llama")]
    counts = torch.stack([(part[:, 1:] != -100).sum() for step in labels for part in step.chunk(4)]).view(-1, 4)
    assert (counts[:, 3] == 0).all() and (counts.max(1).values > 1.5 * counts[:, :3].min(1).values).any()
