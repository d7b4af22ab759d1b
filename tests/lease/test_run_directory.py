from __future__ import annotations

import os
import stat
import subprocess
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from pytest_vmsandbox.errors import HostUnfit, TeardownRefused
from pytest_vmsandbox.host.run_directory import RUN_DIRECTORY_MARKER, mark_run_directory
from pytest_vmsandbox.lease.layout import DEAD, LEDGER, LOCK
from pytest_vmsandbox.lease.locks import hold_base_lock
from pytest_vmsandbox.lease.reaper import Reaped, reap
from pytest_vmsandbox.lease.run_directory import open_run_directory
from pytest_vmsandbox.lease.teardown import tear_down
from tests.dead_runs import leave_dead_run
from tests.people import Kind, Person

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
        assert reap(base).removed == []
        assert (alive / "precious").read_text() == "in use"
    finally:
        process.kill()
        process.wait()

    assert reap(base).removed == [alive]


def test_a_folder_without_our_mark_is_never_touched(base: Path) -> None:
    base.mkdir(mode=0o700)
    stranger = base / "rdeadbeef-gw0"
    stranger.mkdir()
    (stranger / "precious").write_text("theirs")

    assert reap(base).removed == []
    with pytest.raises(TeardownRefused, match="marker"):
        tear_down(stranger)
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
    """The next run reaps when the one before has only its directory's last step to go."""
    reaped: list[list[Path]] = []
    rmdir = os.rmdir

    def reap_first(path: str, *, dir_fd: int | None = None) -> None:
        monkeypatch.setattr(os, "rmdir", rmdir)
        reaped.append(reap(base).removed)
        assert list(base.iterdir()) == []  # the reaper took it up
        rmdir(path, dir_fd=dir_fd)

    with open_run_directory(base, worker="main"):
        monkeypatch.setattr(os, "rmdir", reap_first)

    assert [path.name[: len(DEAD)] for (path,) in reaped] == [DEAD]
    assert list(base.iterdir()) == []


def test_an_interrupted_removal_is_taken_up(base: Path) -> None:
    dead = _make_dead(base)
    mark_run_directory(dead)

    assert reap(base).removed == [dead]
    assert list(base.iterdir()) == []


def test_a_removal_that_lacks_only_its_last_step_is_taken_up(base: Path) -> None:
    dead = base / f"{DEAD}rdeadbeef-gw0"
    dead.mkdir(parents=True)

    assert reap(base).removed == [dead]
    assert list(base.iterdir()) == []


def test_what_is_named_like_an_interrupted_removal_and_is_not_marked_is_left_alone(
    base: Path,
) -> None:
    dead = _make_dead(base)

    done = reap(base)

    assert done.removed == []
    assert [leftover.path for leftover in done.leftovers] == [dead]
    assert (dead / "m1" / "console.log").read_text() == "boot"


def _make_dead(base: Path) -> Path:
    dead = base / f"{DEAD}rdeadbeef-gw0"
    (dead / "m1").mkdir(parents=True)
    (dead / "m1" / "console.log").write_text("boot")
    return dead


@pytest.mark.skipif(os.getuid() != 0, reason="giving files away needs root")
def test_an_interrupted_removal_of_somebody_else_is_left_alone(base: Path) -> None:
    dead = base / f"{DEAD}rdeadbeef-gw0"
    dead.mkdir(parents=True)
    (dead / "precious").write_text("theirs")
    os.chown(dead, 12345, 12345)

    assert reap(base).removed == []
    assert (dead / "precious").read_text() == "theirs"


@pytest.mark.parametrize("content", [[], [LOCK], [LOCK, LEDGER]], ids=str)
def test_what_a_run_left_that_died_before_its_mark_is_removed(
    base: Path, content: list[str]
) -> None:
    unmarked = base / "rdeadbeef-gw0"
    unmarked.mkdir(parents=True)
    for name in content:
        (unmarked / name).touch()

    assert reap(base).removed == [unmarked]
    assert list(base.iterdir()) == []


def test_a_run_directory_that_is_just_being_made_is_left_alone(base: Path) -> None:
    base.mkdir(mode=0o700)
    done: list[Reaped] = []
    with hold_base_lock(base):
        (base / "rdeadbeef-gw0").mkdir()
        reaper = threading.Thread(target=lambda: done.append(reap(base)))
        reaper.start()
        reaper.join(timeout=0.2)  # it waits; and if it did not, the next line would fail
        mark_run_directory(base / "rdeadbeef-gw0")
    reaper.join(timeout=20)

    assert done == [Reaped()]
    assert (base / "rdeadbeef-gw0").is_dir()


@pytest.mark.parametrize(
    ("name", "content"),
    [("rdeadbeef-gw0", "precious"), ("rdeadbeef-gw0", RUN_DIRECTORY_MARKER + "x"), ("mine", LOCK)],
)
def test_an_unmarked_folder_of_another_kind_is_left_alone(
    base: Path, name: str, content: str
) -> None:
    stranger = base / name
    stranger.mkdir(parents=True)
    (stranger / content).write_text("theirs")

    assert reap(base).removed == []
    assert (stranger / content).read_text() == "theirs"


def test_a_link_in_place_of_a_run_directory_leads_nowhere(base: Path, tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "file").write_text("theirs")
    base.mkdir(mode=0o700)
    (base / "r1-gw0").symlink_to(precious.resolve())

    with pytest.raises(TeardownRefused, match="is a symbolic link"):
        tear_down(base / "r1-gw0")
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


def test_a_process_that_was_forked_from_a_run_does_not_end_it(base: Path) -> None:
    script = """
import os, sys
from pathlib import Path
from pytest_vmsandbox.lease.run_directory import open_run_directory
class Out(Exception): pass
try:
    with open_run_directory(Path(sys.argv[1]), worker="main") as directory:
        child = os.fork()
        if child == 0:
            raise Out
        os.waitpid(child, 0)
        print(directory.path.is_dir())
except Out:
    os._exit(0)
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(base)], capture_output=True, text=True, check=True
    )

    assert done.stdout == "True\n"
    assert list(base.iterdir()) == []


def test_a_base_behind_a_link_is_called_by_its_real_name(base: Path) -> None:
    link = base.with_name("link")
    link.symlink_to(base)
    base.mkdir()

    with open_run_directory(link / "below", worker="main") as directory:
        assert directory.path.parent == base / "below"

    assert list((base / "below").iterdir()) == []


# Where our runs lie by default depends on how a session began

_AT_THE_DEFAULT = """
import json, os, sys
from pathlib import Path
from pytest_vmsandbox.lease import bases
from pytest_vmsandbox.lease.run_directory import open_run_directory
bases._RUNTIME, bases._SHARED_TEMPORARY = Path(sys.argv[1], "run"), Path(sys.argv[1], "tmp")
given = sys.argv[2:3]
if given == ["runtime"]:
    os.environ["XDG_RUNTIME_DIR"] = str(bases._RUNTIME / str(os.getuid()))
base = Path(given[0]) if given and given != ["runtime"] else bases.default_base()
with open_run_directory(base, worker="main") as directory:
    print(json.dumps([str(directory.path.parent), list(map(str, directory.leftovers))]))
"""


@dataclass(frozen=True)
class Places:
    """Where an ordinary user's runs may lie: below /run/user, below /tmp, or as they say."""

    someone: Person
    root: Path
    in_runtime: Path
    in_tmp: Path

    def run(self, *given: str | Path) -> tuple[str, list[str]]:
        """The base of a run that begins now, and what it leaves in place."""
        answer = self.someone.python(_AT_THE_DEFAULT, self.root, *given)
        assert isinstance(answer, list)
        base, left = answer
        return base, left


@pytest.fixture
def places(scratch: Path, people: Mapping[Kind, Person]) -> Places:
    someone = people[Kind.ORDINARY]
    runtime, tmp = scratch / "run" / str(someone.uid), scratch / "tmp"
    runtime.mkdir(parents=True, mode=0o700)
    tmp.mkdir()
    for folder in (scratch, runtime, tmp):
        os.chown(folder, someone.uid, someone.gid)
    return Places(
        someone=someone,
        root=scratch,
        in_runtime=runtime / "vmsandbox",
        in_tmp=tmp / f"vmsandbox-{someone.uid}",
    )


def test_a_run_reaps_also_where_another_session_would_have_begun(places: Places) -> None:
    dead = leave_dead_run(places.in_runtime, prefix=places.someone.argv())
    assert places.run() == (str(places.in_tmp), [])
    assert not dead.exists()

    dead = leave_dead_run(places.in_tmp, prefix=places.someone.argv())
    assert places.run("runtime") == (str(places.in_runtime), [])
    assert not dead.exists()


def test_a_run_with_a_place_of_its_own_reaps_nowhere_else(places: Places) -> None:
    dead = leave_dead_run(places.in_tmp, prefix=places.someone.argv())

    assert places.run(places.root / "own") == (str(places.root / "own"), [])
    assert dead.is_dir()


@pytest.mark.parametrize("made", ["of root", "closed", "a link to nowhere", "a loop"])
def test_a_run_begins_whatever_is_wrong_with_the_other_place(places: Places, made: str) -> None:
    if made == "of root":
        places.in_runtime.mkdir()
    elif made == "closed":
        places.in_runtime.mkdir(mode=0o000)
        os.chown(places.in_runtime, places.someone.uid, places.someone.gid)
    else:
        places.in_runtime.symlink_to("vmsandbox" if made == "a loop" else "nowhere")

    base, (left,) = places.run()

    assert base == str(places.in_tmp)
    assert left.startswith(f"{places.in_runtime}: ")
