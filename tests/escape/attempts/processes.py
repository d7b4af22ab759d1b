"""Processes: seeing, signalling, reading and slowing down those of the host."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import resource
import signal
import socket
import struct

from tests.escape.attempts.calls import libc, syscall
from tests.escape.attempts.table import Refused, Targets, attempt

_PTRACE_SEIZE, _PTRACE_DETACH = 0x4206, 17


class _Piece(ctypes.Structure):
    """struct iovec"""

    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


@attempt("see a process of the host")
def see(targets: Targets) -> str:
    with open(f"/proc/{targets.victim}/comm") as file:
        return f"saw {file.read().strip()}"


@attempt("see any process but its own")
def see_any(targets: Targets) -> str:
    ours = {"1", str(os.getpid())}
    others = {name for name in os.listdir("/proc") if name.isdigit()} - ours
    if not others:
        raise Refused("there are only its own")
    return f"saw {len(others)}"


@attempt("signal a process of the host")
def signal_victim(targets: Targets) -> str:
    os.kill(targets.victim, signal.SIGCONT)
    return "SIGCONT was sent"


@attempt("signal the process that runs the tests, and the warden")
def signal_driver(targets: Targets) -> str:
    last: OSError = ProcessLookupError(errno.ESRCH, "none")
    for pid in (targets.driver, targets.warden):
        try:
            os.kill(pid, 0)
        except OSError as error:
            last = error
        else:
            return f"{pid} could be signalled"
    raise last


@attempt("signal everybody (kill -1)")
def signal_everybody(targets: Targets) -> str:
    os.kill(-1, 0)
    return "somebody could be signalled"


@attempt("signal whoever has a pid up to 100,000")
def signal_any_pid(targets: Targets) -> str:
    for pid in range(2, 100_000):
        if pid == os.getpid():
            continue
        try:
            os.kill(pid, 0)
        except OSError:
            continue
        return f"{pid} could be signalled"
    raise Refused("nobody could be")


@attempt("signal a process group of the host")
def signal_group(targets: Targets) -> str:
    os.killpg(targets.victim, 0)
    return "it could be signalled"


@attempt("trace a process of the host (ptrace)", by_host=True)
def ptrace(targets: Targets) -> str:
    libc("ptrace", _PTRACE_SEIZE, targets.victim, 0, 0)
    return "seized it"


@attempt("read the memory of a process of the host (process_vm_readv)", by_host=True)
def read_memory(targets: Targets) -> str:
    buffer = ctypes.create_string_buffer(8)
    # An address that nobody has: EFAULT is told only to who may read.
    ours = _Piece(ctypes.addressof(buffer), 8)
    theirs = _Piece(4096, 8)
    try:
        one = ctypes.byref(ours), 1, ctypes.byref(theirs), 1, 0
        libc("process_vm_readv", targets.victim, *one)  # type: ignore[arg-type]  # pointers
    except OSError as error:
        if error.errno != errno.EFAULT:
            raise
    return "it may be read"


@attempt("open the memory of a process of the host (/proc/N/mem)", by_host=True)
def open_memory(targets: Targets) -> str:
    os.close(os.open(f"/proc/{targets.victim}/mem", os.O_RDWR))
    return "it is open"


@attempt("hold a process of the host by a pidfd")
def pidfd(targets: Targets) -> str:
    os.close(os.pidfd_open(targets.victim))
    return "holds it"


@attempt("take a descriptor out of another process (pidfd_getfd)")
def pidfd_getfd(targets: Targets) -> str:
    # Out of its own child, so that nothing but the call counts.
    holder = os.fork()
    if holder == 0:
        signal.pause()
    try:
        os.close(syscall("pidfd_getfd", os.pidfd_open(holder), 0, 0))
    finally:
        os.kill(holder, signal.SIGKILL)
        os.waitpid(holder, 0)
    return "took it"


@attempt("compare what processes share (kcmp)", by_host=True)
def kcmp(targets: Targets) -> str:
    syscall("kcmp", os.getpid(), os.getpid(), 0, 0, 1)
    return "compared"


@attempt("slow down a process of the host (setpriority)")
def priority(targets: Targets) -> str:
    os.setpriority(os.PRIO_PROCESS, targets.victim, 5)
    return "it is slower now"


@attempt(
    "slow down all processes of the same user",
    harmful=True,
    unproved="it would slow down those of whoever runs the tests",
)
def priority_of_user(targets: Targets) -> str:
    # Of our own processes it is our own matter: the test looks whether others became slower.
    os.setpriority(os.PRIO_USER, os.getuid(), 5)
    try:
        slow = os.getpriority(os.PRIO_PROCESS, targets.victim)
    except ProcessLookupError:
        raise Refused("it reached only its own") from None
    return f"the victim is at {slow}"


@attempt("speed itself up")
def own_priority(targets: Targets) -> str:
    os.setpriority(os.PRIO_PROCESS, 0, -5)
    return "it is faster now"


@attempt("become a real-time process")
def real_time(targets: Targets) -> str:
    os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    return "it is one"


@attempt("bind a process of the host to processors")
def affinity(targets: Targets) -> str:
    os.sched_setaffinity(targets.victim, os.sched_getaffinity(0))
    return "bound it"


@attempt("limit a process of the host (prlimit)")
def limit_victim(targets: Targets) -> str:
    now = resource.prlimit(targets.victim, resource.RLIMIT_CORE)
    resource.prlimit(targets.victim, resource.RLIMIT_CORE, now)
    return "set its limit to what it was"


@attempt("raise a limit of its own", by_host=True)
def raise_limit(targets: Targets) -> str:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    libc("setrlimit", resource.RLIMIT_NOFILE, struct.pack("LL", hard + 1, hard + 1))
    return "raised it"


@attempt("have the kernel signal a process of the host (F_SETOWN)")
def signal_by_kernel(targets: Targets) -> str:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        libc("fcntl", ours.fileno(), fcntl.F_SETOWN, targets.victim)
    return "it would be signalled"


@attempt("change the I/O priority of a process of the host")
def io_priority(targets: Targets) -> str:
    of_process, best_effort = 1, 2
    syscall("ioprio_set", of_process, targets.victim, best_effort << 13 | 7)
    return "changed it"
