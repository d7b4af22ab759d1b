"""Captures: frames in a file that tcpdump and Wireshark read (pcap-savefile(5))."""

from __future__ import annotations

import errno
import struct
from typing import BinaryIO

_HEADER = struct.pack("<IHHiIII", 0xA1B2C3D4, 2, 4, 0, 0, 0x40000, 1)  # 1: LINKTYPE_ETHERNET
_RECORD = struct.Struct("<IIII")

# A test that forgets its capture, or floods it, does not fill the disk.
CAPTURED_AT_MOST = 1 << 30


class PcapWriter:
    """Writes frames to a file, which is its own from then on.

    One that can't be written any more is closed, and harms nobody: `failure` says what was wrong.
    """

    def __init__(self, file: BinaryIO, *, at_most: int = CAPTURED_AT_MOST) -> None:
        self.failure: OSError | None = None
        self._file = file
        self._at_most = at_most
        self._length = len(_HEADER)
        self._file.write(_HEADER)

    def write(self, frame: bytes, *, at_s: float) -> None:
        """Add a frame that passed `at_s` seconds after 1970."""
        seconds = int(at_s)
        micros = int((at_s - seconds) * 1e6)
        record = _RECORD.pack(seconds, micros, len(frame), len(frame)) + frame
        if self._file.closed:
            return
        self._length += len(record)
        if self._length > self._at_most:
            self._give_up(OSError(errno.EFBIG, f"it would be longer than {self._at_most} bytes"))
            return
        try:
            self._file.write(record)
        except OSError as error:
            self._give_up(error)

    def flush(self) -> None:
        """Have in the file what was written."""
        if self._file.closed:
            return
        try:
            self._file.flush()
        except OSError as error:
            self._give_up(error)

    def close(self) -> None:
        """Have all of it in the file, and close that."""
        try:
            self._file.close()
        except OSError as error:  # it is closed all the same
            self.failure = self.failure or error

    def _give_up(self, error: OSError) -> None:
        self.failure = self.failure or error
        self.close()
