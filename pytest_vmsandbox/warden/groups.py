"""Control groups: a limit for all that a process starts, wherever this host lets us set one.

Version 2, version 1 and both side by side are taken as they come (cgroups(7)). A missing
controller is no error: what is limited is reported.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from pytest_vmsandbox.deadline import Deadline
from pytest_vmsandbox.linux.cgroups import own_and_above, read_own_groups
from pytest_vmsandbox.linux.mountinfo import MountInfo, read_mountinfo
from pytest_vmsandbox.linux.owned_fd import OwnedFd
from pytest_vmsandbox.warden.requests import Limits

# Every group of ours is called so: the reaper removes no other.
PREFIX = "vmsandbox-"

# Of this kind are those that a warden makes to find out whether it can.
_TRIAL_PREFIX = f"{PREFIX}trial-"

# A group of ours is empty for some milliseconds, before it is entered and after it is left. What
# is this old was left by a warden that was killed, and is in no ledger, or no reaper has come.
_STALE_S = 3600.0

# Whoever waits for a group to be left serves nobody meanwhile.
_BUSY_S = 0.2

# What limits a group, by controller, in the two forms: each file, and what goes into it, None for
# the limit itself, which comes first. Without the others a VMM would be paged out instead of
# stopped, and when one of its processes is killed for memory the rest would go on.
Settings: TypeAlias = Mapping[str, int | None]
_SETTINGS_V2: Mapping[str, Settings] = {
    "memory": {"memory.max": None, "memory.swap.max": 0, "memory.oom.group": 1},
    "pids": {"pids.max": None},
}
_SETTINGS_V1: Mapping[str, Settings] = {
    "memory": {"memory.limit_in_bytes": None, "memory.memsw.limit_in_bytes": None},
    "pids": {"pids.max": None},
}
_AMPLE = Limits(memory_bytes=1 << 30, processes=64)


@dataclass(frozen=True, slots=True, kw_only=True)
class Hierarchy:
    """A directory in which groups can be made, and what sets each limit there, by controller."""

    parent: Path
    files: Mapping[str, Settings]

    def amounts(self, limits: Limits) -> dict[str, int]:
        """The files to be written for these limits, in this order, and what goes into them."""
        wanted = {"memory": limits.memory_bytes, "pids": limits.processes}
        return {
            file: limit if amount is None else amount
            for controller, settings in self.files.items()
            if (limit := wanted[controller]) is not None
            for file, amount in settings.items()
        }


def find_hierarchies() -> tuple[Hierarchy, ...]:
    """Where this process can make groups that limit; one for each controller, version 2 first.

    Each was tried: a group was made there, limited, entered by a child and removed.
    """
    found: list[Hierarchy] = []
    missing = set(_SETTINGS_V2)
    for choices in candidates(read_mountinfo(), own=read_own_groups()):
        for hierarchy in _most_first(choices, missing):
            tried = try_hierarchy(hierarchy)
            if tried is not None:
                found.append(tried)
                missing -= set(tried.files)
                break
    return tuple(found)


def candidates(mounts: Iterable[MountInfo], *, own: Mapping[str, str]) -> list[list[Hierarchy]]:
    """For each hierarchy the directories in which groups might be made; version 2 first.

    `own` is the group that we are in, by controller, under "" that of version 2. It comes first
    in its hierarchy, then what lies above it, the nearest first: in version 2 a group that holds
    processes hands on no controller, and those above it may have been given to us.
    """
    found: dict[tuple[int, int], list[Hierarchy]] = {}
    for mounted in sorted(mounts, key=lambda mounted: mounted.fs_type != "cgroup2"):
        if choices := list(_choices(mounted, own)):
            # What is mounted twice is one hierarchy, and a process is in one group of it.
            found.setdefault(mounted.device, choices)
    return list(found.values())


def try_hierarchy(hierarchy: Hierarchy) -> Hierarchy | None:
    """The hierarchy with those of its settings that groups there really take.

    None where a group can't be made there, entered or limited. No group of it is left.
    """
    _sweep(hierarchy.parent)
    path = hierarchy.parent / f"{_TRIAL_PREFIX}{os.urandom(8).hex()}"
    try:
        path.mkdir()
    except OSError:
        return None
    try:
        limited = Hierarchy(parent=hierarchy.parent, files=dict(_taken(path, hierarchy)))
        return limited if limited.files and _lets_in(path) else None
    finally:
        _remove([path])


class Group:
    """A control group in each of some hierarchies, under one name; `close` removes them."""

    def __init__(self, name: str, *, hierarchies: Sequence[Hierarchy], limits: Limits) -> None:
        """Make it, limited; OSError, with nothing left, where the kernel refuses."""
        self.paths: list[Path] = []
        try:
            for hierarchy in hierarchies:
                path = hierarchy.parent / f"{PREFIX}{name}"
                if path.exists():  # left by a warden that died; one with a process in it resists
                    path.rmdir()
                path.mkdir()
                self.paths.append(path)
                for file, amount in hierarchy.amounts(limits).items():
                    _write(path / file, amount)
        except BaseException:
            self.close()
            raise

    def enter(self) -> None:
        """Go into it, a process with one thread; what it starts from now on is in it too."""
        for path in self.paths:
            _enter(path)

    def close(self) -> None:
        """Remove it; its processes must have ended. A group that resists stays for the reaper."""
        _remove(self.paths)


def _enter(path: Path) -> None:
    # Where a thread moves itself by `tasks` (version 1), nobody waits. Any other move keeps
    # every fork of the host waiting for an RCU grace period, 10 ms and more (kernel
    # commit 9a3284fad42f, Linux 5.6).
    tasks = path / "tasks"
    _write(tasks if tasks.exists() else path / "cgroup.procs", 0)


def _write(file: Path, number: int) -> None:
    """Write a number as the kernel takes it: at once."""
    with OwnedFd(os.open(file, os.O_WRONLY | os.O_CLOEXEC)) as descriptor:
        os.write(descriptor, b"%d" % number)


def _most_first(choices: Iterable[Hierarchy], missing: set[str]) -> list[Hierarchy]:
    """Those that limit something of what is missing, and may be written, as far as is told."""
    useful = [
        Hierarchy(parent=choice.parent, files=files)
        for choice in choices
        if (files := {name: choice.files[name] for name in choice.files if name in missing})
        and os.access(choice.parent, os.W_OK)
    ]
    return sorted(useful, key=lambda choice: -len(choice.files))


def _taken(path: Path, hierarchy: Hierarchy) -> Iterator[tuple[str, Settings]]:
    """What the group at `path` takes, by controller; without the limit itself nothing counts."""
    amounts = hierarchy.amounts(_AMPLE)
    for controller, settings in hierarchy.files.items():
        taken = {f: a for f, a in settings.items() if _accepts(path / f, amounts[f])}
        if next(iter(settings)) in taken:
            yield controller, taken


def _accepts(file: Path, amount: int) -> bool:
    try:
        _write(file, amount)
    except OSError:
        return False
    return True


def _lets_in(path: Path) -> bool:
    """Whether a process of ours may enter it; the one that did has ended."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    with suppress(OSError):
        _enter(path)
        os._exit(0)
    os._exit(1)


def _remove(paths: Iterable[Path]) -> None:
    """Remove them; a group is busy for a moment after its last process has ended."""
    deadline = Deadline.after(seconds=_BUSY_S)
    for path in paths:
        while _is_busy(path) and not deadline.passed:
            time.sleep(0.001)


def _is_busy(path: Path) -> bool:
    """Remove it, unless there is somebody in it; whether there is."""
    try:
        path.rmdir()
    except OSError as error:
        return error.errno == errno.EBUSY
    return False


def _sweep(parent: Path) -> None:
    """Remove the empty groups that killed wardens left."""
    for path in parent.glob(f"{PREFIX}*"):
        with suppress(OSError):  # it is gone, or somebody is in it
            if time.time() - path.stat().st_mtime > _STALE_S:
                path.rmdir()


def _choices(mounted: MountInfo, own: Mapping[str, str]) -> Iterator[Hierarchy]:
    if mounted.fs_type == "cgroup2":
        for place in own_and_above(mounted, own.get("", "")):
            if delegated := _delegated(place):
                yield Hierarchy(parent=place, files=delegated)
    elif mounted.fs_type == "cgroup":
        files = {n: settings for n, settings in _SETTINGS_V1.items() if n in mounted.super_options}
        for name in list(files)[:1]:
            for place in own_and_above(mounted, own.get(name, "")):
                yield Hierarchy(parent=place, files=files)


def _delegated(parent: Path) -> dict[str, Settings]:
    """The limits that a child group of this one will have (version 2)."""
    with suppress(OSError):
        words = (parent / "cgroup.subtree_control").read_text(encoding="ascii").split()
        return {name: settings for name, settings in _SETTINGS_V2.items() if name in words}
    return {}
