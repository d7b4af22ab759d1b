"""Notices of interfaces that go, in network namespaces of children."""

from __future__ import annotations

import socket
from collections.abc import Callable

from pytest_vmsandbox.linux import CloneFlags, unshare
from pytest_vmsandbox.linux.link_notices import LinkNotices
from pytest_vmsandbox.linux.rtnetlink import RouteSocket

InChild = Callable[..., None]


def test_whatever_goes_is_told_and_nothing_else(in_room: InChild) -> None:
    def body() -> None:
        unshare(CloneFlags.NEWNET)
        with LinkNotices() as notices, RouteSocket() as route:
            route.add_bridge("bridge", ageing_s=300, learned_at_most=10)
            route.add_veth("one", "other")
            one, other = (socket.if_nametoindex(name) for name in ("one", "other"))
            bridge = socket.if_nametoindex("bridge")
            route.set_master("one", "bridge")
            route.set_up("one")
            route.set_master("one", None)  # which a bridge tells as the end of a link of its own
            assert notices.gone() == []

            route.set_master("other", "bridge")
            route.delete("one")
            assert sorted(notices.gone() or ()) == sorted((one, other))
            route.delete("bridge")
            assert notices.gone() == [bridge]
            assert notices.gone() == []

    in_room(body)


def test_when_there_was_too_much_to_tell_it_is_said_and_all_that_follows_is_told(
    in_room: InChild,
) -> None:
    def body() -> None:
        unshare(CloneFlags.NEWNET)
        with LinkNotices() as notices, RouteSocket() as route:
            route.add_veth("one", "other")
            index = socket.if_nametoindex("one")
            for _ in range(1000):
                route.set_up("one")
                route.set_down("one")

            assert notices.gone() is None
            route.delete("one")
            assert index in (notices.gone() or ())

    in_room(body)
