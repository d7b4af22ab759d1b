"""The machine itself: its verbs, as coroutines on the engine's loop.

`Machine` and `AsyncMachine` are its two faces, for `def` and for `async def`.
"""

from __future__ import annotations

import asyncio
import re
from pathlib import Path

from pytest_vmsandbox.machine.build import Build
from pytest_vmsandbox.machine.commands import CONDITION_S
from pytest_vmsandbox.machine.copies import Copies
from pytest_vmsandbox.machine.files import Files
from pytest_vmsandbox.machine.ssh import Ssh
from pytest_vmsandbox.vmm.qemu import card_id

# Where the VMM leaves a picture of its display, in its own directory; the next one replaces it.
PICTURE = "screenshot.png"


class MachineController(Copies, Ssh, Files):
    """One machine, from its first power on to its end."""

    def __init__(self, build: Build) -> None:
        super().__init__(build)
        self._picturing = asyncio.Lock()

    async def close(self) -> None:
        """End it for good: neither process nor file of it is left. Safe to repeat."""
        self._closed = True  # whoever is about to forward a port of it gives up
        try:
            await self.hang_up()
        finally:
            await super().close()

    async def set_link(self, *, up: bool, network: str | None = None) -> None:
        """Plug the cable of its card on that network, or its first, in or out."""
        self.address(network)
        networks = list(self.build.wires.addresses)
        number = 0 if network is None else networks.index(network)
        await self.qmp("set_link", {"name": card_id(number), "up": up})

    async def wait_for_console(
        self, pattern: str, *, timeout: float | None = None
    ) -> re.Match[str]:
        """The first match of a regular expression on the console, now or later."""
        return await self.console.wait_for(pattern, deadline=self._deadline(timeout, CONDITION_S))

    async def screenshot(self, path: Path | str) -> None:
        """Save what the machine's display shows, as PNG."""
        running = self._on()
        picture = running.order.view.directory / PICTURE
        async with self._picturing:
            await self.qmp("screendump", {"filename": str(picture), "format": "png"})
            content = await running.process.read_file(PICTURE)
        await asyncio.to_thread(Path(path).write_bytes, content)
