"""Event counters."""

from __future__ import annotations

import asyncio
import fcntl
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path

import pytest

from pytest_vmsandbox.linux import EventFD, EventFDFlags

InChild = Callable[..., None]
SOON_S = 20  # far more than anything here takes; only a failure waits so long


@pytest.fixture
def counter() -> Iterator[EventFD]:
    with EventFD() as made:
        yield made


def in_loop(work: Coroutine[object, object, object]) -> object:
    async def bounded() -> object:
        return await asyncio.wait_for(work, SOON_S)

    return asyncio.run(bounded())


def open_descriptors() -> set[Path]:
    return set(Path("/proc/self/fd").iterdir())


def test_a_read_takes_the_whole_count(in_child: InChild) -> None:
    def body() -> None:
        with EventFD(2) as counter:
            counter.write(3)
            counter.write()
            assert counter.read() == 6
            counter.write(2**64 - 2)
            assert counter.read() == 2**64 - 2

    in_child(body)


def test_a_semaphore_gives_one_at_a_time() -> None:
    with EventFD(3, EventFDFlags.SEMAPHORE | EventFDFlags.NONBLOCK) as counter:
        taken = [counter.read() for _ in range(3)]

        assert taken == [1, 1, 1]
        with pytest.raises(BlockingIOError, match="eventfd read"):
            counter.read()


def test_the_highest_initial_count_is_taken_whole() -> None:
    with EventFD(2**32 - 1) as counter:
        assert counter.read() == 2**32 - 1


def test_descriptor_zero_is_one_too(in_child: InChild) -> None:
    def body() -> None:
        os.close(0)
        with EventFD(4) as counter:
            assert counter.fileno() == 0
            assert repr(counter) == "<EventFD 0>"
            was_closed = counter.closed
            assert counter.read() == 4
        assert (was_closed, counter.closed) == (False, True)
        assert os.open("/dev/null", os.O_RDONLY) == 0  # it was closed

    in_child(body)


def test_nonblocking_raises_where_the_others_wait() -> None:
    with EventFD(0, EventFDFlags.NONBLOCK) as counter:
        with pytest.raises(BlockingIOError, match="eventfd read"):
            counter.read()
        counter.write(2**64 - 2)
        with pytest.raises(BlockingIOError, match="eventfd write"):
            counter.write()
        counter.write(0)


def test_a_read_waits_for_a_write(counter: EventFD) -> None:
    reading = threading.Event()

    def write() -> None:
        reading.wait()
        counter.write(5)

    thread = threading.Thread(target=write)
    thread.start()
    reading.set()

    assert counter.read() == 5
    thread.join()


@pytest.mark.parametrize(("already", "more"), [(2**64 - 2, 1), (2**64 - 3, 2), (1, 2**64 - 2)])
def test_a_write_waits_for_room_for_all_of_it(counter: EventFD, already: int, more: int) -> None:
    counter.write(already)
    thread = threading.Thread(target=counter.write, args=(more,))
    thread.start()
    first = counter.read()
    second = counter.read()
    thread.join()

    # Had the write not waited, the first read would have found the sum.
    assert (first, second) == (already, more)


@pytest.mark.parametrize("use", ["read", "write"])
def test_closing_ends_what_waits_in_other_threads(use: str) -> None:
    before = open_descriptors()
    counter = EventFD()
    if use == "write":
        counter.write(2**64 - 2)
    ended: list[str] = []

    def wait() -> None:
        with pytest.raises(ValueError, match="this EventFD is closed") as caught:
            getattr(counter, use)()
        ended.append(str(caught.value))

    threads = [threading.Thread(target=wait) for _ in range(3)]
    for thread in threads:
        thread.start()
    while len(counter._alarms) < len(threads):
        time.sleep(0.001)
    counter.close()
    for thread in threads:
        thread.join(timeout=20)

    assert len(ended) == len(threads)
    assert counter._alarms == set()
    assert open_descriptors() == before


def test_a_signal_handler_may_write_while_a_read_waits(counter: EventFD) -> None:
    def write(_number: int, _frame: object) -> None:
        counter.write(3)

    former = signal.signal(signal.SIGALRM, write)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.01)
        assert counter.read() == 3
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, former)


@pytest.mark.parametrize("value", [-1, 2**64 - 1, 2**64])
def test_a_value_that_does_not_fit_is_refused(counter: EventFD, value: int) -> None:
    with pytest.raises(ValueError, match="eventfd: value"):
        counter.write(value)


@pytest.mark.parametrize(
    "flags", [0, EventFDFlags.SEMAPHORE, EventFDFlags.NONBLOCK, EventFDFlags.CLOEXEC]
)
def test_no_program_inherits_it(flags: int) -> None:
    with EventFD(0, flags) as counter:
        assert fcntl.fcntl(counter.fileno(), fcntl.F_GETFD) == fcntl.FD_CLOEXEC
        done = subprocess.run(
            [sys.executable, "-c", f"import os; os.fstat({counter.fileno()})"],
            close_fds=False,
            capture_output=True,
            check=False,
        )
        assert b"Bad file descriptor" in done.stderr


def test_a_closed_one_refuses_every_use(counter: EventFD) -> None:
    fd = counter.fileno()
    assert repr(counter) == f"<EventFD {fd}>"
    before = counter.closed
    counter.close()
    counter.close()

    assert (before, counter.closed) == (False, True)
    assert repr(counter) == "<EventFD closed>"
    uses: list[Callable[[], object]] = [
        counter.read,
        counter.write,
        counter.fileno,
        counter.__enter__,
        lambda: in_loop(counter.aread()),
    ]
    for use in uses:
        with pytest.raises(ValueError, match="this EventFD is closed"):
            use()


def test_closing_twice_does_not_close_what_took_its_number(counter: EventFD) -> None:
    fd = counter.fileno()
    counter.close()
    other = os.open("/dev/null", os.O_RDONLY)
    counter.close()

    try:
        assert other == fd
        assert os.read(other, 1) == b""
    finally:
        os.close(other)


@pytest.mark.parametrize(("initval", "flags"), [(-1, 0), (2**32, 0), (0, 4), (0, 1 << 40)])
def test_a_refused_construction_leaves_nothing(initval: int, flags: int) -> None:
    before = open_descriptors()

    with pytest.raises(ValueError, match="eventfd: "):
        EventFD(initval, flags)

    assert open_descriptors() == before


def test_a_failed_construction_leaves_nothing(in_child: InChild) -> None:
    def body() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))
        with pytest.raises(OSError, match="eventfd"):
            EventFD()

    in_child(body)


def test_an_async_read_waits_for_a_write(counter: EventFD) -> None:
    async def work() -> int:
        reader = asyncio.create_task(counter.aread())
        await asyncio.sleep(0)
        assert not reader.done()
        counter.write(4)
        return await reader

    assert in_loop(work()) == 4
    assert counter._waiting == {}


def test_an_async_read_waits_even_where_read_would_raise() -> None:
    async def work() -> int:
        with EventFD(0, EventFDFlags.NONBLOCK) as counter:
            asyncio.get_running_loop().call_soon(counter.write, 4)
            return await counter.aread()

    assert in_loop(work()) == 4


def test_one_made_outside_serves_one_loop_after_the_other(counter: EventFD) -> None:
    async def work() -> int:
        asyncio.get_running_loop().call_soon(counter.write, 2)
        return await counter.aread()

    assert [in_loop(work()) for _ in range(3)] == [2, 2, 2]


def test_two_async_reads_at_once_both_complete(counter: EventFD) -> None:
    async def work() -> list[int]:
        readers = [asyncio.create_task(counter.aread()) for _ in range(2)]
        await asyncio.sleep(0)
        counter.write(1)
        await asyncio.wait(readers, return_when=asyncio.FIRST_COMPLETED)
        counter.write(2)
        return sorted(await asyncio.gather(*readers))

    assert in_loop(work()) == [1, 2]
    assert counter._waiting == {}


def test_many_async_reads_share_a_semaphore() -> None:
    async def work() -> list[int]:
        with EventFD(0, EventFDFlags.SEMAPHORE) as counter:
            readers = [asyncio.create_task(counter.aread()) for _ in range(20)]
            await asyncio.sleep(0)
            counter.write(20)
            return await asyncio.gather(*readers)

    assert in_loop(work()) == [1] * 20


def test_reads_in_two_loops_of_two_threads_both_complete() -> None:
    with EventFD(0, EventFDFlags.SEMAPHORE) as counter:
        results: list[object] = []
        threads = [
            threading.Thread(target=lambda: results.append(in_loop(counter.aread())))
            for _ in range(2)
        ]
        for thread in threads:
            thread.start()
        counter.write(2)
        for thread in threads:
            thread.join()

        assert results == [1, 1]
        assert counter._waiting == {}


def test_a_cancelled_async_read_takes_nothing(counter: EventFD) -> None:
    async def work() -> int:
        cancelled = asyncio.create_task(counter.aread())
        other = asyncio.create_task(counter.aread())
        await asyncio.sleep(0)
        cancelled.cancel()
        counter.write(3)
        found = await other
        assert cancelled.cancelled()
        return found

    assert in_loop(work()) == 3
    assert counter._waiting == {}


def test_an_async_read_cancelled_after_it_was_woken_takes_nothing(counter: EventFD) -> None:
    async def work() -> int:
        reader = asyncio.create_task(counter.aread())
        await asyncio.sleep(0)
        counter.write(3)
        (futures,) = counter._waiting.values()
        for future in futures:
            future.set_result(None)
        reader.cancel()  # between the news and the read
        await asyncio.wait([reader])
        assert reader.cancelled()
        return counter.read()

    assert in_loop(work()) == 3
    assert counter._waiting == {}


def test_the_only_async_read_can_be_cancelled_and_another_follow(counter: EventFD) -> None:
    async def work() -> int:
        for _ in range(3):
            reader = asyncio.create_task(counter.aread())
            await asyncio.sleep(0)
            reader.cancel()
            await asyncio.wait([reader])
        counter.write(7)
        return await counter.aread()

    assert in_loop(work()) == 7


def test_closing_ends_the_async_reads_that_wait() -> None:
    async def work() -> list[object]:
        counter = EventFD()
        readers = [asyncio.create_task(counter.aread()) for _ in range(2)]
        await asyncio.sleep(0)
        counter.close()
        return await asyncio.gather(*readers, return_exceptions=True)

    before = open_descriptors()
    found = in_loop(work())

    assert isinstance(found, list)
    assert [(type(error), str(error)) for error in found] == [
        (ValueError, "this EventFD is closed")
    ] * 2
    assert open_descriptors() == before


def test_closing_between_the_news_and_the_read_ends_the_read_too() -> None:
    async def work() -> list[object]:
        counter = EventFD()
        readers = [asyncio.create_task(counter.aread()) for _ in range(2)]
        await asyncio.sleep(0)
        counter.write()
        (futures,) = counter._waiting.values()
        futures.copy().pop().set_result(None)
        counter.close()
        return await asyncio.gather(*readers, return_exceptions=True)

    found = in_loop(work())

    assert isinstance(found, list)
    assert [type(error) for error in found] == [ValueError, ValueError]


def test_closing_does_not_stumble_over_a_loop_that_was_closed_while_waiting() -> None:
    counter = EventFD()
    loop = asyncio.new_event_loop()
    waiting = counter.aread()
    loop.call_soon(loop.stop)
    task = loop.create_task(waiting)
    loop.run_forever()
    loop.close()
    assert counter._waiting

    counter.close()

    assert counter._waiting == {}
    task._log_destroy_pending = False  # type: ignore[attr-defined]  # left on purpose
    waiting.close()


def test_a_loop_without_readers_leaves_nothing_half_made(counter: EventFD) -> None:
    class Poor(asyncio.SelectorEventLoop):
        def add_reader(self, *_: object) -> None:
            raise NotImplementedError

    loop = Poor()
    try:
        for _ in range(2):
            with pytest.raises(NotImplementedError):
                loop.run_until_complete(counter.aread())
            assert counter._waiting == {}
    finally:
        loop.close()
