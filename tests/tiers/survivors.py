"""Processes that outlive who started them; we are their subreaper (prctl(2)), so they are ours."""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress
from pathlib import Path

from tests.children import children

_POLL_S = 0.02


def end_survivors(*, grace_s: float) -> list[str]:
    """Reap all our children; what has not ended within `grace_s` seconds is killed and named."""
    over = time.monotonic() + grace_s
    while _reap() and time.monotonic() < over:
        time.sleep(_POLL_S)
    named = [f"process {pid}: {_command(pid)}" for pid in sorted(_reap())]
    while pids := _reap():  # what they started becomes ours in turn
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)  # our own child: its pid can't be another's yet
        time.sleep(_POLL_S)
    return named


def _reap() -> set[int]:
    """Reap what has ended; the pids of the others."""
    with suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    return children()


def _command(pid: int) -> str:
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return "ended meanwhile"
    return words.replace(b"\0", b" ").decode(errors="backslashreplace")[:200]
