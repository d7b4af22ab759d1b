"""The report: one table for people, one JSON document for programs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from statistics import median
from typing import Final

from rich.table import Table

from benchmarks.measurement import Measurement
from benchmarks.setting import HostDescription

REPORT_FORMAT: Final = 1


def table_of(measurements: Sequence[Measurement]) -> Table:
    """One row a measurement; a peer has a row of its own below what it is compared with."""
    table = Table("benchmark", "what", title="benchmarks", title_justify="left")
    for column in ("median", "min", "max"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("peer / ours", justify="right", no_wrap=True)
    table.add_column("how")
    for each in measurements:
        ratio = "" if each.ratio is None else f"{each.ratio:.2f}"
        numbers = _numbers(each, each.values)
        table.add_row(each.benchmark, each.what, *numbers, ratio, f"{each.how}; {_count(each)}")
        if each.peer:
            table.add_row("", f"  {each.peer}", *_numbers(each, each.peer_values), "", "")
    return table


def document_of(measurements: Sequence[Measurement], host: HostDescription) -> dict[str, object]:
    """The same for programs, with every single value."""
    return {
        "format": REPORT_FORMAT,
        "host": asdict(host),
        "measurements": [
            {**asdict(each), "median": each.median, "ratio": each.ratio} for each in measurements
        ],
    }


def _numbers(each: Measurement, values: Sequence[float]) -> list[str]:
    return [f"{number:.4g} {each.unit}" for number in (median(values), min(values), max(values))]


def _count(each: Measurement) -> str:
    return f"{len(each.values)} rounds" if len(each.values) > 1 else "1 round"
