from __future__ import annotations

import os
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from pytest_vmsandbox.errors import HostUnfit, TeardownRefused
from pytest_vmsandbox.lease.run_directory import open_run_directory, remove, sweep

_LIVE_RUN = """
import sys, time
from pathlib import Path
from pytest_vmsandbox.lease.run_directory import open_run_directory
with open_run_directory(Path(sys.argv[1]), worker="gw1") as directory:
    (directory.path / "precious").write_text("in use")
    print(directory.path, flush=True)
    time.sleep(60)
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
