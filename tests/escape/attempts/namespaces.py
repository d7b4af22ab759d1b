"""Namespaces: other views of the file system, and other rights in a world of one's own."""

from __future__ import annotations

import os
import signal

from tests.escape.attempts.calls import LIBC, libc, syscall
from tests.escape.attempts.table import Targets, attempt

_NEW = {
    "time": 0x80,
    "mount": 0x20000,
    "cgroup": 0x2000000,
    "uts": 0x4000000,
    "ipc": 0x8000000,
    "user": 0x10000000,
    "pid": 0x20000000,
    "net": 0x40000000,
}
_REMOUNT, _BIND, _DETACH, _RELATIME = 32, 4096, 2, 1 << 21
_AT_FDCWD, _CLONE_TREE, _RECURSIVE = -100, 1, 0x8000


def _unshared(kind: str) -> str:
    libc("unshare", _NEW[kind])
    return f"it is in a new {kind} namespace"


@attempt("make a user namespace", by_host=True)
def new_user_namespace(targets: Targets) -> str:
    return _unshared("user")


@attempt("make a mount namespace")
def new_mount_namespace(targets: Targets) -> str:
    return _unshared("mount")


@attempt("make a pid namespace")
def new_pid_namespace(targets: Targets) -> str:
    return _unshared("pid")


@attempt("make a network namespace")
def new_network_namespace(targets: Targets) -> str:
    return _unshared("net")


@attempt("make an ipc namespace")
def new_ipc_namespace(targets: Targets) -> str:
    return _unshared("ipc")


@attempt("make a uts namespace")
def new_uts_namespace(targets: Targets) -> str:
    return _unshared("uts")


@attempt("make a cgroup namespace")
def new_cgroup_namespace(targets: Targets) -> str:
    return _unshared("cgroup")


@attempt("make a time namespace", by_host=True)
def new_time_namespace(targets: Targets) -> str:
    return _unshared("time")


@attempt("make a child in a user namespace (clone)", by_host=True)
def clone_user_namespace(targets: Targets) -> str:
    number = {"x86_64": 56, "aarch64": 220}[os.uname().machine]
    child = LIBC.syscall(number, _NEW["user"] | signal.SIGCHLD, 0, 0, 0, 0)
    if child == 0:
        os._exit(0)
    if child < 0:
        return _unshared("user")
    os.waitpid(child, 0)
    return "made one"


@attempt("make a child in a user namespace (clone3)", by_host=True)
def clone3_user_namespace(targets: Targets) -> str:
    words = [_NEW["user"], 0, 0, 0, int(signal.SIGCHLD), 0, 0, 0]
    packed = b"".join(word.to_bytes(8, "little") for word in words)
    child = syscall("clone3", packed, len(packed))
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    return "made one"


@attempt("become root of a user namespace (/proc/self/uid_map)", by_host=True)
def uid_map(targets: Targets) -> str:
    uid = os.getuid()
    LIBC.unshare(_NEW["user"])
    with open("/proc/self/uid_map", "w") as file:
        file.write(f"0 {uid} 1")
    return f"it is uid {os.getuid()}"


@attempt("join the namespaces of a process of the host", by_host=True)
def join_victim(targets: Targets) -> str:
    fd = os.open(f"/proc/{targets.victim}/ns/uts", os.O_RDONLY)
    libc("setns", fd, 0)
    return "joined it"


@attempt("join a namespace that it is in already")
def join_own(targets: Targets) -> str:
    libc("setns", os.open("/proc/self/ns/uts", os.O_RDONLY), 0)
    return "joined it"


def _mounted(source: bytes, kind: bytes | None, flags: int, targets: Targets) -> str:
    place = os.path.join(targets.room, "place")
    os.makedirs(place, exist_ok=True)
    libc("mount", source, place.encode(), kind, flags, None)
    libc("umount2", place.encode(), _DETACH)
    return f"mounted {source.decode()}"


@attempt("mount a tmpfs")
def mount_tmpfs(targets: Targets) -> str:
    return _mounted(b"tmpfs", b"tmpfs", 0, targets)


@attempt("mount a proc")
def mount_proc(targets: Targets) -> str:
    return _mounted(b"proc", b"proc", 0, targets)


@attempt("bind a directory")
def mount_bind(targets: Targets) -> str:
    return _mounted(b"/usr", None, _BIND, targets)


@attempt("make /usr or / writable by a remount")
def remount(targets: Targets) -> str:
    last: OSError = OSError(0, "nothing tried")
    for path in (b"/usr", b"/"):
        try:
            libc("mount", None, path, None, _REMOUNT | _BIND | _RELATIME, None)
        except OSError as error:
            last = error
        else:
            return f"remounted {path.decode()}"
    raise last


@attempt("take off what covers its room")
def unmount(targets: Targets) -> str:
    LIBC.mount(b"tmpfs", targets.room.encode(), b"tmpfs", 0, None)
    libc("umount2", targets.room.encode(), _DETACH)
    return "took it off"


@attempt("copy a tree of mounts (open_tree)")
def open_tree(targets: Targets) -> str:
    os.close(syscall("open_tree", _AT_FDCWD, b"/", _CLONE_TREE | _RECURSIVE))
    return "copied it"


@attempt("put a mount elsewhere (move_mount)")
def move_mount(targets: Targets) -> str:
    place = os.path.join(targets.room, "place")
    os.makedirs(place, exist_ok=True)
    empty_path = 4
    try:
        tree = syscall("open_tree", _AT_FDCWD, b"/usr", _CLONE_TREE)
    except OSError:
        tree = os.open("/usr", os.O_PATH)
    syscall("move_mount", tree, b"", _AT_FDCWD, place.encode(), empty_path)
    libc("umount2", place.encode(), _DETACH)
    return "put it into its room"


@attempt("make a file system (fsopen)")
def fsopen(targets: Targets) -> str:
    os.close(syscall("fsopen", b"tmpfs", 0))
    return "made one"


@attempt("change the attributes of a mount (mount_setattr)")
def mount_setattr(targets: Targets) -> str:
    clear_read_only = bytes(8) + (1).to_bytes(8, "little") + bytes(16)
    syscall("mount_setattr", _AT_FDCWD, b"/", 0, clear_read_only, len(clear_read_only))
    return "/ is writable"


@attempt("change its root (pivot_root)", by_host=True)
def pivot_root(targets: Targets) -> str:
    os.chdir("/")
    # What is asked for can't be: who may ask is told EINVAL or EBUSY, and nothing is done.
    try:
        syscall("pivot_root", b"/usr", b"/usr")
    except OSError as error:
        if isinstance(error, PermissionError):
            raise
    return "it might"


@attempt("change its root (chroot)")
def chroot(targets: Targets) -> str:
    os.chroot(targets.room)
    return "changed it"
