"""Runs that are killed in the midst of what they do, by themselves, at a moment of their choice."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from pytest_vmsandbox.lease.layout import LEDGER

CHECKOUT = Path(__file__).parents[1]

_RUN = """
import os, subprocess, sys, time
from contextlib import suppress
from pathlib import Path
from pytest_vmsandbox.host.facts import Tier
from pytest_vmsandbox.lease.entries import CgroupEntry, ProcessEntry, Role
from pytest_vmsandbox.lease.run_directory import open_run_directory
from pytest_vmsandbox.linux import MountFlags, ProcessIdentity, mount

SLEEP = ["sleep", "600"]
started = []  # a Popen that is thrown away reaps its child

def vmm(name="vm1"):
    return ProcessEntry(role=Role.VMM, tier=Tier.BARE, machine_id=f"id-{name}", machine_name=name)

def start(*argv):
    nothing = subprocess.DEVNULL
    process = subprocess.Popen(argv or SLEEP, stdin=nothing, stdout=nothing, stderr=nothing)
    started.append(process)
    print(process.pid, flush=True)
    return ProcessIdentity.of(process.pid)

def die():
    os.kill(os.getpid(), 9)

with open_run_directory(Path(sys.argv[1]), worker="gw1") as directory:
    ledger, path = directory.ledger, directory.path
    machine = directory.machine_directory("m1")
    (machine / "console.log").write_text("boot")
    print(path, flush=True)
"""


def run_argv(base: Path, body: str) -> list[str]:
    """The command of a run that does `body` in its run directory and then is killed."""
    lines = [f"    {line}\n" for line in [*body.strip().splitlines(), "die()"]]
    return [sys.executable, "-c", _RUN + "".join(lines), str(base)]


def leave_dead_run(base: Path, body: str = "", *, prefix: Sequence[str] = ()) -> Path:
    """The run directory that such a run left; what `body` prints is thrown away."""
    return leave_dead_run_with_pids(base, body, prefix=prefix)[0]


def leave_dead_runs(base: Path, count: int, body: str = "") -> list[Path]:
    """Several of them; each in a base of its own at first, for a run reaps those before it."""
    runs = [leave_dead_run(base.with_name(f"b{number}"), body) for number in range(count)]
    base.mkdir(mode=0o700, exist_ok=True)
    return [run.rename(base / run.name) for run in runs]


def leave_dead_run_with_pids(
    base: Path, body: str, *, prefix: Sequence[str] = ()
) -> tuple[Path, list[int]]:
    """The same, with the pids of what `start` started."""
    done = subprocess.run(
        [*prefix, *run_argv(base, body)],
        cwd=CHECKOUT,
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(CHECKOUT)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == -9, done.stdout + done.stderr
    path, *pids = done.stdout.splitlines()
    return Path(path), list(map(int, pids))


def rewrite_ledger(run: Path, *changes: tuple[str, str]) -> None:
    """Change what a dead run's ledger says."""
    text = (run / LEDGER).read_text()
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    (run / LEDGER).write_text(text)
