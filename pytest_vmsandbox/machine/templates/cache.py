"""The cache of templates: made once by whoever comes first, published whole, noticed when damaged.

    vmsandbox-templates/DIGEST/         published templates
    vmsandbox-templates/.new-DIGEST/    being made, or left by a process that was killed over it
    vmsandbox-templates/.old-*/         on its way out

A template is in use while a process that has read it lives. Whoever has read it has all of it, its
disks under names of its own: who removes or replaces it here harms no machine.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from pytest_vmsandbox.deadline import Deadline
from pytest_vmsandbox.jail.off_loop import off_loop
from pytest_vmsandbox.linux import OwnedFd
from pytest_vmsandbox.machine.frozen import Frozen
from pytest_vmsandbox.machine.templates.locks import (
    LOCK,
    changing,
    own,
    share,
    share_what_is_owned,
)
from pytest_vmsandbox.machine.templates.shelf import (
    NAME,
    NEW,
    OLD,
    is_shelf,
    make_shelf,
    published_in,
    remove_tree,
    strange_in,
    unfinished_in,
)
from pytest_vmsandbox.machine.templates.template import (
    MANIFEST,
    Base,
    Manifest,
    Recipe,
    TemplateDamaged,
    check_template,
    load_template,
    read_manifest,
)

# What templates may take on disk together, in bytes, unless those in use alone take more.
LIMIT_BYTES = 4 << 30

# A template on a template on a template ...: who comes this deep goes round in a circle.
_DEEPEST = 64

_POLL_S = 0.05
# How often who waits for another one's making is told of it.
_TELL_S = 10.0


def _ignore(_waited_s: float) -> None:
    pass


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """A template that this process has read, or made: in use until it is closed.

    `manifest` is None where it is not in the cache, and lives only as long as this.
    """

    manifest: Manifest | None
    frozen: Frozen
    locks: tuple[OwnedFd, ...]

    def close(self) -> None:
        """Give memory and locks back."""
        self.frozen.close()
        for lock in self.locks:
            lock.close()


@dataclass(frozen=True, slots=True, kw_only=True)
class Shelved:
    """A published template as it lies there; `manifest` is None where that can't be read."""

    directory: Path
    manifest: Manifest | None
    bytes: int
    last_use: float


class TemplateCache:
    """The templates below one cache directory, shared by all processes of a user.

    Every method raises RequestInvalid where the directory belongs to somebody else: whoever can
    write a template decides what runs in our tests.
    """

    def __init__(self, cache_dir: Path, *, limit_bytes: int = LIMIT_BYTES) -> None:
        self.directory = cache_dir / NAME
        self._limit_bytes = limit_bytes

    def load(self, recipe: Recipe, *, room: Path) -> Kept | None:
        """The template of that recipe, in memory; None where there is none that is whole.

        Its disks are kept in a directory of their own in `room`. It counts as used just now, and
        so does all that it stands on.
        """
        with ExitStack() as undo:
            try:
                chain, locks = self._chain_in_use(self._place(recipe.digest), undo)
                for strange in filter(None, map(strange_in, chain)):
                    raise TemplateDamaged(f"{strange}: others may have written it")
                manifest, frozen = load_template(chain, recipe, room=room)
            except (TemplateDamaged, FileNotFoundError, NotADirectoryError):
                return None
            for directory in chain:
                with suppress(OSError):
                    os.utime(directory / MANIFEST)
            undo.pop_all()
            return Kept(manifest=manifest, frozen=frozen, locks=tuple(locks))

    @asynccontextmanager
    async def making(
        self, recipe: Recipe, *, deadline: Deadline, on_wait: Callable[[float], None] = _ignore
    ) -> AsyncIterator[Making]:
        """Only one process at a time is in this block for the same recipe; TimedOut if too long.

        While another one is, who lives since it holds the lock, `on_wait` is told now and then for
        how many seconds. Raises OSError where nothing can be written.
        """
        began, tell_at = time.monotonic(), 0.0
        while True:
            async with off_loop(self._attempt(recipe)) as making:
                if making is not None:
                    yield making
                    return
            waited_s = time.monotonic() - began
            if deadline.passed:
                raise deadline.timed_out(f"the end of who makes {self._place(recipe.digest)}")
            if waited_s >= tell_at:
                on_wait(waited_s)
                tell_at += _TELL_S
            await asyncio.sleep(_POLL_S)

    def shelved(self) -> list[Shelved]:
        """All that are published, the one that was used last at the end."""
        if not is_shelf(self.directory):
            return []
        found = [_look_at(path) for path in published_in(self.directory)]
        return sorted(found, key=lambda one: one.last_use)

    def chain_of(self, directory: Path) -> list[Path]:
        """Its directory and those of all that it stands on; TemplateDamaged if one is gone."""
        chain = [directory]
        while (base := read_manifest(chain[-1]).base) is not None:
            chain.append(self._place(base.digest))
            if len(chain) > _DEEPEST:
                raise TemplateDamaged(f"{directory}: it stands on itself")
        return chain

    def check(self, directory: Path, *, every_byte: bool) -> None:
        """Compare a template with its manifest; TemplateDamaged says what differs.

        It is in use meanwhile. FileNotFoundError where it is gone, or about to go.
        """
        with ExitStack() as undo:
            chain, _ = self._chain_in_use(directory, undo)
            check_template(chain, every_byte=every_byte)

    def remove(self, directory: Path) -> bool:
        """Remove a template; False where one stands on it, or a process uses it."""
        if not is_shelf(self.directory):
            return False
        with changing(self.directory):
            gone = self._taken_away(directory)
        remove_tree(gone)
        return gone is not None

    def in_use(self, directory: Path) -> bool:
        """Whether a process uses it now."""
        with changing(self.directory), suppress(FileNotFoundError):
            lock = own(directory)
            if lock is None:
                return True
            lock.close()
        return False

    def tidy(self) -> None:
        """Remove what killed processes left, then what was not used for longest, to the limit."""
        if not is_shelf(self.directory):
            return
        for path in unfinished_in(self.directory):
            if path.name.startswith(OLD):
                remove_tree(path)
            else:
                self.remove(path)
        shelved = self.shelved()
        while sum(one.bytes for one in shelved) > self._limit_bytes:
            if not any(self.remove(one.directory) for one in shelved):
                return  # the others are in use
            shelved = self.shelved()

    @contextmanager
    def _attempt(self, recipe: Recipe) -> Iterator[Making | None]:
        making = self._begin(recipe)
        try:
            yield making
        finally:
            if making is not None:
                making.end()

    def _begin(self, recipe: Recipe) -> Making | None:
        """Become the one who makes it; None where somebody else is."""
        make_shelf(self.directory)
        staging = self.directory / f"{NEW}{recipe.digest[:32]}"
        with changing(self.directory):
            staging.mkdir(mode=0o700, exist_ok=True)
            lock = own(staging)
        if lock is None:
            return None
        return Making(self, staging, self._place(recipe.digest), lock)

    def _chain_in_use(self, place: Path, undo: ExitStack) -> tuple[list[Path], list[OwnedFd]]:
        """Where it and all that it stands on lie, and the locks of those who use them."""
        if not is_shelf(self.directory):
            raise FileNotFoundError(self.directory)
        with changing(self.directory):
            if not place.is_dir():
                raise FileNotFoundError(place)
            chain = self.chain_of(place)
            locks = []
            for directory in chain:
                lock = share(directory)
                if lock is None:
                    raise FileNotFoundError(f"{directory}: somebody is about to remove it")
                undo.callback(lock.close)
                locks.append(lock)
        return chain, locks

    def _place(self, digest: str) -> Path:
        return self.directory / digest[:32]

    def _taken_away(self, directory: Path) -> Path | None:
        """Put it out of sight, where nobody uses it and none stands on it; while `changing`."""
        if any(directory in self._below(other) for other in published_in(self.directory)):
            return None
        try:
            lock = own(directory)
        except (FileNotFoundError, NotADirectoryError):
            return None
        if lock is None:
            return None
        with lock:
            return self.out_of_sight(directory)

    def _below(self, directory: Path) -> list[Path]:
        """What a template stands on; nothing where its manifest can't be read."""
        with suppress(TemplateDamaged):
            base = read_manifest(directory).base
            return [self._place(base.digest)] if base and self._is_still(base) else []
        return []

    def _is_still(self, base: Base) -> bool:
        """Whether that very making of a template is there."""
        with suppress(TemplateDamaged):
            return read_manifest(self._place(base.digest)).content == base.content
        return False

    def out_of_sight(self, directory: Path) -> Path:
        """Put a directory where `tidy` removes it if we can't; to be called while `changing`."""
        return directory.rename(self.directory / f"{OLD}{secrets.token_hex(16)}")


class Making:
    """A template that is being made, in a directory that becomes it, or goes."""

    def __init__(self, cache: TemplateCache, staging: Path, place: Path, lock: OwnedFd) -> None:
        self._cache, self._staging, self._place, self._lock = cache, staging, place, lock
        self._published = False

    def publish(self, write: Callable[[Path], Manifest], frozen: Frozen) -> Kept:
        """Put it in its place at once, as soon as `write` has written it into an empty directory.

        It is in use by us then, and so is `frozen`, what was written. Whatever `write` raises,
        nothing is published, and `frozen` is still the caller's.
        """
        _empty(self._staging)
        manifest = write(self._staging)
        away: Path | None = None
        with changing(self._cache.directory):
            if os.path.lexists(self._place):  # and damaged, or made on a base that is no more
                away = self._cache.out_of_sight(self._place)
            self._staging.rename(self._place)
            self._published = True
            share_what_is_owned(self._lock)
        with suppress(OSError):  # it is published, whatever else can't be removed
            remove_tree(away)
            self._cache.tidy()
        return Kept(manifest=manifest, frozen=frozen, locks=(self._lock,))

    def end(self) -> None:
        """Leave nothing of what was not published."""
        if self._published:
            return
        with self._lock, suppress(OSError):
            with changing(self._cache.directory):
                away = self._cache.out_of_sight(self._staging)
            remove_tree(away)


def _look_at(directory: Path) -> Shelved:
    manifest, last_use = None, 0.0
    with suppress(TemplateDamaged):
        manifest = read_manifest(directory)
    with suppress(OSError):
        last_use = (directory / MANIFEST).stat().st_mtime
    return Shelved(
        directory=directory, manifest=manifest, bytes=_size(directory), last_use=last_use
    )


def _size(directory: Path) -> int:
    """What it takes on disk; holes take nothing."""
    with suppress(OSError):
        return sum(path.stat().st_blocks * 512 for path in directory.iterdir())
    return 0


def _empty(staging: Path) -> None:
    """Remove what a killed maker has left in it, but for the lock, which we hold."""
    for path in staging.iterdir():
        if path.name != LOCK:
            path.unlink()
