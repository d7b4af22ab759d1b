"""Leaving and entering namespaces."""

from __future__ import annotations

from pytest_vmsandbox.linux.arguments import check_bits, check_fd
from pytest_vmsandbox.linux.clone import CloneFlags
from pytest_vmsandbox.linux.libc import call_libc


def unshare(flags: int) -> None:
    """Put the caller into new namespaces of these kinds (unshare(2), Linux 2.6.16).

    `flags` are CloneFlags.NS_FLAGS and nothing else (ValueError). A new pid namespace is for the
    next child; a new user namespace can't be had by a process with threads (EINVAL). On failure
    no namespace was changed.
    """
    bits = check_bits(flags, allowed=CloneFlags.NS_FLAGS, argument="unshare: flags")
    call_libc("unshare", bits)


def setns(fd: int, nstype: int = 0) -> None:
    """Enter the namespace behind `fd`, which stays the caller's (setns(2), Linux 3.0).

    `fd` is an open /proc/PID/ns/* file, and `nstype` the kind it must be, or 0 for any; or it is a
    pidfd (since 5.8), and `nstype` are the kinds to enter, all of them or none.
    """
    bits = check_bits(nstype, allowed=CloneFlags.NS_FLAGS, argument="setns: nstype")
    call_libc("setns", check_fd(fd, argument="setns: fd"), bits)
