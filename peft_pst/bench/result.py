"""What bench finds."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

from ..report.tables import format_table


@dataclasses.dataclass(frozen=True)
class Latency:
    """Of one batch, ms: the median of all rounds, and what 95 of 100 do not exceed."""

    p50: float
    p95: float


@dataclasses.dataclass(frozen=True)
class Measured:
    """One way to run the model."""

    name: str
    latency: dict[str, Latency]
    """By the shape of the batch, such as "8x128": sequences x tokens."""
    tokens_per_second: float | None
    """Of one sequence that is decoded, the median of all rounds; None where nothing generates."""
    resident_bytes: int | None
    """See `peft_pst.bench.memory`; None for another runtime."""
    file_bytes: int | None
    """Of its weights on disk; None where they are not known."""
    accuracy: float | None
    """The share of labelled texts that it finds the class of; None without such texts."""


class Row(NamedTuple):
    """One quantity, of each way to run the model; None where it has none."""

    quantity: str
    unit: str
    values: tuple[float | None, ...]


@dataclasses.dataclass(frozen=True)
class Bench:
    """What `bench` found; `table()` to read, `to_dict()` for JSON."""

    model: str
    """The class of the model."""
    machine: str
    """The processor."""
    threads: int
    repeats: int
    versions: dict[str, str]
    measured: tuple[Measured, ...]
    """The first is the one that all are compared with."""

    def to_dict(self) -> dict[str, Any]:
        """All of it in what JSON knows."""
        return dataclasses.asdict(self)

    def measured_on(self) -> str:
        """What was measured, and on what, in one line."""
        threads = "1 thread" if self.threads == 1 else f"{self.threads} threads"
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        return f"{self.model}; {self.machine}, {threads}, {versions}; rounds: {self.repeats}"

    def rows(self) -> list[Row]:
        """All quantities, in the units of the table."""
        rows = []
        for shape in self.measured[0].latency:
            for quantile in ("p50", "p95"):
                times = tuple(getattr(one.latency[shape], quantile) for one in self.measured)
                rows.append(Row(f"{shape}, {quantile}", "ms", times))
        for quantity, unit, field, scale in (
            ("decoding", "tokens/s", "tokens_per_second", 1),
            ("resident memory", "MB", "resident_bytes", 1e-6),
            ("file", "MB", "file_bytes", 1e-6),
            ("accuracy", "%", "accuracy", 100),
        ):
            values = tuple(getattr(one, field) for one in self.measured)
            if values[0] is not None:
                rows.append(Row(quantity, unit, tuple(None if value is None else scale * value for value in values)))
        return rows

    def table(self) -> str:
        """A row for each way to run the model, a column for each quantity; in brackets, but for the accuracy, as a
        multiple of the first one's. Below the table is what it was measured on."""
        rows = self.rows()
        lines = [[one.name, *(_cell(row, number) for row in rows)] for number, one in enumerate(self.measured)]
        return f"{format_table(['', *(row.quantity for row in rows)], lines)}\n\n({self.measured_on()})"


def _cell(row: Row, number: int) -> str:
    value = row.values[number]
    if value is None:
        return ""
    if number == 0 or row.quantity == "accuracy":
        return f"{value:,.1f} {row.unit}"
    return f"{value:,.1f} {row.unit} ({value / row.values[0]:.2f})"
