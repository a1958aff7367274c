"""Which cells the study has, in which order they run, and what is known of them."""

import json
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import yaml

HERE = Path(__file__).parent
RESULTS = HERE / "results.jsonl"


class Cell(NamedTuple):
    """One training and what came of it."""

    task: str
    method: str
    sparsity: float
    """Of the target weights; 0 for a dense method."""
    lr: float
    seed: int

    def __str__(self) -> str:
        return f"{self.task} · {self.method} · {self.sparsity:.0%} · lr {self.lr:g} · seed {self.seed}"


class Grid:
    """The YAML file of cells, for one kind of machine.

    Args:
        file: `cells.yaml`.
        machine: `"cpu"` or `"gpu"`, whose settings count.
        only: the tasks and methods to run, by the keys `tasks`, `methods` and `sparsities`; None for all.

    Raises:
        ValueError: if one of these is in no cell.
    """

    def __init__(self, file: Path, machine: str, only: dict[str, Sequence[Any] | None] | None = None) -> None:
        found = yaml.safe_load(file.read_text(encoding="utf-8"))
        self.machine, self.only = machine, only or {}
        self.settings: dict[str, dict[str, Any]] = found["settings"][machine]
        self.methods: dict[str, dict[str, Any]] = found["methods"]
        self.seeds, self.rates, self.tuned_at = found["seeds"], found["rates"], found["tuned_at"]
        self.order = found["order"]
        for key, wanted in self.only.items():
            known = list(dict.fromkeys(value for block in self.order for value in block[key]))
            if unknown := [value for value in wanted or () if value not in known]:
                raise ValueError(f"{key} {unknown} are in no cell of {file}: expected some of {known}.")

    def cells(self, done: dict[Cell, dict[str, Any]]) -> Iterator[Cell]:
        """Every cell in its turn, `done` or not. What runs is to be put into `done` before the next cell is asked for,
        since the learning rate of later ones hangs on it."""
        seen = set()
        for block in self.order:
            for seed in self.seeds:
                for sparsity, task, method in product(*map(self._wanted(block), ("sparsities", "tasks", "methods"))):
                    first = self.trials(task, method, sparsity) if seed == self.seeds[0] else []
                    for cell in (*first, None):  # the chosen rate is known after the trials
                        cell = cell or self.cell(task, method, sparsity, seed, done)
                        if cell not in seen:
                            seen.add(cell)
                            yield cell

    def cell(self, task: str, method: str, sparsity: float, seed: int, done: dict[Cell, dict[str, Any]]) -> Cell:
        """The cell with the method's learning rate on the task, chosen already."""
        return Cell(task, method, self.sparsity(method, sparsity), self.rate(task, method, sparsity, done), seed)

    def trials(self, task: str, method: str, sparsity: float) -> list[Cell]:
        """The cells that choose a learning rate, at the nearest sparsity where one is tried."""
        nearest = self._tuned(method, sparsity)
        rates = self.methods[method].get("rates", self.rates)
        return [Cell(task, method, nearest, rate, self.seeds[0]) for rate in rates]

    def rate(self, task: str, method: str, sparsity: float, done: dict[Cell, dict[str, Any]]) -> float:
        """The learning rate of a method on a task: the best on the validation split, by the first metric.

        Raises:
            ValueError: if one of the trials is not done.
        """
        trials = self.trials(task, method, sparsity)
        if missing := [str(cell) for cell in trials if cell not in done]:
            raise ValueError(
                f"{missing} have not run, and one of the trials is to choose the learning rate: run them."
            )
        return max(trials, key=lambda cell: next(iter(done[cell]["validation"].values()))).lr

    def sparsity(self, method: str, sparsity: float) -> float:
        return 0.0 if "kind" in self.methods[method] else sparsity

    def count(self) -> int:
        """How many cells there are."""
        wanted, tuned = set(), set()
        for block in self.order:
            for task, method, sparsity in product(*map(self._wanted(block), ("tasks", "methods", "sparsities"))):
                wanted.add((task, method, self.sparsity(method, sparsity)))
                tuned.add((task, method, self._tuned(method, sparsity)))
        trials = sum(len(self.methods[method].get("rates", self.rates)) for _, method, _ in tuned)
        # the chosen trial is the first seed's cell at its sparsity
        return len(wanted) * len(self.seeds) + trials - len(wanted & tuned)

    def _tuned(self, method: str, sparsity: float) -> float:
        return self.sparsity(method, min(self.tuned_at, key=lambda tuned: abs(tuned - sparsity)))

    def _wanted(self, block: dict[str, Any]) -> Any:
        def values(key: str) -> list[Any]:
            only = self.only.get(key)
            return [value for value in block[key] if only is None or value in only]

        return values


def read_results(file: Path, grid: Grid) -> dict[Cell, dict[str, Any]]:
    """What is known of the cells under the grid's settings and methods, the last of a cell that ran again."""
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []
    found = {}
    for row in rows:
        cell = Cell(*(row[name] for name in Cell._fields))
        known = grid.methods.get(cell.method), grid.settings.get(cell.task)
        if row["machine"] == grid.machine and (row["choices"], row["settings"]) == known:
            found[cell] = row
    return found


def add_result(file: Path, row: dict[str, Any]) -> None:
    """Add a row."""
    part = file.with_name(f"{file.name}.part")
    before = file.read_text(encoding="utf-8") if file.exists() else ""
    part.write_text(before + json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
    part.replace(file)
