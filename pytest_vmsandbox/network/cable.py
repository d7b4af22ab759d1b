"""A cable: the tap that a machine's card is, on the bridge of its network or on a way around it.

The way around is a bridge of its own with nothing on it but this tap and another one, whose other
end is the hub's. The kernel cuts long segments and computes checksums on that way, which a guest
had left to its card: the hub gets frames as they would be on a real wire.
"""

from __future__ import annotations

import os
from contextlib import ExitStack, suppress

from pytest_vmsandbox.linux.owned_fd import OwnedFd
from pytest_vmsandbox.linux.rtnetlink import LinkStats, RouteSocket
from pytest_vmsandbox.linux.tun import open_tap
from pytest_vmsandbox.network.hub import LEARNED_AT_MOST
from pytest_vmsandbox.network.own_address import take_all, take_nothing

# A guest may choose a longer MTU than usual, and is not stopped by ours: the longest of a tap.
_MTU = 65521

_AGEING_S = 300


class Cable:
    """A tap of the switch's network namespace, which is there until `close`."""

    def __init__(self, route: RouteSocket, number: int, *, bridge: str) -> None:
        self.tap, self._pair, self._hub = f"tap{number}", f"pair{number}", f"hub{number}"
        self._route = route
        self._bridge = bridge
        self._has_detour = False
        with ExitStack() as undo:
            self._end = undo.enter_context(open_tap(self.tap, offloads=True))
            add_port(route, self.tap, bridge)
            undo.pop_all()

    def duplicate_end(self) -> OwnedFd:
        """The machine's end, for the caller to close."""
        return OwnedFd(os.dup(self._end))

    @property
    def stats(self) -> LinkStats:
        """What the machine was sent."""
        return self._route.stats(self.tap)

    @property
    def interfaces(self) -> tuple[str, ...]:
        """All that there are."""
        return (self.tap, self._pair, self._hub) if self._has_detour else (self.tap,)

    def open_detour(self) -> OwnedFd:
        """Make the way around, which is there until `close`; the hub's end is the caller's."""
        with ExitStack() as undo:
            hub = undo.enter_context(open_tap(self._hub))
            add_bridge(self._route, self._pair, learns=False)
            undo.callback(self._route.delete, self._pair)
            undo.callback(take_all, self._route, self._pair, None)
            take_nothing(self._route, self._pair)
            add_port(self._route, self._hub, self._pair)
            undo.pop_all()
        self._has_detour = True
        return hub

    def divert(self) -> None:
        """Leave the network's bridge for the way around."""
        self._route.set_master(self.tap, self._pair)

    def rejoin(self) -> None:
        """Go back to the network's bridge."""
        self._route.set_master(self.tap, self._bridge)

    def close(self) -> None:
        """Remove the tap, whoever else holds its end, and the way around, but for the hub's end."""
        self._end.close()
        for name in self.interfaces[:2]:
            with suppress(OSError):  # it went with its end, or somebody removed it
                self._route.delete(name)
        if self._has_detour:
            take_all(self._route, self._pair, None)


def add_bridge(route: RouteSocket, name: str, *, learns: bool) -> None:
    """Make a bridge that is up and silent.

    One that learns may have addresses. One that does not sends all to its other ports.
    """
    ageing_s = _AGEING_S if learns else 0
    route.add_bridge(name, ageing_s=ageing_s, learned_at_most=LEARNED_AT_MOST)
    try:
        _set_apart(route, name, answers=learns)
        route.set_up(name)
    except BaseException:
        route.delete(name)
        raise


def _set_apart(route: RouteSocket, name: str, *, answers: bool) -> None:
    """Keep an interface from this namespace's own IP, and that from it.

    A namespace may be born with the host's settings (ip-sysctl, devconf_inherit_init_net): where
    that forwards, networks would reach each other through us. And a bridge that is only a way
    would answer for the host's end itself, past the hub.
    """
    route.be_silent(name)
    route.hold_aloof(name, answers=answers)


def add_port(route: RouteSocket, name: str, bridge: str, *, up: bool = True) -> None:
    """Make a new tap a port of a bridge, which carries for it while it is up."""
    _set_apart(route, name, answers=False)
    route.set_mtu(name, _MTU)
    route.set_master(name, bridge)
    if up:
        route.set_up(name)
