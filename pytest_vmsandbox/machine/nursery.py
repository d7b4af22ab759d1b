"""The nursery: where the twins of a worker's machines come to be."""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from dataclasses import replace
from itertools import count as count_from
from typing import TYPE_CHECKING

from pytest_vmsandbox.jail.off_loop import to_its_end
from pytest_vmsandbox.machine.build import Build
from pytest_vmsandbox.machine.controller import MachineController
from pytest_vmsandbox.machine.frozen import Frozen
from pytest_vmsandbox.machine.spec import NAME_LENGTH

if TYPE_CHECKING:
    from pytest_vmsandbox.machine.worker import Worker

Hold = Callable[[MachineController], None]
"""Is told of each machine before it is powered on: whatever becomes of it, somebody knows it."""


class WorkerNursery:
    """Makes twins in a worker (see `Nursery`) for one who holds all that it makes."""

    def __init__(self, worker: Worker, hold: Hold) -> None:
        self._worker = worker
        self._hold = hold

    async def twins(self, build: Build, frozen: Frozen, *, count: int) -> list[MachineController]:
        """See `Nursery`."""
        made: list[MachineController] = []
        try:
            while len(made) < count:
                made.append(await self._twin(build, frozen))
        except BaseException:
            await to_its_end(self.end(made))
            raise
        return made

    async def boot(self, machines: Sequence[MachineController]) -> None:
        """See `Nursery`."""
        await self._worker.boot(machines)

    async def end(self, machines: Sequence[MachineController]) -> None:
        """See `Nursery`."""
        await self._worker.end(machines)

    async def _twin(self, build: Build, frozen: Frozen) -> MachineController:
        name = name_of_twin(build.config.name, taken=self._worker.names)
        place = await self._worker.place(name)
        config = replace(build.config, name=name, directory=place.directory)
        build = replace(build, id=place.id, config=config)
        twin = MachineController(await self._worker.wired(build.restored_from(frozen)))
        self._hold(twin)
        return twin


def name_of_twin(name: str, *, taken: Container[str]) -> str:
    """`NAME-fork-1`, or the first number that is free; a long name is cut short for it."""
    for number in count_from(1):
        suffix = f"-fork-{number}"
        twin = name[: NAME_LENGTH.stop - 1 - len(suffix)].rstrip("-") + suffix
        if twin not in taken:
            return twin
    raise AssertionError("numbers have no end")
