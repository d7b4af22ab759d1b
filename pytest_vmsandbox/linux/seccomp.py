"""A seccomp filter that refuses what no VMM needs, and what a program could climb out by."""

from __future__ import annotations

import ctypes
import errno
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

from pytest_vmsandbox.linux.clone import CloneFlags
from pytest_vmsandbox.linux.prctl import PrctlOption, prctl, prctl_set_no_new_privs

# Numbers on x86_64 and aarch64, from the kernel's headers (a test compares them); None where
# that machine has no such call.
_DENIED: Mapping[str, tuple[int | None, int | None]] = {
    # another view of the file system
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "move_mount": (429, 429),
    "open_tree": (428, 428),
    "open_tree_attr": (467, 467),
    "fsopen": (430, 430),
    "fsmount": (432, 432),
    "fsconfig": (431, 431),
    "fspick": (433, 433),
    "mount_setattr": (442, 442),
    # namespaces
    "unshare": (272, 97),
    "setns": (308, 268),
    # other processes
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "kcmp": (312, 272),
    "pidfd_getfd": (438, 438),
    "migrate_pages": (256, 238),
    "move_pages": (279, 239),
    # parts of the kernel with a long history of holes
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "fanotify_init": (300, 262),
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    # another kernel
    "init_module": (175, 105),
    "finit_module": (313, 273),
    "delete_module": (176, 106),
    "create_module": (174, None),
    "kexec_load": (246, 104),
    "kexec_file_load": (320, 294),
    # keys, and files by handle, around every view
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "open_by_handle_at": (304, 265),
    "name_to_handle_at": (303, 264),
    # locks on files that may only be read: whoever wants the file would wait
    "flock": (73, 32),
    # the whole host
    "swapon": (167, 224),
    "swapoff": (168, 225),
    "reboot": (169, 142),
    "acct": (163, 89),
    "quotactl": (179, 60),
    "quotactl_fd": (443, 443),
    "settimeofday": (164, 170),
    "clock_settime": (227, 112),
    "clock_adjtime": (305, 266),
    "adjtimex": (159, 171),
    "sethostname": (170, 161),
    "setdomainname": (171, 162),
    "syslog": (103, 116),
    "vhangup": (153, 58),
    # old and dangerous
    "iopl": (172, None),
    "ioperm": (173, None),
    "modify_ldt": (154, None),
    "uselib": (134, None),
    "_sysctl": (156, None),
    "nfsservctl": (180, 42),
    "lookup_dcookie": (212, 18),
}

CALLS_NO_VMM_NEEDS: tuple[str, ...] = tuple(_DENIED)
"""What neither QEMU nor Firecracker needs once it is started, nor most programs on a host.

io_uring among them: QEMU asks for it only with ``aio=io_uring``, and its main loop does without
where it is refused. mknod(2) is not: the kernel wants a capability for all that is dangerous in it.
"""

# <linux/seccomp.h>, <linux/audit.h>
_MODE_FILTER = 2
_RET_KILL_PROCESS = 0x80000000
_RET_ERRNO = 0x00050000
_RET_ALLOW = 0x7FFF0000
_REFUSE = _RET_ERRNO | errno.EPERM
_AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_MACHINES = tuple(_AUDIT_ARCH)
_X32_BIT = 0x40000000

# struct seccomp_data: int nr, u32 arch, u64 instruction_pointer, u64 args[6]
_NR, _ARCH, _ARGS = 0, 4, 16

# <linux/bpf_common.h>: class, size, mode; class, test, operand
_LOAD_WORD = 0x00 | 0x00 | 0x20
_JUMP_EQUAL = 0x05 | 0x10 | 0x00
_JUMP_AT_LEAST = 0x05 | 0x30 | 0x00
_JUMP_ANY_BIT = 0x05 | 0x40 | 0x00
_RETURN = 0x06
_LONGEST_JUMP = 255

_PERSONALITIES = (0, 0xFFFFFFFF)  # PER_LINUX; "tell me mine"
_LEASE = (1024,)  # F_SETLEASE: whoever opens the file would wait for whoever holds the lease
_TERMINAL_INPUT = (0x5412, 0x541C)  # TIOCSTI, TIOCLINUX: they type into the terminal
# AF_UNIX, AF_INET, AF_INET6, AF_NETLINK. Others know no network namespace (AF_VSOCK), have a long
# history of holes (AF_ALG), or want a capability (AF_PACKET).
_FAMILIES = (1, 2, 10, 16)


@dataclass(frozen=True, slots=True)
class _Instruction:
    """struct sock_filter of <linux/filter.h>: one step of classic BPF."""

    code: int
    k: int
    jt: int = 0
    jf: int = 0


class _SockFilter(ctypes.Structure):
    _fields_ = (
        ("code", ctypes.c_uint16),
        ("jt", ctypes.c_uint8),
        ("jf", ctypes.c_uint8),
        ("k", ctypes.c_uint32),
    )


class _SockFprog(ctypes.Structure):
    """struct sock_fprog of <linux/filter.h>."""

    _fields_ = (("len", ctypes.c_ushort), ("filter", ctypes.POINTER(_SockFilter)))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Check:
    """A call that is answered by one of its arguments, of which the low 32 bits count."""

    numbers: tuple[int, int]
    argument: int
    test: int
    values: Sequence[int]
    matched: int
    otherwise: int

    def render(self, place: int) -> list[_Instruction]:
        """Begins with the call's number at hand; falls through, with it, for any other call."""
        last = len(self.values)
        body = [
            # Both machines are little-endian: the low word comes first. The kernel itself takes
            # no more than 32 bits of these arguments.
            _Instruction(_LOAD_WORD, _ARGS + 8 * self.argument),
            *(
                _Instruction(self.test, value, jt=last - index)
                for index, value in enumerate(self.values)
            ),
            _Instruction(_RETURN, self.otherwise),
            _Instruction(_RETURN, self.matched),
        ]
        return [_Instruction(_JUMP_EQUAL, self.numbers[place], jf=len(body)), *body]


_CHECKS = (
    _Check(  # ioctl
        numbers=(16, 29),
        argument=1,
        test=_JUMP_EQUAL,
        values=_TERMINAL_INPUT,
        matched=_REFUSE,
        otherwise=_RET_ALLOW,
    ),
    _Check(  # fcntl
        numbers=(72, 25),
        argument=1,
        test=_JUMP_EQUAL,
        values=_LEASE,
        matched=_REFUSE,
        otherwise=_RET_ALLOW,
    ),
    _Check(  # clone; CLONE_NEWTIME is not for it: that bit belongs to the exit signal there
        numbers=(56, 220),
        argument=0,
        test=_JUMP_ANY_BIT,
        values=(int(CloneFlags.NS_FLAGS) & ~int(CloneFlags.CLONE_NEWTIME),),
        matched=_REFUSE,
        otherwise=_RET_ALLOW,
    ),
    _Check(  # clone3: its flags lie in memory, where a filter can't look; libc then uses clone
        numbers=(435, 435),
        argument=0,
        test=_JUMP_EQUAL,
        values=(),
        matched=_RET_ERRNO | errno.ENOSYS,
        otherwise=_RET_ERRNO | errno.ENOSYS,
    ),
    _Check(  # personality
        numbers=(135, 92),
        argument=0,
        test=_JUMP_EQUAL,
        values=_PERSONALITIES,
        matched=_RET_ALLOW,
        otherwise=_REFUSE,
    ),
    *(
        _Check(  # socket, socketpair
            numbers=numbers,
            argument=0,
            test=_JUMP_EQUAL,
            values=_FAMILIES,
            matched=_RET_ALLOW,
            otherwise=_RET_ERRNO | errno.EAFNOSUPPORT,
        )
        for numbers in ((41, 198), (53, 199))
    ),
)


def deny_system_calls(names: Iterable[str] = CALLS_NO_VMM_NEEDS) -> bool:
    """Refuse these calls to this process and all that come from it, for good, exec or not.

    They answer EPERM; so do new namespaces by clone(2), typing into a terminal by ioctl(2), leases
    by fcntl(2), and other personalities. clone3(2) answers ENOSYS, sockets of unusual families
    EAFNOSUPPORT, x32 calls ENOSYS; a call of another architecture kills the process. All else is
    allowed. no_new_privs is set first. To be called where there is one thread, and last: what else
    a child does to itself is denied afterwards.

    Returns whether it was installed: False, with nothing done, on machines whose numbers are not
    known here. ValueError, with nothing done, for a name that is not in CALLS_NO_VMM_NEEDS.
    OSError where the kernel has no seccomp filters. Source: seccomp(2), Linux 3.5.
    """
    place = _place_of_this_machine()
    if place is None:
        return False
    steps = _steps(tuple(names), place)
    prctl_set_no_new_privs()
    program = _SockFprog(len(steps), steps)
    prctl(PrctlOption.PR_SET_SECCOMP, _MODE_FILTER, ctypes.addressof(program))
    return True


def prepare_to_deny_system_calls(names: Iterable[str] = CALLS_NO_VMM_NEEDS) -> None:
    """Make the filter now: a child that is forked from here then only installs it."""
    place = _place_of_this_machine()
    if place is not None:
        _steps(tuple(names), place)


@cache
def _steps(names: tuple[str, ...], place: int) -> ctypes.Array[_SockFilter]:
    instructions = list(_render(names, place))
    return (_SockFilter * len(instructions))(
        *(_SockFilter(step.code, step.jt, step.jf, step.k) for step in instructions)
    )


def _place_of_this_machine() -> int | None:
    """Which of `_MACHINES` this process runs as; None for another, and for 32-bit processes."""
    machine = os.uname().machine
    if sys.platform != "linux" or machine not in _MACHINES or sys.maxsize <= 2**32:
        return None
    return _MACHINES.index(machine)


def _render(names: Sequence[str], place: int) -> Iterator[_Instruction]:
    """The whole program, for the machine at `place` of `_MACHINES`."""
    yield _Instruction(_LOAD_WORD, _ARCH)
    yield _Instruction(_JUMP_EQUAL, _AUDIT_ARCH[_MACHINES[place]], jt=1)
    yield _Instruction(_RETURN, _RET_KILL_PROCESS)
    yield _Instruction(_LOAD_WORD, _NR)
    yield _Instruction(_JUMP_AT_LEAST, _X32_BIT, jf=1)
    yield _Instruction(_RETURN, _RET_ERRNO | errno.ENOSYS)
    for check in _CHECKS:
        yield from check.render(place)
    numbers = _numbers(names, place)
    for index, number in enumerate(numbers):
        yield _Instruction(_JUMP_EQUAL, number, jt=len(numbers) - index)
    yield _Instruction(_RETURN, _RET_ALLOW)
    yield _Instruction(_RETURN, _REFUSE)


def _numbers(names: Sequence[str], place: int) -> list[int]:
    unknown = sorted(set(names) - set(_DENIED))
    if unknown:
        raise ValueError(f"no numbers are known for: {', '.join(unknown)}")
    found = {number for name in names if (number := _DENIED[name][place]) is not None}
    if len(found) > _LONGEST_JUMP:
        raise ValueError(f"more than {_LONGEST_JUMP} calls")
    return sorted(found)
