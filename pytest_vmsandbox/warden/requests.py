"""Requests: the closed list of what the warden may be asked for, and how it is read.

A request is one packet: a JSON object, and descriptors beside it. `parse_request` trusts nothing
of it; whatever it lets pass may still be refused where it is performed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from signal import Signals
from typing import TypeAlias

from pytest_vmsandbox.errors import RequestInvalid
from pytest_vmsandbox.warden.steps import Step, parse_steps
from pytest_vmsandbox.warden.validation import (
    absolute_path,
    argument_list,
    machine_name,
    one_of,
    plain_text,
    refuse,
    whole_number,
)

# The longest packet; more is not read but refused. The kernel's own limit is about as long.
PACKET_BYTES = 160 * 1024
DESCRIPTORS_AT_MOST = 64
_NUMBERS = range(2**53)
_PIDS = range(1, 2**31)
_BYTES = range(1 << 20, 1 << 50)
_PROCESSES = range(1, 1 << 20)
_FILES = range(16, 1 << 20)


class Who(StrEnum):
    """As whom a process is started."""

    VMM = "vmm"
    OWNER = "owner"


class Network(StrEnum):
    """What a process sees of the network.

    ISOLATED: nothing. WIRES: nothing either, but it may make interfaces there, for itself alone.
    """

    ISOLATED = "isolated"
    WIRES = "wires"
    HOST = "host"


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a process and all that it starts may use; None for what is not limited.

    `address_bytes` is for each process (RLIMIT_AS), `memory_bytes` for all together, where a
    control group can be had.
    """

    address_bytes: int | None = None
    memory_bytes: int | None = None
    processes: int | None = None
    file_bytes: int | None = None
    open_files: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """Start a process behind walls.

    The descriptors that come with it become 0, 1, 2, and so on up. `files` says for those from 3
    on by which path each was opened, or None: one with a path may only be read. `room` is a
    directory of the view which the warden keeps open for `Connect` and `OpenFile`.
    """

    who: Who
    name: str
    argv: tuple[str, ...]
    env: Mapping[str, str]
    cwd: str
    steps: tuple[Step, ...]
    network: Network
    limits: Limits
    files: tuple[str | None, ...]
    room: str | None
    group: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Connect:
    """Connect to the socket `socket` in the room of `process`."""

    process: int
    socket: str


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenFile:
    """Open the file `file` in the room of `process` for reading."""

    process: int
    file: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Signal:
    """Send a signal to `process`."""

    process: int
    signal: Signals


Request: TypeAlias = Launch | Connect | OpenFile | Signal

_SIGNALS = (Signals.SIGTERM, Signals.SIGKILL)


def parse_packet(packet: bytes) -> tuple[int, dict[str, object]]:
    """The number of the request in a packet, and the rest of its form, of which nothing is read.

    Raises RequestInvalid where there is no number: then nobody waits for the answer.
    """
    try:
        form = json.loads(packet)
    except (ValueError, RecursionError):
        form = None
    if not isinstance(form, dict):
        refuse("packet", packet[:100], "must be an object in JSON")
    return whole_number("number", form.pop("number", None), _NUMBERS), form


def parse_request(form: Mapping[str, object], *, descriptors: int) -> Request:
    """The request that is the rest of a form and came with so many descriptors.

    Raises RequestInvalid, which names the first thing that can't be; nothing has happened then.
    """
    try:
        return _read(dict(form), descriptors)
    except RecursionError:  # a value that could just be read may be too deep to be looked at
        raise RequestInvalid("the request is too deep") from None


def _read(form: dict[str, object], descriptors: int) -> Request:
    kind = form.pop("request", None)
    read = _READERS.get(kind) if isinstance(kind, str) else None
    if read is None:
        refuse("request", kind, f"must be one of {', '.join(_READERS)}")
    reader, keys = read
    if set(form) != keys:
        refuse("keys", sorted(form), f"must be {', '.join(sorted(keys))}")
    if reader is not _read_launch and descriptors:
        raise RequestInvalid(f"it comes with {descriptors} descriptors and takes none")
    return reader(form, descriptors)


def _read_launch(form: Mapping[str, object], descriptors: int) -> Launch:
    files = form["files"]
    if not isinstance(files, list) or len(files) + 3 != descriptors:
        refuse("files", files, f"must go with {descriptors} descriptors, three of them streams")
    room, group = form["room"], form["group"]
    launch = Launch(
        who=one_of("who", form["who"], Who),
        name=machine_name("name", form["name"]),
        argv=argument_list("argv", form["argv"]),
        env=_read_env(form["env"]),
        cwd=absolute_path("cwd", form["cwd"]),
        steps=parse_steps(form["steps"]),
        network=one_of("network", form["network"], Network),
        limits=_read_limits(form["limits"]),
        files=tuple(None if path is None else absolute_path("file", path) for path in files),
        room=None if room is None else absolute_path("room", room),
        group=None if group is None else machine_name("group", group),
    )
    absolute_path("program", launch.argv[0])
    if launch.network is not Network.ISOLATED and launch.who is Who.VMM:
        refuse("network", launch.network, "can't be a VMM's, which has no right to any interface")
    return launch


def _read_env(form: object) -> Mapping[str, str]:
    if not isinstance(form, dict):
        refuse("env", form, "must map names to values")
    for name, value in form.items():
        if not plain_text("name", name) or "=" in name:
            refuse("name", name, "can't be that of an environment variable")
        plain_text(name, value)
    return form


def _read_limits(form: object) -> Limits:
    ranges = {
        "address_bytes": _BYTES,
        "memory_bytes": _BYTES,
        "processes": _PROCESSES,
        "file_bytes": _BYTES,
        "open_files": _FILES,
    }
    if not isinstance(form, dict) or set(form) != set(ranges):
        refuse("limits", form, f"must have the keys {', '.join(ranges)}")
    return Limits(
        **{
            name: None if form[name] is None else whole_number(name, form[name], allowed)
            for name, allowed in ranges.items()
        }
    )


def _read_connect(form: Mapping[str, object], _: int) -> Connect:
    return Connect(process=_pid(form), socket=_file_name("socket", form["socket"]))


def _read_open_file(form: Mapping[str, object], _: int) -> OpenFile:
    return OpenFile(process=_pid(form), file=_file_name("file", form["file"]))


def _read_signal(form: Mapping[str, object], _: int) -> Signal:
    number = whole_number("signal", form["signal"], range(1, 65))
    if number not in _SIGNALS:
        refuse("signal", number, f"must be one of {', '.join(map(str, _SIGNALS))}")
    return Signal(process=_pid(form), signal=Signals(number))


_READERS: Mapping[str, tuple[Callable[[Mapping[str, object], int], Request], set[str]]] = {
    "launch": (
        _read_launch,
        {
            *("who", "name", "argv", "env", "cwd", "steps"),
            *("network", "limits", "files", "room", "group"),
        },
    ),
    "connect": (_read_connect, {"process", "socket"}),
    "open_file": (_read_open_file, {"process", "file"}),
    "signal": (_read_signal, {"process", "signal"}),
}


def _pid(form: Mapping[str, object]) -> int:
    return whole_number("process", form["process"], _PIDS)


def _file_name(name: str, value: object) -> str:
    text = plain_text(name, value)
    if not text or "/" in text or text in (".", ".."):
        refuse(name, value, "must be the name of a file in its room")
    return text
