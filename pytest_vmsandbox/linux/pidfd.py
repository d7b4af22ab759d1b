"""Processes held by descriptor: such a handle never comes to mean another process."""

from __future__ import annotations

import errno
import os
import select
import sys
from dataclasses import dataclass
from enum import IntFlag

from pytest_vmsandbox.deadline import Deadline
from pytest_vmsandbox.linux.arguments import INT_MAX, bits_of, check_bits, check_fd, check_range
from pytest_vmsandbox.linux.libc import call_libc, os_error
from pytest_vmsandbox.linux.owned_fd import OwnedFd

_LAST_SIGNAL = 64  # _NSIG of the kernel, on all machines that we know


class PidFDFlags(IntFlag):
    """PIDFD_* of <linux/pidfd.h> for pidfd_open(2); each also without its prefix."""

    PIDFD_NONBLOCK = NONBLOCK = 0o4000
    PIDFD_THREAD = THREAD = 0o200


@dataclass(frozen=True, slots=True, kw_only=True)
class ExitStatus:
    """How a child ended: `returncode` as in subprocess, -N for signal N."""

    pid: int
    returncode: int


def pidfd_open(pid: int, flags: int = 0) -> OwnedFd:
    """Open process `pid`; the descriptor is the caller's (pidfd_open(2), Linux 5.3).

    CLOEXEC is always set. The pid may have been reused before this call: where that matters, use
    `ProcessIdentity.open_pidfd`. A zombie can be opened too. ProcessLookupError: there is none.
    """
    number = check_range(pid, lowest=1, highest=INT_MAX, argument="pidfd_open: pid")
    bits = check_bits(flags, allowed=bits_of(PidFDFlags), argument="pidfd_open: flags")
    return OwnedFd(call_libc("pidfd_open", number, bits))


def pidfd_send_signal(pidfd: int, signal: int) -> None:
    """Send `signal` to that process and no other (pidfd_send_signal(2), Linux 5.1).

    ProcessLookupError once it was reaped. To a zombie it succeeds and does nothing. Signal 0 only
    asks whether one could be sent.
    """
    number = check_range(signal, lowest=0, highest=_LAST_SIGNAL, argument="signal")
    call_libc("pidfd_send_signal", check_fd(pidfd, argument="pidfd"), number, None, 0)


def pidfd_is_alive(pidfd: int) -> bool:
    """Whether the process still runs: a zombie does not, be it our child or not."""
    return not pidfd_wait_exit(pidfd, deadline=Deadline.after(seconds=0))


def pidfd_wait_exit(pidfd: int, *, deadline: Deadline) -> bool:
    """Wait until the process has ended, whoever its parent is; False when the deadline passed.

    It looks at least once, even after the deadline. The process is not reaped.
    """
    poller = select.poll()
    # A pidfd is readable from the moment its process is a zombie (pidfd_open(2)).
    poller.register(check_fd(pidfd, argument="pidfd"), select.POLLIN)
    timeout_s = deadline.timeout_s
    events = poller.poll(None if timeout_s is None else timeout_s * 1000)
    if any(event & select.POLLNVAL for _fd, event in events):
        raise os_error(errno.EBADF, "poll of a pidfd")
    return bool(events)


def pidfd_reap(pidfd: int) -> ExitStatus | None:
    """Take the exit status of our child, which ends it for good; None while it still runs.

    ChildProcessError where it is not our child, or was reaped before (waitid(2), P_PIDFD).
    """
    if sys.platform != "linux":
        raise os_error(errno.ENOSYS, "waitid")
    seen = os.waitid(os.P_PIDFD, check_fd(pidfd, argument="pidfd"), os.WEXITED | os.WNOHANG)
    if seen is None:
        return None
    exited = seen.si_code == os.CLD_EXITED
    return ExitStatus(pid=seen.si_pid, returncode=seen.si_status if exited else -seen.si_status)
