"""The data plane of taps: the kernel's bridge carries frames, and the hub while something is wrong.

Where nothing is wrong with a network its machines are on one bridge, at the kernel's own speed.
While a frame may have to be lost, kept back, refused or written down, each is on a bridge of its
own with the hub (cable.py), which then carries between them as it does between sockets. A tap is
on one bridge at each instant, so that no frame is carried twice; some may be lost in the change.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, suppress
from functools import partial

from pytest_vmsandbox.linux.owned_fd import OwnedFd
from pytest_vmsandbox.linux.rtnetlink import RouteSocket
from pytest_vmsandbox.linux.tun import open_tap
from pytest_vmsandbox.network.addresses import HOST_END, address_of
from pytest_vmsandbox.network.cable import Cable, add_bridge, add_port
from pytest_vmsandbox.network.hub import Hub, nobody
from pytest_vmsandbox.network.impairment import Impairment
from pytest_vmsandbox.network.link_watch import LinkWatch
from pytest_vmsandbox.network.own_address import leave_own, take_all, take_nothing, take_own
from pytest_vmsandbox.network.pcap import PcapWriter
from pytest_vmsandbox.network.plane import HOST_PORT, Broken, Part
from pytest_vmsandbox.network.port import TapPort

_MTU = 1500  # of the host's end; as a bridge's own, it would follow that of its ports


class TapPlane:
    """A Plane of interfaces; `title` is the network as its user knows it.

    `numbers` tell cables apart, of all networks of this namespace. `told` is called when an
    interface was removed by anybody else; what it carried is Broken from then on.
    """

    def __init__(
        self,
        number: int,
        hub: Hub,
        *,
        title: str,
        numbers: Iterator[int],
        watch: LinkWatch,
        told: Callable[[Broken], None],
    ) -> None:
        self._address = address_of(number, HOST_END)
        self._bridge, self._way = f"net{number}", f"way{number}"
        self._title, self._numbers, self._watch, self._told = title, numbers, watch, told
        self._cables: dict[str, Cable] = {}
        self._machines: dict[str, int | None] = {}  # their numbers
        self._watched: dict[str, list[int]] = {}  # the interfaces of each port
        self._ways: dict[str, TapPort] = {}  # to the hub
        self._broken: dict[str, Broken] = {}  # by port
        self._by_hub = self._has_host_end = False
        self._sent = self._dropped = 0  # to those who are gone
        self._hub = hub
        self._hub.caught_up = self._choose
        with ExitStack() as undo:
            self._route = undo.enter_context(RouteSocket())
            # A machine would be answered by the host's ends of other networks otherwise, in the
            # name of whoever it says that it is: IPv6 does not ask where a sender is at home.
            undo.callback(take_all, self._route, self._bridge, None)
            take_nothing(self._route, self._bridge)
            add_bridge(self._route, self._bridge, learns=True)
            undo.callback(self._route.delete, self._bridge)
            self._route.set_mac(self._bridge, bytes.fromhex(self._address.mac.replace(":", "")))
            self._route.set_mtu(self._bridge, _MTU)
            self._watch_over(HOST_PORT, self._bridge)
            self._choose()
            undo.pop_all()

    def plug(self, port: str, *, machine: int | None) -> OwnedFd:
        """Part of Plane."""
        if port in self._cables:
            raise ValueError(f"there is a port {port} already")
        cable = Cable(self._route, next(self._numbers), bridge=self._bridge)
        self._cables[port], self._machines[port] = cable, machine
        try:
            self._watch_over(port, cable.tap)
            if self._by_hub:
                self._prepare(port)
                cable.divert()
            return cable.duplicate_end()
        except BaseException:
            self._remove(port)
            raise

    def unplug(self, port: str) -> bool:
        """Part of Plane."""
        with suppress(OSError):  # it is gone, and its numbers with it
            stats = self._cables[port].stats
            self._sent += stats.sent
            self._dropped += stats.dropped
        self._remove(port)
        self._choose()
        return self._has_host_end

    def cut(self, pairs: Iterable[frozenset[str]]) -> None:
        """Part of Plane."""
        with ExitStack() as undo:
            undo.callback(self._hub.cut, self._hub.cuts)
            self._hub.cut(pairs)
            self._choose()
            undo.pop_all()

    def impair(self, impairment: Impairment) -> None:
        """Part of Plane."""
        with ExitStack() as undo:
            undo.callback(setattr, self._hub, "impairment", self._hub.impairment)
            self._hub.impairment = impairment
            self._choose()
            undo.pop_all()

    def capture(self, number: int, writer: PcapWriter) -> None:
        """Part of Plane."""
        with ExitStack() as undo:
            undo.callback(self._hub.captures.pop, number)
            self._hub.captures[number] = writer
            self._choose()
            undo.pop_all()

    def end_capture(self, number: int) -> None:
        """Part of Plane."""
        self._catch_up()
        self._hub.captures.pop(number).close()
        self._choose()

    def counts(self) -> Mapping[str, int]:
        """Part of Plane: what the taps were sent, and what the hub kept from them."""
        stats = [cable.stats for cable in self._cables.values()]
        hub = self._hub.counts
        return {
            "carried": self._sent + sum(each.sent for each in stats),
            "cut": hub.cut,
            "lost": hub.lost,
            "overflowed": self._dropped + sum(each.dropped for each in stats) + hub.overflowed,
        }

    def require_host_end(self) -> None:
        """Part of Plane: it is the bridge itself."""
        if self._has_host_end:
            return
        with ExitStack() as undo:
            undo.callback(leave_own, self._route, self._bridge, self._address)
            take_own(self._route, self._bridge, self._address)
            for each in (self._address.ipv4, self._address.ipv6):
                self._route.add_address(self._bridge, each)
            undo.pop_all()
        self._has_host_end = True

    def require_whole(self) -> None:
        """Part of Plane."""
        self._watch.look()
        for broken in self._broken.values():
            raise broken

    def close(self) -> None:
        """Part of Plane."""
        self._hub.caught_up = nobody  # it is over, whatever is late
        for port in tuple(self._cables):
            self._remove(port)
        self._forget(HOST_PORT)
        self._hub.close()
        with suppress(OSError):  # somebody removed it
            self._route.delete(self._bridge)
        take_all(self._route, self._bridge, self._address)
        self._route.close()

    # By bridge, or by hub

    def _choose(self) -> None:
        """Have frames carried by whom they are to be carried now."""
        if self._by_hub == self._hub.disturbed or self._broken:
            return
        try:
            if self._by_hub:
                self._go_by_bridge()
            else:
                self._go_by_hub()
        except OSError:
            self._watch.look()
            if not self._broken:
                raise

    def _go_by_hub(self) -> None:
        """All of them, or none: what was prepared in vain is of use the next time."""
        if HOST_PORT not in self._ways:
            self._open_way()
        for port in self._cables:
            self._prepare(port)
        self._hub.forget_addresses()  # it has heard nothing for a while
        with ExitStack() as undo:
            for cable in self._cables.values():
                cable.divert()
                undo.callback(cable.rejoin)
            # Last: whoever is on the bridge still is heard there, and would be heard again by the
            # hub.
            self._route.set_up(self._way)
            undo.pop_all()
        self._by_hub = True

    def _go_by_bridge(self) -> None:
        self._catch_up()
        self._route.set_down(self._way)
        for cable in self._cables.values():
            cable.rejoin()
        self._by_hub = False

    def _prepare(self, port: str) -> None:
        """Have a way around for a port, which it does not go yet."""
        cable = self._cables[port]
        if port not in self._ways:
            way = TapPort(port, cable.open_detour())
            try:
                self._hub.plug_machine(way, self._machines[port])
            except BaseException:
                way.close()
                raise
            self._ways[port] = way
        for name in cable.interfaces[len(self._watched[port]) :]:
            self._watch_over(port, name)

    def _open_way(self) -> None:
        """Connect the hub with the bridge, which is nothing but the host's end then."""
        with ExitStack() as undo:
            tap = undo.enter_context(open_tap(self._way))
            add_port(self._route, self._way, self._bridge, up=False)
            self._watch_over(HOST_PORT, self._way)
            undo.pop_all()
        self._ways[HOST_PORT] = TapPort(HOST_PORT, tap)
        self._hub.plug(self._ways[HOST_PORT])

    def _catch_up(self) -> None:
        """Have the hub take what has come by now."""
        for port in self._ways.values():
            port.catch_up()

    # What is there

    def _remove(self, port: str) -> None:
        self._forget(port)
        if self._ways.pop(port, None) is not None:
            self._hub.unplug(port)
        self._cables.pop(port).close()
        self._broken.pop(port, None)

    def _watch_over(self, port: str, interface: str) -> None:
        gone = partial(self._lose, port, interface)
        self._watched.setdefault(port, []).append(self._watch.watch(interface, gone))

    def _forget(self, port: str) -> None:
        self._watch.forget(self._watched.pop(port, ()))

    def _lose(self, port: str, interface: str) -> None:
        if port in self._broken:
            return
        part = Part.BRIDGE if port == HOST_PORT else Part.TAP
        what = "the bridge" if part is Part.BRIDGE else f"the tap of {port}"
        sentence = f"{what} on network {self._title!r} was removed by somebody: {interface}"
        self._broken[port] = Broken(part, sentence)
        self._told(self._broken[port])
