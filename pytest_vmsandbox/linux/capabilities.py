"""What a thread may do beyond an ordinary one: its capability sets."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from enum import IntFlag
from pathlib import Path

from pytest_vmsandbox.linux.arguments import INT_MAX, bits_of, check_bits, check_range
from pytest_vmsandbox.linux.libc import call_libc

_VERSION_3 = 0x20080522  # _LINUX_CAPABILITY_VERSION_3: two words of 32 bits for each set
_LAST_CAPABILITY = Path("/proc/sys/kernel/cap_last_cap")


class Capabilities(IntFlag):
    """CAP_* of <linux/capability.h> as bits (1 << CAP_*); each also without its prefix."""

    CAP_CHOWN = CHOWN = 1 << 0
    CAP_DAC_OVERRIDE = DAC_OVERRIDE = 1 << 1
    CAP_DAC_READ_SEARCH = DAC_READ_SEARCH = 1 << 2
    CAP_FOWNER = FOWNER = 1 << 3
    CAP_FSETID = FSETID = 1 << 4
    CAP_KILL = KILL = 1 << 5
    CAP_SETGID = SETGID = 1 << 6
    CAP_SETUID = SETUID = 1 << 7
    CAP_SETPCAP = SETPCAP = 1 << 8
    CAP_LINUX_IMMUTABLE = LINUX_IMMUTABLE = 1 << 9
    CAP_NET_BIND_SERVICE = NET_BIND_SERVICE = 1 << 10
    CAP_NET_BROADCAST = NET_BROADCAST = 1 << 11
    CAP_NET_ADMIN = NET_ADMIN = 1 << 12
    CAP_NET_RAW = NET_RAW = 1 << 13
    CAP_IPC_LOCK = IPC_LOCK = 1 << 14
    CAP_IPC_OWNER = IPC_OWNER = 1 << 15
    CAP_SYS_MODULE = SYS_MODULE = 1 << 16
    CAP_SYS_RAWIO = SYS_RAWIO = 1 << 17
    CAP_SYS_CHROOT = SYS_CHROOT = 1 << 18
    CAP_SYS_PTRACE = SYS_PTRACE = 1 << 19
    CAP_SYS_PACCT = SYS_PACCT = 1 << 20
    CAP_SYS_ADMIN = SYS_ADMIN = 1 << 21
    CAP_SYS_BOOT = SYS_BOOT = 1 << 22
    CAP_SYS_NICE = SYS_NICE = 1 << 23
    CAP_SYS_RESOURCE = SYS_RESOURCE = 1 << 24
    CAP_SYS_TIME = SYS_TIME = 1 << 25
    CAP_SYS_TTY_CONFIG = SYS_TTY_CONFIG = 1 << 26
    CAP_MKNOD = MKNOD = 1 << 27
    CAP_LEASE = LEASE = 1 << 28
    CAP_AUDIT_WRITE = AUDIT_WRITE = 1 << 29
    CAP_AUDIT_CONTROL = AUDIT_CONTROL = 1 << 30
    CAP_SETFCAP = SETFCAP = 1 << 31
    CAP_MAC_OVERRIDE = MAC_OVERRIDE = 1 << 32
    CAP_MAC_ADMIN = MAC_ADMIN = 1 << 33
    CAP_SYSLOG = SYSLOG = 1 << 34
    CAP_WAKE_ALARM = WAKE_ALARM = 1 << 35
    CAP_BLOCK_SUSPEND = BLOCK_SUSPEND = 1 << 36
    CAP_AUDIT_READ = AUDIT_READ = 1 << 37
    CAP_PERFMON = PERFMON = 1 << 38
    CAP_BPF = BPF = 1 << 39
    CAP_CHECKPOINT_RESTORE = CHECKPOINT_RESTORE = 1 << 40


_NONE = Capabilities(0)


class _Header(ctypes.Structure):
    """struct __user_cap_header_struct (capget(2))."""

    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


class _Data(ctypes.Structure):
    """struct __user_cap_data_struct (capget(2))."""

    _fields_ = (
        ("effective", ctypes.c_uint32),
        ("permitted", ctypes.c_uint32),
        ("inheritable", ctypes.c_uint32),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class CapabilitySets:
    """The three sets of capabilities(7) that capget(2) and capset(2) carry (version 3)."""

    effective: Capabilities = _NONE
    permitted: Capabilities = _NONE
    inheritable: Capabilities = _NONE

    @classmethod
    def capget(cls, pid: int = 0) -> CapabilitySets:
        """The sets of the thread `pid`, or of the calling thread; ProcessLookupError: no such."""
        number = check_range(pid, lowest=0, highest=INT_MAX, argument="capget: pid")
        header, data = _Header(_VERSION_3, number), (_Data * 2)()
        call_libc("capget", ctypes.byref(header), data)
        low, high = data
        return cls(
            effective=Capabilities(low.effective | high.effective << 32),
            permitted=Capabilities(low.permitted | high.permitted << 32),
            inheritable=Capabilities(low.inheritable | high.inheritable << 32),
        )

    def capset(self) -> None:
        """Give these sets to the calling thread (not to its process).

        ValueError, with nothing done, for a capability that this kernel has not: it would be
        left out without a word. PermissionError for more than the thread is permitted; its
        sets are then as before.
        """
        data = (_Data * 2)()
        allowed = _known_here()
        for name in ("effective", "permitted", "inheritable"):
            bits = check_bits(getattr(self, name), allowed=allowed, argument=f"capset: {name}")
            setattr(data[0], name, bits & 0xFFFFFFFF)
            setattr(data[1], name, bits >> 32)
        call_libc("capset", ctypes.byref(_Header(_VERSION_3, 0)), data)


def _known_here() -> int:
    """The capabilities of the running kernel, which may be older or newer than our list."""
    try:
        # As bytes: the first text in an encoding imports its codec, and a jail may have no library.
        return (2 << int(_LAST_CAPABILITY.read_bytes())) - 1
    except OSError:
        return bits_of(Capabilities)
