"""The clock of a restored machine: the host's time, or that of the instant it was frozen at."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from pytest_vmsandbox.errors import RequestInvalid
from pytest_vmsandbox.machine.controller import MachineController
from pytest_vmsandbox.machine.spec import MachineSpec
from pytest_vmsandbox.machine.worker import Worker

FROZEN = MachineSpec(clock="frozen")
# What passes between a template's instant and its machine, in seconds.
BETWEEN_S = 3

Make = Callable[[MachineSpec], MachineController]


@pytest.fixture
def make(worker: Worker) -> Make:
    def one(spec: MachineSpec) -> MachineController:
        async def made() -> MachineController:
            (machine,) = await worker.make([spec])
            await worker.boot([machine])
            return machine

        return worker.engine.run(made())

    return one


def behind_s(worker: Worker, machine: MachineController) -> float:
    """How far the guest's clock is behind the host's at least, to the second; below 0 if ahead."""
    asked = time.time()
    said = int(worker.engine.run(machine.run("date +%s", check=True)).stdout)
    return max(asked - said, 0.0) or min(time.time() - said, 0.0)


@pytest.mark.machine
def test_a_frozen_clock_goes_on_from_the_templates_instant(worker: Worker, make: Make) -> None:
    make(MachineSpec())  # the template is there at the latest now
    time.sleep(BETWEEN_S)
    frozen, usual = make(FROZEN), make(MachineSpec())

    assert behind_s(worker, frozen) > BETWEEN_S - 1
    assert -1 < behind_s(worker, usual) < 2
    assert frozen.facts.lifecycle == "restored"


@pytest.mark.machine
def test_forks_and_snapshots_go_on_from_their_own_instant(worker: Worker, make: Make) -> None:
    run, machine = worker.engine.run, make(FROZEN)
    snapshot = run(machine.snapshot())
    before = behind_s(worker, machine)
    time.sleep(BETWEEN_S)
    run(machine.restore(snapshot))
    (twin,) = run(machine.fork(1))

    for one in (machine, twin):
        assert behind_s(worker, one) > before + BETWEEN_S - 1.5


@pytest.mark.machine
def test_a_frozen_clock_is_restored_where_machines_are_usually_booted(
    worker: Worker, make: Make
) -> None:
    spec = MachineSpec(lifecycle="booted").changed({"clock": "frozen"})

    assert make(spec).facts.lifecycle == "restored"


@pytest.mark.machine
def test_a_machine_with_a_frozen_clock_that_boots_again_shows_the_present(
    worker: Worker, make: Make
) -> None:
    make(MachineSpec())
    time.sleep(BETWEEN_S)
    machine = make(FROZEN)
    worker.engine.run(machine.power_cut())
    worker.engine.run(machine.power_on())

    # A clock that had stood still since the template would be behind by more than BETWEEN_S.
    assert -1.5 < behind_s(worker, machine) < BETWEEN_S


def test_a_frozen_clock_and_a_boot_exclude_each_other() -> None:
    with pytest.raises(RequestInvalid, match='clock="frozen"'):
        MachineSpec().changed({"clock": "frozen", "lifecycle": "booted"})


def test_a_clock_is_the_hosts_or_frozen() -> None:
    with pytest.raises(RequestInvalid, match="clock='utc' must be one of host, frozen"):
        MachineSpec(clock="utc")
