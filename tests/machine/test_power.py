"""Power, reboot, pause: what a machine is between its first and its last moment."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from pytest_vmsandbox import Machine, RequestInvalid, TimedOut
from pytest_vmsandbox.vmm.qemu import MachineType


def _boot_id(vm: Machine) -> str:
    return vm.read_text("/proc/sys/kernel/random/boot_id")


def test_a_reboot_is_a_new_boot_of_the_same_machine(vm: Machine) -> None:
    before, qemu = _boot_id(vm), vm.qmp("query-uuid")
    vm.write_text("/run/in-memory", "gone afterwards")

    vm.reboot()

    assert _boot_id(vm) != before
    assert vm.qmp("query-uuid") == qemu
    assert vm.run("test -e /run/in-memory").returncode == 1
    assert vm.run("hostname").stdout.strip() == vm.name


def test_a_guest_that_reboots_itself_answers_again(vm: Machine) -> None:
    before = _boot_id(vm)
    vm.popen("sleep 0.2; reboot -f")
    vm.console.wait_for("reboot: Restarting system", timeout=30)

    vm.wait_until("test -e /proc/uptime", timeout=60)

    assert _boot_id(vm) != before


def test_after_a_shutdown_it_can_be_powered_on(vm: Machine) -> None:
    before = _boot_id(vm)

    vm.shutdown()
    with pytest.raises(RequestInvalid, match="powered off"):
        vm.run(["true"])
    vm.power_on()

    assert _boot_id(vm) != before
    assert "reboot: Power down" in vm.console.text


def test_a_power_cut_gives_the_guest_no_chance(vm: Machine) -> None:
    before = _boot_id(vm)

    vm.power_cut()
    vm.power_cut()
    with pytest.raises(RequestInvalid, match="powered off"):
        vm.qmp("query-status")
    vm.power_on()

    assert _boot_id(vm) != before
    assert "Power down" not in vm.console.text


def test_power_on_twice_is_refused(vm: Machine) -> None:
    with pytest.raises(RequestInvalid, match="powered on already"):
        vm.power_on()


def test_a_paused_machine_does_nothing_until_it_is_resumed(vm: Machine) -> None:
    vm.pause()
    with pytest.raises(TimedOut, match="QEMU answers QMP: yes; the guest's agent answers: no"):
        vm.run(["true"], timeout=0.5)
    vm.resume()

    assert vm.run(["true"]).returncode == 0


def test_qmp_is_the_way_around_and_refusals_name_the_command(vm: Machine) -> None:
    assert vm.qmp("query-status") == {"running": True, "singlestep": False, "status": "running"}
    with pytest.raises(RequestInvalid, match="QMP no-such-command"):
        vm.qmp("no-such-command")


def test_a_screenshot_shows_what_the_guest_draws(vm: Machine, tmp_path: Path) -> None:
    vm.screenshot(tmp_path / "before.png")
    # The firmware left the display in text mode: characters and their colours lie at 0xb8000.
    draw = "printf 'S\\007e\\007e\\007' | dd of=/dev/mem bs=1 seek=$((0xb8000)) conv=notrunc"
    vm.run(draw, check=True)
    vm.screenshot(tmp_path / "after.png")

    before, after = ((tmp_path / name).read_bytes() for name in ("before.png", "after.png"))
    assert after.startswith(b"\x89PNG\r\n")
    assert after != before


def test_each_machine_has_an_identity_of_its_own(vm: Machine) -> None:
    before = vm.read_text("/etc/machine-id")
    vm.reboot()

    assert re.fullmatch(r"[0-9a-f]{32}\n", before)
    assert vm.read_text("/etc/machine-id") != before


def test_a_microvm_boots_and_answers_too(vm: Machine) -> None:
    vm.power_cut()
    build = vm._controller.build
    # Told its clock's rate, the kernel does not calibrate it, which under TCG may hang for good.
    (khz,) = re.findall(r"cpu MHz\s*: (\d+)\.(\d+)", Path("/proc/cpuinfo").read_text())[:1]
    told = (*build.config.command_line, f"tsc_early_khz={''.join(khz)}")
    config = replace(build.config, machine_type=MachineType.MICROVM, command_line=told)
    vm._controller.build = replace(build, config=config)
    vm.power_on()

    assert vm.run("ls /sys/bus/pci/devices 2>/dev/null").stdout == ""
    with pytest.raises(RequestInvalid, match="screendump"):
        vm.screenshot("/dev/null")


def test_what_the_machine_is_stands_in_its_facts(vm: Machine) -> None:
    assert vm.facts.kernel == vm.run("uname -r").stdout.strip()
    assert vm.facts.accel in ("kvm", "tcg")
    assert vm.facts.tier in ("root", "sudo", "qemu-vm", "userns", "bare")
    assert vm.facts.image == "mini"
    assert len(vm.facts.image_digest) == 64
    assert vm.facts.vmm_version[0].isdigit()


@pytest.mark.vm(lifecycle="booted")
def test_what_a_boot_cost_stands_in_its_timings(vm: Machine) -> None:
    vm.run(["true"])

    assert vm.timings.boot_attempts >= 1
    assert vm.timings.spawn_s is not None
    assert vm.timings.boot_s is not None
    assert vm.timings.first_command_s is not None
    assert vm.timings.load_s is None
    assert vm.timings.restore_s is None
