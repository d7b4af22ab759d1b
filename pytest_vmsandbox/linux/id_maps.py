"""The users and groups of a user namespace: who is who on its outside."""

from __future__ import annotations

import os

from pytest_vmsandbox.linux.arguments import INT_MAX, check_range
from pytest_vmsandbox.linux.libc import os_error

_HIGHEST_ID = 2**32 - 2  # the next one, (uid_t) -1, is nobody's


def write_identity_maps(
    pid: int | None = None, *, uid: int, gid: int, deny_setgroups: bool
) -> None:
    """Map `uid` and `gid` to themselves in the new user namespace of `pid`, and no other id.

    `pid` is as /proc numbers it; None is the caller itself. Whoever has no CAP_SETGID in the parent
    namespace must deny setgroups first, and may map its own ids only (user_namespaces(7)). Maps are
    for good: a second call is a PermissionError. The OSError names the file that was refused; those
    before it (setgroups, uid_map, gid_map) are then written. ValueError: nothing was done.
    """
    check_range(uid, lowest=0, highest=_HIGHEST_ID, argument="uid")
    check_range(gid, lowest=0, highest=_HIGHEST_ID, argument="gid")
    whose = "self"
    if pid is not None:
        whose = str(check_range(pid, lowest=1, highest=INT_MAX, argument="pid"))
    if deny_setgroups:
        _write(f"/proc/{whose}/setgroups", "deny")
    _write(f"/proc/{whose}/uid_map", f"{uid} {uid} 1\n")
    _write(f"/proc/{whose}/gid_map", f"{gid} {gid} 1\n")


def _write(path: str, text: str) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, text.encode("ascii"))  # one write: a second one would be refused
    except OSError as error:
        raise os_error(error.errno or 0, "write", path) from None
    finally:
        os.close(fd)
