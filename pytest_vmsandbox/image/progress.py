"""What a build tells while it goes on; whoever calls draws it."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Told of each step as it begins. Called in the thread that builds."""

    def step(self, title: str) -> None:
        """A new step begins, and the one before it has ended; `title` is for people."""


class SilentProgress:
    """Says nothing."""

    def step(self, title: str) -> None:
        """Ignore it."""
