"""A job: the host's record of one command or transfer in the guest, fed by the channel's frames.

It is over when the agent has told how it ended and has ended each output stream; until then its
record is kept, even if nobody waits for it any more.
"""

from __future__ import annotations

from collections.abc import Callable

from pytest_vmsandbox.guest.frames import FrameType, ProtocolViolated, encode_frame
from pytest_vmsandbox.guest.line import Line
from pytest_vmsandbox.guest.messages import parse_number
from pytest_vmsandbox.guest.streams import ReadStream, WriteStream
from pytest_vmsandbox.guest.waiting import Changes, fresh

_STDIN, _STDOUT, _STDERR = 0, 1, 2
_PID_MAX = 4 * 1024 * 1024


class _Stdin:
    """Sends a stream's frames over the line."""

    def __init__(self, line: Line, job_id: int) -> None:
        self._line, self._job_id = line, job_id

    async def wait_writable(self) -> None:
        await self._line.wait_writable()

    def send_data(self, data: memoryview) -> None:
        self._line.send(encode_frame(FrameType.DATA, id_=self._job_id, payload=data))

    def send_eof(self) -> None:
        self._line.send(encode_frame(FrameType.EOF, id_=self._job_id))


class Job:
    """One process in the guest, as far as the host has heard of it."""

    def __init__(self, *, line: Line, id_: int, stdin: bool, stderr: bool) -> None:
        self.id = id_
        self.stdin = WriteStream(_Stdin(line, id_)) if stdin else None
        self.stdout = ReadStream(grant=self._grant(_STDOUT), close=self._close(_STDOUT))
        self.stderr = (
            ReadStream(grant=self._grant(_STDERR), close=self._close(_STDERR)) if stderr else None
        )
        self.returncode: int | None = None
        self.pid: int | None = None
        self._line = line
        self._refusal: OSError | None = None
        self._error: BaseException | None = None
        self._changes = Changes()

    # ---- frames of the agent ----

    def started(self, payload: memoryview) -> None:
        """It runs."""
        pid = parse_number(payload)
        if self.pid is not None or not 0 < pid <= _PID_MAX:
            raise ProtocolViolated(f"job {self.id} started as pid {pid}")
        self.pid = pid
        self._changes.announce()

    def refused(self, error: OSError) -> None:
        """It never ran, and `error` is why."""
        if self.pid is not None:
            raise ProtocolViolated(f"job {self.id} failed to start after it had started")
        self._refusal = error
        if self.stdin:
            self.stdin.refuse()
        for stream in (self.stdout, self.stderr):
            if stream is not None:
                stream.fail(error)
        self._changes.announce()

    def exited(self, status: int) -> None:
        """It ended with `status`, negative for a signal."""
        if self.pid is None or self.returncode is not None:
            raise ProtocolViolated(f"job {self.id} ended out of turn")
        self.returncode = status
        self._changes.announce()

    def data_came(self, stream: int, payload: memoryview) -> None:
        """Bytes on one of its output streams."""
        self._output(stream).feed(payload)

    def eof_came(self, stream: int) -> None:
        """An output stream has ended, or (0) the process reads no more."""
        if stream == _STDIN:
            self._input().refuse()
        else:
            self._output(stream).feed_eof()

    def credit_came(self, stream: int, payload: memoryview) -> None:
        """The process has read some of its stdin."""
        if stream != _STDIN:
            raise ProtocolViolated(f"credit for stream {stream}")
        self._input().credit(parse_number(payload))

    def fail(self, error: BaseException) -> None:
        """Nothing more will be heard of it, and this is why."""
        if self._error is None and not self.is_over:
            self._error = error
            for stream in (self.stdin, self.stdout, self.stderr):
                if stream is not None:
                    stream.fail(error)
            self._changes.announce()

    @property
    def is_over(self) -> bool:
        """Whether the agent has nothing more to say about it."""
        ended = self.stdout.ended and (self.stderr is None or self.stderr.ended)
        return self._refusal is not None or (self.returncode is not None and ended)

    def over(self) -> None:
        """The agent has forgotten it: what is written now would reach nobody."""
        if self.stdin:
            self.stdin.refuse()

    # ---- those who wait ----

    async def wait_started(self) -> int:
        """The pid; raises the guest's OSError when it could not be started."""
        while self.pid is None:
            if self._refusal is not None:
                raise self._refusal
            if self._error is not None:
                raise fresh(self._error)
            await self._changes.wait()
        return self.pid

    async def wait_exited(self) -> int:
        """Exit status, negative for a signal."""
        while self.returncode is None:
            if self._refusal is not None:
                raise self._refusal
            if self._error is not None:
                raise fresh(self._error)
            await self._changes.wait()
        return self.returncode

    def close_outputs(self) -> None:
        """Nobody will read them."""
        self.stdout.close()
        if self.stderr is not None:
            self.stderr.close()

    # ---- frames of ours ----

    def _grant(self, stream: int) -> Callable[[int], None]:
        def grant(count: int) -> None:
            payload = count.to_bytes(4, "little")
            self._line.send(
                encode_frame(FrameType.CREDIT, id_=self.id, stream=stream, payload=payload)
            )

        return grant

    def _close(self, stream: int) -> Callable[[], None]:
        def close() -> None:
            self._line.send(encode_frame(FrameType.CLOSE, id_=self.id, stream=stream))

        return close

    def _input(self) -> WriteStream:
        if self.stdin is None:
            raise ProtocolViolated(f"job {self.id} has no stdin")
        return self.stdin

    def _output(self, stream: int) -> ReadStream:
        if stream == _STDOUT:
            return self.stdout
        if stream == _STDERR and self.stderr is not None:
            return self.stderr
        raise ProtocolViolated(f"job {self.id} has no output stream {stream}")
