"""Kernel: calls that concern the whole host, and devices. Each stops one step before harm."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import glob
import os
import pty
import time

from tests.escape.attempts.calls import LIBC, checked, libc, passes, syscall
from tests.escape.attempts.table import Refused, Targets, attempt

_DISKS = (
    "/dev/sd?",
    "/dev/vd?",
    "/dev/xvd?",
    "/dev/nvme?n?",
    "/dev/loop?",
    "/dev/zram?",
    "/dev/dm-?",
)
_TIOCSTI = 0x5412


def _opened(*patterns: str) -> str:
    found = [path for pattern in patterns for path in glob.glob(pattern)]
    last: OSError = FileNotFoundError(errno.ENOENT, "there is none")
    for path in found:
        try:
            os.close(os.open(path, os.O_RDWR | os.O_NONBLOCK))
        except OSError as error:
            last = error
        else:
            return f"opened {path}"
    raise last


@attempt("open a disk of the host", by_host=True)
def disk(targets: Targets) -> str:
    return _opened(*_DISKS)


@attempt("open the host's memory (/dev/mem, /dev/kmem, /dev/port)", by_host=True)
def memory_devices(targets: Targets) -> str:
    return _opened("/dev/mem", "/dev/kmem", "/dev/port")


@attempt("open the kernel's log (/dev/kmsg)", by_host=True)
def kernel_log(targets: Targets) -> str:
    return _opened("/dev/kmsg")


@attempt("make loop devices", by_host=True)
def loop_control(targets: Targets) -> str:
    return _opened("/dev/loop-control")


@attempt("open /dev/fuse", by_host=True)
def fuse(targets: Targets) -> str:
    return _opened("/dev/fuse")


@attempt("open /dev/net/tun", by_host=True)
def tun(targets: Targets) -> str:
    return _opened("/dev/net/tun")


@attempt("open /dev/kvm, which was not granted", by_host=True)
def kvm(targets: Targets) -> str:
    return _opened("/dev/kvm")


@attempt("open the host's vhost devices, vsock and userfaultfd", by_host=True)
def vhost(targets: Targets) -> str:
    return _opened("/dev/vhost-*", "/dev/vsock", "/dev/userfaultfd")


@attempt("open a terminal of the host", by_host=True)
def terminals(targets: Targets) -> str:
    return _opened("/dev/tty*", "/dev/console", "/dev/pts/*", "/dev/vcs*")


@attempt("type into a terminal (TIOCSTI)", by_host=True)
def type_into_terminal(targets: Targets) -> str:
    _, slave = pty.openpty()
    os.setsid()
    tiocsctty = 0x540E
    fcntl.ioctl(slave, tiocsctty, 0)
    fcntl.ioctl(slave, _TIOCSTI, b"x")
    return "typed into one"


@attempt("load a module (init_module)", by_host=True)
def init_module(targets: Targets) -> str:
    return passes("init_module", b"\0" * 64, 64, b"", harmless=errno.ENOEXEC)


@attempt("load a module from a file (finit_module)", by_host=True)
def finit_module(targets: Targets) -> str:
    file = os.open(targets.image, os.O_RDONLY)
    return passes("finit_module", file, b"", 0, harmless=errno.ENOEXEC)


@attempt("load another kernel (kexec_load)", by_host=True)
def kexec(targets: Targets) -> str:
    return passes("kexec_load", 0, 0, None, 0xFF00, harmless=errno.EINVAL)


@attempt("reboot", by_host=True)
def reboot(targets: Targets) -> str:
    return passes("reboot", 0, 0, 0, None, harmless=errno.EINVAL)


@attempt("swap to a file (swapon)", by_host=True)
def swapon(targets: Targets) -> str:
    try:
        libc("swapon", b"/nonexistent/swap", 0)
    except FileNotFoundError:
        return "the kernel looked for the file"
    return "it swaps"


@attempt("account to a file (acct)", by_host=True)
def acct(targets: Targets) -> str:
    try:
        libc("acct", b"/nonexistent/account")
    except FileNotFoundError:
        return "the kernel looked for the file"
    return "it accounts"


@attempt("change quotas", by_host=True)
def quota(targets: Targets) -> str:
    q_getfmt_of_users = 0x800004 << 8
    return passes("quotactl", q_getfmt_of_users, b"/nonexistent", 0, None, harmless=errno.ENOENT)


@attempt("run a program in the kernel (bpf)", by_host=True)
def bpf(targets: Targets) -> str:
    bpf_prog_load = 5
    return passes("bpf", bpf_prog_load, bytes(64), 64, harmless=errno.E2BIG)


@attempt("count events of the processors (perf_event_open)", by_host=True)
def perf(targets: Targets) -> str:
    software, size = 1, 64
    attributes = software.to_bytes(4, "little") + size.to_bytes(4, "little") + bytes(size - 8)
    os.close(syscall("perf_event_open", attributes, 0, -1, -1, 0))
    return "counts them"


@attempt("handle page faults itself (userfaultfd)", by_host=True)
def userfaultfd(targets: Targets) -> str:
    os.close(syscall("userfaultfd", os.O_CLOEXEC))
    return "does"


@attempt("use io_uring", by_host=True)
def io_uring(targets: Targets) -> str:
    os.close(syscall("io_uring_setup", 1, ctypes.create_string_buffer(120)))
    return "does"


@attempt("use the processor's ports (iopl, ioperm)", by_host=True)
def ports(targets: Targets) -> str:
    if not hasattr(LIBC, "iopl"):
        raise Refused("this machine has none")
    try:
        libc("iopl", 3)
    except OSError:
        libc("ioperm", 0x80, 1, 1)
    return "may"


@attempt("read the kernel's messages (syslog)", by_host=True)
def syslog(targets: Targets) -> str:
    read_all = 3
    count = checked("klogctl", LIBC.klogctl(read_all, ctypes.create_string_buffer(4096), 4096))
    return f"read {count} bytes"


@attempt("set the clock", harmful=True, unproved="it would set the host's")
def clock(targets: Targets) -> str:
    time.clock_settime(time.CLOCK_REALTIME, time.time())
    return "set it"


@attempt("look at the clock's discipline (adjtimex)")
def adjtimex(targets: Targets) -> str:
    libc("adjtimex", ctypes.create_string_buffer(512))
    return "saw it"


@attempt("change the host's name")
def hostname(targets: Targets) -> str:
    name = os.uname().nodename.encode()
    libc("sethostname", name, len(name))
    return "set it to what it was"


@attempt(
    "see how busy the host is (sysinfo)",
    not_apart="memory, load and uptime of the host have no namespace",
)
def sysinfo(targets: Targets) -> str:
    libc("sysinfo", ctypes.create_string_buffer(512))
    return "saw it"


@attempt(
    "see which kernel the host runs (uname)",
    not_apart="the kernel is the host's; the host's name is not shown",
)
def kernel_version(targets: Targets) -> str:
    return os.uname().release
