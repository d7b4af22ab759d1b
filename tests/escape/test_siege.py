"""A machine that holds all it can get, and one that sets traps: what others notice of it."""

from __future__ import annotations

import pytest

from tests.escape.attempts.others import GIFT, SECRET, TRAPS
from tests.escape.conftest import WALLED, Arena, Place

# What is no socket that listens, or is another's: nobody waits for the first kind.
PATIENTLY_AWAITED = {"deaf-socket", "full-socket"}


@pytest.mark.parametrize("place", WALLED)
def test_a_besieged_host_still_runs_its_machines(arena: Arena, place: Place) -> None:
    form = arena("siege", place).form

    assert form["neighbours"] == [SECRET, SECRET]
    assert form["another machine"] == SECRET
    assert form["another worker's"] == SECRET
    assert form["sending descriptors"] == "sent"


@pytest.mark.parametrize("place", WALLED)
def test_a_siege_has_its_bounds(arena: Arena, place: Place) -> None:
    held = arena("siege", place).form["held"]

    assert held["processes"] < 512
    assert held["files"] < 640
    assert held["descriptors in flight"] < 1000
    assert held["inotify"] <= 8
    assert held["signals"] <= 1024


def test_descriptors_in_flight_keep_no_warden_from_answering(arena: Arena) -> None:
    assert arena("flight", Place.USERNS).form == {"another machine": SECRET}


@pytest.mark.parametrize("place", Place)
def test_no_trap_leads_out_of_a_hostile_room(arena: Arena, place: Place) -> None:
    outcome = arena("traps", place).form

    assert outcome["heard"] == []
    assert set(outcome["connected"]) == set(TRAPS)
    for name, said in outcome["connected"].items():
        expected = "TimedOut" if name in PATIENTLY_AWAITED else ("OSError", "SocketAuthError")
        assert said.startswith(expected), name
    assert outcome["neighbours"] == [SECRET, SECRET]


@pytest.mark.parametrize("place", Place)
def test_descriptors_that_a_machine_sends_are_not_taken(arena: Arena, place: Place) -> None:
    assert arena("traps", place).form["gift"] == GIFT


@pytest.mark.parametrize("place", WALLED)
def test_only_a_file_can_be_read_out_of_a_hostile_room(arena: Arena, place: Place) -> None:
    read = arena("traps", place).form["read"]

    assert {name for name, said in read.items() if said.startswith("read ")} == {"file"}
