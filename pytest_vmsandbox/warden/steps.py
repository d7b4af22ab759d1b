"""Steps: the closed list of what the view of a jail may be made of.

A view is a root directory and what is mounted in it. It is built by performing steps in order,
with the capabilities of a user namespace that maps one user, so that none of them can reach what
that user can't reach. The first step makes the root: a Tmpfs or a Bind whose target is `/`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from enum import StrEnum
from typing import TypeAlias

from pytest_vmsandbox.errors import RequestInvalid
from pytest_vmsandbox.warden.validation import plain_text, whole_number

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
        raise RequestInvalid(f"a view has 1 to {_STEPS_AT_MOST} steps, not {forms!r:.200}")
    steps = tuple(_parse_step(form) for form in forms)
    first, *others = steps
    if not isinstance(first, Tmpfs | Bind) or first.target != "/":
        raise RequestInvalid(f"the first step must make the root: {first}")
    for step in others:
        if isinstance(step, Tmpfs | Bind | Proc) and step.target == "/":
            raise RequestInvalid(f"there is a root already: {step}")
    return steps


def _parse_step(form: object) -> Step:
    if not isinstance(form, dict) or not all(isinstance(key, str) for key in form):
        raise RequestInvalid(f"not a step: {form!r:.200}")
    values = dict(form)
    kind = _KINDS.get(str(values.pop("step", None)))
    if kind is None or set(values) != {field.name for field in fields(kind)}:
        raise RequestInvalid(f"not a step: {form!r:.200}", f"known are: {', '.join(_KINDS)}")
    return kind(**{name: _parse_value(name, value) for name, value in values.items()})


def _parse_value(name: str, value: object) -> object:
    match name:
        case "target":
            return _absolute(name, value)
        case "source":
            return _absolute(name, value)
        case "size_mib":
            return whole_number(name, value, TMPFS_MIB)
        case "writable":
            if not isinstance(value, list | tuple) or len(value) > _STEPS_AT_MOST:
                raise RequestInvalid(f"{name}={value!r:.200} must be a list of paths")
            return tuple(_absolute(name, path) for path in value)
        case "mode":
            return whole_number(name, value, MODES)
        case "access":
            return _one_of(name, value, tuple(Access), Access)
        case "name":
            return _one_of(name, value, DEVICES, str)
        case "devices" | "only_pids":
            if not isinstance(value, bool):
                raise RequestInvalid(f"{name}={value!r:.200} must be true or false")
            return value
    return plain_text(name, value)


def _one_of(name: str, value: object, known: tuple[str, ...], kind: type[str]) -> str:
    if not isinstance(value, str) or value not in known:
        raise RequestInvalid(f"{name}={value!r:.200} must be one of {', '.join(known)}")
    return kind(value)


def _absolute(name: str, value: object) -> str:
    path = plain_text(name, value)
    if not path.startswith("/") or ".." in path.split("/"):
        raise RequestInvalid(f"{name}={path!r:.200} must be an absolute path without `..`")
    return path
