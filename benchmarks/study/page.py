"""Write docs/study.md from the results, tables and figures, with what has not run as not run.

    .venv-transformers5/bin/python benchmarks/study/page.py

`page.md` is the text around them: a line `{{what task}}` in it is replaced, where `what` is a function here.
"""

from __future__ import annotations

import argparse
import re
import statistics
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

from grid import HERE, RESULTS, Cell, Grid, read_results

from peft_pst import format_table

DOCS = HERE.parents[1] / "docs"
NOT_RUN = "not run"


class Page:
    """Tables and figures of what is known.

    Args:
        grid: the study's cells.
        done: the results.
        figures: a folder, for the figures.
        tried: the same of what was tried, for its table.
    """

    def __init__(self, grid: Grid, done: dict[Cell, dict[str, Any]], figures: Path, tried: Page | None = None) -> None:
        self.grid, self.done, self.figures, self._tried = grid, done, figures, tried

    def table(self, task: str) -> str:
        """Each metric of the test split, mean and spread over the seeds, and what the trainings took."""
        metrics, sparsities = self.metrics(task), self.sparsities(task)
        prefixes = [""] if len(metrics) == 1 else [f"{metric}, " for metric in metrics]
        names = [f"{prefix}{sparsity:.0%}" for sparsity in sparsities for prefix in prefixes]
        header = ("method", *names, "lr", "trained", "minutes", "peak memory")
        rows = []
        for method in self.methods(task):
            cells = [mean(self.values(task, method, s, metric)) for s in sparsities for metric in metrics]
            rows.append((method, *cells, *self.cost(task, method)))
        return f"{format_table(header, rows)}\n\n{self.origin(task)}"

    def trials(self, task: str) -> str:
        """What chose the learning rates: the first metric on the validation split."""
        columns = list(product(self.grid.tuned_at, range(len(self.grid.rates))))
        header = ("method", *(f"{sparsity:.0%}, lr {self.grid.rates[i]:g}" for sparsity, i in columns))
        rows = []
        for method in self.methods(task):
            found = [self.done.get(self.grid.trials(task, method, sparsity)[i]) for sparsity, i in columns]
            values = [f"{next(iter(row['validation'].values())):.2f}" if row else NOT_RUN for row in found]
            rows.append((method, *values))
        return format_table(header, rows)

    def tried(self, task: str) -> str:
        """The first metric on both splits, of one seed each."""
        page, rows = self._tried, []
        for method in page.methods(task):
            found = page.rows(task, method, *page.grid.tuned_at)
            splits = [next(iter(row[split].values())) for row in found for split in ("validation", "test")]
            rows.append((method, *(f"{value:.2f}" for value in splits)) if found else (method, NOT_RUN, NOT_RUN))
        return f"{format_table(('tried', 'validation', 'test'), rows)}\n\n{page.took(task)}"

    def figure(self, task: str) -> str:
        """The first metric over the sparsity, with the spread as bars; dense methods as lines."""
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot

        figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
        metric = self.metrics(task)[0]
        for i, method in enumerate(self.methods(task)):
            values = {100 * s: self.values(task, method, s, metric) for s in self.sparsities(task)}
            found = [(x, of_seeds) for x, of_seeds in values.items() if of_seeds]
            if not found:
                continue
            middles, spreads = zip(*(middle_and_spread(of_seeds) for _, of_seeds in found), strict=True)
            style = {"color": f"C{i % 10}", "label": method, "linestyle": "--" if i >= 10 else "-"}
            if "kind" in self.grid.methods[method]:
                axes.axhline(middles[0], **{**style, "linestyle": ":"})
            else:
                x = [x + 0.12 * (i - 5) for x, _ in found]  # bars beside one another
                axes.errorbar(x, middles, spreads, marker="o", markersize=3, capsize=2, **style)
        if not axes.has_data():
            return f"No figure: {NOT_RUN}."
        axes.set(xlabel="sparsity (%)", ylabel=f"{metric}, test", title=task)
        axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
        file = self.figures / f"study-{task}.png"
        figure.savefig(file, dpi=150)
        return f"![{metric} over the sparsity on {task}](figures/{file.name})"

    def origin(self, task: str) -> str:
        """The command, and what it took."""
        command = f".venv-transformers5/bin/python benchmarks/study/run.py --data-dir DATA --tasks {task}"
        return f"`{command}`: {self.took(task)}"

    def took(self, task: str) -> str:
        """The time, the machine and the versions."""
        rows = [row for cell, row in self.done.items() if cell.task == task]
        if not rows:
            return f"{NOT_RUN}."
        devices = sorted({row["device"] for row in rows})
        versions = sorted({", ".join(f"{k} {v}" for k, v in row["versions"].items()) for row in rows})
        hours = sum(row["minutes"] for row in rows) / 60
        return f"{len(rows)} trainings, {hours:.1f} hours. {'; '.join(devices)}; {'; '.join(versions)}."

    def methods(self, task: str) -> list[str]:
        """In the order of the cells."""
        blocks = [block for block in self.grid.order if task in block["tasks"]]
        return list(dict.fromkeys(method for block in blocks for method in block["methods"]))

    def sparsities(self, task: str) -> list[float]:
        return sorted(
            {sparsity for block in self.grid.order if task in block["tasks"] for sparsity in block["sparsities"]}
        )

    def metrics(self, task: str) -> list[str]:
        """The one that chooses comes first."""
        return next((list(row["test"]) for cell, row in self.done.items() if cell.task == task), ["accuracy"])

    def rows(self, task: str, method: str, sparsity: float) -> list[dict[str, Any]]:
        """Of each seed that has run."""
        if any(cell not in self.done for cell in self.grid.trials(task, method, sparsity)):
            return []
        cells = [self.grid.cell(task, method, sparsity, seed, self.done) for seed in self.grid.seeds]
        return [self.done[cell] for cell in cells if cell in self.done]

    def values(self, task: str, method: str, sparsity: float, metric: str) -> list[float]:
        return [row["test"][metric] for row in self.rows(task, method, sparsity)]

    def cost(self, task: str, method: str) -> tuple[str, str, str, str]:
        """The chosen learning rate, trained parameters, minutes, peak memory, at the highest sparsity of a choice."""
        found = self.rows(task, method, max(self.grid.tuned_at))
        if not found:
            return ("", "", "", "")
        minutes = statistics.median(row["minutes"] for row in found)
        memory = statistics.median(row["peak_memory"] for row in found)
        return f"{found[0]['lr']:g}", f"{found[0]['trained']:,}", f"{minutes:.1f}", f"{memory / 2**20:,.0f} MiB"


def middle_and_spread(values: list[float]) -> tuple[float, float]:
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def mean(values: list[float]) -> str:
    """The mean and the spread, and how many seeds if not three."""
    if not values:
        return NOT_RUN
    middle, spread = middle_and_spread(values)
    if len(values) == 1:
        return f"{middle:.2f} (1 seed)"
    return f"{middle:.2f} ± {spread:.2f}" + ("" if len(values) >= 3 else f" ({len(values)} seeds)")


def fill(text: str, page: Page) -> str:
    """The text with its marked lines replaced."""

    def replace(found: re.Match[str]) -> str:
        what: Callable[[str], str] = getattr(page, found[1])
        return what(found[2])

    return re.sub(r"^\{\{(table|trials|tried|figure) (\S+)\}\}$", replace, text, flags=re.MULTILINE)


def load_page(machine: str, figures: Path) -> Page:
    """The page of the results in the repository.

    Args:
        machine: `"cpu"` or `"gpu"`, whose results count.
        figures: a folder, for the figures.
    """
    grids = {name: Grid(HERE / f"{name}.yaml", machine) for name in ("cells", "tried")}
    tried = Page(grids["tried"], read_results(HERE / "tried.jsonl", grids["tried"]), figures)
    return Page(grids["cells"], read_results(RESULTS, grids["cells"]), figures, tried)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--machine", default="cpu", choices=("cpu", "gpu"), help="whose results")
    page = load_page(parser.parse_args().machine, DOCS / "figures")
    (DOCS / "study.md").write_text(fill((HERE / "page.md").read_text(encoding="utf-8"), page), encoding="utf-8")


if __name__ == "__main__":
    main()
