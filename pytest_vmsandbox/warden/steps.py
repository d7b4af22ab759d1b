"""Steps: the closed list of what the view of a jail may be made of.

A view is a root directory and what is mounted in it. It is built by performing steps in order,
with the capabilities of a user namespace that maps one user, so that none of them can reach what
that user can't reach. The first step makes the root: a Tmpfs or a Bind whose target is `/`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from enum import StrEnum
from typing import Any, TypeAlias

from pytest_vmsandbox.errors import RequestInvalid
from pytest_vmsandbox.warden.validation import (
    absolute_path,
    one_of,
    plain_text,
    refuse,
    whole_number,
)

# What a VMM, or a command, may need of /dev; never /dev itself, which is one for the whole host.
DEVICES = ("null", "zero", "full", "random", "urandom", "kvm", "net/tun", "vhost-net")

TMPFS_MIB = range(1, 64 * 1024)
MODES = range(0o1000)


class Access(StrEnum):
    """What may be done with what is bound."""

    READ_ONLY = "read-only"
    READ_WRITE = "read-write"


@dataclass(frozen=True, slots=True, kw_only=True)
class Tmpfs:
    """An empty file system of its own, of at most `size_mib` MiB."""

    target: str
    size_mib: int
    mode: int = 0o755

    def __str__(self) -> str:
        return f"tmpfs of {self.size_mib} MiB at {self.target}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Bind:
    """A directory or file of the host, with all that is mounted below it.

    Set-user-id bits have no effect in it, nor have device nodes unless `devices`.
    """

    source: str
    target: str
    access: Access = Access.READ_ONLY
    devices: bool = False

    def __str__(self) -> str:
        return f"bind {self.source} at {self.target}, {self.access}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """One of DEVICES, the host's own, at its usual place."""

    name: str

    def __str__(self) -> str:
        return f"device {self.name}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Proc:
    """The processes of the jail's own pid namespace, and nothing else of /proc if `only_pids`."""

    target: str
    only_pids: bool = True

    def __str__(self) -> str:
        return f"proc at {self.target}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Symlink:
    """A symbolic link at `target` that says `text`."""

    target: str
    text: str

    def __str__(self) -> str:
        return f"symlink {self.target} -> {self.text}"


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadOnly:
    """From now on nothing at `target`, or mounted below it, can be written but what is `writable`.

    `target` is any directory or file of the view, the root of a mount or not. What is at or below
    the paths `writable`, which must be there, stays as it is at this moment.
    """

    target: str
    writable: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.target} read-only{''.join(f', not {path}' for path in self.writable)}"


Step: TypeAlias = Tmpfs | Bind | Device | Proc | Symlink | ReadOnly

_KINDS: Mapping[str, type[Step]] = {
    kind.__name__.lower(): kind for kind in (Tmpfs, Bind, Device, Proc, Symlink, ReadOnly)
}
_STEPS_AT_MOST = 200


def render_step(step: Step) -> dict[str, object]:
    """The form in which a step crosses to the warden."""
    values = {field.name: getattr(step, field.name) for field in fields(step)}
    return {"step": type(step).__name__.lower(), **values}


def parse_steps(forms: object) -> tuple[Step, ...]:
    """Read what `render_step` made; RequestInvalid names the first value that can't be."""
    if not isinstance(forms, list) or not 1 <= len(forms) <= _STEPS_AT_MOST:
        refuse("steps", forms, f"must be a list of 1 to {_STEPS_AT_MOST}")
    steps = tuple(_parse_step(form) for form in forms)
    first, *others = steps
    if not isinstance(first, Tmpfs | Bind) or first.target != "/":
        raise RequestInvalid(f"the first step must make the root: {first}")
    for step in others:
        if isinstance(step, Tmpfs | Bind | Proc) and _is_root(step.target):
            raise RequestInvalid(f"there is a root already: {step}")
    return steps


def _is_root(target: str) -> bool:
    return all(part in ("", ".") for part in target.split("/"))


def _parse_step(form: object) -> Step:
    if not isinstance(form, dict):
        refuse("step", form, "must be an object")
    values: dict[str, Any] = dict(form)
    word = values.pop("step", None)
    kind = _KINDS.get(word) if isinstance(word, str) else None
    if kind is None or set(values) != {field.name for field in fields(kind)}:
        refuse("step", form, f"must be one of {', '.join(_KINDS)}, with its fields")
    parsed: dict[str, Any] = {name: _PARSERS[name](name, values[name]) for name in values}
    return kind(**parsed)


def _parse_device(name: str, value: object) -> str:
    if value not in DEVICES:
        refuse(name, value, f"must be one of {', '.join(DEVICES)}")
    return str(value)


def _parse_truth(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        refuse(name, value, "must be true or false")
    return value


def _parse_paths(name: str, value: object) -> tuple[str, ...]:
    if not isinstance(value, list) or len(value) > _STEPS_AT_MOST:
        refuse(name, value, "must be a list of paths")
    return tuple(absolute_path(name, path) for path in value)


_PARSERS: Mapping[str, Callable[[str, object], object]] = {
    "target": absolute_path,
    "source": absolute_path,
    "text": plain_text,
    "size_mib": lambda name, value: whole_number(name, value, TMPFS_MIB),
    "mode": lambda name, value: whole_number(name, value, MODES),
    "access": lambda name, value: one_of(name, value, Access),
    "name": _parse_device,
    "devices": _parse_truth,
    "only_pids": _parse_truth,
    "writable": _parse_paths,
}
