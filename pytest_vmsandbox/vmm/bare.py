"""The bare launcher: no walls, but the VMM dies with us."""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import subprocess
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

from pytest_vmsandbox.deadline import Deadline
from pytest_vmsandbox.errors import HostUnfit
from pytest_vmsandbox.host.parent_death import dying_with_us
from pytest_vmsandbox.host.socket_auth import connect_machine_socket
from pytest_vmsandbox.linux import ProcessIdentity
from pytest_vmsandbox.vmm.launch import Handed, LaunchRequest, VmmView


class BareProcess:
    """A VMM that is our own child (see `VmmProcess`)."""

    def __init__(self, child: subprocess.Popen[bytes], directory: Path) -> None:
        self._child = child
        self._directory = directory
        self.pid = child.pid
        self.uid = os.getuid()
        self.identity = ProcessIdentity.of(child.pid)
        self.pidfd = _open_pidfd(child.pid)

    async def wait(self) -> int:
        """Its exit status once it has ended; negative for a signal."""
        if self.pidfd is None:
            return await asyncio.to_thread(self._child.wait)
        # A pidfd turns readable when its process ends (pidfd_open(2)); each waiter gets a
        # descriptor of its own, since a loop holds one reader for a descriptor.
        watched = os.dup(self.pidfd)
        ended = asyncio.Event()
        loop = asyncio.get_running_loop()
        loop.add_reader(watched, ended.set)
        try:
            await ended.wait()
        finally:
            loop.remove_reader(watched)
            os.close(watched)
        return self._child.wait()

    def kill(self) -> None:
        """End it at once (SIGKILL); harmless when it has ended already."""
        # Popen looks whether the child was reaped before it signals, so that a reused pid
        # is never hit.
        self._child.kill()

    async def connect(self, name: str, *, deadline: Deadline) -> socket.socket:
        """A connection to the socket called `name` in its directory (see `VmmProcess`)."""
        return await connect_machine_socket(
            self._directory / name,
            uid=self.uid,
            pidfd=self.pidfd,
            identity=self.identity,
            deadline=deadline,
        )

    async def read_file(self, name: str) -> bytes:
        """The file called `name` in its directory."""
        return await asyncio.to_thread((self._directory / name).read_bytes)

    def close(self) -> None:
        """Give the pidfd back; the process must have been reaped."""
        if self.pidfd is not None:
            os.close(self.pidfd)
            self.pidfd = None


class BareLauncher:
    """Starts VMMs as children of this process, with this process's rights (tier `bare`)."""

    def view(self, *, directory: Path, files: Sequence[Handed]) -> VmmView:
        """It sees what we see, and inherits what is open here already."""
        return VmmView(directory=directory, files={file: _seen(file) for file in files})

    @asynccontextmanager
    async def launch(self, request: LaunchRequest) -> AsyncIterator[BareProcess]:
        """Start it in a session of its own; leaving the context kills and reaps it.

        Raises HostUnfit when its program can't be started.
        """
        program = request.argv[0]
        if shutil.which(program) is None:
            raise HostUnfit(
                "VMS-QEMU-MISSING",
                "a VMM that starts",
                f"{program} is not an executable file",
                "vmsandbox setup",
            )
        child = _spawn([*dying_with_us(), *request.argv], request)
        try:
            process = BareProcess(child, request.directory)
        except BaseException:
            child.kill()
            child.wait()
            raise
        try:
            yield process
        finally:
            # The end of a VMM must not be skipped because our own task was cancelled.
            await asyncio.shield(_end(process))


def _seen(file: Handed) -> Path:
    return file if isinstance(file, Path) else Path(f"/proc/self/fd/{int(file.descriptor)}")


async def _end(process: BareProcess) -> None:
    process.kill()
    await process.wait()
    process.close()


def _spawn(argv: Sequence[str], request: LaunchRequest) -> subprocess.Popen[bytes]:
    inherited = [file.descriptor for file in request.files if not isinstance(file, Path)]
    with request.log.open("ab") as output:
        return subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            pass_fds=inherited,
        )


def _open_pidfd(pid: int) -> int | None:
    if not hasattr(os, "pidfd_open"):
        return None
    return os.pidfd_open(pid)
