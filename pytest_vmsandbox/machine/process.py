"""A running command in the guest, for `def test` (compare `subprocess.Popen`)."""

from __future__ import annotations

import asyncio
import io
import signal
from contextlib import suppress
from typing import IO, TYPE_CHECKING, Any

from pytest_vmsandbox.deadline import Deadline
from pytest_vmsandbox.errors import TimedOut
from pytest_vmsandbox.guest.process import GuestProcess
from pytest_vmsandbox.guest.streams import ReadStream, WriteStream
from pytest_vmsandbox.machine.caller import Caller

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer, WriteableBuffer


class ProcessFace:
    """What both faces of a command share: what needs no waiting."""

    def __init__(self, guest: GuestProcess, caller: Caller) -> None:
        self._guest = guest
        self._caller = caller

    @property
    def pid(self) -> int:
        """Its pid in the guest; also its process group."""
        return self._guest.pid

    @property
    def returncode(self) -> int | None:
        """None while it runs; then its exit status, or minus the signal that ended it."""
        return self._guest.returncode

    def poll(self) -> int | None:
        """The same as `returncode`, without waiting."""
        return self._guest.returncode


class Process(ProcessFace):
    """A command that was started; streams are files as `subprocess` gives them."""

    def __init__(self, guest: GuestProcess, caller: Caller, *, encoding: str | None) -> None:
        super().__init__(guest, caller)
        self.stdin = _writer(guest.stdin, caller, encoding) if guest.stdin else None
        self.stdout = _reader(guest.stdout, caller, encoding)
        self.stderr = _reader(guest.stderr, caller, encoding) if guest.stderr else None

    def wait(self, *, timeout: float | None = None) -> int:
        """Its exit status once it has ended; TimedOut after `timeout` seconds."""
        return self._caller.run(wait_for(self._guest, deadline=self._caller.deadline(timeout)))

    def send_signal(self, number: signal.Signals | int) -> None:
        """Send a signal to its process group; nothing where it has ended."""
        self._caller.run(self._guest.send_signal(number))

    def terminate(self) -> None:
        """Send SIGTERM to its process group."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """End its whole process group (SIGKILL)."""
        self._caller.run(self._guest.kill())


async def close(stream: ReadStream) -> None:
    """Close it on the engine's loop, where it lives."""
    stream.close()


async def wait_for(guest: GuestProcess, *, deadline: Deadline) -> int:
    """The exit status of `guest`, or TimedOut at the deadline."""
    try:
        async with asyncio.timeout(deadline.timeout_s):
            return await guest.wait()
    except TimeoutError as error:
        if isinstance(error, TimedOut):
            raise
        raise deadline.timed_out(f"the end of process {guest.pid}") from None


class _Source(io.RawIOBase):
    """A guest's stream as a raw file (io.RawIOBase)."""

    def __init__(self, stream: ReadStream, caller: Caller) -> None:
        self._stream = stream
        self._caller = caller

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer) -> int:
        view = memoryview(buffer).cast("B")
        data = self._caller.run(self._stream.read(len(view)))
        view[: len(data)] = data
        return len(data)

    def close(self) -> None:
        # Also called when it is collected, on any thread and after the engine's end.
        if not self.closed:
            with suppress(RuntimeError):
                self._caller.run(close(self._stream))
        super().close()


class _Sink(io.RawIOBase):
    """A guest's stdin as a raw file; nothing is held back, so that no flush can be forgotten."""

    def __init__(self, stream: WriteStream, caller: Caller) -> None:
        self._stream = stream
        self._caller = caller

    def writable(self) -> bool:
        return True

    def write(self, data: ReadableBuffer) -> int:
        content = bytes(data)
        self._caller.run(self._stream.write(content))
        return len(content)

    def close(self) -> None:
        if not self.closed:
            with suppress(RuntimeError):
                self._caller.run(self._stream.close())
        super().close()


def _reader(stream: ReadStream, caller: Caller, encoding: str | None) -> IO[Any]:
    buffered = io.BufferedReader(_Source(stream, caller), buffer_size=64 * 1024)
    if encoding is None:
        return buffered
    return io.TextIOWrapper(buffered, encoding=encoding, errors="backslashreplace", newline="")


def _writer(stream: WriteStream, caller: Caller, encoding: str | None) -> IO[Any]:
    raw = _Sink(stream, caller)
    if encoding is None:
        return raw  # type: ignore[return-value]  # RawIOBase is IO[bytes] in all that we promise
    # TextIOWrapper asks of its buffer only what a raw file has too.
    return io.TextIOWrapper(raw, encoding=encoding, newline="", write_through=True)  # type: ignore[type-var]
