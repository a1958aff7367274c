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
    """Of one sequence that is decoded, the median of all rounds; None where the model does not generate."""
    resident_bytes: int | None
    """See `peft_pst.bench.memory`; None for what does not come from a folder, and so below."""
    file_bytes: int | None


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
        if self.measured[0].tokens_per_second is not None:
            rows.append(Row("decoding", "tokens/s", tuple(one.tokens_per_second for one in self.measured)))
        for quantity, field in (("resident memory", "resident_bytes"), ("file", "file_bytes")):
            sizes = (getattr(one, field) for one in self.measured)
            rows.append(Row(quantity, "MB", tuple(None if size is None else size / 1e6 for size in sizes)))
        return rows

    def table(self) -> str:
        """A row for each quantity; each way to run the model has a column, and, but for the first, one beside it with
        the quantity as a multiple of the first one's. Below the table is what it was measured on."""
        first, *others = (one.name for one in self.measured)
        header = ["", first]
        for name in others:
            header += [name, f"to {first}"]
        rows = []
        for quantity, unit, (value, *values) in self.rows():
            cells = [quantity, _cell(value, unit)]
            for other in values:
                cells += [_cell(other, unit), "" if other is None else f"{other / value:.2f}"]
            rows.append(cells)
        return f"{format_table(header, rows)}\n\n({self.measured_on()})"


def _cell(value: float | None, unit: str) -> str:
    return "" if value is None else f"{value:,.1f} {unit}"
