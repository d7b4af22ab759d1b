"""A run directory: the folder of one run, below which, and nowhere else, things are removed."""

from __future__ import annotations

import os
import stat
from pathlib import Path

# A folder that holds this file is a run directory of ours.
RUN_DIRECTORY_MARKER = ".vmsandbox-run"


def mark_run_directory(directory: Path) -> None:
    """Make `directory`, which must be ours, a run directory that only we may write.

    Raises OSError, and then it may be closed to others without being one.
    """
    mode = stat.S_IMODE(directory.stat().st_mode)
    directory.chmod(mode & ~(stat.S_IWGRP | stat.S_IWOTH))
    marker = os.open(directory / RUN_DIRECTORY_MARKER, os.O_WRONLY | os.O_CREAT, 0o600)
    os.close(marker)


def is_below_run_directory(path: str | os.PathLike[str]) -> bool:
    """Whether `path` lies strictly below a folder that carries RUN_DIRECTORY_MARKER.

    The path is absolute, without `..` and without a symbolic link on the way (it may be one
    itself), and every folder from the run directory down belongs to us or to root and can be
    written by nobody else, so that nobody can lead a removal elsewhere in between.
    """
    target = Path(path)
    if not target.is_absolute() or ".." in target.parts or "\0" in str(target):
        return False
    try:
        parent = Path(os.path.realpath(target.parent, strict=True))
    except (OSError, ValueError):  # ValueError: a path that no file system can have
        return False
    if target.parent != parent:
        return False
    for folder in target.parents[:-1]:  # the last one is /, which is no run directory
        if not _is_ours_alone(folder, file_type=stat.S_IFDIR):
            return False
        if _is_ours_alone(folder / RUN_DIRECTORY_MARKER, file_type=stat.S_IFREG):
            return True
    return False


def _is_ours_alone(path: Path, *, file_type: int) -> bool:
    try:
        seen = path.lstat()
    except OSError:
        return False
    return (
        stat.S_IFMT(seen.st_mode) == file_type
        and seen.st_uid in {0, os.getuid()}
        and not seen.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    )
