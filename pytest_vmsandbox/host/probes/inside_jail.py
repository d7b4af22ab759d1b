"""The inside of the probe `jail`: what the warden does to start a VMM, in miniature.

A program of its own, sent to a fresh Python like `inside.py`, and like it made of the standard
library alone. It makes the warden's own system calls, the same namespaces, and maps the user as
whom VMMs will run: whatever refuses the warden one of them must refuse it here.

    python -I -S - jail SECONDS SEARCH_PATH [userns]

It prints one JSON object, `{"verdict": ..., "evidence": ...}`, and ends after SECONDS at the
latest. All that it makes lives in its own namespaces and ends with it.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import platform
import pwd
import signal
import socket
import stat
import struct
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

# sched.h
CLONE_NEWNS, CLONE_NEWCGROUP, CLONE_NEWUTS = 0x00020000, 0x02000000, 0x04000000
CLONE_NEWIPC, CLONE_NEWUSER, CLONE_NEWPID = 0x08000000, 0x10000000, 0x20000000
CLONE_NEWNET = 0x40000000

# sys/mount.h, linux/mount.h, linux/fcntl.h, linux/openat2.h
MS_NOSUID, MS_NODEV, MS_NOEXEC = 0x2, 0x4, 0x8
MS_PRIVATE, MS_SLAVE, MNT_DETACH = 0x40000, 0x80000, 0x2
MOUNT_ATTR_RDONLY, MOUNT_ATTR_NOSUID, MOUNT_ATTR_NODEV, MOUNT_ATTR_NOEXEC = 1, 2, 4, 8
OPEN_TREE_CLONE, MOVE_MOUNT_F_EMPTY_PATH, MOVE_MOUNT_T_EMPTY_PATH = 0x1, 0x4, 0x40
FSOPEN_CLOEXEC, FSCONFIG_SET_STRING, FSCONFIG_CMD_CREATE = 1, 1, 6
AT_FDCWD, AT_EMPTY_PATH, AT_RECURSIVE = -100, 0x1000, 0x8000
RESOLVE_IN_ROOT, RESOLVE_NO_MAGICLINKS = 0x10, 0x02

# linux/prctl.h, linux/seccomp.h
PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 22, 38
SECCOMP_MODE_FILTER, RETURN, SECCOMP_RET_ALLOW = 2, 0x06, 0x7FFF0000

# Those of Linux 5 have one number on all machines; an older C library has no wrappers for them.
NUMBERS = {
    "open_tree": 428,
    "move_mount": 429,
    "fsopen": 430,
    "fsconfig": 431,
    "fsmount": 432,
    "openat2": 437,
    "mount_setattr": 442,
    "pivot_root": {"x86_64": 155, "s390x": 217}.get(platform.machine(), 41),
}

# The warden filters the system calls of VMMs on these (linux/seccomp.py).
FILTERED_MACHINES = ("x86_64", "aarch64")

VMM_USER = "qemu-vm"
FREE_UIDS = range(61184, 65520)  # without that user: those that nobody has for good
KVM = "/dev/kvm"

libc = ctypes.CDLL(None, use_errno=True)


class Unusable(Exception):
    """It was done and did not have its effect."""


class TooLate(Exception):
    """The time given is over."""


def check(result: int, call: str, path: str = "") -> int:
    """The result of a system call, or an OSError that names call and path."""
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{call}: {os.strerror(number)}", path or None)
    return result


@contextmanager
def named(call: str) -> Iterator[None]:
    """Let an error of Python's own wrapper name the call."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, f"{call}: {error.strerror}", error.filename) from error


def call(name: str, *arguments: Any, path: str = "") -> int:
    """Make a system call by its number."""
    words = [ctypes.c_long(word) if isinstance(word, int) else word for word in arguments]
    return check(libc.syscall(ctypes.c_long(NUMBERS[name]), *words), name, path)


def unshare(flags: int) -> None:
    """Enter new namespaces."""
    check(libc.unshare(flags), "unshare(CLONE_NEWUSER)" if flags & CLONE_NEWUSER else "unshare")


def mount_setattr(place: int | str, *, attributes: int = 0, propagation: int = 0) -> None:
    """Change all mounts from a path, or a descriptor of a mount, on."""
    change = struct.pack("=QQQQ", attributes, 0, propagation, 0)
    fd, path = (AT_FDCWD, place) if isinstance(place, str) else (place, "")
    flags = AT_RECURSIVE | (0 if path else AT_EMPTY_PATH)
    call("mount_setattr", fd, path.encode(), flags, change, len(change), path=path)


def open_tree(path: str) -> int:
    """A copy of what is mounted at a path and below."""
    flags = OPEN_TREE_CLONE | AT_RECURSIVE | os.O_CLOEXEC
    return call("open_tree", AT_FDCWD, path.encode(), flags, path=path)


def new_mount(kind: str, attributes: int, **options: str) -> int:
    """A new file system, mounted nowhere yet."""
    context = call("fsopen", kind.encode(), FSOPEN_CLOEXEC, path=kind)
    for name, value in options.items():
        words = (FSCONFIG_SET_STRING, name.encode(), value.encode(), 0)
        call("fsconfig", context, *words, path=f"{kind}: {name}")
    call("fsconfig", context, FSCONFIG_CMD_CREATE, None, None, 0, path=kind)
    return call("fsmount", context, FSOPEN_CLOEXEC, attributes, path=kind)


def attach(mount: int, root: int, target: str) -> None:
    """Put a mount on a place in the new root, looked up as from inside."""
    how = struct.pack("=QQQ", os.O_PATH | os.O_CLOEXEC, 0, RESOLVE_IN_ROOT | RESOLVE_NO_MAGICLINKS)
    place = call("openat2", root, target.encode(), how, len(how), path=target)
    flags = MOVE_MOUNT_F_EMPTY_PATH | MOVE_MOUNT_T_EMPTY_PATH
    call("move_mount", mount, b"", place, b"", flags, path=target)


def write_maps(pid: int | str, *, uid: int, gid: int, deny_setgroups: bool) -> None:
    """Map one user and one group to themselves in a new user namespace."""
    maps = [("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")]
    for name, content in ([("setgroups", "deny")] if deny_setgroups else []) + maps:
        with named(f"write {content!r}"):
            write(f"/proc/{pid}/{name}", content)


def write(path: str, content: str) -> None:
    """Write to a file of the kernel's; the OSError names it."""
    try:
        Path(path).write_text(content, encoding="ascii")
    except OSError as error:
        raise OSError(error.errno, error.strerror, path) from error


def vmm_user(*, rootful: bool) -> tuple[int, int, tuple[int, ...]]:
    """Uid, gid and groups as which VMMs run: ours, or those that a warden of root's gives them."""
    if not rootful:
        return os.geteuid(), os.getegid(), ()
    try:
        entry = pwd.getpwnam(VMM_USER)
    except KeyError:
        uid = free_uid()
        return uid, uid, groups_for_kvm()
    return entry.pw_uid, entry.pw_gid, groups_for_kvm()


def free_uid() -> int:
    """A uid that nobody has."""
    for uid in FREE_UIDS:
        try:
            pwd.getpwuid(uid)
        except KeyError:
            return uid
    raise Unusable(f"every uid in {FREE_UIDS} is taken, and there is no {VMM_USER}")


def groups_for_kvm() -> tuple[int, ...]:
    """The group that may use /dev/kvm, where there is one."""
    try:
        device = Path(KVM).stat()
    except OSError:
        return ()
    of_group = stat.S_IRGRP | stat.S_IWGRP
    return (device.st_gid,) if device.st_mode & of_group == of_group and device.st_gid else ()


def start_warden(*, rootful: bool) -> NoReturn:
    """Enter the warden's namespaces, and go on in their first process."""
    if not rootful:
        uid, gid = os.geteuid(), os.getegid()
        unshare(CLONE_NEWUSER)
        write_maps("self", uid=uid, gid=gid, deny_setgroups=True)
    unshare(CLONE_NEWNS | CLONE_NEWPID | CLONE_NEWIPC)
    mount_setattr("/", propagation=MS_SLAVE)
    child = os.fork()
    if child == 0:
        # With it all others end: it is pid 1 of their pid namespace.
        check(libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL), "prctl(PR_SET_PDEATHSIG)")
        report(lambda: be_warden(rootful=rootful))
    os.waitpid(child, 0)
    os._exit(0)  # it has reported


def be_warden(*, rootful: bool) -> NoReturn:
    """Launch as the warden does: the child enters namespaces, and we say who is in them."""
    flags = ctypes.c_ulong(MS_NOSUID | MS_NODEV | MS_NOEXEC)
    check(libc.mount(b"proc", b"/proc", b"proc", flags, b""), "mount proc", "/proc")
    with named("pidfd_open"):
        os.close(os.pidfd_open(os.getpid()))
    uid, gid, groups = vmm_user(rootful=rootful)
    ours, theirs = socket.socketpair()
    child = os.fork()
    if child == 0:
        ours.close()
        report(lambda: be_stage(theirs, uid=uid, gid=gid, groups=groups if rootful else None))
    theirs.close()
    if ours.recv(1):
        write_maps(child, uid=uid, gid=gid, deny_setgroups=not rootful)
        ours.send(b"!")
    os.waitpid(child, 0)
    os._exit(0)  # it has reported


def be_stage(
    line: socket.socket, *, uid: int, gid: int, groups: tuple[int, ...] | None
) -> NoReturn:
    """Enter a VMM's namespaces, become its user there, and go on in the first process."""
    if groups is not None:
        with named("setgroups"):
            os.setgroups(groups)
    unshare(
        CLONE_NEWUSER
        | CLONE_NEWNS
        | CLONE_NEWPID
        | CLONE_NEWIPC
        | CLONE_NEWUTS
        | CLONE_NEWCGROUP
        | CLONE_NEWNET
    )
    line.send(b"?")
    if not line.recv(1):
        os._exit(0)  # whoever should have mapped our user has reported
    with named("setresgid"):
        os.setresgid(gid, gid, gid)
    with named("setresuid"):
        os.setresuid(uid, uid, uid)
    child = os.fork()
    if child == 0:
        report(in_smallest_jail)
    os.waitpid(child, 0)
    os._exit(0)


def in_smallest_jail() -> str:
    """A tmpfs root with /usr in it, read-only, /dev/null, its own /proc, and nothing else."""
    with named("sethostname"):
        socket.sethostname("vmsandbox-probe")
    root = build_view()
    with suppress(FileNotFoundError):
        write("/proc/sys/user/max_user_namespaces", "0")
    os.fchdir(root)
    call("pivot_root", b".", b".", path="/")
    check(libc.umount2(b".", MNT_DETACH), "umount2", "/")
    os.chdir("/")
    look_around()
    give_up_privileges()
    return "launched as the warden does, and saw nothing but its own /usr, as pid 1"


def build_view() -> int:
    """The new root, over the old one."""
    mount_setattr("/", propagation=MS_PRIVATE)
    inert = MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV
    root = new_mount("tmpfs", inert, size="64k", nr_inodes="16", mode="755")
    call("move_mount", root, b"", AT_FDCWD, b"/", MOVE_MOUNT_F_EMPTY_PATH, path="/")
    for name in ("usr", "proc", "dev"):
        os.mkdir(name, dir_fd=root)
    os.close(os.open("dev/null", os.O_CREAT | os.O_EXCL | os.O_WRONLY, dir_fd=root))
    usr = open_tree("/usr")
    mount_setattr(usr, attributes=inert | MOUNT_ATTR_RDONLY)
    attach(usr, root, "/usr")
    null = open_tree("/dev/null")
    mount_setattr(null, attributes=MOUNT_ATTR_NOSUID | MOUNT_ATTR_NOEXEC)
    attach(null, root, "/dev/null")
    proc = new_mount("proc", inert | MOUNT_ATTR_NOEXEC, subset="pid")
    attach(proc, root, "/proc")
    mount_setattr(root, attributes=MOUNT_ATTR_RDONLY)
    return root


def look_around() -> None:
    """Unusable where anything is seen, or can be done, that a jail is there to prevent."""
    shown = {str(path) for path in Path("/").iterdir()}
    if shown != {"/usr", "/proc", "/dev"}:
        raise Unusable(f"the jail shows other things than its own: {sorted(shown)}")
    try:
        # Refused before the name is looked up, where the mount is read-only; where it is not,
        # this leaves no trace in the host's /usr.
        Path("/usr/vmsandbox-probe-of-nothing").rmdir()
    except FileNotFoundError as error:
        raise Unusable("/usr was bound read-only and could be written") from error
    except OSError as error:
        if error.errno != errno.EROFS:
            raise
    if os.getpid() != 1:
        raise Unusable(f"pid {os.getpid()} in a new pid namespace, not 1")


def give_up_privileges() -> None:
    """Install a filter of system calls, one that allows all."""
    check(libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "prctl(PR_SET_NO_NEW_PRIVS)")
    if platform.machine() in FILTERED_MACHINES:
        step = ctypes.create_string_buffer(struct.pack("=HBBI", RETURN, 0, 0, SECCOMP_RET_ALLOW))
        program = struct.pack("@HP", 1, ctypes.addressof(step))
        filtered = libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, program)
        check(filtered, "prctl(PR_SET_SECCOMP)")


def report(attempt: Callable[[], str]) -> NoReturn:
    """Try it, print what came of it, and end without a word more."""
    try:
        verdict, evidence = "ok", attempt()
    except TooLate as error:
        verdict, evidence = "timeout", str(error)
    except (Unusable, ValueError) as error:
        verdict, evidence = "unusable", str(error)
    except OSError as error:
        verdict, evidence = of_oserror(error), str(error)
    os.write(1, json.dumps({"verdict": verdict, "evidence": evidence}).encode())
    os._exit(0)


def of_oserror(error: OSError) -> str:
    """The verdict that goes with an errno."""
    if error.errno in (errno.EPERM, errno.EACCES, errno.EROFS):
        return "denied"
    return "missing" if error.errno == errno.ENOENT else "unusable"


def give_up(_number: int, _frame: object) -> NoReturn:
    """Raise what passes by everything that cleans up."""
    raise TooLate("no end within the time given")


def main(_what: str, seconds: str, _search_path: str, *through: str) -> NoReturn:
    """Try it in the time given."""
    signal.signal(signal.SIGALRM, give_up)
    signal.setitimer(signal.ITIMER_REAL, float(seconds))
    report(lambda: start_warden(rootful="userns" not in through))


if __name__ == "__main__":
    main(*sys.argv[1:])
