"""Templates made by hand: real files and real memory, but of a machine that never ran.

As a program it makes one in a cache, for tests that kill it, or leave it no room:

    python -m tests.machine.templates.handmade CACHE SEED [TMPFS_BYTES]
"""

from __future__ import annotations

import asyncio
import os
import random
import sys
from functools import partial
from pathlib import Path

from pytest_vmsandbox.deadline import Deadline
from pytest_vmsandbox.linux import (
    CloneFlags,
    MountFlags,
    mount,
    unshare,
    write_identity_maps,
)
from pytest_vmsandbox.machine.frozen import Frozen, state_of
from pytest_vmsandbox.machine.memory import GuestMemory, new_memory
from pytest_vmsandbox.machine.templates.cache import Kept, TemplateCache
from pytest_vmsandbox.machine.templates.template import Recipe, Standing, save_template

PAGE = 4096
MEMORY_BYTES = 2 << 20

RECIPE = Recipe(title="by hand", parts={"image": "sha256", "vmm": "qemu 7.2.1"})


def memory_of(seed: int, *, size: int = MEMORY_BYTES) -> GuestMemory:
    """Memory with pages here and there, sealed."""
    dice = random.Random(seed)
    memory = new_memory("vmsandbox-test", size=size)
    for _ in range(40):
        os.pwrite(
            memory,
            dice.randbytes(dice.choice((1, 100, PAGE, 3 * PAGE))),
            dice.randrange(size - 3 * PAGE),
        )
    memory.seal()
    return memory


def frozen_by_hand(seed: int, *, size: int = MEMORY_BYTES) -> Frozen:
    """A machine as if frozen; equal seeds give equal ones."""
    state = random.Random(seed).randbytes(5000)
    return Frozen(
        nonce=f"nonce-{seed}",
        memory=memory_of(seed, size=size),
        state=state_of(state),
        console=b"said " * 20,
    )


def with_changes(frozen: Frozen, changes: dict[int, bytes]) -> Frozen:
    """The same machine a while later: other bytes at some offsets of its memory, another state."""
    memory = new_memory("vmsandbox-test", size=frozen.memory.size)
    os.pwrite(memory, content_of(frozen), 0)
    for offset, part in changes.items():
        os.pwrite(memory, part, offset)
    memory.seal()
    return Frozen(nonce=frozen.nonce, memory=memory, state=state_of(b"later" * 100))


def content_of(frozen: Frozen) -> bytes:
    """All of its memory."""
    return os.pread(frozen.memory, frozen.memory.size, 0)


def publish(
    cache: TemplateCache, frozen: Frozen, *, recipe: Recipe = RECIPE, base: Kept | None = None
) -> Kept:
    """Have it published; what it gives is in use until it is closed."""
    standing = None
    if base is not None:
        assert base.manifest is not None
        standing = Standing(manifest=base.manifest, frozen=base.frozen)

    async def make() -> Kept:
        async with cache.making(recipe, deadline=Deadline.after(seconds=60)) as making:
            write = partial(save_template, recipe=recipe, frozen=frozen, base=standing)
            return making.publish(write, frozen)

    return asyncio.run(make())


def recipe_called(name: str) -> Recipe:
    """Another recipe for each name."""
    return Recipe(title=name, parts={**RECIPE.parts, "name": name})


def _tmpfs_at(place: Path, *, size: int) -> None:
    """Mount a small file system there, in namespaces of our own."""
    uid, gid = os.geteuid(), os.getegid()
    unshare(CloneFlags.CLONE_NEWNS | (CloneFlags.CLONE_NEWUSER if uid else CloneFlags(0)))
    if uid:
        write_identity_maps(uid=uid, gid=gid, deny_setgroups=True)
    mount(None, "/", None, MountFlags.REC | MountFlags.PRIVATE)
    mount("vmsandbox-test", place, "tmpfs", MountFlags(0), f"size={size}")


def main(place: Path, seed: int, tmpfs_bytes: int | None) -> None:
    """Make one, and tell of it."""
    if tmpfs_bytes is not None:
        _tmpfs_at(place, size=tmpfs_bytes)
    cache = TemplateCache(place)
    sys.stdout.write("begins\n")
    sys.stdout.flush()
    try:
        publish(cache, frozen_by_hand(seed)).close()
    except OSError as error:
        there = sorted(path.name for path in cache.directory.iterdir())
        sys.stdout.write(f"{error.strerror} {there} {cache.load(RECIPE, room=place)}\n")
    else:
        sys.stdout.write("published\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]) if sys.argv[3:] else None)
