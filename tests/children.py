"""The children of this process, zombies included: what a test may leave none of."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

_there_before: set[int] = set()


def children() -> set[int]:
    """Their pids (proc_pid_task(5), "children")."""
    found: set[int] = set()
    for path in Path("/proc/self/task").glob("*/children"):
        with suppress(FileNotFoundError, ProcessLookupError):  # a thread that has just ended
            found.update(map(int, path.read_text().split()))
    return found


def remember_children() -> None:
    """From now on, the children that there are don't count: other tests hold them."""
    _there_before.clear()
    _there_before.update(children())


def new_children() -> set[int]:
    """Those that were not there when a test began."""
    return children() - _there_before


def no_child_is_left() -> bool:
    """Whether there is no child that was not there when a test began."""
    return not new_children()
