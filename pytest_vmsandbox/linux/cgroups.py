"""Control groups: which ones this process is in, and where they lie (cgroups(7), v1 and v2)."""

from __future__ import annotations

import os
from pathlib import Path, PurePosixPath

from pytest_vmsandbox.linux.mountinfo import MountInfo

MEMBERSHIP = Path("/proc/self/cgroup")


def read_own_groups(membership: Path = MEMBERSHIP) -> dict[str, str]:
    """The group that a process is in, by controller; under "" the one of version 2.

    Raises OSError where `membership` can't be read, ValueError where it is no such file.
    """
    lines = membership.read_bytes().split(b"\n")[:-1]
    entries = [os.fsdecode(line).split(":", 2) for line in lines]
    return {name: path for _, names, path in entries for name in names.split(",")}


def own_and_above(mounted: MountInfo, own: str) -> list[Path]:
    """Our group's directory, as far as it lies in what is mounted, and all above it to the top."""
    top = Path(mounted.mount_point)
    group = PurePosixPath(own)
    if ".." in group.parts or not group.is_relative_to(mounted.root):
        return [top]  # it is out of our sight: in a container, for example
    below = group.relative_to(mounted.root)
    return [place for place in (top / below, *(top / p for p in below.parents)) if place.is_dir()]
