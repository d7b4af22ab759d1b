"""Sparse files: copied and measured without what is not there."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import threading
from collections.abc import Iterator

from pytest_vmsandbox.jail.off_loop import GivenUp
from pytest_vmsandbox.machine.memory import CHUNK_BYTES, ZEROS, write_at

_FICLONE = 0x40049409  # ioctl_ficlone(2)
_PAGE = 4096
# What may pass between two looks at whether anybody still wants it.
_PIECE_BYTES = 16 << 20
_READ_BYTES = 64 << 10
# copy_file_range(2): the kernel, or the file system, has no way to copy by itself.
_NO_COPY_IN_KERNEL = {errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM}


def copy_sparse(source: int, target: int) -> str:
    """Copy what is not zero to the same place of `target`, which is as long and all zero.

    Returns the SHA-256 of places and bytes, which does not depend on where the file has holes:
    file systems differ in that.
    """
    digest = hashlib.sha256()
    for offset, part in _written_chunks(source):
        digest.update(offset.to_bytes(8) + part)
        _write_pages(target, part, offset)
    return digest.hexdigest()


def hash_sparse(source: int) -> str:
    """The SHA-256 that `copy_sparse` would return."""
    digest = hashlib.sha256()
    for offset, part in _written_chunks(source):
        digest.update(offset.to_bytes(8) + part)
    return digest.hexdigest()


def clone(source: int, target: int, *, stop: threading.Event | None = None) -> None:
    """Make `target`, which is empty, a copy: one that shares its blocks where that can be.

    Holes stay holes. GivenUp soon after `stop` is set; the place in `source` is moved.
    """
    try:
        fcntl.ioctl(target, _FICLONE, source)
    except OSError:  # another file system, or one that can't
        size = os.fstat(source).st_size
        os.ftruncate(target, size)
        for start, end in _extents(source, size):
            _copy_extent(source, target, start, end, stop)


def next_data(source: int, offset: int) -> int | None:
    """Where data begins, at `offset` or behind it; None where there is none any more (lseek(2))."""
    try:
        return os.lseek(source, offset, os.SEEK_DATA)
    except OSError as error:
        if error.errno == errno.ENXIO:
            return None
        raise


def _copy_extent(
    source: int, target: int, start: int, end: int, stop: threading.Event | None
) -> None:
    while start < end:
        if stop is not None and stop.is_set():
            raise GivenUp
        start += _copy_piece(source, target, start, min(end - start, _PIECE_BYTES))


def _copy_piece(source: int, target: int, at: int, count: int) -> int:
    """Copy some of it, at least a byte; how much it was."""
    try:
        if copied := os.copy_file_range(source, target, count, at, at):
            return copied
    except OSError as error:
        if error.errno not in _NO_COPY_IN_KERNEL:
            raise
    part = os.pread(source, min(count, _READ_BYTES), at)
    if not part:
        raise OSError(errno.EIO, "a file became shorter while it was copied")
    write_at(target, part, at)
    return len(part)


def _extents(source: int, size: int) -> Iterator[tuple[int, int]]:
    """Where it has data, from and to; all else are holes."""
    end = 0
    while end < size and (start := next_data(source, end)) is not None:
        end = os.lseek(source, start, os.SEEK_HOLE)
        yield start, end


def _write_pages(target: int, part: bytes, offset: int) -> None:
    """Write what is not zero: whole pages, neighbours together."""
    start = 0
    view = memoryview(part)
    for at in range(0, len(part), _PAGE):
        if part[at : at + _PAGE] == ZEROS[: len(view[at : at + _PAGE])]:
            write_at(target, part[start:at], offset + start)
            start = at + _PAGE
    write_at(target, part[start:], offset + start)


def _written_chunks(source: int) -> Iterator[tuple[int, bytes]]:
    """Where the chunks begin that are not all zero, and their content."""
    offset = 0
    while (data := next_data(source, offset)) is not None:
        offset = data - data % CHUNK_BYTES
        part = os.pread(source, CHUNK_BYTES, offset)
        if part != ZEROS[: len(part)]:
            yield offset, part
        offset += CHUNK_BYTES
