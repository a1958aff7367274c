"""Is PST as good as it says? The study: methods of sparse training on real models and real data, cell by cell.

    .venv-transformers5/bin/python benchmarks/study/run.py --data-dir DATA --minutes 60

trains the cells of `cells.yaml` in their order, each in a process of its own, and adds each to `results.jsonl` when it
is done; what is there is not run again. `--cell` runs one cell again and prints it beside what was found before:

    .venv-transformers5/bin/python benchmarks/study/run.py --data-dir DATA --cell sst2 PST 0.9 0

`page.py` writes docs/study.md from the results.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from grid import HERE, RESULTS, Cell, Grid, add_result, read_results
from page import mean
from tqdm import tqdm


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", type=Path, required=True, help="folder of the folders sst2, banking77 and e2e")
    parser.add_argument("--cells", type=Path, default=HERE / "cells.yaml")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--output", type=Path, default=Path("outputs/study"), help="folder of the dense models")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="after which no other cell begins")
    parser.add_argument("--tasks", nargs="+")
    parser.add_argument("--methods", nargs="+")
    parser.add_argument("--sparsities", nargs="+", type=float)
    parser.add_argument("--cell", nargs=4, metavar=("TASK", "METHOD", "SPARSITY", "SEED"), help="run it alone, again")
    return parser.parse_args()


class Runner:
    """Trains cells, each in a process of its own.

    Args:
        dense: the name of the method whose model is the tuned teacher.
    """

    def __init__(self, grid: Grid, done: dict[Cell, dict[str, Any]], args: argparse.Namespace) -> None:
        self.grid, self.done, self.args = grid, done, args
        self.dense = next(name for name, choices in grid.methods.items() if choices.get("kind") == "dense")

    def train(self, cell: Cell) -> dict[str, Any]:
        """The result of a cell. A dense model is kept, to teach."""
        choices = self.grid.methods[cell.method]
        others = {"machine": self.grid.machine, "choices": choices, "settings": self.grid.settings[cell.task]}
        command = [sys.executable, str(HERE / "train_cell.py"), json.dumps({**cell._asdict(), **others})]
        command += ["--data-dir", str(self.args.data_dir), "--work", str(self.args.output)]
        if choices.get("teacher") == "tuned":
            command += ["--teacher", str(self.teacher(cell.task, cell.seed))]
        if cell.method == self.dense and not self.folder(cell).exists():
            command += ["--model", str(self.folder(cell))]
        found = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        return json.loads(found.stdout.splitlines()[-1])

    def teacher(self, task: str, seed: int) -> Path:
        """The folder of the dense model of a task and a seed, which is trained if it is not there."""
        cell = self.grid.cell(task, self.dense, 0.0, seed, self.done)
        if not self.folder(cell).exists():
            self.train(cell)
        return self.folder(cell)

    def folder(self, cell: Cell) -> Path:
        settings = "-".join(f"{name}-{value}" for name, value in self.grid.settings[cell.task].items())
        return self.args.output / f"{cell.task}-{settings}-lr-{cell.lr:g}-seed-{cell.seed}"


def run_again(cell: Cell, runner: Runner) -> None:
    """Print what a cell gives now beside what all seeds gave before."""
    before = [row for other, row in runner.done.items() if other[:4] == cell[:4]]
    again = runner.train(cell)
    for metric, value in again["test"].items():
        print(f"{cell}: {metric} {value:.2f}; before: {mean([row['test'][metric] for row in before])}")


def main() -> None:
    args = parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    only = {"tasks": args.tasks, "methods": args.methods, "sparsities": args.sparsities}
    grid = Grid(args.cells, "gpu" if torch.cuda.is_available() else "cpu", only)
    done = read_results(args.results, grid)
    runner = Runner(grid, done, args)
    if args.cell is not None:
        task, method, sparsity, seed = args.cell
        if task not in grid.settings or method not in grid.methods:
            raise ValueError(f"{task!r}, {method!r}: expected of {list(grid.settings)} and of {list(grid.methods)}.")
        run_again(grid.cell(task, method, float(sparsity), int(seed), done), runner)
        return
    until = time.monotonic() + 60 * args.minutes
    with tqdm(total=grid.count(), desc="cells") as bar:
        for cell in grid.cells(done):
            if cell not in done:
                if time.monotonic() > until:
                    break
                bar.set_postfix_str(str(cell))
                done[cell] = runner.train(cell)
                add_result(args.results, done[cell])
                bar.write(f"{cell}: {done[cell]['test']} in {done[cell]['minutes']:.1f} minutes")
            bar.update()


if __name__ == "__main__":
    main()
