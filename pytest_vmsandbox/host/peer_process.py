"""The process at the other end of a UNIX socket: is it the one that we started, and whose is it."""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pytest_vmsandbox.linux.process_identity import ProcessIdentity, ProcessStat

# getsockopt(2), since Linux 6.5; the number is that of x86, arm, riscv, s390 and powerpc.
SO_PEERPIDFD = 77

# macOS, <sys/un.h>: the pid of the peer, at level SOL_LOCAL.
_SOL_LOCAL = 0
_LOCAL_PEERPID = 2

_INT = struct.Struct("i")

_PROC = Path("/proc")
_DEFAULT_OVERFLOW_UID = 65534


@dataclass(frozen=True, slots=True)
class Difference:
    """What shows that two processes are not one."""

    what: str
    expected: object
    actual: object

    def __str__(self) -> str:
        return f"expected {self.what} {self.expected}, got {self.actual}"


def find_difference_linux(
    sock: socket.socket, *, peer_pid: int | None, identity: ProcessIdentity, pidfd: int | None
) -> Difference | None:
    """What tells the peer of `sock` from `identity`; None when they are one and the same.

    `pidfd` is ours of that process, where we have one. Raises OSError when the kernel does not
    tell, or the process is gone.
    """
    if peer_pid != identity.pid:
        return Difference("pid", identity.pid, peer_pid)
    with _peer_pidfd(sock) as peer:
        if peer is not None and pidfd is not None:
            if not is_same_process(peer, pidfd):
                return Difference("process", identity.pid, "another one, by its pidfd")
            return None
        # Where the kernel gives a handle of the peer, its pid can't be reused in between.
        if peer is not None and pid_of(peer) != identity.pid:
            return Difference("process", identity.pid, "one that has ended")
        started = ProcessStat.read(identity.pid).start_ticks
    if started != identity.start_ticks:
        return Difference("start time", identity.start_ticks, started)
    return None


def find_difference_macos(sock: socket.socket, *, identity: ProcessIdentity) -> Difference | None:
    """The same by the pid alone, which is all that macOS tells."""
    (pid,) = _INT.unpack(sock.getsockopt(_SOL_LOCAL, _LOCAL_PEERPID, _INT.size))
    return None if pid == identity.pid else Difference("pid", identity.pid, pid)


@contextmanager
def _peer_pidfd(sock: socket.socket) -> Iterator[int | None]:
    """A pidfd of the peer, closed afterwards; None where the kernel is older than 6.5."""
    try:
        answer = sock.getsockopt(socket.SOL_SOCKET, SO_PEERPIDFD, _INT.size)
    except OSError as error:
        if error.errno != errno.ENOPROTOOPT:
            raise
        yield None
        return
    (pidfd,) = _INT.unpack(answer)
    try:
        yield pidfd
    finally:
        os.close(pidfd)


def is_same_process(pidfd: int, other: int) -> bool:
    """Whether two pidfds are of one process, which has not been reaped."""
    # Since Linux 6.9 a process has an inode of its own in pidfs; before, all pidfds share one.
    same_inode = os.fstat(pidfd).st_ino == os.fstat(other).st_ino
    return same_inode and pid_of(pidfd) == pid_of(other) > 0


def pid_of(pidfd: int) -> int:
    """The pid that a pidfd refers to: -1 once reaped, 0 if in a pid namespace that we can't see.

    Raises ValueError for a descriptor that is no pidfd. Source: proc_pid_fdinfo(5).
    """
    for line in Path(f"/proc/self/fdinfo/{pidfd}").read_text().splitlines():
        key, _, value = line.partition(":")
        if key == "Pid":
            return int(value)
    raise ValueError(f"descriptor {pidfd} is not a pidfd")


def stands_for_others(uid: int) -> bool:
    """Whether `uid` may be what the kernel shows here for every user that has no uid here.

    It does so in a user namespace, with the overflow uid (user_namespaces(7), "Unmapped user and
    group IDs"). Where that is mapped, as it is in the initial namespace, it is a user of its own;
    where the map can't be read, it is taken for one that is not.
    """
    if uid != _read_overflow_uid():
        return False
    try:
        lines = (_PROC / "self/uid_map").read_text(encoding="ascii").splitlines()
    except OSError:
        return True
    ranges = [[int(word) for word in line.split()] for line in lines]
    return not any(inside <= uid < inside + count for inside, _outside, count in ranges)


def _read_overflow_uid() -> int:
    try:
        return int((_PROC / "sys/kernel/overflowuid").read_text(encoding="ascii"))
    except OSError:
        return _DEFAULT_OVERFLOW_UID


def read_effective_uid(pid: int) -> int | None:
    """The effective uid that process `pid` has now; None where /proc does not show the process.

    It is not there, or hidden (proc(5), hidepid). Source: proc_pid_status(5), "Uid".
    """
    try:
        lines = (_PROC / str(pid) / "status").read_bytes().splitlines()
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return None
    for line in lines:
        if line.startswith(b"Uid:"):
            _real, effective, _saved, _file_system = line.removeprefix(b"Uid:").split()
            return int(effective)
    raise ValueError(f"no line with uids in the status of process {pid}")
