"""Commands in the guest, and conditions that are awaited there."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pytest_vmsandbox.deadline import Deadline
from pytest_vmsandbox.errors import ChannelLost, TimedOut
from pytest_vmsandbox.guest.messages import ExecRequest, WindowSize
from pytest_vmsandbox.guest.process import GuestProcess
from pytest_vmsandbox.machine.command import (
    Completed,
    Output,
    argv_of,
    decode,
    environment_of,
    run_command,
)
from pytest_vmsandbox.machine.core import MachineCore
from pytest_vmsandbox.machine.listening import port_check

# What a wait may take unless its caller says otherwise, in seconds, before scaling.
COMMAND_S = 120.0
CONDITION_S = 30.0


class Commands(MachineCore):
    """The verbs that run something in the guest."""

    async def run(  # noqa: PLR0913  # as subprocess.run has them
        self,
        command: str | Sequence[str],
        *,
        input: str | bytes | None = None,  # noqa: A002  # as in subprocess.run
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        user: str | int | None = None,
        timeout: float | None = None,
        check: bool = False,
        encoding: str | None = "utf-8",
    ) -> Completed[Any]:
        """Run a command in the guest to its end (compare `subprocess.run`).

        A text is a line for /bin/sh, a list is argv. `env` is added to the agent's own
        environment. Output is text in `encoding`, or bytes where that is None.
        Raises TimedOut after `timeout` seconds (120): the command's whole process group has
        been killed then. Raises CommandFailed for a non-zero status where `check` is set, and
        OSError (FileNotFoundError, PermissionError, ...) when it can't be started at all.
        """
        deadline = self._deadline(timeout, COMMAND_S)
        request = _request(command, env=env, cwd=cwd, user=user, stdin=input is not None)
        data = input.encode(encoding or "utf-8") if isinstance(input, str) else input
        started = time.perf_counter()
        channel = await self._channel(deadline)
        try:
            output = await run_command(channel, request, stdin=data, deadline=deadline)
        except TimedOut as error:
            raise await self._explained(error) from None
        if self.timings.first_command_s is None:
            self.timings.first_command_s = time.perf_counter() - started
        done = _completed(command, output, encoding)
        if check:
            done.check_returncode()
        return done

    async def popen(
        self,
        command: str | Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        user: str | int | None = None,
        pty: bool = False,
        rows: int = 24,
        columns: int = 80,
    ) -> GuestProcess:
        """Start a command in the guest and return it, with its streams."""
        request = _request(
            command,
            env=env,
            cwd=cwd,
            user=user,
            stdin=True,
            pty=WindowSize(rows=rows, columns=columns) if pty else None,
        )
        deadline = self._deadline(None, COMMAND_S)
        channel = await self._channel(deadline)
        async with self._in_time(deadline, f"the start of {command!r}"):
            return await channel.spawn(request)

    async def wait_until(
        self, command: str | Sequence[str], *, timeout: float | None = None
    ) -> None:
        """Return once `command` exits with 0, asked again and again in the guest.

        Raises TimedOut after `timeout` seconds (30), with the last attempt's output.
        """
        deadline = self._deadline(timeout, CONDITION_S)
        await self._wait_for(f"success of {command!r} in {self.name}", command, deadline)

    async def wait_for_port(self, *where: int | str, timeout: float | None = None) -> None:
        """Return once a TCP port is listened on: `(80)` in this guest, `(host, 80)` from it.

        Raises TimedOut after `timeout` seconds (30), with the last attempt's output.
        """
        deadline = self._deadline(timeout, CONDITION_S)
        command = port_check(where)
        *host, port = where
        place = f"on {host[0]}, reached from {self.name}" if host else f"in {self.name}"
        await self._wait_for(f"a listener on port {port} {place}", command, deadline)

    async def _wait_for(self, what: str, command: str | Sequence[str], deadline: Deadline) -> None:
        request = _request(command, env=None, cwd=None, user=None, stdin=False)
        last_seen = "it was never run to its end"
        for pause_s in _pauses():
            try:
                channel = await self._channel(deadline)
                output = await run_command(channel, request, stdin=None, deadline=deadline)
            except TimedOut:
                break
            except ChannelLost as lost:
                # A guest that reboots meanwhile is asked again, one that is gone is not.
                if self._on().failure is not None:
                    raise
                last_seen = lost.cause
            else:
                if output.returncode == 0:
                    return
                said = decode(output.stderr or output.stdout, "utf-8")
                last_seen = f"exit status {output.returncode}: {said}"
            if deadline.passed:
                break
            await asyncio.sleep(min(pause_s, deadline.left_s))
        raise deadline.timed_out(what, last_seen)


def _request(
    command: str | Sequence[str],
    *,
    env: Mapping[str, str] | None,
    cwd: str | None,
    user: str | int | None,
    stdin: bool,
    pty: WindowSize | None = None,
) -> ExecRequest:
    return ExecRequest(
        argv=argv_of(command),
        env=environment_of(env),
        cwd=cwd,
        user=user,
        stdin=stdin,
        pty=pty,
    )


def _completed(
    command: str | Sequence[str], output: Output, encoding: str | None
) -> Completed[Any]:
    if encoding is None:
        return Completed(
            command=command,
            returncode=output.returncode,
            stdout=output.stdout,
            stderr=output.stderr,
        )
    return Completed(
        command=command,
        returncode=output.returncode,
        stdout=decode(output.stdout, encoding),
        stderr=decode(output.stderr, encoding),
    )


def _pauses() -> Iterator[float]:
    """Short pauses first: most conditions are met soon."""
    pause_s = 0.02
    while True:
        yield pause_s
        pause_s = min(pause_s * 1.5, 0.25)
