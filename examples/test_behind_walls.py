"""Walls: which ones a machine has, and commands of the host behind the same ones.

A tier is how the walls are built here, and how much they keep apart (docs/hosts.md). In the tier
`bare` there are none: what needs them is skipped there, with the reason.
"""

from __future__ import annotations

import pytest

from pytest_vmsandbox import Jail, Machine

ISOLATED = {"mounts": "isolated", "network": "isolated"}


def run(jail: Jail, script: str, **walls: object) -> tuple[int, str, str]:
    """A line of shell of the host, behind walls: exit status, output, complaints."""
    status, out, err = jail.run(["/bin/sh", "-c", script], **walls)  # type: ignore[arg-type]
    assert out is not None
    assert err is not None
    return status, out.decode(), err.decode()


def test_a_machine_says_behind_which_walls_it_runs(vm: Machine) -> None:
    if vm.facts.tier == "bare":
        pytest.skip("no walls here: what this test would let loose stays out")

    assert vm.facts.tier in {"root", "sudo", "qemu-vm", "userns"}


@pytest.mark.vm(tier="qemu-vm")
def test_a_hostile_guest_is_only_let_in_where_its_vmm_is_nobody_of_ours(vm: Machine) -> None:
    # Skipped, with the reason, where this user can't start a VMM as the user qemu-vm.
    assert vm.facts.tier == "qemu-vm"
    assert vm.run("id -u").stdout == "0\n"  # root, in a world of its own


def test_an_installer_writes_nowhere_but_where_it_may(vm_jail: Jail) -> None:
    status, out, err = run(
        vm_jail,
        "touch /usr/planted; echo kept > /mnt/result; cat /mnt/result",
        filesystem_writable_paths=["/mnt"],
        extra_mounts=[("none", "/mnt", "tmpfs")],
        **ISOLATED,
    )

    assert (status, out) == (0, "kept\n")
    assert "Read-only file system" in err


def test_a_build_without_network_sees_none(vm_jail: Jail) -> None:
    _, out, _ = run(vm_jail, "tail -n +3 /proc/net/dev", filesystem_writable_paths=None, **ISOLATED)

    (interface,) = out.splitlines()
    assert interface.split(":")[0].strip() == "lo"


def test_a_command_meets_no_process_of_the_host(vm_jail: Jail) -> None:
    status, out, _ = run(vm_jail, "cd /proc && echo [0-9]*", **ISOLATED)

    assert status == 0
    assert set(out.split()) <= {"1", "2", "3"}
