"""In another user's place: the kernel checks what that user may do, and root waits no longer."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from pytest_vmsandbox.lease import bases
from pytest_vmsandbox.lease.bases import bases_of_others, default_base, own_bases
from tests.people import CHECKOUT, Kind, Person

# In a process of its own: pytest has threads, and this forks.
_PRELUDE = """
import json, os, sys, time
from pathlib import Path
from pytest_vmsandbox.deadline import Deadline
from pytest_vmsandbox.errors import TimedOut
from pytest_vmsandbox.lease.as_user import call_as_user
uid = int(sys.argv[1])
def ask(work, seconds=20):
    try:
        return call_as_user(uid, work, deadline=Deadline.after(seconds=seconds))
    except (OSError, TimedOut) as error:
        return f"{type(error).__name__}: {error}"
"""


def _run(someone: Person, body: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", _PRELUDE + body, str(someone.uid)],
        cwd=CHECKOUT,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return done.stdout.splitlines()


@pytest.fixture
def someone(people: Mapping[Kind, Person]) -> Person:
    return people[Kind.ORDINARY]


def test_it_is_that_user_in_all_ids_and_has_no_capability(someone: Person) -> None:
    shown, after = _run(
        someone,
        """
def work():
    lines = Path("/proc/self/status").read_text().splitlines()
    return " ".join(line for line in lines if line.startswith(("Uid", "Gid", "Groups", "CapEff")))
print(ask(work)); print(os.geteuid())
""",
    )

    uids, gids = "\t".join([str(someone.uid)] * 4), "\t".join([str(someone.gid)] * 4)
    assert f"Uid:\t{uids}" in shown
    assert f"Gid:\t{gids}" in shown
    assert f"Groups:\t{someone.gid} " in shown
    assert "CapEff:\t0000000000000000" in shown
    assert after == "0"


def test_it_may_do_what_that_user_may(someone: Person) -> None:
    (shown,) = _run(someone, "print(ask(lambda: Path('/etc/shadow').read_text()))")

    assert "Permission denied" in shown


def test_a_user_that_never_answers_is_given_up(someone: Person) -> None:
    shown, children = _run(
        someone,
        """
print(ask(lambda: time.sleep(600) or "", seconds=0.2).splitlines()[0])
print(Path("/proc/thread-self/children").read_text().split())
""",
    )

    assert shown.startswith("TimedOut: an answer in another user's place")
    assert children == "[]"


def test_one_that_is_killed_has_not_answered(someone: Person) -> None:
    (shown,) = _run(someone, "print(ask(lambda: os.kill(os.getpid(), 9) or ''))")

    assert "without an answer" in shown


@pytest.mark.parametrize("part", [1, 5, 9, 30])
def test_one_that_is_killed_in_the_midst_of_its_answer_has_not_answered(
    someone: Person, part: int
) -> None:
    (shown,) = _run(
        someone,
        f"""
from pytest_vmsandbox.lease import as_user
class Pipe:
    def __init__(self, descriptor, mode): self.descriptor = descriptor
    def __enter__(self): return self
    def __exit__(self, *error): pass
    def write(self, data):
        os.write(self.descriptor, data[:{part}])
        os.kill(os.getpid(), 9)
def work():
    as_user.open = Pipe
    return "\u00e9" * 20
print(ask(work))
""",
    )

    assert "without an answer" in shown


def test_any_text_comes_back(someone: Person) -> None:
    (shown,) = _run(someone, "print(json.dumps(ask(lambda: 'a\\n\u00e9' * 100_000)))")

    assert json.loads(shown) == "a\n\u00e9" * 100_000


# Where they may lie


@pytest.fixture
def shared(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        for place in ("tmp", "run"):
            Path(name, place).mkdir()
        monkeypatch.setattr(bases, "_SHARED_TEMPORARY", Path(name, "tmp"))
        monkeypatch.setattr(bases, "_RUNTIME", Path(name, "run"))
        yield Path(name)


@pytest.mark.skipif(os.getuid() != 0, reason="giving files away needs root")
def test_a_base_of_others_is_known_by_name_and_owner(shared: Path) -> None:
    for name, owner in (
        ("tmp/vmsandbox-4001", 4001),
        ("tmp/vmsandbox-4002", 4001),  # planted by somebody else
        ("tmp/vmsandbox-0", 0),
        ("tmp/vmsandbox-04001", 4001),
        ("tmp/vmsandbox-4001x", 4001),
        ("tmp/vmsandbox-\u0664", 4),
        ("run/4001", 4001),
        ("run/4003", 0),
    ):
        (shared / name).mkdir()
        os.chown(shared / name, owner, owner)
    (shared / "tmp/vmsandbox-4004").symlink_to(shared / "tmp/vmsandbox-4001")

    assert bases_of_others() == [
        (4001, shared / "tmp/vmsandbox-4001"),
        (4001, shared / "run/4001/vmsandbox"),
    ]


def test_our_bases_begin_with_the_one_that_a_run_would_take() -> None:
    assert own_bases()[0] == default_base()
