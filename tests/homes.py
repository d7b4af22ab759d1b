"""A network namespace for a run of pytest, as if it were the host's, and a world around it.

Nobody else changes anything there, unlike in the host's own.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import pytest

from pytest_vmsandbox.linux import CloneFlags, setns

T = TypeVar("T")

# Addresses for documentation (RFC 5737, RFC 3849).
WORLD, WORLD6 = "203.0.113.1", "2001:db8::1"
HOME, HOME6 = "203.0.113.2", "2001:db8::2"


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkNamespace:
    """A network namespace: programs and functions can be run in it."""

    pid: int
    _thread: ThreadPoolExecutor

    def argv(self, *argv: str | Path) -> list[str]:
        """The command line that runs `argv` there."""
        if self.pid == os.getpid():
            return list(map(str, argv))
        return ["nsenter", f"--net=/proc/{self.pid}/ns/net", "--", *map(str, argv)]

    def run(self, *argv: str | Path) -> None:
        """Run a program there that must succeed."""
        subprocess.run(self.argv(*argv), check=True, capture_output=True, timeout=60)

    def do(self, work: Callable[[], T]) -> T:
        """What `work` returns, called in a thread that is in there; sockets stay there."""
        return self._thread.submit(work).result()


@dataclass(frozen=True, slots=True, kw_only=True)
class Home:
    """Where pytest is to run, and what is outside."""

    inside: NetworkNamespace
    world: NetworkNamespace


@pytest.fixture
def home() -> Iterator[Home]:
    """A home with a world around it, which can be reached from there."""
    if os.getuid() != 0:
        pytest.skip("takes root: a network namespace with a world around it")
    with _opened() as inside, _opened() as world:
        for place in (inside, world):
            place.do(_settle_at_once)
        ends = ("ip", "link", "add", "wan", "type", "veth", "peer", "home")
        inside.run(*ends, "netns", str(world.pid))
        for place, end, addresses in (
            (inside, "wan", (f"{HOME}/24", f"{HOME6}/64")),
            (world, "home", (f"{WORLD}/24", f"{WORLD6}/64")),
        ):
            for address in addresses:
                nodad = ("nodad",) if ":" in address else ()
                place.run("ip", "address", "add", address, "dev", end, *nodad)
            for each in ("lo", end):
                place.run("ip", "link", "set", each, "up")
        for family, gateway in (("-4", WORLD), ("-6", WORLD6)):
            inside.run("ip", family, "route", "add", "default", "via", gateway)
        yield Home(inside=inside, world=world)


@pytest.fixture
def own_namespace() -> Iterator[NetworkNamespace]:
    """The one that this test runs in."""
    with ThreadPoolExecutor(1) as thread:
        yield NetworkNamespace(pid=os.getpid(), _thread=thread)


@contextmanager
def _opened() -> Iterator[NetworkNamespace]:
    with ExitStack() as undo:
        holder = subprocess.Popen(
            ["unshare", "--net", "--", "sh", "-c", "echo in && exec sleep 1000"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
        )
        undo.callback(holder.wait)
        undo.callback(holder.kill)
        assert holder.stdout is not None
        undo.callback(holder.stdout.close)
        assert holder.stdout.readline() == b"in\n"
        thread = undo.enter_context(ThreadPoolExecutor(1, initializer=_enter, initargs=(holder,)))
        yield NetworkNamespace(pid=holder.pid, _thread=thread)


def _settle_at_once() -> None:
    """Let addresses be what they are from the start (ip-sysctl, accept_dad)."""
    Path("/proc/sys/net/ipv6/conf/default/accept_dad").write_text("0")


def _enter(holder: subprocess.Popen[bytes]) -> None:
    namespace = os.open(f"/proc/{holder.pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        setns(namespace, CloneFlags.NEWNET)
    finally:
        os.close(namespace)
