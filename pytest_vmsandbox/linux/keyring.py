"""The kernel's keys that a session of processes shares (keyrings(7))."""

from __future__ import annotations

from pytest_vmsandbox.linux.libc import call_libc

_KEYCTL_JOIN_SESSION_KEYRING = 1


def join_session_keyring() -> int:
    """Begin a new, empty, nameless session keyring; its serial number (keyctl(2), Linux 2.6.10).

    Nobody else has it; children inherit it; what was in the former one can no longer be found
    through it. OSError, and the former one is kept: ENOSYS where the kernel has no keys, EDQUOT
    where this user has too many (/proc/sys/kernel/keys/maxkeys, 200 for ordinary users).
    """
    return call_libc("keyctl", _KEYCTL_JOIN_SESSION_KEYRING, None, 0, 0, 0)
