"""What a hostile program in the VMM's place gets: nothing, but what is openly on the list."""

from __future__ import annotations

import pytest

from tests.escape.attempts import run
from tests.escape.attempts.others import SECRET
from tests.escape.attempts.table import ATTEMPTS
from tests.escape.conftest import WALLED, Arena, Place

# Those that are not left to the host, and do no harm where they succeed.
PROVED = [name for name, one in ATTEMPTS.items() if not one.by_host and not one.unproved]


@pytest.mark.parametrize("place", WALLED)
def test_only_what_is_known_gets_out_of_walls(arena: Arena, place: Place) -> None:
    form = arena("attempts", place).form
    results, limits = form["results"], form["limits"]
    known = {name for name, one in ATTEMPTS.items() if one.gets_out_of(place.tier, limits=limits)}

    got_out = {name for name, result in results.items() if result["verdict"] == "gets out"}

    assert set(results) == set(ATTEMPTS)
    assert {name: results[name]["detail"] for name in got_out - known} == {}
    certain = {name for name in known if not ATTEMPTS[name].by_host}
    assert {name: results[name]["detail"] for name in certain - got_out} == {}


@pytest.mark.parametrize("place", WALLED)
def test_what_was_tried_has_harmed_nobody(arena: Arena, place: Place) -> None:
    form = arena("attempts", place).form

    assert form["harm"] == []
    assert form["heard"] == []
    assert form["neighbours"] == [SECRET, SECRET]


@pytest.mark.parametrize("place", Place)
def test_each_attempt_was_made_to_its_end(arena: Arena, place: Place) -> None:
    form = arena("attempts", place).form
    results = form["results"]
    broken = {name: one["detail"] for name, one in results.items() if one["verdict"] == "broken"}
    left_out = {name for name in ATTEMPTS if name not in results}

    assert broken == {}
    assert form["said"] == []
    assert form["status"] == 0
    harmful = {name for name, one in ATTEMPTS.items() if one.harmful}
    assert left_out == (set() if place.has_walls else harmful)


@pytest.mark.parametrize("name", PROVED)
def test_an_attempt_succeeds_where_there_are_no_walls(arena: Arena, name: str) -> None:
    if arena("attempts", Place.BARE).form["results"][name]["verdict"] == "gets out":
        return

    as_root = arena("attempts", Place.BARE_AS_ROOT).form["results"][name]

    assert as_root["verdict"] == "gets out", as_root["detail"]


def test_few_attempts_succeed_nowhere() -> None:
    unproved = [one for one in ATTEMPTS.values() if one.unproved]

    assert len(unproved) < 10
    assert {one.name for one in ATTEMPTS.values() if one.harmful} <= {one.name for one in unproved}


def test_the_host_would_notice_what_gets_out(arena: Arena) -> None:
    form = arena("attempts", Place.BARE).form

    assert {"tcp", "udp", "abstract", "path"} <= set(form["heard"])
    assert {line.split(":")[0] for line in form["harm"]} == {"victim", "image", "secret"}


def test_the_table_is_long_enough() -> None:
    assert len(ATTEMPTS) >= 40
    assert {one.subject for one in ATTEMPTS.values()} == {
        module.__name__.rpartition(".")[2] for module in run.SUBJECTS
    }
