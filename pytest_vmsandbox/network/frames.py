"""Frames: Ethernet frames in a stream of bytes, as QEMU's socket network device sends them.

Before each frame stands its length, four bytes, the highest first (net/net.c of QEMU,
net_socket_rs_init). The other end is a VMM, which may have been taken over: nothing but that length
is believed.
"""

from __future__ import annotations

import struct

# QEMU's own buffer for one (NET_BUFSIZE).
FRAME_AT_MOST = 4096 + 65536
# Two addresses and a type; shorter ones are no frames.
FRAME_AT_LEAST = 14

ADDRESS_BYTES = 6

_LENGTH = struct.Struct("!I")


class NotAFrame(ValueError):
    """What came can't be the beginning of a frame, so that nothing after it can be read."""


def encode_frame(frame: bytes) -> bytes:
    """The frame as it stands in the stream."""
    return _LENGTH.pack(len(frame)) + frame


class FrameReader:
    """Takes a stream apart, in whatever pieces it comes."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, piece: bytes) -> list[bytes]:
        """The frames that this piece completes; those too short to have addresses are left out.

        Raises NotAFrame where a length can't be one; the reader is of no use afterwards.
        """
        data = self._rest + piece if self._rest else piece
        frames = []
        at, end = 0, len(data)
        while end - at >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(data, at)
            if length > FRAME_AT_MOST:
                raise NotAFrame(f"a frame of {length} bytes")
            after = at + _LENGTH.size + length
            if after > end:
                break
            if length >= FRAME_AT_LEAST:
                frames.append(data[at + _LENGTH.size : after])
            at = after
        self._rest = data[at:]
        return frames


def is_for_many(address: bytes) -> bool:
    """Whether a frame to that address is for more than one: multicast, broadcast."""
    return bool(address[0] & 1)
