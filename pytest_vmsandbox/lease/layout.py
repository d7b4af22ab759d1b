"""What a run directory is called and what lies in it, for who makes and who removes it."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from pytest_vmsandbox.errors import TeardownRefused
from pytest_vmsandbox.host.run_directory import RUN_DIRECTORY_MARKER

LOCK = "lock"
LEDGER = "ledger"

# A removal begins with this new name, so that nobody finds half a run directory under its own.
DEAD = ".dead-"

NAME = re.compile(r"r[0-9a-f]{8}-.+", re.DOTALL)

# Removed last and in this order: while anything else is there, it is a run directory of ours.
LATE = (LEDGER, LOCK, RUN_DIRECTORY_MARKER)


@dataclass(frozen=True, slots=True, kw_only=True)
class Leftover:
    """What was left in place: why, and a command to look at it."""

    path: Path
    reason: str
    inspect: str

    def __str__(self) -> str:
        return f"{self.path}: {self.reason} (inspect: {self.inspect})"


def leftover_of(refused: TeardownRefused) -> Leftover:
    """What was left in place because its removal was refused."""
    return Leftover(path=Path(refused.path), reason=refused.because, inspect=refused.inspect)


def dead_name(path: Path) -> Path:
    """What `path` is called from the moment that its removal begins."""
    return path if path.name.startswith(DEAD) else path.with_name(DEAD + path.name)


def look_at(path: Path, *, content: bool = False) -> str:
    """The command that shows `path` itself, or what is in it."""
    return f"ls -{'la' if content else 'ld'} -- {shlex.quote(str(path))}"
