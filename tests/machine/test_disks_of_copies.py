"""Disks of snapshots and twins: of any kind, of any machine, and where the host has no room."""

from __future__ import annotations

from pathlib import Path

import pytest

from pytest_vmsandbox import Disk, Machine, MachineFactory
from tests.machine.conftest import SmallHost
from tests.machine.test_disks import DISK1, _digest, _line, _write

pytestmark = pytest.mark.machine


def _power_cycle(vm: Machine) -> None:
    vm.power_cut()
    vm.power_on()


@pytest.mark.parametrize("lifecycle", ["booted", "restored"])
def test_disks_over_a_source_are_copied_and_its_own_bytes_stay(
    vm_factory: MachineFactory,
    source: Path,
    lifecycle: str,
) -> None:
    before = _digest(source)
    disks = [Disk(source=source), Disk(source=source, read_only=True)]
    vm = vm_factory(disks=disks, lifecycle=lifecycle)
    _write(vm, "then", at=1)
    snapshot = vm.snapshot()
    (twin,) = vm.fork(1)
    _write(twin, "twin's", at=2)
    _write(vm, "later", at=1)

    _power_cycle(twin)
    vm.restore(snapshot)
    _write(vm, "after", at=3)
    _power_cycle(vm)

    assert [_line(vm, at=at) for at in range(5)] == ["first", "then", "", "after", "middle"]
    assert [_line(twin, at=at) for at in range(5)] == ["first", "then", "twin's", "", "middle"]
    for machine in (vm, twin):
        assert (_line(machine, disk=DISK1), _line(machine, at=1, disk=DISK1)) == ("first", "")
        assert machine.run(f"echo x | dd of={DISK1}").returncode != 0
    assert _digest(source) == before


@pytest.mark.vm(disks=[Disk(size="8M"), Disk(size="8M")], lifecycle="restored")
def test_a_restored_machine_is_copied_with_what_it_has_written(vm: Machine) -> None:
    _write(vm, "one")
    (twin,) = vm.fork(1)
    _write(twin, "two", at=1)
    (grandchild,) = twin.fork(1)
    _write(vm, "gone")

    assert [_line(grandchild, at=at) for at in range(2)] == ["one", "two"]
    _write(grandchild, "its own", disk=DISK1)
    _power_cycle(grandchild)
    assert [_line(grandchild, at=at) for at in range(2)] == ["one", "two"]
    assert _line(grandchild, disk=DISK1) == "its own"
    assert (_line(twin, disk=DISK1), _line(vm)) == ("", "gone")


FULL = """
import errno
import pytest
from pytest_vmsandbox import Disk

@pytest.mark.vm(disks=[Disk(size="64M")], lifecycle="booted")
def test_it(vm):
    vm.run("dd if=/dev/urandom of=/dev/vda bs=1M count=6 conv=fsync", check=True)
    before = vm.run("sha256sum < /dev/vda").stdout
    beside = vm._controller.build.config.directory.parent
    there = sorted(beside.iterdir())
    for verb in (vm.snapshot, lambda: vm.fork(1)):
        with pytest.raises(OSError) as raised:
            verb()
        assert raised.value.errno == errno.ENOSPC
        assert sorted(beside.iterdir()) == there
    vm.run("echo 3 > /proc/sys/vm/drop_caches")
    assert vm.run("sha256sum < /dev/vda").stdout == before
    vm.run("dd if=/dev/zero of=/dev/vda bs=1M count=5 conv=fsync; blkdiscard /dev/vda", check=True)
    vm.snapshot()
"""


@pytest.mark.vm_requires("user_namespaces")
def test_a_host_without_room_for_a_copy_says_so_and_the_guest_goes_on(
    small_host: SmallHost,
) -> None:
    told = small_host(FULL, room_mib=10)

    assert "1 passed" in told, told
