"""A heartbeat: notices a silent guest, but only while somebody waits for it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

_BEATS = 10


class Heartbeat:
    """Pings while something is outstanding; tells when `silence_s` have passed without a byte.

    It counts beats, not seconds: a host that was itself stopped for a minute (SIGSTOP, a laptop's
    lid) finds one missed beat, and the bytes that came meanwhile are read before the next.
    """

    def __init__(
        self,
        *,
        silence_s: float,
        ping: Callable[[], None],
        received: Callable[[], int],
        fell_silent: Callable[[], None],
    ) -> None:
        self._interval_s = silence_s / _BEATS
        self._ping, self._received, self._fell_silent = ping, received, fell_silent
        self._timer: asyncio.TimerHandle | None = None
        self._suspended = self._wanted = False
        self._missed = self._last_received = 0

    def want(self, *, wanted: bool) -> None:
        """Whether anything is outstanding."""
        self._wanted = wanted
        self._arrange()

    def suspend(self) -> None:
        """The machine stands still on purpose."""
        self._suspended = True
        self._arrange()

    def resume(self) -> None:
        """The machine runs again."""
        self._suspended = False
        self._arrange()

    def _arrange(self) -> None:
        beats = self._wanted and not self._suspended
        if beats and self._timer is None:
            self._missed, self._last_received = 0, self._received()
            self._timer = asyncio.get_running_loop().call_later(self._interval_s, self._beat)
        elif not beats and self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _beat(self) -> None:
        received = self._received()
        self._missed = self._missed + 1 if received == self._last_received else 0
        self._last_received = received
        self._timer = None
        if self._missed > _BEATS:
            self._fell_silent()
            return
        self._ping()
        self._timer = asyncio.get_running_loop().call_later(self._interval_s, self._beat)
