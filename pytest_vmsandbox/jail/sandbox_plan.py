"""The plan of a sandbox: which steps build what a command sees, and what the host must lend it."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass

from pytest_vmsandbox.jail.sandbox_config import (
    EVERYTHING,
    ExtraMount,
    MountKind,
    SandboxConfig,
    is_at_or_below,
)
from pytest_vmsandbox.linux import MountInfo
from pytest_vmsandbox.warden.steps import Access, Bind, Device, Proc, ReadOnly, Step, Tmpfs

TMPFS_MIB = 256

# File systems that are the kernel itself, one for the whole host: what is written there, or
# removed (in devtmpfs), is so for everybody. To be root in there takes no capability.
KERNEL_FILE_SYSTEMS = frozenset(
    {
        *("proc", "sysfs", "devtmpfs", "cgroup", "cgroup2", "securityfs", "debugfs", "tracefs"),
        *("configfs", "bpf", "pstore", "efivarfs", "selinuxfs", "smackfs", "binfmt_misc"),
        *("fusectl", "resctrl", "nfsd"),
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class MountPoint:
    """A place for a mount: `path`, as seen from inside the directory `root` of the host."""

    root: str
    path: str
    directory: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class SandboxPlan:
    """The steps, in order, and the places that must be there on the host before the first."""

    steps: tuple[Step, ...]
    mount_points: tuple[MountPoint, ...]


def plan_sandbox(
    config: SandboxConfig, *, mounts: Collection[MountInfo], devices: Iterable[str] | None
) -> SandboxPlan:
    """What `config` means on a host with these `mounts`.

    `devices` are those of steps.DEVICES that are to work, and no others do; None: all that the
    file system root has. The kernel's own file systems are read-only, unless a writable path
    names one or something in it; a proc among them is replaced by the command's own.
    """
    root = config.filesystem_root
    named = tuple(path for path in config.writable_paths if path != "/")
    steps: list[Step] = [
        Bind(source=root, target="/", access=Access.READ_WRITE, devices=devices is None)
    ]
    steps += _tame(_kernel_places(root, mounts), at="/", named=named)
    steps += [Device(name=name) for name in devices or ()]
    for extra in config.extra_mounts:
        steps += _extra_mount(extra, mounts=mounts, named=named, devices=devices is None)
    if config.writable_paths != EVERYTHING:
        steps.append(ReadOnly(target="/", writable=config.writable_paths))
    return SandboxPlan(steps=tuple(steps), mount_points=_mount_points(config))


@dataclass(frozen=True, slots=True, kw_only=True)
class _KernelPlace:
    """A kernel's file system below a directory, and what is mounted on it and stays writable."""

    path: str
    is_proc: bool
    others: tuple[str, ...]


def _kernel_places(source: str, mounts: Collection[MountInfo]) -> list[_KernelPlace]:
    """Those in the tree that a bind of `source` shows, topmost first; paths begin at `source`."""
    # a later mount at one place hides the earlier one
    seen = {os.path.normpath(mount.mount_point): mount for mount in mounts}
    around = max((path for path in seen if is_at_or_below(source, path)), key=len, default=None)
    below = sorted(path for path in seen if path != source and is_at_or_below(path, source))
    places: list[_KernelPlace] = []
    for path in [around, *below] if around is not None else below:
        if seen[path].fs_type not in KERNEL_FILE_SYSTEMS:
            continue
        top = source if path == around else path
        places.append(
            _KernelPlace(
                path=_from(source, top),
                is_proc=path != around and seen[path].fs_type == "proc",
                others=_others_on(seen, top, below, source)
                if seen[path].fs_type == "devtmpfs"
                else (),
            )
        )
    return places


def _others_on(
    seen: Mapping[str, MountInfo], top: str, below: Iterable[str], source: str
) -> tuple[str, ...]:
    """What is mounted on devices and belongs to programs: /dev/shm, terminals."""
    return tuple(
        _from(source, path)
        for path in below
        if is_at_or_below(path, top) and seen[path].fs_type not in KERNEL_FILE_SYSTEMS
    )


def visible_mounts(mounts: Iterable[MountInfo]) -> tuple[MountInfo, ...]:
    """`mounts` without those that are on a kernel's file system, or are one, and can't be reached.

    They are covered by later mounts, or lie where we may not go: a step could not find them.
    """
    kept: list[MountInfo] = []
    tops: list[str] = []
    for mount in mounts:
        if mount.fs_type == "autofs":
            continue  # to look at it would mount something; what is mounted has its own line
        if mount.fs_type in KERNEL_FILE_SYSTEMS:
            tops.append(mount.mount_point)
        elif not any(is_at_or_below(mount.mount_point, top) for top in tops):
            kept.append(mount)
            continue
        with suppress(OSError):
            if os.stat(mount.mount_point).st_dev == os.makedev(*mount.device):  # noqa: PTH116
                kept.append(mount)
    return tuple(kept)


def _tame(places: Iterable[_KernelPlace], *, at: str, named: tuple[str, ...]) -> list[Step]:
    """Make what is the kernel's read-only where it lies in a tree that is bound at `at`."""
    steps: list[Step] = []
    done: list[str] = []
    for place in places:
        target = _join(at, place.path)
        if any(is_at_or_below(target, other) for other in done):
            continue  # it became read-only with the one above it, or is hidden by a new proc
        if place.is_proc:
            steps.append(Proc(target=target, only_pids=False))
            done.append(target)
        if not any(is_at_or_below(path, target) for path in named):
            writable = () if place.is_proc else tuple(_join(at, other) for other in place.others)
            steps.append(ReadOnly(target=target, writable=writable))
            done.append(target)
    return steps


def _extra_mount(
    extra: ExtraMount,
    *,
    mounts: Collection[MountInfo],
    named: tuple[str, ...],
    devices: bool,
) -> list[Step]:
    match extra.kind:
        case MountKind.TMPFS:
            return [Tmpfs(target=extra.target, size_mib=TMPFS_MIB)]
        case MountKind.READ_ONLY:
            return [ReadOnly(target=extra.target)]
        case MountKind.PROC:
            return _tame(
                [_KernelPlace(path="/", is_proc=True, others=())], at=extra.target, named=named
            )
        case MountKind.BIND:
            bind = Bind(
                source=extra.source,
                target=extra.target,
                access=Access.READ_WRITE,
                devices=devices,
            )
            places = _kernel_places(extra.source, mounts)
            return [bind, *_tame(places, at=extra.target, named=named)]


def _mount_points(config: SandboxConfig) -> tuple[MountPoint, ...]:
    """Where extra mounts go that lie on the host: those in a tmpfs are made by the view."""
    grounds: list[tuple[str, str | None]] = [("/", config.filesystem_root)]
    points: list[MountPoint] = []
    for extra in config.extra_mounts:
        if extra.kind is MountKind.READ_ONLY:
            continue
        # the last mount that reaches so far down is what the place will lie on
        target, root = next(
            ground for ground in reversed(grounds) if is_at_or_below(extra.target, ground[0])
        )
        if root is not None and extra.target != target:
            path = _from(target, extra.target)
            points.append(MountPoint(root=root, path=path, directory=extra.directory))
        is_bind = extra.kind is MountKind.BIND
        grounds.append((extra.target, extra.source if is_bind else None))
    return tuple(points)


def _from(above: str, path: str) -> str:
    """`path`, which is at or below `above`, as it is seen from there."""
    return os.path.normpath("/" + os.path.relpath(path, above))


def _join(at: str, path: str) -> str:
    return os.path.normpath(f"{at}/{path}")  # three slashes become one, two would stay
