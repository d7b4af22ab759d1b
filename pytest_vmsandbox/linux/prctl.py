"""The options of prctl(2), and the few that we use by name."""

from __future__ import annotations

from collections.abc import Iterable
from enum import IntEnum

from pytest_vmsandbox.linux.arguments import bits_of, check_bits, check_range
from pytest_vmsandbox.linux.capabilities import Capabilities, CapabilitySets
from pytest_vmsandbox.linux.libc import call_libc


class PrctlOption(IntEnum):
    """PR_* of <linux/prctl.h> that are options; each also without its prefix."""

    PR_SET_PDEATHSIG = SET_PDEATHSIG = 1
    PR_GET_PDEATHSIG = GET_PDEATHSIG = 2
    PR_GET_DUMPABLE = GET_DUMPABLE = 3
    PR_SET_DUMPABLE = SET_DUMPABLE = 4
    PR_GET_UNALIGN = GET_UNALIGN = 5
    PR_SET_UNALIGN = SET_UNALIGN = 6
    PR_GET_KEEPCAPS = GET_KEEPCAPS = 7
    PR_SET_KEEPCAPS = SET_KEEPCAPS = 8
    PR_GET_FPEMU = GET_FPEMU = 9
    PR_SET_FPEMU = SET_FPEMU = 10
    PR_GET_FPEXC = GET_FPEXC = 11
    PR_SET_FPEXC = SET_FPEXC = 12
    PR_GET_TIMING = GET_TIMING = 13
    PR_SET_TIMING = SET_TIMING = 14
    PR_SET_NAME = SET_NAME = 15
    PR_GET_NAME = GET_NAME = 16
    PR_GET_ENDIAN = GET_ENDIAN = 19
    PR_SET_ENDIAN = SET_ENDIAN = 20
    PR_GET_SECCOMP = GET_SECCOMP = 21
    PR_SET_SECCOMP = SET_SECCOMP = 22
    PR_CAPBSET_READ = CAPBSET_READ = 23
    PR_CAPBSET_DROP = CAPBSET_DROP = 24
    PR_GET_TSC = GET_TSC = 25
    PR_SET_TSC = SET_TSC = 26
    PR_GET_SECUREBITS = GET_SECUREBITS = 27
    PR_SET_SECUREBITS = SET_SECUREBITS = 28
    PR_SET_TIMERSLACK = SET_TIMERSLACK = 29
    PR_GET_TIMERSLACK = GET_TIMERSLACK = 30
    PR_TASK_PERF_EVENTS_DISABLE = TASK_PERF_EVENTS_DISABLE = 31
    PR_TASK_PERF_EVENTS_ENABLE = TASK_PERF_EVENTS_ENABLE = 32
    PR_MCE_KILL = MCE_KILL = 33
    PR_MCE_KILL_GET = MCE_KILL_GET = 34
    PR_SET_MM = SET_MM = 35
    PR_SET_PTRACER = SET_PTRACER = 0x59616D61
    PR_SET_CHILD_SUBREAPER = SET_CHILD_SUBREAPER = 36
    PR_GET_CHILD_SUBREAPER = GET_CHILD_SUBREAPER = 37
    PR_SET_NO_NEW_PRIVS = SET_NO_NEW_PRIVS = 38
    PR_GET_NO_NEW_PRIVS = GET_NO_NEW_PRIVS = 39
    PR_GET_TID_ADDRESS = GET_TID_ADDRESS = 40
    PR_SET_THP_DISABLE = SET_THP_DISABLE = 41
    PR_GET_THP_DISABLE = GET_THP_DISABLE = 42
    PR_MPX_ENABLE_MANAGEMENT = MPX_ENABLE_MANAGEMENT = 43
    PR_MPX_DISABLE_MANAGEMENT = MPX_DISABLE_MANAGEMENT = 44
    PR_SET_FP_MODE = SET_FP_MODE = 45
    PR_GET_FP_MODE = GET_FP_MODE = 46
    PR_CAP_AMBIENT = CAP_AMBIENT = 47
    PR_SVE_SET_VL = SVE_SET_VL = 50
    PR_SVE_GET_VL = SVE_GET_VL = 51
    PR_GET_SPECULATION_CTRL = GET_SPECULATION_CTRL = 52
    PR_SET_SPECULATION_CTRL = SET_SPECULATION_CTRL = 53
    PR_PAC_RESET_KEYS = PAC_RESET_KEYS = 54
    PR_SET_TAGGED_ADDR_CTRL = SET_TAGGED_ADDR_CTRL = 55
    PR_GET_TAGGED_ADDR_CTRL = GET_TAGGED_ADDR_CTRL = 56
    PR_SET_IO_FLUSHER = SET_IO_FLUSHER = 57
    PR_GET_IO_FLUSHER = GET_IO_FLUSHER = 58
    PR_SET_SYSCALL_USER_DISPATCH = SET_SYSCALL_USER_DISPATCH = 59
    PR_PAC_SET_ENABLED_KEYS = PAC_SET_ENABLED_KEYS = 60
    PR_PAC_GET_ENABLED_KEYS = PAC_GET_ENABLED_KEYS = 61
    PR_SCHED_CORE = SCHED_CORE = 62
    PR_SME_SET_VL = SME_SET_VL = 63
    PR_SME_GET_VL = SME_GET_VL = 64
    PR_SET_MDWE = SET_MDWE = 65
    PR_GET_MDWE = GET_MDWE = 66
    PR_SET_VMA = SET_VMA = 0x53564D41
    PR_GET_AUXV = GET_AUXV = 0x41555856
    PR_SET_MEMORY_MERGE = SET_MEMORY_MERGE = 67
    PR_GET_MEMORY_MERGE = GET_MEMORY_MERGE = 68
    PR_RISCV_V_SET_CONTROL = RISCV_V_SET_CONTROL = 69
    PR_RISCV_V_GET_CONTROL = RISCV_V_GET_CONTROL = 70
    PR_RISCV_SET_ICACHE_FLUSH_CTX = RISCV_SET_ICACHE_FLUSH_CTX = 71
    PR_PPC_GET_DEXCR = PPC_GET_DEXCR = 72
    PR_PPC_SET_DEXCR = PPC_SET_DEXCR = 73
    PR_GET_SHADOW_STACK_STATUS = GET_SHADOW_STACK_STATUS = 74
    PR_SET_SHADOW_STACK_STATUS = SET_SHADOW_STACK_STATUS = 75
    PR_LOCK_SHADOW_STACK_STATUS = LOCK_SHADOW_STACK_STATUS = 76
    PR_TIMER_CREATE_RESTORE_IDS = TIMER_CREATE_RESTORE_IDS = 77
    PR_FUTEX_HASH = FUTEX_HASH = 78
    PR_RSEQ_SLICE_EXTENSION = RSEQ_SLICE_EXTENSION = 79
    PR_GET_CFI = GET_CFI = 80
    PR_SET_CFI = SET_CFI = 81


_CAP_AMBIENT_RAISE = 2  # PR_CAP_AMBIENT_RAISE
_OPTIONS = frozenset(int(option) for option in PrctlOption)
_LAST_SIGNAL = 64  # _NSIG of the kernel, on all machines that we know


def prctl(option: int, arg2: int = 0, arg3: int = 0, arg4: int = 0, arg5: int = 0) -> int:
    """Ask or tell the kernel something about the caller; its answer, mostly 0 (prctl(2)).

    The arguments are C longs, signed or not; many options want those that they don't use to be
    0. Some options take addresses: keeping what they point to alive is the caller's part.
    ValueError, with nothing done, for an option that is not a PrctlOption.
    """
    if option not in _OPTIONS:
        raise ValueError(f"prctl: no such option: {option}")
    longs = [
        check_range(value, lowest=-(2**63), highest=2**64 - 1, argument=f"prctl: {name}") % 2**64
        for name, value in (("arg2", arg2), ("arg3", arg3), ("arg4", arg4), ("arg5", arg5))
    ]
    return call_libc("prctl", int(option), *longs)


def prctl_set_pdeathsig(signal: int) -> None:
    """Have `signal` sent to this process when the *thread* that made it ends; 0 takes it back.

    Lost at fork, and at the exec of a program with set-user-ID or capabilities. A parent that
    is gone already sends nothing: compare os.getppid() afterwards.
    """
    number = check_range(signal, lowest=0, highest=_LAST_SIGNAL, argument="signal")
    prctl(PrctlOption.PR_SET_PDEATHSIG, number)


def prctl_set_child_subreaper(enabled: bool = True) -> None:  # noqa: FBT001, FBT002 - its only one
    """Become the new parent of orphaned descendants (since Linux 3.4), or no longer.

    Whoever turns it on must wait for such children too, or they stay as zombies.
    """
    prctl(PrctlOption.PR_SET_CHILD_SUBREAPER, int(enabled))


def prctl_set_no_new_privs() -> None:
    """Give up, for good and for all descendants, what exec could add (since Linux 3.5)."""
    prctl(PrctlOption.PR_SET_NO_NEW_PRIVS, 1)


def prctl_raise_ambient_capabilities(capabilities: int | Iterable[int] | None = None) -> None:
    """Keep these capabilities over exec by an ordinary user (since Linux 4.3).

    `capabilities` are Capabilities, together or one by one; None means all that can be kept, those
    that are both permitted and inheritable. One that is not both: PermissionError, and the
    ones with lower numbers stay raised.
    """
    wanted = _together(capabilities)
    for number in range(wanted.bit_length()):
        if wanted >> number & 1:
            prctl(PrctlOption.PR_CAP_AMBIENT, _CAP_AMBIENT_RAISE, number)


def _together(capabilities: int | Iterable[int] | None) -> int:
    if capabilities is None:
        mine = CapabilitySets.capget()
        return int(mine.permitted & mine.inheritable)
    each = [capabilities] if isinstance(capabilities, int) else list(capabilities)
    bits = 0
    for some in each:
        bits |= check_bits(some, allowed=bits_of(Capabilities), argument="capabilities")
    return bits
