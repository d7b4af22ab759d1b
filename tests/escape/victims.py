"""Victims: what the host has that a hostile program may want, made for it and gone afterwards."""

from __future__ import annotations

import ctypes
import hashlib
import os
import resource
import socket
import stat
import subprocess
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.escape.attempts.calls import LIBC, checked, libc, syscall

_IPC_CREAT, _IPC_RMID = 0o1000, 0
_JOIN_SESSION, _SESSION = 1, -3


@dataclass(frozen=True, slots=True, kw_only=True)
class Listeners:
    """Sockets of the host, each of which must hear from nobody."""

    tcp: socket.socket
    tcp6: socket.socket | None
    udp: socket.socket
    abstract: socket.socket
    path: socket.socket

    @property
    def abstract_name(self) -> str:
        name = self.abstract.getsockname()
        assert isinstance(name, bytes)
        return name[1:].decode()

    def heard(self) -> list[str]:
        """Which of them somebody has come to since this was last asked."""
        found = []
        for name in ("tcp", "tcp6", "udp", "abstract", "path"):
            sock = getattr(self, name)
            if sock is not None and _heard(sock):
                found.append(name)
        return found


def _heard(sock: socket.socket) -> bool:
    try:
        if sock.type == socket.SOCK_DGRAM:
            sock.recv(100)
        else:
            sock.accept()[0].close()
    except BlockingIOError:
        return False
    return True


@contextmanager
def listeners(directory: Path) -> Iterator[Listeners]:
    """One of each kind; nobody accepts what comes in, but it is counted."""
    with ExitStack() as stack:

        def listening(
            family: int, address: object, kind: int = socket.SOCK_STREAM
        ) -> socket.socket:
            sock = stack.enter_context(socket.socket(family, kind))
            sock.bind(address)  # type: ignore[arg-type]  # an address of whatever family
            if kind == socket.SOCK_STREAM:
                sock.listen(64)
            sock.settimeout(0)
            return sock

        path = directory / "listener.sock"
        unix, tcp6 = socket.AF_UNIX, None
        if Path("/proc/net/if_inet6").exists() and Path("/proc/net/if_inet6").read_text():
            tcp6 = listening(socket.AF_INET6, ("::1", 0))
        made = Listeners(
            tcp=listening(socket.AF_INET, ("127.0.0.1", 0)),
            tcp6=tcp6,
            udp=listening(socket.AF_INET, ("127.0.0.1", 0), socket.SOCK_DGRAM),
            abstract=listening(unix, f"\0vmsandbox-escape-{os.getpid()}"),
            path=listening(unix, str(path)),
        )
        path.chmod(0o777)
        yield made


@contextmanager
def victim() -> Iterator[subprocess.Popen[bytes]]:
    """A process of the host, in a session of its own."""
    with subprocess.Popen(["sleep", "600"], start_new_session=True) as process:
        try:
            while Path(f"/proc/{process.pid}/comm").read_text() != "sleep\n":
                time.sleep(0.001)
            yield process
        finally:
            process.kill()


def state_of_process(pid: int) -> dict[str, object]:
    """All of a process that others might change."""
    return {
        "comm": Path(f"/proc/{pid}/comm").read_text().strip(),
        "nice": os.getpriority(os.PRIO_PROCESS, pid),
        "affinity": sorted(os.sched_getaffinity(pid)),
        "core": resource.prlimit(pid, resource.RLIMIT_CORE),
    }


def state_of_file(path: Path) -> dict[str, object]:
    """All of a file that others might change."""
    state = path.stat()
    return {
        "digest": hashlib.sha256(path.read_bytes()).hexdigest(),
        "mode": stat.filemode(state.st_mode),
        "owner": (state.st_uid, state.st_gid),
        "size": state.st_size,
        "links": state.st_nlink,
        "mtime": state.st_mtime_ns,
        "ctime": state.st_ctime_ns,
        "attributes": os.listxattr(path),
    }


@contextmanager
def ipc_objects() -> Iterator[int]:
    """System V shared memory, semaphores and messages under one key."""
    key = 0x56000000 | os.getpid() & 0xFFFFFF
    with ExitStack() as undo:
        shm = libc("shmget", key, 4096, _IPC_CREAT | 0o600)
        undo.callback(libc, "shmctl", shm, _IPC_RMID, None)
        sem = libc("semget", key, 1, _IPC_CREAT | 0o600)
        undo.callback(libc, "semctl", sem, 0, _IPC_RMID)
        queue = libc("msgget", key, _IPC_CREAT | 0o600)
        undo.callback(libc, "msgctl", queue, _IPC_RMID, None)
        yield key


def remove_shared_memory(keys: Iterable[int]) -> None:
    """Take away what outlives the processes that made it."""
    for key in keys:
        libc("shmctl", libc("shmget", key, 0, 0), _IPC_RMID, None)


@contextmanager
def message_queue() -> Iterator[str]:
    """A POSIX message queue, by name."""
    name = f"/vmsandbox-escape-{os.getpid()}"
    fd = checked("mq_open", LIBC.mq_open(name.encode(), os.O_CREAT | os.O_RDWR, 0o600, None))
    try:
        yield name
    finally:
        os.close(fd)
        libc("mq_unlink", name.encode())


@contextmanager
def shared_file() -> Iterator[Path]:
    """POSIX shared memory."""
    path = Path(f"/dev/shm/vmsandbox-escape-{os.getpid()}")
    path.write_text("shared")
    try:
        yield path
    finally:
        path.unlink()


def session_key() -> int:
    """A key in a session keyring of our own, which ends with us; 0 where there are none."""
    try:
        syscall("keyctl", _JOIN_SESSION, None)
        return syscall("add_key", b"user", b"vmsandbox-escape", b"precious", 8, _SESSION)
    except OSError:
        return 0


def file_handle(path: Path) -> str:
    """struct file_handle of a file, as name_to_handle_at(2) makes it, in hexadecimal digits."""
    room_for = 128
    handle = ctypes.create_string_buffer(room_for.to_bytes(4, "little"), 8 + room_for)
    mount = ctypes.c_int()
    at_fdcwd = -100
    done = LIBC.name_to_handle_at(at_fdcwd, os.fsencode(path), handle, ctypes.byref(mount), 0)
    checked("name_to_handle_at", done)
    return handle.raw.hex()
