"""Resources: taking more than its share."""

from __future__ import annotations

import fcntl
import mmap
import os
import resource
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from tests.escape.attempts.calls import libc
from tests.escape.attempts.table import Refused, Targets, attempt

_MIB = 1 << 20
_BOMB = "no host should be tried so"
_ONE_USER = "the kernel counts it for a user, not for a namespace"

PROCESSES, ROOM_MIB, ROOM_FILES, OPEN_FILES = 600, 32, 100_000, 1100
INOTIFY, PIPES, SIGNALS = 16, 64, 2000
RESERVED_MIB = 6 * 1024


def _count(take: Callable[[int], object], *, at_most: int) -> int:
    """How often something can be taken."""
    for number in range(at_most):
        try:
            take(number)
        except OSError:
            return number
    return at_most


def _verdict(taken: int, *, at_most: int, what: str) -> str:
    if taken < at_most:
        raise Refused(f"{taken} {what}, and no more")
    return f"took {taken} {what}"


@contextmanager
def _forked() -> Iterator[list[int]]:
    """Children, who are ended."""
    children: list[int] = []
    try:
        yield children
    finally:
        for child in children:
            os.kill(child, signal.SIGKILL)
        for child in children:
            os.waitpid(child, 0)


def _fork(children: list[int]) -> None:
    child = os.fork()
    if child == 0:
        signal.pause()
        os._exit(0)
    children.append(child)


@attempt(f"run {PROCESSES} processes", harmful=True, unproved=_BOMB)
def fork_bomb(targets: Targets) -> str:
    with _forked() as children:
        taken = _count(lambda _: _fork(children), at_most=PROCESSES)
    return _verdict(taken, at_most=PROCESSES, what="processes")


@attempt(f"write {ROOM_MIB} MiB into its room")
def fill_room(targets: Targets) -> str:
    path = f"{targets.room}/full"
    with open(path, "wb", buffering=0) as file:
        taken = _count(lambda _: file.write(b"x" * _MIB), at_most=ROOM_MIB)
        size = os.fstat(file.fileno()).st_size
    os.unlink(path)
    if size < ROOM_MIB * _MIB:
        raise Refused(f"{size} bytes, and no more")
    return f"wrote {taken} MiB"


@attempt(
    f"make {ROOM_FILES:,} empty files in its room: each takes memory of the kernel's",
    harmful=True,
    unproved=_BOMB,
)
def fill_room_with_files(targets: Targets) -> str:
    folder = f"{targets.room}/files"
    os.mkdir(folder)
    try:
        at = os.open(folder, os.O_RDONLY)
        taken = _count(
            lambda number: os.close(os.open(str(number), os.O_CREAT | os.O_WRONLY, dir_fd=at)),
            at_most=ROOM_FILES,
        )
    finally:
        for number in range(taken):
            os.unlink(str(number), dir_fd=at)
        os.rmdir(folder)
    return _verdict(taken, at_most=ROOM_FILES, what="files")


@attempt(
    "touch 256 MiB more memory than it was given",
    not_apart="only a control group counts memory that is used, and rootless tiers seldom have one",
    bounded_by="memory",
    harmful=True,
    unproved=_BOMB,
)
def eat_memory(targets: Targets) -> str:
    size = (targets.memory_mib + 256) * _MIB
    with mmap.mmap(-1, size) as memory:
        for place in range(0, size, 4096):
            memory[place] = 1
    return f"touched {size // _MIB} MiB"


@attempt("reserve more address space than it was given")
def reserve_addresses(targets: Targets) -> str:
    noreserve, none = 0x4000, 0
    size = (targets.memory_mib + RESERVED_MIB) * _MIB
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | noreserve
    mmap.mmap(-1, size, flags=flags, prot=none).close()
    return f"reserved {size // _MIB} MiB"


@attempt(f"open {OPEN_FILES} files", by_host=True)
def open_files(targets: Targets) -> str:
    with ExitStack() as files:
        taken = _count(
            lambda _: files.callback(os.close, os.open("/dev/null", os.O_RDONLY)),
            at_most=OPEN_FILES,
        )
    return _verdict(taken, at_most=OPEN_FILES, what="files")


@attempt(f"take {INOTIFY} of the inotify instances that a user has")
def inotify_instances(targets: Targets) -> str:
    taken = _count(lambda _: libc("inotify_init"), at_most=INOTIFY)
    return _verdict(taken, at_most=INOTIFY, what="instances")


@attempt(f"leave {SIGNALS} signals pending, of those that a user has")
def pending_signals(targets: Targets) -> str:
    number = signal.SIGRTMIN
    signal.pthread_sigmask(signal.SIG_BLOCK, [number])
    limit, _ = resource.getrlimit(resource.RLIMIT_SIGPENDING)
    taken = _count(lambda _: libc("sigqueue", os.getpid(), number, None), at_most=SIGNALS)
    if limit == resource.RLIM_INFINITY or limit >= SIGNALS:
        return _verdict(taken, at_most=SIGNALS, what="signals")
    raise Refused(f"{taken} signals, and no more")


@attempt(
    f"take {PIPES} pipes of 1 MiB: other processes of the user get small ones then",
    not_apart=_ONE_USER,
    by_host=True,  # on what other processes of the user hold at this moment
)
def pipe_pages(targets: Targets) -> str:
    def take(_: int) -> None:
        _, write = os.pipe()
        fcntl.fcntl(write, fcntl.F_SETPIPE_SZ, _MIB)

    taken = _count(take, at_most=PIPES)
    if taken == 0:
        raise Refused("none")
    return f"took {taken}"


@attempt(
    "send descriptors that nobody takes: too many, and other processes of the user send none",
    not_apart=_ONE_USER + "; but a VMM can send fewer than its user may have open",
    by_host=True,
)
def descriptors_in_flight(targets: Targets) -> str:
    ours, _theirs = socket.socketpair()
    ours.settimeout(0)
    taken = _count(lambda _: socket.send_fds(ours, [b"x"], [0] * 250), at_most=4)
    if taken == 0:
        raise Refused("none")
    return f"{taken * 250} are in flight"


@attempt(
    "use a processor as long as it likes",
    not_apart="machines compete for processors as other processes do",
)
def burn_processor(targets: Targets) -> str:
    limit, _ = resource.getrlimit(resource.RLIMIT_CPU)
    if limit != resource.RLIM_INFINITY:
        raise Refused(f"{limit} seconds")
    return "there is no limit"


_HELD: list[object] = []


def besiege(room: Path) -> dict[str, int]:
    """Take processes, files, signals and the like until there are no more, and keep them."""

    def flood(_: int) -> None:
        ours, theirs = socket.socketpair()
        ours.settimeout(0)
        _HELD.extend((ours, theirs))
        socket.send_fds(ours, [b"x"], [0] * 250)

    def pipe(_: int) -> None:
        _, write = os.pipe()
        fcntl.fcntl(write, fcntl.F_SETPIPE_SZ, _MIB)

    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGRTMIN])
    children: list[int] = []
    with open(room / "full", "wb", buffering=0) as file:
        _count(lambda _: file.write(b"x" * _MIB), at_most=ROOM_MIB)
    os.truncate(room / "full", 8 * _MIB)
    return {
        "descriptors in flight": 250 * _count(flood, at_most=20),
        "inotify": _count(lambda _: libc("inotify_init"), at_most=1000),
        "pipes": _count(pipe, at_most=100),
        "signals": _count(
            lambda _: libc("sigqueue", os.getpid(), signal.SIGRTMIN, None), at_most=200_000
        ),
        "files": _count(lambda _: os.open("/dev/null", os.O_RDONLY), at_most=100_000),
        "processes": _count(lambda _: _fork(children), at_most=100_000),
    }
