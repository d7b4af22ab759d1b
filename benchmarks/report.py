"""The report: one table for people, one JSON document for programs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from statistics import median
from typing import Final

from rich.box import SIMPLE_HEAD
from rich.table import Table

from benchmarks.measurement import Measurement
from benchmarks.setting import HostDescription

REPORT_FORMAT: Final = 1


def table_of(measurements: Sequence[Measurement]) -> Table:
    """One row a measurement, its peer's figures below it, and how it was measured."""
    table = Table("what, and how it was measured", box=SIMPLE_HEAD)
    for column in ("median", "min", "max", "peer = 1"):
        table.add_column(column, justify="right", no_wrap=True)
    for each in measurements:
        ratio = "" if each.ratio is None else f"{each.ratio:.2f}"
        table.add_row(f"{each.benchmark}: {each.what}", *_numbers(each, each.values), ratio)
        if each.peer:
            table.add_row(f"  peer: {each.peer}", *_numbers(each, each.peer_values), "")
        table.add_row(f"  {each.how}; {_count(each)}", style="dim", end_section=True)
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
    return f"{len(each.values)} values" if len(each.values) > 1 else "1 value"
