"""A program run once: with a deadline, bounded output, and nothing of it left running."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import IO, Self

from pytest_vmsandbox.deadline import Deadline

# What is kept of each stream; a program that prints without end costs no more than this.
OUTPUT_LIMIT_BYTES = 1024 * 1024

# How long the streams of an ended program are still read: what it left in the background may
# hold them open for ever.
_DRAIN_S = 0.25

# How long a killed program may take to end; it is a matter of microseconds.
_REAP_S = 1.0
_REAP_POLL_S = 0.001

# Without a pidfd (kernels before 5.3, macOS) the child is looked at this often.
_POLL_S = 0.005

_CHUNK_BYTES = 64 * 1024

# For Popen, to which None means "still to be reaped"; no program ends with it.
_TAKEN_RETURNCODE = 1 << 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a program ended.

    `returncode` is as in `subprocess` (negative for a signal), and None where the program never
    started or its exit status was lost (`error` says why), or where it timed out. The streams hold
    their first OUTPUT_LIMIT_BYTES.
    `left_running` is True only where we may not kill it: it runs as another user (sudo).
    """

    argv: tuple[str, ...]
    returncode: int | None = None
    stdout: bytes = b""
    stderr: bytes = b""
    timed_out: bool = False
    left_running: bool = False
    error: str = ""

    @property
    def ok(self) -> bool:
        """Whether it ran to its end, in time, with status 0."""
        return self.returncode == 0

    @property
    def text(self) -> str:
        """Its stdout as text, whatever the bytes."""
        return self.stdout.decode(errors="backslashreplace")

    def __str__(self) -> str:
        """One line of evidence: the command, how it ended, its first complaint."""
        complaint = self.stderr.decode(errors="backslashreplace").strip().splitlines()
        return ": ".join([" ".join(self.argv), self._ending(), *complaint[:1]])

    def _ending(self) -> str:
        if self.error:
            return self.error
        if self.timed_out:
            return "timed out" + (", could not be killed" if self.left_running else "")
        return f"exit status {self.returncode}"


async def run_program(
    argv: Sequence[str | os.PathLike[str]],
    *,
    deadline_s: float,
    env: Mapping[str, str] | None = None,
    stdin: int | IO[bytes] = subprocess.DEVNULL,
    start_new_session: bool = True,
    capture: bool = True,
    pass_fds: Sequence[int] = (),
) -> Outcome:
    """Run `argv` and return how it ended, within `deadline_s` and a moment to clean up.

    What the program does, and a program that can't be started, raise nothing: the Outcome says it.
    Afterwards, and after a cancellation too, the program has ended and is reaped, and so has all
    of its process group where it has a session of its own (the default; without one, only the
    program itself is killed). The exceptions are `Outcome.left_running`, and a program whose exit
    status somebody else took (who ignores SIGCHLD, or waits for every child): its group may be a
    stranger's by then and is left alone. How such a program ended is not known, never success.
    Without `capture` both its streams are /dev/null. `pass_fds` are open in it as they are here.
    Blocks the event loop for the fork and exec only.
    """
    words = tuple(os.fspath(word) for word in argv)
    deadline = Deadline.after(seconds=deadline_s)
    try:
        child = _start(
            words,
            env=env,
            stdin=stdin,
            start_new_session=start_new_session,
            capture=capture,
            pass_fds=pass_fds,
        )
    except (OSError, ValueError) as error:  # ValueError: a NUL in a word
        return Outcome(argv=words, error=str(error))
    with _held(child, whole_group=start_new_session) as running:
        return await _watch(running, words, deadline=deadline)


def _start(
    words: tuple[str, ...],
    *,
    env: Mapping[str, str] | None,
    stdin: int | IO[bytes],
    start_new_session: bool,
    capture: bool,
    pass_fds: Sequence[int],
) -> subprocess.Popen[bytes]:
    # Not asyncio's subprocess: its watcher reaps the child when it likes, and a reaped pid may be
    # somebody else's by the time that we kill its group.
    output = subprocess.PIPE if capture else subprocess.DEVNULL
    return subprocess.Popen(
        words,
        env=env,
        stdin=stdin,
        stdout=output,
        stderr=output,
        start_new_session=start_new_session,
        pass_fds=pass_fds,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Running:
    """A child that only we should reap: until then its pid and its group are nobody else's.

    Popen is never asked to wait: where the exit status was taken by somebody else it makes up 0.
    """

    child: subprocess.Popen[bytes]
    pidfd: int | None
    whole_group: bool

    @property
    def returncode(self) -> int | None:
        """How it ended; None while it is not reaped, and where somebody else did that."""
        return None if self.was_taken else self.child.returncode

    @property
    def was_taken(self) -> bool:
        """Whether somebody else took its exit status."""
        return self.child.returncode == _TAKEN_RETURNCODE

    def has_ended(self) -> bool:
        """Whether it has ended; where there is a pidfd, it stays a zombie until `end()`."""
        if self.pidfd is None:
            return self._reap()
        if self.child.returncode is None:
            try:
                flags = os.WEXITED | os.WNOHANG | os.WNOWAIT
                return os.waitid(os.P_PIDFD, self.pidfd, flags) is not None
            except ChildProcessError:
                self.child.returncode = _TAKEN_RETURNCODE
        return True

    def end(self) -> bool:
        """Kill it, with its group where that is its own, and reap it; False if we may not."""
        if self.has_ended() and self.child.returncode is not None:
            return True
        kill = os.killpg if self.whole_group else os.kill
        try:
            kill(self.child.pid, signal.SIGKILL)
        except PermissionError:
            if not self.has_ended():
                return False
        except ProcessLookupError:
            pass
        deadline = Deadline.after(seconds=_REAP_S)
        while not self._reap():
            if deadline.passed:
                return False
            time.sleep(_REAP_POLL_S)
        return True

    def _reap(self) -> bool:
        """Whether it is reaped, now or before, by us or by somebody else; does not wait."""
        if self.child.returncode is None:
            try:
                self.child.returncode = self._take_returncode()
            except ChildProcessError:
                self.child.returncode = _TAKEN_RETURNCODE
        return self.child.returncode is not None

    def _take_returncode(self) -> int | None:
        """Reap it if it has ended; raises ChildProcessError where somebody else has."""
        if self.pidfd is None:
            pid, status = os.waitpid(self.child.pid, os.WNOHANG)
            return os.waitstatus_to_exitcode(status) if pid else None
        # By the pidfd: were it reaped by somebody else, its pid may be another child's of ours.
        seen = os.waitid(os.P_PIDFD, self.pidfd, os.WEXITED | os.WNOHANG)
        if seen is None:
            return None
        return seen.si_status if seen.si_code == os.CLD_EXITED else -seen.si_status


@contextmanager
def _held(child: subprocess.Popen[bytes], *, whole_group: bool) -> Iterator[_Running]:
    """Lend the child; on the way out it is ended and reaped, and its pipes are closed."""
    with ExitStack() as undo:
        for stream in (child.stdout, child.stderr):
            if stream is not None:
                undo.callback(stream.close)
        pidfd = _open_pidfd(child.pid)
        if pidfd is not None:
            undo.callback(os.close, pidfd)
        running = _Running(child=child, pidfd=pidfd, whole_group=whole_group)
        undo.callback(running.end)
        yield running


def _open_pidfd(pid: int) -> int | None:
    """pidfd_open(2), since Linux 5.3; None where there is none."""
    try:
        return os.pidfd_open(pid)
    except (AttributeError, OSError):
        return None


async def _watch(running: _Running, words: tuple[str, ...], *, deadline: Deadline) -> Outcome:
    with _reading(running.child.stdout) as out, _reading(running.child.stderr) as err:
        in_time = await _wait_ended(running, deadline=deadline)
        if in_time:
            drain = deadline.sooner(seconds=_DRAIN_S)
            await out.wait_closed(deadline=drain)
            await err.wait_closed(deadline=drain)
    ended = running.end()
    lost = in_time and running.was_taken
    return Outcome(
        argv=words,
        returncode=running.returncode if in_time else None,
        stdout=bytes(out.kept),
        stderr=bytes(err.kept),
        timed_out=not in_time,
        left_running=not ended,
        error="its exit status was taken by somebody else" if lost else "",
    )


async def _wait_ended(running: _Running, *, deadline: Deadline) -> bool:
    """Whether it ended before the deadline."""
    if running.pidfd is not None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(_wait_readable(running.pidfd), deadline.timeout_s)
        return running.has_ended()
    while not running.has_ended():
        if deadline.passed:
            return False
        await asyncio.sleep(_POLL_S)
    return True


async def _wait_readable(fd: int) -> None:
    loop = asyncio.get_running_loop()
    readable = asyncio.Event()
    loop.add_reader(fd, readable.set)
    try:
        await readable.wait()
    finally:
        loop.remove_reader(fd)


class _Reading:
    """A stream that is read as it comes: the beginning is kept, the rest thrown away."""

    def __init__(self, fd: int) -> None:
        self.kept = bytearray()
        self._fd = fd
        self._closed = asyncio.Event()

    @classmethod
    def of_nothing(cls) -> Self:
        """One that is at its end."""
        reading = cls(-1)
        reading._closed.set()
        return reading

    def read_some(self) -> None:
        """Take what is there; called when the descriptor is readable."""
        try:
            chunk = os.read(self._fd, _CHUNK_BYTES)
        except BlockingIOError:
            return
        self.kept += chunk[: OUTPUT_LIMIT_BYTES - len(self.kept)]
        if not chunk:
            self._closed.set()
            asyncio.get_running_loop().remove_reader(self._fd)

    async def wait_closed(self, *, deadline: Deadline) -> None:
        """Return when the other end is closed, or when the deadline has passed."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._closed.wait(), deadline.timeout_s)


@contextmanager
def _reading(stream: IO[bytes] | None) -> Iterator[_Reading]:
    """Read the stream while the block runs; none is read as an empty one."""
    if stream is None:
        yield _Reading.of_nothing()
        return
    fd = stream.fileno()
    os.set_blocking(fd, False)
    loop = asyncio.get_running_loop()
    reading = _Reading(fd)
    loop.add_reader(fd, reading.read_some)
    try:
        yield reading
    finally:
        loop.remove_reader(fd)
