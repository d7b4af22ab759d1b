"""The machine itself: its verbs, as coroutines on the engine's loop.

`Machine` and `AsyncMachine` are its two faces, for `def` and for `async def`.
"""

from __future__ import annotations

import asyncio
import re
from pathlib import Path

from pytest_vmsandbox.machine.build import Build
from pytest_vmsandbox.machine.commands import CONDITION_S, Commands
from pytest_vmsandbox.machine.copies import Copies
from pytest_vmsandbox.machine.files import Files

# Where the VMM leaves a picture of its display, in its own directory; the next one replaces it.
PICTURE = "screenshot.png"


class MachineController(Copies, Commands, Files):
    """One machine, from its first power on to its end."""

    def __init__(self, build: Build) -> None:
        super().__init__(build)
        self._picturing = asyncio.Lock()

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
