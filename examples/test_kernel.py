"""Kernels are why machines exist: modules, file systems, panics, power."""

from __future__ import annotations

import pytest

from pytest_vmsandbox import GuestPanicked, Machine


def test_a_module_is_loaded(vm_module: Machine) -> None:
    vm_module.run(["modprobe", "dummy"], check=True)

    assert "dummy0" in vm_module.run("ip link").stdout


def test_a_file_system_is_made_mounted_and_filled(vm_module: Machine) -> None:
    vm_module.run("truncate -s 16M /root/disk && mke2fs -F /root/disk", check=True)
    vm_module.run("modprobe loop && mount -o loop /root/disk /mnt", check=True)

    full = vm_module.run("cat /dev/zero > /mnt/filler")

    assert full.returncode != 0
    assert "No space left" in full.stderr


@pytest.mark.vm_expect("panic")
def test_a_panic_that_is_meant(vm: Machine) -> None:
    vm.run("echo c > /proc/sysrq-trigger")


def test_a_panic_that_is_caught(vm: Machine) -> None:
    with pytest.raises(GuestPanicked, match="sysrq triggered crash"):
        vm.run("echo c > /proc/sysrq-trigger")


def test_a_reboot_brings_a_new_boot_id(vm: Machine) -> None:
    before = vm.read_text("/proc/sys/kernel/random/boot_id")

    vm.reboot()

    assert vm.read_text("/proc/sys/kernel/random/boot_id") != before


@pytest.mark.vm(memory_mib=256, cpus=2)
def test_a_machine_of_another_shape(vm: Machine) -> None:
    assert vm.run("nproc").stdout == "2\n"


@pytest.mark.vm_requires("kvm")
def test_what_needs_kvm_is_skipped_without_it(vm: Machine) -> None:
    assert vm.facts.accel == "kvm"
