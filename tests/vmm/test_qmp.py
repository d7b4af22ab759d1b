"""QMP with a real QEMU that has no machine in it: quick to start, and quick to end."""

from __future__ import annotations

import asyncio
import fcntl
import os
import signal
import socket
import sys
import tempfile
import termios
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from pytest_vmsandbox.deadline import Deadline
from pytest_vmsandbox.errors import OutcomeUnknown, RequestInvalid, TimedOut
from pytest_vmsandbox.vmm.bare import BareLauncher, BareProcess
from pytest_vmsandbox.vmm.launch import LaunchRequest
from pytest_vmsandbox.vmm.qmp import QmpEvent, open_qmp

QEMU = "qemu-system-x86_64"


@pytest.fixture
async def qemu() -> AsyncIterator[tuple[BareProcess, socket.socket]]:
    """A QEMU with no machine, and a connection to its control socket."""
    with tempfile.TemporaryDirectory(prefix="vmsb-") as short:
        path = Path(short) / "qmp.sock"
        request = LaunchRequest(
            id="m1",
            argv=[QEMU, "-M", "none", "-nodefaults", "-display", "none",
                  "-qmp", f"unix:{path},server=on,wait=on"],
            directory=Path(short),
            log=Path(short) / "log",
        )  # fmt: skip
        async with BareLauncher().launch(request) as process:
            yield process, await process.connect(path.name, deadline=_soon())


def _soon(seconds: float = 20) -> Deadline:
    return Deadline.after(seconds=seconds)


async def test_commands_are_answered_and_the_version_is_known(
    qemu: tuple[BareProcess, socket.socket],
) -> None:
    async with open_qmp(qemu[1], on_event=lambda event: None, deadline=_soon()) as session:
        status = await session.execute("query-status", deadline=_soon())

        assert isinstance(status, dict)
        assert status["status"] == "running"
        assert len(session.version.split(".")) == 3


async def test_a_refused_command_is_named_with_its_arguments(
    qemu: tuple[BareProcess, socket.socket],
) -> None:
    async with open_qmp(qemu[1], on_event=lambda event: None, deadline=_soon()) as session:
        with pytest.raises(RequestInvalid, match="QMP device_del") as refused:
            await session.execute("device_del", {"id": "nobody"}, deadline=_soon())

    assert "nobody" in str(refused.value)


async def test_events_are_passed_on(qemu: tuple[BareProcess, socket.socket]) -> None:
    events: list[QmpEvent] = []
    async with open_qmp(qemu[1], on_event=events.append, deadline=_soon()) as session:
        await session.execute("stop", deadline=_soon())
        await session.execute("cont", deadline=_soon())
        while len(events) < 2:
            await asyncio.sleep(0.01)

    assert [event.name for event in events] == ["STOP", "RESUME"]


async def test_a_qemu_that_dies_leaves_the_outcome_unknown(
    qemu: tuple[BareProcess, socket.socket],
) -> None:
    process, sock = qemu
    async with open_qmp(sock, on_event=lambda event: None, deadline=_soon()) as session:
        os.kill(process.pid, signal.SIGSTOP)
        asked = asyncio.create_task(session.execute("query-status", deadline=_soon()))
        await asyncio.sleep(0.05)
        process.kill()

        with pytest.raises(OutcomeUnknown, match="query-status"):
            await asked


async def test_a_qemu_that_does_not_answer_times_out(
    qemu: tuple[BareProcess, socket.socket],
) -> None:
    process, sock = qemu
    async with open_qmp(sock, on_event=lambda event: None, deadline=_soon()) as session:
        os.kill(process.pid, signal.SIGSTOP)

        with pytest.raises(TimedOut, match="QEMU's answer to query-status"):
            await session.execute("query-status", deadline=_soon(0.2))
        os.kill(process.pid, signal.SIGCONT)


async def test_nothing_is_sent_while_qemu_takes_a_descriptor(
    qemu: tuple[BareProcess, socket.socket],
) -> None:
    process, sock = qemu
    async with open_qmp(sock, on_event=lambda event: None, deadline=_soon()) as session:
        os.kill(process.pid, signal.SIGSTOP)
        with Path("/dev/null").open() as file:
            handed = asyncio.create_task(session.send_file("file", file.fileno(), deadline=_soon()))
            await asyncio.sleep(0.1)
            sent = _not_read_by_the_other_side(sock)
            asked = asyncio.create_task(session.execute("query-status", deadline=_soon()))
            await asyncio.sleep(0.1)

            assert _not_read_by_the_other_side(sock) == sent > 0
            os.kill(process.pid, signal.SIGCONT)
            await handed
            assert await asked


def _not_read_by_the_other_side(sock: socket.socket) -> int:
    # unix(7), SIOCOUTQ, which termios calls TIOCOUTQ
    packed = fcntl.ioctl(sock.fileno(), termios.TIOCOUTQ, bytes(4))
    return int.from_bytes(packed, sys.byteorder)


async def test_who_greets_with_nonsense_is_refused() -> None:
    ours, theirs = socket.socketpair()
    ours.settimeout(0)
    theirs.sendall(b'{"hello": "I am no QEMU"}\n')

    with pytest.raises(OutcomeUnknown, match="QMP negotiation"):
        async with open_qmp(ours, on_event=lambda event: None, deadline=_soon()):
            pass
    theirs.close()


async def test_who_never_greets_times_out() -> None:
    ours, theirs = socket.socketpair()
    ours.settimeout(0)

    with pytest.raises(TimedOut, match="greeting"):
        async with open_qmp(ours, on_event=lambda event: None, deadline=_soon(0.2)):
            pass
    theirs.close()
