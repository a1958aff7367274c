"""Tables and the figure of `light_lm.py`."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from peft_pst import format_table

TEACHER = "teacher"
LANGUAGES = ("en", "zh")


def mean(values: Sequence[float]) -> str:
    """The mean, and the spread of several."""
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{spread}"


def quality_table(teacher: dict[str, Any], rows: dict[str, list[dict[str, Any]]]) -> str:
    """Held-out accuracy and perplexity of each language."""
    cells = []
    for name, found in {TEACHER: [teacher], **rows}.items():
        tests = [one["test"] for one in found]
        row = [name, f"{found[0]['parameters'] / 1e6:.1f}M"]
        for language in LANGUAGES:
            row.append(mean([100 * test[language]["accuracy"] for test in tests]))
            row.append(mean([test[language]["perplexity"] for test in tests]))
        both = [test["both"] for test in tests]
        share = f"{statistics.mean(both) / teacher['test']['both']:.1%}"
        minutes = statistics.median(one["minutes"] for one in found)
        cells.append((*row, mean([100 * accuracy for accuracy in both]), share, f"{minutes:.1f}"))
    of_each = [f"{language}: {what}" for language in LANGUAGES for what in ("accuracy (%)", "perplexity")]
    header = ("model", "parameters", *of_each, "both: accuracy (%)", "of the teacher's", "minutes")
    return format_table(header, cells)


def memory_table(
    teacher: dict[str, Any], rows: dict[str, list[dict[str, Any]]], memory: dict[str, Sequence[int]]
) -> str:
    """Teacher and student."""
    sizes = [4 * of["parameters"] for of in (teacher, next(iter(rows.values()))[0])]
    found = {"weights, fp32": sizes, **{f"peak of {work}": peaks for work, peaks in memory.items()}}
    cells = [
        (name, *(f"{size / 1e6:.0f} MB" for size in of), f"{1 - of[1] / of[0]:.1%}") for name, of in found.items()
    ]
    return format_table(("memory", TEACHER, "student", "less"), cells)


def curve_table(rows: dict[str, list[dict[str, Any]]]) -> str:
    """Accuracy over both languages after so many steps, on a part of the dev split."""
    steps = [point["step"] for point in next(iter(rows.values()))[0]["curve"]]
    cells = [
        (name, *(mean([100 * one["curve"][i]["both"] for one in found]) for i in range(len(steps))))
        for name, found in rows.items()
    ]
    return format_table(("dev accuracy (%) after steps", *map(str, steps)), cells)


def plot_curves(rows: dict[str, list[dict[str, Any]]], teacher: dict[str, Any], file: Path) -> None:
    """The same as lines, the spread as bands; dashed the teacher."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for name, found in rows.items():
        steps = [point["step"] for point in found[0]["curve"]]
        curves = torch.tensor([[100 * point["both"] for point in one["curve"]] for one in found])
        middle, spread = curves.mean(0), curves.std(0, correction=min(1, len(found) - 1))
        axes.plot(steps, middle, marker="o", markersize=3, label=name)
        axes.fill_between(steps, middle - spread, middle + spread, alpha=0.2)
    axes.axhline(100 * teacher["curve"][-1]["both"], color="gray", linestyle="--", label=TEACHER)
    axes.set(xlabel="steps", ylabel="accuracy of the next token, dev (%)")
    axes.legend(fontsize=8)
    figure.savefig(file, dpi=150)
