"""A guest's memory as a file that exists only in memory (memfd_create(2)).

A machine that is to be frozen shares such a file with its VMM. Once frozen it is sealed: from then
on nobody, whoever holds or reopens it, can change a byte, and restored machines map it privately,
each page copied when it is first written.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Sequence

from pytest_vmsandbox.linux import OwnedFd

# fcntl(2): no more sealing, shrinking, growing or writing.
_ALL_SEALS = 0x1 | 0x2 | 0x4 | 0x8
CHUNK_BYTES = 1 << 20
ZEROS = bytes(CHUNK_BYTES)


class GuestMemory(OwnedFd):
    """The descriptor of a guest's memory, `size` bytes long; its holder closes it."""

    @property
    def size(self) -> int:
        """Its length in bytes, holes included."""
        return os.fstat(self).st_size

    def seal(self) -> None:
        """Forbid every change, for good. OSError (EBUSY) while a VMM has it mapped for writing."""
        seal(self)

    @property
    def sealed(self) -> bool:
        """Whether nobody can change it any more."""
        return is_sealed(self)


def seal(file: int) -> None:
    """Forbid every change of a file in memory, for good; OSError where that can't be."""
    fcntl.fcntl(file, fcntl.F_ADD_SEALS, _ALL_SEALS)


def is_sealed(file: int) -> bool:
    """Whether nobody can change that file in memory any more."""
    return fcntl.fcntl(file, fcntl.F_GET_SEALS) == _ALL_SEALS


def new_memory(name: str, *, size: int) -> GuestMemory:
    """Memory of `size` bytes, all zero, which takes room only where it is written."""
    memory = GuestMemory(os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING))
    try:
        os.ftruncate(memory, size)
    except BaseException:
        memory.close()
        raise
    return memory


def copy_memory(memory: GuestMemory, name: str) -> GuestMemory:
    """A copy that can be written, holes as holes; it is the caller's."""
    copy = new_memory(name, size=memory.size)
    try:
        for offset in range(0, memory.size, CHUNK_BYTES):
            part = os.pread(memory, CHUNK_BYTES, offset)
            if part != ZEROS[: len(part)]:
                write_at(copy, part, offset)
    except BaseException:
        copy.close()
        raise
    return copy


def write_pages(memory: GuestMemory, offset: int, pieces: Sequence[memoryview]) -> None:
    """Write pieces that follow each other, all of them; at most 1024 (IOV_MAX)."""
    written = os.pwritev(memory, pieces, offset)
    if written < sum(map(len, pieces)):
        write_at(memory, b"".join(pieces)[written:], offset + written)


def write_at(target: int, part: bytes, offset: int) -> None:
    """Write all of `part` at `offset`."""
    view = memoryview(part)
    while view:
        written = os.pwrite(target, view, offset)
        view, offset = view[written:], offset + written
