"""The tests of this room again, as users of the other kinds, each in the tier of that kind."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from pytest_vmsandbox.host.facts import Tier
from tests.people import (
    CHECKOUT,
    Kind,
    Person,
    person_reaches_checkout,
    plain_environment,
)
from tests.warden.conftest import TIER

TIERS = {
    Kind.ORDINARY: Tier.USERNS,
    Kind.SUDO_TO_QEMU_VM: Tier.QEMU_VM,
    Kind.SUDO_TO_ALL: Tier.SUDO,
}
MODULES = (
    *("launch", "launch_files", "groups", "client", "rooms", "life_and_death", "main", "fuzz"),
)
FUZZED = 3200
# They take long, and what they show is the same in every tier.
ONCE = "not two_hundred"


@pytest.mark.parametrize("kind", TIERS, ids=lambda kind: TIERS[kind])
def test_all_of_it_holds_in_the_tier_of(
    kind: Kind, people: Mapping[Kind, Person], scratch: Path
) -> None:
    someone = people[kind]
    if not person_reaches_checkout(someone):
        pytest.skip(f"{someone.kind} can't reach this checkout or its interpreter")
    own = scratch / "own"
    own.mkdir()
    os.chown(own, someone.uid, someone.gid)
    paths = [f"tests/warden/test_{name}.py" for name in MODULES]
    options = [
        "-q",
        "-rs",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:vmsandbox",
        "-p",
        "no:xdist",
        "-k",
        ONCE,
    ]
    done = subprocess.run(
        someone.argv(sys.executable, "-m", "pytest", *options, f"--basetemp={own}/tmp", *paths),
        cwd=CHECKOUT,
        env={
            **plain_environment(),
            TIER: TIERS[kind],
            "VMSANDBOX_TEST_FUZZED": str(FUZZED),
            "HYPOTHESIS_STORAGE_DIRECTORY": f"{own}/hypothesis",
        },
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )

    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr[-5000:]
    (passed,) = re.findall(r"(\d+) passed", done.stdout)
    assert int(passed) > 100, done.stdout[-5000:]
