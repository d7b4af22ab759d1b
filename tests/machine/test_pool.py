"""One machine ahead: who gets it, what it costs when it is not wanted, and that it is never old."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import pytest

from pytest_vmsandbox.errors import BootFailed
from pytest_vmsandbox.linux import ProcessIdentity
from pytest_vmsandbox.machine import pool
from pytest_vmsandbox.machine.controller import MachineController
from pytest_vmsandbox.machine.disk import Disk
from pytest_vmsandbox.machine.pool import Pool
from pytest_vmsandbox.machine.spec import MachineSpec
from pytest_vmsandbox.machine.turn import take_turn
from pytest_vmsandbox.machine.worker import Worker
from tests.signals import send_signal

pytestmark = pytest.mark.machine

SPEC = MachineSpec()
OTHER = MachineSpec(memory_mib=160)
SOON_S = 60.0


@pytest.fixture(autouse=True)
def idle(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Say how many processors idle, whatever this host does meanwhile: one, until told."""

    def say(count: int) -> None:
        monkeypatch.setattr(pool, "idle_processors", lambda: count)

    say(1)
    return say


def seen_ahead(worker: Worker) -> MachineController:
    """The machine that waits, once it does."""

    async def look() -> MachineController:
        async with asyncio.timeout(SOON_S):
            while True:
                ahead = worker._pool._ahead
                if ahead is not None and ahead._ready.is_set() and ahead._machine is not None:
                    return ahead._machine
                await asyncio.sleep(0.01)

    return worker.engine.run(look())


def make(worker: Worker, spec: MachineSpec = SPEC) -> MachineController:
    """As a fixture does."""

    async def one() -> MachineController:
        (machine,) = await worker.make([spec])
        await worker.boot([machine])
        return machine

    return worker.engine.run(one())


def foresee(worker: Worker, spec: MachineSpec | None = SPEC) -> None:
    worker.engine.run(worker.foresee(spec))


async def begun(worker: Worker) -> MachineController:
    """The machine ahead as soon as there is one, which is still being started."""
    async with asyncio.timeout(SOON_S):
        while worker._pool._ahead is None or worker._pool._ahead._machine is None:
            await asyncio.sleep(0)
    return worker._pool._ahead._machine


def lives(identity: ProcessIdentity) -> bool:
    return identity.is_alive()


def wait_ended(worker: Worker, identity: ProcessIdentity) -> None:
    async def ended() -> None:
        async with asyncio.timeout(SOON_S):
            while lives(identity):
                await asyncio.sleep(0.01)

    worker.engine.run(ended())


def guest_clock(worker: Worker, machine: MachineController) -> float:
    """The guest's time in seconds since 1970, exact to the hundredth."""
    script = "touch /tmp/now && stat -c %y /tmp/now"
    said = worker.engine.run(machine.run(script, check=True)).stdout
    assert isinstance(said, str)
    day, hour, _zone = said.split()
    return datetime.fromisoformat(f"{day}T{hour[:15]}+00:00").timestamp()


def test_the_machine_ahead_is_given_warm_to_who_asks_for_one_like_it(worker: Worker) -> None:
    first = make(worker)
    foresee(worker)
    ahead = seen_ahead(worker)
    given = make(worker)

    assert given is ahead
    assert given.timings.from_pool
    assert not first.timings.from_pool
    assert first.timings.waited_s is not None
    assert first.timings.restore_s is not None
    assert first.timings.waited_s > first.timings.restore_s
    assert given.timings.waited_s is not None
    assert given.timings.waited_s < first.timings.waited_s  # a handshake, and no restoring
    assert given.timings.first_command_s is None
    assert given.build.nursery is not None
    assert worker.engine.run(given.run("hostname")).stdout == f"{given.name}\n"
    assert len({first.id, given.id}) == len({first.facts.restore_id, given.facts.restore_id}) == 2


def test_no_machine_is_given_twice(worker: Worker) -> None:
    make(worker)
    foresee(worker)
    ahead = seen_ahead(worker)

    assert make(worker) is ahead
    assert make(worker) is not ahead


def test_another_shape_is_made_in_the_ordinary_way(worker: Worker) -> None:
    make(worker)
    foresee(worker)
    ahead = seen_ahead(worker)

    assert make(worker, OTHER) is not ahead
    assert make(worker) is ahead  # it waited on


def test_what_was_foreseen_wrongly_is_ended(worker: Worker) -> None:
    make(worker)
    make(worker, OTHER)
    foresee(worker)
    vmm = seen_ahead(worker).running.process.identity
    foresee(worker, OTHER)

    wait_ended(worker, vmm)
    assert seen_ahead(worker).build.config.memory_mib == OTHER.memory_mib
    foresee(worker, None)
    assert worker._pool._ahead is None


def test_what_is_foreseen_twice_is_started_once(worker: Worker) -> None:
    make(worker)
    foresee(worker)
    ahead = seen_ahead(worker)
    foresee(worker)

    assert seen_ahead(worker) is ahead


def test_a_shape_that_was_never_made_is_not_started_ahead(worker: Worker) -> None:
    make(worker)
    foresee(worker, OTHER)

    assert worker._pool._ahead is None


def test_a_machine_that_boots_is_not_started_ahead(worker: Worker) -> None:
    booted = MachineSpec(lifecycle="booted")
    make(worker, booted)
    foresee(worker, booted)

    assert worker._pool._ahead is None


def test_without_an_idle_processor_nothing_is_started(
    worker: Worker, idle: Callable[[int], None]
) -> None:
    idle(0)
    make(worker)
    foresee(worker)
    given = make(worker)

    assert not given.timings.from_pool
    assert int(given.name.removeprefix("vm")) == 2  # there was none between


def test_what_waits_is_given_up_when_memory_grows_short(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(worker)
    foresee(worker)
    vmm = seen_ahead(worker).running.process.identity
    monkeypatch.setattr(pool, "spare_memory_bytes", lambda: 0)

    wait_ended(worker, vmm)
    assert not make(worker).timings.from_pool


def test_without_memory_to_spare_nothing_is_started(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool, "spare_memory_bytes", lambda: (SPEC.memory_mib << 20) - 1)
    make(worker)
    foresee(worker)
    worker.engine.run(asyncio.sleep(0.2))

    assert not make(worker).timings.from_pool


def test_a_machine_that_died_while_it_waited_is_not_given(worker: Worker) -> None:
    make(worker)
    foresee(worker)
    ahead = seen_ahead(worker)

    async def die() -> None:
        ahead.running.process.kill()
        async with asyncio.timeout(SOON_S):
            while ahead.failure is None:
                await asyncio.sleep(0.01)

    worker.engine.run(die())
    given = make(worker)

    assert given is not ahead
    assert worker.engine.run(given.run("echo alive")).stdout == "alive\n"


def test_one_that_is_being_started_is_waited_for(worker: Worker) -> None:
    make(worker)
    foresee(worker)
    worker.engine.run(begun(worker))

    assert make(worker).timings.from_pool


@pytest.mark.parametrize("passes", range(4))
def test_who_is_cancelled_while_taking_leaves_no_machine(worker: Worker, passes: int) -> None:
    make(worker)
    foresee(worker)
    machine = seen_ahead(worker)
    vmm, directory = machine.running.process.identity, machine.build.config.directory

    async def cancelled() -> MachineController | None:
        taking = asyncio.create_task(worker._pool.take(SPEC))
        for _ in range(passes):
            await asyncio.sleep(0)
        taking.cancel()
        with suppress(asyncio.CancelledError):
            return await taking
        return None

    if (taken := worker.engine.run(cancelled())) is not None:
        worker.engine.run(taken.close())  # it came before the cancellation
    worker.engine.run(worker._pool.close())
    wait_ended(worker, vmm)
    assert not directory.exists()


def test_who_is_cancelled_while_one_is_being_started_leaves_no_machine(worker: Worker) -> None:
    make(worker)
    foresee(worker)

    async def cancelled() -> MachineController:
        machine = await begun(worker)
        taking = asyncio.create_task(worker._pool.take(SPEC))
        await asyncio.sleep(0)
        taking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await taking
        await worker._pool.close()
        return machine

    machine = worker.engine.run(cancelled())
    assert not machine.is_on
    assert not machine.build.config.directory.exists()


def test_the_clock_is_right_in_a_machine_that_stood_still_while_it_waited(worker: Worker) -> None:
    make(worker)
    foresee(worker)
    ahead = seen_ahead(worker)
    vmm = ahead.running.process.identity.pid
    send_signal(vmm, signal.SIGSTOP)
    time.sleep(3)
    send_signal(vmm, signal.SIGCONT)
    given = make(worker)

    assert given is ahead
    # Once to have it translated: what a first command takes is not the clock's error.
    guest_clock(worker, given)
    before = time.time()
    seen = guest_clock(worker, given)
    assert before - 0.2 < seen < time.time() + 0.2


def test_one_that_does_not_answer_any_more_is_not_given(worker: Worker) -> None:
    make(worker)
    foresee(worker)
    ahead = seen_ahead(worker)
    vmm = ahead.running.process.identity
    send_signal(vmm.pid, signal.SIGSTOP)
    given = make(worker)

    assert given is not ahead
    wait_ended(worker, vmm)


def test_one_whose_kernel_is_in_trouble_is_not_given(worker: Worker) -> None:
    make(worker)
    foresee(worker)
    ahead = seen_ahead(worker)
    worker.engine.run(ahead.run("echo '<0>Oops: 0002 [#1] by hand' > /dev/kmsg", check=True))
    worker.engine.run(ahead.wait_for_console("by hand"))

    assert "oops" in ahead.ends
    assert make(worker) is not ahead


def test_what_a_disk_has_for_a_source_may_change_so_it_is_not_read_ahead(
    worker: Worker, tmp_path: Path
) -> None:
    source = tmp_path / "data.img"
    source.write_bytes(b"first".ljust(1 << 20))
    spec = MachineSpec(disks=[Disk(source=source)])
    for _ in range(2):  # whose template is kept only once it is wanted again
        make(worker, spec)
    foresee(worker, spec)
    worker.engine.run(asyncio.sleep(0.5))
    source.write_bytes(b"later".ljust(1 << 20))
    given = make(worker, spec)

    assert not given.timings.from_pool
    read = "head -c 5 /dev/disk/by-id/virtio-disk0"
    assert worker.engine.run(given.run(read)).stdout == "later"


def test_nothing_is_made_ahead_without_a_template_in_memory(worker: Worker) -> None:
    first = make(worker)
    worker.templates.close()
    foresee(worker)
    worker.engine.run(asyncio.sleep(0.5))

    assert worker._pool._ahead is not None
    assert worker._pool._ahead.over
    machines = {path for path in worker.directory.path.rglob("m*") if path.is_dir()}
    assert machines == {first.build.config.directory}


def test_a_machine_on_a_network_is_not_started_ahead(worker: Worker) -> None:
    first = make(worker, MachineSpec(network="lan"))
    foresee(worker, MachineSpec(network="lan"))
    worker.engine.run(asyncio.sleep(0.5))

    assert worker._pool._ahead is not None
    assert worker._pool._ahead.over
    assert worker.networks.members("lan").keys() == {first.name}


def test_what_was_demanded_is_part_of_what_is_foreseen(worker: Worker) -> None:
    make(worker)
    foresee(worker)
    ahead = seen_ahead(worker)
    demanding = replace(SPEC, demanded=frozenset({"lifecycle"}))

    assert make(worker, demanding) is not ahead
    assert make(worker) is ahead


def test_what_the_machine_ahead_cost_is_known(worker: Worker) -> None:
    make(worker)
    foresee(worker)
    timings = seen_ahead(worker).timings

    assert timings.from_pool
    assert timings.waited_s is None
    assert timings.restore_s is not None
    assert timings.load_s is not None
    assert timings.first_command_s is None


def test_nobody_waits_for_the_end_of_a_wrong_guess(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(worker)
    foresee(worker)
    machine = seen_ahead(worker)
    vmm = machine.running.process.identity
    close = machine.close

    async def slow_and_failing() -> None:
        await asyncio.sleep(1)
        await close()
        raise OSError("it did not end in good order")

    monkeypatch.setattr(machine, "close", slow_and_failing)
    foresee(worker, None)
    assert lives(vmm)
    worker.engine.run(worker._pool.close())

    assert not lives(vmm)


def test_a_busy_host_is_looked_at_less_often(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[float] = []

    def look() -> int:
        looks.append(time.monotonic())
        return 0

    monkeypatch.setattr(pool, "idle_processors", look)

    async def busy() -> None:
        waiting = Pool(worker._make_ahead)
        waiting.foresee(SPEC)
        await asyncio.sleep(1.5)
        await waiting.close()

    worker.engine.run(busy())
    assert len(looks) < 80  # 300 at the pace of the first


def test_workers_start_ahead_one_at_a_time(worker: Worker) -> None:
    make(worker)
    another_workers = take_turn(worker.settings.cache_dir)
    assert another_workers is not None
    with another_workers:
        assert take_turn(worker.settings.cache_dir) is None
        foresee(worker)
        worker.engine.run(asyncio.sleep(0.5))
        assert worker._pool._ahead is not None
        assert not worker._pool._ahead._begun

    assert seen_ahead(worker).is_on


def test_machines_of_the_pool_are_themselves_and_can_be_copied(worker: Worker) -> None:
    make(worker)
    given = []
    for _ in range(2):
        foresee(worker)
        seen_ahead(worker)
        given.append(make(worker))
    run = worker.engine.run
    machine = given[0]
    run(machine.run("echo kept > /tmp/kept", check=True))
    snapshot = run(machine.snapshot())
    (twin,) = run(machine.fork(1))
    run(machine.run("rm /tmp/kept", check=True))
    run(machine.restore(snapshot))
    machines = [*given, twin]

    for one in (machine, twin):
        assert run(one.run("cat /tmp/kept")).stdout == "kept\n"
    for path in ("/etc/machine-id", "/proc/sys/kernel/hostname", "/proc/sys/kernel/random/uuid"):
        assert len({run(one.read_text(path)) for one in machines}) == len(machines)
    assert len({one.facts.restore_id for one in machines}) == len(machines)
    assert not twin.timings.from_pool


def test_a_name_may_be_asked_for_twice_in_a_row(worker: Worker) -> None:
    named = MachineSpec(name="server")
    first = make(worker, named)
    worker.engine.run(worker.end([first]))
    foresee(worker, named)
    ahead = seen_ahead(worker)
    second = make(worker, named)

    assert second is ahead
    assert worker.engine.run(second.run("hostname")).stdout == "server\n"


def test_the_end_of_a_worker_ends_what_waits(worker: Worker) -> None:
    make(worker)
    foresee(worker)
    machine = seen_ahead(worker)
    vmm, directory = machine.running.process.identity, machine.build.config.directory
    worker.close()

    assert not lives(vmm)
    assert not directory.exists()


def test_what_goes_wrong_ahead_is_told_to_who_asks(worker: Worker) -> None:
    async def fail(_: MachineSpec) -> MachineController:
        raise BootFailed("vm9", "nothing to boot")

    async def take() -> MachineController | None:
        failing = Pool(fail)
        failing.foresee(SPEC)
        await asyncio.sleep(0.2)
        taken = await failing.take(SPEC)
        await failing.close()
        return taken

    assert worker.engine.run(take()) is None
