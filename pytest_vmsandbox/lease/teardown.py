"""Taking down a directory of ours: first what is mounted in it, deepest first, then the tree."""

from __future__ import annotations

import errno
import os
import shlex
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from pytest_vmsandbox.errors import TeardownRefused
from pytest_vmsandbox.lease.layout import dead_name, look_at
from pytest_vmsandbox.lease.place import Place, clean_path, open_place
from pytest_vmsandbox.lease.privilege import OwnPrivilege, Privilege
from pytest_vmsandbox.linux import MountInfo, mounts_at_or_below, read_mountinfo

# The kernel's words for "there is no mount any more"; whether that is true, mountinfo says.
_GONE = frozenset({errno.ENOENT, errno.EINVAL})


def tear_down(path: str | os.PathLike[str] | None, *, privilege: Privilege | None = None) -> None:
    """Detach all that is mounted at or below `path`, and remove it; whoever lives there is gone.

    Nothing is done for a blank path and a missing directory. Raises TeardownRefused for a relative
    path, `/`, a symbolic link anywhere in it, what is no directory, and what is neither a run
    directory of ours nor in one. Mounts are detached by name, deepest first; when some can't be, or
    new ones came, the directory stays, and the error says which. A run directory that is about to
    be removed is called `.dead-...` first, and under that name a later call goes on.
    """
    clean = clean_path(path)
    if clean is None:
        return
    acting = privilege or OwnPrivilege()
    for name in dict.fromkeys((dead_name(clean), clean)):
        try:
            _tear_down(name, privilege=acting)
        except OSError as error:
            raise TeardownRefused(str(name), str(error), look_at(name)) from error


def _tear_down(path: Path, *, privilege: Privilege) -> None:
    with ExitStack() as undo:
        try:
            undo.enter_context(open_place(path))
        except FileNotFoundError:
            return
        detach_mounts(path, privilege=privilege)
        # Again: what was held may have been the root of a mount that is off now.
        place = undo.enter_context(open_place(path))
        if place.is_run_directory and path != dead_name(path):
            # Whoever saw our marker under the old name finds nothing there from now on.
            place = _renamed(place, dead_name(path))
        # Once more, under the name that is removed: a mount may have come while it was renamed.
        require_nothing_mounted(place.path)
        privilege.remove(place)


def _renamed(place: Place, path: Path) -> Place:
    os.rename(place.name, path.name, src_dir_fd=place.parent, dst_dir_fd=place.parent)
    return replace(place, path=path, name=path.name)


def detach_mounts(path: Path, *, privilege: Privilege) -> None:
    """Detach all mounts at or below `path`, each before what it stands on, stacked ones one by one.

    Raises TeardownRefused, naming them, when mounts are left, be they old or new.
    """
    left = mounts_at_or_below(read_mountinfo(), path)
    first_seen = frozenset(left)  # not their ids alone, which the kernel gives out again
    complaints: dict[str, str] = {}
    while left:
        for mount in left:
            if complaint := _detach(mount, privilege=privilege):
                complaints[mount.mount_point] = complaint
        # One that lay hidden under another can be reached now. What is new is not ours to take.
        now = mounts_at_or_below(read_mountinfo(), path)
        remaining = tuple(mount for mount in now if mount in first_seen)
        if len(remaining) >= len(left):
            break
        left = remaining
    require_nothing_mounted(path, complaints=complaints)


def require_nothing_mounted(path: Path, *, complaints: Mapping[str, str] | None = None) -> None:
    """Raise TeardownRefused, naming the mounts, when there are any at or below `path`."""
    if left := mounts_at_or_below(read_mountinfo(), path):
        points = dict.fromkeys(mount.mount_point for mount in left)
        named = [_named(point, (complaints or {}).get(point, "")) for point in points]
        raise TeardownRefused(
            str(path),
            f"still mounted: {', '.join(named)}",
            f"findmnt --submounts --target {shlex.quote(left[0].mount_point)}",
        )


def _detach(mount: MountInfo, *, privilege: Privilege) -> str:
    """Detach one mount; what was said against it, or nothing."""
    try:
        privilege.detach(Path(mount.mount_point))
    except OSError as error:
        return "" if error.errno in _GONE else str(error.strerror or error)
    except TeardownRefused as refused:
        return refused.because
    return ""


def _named(point: str, complaint: str) -> str:
    return f"{point} ({complaint})" if complaint else point
