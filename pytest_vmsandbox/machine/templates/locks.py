"""Who makes a template, who uses it, who may change the cache: flock(2), let go of however we die.

    .lock             held by whoever takes, gives or looks for one of the others: never for long
    DIGEST/lock       shared by the processes that use a template, alone held by its maker

The second kind lies in the template's own directory, and goes with it: none is ever left over.
Those of the second kind are let go of by closing, never by LOCK_UN: that would take them from our
parent too.
"""

from __future__ import annotations

import errno
import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pytest_vmsandbox.deadline import Deadline
from pytest_vmsandbox.linux import OwnedFd

LOCK = "lock"
_CACHE_LOCK = ".lock"
# Below it, directories are renamed; what takes long is done without it.
_CHANGES_S = 30.0
_POLL_S = 0.002


@contextmanager
def changing(directory: Path) -> Iterator[None]:
    """Be the only one in the cache who takes locks or moves templates; TimedOut after 30 s.

    FileNotFoundError where there is no such directory.
    """
    deadline = Deadline.after(seconds=_CHANGES_S)
    with _opened(directory / _CACHE_LOCK) as lock:
        while not _taken(lock, fcntl.LOCK_EX):
            if deadline.passed:
                raise deadline.timed_out(f"the lock {directory / _CACHE_LOCK}")
            time.sleep(_POLL_S)
        try:
            yield
        finally:
            # Who was forked meanwhile by another thread has it too, and would keep it.
            fcntl.flock(lock, fcntl.LOCK_UN)


def share(template: Path) -> OwnedFd | None:
    """The lock of those who use a template; None while somebody makes or removes it.

    To be called while `changing`. FileNotFoundError where there is no such template.
    """
    return _locked(template, fcntl.LOCK_SH)


def own(template: Path) -> OwnedFd | None:
    """The lock of whoever makes or removes a template; None while anybody makes or uses it.

    To be called while `changing`. FileNotFoundError where there is no such directory.
    """
    return _locked(template, fcntl.LOCK_EX)


def share_what_is_owned(lock: OwnedFd) -> None:
    """Go on as one who uses it. To be called while `changing`: the kernel lets go for a moment."""
    fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)


def _locked(template: Path, kind: int) -> OwnedFd | None:
    lock = _opened(template / LOCK)
    if _taken(lock, kind):
        return lock
    lock.close()
    return None


def _taken(lock: OwnedFd, kind: int) -> bool:
    try:
        fcntl.flock(lock, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _opened(path: Path) -> OwnedFd:
    flags = os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        # To be written: NFS gives nobody else a lock that others must not have.
        return OwnedFd(os.open(path, flags | os.O_RDWR | os.O_CREAT, 0o600))
    except OSError as error:
        if error.errno not in (errno.EROFS, errno.EACCES, errno.EPERM):
            raise
        return OwnedFd(os.open(path, flags | os.O_RDONLY))
