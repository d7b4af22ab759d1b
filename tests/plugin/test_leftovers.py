"""What teardown refuses stays, is named in the summary, and the command to look at it is right."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from pytest_vmsandbox.image.cache import list_images
from tests.people import Kind, Person, person_reaches_checkout
from tests.plugin.conftest import CACHE
from tests.precious import checksum, make_precious

pytestmark = [
    pytest.mark.machine,
    pytest.mark.skipif(os.getuid() != 0, reason="takes root: to hinder a removal"),
]

# The test says where its run directory is, and goes on once it has been tampered with.
WAITS = """
from pathlib import Path
from time import sleep

def test_it(vm):
    Path("new").write_text(str(vm._controller.build.config.directory.parent))
    Path("new").rename("directory")
    while not Path("go").exists():
        sleep(0.02)
"""

# Root mounts something in a user's run directory, in a mount namespace of their own.
MOUNTS = """
import subprocess, sys, time
from pathlib import Path

precious, *pytest = sys.argv[1:]
run = subprocess.Popen(pytest)
while not Path("directory").exists():
    assert run.poll() is None
    time.sleep(0.02)
target = Path(Path("directory").read_text(), "of root")
target.mkdir()
subprocess.run(["mount", "--bind", precious, target], check=True)
Path("go").touch()
sys.exit(run.wait())
"""
OWN_MOUNTS = ("unshare", "--mount", "--propagation", "private", "--")

ALONE_AND_UNDER_XDIST = pytest.mark.parametrize("workers", [(), ("-n1",)], ids=["alone", "xdist"])


@pytest.fixture
def user(people: Mapping[Kind, Person]) -> Person:
    """One who can't become root, and so can't undo what root did."""
    ordinary = people[Kind.ORDINARY]
    if not person_reaches_checkout(ordinary):
        pytest.skip("an ordinary user can't reach this checkout or its interpreter")
    return ordinary


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a run works, with a base of its own, which is emptied afterwards."""

    path: Path

    @property
    def base(self) -> Path:
        return self.path / "run"

    @property
    def environment(self) -> Mapping[str, str]:
        return {
            **os.environ,
            "HOME": str(self.path),
            "PYTHONDONTWRITEBYTECODE": "1",
            "VMSANDBOX_TIER": "auto",
            "VMSANDBOX_RUN_DIR": str(self.base),
            "VMSANDBOX_CACHE_DIR": str(self.path / "cache"),
        }

    def pytest(self, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-rA", *arguments]

    def start(self, argv: Sequence[str]) -> subprocess.Popen[str]:
        return subprocess.Popen(
            argv,
            cwd=self.path,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def directory(self) -> Path:
        """The run directory, once there is one and a machine is up in it."""
        over = time.monotonic() + 120
        while not (self.path / "directory").exists():
            assert time.monotonic() < over
            time.sleep(0.02)
        return Path((self.path / "directory").read_text())


@pytest.fixture
def place() -> Iterator[Place]:
    """What is remembered of the host is its own: others are not to believe what it finds."""
    with tempfile.TemporaryDirectory(prefix="vmsl-", dir="/tmp") as short:
        place = Place(path=Path(short))
        place.path.chmod(0o755)
        (place.path / "test_it.py").write_text(WAITS)
        (place.path / "pytest.ini").write_text(
            "[pytest]\nasyncio_default_fixture_loop_scope = function\n"
        )
        _fill(place.path / "cache")
        yield place


@ALONE_AND_UNDER_XDIST
def test_a_mount_that_can_not_be_detached_is_named_and_what_is_in_it_stays(
    place: Place, workers: tuple[str, ...], user: Person
) -> None:
    precious = place.path / "precious"  # its owner might remove it
    before = make_precious(precious)
    _give_to(user, place)
    script = [*OWN_MOUNTS, sys.executable, "-c", MOUNTS, str(precious)]

    run = place.start([*script, *user.argv(*place.pytest(*workers))])
    said, _ = run.communicate(timeout=200)

    assert run.returncode == 0, said
    target = place.directory() / "of root"
    (line,) = _left_in_place(said)
    assert f"still mounted: {target}" in line
    assert line.endswith(f"(inspect: findmnt --submounts --target '{target}')")
    assert checksum(precious) == before


@ALONE_AND_UNDER_XDIST
def test_files_of_somebody_else_are_named_by_this_run_and_the_next(
    place: Place, workers: tuple[str, ...], user: Person
) -> None:
    _give_to(user, place)
    run = place.start(user.argv(*place.pytest(*workers)))
    directory = place.directory()
    before = make_precious(directory / "precious")
    (place.path / "go").touch()
    said, _ = run.communicate(timeout=200)
    following, _ = place.start(user.argv(*place.pytest(*workers))).communicate(timeout=200)

    assert run.returncode == 0, said
    left = directory.with_name(f".dead-{directory.name}")
    for output in (said, following):
        (line,) = _left_in_place(output)
        assert line.startswith(f"left in place: {left}: not removed: precious/")
        assert "Permission denied" in line
        inspect = line.rpartition("(inspect: ")[2].removesuffix(")")
        seen = subprocess.run(["sh", "-c", inspect], capture_output=True, text=True, check=True)
        assert f"{left}/precious/" in seen.stdout
    assert checksum(left / "precious") == before


def _left_in_place(said: str) -> list[str]:
    return [line for line in said.splitlines() if line.startswith("left in place")]


def _fill(cache: Path) -> None:
    """Bring the image and its agent there, so that nothing has to be built."""
    image = list_images(Path(CACHE))[-1].directory
    shutil.copytree(image, cache / "images" / image.name)
    for known in (Path(CACHE) / "packages", *Path(CACHE).glob("agent-*[!k]")):
        subprocess.run(["cp", "-a", known, cache], check=True)


def _give_to(user: Person, place: Place) -> None:
    """Let a user work there."""
    owner = f"{user.uid}:{user.gid}"
    subprocess.run(["chown", "-R", "--no-dereference", owner, place.path], check=True)
