"""The locks that tell a live run from a dead one: flock(2), let go by the kernel however we die.

They are let go by closing, never by LOCK_UN: that would take the lock from our parent as well in a
process that was forked from it and shares its descriptor.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pytest_vmsandbox.deadline import Deadline
from pytest_vmsandbox.lease.entries import identity_to_json, parse_identity
from pytest_vmsandbox.lease.layout import LOCK
from pytest_vmsandbox.linux import ProcessIdentity

# Under a base's lock a run directory is made: some system calls, and the disk's time to sync.
_BASE_S = 30.0
_POLL_S = 0.002

_LONGEST_NAME = 1024

_LOCK_FILE = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC


@contextmanager
def hold_lock_of_the_living(path: Path) -> Iterator[None]:
    """Make the lock of a new run directory, and hold it."""
    lock = os.open(path / LOCK, _LOCK_FILE | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(lock)


@contextmanager
def hold_lock_of_the_dead(path: Path) -> Iterator[None]:
    """Hold the lock that a dead run left; our name stands in it meanwhile, for `named_holder`.

    Raises BlockingIOError when somebody holds it, FileNotFoundError when it is gone, or goes
    meanwhile: whoever held it has then removed the run directory.
    """
    lock = os.open(path / LOCK, _LOCK_FILE)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.path.samestat(os.fstat(lock), (path / LOCK).lstat()):
            raise FileNotFoundError(f"{path / LOCK}: another one took its place")
        os.ftruncate(lock, 0)
        os.pwrite(lock, json.dumps(identity_to_json(ProcessIdentity.current())).encode(), 0)
        yield
    finally:
        os.close(lock)


def named_holder(path: Path) -> ProcessIdentity | None:
    """Who held the lock of a dead run last, if anybody; they may have let go of it."""
    lock = os.open(path / LOCK, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(lock, "rb") as file:  # noqa: PTH123  # it is a descriptor
        try:
            return parse_identity(json.loads(file.read(_LONGEST_NAME)))
        except (ValueError, RecursionError):  # nobody, or not yet
            return None


@contextmanager
def hold_base_lock(base: Path) -> Iterator[None]:
    """Be the only one who makes a run directory below `base`, or judges a half-made one.

    Raises TimedOut when somebody else stays at it.
    """
    with hold_directory_lock(base, deadline=Deadline.after(seconds=_BASE_S)):
        yield


@contextmanager
def hold_directory_lock(directory: Path, *, deadline: Deadline) -> Iterator[None]:
    """Be the only process, and thread, that holds the lock of this directory.

    Raises TimedOut when somebody else has it at the deadline, an OSError where it is none.
    """
    folder = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        while True:
            try:
                fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if deadline.passed:
                    raise deadline.timed_out(f"the lock of {directory}") from None
                time.sleep(_POLL_S)
        yield
    finally:
        os.close(folder)
