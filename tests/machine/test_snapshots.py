"""Snapshots: a machine goes back to what it was."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pytest_vmsandbox import ChannelLost, Disk, GuestPanicked, Machine, RequestInvalid, VmmDied
from tests.machine.test_fork import COUNTER, counts_on, last_count, off_by_s

DISK0 = "/dev/disk/by-id/virtio-disk0"


def _restore_id(vm: Machine) -> str:
    return vm._controller.running.channel.hello.restore_id


def test_it_becomes_what_it_was_and_runs_on(vm: Machine) -> None:
    vm.write_text("/run/state", "then")
    vm.popen(COUNTER)
    vm.wait_until("grep -qx 10 /run/count")
    snapshot = vm.snapshot()
    then = last_count(vm)
    vm.wait_until(f"grep -qx {then + 20_000} /run/count")
    vm.write_text("/run/state", "afterwards")

    vm.restore(snapshot)

    assert vm.read_text("/run/state") == "then"
    assert last_count(vm) < then + 20_000
    assert counts_on(vm)


def test_it_is_the_same_machine_at_another_time(vm: Machine) -> None:
    def seen() -> list[str]:
        identity = ["/etc/machine-id", "/proc/sys/kernel/random/boot_id"]
        return [vm.name, vm.id, vm.run("hostname").stdout, *map(vm.read_text, identity)]

    before = seen()
    snapshot = vm.snapshot()
    fresh = []
    for _ in range(2):
        vm.restore(snapshot)
        fresh.append((_restore_id(vm), vm.run("head -c 16 /dev/urandom", encoding=None).stdout))
        assert seen() == before

    assert len({restore_id for restore_id, _ in fresh}) == 2
    assert len({random for _, random in fresh}) == 2


def test_the_clock_shows_the_present(vm: Machine) -> None:
    snapshot = vm.snapshot()
    time.sleep(1.5)
    vm.restore(snapshot)

    assert off_by_s(vm) < 0.2


def test_snapshots_may_be_restored_in_any_order(vm: Machine) -> None:
    snapshots = []
    for number in range(3):
        vm.write_text("/run/number", str(number))
        snapshots.append(vm.snapshot())

    for number in (1, 0, 2, 1):
        vm.restore(snapshots[number])
        assert vm.read_text("/run/number") == str(number)


@pytest.mark.vm(disks=[Disk(size="64M")])
def test_disks_go_back_to_the_same_instant(vm: Machine) -> None:
    """What the guest has written and not flushed is in its memory, the rest on the disk."""
    vm.run(f"mke2fs -q {DISK0} && mount {DISK0} /mnt", check=True)
    snapshots = []
    for number in range(3):
        vm.run(f"echo {number} > /mnt/last; dd if=/dev/urandom of=/mnt/{number} bs=1M count=4")
        vm.run("sync" if number == 1 else "true")
        snapshots.append(vm.snapshot())
    sums = vm.run("sha256sum /mnt/[012]").stdout.splitlines()
    vm.run(f"umount /mnt; dd if=/dev/zero of={DISK0} bs=1M; sync")
    snapshots[2].close()

    for number in (1, 0, 1):
        vm.restore(snapshots[number])
        assert vm.read_text("/mnt/last") == f"{number}\n"
        # From the disk, as far as it was there: nothing of later times, and not half of it.
        vm.run("echo 3 > /proc/sys/vm/drop_caches")
        there = vm.run("cd /mnt; sha256sum /mnt/[012] 2>/dev/null").stdout.splitlines()
        assert there == sums[: number + 1]
        vm.run(f"umount /mnt && mount {DISK0} /mnt", check=True)
        assert vm.run("sha256sum /mnt/[012]").stdout.splitlines() == there
        assert "EXT4-fs error" not in vm.run("dmesg").stdout


@pytest.mark.vm(disks=[Disk(size="64M")])
def test_disks_are_kept_when_it_is_powered_on_again(vm: Machine) -> None:
    vm.run(f"echo then | dd of={DISK0} conv=fsync", check=True)
    with vm.snapshot() as snapshot:
        vm.run(f"echo gone | dd of={DISK0} conv=fsync", check=True)
        vm.restore(snapshot)
    vm.run(f"echo more | dd of={DISK0} bs=1 seek=5 conv=fsync", check=True)
    vm.shutdown()
    vm.power_on()

    assert vm.run(f"dd if={DISK0} bs=10 count=1 2>/dev/null").stdout == "then\nmore\n"


def test_a_machine_that_panicked_can_go_back(vm: Machine) -> None:
    snapshot = vm.snapshot()
    with pytest.raises(GuestPanicked):
        vm.run("echo c > /proc/sysrq-trigger")
    with pytest.raises(GuestPanicked):
        vm.snapshot()

    vm.restore(snapshot)

    assert vm.run("hostname").stdout == f"{vm.name}\n"
    assert vm.run("hostname").stdout == f"{vm.name}\n"


def test_a_machine_whose_vmm_died_can_go_back(vm: Machine) -> None:
    snapshot = vm.snapshot()
    vm._controller.running.process.kill()
    with pytest.raises(VmmDied):
        vm.run("sleep 60")

    vm.restore(snapshot)

    assert vm.run(["true"]).returncode == 0


def test_a_machine_that_is_powered_off_can_go_back(vm: Machine) -> None:
    vm.write_text("/run/here", "yes")
    snapshot = vm.snapshot()
    vm.shutdown()

    vm.restore(snapshot)

    assert vm.read_text("/run/here") == "yes"
    vm.power_cut()
    vm.power_on()
    assert vm.run("test -e /run/here").returncode == 1


def test_open_streams_end_and_new_ones_work(vm: Machine) -> None:
    before = vm.popen(["cat"])
    snapshot = vm.snapshot()
    assert before.stdin is not None
    before.stdin.write("still heard\n")
    assert before.stdout is not None
    assert before.stdout.readline() == "still heard\n"

    vm.restore(snapshot)

    with pytest.raises(ChannelLost):
        before.stdout.readline()
    with pytest.raises(ChannelLost):
        before.wait()
    assert vm.run(["cat"], input="of now").stdout == "of now"


def test_a_paused_machine_is_taken_in_and_stays_paused(vm: Machine) -> None:
    vm.write_text("/run/here", "yes")
    vm.pause()
    snapshot = vm.snapshot()
    vm.resume()
    vm.run("rm /run/here")

    vm.restore(snapshot)

    assert vm.read_text("/run/here") == "yes"


def test_only_its_own_snapshots_are_taken_and_only_while_they_are_there(vm: Machine) -> None:
    (twin,) = vm.fork(1)
    with twin.snapshot() as of_twin, pytest.raises(RequestInvalid, match=re.escape(vm.name)):
        vm.restore(of_twin)
    closed = vm.snapshot()
    closed.close()
    closed.close()

    with pytest.raises(RequestInvalid, match="closed"):
        vm.restore(closed)
    assert vm.run(["true"]).returncode == 0


def test_twins_can_be_made_of_a_machine_that_went_back(vm: Machine) -> None:
    vm.write_text("/run/here", "yes")
    snapshot = vm.snapshot()
    vm.restore(snapshot)

    assert [twin.read_text("/run/here") for twin in vm.fork(2)] == ["yes", "yes"]


def test_twenty_in_a_row_leave_nothing_behind(
    vm: Machine, open_descriptors: Callable[[], list[str]]
) -> None:
    directory = vm._controller.build.config.directory

    def there_and_back() -> None:
        with vm.snapshot() as snapshot:
            vm.restore(snapshot)
        assert vm.run(["true"]).returncode == 0

    there_and_back()
    before = open_descriptors(), sorted(directory.iterdir()), _vmms()
    for _ in range(20):
        there_and_back()

    assert (open_descriptors(), sorted(directory.iterdir()), _vmms()) == before


def test_what_is_open_is_closed_with_the_machine(
    vm_factory: Callable[[], Machine], open_descriptors: Callable[[], list[str]]
) -> None:
    machine = vm_factory()
    machine.run(["true"])
    before = open_descriptors()
    snapshot = machine.snapshot()
    assert len(open_descriptors()) == len(before) + 2
    machine._caller.run(machine._controller.close())

    assert snapshot.closed
    with pytest.raises(RequestInvalid):
        machine.restore(snapshot)


def _vmms() -> int:
    """How many there are below us, whoever started them."""
    parents = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            name, _, rest = status.read_text().rpartition(")")
        except OSError:
            continue
        parents[int(status.parent.name)] = (name, int(rest.split()[1]))

    def is_ours(pid: int) -> bool:
        while pid in parents:
            pid = parents[pid][1]
            if pid == os.getpid():
                return True
        return False

    return sum("qemu-system" in name and is_ours(pid) for pid, (name, _) in parents.items())
