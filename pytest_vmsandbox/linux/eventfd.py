"""A counter in the kernel that one side adds to and the other waits for."""

from __future__ import annotations

import errno
import os
import select
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntFlag
from types import TracebackType
from typing import TYPE_CHECKING, Self

from pytest_vmsandbox.linux.arguments import bits_of, check_bits, check_range
from pytest_vmsandbox.linux.libc import call_libc, os_error
from pytest_vmsandbox.linux.owned_fd import OwnedFd

if TYPE_CHECKING:
    import asyncio

_WORD = 8  # eventfd(2): reads and writes are one host-ordered 64-bit number
_MOST = 2**64 - 2
_ONE = (1).to_bytes(_WORD, sys.byteorder)


class EventFDFlags(IntFlag):
    """EFD_* of <sys/eventfd.h>; each also without its prefix."""

    EFD_SEMAPHORE = SEMAPHORE = 0o1
    EFD_NONBLOCK = NONBLOCK = 0o4000
    EFD_CLOEXEC = CLOEXEC = 0o2000000


_ALWAYS = int(EventFDFlags.EFD_CLOEXEC | EventFDFlags.EFD_NONBLOCK)


class EventFD:
    """eventfd(2), since Linux 2.6.27: owned by whoever made it, until `close()` or end of `with`.

    `read` takes the whole count (with SEMAPHORE: one) and waits while it is 0, with NONBLOCK it
    raises BlockingIOError instead. CLOEXEC is always set. Whatever was asked for, the kernel's own
    O_NONBLOCK is set, since readiness may be stolen by another reader between the news and
    the read; who shares the descriptor sees that flag. Any use after `close()` is a ValueError.
    """

    def __init__(self, initval: int = 0, flags: int = 0) -> None:
        count = check_range(initval, lowest=0, highest=2**32 - 1, argument="eventfd: initval")
        bits = check_bits(flags, allowed=bits_of(EventFDFlags), argument="eventfd: flags")
        self._waits = not bits & EventFDFlags.EFD_NONBLOCK
        self._waiting: dict[asyncio.AbstractEventLoop, set[asyncio.Future[None]]] = {}
        self._alarms: set[int] = set()
        # Between asking for the number and using it, close() could give it to another file. It
        # is reentrant since a signal handler may write.
        self._lock = threading.RLock()
        self._fd = call_libc("eventfd", count, bits | _ALWAYS)

    def fileno(self) -> int:
        """The descriptor, still owned by this object."""
        if self._fd < 0:
            raise ValueError("this EventFD is closed")
        return self._fd

    @property
    def closed(self) -> bool:
        """Whether `close()` was called."""
        return self._fd < 0

    def read(self) -> int:
        """The count (with SEMAPHORE: 1), taken from it; waits while it is 0.

        ValueError when another thread closes it meanwhile; so in `write`.
        """
        while True:
            try:
                return self._take()
            except BlockingIOError:
                if not self._waits:
                    raise
            self._wait_readable()

    async def aread(self) -> int:
        """`read` without blocking the running loop, which may be another one at each call.

        It always waits, NONBLOCK or not. Any number may wait at once: each gets a count of its
        own, in no promised order. A cancelled one takes nothing. ValueError when closed meanwhile.
        """
        while True:
            try:
                return self._take()
            except BlockingIOError:
                await self._readable()

    def write(self, value: int = 1) -> None:
        """Add `value`, 0 to 2**64 - 2; waits while the sum would be more than that."""
        number = check_range(value, lowest=0, highest=_MOST, argument="eventfd: value")
        word = number.to_bytes(_WORD, sys.byteorder)
        try:
            self._put(word)
        except BlockingIOError:
            if not self._waits:
                raise os_error(errno.EAGAIN, "eventfd write") from None
            self._write_when_there_is_room(word)

    def close(self) -> None:
        """Close the descriptor; whoever waits gets a ValueError. Twice is harmless.

        A `read` or `write` may wait in any thread. Where an `aread` waits, it is to be called in
        the thread of its loop.
        """
        with self._lock:
            fd, self._fd = self._fd, -1
            if fd < 0:
                return
            for alarm in self._alarms:
                os.write(alarm, _ONE)
        for loop, futures in self._waiting.items():
            if not loop.is_closed():
                loop.remove_reader(fd)
                _wake(futures)
        self._waiting.clear()
        os.close(fd)

    def __enter__(self) -> Self:
        self.fileno()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<EventFD {self._fd if self._fd >= 0 else 'closed'}>"

    def _take(self) -> int:
        try:
            with self._lock:
                word = os.read(self.fileno(), _WORD)
        except BlockingIOError:
            raise os_error(errno.EAGAIN, "eventfd read") from None
        return int.from_bytes(word, sys.byteorder)

    def _put(self, word: bytes) -> None:
        with self._lock:
            os.write(self.fileno(), word)

    def _wait_readable(self) -> None:
        """Wait until a read may succeed, or close() was called in another thread."""
        poller = select.poll()
        with self._alarm() as alarm:
            poller.register(alarm, select.POLLIN)
            with self._lock:
                poller.register(self.fileno(), select.POLLIN)
            # Closed from here on, the number may be another file's: the alarm is raised then.
            poller.poll()

    def _write_when_there_is_room(self, word: bytes) -> None:
        with self._alarm() as alarm, select.epoll() as room:
            room.register(alarm, select.EPOLLIN)
            with self._lock:
                # Edge-triggered: the kernel reports room as soon as there is room for a 1, so that
                # for more than that only the next read is news.
                room.register(self.fileno(), select.EPOLLOUT | select.EPOLLET)
            while True:
                room.poll()
                try:
                    self._put(word)
                except BlockingIOError:
                    continue
                return

    @contextmanager
    def _alarm(self) -> Iterator[int]:
        """A descriptor that is readable from the moment that close() is called."""
        with OwnedFd(call_libc("eventfd", 0, _ALWAYS)) as alarm:
            with self._lock:
                self.fileno()
                self._alarms.add(alarm)
            try:
                yield alarm
            finally:
                with self._lock:
                    self._alarms.discard(alarm)

    async def _readable(self) -> None:
        """Wait until a read may succeed, or close() was called; nothing is taken here."""
        import asyncio  # noqa: PLC0415 - 30 ms that whoever never awaits should not pay

        loop, fd = asyncio.get_running_loop(), self.fileno()
        futures = self._waiting.get(loop)
        if futures is None:
            # A second add_reader() for one descriptor would replace the first: one for all.
            futures = set()
            loop.add_reader(fd, _wake, futures)
            self._waiting[loop] = futures
        future = loop.create_future()
        futures.add(future)
        try:
            await future
        finally:
            futures.discard(future)
            if not futures and self._waiting.get(loop) is futures:
                loop.remove_reader(fd)
                del self._waiting[loop]


def _wake(futures: set[asyncio.Future[None]]) -> None:
    """Let all of them look; those that find nothing wait again."""
    for future in futures:
        if not future.done():
            future.set_result(None)
