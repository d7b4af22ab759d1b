"""Own addresses: an interface takes what is for itself, and nothing that is for another one.

Linux answers for every address that it has, whatever interface a packet comes over. So a machine
would reach, by way of the host's end of its own network, the host's ends of all others.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import suppress
from ipaddress import IPv4Network, IPv6Network, ip_network

from pytest_vmsandbox.linux.rtnetlink import RouteSocket, Rule
from pytest_vmsandbox.network.addresses import Address

# The kernel has its rule for what is the host itself before all others; ours come before it now.
_KERNELS, _OURS, _ELSE, _LATER = 0, 10, 11, 20

_ALL = (IPv4Network("0.0.0.0/0"), IPv6Network("::/0"))
# What IPv6 finds its neighbours by: of each link alone.
_LINK_LOCAL = (IPv6Network("fe80::/10"), IPv6Network("ff00::/8"))


def take_only_own(route: RouteSocket, interface: str, address: Address) -> None:
    """Drop what comes over an interface and is not for that address; `take_all` ends it.

    For a network namespace of one's own. OSError from a kernel that has no such rules.
    """
    take_nothing(route, interface)
    take_own(route, interface, address)


def take_own(route: RouteSocket, interface: str, address: Address) -> None:
    """Take what is for that address over an interface that took nothing before."""
    for rule in _own_rules(interface, address):
        route.add_rule(rule)
    for everything in _ALL:
        # Once only: to the kernel a priority of 0 stands for any (fib_rules.c, rule_find).
        with suppress(FileExistsError):
            route.add_rule(Rule(priority=_LATER, to=everything))
            route.delete_rule(Rule(priority=_KERNELS, to=everything))


def take_nothing(route: RouteSocket, interface: str) -> None:
    """Drop whatever comes over an interface that has no address; `take_all` ends it.

    As long as there is nobody who takes only his own, nobody here takes anything.
    """
    for rule in _other_rules(interface):
        route.add_rule(rule)


def leave_own(route: RouteSocket, interface: str, address: Address) -> None:
    """Take nothing again, as before `take_own`."""
    _forget(route, _own_rules(interface, address))


def take_all(route: RouteSocket, interface: str, address: Address | None) -> None:
    """Forget the rules for an interface with that address, or none; it may be gone."""
    own = () if address is None else _own_rules(interface, address)
    _forget(route, (*own, *_other_rules(interface)))


def _forget(route: RouteSocket, rules: Iterable[Rule]) -> None:
    for rule in rules:
        with suppress(FileNotFoundError):
            route.delete_rule(rule)


def _own_rules(interface: str, address: Address) -> Iterator[Rule]:
    for own in (ip_network(address.ip), ip_network(address.ip6), *_LINK_LOCAL):
        yield Rule(priority=_OURS, to=own, interface=interface)


def _other_rules(interface: str) -> Iterator[Rule]:
    for everything in _ALL:
        yield Rule(priority=_ELSE, to=everything, interface=interface, table=None)
