"""Control groups: a limit for all that a process starts, wherever this host lets us set one.

Version 2, version 1 and both side by side are taken as they come (cgroups(7)). A missing
controller is no error: what is limited is reported.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from pytest_vmsandbox.linux.mountinfo import MountInfo, read_mountinfo
from pytest_vmsandbox.linux.owned_fd import OwnedFd
from pytest_vmsandbox.warden.requests import Limits

# What limits a group, by controller, in the two forms.
_FILES_V2 = {"memory": "memory.max", "pids": "pids.max"}
_FILES_V1 = {"memory": "memory.limit_in_bytes", "pids": "pids.max"}

# Every group of ours is called so: the reaper removes no other.
PREFIX = "vmsandbox-"


@dataclass(frozen=True, slots=True, kw_only=True)
class Hierarchy:
    """A directory in which groups can be made, and the file that sets each limit there."""

    parent: Path
    files: Mapping[str, str]

    def amounts(self, limits: Limits) -> dict[str, int]:
        """The files to be written for these limits, and what goes into them."""
        wanted = {"memory": limits.memory_bytes, "pids": limits.processes}
        return {
            file: amount
            for controller, file in self.files.items()
            if (amount := wanted[controller]) is not None
        }


def find_hierarchies() -> tuple[Hierarchy, ...]:
    """Where this process can make groups that limit; one for each controller, version 2 first."""
    found: list[Hierarchy] = []
    missing = set(_FILES_V2)
    for hierarchy in _candidates():
        useful = {name: file for name, file in hierarchy.files.items() if name in missing}
        if useful and os.access(hierarchy.parent, os.W_OK):
            found.append(Hierarchy(parent=hierarchy.parent, files=useful))
            missing -= set(useful)
    return tuple(found)


class Group:
    """A control group in each of some hierarchies, under one name; `close` removes them."""

    def __init__(self, name: str, *, hierarchies: Sequence[Hierarchy], limits: Limits) -> None:
        """Make it, limited; OSError, with nothing left, where the kernel refuses."""
        self.paths: list[Path] = []
        try:
            for hierarchy in hierarchies:
                path = hierarchy.parent / f"{PREFIX}{name}"
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
            # Where a thread moves itself by `tasks` (version 1), nobody waits. Any other move keeps
            # every fork of the host waiting for an RCU grace period, 10 ms and more (kernel
            # commit 9a3284fad42f, Linux 5.6).
            tasks = path / "tasks"
            _write(tasks if tasks.exists() else path / "cgroup.procs", 0)

    def close(self) -> None:
        """Remove it; its processes must have ended. A group that resists stays for the reaper."""
        for path in self.paths:
            with suppress(OSError):
                path.rmdir()


def _write(file: Path, number: int) -> None:
    """Write a number as the kernel takes it: at once."""
    with OwnedFd(os.open(file, os.O_WRONLY | os.O_CLOEXEC)) as descriptor:
        os.write(descriptor, b"%d" % number)


def _candidates() -> list[Hierarchy]:
    ours = _own_groups()
    v2: list[Hierarchy] = []
    v1: list[Hierarchy] = []
    for mounted in read_mountinfo():
        if mounted.fs_type == "cgroup2":
            v2 += [
                Hierarchy(parent=parent, files=files)
                for parent in _own_then_top(mounted, ours.get("", ""))
                if (files := _delegated(parent))
            ]
        elif mounted.fs_type == "cgroup":
            files = {
                name: file for name, file in _FILES_V1.items() if name in mounted.super_options
            }
            for name in list(files)[:1]:
                v1 += [
                    Hierarchy(parent=parent, files=files)
                    for parent in _own_then_top(mounted, ours.get(name, ""))
                ]
    return v2 + v1


def _delegated(parent: Path) -> dict[str, str]:
    """The limits that a child group of this one will have (version 2)."""
    with suppress(OSError):
        words = (parent / "cgroup.subtree_control").read_text(encoding="ascii").split()
        return {name: file for name, file in _FILES_V2.items() if name in words}
    return {}


def _own_groups() -> dict[str, str]:
    """The group that we are in, by controller; under "" the one of version 2."""
    lines = Path("/proc/self/cgroup").read_bytes().split(b"\n")[:-1]
    entries = [os.fsdecode(line).split(":", 2) for line in lines]
    return {name: path.lstrip("/") for _, names, path in entries for name in names.split(",")}


def _own_then_top(mounted: MountInfo, own: str) -> list[Path]:
    top = Path(mounted.mount_point)
    return [place for place in dict.fromkeys((top / own, top)) if place.is_dir()]
