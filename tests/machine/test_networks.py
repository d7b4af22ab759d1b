"""Who is on which network, and how many can be."""

from __future__ import annotations

import pytest

from pytest_vmsandbox.errors import AddressesExhausted, NameTaken
from pytest_vmsandbox.host.facts import Tier
from pytest_vmsandbox.machine.wires import LooseWires, Wires
from pytest_vmsandbox.machine.worker import Worker
from pytest_vmsandbox.network.addresses import MACHINES, NETWORKS


def _join(worker: Worker, machine: str, *names: str) -> Wires:
    """Nothing is started by that."""
    return worker.networks.join(machine, LooseWires(networks=names), tier=Tier.BARE)


def test_a_network_that_is_full_says_so_until_somebody_leaves(worker: Worker) -> None:
    there = [_join(worker, f"m{number}", "lan") for number in MACHINES]
    assert len({wires.addresses["lan"].ip for wires in there}) == len(MACHINES) == 253

    with pytest.raises(AddressesExhausted, match="network 'lan' is full: 253 machines are on it"):
        _join(worker, "late", "dmz", "lan")
    assert worker.networks.names == ("lan",)  # nor is it on the other one

    worker.engine.run(there[7].leave())
    late = _join(worker, "late", "dmz", "lan")
    assert late.addresses["lan"] == there[7].addresses["lan"]


def test_there_are_so_many_networks_and_no_more_until_one_is_left(
    worker: Worker,
) -> None:
    there = [_join(worker, "one", f"n{number}") for number in NETWORKS]

    with pytest.raises(AddressesExhausted, match=f"there are {len(NETWORKS)} networks already"):
        _join(worker, "one", "another")

    worker.engine.run(there[3].leave())
    another = _join(worker, "one", "another")
    assert str(another.addresses["another"].ipv4) == "10.76.3.2/24"


def test_a_name_is_taken_on_a_network_and_free_on_others(worker: Worker) -> None:
    first = _join(worker, "db", "lan")

    with pytest.raises(NameTaken, match="network 'lan' has a machine 'db' already"):
        _join(worker, "db", "dmz", "lan")
    assert worker.networks.names == ("lan",)
    _join(worker, "db", "dmz")
    worker.engine.run(first.leave())
    worker.engine.run(first.leave())
    _join(worker, "db", "lan")
