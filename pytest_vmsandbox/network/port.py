"""Ports: where a machine's card, or the host's end, is plugged into a network."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable, Sequence
from typing import Protocol

from pytest_vmsandbox.linux.owned_fd import OwnedFd
from pytest_vmsandbox.network.frames import (
    FRAME_AT_LEAST,
    FRAME_AT_MOST,
    FrameReader,
    NotAFrame,
    encode_frame,
)

# How much may wait for a machine that does not take it; what comes then is lost, as in any switch.
WAITING_AT_MOST = 1 << 20

# How much of a stream is read at once, before others have their turn.
_READ_BYTES = 32 * 1024
# How many packets are read at once, before others have their turn.
_PACKETS_AT_ONCE = 64
# A tap's queue (drivers/net/tun.c, TUN_READQ_SIZE): 500 packets.
_TURNS_TO_CATCH_UP = 8


class Port(Protocol):
    """One end of a wire, as the hub sees it; `name` is unique in its network."""

    name: str

    def start(self, came: Callable[[Port, Sequence[bytes]], None]) -> None:
        """Hand over whatever comes from now on."""

    def offer(self, frame: bytes) -> bool:
        """Take a frame, to be sent at the latest with `flush`; False where it is lost."""

    def flush(self) -> None:
        """Send what was offered, as far as the other end takes it; the rest follows by itself."""

    def close(self) -> None:
        """Let go of the other end."""


class StreamPort:
    """A VMM's card, at the other end of a stream (frames.py)."""

    def __init__(self, name: str, sock: socket.socket) -> None:
        self.name = name
        self.broken = ""  # why it hears and says nothing any more
        self._sock = sock
        self._sock.settimeout(0)
        self._reader = FrameReader()
        self._waiting = bytearray()
        self._writing = False
        self._loop = asyncio.get_running_loop()
        self._came: Callable[[Port, Sequence[bytes]], None] = _nobody

    def start(self, came: Callable[[Port, Sequence[bytes]], None]) -> None:
        """Part of Port."""
        self._came = came
        self._loop.add_reader(self._sock, self._readable)

    def offer(self, frame: bytes) -> bool:
        """Part of Port."""
        if self.broken or len(self._waiting) > WAITING_AT_MOST:
            return False
        self._waiting += encode_frame(frame)
        return True

    def flush(self) -> None:
        """Part of Port."""
        if not self._writing:
            self._write()

    def close(self) -> None:
        """Part of Port."""
        self._break("it was unplugged")
        self._sock.close()

    def _readable(self) -> None:
        try:
            piece = self._sock.recv(_READ_BYTES)
        except BlockingIOError:
            return
        except OSError as error:
            self._break(str(error))
            return
        if not piece:
            self._break("the VMM has ended")
            return
        try:
            frames = self._reader.feed(piece)
        except NotAFrame as error:
            self._break(f"the VMM sent what is no frame: {error}")
            return
        self._came(self, frames)

    def _write(self) -> None:
        if self.broken:
            return
        try:
            sent = self._sock.send(self._waiting)
        except BlockingIOError:
            sent = 0
        except OSError as error:
            self._break(str(error))
            return
        del self._waiting[:sent]
        if bool(self._waiting) == self._writing:
            return
        self._writing = bool(self._waiting)
        if self._writing:
            self._loop.add_writer(self._sock, self._write)
        else:
            self._loop.remove_writer(self._sock)

    def _break(self, reason: str) -> None:
        if not self.broken:
            self.broken = reason
            self._waiting.clear()
            self._loop.remove_reader(self._sock)
            self._loop.remove_writer(self._sock)


class PacketPort:
    """An interface of the switch's own network namespace, by a packet socket (packet(7))."""

    def __init__(self, name: str, sock: socket.socket) -> None:
        self.name = name
        self._sock = sock
        self._sock.settimeout(0)
        self._loop = asyncio.get_running_loop()

    def start(self, came: Callable[[Port, Sequence[bytes]], None]) -> None:
        """Part of Port."""
        self._loop.add_reader(self._sock, self._readable, came)

    def offer(self, frame: bytes) -> bool:
        """Part of Port; there is nothing to flush."""
        try:
            self._sock.send(frame)
        except OSError:  # its queue is full, or the frame longer than the interface takes
            return False
        return True

    def flush(self) -> None:
        """Part of Port."""

    def close(self) -> None:
        """Part of Port."""
        self._loop.remove_reader(self._sock)
        self._sock.close()

    def _readable(self, came: Callable[[Port, Sequence[bytes]], None]) -> None:
        frames: list[bytes] = []
        try:
            while len(frames) < _PACKETS_AT_ONCE:
                frames.append(self._sock.recv(FRAME_AT_MOST))
        except OSError:  # nothing more for now
            pass
        came(self, frames)


class TapPort:
    """A tap of the switch's own network namespace, by its descriptor: frames as they are."""

    def __init__(self, name: str, tap: OwnedFd) -> None:
        self.name = name
        self._tap = tap
        self._loop = asyncio.get_running_loop()
        self._came: Callable[[Port, Sequence[bytes]], None] = _nobody

    def start(self, came: Callable[[Port, Sequence[bytes]], None]) -> None:
        """Part of Port."""
        self._came = came
        self._loop.add_reader(self._tap, self._read)

    def offer(self, frame: bytes) -> bool:
        """Part of Port; there is nothing to flush."""
        try:
            os.write(self._tap, frame)
        except OSError:  # it is down, or gone
            return False
        return True

    def flush(self) -> None:
        """Part of Port."""

    def catch_up(self) -> None:
        """Hand over what has come by now, without waiting for the loop; not what comes on."""
        for _ in range(_TURNS_TO_CATCH_UP):
            if self._read() < _PACKETS_AT_ONCE:
                return

    def close(self) -> None:
        """Part of Port."""
        self._loop.remove_reader(self._tap)
        self._tap.close()

    def _read(self) -> int:
        frames: list[bytes] = []
        try:
            while len(frames) < _PACKETS_AT_ONCE:
                frames.append(os.read(self._tap, FRAME_AT_MOST))
        except BlockingIOError:  # nothing more for now
            pass
        except OSError:  # it is gone, which those who watch over it are told of
            self._loop.remove_reader(self._tap)
        self._came(self, [frame for frame in frames if len(frame) >= FRAME_AT_LEAST])
        return len(frames)


def _nobody(_: Port, __: Sequence[bytes]) -> None:
    """Before it is started nothing is read."""
