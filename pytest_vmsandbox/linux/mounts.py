"""The classic mount calls, by path."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterable
from enum import IntFlag

from pytest_vmsandbox.linux.arguments import (
    PathArgument,
    bits_of,
    check_bits,
    encode_optional,
    encode_path,
)
from pytest_vmsandbox.linux.libc import call_libc
from pytest_vmsandbox.linux.mount_flags import MountFlags


class UmountFlags(IntFlag):
    """MNT_* and UMOUNT_NOFOLLOW of <sys/mount.h>; each also without its prefix."""

    MNT_FORCE = FORCE = 1
    MNT_DETACH = DETACH = 2
    MNT_EXPIRE = EXPIRE = 4
    UMOUNT_NOFOLLOW = NOFOLLOW = 8


_MOUNTABLE = bits_of(MountFlags) & ~int(MountFlags.KERNEL_ONLY)
_WITH_PROPAGATION = int(MountFlags.PROPAGATION | MountFlags.MS_REC | MountFlags.MS_SILENT)


def mount(
    source: PathArgument | None,
    target: PathArgument,
    fstype: str | bytes | None = None,
    flags: int = 0,
    data: str | bytes | Iterable[str | bytes] | None = None,
) -> None:
    """Put `source` at `target`, or change what is there, as `flags` say (mount(2)).

    `data` is the file system's own text, or its options one by one, to be joined by commas; none
    of those may hold one. ValueError, with nothing done: a NUL anywhere, bits that mount(2) does
    not take, more than one propagation flag or one beside anything but REC and SILENT, and data
    that the kernel would cut off (it reads one page).
    """
    bits = check_bits(flags, allowed=_MOUNTABLE, argument="mount: flags")
    check_propagation(bits, allowed=_WITH_PROPAGATION, argument="mount: flags")
    encoded_target = encode_path(target, argument="target")
    call_libc(
        "mount",
        encode_optional(source, argument="source"),
        encoded_target,
        encode_optional(fstype, argument="fstype"),
        bits,
        _encode_data(data),
        path=encoded_target,
    )


def umount(target: PathArgument, flags: int = 0) -> None:
    """Take off what was mounted last at `target` (umount2(2)).

    ValueError, with nothing done, for EXPIRE beside FORCE or DETACH. EXPIRE fails with EAGAIN
    the first time: it marks the mount, and takes it off when it was not used until the next call.
    """
    bits = check_bits(flags, allowed=bits_of(UmountFlags), argument="umount: flags")
    if bits & UmountFlags.MNT_EXPIRE and bits & (UmountFlags.MNT_FORCE | UmountFlags.MNT_DETACH):
        raise ValueError("umount: flags: MNT_EXPIRE goes with neither MNT_FORCE nor MNT_DETACH")
    encoded = encode_path(target, argument="target")
    call_libc("umount2", encoded, bits, path=encoded)


def pivot_root(new_root: PathArgument, put_old: PathArgument) -> None:
    """Make `new_root` the root mount, and put the old one at `put_old` (pivot_root(2)).

    Both are directories, `put_old` at or below `new_root`, which is a mount point; neither the new
    root's parent mount nor the old root may be shared. ``pivot_root(".", ".")`` stacks the old
    root upon the new one, to be detached next.
    """
    new, old = encode_path(new_root, argument="new_root"), encode_path(put_old, argument="put_old")
    call_libc("pivot_root", new, old, path=new, path2=old)


def check_propagation(bits: int, *, allowed: int, argument: str) -> None:
    """Raise ValueError unless there is none, or one propagation flag with `allowed` beside it."""
    spreading = bits & int(MountFlags.PROPAGATION)
    if spreading.bit_count() > 1:
        raise ValueError(f"{argument}: more than one propagation flag: {spreading:#x}")
    if spreading and bits & ~allowed:
        raise ValueError(f"{argument}: {bits & ~allowed:#x} can't go with a propagation flag")


def _encode_data(data: str | bytes | Iterable[str | bytes] | None) -> bytes | None:
    if data is None:
        return None
    encoded = (
        encode_path(data, argument="data")
        if isinstance(data, str | bytes)
        else b",".join(_encode_option(option) for option in data)
    )
    if len(encoded) >= resource.getpagesize():
        raise ValueError(f"data is {len(encoded)} bytes long, and mount(2) reads one page")
    return encoded


def _encode_option(option: str | bytes) -> bytes:
    encoded = encode_path(option, argument="data")
    if b"," in encoded:
        raise ValueError(f"data: an option holds a comma: {os.fsdecode(encoded)!r}")
    return encoded
