from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from pytest_vmsandbox.errors import RequestInvalid
from pytest_vmsandbox.vmm.qemu import Card, MachineType, QemuConfig, render_command

CONFIG = QemuConfig(
    program="/usr/bin/qemu-system-x86_64",
    name="vm1",
    directory=Path("/run/vmsandbox/r1/m1"),
    kernel=Path("/images/mini/kernel"),
    initramfs=Path("/images/mini/initramfs"),
    command_line=("console=ttyS0", "quiet"),
    machine_type=MachineType.Q35,
    accel="tcg",
    memory_mib=128,
    cpus=1,
)


def _option(command: list[str], name: str) -> list[str]:
    return [command[place + 1] for place, word in enumerate(command) if word == name]


def test_the_guest_waits_until_its_sockets_are_checked() -> None:
    assert "-S" in render_command(CONFIG)


def test_qemu_makes_every_socket_itself_and_waits_at_the_last_for_its_client() -> None:
    chardevs = _option(render_command(CONFIG), "-chardev")

    assert chardevs == [
        f"socket,id={name},path=/run/vmsandbox/r1/m1/{name}.sock,server=on,wait={wait}"
        for name, wait in (("console", "off"), ("agent", "off"), ("qmp", "on"))
    ]


def test_no_network_card_is_there_unless_asked_for() -> None:
    command = render_command(CONFIG)

    assert "-nodefaults" in command
    assert not [word for word in command if "net" in word]


def test_a_card_is_plugged_into_a_socket_or_a_tap() -> None:
    cards = [
        Card(mac="02:76:6d:00:00:02", wire=Path("/proc/self/fd/7"), tap=tap)
        for tap in (False, True)
    ]

    command = render_command(replace(CONFIG, cards=cards))

    assert _option(command, "-netdev") == ["socket,id=wire-card0,fd=7", "tap,id=wire-card1,fd=7"]


def test_a_comma_in_a_path_is_no_option() -> None:
    command = render_command(replace(CONFIG, directory=Path("/run/a,server=off")))

    assert "path=/run/a,,server=off/qmp.sock" in _option(command, "-chardev")[-1]


@pytest.mark.parametrize("name", ["a\nb", "a\0b", "\x1b[31m"])
def test_control_characters_are_refused(name: str) -> None:
    with pytest.raises(RequestInvalid, match="control characters"):
        render_command(replace(CONFIG, name=name))


def test_image_disks_are_handed_over_read_only() -> None:
    command = render_command(
        replace(CONFIG, read_only_disks={"vmsandbox-mods": Path("/images/m,ods.img")})
    )

    (drive,) = _option(command, "-drive")
    assert "file=/images/m,,ods.img" in drive
    assert "readonly=on" in drive


def test_seccomp_denies_what_a_vmm_never_needs() -> None:
    (sandbox,) = _option(render_command(CONFIG), "-sandbox")

    assert sandbox == "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"


def test_a_microvm_has_no_pci_devices() -> None:
    command = render_command(replace(CONFIG, machine_type=MachineType.MICROVM))

    assert not [word for word in command if "-pci" in word or "VGA" in word]


def test_a_qemu_without_seccomp_is_not_asked_for_it() -> None:
    assert "-sandbox" not in render_command(replace(CONFIG, seccomp=False))
