"""The way out of a network: its gateways, and who answers to names there."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path
from typing import TypeAlias

from pytest_vmsandbox.network.addresses import GATEWAY, RESOLVER, WAY_OUT, address_of

IpAddress: TypeAlias = IPv4Address | IPv6Address

# A guest's, and the host's, of which the gateway asks the first of each kind (slirp.c of libslirp).
RESOLV_CONF = Path("/etc/resolv.conf")

# Somebody out there, to whom nothing is sent (RFC 3849).
_SOMEBODY = ("2001:db8::1", 9)


@dataclass(frozen=True, slots=True, kw_only=True)
class WayOut:
    """What a guest is told of it: the gateways of its default routes, and its resolvers."""

    gateways: Sequence[IpAddress]
    resolvers: Sequence[IpAddress]


def plan_way_out(resolv_conf: str, *, ipv6: bool) -> WayOut:
    """The way out of a host with this resolv.conf, and with or without IPv6.

    It has a resolver of each kind of which the host has one.
    """
    gateway, resolver = address_of(WAY_OUT, GATEWAY), address_of(WAY_OUT, RESOLVER)
    kinds = {address.version for address in name_servers(resolv_conf)}
    gateways: Sequence[IpAddress] = (gateway.ip, gateway.ip6) if ipv6 else (gateway.ip,)
    resolvers: Sequence[IpAddress] = (resolver.ip, resolver.ip6) if ipv6 else (resolver.ip,)
    return WayOut(
        gateways=gateways,
        resolvers=tuple(address for address in resolvers if address.version in kinds),
    )


def name_servers(resolv_conf: str) -> Sequence[IpAddress]:
    """The addresses of the resolvers that a resolv.conf names, without zones."""
    found: list[IpAddress] = []
    for line in resolv_conf.splitlines():
        match line.split():
            case ["nameserver", address, *_]:
                try:
                    found.append(ip_address(address.partition("%")[0]))
                except ValueError:
                    continue
    return found


def render_resolv_conf(resolvers: Sequence[IpAddress]) -> str:
    """A guest's resolv.conf (resolv.conf(5))."""
    lines = (f"nameserver {address}\n" for address in resolvers)
    return "# vmsandbox: who answers to names on the network nat\n" + "".join(lines)


def host_has_ipv6() -> bool:
    """Whether this host has a route to the world for IPv6; nothing is sent."""
    try:
        with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as sock:
            sock.connect(_SOMEBODY)
    except OSError:
        return False
    return True
