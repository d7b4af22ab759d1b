"""What may wait, for coroutines: done in a thread of its own, and never left half done."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractContextManager, asynccontextmanager, suppress
from functools import partial
from typing import TypeVar

T = TypeVar("T")


@asynccontextmanager
async def off_loop(manager: AbstractContextManager[T]) -> AsyncIterator[T]:
    """Hold `manager` while the loop goes on; what was entered is left, come what may.

    A cancellation waits until the entering, or the leaving, is through. `manager` is not told of
    what was raised in the block.
    """
    entering = _start(manager.__enter__)
    try:
        value = await asyncio.shield(entering)
    except asyncio.CancelledError:
        await _wait(entering)
        if entering.exception() is None:
            await to_its_end(_start(lambda: manager.__exit__(None, None, None)))
        raise
    try:
        yield value
    finally:
        await to_its_end(_start(lambda: manager.__exit__(None, None, None)))


async def run_off_loop(work: Callable[[], T]) -> T:
    """What `work` returns or raises; a cancellation waits until it is through."""
    return await to_its_end(_start(work))


class GivenUp(Exception):
    """Work that was told to stop has stopped."""


async def run_stoppable(work: Callable[[threading.Event], T]) -> T:
    """What `work` returns or raises; a cancellation sets its event, and waits until it is through.

    It may raise GivenUp then.
    """
    stop = threading.Event()
    task = _start(partial(work, stop))
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        stop.set()
        await _wait(task)
        with suppress(GivenUp):
            task.result()
        raise


def _start(work: Callable[[], T]) -> asyncio.Task[T]:
    return asyncio.create_task(asyncio.to_thread(work))


async def to_its_end(work: Awaitable[T]) -> T:
    """What `work` returns or raises; a cancellation is passed on only once it is done.

    Nor does a second cancellation, or a third, leave it behind.
    """
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await _wait(task)
        task.result()
        raise


async def _wait(task: asyncio.Future[T]) -> None:
    """Wait for its end, cancelled as often as may be: our caller raises the first one."""
    while not task.done():
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError:
            continue
