"""Addresses: each machine on each network has its own, and the same again in every run."""

from __future__ import annotations

import pytest

from pytest_vmsandbox.errors import AddressesExhausted, NameTaken
from pytest_vmsandbox.network.addresses import (
    HOST_END,
    MACHINES,
    NETWORKS,
    Lessor,
    address_of,
    placeholder_mac,
)


def test_every_machine_on_every_network_has_addresses_of_its_own() -> None:
    everybody = [
        address_of(network, machine) for network in NETWORKS for machine in (HOST_END, *MACHINES)
    ]

    for kind in ("ip", "ip6", "mac"):
        assert len({getattr(address, kind) for address in everybody}) == len(everybody)
    assert not {placeholder_mac(card) for card in range(256)} & {each.mac for each in everybody}


def test_networks_do_not_overlap_and_hold_their_machines() -> None:
    for version in ("ipv4", "ipv6"):
        subnets = {getattr(address_of(network, 2), version).network for network in NETWORKS}
        assert len(subnets) == len(NETWORKS)
        for network in (0, 1, 255):
            subnet = getattr(address_of(network, 2), version).network
            for machine in (HOST_END, *MACHINES):
                address = getattr(address_of(network, machine), version)
                assert address.network == subnet
                assert address.ip != subnet.network_address
                if version == "ipv4":
                    assert address.ip != subnet.broadcast_address


def test_all_of_them_are_private_and_no_mac_was_given_by_the_ieee() -> None:
    for network in NETWORKS:
        address = address_of(network, 2)
        assert address.ip.is_private
        assert address.ip6.is_private
        first = int(address.mac[:2], 16)
        assert first & 2, "locally administered"
        assert not first & 1, "for one machine, not for many"


@pytest.mark.parametrize(
    ("network", "machine"), [(-1, 2), (256, 2), (0, 0), (0, 255), (0, -1), (0, 256)]
)
def test_there_is_no_other_machine(network: int, machine: int) -> None:
    with pytest.raises(ValueError, match=f"machine {machine} on network {network}"):
        address_of(network, machine)


def test_the_lowest_free_address_goes_to_whoever_comes() -> None:
    lessor = Lessor(name="lan", network=3)

    first, second = lessor.lease("a"), lessor.lease("b")
    lessor.release("a")
    third = lessor.lease("c")

    assert [str(address.ip) for address in (first, second)] == ["10.76.3.2", "10.76.3.3"]
    assert third == first
    assert list(lessor.members) == ["c", "b"]
    assert lessor.members["b"] == second


def test_a_name_is_taken_once() -> None:
    lessor = Lessor(name="lan", network=0)
    lessor.lease("db")

    with pytest.raises(NameTaken, match="'lan' has a machine 'db' already"):
        lessor.lease("db")
    lessor.release("nobody")
    lessor.release("db")
    lessor.lease("db")

    assert list(lessor.members) == ["db"]


def test_a_full_network_says_so_and_takes_on_again_once_somebody_left() -> None:
    lessor = Lessor(name="lan", network=0)
    for number in range(len(MACHINES)):
        lessor.lease(f"m{number}")

    with pytest.raises(AddressesExhausted, match="'lan' is full: 253 machines"):
        lessor.lease("one-more")
    lessor.release("m100")

    assert lessor.lease("one-more") == address_of(0, 102)
