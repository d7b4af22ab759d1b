"""A place for the *at calls: a directory's descriptor, a path below it, and how to look there."""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass, replace
from enum import IntFlag
from typing import TypeAlias

from pytest_vmsandbox.linux.arguments import (
    INT_MAX,
    PathArgument,
    bits_of,
    check_bits,
    check_range,
    encode_path,
)

AT_FDCWD = -100
"""In place of a descriptor: relative paths begin at the working directory."""


class AtFlags(IntFlag):
    """AT_* of <linux/fcntl.h>; some values mean different things to different calls."""

    AT_SYMLINK_NOFOLLOW = 0x100
    AT_EACCESS = 0x200
    AT_REMOVEDIR = 0x200
    AT_HANDLE_FID = 0x200
    AT_SYMLINK_FOLLOW = 0x400
    AT_NO_AUTOMOUNT = 0x800
    AT_EMPTY_PATH = 0x1000
    AT_STATX_SYNC_AS_STAT = 0x0
    AT_STATX_FORCE_SYNC = 0x2000
    AT_STATX_DONT_SYNC = 0x4000
    AT_STATX_SYNC_TYPE = 0x6000
    AT_RECURSIVE = 0x8000
    AT_EXECVE_CHECK = 0x10000


@dataclass(frozen=True, slots=True)
class AtLocation:
    """A path that begins at a borrowed descriptor.

    `fd` is never closed here and must outlive the location; AT_FDCWD means the working
    directory. An empty path is the thing behind `fd` itself: AT_EMPTY_PATH is then set.
    `path` is kept as text (surrogateescape). ValueError for a NUL, unknown flags, a bad number.
    """

    fd: int = AT_FDCWD
    path: PathArgument = ""
    flags: int = AtFlags(0)

    def __post_init__(self) -> None:
        path = os.fsdecode(encode_path(self.path, argument="path"))
        flags = AtFlags(check_bits(self.flags, allowed=bits_of(AtFlags), argument="flags"))
        fd = int(self.fd)
        if fd != AT_FDCWD:
            check_range(fd, lowest=0, highest=INT_MAX, argument="fd")
        empty = AtFlags.AT_EMPTY_PATH if not path else AtFlags(0)
        object.__setattr__(self, "fd", fd)
        object.__setattr__(self, "path", path)
        object.__setattr__(self, "flags", flags | empty)

    @classmethod
    def of(cls, place: PlaceArgument) -> AtLocation:
        """`place` itself, or a bare path from the working directory.

        An empty bare path stays what it is to the kernel: no such file, not the working
        directory (FileNotFoundError), so that a forgotten value never names a real place.
        """
        if isinstance(place, AtLocation):
            return place
        if not encode_path(place, argument="path"):
            raise FileNotFoundError(errno.ENOENT, "an empty path names nothing", "")
        return cls(AT_FDCWD, place)

    @property
    def encoded(self) -> bytes:
        """The path as the kernel reads it."""
        return os.fsencode(self.path)

    def joinpath(self, *parts: PathArgument) -> AtLocation:
        """What lies at `parts` below this; ValueError for an absolute one, which would leave it."""
        texts = [os.fsdecode(encode_path(part, argument="part")) for part in parts]
        for text in texts:
            if text.startswith("/"):
                raise ValueError(f"part is absolute: {text!r}")
        joined = os.path.join(os.fsdecode(self.path), *texts)  # noqa: PTH118 - keeps `//`, `.` and a last `/`
        # Once there is a path, AT_EMPTY_PATH has no more to say.
        emptiness = bits_of([AtFlags.AT_EMPTY_PATH]) if joined else 0
        return replace(self, path=joined, flags=int(self.flags) & ~emptiness)

    def __truediv__(self, part: PathArgument) -> AtLocation:
        return self.joinpath(part)

    def nosymfollow(self) -> AtLocation:
        """The same place, where a symlink at the end of the path is meant itself."""
        return replace(self, flags=self.flags | AtFlags.AT_SYMLINK_NOFOLLOW)

    def symfollow(self) -> AtLocation:
        """The same place, where a symlink at the end of the path is followed."""
        return replace(self, flags=int(self.flags) & ~int(AtFlags.AT_SYMLINK_NOFOLLOW))

    def fspath(self) -> str:
        """A path for calls that take no descriptor, good while `fd` is open in this process.

        It goes through /proc/self/fd, whose links the kernel follows without looking at names
        (proc_pid_fd(5)); AT flags can't be expressed in it.
        """
        path = os.fsdecode(self.path)
        if self.fd == AT_FDCWD or path.startswith("/"):
            return path or "."
        own = f"/proc/self/fd/{self.fd}"
        return f"{own}/{path}" if path else own

    __fspath__ = fspath

    def __str__(self) -> str:
        return self.fspath()


PlaceArgument: TypeAlias = "AtLocation | PathArgument"
