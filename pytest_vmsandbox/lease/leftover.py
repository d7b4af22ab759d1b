"""What is left in place: why, and with which command to look at it."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path

from pytest_vmsandbox.errors import TeardownRefused


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


def look_at(path: Path, *, content: bool = False) -> str:
    """The command that shows `path` itself, or what is in it."""
    return f"ls -{'la' if content else 'ld'} -- {shlex.quote(str(path))}"
