"""What calls refuse before the kernel sees it."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from typing import cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_vmsandbox.linux import (
    AT_FDCWD,
    AtLocation,
    Capabilities,
    CapabilitySets,
    CloneFlags,
    EventFD,
    MountAttrFlags,
    MountFlags,
    OpenTreeFlags,
    UmountFlags,
    mount,
    mount_setattr,
    move_mount,
    open_tree,
    openat2,
    pidfd_open,
    pidfd_send_signal,
    pivot_root,
    prctl,
    prctl_raise_ambient_capabilities,
    prctl_set_pdeathsig,
    setns,
    umount,
    unshare,
    write_identity_maps,
)
from pytest_vmsandbox.linux.arguments import (
    bits_of,
    check_bits,
    check_fd,
    check_range,
    encode_path,
)


def _sets(bits: int) -> CapabilitySets:
    # Not through Capabilities(), which reads -1 as "all".
    return CapabilitySets(effective=cast(Capabilities, bits))


# Nothing of this exists: if a refusal failed, the kernel's answer would be an OSError.
NOWHERE = "/no such place"

# By the words in front of the refusal's colon; trailing spaces tell equal ones apart.
FLAG_CALLS: dict[str, Callable[[int], object]] = {
    "mount: flags": lambda bits: mount("none", NOWHERE, "tmpfs", bits),
    "umount: flags": lambda bits: umount(NOWHERE, bits),
    "open_tree: flags": lambda bits: open_tree(NOWHERE, bits),
    "move_mount: flags": lambda bits: move_mount(NOWHERE, NOWHERE, bits),
    "mount_setattr: flags": lambda bits: mount_setattr(NOWHERE, bits),
    "mount_setattr: attr_set": lambda bits: mount_setattr(NOWHERE, attr_set=bits),
    "mount_setattr: attr_clr": lambda bits: mount_setattr(NOWHERE, attr_clr=bits),
    "mount_setattr: propagation": lambda bits: mount_setattr(NOWHERE, propagation=bits),
    "unshare: flags": unshare,
    "setns: nstype": lambda bits: setns(-1, bits),
    "capabilities": prctl_raise_ambient_capabilities,
    "capabilities ": lambda bits: prctl_raise_ambient_capabilities([bits]),
    "capset: effective": lambda bits: _sets(bits).capset(),
    "eventfd: flags": lambda bits: EventFD(0, bits),
    "pidfd_open: flags": lambda bits: pidfd_open(2**31 - 1, bits),
    "openat2: flags": lambda bits: openat2(AT_FDCWD, NOWHERE, bits),
    "openat2: resolve": lambda bits: openat2(AT_FDCWD, NOWHERE, 0, resolve=bits),
    "flags": lambda bits: AtLocation(path=NOWHERE, flags=bits),
}


@pytest.mark.parametrize("argument", FLAG_CALLS)
@pytest.mark.parametrize("bits", [1 << 41, 1 << 63, 1 << 64, (1 << 40 | 1) << 32, -1, -(1 << 40)])
def test_unknown_high_bits_are_refused_by_every_call(argument: str, bits: int) -> None:
    said = rf"^{argument.strip()}: {bits:#x} has bits that are not accepted: "
    with pytest.raises(ValueError, match=said):
        FLAG_CALLS[argument](bits)


@pytest.mark.parametrize(
    "call",
    [
        lambda: mount("none", NOWHERE, "tmpfs", MountFlags.RDONLY | (1 << 33)),
        lambda: umount(NOWHERE, UmountFlags.DETACH | (1 << 33)),
        lambda: unshare(CloneFlags.NEWNS | (1 << 33)),
        lambda: open_tree(NOWHERE, OpenTreeFlags.CLONE | (1 << 33)),
        lambda: mount_setattr(NOWHERE, attr_set=MountAttrFlags.RDONLY | (1 << 33)),
    ],
)
def test_a_high_bit_hidden_in_a_flag_of_the_right_class_is_refused(
    call: Callable[[], object],
) -> None:
    with pytest.raises(ValueError, match="not accepted: 0x200000000"):
        call()


@pytest.mark.parametrize("bit", range(64))
@pytest.mark.parametrize("call", [unshare, lambda bits: setns(-1, bits)])
def test_only_namespaces_can_be_unshared_and_entered(
    call: Callable[[int], object], bit: int
) -> None:
    if 1 << bit & CloneFlags.NS_FLAGS:
        return  # those are called for real in test_namespaces
    with pytest.raises(ValueError, match="bits that are not accepted"):
        call(1 << bit)


@pytest.mark.parametrize("flag", [flag for flag in MountFlags if flag & MountFlags.KERNEL_ONLY])
def test_mount_refuses_the_flags_that_the_kernel_would_ignore(flag: MountFlags) -> None:
    with pytest.raises(ValueError, match="mount: flags"):
        mount("none", NOWHERE, "tmpfs", flag)


NUL_CALLS: dict[str, Callable[[str], object]] = {
    "source": lambda bad: mount(bad, NOWHERE, "tmpfs"),
    "target": lambda bad: mount("none", bad, "tmpfs"),
    "fstype": lambda bad: mount("none", NOWHERE, bad),
    "data": lambda bad: mount("none", NOWHERE, "tmpfs", 0, bad),
    "data ": lambda bad: mount("none", NOWHERE, "tmpfs", 0, ["size=1", bad]),
    "target ": umount,
    "new_root": lambda bad: pivot_root(bad, NOWHERE),
    "put_old": lambda bad: pivot_root(NOWHERE, bad),
    "path": open_tree,
    "path ": lambda bad: move_mount(bad, NOWHERE),
    "path  ": lambda bad: move_mount(NOWHERE, bad),
    "path   ": mount_setattr,
    "path    ": lambda bad: AtLocation(path=bad),
    "path     ": lambda bad: openat2(AT_FDCWD, bad, 0),
    "part": lambda bad: AtLocation(path=NOWHERE).joinpath(bad),
}


@pytest.mark.parametrize("argument", NUL_CALLS)
@pytest.mark.parametrize("bad", ["/tmp\0x", "\0", "/tmp\0"])
def test_a_nul_is_refused_and_the_argument_named(argument: str, bad: str) -> None:
    shown = re.escape(repr(bad.encode()))
    with pytest.raises(ValueError, match=rf"^{argument.strip()} holds a NUL byte: {shown}$"):
        NUL_CALLS[argument](bad)


@pytest.mark.parametrize(
    ("argument", "call"),
    [
        ("setns: fd", lambda: setns(2**32)),
        ("setns: fd", lambda: setns(-2)),
        ("pidfd_open: pid", lambda: pidfd_open(2**32 + 1)),
        ("pidfd_open: pid", lambda: pidfd_open(0)),
        ("pidfd_open: pid", lambda: pidfd_open(-1)),
        ("pidfd", lambda: pidfd_send_signal(2**32, 0)),
        ("signal", lambda: pidfd_send_signal(0, 65)),
        ("signal", lambda: pidfd_send_signal(0, -1)),
        ("signal", lambda: prctl_set_pdeathsig(65)),
        ("signal", lambda: prctl_set_pdeathsig(-1)),
        ("prctl: arg2", lambda: prctl(1, 2**64)),
        ("prctl: arg3", lambda: prctl(1, 0, 2**64)),
        ("prctl: arg4", lambda: prctl(1, 0, 0, 2**64)),
        ("prctl: arg5", lambda: prctl(1, 0, 0, 0, -(2**63) - 1)),
        ("capget: pid", lambda: CapabilitySets.capget(-1)),
        ("capget: pid", lambda: CapabilitySets.capget(2**32 + 1)),
        ("eventfd: initval", lambda: EventFD(2**32)),
        ("eventfd: initval", lambda: EventFD(-1)),
        ("openat2: mode", lambda: openat2(AT_FDCWD, NOWHERE, 0, mode=2**64)),
        ("fd", lambda: openat2(2**32, NOWHERE, 0)),
        ("uid", lambda: write_identity_maps(2**22 + 1, uid=2**32, gid=1, deny_setgroups=True)),
        ("fd", lambda: AtLocation(-1, "x")),
        ("fd", lambda: AtLocation(2**32 + 1, "x")),
    ],
)
def test_a_number_that_c_would_cut_is_refused(argument: str, call: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match=rf"^{argument}: -?\d+ is not in -?\d+\.\.\d+$"):
        call()


@given(st.integers(), st.integers(min_value=0))
def test_bits_are_accepted_exactly_when_all_of_them_are_allowed(value: int, allowed: int) -> None:
    within = value >= 0 and value | allowed == allowed

    if within:
        assert check_bits(value, allowed=allowed, argument="flags") == value
    else:
        with pytest.raises(ValueError, match=r"^flags: "):
            check_bits(value, allowed=allowed, argument="flags")


def test_the_bits_of_some_flags_are_theirs_and_no_more() -> None:
    assert bits_of([]) == 0
    assert bits_of([MountFlags.NOSUID, MountFlags.NOEXEC]) == 2 | 8
    with pytest.raises(ValueError, match="flags: 0x1 has bits"):
        AtLocation(path=NOWHERE, flags=1)


def test_checked_bits_are_plain_integers() -> None:
    bits = check_bits(MountFlags.RDONLY, allowed=MountFlags.RDONLY, argument="flags")

    assert type(bits) is int


@pytest.mark.parametrize(("value", "good"), [(0, False), (1, True), (3, True), (4, False)])
def test_a_range_includes_both_its_ends(value: int, *, good: bool) -> None:
    if good:
        assert check_range(value, lowest=1, highest=3, argument="it") == value
    else:
        with pytest.raises(ValueError, match=r"^it: \d is not in 1\.\.3"):
            check_range(value, lowest=1, highest=3, argument="it")


@pytest.mark.parametrize("fd", [-1, 0, 2**31 - 1])
def test_a_number_that_may_be_a_descriptor_is_left_to_the_kernel(fd: int) -> None:
    assert check_fd(fd, argument="fd") == fd


@pytest.mark.parametrize("fd", [-2, 2**31])
def test_a_number_that_no_descriptor_has_is_refused(fd: int) -> None:
    with pytest.raises(ValueError, match=rf"^fd: {fd} is not in -1\.\.2147483647$"):
        check_fd(fd, argument="fd")


@pytest.mark.parametrize("odd", [b"/tmp/\xff\xfe", "/tmp/\udcff\udcfe", "/tmp/é"])
def test_paths_of_any_bytes_are_taken_as_they_are(odd: str | bytes) -> None:
    assert encode_path(odd, argument="path") == os.fsencode(odd)
