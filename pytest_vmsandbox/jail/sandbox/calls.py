"""The calls: a command behind walls, from its parameters to its exit status and output."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Unpack

from pytest_vmsandbox.jail.sandbox.apart import run_with_own_warden
from pytest_vmsandbox.jail.sandbox.config import (
    CAPTURE,
    ExtraMountForm,
    PathLike,
    Stream,
    Surroundings,
    parse_config,
)


def run_sandbox(  # noqa: PLR0913 - its parameters are fixed
    command: str | Sequence[PathLike],
    *,
    cwd: PathLike | None = None,
    env: Mapping[str, str] | None = None,
    filesystem_root: PathLike = "/",
    filesystem_writable_paths: str | Iterable[PathLike] | None = "all",
    mounts: str = "undefined",
    extra_mounts: str | Iterable[ExtraMountForm] | None = None,
    network: str = "undefined",
    stdout: Stream = CAPTURE,
    stderr: Stream = CAPTURE,
) -> tuple[int, bytes | None, bytes | None]:
    """Run a command of this host, as ourselves, behind walls: its exit status and its output.

    It has pid, mount, user, ipc and uts namespaces of its own, no capabilities, no way to new
    privileges, an empty stdin, and `filesystem_root` as its root. A text is one word, never a
    shell's line. 128+N is signal N; a stream that is not captured comes back as None. It works
    inside a running event loop too, which waits meanwhile.

    Raises RequestInvalid, naming the value, for a parameter that can't be; FileNotFoundError,
    PermissionError or another OSError where the program can't be started, as `subprocess` does;
    HostUnfit where this host has no walls. Whatever happens, KeyboardInterrupt included, nothing
    is left: no process, no mount, no mount point, no descriptor.
    """
    config = parse_config(
        command,
        cwd=cwd,
        env=env,
        filesystem_root=filesystem_root,
        filesystem_writable_paths=filesystem_writable_paths,
        mounts=mounts,
        extra_mounts=extra_mounts,
        network=network,
        stdout=stdout,
        stderr=stderr,
    )
    ended = run_with_own_warden(config)
    return ended.exit_code, ended.out, ended.err


def run_sandbox_with_redirection(
    command: str | Sequence[PathLike],
    *,
    stdout: Stream = None,
    stderr: Stream = None,
    **surroundings: Unpack[Surroundings],
) -> int:
    """Run a command as `run_sandbox` does, with its parameters, and give only its exit status.

    Its streams are ours unless they are led elsewhere; what is captured is thrown away.
    """
    exit_code, _, _ = run_sandbox(command, stdout=stdout, stderr=stderr, **surroundings)
    return exit_code
