"""Furnishing: what a machine is given of its surroundings, as values and in a payload."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Interface, IPv6Address, IPv6Interface

from pytest_vmsandbox.guest.payload import encode_text

# What fits into one message beside an identity; one that is longer is to be done in parts.
FURNISHING_MAX = 32 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Interface:
    """A card by its name or Ethernet address, and the addresses that it is to have.

    As "OLD,NEW" it is the one that has NEW, or has OLD and is given NEW. The default routes go by
    way of its `gateways`, at most one of IPv4 and one of IPv6.
    """

    name: str
    addresses: Sequence[IPv4Interface | IPv6Interface] = ()
    gateways: Sequence[IPv4Address | IPv6Address] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Lines:
    """Lines of a file, mode 0644.

    They are all that it is to hold, or a block among others: then they replace what stands there
    from a first line like theirs to a last one like theirs, or come at the end.
    """

    path: str
    text: str
    are_all: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Furnishing:
    """All that a machine gets in one go, or that is left to be done one by one."""

    interfaces: Sequence[Interface] = ()
    files: Sequence[Lines] = ()


NOTHING = Furnishing()


def encode_furnishing(furnishing: Furnishing) -> bytes:
    """What stands at the end of a HELLO."""
    if furnishing == NOTHING:
        return b""
    return b"".join(_parts(furnishing))


def encode_addresses(interface: Interface) -> bytes:
    """What follows the name of an interface."""
    parts = [bytes((len(interface.addresses),))]
    for address in interface.addresses:
        parts += (_packed(address.ip), bytes((address.network.prefixlen,)))
    parts.append(bytes((len(interface.gateways),)))
    parts += map(_packed, interface.gateways)
    return b"".join(parts)


def _parts(furnishing: Furnishing) -> Iterator[bytes]:
    yield bytes((len(furnishing.interfaces),))
    for interface in furnishing.interfaces:
        yield encode_text(interface.name)
        yield encode_addresses(interface)
    yield bytes((len(furnishing.files),))
    for lines in furnishing.files:
        yield bytes((lines.are_all,))
        yield encode_text(lines.path)
        yield encode_text(lines.text)


def _packed(address: IPv4Address | IPv6Address) -> bytes:
    return bytes((len(address.packed),)) + address.packed
