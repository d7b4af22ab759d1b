"""What is mounted where: the lines of /proc/PID/mountinfo."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from pytest_vmsandbox.linux.arguments import (
    INT_MAX,
    PathArgument,
    check_range,
    encode_path,
)

_ESCAPE = re.compile(rb"\\([0-3][0-7]{2})")
_DELETED = "//deleted"


@dataclass(frozen=True, slots=True, kw_only=True)
class MountInfo:
    """One mount, as proc_pid_mountinfo(5) tells it; texts unescaped, with surrogateescape.

    `root` is the part of the file system that is mounted (not always a path: ``net:[4026531840]``),
    `mount_point` where, seen from the process's root. `options` belong to the mount and
    `super_options` to the file system. A mount with `shared_group` sends to that peer group,
    one with `master_group` receives from that one; `propagate_from` is the nearest group of these
    under the process's root. `root_deleted` and `mount_point_deleted`: the directory or file is
    gone from its file system, and the kernel's ``//deleted`` was taken off the path.
    """

    mount_id: int
    parent_id: int
    device: tuple[int, int]
    root: str
    mount_point: str
    options: tuple[str, ...]
    shared_group: int | None = None
    master_group: int | None = None
    propagate_from: int | None = None
    unbindable: bool = False
    fs_type: str
    source: str
    super_options: tuple[str, ...]
    root_deleted: bool = False
    mount_point_deleted: bool = False

    @classmethod
    def parse(cls, line: bytes) -> Self:
        """Read one line; ValueError, with the line, for anything else."""
        try:
            return cls._parse(line)
        except ValueError as error:
            raise ValueError(f"not a line of mountinfo ({error}): {line!r}") from None

    @classmethod
    def _parse(cls, line: bytes) -> Self:
        # Single blanks: an empty source stands between two of them.
        head, separator, tail = line.rstrip(b"\n").partition(b" - ")
        if not separator:
            raise ValueError("no separator")
        mount_id, parent_id, device, root, mount_point, options, *tags = head.split(b" ")
        fs_type, source, super_options = tail.split(b" ", 2)
        major, minor = device.split(b":")
        root_text, root_deleted = _without_mark(_text(root))
        point_text, point_deleted = _without_mark(_text(mount_point))
        groups = dict(tag.partition(b":")[::2] for tag in tags)
        return cls(
            mount_id=int(mount_id),
            parent_id=int(parent_id),
            device=(int(major), int(minor)),
            root=root_text,
            mount_point=point_text,
            options=_items(options),
            shared_group=_group(groups, b"shared"),
            master_group=_group(groups, b"master"),
            propagate_from=_group(groups, b"propagate_from"),
            unbindable=b"unbindable" in groups,
            fs_type=_text(fs_type),
            source=_text(source),
            super_options=_items(super_options),
            root_deleted=root_deleted,
            mount_point_deleted=point_deleted,
        )

    def is_at(self, path: PathArgument) -> bool:
        """Whether it is mounted at exactly `path`; see `is_below` for what a path may be."""
        return _components(self.mount_point) == _components(path)

    def is_below(self, path: PathArgument) -> bool:
        """Whether it is mounted somewhere below `path`, not at it.

        Whole components are compared (`/database` is not below `/data`), no link is followed.
        ValueError for a relative path, one with ``..``, and one with a NUL.
        """
        above, own = _components(path), _components(self.mount_point)
        return len(own) > len(above) and own[: len(above)] == above


def parse_mountinfo(data: bytes) -> tuple[MountInfo, ...]:
    """All mounts of a mountinfo file, in its order; ValueError, with the line, if one is broken."""
    return tuple(MountInfo.parse(line) for line in data.split(b"\n") if line)


def read_mountinfo(pid: int | None = None) -> tuple[MountInfo, ...]:
    """The mounts that process `pid` (None: our own) sees below its root, in the kernel's order.

    Raises OSError where /proc/PID/mountinfo can't be read.
    """
    who = "self"
    if pid is not None:
        who = str(check_range(pid, lowest=1, highest=INT_MAX, argument="pid"))
    return parse_mountinfo(Path("/proc", who, "mountinfo").read_bytes())


def mounts_at_or_below(mounts: Iterable[MountInfo], path: PathArgument) -> tuple[MountInfo, ...]:
    """Those of `mounts` at or below `path`, in an order in which they can be taken off.

    A mount comes before what it stands on: deepest first, and of those stacked at one place the
    last one first. A place that was mounted n times is listed n times.
    """
    everything = tuple(mounts)
    parents = {mount.mount_id: mount.parent_id for mount in everything}
    found = [mount for mount in everything if mount.is_at(path) or mount.is_below(path)]
    return tuple(sorted(found, key=lambda mount: -_height(mount.mount_id, parents)))


def _height(mount_id: int, parents: dict[int, int]) -> int:
    """How many mounts of `parents` this one stands on."""
    seen: set[int] = set()
    while mount_id in parents and mount_id not in seen:  # the very first is its own parent
        seen.add(mount_id)
        mount_id = parents[mount_id]
    return len(seen)


def _text(field: bytes) -> str:
    """Undo the kernel's escapes: blank, tab, newline, backslash and # as three octal digits."""
    return os.fsdecode(_ESCAPE.sub(lambda match: bytes([int(match[1], 8)]), field))


def _items(field: bytes) -> tuple[str, ...]:
    # Split before unescaping: an escaped comma belongs to its item.
    return tuple(_text(item) for item in field.split(b",") if item)


def _without_mark(path: str) -> tuple[str, bool]:
    # No path of the kernel holds two slashes in a row, so the mark can't be part of a name.
    return (path.removesuffix(_DELETED) or "/", True) if path.endswith(_DELETED) else (path, False)


def _group(tags: dict[bytes, bytes], name: bytes) -> int | None:
    return int(tags[name]) if name in tags else None


def _components(path: PathArgument) -> tuple[str, ...]:
    text = os.fsdecode(encode_path(path, argument="path"))
    parts = tuple(part for part in text.split("/") if part not in ("", "."))
    if not text.startswith("/") or ".." in parts:
        raise ValueError(f"path must be absolute and without '..': {text!r}")
    return parts
