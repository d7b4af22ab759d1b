"""What this host has to spare at this instant: processors that idle, memory that nobody uses."""

from __future__ import annotations

import os
from pathlib import Path

from pytest_vmsandbox.host.cgroup_limits import memory_limits, processor_limit

# What must stay free of all memory, for those who did not ask us.
RESERVED_SHARE = 10


def idle_processors() -> int:
    """How many of the processors that we may use have nothing to run (proc(5), /proc/loadavg).

    A limit of our control groups makes them fewer: a container's share of one is none that idles.
    0 where the host does not say.
    """
    try:
        limit = processor_limit()
        ours = len(os.sched_getaffinity(0))
        ours = ours if limit is None else min(ours, int(limit))
        running, _, _ = Path("/proc/loadavg").read_text(encoding="ascii").split()[3].partition("/")
        return max(0, ours - (int(running) - 1))  # one of them asks
    except (OSError, ValueError, IndexError, AttributeError):
        return 0


def spare_memory_bytes() -> int:
    """How much memory can be taken with a tenth of all still left (proc(5), /proc/meminfo).

    The same tenth is left of each limit of our control groups. Swap does not count; 0 where the
    host does not say.
    """
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        told = dict(line.split(":", 1) for line in lines)
        available, total = (int(told[name].split()[0]) for name in ("MemAvailable", "MemTotal"))
        spare = (available - total // RESERVED_SHARE) * 1024
        rooms = (one.limit - one.used - one.limit // RESERVED_SHARE for one in memory_limits())
        return max(0, min(spare, *rooms, spare))
    except (OSError, ValueError, IndexError, KeyError):
        return 0
