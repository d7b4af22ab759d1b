"""The machine itself: its verbs, as coroutines on the engine's loop.

`Machine` and `AsyncMachine` are its two faces, for `def` and for `async def`.
"""

from __future__ import annotations

import asyncio
import re
import secrets
import shutil
from pathlib import Path

from pytest_vmsandbox.machine.commands import CONDITION_S, Commands
from pytest_vmsandbox.machine.files import Files
from pytest_vmsandbox.machine.power import Power


class MachineController(Power, Commands, Files):
    """One machine, from its first power on to its end."""

    async def wait_for_console(
        self, pattern: str, *, timeout: float | None = None
    ) -> re.Match[str]:
        """The first match of a regular expression on the console, now or later."""
        return await self.console.wait_for(pattern, deadline=self._deadline(timeout, CONDITION_S))

    async def screenshot(self, path: Path | str) -> None:
        """Save what the machine's display shows, as PNG."""
        picture = self.build.config.directory / f"screenshot-{secrets.token_hex(4)}.png"
        try:
            await self.qmp("screendump", {"filename": str(picture), "format": "png"})
            await asyncio.to_thread(shutil.copyfile, picture, path)
        finally:
            picture.unlink(missing_ok=True)
