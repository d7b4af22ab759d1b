"""A TCP connection that the agent has made, from inside the guest."""

from __future__ import annotations

import os
from contextlib import suppress
from typing import Protocol

from pytest_vmsandbox.guest.job import Job
from pytest_vmsandbox.guest.streams import ReadStream, WriteStream


class ConnectionControl(Protocol):
    """What a connection needs of the channel."""

    def abandon(self, job: Job) -> None:
        """Break it where it has not ended, and read nothing more of it."""


class GuestConnection:
    """Bytes come and go, and it ends in each direction by itself."""

    def __init__(self, job: Job, control: ConnectionControl) -> None:
        assert job.stdin is not None  # a connection has both directions
        self._job, self._control = job, control
        self._from: ReadStream = job.stdout
        self._to: WriteStream = job.stdin

    async def read(self, limit: int) -> bytes:
        """The next bytes; none where the other side sends no more.

        OSError (ConnectionResetError, ...) where it broke.
        """
        piece = await self._from.read(limit)
        if not piece and (error := self._job.returncode):
            raise OSError(error, os.strerror(error))
        return piece

    async def write(self, data: bytes) -> None:
        """Send all of it; BrokenPipeError where the other side takes no more."""
        await self._to.write(data)

    async def end(self) -> None:
        """Say that no more will come from here; what comes from there still does."""
        with suppress(BrokenPipeError):  # nobody takes more: what there is to tell, `read` does
            await self._to.close()

    def close(self) -> None:
        """Let go of it: unless it has ended in both directions, the other side sees it broken."""
        self._control.abandon(self._job)
