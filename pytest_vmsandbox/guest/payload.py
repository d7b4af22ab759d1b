"""Payloads: the fields inside a frame, written and read back, every one of them checked."""

from __future__ import annotations

import struct

from pytest_vmsandbox.guest.frames import ProtocolViolated

_U32 = struct.Struct("<I")


def encode_text(text: str | bytes) -> bytes:
    """A string field: u32 length, the bytes, and a NUL that is not counted.

    Raises ValueError for a NUL inside, which no argument, path or name of a kernel can hold.
    """
    raw = text if isinstance(text, bytes) else text.encode("utf-8", "surrogateescape")
    if b"\0" in raw:
        raise ValueError("embedded null byte")
    return b"".join((_U32.pack(len(raw)), raw, b"\0"))


class PayloadReader:
    """Takes fields off a payload from the guest; raises ProtocolViolated at the first wrong one."""

    def __init__(self, payload: memoryview | bytes) -> None:
        self._left = memoryview(payload)

    def take(self, count: int) -> bytes:
        """Exactly `count` bytes."""
        if count > len(self._left):
            raise ProtocolViolated(f"a field of {count} bytes where {len(self._left)} are left")
        taken, self._left = bytes(self._left[:count]), self._left[count:]
        return taken

    def u32(self) -> int:
        """An unsigned number of 32 bits."""
        return int.from_bytes(self.take(4), "little")

    def i32(self) -> int:
        """A signed number of 32 bits."""
        return int.from_bytes(self.take(4), "little", signed=True)

    def text(self, *, at_most: int = 4096) -> str:
        """A string field of at most `at_most` bytes."""
        length = self.u32()
        if length > at_most:
            raise ProtocolViolated(f"a text of {length} bytes, at most {at_most} are allowed")
        raw = self.take(length + 1)
        if raw[-1] != 0:
            raise ProtocolViolated("a text without its end")
        return raw[:-1].decode("utf-8", "surrogateescape")

    def end(self) -> None:
        """Nothing may be left."""
        if self._left:
            raise ProtocolViolated(f"{len(self._left)} bytes too many in a payload")
