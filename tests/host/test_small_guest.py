"""The small guest's image and its answers."""

from __future__ import annotations

import struct

import pytest

from pytest_vmsandbox.host.small_guest import parse_counted, small_guest_firmware


def test_the_firmware_is_64_kib_and_begins_at_the_reset_vector() -> None:
    firmware = small_guest_firmware()

    assert len(firmware) == 64 * 1024
    opcode, offset = struct.unpack_from("<Bh", firmware, 0xFFF0)
    assert opcode == 0xE9
    assert (0xFFF3 + offset) % 0x10000 == 0


def test_the_median_of_the_chunks_counts() -> None:
    told = struct.pack("<6H", 2000, 1000, 100, 64636, 9000, 0)

    counted = parse_counted(told)

    assert counted.chunks == 3
    assert counted.chunk_s == pytest.approx(1000 / 1_193_182)


@pytest.mark.parametrize("told", [b"", b"\1", b"\1\2\3"])
def test_less_than_one_chunk_is_none(told: bytes) -> None:
    assert parse_counted(told).chunks == 0


def test_half_a_chunk_at_the_end_is_dropped() -> None:
    assert parse_counted(struct.pack("<3H", 3, 1, 9)).chunks == 1
