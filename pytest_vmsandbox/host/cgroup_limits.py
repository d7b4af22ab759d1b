"""What control groups leave us of this host: a container's memory and processors are its limits'.

Those of our own group count, and those of all above it that we can see (cgroups(7), v1 and v2).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from pytest_vmsandbox.linux import MountInfo, read_mountinfo

MEMBERSHIP = Path("/proc/self/cgroup")


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
) -> Iterator[tuple[Path, int]]:
    """The directories of our groups, the innermost first, and of which version they are."""
    mounts = read_mountinfo() if mounts is None else mounts
    for line in membership.read_text(encoding="utf-8", errors="surrogateescape").splitlines():
        number, controllers, path = line.split(":", 2)
        version = 2 if (number, controllers) == ("0", "") else 1
        if version == 1 and controller not in controllers.split(","):
            continue
        for mount in mounts:
            is_v2 = version == 2 and mount.fs_type == "cgroup2"  # noqa: PLR2004 - the version
            if is_v2 or (mount.fs_type == "cgroup" and version == 1 and _has(mount, controller)):
                yield from ((group, version) for group in _chain(mount, PurePosixPath(path)))
                break


def _has(mount: MountInfo, controller: str) -> bool:
    return controller in mount.super_options


def _chain(mount: MountInfo, path: PurePosixPath) -> Iterator[Path]:
    """Our group's directory and those above it, as far up as they are mounted here."""
    top = Path(mount.mount_point)
    # In a container what is mounted may be the group itself, under a path of the host's.
    inside = path.relative_to(mount.root) if path.is_relative_to(mount.root) else PurePosixPath()
    if ".." in inside.parts:
        inside = PurePosixPath()
    for part in (inside, *inside.parents):
        yield top / part
        if part == PurePosixPath():
            return


def _word(file: Path) -> list[str] | None:
    """The words in a small file; None where a group has no such file, as the topmost."""
    try:
        return file.read_text(encoding="ascii").split()
    except FileNotFoundError:
        return None
