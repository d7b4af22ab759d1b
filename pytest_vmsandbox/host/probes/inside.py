"""The inside of the probes that need namespaces: a program of its own, sent to a fresh Python.

It is read from stdin by `python -I -S -`, never imported where it acts: unshare(CLONE_NEWUSER) is
EINVAL in a process with threads (unshare(2)), and pytest's plugins start threads. It uses the
standard library alone, because the user it runs as (qemu-vm) may not be able to read our package.
Nothing outlives it: what it makes lives in its own namespaces, and a control group is removed.

    python -I -S - WHAT SECONDS SEARCH_PATH [userns]

It prints one JSON object, `{"verdict": ..., "evidence": ...}`, and ends after SECONDS at the
latest, by an alarm: behind sudo nobody else may kill it.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn

# sched.h
CLONE_NEWNS, CLONE_NEWUSER, CLONE_NEWNET = 0x00020000, 0x10000000, 0x40000000

# sys/mount.h
MS_NOSUID, MS_NODEV, MS_REC, MS_PRIVATE = 0x2, 0x4, 0x4000, 0x40000

# linux/rtnetlink.h, linux/if_link.h, linux/if_tun.h
RTM_NEWLINK, NLM_F_REQUEST, NLM_F_ACK, NLM_F_CREATE, NLM_F_EXCL = 16, 0x1, 0x4, 0x400, 0x200
NLMSG_ERROR, NETLINK_ROUTE = 2, 0
IFLA_IFNAME, IFLA_LINKINFO, IFLA_INFO_KIND, IFF_UP = 3, 18, 1, 0x1
TUNSETIFF, IFF_TAP, IFF_NO_PI = 0x400454CA, 0x2, 0x1000

INTERFACE = "vms-probe"
TUN_DEVICE = "/dev/net/tun"
GROUP_PREFIX = "vmsandbox-probe-"

# Covered by a tmpfs in a mount namespace of our own: every host has it, and anybody may reach it.
EMPTIED = "/tmp"  # noqa: S108 -- nothing is ever written to the host's

libc = ctypes.CDLL(None, use_errno=True)


class Unusable(Exception):
    """It was done and did not have its effect."""


class TooLate(Exception):
    """The time given is over."""


class Missing(Exception):
    """A program that it takes is not there."""


def check(result: int, call: str, path: str = "") -> int:
    """The result of a system call, or an OSError that names call and path."""
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{call}: {os.strerror(number)}", path or None)
    return result


def mount(source: str, target: str, kind: str, flags: int, data: str = "") -> None:
    """Mount it, or raise an OSError that names the target."""
    words = [os.fsencode(word) for word in (source, target, kind)]
    check(
        libc.mount(*words, ctypes.c_ulong(flags), os.fsencode(data)),
        f"mount {kind}".strip(),
        target,
    )


def enter_user_namespace(flags: int) -> None:
    """Into a user namespace of our own, as its root, and others that belong to it."""
    uid, gid = os.geteuid(), os.getegid()
    check(libc.unshare(CLONE_NEWUSER | flags), "unshare(CLONE_NEWUSER)")
    for name, content in (
        ("setgroups", "deny"),  # or gid_map is refused (user_namespaces(7))
        ("uid_map", f"0 {uid} 1"),
        ("gid_map", f"0 {gid} 1"),
    ):
        Path("/proc/self", name).write_text(content, encoding="ascii")


def try_user_namespaces() -> str:
    """Mount in it: AppArmor lets unshare succeed and then takes the capabilities away."""
    mount("none", "/", "", MS_REC | MS_PRIVATE)
    mount("tmpfs", EMPTIED, "tmpfs", MS_NOSUID | MS_NODEV, "size=64k")
    Path(EMPTIED, "proof").touch(exist_ok=False)
    return "unshared, mapped and mounted a tmpfs inside"


def try_bridge() -> str:
    """Add a bridge that is up, by netlink, in a network namespace of our own."""
    kind = attribute(IFLA_LINKINFO, attribute(IFLA_INFO_KIND, b"bridge"))
    link = struct.pack("=BxHiII", socket.AF_UNSPEC, 0, 0, IFF_UP, IFF_UP)  # ifinfomsg
    body = link + attribute(IFLA_IFNAME, INTERFACE.encode() + b"\0") + kind
    flags = NLM_F_REQUEST | NLM_F_ACK | NLM_F_CREATE | NLM_F_EXCL
    header = struct.pack("=IHHII", 16 + len(body), RTM_NEWLINK, flags, 1, 0)
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_ROUTE) as netlink:
        netlink.sendto(header + body, (0, 0))
        _, answer_kind, _, _, _, number = struct.unpack_from("=IHHIIi", netlink.recv(4096))
    if answer_kind != NLMSG_ERROR or number:
        raise OSError(-number, f"RTM_NEWLINK bridge: {os.strerror(-number)}")
    socket.if_nametoindex(INTERFACE)
    return "a bridge was made and is up, in a network namespace"


def attribute(kind: int, content: bytes) -> bytes:
    """A netlink attribute, padded (netlink(3))."""
    length = 4 + len(content)
    return struct.pack("=HH", length, kind) + content + b"\0" * (-length % 4)


def try_tap() -> str:
    """Make a tap in a network namespace of our own; that the device opens proves nothing."""
    tun = os.open(TUN_DEVICE, os.O_RDWR)
    request = struct.pack("16sH22x", INTERFACE.encode(), IFF_TAP | IFF_NO_PI)
    try:
        fcntl.ioctl(tun, TUNSETIFF, request)
    except OSError as error:
        raise OSError(error.errno, f"TUNSETIFF: {error.strerror}", TUN_DEVICE) from error
    socket.if_nametoindex(INTERFACE)
    return "a tap was made, in a network namespace"


def try_cgroups() -> str:
    """Make a control group, limit it, put a process in it, remove it; the first that works."""
    refusals = []
    for parent, limits in possible_cgroups():
        try:
            sweep_cgroups(parent)
            with control_group(parent) as group:
                return f"{limit_cgroup(group, limits)} limited in {group}"
        except OSError as error:
            refusals.append(error)
    if not refusals:
        raise Missing("no cgroup hierarchy is mounted that limits memory or processes")
    raise refusals[0]


@contextmanager
def control_group(parent: Path) -> Iterator[Path]:
    """A new control group of ours, removed afterwards, whenever the alarm comes."""
    group = parent / f"{GROUP_PREFIX}{os.getpid()}"
    # The alarm comes once. It is let in only where what it raises passes by the removal.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})
    try:
        group.mkdir()
        try:
            try:
                signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGALRM})
                yield group
            finally:
                signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})
        finally:
            remove_cgroup(group)
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGALRM})


def sweep_cgroups(parent: Path) -> None:
    """Remove what probes left that were killed; a group with processes in it resists."""
    for group in parent.glob(f"{GROUP_PREFIX}*"):
        pid = group.name.removeprefix(GROUP_PREFIX)
        if pid.isdecimal() and not Path("/proc", pid).exists():
            with suppress(OSError):
                group.rmdir()


# The files that limit a group, by controller, in the two forms (cgroups(7)).
LIMITS_V2 = {"memory": "memory.max", "pids": "pids.max"}
LIMITS_V1 = {"memory": "memory.limit_in_bytes", "pids": "pids.max"}
AMOUNTS = {"memory": str(1 << 30), "pids": "64"}


def possible_cgroups() -> list[tuple[Path, dict[str, str]]]:
    """Directories in which a group might be made, with the limits to set: v2 and ours first."""
    ours = own_cgroups()
    v2: list[tuple[Path, dict[str, str]]] = []
    v1: list[tuple[Path, dict[str, str]]] = []
    # Bytes, and one space at a time: a mount point is any bytes, and a source may be empty.
    for line in Path("/proc/self/mountinfo").read_bytes().split(b"\n")[:-1]:
        left, _, right = line.partition(b" - ")
        kind, _, options = right.split(b" ", 2)
        root, top = map(path_of, left.split(b" ")[3:5])
        if kind == b"cgroup2":
            v2 += [(place, LIMITS_V2) for place in own_and_above(top, root, ours.get("", ""))]
        elif kind == b"cgroup":
            controllers = os.fsdecode(options).split(",")
            limits = {name: LIMITS_V1[name] for name in controllers if name in LIMITS_V1}
            for name in list(limits)[:1]:
                v1 += [(place, limits) for place in own_and_above(top, root, ours.get(name, ""))]
    return v2 + v1


def path_of(field: bytes) -> Path:
    """The path in a field of mountinfo: what would end it is in octal there (proc(5))."""
    plain = re.sub(rb"\\([0-7]{3})", lambda found: bytes([int(found[1], 8) & 0xFF]), field)
    return Path(os.fsdecode(plain))


def own_cgroups() -> dict[str, str]:
    """The group that we are in, by controller; under "" the one of cgroup v2 (cgroups(7))."""
    lines = Path("/proc/self/cgroup").read_bytes().split(b"\n")[:-1]
    entries = [os.fsdecode(line).split(":", 2) for line in lines]
    return {name: path for _, names, path in entries for name in names.split(",")}


def own_and_above(top: Path, root: Path, own: str) -> list[Path]:
    """Our own group, as far as it lies in what is mounted, and all above it up to the top.

    In version 2 a group that holds processes hands on no limits; those above it may be ours.
    """
    group = Path(own)
    if ".." in group.parts or not group.is_relative_to(root):
        return [top]
    below = group.relative_to(root)
    return [top / below, *(top / parent for parent in below.parents)]


def limit_cgroup(group: Path, limits: dict[str, str]) -> str:
    """Set what limits there are, and put a process in; the names of what was limited."""
    done = [name for name, file in limits.items() if (group / file).exists()]
    if not done:
        raise OSError(errno.EOPNOTSUPP, "neither memory nor pids is delegated", str(group))
    for name in done:
        (group / limits[name]).write_text(AMOUNTS[name], encoding="ascii")
    child = os.fork()
    if child == 0:
        try:
            (group / "cgroup.procs").write_text(str(os.getpid()), encoding="ascii")
        except OSError as error:
            os._exit(error.errno or 1)
        os._exit(0)
    number = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if number:
        raise OSError(number, os.strerror(number), str(group / "cgroup.procs"))
    return " and ".join(done)


def remove_cgroup(group: Path) -> None:
    """Remove it; it is busy for a moment after its last process has ended."""
    for _ in range(100):
        try:
            group.rmdir()
        except OSError as error:
            if error.errno != errno.EBUSY:
                raise
            time.sleep(0.005)
        else:
            return


# What can be tried, and the namespaces that it wants to be alone in.
TRIES: dict[str, tuple[int, Callable[[], str]]] = {
    "user_namespaces": (CLONE_NEWNS, try_user_namespaces),
    "bridge": (CLONE_NEWNET, try_bridge),
    "tap": (CLONE_NEWNET, try_tap),
    "cgroups": (0, try_cgroups),
}


def report(attempt: Callable[[], str]) -> NoReturn:
    """Try it, print what came of it, and end without a word more."""
    try:
        verdict, evidence = "ok", attempt()
    except Missing as error:
        verdict, evidence = "missing", str(error)
    except TooLate as error:
        verdict, evidence = "timeout", str(error)
    except (Unusable, subprocess.SubprocessError, ValueError) as error:
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


def main(what: str, seconds: str, search_path: str, *through: str) -> NoReturn:
    """Try one thing, in its own time, in namespaces of its own."""
    signal.signal(signal.SIGALRM, give_up)
    signal.setitimer(signal.ITIMER_REAL, float(seconds))
    os.environ["PATH"] = search_path
    namespaces, attempt = TRIES[what]

    def enter_and_try() -> str:
        if "userns" in through:
            enter_user_namespace(namespaces)
        elif namespaces:
            check(libc.unshare(namespaces), "unshare")
        return attempt()

    report(enter_and_try)


if __name__ == "__main__":
    main(*sys.argv[1:])
