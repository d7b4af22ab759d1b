from __future__ import annotations

import asyncio
import os
import signal
import threading
import time

import pytest

from pytest_vmsandbox.machine.engine import Engine


@pytest.fixture
def engine() -> Engine:
    return Engine()


async def _name_of_thread() -> str:
    return threading.current_thread().name


def test_no_thread_is_started_before_the_first_use(engine: Engine) -> None:
    assert not engine.running


def test_work_runs_on_the_engine_thread(engine: Engine) -> None:
    assert engine.run(_name_of_thread()) == "vmsandbox-engine"
    engine.close()


def test_an_exception_of_the_work_reaches_the_caller(engine: Engine) -> None:
    async def fail() -> None:
        raise LookupError("of the work")

    with pytest.raises(LookupError, match="of the work"):
        engine.run(fail())
    engine.close()


async def test_another_loop_can_await_the_work(engine: Engine) -> None:
    assert await engine.bridge(_name_of_thread()) == "vmsandbox-engine"
    engine.close()


async def test_cancelling_the_awaiting_task_cancels_the_work(engine: Engine) -> None:
    cancelled = threading.Event()

    async def sleep_long() -> None:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            cancelled.set()
            raise

    waiting = asyncio.create_task(engine.bridge(sleep_long()))
    await asyncio.sleep(0.05)
    waiting.cancel()

    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert await asyncio.to_thread(cancelled.wait, 5)
    engine.close()


def test_ctrl_c_interrupts_the_wait_and_the_work_cleans_up_first(engine: Engine) -> None:
    cleaned: list[str] = []

    async def work() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(0.05)
            cleaned.append("yes")

    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
    started = time.monotonic()

    with pytest.raises(KeyboardInterrupt):
        engine.run(work())
    assert cleaned == ["yes"]
    assert time.monotonic() - started < 10
    engine.close()


def test_the_engine_refuses_to_wait_for_itself(engine: Engine) -> None:
    async def inner() -> str:
        return engine.run(_name_of_thread())

    with pytest.raises(RuntimeError, match="wait for itself"):
        engine.run(inner())
    engine.close()


def test_closing_cancels_what_still_runs_and_ends_the_thread(engine: Engine) -> None:
    ended = threading.Event()

    async def background() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            ended.set()

    async def start() -> None:
        engine.background = asyncio.create_task(background())  # type: ignore[attr-defined]
        await asyncio.sleep(0)

    engine.run(start())
    thread = engine._thread
    engine.close()
    engine.close()

    assert ended.is_set()
    assert not engine.running
    assert thread is not None
    assert not thread.is_alive()


def test_work_of_many_threads_runs_side_by_side(engine: Engine) -> None:
    barrier = asyncio.Barrier(5)

    async def meet() -> None:
        async with asyncio.timeout(5):
            await barrier.wait()

    threads = [threading.Thread(target=engine.run, args=(meet(),)) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=10)

    assert not any(thread.is_alive() for thread in threads)
    engine.close()
