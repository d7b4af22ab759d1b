"""Addresses: what each network, and each machine on it, is called by IP and by Ethernet.

Everything follows from two numbers, the network's in its worker and the machine's on its network,
so that a run that does the same gets the same addresses. They mean nothing outside a worker's own
networks: two workers use the same ones at the same time.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from ipaddress import (
    IPv4Address,
    IPv4Interface,
    IPv4Network,
    IPv6Address,
    IPv6Interface,
    IPv6Network,
)

from pytest_vmsandbox.errors import AddressesExhausted, NameTaken

# Private to us by RFC 1918 and RFC 4193; `76:6d73:62` is "vmsb".
IPV4 = IPv4Network("10.76.0.0/16")
IPV6 = IPv6Network("fd76:6d73:6200::/48")
_PREFIX_V4, _PREFIX_V6 = 24, 64

# The second lowest bit of the first byte says that nobody was given it by the IEEE (IEEE 802, 8.4).
_MAC = bytes((0x02, 0x76, 0x6D))

NETWORKS = range(255)
# The one with a way out is always the last, so that its gateway has the same address all the time.
WAY_OUT = 255
# 0 is the network itself, 255 everybody on it, 1 is the host's end.
HOST_END = 1
MACHINES = range(2, 255)
# Where there is a way out, two of them are no machines.
GATEWAY, RESOLVER = 254, 253


@dataclass(frozen=True, slots=True, kw_only=True)
class Address:
    """What one machine, or the host's end, is called on one network."""

    ipv4: IPv4Interface
    ipv6: IPv6Interface
    mac: str

    @property
    def ip(self) -> IPv4Address:
        """The IPv4 address alone."""
        return self.ipv4.ip

    @property
    def ip6(self) -> IPv6Address:
        """The IPv6 address alone."""
        return self.ipv6.ip


def address_of(network: int, machine: int) -> Address:
    """The address of that machine on that network; ValueError for numbers that there are not."""
    known = network == WAY_OUT or network in NETWORKS
    if not known or not (machine == HOST_END or machine in MACHINES):
        raise ValueError(f"there is no machine {machine} on network {network}")
    v4 = IPv4Address(int(IPV4.network_address) + (network << 32 - _PREFIX_V4) + machine)
    v6 = IPv6Address(int(IPV6.network_address) + (network << 128 - _PREFIX_V6) + machine)
    return Address(
        ipv4=IPv4Interface((v4, _PREFIX_V4)),
        ipv6=IPv6Interface((v6, _PREFIX_V6)),
        mac=(_MAC + bytes((0, network, machine))).hex(":"),
    )


def placeholder_mac(card: int) -> str:
    """What a template's card of that number is called, until a machine out of it has its own."""
    return (_MAC + bytes((0xFF, 0, card))).hex(":")


@dataclass(slots=True, kw_only=True)
class Lessor:
    """Who is who on one network: the lowest free number goes to whoever comes."""

    name: str
    network: int
    _held: dict[int, str] = field(default_factory=dict)

    def lease(self, machine: str) -> Address:
        """The address for a machine of that name, until `release`.

        Raises NameTaken where the name is, AddressesExhausted where every address is.
        """
        if machine in self._held.values():
            raise NameTaken(
                f"network {self.name!r} has a machine {machine!r} already",
                "name= tells machines on one network apart",
            )
        taken = {*self._held, *((GATEWAY, RESOLVER) if self.network == WAY_OUT else ())}
        for number in MACHINES:
            if number not in taken:
                self._held[number] = machine
                return address_of(self.network, number)
        raise AddressesExhausted(
            f"network {self.name!r} is full: {len(self._held)} machines are on it, "
            f"and no more can be"
        )

    def release(self, machine: str) -> None:
        """Give a name's address back; a name that has none is none."""
        self._held = {number: name for number, name in self._held.items() if name != machine}

    def number_of(self, machine: str) -> int:
        """The number that a name holds; KeyError for one that holds none."""
        return {name: number for number, name in self._held.items()}[machine]

    @property
    def members(self) -> dict[str, Address]:
        """Who has which address, by name."""
        return {
            name: address_of(self.network, number) for number, name in sorted(self._held.items())
        }
