"""The processes of a run of pytest: what each is, when it lives, and what would betray it later."""

from __future__ import annotations

import os
import re
from collections.abc import Container, Iterator
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from pytest_vmsandbox.linux import ProcessIdentity
from pytest_vmsandbox.warden.bundle import BOOTSTRAP
from tests.children import children

_NAMESPACES = ("cgroup", "ipc", "mnt", "net", "pid", "user", "uts")
# How the program that a fresh Python gets as a warden begins.
_WARDEN = BOOTSTRAP.partition("\n")[0].encode()


class Part(StrEnum):
    """What a process of a run is."""

    PYTEST = "pytest"
    WORKER = "xdist worker"
    SUDO = "sudo"
    OUTER = "warden, outer half"
    INNER = "warden, inner half"
    VMM = "VMM"
    SWITCH = "switch"
    OTHER = "other"


# What such a Python is, by what it descends from, or by what it runs.
_PYTHONS = {Part.OUTER: Part.INNER, Part.INNER: Part.OTHER, Part.SWITCH: Part.SWITCH}


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """One process of a run, and the namespaces that it was in, as far as we may know."""

    part: Part
    identity: ProcessIdentity
    namespaces: frozenset[str]

    @property
    def pid(self) -> int:
        """Its pid, as we count."""
        return self.identity.pid

    def is_gone(self) -> bool:
        """Whether it has ended; as an orphan it may have become our child, and is reaped."""
        if self.part is not Part.PYTEST:  # which is a child of ours that somebody waits for
            with suppress(ChildProcessError):
                os.waitpid(self.pid, os.WNOHANG)
        return not self.identity.is_alive()


def members_of(pid: int) -> list[Member]:
    """The process `pid`, a pytest, and all that descends from it."""
    return list(_members(pid, Part.PYTEST))


def _members(pid: int, part: Part) -> Iterator[Member]:
    with suppress(ProcessLookupError):
        yield Member(
            part=part,
            identity=ProcessIdentity.of(pid),
            namespaces=namespaces_of(Path(f"/proc/{pid}")),
        )
    for child in _children(pid):
        yield from _members(child, _part(child, below=part))


def _children(pid: int) -> list[int]:
    found: list[int] = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):
            found += map(int, path.read_text().split())
    return found


def _part(pid: int, *, below: Part) -> Part:
    try:
        argv = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return Part.OTHER
    if argv[0].rpartition(b"/")[2] == b"sudo":
        return Part.SUDO
    if b"qemu-system" in argv[0]:
        return Part.VMM if below is Part.INNER or b"-nodefaults" in argv else Part.OTHER
    if any(word.startswith(_WARDEN) for word in argv):
        if any(b".network.switch" in word for word in argv):
            below = Part.SWITCH
        return _PYTHONS.get(below, Part.OUTER)
    if below is Part.PYTEST and any(b"sys.stdin.readline" in word for word in argv):
        return Part.WORKER
    return Part.OTHER


def namespaces_of(process: Path) -> frozenset[str]:
    """Its namespaces, "net:[4026531840]"; none where we may not know, or it has ended."""
    found = set()
    for name in _NAMESPACES:
        with suppress(OSError):
            found.add(str((process / "ns" / name).readlink()))
    return frozenset(found)


def living_namespaces(*, but: Container[int] = ()) -> frozenset[str]:
    """All that are mounted here, or that a process below us is in, but for those of some children.

    Not that of any process: the kernel gives the number of a namespace that has gone to the next
    one, whoever makes that. What a run has left is below us, since we adopt orphans.
    """
    mounted = re.findall(r"\w+:\[\d+\]", Path("/proc/self/mountinfo").read_text())
    left = [member for pid in children() if pid not in but for member in members_of(pid)]
    return frozenset(mounted).union(*(member.namespaces for member in left))


def all_mounts() -> str:
    """The mounts of every process, as far as we may know."""
    texts: set[str] = set()
    seen: set[str] = set()
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            namespace = str((process / "ns" / "mnt").readlink())
            if namespace not in seen:
                texts.add((process / "mountinfo").read_text(errors="surrogateescape"))
                seen.add(namespace)
    return "".join(texts)
