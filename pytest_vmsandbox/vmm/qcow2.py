"""QEMU's copy-on-write format, as far as an empty overlay and a look at a header take it.

Source: QEMU docs/interop/qcow2.rst. Written here since qemu-img is a package of its own, and a
process for each disk.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass

MAGIC = b"QFI\xfb"

# The usual size of a cluster: the unit that is allocated, and copied when it is first written.
_CLUSTER_BITS = 16
_CLUSTER = 1 << _CLUSTER_BITS
# One table of the second level, a cluster of 8-byte entries, leads to this many bytes of the disk.
_BYTES_OF_L2 = _CLUSTER // 8 * _CLUSTER

_REFCOUNT_ORDER = 4  # 16 bits
_VERSION = 3  # the first in which a discarded cluster hides what lies below it
_HEADER = struct.Struct(">4sIQIIQIIQQIIQQQQII")

_EXTERNAL_DATA = 1 << 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Qcow2Header:
    """What an image says of itself: the size of the disk in bytes, and what it leans on."""

    size: int
    encrypted: bool
    has_backing_file: bool
    has_data_file: bool

    @property
    def objection(self) -> str | None:
        """Why no VMM of ours gets it, as what it does; None where nothing is against it.

        QEMU has no way behind its walls to another file, and an image may come from anywhere.
        """
        if self.has_backing_file:
            return "has a backing file"
        if self.has_data_file:
            return "keeps its data in another file"
        return "is encrypted" if self.encrypted else None


def read_header(descriptor: int) -> Qcow2Header | None:
    """The header of an image; None where it is none that is known."""
    content = os.pread(descriptor, _HEADER.size, 0)
    if len(content) < _HEADER.size or not content.startswith(MAGIC):
        return None
    _, version, backing, _, _, size, crypt, *_, incompatible, _, _, _, _ = _HEADER.unpack(content)
    if version not in (2, _VERSION):
        return None
    return Qcow2Header(
        size=size,
        encrypted=crypt != 0,
        has_backing_file=backing != 0,
        has_data_file=version == _VERSION and bool(incompatible & _EXTERNAL_DATA),
    )


def write_empty(descriptor: int, *, size: int) -> None:
    """Make an empty file an image of `size` bytes in which nothing was written yet.

    It names no other file: what lies below it, its user says.
    """
    # header, table of refcounts, a block of refcounts, and the table of the first level
    clusters = 3 + -(-_entries(size) * 8 // _CLUSTER)
    os.ftruncate(descriptor, clusters * _CLUSTER)
    os.pwrite(descriptor, _empty_header(size), 0)
    os.pwrite(descriptor, (2 * _CLUSTER).to_bytes(8), _CLUSTER)
    os.pwrite(descriptor, b"\0\1" * clusters, 2 * _CLUSTER)


def is_empty(descriptor: int, *, size: int) -> bool:
    """Whether an image is as `write_empty` left it: nothing was written to it, or discarded."""
    header = os.pread(descriptor, _HEADER.size, 0)
    table = os.pread(descriptor, _entries(size) * 8, 3 * _CLUSTER)
    return header == _empty_header(size) and not any(table)


def _entries(size: int) -> int:
    return -(-size // _BYTES_OF_L2)


def _empty_header(size: int) -> bytes:
    return _HEADER.pack(
        *(MAGIC, _VERSION, 0, 0, _CLUSTER_BITS, size, 0),
        *(_entries(size), 3 * _CLUSTER),
        *(_CLUSTER, 1),
        *(0, 0),  # its own snapshots
        *(0, 0, 0),  # features
        *(_REFCOUNT_ORDER, _HEADER.size),
    )


def size_at_most(size: int) -> int:
    """The bytes that an image of a disk of `size` bytes can come to take, tables included."""
    # Tables take 8 bytes and 2 for a cluster of 64 KiB; twice, with a cluster of each, is plenty.
    return size + size // 1024 + (16 << 20)
