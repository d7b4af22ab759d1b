"""What the tests of this room share: a warden in the tier of whoever runs them, and orders for it.

The tests run as the user that runs them, in that user's best tier; `test_other_users.py` runs them
again as users of the other kinds, and says the tier in the environment.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import pytest

from pytest_vmsandbox.host.facts import Tier
from pytest_vmsandbox.host.way import render_start
from pytest_vmsandbox.jail.vmm_view import ROOM, plan_vmm_view
from pytest_vmsandbox.linux import OwnedFd
from pytest_vmsandbox.warden.bundle import BOOTSTRAP, open_bundle
from pytest_vmsandbox.warden.client import Warden, open_warden
from pytest_vmsandbox.warden.requests import Launch, Limits, Network, Who
from tests.children import no_child_is_left, remember_children

TIER = "VMSANDBOX_TEST_TIER"
PYTHON = Path(sys.executable).resolve()
TRUE = Path("/usr/bin/true")
SLEEP = Path("/usr/bin/sleep")

# Control groups are one for the host: other runs make theirs at the same time.
GROUP = f"test{os.getpid()}"


@pytest.fixture(scope="session")
def tier() -> Tier:
    """In what way wardens are started here."""
    if named := os.environ.get(TIER):
        return Tier(named)
    if sys.platform != "linux":
        pytest.skip("takes namespaces, which only Linux has")
    return Tier.ROOT if os.getuid() == 0 else Tier.USERNS


@pytest.fixture
async def warden(tier: Tier, tmp_path: Path) -> AsyncIterator[Warden]:
    """A real warden; it must end without having said anything."""
    log = tmp_path / "warden.log"
    async with open_warden(tier, log=log) as warden:
        yield warden
    assert log.read_text() == ""


@pytest.fixture(autouse=True)
def _nothing_is_left(open_descriptors: Callable[[], list[str]]) -> Any:
    """No test leaves a child; zombies count."""
    remember_children()
    yield
    assert no_child_is_left()


class RawLine:
    """A warden, and the other end of its line without a client: for what no client would send."""

    def __init__(self, tier: Tier, log: Path) -> None:
        self.line, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.line.settimeout(30)
        with theirs, log.open("wb") as output, OwnedFd(open_bundle()) as bundle:
            socket.send_fds(self.line, [b"\0"], [bundle])
            self.child = subprocess.Popen(
                render_start(tier, "-c", BOOTSTRAP),
                stdin=theirs.fileno(),
                stdout=output,
                stderr=output,
                start_new_session=True,
                cwd="/",
            )
        self.pid = self.child.pid
        self.greeting = self.receive()

    def send(self, form: object, descriptors: Sequence[int] = ()) -> None:
        """One packet: bytes as they are, anything else as JSON."""
        packet = form if isinstance(form, bytes) else json.dumps(form).encode()
        socket.send_fds(self.line, [packet], list(descriptors))

    def receive(self) -> dict[str, Any]:
        """The next answer; what came with it is closed."""
        packet, descriptors, _, _ = socket.recv_fds(self.line, 1 << 18, 4)
        for descriptor in descriptors:
            os.close(descriptor)
        assert packet, "the warden has ended"
        answer: dict[str, Any] = json.loads(packet)
        return answer

    def close(self) -> None:
        """Let go of the line, and wait for the warden's end."""
        self.line.close()
        self.child.wait(30)


@pytest.fixture
def raw(tier: Tier, tmp_path: Path) -> Iterator[RawLine]:
    """The line of a warden; it must end without having said anything."""
    log = tmp_path / "raw.log"
    raw = RawLine(tier, log)
    try:
        yield raw
    finally:
        raw.close()
    assert log.read_text() == ""


def order(*argv: str | Path, **changes: Any) -> Launch:
    """An order to start a program in the view of a VMM, changed where it must be another."""
    words = tuple(map(str, argv))
    given = Launch(
        who=Who.VMM,
        name="m1",
        argv=words,
        env={},
        cwd="/",
        steps=plan_vmm_view(Path(words[0]), kvm=False),
        network=Network.ISOLATED,
        limits=Limits(),
        files=(),
        room=str(ROOM),
        group=None,
    )
    return replace(given, **changes)


def python(script: str, *arguments: str, **changes: Any) -> Launch:
    """An order to run a script."""
    return order(PYTHON, "-I", "-S", "-c", script, *arguments, **changes)


class Streams:
    """Descriptors 0, 1 and 2 of a process: nothing to read, and pipes that are read at its end."""

    def __init__(self) -> None:
        with ExitStack() as undo:
            self.null = undo.enter_context(OwnedFd(os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)))
            self.out, self.out_end = map(OwnedFd, os.pipe2(os.O_CLOEXEC))
            self.err, self.err_end = map(OwnedFd, os.pipe2(os.O_CLOEXEC))
            undo.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for end in (self.null, self.out, self.out_end, self.err, self.err_end):
            end.close()

    @property
    def descriptors(self) -> list[int]:
        return [self.null, self.out_end, self.err_end]

    def text(self) -> tuple[str, str]:
        """What was written, once whoever wrote it has ended."""
        self.out_end.close()
        self.err_end.close()
        return _read(self.out).decode(), _read(self.err).decode()


def _read(pipe: int) -> bytes:
    parts = []
    while part := os.read(pipe, 1 << 16):
        parts.append(part)
    return b"".join(parts)


async def run(warden: Warden, ordered: Launch, files: Sequence[int] = ()) -> tuple[int, str, str]:
    """Run it to its end: its exit status and what it wrote."""
    with Streams() as streams:
        async with warden.launch(ordered, [*streams.descriptors, *files]) as process:
            async with asyncio.timeout(30):
                returncode = await process.wait()
        return (returncode, *streams.text())


async def see(warden: Warden, ordered: Launch, files: Sequence[int] = ()) -> Any:
    """What a script that prints JSON has to say; it must succeed."""
    returncode, out, err = await run(warden, ordered, files)
    assert (returncode, err) == (0, "")
    return json.loads(out)


async def until(condition: Callable[[], object]) -> None:
    """Return once it holds."""
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.01)


def children_of(pid: int) -> list[int]:
    """Its children, zombies included."""
    lists = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for path in lists for child in path.read_text().split()]


def inner_of(warden: Warden | RawLine) -> int:
    """The warden's inner half, which is pid 1 of a namespace; a sudo lies above it."""
    found = [warden.pid]
    for pid in found:
        status = Path(f"/proc/{pid}/status").read_text()
        (numbers,) = (line.split() for line in status.splitlines() if line.startswith("NSpid:"))
        if numbers[-1] == "1" and len(numbers) > len(_own_numbers()):
            return pid
        found += children_of(pid)
    raise AssertionError(f"no inner half below {warden.pid}")


def _own_numbers() -> list[str]:
    status = Path("/proc/self/status").read_text()
    (numbers,) = (line.split() for line in status.splitlines() if line.startswith("NSpid:"))
    return numbers
