"""What a ledger holds: a closed list of things that are acquired, each with its undo."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import TypeAlias

from pytest_vmsandbox.host.facts import Tier
from pytest_vmsandbox.lease.fields import fields_of, number_of, seconds_of, text_of
from pytest_vmsandbox.linux import ProcessIdentity

CGROUP_PREFIX = "vmsandbox-"


class Role(StrEnum):
    """What a process of ours is."""

    WARDEN = "warden"
    VMM = "vmm"
    SWITCH = "switch"
    GATEWAY = "gateway"


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessEntry:
    """A process; while `identity` is None it is an intent: it may have been started, or not.

    `since` is seconds since the epoch. Undo: SIGKILL through a pidfd of exactly that process.
    """

    role: Role
    tier: Tier
    machine_id: str = ""
    machine_name: str = ""
    since: float = field(default_factory=time.time)
    identity: ProcessIdentity | None = None

    def __str__(self) -> str:
        name = f"{self.role} {self.machine_name}".rstrip()
        return f"{name}, pid {self.identity.pid}" if self.identity else f"{name}, not yet started"


@dataclass(frozen=True, slots=True, kw_only=True)
class CgroupEntry:
    """A control group, by its directory, whose name begins with CGROUP_PREFIX. Undo: rmdir."""

    path: Path

    def __post_init__(self) -> None:
        _require_plain(self.path)
        if not self.path.name.startswith(CGROUP_PREFIX):
            raise ValueError(f"a control group of ours is called {CGROUP_PREFIX}...: {self.path}")

    def __str__(self) -> str:
        return f"control group {self.path}"


Entry: TypeAlias = ProcessEntry | CgroupEntry


def entry_to_json(entry: Entry) -> dict[str, object]:
    """What the ledger holds of an entry."""
    match entry:
        case ProcessEntry():
            return {
                "kind": "process",
                "role": entry.role,
                "tier": entry.tier,
                "machine_id": entry.machine_id,
                "machine_name": entry.machine_name,
                "since": entry.since,
                "identity": entry.identity and identity_to_json(entry.identity),
            }
        case CgroupEntry():
            return {"kind": "cgroup", "path": str(entry.path)}


def parse_entry(value: object) -> Entry:
    """The entry that was written so; ValueError for anything else."""
    kind = value.get("kind") if isinstance(value, Mapping) else None
    match kind:
        case "process":
            return _parse_process(value)
        case "cgroup":
            return CgroupEntry(path=Path(text_of(fields_of(value, "kind", "path")["path"])))
    raise ValueError(f"no kind of entry: {kind!r}")


def _parse_process(value: object) -> ProcessEntry:
    names = ("kind", "role", "tier", "machine_id", "machine_name", "since", "identity")
    fields = fields_of(value, *names)
    identity = fields["identity"]
    return ProcessEntry(
        role=Role(text_of(fields["role"])),
        tier=Tier(text_of(fields["tier"])),
        machine_id=text_of(fields["machine_id"]),
        machine_name=text_of(fields["machine_name"]),
        since=seconds_of(fields["since"]),
        identity=None if identity is None else parse_identity(identity),
    )


def identity_to_json(identity: ProcessIdentity) -> dict[str, object]:
    """A process, as the ledger names it."""
    return {
        "boot_id": identity.boot_id,
        "pid": identity.pid,
        "start_ticks": identity.start_ticks,
    }


def parse_identity(value: object) -> ProcessIdentity:
    """The process that was written so; ValueError for anything else."""
    fields = fields_of(value, "boot_id", "pid", "start_ticks")
    boot_id, pid = text_of(fields["boot_id"]), number_of(fields["pid"])
    if not boot_id or not 1 <= pid < 1 << 31:
        raise ValueError(f"no process: {value!r}")
    return ProcessIdentity(boot_id=boot_id, pid=pid, start_ticks=number_of(fields["start_ticks"]))


def _require_plain(path: Path) -> None:
    if not path.is_absolute() or ".." in path.parts or "\0" in str(path):
        raise ValueError(f"a path in the ledger is absolute and does not go up: {str(path)!r}")
