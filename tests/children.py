"""The children of this process, zombies included: what a test may leave none of."""

from __future__ import annotations

from pathlib import Path

_there_before: set[int] = set()


def children() -> set[int]:
    """Their pids (proc_pid_task(5), "children")."""
    lists = Path("/proc/self/task").glob("*/children")
    return {int(pid) for path in lists for pid in path.read_text().split()}


def remember_children() -> None:
    """From now on, the children that there are don't count: other tests hold them."""
    _there_before.clear()
    _there_before.update(children())


def no_child_is_left() -> bool:
    """Whether there is no child that was not there when a test began."""
    return children() <= _there_before
