"""What a command behind walls is to see: the parameters of `run_sandbox`, read and checked."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from pathlib import PurePath
from typing import IO, TypeAlias, TypedDict, Unpack

from pytest_vmsandbox.errors import RequestInvalid

CAPTURE = subprocess.PIPE
STDOUT = subprocess.STDOUT
DISCARD = subprocess.DEVNULL

# What `env=None` gives, and where a command is looked for when its environment has no PATH.
DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

PathLike: TypeAlias = str | PurePath
Stream: TypeAlias = int | IO[bytes] | IO[str] | None
"""CAPTURE, DISCARD, STDOUT (for stderr), a descriptor, an open file, or None: the caller's own."""

ExtraMountForm: TypeAlias = Sequence[PathLike | None]
"""(source, target, type, options), or without the options."""

EVERYTHING = ("/",)

_NO_WORDS = (None, "none", "")


class Isolation(StrEnum):
    """What can be asked of the network, and of mounts, which are a command's own either way."""

    ISOLATED = "isolated"
    UNDEFINED = "undefined"


class MountKind(StrEnum):
    """What an extra mount is."""

    BIND = "bind"
    PROC = "proc"
    TMPFS = "tmpfs"
    READ_ONLY = "read-only"


@dataclass(frozen=True, slots=True, kw_only=True)
class ExtraMount:
    """One extra mount: `target` as seen from inside, `source` a path of the host for a bind."""

    kind: MountKind
    target: str
    source: str = ""

    @property
    def directory(self) -> bool:
        """Whether its mount point is a directory; that of a bound file is a file."""
        return self.kind is not MountKind.BIND or os.path.isdir(self.source)  # noqa: PTH112


@dataclass(frozen=True, slots=True, kw_only=True)
class SandboxConfig:
    """A command and the walls around it, checked.

    Paths are absolute, without `..`; `filesystem_root` and the sources of binds are real paths of
    the host, all others are seen from inside. `writable_paths` is EVERYTHING, or the only ones.
    """

    argv: tuple[str, ...]
    cwd: str
    env: Mapping[str, str]
    filesystem_root: str
    writable_paths: tuple[str, ...]
    mounts: Isolation
    extra_mounts: tuple[ExtraMount, ...]
    network: Isolation
    stdout: Stream
    stderr: Stream


class Surroundings(TypedDict, total=False):
    """What a command sees and has, its streams apart: by parameter of `run_sandbox`."""

    cwd: PathLike | None
    env: Mapping[str, str] | None
    filesystem_root: PathLike
    filesystem_writable_paths: str | Iterable[PathLike] | None
    mounts: str
    extra_mounts: str | Iterable[ExtraMountForm] | None
    network: str


class SandboxParameters(Surroundings, total=False):
    """The keyword parameters of `run_sandbox`; one that is left out has its default there."""

    stdout: Stream
    stderr: Stream


PARAMETERS = frozenset(SandboxParameters.__annotations__)

_DEFAULTS: SandboxParameters = {
    "cwd": None,
    "env": None,
    "filesystem_root": "/",
    "filesystem_writable_paths": "all",
    "mounts": "undefined",
    "extra_mounts": None,
    "network": "undefined",
    "stdout": CAPTURE,
    "stderr": CAPTURE,
}


def parse_config(
    command: str | Sequence[PathLike], **parameters: Unpack[SandboxParameters]
) -> SandboxConfig:
    """Read the parameters of `run_sandbox`; RequestInvalid names the first that can't be.

    One that there is not is a TypeError, as in any call.
    """
    if unknown := sorted(set(parameters) - PARAMETERS):
        raise TypeError(f"run_sandbox has no parameter {', '.join(unknown)}")
    given: SandboxParameters = {**_DEFAULTS, **parameters}
    cwd = given["cwd"]
    return SandboxConfig(
        argv=_parse_command(command),
        cwd="/" if cwd is None else path_inside("cwd", cwd),
        env=_parse_env(given["env"]),
        filesystem_root=_parse_root(given["filesystem_root"]),
        writable_paths=_parse_writable_paths(given["filesystem_writable_paths"]),
        mounts=_parse_isolation("mounts", given["mounts"]),
        extra_mounts=_parse_extra_mounts(given["extra_mounts"]),
        network=_parse_isolation("network", given["network"]),
        stdout=_parse_stream("stdout", given["stdout"]),
        stderr=_parse_stream("stderr", given["stderr"]),
    )


def path_inside(name: str, value: object) -> str:
    """An absolute path as it is seen from inside, `..` taken away word by word.

    From the root `..` leads to the root, as in any root directory (path_resolution(7)).
    """
    path = _text(name, value)
    if not path.startswith("/"):
        raise RequestInvalid(f"{name}={path!r:.200} must be an absolute path")
    return os.path.normpath("/" + path.lstrip("/"))


def is_at_or_below(path: str, above: str) -> bool:
    """Whether `path` is `above` or lies below it, by whole components; both are absolute."""
    return PurePath(path).is_relative_to(above)


def _parse_command(command: object) -> tuple[str, ...]:
    words = [command] if isinstance(command, str | PurePath) else command
    if not isinstance(words, Sequence) or isinstance(words, bytes | bytearray):
        raise RequestInvalid(f"command={command!r:.200} must be a word or a list of words")
    argv = tuple(_text("command", word) for word in words)
    if not argv or not argv[0]:
        raise RequestInvalid(f"command={command!r:.200} must name a program")
    return argv


def _parse_env(env: object) -> Mapping[str, str]:
    if env is None:
        return {"PATH": DEFAULT_PATH}
    if not isinstance(env, Mapping):
        raise RequestInvalid(f"env={env!r:.200} must map names to values")
    for name, value in env.items():
        if not _text("env", name) or "=" in name:
            raise RequestInvalid(f"env: {name!r:.200} can't be the name of a variable")
        if not isinstance(value, str):
            raise RequestInvalid(f"env: {name}={value!r:.200} must be text")
        _text(f"env: {name}", value)
    return dict(env)


def _parse_root(root: object) -> str:
    path = _real_path("filesystem_root", _text("filesystem_root", root))
    if not os.path.isdir(path):  # noqa: PTH112 - it may be any text
        raise RequestInvalid(f"filesystem_root={root!r:.200} is not a directory")
    return path


def _parse_writable_paths(paths: object) -> tuple[str, ...]:
    if paths == "all":
        return EVERYTHING
    if paths is None or paths == "none":
        return ()
    if isinstance(paths, str | bytes | Mapping) or not isinstance(paths, Iterable):
        raise RequestInvalid(
            f"filesystem_writable_paths={paths!r:.200} must be 'all', 'none' or a list of paths"
        )
    wanted = {path_inside("filesystem_writable_paths", path) for path in paths}
    # what lies below a writable path needs no word of its own
    return tuple(
        path
        for path in sorted(wanted)
        if not any(path != other and is_at_or_below(path, other) for other in wanted)
    )


def _parse_extra_mounts(forms: object) -> tuple[ExtraMount, ...]:
    if forms is None or forms in ("none", ""):
        return ()
    if isinstance(forms, str | bytes | Mapping) or not isinstance(forms, Iterable):
        raise RequestInvalid(f"extra_mounts={forms!r:.200} must be a list of mounts")
    return tuple(_parse_extra_mount(form) for form in forms)


def _parse_extra_mount(form: object) -> ExtraMount:
    if not isinstance(form, tuple | list) or len(form) not in (3, 4):
        raise RequestInvalid(
            f"extra_mounts: {form!r:.200} is no mount",
            "a mount is (source, target, type, options), or without the options",
        )
    source, target, kind, options = (
        "" if part in _NO_WORDS else _text("extra_mounts", part) for part in (*form, None)[:4]
    )
    if not target:
        raise RequestInvalid(f"extra_mounts: {form!r:.200} has no target")
    place = path_inside("extra_mounts: target", target)
    what = _mount_kind(form, kind, frozenset(filter(None, options.split(","))))
    if place == "/" and what is not MountKind.READ_ONLY:
        raise RequestInvalid(
            f"extra_mounts: {form!r:.200} would hide the root", "give another filesystem_root"
        )
    if what is not MountKind.BIND:
        return ExtraMount(kind=what, target=place)
    if not source.startswith("/"):
        raise RequestInvalid(f"extra_mounts: the source of {form!r:.200} must be an absolute path")
    return ExtraMount(
        kind=what, target=place, source=_real_path("extra_mounts: the source", source)
    )


def _mount_kind(form: object, kind: str, options: frozenset[str]) -> MountKind:
    match kind, options:
        case (("proc" | "tmpfs"), _) if not options:
            return MountKind(kind)
        case "", _ if options == {"bind"}:
            return MountKind.BIND
        case "", _ if {"remount", "ro"} <= options <= {"remount", "ro", "bind"}:
            return MountKind.READ_ONLY
    raise RequestInvalid(
        f"extra_mounts: {form!r:.200} has type {kind!r} with options {','.join(sorted(options))!r}",
        "type proc or tmpfs without options, or no type with options bind, or remount and ro",
    )


def _parse_isolation(name: str, value: object) -> Isolation:
    if not isinstance(value, str) or value not in tuple(Isolation):
        raise RequestInvalid(f"{name}={value!r:.200} must be one of {', '.join(Isolation)}")
    return Isolation(value)


def _parse_stream(name: str, value: Stream) -> Stream:
    known = (CAPTURE, DISCARD, STDOUT) if name == "stderr" else (CAPTURE, DISCARD)
    match value:
        case None:
            return None
        case bool():
            pass
        case int() if value in known:
            return value
        case int():
            with suppress(OSError, OverflowError):
                os.fstat(value)
                return value
        case _:
            with suppress(AttributeError, OSError, ValueError):
                value.fileno()
                return value
    raise RequestInvalid(
        f"{name}={value!r:.200} is no stream",
        "CAPTURE, DISCARD, None, a descriptor, or an open file that has one",
    )


def _real_path(name: str, path: str) -> str:
    if not path:
        raise RequestInvalid(f"{name} {path!r} is no path")
    try:
        return os.path.realpath(path, strict=True)
    except OSError as error:
        raise RequestInvalid(f"{name} {path!r:.200}: {error.strerror}") from None


def _text(name: str, value: object) -> str:
    if not isinstance(value, str | PurePath):
        raise RequestInvalid(f"{name}={value!r:.200} must be text")
    text = str(value)
    if "\0" in text:
        raise RequestInvalid(f"{name}={text!r:.200} must not hold a NUL")
    try:
        os.fsencode(text)
    except UnicodeEncodeError:
        raise RequestInvalid(f"{name}={text!r:.200} can't be encoded") from None
    return text
