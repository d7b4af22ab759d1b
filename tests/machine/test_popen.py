"""`vm.popen`: processes with streams, for both faces."""

from __future__ import annotations

import signal

import pytest

from pytest_vmsandbox import AsyncMachine, Machine, TimedOut


def test_a_conversation_line_by_line(vm_module: Machine) -> None:
    process = vm_module.popen('while read line; do echo "<$line>"; done')
    assert process.stdin is not None

    process.stdin.write("one\n")
    assert process.stdout.readline() == "<one>\n"
    process.stdin.write("two\nthree\n")
    assert process.stdout.readline() == "<two>\n"
    process.stdin.close()

    assert process.stdout.read() == "<three>\n"
    assert process.wait(timeout=10) == 0


def test_streams_are_bytes_without_an_encoding(vm_module: Machine) -> None:
    process = vm_module.popen(["cat"], encoding=None)
    assert process.stdin is not None

    process.stdin.write(b"\xff\x00\n")
    process.stdin.close()

    assert process.stdout.read() == b"\xff\x00\n"


def test_lines_can_be_iterated(vm_module: Machine) -> None:
    process = vm_module.popen("seq 5")

    assert list(process.stdout) == ["1\n", "2\n", "3\n", "4\n", "5\n"]


def test_poll_does_not_wait_and_signals_arrive(vm_module: Machine) -> None:
    process = vm_module.popen(
        "trap 'echo stopped; exit 5' TERM; echo ready; while :; do sleep 0.1; done"
    )
    assert process.stdout.readline() == "ready\n"

    assert process.poll() is None
    process.send_signal(signal.SIGTERM)

    assert process.wait(timeout=10) == 5
    assert process.returncode == 5
    assert process.stdout.read() == "stopped\n"


def test_a_signal_reaches_the_whole_group(vm_module: Machine) -> None:
    process = vm_module.popen("sleep 5151 & sleep 5151 & echo up; wait")
    process.stdout.readline()
    process.kill()

    assert process.wait(timeout=10) == -signal.SIGKILL
    assert "5151" not in vm_module.run("ps").stdout


def test_waiting_too_long_leaves_the_process_running(vm_module: Machine) -> None:
    process = vm_module.popen("sleep 30")

    with pytest.raises(TimedOut, match="the end of process"):
        process.wait(timeout=0.2)
    assert process.poll() is None
    process.kill()


def test_a_reader_that_leaves_ends_the_writer(vm_module: Machine) -> None:
    process = vm_module.popen("yes")
    process.stdout.readline()
    process.stdout.close()

    assert process.wait(timeout=20) in (-signal.SIGPIPE, 1)


def test_a_terminal_is_given_where_asked_for(vm_module: Machine) -> None:
    process = vm_module.popen("tty; stty size", pty=True, rows=33, columns=99)

    lines = process.stdout.read().replace("\r", "").splitlines()
    assert lines[0].startswith("/dev/pts/")
    assert lines[1] == "33 99"


async def test_the_async_face_talks_alike(async_vm: AsyncMachine) -> None:
    process = await async_vm.popen('read line; echo "<$line>"; echo oops >&2; exit 3')
    assert process.stdin is not None
    assert process.stderr is not None

    await process.stdin.write("hello\n")
    assert await process.stdout.read() == "<hello>\n"
    assert await process.stderr.read() == "oops\n"
    assert await process.wait(timeout=10) == 3

    lines = [line async for line in (await async_vm.popen("seq 3")).stdout]
    assert lines == ["1\n", "2\n", "3\n"]
