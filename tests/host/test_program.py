"""Programs that run once: real children, real deadlines, nothing left running."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pytest_vmsandbox.host import program
from pytest_vmsandbox.host.program import OUTPUT_LIMIT_BYTES, Outcome, run_program
from tests.children import no_child_is_left

NEVER_S = 60.0


def is_running(pid: int) -> bool:
    """Whether the process is there and not a zombie."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat.rpartition(")")[2].split()[0] not in {"Z", "X"}


async def wait_gone(pid: int) -> bool:
    """Whether it goes within the two seconds that init may take to reap an orphan."""
    for _ in range(200):
        if not is_running(pid):
            return True
        await asyncio.sleep(0.01)
    return False


def text_so_far(path: Path) -> str:
    """What was written, once its line has ended."""
    text = path.read_text() if path.exists() else ""
    return text if text.endswith("\n") else ""


async def wait_text(path: Path) -> str:
    for _ in range(1000):
        if text := text_so_far(path):
            return text
        await asyncio.sleep(0.01)
    raise AssertionError(f"{path} was never written")


def open_descriptors() -> list[str]:
    return sorted(entry.name for entry in Path("/proc/self/fd").iterdir())


async def test_a_program_that_succeeds_gives_its_output() -> None:
    seen = await run_program(["sh", "-c", "echo out; echo err >&2"], deadline_s=NEVER_S)

    assert seen.ok
    assert (seen.returncode, seen.stdout, seen.stderr) == (0, b"out\n", b"err\n")
    assert not seen.timed_out
    assert not seen.left_running


async def test_a_program_that_fails_gives_its_status_and_its_complaint() -> None:
    seen = await run_program(["sh", "-c", "echo no way >&2; exit 3"], deadline_s=NEVER_S)

    assert not seen.ok
    assert seen.returncode == 3
    assert str(seen).endswith("exit status 3: no way")


async def test_a_program_that_dies_of_a_signal_shows_it_as_subprocess_does() -> None:
    seen = await run_program(["sh", "-c", "kill -TERM $$"], deadline_s=NEVER_S)

    assert seen.returncode == -15


@pytest.mark.parametrize("argv", [["no-such-program-here"], ["/"], ["true", "a\0b"]])
async def test_a_program_that_cannot_start_is_an_outcome_with_the_reason(argv: list[str]) -> None:
    seen = await run_program(argv, deadline_s=NEVER_S)

    assert not seen.ok
    assert seen.returncode is None
    assert seen.error
    assert seen.error in str(seen)


async def test_a_program_that_hangs_is_killed_at_the_deadline(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    began = time.monotonic()

    seen = await run_program(["sh", "-c", f"echo $$ > {pid_file}; exec sleep 1000"], deadline_s=0.3)

    assert seen.timed_out
    assert seen.returncode is None
    assert time.monotonic() - began < 20
    assert not is_running(int(pid_file.read_text()))
    assert no_child_is_left()


async def test_what_it_started_in_the_background_dies_with_it_at_the_deadline(
    tmp_path: Path,
) -> None:
    pid_file = tmp_path / "pid"
    script = f"sleep 1000 & echo $! > {pid_file}; wait"

    seen = await run_program(["sh", "-c", script], deadline_s=0.3)

    assert seen.timed_out
    assert await wait_gone(int(pid_file.read_text()))


async def test_what_it_left_in_the_background_neither_delays_the_answer_nor_outlives_it(
    tmp_path: Path,
) -> None:
    pid_file = tmp_path / "pid"
    script = f"sleep 1000 & echo $! > {pid_file}; echo done"

    seen = await run_program(["sh", "-c", script], deadline_s=NEVER_S)

    assert seen.ok
    assert seen.stdout == b"done\n"
    assert await wait_gone(int(pid_file.read_text()))


async def test_a_cancelled_caller_leaves_no_child(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    script = f"echo $$ > {pid_file}; exec sleep 1000"
    task = asyncio.create_task(run_program(["sh", "-c", script], deadline_s=NEVER_S))
    pid = int(await wait_text(pid_file))

    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task

    assert not is_running(pid)
    assert no_child_is_left()


async def test_a_program_without_end_of_output_costs_only_the_limit() -> None:
    seen = await run_program(["sh", "-c", "yes | head -c 4000000"], deadline_s=NEVER_S)

    assert seen.ok
    assert len(seen.stdout) == OUTPUT_LIMIT_BYTES


async def test_stdin_is_empty_unless_it_is_given(tmp_path: Path) -> None:
    given = tmp_path / "given"
    given.write_text("hello")

    empty = await run_program(["cat"], deadline_s=NEVER_S)
    with given.open("rb") as stream:
        filled = await run_program(["cat"], deadline_s=NEVER_S, stdin=stream)

    assert (empty.text, filled.text) == ("", "hello")


async def test_the_environment_is_ours_or_the_given_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VMSANDBOX_TEST_WORD", "ours")

    ours = await run_program(["sh", "-c", "echo $VMSANDBOX_TEST_WORD"], deadline_s=NEVER_S)
    given = await run_program(
        ["/bin/sh", "-c", "echo $VMSANDBOX_TEST_WORD"],
        deadline_s=NEVER_S,
        env={"VMSANDBOX_TEST_WORD": "given"},
    )

    assert (ours.text, given.text) == ("ours\n", "given\n")


async def test_it_has_a_session_of_its_own_unless_told_otherwise() -> None:
    script = "import os; print(os.getsid(0) == os.getpid())"

    own = await run_program([sys.executable, "-c", script], deadline_s=NEVER_S)
    shared = await run_program(
        [sys.executable, "-c", script], deadline_s=NEVER_S, start_new_session=False
    )

    assert (own.text, shared.text) == ("True\n", "False\n")


async def test_without_a_session_of_its_own_only_the_program_is_killed() -> None:
    # Were the group killed, pytest would be in it.
    seen = await run_program(["sleep", "1000"], deadline_s=0.1, start_new_session=False)

    assert seen.timed_out
    assert no_child_is_left()


async def test_a_kernel_without_pidfds_serves_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program, "_open_pidfd", lambda _pid: None)

    quick = await run_program(["sh", "-c", "echo out; exit 4"], deadline_s=NEVER_S)
    stuck = await run_program(["sleep", "1000"], deadline_s=0.1)

    assert (quick.returncode, quick.stdout) == (4, b"out\n")
    assert stuck.timed_out
    assert no_child_is_left()


async def test_no_descriptor_is_left_open() -> None:
    await run_program(["true"], deadline_s=NEVER_S)
    before = open_descriptors()

    for _ in range(20):
        await run_program(["true"], deadline_s=NEVER_S)
        await run_program(["no-such-program-here"], deadline_s=NEVER_S)

    assert open_descriptors() == before


@pytest.mark.skipif(os.getuid() != 0, reason="takes root: it gives up the right to kill its child")
def test_a_program_of_another_user_that_may_not_be_killed_is_reported() -> None:
    # sudo is the case: once it has become root, its caller may not signal it.
    script = """
import asyncio, os, subprocess
from pytest_vmsandbox.host import program
async def main():
    class AsRoot(subprocess.Popen):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            os.setresuid(65534, 65534, 0)
    program.subprocess.Popen = AsRoot
    seen = await program.run_program(["sleep", "1000"], deadline_s=0.2)
    print(seen.timed_out, seen.left_running, seen)
    os.setresuid(0, 0, 0)
    os.killpg(int(open("/proc/thread-self/children").read()), 9)
    os.wait()
asyncio.run(main())
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=Path(program.__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )

    assert done.stdout == "True True sleep 1000: timed out, could not be killed\n", done.stderr


def test_an_outcome_without_a_status_is_not_ok() -> None:
    assert not Outcome(argv=("x",)).ok
