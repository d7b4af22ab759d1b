"""The newer mount calls: mounts as descriptors, moved and changed by place."""

from __future__ import annotations

import ctypes
from enum import IntFlag

from pytest_vmsandbox.linux.arguments import bits_of, check_bits, check_fd
from pytest_vmsandbox.linux.at import AtFlags, AtLocation, PlaceArgument
from pytest_vmsandbox.linux.libc import call_libc
from pytest_vmsandbox.linux.mount_flags import MountFlags
from pytest_vmsandbox.linux.mounts import check_propagation
from pytest_vmsandbox.linux.owned_fd import OwnedFd

_NOFOLLOW = int(AtFlags.AT_SYMLINK_NOFOLLOW)
_NO_AUTOMOUNT = int(AtFlags.AT_NO_AUTOMOUNT)
_EMPTY_PATH = int(AtFlags.AT_EMPTY_PATH)
_RECURSIVE = int(AtFlags.AT_RECURSIVE)


class OpenTreeFlags(IntFlag):
    """OPEN_TREE_* of <linux/mount.h>, and the AT_* that open_tree(2) takes."""

    OPEN_TREE_CLONE = CLONE = 1
    OPEN_TREE_NAMESPACE = NAMESPACE = 2
    OPEN_TREE_CLOEXEC = CLOEXEC = 0o2000000
    AT_SYMLINK_NOFOLLOW = 0x100
    AT_NO_AUTOMOUNT = 0x800
    AT_EMPTY_PATH = 0x1000
    AT_RECURSIVE = 0x8000


class MoveMountFlags(IntFlag):
    """MOVE_MOUNT_* of <linux/mount.h>; each also without its prefix."""

    MOVE_MOUNT_F_SYMLINKS = F_SYMLINKS = 0x1
    MOVE_MOUNT_F_AUTOMOUNTS = F_AUTOMOUNTS = 0x2
    MOVE_MOUNT_F_EMPTY_PATH = F_EMPTY_PATH = 0x4
    MOVE_MOUNT_T_SYMLINKS = T_SYMLINKS = 0x10
    MOVE_MOUNT_T_AUTOMOUNTS = T_AUTOMOUNTS = 0x20
    MOVE_MOUNT_T_EMPTY_PATH = T_EMPTY_PATH = 0x40
    MOVE_MOUNT_SET_GROUP = SET_GROUP = 0x100
    MOVE_MOUNT_BENEATH = BENEATH = 0x200


class MountAttrFlags(IntFlag):
    """MOUNT_ATTR_* of <linux/mount.h>; each also without its prefix."""

    MOUNT_ATTR_RDONLY = RDONLY = 0x1
    MOUNT_ATTR_NOSUID = NOSUID = 0x2
    MOUNT_ATTR_NODEV = NODEV = 0x4
    MOUNT_ATTR_NOEXEC = NOEXEC = 0x8
    MOUNT_ATTR_RELATIME = RELATIME = 0x0
    MOUNT_ATTR_NOATIME = NOATIME = 0x10
    MOUNT_ATTR_STRICTATIME = STRICTATIME = 0x20
    MOUNT_ATTR__ATIME = ATIME = 0x70
    MOUNT_ATTR_NODIRATIME = NODIRATIME = 0x80
    MOUNT_ATTR_IDMAP = IDMAP = 0x100000
    MOUNT_ATTR_NOSYMFOLLOW = NOSYMFOLLOW = 0x200000


class MountSetattrFlags(IntFlag):
    """The AT_* that mount_setattr(2) takes."""

    AT_SYMLINK_NOFOLLOW = 0x100
    AT_NO_AUTOMOUNT = 0x800
    AT_EMPTY_PATH = 0x1000
    AT_RECURSIVE = 0x8000


class _MountAttr(ctypes.Structure):
    """struct mount_attr (mount_setattr(2))."""

    _fields_ = (
        ("attr_set", ctypes.c_uint64),
        ("attr_clr", ctypes.c_uint64),
        ("propagation", ctypes.c_uint64),
        ("userns_fd", ctypes.c_uint64),
    )


def open_tree(place: PlaceArgument, flags: int = 0) -> OwnedFd:
    """Open the mount at `place`; the descriptor is the caller's (open_tree(2), Linux 5.2).

    With CLONE it is a detached copy of that mount (with AT_RECURSIVE: and of those below), which
    dissolves at the last close. CLOEXEC is always set. AT_* flags of the place count too.
    ValueError, with nothing done, for other flags, and for AT_RECURSIVE without CLONE.
    """
    location = AtLocation.of(place)
    bits = _all_flags(location, flags, allowed=bits_of(OpenTreeFlags), call="open_tree")
    if bits & _RECURSIVE and not bits & OpenTreeFlags.OPEN_TREE_CLONE:
        raise ValueError("open_tree: flags: AT_RECURSIVE needs OPEN_TREE_CLONE")
    bits |= OpenTreeFlags.OPEN_TREE_CLOEXEC
    return OwnedFd(call_libc("open_tree", location.fd, location.encoded, int(bits), path=location))


def move_mount(source: PlaceArgument, target: PlaceArgument, flags: int = 0) -> None:
    """Put the mount at `source`, attached or not, at `target` (move_mount(2), Linux 5.2).

    The places decide about symlinks at their ends: AT_SYMLINK_NOFOLLOW clears F_SYMLINKS or
    T_SYMLINKS, otherwise it is set. AT_NO_AUTOMOUNT clears F_ or T_AUTOMOUNTS, and an empty path
    sets F_ or T_EMPTY_PATH. ValueError, with nothing done, for any other AT flag.
    """
    origin, goal = AtLocation.of(source), AtLocation.of(target)
    bits = check_bits(flags, allowed=bits_of(MoveMountFlags), argument="move_mount: flags")
    bits = _with_place(bits, origin, argument="source", shift=0)
    bits = _with_place(bits, goal, argument="target", shift=4)
    call_libc(
        "move_mount",
        origin.fd,
        origin.encoded,
        goal.fd,
        goal.encoded,
        bits,
        path=origin,
        path2=goal,
    )


def mount_setattr(
    place: PlaceArgument,
    flags: int = 0,
    *,
    attr_set: int = 0,
    attr_clr: int = 0,
    propagation: int = 0,
    userns_fd: int | None = None,
) -> None:
    """Change the mount at `place` (mount_setattr(2), Linux 5.12).

    Clears `attr_clr`, then sets `attr_set` (MountAttrFlags), and gives it the one `propagation`
    flag (MountFlags); with AT_RECURSIVE so for the whole tree, or for none of it. `userns_fd` goes
    with IDMAP, and IDMAP with it. ValueError, with nothing done, for IDMAP in `attr_clr`: a mapping
    is for good.
    """
    location = AtLocation.of(place)
    bits = _all_flags(location, flags, allowed=bits_of(MountSetattrFlags), call="mount_setattr")
    attributes = _mount_attr(attr_set, attr_clr, propagation, userns_fd)
    call_libc(
        "mount_setattr",
        location.fd,
        location.encoded,
        bits,
        ctypes.byref(attributes),
        ctypes.sizeof(attributes),
        path=location,
    )


def _all_flags(location: AtLocation, flags: int, *, allowed: int, call: str) -> int:
    """The AT flags of the place and those of the call in one word, as the kernel takes them."""
    of_place = check_bits(location.flags, allowed=allowed, argument=f"{call}: place")
    return of_place | check_bits(flags, allowed=allowed, argument=f"{call}: flags")


def _with_place(bits: int, location: AtLocation, *, argument: str, shift: int) -> int:
    """The F_ flags of `location` in `bits`; four bits higher they are the T_ flags."""
    accepted = _NOFOLLOW | _NO_AUTOMOUNT | _EMPTY_PATH
    at = check_bits(location.flags, allowed=accepted, argument=f"move_mount: {argument}")
    symlinks = int(MoveMountFlags.MOVE_MOUNT_F_SYMLINKS) << shift
    bits = bits & ~symlinks if at & _NOFOLLOW else bits | symlinks
    if at & _NO_AUTOMOUNT:
        bits &= ~(int(MoveMountFlags.MOVE_MOUNT_F_AUTOMOUNTS) << shift)
    if at & _EMPTY_PATH:
        bits |= int(MoveMountFlags.MOVE_MOUNT_F_EMPTY_PATH) << shift
    return bits


def _mount_attr(
    attr_set: int, attr_clr: int, propagation: int, userns_fd: int | None
) -> _MountAttr:
    known = bits_of([*MountAttrFlags, MountAttrFlags.MOUNT_ATTR__ATIME])
    sets = check_bits(attr_set, allowed=known, argument="mount_setattr: attr_set")
    clears = check_bits(attr_clr, allowed=known, argument="mount_setattr: attr_clr")
    spreading = int(MountFlags.PROPAGATION)
    spread = check_bits(propagation, allowed=spreading, argument="mount_setattr: propagation")
    check_propagation(spread, allowed=spreading, argument="mount_setattr: propagation")
    if clears & MountAttrFlags.MOUNT_ATTR_IDMAP:
        raise ValueError("mount_setattr: attr_clr: MOUNT_ATTR_IDMAP can't be cleared")
    if bool(sets & MountAttrFlags.MOUNT_ATTR_IDMAP) != (userns_fd is not None):
        raise ValueError("mount_setattr: userns_fd goes with MOUNT_ATTR_IDMAP, and it with that")
    fd = 0 if userns_fd is None else check_fd(userns_fd, argument="mount_setattr: userns_fd")
    return _MountAttr(sets, clears, spread, fd)
