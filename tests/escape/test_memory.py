"""A template's memory and state in a hostile program's hands: to be read, never to be changed."""

from __future__ import annotations

import pytest

from tests.escape.conftest import Arena, Place


@pytest.mark.parametrize("part", ["memory", "state"])
@pytest.mark.parametrize("place", Place)
def test_no_machine_changes_what_the_others_begin_with(
    arena: Arena, place: Place, part: str
) -> None:
    form = arena("memory", place).form

    assert {way for way, came in form[part].items() if not came.startswith("refused")} == set()
    assert form["untouched"]


@pytest.mark.parametrize("place", Place)
def test_each_way_changes_memory_that_is_not_sealed(arena: Arena, place: Place) -> None:
    form = arena("memory", place).form

    assert len(form["unsealed"]) == len(form["memory"]) >= 10
    assert {way: came for way, came in form["unsealed"].items() if came != "changed"} == {}
