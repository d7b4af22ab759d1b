"""Captures: files that others read."""

from __future__ import annotations

import io
import struct

from pytest_vmsandbox.network.pcap import PcapWriter


def test_a_capture_is_what_pcap_savefile_describes() -> None:
    file = io.BytesIO()
    writer = PcapWriter(file)
    writer.write(b"a" * 60, at_s=1.5)
    writer.write(b"b" * 61, at_s=1700000000.000001)
    writer.flush()
    content = file.getvalue()

    magic, major, minor, _, _, longest, link = struct.unpack_from("<IHHiIII", content)
    assert (magic, major, minor, link) == (0xA1B2C3D4, 2, 4, 1)
    assert longest >= 65536
    assert struct.unpack_from("<IIII", content, 24) == (1, 500000, 60, 60)
    assert content[40:100] == b"a" * 60
    assert struct.unpack_from("<IIII", content, 100)[2:] == (61, 61)
    assert len(content) == 24 + 16 + 60 + 16 + 61
