"""A descriptor that somebody must close: an int that knows how."""

from __future__ import annotations

import os
from types import TracebackType
from typing import Self


class OwnedFd(int):
    """A descriptor number, good wherever an int is, that its holder closes.

    Use it in a `with`, or call `close()`; closing twice is harmless. Nothing is closed when it
    is merely forgotten: a destructor would close at a moment that nobody chose.
    """

    _is_open = True

    def fileno(self) -> int:
        """The number, for select and friends; ValueError once it is closed."""
        if not self._is_open:
            raise ValueError(f"descriptor {int(self)} is closed")
        return int(self)

    @property
    def closed(self) -> bool:
        """Whether `close()` was called."""
        return not self._is_open

    def close(self) -> None:
        """Give the descriptor back to the kernel; the second time does nothing."""
        if self._is_open:
            # First the mark: after a failing close(2) the number is free all the same.
            self._is_open = False
            os.close(int(self))

    def __enter__(self) -> Self:
        self.fileno()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __str__(self) -> str:
        return str(int(self))  # as in /proc/self/fd/N

    def __repr__(self) -> str:
        return f"<OwnedFd {int(self)}{'' if self._is_open else ', closed'}>"
