"""A context manager that may wait, held by a coroutine: the loop goes on, nothing stays open."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import pytest

from pytest_vmsandbox.jail.off_loop import GivenUp, off_loop, run_stoppable, to_its_end


class Door:
    """Something that is entered and left, and may take its time over either."""

    def __init__(self) -> None:
        self.seen: list[str] = []
        self.entering, self.enter = threading.Event(), threading.Event()
        self.leaving, self.leave = threading.Event(), threading.Event()

    @contextmanager
    def open(self) -> Iterator[str]:
        self.entering.set()
        assert self.enter.wait(10)
        self.seen.append("entered")
        yield "inside"
        self.leaving.set()
        assert self.leave.wait(10)
        self.seen.append("left")


class Locked(AbstractContextManager[None]):
    """Something that can't be entered."""

    def __enter__(self) -> None:
        raise OSError("locked")

    def __exit__(self, *error: object) -> None:
        raise AssertionError("it was never entered")


@pytest.fixture
def door() -> Door:
    return Door()


async def _visit(door: Door) -> None:
    async with off_loop(door.open()) as value:
        door.seen.append(value)


async def test_the_loop_goes_on_while_it_is_entered_and_left(door: Door) -> None:
    visit = asyncio.create_task(_visit(door))
    # Each of these is set by the loop, which would otherwise stand still.
    await asyncio.to_thread(door.entering.wait, 10)
    door.enter.set()
    await asyncio.to_thread(door.leaving.wait, 10)
    door.leave.set()
    await visit

    assert door.seen == ["entered", "inside", "left"]


async def test_cancelled_while_it_is_entered_it_is_left(door: Door) -> None:
    door.leave.set()
    visit = asyncio.create_task(_visit(door))
    await asyncio.to_thread(door.entering.wait, 10)
    for _ in range(3):
        visit.cancel()
        await asyncio.sleep(0.01)
        assert not visit.done()
    door.enter.set()
    with pytest.raises(asyncio.CancelledError):
        await visit

    assert door.seen == ["entered", "left"]


async def test_cancelled_while_it_is_left_it_is_left_to_the_end(door: Door) -> None:
    door.enter.set()
    visit = asyncio.create_task(_visit(door))
    await asyncio.to_thread(door.leaving.wait, 10)
    for _ in range(3):
        visit.cancel()
        await asyncio.sleep(0.01)
        assert not visit.done()
    door.leave.set()
    with pytest.raises(asyncio.CancelledError):
        await visit

    assert door.seen == ["entered", "inside", "left"]


async def test_what_entering_raises_is_raised() -> None:
    with pytest.raises(OSError, match="locked"):
        async with off_loop(Locked()):
            pytest.fail("it was entered")


async def test_what_is_raised_in_the_block_goes_on_and_it_is_left(door: Door) -> None:
    door.enter.set()
    door.leave.set()
    with pytest.raises(KeyError):
        async with off_loop(door.open()):
            raise KeyError

    assert door.seen == ["entered", "left"]


@pytest.mark.parametrize("outcome", [GivenUp, None])
async def test_work_that_can_stop_is_told_and_waited_for(outcome: type[GivenUp] | None) -> None:
    begun, ended = threading.Event(), threading.Event()

    def work(stop: threading.Event) -> str:
        begun.set()
        assert stop.wait(10)
        ended.set()
        if outcome:
            raise outcome
        return "done all the same"

    working = asyncio.create_task(run_stoppable(work))
    await asyncio.to_thread(begun.wait, 10)
    for _ in range(2):
        working.cancel()
        await asyncio.sleep(0)
    with pytest.raises(asyncio.CancelledError):
        await working

    assert ended.is_set()


async def test_work_that_nobody_stops_gives_its_result() -> None:
    assert await run_stoppable(lambda stop: stop.is_set()) is False


async def test_a_coroutine_goes_on_to_its_end_whoever_is_cancelled() -> None:
    may_end = asyncio.Event()
    ended: list[bool] = []

    async def work() -> str:
        await may_end.wait()
        ended.append(True)
        return "done"

    waiting = asyncio.create_task(to_its_end(work()))
    for _ in range(3):
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.sleep(0)
        assert not waiting.done()
    may_end.set()
    with pytest.raises(asyncio.CancelledError):
        await waiting

    assert ended == [True]
    assert await to_its_end(work()) == "done"
