"""Forgetting hosts: of what is remembered in the cache directory, the files that nobody uses go.

Each boot, user, search path, QEMU, ... has a file of its own; most are never looked at again.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

KEPT = 64
UNUSED_S = 30 * 86400.0

# Whoever holds a lock, or writes a draft, is done with it long before.
_UNFINISHED_S = 86400.0


def forget_old(cache_dir: Path) -> None:
    """Remove the facts that were not used for 30 days, and all but the 64 used last.

    With their locks, and drafts that were never finished. What can't be removed stays.
    """
    now = time.time()
    facts = sorted(_seen(cache_dir, "host-*.json"), reverse=True)
    for number, (used, file) in enumerate(facts):
        if number >= KEPT or used < now - UNUSED_S:
            _remove(file)
    locks = [
        (used, lock)
        for used, lock in _seen(cache_dir, "host-*.json.lock")
        if not lock.with_suffix("").exists()
    ]
    for used, file in [*locks, *_seen(cache_dir, ".host-*")]:
        if used < now - _UNFINISHED_S:
            _remove(file)


def _seen(cache_dir: Path, pattern: str) -> Iterator[tuple[float, Path]]:
    """When each was last used; others may remove them meanwhile."""
    for file in cache_dir.glob(pattern):
        with suppress(OSError):
            yield file.stat().st_mtime, file


def _remove(file: Path) -> None:
    with suppress(OSError):
        file.unlink()
