"""What a test did to networks: whom it follows, what outlasts it, and what does not."""

from __future__ import annotations

import signal
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from pytest_vmsandbox import Machine, MachineFactory, Network
from pytest_vmsandbox.errors import SwitchDied
from pytest_vmsandbox.lease.entries import ProcessEntry, Role
from pytest_vmsandbox.lease.layout import LEDGER
from pytest_vmsandbox.lease.ledger import read_ledger
from pytest_vmsandbox.machine.controller import MachineController
from pytest_vmsandbox.machine.spec import MachineSpec
from pytest_vmsandbox.machine.worker import Worker
from tests.signals import send_signal


def _started(worker: Worker, *networks: str) -> list[MachineController]:
    machines = worker.engine.run(worker.make([MachineSpec(network=name) for name in networks]))
    worker.engine.run(worker.boot(machines))
    return machines


def _reaches(
    worker: Worker, one: MachineController, other: MachineController, *, within_s: int = 10
) -> bool:
    ping = ["ping", "-c", "1", "-W", str(within_s), str(other.address().ip)]
    return worker.engine.run(one.run(ping)).returncode == 0


def _power_cycle(worker: Worker, machines: Sequence[MachineController]) -> None:
    for machine in machines:
        worker.engine.run(machine.power_cut())
    worker.engine.run(worker.boot(machines))


def _kill_the_switch(worker: Worker) -> None:
    for entry in read_ledger(worker.directory.path / LEDGER).entries.values():
        if isinstance(entry, ProcessEntry) and entry.role is Role.SWITCH:
            assert entry.identity is not None
            send_signal(entry.identity.pid, signal.SIGKILL)
    line, deadline = worker.networks._line, time.monotonic() + 15
    assert line is not None
    while not line.over and time.monotonic() < deadline:  # what it is the parent of ends with it
        time.sleep(0.01)
    assert line.over


def test_another_switch_knows_what_is_wrong_with_a_network(worker: Worker) -> None:
    run, networks = worker.engine.run, worker.networks
    machines = one, two, three = _started(worker, "lan", "lan", "lan")
    run(networks.partition([one.name], [two.name], network="lan"))
    _kill_the_switch(worker)
    with pytest.raises(SwitchDied):
        run(networks.partition([one.name], [three.name], network="lan"))
    with pytest.raises(SwitchDied):
        run(networks.impair(network="lan", loss=1.0))

    _power_cycle(worker, machines)

    assert not _reaches(worker, one, two, within_s=1)
    assert _reaches(worker, one, three)  # for that was refused
    assert run(networks.counts(network="lan"))["cut"] > 0
    run(networks.heal())
    # A kernel that asked in vain asks again within seconds.
    run(one.wait_until(["ping", "-c", "1", "-W", "1", str(two.address().ip)]))
    assert not networks.disturbed
    worker.engine.run(worker.end(machines))


def test_a_network_that_fails_keeps_no_other_from_being_healed(worker: Worker) -> None:
    run, networks = worker.engine.run, worker.networks
    (lost,) = _started(worker, "lost")
    _kill_the_switch(worker)
    with pytest.raises(SwitchDied):
        run(networks.counts(network="lost"))
    one, two = _started(worker, "lan", "lan")
    run(networks.partition([one.name], [two.name], network="lan"))

    with pytest.raises(SwitchDied, match="the switch has ended"):
        run(networks.heal())
    healed = _reaches(worker, one, two)
    run(networks.partition([one.name], [two.name], network="lan"))
    run(networks.settle())

    assert healed
    assert _reaches(worker, one, two)
    assert not networks.disturbed
    worker.engine.run(worker.end([lost, one, two]))


def test_a_capture_that_can_not_be_written_is_said_after_all_is_settled(worker: Worker) -> None:
    run, networks = worker.engine.run, worker.networks
    machines = one, two = _started(worker, "lan", "lan")
    run(networks.start_capture(Path("/dev/full"), network="lan"))
    assert _reaches(worker, one, two)  # whom it does not concern
    run(networks.partition([one.name], [two.name], network="lan"))

    with pytest.raises(OSError, match="No space left on device"):
        run(networks.settle())

    assert not networks.disturbed
    assert _reaches(worker, one, two)
    worker.engine.run(worker.end(machines))


def test_twins_are_cut_off_from_whom_the_original_is_cut_off(
    vm_factory: MachineFactory, vm_network: Network
) -> None:
    one, two = vm_factory(count=2, network="lan")
    vm_network.partition(one, two)

    (twin,) = one.fork(1)
    (other_twin,) = two.fork(1)

    assert not _pings(twin, two, within_s=1)
    assert not _pings(other_twin, one, within_s=1)
    assert not _pings(other_twin, twin, within_s=1)
    assert _pings(twin, one)
    assert _pings(other_twin, two)
    vm_network.heal()
    for each in (twin, one):
        each.wait_until(["ping", "-c", "1", "-W", "1", two.ip])


def test_a_name_that_was_cut_off_is_not_when_it_is_anothers(worker: Worker) -> None:
    run, networks = worker.engine.run, worker.networks
    first, other = run(worker.make([MachineSpec(network="lan", name=n) for n in ("db", "web")]))
    run(worker.boot([first, other]))
    run(networks.partition(["db"], ["web"], network=None))

    run(worker.end([first]))

    assert not networks.disturbed
    before = run(networks.counts(network="lan"))["cut"]  # what a kernel says by itself, perhaps
    (second,) = run(worker.make([MachineSpec(network="lan", name="db")]))
    run(worker.boot([second]))
    assert _reaches(worker, second, other)
    assert run(networks.counts(network="lan"))["cut"] == before
    run(worker.end([second, other]))


def _pings(one: Machine, other: Machine, *, within_s: int = 10) -> bool:
    return one.run(["ping", "-c", "1", "-W", str(within_s), other.ip]).returncode == 0
