"""The cache of templates: made once by whoever comes first, published whole, noticed when damaged.

    templates/DIGEST/         published templates
    templates/DIGEST.lock     held by whoever makes that one
    templates/.new-*          being made, or left by a process that was killed over it

A template is read into memory as a whole before it is used: whoever removes or replaces it here
harms no machine that runs.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from pytest_vmsandbox.deadline import Deadline
from pytest_vmsandbox.machine.frozen import Frozen
from pytest_vmsandbox.machine.template import (
    MANIFEST,
    Recipe,
    TemplateDamaged,
    load_template,
)

# What templates may take on disk together, in bytes, unless one alone takes more.
LIMIT_BYTES = 4 << 30

_NEW, _OLD = ".new-", ".old-"


class TemplateCache:
    """The templates below one cache directory, shared by all processes of a user."""

    def __init__(self, cache_dir: Path) -> None:
        self._directory = cache_dir / "templates"

    def load(self, recipe: Recipe) -> Frozen | None:
        """The template of that recipe, in memory; None where there is none that is whole.

        A damaged one is removed, where that can be done. It counts as used just now.
        """
        place = self._place(recipe)
        try:
            frozen = load_template(place, recipe)
        except TemplateDamaged:
            with suppress(OSError):
                self._discard(place)
            return None
        with suppress(OSError):
            os.utime(place / MANIFEST)
        return frozen

    @asynccontextmanager
    async def making(self, recipe: Recipe, *, deadline: Deadline) -> AsyncIterator[None]:
        """Only one process at a time is in this block for the same recipe; TimedOut if too long."""
        self._directory.mkdir(parents=True, mode=0o700, exist_ok=True)
        lock = FileLock(f"{self._place(recipe)}.lock", mode=0o600, thread_local=False)
        try:
            await asyncio.to_thread(lock.acquire, timeout=deadline.timeout_s or -1)
        except Timeout:
            raise deadline.timed_out(f"the lock {lock.lock_file}") from None
        try:
            yield
        finally:
            lock.release()

    def publish(self, recipe: Recipe, write: Callable[[Path], None]) -> None:
        """Put a template, which `write` writes into an empty directory, in its place at once.

        To be called inside `making`. Whatever `write` raises, nothing is published.
        """
        staging = Path(tempfile.mkdtemp(prefix=f"{_NEW}{recipe.digest[:16]}-", dir=self._directory))
        try:
            write(staging)
            self._discard(self._place(recipe))
            staging.rename(self._place(recipe))
        finally:
            shutil.rmtree(staging, ignore_errors=True)
        self._prune(keep=recipe)

    def _place(self, recipe: Recipe) -> Path:
        return self._directory / recipe.digest[:32]

    def _discard(self, place: Path) -> None:
        """Take it out of sight in one step, then remove it."""
        with suppress(FileNotFoundError):
            out_of_sight = Path(tempfile.mkdtemp(prefix=_OLD, dir=self._directory))
            try:
                place.rename(out_of_sight / "template")
            finally:
                shutil.rmtree(out_of_sight, ignore_errors=True)

    def _prune(self, *, keep: Recipe) -> None:
        """Remove those that were not used for longest, until the others are within the limit."""
        sizes = {path: _size(path) for path in self._directory.glob("[0-9a-f]*") if path.is_dir()}
        for path in sorted(sizes, key=_last_use):
            if sum(sizes.values()) <= LIMIT_BYTES:
                return
            if path != self._place(keep):
                self._discard(path)
                del sizes[path]


def _size(directory: Path) -> int:
    """What it takes on disk; holes take nothing."""
    with suppress(OSError):
        return sum(path.stat().st_blocks * 512 for path in directory.iterdir())
    return 0


def _last_use(directory: Path) -> float:
    with suppress(OSError):
        return (directory / MANIFEST).stat().st_mtime
    return 0.0
