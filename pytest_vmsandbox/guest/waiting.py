"""Waiting for a state to change, on one loop.

States live in plain attributes, errors among them; who waits looks again after each change. So a
cancelled wait leaves nothing behind, and no future is left with an exception that nobody reads.
"""

from __future__ import annotations

import asyncio
import copy


class Changes:
    """Wakes everybody who waits for the next change."""

    __slots__ = ("_waiting",)

    def __init__(self) -> None:
        self._waiting: set[asyncio.Future[None]] = set()

    async def wait(self) -> None:
        """Return after the next `announce()`."""
        future = asyncio.get_running_loop().create_future()
        self._waiting.add(future)
        try:
            await future
        finally:
            self._waiting.discard(future)

    def announce(self) -> None:
        """Something has changed: look again."""
        for future in self._waiting:
            if not future.done():
                future.set_result(None)


def fresh(error: BaseException) -> BaseException:
    """A copy to raise, so that many who wait for one failure don't share one traceback."""
    twin = copy.copy(error)
    twin.__cause__ = error.__cause__
    return twin
