"""The walled launcher: VMMs as processes of the worker's warden, each in a jail of its own."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from pathlib import Path
from typing import IO

from pytest_vmsandbox.deadline import Deadline
from pytest_vmsandbox.errors import HostUnfit
from pytest_vmsandbox.host.socket_auth import verify_machine_peer
from pytest_vmsandbox.jail.vmm_view import ROOM, plan_vmm_view
from pytest_vmsandbox.linux import ProcessIdentity
from pytest_vmsandbox.vmm.launch import Handed, LaunchRequest, Memory, VmmView
from pytest_vmsandbox.warden.client import JailedProcess, Warden
from pytest_vmsandbox.warden.requests import Launch, Limits, Network, Who

# How often a VMM that does not listen yet is tried again; it takes some 20 ms to get there.
RETRY_S = 0.003

# Descriptors 0, 1 and 2 come first.
FIRST_FILE = 3

# Threads of QEMU: up to 255 processors, I/O, and a pool of at most 64 workers.
PROCESSES = 512

# Descriptors that are sent and not yet received count for all processes of a user, and who may
# open fewer can't send any then (unix(7), ETOOMANYREFS). A VMM in our own name has to stay below
# the 1024 that we may open as a rule: with what it has in flight it can pass its limit by 253.
OPEN_FILES = 640

# What a VMM may write to any one file: its log is the only one that is the host's.
FILE_BYTES = 64 << 20

# Nobody listens; or the VMM has ended, of which whoever watches it tells more.
_NOT_YET = (FileNotFoundError, ConnectionRefusedError, BlockingIOError, ProcessLookupError)

# A 64-bit QEMU reserves address space that it never uses: 3 GiB for arenas and caches, seen.
RESERVED_BYTES = 6 << 30


class WalledProcess:
    """A VMM behind walls (see `VmmProcess`)."""

    def __init__(self, process: JailedProcess) -> None:
        self._process = process
        self.pid = process.pid
        self.uid = process.uid
        self.pidfd: int | None = process.pidfd
        self.identity: ProcessIdentity = process.identity

    async def wait(self) -> int:
        """Its exit status once it has ended; negative for a signal."""
        return await self._process.wait()

    def kill(self) -> None:
        """End it at once (SIGKILL); harmless when it has ended already."""
        self._process.kill()

    async def connect(self, name: str, *, deadline: Deadline) -> socket.socket:
        """A connection to the socket called `name` in its directory (see `VmmProcess`)."""
        while True:
            try:
                sock = await self._process.connect(name)
            except _NOT_YET as error:
                if deadline.passed:
                    raise deadline.timed_out(f"the VMM listening on {name}", str(error)) from None
                await asyncio.sleep(min(RETRY_S, deadline.left_s))
            else:
                return self._verified(sock, name)

    async def read_file(self, name: str) -> bytes:
        """The file called `name` in its directory."""
        with await self._process.open_file(name) as file:
            return await asyncio.to_thread(file.read)

    def _verified(self, sock: socket.socket, name: str) -> socket.socket:
        try:
            verify_machine_peer(
                sock,
                uid=self.uid,
                identity=self.identity,
                pidfd=self.pidfd,
                socket_path=str(ROOM / name),
            )
        except BaseException:
            sock.close()
            raise
        return sock


class WalledLauncher:
    """Starts VMMs through a warden; each sees its own directory and nothing of the others."""

    def __init__(self, warden: Warden) -> None:
        self._warden = warden

    def view(self, *, directory: Path, files: Sequence[Handed]) -> VmmView:  # noqa: ARG002 - not shown
        """Its directory exists in its own view only; files come as descriptors."""
        return VmmView(
            directory=Path(ROOM),
            files={
                path: Path(f"/proc/self/fd/{number}")
                for number, path in enumerate(files, start=FIRST_FILE)
            },
        )

    @asynccontextmanager
    async def launch(self, request: LaunchRequest) -> AsyncIterator[WalledProcess]:
        """Start it; leaving the context kills it.

        Raises HostUnfit when its program can't be started.
        """
        with ExitStack() as given:
            files = [given.enter_context(file) for file in _streams(request)]
            descriptors = [file.fileno() for file in files]
            for handed in request.files:
                if isinstance(handed, Memory):
                    descriptors.append(handed.descriptor)
                else:
                    descriptors.append(given.enter_context(handed.open("rb")).fileno())
            async with self._start(request, descriptors) as process:
                given.close()
                yield WalledProcess(process)

    @asynccontextmanager
    async def _start(
        self, request: LaunchRequest, descriptors: Sequence[int]
    ) -> AsyncIterator[JailedProcess]:
        async with AsyncExitStack() as stack:
            try:
                started = self._warden.launch(_order(request), descriptors)
                process = await stack.enter_async_context(started)
            except OSError as error:
                raise HostUnfit(
                    "VMS-WALLS-UNUSABLE",
                    "a VMM that starts behind walls",
                    str(error),
                    "vmsandbox doctor; --vm-tier=bare does without walls",
                ) from error
            yield process


def _streams(request: LaunchRequest) -> Iterator[IO[bytes]]:
    for path, mode in ((Path(os.devnull), "rb"), (request.log, "ab"), (request.log, "ab")):
        yield path.open(mode)


def _order(request: LaunchRequest) -> Launch:
    program = request.argv[0]
    memory_bytes = None if request.memory_mib is None else request.memory_mib << 20
    return Launch(
        who=Who.VMM,
        name=request.id,
        argv=tuple(request.argv),
        env={"PATH": "/usr/bin:/bin", "TMPDIR": str(ROOM)},
        cwd=str(ROOM),
        steps=plan_vmm_view(Path(program), kvm=request.kvm),
        network=Network.ISOLATED,
        limits=Limits(
            address_bytes=None if memory_bytes is None else memory_bytes + RESERVED_BYTES,
            memory_bytes=memory_bytes,
            processes=PROCESSES,
            file_bytes=FILE_BYTES,
            open_files=OPEN_FILES,
        ),
        files=tuple(
            None if isinstance(file, Memory) else str(file.absolute()) for file in request.files
        ),
        room=str(ROOM),
        group=request.id,
    )
