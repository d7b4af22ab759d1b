"""The pool: one machine ahead, restored and warmed while a test runs, for the test after it.

A restored guest under emulation begins with nothing translated, and its first command costs ten
times the second: here that has been paid before anybody waits. It uses what the host has to spare
and no more, and what waits is given up at once when memory grows short. No machine comes back.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import TypeAlias

from pytest_vmsandbox.deadline import Deadline
from pytest_vmsandbox.errors import VmSandboxError
from pytest_vmsandbox.host.spare import idle_processors, spare_memory_bytes
from pytest_vmsandbox.jail.off_loop import to_its_end
from pytest_vmsandbox.machine.controller import MachineController
from pytest_vmsandbox.machine.spec import MachineSpec

_log = logging.getLogger(__name__)

# A processor counts as spare when it idled each time that we looked.
_LOOKS = 3
_LOOK_S = 0.005
# On a host that stays busy our looks would be one more thing that it has to do.
_PATIENT_LOOKS = 50
_PATIENT_LOOK_S = 0.075

# How often memory is looked at while a machine waits.
_WATCH_S = 0.5

# What the guest may take to say that it is still well, before scaling: a healthy one takes 1 ms.
_HAND_OVER_S = 0.5

# What makes the guest's kernel start and end a process once.
_WARMING = ("true",)

Make: TypeAlias = Callable[[MachineSpec], Awaitable[MachineController | None]]
Turn: TypeAlias = Callable[[], AbstractContextManager[object] | None]


class Pool:
    """At most one machine that waits.

    `make` gives those that are started, not powered on yet, or None where one is not to be had in
    a moment; `turn` gives a block in which one may be started, or None while others start theirs.
    All of it belongs to one loop. What goes wrong in here costs the machine that waits and nothing
    else: whoever asks makes one in the ordinary way, and is told there what is wrong.
    """

    def __init__(self, make: Make, *, turn: Turn = nullcontext) -> None:
        self._make = make
        self._turn = turn
        self._ahead: _Ahead | None = None
        self._ending: set[asyncio.Task[None]] = set()

    def foresee(self, spec: MachineSpec | None) -> None:
        """Have a machine like `spec` soon, in place of any other; with None, have none.

        Nobody waits for the end of one that was not wanted.
        """
        if self._ahead is not None and self._ahead.is_like(spec) and not self._ahead.over:
            return
        self._give_up(self._ahead)
        self._ahead = None if spec is None else _Ahead(spec, self._make, self._turn)

    async def take(self, spec: MachineSpec) -> MachineController | None:
        """The machine that waits, if it is like `spec`: powered on, and from now on the caller's.

        One that is being started is waited for, one that is not even begun is given up: then, or
        where there is none or it is not well, the answer is None. A caller who is cancelled is
        given none, and it is ended.
        """
        ahead = self._ahead
        if ahead is None or not ahead.is_like(spec):
            return None
        self._ahead = None
        try:
            return await ahead.take()
        finally:
            self._give_up(ahead)

    async def close(self) -> None:
        """End what waits; returns once all that were given up have ended."""
        self._give_up(self._ahead)
        self._ahead = None
        if self._ending:
            await asyncio.wait(self._ending)

    def _give_up(self, ahead: _Ahead | None) -> None:
        if ahead is not None and not ahead.over:
            self._ending.add(ahead.task)
            ahead.task.add_done_callback(self._ending.discard)
            ahead.give_up()


class _Ahead:
    """One machine from the wish for it until it is taken or given up.

    Its task owns the machine, and ends it, until the very moment at which somebody has it.
    """

    def __init__(self, spec: MachineSpec, make: Make, turn: Turn) -> None:
        self.spec = spec
        self._make = make
        self._turn = turn
        self._machine: MachineController | None = None
        self._begun = False
        self._ends = False
        self._ready = asyncio.Event()  # or over
        self.task = asyncio.create_task(self._live())

    @property
    def over(self) -> bool:
        """Whether it was given up, or has failed."""
        return self._ends or self.task.done()

    def is_like(self, spec: MachineSpec | None) -> bool:
        """Whether it is what `spec` asks for, which may be with another right to it."""
        return spec is not None and spec == self.spec and spec.demanded == self.spec.demanded

    async def take(self) -> MachineController | None:
        """The machine, if it is well, for the caller to end; None otherwise."""
        if self._begun:
            await self._ready.wait()
        machine = self._machine
        if machine is None or not self._ready.is_set() or not await _is_well(machine):
            return None
        # Without a wait from here on: until now whoever is cancelled leaves it to our task, which
        # may also have ended it meanwhile.
        machine, self._machine = self._machine, None
        return machine

    def give_up(self) -> None:
        """End it, unless somebody has it; the task is over once that is done."""
        if not self._ends:
            self._ends = True
            self.task.cancel()

    async def _live(self) -> None:
        try:
            with await self._admission():
                self._begun = True
                await self._start()
            self._ready.set()
            while self._machine is not None and spare_memory_bytes():  # noqa: ASYNC110 - none tells
                await asyncio.sleep(_WATCH_S)
        except Exception:  # noqa: BLE001 - whoever asks makes another, and is told what is wrong
            _log.debug("no machine ahead", exc_info=True)
        finally:
            self._ends = True
            machine, self._machine = self._machine, None  # from here on nobody is given it
            self._ready.set()
            if machine is not None:
                await _end(machine)

    async def _admission(self) -> AbstractContextManager[object]:
        """What the start happens in: there is room for one, and nobody else starts one."""
        while True:
            await self._spare()
            if (turn := self._turn()) is not None:
                return turn
            await asyncio.sleep(_PATIENT_LOOK_S)

    async def _spare(self) -> None:
        """Return once a processor has idled for a moment, and there is memory for a machine."""
        idle = looks = 0
        while idle < _LOOKS:
            await asyncio.sleep(_LOOK_S if looks < _PATIENT_LOOKS or idle else _PATIENT_LOOK_S)
            looks += 1
            idle = idle + 1 if idle_processors() else 0
            if idle == _LOOKS and spare_memory_bytes() < self.spec.memory_mib << 20:
                idle = 0
                await asyncio.sleep(_WATCH_S)

    async def _start(self) -> None:
        machine = self._machine = await self._make(self.spec)
        if machine is not None:
            await machine.power_on()
            await machine.run(_WARMING)
            machine.timings = replace(machine.timings, first_command_s=None, from_pool=True)


async def _is_well(machine: MachineController) -> bool:
    """Whether it still answers and nothing has happened to it; its clock is right then."""
    if machine.failure is not None or machine.ends:
        return False
    deadline = Deadline.after(seconds=machine.seconds(None, _HAND_OVER_S))
    try:
        await machine.running.refresh(deadline=deadline)
    except (VmSandboxError, OSError):
        _log.debug("%s has waited, and is not well", machine.name, exc_info=True)
        return False
    return machine.failure is None and not machine.ends


async def _end(machine: MachineController) -> None:
    try:
        await to_its_end(machine.close())
    except Exception:  # noqa: BLE001 - no test has asked for it; the end of the run tells what is left
        _log.debug("%s did not end in good order", machine.name, exc_info=True)
