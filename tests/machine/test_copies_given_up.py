"""Snapshots, restores and forks that are given up half-way, by their caller or by an end."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Callable, Coroutine
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from pytest_vmsandbox import Disk, Machine, VmmDied
from pytest_vmsandbox.machine import capture
from pytest_vmsandbox.machine.controller import MachineController
from pytest_vmsandbox.machine.disks import Disks
from pytest_vmsandbox.machine.memory import is_sealed
from pytest_vmsandbox.machine.spec import MachineSpec
from pytest_vmsandbox.machine.worker import Place, Worker
from pytest_vmsandbox.vmm.migration_stream import StreamSplitter
from tests.signals import send_signal

pytestmark = pytest.mark.machine
DISK0 = "/dev/disk/by-id/virtio-disk0"
DELAYS_S = (0.0, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.08)


def _booted(worker: Worker) -> MachineController:
    spec = MachineSpec(disks=(Disk(size="8M"),))
    (controller,) = worker.engine.run(worker.make([spec]))
    worker.engine.run(worker.boot([controller]))
    return controller


def _write(vm: Machine, text: str) -> None:
    vm.run(f"echo {text} | dd of={DISK0} conv=fsync", check=True)


def _line(vm: Machine) -> str:
    return vm.run(f"dd if={DISK0} bs=64 count=1 2>/dev/null | head -n 1").stdout.strip("\0\n")


def _copies_of_disks(controller: MachineController) -> list[Path]:
    """Those beside the machine's directory: of its template, and of what was taken of it."""
    return sorted(controller.build.config.directory.parent.glob("disks-*"))


@pytest.mark.parametrize("moment", ["open", "close"])
def test_a_restore_given_up_among_its_disks_leaves_all_of_one_time(
    worker: Worker,
    monkeypatch: pytest.MonkeyPatch,
    open_descriptors: Callable[[], list[str]],
    moment: str,
) -> None:
    controller = _booted(worker)
    vm = Machine(controller, worker.engine)
    of_template = _copies_of_disks(controller)
    _write(vm, "then")
    snapshot = vm.snapshot()
    _write(vm, "later")
    before = open_descriptors()

    async def give_up() -> None:
        restoring = asyncio.create_task(controller.restore(snapshot))
        loop, real = asyncio.get_running_loop(), getattr(Disks, moment)

        def slowly(disks: Disks) -> object:
            loop.call_soon_threadsafe(restoring.cancel)
            time.sleep(0.1)
            return real(disks)

        with monkeypatch.context() as patched:
            patched.setattr(Disks, moment, slowly)
            with pytest.raises(asyncio.CancelledError):
                await restoring

    worker.engine.run(give_up())
    assert not controller.is_on
    vm.power_on()

    assert _line(vm) == "then"
    assert len(open_descriptors()) == len(before)
    worker.engine.run(worker.end([controller]))
    assert _copies_of_disks(controller) == of_template


def test_whoever_is_cancelled_twice_leaves_the_guest_running(worker: Worker) -> None:
    controller = _booted(worker)
    of_template = _copies_of_disks(controller)

    async def give_up_twice(delay_s: float) -> object:
        taking = asyncio.create_task(controller.snapshot())
        await asyncio.sleep(delay_s)
        for _ in range(3):
            taking.cancel()
            await asyncio.sleep(0)
        await asyncio.wait({taking})
        return await controller.qmp("query-status")

    for delay_s in DELAYS_S:
        status = worker.engine.run(give_up_twice(delay_s))
        assert isinstance(status, dict)
        assert status["status"] == "running"
        # One that was through before anybody gave it up is a snapshot.
        taken = [one for one in controller._snapshots if not one.closed]
        assert len(_copies_of_disks(controller)) == len(of_template) + len(taken)

    assert Machine(controller, worker.engine).run("hostname").stdout == f"{controller.name}\n"
    worker.engine.run(worker.end([controller]))


def test_a_guest_that_can_not_be_let_go_on_has_failed(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(capture, "_GO_ON_S", 0.5)
    controller = _booted(worker)
    vm = Machine(controller, worker.engine)
    pid = controller.running.process.pid
    # Once the guest stands, the VMM answers nobody any more.
    real = StreamSplitter.filled

    def stop(splitter: StreamSplitter, count: int) -> None:
        send_signal(pid, signal.SIGSTOP)
        real(splitter, count)

    monkeypatch.setattr(StreamSplitter, "filled", stop)
    try:
        with pytest.raises((VmmDied, TimeoutError)):
            vm.snapshot(timeout=0.5)
        with pytest.raises(VmmDied, match="does not go on after it was copied"):
            vm.run(["true"])
    finally:
        send_signal(pid, signal.SIGCONT)
    worker.engine.run(worker.end([controller]))


@pytest.mark.parametrize("verb", ["snapshot", "restore", "fork"])
def test_a_machine_that_ends_meanwhile_leaves_nothing(
    worker: Worker, open_descriptors: Callable[[], list[str]], verb: str
) -> None:
    engine = worker.engine

    async def end_meanwhile(controller: MachineController, delay_s: float) -> None:
        snapshot = await controller.snapshot()
        does: dict[str, Callable[[], Coroutine[Any, Any, object]]] = {
            "snapshot": controller.snapshot,
            "restore": lambda: controller.restore(snapshot),
            "fork": lambda: controller.fork(1),
        }
        doing = asyncio.create_task(does[verb]())
        await asyncio.sleep(delay_s)
        await controller.close()
        (came,) = await asyncio.gather(doing, return_exceptions=True)
        if isinstance(came, list):
            await worker.end(came)

    before: list[str] = []
    for delay_s in (0.0, 0.01, 0.03, 0.08):
        controller = _booted(worker)
        of_template = _copies_of_disks(controller)
        engine.run(end_meanwhile(controller, delay_s))

        assert not controller.is_on
        assert not controller.build.config.directory.exists()
        assert _copies_of_disks(controller) == of_template
        before = before or open_descriptors()
        assert len(open_descriptors()) == len(before)


def test_twins_of_whom_only_some_came_to_be_end(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[MachineController] = []
    (controller,) = worker.engine.run(worker.make([MachineSpec()], hold=held.append))
    worker.engine.run(worker.boot([controller]))
    real, names = worker.place, set(worker.names)

    async def give_up() -> None:
        forking = asyncio.create_task(controller.fork(4))

        async def place(name: str | None = None) -> Place:
            if len(held) == 3:
                forking.cancel()
                await asyncio.sleep(10)
            return await real(name)

        monkeypatch.setattr(worker, "place", place)
        with pytest.raises(asyncio.CancelledError):
            await forking

    worker.engine.run(give_up())

    assert len(held) == 3
    assert not [twin for twin in held[1:] if twin.build.config.directory.exists()]
    assert worker.names == names
    worker.engine.run(worker.end([controller]))


def test_nobody_changes_the_state_of_a_snapshot(vm: Machine) -> None:
    with vm.snapshot() as snapshot, closing(snapshot.copy()) as frozen:
        assert is_sealed(frozen.state)
