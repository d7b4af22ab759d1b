"""Frames: how bytes on the agent's line are cut into messages (docs/protocol.md).

Sans I/O and hostile-proof: one fixed buffer, every header checked, and nothing kept that is not
part of a frame of at most 64 KiB.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum

MAGIC = b"\xf5VMS"
PAYLOAD_MAX = 65536
_HEADER = struct.Struct("<4sBBHII")
_TRAILER = struct.Struct("<I")
HEADER_SIZE = _HEADER.size
TRAILER_SIZE = _TRAILER.size
FRAME_MAX = HEADER_SIZE + PAYLOAD_MAX + TRAILER_SIZE
CAPACITY = 4 * FRAME_MAX
WELCOME_MAX = 2048
_MASK = 0xFFFFFFFF


class FrameType(IntEnum):
    """What a frame says; below 64 the host says it (or both do), from 64 on only the agent."""

    HELLO = 1
    PING = 2
    MORE = 3
    EXEC = 4
    TRANSFER = 5
    DATA = 6
    EOF = 7
    CREDIT = 8
    CLOSE = 9
    SIGNAL = 10
    KILL = 11
    RESIZE = 12
    POWER = 13
    CONNECT = 14
    WELCOME = 64
    DONE = 65
    FAILED = 66
    STARTED = 67
    EXITED = 68
    STRANGER = 69


class ProtocolViolated(Exception):
    """The guest sent what no agent of ours would send; its line is not to be believed any more."""


@dataclass(frozen=True, slots=True)
class Frame:
    """One message; `payload` is a view that is valid until the parser is fed again."""

    type: int
    stream: int
    id: int
    payload: memoryview


def header_check(type_: int, stream: int, id_: int, length: int) -> int:
    """The 16 bits that tell a header from bytes that merely begin like one."""
    mixed = (
        (id_ * 0x9E3779B1) ^ (length * 0x85EBCA6B) ^ ((type_ << 8 | stream) * 0xC2B2AE35)
    ) & _MASK
    return (mixed ^ mixed >> 16) & 0xFFFF


def encode_frame(
    type_: int, *, id_: int, stream: int = 0, payload: bytes | bytearray | memoryview = b""
) -> bytes:
    """One whole frame as bytes; `payload` holds at most PAYLOAD_MAX bytes."""
    length = len(payload)
    if length > PAYLOAD_MAX:
        raise ValueError(f"a payload of {length} bytes does not fit into one frame")
    check = header_check(type_, stream, id_, length)
    return b"".join(
        (
            _HEADER.pack(MAGIC, type_, stream, check, id_, length),
            payload,
            _TRAILER.pack(_trailer_of(id_)),
        )
    )


def _trailer_of(id_: int) -> int:
    return 0x53D4B20A ^ id_


class FrameParser:
    """Cuts the bytes that are put into `room()` into frames.

    While `hunting`, everything is thrown away up to the next whole WELCOME; afterwards anything
    that is not a frame raises ProtocolViolated.
    """

    def __init__(self) -> None:
        self._buffer = bytearray(CAPACITY)
        self._view = memoryview(self._buffer)
        self._start = self._end = 0
        self._hunting = True

    def hunt(self) -> None:
        """Believe nothing more until a WELCOME; what is buffered is looked through as well."""
        self._hunting = True

    def believe(self) -> None:
        """The last frame was the WELCOME that was waited for: from here on be strict."""
        self._hunting = False

    def room(self) -> memoryview:
        """Where to put the bytes that come next; never empty once all frames have been taken."""
        if self._start == self._end:
            self._start = self._end = 0
        elif CAPACITY - self._end < FRAME_MAX:
            left = self._end - self._start
            self._view[:left] = self._view[self._start : self._end]
            self._start, self._end = 0, left
        return self._view[self._end :]

    def filled(self, count: int) -> None:
        """`count` bytes have been put into `room()`."""
        self._end += count

    def frames(self) -> Iterator[Frame]:
        """The frames that are whole by now."""
        while frame := self._hunted() if self._hunting else self._next():
            yield frame

    def _next(self) -> Frame | None:
        start, available = self._start, self._end - self._start
        if available < HEADER_SIZE:
            return None
        magic, type_, stream, check, id_, length = _HEADER.unpack_from(self._buffer, start)
        if (
            magic != MAGIC
            or length > PAYLOAD_MAX
            or check != header_check(type_, stream, id_, length)
        ):
            raise ProtocolViolated(f"not a frame: {self._seen()}")
        if available < HEADER_SIZE + length + TRAILER_SIZE:
            return None
        end = start + HEADER_SIZE + length
        if _TRAILER.unpack_from(self._buffer, end)[0] != _trailer_of(id_):
            raise ProtocolViolated(f"a frame that does not end as it should: {self._seen()}")
        self._start = end + TRAILER_SIZE
        return Frame(type_, stream, id_, self._view[start + HEADER_SIZE : end])

    def _hunted(self) -> Frame | None:
        mark = MAGIC + bytes((FrameType.WELCOME, 0))
        while True:
            found = self._buffer.find(mark, self._start, self._end)
            if found < 0:  # all but what may be the beginning of the mark can go
                self._start = max(self._start, self._end - len(mark) + 1)
                return None
            self._start = found
            try:
                frame = self._next()
            except ProtocolViolated:
                self._start += 1
                continue
            if (
                frame is None and self._claimed() > WELCOME_MAX
            ):  # of something stale: it may never be whole
                self._start += 1
                continue
            return frame

    def _claimed(self) -> int:
        """The length that an unfinished frame claims; 0 where its header is not there."""
        if self._end - self._start < HEADER_SIZE:
            return 0
        length: int = _HEADER.unpack_from(self._buffer, self._start)[5]
        return length

    def _seen(self) -> str:
        shown = bytes(self._view[self._start : min(self._start + 32, self._end)])
        return shown.hex(" ")
