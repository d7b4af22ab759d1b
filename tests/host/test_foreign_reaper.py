"""Exit statuses that somebody else takes: how a program ended is then not known, never success."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from pytest_vmsandbox.host import program
from pytest_vmsandbox.host.program import run_program
from tests.children import no_child_is_left

TAKEN = "its exit status was taken by somebody else"

# Runs programs in a process whose children are reaped by `how`, and prints how they ended.
SCRIPT = """
import asyncio, json, os, signal, sys, threading, time
from pytest_vmsandbox.host import program
how, pidfds, deadline_s, left, *commands = sys.argv[1:]
if how == "thread":
    def reap():
        while True:
            try:
                os.waitpid(-1, 0)
            except ChildProcessError:
                time.sleep(0.0005)
    threading.Thread(target=reap, daemon=True).start()
elif how == "stolen":
    # The status is taken as early as can be: before anybody could have opened a pidfd.
    class Stolen(program.subprocess.Popen):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            os.waitpid(self.pid, 0)
    program.subprocess.Popen = Stolen
if pidfds == "without":
    program._open_pidfd = lambda pid: None
async def main():
    for command in commands:
        seen = await program.run_program(["sh", "-c", command], deadline_s=float(deadline_s))
        out = seen.stdout.decode()
        print(json.dumps([seen.ok, seen.returncode, seen.error, seen.timed_out,
                          seen.left_running, out]))
asyncio.run(main())
if left == "none":
    try:
        os.waitpid(-1, os.WNOHANG)
        print('"a child is left"')
    except ChildProcessError:
        pass
"""

Seen = list[tuple[bool, int | None, str, bool, bool, str]]


def run_reaped_by(how: str, pidfds: str, *commands: str, deadline_s: float = 60) -> Seen:
    # A shell's `trap ''` ignores SIGCHLD for good: what is ignored stays so across execve(2).
    ignore = "trap '' CHLD; " if how == "nobody" else ""
    done = subprocess.run(
        [
            *("bash", "-c", f'{ignore}exec "$@"', "bash"),
            *(sys.executable, "-X", "dev", "-W", "error", "-c", SCRIPT),
            *(how, pidfds, str(deadline_s), "none" if how != "thread" else "any", *commands),
        ],
        cwd=Path(program.__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return [tuple(json.loads(line)) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("pidfds", ["with", "without"])
@pytest.mark.parametrize("how", ["nobody", "stolen"])
def test_a_command_whose_status_is_gone_is_not_a_success(how: str, pidfds: str) -> None:
    failed, succeeded = run_reaped_by(how, pidfds, "echo out; exit 7", "exit 0")

    assert failed == (False, None, TAKEN, False, False, "out\n")
    assert succeeded == (False, None, TAKEN, False, False, "")


@pytest.mark.parametrize("pidfds", ["with", "without"])
def test_a_thread_that_waits_for_every_child_never_makes_a_failure_a_success(pidfds: str) -> None:
    # Who comes first is chance: the true status or none are right, anything else is wrong.
    seen = run_reaped_by("thread", pidfds, *["exit 7"] * 20)

    assert len(seen) == 20
    assert {(ok, status, error) for ok, status, error, *_ in seen} <= {
        (False, None, TAKEN),
        (False, 7, ""),
    }


@pytest.mark.parametrize("pidfds", ["with", "without"])
@pytest.mark.parametrize("how", ["nobody", "thread"])
def test_a_program_that_hangs_is_killed_though_others_take_its_status(
    how: str, pidfds: str
) -> None:
    (seen,) = run_reaped_by(how, pidfds, "echo $$; exec sleep 1000", deadline_s=0.5)

    ok, status, error, timed_out, left_running, out = seen
    assert (ok, status, error, timed_out, left_running) == (False, None, "", True, False)
    assert not Path(f"/proc/{int(out)}").exists()


@pytest.mark.parametrize("pidfds", ["with", "without"])
async def test_a_status_that_nobody_takes_is_the_true_one(
    monkeypatch: pytest.MonkeyPatch, pidfds: str
) -> None:
    if pidfds == "without":
        monkeypatch.setattr(program, "_open_pidfd", lambda _pid: None)
    commands = ("exit 0", "exit 7", "exit 255", "kill -KILL $$", "kill -TERM $$")

    ended = [await run_program(["sh", "-c", command], deadline_s=60) for command in commands]

    assert [seen.returncode for seen in ended] == [0, 7, 255, -9, -15]
    assert {seen.error for seen in ended} == {""}
    assert no_child_is_left()


async def test_without_capture_both_streams_are_the_null_device(tmp_path: Path) -> None:
    look = "seen=$(readlink /proc/$$/fd/1 /proc/$$/fd/2)"
    script = f'{look}; echo "$seen" > {tmp_path}/streams; echo out; echo err >&2'

    seen = await run_program(["sh", "-c", script], deadline_s=60, capture=False)

    assert (seen.ok, seen.stdout, seen.stderr) == (True, b"", b"")
    assert (tmp_path / "streams").read_text() == "/dev/null\n" * 2
