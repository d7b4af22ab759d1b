"""A template whose root can't be written to any more: its machines are themselves all the same."""

from __future__ import annotations

import pytest

from pytest_vmsandbox import BootFailed, Machine, MachineFactory, TemplateBuilder

pytestmark = pytest.mark.machine


def read_only(vm: Machine) -> None:
    vm.run("mount -o remount,ro /", check=True)
    assert vm.run("echo > /etc/hostname").returncode != 0


def read_only_and_bare(vm: Machine) -> None:
    vm.run("rm /etc/machine-id && mount -o remount,ro /", check=True)


def test_machines_with_a_read_only_root_have_a_machine_id_each(
    vm_factory: MachineFactory, vm_templates: TemplateBuilder
) -> None:
    one, other = vm_factory(count=2, template=vm_templates.build(setup=read_only))

    assert len({vm.read_text("/etc/machine-id") for vm in (one, other)}) == 2
    (twin,) = one.fork(1)
    assert twin.read_text("/etc/machine-id") != one.read_text("/etc/machine-id")


def test_a_guest_that_can_not_have_an_identity_is_no_machine(
    vm_factory: MachineFactory, vm_templates: TemplateBuilder
) -> None:
    template = vm_templates.build(setup=read_only_and_bare)

    with pytest.raises(BootFailed, match="/etc/machine-id: Read-only file system") as caught:
        vm_factory(template=template)
    assert caught.value.evidence.command_line
    assert caught.value.evidence.console_tail


def test_machines_with_a_read_only_root_know_each_other_by_name(
    vm_factory: MachineFactory, vm_templates: TemplateBuilder
) -> None:
    template = vm_templates.build(setup=read_only, name="read_only_on_lan", network="lan")
    one = vm_factory(template=template, network="lan", name="one")
    other = vm_factory(template=template, network="lan", name="other")

    for vm, name in ((one, "other"), (other, "one"), (other, "other")):
        assert vm.run(["ping", "-c", "1", "-W", "5", name]).returncode == 0
    assert "one" in other.read_text("/etc/hosts")
    vm_factory(template=template, network="lan", name="third")
    assert one.run(["ping", "-c", "1", "-W", "5", "third"]).returncode == 0
    assert one.read_text("/proc/self/mounts").count("/etc/hosts") == 1
