"""Decompression of what distributions compress kernels and modules with."""

from __future__ import annotations

import gzip
import lzma
import shutil
import struct
import subprocess

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_vmsandbox.image.decompress import CannotDecompress, decompress

# Larger than one 8 MiB block of lz4's, and not too regular.
CONTENT = b"\x7fELF" + b"".join(struct.pack("<IQ", n, n * n) for n in range(800_000))

COMPRESSORS = {
    "gzip": lambda data: gzip.compress(data, 1),
    "xz": lambda data: lzma.compress(data, check=lzma.CHECK_CRC32, preset=0),
    "lz4": lambda data: by_program(["lz4", "-l", "-1", "-c"], data),
    "zstd": lambda data: by_program(["zstd", "-1", "-c"], data),
}


def by_program(command: list[str], data: bytes) -> bytes:
    if shutil.which(command[0]) is None:
        pytest.skip(f"no {command[0]} to compress with")
    return subprocess.run(command, input=data, capture_output=True, check=True, timeout=60).stdout


@pytest.mark.parametrize("name", COMPRESSORS)
def test_what_was_compressed_comes_back(name: str) -> None:
    assert decompress(COMPRESSORS[name](CONTENT)) == CONTENT


@pytest.mark.parametrize("name", COMPRESSORS)
def test_the_length_that_kernels_put_behind_their_payload_does_no_harm(name: str) -> None:
    payload = COMPRESSORS[name](CONTENT) + struct.pack("<I", len(CONTENT))

    assert decompress(payload) == CONTENT


def test_an_elf_file_is_left_as_it_is() -> None:
    assert decompress(CONTENT) is CONTENT


@pytest.mark.parametrize("name", ["lz4", "zstd"])
def test_a_broken_stream_is_said_to_be_broken(name: str) -> None:
    whole = COMPRESSORS[name](CONTENT)

    with pytest.raises(CannotDecompress):
        decompress(whole[:200] + bytes(2000) + whole[2200:])


@given(
    st.sampled_from([b"\x1f\x8b", b"\xfd7zXZ\0", b"\x02\x21\x4c\x18", b"\x28\xb5\x2f\xfd", b""]),
    st.binary(max_size=200),
)
def test_garbage_gives_bytes_or_the_one_error(magic: bytes, garbage: bytes) -> None:
    try:
        result = decompress(magic + garbage)
    except CannotDecompress:
        return

    assert isinstance(result, bytes)
