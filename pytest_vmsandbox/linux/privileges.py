"""Giving up privilege for good."""

from __future__ import annotations

import errno
from dataclasses import replace
from enum import IntFlag

from pytest_vmsandbox.linux.capabilities import Capabilities, CapabilitySets
from pytest_vmsandbox.linux.prctl import PrctlOption, prctl, prctl_raise_ambient_capabilities

_NONE = Capabilities(0)


class SecureBits(IntFlag):
    """SECBIT_* of <linux/securebits.h> (capabilities(7)); each also without its prefix."""

    SECBIT_NOROOT = NOROOT = 1 << 0
    SECBIT_NOROOT_LOCKED = NOROOT_LOCKED = 1 << 1
    SECBIT_NO_SETUID_FIXUP = NO_SETUID_FIXUP = 1 << 2
    SECBIT_NO_SETUID_FIXUP_LOCKED = NO_SETUID_FIXUP_LOCKED = 1 << 3
    SECBIT_KEEP_CAPS = KEEP_CAPS = 1 << 4
    SECBIT_KEEP_CAPS_LOCKED = KEEP_CAPS_LOCKED = 1 << 5
    SECBIT_NO_CAP_AMBIENT_RAISE = NO_CAP_AMBIENT_RAISE = 1 << 6
    SECBIT_NO_CAP_AMBIENT_RAISE_LOCKED = NO_CAP_AMBIENT_RAISE_LOCKED = 1 << 7


_LOCKED = (
    SecureBits.NOROOT
    | SecureBits.NOROOT_LOCKED
    | SecureBits.NO_SETUID_FIXUP
    | SecureBits.NO_SETUID_FIXUP_LOCKED
    | SecureBits.KEEP_CAPS_LOCKED
    | SecureBits.NO_CAP_AMBIENT_RAISE
    | SecureBits.NO_CAP_AMBIENT_RAISE_LOCKED
)


def drop_all_capabilities(*, but: Capabilities = _NONE) -> None:
    """Leave the calling thread without any capability, and without a way back to one.

    Those of `but` it keeps, over exec too, until it gives them up itself: they are in every set but
    the bounding one. Otherwise
    bounding, ambient, inheritable, permitted and effective set are empty afterwards, and no exec
    by uid 0 and no change of uid brings anything back: the securebits that say so are locked
    (capabilities(7)). To be called where there is one thread. PermissionError without CAP_SETPCAP,
    unless all of this is so already; the other sets are then as they were. Nothing here is read
    from /proc: there may be none yet.
    """
    if but:
        now = CapabilitySets.capget()
        replace(now, inheritable=but).capset()
        prctl_raise_ambient_capabilities(but)
    _empty_bounding_set()
    _lock_secure_bits()
    # Which takes the other ambient ones along: they must be permitted.
    CapabilitySets(effective=but, permitted=but, inheritable=but).capset()


def _empty_bounding_set() -> None:
    number = 0
    while _is_dropped(number):
        number += 1


def _is_dropped(number: int) -> bool:
    """Take one out of the bounding set; False beyond the last one that this kernel knows."""
    try:
        try:
            prctl(PrctlOption.PR_CAPBSET_DROP, number)
        except PermissionError:
            if prctl(PrctlOption.PR_CAPBSET_READ, number):
                raise
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return False
    return True


def _lock_secure_bits() -> None:
    now = prctl(PrctlOption.PR_GET_SECUREBITS)
    wanted = (now | int(_LOCKED)) & ~int(SecureBits.SECBIT_KEEP_CAPS)
    if wanted != now:
        prctl(PrctlOption.PR_SET_SECUREBITS, wanted)
