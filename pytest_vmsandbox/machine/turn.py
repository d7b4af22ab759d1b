"""A turn: of all workers that share a cache directory, one at a time starts a machine ahead.

Each sees the same idle processor; without turns all would start on it at the same instant.
"""

from __future__ import annotations

import fcntl
import os
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from pytest_vmsandbox.linux import OwnedFd

LOCK = "ahead.lock"


def take_turn(cache_dir: Path) -> AbstractContextManager[object] | None:
    """A turn, which ends with the block, or with us (flock(2)); None while it is another's.

    Where the cache can't be written to, nobody waits for anybody.
    """
    try:
        lock = OwnedFd(os.open(cache_dir / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
    except OSError:
        return nullcontext()
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        return None
    except OSError:  # a file system without locks
        lock.close()
        return nullcontext()
    return lock
