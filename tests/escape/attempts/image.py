"""The image: a file of the owner's that is handed over to be read, and no more."""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import struct

from tests.escape.attempts.calls import LIBC, libc
from tests.escape.attempts.table import Targets, attempt

_F_SETLEASE = 1024
_FS_IOC_GETFLAGS, _FS_IOC_SETFLAGS = 0x80086601, 0x40086602
_IN_ACCESS = 1
_READABLE = (
    "whoever may read a file may keep others from locking it; nothing of ours locks an image"
)


def _opened(targets: Targets) -> int:
    """The image, for writing if that can be."""
    try:
        return os.open(targets.image, os.O_RDWR)
    except OSError:
        return os.open(targets.image, os.O_RDONLY)


@attempt("open the image by its path on the host")
def image_by_path(targets: Targets) -> str:
    os.close(os.open(targets.image_on_host, os.O_RDONLY))
    return "it is open"


@attempt("open the image anew for writing")
def image_reopened(targets: Targets) -> str:
    os.close(os.open(targets.image, os.O_RDWR))
    return "it is open for writing"


@attempt("cut the image off")
def image_truncated(targets: Targets) -> str:
    os.truncate(targets.image, os.stat(targets.image).st_size)
    return "set its size to what it was"


@attempt("change the image's mode")
def image_mode(targets: Targets) -> str:
    fd = _opened(targets)
    os.fchmod(fd, os.fstat(fd).st_mode & 0o7777)
    return "set it to what it was"


@attempt("give the image to somebody else")
def image_owner(targets: Targets) -> str:
    fd = _opened(targets)
    state = os.fstat(fd)
    os.fchown(fd, state.st_uid, state.st_gid)
    return "set it to what it was"


@attempt("change the image's times")
def image_times(targets: Targets) -> str:
    fd = _opened(targets)
    state = os.fstat(fd)
    os.utime(fd, ns=(state.st_atime_ns, state.st_mtime_ns))
    return "set them to what they were"


@attempt("give the image an attribute")
def image_attribute(targets: Targets) -> str:
    fd = _opened(targets)
    os.setxattr(fd, "user.vmsandbox", b"was here")
    os.removexattr(fd, "user.vmsandbox")
    return "set one, and removed it"


@attempt("change the image's inode flags (append only, immutable)", by_host=True)
def image_flags(targets: Targets) -> str:
    fd = _opened(targets)
    flags = fcntl.ioctl(fd, _FS_IOC_GETFLAGS, b"\0" * 8)
    fcntl.ioctl(fd, _FS_IOC_SETFLAGS, flags)
    return "set them to what they were"


@attempt("make another name for the image")
def image_linked(targets: Targets) -> str:
    at_fdcwd, follow = -100, 0x400
    name = f"{targets.room}/linked".encode()
    libc("linkat", at_fdcwd, targets.image.encode(), at_fdcwd, name, follow)
    os.unlink(name)
    return "made one"


@attempt("map the image for writing, shared")
def image_mapped(targets: Targets) -> str:
    fd = _opened(targets)
    mmap.mmap(fd, 4096, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ | mmap.PROT_WRITE).close()
    return "mapped it"


@attempt("punch a hole into the image")
def image_fallocate(targets: Targets) -> str:
    keep_size, punch_hole = 1, 2
    offset = ctypes.c_long(os.stat(targets.image).st_size + 4096)
    LIBC.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_long]
    libc("fallocate", _opened(targets), keep_size | punch_hole, offset.value, 4096)
    return "behind its end"


@attempt("lock the image (flock) against all others")
def image_flock(targets: Targets) -> str:
    fd = os.open(targets.image, os.O_RDONLY)
    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return "locked it"


@attempt("lock the image (fcntl) against writers", not_apart=_READABLE)
def image_read_lock(targets: Targets) -> str:
    fcntl.lockf(os.open(targets.image, os.O_RDONLY), fcntl.LOCK_SH | fcntl.LOCK_NB)
    return "locked it"


@attempt("take a lease on the image, which holds up whoever opens it")
def image_lease(targets: Targets) -> str:
    fcntl.fcntl(os.open(targets.image, os.O_RDONLY), _F_SETLEASE, fcntl.F_RDLCK)
    return "took it"


@attempt(
    "watch who else reads the image (inotify)",
    not_apart="whoever may read a file may watch it: it is seen when others read the same image",
)
def image_watched(targets: Targets) -> str:
    watcher = libc("inotify_init")
    libc("inotify_add_watch", watcher, targets.image.encode(), _IN_ACCESS)
    return "watched it"


@attempt("have the kernel signal a process of the host for the image (F_SETOWN)")
def image_signal_owner(targets: Targets) -> str:
    fd = os.open(targets.image, os.O_RDONLY)
    libc("fcntl", fd, fcntl.F_SETOWN, targets.victim)
    f_getown_ex = 16
    owner = fcntl.fcntl(fd, f_getown_ex, b"\0" * 8)
    return f"its owner is {struct.unpack('ii', owner)[1]}"
