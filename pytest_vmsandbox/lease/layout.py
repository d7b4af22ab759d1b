"""What a run directory is called and what lies in it, for who makes and who removes it."""

from __future__ import annotations

import re
from pathlib import Path

from pytest_vmsandbox.host.run_directory import RUN_DIRECTORY_MARKER

LOCK = "lock"
LEDGER = "ledger"

# A removal begins with this new name, so that nobody finds half a run directory under its own.
DEAD = ".dead-"

NAME = re.compile(r"r[0-9a-f]{8}-.+", re.DOTALL)

# Removed last and in this order: while anything else is there, it is a run directory of ours.
LATE = (LEDGER, LOCK, RUN_DIRECTORY_MARKER)


def dead_name(path: Path) -> Path:
    """What `path` is called from the moment that its removal begins."""
    return path if path.name.startswith(DEAD) else path.with_name(DEAD + path.name)
