"""Capability sets of children, as root and as an ordinary user."""

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
    prctl_raise_ambient_capabilities,
)
from pytest_vmsandbox.linux import capabilities as module

InChild = Callable[..., None]


def shown(status: str) -> dict[str, int]:
    return {name: int(bits, 16) for name, bits in re.findall(r"Cap(\w+):\s+(\w+)", status)}


def test_the_sets_are_those_that_proc_shows() -> None:
    status = shown(Path("/proc/thread-self/status").read_text(encoding="ascii"))

    sets = CapabilitySets.capget()

    assert sets.effective == status["Eff"]
    assert sets.permitted == status["Prm"]
    assert sets.inheritable == status["Inh"]
    assert CapabilitySets.capget(os.getpid()).permitted == status["Prm"]


def test_a_process_that_is_not_there_has_none() -> None:
    with pytest.raises(ProcessLookupError, match="capget"):
        CapabilitySets.capget(2**22 + 1)


def test_sets_are_given_up_and_do_not_come_back(in_room: InChild) -> None:
    def body() -> None:
        high = Capabilities.CHECKPOINT_RESTORE  # beyond the first 32 bits
        kept = Capabilities.SYS_ADMIN | high
        CapabilitySets(effective=Capabilities.SYS_ADMIN, permitted=kept, inheritable=high).capset()
        now = CapabilitySets.capget()
        assert now.effective == Capabilities.SYS_ADMIN
        assert now.permitted == kept
        assert now.inheritable == high
        with pytest.raises(PermissionError, match="capset"):
            CapabilitySets(permitted=kept | Capabilities.KILL).capset()
        assert CapabilitySets.capget() == now

    in_room(body)


def test_an_ordinary_user_has_none(in_child: InChild, user_id: int) -> None:
    if user_id == 0:
        pytest.skip("VMS-TEST-ROOT: root has them all")

    def body() -> None:
        assert CapabilitySets.capget() == CapabilitySets()
        CapabilitySets().capset()
        with pytest.raises(PermissionError):
            prctl_raise_ambient_capabilities(Capabilities.KILL)

    in_child(body)


def test_ambient_capabilities_reach_a_program(in_room: InChild) -> None:
    def body() -> None:
        mine = Capabilities.SYS_ADMIN | Capabilities.NET_RAW | Capabilities.BPF
        all_mine = CapabilitySets.capget().permitted
        CapabilitySets(effective=all_mine, permitted=all_mine, inheritable=mine).capset()

        def ambient() -> int:
            code = "print(open('/proc/self/status').read().split('CapAmb:')[1].split()[0])"
            done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
            return int(done.stdout, 16)

        assert ambient() == 0
        prctl_raise_ambient_capabilities(Capabilities.BPF)
        assert ambient() == Capabilities.BPF
        prctl_raise_ambient_capabilities([Capabilities.NET_RAW, Capabilities.BPF])
        assert ambient() == Capabilities.NET_RAW | Capabilities.BPF
        prctl_raise_ambient_capabilities()
        assert ambient() == mine
        with pytest.raises(PermissionError):
            prctl_raise_ambient_capabilities(Capabilities.CHOWN | Capabilities.SETUID)
        assert ambient() == mine

    in_room(body)


def test_a_capability_beyond_this_kernels_last_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    last = tmp_path / "cap_last_cap"
    last.write_text("36\n")
    monkeypatch.setattr(module, "_LAST_CAPABILITY", last)

    with pytest.raises(ValueError, match=r"capset: permitted: .* 0x2000000000$"):
        CapabilitySets(permitted=Capabilities.AUDIT_READ | Capabilities.KILL).capset()
    assert module._known_here() == Capabilities.BLOCK_SUSPEND * 2 - 1


def test_without_proc_our_own_list_of_capabilities_counts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(module, "_LAST_CAPABILITY", tmp_path / "none")

    assert module._known_here() == Capabilities.CHECKPOINT_RESTORE * 2 - 1
