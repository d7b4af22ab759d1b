"""Guarded removal: a tree goes by descriptors, and nothing that is mounted or linked in it does."""

from __future__ import annotations

import errno
import os
import secrets
import shlex
import stat
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from pytest_vmsandbox.deadline import Deadline
from pytest_vmsandbox.errors import TeardownRefused
from pytest_vmsandbox.lease.layout import LATE
from pytest_vmsandbox.lease.leftover import look_at
from pytest_vmsandbox.lease.place import O_PATH, Place, mount_id_of

# Each level of the walk holds two descriptors; what lies deeper is first moved to the top.
_DEEPEST = 64

# Somebody may write while we remove; who never stops is not waited for.
_LONGEST_S = 60.0

_SHOWN = 3

# O_NOFOLLOW with O_PATH would give a link itself; with O_DIRECTORY it fails for one (open(2)).
_FOLDER_ITSELF = O_PATH | os.O_NOFOLLOW | os.O_DIRECTORY | os.O_CLOEXEC
_FOLDER_TO_READ = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """Something that could not be removed, by its path below the root.

    `denied`: for want of permission, and for no other reason.
    """

    path: Path
    reason: str
    denied: bool = False


def remove_tree(place: Place) -> None:
    """Remove a directory with all that is in it.

    Only entries of one mount of one file system go, by descriptors, and no link is followed: what
    is mounted inside, and what a link leads to, stays as it is. Others may remove it at the same
    time. Raises TeardownRefused, naming what stays, when anything does; the marker of a run
    directory goes last.
    """
    if kept := clear_tree(place):
        raise refusal(place.path, kept)


def clear_tree(place: Place) -> list[Kept]:
    """The same, but what stays is given back; nothing does when the list is empty."""
    late = LATE if place.is_run_directory else ()
    deadline = Deadline.after(seconds=_LONGEST_S)
    while not deadline.passed:
        walk = _Walk(place)
        walk.clear_root(besides=late)
        if walk.kept:
            return walk.kept
        if walk.again:
            continue
        for name in late:
            with suppress(FileNotFoundError):
                os.unlink(name, dir_fd=place.directory)
        try:
            os.rmdir(place.name, dir_fd=place.parent)
        except FileNotFoundError:
            pass
        except OSError as error:
            if error.errno == errno.ENOTEMPTY:  # somebody wrote into it meanwhile
                continue
            return [_kept(Path(), error)]
        return []
    return [Kept(path=Path(), reason="somebody keeps on writing into it")]


def refusal(path: Path, kept: Collection[Kept]) -> TeardownRefused:
    """The error that names what was kept below `path`, and how to look at the first of it."""
    first, *_ = kept
    names = [f"{item.path} ({item.reason})" for item in list(kept)[:_SHOWN]]
    more = [f"and {len(kept) - _SHOWN} more"] if len(kept) > _SHOWN else []
    inspect = look_at(path / first.path)
    if not first.denied:
        inspect += f"; findmnt --target {shlex.quote(str(path / first.path))}"
    return TeardownRefused(str(path), f"not removed: {', '.join(names + more)}", inspect)


@dataclass(slots=True)
class _Walk:
    """One pass through a tree."""

    place: Place
    kept: list[Kept] = field(default_factory=list)
    again: bool = False
    _mount_id: int = 0
    _device: int = 0

    def clear_root(self, *, besides: Collection[str]) -> None:
        """Remove what is in the root, but for the names `besides`."""
        self._mount_id = mount_id_of(self.place.parent)
        self._device = os.fstat(self.place.directory).st_dev
        self._clear_folder(self.place.directory, Path(), depth=0, besides=besides)

    def _clear_folder(
        self, folder: int, below: Path, *, depth: int, besides: Collection[str] = ()
    ) -> None:
        try:
            self._require_same_mount(folder)
            _make_ours_writable(folder)
            # Of the very directory that was looked at: "." leads nowhere else.
            reading = os.open(".", _FOLDER_TO_READ, dir_fd=folder)
        except OSError as error:
            self._keep(below, error)
            return
        try:
            with os.scandir(reading) as entries:
                found = [(e.name, e.is_dir(follow_symlinks=False)) for e in entries]
            for name, is_folder in found:
                if name not in besides:
                    self._remove(reading, name, below / name, is_folder=is_folder, depth=depth)
        finally:
            os.close(reading)

    def _remove(self, parent: int, name: str, below: Path, *, is_folder: bool, depth: int) -> None:
        try:
            if not is_folder:
                os.unlink(name, dir_fd=parent)
            elif depth >= _DEEPEST:
                self._move_to_top(parent, name)
            else:
                self._remove_folder(parent, name, below, depth=depth)
        except OSError as error:
            self._keep(below, error)

    def _remove_folder(self, parent: int, name: str, below: Path, *, depth: int) -> None:
        kept_before = len(self.kept)
        folder = os.open(name, _FOLDER_ITSELF, dir_fd=parent)
        try:
            self._clear_folder(folder, below, depth=depth + 1)
        finally:
            os.close(folder)
        if len(self.kept) == kept_before:
            os.rmdir(name, dir_fd=parent)

    def _move_to_top(self, parent: int, name: str) -> None:
        # Across mounts the kernel refuses (EXDEV), as it does to move what is mounted on (EBUSY).
        new_name = f".deep-{secrets.token_hex(8)}"
        os.rename(name, new_name, src_dir_fd=parent, dst_dir_fd=self.place.directory)
        self.again = True

    def _require_same_mount(self, folder: int) -> None:
        # The device as well: a btrfs subvolume is another one within the same mount.
        if mount_id_of(folder) != self._mount_id or os.fstat(folder).st_dev != self._device:
            raise OSError(errno.EXDEV, "something is mounted here")

    def _keep(self, below: Path, error: OSError) -> None:
        # Gone: another remover was faster. Not empty: the next pass sees what came in.
        if error.errno == errno.ENOTEMPTY:
            self.again = True
        elif error.errno != errno.ENOENT:
            self.kept.append(_kept(below, error))


def _make_ours_writable(folder: int) -> None:
    """Open a directory of ours to ourselves; a test may have closed it."""
    seen = os.fstat(folder)
    if seen.st_uid == os.geteuid() and seen.st_mode & stat.S_IRWXU != stat.S_IRWXU:
        # fchmod(2) takes no O_PATH descriptor; the link in /proc leads to the directory itself.
        os.chmod(f"/proc/self/fd/{folder}", stat.S_IMODE(seen.st_mode) | stat.S_IRWXU)  # noqa: PTH101


def _kept(below: Path, error: OSError) -> Kept:
    return Kept(
        path=below,
        reason=error.strerror or str(error),
        denied=error.errno in (errno.EACCES, errno.EPERM),
    )
