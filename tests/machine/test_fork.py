"""Twins: machines out of a running one."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable
from datetime import datetime

import pytest

from pytest_vmsandbox import AsyncMachine, Disk, Machine, RequestInvalid, TimedOut

# One number a line; the last line may still be being written.
COUNTER = "i=0; while :; do i=$((i + 1)); echo $i; done > /run/count"


def last_count(vm: Machine) -> int:
    """How far the counter has come in that machine."""
    return int(vm.run("tail -n 2 /run/count | head -n 1", check=True).stdout)


def counts_on(vm: Machine) -> bool:
    """Whether it counts, from where it is, and without a gap or a repetition."""
    before = last_count(vm)
    vm.wait_until(f"grep -qx {before + 100} /run/count")
    told = vm.run("head -n 5000 /run/count | uniq | wc -l").stdout
    return int(told) == min(5000, int(vm.run("head -n 5000 /run/count | tail -n 1").stdout))


def off_by_s(vm: Machine) -> float:
    """How far the guest's clock is from ours at least: to ask it takes a while."""
    before = time.time()
    told = vm.run("touch /tmp/now && stat -c %y /tmp/now", check=True).stdout
    after = time.time()
    day, hour, _zone = told.split()
    seen = datetime.fromisoformat(f"{day}T{hour[:15]}+00:00").timestamp()
    return max(before - seen, seen - after, 0.0)


def _pid(vm: Machine | AsyncMachine) -> int:
    return vm._controller.running.process.pid


def _restore_id(vm: Machine) -> str:
    return vm._controller.running.channel.hello.restore_id


def test_what_runs_goes_on_in_each_twin_and_in_the_original(vm: Machine) -> None:
    vm.popen(COUNTER)
    vm.wait_until("grep -qx 10 /run/count")
    vm.popen(["nc", "-ll", "-p", "80", "-e", "hostname"])
    vm.wait_for_port(80)
    before = last_count(vm)

    twins = vm.fork(2)

    for machine in (vm, *twins):
        assert last_count(machine) >= before
        assert counts_on(machine)
        answer = machine.run("nc 127.0.0.1 80 </dev/null").stdout
        assert answer == f"{machine.name}\n"


def test_what_one_writes_no_other_sees(vm: Machine) -> None:
    vm.write_text("/run/shared", "before")
    vm.run("head -c 8000000 /dev/zero | tr '\\0' x > /run/large", check=True)
    twins = vm.fork(2)
    for machine in (vm, *twins):
        machine.write_text("/run/shared", machine.name)
        machine.run(
            f"head -c 8000000 /dev/zero | tr '\\0' {machine.name[-1]} > /run/large", check=True
        )

    for machine in (vm, *twins):
        assert machine.read_text("/run/shared") == machine.name
        assert machine.read_bytes("/run/large") == machine.name[-1].encode() * 8_000_000


@pytest.mark.vm(disks=[Disk(size="64M"), Disk(size="1M", serial="second")])
def test_each_has_disks_of_its_own_that_begin_as_they_were(vm: Machine) -> None:
    disk = "/dev/disk/by-id/virtio-disk0"
    vm.run(f"mke2fs -q {disk} && mount {disk} /mnt && echo shared > /mnt/file", check=True)
    counter = "until test -e /run/enough; do i=$((i + 1)); echo $i >> /mnt/log; sync; done"
    writing = vm.popen(f"i=0; {counter}")
    vm.wait_until("test -s /mnt/log")

    twins = vm.fork(2)
    (grandchild,) = twins[0].fork(1)
    machines = [vm, *twins, grandchild]
    for machine in machines:
        machine.run(f"echo {machine.name} > /mnt/mine; echo {machine.name} > /mnt/file; sync")
        machine.run("touch /run/enough")
    assert writing.wait() == 0

    for machine in machines:
        assert machine.read_text("/mnt/file") == f"{machine.name}\n"
        if machine is grandchild:
            machine.reboot()
        else:
            machine.wait_until("umount /mnt")  # the counter may still be at its last word
            machine.run("echo 3 > /proc/sys/vm/drop_caches", check=True)
        machine.run(f"mount {disk} /mnt", check=True)
        assert machine.read_text("/mnt/mine") == f"{machine.name}\n"
        log = machine.read_text("/mnt/log").split()
        assert log[:10] == [str(number) for number in range(1, len(log[:10]) + 1)]


def test_a_twin_is_nobody_else(vm: Machine) -> None:
    machines = [vm, *vm.fork(3)]

    for seen in (
        [machine.name for machine in machines],
        [machine.id for machine in machines],
        [machine.run("hostname").stdout for machine in machines],
        [machine.read_text("/etc/machine-id") for machine in machines],
        [machine.run("head -c 16 /dev/urandom", encoding=None).stdout for machine in machines],
        [machine.read_text("/proc/sys/kernel/random/uuid") for machine in machines],
        [_restore_id(machine) for machine in machines],
        [_pid(machine) for machine in machines],
        [machine._controller.build.config.directory for machine in machines],
    ):
        assert len(set(seen)) == len(machines), seen


def test_time_goes_on_and_the_clock_shows_the_present(vm: Machine) -> None:
    uptime_before = float(vm.read_text("/proc/uptime").split()[0])
    vm.pause()
    time.sleep(1)
    (twin,) = vm.fork(1)

    assert off_by_s(twin) < 0.2
    assert float(twin.read_text("/proc/uptime").split()[0]) >= uptime_before


def test_twins_can_be_forked_rebooted_and_powered_off(vm: Machine) -> None:
    (twin,) = vm.fork(1)
    twin.write_text("/run/twin", "of the first")
    (grandchild,) = twin.fork(1)

    assert grandchild.read_text("/run/twin") == "of the first"
    assert grandchild.name == f"{twin.name}-fork-1"
    twin.reboot()
    assert twin.run("hostname; test -e /run/twin").stdout == f"{twin.name}\n"
    twin.shutdown()
    twin.power_on()
    assert twin.run("hostname").stdout == f"{twin.name}\n"
    assert grandchild.run("hostname").stdout == f"{grandchild.name}\n"


def test_a_paused_machine_stays_so_and_its_twins_run(vm: Machine) -> None:
    vm.write_text("/run/here", "yes")
    vm.pause()

    (first,) = vm.fork(1)
    (second,) = vm.fork(1)

    assert first.read_text("/run/here") == second.read_text("/run/here") == "yes"
    with pytest.raises(TimedOut):
        vm.run(["true"], timeout=0.5)
    vm.resume()
    assert vm.run(["true"]).returncode == 0


@pytest.mark.vm(lifecycle="restored")
def test_a_restored_machine_is_forked_like_a_booted_one(vm: Machine) -> None:
    vm.write_text("/run/here", "yes")

    assert [twin.read_text("/run/here") for twin in vm.fork(2)] == ["yes", "yes"]


@pytest.mark.parametrize("count", [0, -1, True, 1.5, "2", None])
def test_only_a_number_of_twins_can_be_asked_for(vm_module: Machine, count: object) -> None:
    with pytest.raises(RequestInvalid, match=re.escape(repr(count))):
        vm_module.fork(count)  # type: ignore[arg-type]


def test_what_is_powered_off_has_no_twins(vm: Machine) -> None:
    vm.power_cut()

    with pytest.raises(RequestInvalid, match="powered off"):
        vm.fork(1)
    with pytest.raises(RequestInvalid, match="powered off"):
        vm.snapshot()


def test_a_rebooting_machine_is_waited_for(vm: Machine) -> None:
    vm.popen("sleep 0.1; reboot -f")
    vm.console.wait_for("reboot: Restarting system")

    (twin,) = vm.fork(1)

    assert float(twin.read_text("/proc/uptime").split()[0]) < 60
    assert twin.run("hostname").stdout == f"{twin.name}\n"


def test_output_that_floods_reaches_its_reader_whole(vm: Machine) -> None:
    """Half a frame is on the line of the original when its twins are made."""
    flood = vm.popen("i=0; while [ $i -lt 20000 ]; do echo $i 0123456789; i=$((i + 1)); done")
    assert flood.stdout is not None
    read = flood.stdout.readline()

    twins = vm.fork(2)

    read += flood.stdout.read()
    assert read.splitlines() == [f"{i} 0123456789" for i in range(20000)]
    assert flood.wait() == 0
    for twin in twins:
        assert twin.run("seq 3").stdout == "1\n2\n3\n"


async def test_input_that_is_being_written_arrives_whole(async_vm: AsyncMachine) -> None:
    data = b"".join(b"%07d\n" % number for number in range(1_500_000))
    sink = await async_vm.popen("cat > /run/sink; sha256sum < /run/sink", encoding=None)
    assert sink.stdin is not None

    async def write() -> None:
        assert sink.stdin is not None
        await sink.stdin.write(data)
        await sink.stdin.close()

    writing = asyncio.create_task(write())
    await asyncio.sleep(0.1)
    twins = await async_vm.fork(2)
    await writing

    assert await sink.wait() == 0
    assert await async_vm.read_bytes("/run/sink") == data
    for twin in twins:
        came = await twin.read_bytes("/run/sink")
        assert 0 < len(came) < len(data), "nothing was being written at the instant"
        assert data.startswith(came)


async def test_two_forks_at_once_take_their_turns(async_vm: AsyncMachine) -> None:
    first, second = await asyncio.gather(async_vm.fork(1), async_vm.fork(1))

    names = [machine.name for machine in (async_vm, *first, *second)]
    assert len(set(names)) == 3
    assert [(await machine.run("hostname")).stdout for machine in (*first, *second)] == [
        f"{name}\n" for name in names[1:]
    ]


async def test_a_fork_that_is_given_up_leaves_the_original_running(
    async_vm: AsyncMachine, open_descriptors: Callable[[], list[str]]
) -> None:
    await async_vm.run(["true"])
    before = open_descriptors()
    for delay_s in (0.0, 0.005, 0.01, 0.02, 0.03, 0.05, 0.08, 0.12, 0.2):
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(delay_s):
                await async_vm.fork(8)
        assert (await async_vm.run(["true"], timeout=10)).returncode == 0
        assert await async_vm.qmp("query-status") == {
            "running": True,
            "singlestep": False,
            "status": "running",
        }

    assert open_descriptors() == before
    (twin,) = await async_vm.fork(1)
    assert (await twin.run("hostname")).stdout == f"{twin.name}\n"
