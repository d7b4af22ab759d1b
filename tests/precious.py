"""Files that must survive a removal next to them, and run directories to be removed."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

from pytest_vmsandbox.errors import TeardownRefused
from pytest_vmsandbox.host.run_directory import mark_run_directory
from pytest_vmsandbox.lease.privilege import Privilege
from pytest_vmsandbox.lease.teardown import tear_down

# Where a test's own mount namespace has an empty file system (`in_room`).
ROOM = Path("/mnt")

NOT_UTF_8 = os.fsdecode(b"\xff\xfe")
ODD_NAMES = ["two words", "new\nline", "tab\t", r"literal\040", "#", "-rf", NOT_UTF_8]


class InterruptedHere(BaseException):
    """As if the process had been killed."""


def make_precious(path: Path) -> str:
    """A tree of files at `path`; returns its checksum."""
    (path / "sub").mkdir(parents=True)
    (path / "file").write_text("theirs")
    (path / "sub" / "file").write_text("theirs, too")
    (path / "sub" / "link").symlink_to("file")
    return checksum(path)


def checksum(path: Path) -> str:
    """Of the names, kinds and contents of everything at and below `path`."""
    digest = hashlib.sha256()
    for found in [path, *sorted(path.rglob("*"))]:
        state = found.lstat()
        digest.update(repr((str(found.relative_to(path)), state.st_mode)).encode())
        if found.is_file() and not found.is_symlink():
            digest.update(found.read_bytes())
    return digest.hexdigest()


def make_run_directory(path: Path) -> Path:
    """A run directory at `path` with something in it."""
    (path / "m1" / "root").mkdir(parents=True)
    path.chmod(0o700)
    mark_run_directory(path)
    (path / "m1" / "console.log").write_text("boot")
    return path


def names_in(path: Path) -> list[str]:
    """What is in a directory."""
    return sorted(entry.name for entry in path.iterdir())


def refusal_of(path: Path, *, privilege: Privilege | None = None) -> TeardownRefused:
    """The error of a teardown that must be refused."""
    try:
        tear_down(path, privilege=privilege)
    except TeardownRefused as refused:
        return refused
    raise AssertionError(f"it was not refused: {path}")


@contextmanager
def interrupted_before_change(number: int) -> Iterator[None]:
    """Raise InterruptedHere in place of the call with this number that changes a directory."""
    calls = 0

    def wrapped(original: Callable[..., None]) -> Callable[..., None]:
        def call(*arguments: object, **options: object) -> None:
            nonlocal calls
            calls += 1
            if calls == number:
                raise InterruptedHere
            original(*arguments, **options)

        return call

    with patch.multiple(
        os, unlink=wrapped(os.unlink), rmdir=wrapped(os.rmdir), rename=wrapped(os.rename)
    ):
        yield
