"""IPC: shared memory, semaphores, queues, and keys of the host."""

from __future__ import annotations

import ctypes
import os

from tests.escape.attempts.calls import LIBC, checked, libc, syscall
from tests.escape.attempts.table import Targets, attempt

_KEYCTL_SEARCH, _KEYCTL_READ = 10, 11
_SESSION, _USER = -3, -4


@attempt("find System V shared memory of the host")
def shared_memory(targets: Targets) -> str:
    return f"found {libc('shmget', targets.ipc_key, 0, 0)}"


@attempt("find System V shared memory of the other machine, and of another worker's")
def neighbours_memory(targets: Targets) -> str:
    last: OSError = OSError(2, "none")
    for key in targets.neighbour_keys:
        try:
            return f"found {libc('shmget', key, 0, 0)}"
        except OSError as error:
            last = error
    raise last


@attempt("find System V semaphores of the host")
def semaphores(targets: Targets) -> str:
    return f"found {libc('semget', targets.ipc_key, 0, 0)}"


@attempt("find a System V message queue of the host")
def messages(targets: Targets) -> str:
    return f"found {libc('msgget', targets.ipc_key, 0)}"


@attempt("open a POSIX message queue of the host")
def message_queue(targets: Targets) -> str:
    LIBC.mq_open.restype = ctypes.c_int
    os.close(libc("mq_open", targets.queue.encode(), os.O_RDONLY))
    return "opened it"


@attempt("read POSIX shared memory of the host (/dev/shm)")
def posix_shared_memory(targets: Targets) -> str:
    with open(targets.shared_file, "rb") as file:
        return f"read {len(file.read())} bytes"


@attempt("read a key of the session in which the tests run")
def session_key(targets: Targets) -> str:
    buffer = ctypes.create_string_buffer(64)
    return f"read {syscall('keyctl', _KEYCTL_READ, targets.key, buffer, 64)} bytes"


@attempt("find a key in the session's keyring")
def search_session(targets: Targets) -> str:
    found = syscall("keyctl", _KEYCTL_SEARCH, _SESSION, b"user", b"vmsandbox-escape", 0)
    return f"found {found}"


@attempt("put a key into the user's keyring")
def user_keyring(targets: Targets) -> str:
    key = syscall("add_key", b"user", b"vmsandbox-was-here", b"x", 1, _USER)
    keyctl_unlink = 9
    syscall("keyctl", keyctl_unlink, key, _USER)
    return "put one, and removed it"


@attempt("list the keys of the host")
def list_keys(targets: Targets) -> str:
    with open("/proc/keys") as file:
        return f"read {len(file.read())} characters"


@attempt("list System V IPC of the host")
def list_ipc(targets: Targets) -> str:
    with open("/proc/sysvipc/shm") as file:
        return f"read {len(file.read())} characters"


@attempt("find System V shared memory of the host by counting")
def count_shared_memory(targets: Targets) -> str:
    shm_stat = 13  # by its place in the kernel's table
    for place in range(256):
        number = LIBC.shmctl(place, shm_stat, ctypes.create_string_buffer(256))
        if number >= 0:
            return f"{number} is there"
    return f"{checked('shmctl', -1)}"
