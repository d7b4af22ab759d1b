"""A look into a sandbox's root from outside: what is there before anything is built."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from pytest_vmsandbox.errors import RequestInvalid
from pytest_vmsandbox.jail.mount_points import INSIDE
from pytest_vmsandbox.jail.sandbox.config import (
    DEFAULT_PATH,
    EVERYTHING,
    MountKind,
    SandboxConfig,
    is_at_or_below,
)
from pytest_vmsandbox.linux import OwnedFd
from pytest_vmsandbox.linux.openat2 import openat2
from pytest_vmsandbox.warden.steps import DEVICES


def find_programs(config: SandboxConfig) -> tuple[str, ...]:
    """Where the command's program is, as seen from inside; the first that is there is meant.

    A word with a slash is a path, relative to `cwd`; any other is looked for in the PATH of the
    command's environment. What extra mounts will show can't be seen yet and is kept.
    FileNotFoundError or PermissionError when there is none.
    """
    word = config.argv[0]
    if "/" in word:
        return (_from_cwd(config, word),)
    places = config.env.get("PATH", DEFAULT_PATH).split(":")
    paths = [_from_cwd(config, f"{place or '.'}/{word}") for place in places]
    seen = {path: _mode(config, path) for path in paths if not _is_covered(config, path)}
    found = [path for path in paths if path not in seen or _is_executable(seen[path])]
    if found:
        return tuple(dict.fromkeys(found))
    if any(mode is not None and stat.S_ISREG(mode) for mode in seen.values()):
        raise PermissionError(errno.EACCES, "it is not executable", word)
    raise FileNotFoundError(errno.ENOENT, f"no such program in {':'.join(places)}", word)


def require_paths(config: SandboxConfig) -> None:
    """Raise RequestInvalid for a path to be writable, or read-only, that is not there."""
    writable = () if config.writable_paths == EVERYTHING else config.writable_paths
    read_only = [extra.target for extra in config.extra_mounts if extra.kind is MountKind.READ_ONLY]
    for name, paths in (("filesystem_writable_paths", writable), ("extra_mounts", read_only)):
        for path in paths:
            if not _is_covered(config, path) and _mode(config, path) is None:
                raise RequestInvalid(f"{name}: {path!r} is not there in {config.filesystem_root}")


def devices_of(root: str) -> tuple[str, ...]:
    """Those of steps.DEVICES for which the directory `root` has a device in its /dev."""
    with _opened(root) as directory:
        modes = {name: _mode_at(directory, f"/dev/{name}") for name in DEVICES}
    return tuple(name for name, mode in modes.items() if mode is not None and stat.S_ISCHR(mode))


def _from_cwd(config: SandboxConfig, path: str) -> str:
    return os.path.normpath(os.path.join(config.cwd, path))  # noqa: PTH118 - `..` goes by words


def _is_covered(config: SandboxConfig, path: str) -> bool:
    return any(
        is_at_or_below(path, extra.target)
        for extra in config.extra_mounts
        if extra.kind is not MountKind.READ_ONLY
    )


def _is_executable(mode: int | None) -> bool:
    return mode is not None and stat.S_ISREG(mode) and bool(mode & 0o111)


def _mode(config: SandboxConfig, path: str) -> int | None:
    with _opened(config.filesystem_root) as directory:
        return _mode_at(directory, path)


@contextmanager
def _opened(root: str) -> Iterator[OwnedFd]:
    with OwnedFd(os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)) as directory:
        yield directory


def _mode_at(root: OwnedFd, path: str) -> int | None:
    """Type and permissions of what is at `path` in that root; None where we find nothing."""
    with suppress(OSError), openat2(root, path, os.O_PATH, resolve=INSIDE) as found:
        return os.fstat(found).st_mode
    return None
