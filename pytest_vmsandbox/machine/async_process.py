"""A running command in the guest, for `async def test` (compare `asyncio.subprocess.Process`)."""

from __future__ import annotations

import codecs
import signal
from collections.abc import AsyncIterator

from pytest_vmsandbox.guest.process import GuestProcess
from pytest_vmsandbox.guest.streams import ReadStream, WriteStream
from pytest_vmsandbox.machine.caller import Caller
from pytest_vmsandbox.machine.process import ProcessFace, close, wait_for

CHUNK = 64 * 1024


class AsyncReader:
    """What a command prints: `str` in the encoding asked for, or `bytes` without one."""

    def __init__(self, stream: ReadStream, caller: Caller, *, encoding: str | None) -> None:
        self._stream = stream
        self._caller = caller
        self._decoder = (
            codecs.getincrementaldecoder(encoding)(errors="backslashreplace") if encoding else None
        )

    async def read(self, size: int = -1) -> str | bytes:
        """All up to the end, or what is there, at most `size` bytes; empty at the end."""
        while True:
            data = await self._caller.bridge(self._stream.read(size))
            text = self._decoded(data, final=size < 0 or not data)
            # A read may end inside a character: nothing to give yet, and not the end.
            if text or not data:
                return text

    async def readline(self) -> str | bytes:
        """One line with its newline; without one at the end, and empty behind it."""
        line = await self._caller.bridge(self._stream.readline())
        return self._decoded(line, final=True)

    async def __aiter__(self) -> AsyncIterator[str | bytes]:
        while line := await self.readline():
            yield line

    async def close(self) -> None:
        """Read no more: a command that still prints gets SIGPIPE."""
        await self._caller.bridge(close(self._stream))

    def _decoded(self, data: bytes, *, final: bool) -> str | bytes:
        return data if self._decoder is None else self._decoder.decode(data, final=final)


class AsyncWriter:
    """What a command reads."""

    def __init__(self, stream: WriteStream, caller: Caller, *, encoding: str | None) -> None:
        self._stream = stream
        self._caller = caller
        self._encoding = encoding

    async def write(self, data: str | bytes) -> None:
        """Send it; returns once the guest has room for all of it."""
        content = data.encode(self._encoding or "utf-8") if isinstance(data, str) else data
        await self._caller.bridge(self._stream.write(content))

    async def close(self) -> None:
        """The end of the input."""
        await self._caller.bridge(self._stream.close())


class AsyncProcess(ProcessFace):
    """A command that was started; its streams are awaited."""

    def __init__(self, guest: GuestProcess, caller: Caller, *, encoding: str | None) -> None:
        super().__init__(guest, caller)
        self.stdin = AsyncWriter(guest.stdin, caller, encoding=encoding) if guest.stdin else None
        self.stdout = AsyncReader(guest.stdout, caller, encoding=encoding)
        self.stderr = AsyncReader(guest.stderr, caller, encoding=encoding) if guest.stderr else None

    async def wait(self, *, timeout: float | None = None) -> int:
        """Its exit status once it has ended; TimedOut after `timeout` seconds."""
        return await self._caller.bridge(
            wait_for(self._guest, deadline=self._caller.deadline(timeout))
        )

    async def send_signal(self, number: signal.Signals | int) -> None:
        """Send a signal to its process group; nothing where it has ended."""
        await self._caller.bridge(self._guest.send_signal(number))

    async def terminate(self) -> None:
        """Send SIGTERM to its process group."""
        await self.send_signal(signal.SIGTERM)

    async def kill(self) -> None:
        """End its whole process group (SIGKILL)."""
        await self._caller.bridge(self._guest.kill())
