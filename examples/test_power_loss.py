"""A file system under power loss: what was committed is there again, and nothing is torn.

The disk is the machine's own and outlives its power; what the guest had only in memory does not.
"""

from __future__ import annotations

import pytest

from pytest_vmsandbox import Disk, Machine

DATA = "/dev/disk/by-id/virtio-data"

# A little database: each record is written beside the last one, then takes its place at once.
WRITER = """
number=0
while :; do
    number=$((number + 1))
    printf '%s %s\\n' $number $(echo $number | sha256sum | cut -c 1-64) > /data/record.new
    sync /data/record.new
    mv /data/record.new /data/record
    sync /data
    echo $number
done
"""


@pytest.mark.vm(disks=[Disk(size="64M", serial="data")])
def test_no_record_is_lost_or_torn_by_a_power_cut(vm: Machine) -> None:
    vm.run(f"mke2fs {DATA} && mkdir /data && mount {DATA} /data", check=True)

    writer = vm.popen(["sh", "-c", WRITER])
    acknowledged = 0
    while acknowledged < 20:
        acknowledged = int(writer.stdout.readline())
    vm.power_cut()
    vm.power_on()

    vm.run(f"mkdir /data && mount {DATA} /data", check=True)
    number, checksum = vm.read_text("/data/record").split()
    assert int(number) >= acknowledged
    assert vm.run(f"echo {number} | sha256sum").stdout.startswith(checksum)


@pytest.mark.vm(disks=[Disk(size="64M", serial="data")])
def test_what_was_never_synced_may_be_gone(vm: Machine) -> None:
    vm.run(f"mke2fs {DATA} && mkdir /data && mount {DATA} /data", check=True)
    vm.run("echo kept > /data/kept && sync && echo lost > /data/lost", check=True)

    vm.power_cut()
    vm.power_on()

    vm.run(f"mkdir /data && mount {DATA} /data", check=True)
    assert vm.run("ls /data/kept /data/lost").stdout == "/data/kept\n"
