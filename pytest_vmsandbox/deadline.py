"""A deadline: one moment that every wait below it shares, never restarted."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

from pytest_vmsandbox.errors import TimedOut


@dataclass(frozen=True, slots=True)
class Deadline:
    """The moment `at` on the monotonic clock (seconds), and how long it was from the start."""

    at: float
    length_s: float

    @classmethod
    def after(cls, *, seconds: float | None) -> Deadline:
        """A deadline `seconds` from now; None is a deadline that never comes."""
        length = math.inf if seconds is None else seconds
        return cls(at=time.monotonic() + length, length_s=length)

    @property
    def left_s(self) -> float:
        """Seconds that are left, never below zero; `inf` where there is no end."""
        return max(0.0, self.at - time.monotonic())

    @property
    def timeout_s(self) -> float | None:
        """`left_s` as asyncio and select want it: None where there is no end."""
        left = self.left_s
        return None if math.isinf(left) else left

    @property
    def passed(self) -> bool:
        """Whether the moment has come."""
        return self.left_s == 0.0

    def sooner(self, *, seconds: float) -> Deadline:
        """The same deadline, or one `seconds` from now, whichever comes first."""
        other = Deadline.after(seconds=seconds)
        return other if other.at < self.at else self

    def timed_out(self, awaited: str, last_seen: str = "") -> TimedOut:
        """The error to raise when it has passed while waiting for `awaited`."""
        return TimedOut(awaited, self.length_s, last_seen)
