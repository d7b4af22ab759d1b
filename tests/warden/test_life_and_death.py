"""A warden's end, whoever dies first: nothing that it launched outlives it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from pytest_vmsandbox.host.facts import Tier
from pytest_vmsandbox.linux import OwnedFd, pidfd_is_alive, prctl_set_child_subreaper
from pytest_vmsandbox.warden.client import Warden, open_warden
from pytest_vmsandbox.warden.requests import Who
from tests.children import new_children, no_child_is_left, remember_children
from tests.people import CHECKOUT
from tests.warden.conftest import (
    SLEEP,
    RawLine,
    Streams,
    children_of,
    inner_of,
    order,
    until,
)
from tests.warden.test_requests import form_of

# A client of its own, which can be killed: it opens a warden, launches, and tells who is there.
CLIENT = """
import asyncio, json, os, sys
from pathlib import Path
from pytest_vmsandbox.host.facts import Tier
from pytest_vmsandbox.warden.client import open_warden
from pytest_vmsandbox.warden.requests import Who
from tests.warden.conftest import SLEEP, inner_of, order

async def main():
    null = os.open(os.devnull, os.O_RDWR)
    async with open_warden(Tier(sys.argv[1]), log=Path(sys.argv[2])) as warden:
        async with (
            warden.launch(order(SLEEP, "600"), [null] * 3) as one,
            warden.launch(order(SLEEP, "600", who=Who.OWNER), [null] * 3) as two,
        ):
            print(json.dumps([warden.pid, inner_of(warden), one.pid, two.pid]), flush=True)
            await asyncio.sleep(600)

asyncio.run(main())
"""


@dataclass(frozen=True, slots=True)
class Household:
    """All that belong together, each held by a pidfd: they are looked at when they are gone."""

    outer: int
    inner: int
    pidfds: list[OwnedFd]

    def all_gone(self) -> bool:
        return not any(map(pidfd_is_alive, self.pidfds))


@contextmanager
def held(outer: int, inner: int, *others: int) -> Iterator[Household]:
    with ExitStack() as undo:
        pids = (outer, inner, *others)
        pidfds = [undo.enter_context(OwnedFd(os.pidfd_open(pid))) for pid in pids]
        yield Household(outer, inner, pidfds)


@asynccontextmanager
async def household(tier: Tier, folder: Path) -> AsyncIterator[tuple[Warden, Household]]:
    """A warden with a VMM and a command, and a grandchild of each."""
    async with AsyncExitStack() as stack:
        warden = await stack.enter_async_context(open_warden(tier, log=folder / "log"))
        streams = stack.enter_context(Streams())
        pids = []
        for who in Who:
            ordered = order("/usr/bin/sh", "-c", "sleep 600 & sleep 600", who=who)
            started = warden.launch(ordered, streams.descriptors)
            process = await stack.enter_async_context(started)
            await until(lambda pid=process.pid: len(descendants_of(pid)) >= 2)  # type: ignore[misc]  # mypy: a default in a lambda
            pids += [process.pid, *descendants_of(process.pid)]
        inner = inner_of(warden)
        with held(warden.pid, inner, *pids) as all_of_them:
            yield warden, all_of_them


def descendants_of(pid: int) -> list[int]:
    found = [pid]
    for one in found:
        with suppress(FileNotFoundError, ProcessLookupError):
            found += children_of(one)
    return found[1:]


def kill(pid: int, number: signal.Signals = signal.SIGKILL) -> None:
    try:
        os.kill(pid, number)
    except PermissionError:
        pytest.skip("takes a user who may signal the warden")


@pytest.fixture
def adopted() -> Iterator[Callable[[], bool]]:
    """Whoever is orphaned becomes our child: pid 1 of a container may reap nobody."""
    prctl_set_child_subreaper()
    remember_children()

    def all_reaped() -> bool:
        for pid in new_children():
            with suppress(ChildProcessError):  # reaped meanwhile by whoever started it
                os.waitpid(pid, os.WNOHANG)
        return no_child_is_left()

    try:
        yield all_reaped
    finally:
        prctl_set_child_subreaper(enabled=False)


async def test_all_end_when_the_line_is_let_go(tier: Tier, tmp_path: Path) -> None:
    async with AsyncExitStack() as stack:
        warden, all_of_them = await stack.enter_async_context(household(tier, tmp_path))
        assert len(all_of_them.pidfds) >= 7
        warden._line.shutdown(socket.SHUT_RDWR)

        await until(all_of_them.all_gone)
    assert (tmp_path / "log").read_text() == ""


async def test_all_end_with_the_outer_half(tier: Tier, tmp_path: Path) -> None:
    async with household(tier, tmp_path) as (_, all_of_them):
        kill(all_of_them.outer)

        await until(all_of_them.all_gone)


async def test_all_end_with_the_inner_half(tier: Tier, tmp_path: Path) -> None:
    async with household(tier, tmp_path) as (_, all_of_them):
        kill(all_of_them.inner)

        await until(all_of_them.all_gone)


async def test_all_end_with_the_outer_half_while_the_inner_one_is_stopped(
    tier: Tier, tmp_path: Path
) -> None:
    async with household(tier, tmp_path) as (_, all_of_them):
        kill(all_of_them.inner, signal.SIGSTOP)
        kill(all_of_them.outer)

        await until(all_of_them.all_gone)


async def test_what_was_launched_can_not_end_the_warden(tier: Tier, tmp_path: Path) -> None:
    async with household(tier, tmp_path) as (_, all_of_them):
        for pidfd in all_of_them.pidfds[2:]:
            with suppress(PermissionError, ProcessLookupError):
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)

        assert pidfd_is_alive(all_of_them.pidfds[0])
        assert pidfd_is_alive(all_of_them.pidfds[1])


@pytest.mark.parametrize("inner_half", ["running", "stopped"])
async def test_all_end_with_a_client_that_is_killed(
    tier: Tier, tmp_path: Path, adopted: Callable[[], bool], inner_half: str
) -> None:
    argv = [sys.executable, "-c", CLIENT, tier, str(tmp_path / "log")]
    client = subprocess.Popen(argv, stdout=subprocess.PIPE, cwd=CHECKOUT)
    assert client.stdout
    try:
        with client.stdout, held(*json.loads(client.stdout.readline())) as all_of_them:
            if inner_half == "stopped":
                if tier in (Tier.SUDO, Tier.QEMU_VM):
                    pytest.skip("sudo stays between: the reaper ends those, by the ledger")
                kill(all_of_them.inner, signal.SIGSTOP)
            client.kill()
            client.wait()

            await until(all_of_them.all_gone)
    finally:
        client.kill()
        client.wait()
        await until(adopted)


def test_a_client_that_never_reads_is_outlived_by_nobody(raw: RawLine) -> None:
    with OwnedFd(os.open(os.devnull, os.O_RDWR)) as null:
        raw.send({"number": 1, **form_of(order(SLEEP, "600"))}, [null] * 3)
    raw.receive()
    inner = inner_of(raw)
    with held(raw.pid, inner, *descendants_of(inner)) as all_of_them:
        raw.line.settimeout(1)
        with suppress(TimeoutError):  # it has stopped reading: its answers are not read either
            while True:
                raw.send({"number": 1})
        raw.close()

        assert all_of_them.all_gone()


def test_an_empty_packet_is_the_end(raw: RawLine) -> None:
    raw.line.send(b"")

    assert raw.child.wait(30) == 0


def test_what_was_asked_for_before_the_end_is_not_left_running(raw: RawLine) -> None:
    inner = inner_of(raw)
    with held(raw.pid, inner) as both, OwnedFd(os.open(os.devnull, os.O_RDWR)) as null:
        for number in range(5):
            raw.send({"number": number, **form_of(order(SLEEP, "600"))}, [null] * 3)
        raw.close()

        assert both.all_gone()
