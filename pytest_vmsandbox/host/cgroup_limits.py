"""What control groups leave us of this host: a container's memory and processors are its limits'.

Those of our own group count, and those of all above it that we can see (cgroups(7), v1 and v2).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from pytest_vmsandbox.linux import MountInfo, own_and_above, read_mountinfo, read_own_groups
from pytest_vmsandbox.linux.cgroups import MEMBERSHIP


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryLimit:
    """How many bytes a group may have, and has that can't be taken back from it at once."""

    limit: int
    used: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Names:
    """Under which names a version of control groups tells of memory."""

    limit: str
    used: str
    reclaimable: str


_V1 = _Names(
    limit="memory.limit_in_bytes", used="memory.usage_in_bytes", reclaimable="total_inactive_file"
)
_V2 = _Names(limit="memory.max", used="memory.current", reclaimable="inactive_file")


def memory_limits(
    *, membership: Path = MEMBERSHIP, mounts: Sequence[MountInfo] | None = None
) -> list[MemoryLimit]:
    """The limits of memory on us, none where there are none; OSError, ValueError on odd hosts."""
    found = []
    for group, version in _groups("memory", membership, mounts):
        names = _V1 if version == 1 else _V2
        limit, used = _word(group / names.limit), _word(group / names.used)
        if limit is not None and used is not None and limit[0] != "max":
            told = dict(
                line.split(" ", 1) for line in (group / "memory.stat").read_text().splitlines()
            )
            cache = int(told.get(names.reclaimable, 0))
            found.append(MemoryLimit(limit=int(limit[0]), used=max(0, int(used[0]) - cache)))
    return found


def processor_limit(
    *, membership: Path = MEMBERSHIP, mounts: Sequence[MountInfo] | None = None
) -> float | None:
    """How many processors' worth of time we may have; None where nobody limits it."""
    shares = []
    for group, version in _groups("cpu", membership, mounts):
        if version == 1:
            quota = _word(group / "cpu.cfs_quota_us")
            period = _word(group / "cpu.cfs_period_us")
            words = [*(quota or ()), *(period or ())]
        else:
            words = _word(group / "cpu.max") or []
        if len(words) == 2 and words[0] not in ("max", "-1"):  # noqa: PLR2004 - quota and period
            shares.append(int(words[0]) / int(words[1]))
    return min(shares, default=None)


def _groups(
    controller: str, membership: Path, mounts: Sequence[MountInfo] | None
) -> Sequence[tuple[Path, int]]:
    """The directories of our groups, the innermost first, and of which version they are."""
    own = read_own_groups(membership)
    names = ((version, own[name]) for version, name in ((1, controller), (2, "")) if name in own)
    return _directories(controller, tuple(names), None if mounts is None else tuple(mounts))


# Looked for once for each group that we are in: whoever waits for what there is to spare asks every
# few milliseconds, and to read the mount table costs more than all the rest.
@lru_cache(maxsize=8)
def _directories(
    controller: str, own: Sequence[tuple[int, str]], mounts: Sequence[MountInfo] | None
) -> Sequence[tuple[Path, int]]:
    mounts = read_mountinfo() if mounts is None else mounts
    found: list[tuple[Path, int]] = []
    for version, group in own:
        ours = (mounted for mounted in mounts if _has(mounted, controller, version))
        if (mounted := next(ours, None)) is not None:
            found.extend((place, version) for place in own_and_above(mounted, group))
    return tuple(found)


def _has(mounted: MountInfo, controller: str, version: int) -> bool:
    if version == 1:
        return mounted.fs_type == "cgroup" and controller in mounted.super_options
    return mounted.fs_type == "cgroup2"


def _word(file: Path) -> list[str] | None:
    """The words in a small file; None where a group has no such file, as the topmost."""
    try:
        return file.read_text(encoding="ascii").split()
    except FileNotFoundError:
        return None
