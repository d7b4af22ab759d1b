"""Descriptors: what it was given, what it was not, and what can be reached through them."""

from __future__ import annotations

import os
import stat

from tests.escape.attempts.table import RESULTS, Refused, Targets, attempt

_LOG_MIB = 64
_OWN_LOG = "the log is the owner's file, and so is the VMM: it may spoil what it has said itself"


def _given() -> list[int]:
    """What was open when the program began; the zip file it comes from is one of them."""
    found = []
    for fd in set(range(1024)) - {RESULTS}:
        try:
            os.fstat(fd)
        except OSError:
            continue
        found.append(fd)
    return found


@attempt(
    "use a descriptor that it was not given",
    unproved="the bare launcher closes all others as well",
)
def extra_descriptors(targets: Targets) -> str:
    # 0, 1, 2, the image and the program: as numbers behind walls, opened by path in bare.
    behind_walls = targets.image.startswith("/proc/self/fd/")
    allowed = 5 if behind_walls else 3
    found = _given()
    if len(found) > allowed:
        return f"{[os.readlink(f'/proc/self/fd/{fd}') for fd in found]}"
    raise Refused(f"{len(found)} are open")


@attempt(
    "find a directory or a socket among its descriptors", unproved="neither launcher gives any"
)
def directory_descriptor(targets: Targets) -> str:
    for fd in _given():
        kind = os.fstat(fd).st_mode
        if stat.S_ISDIR(kind) or stat.S_ISSOCK(kind):
            return f"{fd} is {os.readlink(f'/proc/self/fd/{fd}')}"
    raise Refused("none is one")


@attempt("reach the files beside its log, by the path that the descriptor tells")
def beside_the_log(targets: Targets) -> str:
    return f"{os.listdir(os.path.dirname(os.readlink('/proc/self/fd/1')))}"


@attempt(
    "reach the files beside its log through the descriptor itself",
    unproved="a file is not a directory, anywhere",
)
def through_the_log(targets: Targets) -> str:
    os.close(os.open("..", os.O_RDONLY, dir_fd=1))
    return "opened the directory"


@attempt(
    "open its log anew, to rewrite it",
    not_apart=_OWN_LOG,
    not_apart_in=("userns",),
)
def rewrite_log(targets: Targets) -> str:
    os.close(os.open("/proc/self/fd/1", os.O_RDWR))
    return "it is open for reading and writing"


@attempt("change the mode of its log", not_apart=_OWN_LOG, not_apart_in=("userns",))
def log_mode(targets: Targets) -> str:
    os.fchmod(1, os.fstat(1).st_mode & 0o7777)
    return "set it to what it was"


@attempt(f"grow its log beyond {_LOG_MIB} MiB")
def grow_log(targets: Targets) -> str:
    size = os.fstat(1).st_size
    try:
        os.ftruncate(1, _LOG_MIB << 20)  # a hole: it takes no room on the disk
        os.write(1, b"x")
        return f"it has {os.fstat(1).st_size} bytes"
    finally:
        os.ftruncate(1, size)
