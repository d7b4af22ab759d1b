from __future__ import annotations

import asyncio

import pytest

from pytest_vmsandbox.guest.frames import PAYLOAD_MAX, ProtocolViolated
from pytest_vmsandbox.guest.streams import WRITE_WINDOW, ReadStream, WriteStream

pytestmark = pytest.mark.asyncio

WINDOW = 1000


class Line:
    """Takes what a WriteStream sends."""

    def __init__(self) -> None:
        self.sent: list[bytes | None] = []

    async def wait_writable(self) -> None:
        await asyncio.sleep(0)

    def send_data(self, data: memoryview) -> None:
        self.sent.append(bytes(data))

    def send_eof(self) -> None:
        self.sent.append(None)


def reading() -> tuple[ReadStream, list[int], list[str]]:
    granted: list[int] = []
    closed: list[str] = []
    stream = ReadStream(grant=granted.append, close=lambda: closed.append("closed"), window=WINDOW)
    return stream, granted, closed


async def test_credit_is_given_back_as_it_is_read_and_never_more() -> None:
    stream, granted, _ = reading()
    stream.feed(memoryview(bytes(WINDOW)))
    await stream.read(100)
    assert granted == []  # in few and large steps
    await stream.read(500)
    assert granted == [600]
    stream.feed(memoryview(bytes(600)))
    with pytest.raises(ProtocolViolated):
        stream.feed(memoryview(b"x"))


async def test_a_reader_of_more_than_a_window_is_served() -> None:
    stream, granted, _ = reading()
    task = asyncio.create_task(stream.readexactly(10 * WINDOW))
    allowed = fed = WINDOW
    stream.feed(memoryview(bytes(WINDOW)))
    while not task.done():
        await asyncio.sleep(0)
        more, granted[:] = sum(granted), []
        allowed += more
        if more:
            stream.feed(memoryview(bytes(more)))
            fed += more

    assert len(task.result()) == 10 * WINDOW
    assert fed <= 11 * WINDOW


async def test_what_arrived_before_a_failure_is_read_first() -> None:
    stream, _, _ = reading()
    stream.feed(memoryview(b"line\nrest"))
    stream.fail(ConnectionError("gone"))

    assert await stream.readline() == b"line\n"
    assert await stream.read(100) == b"rest"
    with pytest.raises(ConnectionError):
        await stream.read(1)


async def test_an_incomplete_exact_read_hands_over_what_there_was() -> None:
    stream, _, _ = reading()
    stream.feed(memoryview(b"abc"))
    stream.feed_eof()
    with pytest.raises(asyncio.IncompleteReadError) as caught:
        await stream.readexactly(5)

    assert caught.value.partial == b"abc"
    assert stream.at_eof()


async def test_two_readers_at_once_are_refused() -> None:
    stream, _, _ = reading()
    first = asyncio.create_task(stream.read(1))
    await asyncio.sleep(0)
    with pytest.raises(RuntimeError):
        await stream.read(1)
    stream.feed(memoryview(b"x"))

    assert await first == b"x"


async def test_closing_tells_the_guest_once_and_wakes_the_reader() -> None:
    stream, _, closed = reading()
    waiting = asyncio.create_task(stream.read())
    await asyncio.sleep(0)
    stream.close()
    stream.close()
    stream.feed(memoryview(b"late"))

    assert await waiting == b""
    assert (closed, stream.at_eof(), len(stream._buffer)) == (["closed"], True, 0)


async def test_a_writer_waits_when_its_credit_is_used_up_and_goes_on_with_more() -> None:
    line = Line()
    stream = WriteStream(line)
    writing = asyncio.create_task(stream.write(bytes(WRITE_WINDOW + 10)))
    for _ in range(20):
        await asyncio.sleep(0)
    assert sum(len(part or b"") for part in line.sent) == WRITE_WINDOW
    assert not writing.done()
    stream.credit(10)
    await writing

    assert max(len(part or b"") for part in line.sent) == PAYLOAD_MAX
    with pytest.raises(ProtocolViolated):
        stream.credit(WRITE_WINDOW + 1)


async def test_a_cancelled_writer_loses_no_credit() -> None:
    line = Line()
    stream = WriteStream(line)
    for _ in range(100):
        writing = asyncio.create_task(stream.write(b"x"))
        await asyncio.sleep(0)
        writing.cancel()
        await asyncio.wait([writing])

    assert stream._credit + sum(len(part or b"") for part in line.sent) == WRITE_WINDOW


async def test_the_end_is_sent_once_and_nothing_after_it() -> None:
    line = Line()
    stream = WriteStream(line)
    await stream.close()
    await stream.close()
    with pytest.raises(BrokenPipeError):
        await stream.write(b"x")

    assert (line.sent, stream.is_closing()) == ([None], True)
