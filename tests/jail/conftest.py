"""What the tests of this room share: commands behind walls, run by two users."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from pytest_vmsandbox.errors import HostUnfit
from pytest_vmsandbox.jail.sandbox import run_sandbox
from pytest_vmsandbox.linux import prctl_set_child_subreaper
from tests.people import Kind, Person, person_reaches_checkout

RUN = """
import json, sys
from pytest_vmsandbox.jail.sandbox import run_sandbox
command, options = json.loads(sys.argv[1])
code, out, err = run_sandbox(command, **options)
print(json.dumps([code, out.decode(), err.decode()]))
"""

# Where the programs of a root directory without any come from.
USR = ("/usr", "/usr", None, "bind")


@dataclass(frozen=True, slots=True, kw_only=True)
class Runner:
    """Somebody who runs commands behind walls; a text is for a shell."""

    uid: int
    call: Callable[..., tuple[int, str, str]]

    def __call__(self, command: str | list[str], **options: Any) -> tuple[int, str, str]:
        words = ["sh", "-c", command] if isinstance(command, str) else command
        return self.call(words, **options)

    def says(self, command: str | list[str], **options: Any) -> str:
        """What a command that must succeed writes."""
        code, out, err = self(command, **options)
        assert code == 0, err
        return out

    def succeeds(self, command: str, **options: Any) -> bool:
        return self(command, **options)[0] == 0


@pytest.fixture(scope="session")
def _walls() -> None:
    try:
        run_sandbox(["true"])
    except HostUnfit as error:
        pytest.skip(str(error))


@pytest.fixture
def ourselves(_walls: None) -> Runner:
    """Whoever runs the tests."""

    def call(command: list[str], **options: Any) -> tuple[int, str, str]:
        code, out, err = run_sandbox(command, **options)
        assert out is not None
        assert err is not None
        return code, out.decode(), err.decode()

    return Runner(uid=os.getuid(), call=call)


@pytest.fixture(params=["ourselves", "ordinary"])
def somebody(request: pytest.FixtureRequest) -> Runner:
    """Whoever runs the tests, and a user without any privilege."""
    if request.param == "ourselves":
        runner: Runner = request.getfixturevalue("ourselves")
        return runner
    people: Mapping[Kind, Person] = request.getfixturevalue("people")
    ordinary = people[Kind.ORDINARY]
    if not person_reaches_checkout(ordinary):
        pytest.skip("an ordinary user can't reach this checkout or its interpreter")

    def call(command: list[str], **options: Any) -> tuple[int, str, str]:
        told = ordinary.python(RUN, json.dumps([command, options], default=str))
        assert isinstance(told, list)
        code, out, err = told
        return code, out, err

    return Runner(uid=ordinary.uid, call=call)


@pytest.fixture
def root(scratch: Path, somebody: Runner) -> Path:
    """A root directory that is theirs: links into /usr, which is not there, and two folders."""
    directory = scratch / "root"
    for folder in (directory, directory / "data", directory / "database"):
        folder.mkdir()
        os.chown(folder, somebody.uid, -1)
    for name in ("bin", "sbin", "lib", "lib64"):
        (directory / name).symlink_to(f"usr/{name}")
    return directory


@pytest.fixture
def orphans() -> Iterator[None]:
    """Orphans become our children for this test, and are reaped: not every init does it."""
    prctl_set_child_subreaper()
    yield
    prctl_set_child_subreaper(enabled=False)
