"""A directory held by descriptors: reached from / without following a link, and provably ours."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from pytest_vmsandbox.errors import TeardownRefused
from pytest_vmsandbox.host.run_directory import RUN_DIRECTORY_MARKER
from pytest_vmsandbox.lease.leftover import look_at

# An O_PATH descriptor names a thing without opening it: no device starts, nothing is mounted
# automatically, and no permission but that to pass through its parents is asked for (open(2)).
O_PATH: int = getattr(os, "O_PATH", 0)  # macOS, where this module can be imported, has none

_NAME_ONLY = O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """The directory `name` in `parent`; both descriptors are borrowed and O_PATH.

    `is_run_directory`: it carries our marker itself. Otherwise it lies below one that does.
    """

    path: Path
    parent: int
    name: str
    directory: int
    is_run_directory: bool


def clean_path(path: str | os.PathLike[str] | None) -> Path | None:
    """`path` without doubled slashes and dots; None when it is blank: there is nothing to do.

    Raises TeardownRefused for what can't be meant: a relative path, `..`, `/`, a NUL.
    """
    text = os.fspath(path or "")
    if not text.strip():
        return None
    # From here on the one form is used: Path has taken out what is doubled, and nothing else.
    clean = Path(text)
    for wrong, because in (
        ("\0" in text, "no file system has such a path"),
        (not clean.is_absolute(), "its path is relative"),
        (".." in clean.parts, "its path goes up again"),
        (len(clean.parts) < 2, "it is the root of everything"),  # noqa: PLR2004
    ):
        if wrong:
            raise TeardownRefused(text, because)
    return Path("/", *clean.parts[1:])  # of two leading slashes too, POSIX would make something


@contextmanager
def open_place(path: Path) -> Iterator[Place]:
    """Hold the directory at `path`, absolute and clean, which is a run directory or in one.

    That is: it or a folder above it carries our marker, and from there down to its parent all
    folders are ours and can be written by nobody else, so that nobody can exchange it. Raises
    FileNotFoundError where there is nothing, TeardownRefused where any of this does not hold, for
    a symbolic link anywhere in the path, and for what is no directory.
    """
    with ExitStack() as undo:
        chain = open_directories(path, undo)
        below = False
        for folder in chain[:-1]:
            below = _is_ours_alone(folder) and (below or _has_marker(folder))
        itself = _is_ours_alone(chain[-1]) and _has_marker(chain[-1])
        if not (below or itself):
            raise TeardownRefused(
                str(path),
                f"neither it nor a folder of ours above it has our marker {RUN_DIRECTORY_MARKER}",
                look_at(path, content=True),
            )
        yield Place(
            path=path,
            parent=chain[-2],
            name=path.name,
            directory=chain[-1],
            is_run_directory=itself,
        )


def open_directories(path: Path, undo: ExitStack) -> list[int]:
    """O_PATH descriptors of `/` and of each directory on the way to `path`, it included.

    They are closed with `undo`. Errors as of `open_place`.
    """
    chain = [os.open("/", _NAME_ONLY)]
    undo.callback(os.close, chain[0])
    reached = Path("/")
    for name in path.parts[1:]:
        reached /= name
        try:
            chain.append(os.open(name, _NAME_ONLY, dir_fd=chain[-1]))
        except PermissionError as error:
            because = f"{reached}: {error.strerror}"
            raise TeardownRefused(str(path), because, look_at(reached)) from None
        undo.callback(os.close, chain[-1])
        mode = os.fstat(chain[-1]).st_mode
        if not stat.S_ISDIR(mode):
            kind = "a symbolic link" if stat.S_ISLNK(mode) else "not a directory"
            raise TeardownRefused(str(path), f"{reached} is {kind}", look_at(reached))
    return chain


def mount_id_of(descriptor: int) -> int:
    """Which mount an open file is seen through (proc_pid_fdinfo(5), Linux 3.15).

    A bind mount has the device number of what it shows; only this tells them apart.
    """
    # Bytes: a codec may have to be imported, which Python 3.13 can't where the working directory
    # is gone, as it may be when what was mounted there is taken off.
    lines = Path(f"/proc/self/fdinfo/{descriptor}").read_bytes().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(b"mnt_id:"))


def _is_ours_alone(directory: int) -> bool:
    seen = os.fstat(directory)
    return seen.st_uid == os.geteuid() and not seen.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def _has_marker(directory: int) -> bool:
    try:
        seen = os.stat(RUN_DIRECTORY_MARKER, dir_fd=directory, follow_symlinks=False)
    except OSError:
        return False
    return stat.S_ISREG(seen.st_mode) and seen.st_uid == os.geteuid()
