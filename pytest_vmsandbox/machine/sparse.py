"""Sparse files: copied and measured without what is not there."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
from collections.abc import Iterator

from pytest_vmsandbox.machine.memory import CHUNK_BYTES, ZEROS, write_at

_FICLONE = 0x40049409  # ioctl_ficlone(2)


def copy_sparse(source: int, target: int) -> str:
    """Copy what is not zero to the same place of `target`, which is as long and all zero.

    Returns the SHA-256 of places and bytes, which does not depend on where the file has holes:
    file systems differ in that.
    """
    digest = hashlib.sha256()
    for offset, part in _written_chunks(source):
        digest.update(offset.to_bytes(8) + part)
        write_at(target, part, offset)
    return digest.hexdigest()


def hash_sparse(source: int) -> str:
    """The SHA-256 that `copy_sparse` would return."""
    digest = hashlib.sha256()
    for offset, part in _written_chunks(source):
        digest.update(offset.to_bytes(8) + part)
    return digest.hexdigest()


def clone(source: int, target: int) -> None:
    """Make `target`, which is empty, a copy: one that shares its blocks where that can be."""
    try:
        fcntl.ioctl(target, _FICLONE, source)
    except OSError:  # another file system, or one that can't
        os.ftruncate(target, os.fstat(source).st_size)
        copy_sparse(source, target)


def _written_chunks(source: int) -> Iterator[tuple[int, bytes]]:
    """Where the chunks begin that are not all zero, and their content."""
    offset = 0
    while True:
        try:
            data = os.lseek(source, offset, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:  # there is none behind it
                return
            raise
        offset = data - data % CHUNK_BYTES
        part = os.pread(source, CHUNK_BYTES, offset)
        if part != ZEROS[: len(part)]:
            yield offset, part
        offset += CHUNK_BYTES
