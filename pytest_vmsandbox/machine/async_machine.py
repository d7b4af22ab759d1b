"""The machine that a test holds, for `async def test`, on any loop."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Unpack, overload

from pytest_vmsandbox.machine.async_process import AsyncProcess
from pytest_vmsandbox.machine.caller import Caller
from pytest_vmsandbox.machine.command import Completed
from pytest_vmsandbox.machine.controller import MachineController
from pytest_vmsandbox.machine.face import ConsoleFace, Face, PopenOptions, RunOptions, awaitable


class AsyncMachineConsole(ConsoleFace):
    """The serial console of an async machine."""

    async def wait_for(self, pattern: str, *, timeout: float | None = None) -> re.Match[str]:
        """The first match of `pattern` in the whole text, now or once it has been printed.

        Raises TimedOut after `timeout` seconds (30) with the last lines.
        """
        return await self._caller.bridge(
            self._caller.controller.wait_for_console(pattern, timeout=timeout)
        )


class AsyncMachineLink:
    """The cables of a machine's network cards."""

    def __init__(self, caller: Caller) -> None:
        self._caller = caller

    async def down(self, *, network: str | None = None) -> None:
        """Pull the cable of its card on that network, or its first: the guest sees no carrier."""
        await self._caller.bridge(self._caller.controller.set_link(up=False, network=network))

    async def up(self, *, network: str | None = None) -> None:
        """Put it back."""
        await self._caller.bridge(self._caller.controller.set_link(up=True, network=network))


class AsyncMachine(Face):
    """A real Linux machine: the verbs of `Machine`, awaited, on whatever loop the test runs."""

    if TYPE_CHECKING:

        @overload
        async def run(
            self,
            command: str | Sequence[str],
            *,
            encoding: str = ...,
            **options: Unpack[RunOptions],
        ) -> Completed[str]: ...

        @overload
        async def run(
            self, command: str | Sequence[str], *, encoding: None, **options: Unpack[RunOptions]
        ) -> Completed[bytes]: ...

        async def run(
            self,
            command: str | Sequence[str],
            *,
            encoding: str | None = "utf-8",
            **options: Unpack[RunOptions],
        ) -> Completed[str] | Completed[bytes]:
            """See `MachineController.run`."""
            ...

    else:
        run = awaitable(MachineController.run)

    async def popen(
        self,
        command: str | Sequence[str],
        *,
        encoding: str | None = "utf-8",
        **options: Unpack[PopenOptions],
    ) -> AsyncProcess:
        """Start a command and return it with its streams (compare `subprocess.Popen`).

        Streams are text in `encoding`, bytes where it is None. With `pty=True` it gets a
        terminal of `rows` and `columns`, and stdout carries all that it prints.
        """
        started = await self._caller.bridge(self._controller.popen(command, **options))
        return AsyncProcess(started, self._caller, encoding=encoding)

    async def fork(self, count: int, *, timeout: float | None = None) -> list[AsyncMachine]:
        """See `MachineController.fork`: `count` machines like this one as it is now."""
        twins = await self._caller.bridge(self._controller.fork(count, timeout=timeout))
        return [AsyncMachine(twin, self._engine) for twin in twins]

    @property
    def console(self) -> AsyncMachineConsole:
        """Its serial console."""
        return AsyncMachineConsole(self._caller)

    @property
    def link(self) -> AsyncMachineLink:
        """The cables of its network cards."""
        return AsyncMachineLink(self._caller)

    power_on = awaitable(MachineController.power_on)
    power_cut = awaitable(MachineController.power_cut)
    shutdown = awaitable(MachineController.shutdown)
    reboot = awaitable(MachineController.reboot)
    pause = awaitable(MachineController.pause)
    resume = awaitable(MachineController.resume)
    snapshot = awaitable(MachineController.snapshot)
    restore = awaitable(MachineController.restore)
    wait_until = awaitable(MachineController.wait_until)
    wait_for_port = awaitable(MachineController.wait_for_port)
    connect = awaitable(MachineController.connect)
    forward = awaitable(MachineController.forward)
    ssh_config = awaitable(MachineController.ssh_config)
    push = awaitable(MachineController.push)
    pull = awaitable(MachineController.pull)
    read_bytes = awaitable(MachineController.read_bytes)
    read_text = awaitable(MachineController.read_text)
    write_bytes = awaitable(MachineController.write_bytes)
    write_text = awaitable(MachineController.write_text)
    qmp = awaitable(MachineController.qmp)
    screenshot = awaitable(MachineController.screenshot)
