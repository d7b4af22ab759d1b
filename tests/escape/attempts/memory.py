"""Memory that a VMM is handed: that of a template, which every other machine begins with too."""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import signal
from collections.abc import Callable
from pathlib import Path

from tests.escape.attempts.calls import LIBC, libc

MARK = b"was here"
PAGE = 4096

_KEEP_SIZE, _PUNCH_HOLE = 1, 2
_MAP_FAILED = ctypes.c_void_p(-1).value


def vandal(room: Path, *memories: str) -> None:
    """Try to change each memory in every way there is; say what came of it, and wait."""
    told = {path: {way: _outcome(_WAYS[way], path) for way in _WAYS} for path in memories}
    (room / "half").write_text(json.dumps(told))
    (room / "half").rename(room / "tried")
    while True:
        signal.pause()


def _outcome(way: Callable[[str], object], path: str) -> str:
    try:
        way(path)
    except (OSError, ValueError) as error:
        return f"refused: {error}"
    return "changed"


def _handed(path: str) -> int:
    """The very descriptor that was handed over, which the path names; or the best we get."""
    number = int(path.rpartition("/")[2])
    return number if path.startswith("/proc/self/") else os.open(path, os.O_RDWR)


def _write_anew(path: str) -> None:
    fd = os.open(path, os.O_RDWR)
    os.write(fd, MARK)


def _write(path: str) -> None:
    os.pwrite(_handed(path), MARK, PAGE)


def _truncate_anew(path: str) -> None:
    size = os.stat(path).st_size
    fd = os.open(path, os.O_RDWR | os.O_TRUNC)
    os.ftruncate(fd, size)


def _shrink(path: str) -> None:
    size = os.stat(path).st_size
    os.ftruncate(_handed(path), size - PAGE)
    os.ftruncate(_handed(path), size)


def _grow(path: str) -> None:
    os.ftruncate(_handed(path), os.stat(path).st_size + PAGE)


def _map(path: str) -> None:
    with mmap.mmap(os.open(path, os.O_RDWR), PAGE, mmap.MAP_SHARED) as shared:
        shared[: len(MARK)] = MARK


def _make_writable(path: str) -> None:
    LIBC.mmap.restype = ctypes.c_void_p
    size = ctypes.c_size_t(PAGE)
    at = LIBC.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, _handed(path), ctypes.c_long(0))
    if at == _MAP_FAILED:
        raise OSError(ctypes.get_errno(), "mmap")
    if LIBC.mprotect(ctypes.c_void_p(at), size, mmap.PROT_READ | mmap.PROT_WRITE):
        raise OSError(ctypes.get_errno(), "mprotect")
    ctypes.memmove(at, MARK, len(MARK))


def _punch(path: str) -> None:
    mode = _KEEP_SIZE | _PUNCH_HOLE
    libc("fallocate", _handed(path), mode, 0, PAGE)


def _splice(path: str) -> None:
    read, write = os.pipe()
    os.write(write, MARK)
    os.splice(read, _handed(path), len(MARK), offset_dst=0)


def _copy(path: str) -> None:
    source = os.memfd_create("source")
    os.write(source, MARK)
    os.sendfile(os.open(path, os.O_RDWR), source, 0, len(MARK))


_WAYS: dict[str, Callable[[str], object]] = {
    "write, opened anew": _write_anew,
    "write": _write,
    "cut off, opened anew": _truncate_anew,
    "map": _map,
    "make a mapping writable": _make_writable,
    "punch a hole": _punch,
    "splice": _splice,
    "copy": _copy,
    "shrink": _shrink,
    "grow": _grow,
}
