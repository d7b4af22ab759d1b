"""The machine that a test holds, for `def test`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Unpack, overload

from pytest_vmsandbox.machine.caller import Caller
from pytest_vmsandbox.machine.command import Completed
from pytest_vmsandbox.machine.controller import MachineController
from pytest_vmsandbox.machine.face import ConsoleFace, Face, PopenOptions, RunOptions, blocking
from pytest_vmsandbox.machine.process import Process


class MachineConsole(ConsoleFace):
    """The serial console of a machine."""

    def wait_for(self, pattern: str, *, timeout: float | None = None) -> re.Match[str]:
        """The first match of `pattern` in the whole text, now or once it has been printed.

        Raises TimedOut after `timeout` seconds (30) with the last lines.
        """
        return self._caller.run(self._caller.controller.wait_for_console(pattern, timeout=timeout))


class MachineLink:
    """The cables of a machine's network cards."""

    def __init__(self, caller: Caller) -> None:
        self._caller = caller

    def down(self, *, network: str | None = None) -> None:
        """Pull the cable of its card on that network, or its first: the guest sees no carrier."""
        self._caller.run(self._caller.controller.set_link(up=False, network=network))

    def up(self, *, network: str | None = None) -> None:
        """Put it back."""
        self._caller.run(self._caller.controller.set_link(up=True, network=network))


class Machine(Face):
    """A real Linux machine: every verb waits until it is done, and Ctrl-C interrupts it."""

    if TYPE_CHECKING:

        @overload
        def run(
            self,
            command: str | Sequence[str],
            *,
            encoding: str = ...,
            **options: Unpack[RunOptions],
        ) -> Completed[str]: ...

        @overload
        def run(
            self, command: str | Sequence[str], *, encoding: None, **options: Unpack[RunOptions]
        ) -> Completed[bytes]: ...

        def run(
            self,
            command: str | Sequence[str],
            *,
            encoding: str | None = "utf-8",
            **options: Unpack[RunOptions],
        ) -> Completed[str] | Completed[bytes]:
            """See `MachineController.run`."""
            ...

    else:
        run = blocking(MachineController.run)

    def popen(
        self,
        command: str | Sequence[str],
        *,
        encoding: str | None = "utf-8",
        **options: Unpack[PopenOptions],
    ) -> Process:
        """Start a command and return it with its streams (compare `subprocess.Popen`).

        Streams are text in `encoding`, bytes where it is None. With `pty=True` it gets a
        terminal of `rows` and `columns`, and stdout carries all that it prints.
        """
        started = self._caller.run(self._controller.popen(command, **options))
        return Process(started, self._caller, encoding=encoding)

    def fork(self, count: int, *, timeout: float | None = None) -> list[Machine]:
        """See `MachineController.fork`: `count` machines like this one as it is now."""
        twins = self._caller.run(self._controller.fork(count, timeout=timeout))
        return [Machine(twin, self._engine) for twin in twins]

    @property
    def console(self) -> MachineConsole:
        """Its serial console."""
        return MachineConsole(self._caller)

    @property
    def link(self) -> MachineLink:
        """The cables of its network cards."""
        return MachineLink(self._caller)

    power_on = blocking(MachineController.power_on)
    power_cut = blocking(MachineController.power_cut)
    shutdown = blocking(MachineController.shutdown)
    reboot = blocking(MachineController.reboot)
    pause = blocking(MachineController.pause)
    resume = blocking(MachineController.resume)
    snapshot = blocking(MachineController.snapshot)
    restore = blocking(MachineController.restore)
    wait_until = blocking(MachineController.wait_until)
    wait_for_port = blocking(MachineController.wait_for_port)
    connect = blocking(MachineController.connect)
    forward = blocking(MachineController.forward)
    ssh_config = blocking(MachineController.ssh_config)
    push = blocking(MachineController.push)
    pull = blocking(MachineController.pull)
    read_bytes = blocking(MachineController.read_bytes)
    read_text = blocking(MachineController.read_text)
    write_bytes = blocking(MachineController.write_bytes)
    write_text = blocking(MachineController.write_text)
    qmp = blocking(MachineController.qmp)
    screenshot = blocking(MachineController.screenshot)
