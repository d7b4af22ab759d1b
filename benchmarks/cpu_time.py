"""Processor time of this process and of all that descend from it, also of those that ended."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Final

_TICKS: Final = os.sysconf("SC_CLK_TCK")


class TreeClock:
    """Counts user's and system's time of the tree below us; what its own looking costs is left out.

    To the nanosecond while processes live; of those that have ended and were waited for, what
    their parents were told (proc(5), cutime).
    """

    def __init__(self) -> None:
        self._looking_s = 0.0

    def seconds(self) -> float:
        """So far."""
        began = time.process_time()
        seconds = began - self._looking_s + _of_the_ended(os.getpid())
        for pid in _descendants(os.getpid()):
            # Who ends between the look and the question counts with its parent's, next time.
            with suppress(OSError):
                seconds += time.clock_gettime(_clock_of(pid)) + _of_the_ended(pid)
        self._looking_s += time.process_time() - began
        return seconds


def _clock_of(pid: int) -> int:
    """clock_getcpuclockid(3), as the kernel numbers them: all threads of that process."""
    return (~pid << 3) | 2


def _of_the_ended(pid: int) -> float:
    # From the state on, which is the third field: the name before it may hold anything.
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    return (int(fields[13]) + int(fields[14])) / _TICKS


def _descendants(pid: int) -> Iterator[int]:
    for thread in Path(f"/proc/{pid}/task").iterdir():
        with suppress(OSError):
            for child in (thread / "children").read_text(encoding="utf-8").split():
                yield int(child)
                with suppress(OSError):
                    yield from _descendants(int(child))
