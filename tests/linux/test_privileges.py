"""Giving up every capability, in children."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from pytest_vmsandbox.linux import (
    Capabilities,
    CapabilitySets,
    PrctlOption,
    SecureBits,
    drop_all_capabilities,
    prctl,
    prctl_raise_ambient_capabilities,
)

InChild = Callable[..., None]


def test_every_set_is_empty_and_stays_so_over_exec(in_room: InChild) -> None:
    def body() -> None:
        def sets(status: str) -> dict[str, int]:
            return {name: int(bits, 16) for name, bits in re.findall(r"Cap(\w+):\s+(\w+)", status)}

        held = CapabilitySets.capget().permitted
        CapabilitySets(effective=held, permitted=held, inheritable=held).capset()
        prctl_raise_ambient_capabilities()
        before = sets(Path("/proc/self/status").read_text())
        assert all(before[name] & Capabilities.SYS_ADMIN for name in ("Bnd", "Amb", "Inh", "Eff"))
        nothing = dict.fromkeys(before, 0)

        drop_all_capabilities()

        assert sets(Path("/proc/self/status").read_text()) == nothing
        show = "print(open('/proc/self/status').read())"
        # To uid 0, and to the uid 0 of a namespace, exec gives everything, were it not for NOROOT.
        assert os.geteuid() == 0
        done = subprocess.run([sys.executable, "-c", show], capture_output=True, check=True)
        assert sets(done.stdout.decode()) == nothing

    in_room(body)


def test_what_is_kept_lasts_over_exec_and_nothing_else_does(in_room: InChild) -> None:
    def body() -> None:
        kept = Capabilities.NET_ADMIN | Capabilities.NET_RAW

        drop_all_capabilities(but=kept)

        show = "print(open('/proc/self/status').read())"
        done = subprocess.run([sys.executable, "-c", show], capture_output=True, check=True)
        found = dict(re.findall(r"Cap(\w+):\s+(\w+)", done.stdout.decode()))
        sets = {name: int(bits, 16) for name, bits in found.items()}
        assert sets == {"Inh": kept, "Prm": kept, "Eff": kept, "Amb": kept, "Bnd": 0}
        for more in (Capabilities.SYS_ADMIN, kept | Capabilities.CHOWN):
            with pytest.raises(PermissionError):
                CapabilitySets(permitted=more, effective=more).capset()
        with pytest.raises(PermissionError):
            prctl(PrctlOption.SET_SECUREBITS, 0)

    in_room(body)


def test_what_was_given_up_can_not_be_had_again(in_room: InChild) -> None:
    def body() -> None:
        drop_all_capabilities()
        bits = prctl(PrctlOption.GET_SECUREBITS)
        assert bits == 0xEF
        assert not bits & SecureBits.KEEP_CAPS
        for attempt in (
            lambda: prctl(PrctlOption.SET_SECUREBITS, 0),
            lambda: prctl(PrctlOption.SET_KEEPCAPS, 1),
            lambda: prctl_raise_ambient_capabilities(Capabilities.CHOWN),
            lambda: CapabilitySets(permitted=Capabilities.CHOWN).capset(),
            lambda: CapabilitySets(inheritable=Capabilities.CHOWN).capset(),
        ):
            with pytest.raises(PermissionError):
                attempt()

    in_room(body)


def test_a_second_time_is_harmless(in_room: InChild) -> None:
    def body() -> None:
        drop_all_capabilities()
        drop_all_capabilities()
        assert CapabilitySets.capget() == CapabilitySets()

    in_room(body)


def test_keeping_capabilities_over_a_change_of_user_is_turned_off(in_room: InChild) -> None:
    def body() -> None:
        prctl(PrctlOption.SET_KEEPCAPS, 1)
        drop_all_capabilities()
        assert prctl(PrctlOption.GET_KEEPCAPS) == 0

    in_room(body)


def test_who_may_not_drop_is_told_so_and_keeps_what_it_has(in_room: InChild) -> None:
    def body() -> None:
        kept = Capabilities.CHOWN | Capabilities.KILL
        CapabilitySets(effective=kept, permitted=kept).capset()
        with pytest.raises(PermissionError, match="prctl"):
            drop_all_capabilities()
        assert CapabilitySets.capget() == CapabilitySets(effective=kept, permitted=kept)

    in_room(body)


def test_an_ordinary_user_can_not_empty_its_bounding_set(in_child: InChild, user_id: int) -> None:
    if user_id == 0:
        pytest.skip("VMS-TEST-ROOT: root can")

    def body() -> None:
        with pytest.raises(PermissionError, match="prctl"):
            drop_all_capabilities()

    in_child(body)
