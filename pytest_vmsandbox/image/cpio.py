"""A cpio archive as the kernel unpacks it for an initramfs ("newc").

Written by ourselves because the entries are described, not read from a directory: owners and
device nodes then need no privilege. Source: Linux, driver-api/early-userspace/buffer-format.rst.
"""

from __future__ import annotations

import stat
from collections.abc import Iterable
from dataclasses import dataclass
from typing import BinaryIO, Final

_TRAILER: Final = "TRAILER!!!"


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One thing in the archive, owned by root. `mode` has the type bits, as in stat(2)."""

    name: str
    mode: int
    content: bytes = b""
    device: tuple[int, int] = (0, 0)


def directory(name: str, *, permissions: int = 0o755) -> Entry:
    """A directory."""
    return Entry(name=name, mode=stat.S_IFDIR | permissions)


def file(name: str, content: bytes, *, permissions: int = 0o644) -> Entry:
    """A regular file."""
    return Entry(name=name, mode=stat.S_IFREG | permissions, content=content)


def symlink(name: str, *, target: str) -> Entry:
    """A symbolic link."""
    return Entry(name=name, mode=stat.S_IFLNK | 0o777, content=target.encode())


def character_device(name: str, *, major: int, minor: int, permissions: int = 0o600) -> Entry:
    """A character device node."""
    return Entry(name=name, mode=stat.S_IFCHR | permissions, device=(major, minor))


def write_archive(entries: Iterable[Entry], out: BinaryIO) -> None:
    """Write an archive of `entries`, in their order, to `out`.

    The same entries give the same bytes: inode numbers count up, every time stamp is 0.
    Parents must come before what is in them, or the kernel drops the children in silence;
    that, and a name twice, is a ValueError.
    """
    seen: set[str] = set()
    for inode, entry in enumerate(entries, start=1):
        _check_place(entry.name, seen)
        seen.add(entry.name)
        out.write(_render(entry, inode))
    out.write(_render(Entry(name=_TRAILER, mode=0), 0))


def _check_place(name: str, seen: set[str]) -> None:
    if name in seen or name == _TRAILER:
        raise ValueError(f"{name!r} is in the archive already")
    if name.startswith("/") or "\0" in name or "" in name.split("/") or ".." in name.split("/"):
        raise ValueError(f"{name!r} is no name in an archive: relative, no '..', no empty part")
    parent, slash, _ = name.rpartition("/")
    if slash and parent not in seen:
        raise ValueError(f"{name!r} comes before its parent {parent!r}")


def _render(entry: Entry, inode: int) -> bytes:
    name = entry.name.encode() + b"\0"
    links = 2 if stat.S_ISDIR(entry.mode) else 1
    fields = (
        inode,
        entry.mode,
        0,  # uid
        0,  # gid
        links,
        0,  # mtime
        len(entry.content),
        0,  # device that it is on: 0:0 with distinct inodes, so that nothing is a hard link
        0,
        *entry.device,
        len(name),
        0,  # checksum, of another format
    )
    header = b"070701" + b"".join(b"%08X" % field for field in fields)
    return _padded(header + name) + _padded(entry.content)


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)
