"""The table of attempts in docs/escapes.md is what was measured, and says why."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.escape.attempts import run
from tests.escape.attempts.table import ATTEMPTS, Attempt
from tests.escape.conftest import Arena, Place

PAGE = Path(__file__).parents[2] / "docs" / "escapes.md"
BARE = (Place.BARE, Place.BARE_AS_ROOT)


def rows() -> dict[str, list[str]]:
    """The cells of each attempt, by its name."""
    lines = [line for line in PAGE.read_text().splitlines() if line.startswith("| `")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {first.strip("`"): others for first, *others in cells}


def walled_cell(attempt: Attempt, place: Place) -> str:
    """What the table must say of an attempt and a tier with walls."""
    if attempt.bounded_by:
        return "by control group"
    return "**gets out**" if attempt.gets_out_of(place.tier, limits=()) else "refused"


def test_the_table_has_every_attempt_in_its_order() -> None:
    assert run.SUBJECTS
    by_subject = {module.__name__.rpartition(".")[2]: 0 for module in run.SUBJECTS}
    order = sorted(ATTEMPTS.values(), key=lambda one: list(by_subject).index(one.subject))

    assert [(name, cells[0]) for name, cells in rows().items()] == [
        (one.name, one.does.replace("|", "or")) for one in order
    ]


def test_the_table_says_what_walls_do() -> None:
    for name, (_, *cells) in rows().items():
        expected = [walled_cell(ATTEMPTS[name], place) for place in Place if place.has_walls]

        assert cells[: len(expected)] == expected, name


@pytest.mark.parametrize("place", BARE)
def test_the_table_says_what_happens_without_walls(arena: Arena, place: Place) -> None:
    results = arena("attempts", place).form["results"]

    for name, cells in rows().items():
        cell = cells[len(Place) - len(BARE) + 1 + BARE.index(place)]
        if ATTEMPTS[name].harmful:
            assert cell == "not tried", name
        elif ATTEMPTS[name].by_host:
            assert cell in ("gets out ¹", "refused ¹"), name
        else:
            assert cell == results[name]["verdict"], name


def test_the_page_says_why_something_is_not_kept_apart() -> None:
    page = " ".join(PAGE.read_text().split())
    open_ones = {one.name: one.not_apart for one in ATTEMPTS.values() if one.not_apart}

    assert open_ones
    for name, reason in open_ones.items():
        assert f"`{name}`: {reason}" in page, name


def test_the_page_counts_the_attempts() -> None:
    assert f"It makes {len(ATTEMPTS)} attempts" in PAGE.read_text()
