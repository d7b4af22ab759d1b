"""The engine: one private asyncio loop on a thread of its own, where all machines live.

`def test` and `async def test` under every pytest-asyncio loop scope share it: what a machine
holds belongs to this loop, never to a test's.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
from collections.abc import Coroutine, Iterator
from contextlib import AbstractAsyncContextManager, contextmanager
from typing import Any, TypeVar

from pytest_vmsandbox.deadline import Deadline

T = TypeVar("T")

# How long an interrupted caller waits for its cancelled work to clean up behind itself.
CANCELLATION_GRACE_S = 5.0


class Engine:
    """Runs coroutines on its own loop for callers on any thread or loop.

    The thread starts with the first use and ends with `close()`. It is a daemon, so that an
    interpreter whose teardown was skipped can still exit.
    """

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        # Re-entrant: a file of a guest may be finalised, and ask for us, at any moment.
        self._starting = threading.RLock()
        self._closed = False

    @property
    def running(self) -> bool:
        """Whether the thread has been started and not yet closed."""
        return self._thread is not None

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run `work` to its end and give its result; the calling thread blocks.

        Ctrl-C, and whatever else is raised in the waiting thread (pytest-timeout's signal),
        interrupts the wait: `work` is cancelled, given a moment to undo, and the exception
        goes on.
        """
        future = self._submit(work)
        try:
            return future.result()
        except BaseException:
            if not future.done():
                self._cancel(future)
            raise

    async def bridge(self, work: Coroutine[Any, Any, T]) -> T:
        """Run `work` on the engine, awaited from any other loop; cancellation is passed on."""
        future = self._submit(work)
        try:
            return await asyncio.wrap_future(future)
        except asyncio.CancelledError:
            await asyncio.wrap_future(self._submit(_settle()))
            raise

    @contextmanager
    def entered(self, manager: AbstractAsyncContextManager[T]) -> Iterator[T]:
        """Hold `manager` on the engine while the caller's thread is in the block.

        It is not told of what was raised there: Ctrl-C, raised on the engine, would end it.
        """
        value = self.run(_entering(manager))
        try:
            yield value
        finally:
            self.run(_leaving(manager))

    def close(self) -> None:
        """Cancel what still runs, stop the loop and join the thread; safe to repeat."""
        self._closed = True
        if self._loop is None or self._thread is None:
            return
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=CANCELLATION_GRACE_S)
        self._loop = self._thread = None

    def _submit(self, work: Coroutine[Any, Any, T]) -> concurrent.futures.Future[T]:
        if self._closed or threading.current_thread() is self._thread:
            work.close()
            why = "has been closed" if self._closed else "can't wait for itself"
            raise RuntimeError(f"the engine {why}")
        loop = self._start()
        return asyncio.run_coroutine_threadsafe(work, loop)

    def _cancel(self, future: concurrent.futures.Future[T]) -> None:
        future.cancel()
        # A cancelled concurrent future is done at once, its task is not: let the loop turn
        # until the task's own clean-up has run.
        settled = asyncio.run_coroutine_threadsafe(_settle(), self._start())
        concurrent.futures.wait([settled], timeout=CANCELLATION_GRACE_S)

    def _start(self) -> asyncio.AbstractEventLoop:
        with self._starting:
            if self._loop is None:
                loop = asyncio.new_event_loop()
                self._thread = threading.Thread(
                    target=_serve, args=(loop,), name="vmsandbox-engine", daemon=True
                )
                self._thread.start()
                self._loop = loop
            return self._loop


def _serve(loop: asyncio.AbstractEventLoop) -> None:
    asyncio.set_event_loop(loop)
    try:
        loop.run_forever()
        remaining = asyncio.all_tasks(loop)
        for task in remaining:
            task.cancel()
        loop.run_until_complete(asyncio.gather(*remaining, return_exceptions=True))
        loop.run_until_complete(loop.shutdown_asyncgens())
    finally:
        loop.close()


async def _entering(manager: AbstractAsyncContextManager[T]) -> T:
    return await manager.__aenter__()


async def _leaving(manager: AbstractAsyncContextManager[Any]) -> None:
    await manager.__aexit__(None, None, None)


async def _settle() -> None:
    """Return once every task that is being cancelled has ended, or the grace is over."""
    deadline = Deadline.after(seconds=CANCELLATION_GRACE_S)
    while not deadline.passed:
        await asyncio.sleep(0)
        ending = [task for task in asyncio.all_tasks() if task.cancelling()]
        if not ending:
            return
        await asyncio.wait(ending, timeout=deadline.timeout_s)
