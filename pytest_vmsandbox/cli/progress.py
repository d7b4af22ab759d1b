"""Progress of a long step, drawn on the terminal."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Self

from rich.console import Console


class RichProgress:
    """A spinner with the current step where there is a terminal, a line a step elsewhere."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._status = console.status("")
        self._current: str | None = None
        self._since = 0.0

    def step(self, title: str) -> None:
        """A new step begins; the one before is over, and its time is shown."""
        self._finish()
        self._current, self._since = title, time.monotonic()
        self._status.update(title)

    def forget(self) -> None:
        """The step is over, and whoever calls tells of it."""
        self._current = None

    def hide(self) -> None:
        """The terminal belongs to somebody else from here on."""
        self._status.stop()
        self._current = None

    def __enter__(self) -> Self:
        self._status.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._status.stop()
        if error is None:
            self._finish()
        elif self._current:
            self._console.print(f"failed at: {self._current}", markup=False)

    def _finish(self) -> None:
        if self._current:
            took_s = time.monotonic() - self._since
            self._console.print(f"{took_s:6.1f} s  {self._current}", markup=False)
