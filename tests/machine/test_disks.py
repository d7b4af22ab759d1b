"""Disks of a machine's own: kept while it lives, over a source that never changes."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from pytest_vmsandbox import (
    AsyncMachineFactory,
    Disk,
    Machine,
    MachineFactory,
    RequestInvalid,
    TemplateBuilder,
)
from pytest_vmsandbox.host.facts import Tier
from pytest_vmsandbox.machine.controller import MachineController
from pytest_vmsandbox.machine.disk import DISKS_AT_MOST
from pytest_vmsandbox.machine.spec import MachineSpec
from pytest_vmsandbox.machine.worker import Worker
from tests.machine.conftest import SmallHost

pytestmark = pytest.mark.machine

DISK0 = "/dev/disk/by-id/virtio-disk0"
DISK1 = "/dev/disk/by-id/virtio-disk1"

MIB = 1 << 20


def _write(vm: Machine, text: str, *, at: int = 0, disk: str = DISK0) -> None:
    vm.run(f"dd of={disk} bs=1M seek={at} conv=fsync", input=f"{text}\n", check=True)


def _line(vm: Machine, *, at: int = 0, disk: str = DISK0) -> str:
    """The one line of a mebibyte, whatever zeros follow it."""
    return vm.run(f"dd if={disk} bs=1M skip={at} count=1 2>/dev/null | tr -d '\\0'").stdout[:-1]


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.vm(disks=[Disk(size="64M"), Disk(size=MIB, serial="journal")])
def test_the_guest_has_them_in_order_under_their_serials(vm: Machine) -> None:
    journal = "/dev/disk/by-id/virtio-journal"
    sizes = vm.run(f"for disk in {DISK0} {journal}; do blockdev --getsize64 $disk; done").stdout

    assert sizes.split() == [str(64 * MIB), str(MIB)]
    assert vm.run(f"readlink -f {DISK0}").stdout == "/dev/vda\n"
    assert vm.run("cat /sys/block/vda/serial /sys/block/vdb/serial").stdout == "disk0journal"


@pytest.mark.vm(disks=[Disk(size="64M")])
def test_a_file_system_lives_through_reboot_shutdown_and_power_cut(vm: Machine) -> None:
    vm.run(f"mke2fs -q {DISK0} && mount {DISK0} /mnt && mkdir /mnt/kept", check=True)

    for end in (vm.reboot, vm.shutdown, vm.power_cut):
        vm.run(f"echo {end.__name__} >> /mnt/kept/ends && sync", check=True)
        end()
        if end != vm.reboot:
            vm.power_on()
        vm.run(f"mount {DISK0} /mnt", check=True)

    assert vm.read_text("/mnt/kept/ends") == "reboot\nshutdown\npower_cut\n"


@pytest.mark.vm(disks=[Disk(size="8M")])
def test_every_machine_begins_with_a_blank_disk(vm: Machine, vm_factory: MachineFactory) -> None:
    _write(vm, "mine")

    assert _line(vm_factory()) == ""
    assert _line(vm) == "mine"


@pytest.mark.parametrize("form", ["raw", "qcow2"])
def test_two_machines_over_one_source_see_their_own_writes_only(
    vm_factory: MachineFactory, source: Path, form: str
) -> None:
    source = _as(form, source)
    before = _digest(source)
    one, other = vm_factory(count=2, disks=[Disk(source=source)])

    _write(one, "one's")
    _write(other, "other's", at=4)
    one.power_cut()
    one.power_on()

    assert (_line(one), _line(one, at=4)) == ("one's", "middle")
    assert (_line(other), _line(other, at=4)) == ("first", "other's")
    assert _digest(source) == before


@pytest.mark.vm(disks=[Disk(size="8M")], lifecycle="restored")
def test_a_restored_machine_has_the_disks_of_its_template(vm: Machine) -> None:
    _write(vm, "written")

    vm.power_cut()
    vm.power_on()

    assert _line(vm) == "written"


def test_restored_machines_over_one_source_see_their_own_writes_only(
    vm_factory: MachineFactory, source: Path
) -> None:
    before = _digest(source)
    disks = [Disk(source=source, size="16M"), Disk(size="8M")]
    one, other = vm_factory(count=2, disks=disks, lifecycle="restored")

    _write(one, "one's")
    _write(one, "grown", at=15)
    _write(other, "blank no more", disk=DISK1)
    other.reboot()

    assert (_line(one), _line(one, at=4), _line(one, at=15)) == ("one's", "middle", "grown")
    assert _line(one, disk=DISK1) == ""
    assert (_line(other), _line(other, at=15)) == ("first", "")
    assert _line(other, disk=DISK1) == "blank no more"
    assert _digest(source) == before


def test_a_source_is_part_of_a_template_once_it_is_used_again(
    vm_factory: MachineFactory, source: Path
) -> None:
    lifecycles = [vm_factory(disks=[Disk(source=source)]).facts.lifecycle for _ in range(3)]

    assert lifecycles == ["booted", "restored", "restored"]


def test_a_source_that_changed_makes_another_template(
    vm_factory: MachineFactory, source: Path
) -> None:
    assert _line(vm_factory(disks=[Disk(source=source)], lifecycle="restored")) == "first"
    with source.open("r+b") as image:
        image.write(b"other\n")

    vm = vm_factory(disks=[Disk(source=source)], lifecycle="restored")

    assert _line(vm) == "other"


def test_nobody_writes_to_a_read_only_disk(vm_factory: MachineFactory, source: Path) -> None:
    vm = vm_factory(disks=[Disk(source=source, read_only=True)])

    assert _line(vm) == "first"
    assert vm.run(f"echo x | dd of={DISK0}").returncode != 0
    assert vm.run("cat /sys/block/vda/ro").stdout == "1\n"


def test_what_is_discarded_shows_nothing_of_the_source(
    vm_factory: MachineFactory, source: Path
) -> None:
    vm = vm_factory(disks=[Disk(source=source)])

    vm.run(f"blkdiscard {DISK0} && sync {DISK0}", check=True)
    vm.power_cut()
    vm.power_on()

    assert (_line(vm), _line(vm, at=4)) == ("", "")


async def test_several_disks_at_once(async_vm_factory: AsyncMachineFactory) -> None:
    vm = await async_vm_factory(disks=[Disk(size="1M")] * DISKS_AT_MOST)

    found = await vm.run("cat /sys/block/vd*/serial")

    assert all(f"disk{number}" in found.stdout for number in range(DISKS_AT_MOST))


def test_a_disk_longer_than_the_host_has_room_for(vm_factory: MachineFactory) -> None:
    vm = vm_factory(disks=[Disk(size="4T")])

    _write(vm, "far out", at=4 * MIB - 1)

    assert _line(vm, at=4 * MIB - 1) == "far out"


def test_disks_are_frozen_while_their_machine_is_paused_and_goes_on(
    worker: Worker, source: Path
) -> None:
    disks = (Disk(source=source), Disk(size="8M"))
    engine = worker.engine
    (controller,) = engine.run(worker.make([MachineSpec(disks=disks)]))
    engine.run(worker.boot([controller]))
    vm = Machine(controller, engine)
    _write(vm, "before")
    _write(vm, "before", disk=DISK1)

    vm.pause()
    with closing(controller.disks.freeze()) as frozen:
        vm.resume()
        _write(vm, "after!")
        _write(vm, "after!", disk=DISK1)
        build = engine.run(worker.plan(MachineSpec(disks=disks)))
        twin = MachineController(replace(build, disks=frozen.under(build.disks)))
        engine.run(worker.boot([twin]))

    assert _both(Machine(twin, engine)) == ["before", "before"]
    assert _both(vm) == ["after!", "after!"]
    engine.run(worker.end([controller, twin]))


FULL = """
import pytest
from pytest_vmsandbox import Disk, MachineFailed

@pytest.mark.vm(disks=[Disk(size="64M")], lifecycle="booted")
def test_it(vm):
    with pytest.raises(MachineFailed, match="file of the disk disk0: No space left on device"):
        vm.run("dd if=/dev/zero of=/dev/disk/by-id/virtio-disk0 bs=1M conv=fsync", timeout=60)
"""


@pytest.mark.vm_requires("user_namespaces")
def test_a_full_host_stops_the_guest_and_says_so(small_host: SmallHost) -> None:
    told = small_host(FULL, room_mib=4)

    assert "1 passed" in told, told


def test_a_source_is_for_a_vmm_that_may_read_it(vm_factory: MachineFactory, source: Path) -> None:
    source.chmod(0o600)
    disks = [Disk(source=source)]

    if vm_factory().facts.tier in (Tier.USERNS, Tier.BARE):  # the VMM runs in our own name
        assert _line(vm_factory(disks=disks)) == "first"
    else:
        with pytest.raises(RequestInvalid, match=f"chmod o\\+r {source}"):
            vm_factory(disks=disks)


def _both(vm: Machine) -> list[str]:
    return [_line(vm), _line(vm, disk=DISK1)]


def _as(form: str, source: Path) -> Path:
    if form == "raw":
        return source
    image = source.with_suffix(".qcow2")
    program = shutil.which("qemu-img")
    if program is None:
        pytest.skip("qemu-img is not installed")
    subprocess.run(
        [program, "convert", "-f", "raw", "-O", form, source, image], check=True, timeout=60
    )
    return image


def test_what_a_setup_writes_is_on_the_disks_of_every_machine_of_its_template(
    vm_templates: TemplateBuilder, vm_factory: MachineFactory, source: Path
) -> None:
    def first(vm: Machine) -> None:
        _write(vm, "by the first")
        _write(vm, "on the blank one", disk=DISK1)

    def second(vm: Machine) -> None:
        assert _line(vm) == "by the first"
        _write(vm, "by the second", at=1)

    disks = [Disk(source=source), Disk(size="8M")]
    below = vm_templates.build(setup=first, name="disks-first", disks=disks, key=str(source))
    template = vm_templates.build(setup=second, name="disks-second", base=below, key=str(source))
    one, other = vm_factory(count=2, template=template)
    _write(one, "by one", at=2)
    one.power_cut()
    one.power_on()

    for vm, own in ((one, "by one"), (other, "")):
        lines = [_line(vm, at=place) for place in (0, 1, 2, 4)]
        assert lines == ["by the first", "by the second", own, "middle"]
        assert _line(vm, disk=DISK1) == "on the blank one"
