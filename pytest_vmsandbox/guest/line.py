"""The host's end of the line: bytes in, frames out, and writers that wait when it is full."""

from __future__ import annotations

import asyncio
from typing import Protocol, cast

from pytest_vmsandbox.guest.frames import Frame, FrameParser, ProtocolViolated
from pytest_vmsandbox.guest.waiting import Changes

_HIGH_WATER = 512 * 1024


class Listener(Protocol):
    """Who is told what comes over the line."""

    def frame_came(self, frame: Frame) -> None:
        """A whole frame; raises ProtocolViolated when it can't be."""

    def line_broke(self, cause: str) -> None:
        """Nothing more will come; called once, and not after `Line.abort()`."""


class Line(asyncio.BufferedProtocol):
    """A connected socket to an agent."""

    def __init__(self, listener: Listener) -> None:
        self.parser = FrameParser()
        self.bytes_received = 0
        self._listener: Listener | None = listener
        self._transport: asyncio.Transport | None = None
        self._paused = self._gone = False
        self._changes = Changes()

    # ---- what asyncio calls ----

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Part of asyncio.BaseProtocol."""
        self._transport = cast("asyncio.Transport", transport)
        self._transport.set_write_buffer_limits(high=_HIGH_WATER)

    def get_buffer(self, sizehint: int) -> memoryview:  # noqa: ARG002 - given by asyncio
        """Part of asyncio.BufferedProtocol."""
        return self.parser.room()

    def buffer_updated(self, nbytes: int) -> None:
        """Part of asyncio.BufferedProtocol."""
        self.bytes_received += nbytes
        self.parser.filled(nbytes)
        try:
            for frame in self.parser.frames():
                if self._listener is None:
                    return
                self._listener.frame_came(frame)
        except ProtocolViolated as violation:
            self._broke(f"the guest broke the protocol: {violation}")

    def eof_received(self) -> None:
        """Part of asyncio.BufferedProtocol."""
        self._broke("the line was closed by the other side")

    def connection_lost(self, exc: Exception | None) -> None:
        """Part of asyncio.BaseProtocol."""
        self._gone = True
        self._changes.announce()
        self._broke(f"the line broke: {exc}" if exc else "the line was closed")

    def pause_writing(self) -> None:
        """Part of asyncio.BaseProtocol."""
        self._paused = True

    def resume_writing(self) -> None:
        """Part of asyncio.BaseProtocol."""
        self._paused = False
        self._changes.announce()

    # ---- what the channel calls ----

    def send(self, data: bytes) -> None:
        """Queue `data`, however full the line is; after the end it is dropped."""
        if self._transport is not None and not self._gone:
            self._transport.write(data)

    @property
    def waits_to_send(self) -> int:
        """Bytes that the other side has not taken yet."""
        return 0 if self._transport is None else self._transport.get_write_buffer_size()

    async def wait_writable(self) -> None:
        """Return once the line takes more, or is gone."""
        while self._paused and not self._gone:
            await self._changes.wait()

    def abort(self) -> None:
        """Close at once; the listener hears nothing any more."""
        self._listener = None
        if self._transport is not None:
            self._transport.abort()

    async def close(self) -> None:
        """Close at once, and return when the socket is closed."""
        self.abort()
        while self._transport is not None and not self._gone:
            await self._changes.wait()

    def _broke(self, cause: str) -> None:
        listener, self._listener = self._listener, None
        if self._transport is not None:
            self._transport.abort()
        if listener is not None:
            listener.line_broke(cause)
