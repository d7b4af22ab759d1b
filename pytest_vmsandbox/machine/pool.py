"""The pool: one machine ahead, restored and warmed while a test runs, for the test after it.

A restored guest under emulation begins with nothing translated, and its first command costs ten
times the second: here that has been paid before anybody waits. It uses what the host has to spare
and no more, and what waits is given up at once when memory grows short. No machine comes back.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from pytest_vmsandbox.host.spare import idle_processors, spare_memory_bytes
from pytest_vmsandbox.machine.controller import MachineController
from pytest_vmsandbox.machine.spec import MachineSpec
from pytest_vmsandbox.machine.timings import Timings

_log = logging.getLogger(__name__)

# A processor counts as spare when it idled each time that we looked.
_LOOKS = 3
_LOOK_S = 0.005

# How often memory is looked at while a machine waits.
_WATCH_S = 0.5

# What makes the guest's kernel start and end a process once.
_WARMING = ("true",)


class Pool:
    """At most one machine that waits; `make` gives those that it starts, not powered on.

    All of it belongs to one loop. What goes wrong in here costs the machine that waits and nothing
    else: whoever asks makes one in the ordinary way, and is told there what is wrong.
    """

    def __init__(self, make: Callable[[MachineSpec], Awaitable[MachineController]]) -> None:
        self._make = make
        self._ahead: _Ahead | None = None

    async def foresee(self, spec: MachineSpec | None) -> None:
        """Have a machine like `spec` soon, in place of any other; with None, have none."""
        if self._ahead is not None and self._ahead.spec == spec and not self._ahead.over:
            return
        await self.close()
        if spec is not None:
            self._ahead = _Ahead(spec, self._make)

    async def take(self, spec: MachineSpec) -> MachineController | None:
        """The machine that waits, if it is like `spec`: powered on, and from now on the caller's.

        One that is being started is waited for, one that is not even begun is given up: then, or
        where there is none or it has failed, the answer is None.
        """
        ahead = self._ahead
        if ahead is None or ahead.spec != spec:
            return None
        self._ahead = None
        return await ahead.take()

    async def close(self) -> None:
        """End what waits."""
        ahead, self._ahead = self._ahead, None
        if ahead is not None:
            await ahead.give_up()


class _Ahead:
    """One machine from the wish for it until it is taken or given up."""

    def __init__(
        self, spec: MachineSpec, make: Callable[[MachineSpec], Awaitable[MachineController]]
    ) -> None:
        self.spec = spec
        self._make = make
        self._machine: MachineController | None = None
        self._begun = False
        self._ready = asyncio.Event()  # or over
        self._task = asyncio.create_task(self._live())

    @property
    def over(self) -> bool:
        """Whether it was given up, or has failed."""
        return self._task.done()

    async def take(self) -> MachineController | None:
        if self._begun:
            await self._ready.wait()
        machine = self._machine if self._ready.is_set() and not self.over else None
        self._machine = None
        await self.give_up()
        if machine is not None and machine.failure is not None:
            await machine.close()
            return None
        return machine

    async def give_up(self) -> None:
        self._task.cancel()
        await asyncio.wait({self._task})

    async def _live(self) -> None:
        try:
            await self._spare()
            self._begun = True
            await self._start()
            self._ready.set()
            while spare_memory_bytes():  # noqa: ASYNC110 - nothing tells of it
                await asyncio.sleep(_WATCH_S)
        except Exception:  # noqa: BLE001 - whoever asks makes another, and is told what is wrong
            _log.debug("no machine ahead", exc_info=True)
        finally:
            self._ready.set()
            machine, self._machine = self._machine, None  # from here on nobody is given it
            if machine is not None:
                await asyncio.shield(machine.close())

    async def _spare(self) -> None:
        """Return once a processor has idled for a moment, and there is memory for a machine."""
        idle = 0
        while idle < _LOOKS:
            await asyncio.sleep(_LOOK_S)
            idle = idle + 1 if idle_processors() else 0
            if idle == _LOOKS and spare_memory_bytes() < self.spec.memory_mib << 20:
                idle = 0
                await asyncio.sleep(_WATCH_S)

    async def _start(self) -> None:
        machine = self._machine = await self._make(self.spec)
        await machine.power_on()
        await machine.run(_WARMING)
        started = machine.timings
        machine.timings = Timings(
            spawn_s=started.spawn_s,
            load_s=started.load_s,
            restore_s=started.restore_s,
            boot_attempts=started.boot_attempts,
            from_pool=True,
        )
