"""`vmsandbox ps` and `vmsandbox reap`: what they show, what they undo, and what they exit with."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from pytest_vmsandbox.host.facts import Tier
from pytest_vmsandbox.lease.entries import CgroupEntry, ProcessEntry, Role
from pytest_vmsandbox.lease.layout import LEDGER
from pytest_vmsandbox.lease.run_directory import open_run_directory
from pytest_vmsandbox.linux import ProcessIdentity
from tests.dead_runs import CHECKOUT, leave_dead_run, leave_dead_runs
from tests.people import Kind, Person
from tests.precious import checksum, make_precious


@pytest.fixture
def base() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="vmsb-") as short:
        yield Path(short).resolve() / "b"


def _run(*words: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pytest_vmsandbox.cli", *words],
        cwd=CHECKOUT,
        env={"PATH": os.environ["PATH"], **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def _ps(base: Path) -> list[dict[str, Any]]:
    done = _run("ps", "--json", "--run-dir", base)
    assert (done.returncode, done.stderr) == (0, "")
    runs = json.loads(done.stdout)["runs"]
    assert isinstance(runs, list)
    return runs


def test_where_nothing_is_nothing_is_shown_and_nothing_done(base: Path) -> None:
    for path in (base, base.parent):
        shown = _run("ps", "--run-dir", path)
        done = _run("reap", "--run-dir", path)

        assert (shown.returncode, shown.stdout, shown.stderr) == (0, "no runs\n", "")
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not base.exists()


def test_a_live_run_is_shown_with_its_machines_and_left_alone(base: Path) -> None:
    with (
        subprocess.Popen(["sleep", "600"]) as vmm,
        open_run_directory(base, worker="gw3") as directory,
    ):
        number = directory.ledger.record(
            ProcessEntry(role=Role.VMM, tier=Tier.USERNS, machine_id="r1-gw3-m1", machine_name="db")
        )
        directory.ledger.identify(number, ProcessIdentity.of(vmm.pid))
        directory.ledger.record(ProcessEntry(role=Role.WARDEN, tier=Tier.SUDO))
        group = Path("/sys/fs/cgroup/vmsandbox-m1")
        directory.ledger.strike(directory.ledger.record(CgroupEntry(path=group)))
        directory.ledger.record(CgroupEntry(path=group))

        (run,) = _ps(base)
        shown = _run("ps", "--run-dir", base).stdout
        reaped = _run("reap", "--run-dir", base)

        assert (reaped.returncode, reaped.stdout, reaped.stderr) == (0, "", "")
        assert vmm.poll() is None
        assert directory.path.is_dir()
    assert run["path"] == str(directory.path)
    assert (run["state"], run["worker"], run["pid"]) == ("alive", "gw3", os.getpid())
    assert (run["reason"], run["inspect"]) == ("", "")
    assert run["others"] == [f"control group {group}"]
    machine, warden = run["processes"]
    assert 0 <= machine.pop("age_s") < 60
    assert machine == {
        "role": "vmm",
        "machine_id": "r1-gw3-m1",
        "machine_name": "db",
        "tier": "userns",
        "pid": vmm.pid,
    }
    assert (warden["role"], warden["pid"]) == ("warden", None)
    assert f"alive     {directory.path}  worker gw3  pid {os.getpid()}  for " in shown
    assert f"db  r1-gw3-m1  tier userns  pid {vmm.pid}  for " in shown
    assert "warden  tier sudo  not started  for " in shown


def test_what_is_dead_is_shown_and_undone_step_by_step(base: Path) -> None:
    run = leave_dead_run(base, "ledger.record(vmm())")
    (seen,) = _ps(base)
    assert seen["state"] == "dead"

    done = _run("reap", "--run-dir", base)

    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [
        "vmm vm1, not yet started: not there",
        f"{run}: removed",
    ]
    assert _ps(base) == []


def test_what_is_in_doubt_is_named_by_both_and_left(base: Path) -> None:
    doubtful, dead = leave_dead_runs(base, 2)
    (doubtful / LEDGER).write_text("\x1b[31mnonsense\n")

    states = {run["path"]: run["state"] for run in _ps(base)}
    shown = _run("ps", "--run-dir", base)
    done = _run("reap", "--run-dir", base)

    assert states == {str(doubtful): "doubtful", str(dead): "dead"}
    assert "its ledger is damaged" in shown.stdout
    assert f"inspect: cat -v -- {doubtful / LEDGER}" in shown.stdout
    assert done.returncode == 1
    assert done.stdout == f"{dead}: removed\n"
    assert f"left in place: {doubtful}: its ledger is damaged" in done.stderr
    assert "\x1b" not in shown.stdout + done.stderr
    assert doubtful.is_dir()


def test_a_base_that_others_may_write_is_in_doubt_itself(base: Path) -> None:
    base.mkdir()
    (base / "mount-points").mkdir()  # it is not looked into
    base.chmod(0o777)

    (seen,) = _ps(base)
    done = _run("reap", "--run-dir", base)

    assert (seen["path"], seen["state"]) == (str(base), "doubtful")
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert "it is not a directory of ours alone" in line


@pytest.mark.parametrize("command", ["ps", "reap"])
def test_a_place_that_can_not_be_is_named(command: str) -> None:
    done = _run(command, "--run-dir", "/etc/passwd/x")

    assert (done.returncode, done.stdout) == (125, "")
    assert "run directories can't lie in /etc/passwd/x: Not a directory" in done.stderr
    assert "--run-dir" in done.stderr


def test_the_environment_says_where_to_look(base: Path) -> None:
    run = leave_dead_run(base)

    done = _run("reap", VMSANDBOX_RUN_DIR=str(base))

    assert done.stdout == f"{run}: removed\n"


# Root, and what belongs to others


@pytest.fixture
def of_somebody(base: Path, people: Mapping[Kind, Person]) -> Person:
    """Whose base it is."""
    someone = people[Kind.ORDINARY]
    base.parent.chmod(0o755)
    base.mkdir(mode=0o700)
    os.chown(base, someone.uid, someone.gid)
    return someone


def test_root_sees_and_reaps_what_another_user_left(base: Path, of_somebody: Person) -> None:
    run = leave_dead_run(base, prefix=of_somebody.argv())
    (seen,) = _ps(base)
    assert (seen["path"], seen["state"]) == (str(run), "dead")

    done = _run("reap", "--run-dir", base)

    assert (done.returncode, done.stdout, done.stderr) == (0, f"{run}: removed\n", "")
    assert not any(base.iterdir())


def test_a_base_or_a_user_that_can_not_be_asked_keeps_no_other_from_being_asked(
    people: Mapping[Kind, Person],
) -> None:
    uids = [people[kind].uid for kind in (Kind.ORDINARY, Kind.SUDO_TO_ALL)]
    done = subprocess.run(
        [sys.executable, "-c", _ASK_SEVERAL, *map(str, uids)],
        cwd=CHECKOUT,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )

    first, own, killed, last = done.stdout.splitlines()
    assert first.startswith("failed /unfit VMS-RUN-DIR-UNUSABLE")
    assert own == "/own 0"
    assert killed == f"failed /killed as uid {uids[0]}: it ended without an answer"
    assert last == f"/other {uids[1]}"


_ASK_SEVERAL = """
import argparse, os, sys
from pathlib import Path
from pytest_vmsandbox.cli import runs
from pytest_vmsandbox.errors import HostUnfit
os.environ.pop("VMSANDBOX_RUN_DIR", None)
runs.own_bases = lambda: [Path("/unfit"), Path("/own")]
runs.bases_of_others = lambda: list(zip(map(int, sys.argv[1:]), [Path("/killed"), Path("/other")]))
def look(base):
    if base.name == "killed":
        os.kill(os.getpid(), 9)
    if base.name == "unfit":
        raise HostUnfit("VMS-RUN-DIR-UNUSABLE", "a directory", "none", "make one")
    return f"{base} {os.getuid()}"
def failed(base, reason):
    return f"failed {base} {reason}".splitlines()[0]
for answer in runs.ask_each_base(argparse.Namespace(run_dir=None), look, failed=failed):
    print(answer, flush=True)
"""


def test_root_is_not_led_to_what_the_user_may_not_touch(base: Path, of_somebody: Person) -> None:
    """By a ledger that names root's process and directory, and by links in place of folders."""
    precious = base.with_name("vmsandbox-precious")
    make_precious(precious)
    (precious / ".vmsandbox-run").touch()
    before = checksum(precious)
    with subprocess.Popen(["sleep", "600"]) as of_root:
        run = leave_dead_run(
            base,
            f"""
ledger.identify(ledger.record(vmm()), ProcessIdentity.of({of_root.pid}))
ledger.record(CgroupEntry(path=Path({str(precious)!r})))
(machine / "link").symlink_to({str(precious)!r})
(path.parent / "r00000000-gw0").symlink_to({str(precious)!r})
""",
            prefix=of_somebody.argv(),
        )

        done = _run("reap", "--run-dir", base)

        assert done.returncode == 1
        assert of_root.poll() is None
        of_root.kill()
    assert "we may not kill it" in done.stderr
    assert f"control group {precious}: it is in no cgroup file system" in done.stderr
    assert f"{base}/r00000000-gw0: it is not a directory of ours" in done.stderr
    assert run.is_dir()
    assert checksum(precious) == before


def test_a_user_sees_nothing_of_others(base: Path, people: Mapping[Kind, Person]) -> None:
    base.parent.chmod(0o755)
    leave_dead_run(base)
    someone = people[Kind.ORDINARY]

    done = subprocess.run(
        someone.argv(sys.executable, "-m", "pytest_vmsandbox.cli", "reap", "--run-dir", base),
        cwd=CHECKOUT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )

    assert done.returncode == 1
    assert "it is not a directory of ours alone" in done.stderr
    assert len(list(base.iterdir())) == 1
