"""One machine ahead: who gets it, what it costs when it is not wanted, and that it is never old."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from pytest_vmsandbox.errors import BootFailed
from pytest_vmsandbox.linux import ProcessIdentity
from pytest_vmsandbox.machine import pool
from pytest_vmsandbox.machine.controller import MachineController
from pytest_vmsandbox.machine.pool import Pool
from pytest_vmsandbox.machine.spec import MachineSpec
from pytest_vmsandbox.machine.worker import Worker

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


def lives(identity: ProcessIdentity) -> bool:
    return identity.is_alive()


def test_the_machine_ahead_is_given_warm_to_who_asks_for_one_like_it(worker: Worker) -> None:
    first = make(worker)
    foresee(worker)
    ahead = seen_ahead(worker)
    given = make(worker)

    assert given is ahead
    assert given.timings.from_pool
    assert not first.timings.from_pool
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

    assert not lives(vmm)
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

    async def ended() -> None:
        async with asyncio.timeout(SOON_S):
            while lives(vmm):
                await asyncio.sleep(0.01)

    worker.engine.run(ended())
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

    async def begun() -> None:
        async with asyncio.timeout(SOON_S):
            while worker._pool._ahead is None or worker._pool._ahead._machine is None:
                await asyncio.sleep(0)

    worker.engine.run(begun())
    assert make(worker).timings.from_pool


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
        await failing.foresee(SPEC)
        await asyncio.sleep(0.2)
        taken = await failing.take(SPEC)
        await failing.close()
        return taken

    assert worker.engine.run(take()) is None
