"""The wires of one machine: its cards, plugged in while it is on, and what its guest is told."""

from __future__ import annotations

import asyncio
import errno
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, ExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Protocol

from pytest_vmsandbox.errors import NetworkFailed, VmSandboxError
from pytest_vmsandbox.guest.channel import Channel
from pytest_vmsandbox.guest.furnishing import (
    FURNISHING_MAX,
    NOTHING,
    Furnishing,
    Interface,
    Lines,
    encode_furnishing,
)
from pytest_vmsandbox.guest.messages import ExecRequest
from pytest_vmsandbox.jail.off_loop import to_its_end
from pytest_vmsandbox.linux import OwnedFd
from pytest_vmsandbox.machine.settings_file import read_settings, write_settings
from pytest_vmsandbox.network.addresses import Address, placeholder_mac
from pytest_vmsandbox.network.hosts import PATH, render_block, render_hosts
from pytest_vmsandbox.network.topology import NAT
from pytest_vmsandbox.network.way_out import RESOLV_CONF, WayOut, render_resolv_conf
from pytest_vmsandbox.network.wire_kind import WireKind
from pytest_vmsandbox.vmm.launch import Wire as WireEnd
from pytest_vmsandbox.vmm.qemu import Card

# How long whoever comes waits for a guest that runs to note him, and how long that one is left
# alone then, in seconds, before scaling.
NEIGHBOUR_S = 5.0
RETRY_S = 1.0

_DRIVER = "virtio_net"


class Wires(Protocol):
    """A machine's cards, and what is at their other ends."""

    @property
    def spare(self) -> int:
        """How many cards it has behind those of its networks."""

    @property
    def networks(self) -> Sequence[str]:
        """The networks that the machine is for, in the order of its cards."""

    @property
    def addresses(self) -> Mapping[str, Address]:
        """What the machine is called, by network, once it is on them."""

    @property
    def kind(self) -> WireKind:
        """What they are made of."""

    @property
    def cards(self) -> Sequence[Card]:
        """The cards, not plugged in."""

    def plugged(self) -> AbstractAsyncContextManager[Sequence[Card]]:
        """The cards, each with a wire to hand to a VMM; unplugged on the way out."""

    async def unplug(self) -> None:
        """Let nothing pass any more, and end the host's connections to it; safe to repeat."""

    def plan_furnishing(self) -> Furnishing:
        """What `furnish` need not tell any more where the guest takes it with its identity."""

    def plan_resumption(self) -> Furnishing:
        """The same for `resume`."""

    async def furnish(self, channel: Channel) -> None:
        """Tell the guest, which has just been met, all that it must know of its cards."""

    async def resume(self, channel: Channel) -> None:
        """The same for a guest that knows it all, but has missed what happened meanwhile."""

    def stand_still(self) -> None:
        """Tell the guest nothing: it is paused."""

    async def catch_up(self) -> None:
        """Tell the guest, which was paused, whom it has missed."""

    async def connect(self, network: str, port: int, *, timeout_s: float) -> socket.socket:
        """A socket connected to the machine's port there; EOPNOTSUPP where we have no end of it."""

    async def leave(self) -> None:
        """Be on no network any more; safe to repeat."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LooseWires:
    """Cards at whose other ends there is nobody: those of a template, or none at all.

    Behind those for `networks` come `spare` ones, for which there is no use yet. They are taps
    where `open_tap` gives them, and sockets else.
    """

    networks: Sequence[str] = ()
    spare: int = 0
    addresses: Mapping[str, Address] = field(default_factory=dict)
    open_tap: Callable[[], Awaitable[OwnedFd]] | None = None

    @property
    def kind(self) -> WireKind:
        """Part of Wires."""
        return WireKind.SOCKET if self.open_tap is None else WireKind.TAP

    @property
    def cards(self) -> Sequence[Card]:
        """Part of Wires."""
        return _loose_cards(range(len(self.networks) + self.spare), self.kind)

    @asynccontextmanager
    async def plugged(self) -> AsyncIterator[Sequence[Card]]:
        """Part of Wires."""
        with ExitStack() as held:
            yield [await _plug_loosely(card, self.open_tap, held) for card in self.cards]

    async def unplug(self) -> None:
        """Part of Wires."""

    def plan_furnishing(self) -> Furnishing:
        """Part of Wires."""
        return NOTHING

    def plan_resumption(self) -> Furnishing:
        """Part of Wires."""
        return NOTHING

    async def furnish(self, channel: Channel) -> None:
        """Part of Wires: the cards are ready when a machine out of the template wants them."""
        if not self.networks:  # of those that are only spare nobody wants any
            return
        await load_driver(channel)
        for card in self.cards:
            with suppress(OSError):  # its guest has no driver: who wants the card is told
                await channel.set_addresses(Interface(name=card.mac))

    async def resume(self, channel: Channel) -> None:
        """Part of Wires."""

    def stand_still(self) -> None:
        """Part of Wires."""

    async def catch_up(self) -> None:
        """Part of Wires."""

    async def connect(self, network: str, port: int, *, timeout_s: float) -> socket.socket:  # noqa: ARG002 - there is none
        """Part of Wires: there is nobody."""
        raise OSError(errno.EOPNOTSUPP, f"no end of network {network!r} is here")

    async def leave(self) -> None:
        """Part of Wires."""


OpenTap = Callable[[], Awaitable[OwnedFd]]


def _loose_cards(numbers: range, kind: WireKind) -> list[Card]:
    return [Card(mac=placeholder_mac(at), tap=kind is WireKind.TAP) for at in numbers]


async def _plug_loosely(card: Card, open_tap: OpenTap | None, held: ExitStack) -> Card:
    """The card with a wire, held in `held`, at whose other end there is nobody."""
    if open_tap is None:
        ends = [held.enter_context(end) for end in socket.socketpair()]
        return replace(card, wire=WireEnd(ends[0].fileno()))
    return replace(card, wire=WireEnd(held.enter_context(await open_tap())))


class Switch(Protocol):
    """What wires need of a worker's networks."""

    @property
    def kind(self) -> WireKind:
        """What wires are made of."""

    async def plug(self, network: str, name: str) -> OwnedFd:
        """The machine's end of a new wire, for the caller to close."""

    async def unplug(self, network: str, name: str, address: Address) -> None:
        """Carry it no more, and end the host's connections to it."""

    async def loose_tap(self) -> OwnedFd:
        """A tap at whose other end there is nobody, for the caller to close."""

    async def connect(
        self, network: str, address: str, port: int, *, timeout_s: float
    ) -> socket.socket:
        """A socket connected to a machine, from the host's end."""

    def members(self, network: str) -> Mapping[str, Address]:
        """Who is on a network."""

    def way_out(self, network: str) -> WayOut | None:
        """How whoever is plugged in there reaches the world; None where he does not."""

    def neighbours(self, wires: PluggedWires) -> Sequence[PluggedWires]:
        """The machines that it reaches by a network."""

    async def left(self, wires: PluggedWires) -> None:
        """Its addresses are free again."""


class PluggedWires:
    """A machine's places on its networks; `addresses` by network, in the order of its cards.

    By `former` Ethernet addresses its guest may know its cards until it has been furnished. Behind
    them come `spare` ones, at whose other ends there is nobody.
    """

    def __init__(
        self,
        machine: str,
        addresses: Mapping[str, Address],
        switch: Switch,
        *,
        former: Sequence[str],
        spare: int = 0,
        time_scale: float,
    ) -> None:
        self.machine = machine
        self.spare = spare
        self.networks = tuple(addresses)
        self.addresses = addresses
        self._former = former
        self._switch = switch
        self._channel: Channel | None = None
        self._known: dict[str, Address] = {}  # whom the guest knows by name
        self._planned: dict[str, Address] = {}  # whom it knows if it takes what was planned
        self._writing = asyncio.Lock()
        self._time_scale = time_scale
        self._paused = False
        self._retrying: asyncio.Task[None] | None = None
        self._plugged: list[str] = []
        self._unplugging = asyncio.Lock()

    @property
    def kind(self) -> WireKind:
        """Part of Wires."""
        return self._switch.kind

    @property
    def cards(self) -> Sequence[Card]:
        """Part of Wires."""
        tap, first = self.kind is WireKind.TAP, len(self.addresses)
        cards = [Card(mac=address.mac, tap=tap) for address in self.addresses.values()]
        return [*cards, *_loose_cards(range(first, first + self.spare), self.kind)]

    @asynccontextmanager
    async def plugged(self) -> AsyncIterator[Sequence[Card]]:
        """Part of Wires."""
        with ExitStack() as held:
            cards = []
            planned = self.cards
            open_tap = self._switch.loose_tap if self.kind is WireKind.TAP else None
            try:
                for network, card in zip(self.addresses, planned, strict=False):
                    self._plugged.append(network)
                    wire = held.enter_context(await self._switch.plug(network, self.machine))
                    cards.append(replace(card, wire=WireEnd(wire)))
                spare = planned[len(cards) :]
                yield [*cards, *[await _plug_loosely(card, open_tap, held) for card in spare]]
            finally:
                self._channel, self._paused = None, False
                self._stop_retrying()
                await to_its_end(self.unplug())

    async def unplug(self) -> None:
        """Part of Wires."""
        async with self._unplugging:
            while self._plugged:
                network = self._plugged[-1]
                with suppress(NetworkFailed, OSError):  # it has ended, and carries nothing
                    await self._switch.unplug(network, self.machine, self.addresses[network])
                self._plugged.pop()

    def plan_furnishing(self) -> Furnishing:
        """Part of Wires."""
        resolvers = [
            Lines(path=str(RESOLV_CONF), text=render_resolv_conf(way_out.resolvers), are_all=True)
            for way_out in self._ways_out()
        ]
        return self._plan(interfaces=tuple(self._interfaces()), files=resolvers)

    def plan_resumption(self) -> Furnishing:
        """Part of Wires."""
        return self._plan()

    def _plan(
        self, *, interfaces: Sequence[Interface] = (), files: Sequence[Lines] = ()
    ) -> Furnishing:
        """These, and the names of all who are on the same networks now, if it is on any."""
        self._planned = self._members()
        if not self._planned:
            return NOTHING
        names = Lines(path=PATH, text=render_block(self._planned))
        furnishing = Furnishing(interfaces=interfaces, files=(*files, names))
        return furnishing if len(encode_furnishing(furnishing)) <= FURNISHING_MAX else NOTHING

    def _interfaces(self) -> Iterator[Interface]:
        """The cards, each with all that its guest is to have of it."""
        for former, (network, address) in zip(self._former, self.addresses.items(), strict=True):
            way_out = self._switch.way_out(network)
            yield Interface(
                name=f"{former},{address.mac}",
                addresses=(address.ipv4, address.ipv6),
                gateways=way_out.gateways if way_out else (),
            )

    def _ways_out(self) -> Iterator[WayOut]:
        for network in self.addresses:
            if (way_out := self._switch.way_out(network)) is not None:
                yield way_out

    async def furnish(self, channel: Channel) -> None:
        """Part of Wires: addresses, ways out, and the names of all who are on the same networks.

        NetworkFailed where the guest has no such card, or can't be given what belongs to it.
        Neighbours that run are told of this one.
        """
        self._channel, self._known = None, {}
        if not channel.hello.furnished:
            for interface in self._interfaces():
                await self._give_address(channel, interface)
            for way_out in self._ways_out():
                await self._give_resolvers(channel, way_out)
        await self.resume(channel)

    async def resume(self, channel: Channel) -> None:
        """Part of Wires."""
        self._channel, self._known = channel, self._planned if channel.hello.furnished else {}
        try:
            await self.introduce()
        except TimeoutError:
            raise
        except OSError as error:
            raise NetworkFailed(f"{self.machine} can't be told who is there: {error}") from error
        await asyncio.gather(*(other.meet() for other in self._switch.neighbours(self)))

    def stand_still(self) -> None:
        """Part of Wires."""
        self._paused = True
        self._stop_retrying()

    async def catch_up(self) -> None:
        """Part of Wires."""
        self._paused = False
        await self.meet()

    async def connect(self, network: str, port: int, *, timeout_s: float) -> socket.socket:
        """Part of Wires."""
        address = str(self.addresses[network].ip)
        return await self._switch.connect(network, address, port, timeout_s=timeout_s)

    async def leave(self) -> None:
        """Part of Wires."""
        await self._switch.left(self)

    async def introduce(self) -> None:
        """Have in the guest's list of names whoever is on its networks now."""
        async with self._writing:
            channel = self._channel
            while channel is not None and (members := self._members()) != self._known:
                text = render_hosts(await read_settings(channel, PATH), members)
                await write_settings(channel, PATH, text)
                self._known = members

    async def meet(self) -> None:
        """The same for a guest that is busy with other things: what goes wrong is its affair.

        One that does not get round to it in time is told again and again, without anybody waiting
        for it; one that is paused, when it goes on.
        """
        if self._paused or self._retrying is not None or await self._in_time():
            return
        if self._channel is not None and not self._paused and self._retrying is None:
            self._retrying = asyncio.create_task(self._retry())

    async def _in_time(self) -> bool:
        """Whether the guest was not too slow."""
        try:
            async with asyncio.timeout(NEIGHBOUR_S * self._time_scale):
                await self.introduce()
        except TimeoutError:
            return False
        except (VmSandboxError, OSError):
            pass
        return True

    async def _retry(self) -> None:
        late = True
        while late:
            await asyncio.sleep(RETRY_S * self._time_scale)
            late = not await self._in_time()
        self._retrying = None

    def _stop_retrying(self) -> None:
        if self._retrying is not None:
            self._retrying.cancel()
            self._retrying = None

    def _members(self) -> dict[str, Address]:
        found: dict[str, Address] = {}
        for network in self.addresses:
            for name, address in self._switch.members(network).items():
                if network != NAT or name == self.machine:  # there the others are not reached
                    found.setdefault(name, address)
        return found

    async def _give_address(self, channel: Channel, interface: Interface) -> None:
        try:
            await channel.set_addresses(interface)
        except OSError as error:
            if error.errno != errno.ENODEV:
                raise self._failed(interface, error) from error
            await load_driver(channel)
            try:
                await channel.set_addresses(interface)
            except OSError as again:
                raise self._failed(interface, again) from again

    async def _give_resolvers(self, channel: Channel, way_out: WayOut) -> None:
        text = render_resolv_conf(way_out.resolvers)
        try:
            await write_settings(channel, str(RESOLV_CONF), text)
        except OSError as error:
            raise NetworkFailed(f"{self.machine} can't be told its resolver: {error}") from error

    def _failed(self, interface: Interface, error: OSError) -> NetworkFailed:
        address = interface.addresses[0].ip
        _, _, mac = interface.name.partition(",")
        return NetworkFailed(
            f"{self.machine} can't be given the address {address} on its card {mac}: {error}"
        )


async def load_driver(channel: Channel) -> None:
    """Have the driver of our cards in the guest; it may be built in, or there already."""
    with suppress(OSError):  # no modprobe
        process = await channel.spawn(ExecRequest(argv=["modprobe", "-q", _DRIVER]))
        await process.wait()
