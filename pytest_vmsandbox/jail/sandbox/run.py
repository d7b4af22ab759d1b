"""One command behind walls, by a warden that runs: from its configuration to how it ended."""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Sequence
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Self

from pytest_vmsandbox.jail.mount_points import open_mount_points
from pytest_vmsandbox.jail.off_loop import off_loop
from pytest_vmsandbox.jail.sandbox.config import (
    CAPTURE,
    DISCARD,
    STDOUT,
    Isolation,
    SandboxConfig,
    Stream,
)
from pytest_vmsandbox.jail.sandbox.lookup import devices_of, find_programs, require_paths
from pytest_vmsandbox.jail.sandbox.plan import plan_sandbox, visible_mounts
from pytest_vmsandbox.linux import OwnedFd, read_mountinfo
from pytest_vmsandbox.warden.client import Warden
from pytest_vmsandbox.warden.requests import Launch, Limits, Network, Who
from pytest_vmsandbox.warden.steps import Step

# The host name that a command sees.
HOST_NAME = "sandbox"

_PART_BYTES = 1 << 20
_NOT_THERE = (errno.ENOENT, errno.ENOTDIR, errno.EACCES)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """How a command ended: 128+N for signal N; None for a stream that was not captured."""

    exit_code: int
    out: bytes | None
    err: bytes | None


async def run_in(warden: Warden, config: SandboxConfig, *, base: Path) -> Ended:
    """Run the command of `config` to its end, as ourselves, behind walls of its own.

    Nothing of it is left whatever happens, cancellation included. As with `subprocess`,
    FileNotFoundError, PermissionError or another OSError is raised where the program can't be
    started; RequestInvalid where a path of the configuration is not there. `base` is where the
    mount points that had to be made are registered.
    """
    require_paths(config)
    programs = find_programs(config)
    # What belongs to root can be used by root without a capability, a raw disk too: root gets
    # the harmless devices. Others can open no more than outside.
    devices = devices_of(config.filesystem_root) if os.getuid() == 0 else None
    plan = plan_sandbox(config, mounts=visible_mounts(read_mountinfo()), devices=devices)
    points = off_loop(open_mount_points(plan.mount_points, base=base))
    async with points, AsyncExitStack() as streams:
        null = streams.enter_context(OwnedFd(os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)))
        out = streams.enter_context(_Output(config.stdout, null=null, ours=1))
        to = out.write_end if config.stderr == STDOUT else config.stderr
        err = streams.enter_context(_Output(to, null=null, ours=2))
        order = _order(config, plan.steps)
        returncode = await _run_first(
            warden, order, programs, descriptors=(null, out.write_end, err.write_end)
        )
        return Ended(
            exit_code=returncode if returncode >= 0 else 128 - returncode,
            out=out.finish(),
            err=err.finish(),
        )


def _order(config: SandboxConfig, steps: tuple[Step, ...]) -> Launch:
    return Launch(
        who=Who.OWNER,
        name=HOST_NAME,
        argv=config.argv,
        env=config.env,
        cwd=config.cwd,
        steps=steps,
        network=Network.ISOLATED if config.network is Isolation.ISOLATED else Network.HOST,
        limits=Limits(),
        files=(),
        room=None,
        group=None,
    )


async def _run_first(
    warden: Warden, order: Launch, programs: Sequence[str], *, descriptors: Sequence[int]
) -> int:
    """Run the first of `programs` that is there, to its end."""
    *others, last = programs
    for program in others:
        try:
            return await _run(warden, order, program, descriptors=descriptors)
        except OSError as error:
            if error.errno not in _NOT_THERE:
                raise
    return await _run(warden, order, last, descriptors=descriptors)


async def _run(warden: Warden, order: Launch, program: str, *, descriptors: Sequence[int]) -> int:
    order = replace(order, argv=(program, *order.argv[1:]))
    async with AsyncExitStack() as stack:
        launch = warden.launch(order, descriptors)
        launching = asyncio.ensure_future(stack.enter_async_context(launch))
        try:
            process = await asyncio.shield(launching)
        except asyncio.CancelledError:
            # Its view is being built on mount points that must not be taken away meanwhile: some
            # milliseconds, at worst what the warden's answer may take.
            while not launching.done():
                with suppress(asyncio.CancelledError):
                    await asyncio.wait({launching})
            raise
        return await process.wait()


class _Output:
    """Where a stream goes: the command gets `write_end`; captured, the loop reads the other end.

    A pipe has no end while anybody holds it open, and a command may have handed it on to somebody
    outside. So `finish` takes what is there when the command, and all it started, have ended.
    """

    def __init__(self, stream: Stream, *, null: int, ours: int) -> None:
        self._parts: list[bytes] = []
        self._pipe: tuple[OwnedFd, ...] = ()
        if stream == CAPTURE:
            self._pipe = tuple(OwnedFd(end) for end in os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK))
            os.set_blocking(self._pipe[1], True)
            self.write_end: int = self._pipe[1]
            asyncio.get_running_loop().add_reader(self._pipe[0], self._take)
        elif stream is None:
            self.write_end = ours
        elif isinstance(stream, int):
            self.write_end = null if stream == DISCARD else stream
        else:
            stream.flush()  # what was written before comes before
            self.write_end = stream.fileno()

    def finish(self) -> bytes | None:
        """All that was written; None if it was not captured."""
        if not self._pipe:
            return None
        while self._take():
            pass
        return b"".join(self._parts)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._pipe:
            asyncio.get_running_loop().remove_reader(self._pipe[0])
        for end in self._pipe:
            end.close()

    def _take(self) -> bool:
        """Read what is there, as far as one read goes; whether it was anything."""
        try:
            part = os.read(self._pipe[0], _PART_BYTES)
        except BlockingIOError:
            return False
        self._parts.append(part)
        return bool(part)
