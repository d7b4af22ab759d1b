"""The launcher: what starts a VMM, behind whatever walls it stands for."""

from __future__ import annotations

import socket
from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeAlias

from pytest_vmsandbox.deadline import Deadline
from pytest_vmsandbox.linux import ProcessIdentity


@dataclass(frozen=True, slots=True)
class Memory:
    """A file in memory that is handed over as it is; the descriptor stays the caller's."""

    descriptor: int


@dataclass(frozen=True, slots=True)
class Writable:
    """A file that is handed over open for writing; the descriptor stays the caller's."""

    descriptor: int


@dataclass(frozen=True, slots=True)
class Wire:
    """One end of a wire, a socket or a tap, handed over as it is; it stays the caller's."""

    descriptor: int


Handed: TypeAlias = Path | Memory | Writable | Wire
"""What a VMM is handed: a file that it may read, memory, a file to write to, an end of a wire."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VmmView:
    """How a VMM will see what is handed to it: its own directory, and each file."""

    directory: Path
    files: Mapping[Handed, Path]


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchRequest:
    """A VMM to be started: its `argv`, with paths as it will see them, and what it needs.

    `id` names the machine on this host, `name` for its user; `files` may be read, and nothing of
    the host be written but the VMM's own directory and what is `Writable`; stdout and stderr go
    to `log`, stdin is /dev/null. `memory_mib` is what guest and VMM together may take, `kvm` asks
    for /dev/kvm; `written_bytes` is how long a file it must be able to write.
    """

    id: str
    name: str = ""
    argv: Sequence[str]
    directory: Path
    log: Path
    files: Sequence[Handed] = ()
    memory_mib: int | None = None
    kvm: bool = False
    written_bytes: int = 0


class VmmProcess(Protocol):
    """A VMM that was started, known for good by its pidfd (None where there are none)."""

    pid: int
    uid: int
    pidfd: int | None
    identity: ProcessIdentity

    async def wait(self) -> int:
        """Its exit status once it has ended; negative for a signal."""

    def kill(self) -> None:
        """End it at once (SIGKILL); harmless when it has ended already."""

    async def connect(self, name: str, *, deadline: Deadline) -> socket.socket:
        """A connection to the socket called `name` in its directory, as soon as it listens.

        The other end is proved to be this very process before anything is sent. Raises
        SocketAuthError where it is not, TimedOut when it does not listen by the deadline.
        """

    async def read_file(self, name: str) -> bytes:
        """The file called `name` in its directory, which is removed with the VMM at the latest."""


class Launcher(Protocol):
    """Runs a VMM; leaving the context kills and reaps it.

    A machine that is to end in good order has been shut down before that; what is left then
    is thrown away with its disks, and nothing is quicker or surer than SIGKILL.
    """

    def view(self, *, directory: Path, files: Sequence[Handed]) -> VmmView:
        """How a VMM started with these would see them; `files` in the order of the request."""

    def launch(self, request: LaunchRequest) -> AbstractAsyncContextManager[VmmProcess]:
        """Start it; the process is ours until the context is left."""
