"""Scratch: a directory for what a probe has programs make, of which no dead probe leaves any."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pytest_vmsandbox.linux.mountinfo import mounts_at_or_below, read_mountinfo
from pytest_vmsandbox.linux.owned_fd import OwnedFd

_PREFIX = "vmsandbox-scratch-"


@contextmanager
def open_scratch() -> Iterator[Path]:
    """A private directory, removed afterwards; OSError where none can be made.

    Whoever is killed meanwhile leaves it, and the next to open one removes it: the kernel lets go
    of a lock when its holder is no more. Nothing is remembered of a survey that was killed, so that
    the next run is the next to open one.
    """
    _remove_abandoned()
    path, held = _made()
    with held:
        try:
            yield path
        finally:
            shutil.rmtree(path)


def _made() -> tuple[Path, OwnedFd]:
    """A new one that is locked; whoever takes it for an abandoned one before that removes it."""
    while True:
        path = Path(tempfile.mkdtemp(prefix=_PREFIX))
        held = _locked(path)
        if held is not None:
            return path, held


def _remove_abandoned() -> None:
    for path in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        held = _locked(path)
        if held is None:
            continue
        with held:
            if not mounts_at_or_below(read_mountinfo(), path):
                shutil.rmtree(path, ignore_errors=True)  # what was begun there may go on a moment


def _locked(path: Path) -> OwnedFd | None:
    """Our own directory at that path, if nobody else holds it."""
    try:
        held = OwnedFd(os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC))
    except OSError:
        return None
    with suppress(OSError):
        opened = os.fstat(held)
        if opened.st_uid == os.getuid():  # not even for a moment is another user's locked
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(path.lstat(), opened):
                return held
    held.close()
    return None
