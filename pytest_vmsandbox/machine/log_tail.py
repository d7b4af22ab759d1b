"""The tail of a log: what a process printed last, for whoever asks why it ended."""

from __future__ import annotations

from pathlib import Path

_TAIL_BYTES = 4000


def read_log_tail(log: Path) -> str:
    """Its last bytes as text; empty where there is none. Bytes that don't decode are escapes."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - _TAIL_BYTES))
            return file.read().decode(errors="backslashreplace")
    except OSError:
        return ""
