"""Opening a file where the kernel itself keeps the way to it within bounds."""

from __future__ import annotations

import ctypes
import os
from enum import IntFlag

from pytest_vmsandbox.linux.arguments import PathArgument, bits_of, check_bits, check_range
from pytest_vmsandbox.linux.at import AtLocation
from pytest_vmsandbox.linux.libc import call_libc
from pytest_vmsandbox.linux.owned_fd import OwnedFd

# Somebody who renames directories without end could keep us here for good.
_TRIES = 128


class ResolveFlags(IntFlag):
    """RESOLVE_* of <linux/openat2.h>; each also without its prefix."""

    RESOLVE_NO_XDEV = NO_XDEV = 0x01
    RESOLVE_NO_MAGICLINKS = NO_MAGICLINKS = 0x02
    RESOLVE_NO_SYMLINKS = NO_SYMLINKS = 0x04
    RESOLVE_BENEATH = BENEATH = 0x08
    RESOLVE_IN_ROOT = IN_ROOT = 0x10
    RESOLVE_CACHED = CACHED = 0x20


class _OpenHow(ctypes.Structure):
    """struct open_how (openat2(2))."""

    _fields_ = (
        ("flags", ctypes.c_uint64),
        ("mode", ctypes.c_uint64),
        ("resolve", ctypes.c_uint64),
    )


def openat2(at: int, path: PathArgument, flags: int, *, mode: int = 0, resolve: int = 0) -> OwnedFd:
    """Open `path` below the directory `at`; the descriptor is the caller's (openat2(2), Linux 5.6).

    `at` is borrowed, and may be AT_FDCWD. `flags` are os.O_*, CLOEXEC is always set; `mode` goes
    with O_CREAT and O_TMPFILE only (else EINVAL); `resolve` are ResolveFlags. A way that leaves
    what BENEATH or NO_XDEV allow is an OSError(EXDEV), one over a forbidden link ELOOP. EAGAIN,
    which a rename under way can cause, is tried again a bounded number of times; with CACHED it is
    the answer. ValueError, with nothing done, for unknown flags, a bad number and a NUL.
    """
    location = AtLocation(at, path)
    bits = check_bits(flags, allowed=_open_flags(), argument="openat2: flags")
    how = _OpenHow(
        bits | os.O_CLOEXEC,
        check_range(mode, lowest=0, highest=0o7777, argument="openat2: mode"),
        check_bits(resolve, allowed=bits_of(ResolveFlags), argument="openat2: resolve"),
    )
    tries = 1 if how.resolve & ResolveFlags.RESOLVE_CACHED else _TRIES
    while True:
        tries -= 1
        try:
            return OwnedFd(
                call_libc(
                    "openat2",
                    location.fd,
                    location.encoded,
                    ctypes.byref(how),
                    ctypes.sizeof(how),
                    path=location,
                )
            )
        except BlockingIOError:
            if not tries:
                raise


def _open_flags() -> int:
    """Every O_* that this Python knows: the numbers differ between machines."""
    together = 0
    for name, value in vars(os).items():
        if name.startswith("O_"):
            together |= value
    return together
