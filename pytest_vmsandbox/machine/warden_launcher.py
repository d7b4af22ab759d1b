"""The warden launcher: VMMs as processes of a worker's warden, each in a jail of its own."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from typing import IO, Self

from pytest_vmsandbox.deadline import Deadline
from pytest_vmsandbox.errors import BootFailed, HostUnfit, RequestInvalid, VmSandboxError
from pytest_vmsandbox.host.socket_auth import verify_machine_peer
from pytest_vmsandbox.jail.vmm_view import ROOM, plan_vmm_view
from pytest_vmsandbox.lease.entries import CGROUP_PREFIX, CgroupEntry
from pytest_vmsandbox.lease.ledger import Ledger
from pytest_vmsandbox.linux import ProcessIdentity
from pytest_vmsandbox.vmm.launch import Handed, LaunchRequest, VmmView
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

# What a VMM may write to any one file, unless a disk is longer: of the host's that is its log.
FILE_BYTES = 64 << 20

# Nobody listens; or the VMM has ended, of which whoever watches it tells more.
_NOT_YET = (FileNotFoundError, ConnectionRefusedError, BlockingIOError, ProcessLookupError)

# A 64-bit QEMU reserves address space that it never uses: 3 GiB for arenas and caches, seen.
RESERVED_BYTES = 6 << 30


# What the kernel answers where it does not let us build walls, or start this program.
_UNFIT = (
    *(errno.EPERM, errno.EACCES, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL),
    *(errno.ENOENT, errno.ENOTDIR, errno.ENOEXEC, errno.EROFS),
)


class WardenProcess:
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


class WardenLauncher:
    """Starts VMMs through a warden; each sees its own directory and nothing of the others.

    `find_warden` gives the warden, another one once that has died. What it makes on the host for a
    VMM stands in `ledger` first, and until it is gone.
    """

    def __init__(
        self, find_warden: Callable[[], Awaitable[Warden]], *, ledger: Ledger | None = None
    ) -> None:
        self._find_warden = find_warden
        self._ledger = ledger

    @classmethod
    def through(cls, warden: Warden) -> Self:
        """A launcher through this one warden, for as long as it lives; nothing is recorded."""

        async def find() -> Warden:
            return warden

        return cls(find)

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
    async def launch(self, request: LaunchRequest) -> AsyncIterator[WardenProcess]:
        """Start it; leaving the context kills it.

        Raises RequestInvalid for a file that the VMM's user may not read, HostUnfit where this host
        does not let it be walled in, BootFailed for anything else that keeps it from starting.
        """
        warden = await self._find_warden()
        with ExitStack() as recorded, ExitStack() as given:
            if self._ledger is not None:
                for parent in warden.greeting.groups:
                    path = Path(parent, f"{CGROUP_PREFIX}{request.id}")
                    recorded.enter_context(_recorded_group(path, ledger=self._ledger))
            files = [given.enter_context(file) for file in _streams(request)]
            descriptors = [file.fileno() for file in files]
            for handed in request.files:
                if isinstance(handed, Path):
                    descriptors.append(given.enter_context(handed.open("rb")).fileno())
                else:
                    descriptors.append(handed.descriptor)
            async with AsyncExitStack() as stack:
                try:
                    started = warden.launch(_order(request), descriptors)
                    process = await stack.enter_async_context(started)
                except OSError as error:
                    raise _failure(request, error) from error
                given.close()
                yield WardenProcess(process)


@contextmanager
def _recorded_group(path: Path, *, ledger: Ledger) -> Iterator[None]:
    """Have it in the ledger while it may be there: a warden that died has removed nothing."""
    number = ledger.record(CgroupEntry(path=path))
    try:
        yield
    finally:
        if not path.exists():
            ledger.strike(number)


def _failure(request: LaunchRequest, error: OSError) -> VmSandboxError:
    """What it means that it could not be started: the host lacks something, or this went wrong."""
    if error.errno == errno.EACCES and (denied := _named_in(str(error), request.files)):
        return RequestInvalid(
            f"{request.name or request.id}: the VMM's own user can't be given a file: {error}",
            f"chmod o+r {denied}, or --vm-tier=userns",
        )
    if error.errno in _UNFIT:
        return HostUnfit(
            "VMS-WALLS-UNUSABLE",
            "a VMM that starts behind walls",
            str(error),
            "vmsandbox doctor says what this host lacks",
        )
    return BootFailed(request.name or request.id, f"its VMM could not be started: {error}")


def _named_in(sentence: str, files: Sequence[Handed]) -> Path | None:
    paths = (file for file in files if isinstance(file, Path))
    return next((path for path in paths if repr(str(path)) in sentence), None)


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
            file_bytes=max(FILE_BYTES, request.written_bytes),
            open_files=OPEN_FILES,
        ),
        files=tuple(
            str(file.absolute()) if isinstance(file, Path) else None for file in request.files
        ),
        room=str(ROOM),
        group=request.id,
    )
