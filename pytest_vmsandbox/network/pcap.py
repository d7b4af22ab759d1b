"""Captures: frames in a file that tcpdump and Wireshark read (pcap-savefile(5))."""

from __future__ import annotations

import struct
from typing import BinaryIO

_HEADER = struct.pack("<IHHiIII", 0xA1B2C3D4, 2, 4, 0, 0, 0x40000, 1)  # 1: LINKTYPE_ETHERNET
_RECORD = struct.Struct("<IIII")


class PcapWriter:
    """Writes frames to a file, which is its own from then on."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._file.write(_HEADER)

    def write(self, frame: bytes, *, at_s: float) -> None:
        """Add a frame that passed `at_s` seconds after 1970."""
        seconds = int(at_s)
        micros = int((at_s - seconds) * 1e6)
        self._file.write(_RECORD.pack(seconds, micros, len(frame), len(frame)) + frame)

    def flush(self) -> None:
        """Have in the file what was written."""
        self._file.flush()

    def close(self) -> None:
        """Have all of it in the file, and close that."""
        self._file.close()
