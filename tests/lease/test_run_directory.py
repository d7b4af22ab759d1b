from __future__ import annotations

import os
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pytest_vmsandbox.errors import HostUnfit, TeardownRefused
from pytest_vmsandbox.host.run_directory import RUN_DIRECTORY_MARKER, mark_run_directory
from pytest_vmsandbox.lease.run_directory import DEAD, LOCK, open_run_directory, remove, sweep

_LIVE_RUN = """
import sys, time
from pathlib import Path
from pytest_vmsandbox.lease.run_directory import open_run_directory
with open_run_directory(Path(sys.argv[1]), worker="gw1") as directory:
    (directory.path / "precious").write_text("in use")
    print(directory.path, flush=True)
    time.sleep(60)
"""

_MANY_RUNS = """
import sys
from pathlib import Path
from pytest_vmsandbox.lease.run_directory import open_run_directory
for _ in range(30):
    with open_run_directory(Path(sys.argv[1]), worker="gw1") as directory:
        (directory.machine_directory("m1") / "console.log").write_text("boot")
"""


@pytest.fixture
def base() -> Iterator[Path]:
    # pytest's own directories are too long for a socket's path
    with tempfile.TemporaryDirectory(prefix="vmsb-") as short:
        yield Path(short) / "b"


def _start_run(base: Path) -> tuple[subprocess.Popen[str], Path]:
    process = subprocess.Popen(
        [sys.executable, "-c", _LIVE_RUN, str(base)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    with process.stdout:
        return process, Path(process.stdout.readline().strip())


def test_it_is_private_and_gone_afterwards(base: Path) -> None:
    with open_run_directory(base, worker="main") as directory:
        assert directory.path.parent == base
        assert stat.S_IMODE(base.stat().st_mode) == 0o700
        machine = directory.machine_directory("m1")
        assert stat.S_IMODE(machine.stat().st_mode) == 0o700
        (machine / "console.log").write_text("boot")

    assert list(base.iterdir()) == []


def test_what_a_killed_run_left_is_removed_by_the_next(base: Path) -> None:
    process, left = _start_run(base)
    process.kill()
    process.wait()
    assert left.is_dir()

    with open_run_directory(base, worker="main"):
        assert not left.exists()


def test_a_live_run_is_left_alone(base: Path) -> None:
    process, alive = _start_run(base)
    try:
        assert sweep(base) == []
        assert (alive / "precious").read_text() == "in use"
    finally:
        process.kill()
        process.wait()

    assert sweep(base) == [alive]


def test_a_folder_without_our_mark_is_never_touched(base: Path) -> None:
    base.mkdir(mode=0o700)
    stranger = base / "rdeadbeef-gw0"
    stranger.mkdir()
    (stranger / "precious").write_text("theirs")

    assert sweep(base) == []
    with pytest.raises(TeardownRefused, match="marker"):
        remove(stranger)
    assert (stranger / "precious").read_text() == "theirs"


def test_runs_that_begin_and_end_at_the_same_time_do_not_trip_each_other(base: Path) -> None:
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", _MANY_RUNS, str(base)], stderr=subprocess.PIPE, text=True
        )
        for _ in range(6)
    ]
    complaints = [run.communicate()[1] for run in runs]

    assert complaints == [""] * len(runs)
    assert [run.returncode for run in runs] == [0] * len(runs)
    assert list(base.iterdir()) == []


def test_whoever_saw_a_run_before_it_ended_leaves_nothing_in_its_place(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next run sweeps when the one before has only its directory's last step to go."""
    swept: list[list[Path]] = []
    rmdir = Path.rmdir

    def sweep_first(path: Path) -> None:
        monkeypatch.setattr(Path, "rmdir", rmdir)
        swept.append(sweep(base))
        assert not path.exists()  # the sweep took it up
        rmdir(path)

    with open_run_directory(base, worker="main"):
        monkeypatch.setattr(Path, "rmdir", sweep_first)

    assert [path.name[: len(DEAD)] for (path,) in swept] == [DEAD]
    assert list(base.iterdir()) == []


@pytest.mark.parametrize("marked", [True, False], ids=["marked", "unmarked"])
def test_an_interrupted_removal_is_taken_up(base: Path, *, marked: bool) -> None:
    dead = base / f"{DEAD}rdeadbeef-gw0"
    (dead / "m1").mkdir(parents=True)
    base.chmod(0o700)
    (dead / "m1" / "console.log").write_text("boot")
    if marked:
        mark_run_directory(dead)

    assert sweep(base) == [dead]
    assert list(base.iterdir()) == []


@pytest.mark.skipif(os.getuid() != 0, reason="giving files away needs root")
def test_an_interrupted_removal_of_somebody_else_is_left_alone(base: Path) -> None:
    dead = base / f"{DEAD}rdeadbeef-gw0"
    dead.mkdir(parents=True)
    (dead / "precious").write_text("theirs")
    os.chown(dead, 12345, 12345)

    assert sweep(base) == []
    assert (dead / "precious").read_text() == "theirs"


@pytest.mark.parametrize("content", [[], [LOCK]], ids=["empty", "with its lock"])
def test_what_a_run_left_that_died_before_its_mark_goes_after_a_minute(
    base: Path, content: list[str]
) -> None:
    unmarked = base / "rdeadbeef-gw0"
    unmarked.mkdir(parents=True)
    for name in content:
        (unmarked / name).touch()

    assert sweep(base) == []
    _make_older(unmarked)
    assert sweep(base) == [unmarked]
    assert list(base.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "content"),
    [("rdeadbeef-gw0", "precious"), ("rdeadbeef-gw0", RUN_DIRECTORY_MARKER + "x"), ("mine", LOCK)],
)
def test_an_old_unmarked_folder_of_another_kind_is_left_alone(
    base: Path, name: str, content: str
) -> None:
    stranger = base / name
    stranger.mkdir(parents=True)
    (stranger / content).write_text("theirs")
    _make_older(stranger)

    assert sweep(base) == []
    assert (stranger / content).read_text() == "theirs"


def _make_older(path: Path) -> None:
    then = time.time() - 120
    os.utime(path, (then, then))


def test_a_link_in_place_of_a_run_directory_leads_nowhere(base: Path, tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "file").write_text("theirs")
    base.mkdir(mode=0o700)
    (base / "r1-gw0").symlink_to(precious.resolve())

    with pytest.raises(TeardownRefused, match="not a directory of ours"):
        remove(base / "r1-gw0")
    assert (precious / "file").read_text() == "theirs"


def test_a_link_inside_is_removed_and_not_followed(base: Path, tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "file").write_text("theirs")

    with open_run_directory(base, worker="main") as directory:
        (directory.machine_directory("m1") / "link").symlink_to(precious.resolve())
        (directory.path / "link").symlink_to(precious.resolve())

    assert (precious / "file").read_text() == "theirs"


def test_a_base_that_others_may_write_is_refused(base: Path) -> None:
    base.mkdir()
    base.chmod(0o777)

    with (
        pytest.raises(HostUnfit, match="VMS-RUN-DIR-UNUSABLE"),
        open_run_directory(base, worker="main"),
    ):
        pass


def test_a_base_that_is_a_link_is_refused(base: Path, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir(mode=0o700)
    base.symlink_to((tmp_path / "real").resolve())

    with (
        pytest.raises(HostUnfit, match="VMS-RUN-DIR-UNUSABLE"),
        open_run_directory(base, worker="main"),
    ):
        pass


def test_a_base_too_long_for_a_socket_is_refused(tmp_path: Path) -> None:
    with (
        pytest.raises(HostUnfit, match="VMS-RUN-DIR-TOO-LONG"),
        open_run_directory(tmp_path / ("x" * 108), worker="main"),
    ):
        pass


@pytest.mark.skipif(os.getuid() != 0, reason="mounting needs root")
def test_nothing_is_removed_while_something_is_mounted_inside(base: Path) -> None:
    script = """
import subprocess, sys
from pathlib import Path
from pytest_vmsandbox.errors import TeardownRefused
from pytest_vmsandbox.lease.run_directory import open_run_directory
try:
    with open_run_directory(Path(sys.argv[1]), worker="main") as directory:
        target = directory.machine_directory("m1")
        (target / "file").write_text("below")
        subprocess.run(["mount", "-t", "tmpfs", "precious", target.resolve()], check=True)
        (target / "precious").write_text("mounted")
except TeardownRefused as refused:
    print(refused)
    assert target.parent.parent == Path(sys.argv[1]), target
    print((target / "precious").read_text())
"""
    done = subprocess.run(
        ["unshare", "--mount", sys.executable, "-c", script, str(base.absolute())],
        capture_output=True,
        text=True,
        check=True,
    )

    assert "still mounted" in done.stdout
    assert "mounted" in done.stdout.splitlines()[-1]
