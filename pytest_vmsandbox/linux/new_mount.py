"""A new file system, mounted nowhere yet: fsopen, fsconfig and fsmount in one."""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntEnum

from pytest_vmsandbox.linux.arguments import bits_of, check_bits, encode_path
from pytest_vmsandbox.linux.libc import call_libc
from pytest_vmsandbox.linux.mount_tree import MountAttrFlags
from pytest_vmsandbox.linux.owned_fd import OwnedFd

_CLOEXEC = 1  # FSOPEN_CLOEXEC and FSMOUNT_CLOEXEC of <linux/mount.h>


class FsconfigCommand(IntEnum):
    """The FSCONFIG_* of <linux/mount.h> that we use; each also without its prefix."""

    FSCONFIG_SET_STRING = SET_STRING = 1
    FSCONFIG_CMD_CREATE = CMD_CREATE = 6


def new_mount(kind: str, *, options: Mapping[str, str], attributes: int = 0) -> OwnedFd:
    """A new mount of a file system of `kind`, which `move_mount` puts in its place.

    The descriptor is the caller's; closed before the mount has a place, the mount is gone.
    `options` are the file system's own, `attributes` MOUNT_ATTR_*. Raises OSError with the name
    of the call that failed, and of the option; nothing is left then. Source: fsopen(2),
    fsconfig(2), fsmount(2), Linux 5.2.
    """
    bits = check_bits(attributes, allowed=bits_of(MountAttrFlags), argument="new_mount: attributes")
    name = encode_path(kind, argument="new_mount: kind")
    with OwnedFd(call_libc("fsopen", name, _CLOEXEC, path=kind)) as context:
        for option, value in options.items():
            call_libc(
                "fsconfig",
                context,
                FsconfigCommand.SET_STRING,
                encode_path(option, argument="new_mount: option"),
                encode_path(value, argument=f"new_mount: {option}"),
                0,
                path=option,
            )
        call_libc("fsconfig", context, FsconfigCommand.CMD_CREATE, None, None, 0, path=kind)
        return OwnedFd(call_libc("fsmount", context, _CLOEXEC, bits, path=kind))
