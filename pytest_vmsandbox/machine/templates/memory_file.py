"""A guest's memory on disk: what is in it, or what differs from the memory that it came from.

memory   as long as the guest's memory; what is not named in `pages` is a hole
pages    which runs of pages are in it, each as two numbers: the first, and how many

What a file holds is the same for equal memory, whatever the file system makes of holes.
"""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Iterator
from pathlib import Path

from pytest_vmsandbox.machine.memory import CHUNK_BYTES, ZEROS, GuestMemory, write_at

MEMORY, PAGES = "memory", "pages"

PAGE_BYTES = 4096
_RUN = struct.Struct("<II")


class MemoryDamaged(Exception):
    """The files can't be what was written once."""


def save_memory(memory: GuestMemory, directory: Path, *, base: GuestMemory | None) -> str:
    """Write both files: all that is not zero, or not as it is in `base`; what they hold, hashed."""
    digest, runs = hashlib.sha256(), bytearray()
    with (directory / MEMORY).open("xb") as file:
        file.truncate(memory.size)
        for offset, part in _changed(memory, base):
            run = _RUN.pack(offset // PAGE_BYTES, len(part) // PAGE_BYTES)
            digest.update(run + part)
            runs += run
            write_at(file.fileno(), part, offset)
    (directory / PAGES).write_bytes(runs)
    return digest.hexdigest()


def load_memory(directory: Path, memory: GuestMemory) -> str:
    """Put what the files hold in its place in `memory`; what they hold, hashed.

    Raises MemoryDamaged where they can't be memory of that size, OSError where they can't be read.
    """
    digest = hashlib.sha256()
    for run, offset, part in _held(directory, size=memory.size):
        digest.update(run + part)
        write_at(memory, part, offset)
    return digest.hexdigest()


def hash_memory(directory: Path, *, size: int) -> str:
    """What the files hold, hashed; raises what `load_memory` does."""
    digest = hashlib.sha256()
    for run, _, part in _held(directory, size=size):
        digest.update(run + part)
    return digest.hexdigest()


def _held(directory: Path, *, size: int) -> Iterator[tuple[bytes, int, bytes]]:
    """Each run: as it is named, its offset, its bytes."""
    runs = (directory / PAGES).read_bytes()
    with (directory / MEMORY).open("rb") as file:
        if len(runs) % _RUN.size or os.fstat(file.fileno()).st_size != size:
            raise MemoryDamaged(f"{directory}: its memory is not {size} bytes long")
        end = 0
        for place in range(0, len(runs), _RUN.size):
            run = runs[place : place + _RUN.size]
            offset, length = (number * PAGE_BYTES for number in _RUN.unpack(run))
            # In order, so that none comes twice; and none longer than we write them.
            if offset < end or not 0 < length <= CHUNK_BYTES or offset + length > size:
                raise MemoryDamaged(f"{directory}: its memory has no such pages")
            end = offset + length
            yield run, offset, os.pread(file.fileno(), length, offset)


def _changed(memory: GuestMemory, base: GuestMemory | None) -> Iterator[tuple[int, bytes]]:
    for offset in range(0, memory.size, CHUNK_BYTES):
        part = os.pread(memory, CHUNK_BYTES, offset)
        before = ZEROS[: len(part)] if base is None else os.pread(base, CHUNK_BYTES, offset)
        if part == before:
            continue
        for first, end in _runs_that_differ(part, before):
            yield offset + first, part[first:end]


def _runs_that_differ(part: bytes, before: bytes) -> Iterator[tuple[int, int]]:
    first: int | None = None
    for place in range(0, len(part), PAGE_BYTES):
        page = slice(place, place + PAGE_BYTES)
        if part[page] != before[page]:
            first = place if first is None else first
        elif first is not None:
            yield first, place
            first = None
    if first is not None:
        yield first, len(part)
