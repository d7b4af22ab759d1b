"""A guest's memory as a file that exists only in memory (memfd_create(2)).

A machine that is to be frozen shares such a file with its VMM. Once frozen it is sealed: from then
on nobody, whoever holds or reopens it, can change a byte, and restored machines map it privately,
each page copied when it is first written.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
from pathlib import Path

from pytest_vmsandbox.linux import OwnedFd

# fcntl(2): no more sealing, shrinking, growing or writing.
_ALL_SEALS = 0x1 | 0x2 | 0x4 | 0x8
_CHUNK_BYTES = 1 << 20
_ZEROS = bytes(_CHUNK_BYTES)


class GuestMemory(OwnedFd):
    """The descriptor of a guest's memory, `size` bytes long; its holder closes it."""

    @property
    def size(self) -> int:
        """Its length in bytes, holes included."""
        return os.fstat(self).st_size

    def seal(self) -> None:
        """Forbid every change, for good. OSError (EBUSY) while a VMM has it mapped for writing."""
        fcntl.fcntl(self, fcntl.F_ADD_SEALS, _ALL_SEALS)

    @property
    def sealed(self) -> bool:
        """Whether nobody can change it any more."""
        return fcntl.fcntl(self, fcntl.F_GET_SEALS) == _ALL_SEALS


def new_memory(name: str, *, size: int) -> GuestMemory:
    """Memory of `size` bytes, all zero, which takes room only where it is written."""
    memory = GuestMemory(os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING))
    try:
        os.ftruncate(memory, size)
    except BaseException:
        memory.close()
        raise
    return memory


def save_memory(memory: GuestMemory, path: Path) -> str:
    """Write it to a new file, holes as holes; the SHA-256 of all that is not zero."""
    with path.open("xb") as file:
        file.truncate(memory.size)
        return _copy(memory, file.fileno())


def load_memory(path: Path) -> tuple[GuestMemory, str]:
    """Read a file that `save_memory` wrote into sealed memory, which is the caller's; its SHA-256.

    OSError where it can't be read, or memory is short; nothing is left open then.
    """
    with path.open("rb") as file:
        memory = new_memory("vmsandbox-memory", size=os.fstat(file.fileno()).st_size)
        try:
            digest = _copy(file.fileno(), memory)
            memory.seal()
        except BaseException:
            memory.close()
            raise
    return memory, digest


def _copy(source: int, target: int) -> str:
    """Copy what is not zero to the same place; the SHA-256 of places and bytes."""
    # Not what is no hole: file systems differ in where they keep zeros.
    digest = hashlib.sha256()
    for offset in range(0, os.fstat(source).st_size, _CHUNK_BYTES):
        part = os.pread(source, _CHUNK_BYTES, offset)
        if part != _ZEROS[: len(part)]:
            digest.update(offset.to_bytes(8) + part)
            _write_all(target, part, offset)
    return digest.hexdigest()


def _write_all(target: int, part: bytes, offset: int) -> None:
    view = memoryview(part)
    while view:
        written = os.pwrite(target, view, offset)
        view, offset = view[written:], offset + written
