"""A process named for good: its pid, when it started, and in which boot of the host."""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from pytest_vmsandbox.linux.arguments import INT_MAX, check_range
from pytest_vmsandbox.linux.libc import os_error
from pytest_vmsandbox.linux.owned_fd import OwnedFd
from pytest_vmsandbox.linux.pidfd import pidfd_open

_PROC = Path("/proc")
_ENDED = frozenset("ZXx")  # zombie and dead (proc_pid_stat(5), field 3)


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessStat:
    """What /proc/PID/stat says of a process, as far as we need it."""

    pid: int
    comm: str
    state: str
    parent_pid: int
    threads: int
    start_ticks: int

    @property
    def ended(self) -> bool:
        """Whether nothing of it runs any more, though its parent has not reaped it yet."""
        # A main thread that left before the others shows as Z too, while the process goes on.
        return self.state in _ENDED and self.threads <= 1

    @classmethod
    def parse(cls, line: bytes) -> Self:
        """Read one stat line (proc_pid_stat(5)); ValueError for anything else.

        The name of the program may hold anything, ``) R 1 (`` included: the last parenthesis
        is the one that closes it.
        """
        head, closed, tail = line.rpartition(b")")
        pid, opened, comm = head.partition(b"(")
        fields = tail.split()
        if not opened or not closed or len(fields) < _FIELDS:
            raise ValueError(f"not a line of /proc/PID/stat: {line!r}")
        return cls(
            pid=int(pid),
            comm=os.fsdecode(comm),
            state=fields[0].decode("ascii"),
            parent_pid=int(fields[1]),
            threads=int(fields[17]),
            start_ticks=int(fields[19]),
        )

    @classmethod
    def read(cls, pid: int) -> Self:
        """The stat of process `pid`; ProcessLookupError where /proc shows none."""
        number = check_range(pid, lowest=1, highest=INT_MAX, argument="pid")
        path = _PROC / str(number) / "stat"
        try:
            line = path.read_bytes()
        except (FileNotFoundError, ProcessLookupError):  # the latter: it ended while being read
            raise os_error(errno.ESRCH, "read", path) from None
        return cls.parse(line)


_FIELDS = 20  # from the state, field 3, to the start time, field 22


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessIdentity:
    """One process, for good: a pid alone is reused (proc_pid_stat(5), field 22).

    `start_ticks` are clock ticks (SC_CLK_TCK) from the boot to its start, `boot_id` names that
    boot. All three are seen from our own pid namespace and /proc.
    """

    boot_id: str
    pid: int
    start_ticks: int

    @classmethod
    def of(cls, pid: int) -> Self:
        """The identity of the process that has this pid now, a zombie included.

        ProcessLookupError where there is none.
        """
        return cls(boot_id=read_boot_id(), pid=pid, start_ticks=ProcessStat.read(pid).start_ticks)

    @classmethod
    def current(cls) -> Self:
        """Our own identity."""
        return cls.of(os.getpid())

    def is_alive(self) -> bool:
        """Whether it still runs. A zombie does not; where it can't be known, doubt means alive."""
        if self.boot_id != read_boot_id():
            return False
        try:
            seen = ProcessStat.read(self.pid)
        except ProcessLookupError:
            return _hidden(self.pid)
        except OSError:
            return True
        return seen.start_ticks == self.start_ticks and not seen.ended

    def open_pidfd(self) -> OwnedFd:
        """A pidfd for exactly this process, owned by the caller; ProcessLookupError once it ended.

        A hidden process can't be told from another one with its pid, and is refused as well.
        """
        pidfd = pidfd_open(self.pid)
        try:
            # Looked at after the open: if it is still the one, it was the one that was opened.
            if self.boot_id == read_boot_id():
                seen = ProcessStat.read(self.pid)
                if seen.start_ticks == self.start_ticks and not seen.ended:
                    return pidfd
            raise os_error(errno.ESRCH, "pidfd_open")
        except BaseException:
            pidfd.close()
            raise


def read_boot_id() -> str:
    """The id that the kernel drew at this boot (random(4))."""
    path = _PROC / "sys/kernel/random/boot_id"
    try:
        return path.read_text(encoding="ascii").strip()
    except FileNotFoundError:
        raise os_error(errno.ENOSYS, "read", path) from None


def _hidden(pid: int) -> bool:
    """Whether a process has this pid although /proc shows none (hidepid, proc(5))."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass  # EPERM says that it is there
    return True
