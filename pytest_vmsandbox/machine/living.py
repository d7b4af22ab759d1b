"""The living: the machines of a worker that are on, which end with it."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pytest_vmsandbox.machine.power import Power


class Living:
    """Each machine is here from its power on to its power cut; `close` ends those that are.

    `incidents` tells of those that could not be ended in good order.
    """

    def __init__(self) -> None:
        self.incidents: list[str] = []
        self._machines: set[Power] = set()

    def add(self, machine: Power) -> None:
        """It is being powered on."""
        self._machines.add(machine)

    def discard(self, machine: Power) -> None:
        """It is off; one that was never on may be so too."""
        self._machines.discard(machine)

    async def close(self) -> None:
        """End whom nobody has ended; each one is tried.

        Left to the end of the loop, what holds a machine would be taken apart all at once, and not
        from the outside in: generators that wait for each other are closed side by side there.
        """
        machines = tuple(self._machines)
        closing = (machine.close() for machine in machines)
        results = await asyncio.gather(*closing, return_exceptions=True)
        self.incidents += [
            f"{machine.name} did not end in good order: {str(result) or type(result).__name__}"
            for machine, result in zip(machines, results, strict=True)
            if result is not None
        ]
