"""Runs of the arena: each part once in each tier, as the user who has the tier."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, NoReturn

import pytest

from pytest_vmsandbox.host.facts import Tier
from tests.people import CHECKOUT, Kind, Person, person_reaches_checkout, plain_environment


class Place(StrEnum):
    """Where the hostile program is let loose: a tier, and for the tier bare as whom."""

    ROOT = "root"
    SUDO = "sudo"
    QEMU_VM = "qemu-vm"
    USERNS = "userns"
    BARE = "bare"
    BARE_AS_ROOT = "bare, as root"

    @property
    def tier(self) -> Tier:
        return Tier.BARE if self is Place.BARE_AS_ROOT else Tier(self.value)

    @property
    def has_walls(self) -> bool:
        return self.tier is not Tier.BARE


WALLED = [place for place in Place if place.has_walls]
_WHO = {
    Place.ROOT: Kind.ROOT,
    Place.SUDO: Kind.SUDO_TO_ALL,
    Place.QEMU_VM: Kind.SUDO_TO_QEMU_VM,
    Place.USERNS: Kind.ORDINARY,
    Place.BARE: Kind.ORDINARY,
    Place.BARE_AS_ROOT: Kind.ROOT,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What came of a part of the arena in one place."""

    place: Place
    form: Mapping[str, Any]


Arena = Callable[[str, Place], Outcome]


@pytest.fixture(scope="session")
def arena(request: pytest.FixtureRequest) -> Arena:
    """Runs a part in a place, once for the whole session; skips where that can't be had."""
    known: dict[tuple[str, Place], Outcome | str] = {}

    def outcome(part: str, place: Place) -> Outcome:
        if (part, place) not in known:
            try:
                known[part, place] = _run(request, part, place)
            except pytest.skip.Exception as skipped:
                known[part, place] = str(skipped)
        found = known[part, place]
        if isinstance(found, str):
            pytest.skip(found)
        return found

    return outcome


def _run(request: pytest.FixtureRequest, part: str, place: Place) -> Outcome:
    argv = [sys.executable, "-m", "tests.escape.arena", part, str(place.tier)]
    if os.getuid() == 0:
        people: Mapping[Kind, Person] = request.getfixturevalue("people")
        person = people[_WHO[place]]
        if not person_reaches_checkout(person):
            leave_untried(place, f"{person.kind} can't reach this checkout or its interpreter")
        argv = person.argv(*argv)
    elif place not in (Place.USERNS, Place.BARE):
        pytest.skip(f"takes root: it makes the users who have the tier {place.tier}")
    done = subprocess.run(
        argv,
        cwd=CHECKOUT,
        env=plain_environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    if "VMS-WARDEN-" in done.stderr and place is Place.USERNS:
        leave_untried(place, f"no user namespaces for us: {done.stderr.splitlines()[-1]}")
    assert done.returncode == 0, done.stderr
    return Outcome(place=place, form=json.loads(done.stdout))


def leave_untried(place: Place, reason: str) -> NoReturn:
    """Skip with a code, which the summary counts; in CI, where nobody reads it, fail.

    It is a whole tier that is left out. A checkout in a home with mode 0700 is nothing wrong.
    """
    if os.environ.get("CI") == "true":
        pytest.fail(f"nothing was tried in the place {place}: {reason}", pytrace=False)
    pytest.skip(f"VMS-TEST-UNTRIED-{place.tier.upper()}: {reason}")
