"""Who does what a teardown decides: we ourselves, or sudo where we may not."""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Protocol

from pytest_vmsandbox.errors import TeardownRefused
from pytest_vmsandbox.host.program import Outcome, run_program
from pytest_vmsandbox.host.run_directory import is_below_run_directory
from pytest_vmsandbox.lease.place import Place, open_directories
from pytest_vmsandbox.lease.removal import Kept, clear_tree, refusal, remove_tree
from pytest_vmsandbox.linux import UmountFlags, umount

_COMMAND_DEADLINE_S = 10.0
_REMOVAL_DEADLINE_S = 60.0

# rm(1) knows devices but no mounts, so it would walk into a bind mount that somebody made a moment
# ago. Here it sees the tree through a mount of its own, in a namespace of its own: in that mount
# nothing else is mounted, whatever is, or comes, elsewhere.
_REMOVE_IN_OWN_VIEW = 'mount --bind -- "$1" "$1" && exec rm -rf -- "$2"'


class Privilege(Protocol):
    """Performs the steps of an undo. Each is safe to repeat and leaves what it can't do."""

    def detach(self, target: Path) -> None:
        """Take off what was mounted last at `target`; raises OSError."""
        ...

    def remove(self, place: Place) -> None:
        """Remove a tree by guarded removal; raises TeardownRefused."""
        ...

    def remove_cgroup(self, path: Path) -> None:
        """Remove an empty control group; raises OSError."""
        ...


class OwnPrivilege:
    """We do it, as whoever we are."""

    def detach(self, target: Path) -> None:
        """Detach by descriptor: no link on the way, and none at the end, is followed."""
        with ExitStack() as undo:
            parent = open_directories(target.parent, undo)[-1]
            by_descriptor = f"/proc/self/fd/{parent}/{target.name}"
            umount(by_descriptor, UmountFlags.MNT_DETACH | UmountFlags.UMOUNT_NOFOLLOW)

    def remove(self, place: Place) -> None:
        """Guarded removal."""
        remove_tree(place)

    def remove_cgroup(self, path: Path) -> None:
        """rmdir(2), which fails while there is a process in it."""
        path.rmdir()


class SudoPrivilege(OwnPrivilege):
    """We do it as far as we may, and sudo, which never prompts, does the rest."""

    def detach(self, target: Path) -> None:
        """`umount --lazy` of this one mount; never of those below it."""
        try:
            super().detach(target)
        except PermissionError:
            self._require_below_run_directory(target)
            _sudo("umount", "--lazy", "--", target)

    def remove(self, place: Place) -> None:
        """`rm -rf` of what guarded removal had to leave for want of permission alone."""
        kept = clear_tree(place)
        if not kept:
            return
        if not all(item.denied for item in kept):
            raise refusal(place.path, kept)
        try:
            for root in _roots(place, kept):
                self._remove_in_own_view(root)
        except OSError as error:
            failed = Kept(path=Path(), reason=str(error.strerror), denied=True)
            raise refusal(place.path, [kept[0], failed, *kept[1:]]) from error
        remove_tree(place)

    def remove_cgroup(self, path: Path) -> None:
        """rmdir(1); what it complains of becomes the error that rmdir(2) would have been."""
        try:
            super().remove_cgroup(path)
        except PermissionError:
            try:
                _sudo("rmdir", "--", path)
            except PermissionError as error:
                for number in (errno.ENOENT, errno.EBUSY):
                    if os.strerror(number) in str(error):
                        raise OSError(number, os.strerror(number), str(path)) from error
                raise

    def _remove_in_own_view(self, path: Path) -> None:
        self._require_below_run_directory(path)
        _sudo(
            *("unshare", "--mount", "--propagation", "private", "--"),
            *("sh", "-c", _REMOVE_IN_OWN_VIEW, "sh", path.parent, path),
            deadline_s=_REMOVAL_DEADLINE_S,
        )

    def _require_below_run_directory(self, path: Path) -> None:
        if not is_below_run_directory(path):
            raise TeardownRefused(str(path), "it is not below a run directory that only we write")


def best_privilege() -> Privilege:
    """Ours where we are root, else ours with sudo behind it."""
    return OwnPrivilege() if os.geteuid() == 0 else SudoPrivilege()


def _roots(place: Place, kept: Sequence[Kept]) -> list[Path]:
    """What to give to sudo: the place, or what is in it where that is a run directory itself.

    Strictly below the marker, which stays to the end.
    """
    if not place.is_run_directory:
        return [place.path]
    names = dict.fromkeys(item.path.parts[0] for item in kept if item.path.parts)
    return [place.path / name for name in names]


def _sudo(*words: str | Path, deadline_s: float = _COMMAND_DEADLINE_S) -> None:
    """Run a program as root; OSError with its first complaint when it fails."""
    outcome = _run_now(["sudo", "-n", *map(str, words)], deadline_s=deadline_s)
    if not outcome.ok:
        raise PermissionError(errno.EPERM, str(outcome))


def _run_now(argv: Sequence[str], *, deadline_s: float) -> Outcome:
    """`run_program` for a caller that does not await, on whatever thread and loop it is."""
    with ThreadPoolExecutor(max_workers=1) as thread:
        run = run_program(argv, deadline_s=deadline_s, env={**os.environ, "LC_ALL": "C"})
        return thread.submit(asyncio.run, run).result()
