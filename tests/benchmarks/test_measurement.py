"""How values become a comparison."""

from __future__ import annotations

from benchmarks.import_cost import outermost, parse_import_times
from benchmarks.measurement import Measurement, Unit, alternate, quotients


def test_sides_take_turns_and_change_who_begins() -> None:
    calls: list[str] = []

    def side(name: str) -> float:
        calls.append(name)
        return float(len(calls))

    values = alternate({"a": lambda: side("a"), "b": lambda: side("b")}, rounds=3)

    assert calls == ["a", "b", "b", "a", "a", "b"]
    assert values == {"a": (1.0, 4.0, 5.0), "b": (2.0, 3.0, 6.0)}


def test_the_ratio_is_the_median_of_the_rounds_and_not_of_the_medians() -> None:
    compared = Measurement(
        benchmark="boot",
        what="boot",
        unit=Unit.SECONDS,
        values=(1.0, 10.0, 2.0),
        how="",
        peer="by hand",
        peer_values=(2.0, 20.0, 1.0),
    )

    assert compared.median == 2.0
    assert compared.ratio == 2.0


def test_of_a_rate_more_is_better() -> None:
    compared = Measurement(
        benchmark="network",
        what="throughput",
        unit=Unit.MEGABITS_PER_SECOND,
        values=(200.0, 100.0),
        how="",
        peer="by hand",
        peer_values=(100.0, 50.0),
    )

    assert compared.ratio == 2.0


def test_without_a_peer_there_is_no_ratio() -> None:
    alone = Measurement(benchmark="b", what="w", unit=Unit.SECONDS, values=(1.0,), how="")

    assert alone.ratio is None


def test_quotients_are_taken_round_by_round() -> None:
    compared = quotients(
        benchmark="restored", what="r", ours=[8.0, 30.0, 9.0], theirs=[2.0, 10.0, 1.0], how="done"
    )

    assert compared.values == (4.0, 3.0, 9.0)
    assert compared.unit is Unit.TIMES
    assert compared.how == "done; of the medians: 4.5"


def test_an_import_of_ours_counts_once_with_all_that_it_imported() -> None:
    told = """\
import time: self [us] | cumulative | imported package
import time:        10 |         10 |     json
import time:         5 |          5 |     pytest_vmsandbox.errors
import time:        20 |         35 |   pytest_vmsandbox.plugin
import time:         7 |          7 |   pytest_vmsandbox_not_ours
import time:       100 |        142 | outsider
import time:         3 |          3 | pytest_vmsandbox.late
"""

    ours = outermost(parse_import_times(told))

    assert {each.name: each.cumulative_us for each in ours} == {
        "pytest_vmsandbox.plugin": 35,
        "pytest_vmsandbox.late": 3,
    }
