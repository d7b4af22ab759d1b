"""Decompression of kernels and kernel modules, whatever the distribution chose.

gzip and xz are in the standard library. lz4 and zstd are not, before Python 3.14; the shared
libraries are on every host that has apt, which is linked with both (libapt-pkg), so those are
called: liblz4's lz4.h and libzstd's zstd.h.
"""

from __future__ import annotations

import ctypes
import lzma
import struct
import zlib
from typing import Final

_LZ4_LEGACY_BLOCK: Final = 8 << 20
_LARGEST: Final = 256 << 20
_ZSTD_DESTINATION_TOO_SMALL: Final = 70  # zstd_errors.h
_GZIP_WBITS: Final = 16 + zlib.MAX_WBITS


class CannotDecompress(Exception):
    """The host can't: an unknown format, a library that is not here, or broken data."""


def decompress(data: bytes) -> bytes:
    """The content of the first compressed stream in `data`, whatever follows it.

    What is not compressed comes back as it is only when it is an ELF file; anything else that
    is not understood raises CannotDecompress.
    """
    try:
        if data.startswith(b"\x7fELF"):
            return data
        if data.startswith(b"\x1f\x8b"):
            return zlib.decompressobj(_GZIP_WBITS).decompress(data)
        if data.startswith(b"\xfd7zXZ\0"):
            return lzma.LZMADecompressor(lzma.FORMAT_XZ).decompress(data)
        if data.startswith(b"\x02\x21\x4c\x18"):
            return _lz4_legacy(data)
        if data.startswith(b"\x28\xb5\x2f\xfd"):
            return _zstd(data)
    except (zlib.error, lzma.LZMAError, struct.error, OSError) as broken:
        raise CannotDecompress(str(broken)) from broken
    raise CannotDecompress(f"unknown format: it begins with {data[:4].hex(' ')}")


def _lz4_legacy(data: bytes) -> bytes:
    # The kernel's format: blocks of at most 8 MiB, each behind its compressed length
    # (lib/decompress_unlz4.c). A kernel's payload ends with its decompressed length, 4 bytes.
    library = ctypes.CDLL("liblz4.so.1")
    buffer = ctypes.create_string_buffer(_LZ4_LEGACY_BLOCK)
    out, position = bytearray(), 4
    while position + 8 <= len(data):
        (length,) = struct.unpack_from("<I", data, position)
        position += 4
        block = data[position : position + length]
        got = library.LZ4_decompress_safe(block, buffer, len(block), _LZ4_LEGACY_BLOCK)
        if got < 0 or len(block) < length:
            raise CannotDecompress(f"lz4: broken block at byte {position}")
        out += memoryview(buffer)[:got]
        position += length
    return bytes(out)


def _zstd(data: bytes) -> bytes:
    library = ctypes.CDLL("libzstd.so.1")
    for name in ("ZSTD_decompress", "ZSTD_findFrameCompressedSize"):
        getattr(library, name).restype = ctypes.c_size_t
    frame: int = library.ZSTD_findFrameCompressedSize(data, ctypes.c_size_t(len(data)))
    if library.ZSTD_isError(ctypes.c_size_t(frame)):
        raise CannotDecompress("zstd: broken frame")
    # The frame need not say how large its content is, so the buffer grows until it fits.
    room = max(8 * frame, 1 << 16)
    while room <= _LARGEST:
        buffer = ctypes.create_string_buffer(room)
        got: int = library.ZSTD_decompress(
            buffer, ctypes.c_size_t(room), data, ctypes.c_size_t(frame)
        )
        if not library.ZSTD_isError(ctypes.c_size_t(got)):
            return buffer.raw[:got]
        if library.ZSTD_getErrorCode(ctypes.c_size_t(got)) != _ZSTD_DESTINATION_TOO_SMALL:
            raise CannotDecompress("zstd: broken frame")
        room *= 4
    raise CannotDecompress(f"zstd: more than {_LARGEST} bytes")
