"""Verbs that meet: what happens to a machine while somebody waits for it."""

from __future__ import annotations

import asyncio
import signal
import time
from pathlib import Path

import pytest

from pytest_vmsandbox import (
    AsyncMachine,
    ChannelLost,
    GuestPanicked,
    Machine,
    RequestInvalid,
    TimedOut,
    VmmDied,
)
from pytest_vmsandbox.machine.spec import MachineSpec
from pytest_vmsandbox.machine.worker import Worker
from tests.signals import send_signal


def _pid(vm: Machine | AsyncMachine) -> int:
    running = vm._controller._running
    assert running is not None
    return running.process.pid


def test_a_guest_that_can_not_answer_is_not_waited_for_without_end(vm: Machine) -> None:
    vm.pause()
    started = time.monotonic()
    with pytest.raises(TimedOut, match="consent to power off"):
        vm.shutdown(timeout=0.5)
    with pytest.raises(TimedOut, match="consent to reboot"):
        vm.reboot(timeout=0.5)
    vm.resume()

    assert time.monotonic() - started < 20
    vm.wait_until("true", timeout=60)


async def test_a_vmm_that_is_killed_during_a_shutdown_died(async_vm: AsyncMachine) -> None:
    pid = _pid(async_vm)
    send_signal(pid, signal.SIGSTOP)
    ending = asyncio.create_task(async_vm.shutdown(timeout=30))
    await asyncio.sleep(0.2)
    send_signal(pid, signal.SIGKILL)

    with pytest.raises(VmmDied):
        await ending


async def test_who_waits_for_a_machine_that_is_ended_learns_of_it_at_once(
    async_vm: AsyncMachine,
) -> None:
    await async_vm.pause()
    waits = [
        asyncio.create_task(async_vm.reboot(timeout=60)),
        asyncio.create_task(async_vm.run(["true"], timeout=60)),
        asyncio.create_task(async_vm.console.wait_for("never printed", timeout=60)),
    ]
    await asyncio.sleep(0.2)
    started = time.monotonic()
    await async_vm.power_cut()

    ends = await asyncio.gather(*waits, return_exceptions=True)
    assert [type(end) for end in ends] == [ChannelLost] * 3
    assert time.monotonic() - started < 10


async def test_a_machine_is_powered_on_once(async_vm: AsyncMachine) -> None:
    await async_vm.power_cut()
    first = asyncio.create_task(async_vm.power_on())
    await asyncio.sleep(0.05)
    with pytest.raises(RequestInvalid, match="powered on already"):
        await async_vm.power_on()
    await first

    assert (await async_vm.run(["true"])).returncode == 0


async def test_a_boot_that_is_cancelled_leaves_no_vmm_and_can_be_repeated(
    async_vm: AsyncMachine,
) -> None:
    await async_vm.power_cut()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.5):
            await async_vm.power_on()

    assert async_vm._controller._running is None
    await async_vm.power_on()
    assert (await async_vm.run(["true"])).returncode == 0


def test_a_machine_that_is_ended_while_it_boots_is_gone(worker: Worker) -> None:
    async def overlap() -> int:
        (machine,) = await worker.make([MachineSpec()])
        boot = asyncio.create_task(worker.boot([machine]))
        while machine._last is None:
            await asyncio.sleep(0.01)
        pid = machine._last.process.pid
        await worker.end([machine])
        await asyncio.gather(boot, return_exceptions=True)
        with pytest.raises(RequestInvalid, match="has ended for good"):
            await machine.power_on()
        return pid

    pid = worker.engine.run(overlap())

    assert not Path(f"/proc/{pid}").exists()


def test_a_caught_failure_does_not_hide_the_next_one(vm: Machine) -> None:
    with pytest.raises(GuestPanicked):
        vm.run("echo c > /proc/sysrq-trigger")
    told_before = vm._controller.failure_was_told
    vm.power_cut()
    vm.power_on()

    assert told_before
    assert not vm._controller.failure_was_told
    vm.reboot()
    assert not vm._controller.failure_was_told


async def test_text_that_is_cut_inside_a_character_is_neither_lost_nor_an_end(
    async_vm: AsyncMachine,
) -> None:
    process = await async_vm.popen(
        "printf '\\303'; sleep 0.3; printf '\\251 more'; sleep 0.3; printf 'abc\\303'"
    )
    pieces = []
    while piece := await process.stdout.read(100):
        pieces.append(piece)

    assert "".join(map(str, pieces)) == "é moreabc\\xc3"
