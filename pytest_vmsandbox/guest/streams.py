"""Streams of a process in the guest: bounded by credit, so that a slow one holds up nobody else."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Callable
from typing import Protocol

from pytest_vmsandbox.guest.frames import PAYLOAD_MAX, ProtocolViolated
from pytest_vmsandbox.guest.waiting import Changes, fresh

READ_WINDOW = 1024 * 1024
WRITE_WINDOW = 256 * 1024
LINE_MAX = 1024 * 1024


class ReadStream:
    """What a process in the guest writes.

    At most READ_WINDOW bytes are kept that nobody has asked for. One reader at a time. After a
    failure of the channel what had arrived can still be read; then its error is raised.
    """

    def __init__(
        self, *, grant: Callable[[int], None], close: Callable[[], None], window: int = READ_WINDOW
    ) -> None:
        self._grant, self._tell_closed, self._window = grant, close, window
        self._buffer = bytearray()
        self._credit = window  # what the guest may still send
        self._changes = Changes()
        self._ended = self._closed = self._reading = False
        self._error: BaseException | None = None

    def feed(self, data: memoryview) -> None:
        """Bytes of the guest; more than it had credit for is a violation."""
        if self._ended or not data or len(data) > self._credit:
            raise ProtocolViolated(f"{len(data)} bytes on a stream with credit {self._credit}")
        self._credit -= len(data)
        if not self._closed:
            self._buffer += data
            self._changes.announce()

    def feed_eof(self) -> None:
        """The guest's end of the stream."""
        if self._ended:
            raise ProtocolViolated("a stream that ends twice")
        self._ended = True
        self._changes.announce()

    def fail(self, error: BaseException) -> None:
        """No more will come, and this is why."""
        if not self._ended and self._error is None:
            self._error = error
            self._changes.announce()

    @property
    def ended(self) -> bool:
        """Whether the guest has said that no more will come (some may still be unread)."""
        return self._ended

    def at_eof(self) -> bool:
        """Whether everything has been read."""
        return self._closed or (self._ended and not self._buffer)

    async def read(self, n: int = -1) -> bytes:
        """At least one and at most `n` bytes, or all up to the end; empty at the end."""
        if n == 0:
            return b""
        await self._until(math.inf if n < 0 else 1)
        return self._take(len(self._buffer) if n < 0 else n)

    async def readexactly(self, n: int) -> bytes:
        """`n` bytes, or asyncio.IncompleteReadError."""
        await self._until(n)
        if len(self._buffer) < n:
            raise asyncio.IncompleteReadError(self._take(len(self._buffer)), n)
        return self._take(n)

    async def readline(self) -> bytes:
        """A line with its newline, the unfinished last one, or nothing at the end.

        Raises ValueError, and takes nothing, where LINE_MAX bytes hold no newline.
        """
        looked_at = 0
        while (found := self._buffer.find(b"\n", looked_at)) < 0:
            looked_at = len(self._buffer)
            if looked_at > LINE_MAX:
                raise ValueError(f"no newline in {looked_at} bytes")
            await self._until(looked_at + 1)
            if len(self._buffer) == looked_at:
                return self._take(looked_at)
        return self._take(found + 1)

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while line := await self.readline():
            yield line

    def close(self) -> None:
        """Read no more: the process gets SIGPIPE when it writes again."""
        if self._closed:
            return
        self._closed = True
        self._buffer.clear()
        if not self._ended and self._error is None:
            self._tell_closed()
        self._changes.announce()

    async def _until(self, wanted: float) -> None:
        if self._reading:
            raise RuntimeError("another coroutine is already reading this stream")
        self._reading = True
        try:
            while len(self._buffer) < wanted and not self._ended and not self._closed:
                if self._error is not None:
                    raise fresh(self._error)
                self._top_up(asked_for_more=True)
                await self._changes.wait()
        finally:
            self._reading = False

    def _take(self, count: int) -> bytes:
        if count >= len(self._buffer):
            taken = bytes(self._buffer)
            self._buffer = bytearray()
        else:
            with memoryview(self._buffer) as view:
                taken = bytes(view[:count])
            del self._buffer[:count]
        self._top_up(asked_for_more=False)
        return taken

    def _top_up(self, *, asked_for_more: bool) -> None:
        """Credit so that the window is full again, in few and large steps.

        A reader that waits for more than the buffer holds is owed a window beyond it.
        """
        allowed = self._window if asked_for_more else self._window - len(self._buffer)
        missing = allowed - self._credit
        if missing >= self._window // 2 and not (self._ended or self._closed or self._error):
            self._credit += missing
            self._grant(missing)


class Sender(Protocol):
    """What a WriteStream needs of the line."""

    async def wait_writable(self) -> None:
        """Return once the line takes more."""

    def send_data(self, data: memoryview) -> None:
        """Queue one frame of data."""

    def send_eof(self) -> None:
        """Queue the end of the stream."""


class WriteStream:
    """The stdin of a process in the guest."""

    def __init__(self, sender: Sender) -> None:
        self._sender = sender
        self._credit = WRITE_WINDOW
        self._changes = Changes()
        self._closing = self._refused = False
        self._error: BaseException | None = None

    def credit(self, more: int) -> None:
        """The process has taken `more` bytes."""
        if more == 0 or self._credit + more > WRITE_WINDOW:
            raise ProtocolViolated(f"credit {more} for a stream that has {self._credit}")
        self._credit += more
        self._changes.announce()

    def refuse(self) -> None:
        """The process reads no more."""
        self._refused = True
        self._changes.announce()

    def fail(self, error: BaseException) -> None:
        """Nothing can be written any more, and this is why."""
        if self._error is None:
            self._error = error
            self._changes.announce()

    async def write(self, data: bytes | bytearray | memoryview) -> None:
        """Send all of `data`; waits while the process does not read.

        Raises BrokenPipeError once it reads no more. When cancelled, a part may have been sent.
        """
        left = memoryview(data).cast("B")
        while left:
            await self._ready()
            part = left[: min(self._credit, PAYLOAD_MAX)]
            self._credit -= len(part)
            self._sender.send_data(part)
            left = left[len(part) :]

    async def close(self) -> None:
        """Say that no more will come. Safe to repeat, and after the process has gone."""
        self.end()

    def end(self) -> None:
        """`close()` for callers that can't await: it never waits."""
        if not (self._closing or self._refused or self._error):
            self._sender.send_eof()
        self._closing = True
        self._changes.announce()

    def is_closing(self) -> bool:
        """Whether it was closed here, or the process reads no more."""
        return self._closing or self._refused

    async def _ready(self) -> None:
        await self._sender.wait_writable()
        while not self._may_send():
            await self._changes.wait()

    def _may_send(self) -> bool:
        if self._error is not None:
            raise fresh(self._error)
        if self._refused or self._closing:
            raise BrokenPipeError(32, "the process reads no more" if self._refused else "closed")
        return self._credit > 0
