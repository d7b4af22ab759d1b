"""A process in the guest, as asyncio's own subprocesses are used."""

from __future__ import annotations

import asyncio
import signal
from contextlib import suppress
from typing import Protocol

from pytest_vmsandbox.guest.job import Job
from pytest_vmsandbox.guest.streams import ReadStream, WriteStream


class JobControl(Protocol):
    """What a process needs of the channel."""

    async def signal_job(self, job: Job, signal_number: int) -> None:
        """Signal its process group."""

    async def kill_job(self, job: Job) -> None:
        """Kill its process group, and end its streams once it is dead."""

    async def resize_job(self, job: Job, *, rows: int, columns: int) -> None:
        """Change the size of its terminal."""


class GuestProcess:
    """A started command. It leads a session and a process group of its own in the guest."""

    def __init__(self, job: Job, control: JobControl, *, pid: int) -> None:
        self._job, self._control = job, control
        self.pid = pid

    @property
    def stdin(self) -> WriteStream | None:
        """Its stdin, where one was asked for."""
        return self._job.stdin

    @property
    def stdout(self) -> ReadStream:
        """Its stdout, or its terminal's output."""
        return self._job.stdout

    @property
    def stderr(self) -> ReadStream | None:
        """Its stderr; None with a terminal or where it was merged into stdout."""
        return self._job.stderr

    @property
    def returncode(self) -> int | None:
        """Exit status, negative for a signal; None while it runs."""
        return self._job.returncode

    async def wait(self) -> int:
        """The exit status of the process itself; its children may still hold its streams."""
        return await self._job.wait_exited()

    async def send_signal(self, signal_number: int) -> None:
        """Signal its process group; nothing happens when that is gone."""
        await self._control.signal_job(self._job, signal_number)

    async def terminate(self) -> None:
        """Send SIGTERM to its process group."""
        await self.send_signal(signal.SIGTERM)

    async def kill(self) -> None:
        """Send SIGKILL to its process group.

        Once the process is dead its streams end after what was written so far, even if a process
        that left the group still holds them.
        """
        await self._control.kill_job(self._job)

    async def resize(self, *, rows: int, columns: int) -> None:
        """Change the size of its terminal; OSError(ENOTTY) where it has none."""
        await self._control.resize_job(self._job, rows=rows, columns=columns)

    async def communicate(self, data: bytes | None = None) -> tuple[bytes, bytes]:
        """Write `data` to stdin and close it, read both outputs to their ends, and wait."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._feed(data))
            out = group.create_task(self.stdout.read())
            err = group.create_task(self.stderr.read()) if self.stderr else None
        await self.wait()
        return out.result(), err.result() if err else b""

    async def _feed(self, data: bytes | None) -> None:
        if self.stdin is None:
            return
        with suppress(BrokenPipeError):  # as in subprocess: it may end without reading
            await self.stdin.write(data or b"")
        await self.stdin.close()

    def close(self) -> None:
        """Give up its streams: it reads an end of file, and gets SIGPIPE when it writes."""
        if self.stdin is not None:
            self.stdin.end()
        self._job.close_outputs()
