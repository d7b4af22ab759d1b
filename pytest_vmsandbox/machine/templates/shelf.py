"""The directory that templates lie in: marked when we make it, ours alone, and what in it is ours.

Whoever names a directory for our cache may have other things in it: nothing is changed or removed
in one without our mark, nor under a name that we do not give.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

from pytest_vmsandbox.errors import RequestInvalid
from pytest_vmsandbox.linux import OwnedFd

# Not a name that anything else has, for a cache directory may be a project's.
NAME = "vmsandbox-templates"

# https://bford.info/cachedir/: whoever makes backups leaves out a directory with this.
MARK = "CACHEDIR.TAG"
_SIGNATURE = "Signature: 8a477f597d28d172789f06886806bc55"
_TEXT = f"{_SIGNATURE}\n# Templates of pytest-vmsandbox; see `vmsandbox cache --help`.\n"

NEW, OLD = ".new-", ".old-"
_PUBLISHED = re.compile(r"[0-9a-f]{32}")
_UNFINISHED = re.compile(rf"(?:{re.escape(NEW)}|{re.escape(OLD)})[0-9a-f]{{32}}")


def make_shelf(directory: Path) -> None:
    """Make it, with its mark; it may be there. Raises RequestInvalid where it is not ours."""
    directory.parent.mkdir(parents=True, mode=0o700, exist_ok=True)
    if is_shelf(directory):
        return
    unmarked = directory.with_name(f"{directory.name}.{secrets.token_hex(8)}")
    unmarked.mkdir(mode=0o700)
    try:
        (unmarked / MARK).write_text(_TEXT, encoding="ascii")
        try:
            unmarked.rename(directory)
        except OSError:
            if not is_shelf(directory):  # otherwise another one was quicker
                raise
    finally:
        shutil.rmtree(unmarked, ignore_errors=True)


def is_shelf(directory: Path) -> bool:
    """Whether it is there; RequestInvalid where it is not ours alone, or has not our mark.

    An empty one is as good as none.
    """
    try:
        state = directory.lstat()
    except FileNotFoundError:
        return False
    _require_alone(directory, state)
    try:
        marked = (directory / MARK).read_bytes().startswith(_SIGNATURE.encode())
    except FileNotFoundError:
        marked = False
    if not marked and any(directory.iterdir()):
        raise RequestInvalid(
            f"{directory} is not a directory that we made: it has no {MARK}",
            "choose another place with --vm-cache-dir, or remove it if nothing in it is of use",
        )
    return marked


def published_in(directory: Path) -> Iterator[Path]:
    """The directories in it that are called as templates are."""
    return _directories(directory, _PUBLISHED)


def unfinished_in(directory: Path) -> Iterator[Path]:
    """What is being made or on its way out, or was when its process was killed."""
    return _directories(directory, _UNFINISHED)


def strange_in(template: Path) -> str | None:
    """What of a template's directory others may have written, or is no file; None if nothing.

    OSError where it is no directory, or a link to one.
    """
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    with OwnedFd(os.open(template, flags)) as directory:
        if not _is_ours(os.fstat(directory)):
            return str(template)
        for name in sorted(os.listdir(directory)):  # noqa: PTH208 - of what is open, not of a path
            state = os.stat(name, dir_fd=directory, follow_symlinks=False)
            if not stat.S_ISREG(state.st_mode) or not _is_ours(state):
                return str(template / name)
    return None


def _is_ours(state: os.stat_result) -> bool:
    return state.st_uid == os.geteuid() and not state.st_mode & 0o022


def remove_tree(path: Path | None) -> None:
    """Remove what was put out of sight, as far as it can be; a link, not what it points to."""
    if path is None:
        return
    if path.is_symlink() or path.is_file():
        path.unlink(missing_ok=True)
    shutil.rmtree(path, ignore_errors=True)


def _directories(directory: Path, name: re.Pattern[str]) -> Iterator[Path]:
    for path in directory.iterdir():
        if name.fullmatch(path.name) and path.is_dir() and not path.is_symlink():
            yield path


def _require_alone(directory: Path, state: os.stat_result) -> None:
    if state.st_uid != os.geteuid() or state.st_mode & 0o022 or not stat.S_ISDIR(state.st_mode):
        raise RequestInvalid(
            f"{directory} is not a directory of uid {os.geteuid()} that nobody else may write: "
            f"it belongs to uid {state.st_uid}, mode {stat.S_IMODE(state.st_mode):04o}; "
            "who can write a template decides what runs in your tests",
            "choose another place with --vm-cache-dir, or remove it: it may not be yours any more",
        )
    above = directory.parent.stat()
    if above.st_mode & stat.S_IWOTH and not above.st_mode & stat.S_ISVTX:
        raise RequestInvalid(
            f"{directory.parent} can be written by everybody (mode "
            f"{stat.S_IMODE(above.st_mode):04o}): who can put another {directory.name} there "
            "decides what runs in your tests",
            f"chmod o-w {directory.parent}, or choose another place with --vm-cache-dir",
        )
