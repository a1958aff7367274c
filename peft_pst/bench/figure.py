"""The figure of a benchmark. It needs matplotlib, which the extra `plot` brings."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from ..report.figures import _figure, _written
from .result import Bench, Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLUMNS = 3


def plot_bench(found: Bench, path: str | os.PathLike) -> Figure:
    """Draw each quantity of a benchmark as bars, one for each way to run the model, and write the figure to `path`
    (.png, .svg or .pdf). Behind the bar of a latency, its median, a paler one reaches to the 95th percentile. The
    accuracy, where there is one, is drawn over the speed-up at the first shape.

    Raises:
        ImportError: if matplotlib is not installed.
    """
    rows = {row.quantity: row for row in found.rows()}
    drawn = [row for name, row in rows.items() if not name.endswith("p95") and name != "accuracy"]
    panels_drawn = len(drawn) + ("accuracy" in rows)
    lines = -(-panels_drawn // COLUMNS)
    figure = _figure(4 * COLUMNS, (0.9 + 0.35 * len(found.measured)) * lines)
    panels = figure.subplots(lines, COLUMNS, squeeze=False).flatten()
    for row, axes in zip(drawn, panels, strict=False):
        _draw_bars(axes, found, row, rows.get(row.quantity.replace("p50", "p95"), row).values)
    if "accuracy" in rows:
        _draw_accuracy(panels[len(drawn)], found, drawn[0], rows["accuracy"])
    for axes in panels[panels_drawn:]:
        axes.axis("off")
    figure.suptitle(found.measured_on(), fontsize=9)
    return _written(figure, path)


def _draw_bars(axes: Axes, found: Bench, row: Row, longest: tuple[float | None, ...]) -> None:
    for number, (one, value, long) in enumerate(zip(found.measured, row.values, longest, strict=True)):
        if value is not None:
            behind = axes.barh(one.name, long, color=f"C{number}", alpha=0.4)
            axes.barh(one.name, value, color=f"C{number}")
            axes.bar_label(behind, [f"{value:,.1f}"], padding=3, fontsize=7)
    axes.invert_yaxis()
    axes.margins(x=0.2)
    axes.set_title(f"{row.quantity} ({row.unit})", fontsize=9)
    axes.tick_params(labelsize=7)


def _draw_accuracy(axes: Axes, found: Bench, latency: Row, accuracy: Row) -> None:
    for number, (one, time, right) in enumerate(zip(found.measured, latency.values, accuracy.values, strict=True)):
        speed_up = latency.values[0] / time
        axes.scatter(speed_up, right, color=f"C{number}")
        axes.annotate(one.name, (speed_up, right), xytext=(4, 4), textcoords="offset points", fontsize=7)
    axes.margins(0.3)
    axes.set_xlabel(f"speed-up over {found.measured[0].name}, {latency.quantity}", fontsize=7)
    axes.set_title(f"accuracy ({accuracy.unit})", fontsize=9)
    axes.tick_params(labelsize=7)
